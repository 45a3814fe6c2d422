"""Reads inputs in forked processes with limits of memory and time, and says how each ended."""

import contextlib
import encodings.cp437  # noqa: F401, of names in zip archives; reading then imports nothing
import gc
import hashlib
import json
import os
import pickle
import re
import resource
import selectors
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from maxmap.errors import UserError, sentence
from tests.fuzz.rows import Files, Row

MEMORY = 2 << 30  # bytes that reading may take
SECONDS = 10  # of a processor; and six times as long until the end, for a busy machine
ROOT = Path(__file__).resolve().parents[2]

CLEAN, SAME, OTHER = "clean sentence", "same values", "accepted with other values"
TRACE, HANG, OUT_OF_MEMORY, CRASH = "stack trace", "hang", "memory", "crash"
ENDS = (CLEAN, SAME, OTHER, TRACE, HANG, OUT_OF_MEMORY, CRASH)

# What reading a file never does. An attempt is stopped and counts as a crash.
_FORBIDDEN = {
    *("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "os.forkpty", "pty.spawn"),
    *("ctypes.dlopen", "pickle.find_class", "socket.connect", "socket.getaddrinfo"),
}
_CHANGING = {"os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.symlink", "os.link", "os.truncate", "os.chmod"}
_READABLE = tuple(map(os.path.realpath, (ROOT, sys.prefix, sys.base_prefix, "/proc", "/sys", "/etc/mime.types")))


@dataclass(frozen=True)
class Task:
    """An input to read.

    Attributes:
      row: whose reader reads it.
      name: of the input.
      make: makes its files.
      same: digest of the values of the unspoiled files; empty if there are none.
      refuse: the reader has to refuse it.
      trusted: nothing is forbidden; what is imported is noted, and which modules of maxmap take part.
    """

    row: Row
    name: str
    make: Callable[[], Files]
    same: str = ""
    refuse: bool = False
    trusted: bool = False


@dataclass
class End:
    """How reading an input ended.

    Attributes:
      kind: one of `ENDS`.
      text: what was said.
      digest: of the values.
      imported: names of modules that were imported.
      entered: names of modules of maxmap that took part, of a trusted input.
    """

    kind: str
    text: str = ""
    digest: str = ""
    imported: list[str] = field(default_factory=list)
    entered: list[str] = field(default_factory=list)


class Guard:
    """An audit hook that stops what reading a file never does."""

    def __init__(self, folder: Path, trusted: bool):
        self._own, self._trusted = f"{os.path.realpath(folder)}{os.sep}", trusted
        self.attempts: list[str] = []
        self.imported: list[str] = []

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "import":
            self.imported.append(arguments[0])
        elif self._trusted:
            pass
        elif event in _FORBIDDEN or (event in _CHANGING and not self._is_own(arguments[0])):
            self._stop(f"{event} {arguments!r}"[:500])
        elif event == "open" and not isinstance(arguments[0], int) and not self._is_own(arguments[0]):
            writes = arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            if writes or not os.path.realpath(os.fsdecode(arguments[0])).startswith(_READABLE):
                self._stop(f"open {arguments!r}"[:500])

    def _is_own(self, path: Any) -> bool:
        return os.path.realpath(os.fsdecode(path)).startswith((self._own, os.devnull))

    def _stop(self, attempt: str) -> None:
        self.attempts.append(attempt)
        raise RuntimeError(f"reading a file tried {attempt}")


def run(tasks: Iterable[Task], scratch: Path, jobs: int) -> Iterator[tuple[Task, End, Path]]:
    """Reads each input in a process of its own, `jobs` at a time; yields how they ended, in any order.

    The folder that it yields is then deleted.
    """
    gc.freeze()  # the children share these pages
    waiting, running = iter(tasks), selectors.DefaultSelector()
    number = 0
    while True:
        while len(running.get_map()) < jobs and (task := next(waiting, None)) is not None:
            number += 1
            child = _start(task, scratch / str(number))
            running.register(child.pipe, selectors.EVENT_READ, child)
        if not running.get_map():
            return
        ready = {key.data.pid: key.data for key, _ in running.select(timeout=1)}
        late = [key.data for key in running.get_map().values() if time.monotonic() > key.data.deadline]
        for child in late:
            os.kill(child.pid, signal.SIGKILL)
        for child in {**ready, **{child.pid: child for child in late}}.values():
            running.unregister(child.pipe)
            yield child.task, _finish(child, child in late), child.folder
            shutil.rmtree(child.folder, ignore_errors=True)


@dataclass(eq=False)
class _Child:
    task: Task
    folder: Path
    pid: int
    pipe: int
    deadline: float


def _start(task: Task, folder: Path) -> _Child:
    receiver, sender = os.pipe()
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        gc.disable()
        code = 1
        with contextlib.suppress(BaseException):
            os.close(receiver)
            end = _read(task, folder)
            end.text = end.text[-5000:]  # a pipe takes 64 KB
            os.write(sender, json.dumps(vars(end)).encode())
            code = 0
        os._exit(code)
    os.close(sender)
    return _Child(task, folder, pid, receiver, time.monotonic() + 6 * SECONDS)


def _finish(child: _Child, late: bool) -> End:
    with open(child.pipe, "rb") as pipe:
        said = pipe.read()
    _, status = os.waitpid(child.pid, 0)
    if said and status == 0:
        return End(**json.loads(said))
    number = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
    if late or number == signal.SIGXCPU:
        return End(HANG, f"no end after {SECONDS} s of a processor or {6 * SECONDS} s")
    errors = child.folder / "errors"
    text = errors.read_text(errors="replace")[-2000:] if errors.exists() else ""
    kind = OUT_OF_MEMORY if "bad_alloc" in text else CRASH
    return End(kind, f"{signal.Signals(number).name if number else f'exit status {status}'} {text}")


def in_a_child(make: Callable[[], Any]) -> Any:
    """Returns what a function returns in a process of its own, whose imports and threads end with it."""
    with tempfile.TemporaryFile() as file:
        pid = os.fork()
        if pid == 0:
            try:
                os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
                pickle.dump(make(), file)
                file.flush()
                os._exit(0)
            except BaseException:
                traceback.print_exc()
            os._exit(1)
        if os.waitpid(pid, 0)[1] != 0:
            raise AssertionError("its files could not be made")
        file.seek(0)
        return pickle.load(file)


def write(files: Files, folder: Path) -> Path:
    """Writes the files of an input."""
    for name, data in files.items():
        file = folder / "input" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)
    (folder / "input").mkdir(parents=True, exist_ok=True)
    return folder / "input"


def _read(task: Task, folder: Path) -> End:
    """Reads an input in this process, under all limits."""
    place = write(task.make(), folder)
    errors = os.open(folder / "errors", os.O_WRONLY | os.O_CREAT)
    os.dup2(errors, 1)
    os.dup2(errors, 2)
    pages = int(Path("/proc/self/statm").read_text().split()[5])  # of data and stack
    most = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_DATA, (most, most))
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS + 1))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    guard = Guard(folder.parent, task.trusted)
    sys.addaudithook(guard)
    entered: set[str] = set()
    if task.trusted and task.name.endswith(" 0"):  # it is slow, and one file is enough
        sys.setprofile(lambda frame, *_: entered.add(frame.f_globals.get("__name__", "")))
    end = _outcome(task, place)
    end.imported = guard.imported[:500]
    end.entered = sorted(name for name in entered if name.startswith("maxmap."))
    if guard.attempts:
        return End(CRASH, f"it tried {guard.attempts[0]}")
    return end


def _outcome(task: Task, place: Path) -> End:
    try:
        found = digest(task.row.read(place))
    except UserError as error:
        fault = _fault(sentence(error))
        return End(TRACE, f"{fault}: {sentence(error)}") if fault else End(CLEAN, sentence(error))
    except MemoryError:
        return End(OUT_OF_MEMORY, traceback.format_exc(limit=-8))
    except BaseException as error:
        kind = OUT_OF_MEMORY if "bad_alloc" in str(error) else TRACE
        return End(kind, traceback.format_exc(limit=-8))
    return End(SAME if found == task.same else OTHER, digest=found)


def _fault(text: str) -> str:
    """Returns what is wrong with a sentence."""
    if not text.endswith("."):
        return "no sentence"
    if re.search(r"\(\s*\):|:\s*[.:]|:$", text):
        return "no reason"
    if re.search(r"<locals>|object has no attribute|positional argument|unsupported operand", text):
        return "no plain words"
    if len(text) > 2000 or not text.isprintable():
        return "no line for a terminal"
    return ""


def digest(value: Any) -> str:
    """Returns a hash of plain data and arrays."""
    hashed = hashlib.blake2b()
    _update(hashed, value)
    return hashed.hexdigest()


def _update(hashed: Any, value: Any) -> None:
    if isinstance(value, np.ndarray):
        hashed.update(f"{value.dtype}{value.shape}".encode())
        hashed.update(np.ascontiguousarray(value).tobytes())
    elif isinstance(value, Mapping):
        hashed.update(b"{")
        for key, part in value.items():
            _update(hashed, key)
            _update(hashed, part)
    elif isinstance(value, list | tuple):
        hashed.update(f"[{len(value)}".encode())
        for part in value:
            _update(hashed, part)
    elif isinstance(value, bytes):
        hashed.update(value)
    else:
        hashed.update(f"{type(value)}{value!r}".encode(errors="backslashreplace"))
