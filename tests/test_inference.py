"""Predictions with the model, the classes and the preprocessing that a checkpoint carries."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from maxmap import checkpoint
from maxmap.errors import UserError
from maxmap.inference import load, predict, preprocess
from tests.tiny import CLASSES, assert_equal, copied, create_tiny, preprocessing, write_image

pytestmark = pytest.mark.usefixtures("tiny_models")


@pytest.fixture(scope="module")
def variables() -> dict:
    variables = create_tiny("tiny", num_classes=3).init(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))
    # Far from uniform, so that another input is another answer.
    return copied({**variables, "params": jax.tree.map(lambda x: 3 * x + 0.1, variables["params"])})


def save(workdir: Path, variables: dict, **changes) -> Path:
    checkpoints = checkpoint.Checkpoints(workdir)
    info = {
        "model": {"name": "tiny", "num_classes": 3},
        "classes": list(CLASSES),
        "preprocessing": {**preprocessing(), **changes},
    }
    checkpoints.save(1, {"variables": variables}, info)
    checkpoints.close()
    return workdir


@pytest.fixture(scope="module")
def workdir(tmp_path_factory, variables) -> Path:
    return save(tmp_path_factory.mktemp("run"), variables)


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> list[Path]:
    """Five files; one of another size, one grey."""
    folder = tmp_path_factory.mktemp("images")
    paths = [folder / f"{i}.png" for i in range(5)]
    for i, path in enumerate(paths):
        write_image(path, i, i % 3, size=20 if i == 3 else 8)
    Image.open(paths[4]).convert("L").save(paths[4])
    return paths


def test_load_returns_model_variables_and_info(workdir, variables):
    model, loaded, info = load(workdir)
    assert model == create_tiny("tiny", num_classes=3)
    assert_equal(loaded, variables)
    assert (info["classes"], info["step"], info["weights"]) == (list(CLASSES), 1, "raw")
    assert info["preprocessing"] == preprocessing()


def test_photos_are_turned_for_a_checkpoint_that_was_trained_so(tmp_path, variables):
    exif = Image.Exif()
    exif[0x0112] = 6
    write_image(tmp_path / "upright.png", 1, 1)
    with Image.open(tmp_path / "upright.png") as photo:
        photo.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "photo.png", exif=exif)
        photo.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "plain.png")
    turned = predict(
        save(tmp_path / "turned", variables, exif=True), [tmp_path / "photo.png", tmp_path / "upright.png"]
    )
    same = dict(turned[1])  # up to the rounding of another place in the batch
    assert dict(turned[0]) == pytest.approx(same, rel=1e-5)
    older = predict(save(tmp_path / "older", variables), [tmp_path / "photo.png", tmp_path / "plain.png"])
    assert dict(older[0]) == pytest.approx(dict(older[1]), rel=1e-5) and dict(older[0]) != pytest.approx(same, rel=1e-2)


def test_probabilities_are_those_of_the_model(workdir, images, variables):
    results = predict(workdir, images, top=3, batch_size=2)  # the last batch is not full
    assert len(results) == 5
    for path, result in zip(images[:3], results[:3], strict=True):
        pixels = (np.asarray(Image.open(path), np.float32) / 255 - 0.5) / 0.25
        logits = create_tiny("tiny", num_classes=3).apply(variables, jnp.asarray(pixels)[None])["logits"]
        wanted = np.asarray(jax.nn.softmax(jnp.mean(logits, axis=0)))[0]
        assert [name for name, _ in result] == [CLASSES[k] for k in np.argsort(-wanted)]
        np.testing.assert_allclose([p for _, p in result], np.sort(wanted)[::-1], rtol=1e-4)
    for result in results:
        assert sum(probability for _, probability in result) == pytest.approx(1, abs=1e-5)
    assert results[0] != results[1]


def test_images_are_prepared_as_the_checkpoint_says(tmp_path, images):
    """One or several, of any kind and size: (pixels / 255 - mean) / std, NHWC."""
    info = {"preprocessing": {**preprocessing(), "mean": [0.1, 0.2, 0.3], "std": [0.5, 0.25, 0.125]}}
    array = np.asarray(Image.open(images[0]))
    wanted = (array / 255 - np.array([0.1, 0.2, 0.3])) / np.array([0.5, 0.25, 0.125])
    with Image.open(images[0]) as opened:
        for one in (images[0], str(images[0]), opened, array, [array], array[None]):
            prepared = preprocess(one, info)
            assert prepared.shape == (1, 8, 8, 3) and prepared.dtype == np.float32
            np.testing.assert_allclose(prepared[0], wanted, atol=1e-6)
        several = preprocess([images[3], opened, np.zeros((20, 30, 3), np.uint8)], info)
    assert several.shape == (3, 8, 8, 3) and np.array_equal(several[1], prepared[0])
    assert np.array_equal(several[0], preprocess(images[3], info)[0])
    for wrong in (array / 255, array[..., 0], array[..., :2], [array, array.astype(int)]):
        with pytest.raises(UserError, match=r"the image is an array .*: give uint8 \[height, width, 3\]"):
            preprocess(wrong, info)


def test_a_photo_of_pillows_is_prepared_as_its_file(tmp_path):
    """A JPEG of four colours, a palette with transparency, and one that lies on its side."""
    noise = np.random.default_rng(0).integers(0, 255, (40, 60, 3), np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(noise).convert("CMYK").save(tmp_path / "four.jpg", exif=exif)
    Image.fromarray(noise).convert("P").save(tmp_path / "palette.png", transparency=0)
    Image.fromarray(noise).save(tmp_path / "plain.jpg", exif=exif)
    for turned in (False, True):
        info = {"preprocessing": {**preprocessing(), "image_size": 32, "exif": turned}}
        for path in tmp_path.iterdir():
            with Image.open(path) as opened:
                assert np.array_equal(preprocess(opened, info), preprocess(path, info)), path.name


def test_top_classes_are_sorted(workdir, images):
    for top, names in ((1, 1), (2, 2), (5, 3)):
        (result,) = predict(workdir, images[:1], top=top)
        probabilities = [probability for _, probability in result]
        assert len(result) == len({name for name, _ in result}) == names
        assert probabilities == sorted(probabilities, reverse=True) and sum(probabilities) <= 1 + 1e-5
    with pytest.raises(UserError, match="top is 0: give a value of type int of at least 1"):
        predict(workdir, images, top=0)


@pytest.mark.parametrize(
    "change",
    [{"mean": [0.1, 0.5, 0.5]}, {"std": [0.5, 0.25, 0.25]}, {"crop_pct": 0.5}, {"interpolation": "nearest"}],
    ids=lambda change: next(iter(change)),
)
def test_the_preprocessing_is_that_of_the_checkpoint(tmp_path, workdir, images, variables, change):
    other = save(tmp_path, variables, **change)
    one, two = (predict(path, images[3:4], top=3)[0] for path in (workdir, other))
    assert max(abs(dict(one)[name] - dict(two)[name]) for name in CLASSES) > 1e-3


def test_bad_input_is_one_sentence(tmp_path, workdir, images):
    text, cut = tmp_path / "text.png", tmp_path / "cut.png"
    text.write_text("not an image")
    cut.write_bytes(images[3].read_bytes()[:100])
    for path in (tmp_path / "missing.png", text, cut, tmp_path):
        with pytest.raises(UserError, match=r"cannot read .*: give the path of an image file that is whole") as error:
            predict(workdir, [images[0], path])
        assert str(path) in str(error.value)
    with pytest.raises(UserError, match=r"no checkpoint in .*nothing"):
        predict(tmp_path / "nothing", images)
