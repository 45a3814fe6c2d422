"""Explanations: shares that add up to the logit, attention that follows the pixels, Grad-CAM by hand, the command."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from PIL import Image

import maxmap
from maxmap import checkpoint
from maxmap.__main__ import main
from maxmap.models import average
from maxmap.pictures import overlay
from tests.marks import cases
from tests.test_grid import BACKBONES, HEAD_FIELDS, made, small
from tests.test_readme import BLOCK
from tests.tiny import CLASSES, ROOT, preprocessing, write_image
from tests.zoo import initial_values, quick

pytestmark = pytest.mark.usefixtures("quick_compilation")

HEADS = {
    "MAP": ("map", {"branches": 2, "tokens": 2}),
    "MAP, linear classifiers": ("map", {"classifier": "linear", "self_distill": False, "branches": 2}),
    "MAP, light": ("map", {"light": True, "branches": 2}),
    "MAP of two blocks with learned tokens": ("map", {"gram": False, "layers": 2, "interactive": False}),
    "GA": ("gramian", {"branches": 2}),
}
TOKENS = {"MAP": 2, "MAP, linear classifiers": 2, "MAP, light": 1, "MAP of two blocks with learned tokens": 2, "GA": 1}


def built(family, head, fields=None, size=32):
    """A small model with every leaf random, and two images."""
    model = small(family, head, fields)
    images = np.random.default_rng(0).standard_normal((2, size, size, 3))
    features, body = made(model.backbone, images)
    of_head = made(model.head, features)[1]
    return model, {key: {"backbone": body[key], "head": of_head[key]} for key in ("params", "batch_stats")}, images


@pytest.mark.parametrize("kind", cases(HEADS, long=set(HEADS) - {"MAP", "GA"}))
def test_shares_add_up_to_the_logit(kind, x64, plain_convolutions):
    model, variables, images = built("convnext", *HEADS[kind])
    classes = [3, 3]
    found = maxmap.explain(model, variables, images, classes)
    outputs = quick(model.apply, variables, images)
    logits = average(outputs)[jnp.arange(2), jnp.asarray(classes)]
    np.testing.assert_allclose(found.logits, logits, rtol=1e-12)
    assert found.shares.shape == (2, model.head.branches, TOKENS[kind])
    np.testing.assert_allclose(found.shares.sum((1, 2)) + found.bias, logits, rtol=1e-10)
    of_branch = outputs["logits"][:, jnp.arange(2), jnp.asarray(classes)].T / model.head.branches
    assert np.ptp(of_branch - found.shares.sum(2), axis=0).max() < 1e-12  # what is left is a bias, for any image
    assert found.attention.shape[:3] == found.shares.shape
    assert found.saliency.shape[0] == 2 and np.all(found.saliency >= 0)


def test_attention_follows_the_pixels(x64):
    """Gram matrix and attention do not know where a pixel is: in another order, it gets the same attention."""
    model = small("convnext", "map", {"level": -1, "branches": 2})
    x = np.random.default_rng(0).standard_normal((2, 3, 4, 16))
    order = np.random.default_rng(1).permutation(12)
    moved = x.reshape(2, 12, 16)[:, order].reshape(x.shape)
    variables = made(model.head, [x])[1]

    def run(features):
        outputs, sown = model.head.apply(variables, [features], mutable=["intermediates"])
        return outputs["logits"], model.head.attention_of(sown["intermediates"])

    (logits, attention), (of_moved, attention_moved) = quick(run, x), quick(run, moved)
    assert model.head.attended_size([x]) == (3, 4)
    np.testing.assert_allclose(of_moved, logits, rtol=1e-9)
    np.testing.assert_allclose(attention_moved, attention[..., order], rtol=1e-9)
    assert np.ptp(attention, axis=-1).min() > 1e-4


def test_grad_cam_of_a_mean_is_the_class_activation_map(x64, plain_convolutions):
    """Behind a global mean and one linear map, the gradient at every pixel is the class's weight by the pixels."""
    model, variables, images = built("convnext", "linear", {"norm": "none"})
    found = maxmap.explain(model, variables, images)
    features = quick(lambda v, x: model.apply(v, x, method="features"), variables, images)[-1]
    logits = average(quick(model.apply, variables, images))
    assert np.array_equal(found.classes, np.argmax(logits, axis=-1))
    weights = variables["params"]["head"]["fc"]["kernel"][:, found.classes].T / features[0, ..., 0].size
    wanted = np.maximum(np.einsum("bhwc,bc->bhw", features, weights), 0)
    np.testing.assert_allclose(found.saliency, wanted, rtol=1e-9, atol=1e-12)
    assert found.shares is found.bias is found.attention is None


class Shrinking(nn.Module):
    """A backbone whose last map has one pixel, as a ResNet's of 32 pixels."""

    image_size: int = 4

    def __call__(self, x, *, train=False):
        return [x, jnp.mean(x, axis=(1, 2), keepdims=True)]


def test_a_last_map_of_one_pixel_is_no_class_token(x64):
    model = maxmap.create_model(Shrinking(), head={"name": "linear", "norm": "none"}, num_classes=2)
    images = np.random.default_rng(0).uniform(size=(2, 4, 4, 3))
    variables = {"params": {"head": {"fc": {"kernel": np.array([[1.0, 0], [0.5, -1], [0, 0]]), "bias": np.zeros(2)}}}}
    wanted = np.maximum(images.mean((1, 2)) @ variables["params"]["head"]["fc"]["kernel"], 0)[range(2), [0, 1]]
    np.testing.assert_allclose(maxmap.explain(model, variables, images, [0, 1]).saliency[:, 0, 0], wanted, rtol=1e-9)
    assert wanted[0] > 0 == wanted[1]


@pytest.mark.parametrize(("family", "side"), [("vit", 4), ("pit", 3)])
def test_networks_with_a_class_token(family, side, x64):
    """The last map is the token: Grad-CAM reads the pixels' tokens in front of the last attention."""
    model, variables, images = built(family, "linear", size=small(family).backbone.image_size)
    saliency = maxmap.explain(model, variables, images, [0, 1]).saliency
    assert saliency.shape == (2, side, side)
    assert np.all(np.isfinite(saliency)) and saliency.max() > 0


def test_an_overlay_is_red_where_a_map_is_largest():
    image = np.full((8, 8, 3), 128, np.uint8)
    seen = overlay(image, np.array([[0, 0], [-5, 2]])).astype(int)
    assert np.array_equal(seen[0, 0], seen[7, 0])  # nothing and less than nothing
    red, blue = seen[..., 0] - seen[..., 2], seen[..., 2] - seen[..., 0]
    assert red[7, 7] == red.max() > 0 and blue[0, 0] > 0


def test_the_command(tmp_path, capsys):
    """Pictures, numbers that add up, and the probability that `predict` gives; mistakes are one sentence."""
    name, fields = BACKBONES["convnext"]
    head = {"name": "map", **HEAD_FIELDS["map"], "branches": 2}
    given = {"name": name, **fields, "head": head, "num_classes": 3}
    info = {
        "model": given,
        "classes": list(CLASSES),
        "preprocessing": preprocessing() | {"image_size": 32, "crop_pct": 0.75},
    }
    model = maxmap.create_model(**given)
    variables = initial_values(model, jnp.zeros((1, 32, 32, 3)))
    folder, photo, out = tmp_path / "made", tmp_path / "photo.png", tmp_path / "out"
    checkpoint.write_variables(folder, variables, info | {"step": 0, "weights": "raw"})
    write_image(photo, 0, 1, size=40)
    assert main(["explain", str(folder), str(photo), str(photo), f"--out={out}", f"--class={CLASSES[1]}"]) == 0
    rows = json.loads((out / "explain.json").read_text())
    (predicted,) = maxmap.predict(folder, [photo])
    assert [row["picture"] for row in rows] == ["00000_photo.png", "00001_photo.png"]
    for row in rows:
        assert row["class"] == CLASSES[1]
        assert row["probability"] == pytest.approx(dict(predicted)[CLASSES[1]], rel=1e-4)
        assert np.sum(row["shares"]) + row["bias"] == pytest.approx(row["logit"], rel=1e-4)
        with Image.open(out / row["picture"]) as picture:
            assert min(picture.size) > 100
    logit = rows[0]["logit"]
    assert capsys.readouterr().out.startswith(
        f"{photo}: {CLASSES[1]} {100 * rows[0]['probability']:.1f} %, logit {logit:.2f} = branch 0 "
    )
    assert main(["explain", str(folder), str(photo), "--class=nothing"]) == 2
    assert "has no class 'nothing'; the nearest are" in capsys.readouterr().err
    assert main(["explain", str(folder), str(photo), f"--out={photo}"]) == 2
    assert capsys.readouterr().err.startswith(f"maxmap: cannot make the folder {photo} ")
    assert main(["explain", str(folder), str(folder), f"--out={out}"]) == 2
    assert capsys.readouterr().err.startswith("maxmap: cannot read ")


def test_the_documents_snippet_runs(small_demo):
    (block,) = (m["text"] for m in BLOCK.finditer((ROOT / "docs" / "explain.md").read_text("utf-8")) if m["language"])
    session = {}
    exec(compile(block, "docs/explain.md", "exec"), session)
    found = session["found"]
    np.testing.assert_allclose(found.shares.sum((1, 2)) + found.bias, found.logits, rtol=1e-4)
    assert found.attention.shape[:3] == found.shares.shape
