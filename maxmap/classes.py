"""Class names: they decide everywhere that a checkpoint's classes meet those of data or of another checkpoint."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from maxmap.errors import UserError, nearest

_SHOWN = 3  # names that a message lists


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
            f"class {unknown[0]!r} of {where} ({len(unknown)} such) is not among the {len(index)} classes of {whose} "
            f"(nearest: {nearest(unknown[0], index)}): rename it, or leave it out."
        )
    return np.array([index[name] for name in own], np.int32)


def require_distinct(names: Sequence[str], where: str) -> None:
    """Raises UserError if a name is empty or two classes have the same name; `where` says what has these classes."""
    for i, name in enumerate(names):
        if not name.strip():
            raise UserError(f"class {i} of {where} has no name: give each class a name of its own.")
    if len(set(names)) < len(names):
        twice = next(name for i, name in enumerate(names) if name in names[:i])
        both = ", ".join(str(i) for i, name in enumerate(names) if name == twice)
        raise UserError(
            f"{where} has {names.count(twice)} classes with the name {twice!r} (numbers {both}): give each class a "
            "name of its own."
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


def read_lines(path: str | os.PathLike) -> list[str]:
    """Reads the lines of a UTF-8 file, without a byte-order mark and without blank lines at its end.

    Raises:
      UserError: The file cannot be read.
    """
    try:
        text = Path(path).read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path} ({error}): give a UTF-8 text file with one line for each class.") from None
    # Not splitlines(), which also splits at characters that a name may contain.
    return text.rstrip().split("\n")
