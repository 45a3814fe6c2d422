"""Loss, windows and figures of segmentation by hand, and a run that learns shapes: by every command that takes it."""

import csv
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from PIL import Image

from maxmap import checkpoint, tasks
from maxmap.__main__ import main
from maxmap.config import bind
from maxmap.data.paired import places
from maxmap.data.pipeline import open_data
from maxmap.data.preprocessing import cropped
from maxmap.errors import UserError
from maxmap.evaluate import evaluate, make_eval_step
from maxmap.evaluation_commands import _mask_writer
from maxmap.inference import load, predict, predict_masks
from maxmap.losses import total_loss
from maxmap.metrics import IGNORED
from maxmap.models import create_model
from maxmap.pictures import lay_mask
from maxmap.segmentation import confusion, figures, segment
from maxmap.shapes import eval_shape_of_init
from maxmap.sharding import make_mesh
from maxmap.tasks.segmentation import Segmentation
from maxmap.train import loop
from maxmap.validate import _graph_step
from tests.shapes import CLASSES, settings, write_shapes
from tests.test_features import BLOCK
from tests.tiny import ROOT, preprocessing, read_lines, without_timings, write_folder


def test_loss_is_the_mean_over_the_pixels_that_count(x64):
    """Two pixels of two classes and an ignored one, at the logits' own size; then logits of one pixel for all."""
    masks = jnp.array([[[0, 1, IGNORED]]])
    logits = jnp.array([[[[[1.0, 3.0], [0.0, 2.0], [9.0, -9.0]]]]])
    each = np.log(1 + np.exp(2.0)), np.log(1 + np.exp(-2.0))
    assert abs(total_loss({"logits": logits}, masks)[0] - sum(each) / 2) < 1e-12
    weighted = total_loss({"logits": logits}, masks, weights=jnp.array([3.0, 1.0]))[0]
    assert abs(weighted - (3 * each[0] + each[1]) / 2) < 1e-12
    coarse = jnp.array([[[[[0.5, 0.0]]]]])
    second = (np.log(1 + np.exp(-0.5)) + np.log(1 + np.exp(0.5))) / 2
    loss, parts = total_loss({"logits": logits, "auxiliary": coarse}, masks, auxiliary=0.25)
    assert abs(loss - (sum(each) / 2 + 0.25 * second)) < 1e-12 and abs(parts["auxiliary"] - 0.25 * second) < 1e-12
    gradient = jax.grad(lambda x: total_loss({"logits": x}, masks)[0])(logits)
    assert not gradient[..., 2, :].any()
    assert total_loss({"logits": logits}, jnp.full_like(masks, IGNORED))[0] == 0


class Pixels(nn.Module):
    """A backbone that hands on its images."""

    image_size: int = 4

    def __call__(self, x: jax.Array, *, train: bool = False) -> list[jax.Array]:
        return [x]


class Centred(nn.Module):
    """Logits of a pixel: its colours less the mean of what the network sees, so that windows differ."""

    @nn.compact
    def __call__(self, features: Any, *, train: bool = False) -> dict[str, jax.Array]:
        x = features[-1]
        mean = jnp.mean(x, axis=(1, 2))
        return {"logits": (x - mean[:, None, None])[None], "embedding": mean}


def test_windows_cover_an_image_and_are_averaged_where_they_overlap(x64):
    model = create_model(Pixels(), head=Centred())
    images = np.random.default_rng(0).standard_normal((2, 5, 7, 3))
    whole = segment(model, {}, images)
    assert np.allclose(whole, images - images.mean((1, 2), keepdims=True), atol=1e-12)

    wanted, times = np.zeros_like(images), np.zeros((5, 7, 1))
    for y in (0, 1):  # windows of 4 x 3 every 3 x 2 pixels; the last ones end where the image ends
        for x in (0, 2, 4):
            part = images[:, y : y + 4, x : x + 3]
            wanted[:, y : y + 4, x : x + 3] += part - part.mean((1, 2), keepdims=True)
            times[y : y + 4, x : x + 3] += 1
    slid = segment(model, {}, images, window=(4, 3), stride=(3, 2))
    assert np.allclose(slid, wanted / times, atol=1e-12)
    assert np.allclose(segment(model, {}, images, window=8), whole, atol=1e-12)


def test_figures_are_counted_by_hand():
    truth = np.array([[0, 0, 0, 1], [1, 2, IGNORED, IGNORED]])
    predicted = np.array([[0, 0, 1, 1], [2, 2, 0, 3]])
    counts = confusion(predicted, truth, 4)
    assert counts.tolist() == [[2, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 0], [0, 0, 0, 0]]
    found = figures(counts)
    assert found["iou"] == pytest.approx([200 / 3, 100 / 3, 50, None])
    assert found["miou"] == pytest.approx(50)
    assert found["pixel_accuracy"] == pytest.approx(400 / 6)
    assert found["class_accuracy"] == pytest.approx(100 * (2 / 3 + 1 / 2 + 1) / 3)
    halves = confusion(predicted[0], truth[0], 4) + confusion(predicted[1], truth[1], 4)
    assert np.array_equal(halves, counts)


def test_misuse_is_one_sentence():
    images = jnp.zeros((1, 32, 32, 3))
    plain = create_model("maxvit_mini_32", num_classes=3)
    variables = eval_shape_of_init(plain.init, jax.random.key(0), images)
    with pytest.raises(UserError, match="LinearHead classifies whole images: build the model with head='upernet'"):
        jax.eval_shape(lambda v, x: segment(plain, v, x), variables, images)
    with pytest.raises(UserError, match="leaves out pixels between windows"):
        segment(plain, variables, images, window=8, stride=9)
    with pytest.raises(UserError, match="no pixel of the masks counts"):
        figures(np.zeros((2, 2), int))


def run_document(name: str) -> dict[str, Any]:
    """Runs the code of a page of docs/ and returns its names."""
    (block,) = (
        match for match in BLOCK.finditer((ROOT / "docs" / name).read_text("utf-8")) if match["language"] == "python"
    )
    names: dict[str, Any] = {}
    exec(block["text"], names)
    return names


def test_a_network_of_pixels_that_says_no_task_is_refused(tmp_path, capsys):
    head, fields = {"name": "upernet", "channels": 4}, {"embed_dim": (4, 4, 4, 4), "depths": (1, 1, 1, 1)}
    model = {"name": "resnet50", "head": head, "num_classes": 2, "image_size": 32, **fields}
    like = jax.eval_shape(create_model(**model).init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), like)
    info = {"model": model, "classes": ["a", "b"], "preprocessing": preprocessing(), "weights": "raw", "step": 1}
    checkpoint.write_variables(tmp_path / "pixels", zeros, info)
    images, written = write_folder(tmp_path / "images", 0, 2, ("a", "b")), str(tmp_path / "pixels")
    photo = str(images / "val" / "a" / "000.png")
    other = ("--config.model.name=convnext_tiny", "--config.model.head.name=upernet")
    for command in (
        *(["predict", written, photo], ["validate", written, str(images)]),
        ["train", "--config=quickstart", f"--workdir={tmp_path / 'run'}", *other],
    ):
        assert main(command) == 2, command
        assert "has a head that classifies pixels, not images" in capsys.readouterr().err, command
    assert not list(tmp_path.glob("pixels/*.json"))


LONG = {"epochs": 16, "evaluate__every_epochs": 16, "evaluate__batch_size": 22, "checkpoint__every": 128}


class Colours(nn.Module):
    """Logits of a pixel: its colours."""

    @nn.compact
    def __call__(self, features: Any, *, train: bool = False) -> dict[str, jax.Array]:
        return {"logits": features[-1][None], "embedding": jnp.mean(features[-1], axis=(1, 2))}


@pytest.fixture(scope="module")
def shapes(tmp_path_factory) -> Path:
    return write_shapes(tmp_path_factory.mktemp("shapes"))


@pytest.mark.parametrize("flip", [False, True])
def test_pixels_are_counted_exactly_on_any_number_of_devices_and_in_any_batches(shapes, flip):
    """Each pixel of a mask file, by the network's answer where the image shows it."""
    options = {"image_size": 24, "crop_pct": 1.0, "crop_mode": "border", "mean": (0,) * 3, "std": (1,) * 3}
    data = open_data("masks", shapes, task="segmentation", train_split=None, threads=1, **options)
    wanted = np.zeros((3, 3), np.int64)
    for i in range(len(data.val)):
        image, mask = data.val[i]
        answers = cropped(image, data.preprocessing).argmax(-1)
        wanted += confusion(answers[np.ix_(*places(mask.shape[::-1], data.preprocessing))], mask, 3)
    model = create_model(Pixels(), head=Colours())
    graph = SimpleNamespace(logits=lambda pixels, _: pixels / np.float32(255))
    for devices, batch_size in ((1, 4), (8, 100), (1, 22)):
        mesh = make_mesh(data=devices)
        step = make_eval_step(model, data.preprocessing, mesh, jnp.float32, flip=flip, task=Segmentation())
        if batch_size == 22:
            step = _graph_step(graph, data.preprocessing, None, flip, None, Segmentation())
        result = evaluate(step, {"params": {}}, data, batch_size, mesh, rows := [], task=Segmentation())
        assert {key: result[key] for key in ("miou", "pixel_accuracy", "class_accuracy")} == {
            key: value for key, value in figures(wanted).items() if key != "iou"
        }
        assert [result["classes"][name]["pixels"] for name in CLASSES] == wanted.sum(1).tolist()
        assert sum(row["pixels"] for row in rows) == wanted.sum() and result["images"] == len(rows) == 22
        right = sum(row["pixels"] * row["pixel_accuracy"] for row in rows) / 100
        assert round(right) == np.trace(wanted)


def test_a_batch_of_too_many_pixels_is_refused():
    labels = jax.ShapeDtypeStruct((4096, 1024, 1024, 1), jnp.uint8)
    logits, mask = jax.ShapeDtypeStruct((4096, 8, 8, 3), jnp.float32), jax.ShapeDtypeStruct((4096,), bool)
    with pytest.raises(UserError, match="a batch of 4096 masks has too many pixels to count: give a smaller batch"):
        jax.eval_shape(Segmentation().measure, logits, logits, labels, mask)


@pytest.fixture(scope="module")
def run(shapes, tmp_path_factory, quick_compilation) -> Path:
    """A run of 16 epochs of 8 steps."""
    workdir = tmp_path_factory.mktemp("run") / "run"
    loop.run(bind(settings(shapes, **LONG)), workdir)
    return workdir


def test_a_run_learns_the_shapes_that_it_is_shown(run):
    result = json.loads((run / "eval.json").read_text())
    assert result["miou"] > 90 and result["task"] == "segmentation" and result["images"] == 22
    assert min(row["iou"] for row in result["classes"].values()) > 80
    assert (run / "curves.png").is_file() and load(run)[2]["classes"] == list(CLASSES)


@pytest.mark.long
def test_a_resumed_run_takes_the_same_steps(run, shapes, tmp_path):
    values = settings(shapes, **LONG)
    for steps in (5, 8):
        loop.run(bind({**values, "steps": steps}), tmp_path / "run")
    found, wanted = (
        {row["step"]: without_timings(row) for row in read_lines(each / "metrics.jsonl") if row["kind"] == "train"}
        for each in (tmp_path / "run", run)
    )
    for step in (2, 4, 6, 8):  # the first ones were taken before the stop
        assert found[step] == wanted[step]


def test_validate_and_predict_say_the_same(run, shapes, tmp_path, capsys):
    """Of the pixels of the mask that is written for an image so many are right as `predictions.csv` says."""
    wanted = json.loads((run / "eval.json").read_text())
    files = [f"--json={tmp_path / 'v.json'}", f"--csv={tmp_path / 'v.csv'}"]
    assert main(["validate", str(run), str(shapes), *files]) == 0
    told = capsys.readouterr().out
    assert f"* mIoU {wanted['miou']:.2f} %, pixel accuracy {wanted['pixel_accuracy']:.2f} %" in told
    assert "22 images of 3 classes" in told
    rows = list(csv.DictReader((tmp_path / "v.csv").read_text().splitlines()))
    images = [row["name"] for row in rows[:4]]
    assert main(["predict", str(run), *images, f"--masks={tmp_path / 'masks'}"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for row, line, image in zip(rows, lines, images, strict=False):
        picture = Image.open(tmp_path / "masks" / Path(image).name)
        found, truth = np.asarray(picture), np.asarray(Image.open(shapes / "masks" / "val" / Path(image).name))
        assert picture.mode == "P" and picture.getpalette()[3:9] == [128, 0, 0, 0, 128, 0]
        right = 100 * np.mean((found == truth)[truth != IGNORED])
        assert right == pytest.approx(float(row["pixel_accuracy"]), abs=1e-3) and right > 80
        share = 100 * np.mean(found == 0)
        assert line.startswith(f"{image}: ground {share:.1f} %, ")
    assert dict(predict(run, images[3:4])[0])["ground"] == np.mean(found == 0)
    (mask,) = predict_masks(run, images[3:4], window=48)  # one window, as large as what the network sees
    assert np.array_equal(mask, found)


def test_an_onnx_file_says_what_its_checkpoint_says(run, shapes, tmp_path):
    assert main(["export", str(run), str(tmp_path / "x.onnx")]) == 0
    assert main(["validate", str(tmp_path / "x.onnx"), str(shapes), f"--json={tmp_path / 'v.json'}"]) == 0
    found, wanted = (json.loads(file.read_text()) for file in (tmp_path / "v.json", run / "eval.json"))
    assert found["miou"] == pytest.approx(wanted["miou"], abs=0.02) and found["step"] == wanted["step"] == 128


def test_the_python_of_the_document_runs(run, shapes, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("runs").mkdir()
    Path("runs/masks").symlink_to(run)
    Path("photo.jpg").symlink_to(shapes / "images" / "val" / "002.png")
    names = run_document("segmentation.md")
    assert names["mask"].shape == (80, 96) and names["logits"].shape == (1, 48, 48, 3)
    rows, columns = places((96, 80), names["info"]["preprocessing"])
    assert np.array_equal(names["mask"], np.asarray(names["logits"])[0].argmax(-1)[np.ix_(rows, columns)])
    assert names["result"]["miou"] == 100


def test_what_has_no_answer_for_pixels_says_so(run, shapes, tmp_path, capsys):
    workdir = str(run)
    image = str(shapes / "images" / "val" / "000.png")
    for command, says in (
        (["explain", workdir, image], "explain is for one class per image"),
        (["report", workdir, str(shapes)], "report is for one class per image"),
        (["serve", workdir, "--port=0"], "serve is for one class per image"),
        (["predict", workdir, image, f"--to={tmp_path / 'table.csv'}"], "give --masks=FOLDER in place of --to"),
        (["predict", workdir, image, image, f"--masks={tmp_path}"], "2 images are called '000', and so would their"),
        (["validate", workdir, str(shapes), "--crops"], "--crops is for whole images"),
        (["validate", workdir, str(shapes), "--crop-pct=0.9"], "every pixel of a mask counts"),
        (["validate", workdir, str(shapes), "--tfds=coco"], "leave out --tfds and give a folder"),
        (["validate", workdir, str(tmp_path)], "has no folder 'images': give a folder with images/train/NAME.jpg"),
    ):
        assert main(command) == 2, command
        assert says in capsys.readouterr().err, command
    for changes, says in (
        ({"model__head": "linear"}, "has a head that classifies images, not pixels"),
        ({"mix__mixup": 0.2}, "mix is for classes of images and not of pixels"),
        ({"loss__name": "bce"}, "set --config.loss.name=softmax"),
        ({"augment__rand_augment": "rand-m9"}, "augment.rand_augment turns and shears images and not their masks"),
        ({"data__class_weights": "inverse"}, "give pairs"),
    ):
        with pytest.raises(UserError, match=says):
            loop.run(bind(settings(shapes, **changes)), tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_a_mask_does_not_replace_its_image(tmp_path, monkeypatch):
    Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(tmp_path / "photo.png")
    with pytest.raises(UserError, match="would replace the image itself: give another folder"):
        _mask_writer(tmp_path, [tmp_path / "photo.png"])
    monkeypatch.chdir(tmp_path)
    _mask_writer(Path("out"), [Path("photo.png")])(Path("photo.png"), np.ones((4, 4), np.uint8))
    with Image.open("out/photo.png") as mask:
        assert mask.mode == "P" and np.array_equal(mask, np.ones((4, 4)))


def test_the_batch_that_is_shown_says_what_its_masks_hold():
    mask = np.array([[0, 0, 0, 1], [IGNORED, IGNORED, 0, IGNORED]])
    assert Segmentation().caption(mask, CLASSES) == "80 % ground\n20 % square"
    laid = lay_mask(np.full((2, 4, 3), 100, np.uint8), mask)
    assert laid[0, [0, 3]].tolist() == [[50, 50, 50], [114, 50, 50]]
    assert tasks.of_checkpoint({"task": tasks.describe(Segmentation())}) == Segmentation()


def test_the_maps_of_the_document_have_the_sizes_that_it_says(plain_convolutions):
    names = run_document("detection.md")
    assert names["square"] == [(112, 112), (56, 56), (28, 28), (14, 14), (7, 7)]
    assert names["wide"] == [(80, 112), (40, 56), (20, 28), (10, 14), (5, 7)]
