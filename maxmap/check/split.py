"""Splits the images of a folder of class folders into train and val, in a new folder."""

import os
import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import numpy as np

from maxmap.check.contents import Contents
from maxmap.ranges import CountOrZero, Range
from maxmap.storage import atomic_target


def choose_val(
    label: np.ndarray,
    groups: Sequence[np.ndarray],
    *,
    share: Annotated[float, Range(above=0, below=1)],
    seed: CountOrZero,
) -> np.ndarray:
    """Draws the images of val: the same share of every class, and copies on one side.

    A class with two images or more gives val at least one and keeps one, unless all of them are copies of each other.

    Args:
      label: Class of each image, int [N].
      groups: The images that are copies of each other.
      share: Of the images of each class.
      seed: Of the draw.

    Returns:
      bool [N].
    """
    total = Counter(label.tolist())
    wanted = {each: min(max(1, round(share * count)), count - 1) for each, count in total.items()}
    grouped = set(np.concatenate(groups).tolist()) if groups else set()
    units = [*groups, *(np.array([index]) for index in range(len(label)) if index not in grouped)]
    units.sort(key=lambda unit: unit[0])
    val, given = np.zeros(len(label), bool), Counter[int]()

    def give(unit: np.ndarray, counts: Counter[int]) -> None:
        val[unit] = True
        given.update(counts)

    for number in np.random.RandomState(seed).permutation(
        len(units)
    ):  # whose streams never change with NumPy's version
        counts = Counter(label[units[number]].tolist())
        if all(given[each] + count <= wanted[each] for each, count in counts.items()):
            give(units[number], counts)
    for unit in sorted(units, key=len):  # where every group of a class is larger than its share
        counts = Counter(label[unit].tolist())
        if not all(given[each] for each in counts) and all(given[each] + n < total[each] for each, n in counts.items()):
            give(unit, counts)
    return val


def write_split(contents: Contents, images: Sequence[int] | np.ndarray, val: np.ndarray, out: Path) -> None:
    """Writes `out/{train,val}/CLASS/FILE` as hard links, or as copies where the file system has no links.

    Nothing is moved or changed, and `out` is there with all files or not at all.

    Args:
      contents: The images.
      images: Numbers of those to write.
      val: Whether each of these goes to val, bool [len(images)].
      out: A folder that is not there yet.

    Raises:
      UserError: The folder is there already, or cannot be written.
    """
    with atomic_target(out) as unfinished:
        for index, in_val in zip(images, val, strict=True):
            target = unfinished / ("val" if in_val else "train") / contents.classes[contents.label[index]]
            target = target / contents.files[index]
            target.parent.mkdir(parents=True, exist_ok=True)
            source = os.path.realpath(contents.path(int(index)))  # else the new name would be a link to a link
            try:
                os.link(source, target)
            except OSError:  # another disk, or a file system without links
                shutil.copyfile(source, target)
