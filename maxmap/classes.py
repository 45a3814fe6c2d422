"""Class names: they decide everywhere that a checkpoint's classes meet those of data or of another checkpoint."""

import collections
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from maxmap.errors import UserError, nearest, quoted, reason, shortened
from maxmap.small_files import read_small

_SHOWN = 3  # names that a message lists
_CLASS_NUMBER = re.compile("-1|[0-9]{1,9}")


def match(own: Sequence[str], known: Sequence[str], where: str, whose: str) -> np.ndarray:
    """Finds classes among others by their names.

    Args:
      own: Names of some classes.
      known: Names of the classes to find them among.
      where: What has `own`, for the message: '/data/val'.
      whose: What has `known`, for the message: 'the training split'.

    Returns:
      int32 `[len(own)]`: for each of `own` its index in `known`.

    Raises:
      UserError: Names in `own` are not in `known`, or two classes of either have the same name.
    """
    require_distinct(own, where)
    require_distinct(known, whose)
    index = {name: i for i, name in enumerate(known)}
    unknown = [name for name in own if name not in index]
    if unknown:
        raise UserError(
            f"class {quoted(unknown[0])} of {where} ({len(unknown)} such) is not among the {len(index)} classes of "
            f"{whose} (nearest: {nearest(unknown[0], index)}): rename it, or leave it out."
        )
    return np.array([index[name] for name in own], np.int32)


def require_distinct(names: Sequence[str], where: str) -> None:
    """Raises UserError if a name is empty or two classes have the same name; `where` says what has these classes."""
    for i, name in enumerate(names):
        if not name.strip():
            raise UserError(f"class {i} of {where} has no name: give each class a name of its own.")
    counts = collections.Counter(names)
    if len(counts) < len(names):
        twice = next(name for name in names if counts[name] > 1)
        both = [str(i) for i, name in enumerate(names) if name == twice]
        raise UserError(
            f"{where} has {len(both)} classes with the name {quoted(twice)} (numbers {listed(both)}): give each class "
            "a name of its own."
        )


def are_numbers(names: Sequence[str]) -> bool:
    """Whether classes have the numbers from 0 in place of names."""
    return list(names) == [str(number) for number in range(len(names))]


def stored_names(info: Mapping[str, Any]) -> Sequence[str] | None:
    """Returns the class names of a checkpoint; None if it knows only their numbers.

    Numbers are names where a run took them from folders or from a data set that has names. A converted checkpoint, and
    a run on archives that store labels, may know nothing but numbers.

    Args:
      info: What a checkpoint says of itself.
    """
    names = info.get("classes")
    source = info.get("config", {}).get("data", {}).get("source", "tar")
    return None if names is None or (source == "tar" and are_numbers(names)) else names


def listed(names: Sequence[str]) -> str:
    """Returns names as text, the first ones of many."""
    return ", ".join([*names[:_SHOWN], *["..."] * (len(names) > _SHOWN)])


def read_names(path: str | os.PathLike) -> list[str]:
    """Reads a text file with the name of a class in every line; line i, from 0, names class i.

    Raises:
      UserError: The file cannot be read, or a line is blank, or two lines are the same.
    """
    names = [line.strip() for line in read_lines(path)]
    for number, name in enumerate(names, 1):
        if not name:
            raise UserError(
                f"line {number} of {path} is blank, and each line names a class: remove the line, or name the class."
            )
    require_distinct(names, os.fspath(path))
    return names


def read_numbers(path: str | os.PathLike) -> list[int]:
    """Reads a class map: in every line the number of a class, or -1.

    Raises:
      UserError: The file cannot be read, or a line is no such number.
    """
    lines = read_lines(path)
    for number, line in enumerate(lines, 1):
        if not _CLASS_NUMBER.fullmatch(line.strip()):
            raise UserError(
                f"{path} is no class map, because its line {number} is {quoted(line)}: give the number of a class in "
                "every line, or -1."
            )
    return [int(line) for line in lines]


def read_lines(path: str | os.PathLike) -> list[str]:
    """Reads the lines of a UTF-8 file, without a byte-order mark and without blank lines at its end.

    Raises:
      UserError: The file cannot be read.
    """
    try:
        text = read_small(path).decode("utf-8-sig")
    except (OSError, ValueError) as error:
        raise UserError(
            f"cannot read {path} ({shortened(reason(error))}): give a UTF-8 text file with one line for each class."
        ) from None
    # Not splitlines(), which also splits at characters that a name may contain.
    return text.rstrip().split("\n")
