"""Images of one, four and five channels: from the file to training, resuming, validation, prediction and export."""

import io
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tifffile
from PIL import Image
from safetensors.numpy import load_file, save_file

from maxmap import checkpoint, create_model, evaluate, inference
from maxmap.config import bind
from maxmap.convert.load import export, read_foreign
from maxmap.convert.torch import from_torch, to_torch
from maxmap.data.augment import augment
from maxmap.data.decode import eval_crop, train_crop
from maxmap.data.inspection import inspect
from maxmap.data.preprocessing import of_channels
from maxmap.errors import UserError
from maxmap.models import average
from maxmap.onnx.export import export_onnx
from maxmap.onnx.session import Network
from maxmap.pictures import draw_grid, overlay
from maxmap.programs import export_program
from maxmap.train import loop
from maxmap.train.build import build
from maxmap.train.plan import plan
from maxmap.train.start import first_state
from maxmap.validate import validate
from tests.marks import cases
from tests.test_grid import BACKBONES
from tests.tiny import (
    CLASSES,
    assert_equal,
    create_tiny,
    preprocessing,
    read_lines,
    settings_for,
    use_models,
    without_timings,
)
from tests.zoo import filled, initial_values, quick

pytestmark = pytest.mark.usefixtures("quick_compilation")

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (12, 20, 5), np.uint8)


def npy(array: np.ndarray) -> bytes:
    np.save(file := io.BytesIO(), array)
    return file.getvalue()


def tiff(array: np.ndarray, **options) -> bytes:
    tifffile.imwrite(file := io.BytesIO(), array, **{"photometric": "minisblack", "planarconfig": "contig"} | options)
    return file.getvalue()


def picture(array: np.ndarray, format: str = "PNG", **options) -> bytes:
    Image.fromarray(np.ascontiguousarray(array)).save(file := io.BytesIO(), format, **options)
    return file.getvalue()


def resized(bands: np.ndarray) -> np.ndarray:
    """Each channel on its own, by Pillow."""
    planes = [Image.fromarray(np.ascontiguousarray(band)) for band in np.moveaxis(bands, -1, 0)]
    return np.stack([np.asarray(plane.resize((8, 8), Image.Resampling.BICUBIC)) for plane in planes], axis=-1)


def crop(image: bytes | np.ndarray, channels: int) -> np.ndarray:
    about = {"size": 8, "crop_pct": 1.0, "mode": "squash", "interpolation": "bicubic"}
    return eval_crop(image, **about, mean=[0.5] * channels)


PLANES = np.ascontiguousarray(PIXELS.transpose(2, 0, 1))
FIVE = {
    "npy": npy(PIXELS),
    "Fortran": npy(np.asfortranarray(PIXELS)),
    "array": PIXELS,
    "tiff": tiff(PIXELS),
    "planes": tiff(PLANES, planarconfig="separate", compression="zlib", predictor=2),
    "tiles": tiff(PIXELS, tile=(16, 16), compression="zlib"),
    "colours and more": tiff(PIXELS, photometric="rgb"),
}
RGBA = PIXELS[..., :4]
FOUR = {
    "png": picture(RGBA),
    "tiff": picture(RGBA, "TIFF"),
    "near infrared": tiff(RGBA, photometric="rgb", extrasamples=[0]),
    "bands": tiff(RGBA),
    "planes": tiff(PLANES[:4], planarconfig="separate"),
    "npy": npy(RGBA),
    "array": RGBA,
}


@pytest.mark.parametrize("image", FIVE.values(), ids=FIVE.keys())
def test_five_channels_are_resized_each_on_its_own(image):
    assert np.array_equal(crop(image, 5), resized(PIXELS))
    assert np.array_equal(train_crop(image, np.random.default_rng(3), size=8, channels=5), TRAINED)


TRAINED = train_crop(PIXELS, np.random.default_rng(3), size=8, channels=5)


@pytest.mark.parametrize("image", FOUR.values(), ids=FOUR.keys())
def test_four_channels_are_rgba(image):
    assert np.array_equal(crop(image, 4), resized(RGBA))


def test_a_picture_without_transparency_is_opaque_and_a_colour_becomes_grey():
    colours, grey = PIXELS[..., :3], np.asarray(Image.fromarray(PIXELS[..., :3].copy()).convert("L"))
    for file in (picture(colours), picture(colours, "JPEG", quality=100, subsampling=0)):
        plain = np.asarray(Image.open(io.BytesIO(file)).convert("RGB"))
        assert np.array_equal(crop(file, 4), np.concatenate([crop(file, 3), np.full((8, 8, 1), 255)], -1))
        by_hand = np.asarray(Image.fromarray(plain).convert("L"))
        assert np.array_equal(crop(file, 1), resized(by_hand[..., None]))
    assert np.array_equal(crop(picture(grey), 1), crop(picture(colours), 1))
    assert np.array_equal(crop(npy(grey), 1), crop(picture(colours), 1))
    deep = picture(grey.astype(np.uint16) << 8)
    assert np.array_equal(crop(deep, 1), crop(picture(grey), 1))


EXIF = Image.Exif()
EXIF[274] = 6


def test_an_image_is_turned_as_a_whole():
    about = {"size": 8, "crop_pct": 1.0, "mode": "squash", "interpolation": "bicubic", "exif": True}
    file = picture(RGBA, exif=EXIF)
    assert np.array_equal(eval_crop(file, **about, mean=[0.5] * 4), resized(np.rot90(RGBA, -1)))
    file = tiff(PIXELS, extratags=[(274, 3, 1, 6, True)])
    assert np.array_equal(eval_crop(file, **about, mean=[0.5] * 5), resized(np.rot90(PIXELS, -1)))


@pytest.mark.parametrize(
    ("image", "channels", "says"),
    [
        (picture(RGBA), 5, "it is a picture, and 5 channels are wanted: save it as .npy or TIFF with as many"),
        (npy(RGBA), 5, "it has 4 channels, and 5 are wanted"),
        (tiff(RGBA), 5, "it has 4 channels, and 5 are wanted"),
        (
            npy(PIXELS.astype(np.uint16)),
            5,
            r"the array is uint16 \[12, 20, 5\]: save uint8",
        ),
        (tiff(PIXELS.astype(np.uint16)), 5, "the numbers of the TIFF are not of 8 bits"),
        (npy(PIXELS)[:-1], 5, "holds 1199 numbers, and its header says another number"),
        (tiff(PIXELS)[:-500], 5, "the TIFF is damaged"),
        (npy(np.array([[{}]], object)), 5, r"the array is object \[1, 1, 1\]"),
    ],
)
def test_what_is_refused(image, channels, says):
    with pytest.raises(OSError, match=says):
        crop(image, channels)


def test_means_of_colours_fit_any_channels():
    assert of_channels((0.1, 0.2, 0.6), 3, "mean") == [0.1, 0.2, 0.6]
    assert of_channels((0.1, 0.2, 0.6), 1, "mean") == [pytest.approx(0.3)]
    assert of_channels((0.1, 0.2, 0.6), 5, "mean") == [0.1, 0.2, 0.6, 0.1, 0.2]
    assert of_channels((0.1, 0.2), 2, "mean") == [0.1, 0.2]
    with pytest.raises(UserError, match=r"data.mean has 2 values, and the images have 5 channels: give 5, or three"):
        of_channels((0.1, 0.2), 5, "data.mean")


def test_grey_is_augmented_as_the_colour_that_it_is():
    grey = RNG.integers(0, 256, (6, 9, 9, 1), np.uint8)

    def augmented(images, **options):
        return augment(jax.random.key(0), images, jnp.zeros(len(images), int), **options)[0]

    def both(images):
        one = augmented(images, mean=(0.4,), rand_augment="rand-m9-n2-p1")
        return one, augmented(jnp.repeat(images, 3, -1), mean=(0.4,) * 3, rand_augment="rand-m9-n2-p1")

    one, colour = quick(both, jnp.asarray(grey))
    assert one.shape == grey.shape and not np.array_equal(one, grey)
    assert np.array_equal(colour, np.repeat(one, 3, axis=-1))
    with pytest.raises(UserError, match="are for colours and grey, and the images have 5 channels: set both to None"):
        augmented(jnp.zeros((1, 9, 9, 5), jnp.uint8), mean=(0.5,) * 5, color_jitter=0.4)


def test_pictures_show_three_channels_as_colours():
    heat = np.ones((2, 2))
    for image, colours in ((PIXELS, PIXELS[..., :3]), (PIXELS[..., :1], np.repeat(PIXELS[..., :1], 3, -1))):
        assert np.array_equal(overlay(image, heat), overlay(colours, heat))
        drawn = np.asarray(draw_grid(image[None], ["one"]))
        assert np.array_equal(drawn[3:99:8, 3:163:8], colours)


def test_check_looks_into_arrays(tmp_path):
    for name, file in (("a.npy", FIVE["npy"]), ("b.tif", FIVE["tiff"])):
        (tmp_path / name).write_bytes(file)
        found = inspect(str(tmp_path / name))
        assert (found.size, found.kind, found.fault) == ((20, 12), "5 channels", None)


def write_photos(root: Path, channels: int) -> Path:
    """Images of three classes, in every kind of file that there is for them."""
    for i in range(18):
        pixels = np.random.default_rng(i).integers(0, 120, (8, 8, channels), np.uint8)
        pixels[..., i % 3 % channels] += np.uint8(40 * (i % 3) + 30)
        other = (
            ("tif", tiff(pixels)) if channels == 5 else ("png", picture(pixels if channels == 3 else pixels[..., 0]))
        )
        ending, file = ("npy", npy(pixels)) if i % 2 else other
        path = root / ("train" if i < 12 else "val") / CLASSES[i % 3] / f"{i:02}.{ending}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(file)
    return root


# ------------------------------------------------------------------------------------------------- a real network

NAME, FIELDS = BACKBONES["convnext"]
GIVEN = {"name": NAME, **FIELDS, "num_classes": 3}


def test_the_stem_takes_weights_for_colours(tmp_path):
    """One channel gets their sum, as in timm; all other weights stay."""
    before = jax.tree.map(np.float32, filled(create_model(**GIVEN), (16, 16)))
    info = {"model": GIVEN, "classes": list(CLASSES), "preprocessing": preprocessing(), "step": 0, "weights": "raw"}
    checkpoint.write_variables(tmp_path / "colours", before, info)
    model = {key: value for key, value in GIVEN.items() if key != "num_classes"}
    about = {"model": model, "data__channels": 1, "data__image_size": 16, "batch_size": 4}
    recipe = bind(settings_for(write_photos(tmp_path, 1), init_from=str(tmp_path / "colours"), **about))
    state, said = first_state(build(recipe, recipe.mesh(), recipe.data()), tmp_path / "none", None)
    assert "changed from 3 to 1 channels 1: stem.0.weight" in said
    after, old = (dict(jax.tree_util.tree_leaves_with_path(params)) for params in (state.params, before["params"]))
    (stem,) = (path for path in old if after[path].shape != old[path].shape)
    np.testing.assert_allclose(after.pop(stem), old[stem].sum(2, keepdims=True), rtol=1e-6, atol=1e-7)
    assert all(np.array_equal(after[path], old[path]) for path in after)


def test_what_is_exported_takes_the_channels(tmp_path):
    model = create_model(**GIVEN)
    variables = initial_values(model, jnp.zeros((1, 16, 16, 5)))
    pre = preprocessing() | {"image_size": 16, "mean": [0.1, 0.2, 0.3, 0.4, 0.5], "std": [0.2] * 5}
    info = {"model": GIVEN, "classes": list(CLASSES), "preprocessing": pre, "step": 0, "weights": "raw"}
    run, pixels = tmp_path / "run", RNG.integers(0, 256, (2, 16, 16, 5), np.uint8)
    checkpoint.write_variables(run, variables, info)
    images = (pixels / np.float32(255) - np.float32(pre["mean"])) / np.float32(pre["std"])
    outputs = quick(model.apply, variables, jnp.asarray(images))
    logits = np.asarray(average(outputs))
    export_program(run, tmp_path / "run.stablehlo", platforms=["cpu"], pixels=True)
    program = jax.export.deserialize((tmp_path / "run.stablehlo").read_bytes())
    np.testing.assert_allclose(program.call(pixels), logits, rtol=1e-3, atol=1e-4)
    export_onnx(run, tmp_path / "run.onnx", pixels=True)
    np.testing.assert_allclose(Network(tmp_path / "run.onnx").run(pixels), logits, rtol=1e-3, atol=1e-4)
    export(run, tmp_path / "run.safetensors")
    assert_equal(from_torch(load_file(tmp_path / "run.safetensors"), model), jax.tree.map(np.asarray, variables))


def test_a_converted_checkpoint_says_its_channels(tmp_path):
    model = create_model(**GIVEN)
    state_dict = to_torch(jax.tree.map(np.float32, filled(model, (16, 16))), model)
    save_file({key: np.ascontiguousarray(value) for key, value in state_dict.items()}, tmp_path / "model.safetensors")
    own = {"model": GIVEN, "weights": "raw", "step": 0}
    said = {"input_size": [3, 16, 16], "mean": [0.1, 0.2, 0.6], "std": [0.1, 0.2, 0.3]}
    config = {"architecture": NAME, "num_classes": 3, "pretrained_cfg": said, "maxmap": own}
    (tmp_path / "config.json").write_text(json.dumps(config))
    for channels, mean in ((1, [0.3]), (5, [0.1, 0.2, 0.6, 0.1, 0.2])):
        info = read_foreign(tmp_path, in_channels=channels).info
        assert info["preprocessing"]["mean"] == pytest.approx(mean) and len(info["preprocessing"]["std"]) == channels


def with_data(settings: dict, **changes) -> dict:
    return {**settings, "data": {**settings["data"], **changes}}


@pytest.fixture(scope="module", params=cases([1, 5], long=[1]))
def made(request, tmp_path_factory) -> SimpleNamespace:
    """A run of two steps, of the small network."""
    channels, root = request.param, tmp_path_factory.mktemp("channels")
    photos = write_photos(root / "photos", channels)
    about = {
        "batch_size": 4,
        "steps": 2,
        "data__channels": channels,
        "data__mean": (0.3, 0.4, 0.5),
        "checkpoint__every": 1,
        "model": {"name": "tiny", "branches": 1, "norm": False},
        "mix": {},
        "ema_decay": None,
        "optim": {"name": "sgd"},
        "schedule": {"name": "constant", "lr": 0.1},
    }
    settings = settings_for(photos, **about)
    with pytest.MonkeyPatch.context() as patch:
        use_models(create_tiny, patch)
        result = loop.run(bind(settings), root / "run")
        yield SimpleNamespace(
            channels=channels, root=root, photos=photos, settings=settings, result=result, run=root / "run"
        )


def test_a_run_in_two_parts_equals_a_whole_one(made):
    parts = shutil.copytree(made.run, made.root / "parts")
    shutil.rmtree(parts / "checkpoints" / "2")
    result = loop.run(bind(made.settings), parts)
    assert result == made.result
    assert_equal(*(checkpoint.read_variables(path)[0] for path in (parts, made.run)))
    one, other = ([without_timings(row) for row in read_lines(path / "metrics.jsonl")] for path in (parts, made.run))
    assert [row for row in one if row["step"] == 2] == [row for row in other if row["step"] == 2]
    with pytest.raises(UserError, match=f"data.channels: {made.channels} -> 4"):
        loop.run(bind(with_data(made.settings, channels=4, check=0)), parts)


def test_evaluation_validation_and_prediction_agree_with_the_network_by_hand(made, tmp_path):
    model, variables, info = inference.load(made.run)
    pre = info["preprocessing"]
    assert len(pre["mean"]) == len(pre["std"]) == made.channels
    result = validate(made.run, made.photos / "val", json_file=tmp_path / "eval.json")
    assert result["loss"] == pytest.approx(made.result["loss"], rel=1e-5) and result["images"] == 6
    files = sorted((made.photos / "val").rglob("*.*"))
    read = {".npy": np.load, ".tif": tifffile.imread, ".png": lambda file: np.asarray(Image.open(file))[..., None]}
    pixels = np.stack([read[file.suffix](file) for file in files])
    images = (pixels / np.float32(255) - np.float32(pre["mean"])) / np.float32(pre["std"])
    np.testing.assert_allclose(inference.preprocess(files, info), images, rtol=1e-4, atol=1e-5)
    shares = np.asarray(jax.nn.softmax(average(model.apply(variables, jnp.asarray(images)))))
    for row, named in zip(shares.tolist(), inference.predict(made.run, files, top=3), strict=True):
        assert dict(named) == pytest.approx(dict(zip(CLASSES, row, strict=True)), rel=1e-4)


def test_other_channels_than_the_run_has_are_one_sentence(made):
    """Those of the network, the files, the teacher, and of an augmentation that knows colours alone."""
    colours = write_photos(made.root / "colours", 3)
    with pytest.raises(UserError, match=r"the model does not take images of 8 pixels: .*\(3, 3, 3, 8\)"):
        evaluate.run(bind(with_data(made.settings, path=str(colours), channels=3)), made.run)
    with pytest.raises(UserError, match=r"of the 12 images checked are broken or cut off: .*\(it (has|is)"):
        bind(with_data(made.settings, channels=2)).data()
    with pytest.raises(UserError, match=f"data.rand_augment is for colours, and data.channels is {made.channels}"):
        bind(with_data(made.settings, rand_augment="rand-m9")).data()
    recipe = bind(with_data({**made.settings, "distill": {"teacher": str(made.run)}}, path=str(colours), channels=3))
    with pytest.raises(UserError, match=f"takes images of {made.channels} channels, and config.data.channels is 3"):
        plan(recipe, 1, "tpu-v4", 0.3)


def test_the_plan_counts_the_channels(made):
    found = {count: plan(bind(with_data(made.settings, channels=count)), 1, "tpu-v4", 0.3) for count in (3, 7)}
    assert found[3]["memory"]["images"] * 7 == found[7]["memory"]["images"] * 3
    assert found[7]["parameters"] - found[3]["parameters"] == 4 * 3 * 3 * 8  # of the first convolution
