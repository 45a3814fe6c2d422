"""Flips, colours and erased rectangles have the distributions of torchvision and timm."""

import json
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from maxmap.data import augment as aug
from maxmap.errors import UserError
from tests.data.statistics import assert_share, random_images

pytestmark = pytest.mark.usefixtures("quick_compilation")

MEAN = (0.485, 0.456, 0.406)
RECIPE = "rand-m9-mstd0.5-inc1"

both = jax.jit(aug.augment, static_argnames=("mean", "hflip", "vflip", "rand_augment", "color_jitter"))


def augment(key, images, **options):
    """The images alone, whose classes stay as they are."""
    return both(key, images, jnp.zeros(len(images), jnp.int32), **options)[0]


# ------------------------------------------------------------------------------------------------------- whole batches


def test_flips():
    images = jnp.asarray(random_images(3, 2000, 2, 3, 3))
    key = jax.random.key(5)
    np.testing.assert_array_equal(augment(key, images, mean=MEAN, hflip=1.0), images[:, :, ::-1])
    np.testing.assert_array_equal(augment(key, images, mean=MEAN, hflip=0.0, vflip=1.0), images[:, ::-1])
    np.testing.assert_array_equal(augment(key, images, mean=MEAN, hflip=0.0), images)
    flipped, masks = map(np.asarray, both(key, images, images[..., 0], mean=MEAN, hflip=0.5, vflip=0.25))
    np.testing.assert_array_equal(masks, flipped[..., 0])  # a mask is flipped with its image
    views = {"none": images, "h": images[:, :, ::-1], "v": images[:, ::-1], "hv": images[:, ::-1, ::-1]}
    for (name, view), share in zip(views.items(), (0.375, 0.375, 0.125, 0.125), strict=True):
        assert_share((flipped == np.asarray(view)).all((1, 2, 3)), share), name


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
    run = partial(augment, mean=MEAN, rand_augment=rand_augment, color_jitter=0.4)
    sharded = jax.device_put(images, NamedSharding(mesh, PartitionSpec("data")))
    np.testing.assert_array_equal(run(jax.random.key(12), sharded), run(jax.random.key(12), jnp.asarray(images)))


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
    np.testing.assert_array_equal(erase(17, images, prob=1.0, mode="const", min_area=1.0, max_area=1.0), images)
    np.testing.assert_array_equal(erase(17, images, prob=0.0), images)


def test_an_unknown_erase_mode_is_named():
    with pytest.raises(UserError, match="'noise'"):
        aug.erase(jax.random.key(0), jnp.ones((1, 4, 4, 3)), mode="noise")
