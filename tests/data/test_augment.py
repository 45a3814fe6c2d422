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

from maxmap.data import augment as aug
from maxmap.errors import UserError

MEAN = (0.485, 0.456, 0.406)
FILL = (124, 116, 104)
RECIPE = "rand-m9-mstd0.5-inc1"
DRAWS = 30_000

apply_operations = jax.jit(aug.apply_operations, static_argnames="fill")
augment = jax.jit(aug.augment, static_argnames=("mean", "hflip", "vflip", "rand_augment", "color_jitter"))
draw_operations = jax.jit(aug.draw_operations, static_argnums=(1, 2))


def random_images(seed, *shape):
    return np.random.RandomState(seed).randint(0, 256, shape, dtype=np.uint8)


def assert_share(hits, expected):
    """Fails if the share of `hits` is more than five standard deviations of a binomial share away."""
    hits = np.asarray(hits)
    assert abs(hits.mean() - expected) < 5 * math.sqrt(expected * (1 - expected) / hits.size)


def indices(names):
    return jnp.array([aug.OPERATIONS.index(name) for name in names])


# ------------------------------------------------------------------------------------------ operations against Pillow


@pytest.fixture(scope="module")
def table(goldens):
    return json.loads((goldens / "randaugment.json").read_text())


@pytest.fixture(scope="module", params=["apply_operations", "_apply_at_once"])
def pairs(request, goldens, table):
    """Ours and Pillow's rows of every stored case, (44, 128, 3) each; the CPU's way and the accelerators'."""
    expected = {}
    for name in ("randaugment_warps", "randaugment_values"):
        with np.load(goldens / f"{name}.npz") as file:
            image, rows = file["input"], file["rows"]
            expected |= {key: file[key] for key in file.files if key not in ("input", "rows")}
    cases = [table["outputs"][key] for key in expected]
    apply = jax.jit(partial(getattr(aug, request.param), fill=FILL))
    ours = apply(
        jnp.asarray(np.repeat(image[None], len(cases), axis=0)),
        indices(case["op"].removesuffix("Increasing") for case in cases),
        jnp.array([case["arg"] or 0 for case in cases], jnp.float32),
        jnp.array([case["resample"] == "bicubic" for case in cases]),
    )
    return {key: (np.asarray(mine)[rows], expected[key]) for key, mine in zip(expected, ours, strict=True)}


def test_every_operation_has_stored_outputs(pairs):
    stored = {key.split("/")[0].removesuffix("Increasing") for key in pairs}
    assert stored == set(aug.OPERATIONS)


def test_tables_and_blends_equal_pillow(pairs):
    exact = {key: pair for key, pair in pairs.items() if not key.startswith(aug.WARPS)}
    assert len(exact) == 31
    for key, (ours, expected) in exact.items():
        np.testing.assert_array_equal(ours, expected, err_msg=key)


def test_warps_are_within_one_level_of_pillow(pairs):
    warps = {key: pair for key, pair in pairs.items() if key.startswith(aug.WARPS)}
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
    operations = jnp.append(indices(names), aug.IDENTITY)
    images = jnp.asarray(np.repeat(random_images(2, 1, 16, 12, 3), len(operations), axis=0))
    for apply in (aug.apply_operations, aug._apply_at_once):
        run = jax.jit(partial(apply, fill=FILL))
        for bicubic in (False, True):
            ours = run(images, operations, jnp.zeros(len(operations)), jnp.full(len(operations), bicubic))
            np.testing.assert_array_equal(ours, images)


def test_warps_neither_darken_plain_areas_nor_blend_with_the_fill():
    names = [name for name in aug.WARPS for _ in range(4)]
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
    assert {name.removesuffix("Increasing") for name in stored} == set(aug.OPERATIONS)
    magnitudes = jnp.arange(11.0)
    for name, values in stored.items():
        operation = jnp.full(11, aug.OPERATIONS.index(name.removesuffix("Increasing")))
        for sign, negative in (("positive", False), ("negative", True)):
            expected = values[sign] if isinstance(values, dict) else values if values else [0] * 11
            ours = aug.operation_arguments(operation, magnitudes, jnp.full(11, negative), increasing=increasing)
            np.testing.assert_allclose(ours, expected, rtol=1e-6, atol=1e-7, err_msg=name)


# ----------------------------------------------------------------------------------------------- what RandAugment draws


def test_parse_the_recipes():
    assert aug.parse_rand_augment("rand-m9-mstd0.5-inc1") == aug.RandAugment(9.0, 2, 0.5, 0.5, 10.0, True)
    assert aug.parse_rand_augment("rand-m20-n3-p0.7-mstd1-mmax15-inc0") == aug.RandAugment(
        20.0, 3, 0.7, 1.0, 15.0, False
    )
    assert aug.parse_rand_augment("rand") == aug.RandAugment()


@pytest.mark.parametrize(
    "text, wrong",
    [
        ("rand-m9-foo3", "foo3"),
        ("rand-m9-mstd", "mstd"),
        ("rand-m9--inc1", "''"),
        ("rand-n1.5", "n1.5"),
        ("rand-p2", "p2"),
        ("original-mstd0.5", "original"),
    ],
)
def test_parts_that_cannot_be_read_are_named(text, wrong):
    with pytest.raises(UserError, match=re.escape(wrong)):
        aug.parse_rand_augment(text)


def test_operations_are_drawn_uniformly_and_applied_half_the_time():
    policy = aug.parse_rand_augment(RECIPE)
    operations, _, bicubic = draw_operations(jax.random.key(0), policy, DRAWS)
    operations = np.asarray(operations)
    assert_share(operations != aug.IDENTITY, 0.5)
    for index in range(len(aug.OPERATIONS)):
        assert_share(operations == index, 0.5 / 15)
    assert_share(bicubic, 0.5)


def test_layers_and_images_are_drawn_independently():
    policy = aug.parse_rand_augment("rand-m9-n2-p0.5")
    keys = jax.random.split(jax.random.key(1), policy.layers)
    applied = [np.asarray(draw_operations(key, policy, DRAWS)[0]) != aug.IDENTITY for key in keys]
    assert_share(applied[0] & applied[1], 0.25)
    assert_share(applied[0][1:] & applied[0][:-1], 0.25)


def rotations(text, seed):
    """The magnitudes, with sign, of the rotations in one layer."""
    operations, arguments, _ = draw_operations(jax.random.key(seed), aug.parse_rand_augment(text), 15 * DRAWS)
    return np.asarray(arguments)[np.asarray(operations) == aug.OPERATIONS.index("Rotate")] / 3


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


# ------------------------------------------------------------------------------------------------------- whole batches


def test_flips():
    images = jnp.asarray(random_images(3, 2000, 2, 3, 3))
    key = jax.random.key(5)
    np.testing.assert_array_equal(augment(key, images, mean=MEAN, hflip=1.0), images[:, :, ::-1])
    np.testing.assert_array_equal(augment(key, images, mean=MEAN, hflip=0.0, vflip=1.0), images[:, ::-1])
    np.testing.assert_array_equal(augment(key, images, mean=MEAN, hflip=0.0), images)
    both = np.asarray(augment(key, images, mean=MEAN, hflip=0.5, vflip=0.25))
    views = {"none": images, "h": images[:, :, ::-1], "v": images[:, ::-1], "hv": images[:, ::-1, ::-1]}
    for (name, view), share in zip(views.items(), (0.375, 0.375, 0.125, 0.125), strict=True):
        assert_share((both == np.asarray(view)).all((1, 2, 3)), share), name


def test_rand_augment_is_a_function_of_the_key():
    images = jnp.asarray(random_images(4, 24, 16, 16, 3))
    run = partial(augment, images=images, mean=MEAN, rand_augment=RECIPE)
    first, again, other = run(jax.random.key(6)), run(jax.random.key(6)), run(jax.random.key(7))
    np.testing.assert_array_equal(first, again)
    assert (np.asarray(first) != np.asarray(other)).any()
    assert first.dtype == jnp.uint8 and first.shape == images.shape


def test_rand_augment_fills_with_the_mean_colour():
    images = jnp.zeros((64, 16, 16, 3), jnp.uint8)
    run = partial(augment, jax.random.key(8), images, mean=(0.9, 0.5, 0.301))
    filled = np.asarray(run(rand_augment="rand-m10-n1-p1")).reshape(-1, 3)
    assert (filled == np.array([230, 128, 77])).all(-1).any()  # 127.5 rounds to the even 128


def test_colour_jitter_gives_way_to_rand_augment():
    images = jnp.asarray(random_images(5, 8, 8, 8, 3))
    run = partial(augment, jax.random.key(9), images, mean=MEAN, rand_augment=RECIPE)
    np.testing.assert_array_equal(run(color_jitter=0.4), run())


def test_colour_jitter_scales_brightness_uniformly():
    """A plain grey image has no contrast and no saturation to change: only the brightness is left."""
    images = jnp.full((4000, 2, 2, 3), 180, jnp.uint8)
    jittered = np.asarray(augment(jax.random.key(10), images, mean=MEAN, color_jitter=0.4))
    assert (jittered == jittered[:, :1, :1, :1]).all()
    values = jittered[:, 0, 0, 0].astype(float)
    assert values.min() >= 107 and values.max() <= 252
    for limit in (0.7, 1.0, 1.3):
        assert_share(values + 1 <= 180 * limit, (limit - 0.6) / 0.8)


def test_colour_jitter_draws_contrast_and_saturation():
    """In a plain colour, contrast and saturation each scale the distance from grey, and brightness scales all alike."""
    colour = np.array([100, 160, 120])
    images = jnp.broadcast_to(jnp.asarray(colour, jnp.uint8), (4000, 1, 1, 3))
    jittered = np.asarray(augment(jax.random.key(11), images, mean=MEAN, color_jitter=0.4), float)[:, 0, 0]

    def distance(values):
        return (values[..., 1] - values[..., 0]) / (values @ np.array([0.299, 0.587, 0.114]))

    scale = distance(jittered) / distance(colour)
    variance = 0.8**2 / 12  # of a factor that is uniform in 0.6..1.4
    assert abs(scale.mean() - 1) < 5 * scale.std() / math.sqrt(scale.size) + 0.01  # 0.01 and 0.005: whole grey levels
    squares = (scale - 1) ** 2
    assert abs(squares.mean() - ((1 + variance) ** 2 - 1)) < 5 * squares.std() / math.sqrt(scale.size) + 0.005


def test_normalize_is_the_affine_map_of_the_bytes():
    images = random_images(7, 2, 4, 4, 3)
    std = (0.229, 0.224, 0.225)
    expected = (images.astype(np.float64) / 255 - np.array(MEAN)) / np.array(std)
    np.testing.assert_allclose(aug.normalize(jnp.asarray(images), MEAN, std), expected, atol=1e-6)
    half = aug.normalize(jnp.asarray(images), MEAN, std, jnp.bfloat16)
    assert half.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(half, np.float64), expected, rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize("rand_augment", [None, RECIPE])
def test_a_sharded_batch_gives_the_same_images(rand_augment):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    images = random_images(8, 16, 16, 16, 3)
    run = jax.jit(partial(aug.augment, mean=MEAN, rand_augment=rand_augment, color_jitter=0.4))
    sharded = jax.device_put(images, NamedSharding(mesh, PartitionSpec("data")))
    np.testing.assert_array_equal(run(jax.random.key(12), sharded), run(jax.random.key(12), jnp.asarray(images)))


def test_accelerators_augment_a_sharded_batch_where_it_is():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    split = NamedSharding(mesh, PartitionSpec("data"))
    drawn = jnp.zeros(16, jnp.int32), jnp.zeros(16), jnp.zeros(16, bool)
    run = jax.jit(partial(aug._apply_at_once, fill=FILL), in_shardings=split, out_shardings=split)
    program = run.lower(jnp.zeros((16, 16, 16, 3), jnp.uint8), *drawn).compile().as_text()
    assert not re.search("all-gather|all-reduce|all-to-all|collective-permute", program)


# --------------------------------------------------------------------------------------------------------- erasing


@pytest.fixture(scope="module")
def erasing(goldens):
    return json.loads((goldens / "random_erasing.json").read_text())


def erase(seed, images, **options):
    return jax.jit(partial(aug.erase, **options))(jax.random.key(seed), images)


def erased_boxes(erased):
    """Top, left, height and width [n] of the zeros in images of ones [B, H, W, 1], of those that have any."""
    hole = np.asarray(erased)[..., 0] == 0
    hole = hole[hole.any((1, 2))]
    rows, columns = hole.any(2), hole.any(1)
    height, width = rows.sum(1), columns.sum(1)
    assert (hole.sum((1, 2)) == height * width).all()  # full rectangles
    return rows.argmax(1), columns.argmax(1), height, width


def test_erase_sizes(erasing):
    height, width = erasing["shape_table"]["image"]
    area, aspect, *expected = np.array(erasing["shape_table"]["rows"], float).T
    ours = aug.erase_size(jnp.asarray(area, jnp.float32), jnp.asarray(aspect, jnp.float32), height, width)
    np.testing.assert_array_equal(np.stack(ours), expected)


def test_erased_rectangles_are_distributed_as_the_reference_ones(erasing):
    measured = erasing["empirical"][1]
    height, width = measured["size"]
    prob, images = measured["probability"], 16_000
    ones = jnp.ones((images, height, width, 1), jnp.float32)
    erased = erase(13, ones, prob=prob, mode="const")
    top, left, box_height, box_width = erased_boxes(erased)
    assert_share(np.arange(images) < len(top), prob)
    area, log_aspect = box_height * box_width / (height * width), np.log(box_height / box_width)

    def assert_mean(values, expected):  # the reference's mean has its own error, of fewer images
        deviation = values.std() * math.sqrt(1 / len(values) + 1 / (measured["images"] * measured["fraction_erased"]))
        assert abs(values.mean() - expected) < 5 * deviation

    assert_mean(area, measured["area_mean"])
    assert_mean(log_aspect, measured["log_aspect_mean"])
    assert_mean((log_aspect - log_aspect.mean()) ** 2, measured["log_aspect_std"] ** 2)
    # A side is rounded by half a pixel at most, and the smallest sides are 5 pixels: 10 % either way.
    assert area.min() > 0.02 * 0.85 and area.max() < 1.05 / 3
    assert (box_height < height).all() and (box_width < width).all()
    assert abs(log_aspect).max() < math.log(1 / 0.3) + 0.2
    # The place is uniform, both ends included: its mean is the middle, and both edges are reached.
    for start, side, limit in ((top, box_height, height), (left, box_width, width)):
        place = start / (limit - side)
        assert abs(place.mean() - 0.5) < 5 * place.std() / math.sqrt(len(place))
        assert place.min() == 0 and place.max() == 1


def test_erase_puts_normal_noise_in_every_pixel():
    images = jnp.full((200, 32, 32, 3), 100.0)
    erased = np.asarray(erase(14, images, prob=1.0))
    noise = erased[erased != 100]
    assert 0.02 * 0.8 < noise.size / erased.size < 0.35
    assert abs(noise.mean()) < 5 / math.sqrt(noise.size)
    assert abs(noise.var() - 1) < 5 * math.sqrt(2 / noise.size)
    hole = (erased != 100).any(-1)
    assert (np.unique(erased[hole][:, 0]).size) > 0.9 * hole.sum()  # not one colour


def test_erase_with_one_colour_for_a_rectangle():
    images = jnp.full((50, 32, 32, 3), 100.0, jnp.bfloat16)
    erased = erase(15, images, prob=1.0, mode="rand")
    assert erased.dtype == jnp.bfloat16
    for image in np.asarray(erased, np.float32):
        colours = np.unique(image.reshape(-1, 3), axis=0)
        assert len(colours) == 2 and [100, 100, 100] in colours.tolist()


def test_several_rectangles_share_the_area():
    ones = jnp.ones((500, 64, 64, 1))
    erased = 1 - np.asarray(erase(16, ones, prob=1.0, mode="const", count=3)).mean((1, 2, 3))
    assert erased.max() < 1.05 / 3
    assert erased.mean() > 0.02


def test_what_never_fits_is_left_alone():
    images = jnp.ones((20, 10, 10, 3))
    np.testing.assert_array_equal(erase(17, images, prob=1.0, mode="const", min_area=1.5, max_area=2.0), images)
    np.testing.assert_array_equal(erase(17, images, prob=0.0), images)


def test_an_unknown_erase_mode_is_named():
    with pytest.raises(UserError, match="'noise'"):
        aug.erase(jax.random.key(0), jnp.ones((1, 4, 4, 3)), mode="noise")
