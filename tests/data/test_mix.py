import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maxmap.data import mix as mixing
from maxmap.data.mix import cutmix_images, mix_targets, mixup_images

pytestmark = pytest.mark.usefixtures("quick_compilation")

OPTIONS = ("num_classes", "mixup", "cutmix", "prob", "switch_prob", "smoothing")
mix = jax.jit(mixing.mix, static_argnames=OPTIONS)
cutmix_box = jax.jit(mixing.cutmix_box, static_argnums=(2, 3))

REFERENCE = "timm_0.9.2"  # the version of the recipes


@pytest.fixture(scope="module")
def stored(goldens):
    with np.load(goldens / "mixup_cutmix.npz") as file:
        arrays = {key: file[key] for key in file.files}
    return json.loads((goldens / "mixup_cutmix.json").read_text())["cases"], arrays


def expected(arrays, name, what):
    return arrays[f"{name}/{what}"] if f"{name}/{what}" in arrays else arrays[f"{name}/{REFERENCE}/{what}"]


@pytest.mark.parametrize("name", ["mixup_lam0.3", "mixup_lam0.7123", "mixup_lam0.5_ties", "lam1"])
def test_mixup_equals_the_reference(stored, name):
    cases, arrays = stored
    lam = jnp.float32(cases[name]["lam_drawn"])
    images = np.asarray(mixup_images(jnp.asarray(arrays["input"]), lam))
    targets = mix_targets(jnp.asarray(arrays["labels"]), lam, num_classes=10, smoothing=0.1)
    np.testing.assert_array_equal(images, expected(arrays, name, "images"))
    np.testing.assert_allclose(targets, expected(arrays, name, "targets"), atol=1e-7)


@pytest.mark.parametrize(
    "name",
    [
        "cutmix_lam0.6_center4_3",
        "cutmix_lam0.75_center4_4",
        "cutmix_lam0.3_center0_7",
        "cutmix_lam0.001_center3_3",
    ],
)
def test_cutmix_equals_the_reference(stored, name):
    cases, arrays = stored
    case = cases[name]
    box, lam = cutmix_box(jnp.array(case["center_y_x"]), jnp.float32(case["lam_drawn"]), 8, 8)
    assert box.tolist() == case[REFERENCE]["box"]
    assert float(lam) == case[REFERENCE]["lam"]
    np.testing.assert_array_equal(cutmix_images(jnp.asarray(arrays["input"]), box), expected(arrays, name, "images"))
    targets = mix_targets(jnp.asarray(arrays["labels"]), lam, num_classes=10, smoothing=0.1)
    np.testing.assert_allclose(targets, expected(arrays, name, "targets"), atol=1e-7)


def test_the_box_of_a_wide_image_keeps_its_shape():
    box, lam = cutmix_box(jnp.array([10, 20]), jnp.float32(0.75), 20, 40)
    assert box.tolist() == [5, 15, 10, 30]
    assert float(lam) == 0.75


def test_targets_by_hand():
    targets = mix_targets(jnp.array([0, 2]), 0.75, num_classes=4, smoothing=0.2)
    np.testing.assert_allclose(targets, [[0.65, 0.05, 0.25, 0.05], [0.25, 0.05, 0.65, 0.05]], atol=1e-7)


def test_without_mixing_the_targets_are_smoothed_one_hot():
    images = jnp.asarray(np.random.RandomState(0).randint(0, 256, (3, 4, 4, 3), dtype=np.uint8))
    for options in ({}, {"mixup": 0.8, "cutmix": 1.0, "prob": 0.0}):
        mixed, targets = mix(jax.random.key(0), images, jnp.array([1, 0, 4]), num_classes=5, smoothing=0.1, **options)
        np.testing.assert_array_equal(mixed, images)
        np.testing.assert_allclose(targets, 0.02 + 0.9 * np.eye(5)[[1, 0, 4]], atol=1e-7)


# Two images, 0 and 255 everywhere: the first mixed image shows lam and whether it was mixup or CutMix.
SIDE = 64
PAIR = jnp.array([0, 255], jnp.uint8)[:, None, None, None] * jnp.ones((1, SIDE, SIDE, 1), jnp.uint8)
DRAWS = 2000


def draw(**options):
    """Returns of DRAWS batches the smallest, largest and mean value of image 0, and the weight of its own label."""

    def one(key):
        images, targets = mix(key, PAIR, jnp.array([0, 1]), num_classes=2, **options)
        first = images[0].astype(jnp.float32)
        return jnp.min(first), jnp.max(first), jnp.mean(first), targets[0, 0]

    return [np.asarray(values) for values in jax.lax.map(one, jax.random.split(jax.random.key(1), DRAWS))]


def assert_mean(values, mean, variance):
    assert abs(values.mean() - mean) < 5 * math.sqrt(variance / len(values))


@pytest.mark.parametrize("alpha", [0.1, 0.8, 1.0])
def test_mixup_draws_lam_from_beta(alpha):
    low, high, _, lam = draw(mixup=alpha)
    np.testing.assert_array_equal(low, high)  # one lam for the whole image
    np.testing.assert_allclose(low, 255 * (1 - lam), atol=0.51)  # and the same in the target
    variance = 1 / (4 * (2 * alpha + 1))
    assert_mean(lam, 0.5, variance)
    assert_mean((lam - 0.5) ** 2, variance, np.var((lam - 0.5) ** 2))


def test_cutmix_targets_follow_the_clipped_box():
    low, high, mean, lam = draw(cutmix=1.0)
    assert set(np.unique(low)) <= {0.0, 255.0} and set(np.unique(high)) <= {0.0, 255.0}
    np.testing.assert_allclose(mean / 255, 1 - lam, atol=1e-5)
    # With Beta(1, 1) a side is s = sqrt(u) of the image's; half a side either way, clipped, leaves s - s^2 / 4 of it on
    # average. So the box covers E (s - s^2 / 4)^2 = E (u - u^1.5 / 2 + u^2 / 16) = 1/2 - 1/5 + 1/48, and whole pixels
    # take up to 2 of 64 from a side.
    covered = 1 / 2 - 1 / 5 + 1 / 48
    assert covered - 2 * 2 / SIDE < (1 - lam).mean() < covered + 5 * math.sqrt(np.var(lam) / DRAWS)


@pytest.mark.parametrize("prob, switch_prob", [(1.0, 0.5), (0.6, 0.25)])
def test_how_often_each_is_drawn(prob, switch_prob):
    low, high, _, _ = draw(mixup=1.0, cutmix=1.0, prob=prob, switch_prob=switch_prob)
    # A mixed colour shows mixup, two colours show CutMix. Mixup hides when lam is within 1/510 of 0 or 1, CutMix when
    # its box is empty (a side below 2 of 64 pixels, 1 - lam < 1/1024) and as rarely because it covers everything.
    mixup = (low == high) & (low > 0) & (low < 255)
    cutmix = low != high
    for hits, share, hidden in ((mixup, prob * (1 - switch_prob), 2 / 510), (cutmix, prob * switch_prob, 2 / 1024)):
        slack = 5 * math.sqrt(share * (1 - share) / DRAWS)
        assert share * (1 - hidden) - slack < hits.mean() < share + slack


def test_a_batch_has_one_draw_and_the_reversed_batch_as_partners():
    images = jnp.asarray(np.random.RandomState(2).randint(0, 256, (6, 8, 8, 3), dtype=np.uint8))
    labels = jnp.arange(6)
    mixed, targets = mix(jax.random.key(3), images, labels, num_classes=6, mixup=1.0)
    lam = float(targets[0, 0])
    assert 0 < lam < 1
    np.testing.assert_allclose(targets, lam * np.eye(6) + (1 - lam) * np.eye(6)[::-1], atol=1e-6)
    exact = lam * np.asarray(images, float) + (1 - lam) * np.asarray(images, float)[::-1]
    np.testing.assert_allclose(mixed, exact, atol=0.501)
    assert mixed.dtype == jnp.uint8 and targets.dtype == jnp.float32
