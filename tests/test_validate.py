"""A checkpoint on labelled images: with its own preprocessing, wherever the images lie, and nothing quietly else."""

import csv
import json
import shutil
import tarfile
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from maxmap import checkpoint, evaluate, validate
from maxmap.__main__ import main
from maxmap.config import bind
from maxmap.errors import UserError
from maxmap.evaluate import check_image_size
from maxmap.models import create_model
from maxmap.shapes import eval_shape_of_init
from tests.tiny import CLASSES, copied, create_tiny, preprocessing, settings_for, write_folder

TINY = {"name": "tiny", "norm": False, "constant": False}


def save(workdir: Path, classes: tuple[str, ...] = CLASSES, **changes) -> Path:
    variables = create_tiny(**TINY, num_classes=len(classes)).init(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))
    variables = copied({**variables, "params": jax.tree.map(lambda x: 3 * x + 0.1, variables["params"])})
    info = {
        "model": {**TINY, "num_classes": len(classes)},
        "classes": list(classes),
        "preprocessing": {**preprocessing(), **changes},
        "step": 1,
    }
    checkpoint.write_variables(workdir, variables, info)
    return workdir


@pytest.fixture(scope="module")
def workdir(tmp_path_factory) -> Path:
    return save(tmp_path_factory.mktemp("runs") / "run")


def figures(result: dict) -> dict:
    """The figures of a result; the order of the sums of a loss depends on the number of devices."""
    keys = ("top1", "top1_err", "top5", "branch_top1", "images")
    return {key: result[key] for key in keys} | {"loss": pytest.approx(result["loss"], rel=1e-6)}


@pytest.mark.usefixtures("tiny_models")
def test_images_are_found_where_they_lie(tmp_path, images, workdir):
    """Class folders alone, a split of folders, an archive and a folder of archives hold the same photographs."""
    shutil.copytree(images / "val", tmp_path / "photos")
    (tmp_path / "tars").mkdir()
    for name, splits in {"val": ["val"], "train": ["train"]}.items():
        with tarfile.open(tmp_path / "tars" / f"{name}.tar", "w") as tar:
            for split in splits:
                tar.add(images / split, "photos")
    (tmp_path / "one").mkdir()
    shutil.copy(tmp_path / "tars" / "val.tar", tmp_path / "one" / "photos.tar")
    shutil.copytree(images / "val", tmp_path / "splits" / "validation")
    shutil.copytree(images / "val", tmp_path / "splits" / "test" / "more", dirs_exist_ok=True)
    places = {
        "photos": {},
        "splits": {},
        "one": {},  # every archive in it
        "tars": {},  # that of the split
        "tars/val.tar": {},
        "splits/test": {"split": "more"},
        "tars/": {"split": "val.tar"},
    }
    results = [
        validate.validate(workdir, tmp_path / place, **options, batch_size=4, json_file=tmp_path / "a.json")
        for place, options in places.items()
    ]
    wanted = evaluate.run(bind(settings_for(images, model=TINY)), workdir)
    for place, result in zip(places, results, strict=True):
        assert figures(result) == figures(wanted), place
    assert wanted["images"] == 11 and 0 < wanted["top1"] < 100 and wanted["loss"] > 0


@pytest.mark.usefixtures("tiny_models")
def test_what_a_validation_prints_and_writes(tmp_path, images, workdir, capsys):
    argv = ["validate", str(workdir), str(images), "--batch-size=4", "--dtype=float32"]
    assert main(argv) == 0
    printed, err = capsys.readouterr()
    model, data, pre, whose, line, written = printed.splitlines()
    assert model == f"tiny, 350 parameters, 3 classes: raw weights of {workdir}, step 1"
    assert data == f"11 images of 3 classes in {images}"
    assert pre == (
        "preprocessing: image_size 8, crop_pct 1.0, crop_mode center, interpolation bicubic, "
        "mean 0.5 0.5 0.5, std 0.25 0.25 0.25, exif False"
    )
    assert whose == "all of it is the checkpoint's"
    assert "11/11 images, " in err and " images/s, top-1 " in err
    result = json.loads((workdir / "eval.json").read_text())
    assert line == evaluate.summary(result) and line.startswith(f"* Acc@1 {result['top1']:.3f} (")
    assert (
        result["mean"] == [0.5] * 3
        and result["std"] == [0.25] * 3
        and result["top1"] + result["top1_err"] == pytest.approx(100)
    )
    assert written == f"written to {workdir}/eval.json and {workdir}/predictions.csv"
    rows = list(csv.DictReader((workdir / "predictions.csv").read_text().splitlines()))
    assert len(rows) == 11 and 100 * sum(row["rank"] == "1" for row in rows) / 11 == pytest.approx(result["top1"])

    other = save(tmp_path / "other", crop_pct=0.75, mean=[0.1, 0.2, 0.3], interpolation="nearest")
    files = [f"--json={tmp_path}/a.json", f"--csv={tmp_path}/a.csv"]
    options = ["--crop-pct=0.75", "--interpolation=nearest", "--mean", "0.1", "0.2", "0.3"]
    assert main([*argv, *options, *files]) == 0
    assert capsys.readouterr().out.splitlines()[3] == (
        "not the checkpoint's: crop_pct is 0.75 instead of 1.0; interpolation is nearest instead of bicubic; "
        "mean is 0.1 0.2 0.3 instead of 0.5 0.5 0.5"
    )
    changed = json.loads((tmp_path / "a.json").read_text())
    assert main(["validate", str(other), str(images)]) == 0
    own = json.loads((other / "eval.json").read_text())
    assert (
        figures(own) == figures(changed)
        and own["loss"] != pytest.approx(result["loss"], rel=1e-3)
        and own["mean"] == changed["mean"] == [0.1, 0.2, 0.3]
    )
    assert json.loads((workdir / "eval.json").read_text()) == result
    assert main([*argv, "--flip", *files]) == 0
    flipped = json.loads((tmp_path / "a.json").read_text())
    assert flipped["flip"] is True and flipped["loss"] != pytest.approx(result["loss"], rel=1e-6)
    assert main([*argv, "--crops", "--crop-pct=0.7", *files]) == 0
    cropped = json.loads((tmp_path / "a.json").read_text())
    assert cropped["crops"] is True and cropped["crop_pct"] == 0.7 and cropped["image_size"] == 8
    assert main([*argv, "--crops"]) == 2
    assert "--crops has nothing to crop with crop_pct 1.0: give a smaller one" in capsys.readouterr().err


@pytest.mark.usefixtures("tiny_models")
def test_a_config_that_departs_from_the_checkpoint_is_told(tmp_path, images, capfd):
    """And a folder without a training split is enough, whether the checkpoint knows names or numbers."""
    photos = tmp_path / "photos"
    shutil.copytree(images / "val", photos / "val")
    for classes in (CLASSES, ("0", "1", "2")):
        run = save(tmp_path / f"run{classes[0]}", classes, mean=[0.1, 0.2, 0.3], crop_pct=0.9)
        result = evaluate.run(bind(settings_for(photos, model=TINY)), run)
        assert result["images"] == 11 and result["mean"] == [0.5, 0.5, 0.5]
        assert (
            f"the config's preprocessing is not that of the checkpoint in {run}: crop_pct is 1.0 instead of 0.9; "
            "mean is 0.5 0.5 0.5 instead of 0.1 0.2 0.3."
        ) in capfd.readouterr().err
    with pytest.raises(UserError, match="no split 'train'"):  # which of four classes are these three
        evaluate.run(bind(settings_for(photos, model=TINY)), save(tmp_path / "run4", ("0", "1", "2", "3")))


@pytest.mark.usefixtures("tiny_models")
def test_bad_input_is_one_sentence(tmp_path, images, workdir, capsys):
    def says(*argv: object) -> str:
        assert main(["validate", *map(str, argv)]) == 2
        out, err = capsys.readouterr()
        assert out == "" and err.count("\n") == 1 and err.endswith(".\n")
        return err

    run = [workdir, tmp_path / "photos"]
    assert "there is no folder of images and no tar archive" in says(*run)
    (tmp_path / "photos").mkdir()
    assert "holds no class folders" in says(*run)
    write_folder(tmp_path, val=6)
    (tmp_path / "val").rename(tmp_path / "photos" / "val")
    assert "has no split 'dev'" in says(*run, "--split=dev")
    (tmp_path / "photos/val/red").rename(tmp_path / "photos/val/rad")
    assert "class 'rad' of the data (1 such) is not among the 3 classes of the checkpoint in" in says(*run)
    (tmp_path / "photos/val/rad").rename(tmp_path / "photos/val/red")
    photo = next((tmp_path / "photos/val/red").iterdir())
    photo.write_text("no photo")
    assert f"1 of the 6 images checked are broken or cut off: {photo}" in says(*run)
    assert main(["validate", *map(str, run), "--check=0"]) == 0
    assert f"left out, because it cannot be decoded: {photo}" in capsys.readouterr().err
    shutil.rmtree(tmp_path / "photos/val/red")
    (tmp_path / "photos/val/red").mkdir()
    assert "class folder" in says(*run) and "holds no images" in says(*run)
    assert "--labels=real needs --file" in says(*run, "--labels=real")
    assert "was not trained on ImageNet's 1,000 classes" in says(workdir, images, "--labels=sketch")
    few = save(tmp_path / "few", ("blue", "green", "rot", "weiss"))
    assert "class 'red' of the data (1 such) is not among the 4 classes" in says(
        few, images
    )  # and nothing else is said
    assert "the data has 3 classes, and the 4 of the checkpoint" in says(save(tmp_path / "four", tuple("0123")), images)
    assert "cannot write" in says_last(capsys, workdir, images, f"--json={tmp_path}/no/a.json")


def says_last(capsys, *argv: object) -> str:
    """The sentence of a command whose figures are printed already, so that they are not lost."""
    assert main(["validate", *map(str, argv)]) == 2
    out, err = capsys.readouterr()
    assert out.splitlines()[-1].startswith("* Acc@1 ")
    return err


@pytest.mark.parametrize("values", [["0.5", "0.5"], ["0.5", "0.5", "128"], ["0.5", "half", "0.5"]])
def test_a_mean_is_three_numbers_from_0_to_1(values, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["validate", "run", "photos", "--mean", *values])
    assert stopped.value.code == 2
    err = capsys.readouterr().err
    assert err.startswith("maxmap: argument --mean: ") and err.count("\n") == 1


def test_a_size_under_the_stride_is_refused():
    model = create_model("map_mobilenet_v1", num_classes=3)
    variables = eval_shape_of_init(model.init, jax.random.key(0), jnp.zeros((1, 64, 64, 3)))
    check_image_size(model, variables, {**preprocessing(), "image_size": 32})
    with pytest.raises(UserError, match="images of 31 pixels are smaller than the model's stride of 32"):
        check_image_size(model, variables, {**preprocessing(), "image_size": 31})


def test_windows_count_where_they_are_what_the_network_sees():
    model = create_model("maxvit_mini_32", num_classes=3)
    variables = eval_shape_of_init(model.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    larger = {**preprocessing(), "image_size": 48}
    check_image_size(model, variables, larger, window=32)
    for window in (None, 20, 64):
        with pytest.raises(UserError, match=f"does not take images of {min(window or 48, 48)} pixels: .*windows of 4"):
            check_image_size(model, variables, larger, window=window)
