"""Every image counts once, on any number of devices, in batches of any size."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

from maxmap import evaluate
from maxmap.cost import count_parameters
from maxmap.data.pipeline import open_data
from maxmap.errors import UserError
from maxmap.evaluate import check_same_model, make_eval_step, report, summary
from maxmap.models import average
from maxmap.progress import Progress
from maxmap.sharding import make_mesh
from maxmap.tasks.single_label import rank_of
from tests.tiny import write_folder

pytestmark = pytest.mark.usefixtures("quick_compilation")

DIGITS = {"image_size": 8, "crop_pct": 1.0, "mean": (0.0,) * 3, "std": (1.0,) * 3, "threads": 1}


class Pixels(nn.Module):
    """Logits that are pixels of the image, many of them equal: nothing to round, and ties in plenty."""

    num_classes: int
    branches: int = 2

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool = False) -> dict[str, jax.Array]:
        # Sixteenths: every mean of them is exact in float32, so that ties are ties.
        values = jnp.round(images[..., 0].reshape(images.shape[0], -1) * 255) * self.param(
            "gain", nn.initializers.ones, ()
        )
        parts = [values[:, 9 + 20 * g :][:, : self.num_classes] for g in range(self.branches)]
        return {"logits": jnp.stack(parts)}


VARIABLES = {"params": {"gain": jnp.float32(1 / 16)}}


def expected(data, num_classes: int) -> dict:
    """The same figures in plain NumPy, an image at a time."""
    counts = {"top1": 0, "top5": 0, "loss": 0.0, "branch_top1": [0, 0]}
    for batch in data.eval_batches(1):
        pixels = batch["image"][0, ..., 0].reshape(-1) / 16
        label = batch["label"][0]
        branches = [pixels[9 + 20 * g :][:num_classes] for g in range(2)]
        logits = np.mean(branches, axis=0)
        better = sum(1 for k, value in enumerate(logits) if k != label and value >= logits[label])
        counts["top1"] += better < 1
        counts["top5"] += better < 5
        counts["loss"] += np.log(np.sum(np.exp(logits))) - logits[label]
        for g, branch in enumerate(branches):
            counts["branch_top1"][g] += np.sum(branch >= branch[label]) == 1
    n = data.num_eval
    return {
        "top1": 100 * counts["top1"] / n,
        "top5": 100 * counts["top5"] / n,
        "loss": counts["loss"] / n,
        "branch_top1": [100 * count / n for count in counts["branch_top1"]],
    }


@pytest.fixture(scope="module")
def digits():
    data = open_data("digits", **DIGITS)
    return data, expected(data, 10)


@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize("batch_size", [7, 64, 1000])
def test_figures_are_exact(digits, devices, batch_size):
    data, wanted = digits
    mesh = make_mesh(data=devices)
    step = make_eval_step(Pixels(10), data.preprocessing, mesh, jnp.float32)
    result = evaluate.evaluate(step, VARIABLES, data, batch_size, mesh)
    assert result["images"] == data.num_eval == 360 and result["skipped"] == []
    for key in ("top1", "top5", "branch_top1"):
        assert result[key] == wanted[key], key
    np.testing.assert_allclose(result["loss"], wanted["loss"], rtol=1e-6)
    assert 0 < result["top1"] < result["top5"] < 100


def test_flipped_images_count_as_their_mirror_images():
    """The loss is that of the mean of both logits, and a mirrored batch has the same predictions."""
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (6, 8, 8, 3), np.uint8), np.arange(6, dtype=np.int32)
    step = make_eval_step(Pixels(10), DIGITS, make_mesh(data=1), jnp.float32, flip=True)

    def run(images):
        return step(VARIABLES, {"image": images, "label": labels, "mask": np.ones(6, bool)})

    found, mirrored = run(images), run(images[:, :, ::-1])
    logits = [average(Pixels(10).apply(VARIABLES, x / np.float32(255))) for x in (images, images[:, :, ::-1])]
    assert np.abs(logits[0] - logits[1]).max() > 0.01
    wanted = optax.softmax_cross_entropy_with_integer_labels((logits[0] + logits[1]) / 2, labels).sum()
    np.testing.assert_allclose(found["loss"], wanted, rtol=1e-5)
    jax.tree.map(np.testing.assert_array_equal, found["predictions"], mirrored["predictions"])


def test_five_crops_count_as_the_mean_of_their_logits():
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (3, 11, 11, 3), np.uint8), np.arange(3, dtype=np.int32)
    step = make_eval_step(Pixels(10), DIGITS, make_mesh(data=1), jnp.float32, crop=8)
    found = step(VARIABLES, {"image": images, "label": labels, "mask": np.ones(3, bool)})
    crops = [images[:, i : i + 8, j : j + 8] for i, j in ((0, 0), (0, 3), (3, 0), (3, 3), (1, 1))]
    logits = sum(average(Pixels(10).apply(VARIABLES, crop / np.float32(255))) for crop in crops) / 5
    wanted = optax.softmax_cross_entropy_with_integer_labels(logits, labels).sum()
    np.testing.assert_allclose(found["loss"], wanted, rtol=1e-5)


def test_fewer_classes_than_five(tmp_path):
    data = open_data("folder", write_folder(tmp_path), **DIGITS)
    mesh = make_mesh(data=1)
    step = make_eval_step(Pixels(3), data.preprocessing, mesh, jnp.float32)
    result, wanted = evaluate.evaluate(step, VARIABLES, data, 4, mesh), expected(data, 3)
    assert result["top5"] == wanted["top5"] == 100.0
    assert result["top1"] == wanted["top1"] < 100 and result["images"] == 11


def test_files_that_cannot_be_decoded_are_named_and_do_not_count(tmp_path):
    folder = write_folder(tmp_path)
    bad = [folder / "val/blue/003.png", folder / "val/red/008.png"]
    for path in bad:
        path.write_bytes(path.read_bytes()[:60])
    data = open_data("folder", folder, **DIGITS, check=0)
    mesh = make_mesh(data=8)
    step = make_eval_step(Pixels(3), data.preprocessing, mesh, jnp.float32)
    result = evaluate.evaluate(step, VARIABLES, data, 8, mesh)
    assert result["images"] == 9 and result["skipped"] == [str(path) for path in bad]
    for path in bad:
        path.unlink()
    data = open_data("folder", folder, **DIGITS)
    assert evaluate.evaluate(step, VARIABLES, data, 8, mesh) == {**result, "skipped": []}


def test_ties_and_nan_count_against():
    nan = np.nan
    logits = jnp.array([[1, 3, 2], [3, 1, 3], [0, 0, 0], [nan, 2, 1], [nan, nan, nan], [2, 2, 9]], jnp.float32)
    assert rank_of(jnp.array([1, 0, 1, 0, 2, 2]), logits).tolist() == [1, 2, 3, 3, 3, 1]
    assert int(rank_of(jnp.array([1]), logits[3:4])[0]) == 2  # behind what is not a number


def test_the_model_computes_in_the_type_asked_for(digits):
    data, _ = digits
    seen = {}

    class Spy(nn.Module):
        @nn.compact
        def __call__(self, images, *, train=False):
            gain = self.param("gain", nn.initializers.ones, ())
            seen.update(images=images.dtype, params=gain.dtype, train=train)
            return {"logits": (images[:, 0, :, 0] * gain)[None]}

    step = make_eval_step(Spy(), data.preprocessing, make_mesh(data=1), jnp.bfloat16)
    batch = {"image": np.zeros((2, 10, 10, 3), np.uint8), "label": np.zeros(2, np.int32), "mask": np.ones(2, bool)}
    sums = jax.eval_shape(step, VARIABLES, batch)
    assert seen == {"images": jnp.bfloat16, "params": jnp.bfloat16, "train": False}
    assert sums["loss"].dtype == jnp.float32


def test_report_says_what_the_figures_belong_to():
    info = {
        "model": {"name": "tiny", "num_classes": 2},
        "step": 4,
        "weights": "ema",
        "preprocessing": {"image_size": 8, "crop_pct": 0.9, "mean": [0.5], "std": [0.5]},
    }
    params = {"a": {"kernel": np.zeros((3, 4)), "bias": np.zeros(4)}, "scale": np.zeros(())}
    assert count_parameters(params) == 17
    assert report({"top1": 73.43, "top5": 91.364}, 17, info) == {
        "model": "tiny",
        "step": 4,
        "weights": "ema",
        "task": "single_label",
        "top1": 73.43,
        "top1_err": 26.57,
        "top5": 91.364,
        "top5_err": 8.636,
        "param_count": 17,
        **info["preprocessing"],
    }


def test_the_line_of_the_seeds():
    result = {"top1": 73.43, "top1_err": 26.57, "top5": 91.364, "top5_err": 8.636, "images": 50_000}
    result |= {"param_count": 4879612, "image_size": 224, "crop_pct": 0.95, "crop_mode": "center"}
    assert summary({**result, "interpolation": "bicubic"}) == (
        "* Acc@1 73.430 (26.570) Acc@5 91.364 (8.636), 50,000 images, 4,879,612 parameters, 224 px, crop 0.95 center, "
        "bicubic"
    )


@pytest.mark.parametrize("batches", [1, 3, 99])
def test_batches_on_the_devices_at_a_time(digits, batches):
    """More of them change no figure; their number is that of steps before the figures of the first are read."""
    data, wanted = digits
    mesh, events = make_mesh(data=1), []
    step = make_eval_step(Pixels(10), data.preprocessing, mesh, jnp.float32)

    def noted(variables, batch):
        events.append("step")
        return step(variables, batch)

    class Noted:
        update = staticmethod(lambda *progress: events.append(progress))
        close = staticmethod(lambda: events.append("closed"))

    result = evaluate.evaluate(noted, VARIABLES, data, 60, mesh, progress=Noted, device_batches=batches)
    assert [result[key] for key in ("top1", "top5")] == [wanted[key] for key in ("top1", "top5")]
    assert events.index(next(event for event in events if event != "step")) == min(batches, 6)
    *_, last, closed = events
    assert closed == "closed" and last == (360, f"top-1 {wanted['top1']:.2f} %, top-5 {wanted['top5']:.2f} %")


def test_progress_without_a_terminal_is_a_few_lines(capsys):
    progress = Progress(1000)
    for done in range(10, 1001, 10):
        progress.update(done, "top-1 73.43 %")
    progress.close()
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 10
    assert re.fullmatch(r"100/1000 images, [\d.]+ images/s, top-1 73.43 %, 0:0\d:\d\d left", lines[0])
    assert lines[-1].endswith("0:00:00 left")


def test_write_replaces_the_file(tmp_path):
    for top1 in (1.0, 2.0):
        evaluate.write({"top1": top1}, tmp_path)
    assert json.loads((tmp_path / "eval.json").read_text()) == {"top1": 2.0}
    assert [path.name for path in tmp_path.iterdir()] == ["eval.json"]


def test_same_model():
    """JSON made lists of the tuples, and stochastic depth is for training alone."""
    mini = {"name": "maxvit_mini_32", "num_classes": 3}
    check_same_model({**mini, "embed_dim": (32, 96), "drop_path": 0.1}, {**mini, "embed_dim": [32, 96]}, "run")
    with pytest.raises(UserError, match=r"in run holds another model \(.*num_classes is 4 there and 3 here"):
        check_same_model(mini, {**mini, "num_classes": 4}, "run")
