"""Loss, windows and figures of segmentation by hand, and docs/segmentation.md, whose loop learns what it draws."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from maxmap import checkpoint
from maxmap.__main__ import main
from maxmap.errors import UserError
from maxmap.models import create_model
from maxmap.segmentation import IGNORED, confusion, figures, segment, segmentation_loss
from tests.test_features import BLOCK
from tests.tiny import ROOT, preprocessing, write_folder


def test_loss_is_the_mean_over_the_pixels_that_count(x64):
    """Two pixels of two classes and an ignored one, at the logits' own size; then logits of one pixel for all."""
    masks = jnp.array([[[0, 1, IGNORED]]])
    logits = jnp.array([[[[[1.0, 3.0], [0.0, 2.0], [9.0, -9.0]]]]])
    by_hand = (np.log(1 + np.exp(2.0)) + np.log(1 + np.exp(-2.0))) / 2
    assert abs(segmentation_loss({"logits": logits}, masks) - by_hand) < 1e-12
    coarse = jnp.array([[[[[0.5, 0.0]]]]])
    second = (np.log(1 + np.exp(-0.5)) + np.log(1 + np.exp(0.5))) / 2
    both = segmentation_loss({"logits": logits, "auxiliary": coarse}, masks, auxiliary=0.25)
    assert abs(both - (by_hand + 0.25 * second)) < 1e-12
    gradient = jax.grad(lambda x: segmentation_loss({"logits": x}, masks))(logits)
    assert not gradient[..., 2, :].any()
    assert segmentation_loss({"logits": logits}, jnp.full_like(masks, IGNORED)) == 0


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
    variables = jax.eval_shape(plain.init, jax.random.key(0), images)
    with pytest.raises(UserError, match="LinearHead classifies whole images: build the model with head='upernet'"):
        jax.eval_shape(lambda v, x: segment(plain, v, x), variables, images)
    with pytest.raises(UserError, match="leaves out pixels between windows"):
        segment(plain, variables, images, window=8, stride=9)
    with pytest.raises(UserError, match="no pixel of the masks counts"):
        figures(np.zeros((2, 2), int))


def run_document(name: str) -> dict[str, Any]:
    """Runs the code of a page of docs/ and returns its names."""
    (block,) = BLOCK.finditer((ROOT / "docs" / name).read_text("utf-8"))
    names: dict[str, Any] = {}
    exec(block["text"], names)
    return names


def test_a_command_about_whole_images_refuses_a_network_of_pixels(tmp_path, capsys):
    head, fields = {"name": "upernet", "channels": 4}, {"embed_dim": (4, 4, 4, 4), "depths": (1, 1, 1, 1)}
    model = {"name": "resnet50", "head": head, "num_classes": 2, "image_size": 32, **fields}
    like = jax.eval_shape(create_model(**model).init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), like)
    info = {"model": model, "classes": ["a", "b"], "preprocessing": preprocessing(), "weights": "raw", "step": 1}
    checkpoint.write_variables(tmp_path / "pixels", zeros, info)
    images, written = write_folder(tmp_path / "images", 0, 2, ("a", "b")), str(tmp_path / "pixels")
    photo, to = str(images / "val" / "a" / "000.png"), f"--to={tmp_path / 'table.csv'}"
    for command in (
        *(["predict", written, photo], ["predict", written, photo, to], ["explain", written, photo]),
        *(["validate", written, str(images)], ["report", written, str(images)], ["serve", written, "--port=0"]),
        ["train", "--config=quickstart", f"--workdir={tmp_path / 'run'}", "--config.model.head.name=upernet"],
    ):
        assert main(command) == 2, command
        assert "has a head that classifies pixels, not images" in capsys.readouterr().err, command
    assert not (tmp_path / "table.csv").exists() and not list(tmp_path.glob("pixels/*.json"))


def test_the_network_of_the_document_learns_what_it_draws(quick_compilation, plain_convolutions):
    result = run_document("segmentation.md")["result"]
    assert result["miou"] > 90
    assert min(result["iou"]) > 80


def test_the_maps_of_the_document_have_the_sizes_that_it_says(plain_convolutions):
    names = run_document("detection.md")
    assert names["square"] == [(112, 112), (56, 56), (28, 28), (14, 14), (7, 7)]
    assert names["wide"] == [(80, 112), (40, 56), (20, 28), (10, 14), (5, 7)]
