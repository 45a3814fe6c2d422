"""A table of many rows: what processes write of it becomes the table of one, also where one was stopped."""

import contextlib
import csv
import json

import pyarrow.parquet
import pytest

from maxmap.errors import UserError
from maxmap.result_table import ENDINGS, Table


def rows_of(file):
    """The rows of a table; what a row lacks is "" in CSV, None in Parquet, and absent in JSON lines."""
    if file.suffix == ".parquet":
        return pyarrow.parquet.read_table(file).to_pylist()
    if file.suffix == ".csv":
        return list(csv.DictReader(file.read_text("utf-8").splitlines()))
    return [json.loads(line) for line in file.read_text("utf-8").splitlines()]


@pytest.mark.parametrize("ending", ENDINGS)
def test_parts_of_processes_become_the_table_of_one(ending, tmp_path):
    """Three of them, of which the second is stopped in its last row, and goes on."""
    rows = [{"image": f"{i}.png", "label": f"a, {i}", "value": i / 8} for i in range(7)]
    rows[4] = {"image": "4.png", "error": "no image"}
    whole, file = tmp_path / "whole" / f"table{ending}", tmp_path / "shared" / f"table{ending}"
    example = {"label": "", "value": 0.0}
    alone = Table(whole, example, {"top": 1})
    alone.append(rows)
    alone.close()
    alone.finish()
    for process in range(3):
        table = Table(file, example, {"top": 1}, process, 3)
        table.append(rows[process::3])
        table.close()
    part = file.with_name(f"table{ending}.part1-of-3")
    part.write_bytes(part.read_bytes()[:-3])
    second = Table(file, example, {"top": 1}, 1, 3)
    assert (second.rows, second.errors) == (1, 0)  # and the error was in the row that was cut
    second.append(rows[4:5])
    second.close()
    part.rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=r"there is no .*\.part1-of-3, which another process has .* or give a file on"):
        table.finish()
    (tmp_path / "elsewhere").rename(part)
    said = part.with_name(f"{part.name}.json")
    text = said.read_text()
    said.write_text(text.replace("1", "2"))
    with pytest.raises(UserError, match=r"part0-of-3 and the parts of other processes are of different images"):
        table.finish()
    said.write_text(text)
    table.finish()
    assert rows_of(file) == rows_of(whole) and len(rows_of(whole)) == 7 and list(file.parent.iterdir()) == [file]


def test_a_full_disk_is_one_sentence(tmp_path):
    (tmp_path / "table.jsonl.part").symlink_to("/dev/full")
    with (
        pytest.raises(UserError, match=r"cannot write .*table.jsonl.part \(No space left on device\): make room"),
        contextlib.closing(Table(tmp_path / "table.jsonl", {"value": 0.0}, {})) as table,
    ):
        table.append([{"image": "0.png", "value": 1.0}])
