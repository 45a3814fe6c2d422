"""Readers that do what no reader may do. If one of them is not noticed, the zeros of the table say nothing."""

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from maxmap.errors import UserError
from tests.fuzz.child import CLEAN, CRASH, HANG, OTHER, OUT_OF_MEMORY, TRACE, Task, run
from tests.fuzz.rows import Files, Row


def loop(folder: Path) -> None:
    while True:
        pass


def fill_memory(folder: Path) -> int:
    return len(bytearray(3 << 30))


def break_down(folder: Path) -> None:
    os.kill(os.getpid(), signal.SIGSEGV)


def start_program(folder: Path) -> None:
    os.system("true")


def start_program_and_hide_it(folder: Path) -> None:
    try:
        os.system("true")
    except RuntimeError:
        raise UserError("the file is damaged: get it again.") from None


def write_elsewhere(folder: Path) -> None:
    (folder.parents[2] / "elsewhere").write_text("")


def raise_another_error(folder: Path) -> None:
    raise KeyError("a")


def give_no_reason(folder: Path) -> None:
    raise UserError("the file is damaged (): get it again.")


def refuse(folder: Path) -> None:
    raise UserError("the file is damaged: get it again.")


def accept(folder: Path) -> bytes:
    return (folder / "file").read_bytes()


ENDS: dict[Callable[[Path], Any], str] = {
    loop: HANG,
    fill_memory: OUT_OF_MEMORY,
    break_down: CRASH,
    start_program: CRASH,
    start_program_and_hide_it: CRASH,
    write_elsewhere: CRASH,
    raise_another_error: TRACE,
    give_no_reason: TRACE,
    refuse: CLEAN,
    accept: OTHER,
}


def check_ends(scratch: Path) -> None:
    """Raises AssertionError unless each of these readers ends as it should."""

    def files() -> Files:
        return {"file": b"content"}

    rows = {read.__name__: Row(read.__name__, (), 1, list, lambda files, rng: files, read) for read in ENDS}
    wanted = {read.__name__: end for read, end in ENDS.items()}
    for task, end, _ in run((Task(row, name, files) for name, row in rows.items()), scratch, 2, seconds=1):
        assert end.kind == wanted[task.name], f"{task.name} ends as {end.kind}, not as {wanted[task.name]}: {end.text}"
