"""MobileNetV1 and its MAP form: exact sizes, the authors' and timm's numbers in float64 with every weight random."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maxmap.convert.torch import to_torch
from maxmap.errors import UserError
from maxmap.models import create_model
from maxmap.shapes import eval_shape_of_init
from tests.marks import cases
from tests.reference import import_timm, read_golden
from tests.zoo import (
    assert_equals_golden,
    assert_equals_timm,
    assert_same_names,
    assert_size,
    idle_parameters,
    initial_values,
    named,
    numbers,
    pyramid,
)

# Parameters with 1000 classes, and the width multiplier. Howard et al.'s table 6: 4.2, 2.6, 1.3 and 0.5 million.
ROWS = {
    "mobilenet_v1": (4_231_976, 1),
    "mobilenet_v1_025_tf": (470_072, 0.25),
    "mobilenet_v1_050_tf": (1_331_592, 0.5),
    "mobilenet_v1_075_tf": (2_585_560, 0.75),
    "mobilenet_v1_100_tf": (4_231_976, 1),
    "mobilenet_v1_025_leaky": (470_072, 0.25),
    "mobilenetv1_100": (4_231_976, 1),
    "mobilenetv1_100h": (5_282_600, 1),
    "mobilenetv1_125": (6_270_840, 1.25),
    "map_mobilenet_v1": (4_879_612, 1),
}
CHANNELS = (64, 128, 256, 512, 1024)


def test_every_variant_has_a_row():
    assert set(ROWS) == named("mobilenet")


@pytest.mark.parametrize("name", ROWS)
def test_parameters_and_features(name, plain_convolutions):
    parameters, width = ROWS[name]
    maps = pyramid(224, (2, 4, 8, 16, 32), [int(width * channels) for channels in CHANNELS])
    assert_size(create_model(name), parameters, [*maps, *([(1, 7, 7, 1024)] if name.endswith("h") else [])])


def test_equals_timm(x64):
    """An eighth as wide; with timm's convolution behind the stages, which the other two of its models lack."""
    import_timm()
    from timm.models.efficientnet import _gen_mobilenet_v1

    reference = _gen_mobilenet_v1("mobilenetv1_100h", 0.125, head_conv=True, num_classes=7)
    model = create_model("mobilenetv1_100h", stem_width=8, embed_dim=(8, 16, 32, 64, 128), num_classes=7)
    assert_equals_timm(model, reference, numbers(0, 2, 40, 48, 3), slice(0, 5), dialect="timm")


@pytest.mark.parametrize("name", cases(["mobilenet_v1", "map_mobilenet_v1"], long=["mobilenet_v1"]))
def test_goldens(name, goldens, x64):
    golden = read_golden(goldens, name)
    model = create_model(name)
    assert_same_names(assert_equals_golden(model, golden, level=1), model, golden[0])


def test_names_with_a_digit_of_their_own(plain_convolutions):
    """Tokens of another width have two first norms; their numbers are no list indices."""
    head = {"channels": 64, "token_channels": 32, "gram_channels": 16, "gram_groups": 4, "heads": 2}
    model = create_model("map_mobilenet_v1", embed_dim=(8,) * 5, head=head, num_classes=3)
    shapes = eval_shape_of_init(model.init, jax.random.key(0), jnp.zeros((1, 64, 64, 3)))
    keys = set(to_torch(jax.tree.map(lambda leaf: np.zeros(leaf.shape), shapes), model))
    attention = "fc.mmcap.mmcap.0.attention.0"
    assert {f"{attention}.norm1_1.weight", f"{attention}.norm1_2.bias", f"{attention}.attn.k2.weight"} <= keys
    assert {"layers.0.0.1.running_var", "layers.3.5.4.weight", "fc.mmcap.channel_convertor.1.weight"} <= keys


def test_initialisation_is_torchs_default(plain_convolutions):
    """U(+-1/sqrt(fan_in)) everywhere, also in the head."""
    model = create_model("map_mobilenet_v1")
    variables = initial_values(model, jnp.zeros((1, 32, 32, 3)))
    leaves = to_torch({"params": variables["params"]}, model)
    for key, value in leaves.items():
        weight = leaves[re.sub(r"bias$", "weight", key)]
        if weight.ndim == 1:
            assert (value == key.endswith("weight")).all(), key
            continue
        bound = np.prod(weight.shape[1:]) ** -0.5
        assert np.abs(value).max() <= bound, key
        if value.size > 1000:
            assert np.abs(value).max() > 0.99 * bound, key
            assert value.mean() == pytest.approx(0, abs=5 * bound / value.size**0.5), key
            assert value.std() == pytest.approx(bound / 3**0.5, rel=0.1), key


@pytest.mark.long
def test_gradients_reach_every_parameter(x64, plain_convolutions):
    """But the two biases that a softmax cancels."""
    model = create_model(
        "map_mobilenet_v1",
        stem_width=8,
        embed_dim=(8, 16, 16, 32, 64),
        depths=(1, 2, 1, 1, 1),
        num_classes=10,
        head={"channels": 48, "gram_channels": 32, "gram_groups": 8, "heads": 2},
    )
    cancelled = {f"fc.mmcap.mmcap.0.attention.0.attn.{name}.bias" for name in ("k", "w1")}
    assert idle_parameters(model, (64, 96), batch=4) == cancelled


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"drop_path": 0.1}, "no residual branches, so drop_path can only be 0, not 0.1"),
        ({"depths": (1, 2)}, "one entry for each stage"),
        ({"padding": "valid"}, "padding 'valid' is not one of one, same"),
        ({"head": {"gram_groups": 7}}, "7 gram_groups do not divide 18528 Gram values; the nearest that do is 6"),
        ({"head": {"init_scheme": "zeros"}}, "init_scheme 'zeros' is not one of torch, trunc_normal"),
    ],
)
def test_bad_fields(fields, sentence):
    with pytest.raises(UserError, match=sentence):
        create_model("map_mobilenet_v1", **fields)
