"""RandAugment on the device follows Pillow's stored outputs, and draws as the paper's authors and timm draw."""

import json
import math
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from PIL import Image, ImageOps

from maxmap.data import randaugment_device as device
from maxmap.data.randaugment import OPERATIONS, WARPS, parse_rand_augment
from tests.data.statistics import assert_share, random_images

pytestmark = pytest.mark.usefixtures("quick_compilation")

FILL = (124, 116, 104)
RECIPE = "rand-m9-mstd0.5-inc1"
DRAWS = 30_000

apply_operations = jax.jit(device.apply_operations, static_argnames="fill")
draw_operations = jax.jit(device.draw_operations, static_argnums=(1, 2))


def indices(names):
    return jnp.array([OPERATIONS.index(name) for name in names])


# ------------------------------------------------------------------------------------------ operations against Pillow


@pytest.fixture(scope="module")
def table(goldens):
    return json.loads((goldens / "randaugment.json").read_text())


@pytest.fixture(scope="module", params=["apply_operations", "_apply_batched"])
def pairs(request, goldens, table):
    """Ours and Pillow's rows of every stored case, (44, 128, 3) each; the CPU's way and the accelerators'."""
    expected = {}
    for name in ("randaugment_warps", "randaugment_values"):
        with np.load(goldens / f"{name}.npz") as file:
            image, rows = file["input"], file["rows"]
            expected |= {key: file[key] for key in file.files if key not in ("input", "rows")}
    cases = [table["outputs"][key] for key in expected]
    apply = jax.jit(partial(getattr(device, request.param), fill=FILL))
    ours = apply(
        jnp.asarray(np.repeat(image[None], len(cases), axis=0)),
        indices(case["op"].removesuffix("Increasing") for case in cases),
        jnp.array([case["arg"] or 0 for case in cases], jnp.float32),
        jnp.array([case["resample"] == "bicubic" for case in cases]),
    )
    return {key: (np.asarray(mine)[rows], expected[key]) for key, mine in zip(expected, ours, strict=True)}


def test_every_operation_has_stored_outputs(pairs):
    stored = {key.split("/")[0].removesuffix("Increasing") for key in pairs}
    assert stored == set(OPERATIONS)


def test_tables_and_blends_equal_pillow(pairs):
    exact = {key: pair for key, pair in pairs.items() if not key.startswith(WARPS)}
    assert len(exact) == 31
    for key, (ours, expected) in exact.items():
        np.testing.assert_array_equal(ours, expected, err_msg=key)


def test_warps_are_within_one_level_of_pillow(pairs):
    warps = {key: pair for key, pair in pairs.items() if key.startswith(WARPS)}
    assert len(warps) == 40
    for key, (ours, expected) in warps.items():
        difference = np.abs(ours.astype(int) - expected.astype(int))
        assert difference.max() <= 1, key
        assert (difference == 0).mean() > 0.98, key


@pytest.mark.parametrize("bicubic", [False, True])
@pytest.mark.parametrize("angle", [-30.0, 11.0])
def test_images_that_are_not_square_rotate_about_their_centre(angle, bicubic):
    image = random_images(0, 21, 34, 3)
    resample = Image.Resampling.BICUBIC if bicubic else Image.Resampling.BILINEAR
    expected = np.asarray(Image.fromarray(image).rotate(angle, resample, fillcolor=FILL))
    ours = apply_operations(
        jnp.asarray(image)[None], indices(["Rotate"]), jnp.array([angle]), jnp.array([bicubic]), FILL
    )
    assert np.abs(np.asarray(ours)[0].astype(int) - expected.astype(int)).max() <= 1


@pytest.mark.parametrize("low, high", [(0, 256), (70, 171), (9, 10), (200, 203)])
@pytest.mark.parametrize("name", ["AutoContrast", "Equalize"])
def test_tables_follow_pillow_on_narrow_histograms(name, low, high):
    image = np.random.RandomState(1).randint(low, high, (40, 30, 3)).astype(np.uint8)
    pillow = {"AutoContrast": ImageOps.autocontrast, "Equalize": ImageOps.equalize}[name]
    ours = apply_operations(jnp.asarray(image)[None], indices([name]), jnp.zeros(1), jnp.array([False]), FILL)
    # Pillow's scale is a float64, which can fall just below a whole level where integers do not.
    difference = np.asarray(pillow(Image.fromarray(image))).astype(int) - np.asarray(ours)[0]
    assert set(np.unique(difference)) <= {-1, 0}
    if name == "Equalize":
        assert not difference.any()


def test_posterize_to_zero_bits_is_black():
    image = jnp.full((1, 4, 4, 3), 255, jnp.uint8)
    ours = apply_operations(image, indices(["Posterize"]), jnp.zeros(1), jnp.array([False]), FILL)
    assert not ours.any()


def test_identity_and_magnitude_zero_leave_the_image():
    names = ["Rotate", "ShearX", "ShearY", "TranslateXRel", "TranslateYRel", "SolarizeAdd"]
    operations = jnp.append(indices(names), device.IDENTITY)
    images = jnp.asarray(np.repeat(random_images(2, 1, 16, 12, 3), len(operations), axis=0))
    for apply in (device.apply_operations, device._apply_batched):
        run = jax.jit(partial(apply, fill=FILL))
        for bicubic in (False, True):
            ours = run(images, operations, jnp.zeros(len(operations)), jnp.full(len(operations), bicubic))
            np.testing.assert_array_equal(ours, images)


def test_warps_neither_darken_plain_areas_nor_blend_with_the_fill():
    names = [name for name in WARPS for _ in range(4)]
    arguments = jnp.array([17.3, 0.21, 0.17, 0.31, 0.22]).repeat(4) * jnp.tile(jnp.array([1.0, 1.0, -1.0, -1.0]), 5)
    images = jnp.full((len(names), 33, 40, 3), 255, jnp.uint8)
    warped = apply_operations(images, indices(names), arguments, jnp.tile(jnp.array([True, False]), 10), FILL)
    is_fill = (np.asarray(warped) == np.array(FILL)).all(-1)
    is_plain = (np.asarray(warped) == 255).all(-1)
    assert (is_fill | is_plain).all()
    assert is_fill.any(axis=(1, 2)).all() and is_plain.any(axis=(1, 2)).all()


@pytest.mark.parametrize("increasing", [True, False])
def test_arguments_of_every_magnitude(table, increasing):
    stored = table["argument_for_magnitude_0_to_10"]["increasing_set" if increasing else "plain_set"]
    assert {name.removesuffix("Increasing") for name in stored} == set(OPERATIONS)
    magnitudes = jnp.arange(11.0)
    for name, values in stored.items():
        operation = jnp.full(11, OPERATIONS.index(name.removesuffix("Increasing")))
        for sign, negative in (("positive", False), ("negative", True)):
            expected = values[sign] if isinstance(values, dict) else values if values else [0] * 11
            ours = device.operation_arguments(operation, magnitudes, jnp.full(11, negative), increasing=increasing)
            np.testing.assert_allclose(ours, expected, rtol=1e-6, atol=1e-7, err_msg=name)


# ----------------------------------------------------------------------------------------------- what RandAugment draws


def test_operations_are_drawn_uniformly_and_applied_half_the_time():
    policy = parse_rand_augment(RECIPE)
    operations, _, bicubic = draw_operations(jax.random.key(0), policy, DRAWS)
    operations = np.asarray(operations)
    assert_share(operations != device.IDENTITY, 0.5)
    for index in range(len(OPERATIONS)):
        assert_share(operations == index, 0.5 / 15)
    assert_share(bicubic, 0.5)


def test_layers_and_images_are_drawn_independently():
    policy = parse_rand_augment("rand-m9-n2-p0.5")
    keys = jax.random.split(jax.random.key(1), policy.layers)
    applied = [np.asarray(draw_operations(key, policy, DRAWS)[0]) != device.IDENTITY for key in keys]
    assert_share(applied[0] & applied[1], 0.25)
    assert_share(applied[0][1:] & applied[0][:-1], 0.25)


def rotations(text, seed):
    """The magnitudes, with sign, of the rotations in one layer."""
    operations, arguments, _ = draw_operations(jax.random.key(seed), parse_rand_augment(text), 15 * DRAWS)
    return np.asarray(arguments)[np.asarray(operations) == OPERATIONS.index("Rotate")] / 3


def test_magnitudes_are_gaussian_and_cut_at_ten():
    signed = rotations(RECIPE, seed=2)
    assert_share(signed > 0, 0.5)
    magnitudes = np.abs(signed)
    assert magnitudes.max() <= 10
    beyond = 0.5 * math.erfc(2 / math.sqrt(2))  # the limit is two standard deviations above the magnitude
    assert_share(magnitudes >= 9.9999, beyond)
    inner = magnitudes[magnitudes < 9]  # the lower half of the Gaussian: E (9 - m)^2 = mstd^2
    squares = (9 - inner) ** 2
    assert abs(squares.mean() - 0.25) < 5 * squares.std() / math.sqrt(squares.size)
    assert_share(magnitudes < 9, 0.5)


def test_m15_means_ten_unless_mmax_is_given():
    np.testing.assert_allclose(np.abs(rotations("rand-m15-mstd0.5-inc1", seed=3)), 10, rtol=1e-6)
    raised = np.abs(rotations("rand-m15-mstd0.5-mmax20-inc1", seed=3))
    assert abs(raised.mean() - 15) < 5 * 0.5 / math.sqrt(raised.size)


def test_mstd_above_100_draws_the_magnitude_uniformly():
    magnitudes = np.abs(rotations("rand-m8-mstd101", seed=4))
    assert magnitudes.max() < 8
    assert abs(magnitudes.mean() - 4) < 5 * 8 / math.sqrt(12 * magnitudes.size)


def test_accelerators_augment_a_sharded_batch_where_it_is():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    split = NamedSharding(mesh, PartitionSpec("data"))
    drawn = jnp.zeros(16, jnp.int32), jnp.zeros(16), jnp.zeros(16, bool)
    run = jax.jit(partial(device._apply_batched, fill=FILL), in_shardings=split, out_shardings=split)
    program = run.lower(jnp.zeros((16, 16, 16, 3), jnp.uint8), *drawn).compile().as_text()
    assert not re.search("all-gather|all-reduce|all-to-all|collective-permute", program)
