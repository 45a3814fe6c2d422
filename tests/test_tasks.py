"""Several labels, distributions and numbers: from a CSV file to a checkpoint, its figures and its predictions."""

import csv
import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maxmap import checkpoint, evaluate, metrics, tasks
from maxmap.__main__ import main
from maxmap.config import bind
from maxmap.data.pipeline import Data, open_data
from maxmap.errors import UserError
from maxmap.evaluate import make_eval_step
from maxmap.explanation import explain_files
from maxmap.inference import load, predict
from maxmap.models import average
from maxmap.sharding import make_mesh
from maxmap.tasks import SINGLE_LABEL, TASKS, describe, of_checkpoint, of_data
from maxmap.tasks.rows import Distribution, MultiLabel, Numbers
from maxmap.train import loop
from maxmap.train.build import Images, make_loss
from tests.test_evaluate import DIGITS, VARIABLES, Pixels
from tests.tiny import settings_for, write_image

pytestmark = pytest.mark.usefixtures("tiny_models")

# How each task reads the columns of `write_table`, and the loss that it is trained with.
READ: dict[str, tuple[dict[str, Any], str]] = {
    "multi_label": ({"label_columns": "tags"}, "bce"),
    "distribution": ({"label_columns": ("1", "2", "3")}, "emd"),
    "numbers": ({"label_columns": ("age", "size")}, "huber"),
}
TAGS = ("ant", "bee", "cow")


def write_table(folder: Path, train: int = 8, val: int = 11) -> Path:
    """Writes images and `all.csv`, which labels them for every task."""
    rows = []
    for number in range(train + val):
        name = f"photos/{number:03}.png"
        write_image(folder / name, number, number % 3)
        kind, counts = number % 3, [1 + number % 4, number % 2, 2 * (number % 3)]
        tags = "|".join(tag for k, tag in enumerate(TAGS) if k == kind or (number + k) % 4 == 0)
        split = "train" if number < train else "val"
        rows.append([name, split, "abc"[kind], tags, *counts, 30 + 10 * kind + number, 0.001 * (number % 5)])
    with (folder / "all.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["image", "split", "label", "tags", "1", "2", "3", "age", "size"], *rows])
    return folder


@pytest.fixture(scope="module")
def table(tmp_path_factory) -> Path:
    return write_table(tmp_path_factory.mktemp("table"))


def opened(table: Path, task: str, **options: Any) -> Data:
    return open_data("csv", table / "all.csv", task=task, **{**READ[task][0], **DIGITS, **options})


def figures_by_hand(task: str, labels: np.ndarray, logits: np.ndarray, training: np.ndarray) -> dict[str, float]:
    """The figures of `logits` [N, K], an image and a column at a time."""
    rows = list(zip(labels.tolist(), logits.tolist(), strict=True))
    if task == "multi_label":
        p = 1 / (1 + np.exp(-logits))
        aps, f1s, losses = [], [], []
        for k in range(labels.shape[1]):
            truth, given = labels[:, k], (p[:, k] >= 0.5).astype(float)
            aps.append(metrics.average_precision(truth, p[:, k]))  # tests/test_metrics.py has its definition
            f1s.append(2 * np.sum(truth * given) / max(np.sum(truth) + np.sum(given), 1))
        for label, z in rows:
            losses.append(
                -np.mean([math.log(1 / (1 + math.exp(-x if t else x))) for t, x in zip(label, z, strict=True)])
            )
        return {"map": 100 * np.mean(aps), "f1": 100 * np.mean(f1s), "loss": np.mean(losses)}
    if task == "distribution":
        losses, means, true_means, steps = [], [], [], []
        for label, z in rows:
            total = sum(map(math.exp, z))
            share = [math.exp(x) / total for x in z]
            gaps = [sum(share[: k + 1]) - sum(label[: k + 1]) for k in range(3)]
            losses.append(math.sqrt(sum(gap**2 for gap in gaps) / 3))
            steps.append(sum(map(abs, gaps)) / 3)
            means.append(sum((k + 1) * x for k, x in enumerate(share)))
            true_means.append(sum((k + 1) * x for k, x in enumerate(label)))
        found = {"plcc": np.corrcoef(means, true_means)[0, 1], "mean_score": np.mean(means), "emd": np.mean(steps)}
        found["srcc"] = np.corrcoef(
            metrics.average_ranks(np.array(means)), metrics.average_ranks(np.array(true_means))
        )[0, 1]
        return {**found, "label_mean_score": np.mean(true_means), "loss": np.mean(losses)}
    mean, deviation = training.mean(0), training.std(0)
    error = labels - (logits * deviation + mean)
    r2 = [1 - np.sum(error[:, k] ** 2) / np.sum((labels[:, k] - labels[:, k].mean()) ** 2) for k in range(2)]
    return {
        "mae": np.mean(np.abs(error)),
        "rmse": np.mean(np.sqrt(np.mean(error**2, 0))),
        "r2": np.mean(r2),
        "loss": np.mean((error / deviation) ** 2),
    }


@pytest.mark.parametrize("name", READ)
def test_figures_are_exact_on_any_number_of_devices_and_in_any_batches(table, name):
    data = opened(table, name)
    task, columns = of_data(data), len(data.classes)
    model = Pixels(columns)
    results = []
    for devices, batch_size in ((1, 4), (8, 1000), (8, 3)):
        mesh = make_mesh(data=devices)
        step = make_eval_step(model, data.preprocessing, mesh, jnp.float32, task=task)
        results.append(evaluate.evaluate(step, VARIABLES, data, batch_size, mesh, task=task))
    (batch,) = data.eval_batches(data.num_eval)
    branches = model.apply(VARIABLES, batch["image"] / np.float32(255))["logits"]
    logits = np.asarray(average({"logits": branches}), np.float64)
    wanted = figures_by_hand(name, np.float64(batch["label"]), logits, np.float64(data.train.labels()))
    for result in results:
        assert result["images"] == 11 and result["skipped"] == []
        assert {key: result[key] for key in wanted} == pytest.approx(wanted, rel=1e-5)
        kept = {key: value for key, value in result.items() if key.startswith("branch")}
        assert len(next(iter(kept.values()))) == 2 and len(set(next(iter(kept.values())))) == 2
    assert task.score in results[0] and task.curves[0].keys() <= results[0].keys()


@pytest.mark.parametrize("name", READ)
def test_from_a_csv_file_to_predictions(table, tmp_path, name, capsys):
    """Training, evaluation alone, the file of predictions, `validate`, `predict` and its table agree."""
    read, loss = READ[name]
    settings = settings_for(table, epochs=1, batch_size=4, ema_decay=None, loss={"name": loss, "decorrelation": -0.1})
    settings["model"] = {"name": "tiny", "norm": False, "constant": False}
    settings["data"] |= {"source": "csv", "path": str(table / "all.csv"), "task": name, **read}
    settings |= {"mix": {"mixup": 0.2}, "augment": {"hflip": 0.0}}
    workdir = tmp_path / "run"
    recipe = bind(settings)
    result = loop.run(recipe, workdir)
    task = of_checkpoint(load(workdir)[2])
    assert result["task"] == name and math.isfinite(result[task.score]) and "top1" not in result
    assert (workdir / "curves.png").is_file() and json.loads((workdir / "eval.json").read_text()) == result
    alone = evaluate.run(recipe, workdir)
    numbers = {key: value for key, value in result.items() if isinstance(value, float) and key != "crop_pct"}
    assert {key: alone[key] for key in numbers} == pytest.approx(numbers, rel=1e-5)
    capsys.readouterr()

    assert main(["validate", str(workdir), str(table / "all.csv"), f"--json={tmp_path / 'a.json'}"]) == 0
    assert {key: json.loads((tmp_path / "a.json").read_text())[key] for key in numbers} == pytest.approx(
        numbers, rel=1e-5
    )
    told = capsys.readouterr().out
    assert f"* {task.summary(result)}, 11 images" in told
    outputs_of = {"multi_label": "3 labels", "distribution": "3 scores", "numbers": "2 numbers"}[name]
    assert f"11 images of {outputs_of} in {table}" in told and f"{outputs_of}: raw weights of {workdir}" in told

    rows = list(csv.DictReader((workdir / "predictions.csv").read_text().splitlines()))
    names = load(workdir)[2]["classes"]
    outputs = {
        key: np.array([[float(row[f"{key} {name}"]) for name in names] for row in rows])
        for key in ("label", task.value)
    }
    kept = {"label": outputs["label"], "outputs": outputs[task.value], "branch": outputs[task.value][None]}
    again = task.figures({"images": 11, "loss": 11 * result["loss"]}, kept, names)
    assert {key: again[key] for key in numbers} == pytest.approx(numbers, rel=1e-4, abs=1e-4)

    images = [Path(row["name"]) for row in rows[:2]]
    answers = predict(workdir, images)
    for row, answer in zip(outputs[task.value], answers, strict=False):
        assert dict(answer) == pytest.approx(dict(task.named(row, names, 5)), rel=1e-4)
    assert main(["predict", str(workdir), *map(str, images), f"--csv={tmp_path / 'p.csv'}"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(": ")[0] for line in lines] == [str(image) for image in images]
    assert all(
        f"{key} {task.shown(value)}" in line
        for line, answer in zip(lines, answers, strict=True)
        for key, value in answer
    )
    assert main(["predict", str(workdir), str(table / "photos"), f"--to={tmp_path / 'all.csv'}"]) == 0
    listed = {row["image"]: row for row in csv.DictReader((tmp_path / "all.csv").read_text().splitlines())}
    assert len(listed) == 19
    for row, image in zip(rows, (row["name"] for row in rows), strict=True):
        for each in names:
            column = f"{task.value} {each}"
            assert float(listed[image][column]) == pytest.approx(float(row[column]), rel=1e-4, abs=1e-6)

    folders = tmp_path / "folders" / "val"
    for k, each in enumerate("ab"):
        write_image(folders / each / "0.png", k, k)
    with pytest.raises(
        UserError, match=f"was trained for the task '{name}', and the images are labelled for 'single_l"
    ):
        evaluate.open_for(bind(settings_for(tmp_path / "folders")), load(workdir)[2], workdir)
    with pytest.raises(UserError, match=r"explain is for one class per image.*: give another one, or see what predict"):
        explain_files(workdir, images, tmp_path / "explained")


def test_one_class_per_image_is_as_from_folders(table, tmp_path):
    """The same photographs in the same order have the same labels, and so the same run."""
    data = open_data("csv", table / "all.csv", **DIGITS)
    assert data.val is not None and data.classes == ("a", "b", "c")
    for index in range(len(data.val)):
        write_image(tmp_path / "val" / "abc"[(8 + index) % 3] / f"{index:03}.png", 8 + index, (8 + index) % 3)
    folder = open_data("folder", tmp_path, train_split=None, **DIGITS)
    step = make_eval_step(Pixels(3), data.preprocessing, make_mesh(data=1), jnp.float32)
    one, other = (evaluate.evaluate(step, VARIABLES, each, 11, make_mesh(data=1)) for each in (data, folder))
    assert {**one, "loss": 0} == {**other, "loss": 0} and one["loss"] == pytest.approx(other["loss"], rel=1e-6)


@pytest.mark.parametrize(
    "task",
    [
        SINGLE_LABEL,
        MultiLabel(0.25),
        MultiLabel((("ant", 0.25), ("bee", 0.75))),
        Distribution((1.0, 2.0, 3.0)),
        Numbers((1.0, 2.0), (0.5, 1.0)),
    ],
)
def test_a_checkpoint_keeps_its_task(task):
    assert of_checkpoint({"task": json.loads(json.dumps(describe(task)))}) == task
    assert TASKS[task.name] is type(task)


def test_a_run_that_goes_on_keeps_the_scale_of_its_numbers(table):
    """And new thresholds count."""
    assert of_data(opened(table, "numbers")).fitted(Numbers((0.0, 0.0), (1.0, 1.0))) == Numbers((0.0, 0.0), (1.0, 1.0))
    assert of_data(opened(table, "multi_label", thresholds=0.3)).fitted(MultiLabel(0.5)) == MultiLabel(0.3)
    assert of_checkpoint({"classes": ["a"]}) == SINGLE_LABEL  # from before there were tasks


def test_labels_from_their_thresholds_on():
    task, names = MultiLabel((("bee", 0.2), ("cow", 0.7))), list(TAGS)
    assert task.named(np.array([0.4, 0.25, 0.6]), names, 1) == [("bee", 0.25)]
    assert task.named(np.array([0.5, 0.9, 0.7]), names, 1) == [("bee", 0.9), ("cow", 0.7), ("ant", 0.5)]
    with pytest.raises(
        UserError, match=r"data.thresholds names 'dog', which is none of 'ant', 'bee', 'cow': correct it"
    ):
        MultiLabel((("dog", 0.2),)).at(names)


def test_labels_that_no_image_has_do_not_count():
    truth = np.array([[1, 0, 0], [1, 0, 1], [0, 0, 0]], np.float32)
    outputs = np.array([[0.9, 0.9, 0.1], [0.2, 0.9, 0.8], [0.3, 0.9, 0.9]], np.float32)
    kept = {"label": truth, "outputs": outputs, "branch": outputs[None]}
    found = MultiLabel().figures({"images": 3.0, "loss": 1.5}, kept, TAGS)
    # ant: ranks 1 and 3, one given and right. cow: rank 2, two given, one right.
    assert found["map"] == pytest.approx(100 * ((1 + 2 / 3) / 2 + 1 / 2) / 2)
    assert found["f1"] == pytest.approx(100 * (2 / 3 + 2 / 3) / 2)
    assert (found["micro_precision"], found["micro_recall"]) == pytest.approx((100 * 2 / 6, 100 * 2 / 3))
    assert found["labels"].keys() == {"ant", "cow"} and found["loss"] == 0.5 and found["branch_map"] == [found["map"]]
    assert found["labels"]["ant"]["best_threshold"] == pytest.approx(0.2)


def test_scores_have_the_values_of_their_names(table):
    assert of_data(opened(table, "distribution")) == Distribution((1.0, 2.0, 3.0))
    assert of_data(opened(table, "distribution", label_columns=("3", "1"))) == Distribution((3.0, 1.0))
    assert of_data(opened(table, "distribution", label_columns=("age", "size"))) == Distribution((1.0, 2.0))
    shares = np.array([0.5, 0.25, 0.25])
    named = dict(Distribution((1.0, 2.0, 3.0)).named(shares, "123", 5))
    assert named == pytest.approx({"mean_score": 1.75, "deviation": math.sqrt(0.6875)})


def weights(data: Data) -> Sequence[float] | None:
    return tasks.class_weights(data, of_data(data))


def test_class_weights(table):
    """Eight training images: a 3, b 3, c 2; ant 4, bee 5, cow 4."""
    single = open_data("csv", table / "all.csv", **DIGITS)
    assert weights(single) is None
    inverse = dataclasses.replace(single, class_weights="inverse")
    assert weights(inverse) == pytest.approx([8 / (3 * n) for n in (3, 3, 2)])
    assert weights(dataclasses.replace(single, class_weights=[("c", 4.0)])) == (1.0, 1.0, 4.0)
    several = opened(table, "multi_label", class_weights="inverse")
    counts = np.sum(several.train.labels(), 0)
    assert weights(several) == pytest.approx([(8 - n) / n for n in counts])
    recipe = bind(settings_for(table, data=settings_for(table)["data"] | {"class_weights": "inverse"}))
    loss = make_loss(recipe, Images.of(inverse))
    logits, targets = np.float32([[0.5, 1, -1]]), np.float32([[0, 0, 1]])
    by_hand = -4 / 3 * (-1 - np.log(np.exp(0.5) + np.exp(1) + np.exp(-1)))
    np.testing.assert_allclose(loss({"logits": logits[None]}, jnp.asarray(targets))[0], by_hand, rtol=1e-6)


@pytest.mark.parametrize(
    ("task", "changes", "words"),
    [
        ("multi_label", {"class_weights": (("dog", 2.0),)}, "data.class_weights names 'dog', which is none of 'ant'"),
        ("numbers", {"class_weights": "inverse"}, "data.class_weights is for classes and labels"),
        ("multi_label", {"thresholds": (("dog", 0.5),)}, "data.thresholds names 'dog'"),
    ],
)
def test_wrong_names_of_classes(table, task, changes, words):
    with pytest.raises(UserError, match=words):
        weights(opened(table, task, **changes))


def test_a_class_without_training_images_has_no_weight(table):
    data = open_data("csv", table / "all.csv", classes=("a", "b", "c", "d"), class_weights="inverse", **DIGITS)
    with pytest.raises(
        UserError, match=r"no training image has 'd', so data.class_weights='inverse' has no weight for"
    ):
        weights(data)


@pytest.mark.parametrize(
    ("task", "changes", "words"),
    [
        (
            "multi_label",
            {},
            r"config.loss.name is 'softmax', which does not fit .*'multi_label': set --config.loss.name=bce",
        ),
        ("numbers", {}, r"set --config.loss.name=mse \(or huber\)"),
        ("distribution", {"loss": {"name": "emd"}}, "mix.smoothing is for one class per image"),
    ],
)
def test_what_does_not_fit_a_task_ends_a_run_before_it_starts(table, tmp_path, task, changes, words):
    settings = settings_for(table, **changes)
    settings["data"] |= {"source": "csv", "path": str(table / "all.csv"), "task": task, **READ[task][0]}
    with pytest.raises(UserError, match=words):
        loop.run(bind(settings), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_other_columns_than_a_checkpoint_has(table):
    data = opened(table, "numbers", label_columns=("age",))
    info = {"classes": ["age", "size"], "task": describe(Numbers((0.0, 0.0), (1.0, 1.0)))}
    with pytest.raises(UserError, match=r"answers with age, size \(2\), and the images are labelled by age \(1\)"):
        evaluate.match_classes(data, info, "run")


def test_checkpoints_for_numbers_of_other_scales_are_not_averaged(tmp_path):
    for name, mean in (("a", 1.0), ("b", 1.0), ("c", 2.0)):
        info = {"model": {"name": "tiny"}, "classes": ["age"], "step": 1, "task": describe(Numbers((mean,), (1.0,)))}
        checkpoint.write_variables(tmp_path / name, {"params": {"w": np.full(2, mean, np.float32)}}, info)
    assert checkpoint.average_checkpoints([tmp_path / "a", tmp_path / "b"])[0]["params"]["w"].tolist() == [1, 1]
    with pytest.raises(UserError, match="were trained on numbers of other means and deviations"):
        checkpoint.average_checkpoints([tmp_path / "a", tmp_path / "c"])


def test_captions_of_numbers_are_in_their_units():
    assert Numbers((10.0, 0.0), (2.0, 1.0)).caption(np.array([0.5, -1.0]), ("age", "size")) == "age 11\nsize -1"


@pytest.mark.parametrize("name", READ)
def test_a_step_with_self_distillation_has_gradients_of_every_branch(name):
    """The loss is a sum over branches, and the terms between them fit what the outputs stand for."""
    task = tasks.unfitted(name, 3)
    recipe = bind(settings_for(None, loss={"name": READ[name][1], "decorrelation": 0.3}))
    about = Images(8, 3, (0.5,) * 3, (0.25,) * 3, task)
    loss = make_loss(recipe, about)
    logits, students = jax.random.normal(jax.random.key(0), (2, 2, 4, 3))
    targets = jnp.full((4, 3), 1 / 3)
    compute = jax.jit(jax.value_and_grad(lambda outputs: loss(outputs, targets), has_aux=True))
    (_, parts), grads = compute({"logits": logits, "distill": students})
    one = jax.jit(lambda branch: loss({"logits": branch[None]}, targets)[0])
    np.testing.assert_allclose(parts["base"], sum(map(one, logits)), rtol=1e-6)
    assert parts["distillation"] > 0 and parts["decorrelation"] > 0
    assert all(np.abs(branch).max() > 0 for tree in grads.values() for branch in tree)
    equal = jnp.stack([logits[0]] * 2)
    np.testing.assert_allclose(compute({"logits": equal, "distill": equal})[0][1]["distillation"], 0, atol=1e-7)
