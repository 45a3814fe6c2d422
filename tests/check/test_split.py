"""The split: the same share of each class, copies on one side, nothing lost, the same again for the same seed."""

from collections import Counter

import numpy as np
import pytest

from maxmap.check.contents import read_contents
from maxmap.check.split import choose_val, write_split
from maxmap.errors import UserError
from tests.tiny import CLASSES, files, write_image


@pytest.mark.parametrize("seed", range(5))
def test_the_share_of_every_class_without_copies(seed):
    label = np.repeat([0, 1, 2, 3, 4], [100, 37, 3, 2, 1])
    val = choose_val(label, [], share=0.2, seed=seed)
    assert [val[label == each].sum() for each in range(5)] == [20, 7, 1, 1, 0]
    assert np.array_equal(val, choose_val(label, [], share=0.2, seed=seed))
    assert not np.array_equal(val, choose_val(label, [], share=0.2, seed=seed + 1))


@pytest.mark.parametrize("seed", range(5))
def test_copies_stay_on_one_side(seed):
    rng = np.random.default_rng(seed)
    label = np.sort(rng.integers(0, 4, 200))
    order = rng.permutation(200)
    groups = [np.sort(group) for group in np.split(order[:120], np.sort(rng.choice(120, 30, replace=False)))]
    val = choose_val(label, groups, share=0.3, seed=seed)
    assert all(len(set(val[group])) <= 1 for group in groups)
    for each in range(4):  # and never more than the share
        assert 0 < val[label == each].sum() <= round(0.3 * (label == each).sum())


def test_classes_of_large_groups():
    """Two groups of five, of which the smaller share takes none: one goes to val. One group alone stays together."""
    label = np.repeat([0, 1], [10, 4])
    groups = [np.arange(5), np.arange(5, 10), np.arange(10, 14)]
    val = choose_val(label, groups, share=0.2, seed=0)
    assert val.sum() == 5 and not val[10:].any()


def test_files_are_linked_and_the_originals_stay(tmp_path):
    source, out = tmp_path / "photos", tmp_path / "new" / "split"
    for i in range(12):
        write_image(source / CLASSES[i % 3] / ("deeper" if i > 8 else ".") / f"{i}.png", i, i % 3)
    (source / "red" / "link.png").symlink_to("2.png")  # a link that leads nowhere in another folder
    before = files(source)
    contents = read_contents(str(source))
    val = np.arange(len(contents.files)) % 4 == 0
    write_split(contents, np.arange(len(contents.files)), val, out)
    assert files(source) == before
    after = files(out)
    assert Counter(name.split("/")[0] for name in after) == {"train": 9, "val": 4}
    assert {name.split("/", 1)[1]: data for name, data in after.items()} == before
    assert not any(path.is_symlink() for path in out.rglob("*"))
    assert (source / "red" / "2.png").stat().st_nlink == 3  # itself, its own copy and that of the link
    with pytest.raises(UserError, match="is there already"):
        write_split(contents, [0], val[:1], out)


def test_files_are_copied_where_links_are_impossible(tmp_path, monkeypatch):
    def link(source, target):
        raise OSError(18, "Invalid cross-device link")

    write_image(tmp_path / "photos" / "red" / "0.png", 0, 0)
    contents = read_contents(str(tmp_path / "photos"))
    monkeypatch.setattr("os.link", link)
    write_split(contents, [0], np.array([False]), tmp_path / "out")
    assert files(tmp_path / "out") == {f"train/{name}": data for name, data in files(tmp_path / "photos").items()}
