"""Reads FlatBuffers without their schema: TFLite files consist of them.

A table is a list of fields, found by an offset for each in front of it. Scalars lie in the table; strings, vectors and
other tables lie elsewhere, and the table has the way to them. The format is described in
https://flatbuffers.dev/internals.
"""

import struct
from collections.abc import Sequence
from typing import Any

import numpy as np


class MalformedTable(ValueError):
    """An offset or a length points out of the file."""


class Table:
    """A table, whose fields the caller asks for by number and type.

    Args:
      data: the bytes of the file, for example a mapped one.
      position: of the table in there.

    Raises:
      MalformedTable: here and in every method, if what is asked for does not lie in the file.
    """

    def __init__(self, data: np.ndarray, position: int):
        self._data, self._position = data, position
        self._fields = position - _unpack(data, "<i", position)  # of the list of offsets
        self._count = max(0, _unpack(data, "<H", self._fields) // 2 - 2)

    def scalar(self, number: int, kind: str = "<i", default: int = 0) -> int:
        """Returns a number; `kind` is a format of `struct`."""
        position = self._find(number)
        return default if position is None else _unpack(self._data, kind, position)

    def vector(self, number: int, dtype: Any) -> np.ndarray:
        """Returns a vector of numbers as a view of the file; an absent one is empty."""
        start, count = self._vector(number, np.dtype(dtype).itemsize)
        return self._data[start : start + count * np.dtype(dtype).itemsize].view(dtype)

    def table(self, number: int) -> "Table | None":
        """Returns a table; None if there is none."""
        position = self._find(number)
        return None if position is None else Table(self._data, position + _unpack(self._data, "<I", position))

    def tables(self, number: int) -> Sequence["Table"]:
        """Returns a vector of tables, which are read when they are asked for."""
        return _Tables(self._data, *self._vector(number, 4))

    def _find(self, number: int) -> int | None:
        offset = _unpack(self._data, "<H", self._fields + 4 + 2 * number) if number < self._count else 0
        return self._position + offset if offset else None

    def _vector(self, number: int, itemsize: int) -> tuple[int, int]:
        """Returns where the first entry of a vector is, and the number of entries."""
        position = self._find(number)
        if position is None:
            return 0, 0
        start = position + _unpack(self._data, "<I", position)
        count = _unpack(self._data, "<I", start)
        if count * itemsize > self._data.size - start - 4:
            raise MalformedTable(f"a list of {count} entries is cut off")
        return start + 4, count


class _Tables(Sequence[Table]):
    def __init__(self, data: np.ndarray, start: int, count: int):
        self._data, self._start, self._count = data, start, count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: Any) -> Any:
        if not 0 <= index < self._count:
            raise IndexError
        position = self._start + 4 * index
        return Table(self._data, position + _unpack(self._data, "<I", position))


def root(data: np.ndarray) -> Table:
    """Returns the table that holds all others."""
    return Table(data, _unpack(data, "<I", 0))


def _unpack(data: np.ndarray, kind: str, position: int) -> int:
    size = struct.calcsize(kind)
    if not 0 <= position <= data.size - size:
        raise MalformedTable(f"it points to byte {position} of {data.size}")
    return struct.unpack(kind, data[position : position + size].tobytes())[0]
