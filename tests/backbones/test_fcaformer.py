"""FcaFormer: exact sizes, the paper's equations written out in PyTorch, any image size, sentences.

There is no reference implementation: the authors' code has no licence.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from maxmap.backbones import fcaformer
from maxmap.convert.torch import to_torch
from maxmap.errors import UserError
from maxmap.models import create_model
from maxmap.optim import decay_mask
from maxmap.shapes import eval_shape_of_init
from tests import zoo
from tests.zoo import named, nchw, nhwc, numbers

# Parameters with 1000 classes, the paper's in millions, channels of the stem's and the stages' maps.
ROWS = {
    "fcaformer_l1": (6_242_600, 6.2, (64, 64, 128, 192, 320)),
    "fcaformer_l2": (16_468_040, 16.3, (96, 96, 192, 320, 480)),
    "fcaformer_l3": (27_991_080, 27.9, (96, 96, 192, 320, 480)),
    "fcaformer_l4": (65_306_920, 65.6, (128, 128, 256, 480, 768)),
}
HEIGHT, WIDTH = SIZE = (24, 40)  # maps of 6 x 10 and, merged, of 2 x 4
FIELDS = {"embed_dim": (8, 16), "depths": (1, 3), "blocks": ("conv", "attention"), "head_dim": 8}


def small(**fields):
    return create_model("fcaformer_l1", image_size=SIZE, num_classes=5, **FIELDS, **fields)


def test_every_variant_has_a_row():
    assert set(ROWS) == named("fcaformer")


@pytest.mark.parametrize(("name", "row"), ROWS.items())
def test_parameters_and_features(name, row, plain_convolutions):
    params, published, channels = row
    assert params / 1e6 == pytest.approx(published, rel=0.011)  # the widths are chosen so, see docs/references.md
    zoo.assert_size(create_model(name), params, zoo.pyramid(224, (4, 4, 8, 16, 32), channels))


def equations(x, weights, heads, stride):
    """A stage of attention blocks behind its strided convolution, `[B, C, H, W]`, as the module's docstrings say."""
    import torch
    from torch.nn import functional as F

    def linear(x, name):
        return F.linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"])

    def norm(x, name):
        x = F.layer_norm(x.movedim(1, -1), x.shape[1:2], weights[f"{name}.weight"], weights[f"{name}.bias"], 1e-6)
        return x.movedim(-1, 1)

    def conv(x, name, **options):
        groups = x.shape[1] // weights[f"{name}.weight"].shape[1]
        return F.conv2d(x, weights[f"{name}.weight"], weights[f"{name}.bias"], groups=groups, **options)

    def tokens(x):
        return x.flatten(2).transpose(1, 2)

    def split(x):
        return x.unflatten(2, (heads, -1)).transpose(1, 2)

    x = conv(norm(x, "downsample.0"), "downsample.1", stride=2)
    cross = []
    for i in range(FIELDS["depths"][1]):
        block = f"blocks.{i}"
        own = tokens(norm(x, f"{block}.norm1"))
        scaled = [part * weights[f"{block}.attn.cross_scale"][j] for j, part in enumerate(cross)]
        key, value = linear(torch.cat([own, *scaled], 1), f"{block}.attn.kv").chunk(2, -1)
        y = F.scaled_dot_product_attention(split(linear(own, f"{block}.attn.q")), split(key), split(value))
        y = linear(y.transpose(1, 2).flatten(2), f"{block}.attn.proj")
        x = x + y.transpose(1, 2).unflatten(2, x.shape[2:])
        y = norm(x, f"{block}.norm2")
        if i + 1 < FIELDS["depths"][1]:
            cross.append(tokens(conv(y, f"{block}.merge", stride=stride, padding=2)))
        y = tokens(conv(y, f"{block}.enhance", padding=1))
        y = linear(F.gelu(linear(y, f"{block}.mlp.fc1")), f"{block}.mlp.fc2")
        x = x + y.transpose(1, 2).unflatten(2, x.shape[2:])
    return x


@pytest.mark.parametrize("stride", [1, 3])
def test_equals_the_equations(stride, x64, plain_convolutions):
    """With stride 1 the cross tokens are as many as a block's own."""
    import torch

    model = small(merge_stride=stride)
    variables, images = zoo.filled(model, SIZE), numbers(0, 2, *SIZE, 3)
    features = zoo.quick(lambda v, x: model.apply(v, x, method="features"), variables, images)
    features = [np.array(x) for x in features]
    stage = "stages.1."
    weights = {
        key.removeprefix(stage): torch.from_numpy(value)
        for key, value in to_torch(variables, model).items()
        if key.startswith(stage)
    }
    with torch.no_grad():
        wanted = equations(nchw(features[1]), weights, heads=2, stride=stride)
    assert zoo.error(features[2], nhwc(wanted)) < 1e-12


def test_scale_factors_do_not_decay():
    params = eval_shape_of_init(small().init, jax.random.key(0), jnp.zeros((1, *SIZE, 3)))["params"]
    decays = traverse_util.flatten_dict(decay_mask(params), sep="/")
    factors = {path for path in decays if path.endswith("cross_scale")}
    assert len(factors) == 2 and not any(decays[path] for path in factors)
    assert {path for path, leaf in traverse_util.flatten_dict(params, sep="/").items() if leaf.ndim > 1} == {
        *factors,
        *(path for path, value in decays.items() if value),
    }


def test_other_sizes_take_the_same_weights():
    model = small()
    variables = eval_shape_of_init(model.init, jax.random.key(0), jnp.zeros((1, *SIZE, 3)))
    shape = jax.ShapeDtypeStruct((1, 8, 100, 3), jnp.float32)
    features = jax.eval_shape(lambda v, x: model.apply(v, x, method="features"), variables, shape)
    assert [feature.shape for feature in features] == [(1, 2, 25, 8), (1, 2, 25, 8), (1, 1, 12, 16)]


def test_stochastic_depth(monkeypatch, plain_convolutions):
    """Rising over the blocks; an attention block has two branches of one rate."""
    rates = zoo.rates_of(small(drop_path=0.3), SIZE, monkeypatch, fcaformer)
    assert rates == pytest.approx([0.0, 0.1, 0.1, 0.2, 0.2, 0.3, 0.3])
    zoo.assert_drops_in_training_only(small(drop_path=0.3), SIZE)


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"depths": (1, 2)}, "embed_dim, depths and blocks need one entry for each stage"),
        ({"blocks": ("conv", "conv", "conv", "window")}, "blocks 'window' is not one of conv, attention"),
        ({"head_dim": 48}, "48 channels of a head do not divide 320 channels of stage 3; the nearest that do is 40"),
        ({"merge_kernel": 4}, "merge_kernel 4 is not an odd number; the next is 5"),
        ({"image_size": 31}, "image side 31 is too small for 4 stages; the least is 32"),
    ],
)
def test_bad_fields(fields, sentence):
    with pytest.raises(UserError, match=sentence):
        create_model("fcaformer_l1", **fields)
