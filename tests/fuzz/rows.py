"""What a row of the table is: a reader of files from strangers, files that it reads, and ways to spoil them."""

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Files = Mapping[str, bytes]  # the content of each file of an input, by its path in a folder
Made = Files | Callable[[], Files]  # files, or what makes large ones when they are needed


def nothing() -> dict[str, Made]:
    return {}


@dataclass(frozen=True)
class Row:
    """A reader and its inputs.

    Attributes:
      name: of the reader, in the table and in the names of kept files.
      modules: of maxmap that take files from strangers in this way.
      share: inputs, of about 20,000.
      valid: makes files that can be read; in a process of its own, which may import anything.
      change: spoils one of them.
      read: reads an input from a folder; its result is plain data and arrays, a refusal is a UserError.
      hostile: makes files by name that have to be refused.
      odd: makes files by name that may be refused, but take no time and memory.
    """

    name: str
    modules: tuple[str, ...]
    share: int
    valid: Callable[[], list[Files]]
    change: Callable[[Files, random.Random], Files]
    read: Callable[[Path], Any]
    hostile: Callable[[], Mapping[str, Made]] = nothing
    odd: Callable[[], Mapping[str, Made]] = nothing
