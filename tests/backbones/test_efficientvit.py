"""EfficientViT of MIT: exact sizes, timm's numbers in float64 with every weight random, initialisation, sentences."""

import jax.numpy as jnp
import numpy as np
import pytest

from maxmap.backbones.efficientvit import relu_attention
from maxmap.errors import UserError
from maxmap.layers import blocks
from maxmap.models import create_model
from tests import zoo
from tests.marks import cases
from tests.reference import import_timm
from tests.zoo import named, numbers

# Parameters with 1000 classes, channels of the stem's and the stages' maps.
ROWS = {
    "efficientvit_b0": (3_410_008, (8, 16, 32, 64, 128)),
    "efficientvit_b1": (9_102_024, (16, 32, 64, 128, 256)),
    "efficientvit_b2": (24_330_712, (24, 48, 96, 192, 384)),
    "efficientvit_b3": (48_646_056, (32, 64, 128, 256, 512)),
    "efficientvit_l1": (52_654_088, (32, 64, 128, 256, 512)),
    "efficientvit_l2": (63_707_016, (32, 64, 128, 256, 512)),
    "efficientvit_l3": (246_037_288, (64, 128, 256, 512, 1024)),
}
SIZE, CLASSES = (64, 96), 10  # height and width cannot be mixed up unseen
STEM, WIDTHS = 8, (8, 16, 16, 32)
# Our depths, and timm's of stem and stages: in the B series the block that halves the map counts in the first two.
DEPTHS = {"b": ((1, 1, 1, 1), (1, 2, 2, 1, 1)), "l": ((1, 1, 1, 1), (1, 1, 1, 1, 1))}


def small(series, **fields):
    """The first network of a series, narrow, with one block behind each that halves the map."""
    widths = {"stem_width": STEM, "embed_dim": WIDTHS, "depths": DEPTHS[series][0], "head_dim": 8}
    head = {"neck": (24, 40)}
    name = "efficientvit_b0" if series == "b" else "efficientvit_l1"
    return create_model(name, num_classes=CLASSES, head=head, **widths, **fields)


def timm_model(series):
    import_timm()
    from timm.models.efficientvit_mit import EfficientVit, EfficientVitLarge

    kind = EfficientVit if series == "b" else EfficientVitLarge
    return kind(widths=(STEM, *WIDTHS), depths=DEPTHS[series][1], head_dim=8, head_widths=(24, 40), num_classes=CLASSES)


def test_every_variant_has_a_row():
    assert set(ROWS) == named("efficientvit")


@pytest.mark.parametrize(("name", "row"), ROWS.items())
def test_parameters_and_features(name, row, plain_convolutions):
    params, channels = row
    zoo.assert_size(create_model(name), params, zoo.pyramid(224, (2, 4, 8, 16, 32), channels))


# The last bias in front of 1x1 convolutions, behind which batch norms subtract their means.
SHIFTS = {
    "b": ("stem.res0", "stages.0.blocks.0", "stages.0.blocks.1", "stages.3.blocks.1.local_module"),
    "l": ("stages.3.blocks.1.local_module",),
}


@pytest.mark.parametrize("series", cases(DEPTHS, long=["l"]))
def test_equals_timm(series, x64, plain_convolutions):
    idle = {f"{block}.main.point_conv.norm.bias" for block in SHIFTS[series]}
    zoo.assert_equals_timm(small(series), timm_model(series), numbers(0, 2, *SIZE, 3), slice(1, None), idle=idle)


@pytest.mark.parametrize("series", DEPTHS)
def test_initialisation_follows_timm(series, plain_convolutions):
    zoo.assert_initialised_like(small(series), SIZE, lambda: timm_model(series))


def test_relu_attention_is_a_mean_with_weights(x64):
    """Written out with one weight for each pair of a query and a key."""
    q, k, v = numbers(0, 3, 2, 5, 7, 4)
    weights = np.einsum("...nd,...md->...nm", np.maximum(q, 0), np.maximum(k, 0))
    wanted = weights @ v / (weights.sum(-1, keepdims=True) + 1e-5)
    zoo.assert_close(relu_attention(*map(jnp.asarray, (q, k, v))), wanted)


def test_relu_attention_computes_in_float32():
    """In float16 a sum over many pixels would be infinite."""
    q, k, v = (jnp.full((1, 4096, 4), value, jnp.float16) for value in (8, 8, 1))
    out = relu_attention(q, k, v)
    assert out.dtype == jnp.float16
    np.testing.assert_allclose(out, 1, rtol=1e-3)


def test_drop_path_rates(monkeypatch, plain_convolutions):
    """Over all residual branches, of which attention blocks have two: i / N of the rate, from 1 on."""
    rates = zoo.rates_of(small("b", drop_path=0.7), SIZE, monkeypatch, blocks)
    assert rates == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7])


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"depths": (1, 1, 2)}, "embed_dim, depths, blocks and expand need one entry for each stage"),
        ({"embed_dim": (16, 32, 60, 128)}, "16 channels per head do not divide 60 channels of stage 2; .* is 15"),
        ({"blocks": ("mb", "mb", "attn", "mb")}, "the block of stage 2 'attn' is not one of mb, fused, attention"),
        ({"stem_block": "mb"}, "stem_block 'mb' is not one of ds, res"),
        ({"activation": "hswish"}, "activation 'hswish' is not one of relu"),
    ],
)
def test_bad_fields(fields, sentence):
    with pytest.raises(UserError, match=sentence):
        create_model("efficientvit_b0", **fields)
