"""Images of any size: maps that windows do not divide are padded, and the padding changes nothing."""

import functools
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from einops import rearrange

from maxmap import checkpoint
from maxmap.__main__ import main
from maxmap.backbones import fastervit
from maxmap.backbones.maxxvit import attention
from maxmap.backbones.maxxvit.attention import TransformerFields, WindowAttention
from maxmap.errors import UserError
from maxmap.inference import preprocess
from maxmap.layers.blocks import StripeAttention
from maxmap.layers.primitives import Conv
from maxmap.models import create_model
from maxmap.shapes import eval_shape_of_init
from tests.marks import cases
from tests.test_grid import BACKBONES, WINDOWED, made, small
from tests.tiny import CLASSES, preprocessing, write_folder
from tests.zoo import QUICK, quick


def noise(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def random_variables(module, *args, **kwargs):
    """Variables of a module with every leaf random."""
    shapes = eval_shape_of_init(lambda: module.init(jax.random.key(0), *args, **kwargs))

    def value(path, leaf):
        values = 0.3 * noise(*leaf.shape, seed=leaf.size)
        return np.abs(values) if path[-1].key == "var" else values

    return jax.tree_util.tree_map_with_path(value, shapes)


@pytest.mark.parametrize("kind", ["window", "grid"])
def test_attention_of_a_window_reads_its_real_pixels_alone(x64, kind):
    """By hand: every window attends over those of its pixels that lie in the map, with their part of the bias."""
    height, width, window, heads, channels = 5, 7, (2, 3), 2, 8
    module = WindowAttention(channels, channels, window, TransformerFields(head_dim=4), "vit_eff")
    x = noise(2, height, width, channels)
    variables = random_variables(module, x, train=False, kind=kind)
    found = module.apply(variables, x, train=False, kind=kind)
    weights = variables["params"]
    qkv = x @ weights["qkv"]["kernel"] + weights["qkv"]["bias"]
    qkv = rearrange(qkv, "b h w (n three d) -> three n b h w d", n=heads, three=3)  # head first
    table = weights["rel_pos"]["relative_position_bias_table"]
    rows, columns = (-(-side // step) for side, step in zip((height, width), window, strict=True))  # windows
    wanted = np.zeros_like(x)
    for i, j in itertools.product(range(rows), range(columns)):
        if kind == "window":
            inside = [(i * window[0] + p, j * window[1] + q, p, q) for p, q in np.ndindex(window)]
        else:
            inside = [(p * rows + i, q * columns + j, p, q) for p, q in np.ndindex(window)]
        inside = [pixel for pixel in inside if pixel[0] < height and pixel[1] < width]
        y, x_, p, q = np.transpose(inside)
        query, key, value = qkv[:, :, :, y, x_]  # [heads, B, N, d]
        offsets = (p[:, None] - p + window[0] - 1) * (2 * window[1] - 1) + q[:, None] - q + window[1] - 1
        logits = np.einsum("hbqd,hbkd->hbqk", query, key) / 2 + np.moveaxis(table[offsets], -1, 0)[:, None]
        shares = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
        wanted[:, y, x_] = rearrange(np.einsum("hbqk,hbkd->hbqd", shares, value), "h b n d -> b n (h d)")
    wanted = wanted @ weights["proj"]["kernel"] + weights["proj"]["bias"]
    np.testing.assert_allclose(found, wanted, rtol=1e-12, atol=1e-12)


def test_a_stripe_that_ends_in_the_padding_is_a_narrower_stripe(x64):
    """Its attention and its convolution see what they would see if the stripe ended with the map."""
    q, k, v = noise(3, 2, 5, 7, 8)
    variables = random_variables(StripeAttention(2, (5, 4)), q, k, v)
    found = StripeAttention(2, (5, 4)).apply(variables, q, k, v)
    parts = [
        StripeAttention(2, (5, part.stop - part.start)).apply(variables, q[:, :, part], k[:, :, part], v[:, :, part])
        for part in (slice(0, 4), slice(4, 7))
    ]
    np.testing.assert_allclose(found, np.concatenate(parts, axis=2), rtol=1e-12, atol=1e-12)


def test_carrier_tokens_are_means_of_real_pixels(x64):
    """Of a map 5 x 7 as part of 8 x 8, by squares of 2; a token without pixels is zero, and no key."""
    x = noise(1, 5, 7, 3)
    module = fastervit.Tokenizer(side=4, size=8)
    variables = random_variables(module, x)
    convolved = Conv(3, 3, padding=1, groups=3).apply({"params": variables["params"]["pos_embed"]}, x)
    wanted = np.zeros((4, 4, 3))
    for i, j in itertools.product(range(3), range(4)):
        wanted[i, j] = convolved[0, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2].mean(axis=(0, 1))
    found = module.apply(variables, x).reshape(4, 4, 3)
    np.testing.assert_allclose(found, wanted, rtol=1e-12, atol=1e-12)
    keys, token_keys = fastervit.real_keys((5, 7), windows=2, window=4, carriers=2)
    assert np.array_equal(token_keys.reshape(4, 4), np.repeat([[True], [True], [True], [False]], 4, axis=1))
    assert np.array_equal(keys[0], [True] * 20)  # above and left: 4 carriers and 4 x 4 pixels
    assert np.array_equal(keys[3], [1, 1, 0, 0] + [1, 1, 1, 0] + 12 * [0])  # below and right: 1 x 3 of the pixels


@pytest.mark.parametrize("family", cases(["fastervit", "maxxvit"], long=["maxxvit"]))
def test_what_lies_in_the_padding_changes_no_logit(x64, family, monkeypatch):
    """Not in one bit. CSWin's convolution needs zeros there, as at the border of any map: see its own test."""
    model = small(family, "map", pad=True)
    images = noise(2, 100, 140, 3)
    shapes = made(model.backbone, images)
    variables = {key: {"backbone": shapes[1][key], "head": made(model.head, shapes[0])[1][key]} for key in shapes[1]}
    padded = []

    @functools.partial(jax.jit, compiler_options=QUICK)
    def logits(level):
        def pad_map(x, size):
            padded.append(x.shape[1:3] != tuple(size))
            content = level * jnp.asarray(noise(x.shape[0], *size, x.shape[3]))
            return content.at[:, : x.shape[1], : x.shape[2]].set(x)

        for module in (attention, fastervit):
            monkeypatch.setattr(module, "pad_map", pad_map)
        return model.apply(variables, images)["logits"]

    assert np.array_equal(logits(0.0), logits(1e3))
    assert any(padded)
    monkeypatch.undo()
    np.testing.assert_allclose(logits(0.0), quick(lambda: model.apply(variables, images)["logits"]), rtol=1e-9)


@pytest.mark.parametrize("family", WINDOWED)
def test_sizes_that_windows_divide_compute_the_same_program(family):
    plain, padding = (small(family, pad=pad) for pad in (False, True))
    images = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
    variables = eval_shape_of_init(plain.init, jax.random.key(0), images)
    programs = {str(jax.make_jaxpr(model.apply)(variables, images)) for model in (plain, padding)}
    assert len(programs) == 1


@pytest.mark.parametrize("family", cases(WINDOWED, long=["fastervit"]))
def test_every_pixel_of_a_small_or_oblong_image_counts(family, x64, plain_convolutions):
    """Every row and column of pixels has a gradient, and all is finite; test_grid.py has the other families."""
    model = small(family, "map", pad=True)
    images = noise(1, 52, 76, 3)
    variables = random_variables(model, images)

    def loss(params, images):
        logits = model.apply({**variables, "params": params}, images)["logits"]
        return jnp.sum(logits * noise(*logits.shape)), logits

    gradients = jax.grad(loss, argnums=(0, 1), has_aux=True)
    (of_params, of_images), logits = quick(gradients, variables["params"], images)
    assert all(np.any(of_images, axis=axes).all() for axes in ((0, 2, 3), (0, 1, 3)))
    smaller = quick(loss, variables["params"], noise(1, 40, 40, 3))[1]
    assert all(np.isfinite(leaf).all() for leaf in (logits, smaller, of_images, *jax.tree.leaves(of_params)))


@pytest.mark.parametrize("family", WINDOWED)
def test_without_it_the_sentence_names_it(family):
    with pytest.raises(UserError, match=r"nearest size that works is \d+; set pad for any size\.$"):
        small(family, image_size=36)


def test_weights_of_a_head_for_another_size_are_one_sentence():
    """CSWin's stripes halve a map of even sides and cover one of odd sides, so that the weights differ."""
    head = {"channels": 64, "gram_channels": 64, "aggregation": "cswin", "block": "cswin", "aggregation_mlp_groups": 1}
    model = small("cswin", "gramian", head, pad=True)
    variables = eval_shape_of_init(model.init, jax.random.key(0), jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32))
    with pytest.raises(UserError, match=r"^the images are 36 x 36 pixels, and the weights are made for 32 x 32"):
        jax.eval_shape(model.apply, variables, jax.ShapeDtypeStruct((1, 36, 36, 3), jnp.float32))


def test_commands_take_any_size(tmp_path, capsys, quick_compilation):
    """`predict` and `validate` at 20 px with windows of 2 for 16 px; without --pad, a sentence."""
    name, fields = BACKBONES["maxxvit"]
    given = {"name": name, **fields, "head": {"name": "linear"}, "num_classes": 3}
    images = write_folder(tmp_path / "images")
    photo = next((images / "val").rglob("*.png"))
    info = {"model": given, "classes": list(CLASSES), "preprocessing": preprocessing() | {"image_size": 16}}
    info |= {"step": 0, "weights": "raw"}
    model = create_model(**given)
    variables = random_variables(model, jnp.zeros((1, 16, 16, 3)))
    variables = jax.tree.map(lambda leaf: leaf.astype("float32"), variables)
    checkpoint.write_variables(tmp_path / "made", variables, info)
    commands = (["predict", tmp_path / "made", photo], ["validate", tmp_path / "made", images])
    for command in commands:
        assert main([*map(str, command), "--image-size=20"]) == 2
        assert "windows of 2 do not divide; the nearest size that works is 16; set pad" in capsys.readouterr().err
        assert main([*map(str, command), "--image-size=20", "--pad", f"--json={tmp_path}/{command[0]}.json"]) == 0
    padding = create_model(**given, pad=True)
    pixels = preprocess(photo, {"preprocessing": info["preprocessing"] | {"image_size": 20}})
    shares = jax.nn.softmax(quick(padding.apply, variables, pixels)["logits"][0, 0])
    rows = json.loads((tmp_path / "predict.json").read_text())
    assert [row["class"] for row in rows] == [CLASSES[i] for i in np.argsort(-shares)]
    np.testing.assert_allclose([row["probability"] for row in rows], np.sort(shares)[::-1], rtol=1e-5)
    assert json.loads((tmp_path / "validate.json").read_text())["image_size"] == 20
