"""Reads a CSV file that labels images, a row for each: by one class, several labels, a distribution or numbers.

The file has a header, commas and UTF-8. Everything that is wrong in it is one sentence with its line and column.
"""

import collections
import csv
import os
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, NoReturn

import numpy as np

from maxmap.classes import require_distinct
from maxmap.data.folders import Listing
from maxmap.errors import UserError, nearest, printable, quoted, reason, shortened

ENDING = ".csv"

_LARGEST = float(np.finfo(np.float32).max)
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)


class Columns(NamedTuple):
    """The columns of a file.

    Attributes:
      image: of the path of each image, relative to the file.
      labels: of the labels.
      split: of the split that a row belongs to.
      separator: between the labels in the cell of a single column.
    """

    image: str
    labels: tuple[str, ...]
    split: str
    separator: str


class Table(NamedTuple):
    """The rows of one split.

    Attributes:
      folder: that the names are relative to.
      names: of the images, as the file has them.
      labels: int32 `[N]` for single labels, else float32 `[N, K]`.
      classes: names of the classes or of the K columns.
    """

    folder: str
    names: list[str]
    labels: np.ndarray
    classes: tuple[str, ...]


def column_names(given: str | Sequence[str]) -> tuple[str, ...]:
    """Returns the names of columns, of which a config may give one alone."""
    return (given,) if isinstance(given, str) else tuple(given)


def find_table(path: str | os.PathLike | None, split: str) -> str:
    """Returns the file that holds a split: the path itself, or `<path>/<split>.csv`.

    Raises:
      UserError: there is no such file.
    """
    if path is None:
        raise UserError(
            "no path to the labels is set: give a CSV file, or a folder with train.csv and val.csv, with "
            "--config.data.path=<path>."
        )
    path = os.path.expanduser(os.fspath(path))
    file = os.path.join(path, split + ENDING) if os.path.isdir(path) else path
    if os.path.isfile(file):
        return file
    if not os.path.isdir(path):
        raise UserError(f"there is no CSV file {printable(path)}: give another path with --config.data.path=<path>.")
    present = shortened(", ".join(sorted(name for name in os.listdir(path) if name.endswith(ENDING))) or "no CSV file")
    raise UserError(
        f"there is no {split}{ENDING} in {printable(path)}, where {present} lies: "
        "name the splits with --config.data.train_split and --config.data.val_split, or give one file with a column "
        "'split'."
    )


def split_names(path: str | os.PathLike, column: str) -> list[str]:
    """Returns the names of the splits in a file, sorted; none where it has no such column."""
    reader = _Reader(os.fspath(path))
    if column not in reader.header:
        return []
    return sorted({row[column] for _, row in reader.rows()})


def read_table(
    path: str | os.PathLike | None, split: str, task: str, columns: Columns, classes: Sequence[str] | None = None
) -> Table:
    """Reads the rows of a split.

    Args:
      path: a CSV file with a column that names splits, or a folder with `<split>.csv`.
      split: its name; '' for all rows of a file.
      task: how the rows label images, a key of `maxmap.tasks.TASKS`.
      columns: see `Columns`.
      classes: names that the labels may have, in order; None for those of these rows, sorted.

    Raises:
      UserError: the file is missing or malformed.
    """
    file = find_table(path, split)
    reader = _Reader(file)
    reader.require(columns.image, "data.image_column")
    for column in columns.labels:
        reader.require(column, "data.label_columns")
    in_split = _in_split(
        reader, split, columns.split, whole=path is not None and os.path.isdir(os.path.expanduser(path))
    )
    parse = CELLS[task](reader, columns, classes)
    folder, names, cells, lines = os.path.dirname(os.path.abspath(file)), [], [], dict[str, int]()
    exists = Listing(folder)
    for line, row in reader.rows():
        if not in_split(row):
            continue
        name = row[columns.image]
        if not name:
            reader.refuse(line, columns.image, "names no image", "give the path of one, relative to the file")
        if not exists(name):
            reader.refuse(line, columns.image, f"names {quoted(name)}, which is no file", "correct the path")
        if name in lines:
            again = f"names {quoted(name)} again, as line {lines[name]} does"
            reader.refuse(line, columns.image, again, "give an image one row")
        lines[name] = line
        names.append(name)
        cells.append(parse.cell(line, row))
    if not names:
        there = split_names(file, columns.split)
        other = f" of the split {split!r}, only of {shortened(', '.join(there))}" if there else ""
        raise UserError(f"{printable(file)} has no rows{other}: add some, or give another file or split.")
    return Table(folder, names, *parse.labels(cells))


class _Reader:
    """The rows of a CSV file with a header."""

    def __init__(self, path: str):
        self.path = path
        self.header: list[str] = []
        for _, cells in self._records():
            self.header = [cell.strip() for cell in cells]
            break
        if not any(self.header):
            raise UserError(f"{printable(path)} has no header: name the columns in its first line.")
        twice = [name for name, count in collections.Counter(self.header).items() if count > 1]
        if twice:
            raise UserError(f"{printable(path)} has two columns {quoted(twice[0])}: give each a name of its own.")

    def rows(self) -> Iterator[tuple[int, dict[str, str]]]:
        """Yields each row with the number of its line; blank lines at the end are none."""
        blank = 0
        for line, cells in self._records(skip=1):
            if not any(cell.strip() for cell in cells):
                blank = blank or line
                continue
            if blank:
                raise UserError(f"line {blank} of {printable(self.path)} is empty: remove it.")
            if len(cells) != len(self.header):
                raise UserError(
                    f"line {line} of {printable(self.path)} has {len(cells)} columns, and the header has "
                    f"{len(self.header)}: correct it (a name with a comma stands in double quotes)."
                )
            yield line, dict(zip(self.header, map(str.strip, cells), strict=True))

    def require(self, column: str, key: str) -> None:
        """Raises UserError unless the file has a column."""
        if column in self.header:
            return
        other = next((mark for mark in ";\t" if len(self.header) == 1 and mark in self.header[0]), None)
        if other is not None:
            raise UserError(f"{printable(self.path)} has its columns between {other!r}: save it with commas.")
        raise UserError(
            f"{printable(self.path)} has no column {quoted(column)} ({key}); the nearest are "
            f"{nearest(column, self.header)}: rename one in the file, or train with another --config.{key}."
        )

    def refuse(self, line: int, column: str, what: str, mend: str) -> NoReturn:
        """Raises UserError for a cell."""
        raise UserError(f"line {line}, column {quoted(column)} of {printable(self.path)} {what}: {mend}.")

    def _records(self, skip: int = 0) -> Iterator[tuple[int, list[str]]]:
        try:
            with open(self.path, encoding="utf-8-sig", newline="") as file:
                reader = csv.reader(file, strict=True)
                for number, cells in enumerate(reader):
                    if number >= skip:
                        yield reader.line_num, cells
        except (OSError, ValueError, csv.Error) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(
                f"cannot read {printable(self.path)} as CSV ({shortened(reason(error))}): save it as UTF-8 with commas."
            ) from None


def _in_split(reader: _Reader, split: str, column: str, *, whole: bool) -> Callable[[dict[str, str]], bool]:
    """Returns whether a row belongs to a split."""
    if whole or not split:
        return lambda row: True
    if column not in reader.header:
        raise UserError(
            f"{printable(reader.path)} has no column {quoted(column)} (data.split_column), so it does not say which "
            f"rows are {split!r}: add one, or give a folder with train.csv and val.csv as --config.data.path."
        )
    return lambda row: row[column] == split


class _Single:
    """A class in one column."""

    def __init__(self, reader: _Reader, columns: Columns, classes: Sequence[str] | None):
        if len(columns.labels) != 1:
            raise UserError(
                f"data.label_columns names {len(columns.labels)} columns, and a class stands in one: name one, or set "
                "--config.data.task to multi_label, distribution or numbers."
            )
        self._reader, self._column = reader, columns.labels[0]
        self._classes = _Known(reader, self._column, classes)

    def cell(self, line: int, row: dict[str, str]) -> str:
        if not row[self._column]:
            self._reader.refuse(line, self._column, "is empty", "name the class of the image")
        return self._classes.seen(line, row[self._column])

    def labels(self, cells: list[str]) -> tuple[np.ndarray, tuple[str, ...]]:
        index = self._classes.index()
        return np.array([index[cell] for cell in cells], np.int32), tuple(index)


class _Several:
    """Labels in one column, separated, or 0 and 1 in a column for each."""

    def __init__(self, reader: _Reader, columns: Columns, classes: Sequence[str] | None):
        self._reader, self._columns = reader, columns
        if not columns.separator:
            raise UserError("data.separator is empty: give what stands between two labels, such as '|'.")
        one = columns.labels[0]
        self._classes = _Known(reader, one, classes) if len(columns.labels) == 1 else None

    def cell(self, line: int, row: dict[str, str]) -> list[Any]:
        if self._classes is not None:
            cell = row[self._columns.labels[0]]
            parts = [part.strip() for part in cell.split(self._columns.separator)] if cell else []
            if "" in parts:
                self._reader.refuse(line, self._columns.labels[0], f"is {quoted(cell)}", "leave no label empty")
            return [self._classes.seen(line, part) for part in parts]
        for column in self._columns.labels:
            if row[column] not in ("0", "1"):
                self._reader.refuse(
                    line, column, f"is {quoted(row[column])}", "give 1 if the image has the label, or 0"
                )
        return [row[column] == "1" for column in self._columns.labels]

    def labels(self, cells: list[list[Any]]) -> tuple[np.ndarray, tuple[str, ...]]:
        if self._classes is None:
            return np.array(cells, np.float32), self._columns.labels
        index = self._classes.index()
        if not index:
            raise UserError(
                f"column {quoted(self._columns.labels[0])} of {printable(self._reader.path)} has no label at all: give "
                "some images labels."
            )
        labels = np.zeros((len(cells), len(index)), np.float32)
        for row, names in enumerate(cells):
            labels[row, [index[name] for name in names]] = 1
        return labels, tuple(index)


class _Numbers:
    """A number in each column."""

    def __init__(self, reader: _Reader, columns: Columns, classes: Sequence[str] | None):
        del classes  # the columns, in the order that the config has
        self._reader, self._columns = reader, columns.labels

    def cell(self, line: int, row: dict[str, str]) -> list[float]:
        return [self._number(line, column, row[column]) for column in self._columns]

    def _number(self, line: int, column: str, cell: str) -> float:
        if not cell:
            self._reader.refuse(line, column, "is empty", "give a number, or leave the row out")
        value = float(cell) if _NUMBER.fullmatch(cell) else np.inf
        if abs(value) > _LARGEST:
            self._reader.refuse(line, column, f"is {quoted(cell)}", "give a number, with a point and no unit")
        return value

    def labels(self, cells: list[list[float]]) -> tuple[np.ndarray, tuple[str, ...]]:
        return np.array(cells, np.float32), self._columns


class _Shares(_Numbers):
    """A count or a share of each score in a column; the rows are divided by their sums."""

    def __init__(self, reader: _Reader, columns: Columns, classes: Sequence[str] | None):
        if len(columns.labels) < 2:
            raise UserError(
                f"data.label_columns names {len(columns.labels)} column, and a distribution has one for each of its "
                "scores: name them all, in order."
            )
        super().__init__(reader, columns, classes)

    def cell(self, line: int, row: dict[str, str]) -> list[float]:
        counts = super().cell(line, row)
        for column, count in zip(self._columns, counts, strict=True):
            if count < 0:
                self._reader.refuse(line, column, f"is {row[column]}", "a count or a share is 0 or more")
        if not 0 < sum(counts) < np.inf:
            self._reader.refuse(line, self._columns[0], "and the other scores are all 0", "leave the row out")
        return [count / sum(counts) for count in counts]


# By the name of a task in `maxmap.tasks.TASKS`.
CELLS: dict[str, Callable[[_Reader, Columns, Sequence[str] | None], Any]] = {
    "single_label": _Single,
    "multi_label": _Several,
    "distribution": _Shares,
    "numbers": _Numbers,
}


class _Known:
    """The names that the labels in a column have, or may have."""

    def __init__(self, reader: _Reader, column: str, classes: Sequence[str] | None):
        self._reader, self._column, self._classes = reader, column, classes
        self._names = {name: name for name in classes or ()}
        if classes is not None:
            require_distinct(classes, "the training split")

    def seen(self, line: int, name: str) -> str:
        """Notes a name, or raises UserError if the training split does not have it."""
        if self._classes is not None and name not in self._names:
            self._reader.refuse(
                line,
                self._column,
                f"names {quoted(name)}, which is not among the {len(self._names)} classes of the training split "
                f"(nearest: {nearest(name, self._names)})",
                "rename it, or leave the row out",
            )
        return self._names.setdefault(name, name)  # one text for all rows

    def index(self) -> dict[str, int]:
        """Returns the names with their numbers, in order."""
        return {name: k for k, name in enumerate(self._names if self._classes is not None else sorted(self._names))}
