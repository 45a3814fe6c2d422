"""CSWin: exact sizes, the authors' numbers in float64 with every weight random, and a block written out in NumPy."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.nn import gelu

from maxmap.convert.torch import to_torch
from maxmap.errors import UserError
from maxmap.layers import blocks
from maxmap.layers.blocks import CSWinBlock
from maxmap.models import create_model
from tests import zoo
from tests.marks import cases
from tests.reference import read_golden
from tests.zoo import error, initial_values, named, numbers, quick, run

# Parameters with 1000 classes, image sizes, channels of the first stage.
MODELS = {
    "64_12211_tiny": (22_320_552, (224,), 64),
    "64_24322_small": (34_643_304, (224,), 64),
    "96_24322_base": (77_382_184, (224, 384), 96),
    "144_24322_large": (173_262_664, (224, 384), 144),
}
ROWS = {
    f"CSWin_{name}_{size}": (params, size, channels)
    for name, (params, sizes, channels) in MODELS.items()
    for size in sizes
}
SIZE, CLASSES = (64, 96), 10  # height and width cannot be mixed up unseen
SMALL = {
    "image_size": SIZE,
    "embed_dim": (16, 24, 32, 48),
    "heads": (2, 2, 4, 3),
    "depths": (1, 1, 2, 1),
    "num_classes": CLASSES,
}


def test_every_variant_has_a_row():
    assert set(ROWS) == named("cswin")


@pytest.mark.parametrize("name", ROWS)
def test_parameters_and_features(name, plain_convolutions):
    params, size, channels = ROWS[name]
    widths = [channels * factor for factor in (1, 1, 2, 4, 8)]
    model = create_model(name)
    assert model.backbone.image_size == size
    zoo.assert_size(model, params, zoo.pyramid(size, (4, 4, 8, 16, 32), widths))


def test_golden(goldens, x64, plain_convolutions):
    golden = read_golden(goldens, "CSWin_64_12211_tiny_224")
    model = create_model("CSWin_64_12211_tiny_224")
    zoo.assert_same_names(zoo.assert_equals_golden(model, golden), model, golden[0])


def stripes_by_hand(q, k, v, p, heads, window):
    """Attention and position encoding in every window of a map, one window and one head at a time."""
    (h, w), d = window, v.shape[-1] // heads
    out = np.zeros_like(v)
    for b in range(v.shape[0]):
        for top in range(0, v.shape[1], h):
            for left in range(0, v.shape[2], w):
                here = (b, slice(top, top + h), slice(left, left + w))
                padded = np.pad(v[here], ((1, 1), (1, 1), (0, 0)))
                for i in range(3):
                    for j in range(3):
                        out[here] += padded[i : i + h, j : j + w] * p["get_v"]["kernel"][i, j, 0]
                out[here] += p["get_v"]["bias"]
                for head in range(heads):
                    part = (*here, slice(head * d, (head + 1) * d))
                    tokens = [x[part].reshape(h * w, d) for x in (q, k, v)]
                    weights = np.exp(tokens[0] @ tokens[1].T * d**-0.5)
                    out[part] += (weights / weights.sum(1, keepdims=True) @ tokens[2]).reshape(h, w, d)
    return out


def norm_by_hand(x, p):
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt(x.var(-1, keepdims=True) + 1e-5) * p["scale"] + p["bias"]


def linear_by_hand(x, p):
    return x @ p["kernel"] + p["bias"]


@pytest.mark.parametrize("stripe", [(2, 3), None])
def test_block_by_hand(stripe, x64):
    """Vertical stripes for the first half of the channels, horizontal ones for the second; one branch without them."""
    x, heads = numbers(0, 2, 4, 6, 8), 4
    block = CSWinBlock(heads, stripe)
    leaves, tree = jax.tree.flatten(jax.eval_shape(block.init, jax.random.key(0), x)["params"])
    p = jax.tree.unflatten(tree, [numbers(10 + i, *leaf.shape) for i, leaf in enumerate(leaves)])
    qkv = np.split(linear_by_hand(norm_by_hand(x, p["norm1"]), p["qkv"]), 3, axis=-1)
    if stripe == (2, 3):
        first, second = ([part[..., half] for part in qkv] for half in (slice(0, 4), slice(4, 8)))
        y = np.concatenate(
            [
                stripes_by_hand(*first, p["attns_0"], 2, (4, 3)),
                stripes_by_hand(*second, p["attns_1"], 2, (2, 6)),
            ],
            axis=-1,
        )
    else:
        assert "attns_1" not in p
        y = stripes_by_hand(*qkv, p["attns_0"], heads, (4, 6))
    y = x + linear_by_hand(y, p["proj"])
    hidden = np.asarray(gelu(linear_by_hand(norm_by_hand(y, p["norm2"]), p["mlp"]["fc1"]), approximate=False))
    ours = quick(lambda p, x: block.apply({"params": p}, x), p, x)
    assert error(ours, y + linear_by_hand(hidden, p["mlp"]["fc2"])) < 1e-12


def test_stripes_follow_the_image_size(plain_convolutions):
    """A stage keeps its two branches where the image is larger or not square."""
    small = create_model("CSWin_64_12211_tiny_224", **SMALL)
    large = create_model("CSWin_64_12211_tiny_224", **SMALL | {"image_size": (128, 192)})
    shapes = [
        jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, *model.backbone.image_size, 3)))
        for model in (small, large)
    ]
    assert shapes[0] == shapes[1]
    # Made for 64 x 96, stage 2 has stripes of 2 and 3 pixels; its maps at 128 x 192 have 8 x 12.
    features, _ = jax.eval_shape(lambda v, x: small.apply(v, x, method=run), shapes[0], jnp.zeros((1, 128, 192, 3)))
    assert features[3].shape == (1, 8, 12, 32)
    with pytest.raises(ValueError, match=r"image width 128 .* stripes of 3 do not divide; .* is 140"):
        jax.eval_shape(small.apply, shapes[0], jnp.zeros((1, 128, 128, 3)))


@pytest.mark.parametrize("deep_stem", cases([False, True], long=[False]))  # test_grid.py has the other stem
def test_gradients_reach_every_parameter(deep_stem, x64, plain_convolutions):
    model = create_model("CSWin_64_12211_tiny_224", deep_stem=deep_stem, taps=1, **SMALL)
    assert zoo.idle_parameters(model, SIZE, least=1e-6) == set()


def test_initialisation(plain_convolutions):
    """Linear maps 0.02 wide with zero biases, convolutions by torch's default."""
    model = create_model("CSWin_64_12211_tiny_224", **SMALL | {"depths": (1, 1, 1, 1)})
    variables = initial_values(model, jnp.zeros((1, *SIZE, 3)))
    leaves = to_torch(variables, model)
    for key, value in leaves.items():
        weight = leaves[re.sub(r"bias$", "weight", key)]
        if weight.ndim == 4:
            bound = np.prod(weight.shape[1:]) ** -0.5
            assert 0.5 * bound < np.abs(value).max() <= bound, key
        elif value.ndim == 2:
            assert value.std() == pytest.approx(0.02, rel=5 / value.size**0.5), key
        else:
            assert (value == (key.endswith("weight") and weight.ndim == 1)).all(), key


def test_drop_path_rates(monkeypatch, plain_convolutions):
    """They rise to the full rate over all blocks, both branches of a block alike."""
    model = create_model("CSWin_64_12211_tiny_224", drop_path=0.6, **SMALL)
    assert zoo.rates_of(model, SIZE, monkeypatch, blocks) == pytest.approx([0.15 * (i // 2) for i in range(10)])


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"image_size": 240}, "image height 240 gives a map of 15 pixels .* stripes of 7 do not divide; .* is 224"),
        ({"split_size": (1, 3, 7)}, "28 pixels in stage 1, which stripes of 3 do not divide; .* works is 216"),
        ({"split_size": (1, 2, 7, 7)}, "one entry for each stage, split_size one less"),
        (
            {"heads": (2, 4, 7, 16)},
            "7 heads do not divide 256 channels of stage 2 by a multiple of 2; .* do is 8",
        ),
        ({"taps": 21}, "21 taps do not fit inside of a third stage of 21 blocks; the most is 20"),
    ],
)
def test_bad_fields(fields, sentence):
    with pytest.raises(UserError, match=sentence):
        create_model("CSWin_64_12211_tiny_224", **fields)
