"""The short part of `make fuzz`, and that no reader of files from strangers is without a row in its table."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fuzz.readers import OWN_FILES, ROWS

ROOT = Path(__file__).resolve().parent.parent
# Calls that take bytes from a file, or make values of bytes.
READING = {
    "open",
    "read_text",
    "read_bytes",
    "memmap",
    "fromfile",
    "frombuffer",
    "pread",
    "loads",
    "urlopen",
    "ZipFile",
}
READING |= {"deserialize", "read_small", "read_json"}


def reading_modules() -> set[str]:
    """Modules of maxmap in which something is read."""
    found = set()
    for path in ROOT.glob("maxmap/**/*.py"):
        calls = [node.func for node in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(node, ast.Call)]
        names = {call.id if isinstance(call, ast.Name) else getattr(call, "attr", "") for call in calls}
        if names & READING:
            found.add(".".join(path.relative_to(ROOT).with_suffix("").parts))
    return found


def test_every_module_that_reads_has_a_row():
    """That the reader of a row enters the modules that it names is checked whenever the row is tried."""
    in_rows = {name for row in ROWS for name in row.modules}
    assert reading_modules() - in_rows == OWN_FILES.keys(), (
        "give a new reader a row in tests/fuzz, or say whose files it reads"
    )
    assert not in_rows & OWN_FILES.keys()


@pytest.mark.long
def test_files_from_strangers_end_in_a_sentence(tmp_path):
    """A few hostile and spoiled files of each kind but those that take a second each; these have other tests."""
    rows = [row for row in ROWS if row.name.partition(",")[0] not in ("config.json", "metrics.jsonl")]
    command = [sys.executable, "-m", "tests.fuzz", "--inputs=100", f"--keep={tmp_path}"]
    command.append(f"--only={'|'.join(f'^{re.escape(row.name)}$' for row in rows)}")
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    table = [[cell.strip() for cell in line.split("|")[1:-1]] for line in done.stdout.splitlines()[2:]]
    assert [cells[0] for cells in table] == [*(row.name for row in rows), "all"]
    assert all(cells[-4:] == ["0"] * 4 and int(cells[2]) > 0 for cells in table)
