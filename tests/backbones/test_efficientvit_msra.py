"""EfficientViT of MSRA: exact sizes, timm's numbers in float64 with every weight random, initialisation, sentences."""

import jax
import jax.numpy as jnp
import pytest

from maxmap.errors import UserError
from maxmap.layers import blocks
from maxmap.models import create_model
from maxmap.shapes import eval_shape_of_init
from tests import zoo
from tests.reference import import_timm
from tests.zoo import named, numbers

# Parameters with 1000 classes, channels of the stem's and the stages' maps.
ROWS = {
    "efficientvit_m0": (2_349_436, (64, 64, 128, 192)),
    "efficientvit_m1": (2_980_560, (128, 128, 144, 192)),
    "efficientvit_m2": (4_187_554, (128, 128, 192, 224)),
    "efficientvit_m3": (6_900_722, (128, 128, 240, 320)),
    "efficientvit_m4": (8_804_228, (128, 128, 256, 384)),
    "efficientvit_m5": (12_473_772, (192, 192, 288, 384)),
}
# Maps of 8 x 10 and 4 x 5 pixels: windows of 5, for which the height is padded, and of 4, for which the width is.
SIZE, CLASSES = (128, 160), 10
FIELDS = {"embed_dim": (16, 24), "depths": (1, 1), "key_dim": 8, "kernels": (5, 3, 3), "window": 5}
HEADS = (2, 3)


def small(**fields):
    return create_model("efficientvit_m0", image_size=SIZE, num_classes=CLASSES, heads=HEADS, **FIELDS, **fields)


def timm_model():
    import_timm()
    from timm.models.efficientvit_msra import EfficientVitMsra

    return EfficientVitMsra(
        img_size=SIZE,
        num_classes=CLASSES,
        embed_dim=FIELDS["embed_dim"],
        key_dim=(FIELDS["key_dim"],) * 2,
        depth=FIELDS["depths"],
        num_heads=HEADS,
        window_size=(FIELDS["window"],) * 2,
        kernels=FIELDS["kernels"],
    )


def test_every_variant_has_a_row():
    assert set(ROWS) == named("efficientvit_msra")


@pytest.mark.parametrize(("name", "row"), ROWS.items())
def test_parameters_and_features(name, row, plain_convolutions):
    params, channels = row
    shapes = [(1, side, side, c) for side, c in zip((14, 14, 7, 4), channels, strict=True)]
    zoo.assert_size(create_model(name), params, shapes)


# The last biases in front of 1x1 convolutions or the head, behind which batch norms subtract their means.
SHIFTS = {
    *("stages.1.downsample.res1.0.m.bn.bias", "stages.1.downsample.res1.1.m.pw2.bn.bias"),
    *("stages.1.blocks.0.dw1.m.bn.bias", "stages.1.blocks.0.ffn1.m.pw2.bn.bias"),
}


def test_equals_timm(x64, plain_convolutions):
    """The embedding is normalised here, as in other families."""
    x = numbers(0, 2, *SIZE, 3)
    zoo.assert_equals_timm(small(), timm_model(), x, slice(1, None), embedding=False, idle=SHIFTS)


def test_initialisation_follows_timm(plain_convolutions):
    zoo.assert_initialised_like(small(), SIZE, timm_model)


def test_other_sizes_are_padded():
    """The windows, and so the tables, stay those of the model's own size."""
    model = small()
    variables = eval_shape_of_init(model.init, jax.random.key(0), jnp.zeros((1, *SIZE, 3)))
    for height, width, maps in ((32, 400, (2, 25)), (100, 100, (7, 7))):
        shape = jax.ShapeDtypeStruct((1, height, width, 3), jnp.float32)
        features = jax.eval_shape(lambda v, x: model.apply(v, x, method="features"), variables, shape)
        assert features[1].shape == (1, *maps, 16)


def test_drop_path_rates(monkeypatch, plain_convolutions):
    """Over all residual branches, four of each downsampling and five of each block."""
    rates = zoo.rates_of(small(drop_path=0.26), SIZE, monkeypatch, blocks)
    assert rates == pytest.approx([0.02 * i for i in range(14)])


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"depths": (1, 2)}, "embed_dim, depths and heads need one entry for each stage"),
        ({"heads": (4, 4, 5)}, "5 heads do not divide 192 channels of stage 2; the nearest that do is 4"),
        ({"kernels": (5, 5, 5)}, "kernels has 3 entries, and a stage has 4 heads"),
        ({"kernels": (5, 5, 4, 3)}, "a kernel of size 4 would shift the map; the sizes have to be odd"),
        ({"embed_dim": (60, 128, 192)}, "embed_dim 60 of the stem is not a multiple of 8; the nearest is 64"),
        ({"image_size": (224, 15)}, "image side 15 is too small; the least is 16"),
    ],
)
def test_bad_fields(fields, sentence):
    with pytest.raises(UserError, match=sentence):
        create_model("efficientvit_m0", **fields)
