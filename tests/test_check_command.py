"""The command check: what it counts is what training reads, and what it finds in a folder with everything wrong."""

import json
import os
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from maxmap.__main__ import main
from maxmap.check.contents import read_contents
from maxmap.data.sources import FolderSource
from tests.tiny import CLASSES, files, write_image


def picture(path: Path, number: int, size: tuple[int, int] = (64, 48)) -> Path:
    """Writes a picture of a few coarse spots, which no other number has."""
    spots = Image.fromarray(np.random.default_rng(number).integers(0, 256, (6, 8, 3)).astype(np.uint8))
    path.parent.mkdir(parents=True, exist_ok=True)
    spots.resize(size, Image.Resampling.BICUBIC).save(path)
    return path


def run(capsys, *argv: object) -> tuple[int, str, str]:
    code = main(["check", *map(str, argv)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.fixture
def clean(tmp_path) -> Path:
    """Three classes with 8, 4 and 4 pictures in train and 2 each in val."""
    root = tmp_path / "clean"
    for label, (name, count) in enumerate(zip(CLASSES, (8, 4, 4), strict=True)):
        for i in range(count):
            picture(root / "train" / name / f"{i}.png", 100 * label + i)
        for i in range(2):
            picture(root / "val" / name / f"{i}.png", 100 * label + 50 + i)
    return root


@pytest.fixture
def dirty(clean) -> Path:
    """The same with one of everything that is odd."""
    train, val = clean / "train", clean / "val"
    shutil.copy(train / "red/0.png", val / "red/equal.png")
    picture(val / "red/small.png", 201, (48, 36))  # as train/red/1.png
    shutil.copy(train / "green/0.png", train / "blue/green.png")
    shutil.copy(train / "blue/1.png", train / "blue/again.png")
    (train / "blue/cut.png").write_bytes((train / "blue/0.png").read_bytes()[:-60])
    (train / "blue" / os.fsdecode(b"caf\xe9<b>.jpg")).write_text("no image")
    picture(train / "blue/tiny.png", 999, (64, 9))
    (train / "blue/notes.txt").write_text("")
    (train / "empty").mkdir()
    (train / "phone").mkdir()
    (train / "phone/1.heic").write_text("")
    picture(val / "wolf/0.png", 8)
    return clean


def test_nothing_hinders(clean, capsys):
    code, out, err = run(capsys, clean)
    assert code == 0 and out.splitlines()[-1] == "nothing hinders training"
    rows = [line.split() for line in out.splitlines()]
    assert ["train", "16", "3", "green", "4", "blue", "8", "2.0"] in rows and ["blue", "8", "2"] in rows
    assert "kinds    PNG RGB 22" in out.splitlines() and "22/22 images" in err
    assert [line.split() for line in out.splitlines() if line.startswith(("broken", "tiny", "leakage", "copies"))] == [
        [name, "none"] for name in ("broken", "tiny", "leakage", "copies")
    ]


def test_it_counts_what_training_reads(clean):
    (clean / "train" / "blue" / "deeper").mkdir()
    picture(clean / "train/blue/deeper/a.JPG", 1)
    (clean / "train/blue/.hidden.png").write_text("")
    contents = read_contents(str(clean))
    for number, split in enumerate(contents.splits):
        source = FolderSource(clean, split)
        own = np.flatnonzero(contents.split == number)
        assert [contents.path(index) for index in own] == [source.name(i) for i in range(len(source))]
        names = [contents.classes[label] for label in contents.label[own]]
        assert names == [source.classes[source[i].label] for i in range(len(source))]


def test_everything_that_is_odd(dirty, tmp_path, capsys):
    code, out, _ = run(capsys, dirty, f"--json={tmp_path}/found.json", f"--html={tmp_path}/page.html")
    assert code == 1
    found = json.loads((tmp_path / "found.json").read_text("utf-8"))

    def below(text: str) -> str:
        return text.removeprefix(f"{dirty}/")

    def groups(name: str) -> list[tuple[bool, list[str]]]:
        return [(group["equal"], [below(path) for path in group["images"]]) for group in found[name]]

    assert found["classes"]["blue"] == {"train": 11, "val": 2} and found["classes"]["wolf"] == {"train": 0, "val": 1}
    assert [below(each["image"]) for each in found["broken"]] == [r"train/blue/caf\xe9<b>.jpg", "train/blue/cut.png"]
    assert [below(path) for path in found["tiny"]] == ["train/blue/tiny.png"]
    leaks = [(True, ["train/red/0.png", "val/red/equal.png"]), (False, ["train/red/1.png", "val/red/small.png"])]
    assert groups("leaks") == leaks
    assert groups("contradictions") == [(True, ["train/blue/green.png", "train/green/0.png"])]
    assert len(groups("copies")) == 4 and (True, ["train/blue/1.png", "train/blue/again.png"]) in groups("copies")
    assert [below(path) for path in found["ignored"]] == ["train/blue/notes.txt"]
    problems = [
        r"class folder .*train/empty holds no images",
        r"train/phone/1.heic is an image of a kind that cannot be read",
        "2 images cannot be decoded",
        "2 images of val have copies in another split",
        r"val has classes that train has no image of \(wolf\), which training refuses",
    ]
    assert len(found["problems"]) == len(problems)
    for pattern, problem in zip(problems, found["problems"], strict=True):
        assert re.search(pattern, problem) and f"problem: {problem}" in out.splitlines()
    for title, path in (("broken", "cut.png"), ("tiny", "tiny.png"), ("ignored", "notes.txt")):
        assert re.search(rf"^{title} +\d [^\n]*\n(?: {{9}}[^\n]*\n)*? {{9}}[^\n]*{path}", out, re.MULTILINE), title

    page = (tmp_path / "page.html").read_text("utf-8")
    # Nothing is loaded from elsewhere, no name is markup, and every group has its pictures.
    assert set(re.findall(r'(?:src|href)="([^"]{10})', page)) == {"data:image"} and "<script" not in page
    assert r"caf\xe9&lt;b&gt;.jpg" in page and "<b>" not in page
    assert page.count("<figure>") == 4 * 2 + 1
    code, out, _ = run(capsys, dirty, "--splits", "train", "--tiny=9", "--distance=0")
    assert code == 1 and "leakage  none" in out and "tiny     none" in out


def test_a_folder_is_split_and_then_fine(dirty, tmp_path, capsys):
    train = dirty / "train"
    shutil.rmtree(train / "empty")
    shutil.rmtree(train / "phone")
    before = files(dirty)
    argv = (train, "--split=0.25", "--seed=3")
    code, out, _ = run(capsys, *argv, f"--out={tmp_path}/new")
    assert code == 1 and out.splitlines()[-1].endswith("; 2 broken left out")  # of the folder, not of the new one
    written = {path.split("/", 1)[1]: data for path, data in files(tmp_path / "new").items()}
    readable = {p: data for p, data in files(train).items() if not p.endswith((".txt", "cut.png", ".jpg"))}
    assert written == readable and files(dirty) == before
    # The one picture that two classes have is the only thing left to say.
    code, out, _ = run(capsys, tmp_path / "new")
    assert code == 0 and "leakage  none" in out and "doubtful 1 group" in out
    run(capsys, *argv, f"--out={tmp_path}/again")
    assert files(tmp_path / "again") == files(tmp_path / "new")


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["{root}/none"], "there is no folder"),
        (["{root}/train/red"], "holds no class folders"),
        (["{root}", "--splits", "train", "test"], "has no split 'test', only train, val"),
        (["{root}", "--split=0.2"], "--split=SHARE and --out=FOLDER belong together"),
        (["{root}", "--split=0.2", "--out={root}-new"], "has the splits train, val already"),
        (["{root}/train", "--split=0.2", "--out={root}/train/new"], "give a folder outside"),
        (["{root}/train", "--split=0.2", "--out={root}/val"], "is there already: give another name"),
    ],
)
def test_bad_input_is_one_sentence(argv, says, clean, capsys):
    before = files(clean)
    code, _, err = run(capsys, *(text.format(root=clean) for text in argv))
    sentence = err.splitlines()[-1]
    assert code == 2 and sentence.startswith("maxmap: ") and says in sentence and files(clean) == before


def test_images_with_masks_are_not_taken_for_classes(tmp_path, capsys):
    for kind in ("images", "annotations"):
        (tmp_path / kind / "training").mkdir(parents=True)
        picture(tmp_path / kind / "training" / "a.png", 0)
    code, _, err = run(capsys, tmp_path)
    assert code == 2 and "has images and annotations, and check is for folders of classes" in err


def test_a_folder_above_the_right_one(clean, tmp_path, capsys):
    code, out, _ = run(capsys, tmp_path)
    assert code == 1 and "problem: there is one class alone, clean: give the folder that holds train and val" in out


def test_nothing_can_be_decoded(tmp_path, capsys):
    for name in CLASSES:
        (tmp_path / "photos" / name).mkdir(parents=True)
        (tmp_path / "photos" / name / "a.jpg").write_text("no image")
    options = [f"--html={tmp_path}/page.html", f"--json={tmp_path}/found.json"]
    code, out, _ = run(capsys, tmp_path / "photos", *options)
    assert code == 1 and "problem: 3 images cannot be decoded" in out and "sizes    none" in out
    assert json.loads((tmp_path / "found.json").read_text())["sizes"] == {}
    code, _, err = run(capsys, tmp_path / "photos", "--split=0.5", f"--out={tmp_path}/new")
    assert code == 2 and "nothing to split" in err and not (tmp_path / "new").exists()


def test_without_imagehash(clean, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "imagehash", None)
    code, out, err = run(capsys, clean)
    assert code == 2 and out == "" and "takes the package imagehash: pip install imagehash." in err.splitlines()[-1]


def test_what_trains_is_what_was_checked(clean, tmp_path):
    """A link into the folder counts once as training counts it: a class folder may be a link."""
    (clean / "val" / "more").symlink_to(clean / "val" / "red")
    assert read_contents(str(clean)).files.count("0.png") == 7
    write_image(clean / "train" / "stray.png", 0, 0)
    assert main(["check", str(clean)]) == 2
