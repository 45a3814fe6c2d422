"""MobileNetV1 and its MAP form: exact sizes, the author's numbers in float64 with every weight random."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maxmap.convert.torch import from_torch, to_torch
from maxmap.errors import UserError
from maxmap.models import create_model
from tests.reference import fill, read_golden
from tests.zoo import QUICK, named, run

# Parameters with 1000 classes.
ROWS = {"mobilenet_v1": 4_231_976, "map_mobilenet_v1": 4_879_612}
CHANNELS = (64, 128, 256, 512, 1024)


def test_every_variant_has_a_row():
    assert set(ROWS) == named("mobilenet")


@pytest.mark.parametrize(("name", "params"), ROWS.items())
def test_parameters_and_features(name, params, plain_convolutions):
    model = create_model(name)
    x = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    (features, _), variables = jax.eval_shape(lambda x: model.init_with_output(jax.random.key(0), x, method=run), x)
    assert sum(leaf.size for leaf in jax.tree.leaves(variables["params"])) == params
    sizes = [(1, 224 // s, 224 // s, c) for s, c in zip((2, 4, 8, 16, 32), CHANNELS, strict=True)]
    assert [feature.shape for feature in features] == sizes
    assert model.backbone.num_features() == len(features)


@pytest.mark.parametrize("name", ["mobilenet_v1", "map_mobilenet_v1"])
def test_goldens(name, goldens, x64):
    weights, images, wanted = read_golden(goldens, name)
    model = create_model(name)
    variables = from_torch(weights, model)
    features, outputs = jax.jit(lambda v, x: model.apply(v, x, method=run))(variables, images)
    logits = wanted["head_logits"] if name.startswith("map_") else wanted["logits"][None]
    assert outputs["logits"].shape == logits.shape
    assert outputs["logits"].dtype == np.float64
    assert np.abs(outputs["logits"] - logits).max() < 1e-9 * logits.std()
    for i, feature in enumerate(features):
        means = wanted[f"feature_{i}"]
        assert np.abs(feature.mean((1, 2)) - means).max() < 1e-9 * np.abs(means).max()
    back = to_torch(variables, model)
    assert set(back) == {key for key in weights if not key.endswith(("num_batches_tracked", "bp_index"))}
    assert all(np.array_equal(back[key], weights[key]) for key in back)


def test_names_with_a_digit_of_their_own(plain_convolutions):
    """Tokens of another width have two first norms; their numbers are no list indices."""
    head = {"channels": 64, "token_channels": 32, "gram_channels": 16, "gram_groups": 4, "heads": 2}
    model = create_model("map_mobilenet_v1", embed_dim=(8,) * 5, head=head, num_classes=3)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 64, 64, 3)))
    keys = set(to_torch(jax.tree.map(lambda leaf: np.zeros(leaf.shape), shapes), model))
    attention = "fc.mmcap.mmcap.0.attention.0"
    assert {f"{attention}.norm1_1.weight", f"{attention}.norm1_2.bias", f"{attention}.attn.k2.weight"} <= keys
    assert {"layers.0.0.1.running_var", "layers.3.5.4.weight", "fc.mmcap.channel_convertor.1.weight"} <= keys


def test_initialisation_is_torchs_default(plain_convolutions):
    """U(+-1/sqrt(fan_in)) everywhere, also in the head."""
    model = create_model("map_mobilenet_v1")
    variables = jax.jit(model.init, compiler_options=QUICK)(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
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
    size = (64, 96)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, *size, 3)))
    named = to_torch(jax.tree.map(lambda leaf: np.zeros(leaf.shape), shapes), model)
    variables = from_torch({key: fill(key, value.shape).astype(np.float64) for key, value in named.items()}, model)
    random = np.random.default_rng(0)
    x, direction = random.standard_normal((4, *size, 3)), random.standard_normal((1, 4, 10))

    def loss(params):
        outputs, _ = model.apply(
            variables | {"params": params},
            x,
            train=True,
            rngs={"dropout": jax.random.key(0)},
            mutable=["batch_stats"],
        )
        return jnp.sum(outputs["logits"] * direction)

    gradient = jax.jit(jax.grad(loss), compiler_options=QUICK)(variables["params"])
    norms = {key: np.linalg.norm(value) for key, value in to_torch({"params": gradient}, model).items()}
    total = np.linalg.norm(list(norms.values()))
    assert np.isfinite(total)
    cancelled = {key for key, norm in norms.items() if norm < 1e-9 * total}
    assert cancelled == {f"fc.mmcap.mmcap.0.attention.0.attn.{name}.bias" for name in ("k", "w1")}


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"drop_path": 0.1}, "no residual branches, so drop_path can only be 0, not 0.1"),
        ({"depths": (1, 2)}, "one entry for each stage"),
        ({"head": {"gram_groups": 7}}, "7 gram_groups do not divide 18528 Gram values; the nearest that do is 6"),
        ({"head": {"init_scheme": "zeros"}}, "init_scheme 'zeros' is not one of torch, trunc_normal"),
    ],
)
def test_bad_fields(fields, sentence):
    with pytest.raises(UserError, match=sentence):
        create_model("map_mobilenet_v1", **fields)
