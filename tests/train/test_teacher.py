"""Knowledge distillation: what the teacher is shown, what the student learns of it, and that a run goes on with it."""

import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maxmap import checkpoint
from maxmap.config import bind
from maxmap.errors import UserError
from maxmap.losses import total_loss
from maxmap.recipe import Distillation
from maxmap.sharding import make_mesh
from maxmap.tasks import SINGLE_LABEL
from maxmap.tasks.rows import MultiLabel
from maxmap.train import loop
from maxmap.train.plan import plan
from maxmap.train.teacher import identity, matched, read_teacher, with_teacher
from tests.tiny import assert_equal, copied, create_tiny, read_lines, settings_for, without_timings, write_image

pytestmark = pytest.mark.usefixtures("tiny_models")

KNOWN = ("red", "yellow", "green", "blue")  # of the teacher: another order than the data's, and one class more
CHANNELS = {"red": 0, "green": 1, "blue": 2}
FIELDS = {"name": "tiny", "num_classes": 4, "branches": 1, "norm": False, "constant": False, "width": 128}
OWN = {"image_size": 12, "crop_pct": 1.0, "crop_mode": "center", "interpolation": "bicubic"}
OWN |= {"mean": [0.25, 0.5, 0.5], "std": [0.5, 0.25, 0.25]}


def write_teacher(folder: Path, *, weight: float = 20.0, classes: tuple[str, ...] = KNOWN, **info: object) -> Path:
    """A network that nobody has trained, but that knows the classes of `write_image`: by the brightest colour."""
    fields = {**FIELDS, "num_classes": len(classes)}
    images = jax.ShapeDtypeStruct((1, 12, 12, 3), jnp.float32)
    shapes = jax.eval_shape(create_tiny(**fields).init, jax.random.key(0), images)
    variables = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), shapes)
    params = variables["params"]
    for number, name in enumerate(classes):
        if name in CHANNELS:
            channel = CHANNELS[name]
            params["conv"]["kernel"][:, :, channel, channel] = OWN["std"][channel] / 9  # in units of one for all
            params["head_0"]["kernel"][channel, number] = weight
    about = {"model": fields, "classes": list(classes), "preprocessing": OWN, "step": 3, "weights": "raw", **info}
    checkpoint.write_variables(folder, variables, about)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Training images whose labels are all wrong, and evaluation images whose labels are right."""
    root = tmp_path_factory.mktemp("taught")
    for split, shift in (("train", 1), ("val", 0)):
        for i in range(24):
            name = ("blue", "green", "red")[(i + shift) % 3]
            write_image(root / "images" / split / name / f"{i:03}.png", i + 1000 * shift, i % 3)
    write_teacher(root / "teacher")
    return root


def settings(folder: Path, **changes) -> dict:
    about = {
        "epochs": 24,
        "batch_size": 16,
        "accumulate": 2,
        "evaluate__every_epochs": 24,
        "checkpoint__every": 8,
        "schedule": {"name": "constant", "lr": 0.02},
        "distill": {"teacher": str(folder / "teacher"), "alpha": 1.0, "temperature": 2.0},
    }
    return settings_for(folder / "images", **about | changes)


def run(settings: dict, workdir: Path) -> tuple[dict, dict]:
    """Trains; returns the result and a copy of everything that was saved, by step."""
    saved, save = {}, checkpoint.Checkpoints.save

    def remember(self, step, items, info, score=None):
        saved[step] = copied(items)
        save(self, step, items, info, score)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint.Checkpoints, "save", remember)
        return loop.run(bind(settings), workdir), saved


@pytest.fixture(scope="module")
def student(folder) -> tuple[dict, dict, Path]:
    """A run in which the teacher alone counts."""
    return *run(settings(folder), folder / "student"), folder / "student"


def test_a_student_learns_what_the_teacher_says_and_not_the_wrong_labels(folder, student):
    result, saved, workdir = student
    assert result["top1"] == 100
    info = checkpoint.read_info(workdir)
    assert info["teacher"] == {
        "path": str(folder / "teacher"),
        "model": "tiny",
        "step": 3,
        "weights": "raw",
        "sha256": read_teacher(bind(settings(folder))).sha256,
    }
    like = jax.eval_shape(create_tiny("tiny", num_classes=3).init, jax.random.key(0), jnp.zeros((1, 8, 8, 3)))
    for item in ("variables", "ema"):  # the student's alone
        assert jax.tree.map(np.shape, saved[24][item]) == jax.tree.map(np.shape, dict(like))
    rows = [row for row in read_lines(workdir / "metrics.jsonl") if row["kind"] == "train"]
    parts = ("base", "distillation", "decorrelation", "teacher")
    assert all(row["loss"] == pytest.approx(sum(row[key] for key in parts), rel=1e-5) for row in rows)
    assert {row["base"] for row in rows} == {0} and rows[-1]["teacher"] < rows[0]["teacher"] / 4


def test_a_resumed_run_equals_an_uninterrupted_one_wherever_its_teacher_lies(folder, student, tmp_path):
    _, saved, workdir = student
    shutil.copytree(workdir, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "24")
    moved = shutil.copytree(folder / "teacher", tmp_path / "moved")
    again = settings(folder, distill={"teacher": str(moved), "alpha": 1.0, "temperature": 2.0})
    assert_equal(run(again, tmp_path / "run")[1][24], saved[24])
    logs = [read_lines(path / "metrics.jsonl") for path in (tmp_path / "run", workdir)]
    assert [without_timings(row) for row in logs[0]] == [without_timings(row) for row in logs[1]]

    again["distill"]["teacher"] = str(write_teacher(tmp_path / "other", weight=21.0))
    before = identity(checkpoint.read_info(workdir)["teacher"])
    now = identity(read_teacher(bind(again)).describe())
    assert before != now
    with pytest.raises(
        UserError, match=rf"another config \(distill.teacher: {before} -> {now}\): give the values that"
    ):
        loop.run(bind(again), tmp_path / "run")
    with pytest.raises(UserError, match=rf"\(.*distill.teacher: {before} -> None.*\): give the values that"):
        loop.run(bind({**again, "distill": {}}), tmp_path / "run")


def test_one_device_equals_eight(folder, student, tmp_path):
    """Four copies of the state, each in two parts; what is larger than a part of the teacher's is split, too."""
    _, saved, _ = student
    changes = settings(folder, mesh={"data": 4, "fsdp": 2}, steps=8)
    teacher = read_teacher(bind(changes))
    kernel = teacher.like(make_mesh(data=4, fsdp=2))["params"]["mlp"]["kernel"]
    assert kernel.shape == (128, 128) and kernel.sharding.shard_shape(kernel.shape) == (64, 128)
    _, other = run(changes, tmp_path)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), other[8], saved[8])


def test_the_teacher_is_shown_the_same_images_in_its_own_way(folder):
    recipe = bind(settings(folder))
    teacher, told = matched(read_teacher(recipe), recipe.data())
    assert teacher.columns == (3, 2, 0)
    assert told == "tiny, 20,612 parameters; of its 4 classes the 3 of the data count, by their names"
    pixels = np.random.default_rng(0).random((5, 8, 8, 3), np.float32)
    mean, std = np.float32([0.5, 0.4, 0.3]), np.float32([0.25, 0.2, 0.3])
    given = teacher.variables, (pixels - mean) / std
    answers = teacher.answer(*given, mean=mean, std=std, dtype=jnp.float32)
    larger = np.asarray(jax.image.resize(pixels, (5, 12, 12, 3), "bilinear"))
    wanted = teacher.model.apply(teacher.variables, (larger - np.float32(OWN["mean"])) / np.float32(OWN["std"]))
    np.testing.assert_allclose(answers, np.asarray(wanted["logits"])[0][:, [3, 2, 0]], rtol=1e-4, atol=1e-5)
    assert np.ptp(np.asarray(answers), axis=1).min() > 0


def by_hand(x: np.ndarray, temperature: float) -> np.ndarray:
    """Softmax of rows."""
    x = np.exp(x / temperature)
    return x / x.sum(-1, keepdims=True)


TARGETS = np.array([[0.9, 0.1, 0.0], [0.0, 0.0, 1.0]])
TAUGHT = np.array([[1.0, -2.0, 0.5], [0.0, 3.0, 2.5]])
LOGITS = np.array([[[0.5, 0.0, -1.0], [2.0, 1.0, 0.0]], [[0.0, 0.0, 1.0], [-1.0, 0.5, 0.25]]])  # two branches
OUTPUTS = {"logits": LOGITS, "teacher": TAUGHT}


@pytest.mark.parametrize("name", ["softmax", "bce"])
@pytest.mark.parametrize("kind", ["soft", "hard"])
def test_the_loss_of_one_class_by_hand(kind, name, x64):
    distill = Distillation("teacher", kind, 0.25, 3.0 if kind == "soft" else 1.0)

    def base(outputs, targets):
        return total_loss(outputs, targets, name=name, decorrelation=-0.1)

    value, parts = with_teacher(base, distill, SINGLE_LABEL, name)(OUTPUTS, jnp.asarray(TARGETS))
    if kind == "soft":
        p, q = by_hand(TAUGHT, 3.0), by_hand(LOGITS, 3.0)
        wanted = 9 * np.sum(p * np.log(p / q)) / (2 if name == "softmax" else 2 * 3)
    else:
        labels = np.array([[1.0, 0, 0], [0, 1, 0]])
        q, yes = by_hand(LOGITS, 1.0), 1 / (1 + np.exp(-LOGITS))
        terms = labels * np.log(q) if name == "softmax" else labels * np.log(yes) + (1 - labels) * np.log(1 - yes)
        wanted = -np.sum(terms) / (2 if name == "softmax" else 2 * 3)
    without = base(OUTPUTS, jnp.asarray(TARGETS))[1]
    np.testing.assert_allclose(parts["teacher"], 0.25 * wanted, rtol=1e-12)
    np.testing.assert_allclose(parts["base"], 0.75 * without["base"], rtol=1e-12)
    assert parts["decorrelation"] == without["decorrelation"] != 0
    np.testing.assert_allclose(value, sum(parts[key] for key in parts.keys() - {"loss"}), rtol=1e-12)


def test_the_loss_of_several_labels_by_hand(x64):
    yes, taught = (1 / (1 + np.exp(-x)) for x in (LOGITS, TAUGHT))
    soft = taught * np.log(taught / yes) + (1 - taught) * np.log((1 - taught) / (1 - yes))
    labels = np.array([[1.0, 0, 1], [0, 1, 1]])
    hard = -labels * np.log(yes) - (1 - labels) * np.log(1 - yes)
    for kind, terms in (("soft", soft), ("hard", hard)):
        distill = Distillation("teacher", kind, 1.0)
        loss = with_teacher(lambda *given: total_loss(*given, name="bce"), distill, MultiLabel(), "bce")
        np.testing.assert_allclose(loss(OUTPUTS, jnp.asarray(TARGETS))[0], np.sum(terms) / (2 * 3), rtol=1e-12)


def test_the_plan_counts_the_teacher(folder):
    values = settings(folder, batch_size=64, dtype="bfloat16", mesh={})
    with_it, without = (plan(bind({**values, **change}), 8, "tpu-v4", 0.3) for change in ({}, {"distill": {}}))
    one = read_teacher(bind(values))
    assert with_it["memory"].pop("teacher") == one.on(make_mesh())["params"]["mlp"]["kernel"].nbytes + 2 * (
        27 * 128 + 128 + 128 + 128 * 4 + 4
    )
    assert with_it["memory"] == without["memory"]
    # a convolution, a matrix at each place and the classifier, for the 4 images of each of two micro-batches
    each = 6 * 6 * 128 * (27 + 128) + 128 * 4
    assert with_it["flops"] - without["flops"] == 2 * 8 * each


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"teacher": "nowhere"}, "there is no checkpoint in nowhere"),
        ({"alpha": 0.0}, "config.distill.alpha is 0.0: give a value of type float above 0 and at most 1"),
        ({"kind": "hardest"}, "config.distill.kind is 'hardest': give one of soft, hard"),
        ({"kind": "hard", "temperature": 2.0}, "config.distill.temperature belongs to kind='soft'"),
        ({"teacher": "lacking"}, "of the data's 3 it lacks 1, such as 'green' (nearest: grey"),
        ({"teacher": "numbers"}, "has 4 classes and the student 3, and without names for both"),
        ({"teacher": "labels"}, "was trained for the task 'multi_label'"),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else "",
)
def test_what_cannot_teach(folder, tmp_path, change, says):
    where = folder / change.get("teacher", "teacher")
    if where.name == "lacking":
        write_teacher(where, classes=("red", "grey", "blue"))
    elif where.name == "numbers":
        write_teacher(where, classes=("0", "1", "2", "3"))
    elif where.name == "labels":
        write_teacher(where, task={"name": "multi_label", "thresholds": 0.5})
    if "teacher" in change and where.name != "nowhere":
        change = {**change, "teacher": str(where)}
    with pytest.raises(UserError) as error:
        loop.run(bind(settings(folder, distill={"teacher": str(folder / "teacher")} | change)), tmp_path / "run")
    assert says in str(error.value) and str(error.value).rstrip(".").count(". ") == 0
    assert not (tmp_path / "run").exists()


def test_numbers_and_masks_have_no_teacher(folder):
    for task, says in (("numbers", "distributions and numbers"), ("segmentation", "masks")):
        with pytest.raises(UserError, match=f"config.distill.teacher is for class.*: leave it out for {says}"):
            plan(bind(settings(folder, data__task=task)), 1, "tpu-v4", 0.3)
