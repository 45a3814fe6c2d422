"""What is odd about the images of a folder, and what of it hinders training."""

import collections
import concurrent.futures
import itertools
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np

from maxmap.check.contents import Contents
from maxmap.check.duplicates import find_groups
from maxmap.data.inspection import Inspection, inspect
from maxmap.errors import printable
from maxmap.progress import Progress
from maxmap.ranges import Count, Range

_CHUNK = 1000  # images that wait for a thread at a time


@dataclass(frozen=True)
class Findings:
    """What `examine` finds; images are numbers in the order of `contents`.

    Attributes:
      contents: The images.
      inspections: What each of them is.
      counts: Readable images of each split and class, int64 [splits, classes].
      kinds: Number of images of each format and mode.
      broken: Images that cannot be decoded.
      tiny: Images with a short side.
      copies: Groups of images that look the same, among them equal files.
      leaks: Those of the groups that more than one split has.
      contradictions: Those of the groups that more than one class has.
      problems: What hinders training, in words.
      hints: What does not, but is worth knowing.
    """

    contents: Contents
    inspections: list[Inspection]
    counts: np.ndarray
    kinds: dict[str, int]
    broken: np.ndarray
    tiny: np.ndarray
    copies: list[np.ndarray]
    leaks: list[np.ndarray]
    contradictions: list[np.ndarray]
    problems: list[str]
    hints: list[str]

    def readable(self) -> np.ndarray:
        """Returns which images can be decoded, bool [N]."""
        return np.array([found.fault is None for found in self.inspections], bool)

    def ordinary_copies(self) -> list[np.ndarray]:
        """Returns the groups of copies that lie in one split and one class."""
        odd = {id(group) for group in [*self.leaks, *self.contradictions]}
        return [group for group in self.copies if id(group) not in odd]

    def equal(self, group: np.ndarray) -> bool:
        """Whether the images of a group are the same file."""
        return len({self.inspections[index].digest for index in group}) == 1


def inspect_all(contents: Contents) -> list[Inspection]:
    """Reads every image, on as many threads as the machine has cores, and shows how far it is."""
    found: list[Inspection] = []
    broken = 0
    progress = Progress(len(contents.files))
    numbers = iter(range(len(contents.files)))
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        try:
            while chunk := [contents.path(index) for index in itertools.islice(numbers, _CHUNK)]:
                for one in pool.map(inspect, chunk):
                    found.append(one)
                    broken += one.fault is not None
                    progress.update(len(found), f"{broken} broken")
        finally:
            pool.shutdown(cancel_futures=True)
            progress.close()
    return found


def examine(
    contents: Contents,
    inspections: list[Inspection],
    *,
    distance: Annotated[int, Range(at_least=0, at_most=10)],
    tiny: Count,
) -> Findings:
    """Says what is odd about images.

    Args:
      contents: The images.
      inspections: What each of them is.
      distance: Bits of 64 in which the perceptual hashes of copies differ at most.
      tiny: Pixels of a side below which an image is tiny.
    """
    good = np.flatnonzero([found.fault is None for found in inspections])
    broken = np.setdiff1d(np.arange(len(inspections)), good)
    counts = np.zeros((len(contents.splits), len(contents.classes)), np.int64)
    np.add.at(counts, (contents.split[good], contents.label[good]), 1)
    hashes = np.array([inspections[index].hash for index in good], np.uint64)
    copies = [_places_first(contents, good[group]) for group in find_groups(hashes, distance)]
    return Findings(
        contents,
        inspections,
        counts,
        dict(collections.Counter(inspections[index].kind for index in good).most_common()),
        broken,
        good[[min(inspections[index].size) < tiny for index in good]],
        copies,
        leaks := [group for group in copies if len(set(contents.split[group])) > 1],
        [group for group in copies if len(set(contents.label[group])) > 1],
        _problems(contents, counts, len(broken), leaks),
        _hints(contents, counts),
    )


def _places_first(contents: Contents, group: np.ndarray) -> np.ndarray:
    """Orders a group so that the first image of every split and class comes before the others."""
    places = np.stack([contents.split[group], contents.label[group]])
    first = np.sort(np.unique(places, axis=1, return_index=True)[1])
    return group[[*first, *np.setdiff1d(np.arange(len(group)), first)]]


def _problems(contents: Contents, counts: np.ndarray, broken: int, leaks: Sequence[np.ndarray]) -> list[str]:
    """Returns what hinders training."""
    found = [sentence.rstrip(".") for sentence in contents.refused]
    if broken:
        found.append(f"{counted(broken, 'image')} cannot be decoded; remove or replace them")
    first = contents.splits[0]
    leaked: collections.Counter[int] = collections.Counter()
    for group in leaks:
        leaked.update(split for split in contents.split[group].tolist() if split != contents.split[group].min())
    for split, number in sorted(leaked.items()):
        verb = "has a copy" if number == 1 else "have copies"
        found.append(
            f"{counted(number, 'image')} of {contents.splits[split]} {verb} in another split, so its accuracy says too "
            "much; remove them from one of the splits"
        )
    present = {name: set(np.flatnonzero(row).tolist()) for name, row in zip(contents.splits, counts, strict=True)}
    if first == "train":
        for name in contents.splits[1:]:
            if unknown := sorted(present[name] - present[first]):
                what = f"classes that {first} has no image of ({_named(contents, unknown)})"
                found.append(f"{name} has {what}, which training refuses")
    if len(contents.classes) == 1:
        found.append(
            f"there is one class alone, {contents.classes[0]}: give the folder that holds train and val, or classes"
        )
    return found


def _hints(contents: Contents, counts: np.ndarray) -> list[str]:
    """Returns what does not hinder training, but is worth knowing."""
    found = []
    if contents.splits == [""]:
        found.append("there are no splits yet: --split=0.2 --out=FOLDER makes them")
    elif "val" not in contents.splits:
        found.append("training evaluates on val, which is not there: name another with --config.data.val_split")
    elif "train" not in contents.splits:
        found.append("there is no split train to train on")
    for name, row in zip(contents.splits, counts, strict=True):
        absent = np.flatnonzero((row == 0) & (counts.sum(axis=0) > 0))
        if name != "train" and len(absent):
            found.append(f"{name} has no images of {_named(contents, absent.tolist())}")
    return found


def _named(contents: Contents, classes: Sequence[int]) -> str:
    """Returns the names of classes, the first three of many."""
    names = [printable(contents.classes[number]) for number in classes]
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def counted(number: int, noun: str) -> str:
    """Returns a number with its noun, such as "1 image" or "1,200 images"."""
    return f"{number:,} {noun}{'s' * (number != 1)}"


def as_json(findings: Findings) -> dict[str, Any]:
    """Returns everything that was found, as JSON holds it."""
    contents = findings.contents
    names = [name or "all" for name in contents.splits]

    def paths(numbers: Sequence[int] | np.ndarray) -> list[str]:
        return [printable(contents.path(int(index))) for index in numbers]

    def groups(found: Sequence[np.ndarray]) -> list[dict[str, Any]]:
        return [{"equal": findings.equal(group), "images": paths(group)} for group in found]

    good = np.flatnonzero(findings.readable())
    sizes = np.array([findings.inspections[index].size for index in good]).reshape(-1, 2)
    return {
        "folder": printable(contents.folder),
        "images": len(contents.files),
        "classes": {
            printable(name): dict(zip(names, column.tolist(), strict=True))
            for name, column in zip(contents.classes, findings.counts.T, strict=True)
        },
        "kinds": findings.kinds,
        "sizes": {
            name: dict(
                zip(("least", "median", "most"), np.percentile(side, (0, 50, 100)).astype(int).tolist(), strict=True)
            )
            for name, side in (("width", sizes[:, 0]), ("height", sizes[:, 1]))
            if len(good)
        },
        "broken": [
            {"image": printable(contents.path(int(index))), "reason": printable(str(findings.inspections[index].fault))}
            for index in findings.broken
        ],
        "tiny": paths(findings.tiny),
        "copies": groups(findings.copies),
        "leaks": groups(findings.leaks),
        "contradictions": groups(findings.contradictions),
        "ignored": list(map(printable, contents.ignored)),
        "problems": [printable(text) for text in findings.problems],
        "hints": findings.hints,
    }
