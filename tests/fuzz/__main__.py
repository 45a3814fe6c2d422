"""Files from strangers: does each reader refuse them in a sentence? `make fuzz`, or python -m tests.fuzz.

Valid files are spoiled (bytes, lengths, offsets, shapes, headers, opcodes), hostile ones are built. Each is read in a
process of its own with limits of memory and time, where an attempt to start a program, to open a file elsewhere or to
import what the valid files do not need is a crash. The last four columns of the table have to be 0; the inputs that
made them more are kept in runs/fuzz.

  --only REGEX   the readers whose names match         --jobs N    processes at a time
  --inputs N     about as many in all                  --seed N    of all changes
  --again PATH   reads one kept input again            --keep PATH where inputs are kept
"""

import argparse
import contextlib
import functools
import importlib
import os
import random
import re
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # a forked process has only one thread

from tests.fuzz.child import CLEAN, CRASH, ENDS, OTHER, ROOT, End, Task, in_a_child, run
from tests.fuzz.readers import ROWS
from tests.fuzz.rows import Files, Made, Row

BAD = ENDS[3:]
INPUTS = 20_000


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="")
    parser.add_argument("--inputs", type=int, default=INPUTS)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--again", type=Path)
    parser.add_argument("--keep", type=Path, default=ROOT / "runs" / "fuzz")
    chosen = parser.parse_args(arguments)
    if chosen.again:
        return again(chosen.again)
    rows = [row for row in ROWS if re.search(chosen.only, row.name)]
    began = time.monotonic()
    total: Counter[str] = Counter()
    faults = 0
    print("| reader | inputs | " + " | ".join(ENDS) + " |\n" + "|---" * (len(ENDS) + 2) + "|", flush=True)
    for row in rows:
        count = max(1, round(row.share * chosen.inputs / sum(row.share for row in ROWS)))
        ends, wrong = try_row(row, count, chosen.seed, chosen.jobs, chosen.keep)
        total += ends
        faults += wrong
        print(line(row.name, ends), flush=True)
    print(line("all", total))
    print(f"{total.total():,} inputs in {time.monotonic() - began:.0f} s, seed {chosen.seed}.", file=sys.stderr)
    if faults:
        print(f"{faults} inputs are kept in {chosen.keep}: see the file `why` beside each.", file=sys.stderr)
    return min(faults, 1)


def line(name: str, ends: Counter[str]) -> str:
    numbers = (ends.total(), *(ends[kind] for kind in ENDS))
    return f"| {name} | " + " | ".join(f"{number:,}" for number in numbers) + " |"


def try_row(row: Row, count: int, seed: int, jobs: int, keep: Path) -> tuple[Counter[str], int]:
    """Reads `count` inputs of a row; returns how they ended, and how many of these ends are faults."""
    ends: Counter[str] = Counter()
    faults = 0
    with scratch_folder() as scratch:
        valid, hostile, odd = in_a_child(lambda: (row.valid(), row.hostile(), row.odd()))
        digests, usual = learn(row, valid, scratch)
        for task, end, folder in run(inputs(row, valid, hostile, odd, digests, count, seed), scratch, jobs):
            if strange := [name for name in end.imported if name not in usual]:
                end.kind, end.text = CRASH, f"it imports {', '.join(strange[:5])}"
            ends[end.kind] += 1
            if end.kind in BAD or (task.refuse and end.kind != CLEAN):
                faults += 1
                store(keep / file_name(row.name) / file_name(task.name), end, folder)
    return ends, faults


@contextlib.contextmanager
def scratch_folder() -> Iterator[Path]:
    """Yields a folder for inputs, and for what libraries keep."""
    with tempfile.TemporaryDirectory(prefix="maxmap-fuzz-") as folder:
        os.environ["MPLCONFIGDIR"] = os.environ["XDG_CACHE_HOME"] = folder
        yield Path(folder)


def learn(row: Row, valid: Sequence[Files], scratch: Path) -> tuple[list[str], set[str]]:
    """Reads the valid files; returns the digests of their values, and the modules that reading them imports.

    These are imported here, once instead of in every process. Then the files are read again, under all rules.
    """
    usual: set[str] = set()
    entered: set[str] = set()
    for trusted in (True, False):
        ends = []
        for number, files in enumerate(valid):
            task = Task(row, f"valid {number}", _maker(files), trusted=trusted)
            ((_, end, _),) = run([task], scratch, 1)
            if end.kind != OTHER:
                raise AssertionError(f"{row.name}: valid file {number}: {end.kind}: {end.text}")
            ends.append(end)
        usual.update(*(end.imported for end in ends))
        entered.update(*(end.entered for end in ends))
        for name in sorted(usual):
            with contextlib.suppress(ImportError):
                importlib.import_module(name)
    if missed := set(row.modules) - entered:
        raise AssertionError(f"{row.name}: {', '.join(sorted(missed))} takes no part in reading it: mend the row.")
    return [end.digest for end in ends], usual


def inputs(
    row: Row,
    valid: Sequence[Files],
    hostile: Mapping[str, Made],
    odd: Mapping[str, Made],
    digests: Sequence[str],
    count: int,
    seed: int,
) -> Iterator[Task]:
    """Yields `count` inputs: hostile and odd ones, all of them or at most half, and spoiled ones."""
    built = [Task(row, f"hostile {name}", _maker(files), refuse=True) for name, files in hostile.items()]
    built += [Task(row, f"odd {name}", _maker(files)) for name, files in odd.items()]
    if 2 * len(built) > count:
        built = random.Random(f"{seed} {row.name}").sample(built, count // 2)
    yield from built
    for number in range(count - len(built)):
        which = number % len(valid)
        rng = random.Random(f"{seed} {row.name} {number}")
        yield Task(row, f"spoiled {number}", functools.partial(row.change, valid[which], rng), same=digests[which])


def _maker(files: Made) -> Callable[[], Files]:
    return files if callable(files) else functools.partial(dict, files)


def store(kept: Path, end: End, folder: Path) -> None:
    """Keeps an input and says why."""
    shutil.rmtree(kept, ignore_errors=True)
    shutil.copytree(folder / "input", kept)
    kept.with_name(f"{kept.name}.why").write_text(f"{end.kind}\n{end.text}\n", errors="backslashreplace")
    said = (end.text.strip() or "accepted").splitlines()[-1]
    print(f"{kept}: {end.kind}: {said}"[:300], file=sys.stderr)


def again(kept: Path) -> int:
    """Reads one kept input again, and prints how that ended."""
    row = next((row for row in ROWS if file_name(row.name) == kept.parent.name), None)
    if row is None or not kept.is_dir():
        raise SystemExit(f"{kept} is no kept input: give a folder in runs/fuzz/READER/.")
    files = {str(file.relative_to(kept)): file.read_bytes() for file in kept.rglob("*") if file.is_file()}
    with scratch_folder() as scratch:
        learn(row, in_a_child(row.valid), scratch)
        ((_, end, _),) = run([Task(row, kept.name, functools.partial(dict, files))], scratch, 1)
    print(f"{end.kind}\n{end.text}")
    return int(end.kind in BAD)


def file_name(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:80]


if __name__ == "__main__":
    sys.exit(main())
