"""RandAugment with Pillow: the operations of the device's and timm's stored outputs, drawn image by image."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from maxmap.data import randaugment_device, randaugment_host
from maxmap.data.pipeline import open_data
from maxmap.data.randaugment import OPERATIONS, operation_argument, parse_rand_augment
from maxmap.data.randaugment_host import apply_operation, rand_augment_image

POLICY = parse_rand_augment("rand-m9-mstd0.5-inc1")
FILL = (124, 116, 104)


def test_every_stored_output_of_timm_is_met_exactly(goldens):
    table = json.loads((goldens / "randaugment.json").read_text())["outputs"]
    met = 0
    for name in ("randaugment_warps", "randaugment_values"):
        with np.load(goldens / f"{name}.npz") as file:
            image, rows = Image.fromarray(file["input"]), file["rows"]
            for key in set(file.files) - {"input", "rows"}:
                case = table[key]
                resample = Image.Resampling.BICUBIC if case["resample"] == "bicubic" else Image.Resampling.BILINEAR
                ours = apply_operation(image, case["op"].removesuffix("Increasing"), case["arg"] or 0, resample, FILL)
                np.testing.assert_array_equal(np.asarray(ours)[rows], file[key], err_msg=key)
                met += 1
    assert met == 71


@pytest.mark.parametrize("increasing", [True, False])
@pytest.mark.parametrize("negative", [True, False])
def test_arguments_are_those_of_the_device(increasing, negative):
    for number, name in enumerate(OPERATIONS):
        for magnitude in (0.0, 0.3, 4.0, 7.49, 9.99, 10.0):
            wanted = randaugment_device.operation_arguments(
                jnp.array([number]), jnp.array([magnitude]), jnp.array([negative]), increasing=increasing
            )
            value = operation_argument(name, magnitude, negative, increasing=increasing, xp=np)
            assert float(value) == pytest.approx(float(wanted[0]), rel=1e-6, abs=1e-7), (name, magnitude)


def test_operations_are_drawn_uniformly_and_applied_half_the_time(monkeypatch):
    applied: list[tuple[str, float]] = []
    monkeypatch.setattr(
        randaugment_host, "apply_operation", lambda image, name, argument, *_: applied.append((name, argument)) or image
    )
    image, rng = Image.new("RGB", (4, 4)), np.random.default_rng(0)
    times = 6000
    for _ in range(times):
        rand_augment_image(image, rng, POLICY, FILL)
    assert len(applied) == pytest.approx(times, abs=5 * np.sqrt(times / 2))  # of 2 * times drawn
    counts = {name: sum(drawn == name for drawn, _ in applied) for name in OPERATIONS}
    expected = len(applied) / 15
    assert max(abs(count - expected) for count in counts.values()) < 5 * np.sqrt(expected)
    angles = np.array([value for name, value in applied if name == "Rotate"])
    assert (angles < 0).mean() == pytest.approx(0.5, abs=0.13)
    assert np.abs(angles).max() == pytest.approx(30)  # the magnitudes' noise is cut at 10
    assert np.median(np.abs(angles)) == pytest.approx(27, abs=0.5)


def test_the_pipeline_draws_by_seed_and_position():
    def batch(**options):
        data = open_data(
            "digits", image_size=32, crop_pct=1.0, mean=(0.5,) * 3, std=(0.5,) * 3, scale=(1.0, 1.0), **options
        )
        return next(data.train_batches(64, seed=3, num_steps=1))

    plain, one, other = batch(), batch(rand_augment="rand-m9-p1"), batch(rand_augment="rand-m9-p1")
    np.testing.assert_array_equal(one["image"], other["image"])
    np.testing.assert_array_equal(one["label"], plain["label"])
    assert (one["image"] != plain["image"]).any(axis=(1, 2, 3)).mean() > 0.9
