"""Batches are a function of (seed, step), whatever the processes; evaluation sees every image once."""

import dataclasses
import io
import itertools
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from maxmap.data import decode, order
from maxmap.data.labelled import LabelledImage
from maxmap.data.pipeline import Data, open_data
from maxmap.data.preprocessing import cropped
from maxmap.data.sources import open_source
from maxmap.errors import UserError
from tests.reference import import_timm

OPTIONS = {
    "image_size": 6,
    "crop_pct": 0.875,
    "mean": (0.5, 0.4, 0.3),
    "std": (0.2, 0.2, 0.2),
    "threads": 3,
}


def digits(**options) -> Data:
    return open_data("digits", **{**OPTIONS, **options})


def assert_same(one: dict, other: dict) -> None:
    assert one.keys() == other.keys()
    for name in one:
        assert one[name].dtype == other[name].dtype and np.array_equal(one[name], other[name]), name


def concatenate(batches) -> dict:
    batches = list(batches)
    return {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}


@pytest.fixture(scope="module")
def data() -> Data:
    return digits()


def test_batches_have_the_contracts_shapes_and_types(data):
    (batch,) = data.train_batches(20, seed=0, num_steps=1)
    assert {name: (value.shape, value.dtype.name) for name, value in batch.items()} == {
        "image": ((20, 6, 6, 3), "uint8"),
        "label": ((20,), "int32"),
        "index": ((20,), "int64"),
        "skipped": ((20,), "int64"),
    }
    batch = next(data.eval_batches(20))
    assert {name: (value.shape, value.dtype.name) for name, value in batch.items()} == {
        "image": ((20, 6, 6, 3), "uint8"),
        "label": ((20,), "int32"),
        "mask": ((20,), "bool"),
        "index": ((20,), "int64"),
        "skipped": ((20,), "int64"),
    }
    assert (data.num_train, data.num_eval, data.classes) == (1437, 360, tuple("0123456789"))


@pytest.mark.parametrize("batch_size", [1, 100, 33])  # 100 and 33 take several chunks
def test_resuming_equals_going_on(data, batch_size):
    steps = data.steps_per_epoch(batch_size)
    start = max(0, steps - 3)  # across the end of the epoch
    whole = list(data.train_batches(batch_size, seed=3, num_steps=start + 7))
    resumed = list(data.train_batches(batch_size, seed=3, start_step=start, num_steps=7))
    assert len(whole) == start + 7 and len(resumed) == 7
    for one, other in zip(whole[start:], resumed, strict=True):
        assert_same(one, other)


@pytest.mark.parametrize("processes", [2, 4])
def test_one_process_equals_several_together(data, processes):
    alone = data.train_batches(88, seed=1, start_step=14, num_steps=4)
    shares = [
        data.train_batches(88, seed=1, start_step=14, num_steps=4, process_index=k, process_count=processes)
        for k in range(processes)
    ]
    for whole, *parts in zip(alone, *shares, strict=True):
        assert_same(whole, concatenate(parts))


def test_threads_and_workers_do_not_change_the_batches(data):
    wanted = list(data.train_batches(70, seed=2, num_steps=3))
    for other in (dataclasses.replace(data, threads=1), dataclasses.replace(data, workers=2)):
        batches = list(other.train_batches(70, seed=2, num_steps=3))
        assert len(batches) == 3
        for one, two in zip(wanted, batches, strict=True):
            assert_same(one, two)


def test_an_epoch_is_a_permutation_and_each_seed_and_epoch_has_its_own(data):
    steps = data.steps_per_epoch(100)
    assert steps == 14
    orders = [
        concatenate(data.train_batches(100, seed=seed, start_step=start, num_steps=steps))["index"]
        for seed, start in [(0, 0), (0, steps), (1, 0)]
    ]
    for indices in orders:
        assert len(set(indices)) == 1400 and indices.min() >= 0 and indices.max() < 1437
    for one, other in itertools.combinations(orders, 2):
        assert np.mean(one == other) < 0.02
        assert set(one) != set(other)  # what is left out differs too


def test_rows_are_the_crops_of_the_images_they_name(data):
    (batch,) = data.train_batches(50, seed=5, start_step=2, num_steps=1)
    for row in range(50):
        record = data.train[int(batch["index"][row])]
        assert batch["label"][row] == record.label
        rng = order.SampleOrder(1437, 1, 1400, 5).generator(2 * 50 + row)
        assert np.array_equal(batch["image"][row], decode.train_crop(record.image, rng, size=6))


def test_every_epoch_crops_an_image_anew(data):
    one, two = (concatenate(data.train_batches(1437, seed=0, start_step=epoch, num_steps=1)) for epoch in (0, 1))
    same = one["image"][np.argsort(one["index"])] == two["image"][np.argsort(two["index"])]
    assert same.all(axis=(1, 2, 3)).mean() < 0.05


@pytest.mark.parametrize("batch_size", [1, 7, 64, 120, 359, 360, 361, 1000])
@pytest.mark.parametrize("processes", [1, 2, 3])
def test_evaluation_sees_every_image_once(data, batch_size, processes):
    shares = [list(data.eval_batches(batch_size, process_index=k, process_count=processes)) for k in range(processes)]
    assert len({len(share) for share in shares}) == 1
    assert len({batch["image"].shape for share in shares for batch in share}) == 1
    rows = concatenate(batch for batches in zip(*shares, strict=True) for batch in batches)
    assert rows["index"][rows["mask"]].tolist() == list(range(360))
    assert rows["label"][rows["mask"]].tolist() == [data.val[i].label for i in range(360)]
    padding = ~rows["mask"]
    assert (rows["index"][padding] == -1).all() and not rows["image"][padding].any()
    assert (rows["skipped"] == -1).all()


def test_cropped_does_what_evaluation_does(data, tmp_path):
    assert json.loads(json.dumps(data.preprocessing)) == data.preprocessing
    assert data.preprocessing == {
        "image_size": 6,
        "crop_pct": 0.875,
        "crop_mode": "center",
        "interpolation": "bicubic",
        "mean": [0.5, 0.4, 0.3],
        "std": [0.2, 0.2, 0.2],
        "exif": False,
    }
    images = next(data.eval_batches(9))["image"]
    path = tmp_path / "a.png"
    Image.fromarray(data.val[8].image).save(path)
    for image in (data.val[8].image, Image.open(path), path, str(path), path.read_bytes()):
        assert np.array_equal(cropped(image, data.preprocessing), images[8])
    path.write_bytes(b"text")
    for broken, where in [(path, str(path)), (tmp_path / "none.png", "none.png"), (b"text", "the image")]:
        with pytest.raises(UserError, match=rf"cannot read .*{where}"):
            cropped(broken, data.preprocessing)


def test_evaluation_has_its_own_size_and_crop():
    data = digits(eval_image_size=9, crop_mode="border", eval_interpolation="nearest")
    assert next(data.eval_batches(4))["image"].shape == (4, 9, 9, 3)
    (batch,) = data.train_batches(4, seed=0, num_steps=1)
    assert batch["image"].shape == (4, 6, 6, 3)
    assert data.preprocessing["crop_mode"] == "border" and data.preprocessing["interpolation"] == "nearest"


# Repeated augmentation ---------------------------------------------------------------------------------------------


def test_repeats_follow_one_another_with_crops_of_their_own():
    data = digits(repeats=3)
    assert data.steps_per_epoch(128) == 1437 // 256 * 256 // 128
    batch = concatenate(data.train_batches(128, seed=0, num_steps=10))
    triples = batch["index"][: 3 * 426].reshape(-1, 3)  # [unique images, repeats]
    assert (triples == triples[:, :1]).all() and len(set(triples[:, 0])) == 426
    crops = batch["image"][: 3 * 426].reshape(426, 3, -1)
    assert (crops[:, 0] == crops[:, 1]).all(axis=-1).mean() < 0.05


@pytest.mark.parametrize("num, ranks", [(1000, 1), (1000, 4), (100, 1), (100, 2)])
def test_repeats_are_timms_repeat_aug_sampler_for_the_same_permutation(monkeypatch, num, ranks):
    import_timm()
    import torch
    from timm.data.distributed_sampler import RepeatAugSampler

    permutation = order.permutation(num, 7, 0)
    monkeypatch.setattr(torch, "randperm", lambda n, generator: torch.tensor(permutation))
    shares = [list(RepeatAugSampler(range(num), ranks, rank, num_repeats=3)) for rank in range(ranks)]
    wanted = [index for row in zip(*shares, strict=True) for index in row]
    length = order.epoch_length(num, 3)
    samples = order.SampleOrder(num, 3, length, 7)
    assert [samples.index(position) for position in range(length)] == wanted


def test_a_balanced_epoch_has_as_many_samples_of_one_class_as_of_another():
    labels = np.random.default_rng(0).permutation(np.repeat([0, 2, 3], [180, 19, 3]))  # no image of class 1
    samples = order.SampleOrder(202, 1, 202, 5, labels)
    epochs = np.array([[samples.index(202 * epoch + i) for i in range(202)] for epoch in range(6)])
    counts = np.array([np.bincount(labels[epoch], minlength=4) for epoch in epochs])
    assert (counts[:, 1] == 0).all() and set(counts[:, [0, 2, 3]].ravel()) == {67, 68}
    assert (counts[:3].sum(0) == [202, 0, 202, 202]).all()  # the classes take turns with the sample that is left
    for label in (0, 2, 3):
        dealt = np.bincount(epochs.ravel(), minlength=202)[labels == label]
        assert np.ptp(dealt) <= 1  # no image a second time before all others came
    assert not np.array_equal(epochs[0], epochs[1])
    again = pickle.loads(pickle.dumps(samples))
    assert [again.index(i) for i in (0, 500, 1211)] == [epochs.ravel()[i] for i in (0, 500, 1211)]


def test_balanced_data(folder):
    for i in range(0, 40, 2):
        if i > 3:
            (folder / "train" / "a" / f"{i:02}.jpg").unlink()
    data = open_data("folder", folder, balanced=True, **OPTIONS)
    whole = data.with_classes(("b", "c", "a"), "the checkpoint")
    for source, small in ((data, 0), (whole, 2)):
        rows = concatenate(source.train_batches(11, seed=0, num_steps=2))
        assert np.bincount(rows["label"], minlength=3)[small] == 11


# Broken images -----------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    """Forty JPEGs; number i is grey level 6 * i, and its class is i % 2."""
    for split, i in itertools.product(("train", "val"), range(40)):
        path = tmp_path / split / "ab"[i % 2] / f"{i:02}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 16), (6 * i,) * 3).save(path)
    return tmp_path


def cut(path) -> None:
    path.write_bytes(path.read_bytes()[:-40])


def test_a_broken_image_in_training_is_replaced_by_the_next_and_reported(folder):
    data = open_data("folder", folder, **OPTIONS)
    whole = concatenate(data.train_batches(10, seed=0, num_steps=4))
    bad = int(whole["index"][12])
    cut(Path(data.train.name(bad)))
    with pytest.raises(UserError, match=r"1 of the 40 images checked"):
        open_data("folder", folder, **OPTIONS)
    data = open_data("folder", folder, check=0, **OPTIONS)
    rows = concatenate(data.train_batches(10, seed=0, num_steps=4))
    others = np.arange(40) != 12
    for name in rows:
        assert np.array_equal(rows[name][others], whole[name][others])
    assert rows["index"][12] == whole["index"][13] and rows["label"][12] == whole["label"][13]
    assert np.array_equal(rows["image"][12], whole["image"][13])  # plain grey, whatever the crop
    assert rows["skipped"][12] == bad and (rows["skipped"][others] == -1).all()
    assert_same(rows, concatenate(data.train_batches(10, seed=0, num_steps=4)))


def test_a_broken_image_in_evaluation_is_masked_and_reported(folder):
    data = open_data("folder", folder, **OPTIONS)
    cut(Path(data.val.name(17)))
    rows = concatenate(data.eval_batches(16))
    assert rows["index"][rows["mask"]].tolist() == [i for i in range(40) if i != 17]
    assert rows["skipped"][17] == 17 and rows["index"][17] == 17 and not rows["image"][17].any()
    assert (np.delete(rows["skipped"], 17) == -1).all()


def test_a_photo_that_lies_on_its_side_is_turned_where_the_config_says_so(folder):
    exif = Image.Exif()
    exif[0x0112] = 6
    upright = np.zeros((16, 20, 3), np.uint8)
    upright[:8] = 255  # the sky
    for path in folder.rglob("*.jpg"):
        Image.fromarray(upright).transpose(Image.Transpose.ROTATE_90).save(path, exif=exif, quality=95)
    options = {**OPTIONS, "scale": (1.0, 1.0)}
    for turned in (False, True):
        data = open_data("folder", folder, exif=turned, **options)
        assert data.preprocessing["exif"] is turned
        train = next(data.train_batches(4, seed=0, num_steps=1))["image"].astype(int)
        val = next(data.eval_batches(4))["image"].astype(int)
        single = cropped(data.val.name(0), data.preprocessing)[None].astype(int)
        older = {key: value for key, value in data.preprocessing.items() if key != "exif"}
        assert np.array_equal(cropped(data.val.name(0), older)[None] == single, np.full(single.shape, True)) != turned
        for images in (train, val, single):
            sky, ground = images[:, 0].mean(), images[:, -1].mean()
            assert (sky > 240 and ground < 15) if turned else abs(sky - ground) < 15


def test_an_image_of_more_pixels_than_allowed_is_broken(folder):
    Image.new("RGB", (21, 16)).save(folder / "val" / "a" / "00.jpg")
    with pytest.raises(
        UserError, match=r"00\.jpg \(the image has 21 x 16 pixels, more than the 320 of .*max_pixels\);"
    ):
        open_data("folder", folder, max_pixels=320, **OPTIONS)
    data = open_data("folder", folder, max_pixels=320, check=0, **OPTIONS)
    assert next(data.eval_batches(4))["skipped"].tolist() == [0, -1, -1, -1]
    (folder / "val" / "a" / "00.jpg").rename(folder / "train" / "a" / "00.jpg")
    data = open_data("folder", folder, max_pixels=320, check=0, **OPTIONS)
    (batch,) = data.train_batches(40, seed=0, num_steps=1)
    assert sorted(batch["skipped"].tolist())[-2:] == [-1, 0]


def test_training_gives_up_when_nothing_can_be_read(folder):
    data = open_data("folder", folder, **OPTIONS)
    for path in (folder / "train").rglob("*.jpg"):
        path.unlink()
    with pytest.raises(UserError, match=r"100 training images in a row cannot be read, from .*\.jpg on"):
        next(data.train_batches(4, seed=0, num_steps=1))


@pytest.mark.parametrize("workers", [0, 1])
def test_errors_of_threads_and_workers_reach_the_caller(folder, workers):
    data = open_data("folder", folder, workers=workers, **OPTIONS)
    for path in (folder / "train").rglob("*.jpg"):
        path.unlink()
    batches = data.train_batches(4, seed=0, num_steps=1)
    with pytest.raises(UserError, match="100 training images in a row"):
        next(batches)


class Faulty:
    """A source with a fault in its code, which is no broken image."""

    classes = ("a",)
    label_shape = ()

    def __len__(self) -> int:
        return 50

    def __getitem__(self, index: int) -> LabelledImage:
        raise RuntimeError(f"fault at {index}")


def test_a_fault_in_the_code_is_no_broken_image(data):
    faulty = dataclasses.replace(data, train=Faulty(), val=Faulty())
    for batches in (faulty.train_batches(4, seed=0, num_steps=2), faulty.eval_batches(4)):
        with pytest.raises(RuntimeError, match="fault at"):
            next(batches)


def test_training_classes_rule_the_labels_of_evaluation(folder):
    for path in (folder / "val" / "a").iterdir():
        path.unlink()
    (folder / "val" / "a").rmdir()
    data = open_data("folder", folder, **OPTIONS)
    assert data.classes == ("a", "b")
    assert set(concatenate(data.eval_batches(20))["label"]) == {1}


# Mistakes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("repeats, length", [(1, 1437), (3, 1280)])
def test_a_batch_larger_than_the_epoch(repeats, length):
    data = digits(repeats=repeats)
    assert data.steps_per_epoch(length) == 1
    for batch_size in (length + 1, 0):
        with pytest.raises(UserError, match=rf"batch size {batch_size} does not fit an epoch of {length} samples"):
            data.train_batches(batch_size, seed=0, num_steps=1)


def test_a_batch_that_processes_cannot_share(data):
    with pytest.raises(UserError, match="batch size 10 cannot be shared by 4 processes"):
        data.train_batches(10, seed=0, num_steps=1, process_count=4)


def test_a_negative_seed(data):
    with pytest.raises(UserError, match="seed -1 is negative"):
        data.train_batches(10, seed=-1, num_steps=1)


@pytest.mark.parametrize(
    "options, text",
    [
        ({"interpolation": "randm"}, r"'randm' \(--config.data.interpolation\): did you mean 'random'"),
        ({"eval_interpolation": "random"}, r"'random' \(--config.data.eval_interpolation\)"),
        ({"crop_mode": "centre"}, r"'centre' \(--config.data.crop_mode\): did you mean 'center'"),
        ({"max_pixels": 0}, "data.max_pixels is 0: give a value of type int from 1 to 178956970"),
        ({"scale": (0.5, 0.1)}, r"scale=\(0.5, 0.1\) is no range: give the smaller number first"),
        ({"ratio": (2, 1)}, r"ratio=\(2, 1\) is no range"),
        ({"crop_pct": 1e-6}, "data.crop_pct is 1e-06: give a value of type float from 0.1 to 1"),
        ({"train_split": None, "val_split": None}, "neither .*train_split nor .*val_split"),
    ],
)
def test_options_out_of_range(options, text):
    with pytest.raises(UserError, match=text):
        digits(**options)


def test_one_split_is_enough():
    evaluation = digits(train_split=None)
    assert evaluation.num_train == 0 and len(next(evaluation.eval_batches(8))["label"]) == 8
    with pytest.raises(UserError, match="no training data"):
        evaluation.steps_per_epoch(8)
    training = digits(val_split=None)
    assert training.num_eval == 0
    with pytest.raises(UserError, match="no evaluation data"):
        training.eval_batches(8)


def test_given_classes_rule_the_labels():
    data = digits(train_split=None, classes=tuple("9876543210x"))
    plain = open_source("digits", split="val")
    assert data.classes == tuple("9876543210x")
    assert next(data.eval_batches(8))["label"].tolist() == [9 - plain[i].label for i in range(8)]


def test_an_image_file_makes_the_same_row_as_its_pixels(tmp_path):
    file = io.BytesIO()
    image = np.random.default_rng(0).integers(0, 255, (40, 30, 3), np.uint8)
    Image.fromarray(image).save(file, "PNG")
    crops = [decode.train_crop(given, np.random.default_rng(1), size=12) for given in (image, file.getvalue())]
    assert np.array_equal(*crops)
