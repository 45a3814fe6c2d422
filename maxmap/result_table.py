"""A table of many rows, which grows while they are computed and goes on where it was stopped: .csv, .jsonl or .parquet.

Until it is whole, its rows lie in a file of lines beside it whose name ends in `.part`. Of n processes, each writes one
such file, and row i of the table belongs to process i % n; the first process joins them. A Parquet file cannot grow, so
its rows are lines of JSON until the end. Memory does not grow with the table.
"""

import contextlib
import csv
import io
import itertools
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from maxmap.errors import UserError, printable, reason

ENDINGS = (".csv", ".jsonl", ".parquet")
PART = ".part"  # behind the name of a table that is not whole yet
_BLOCK = 2**22  # bytes of JSON that become a group of rows of Parquet; a row has to fit


class Table:
    """The rows that one process writes of a table.

    Args:
      target: the table; it is there when it is whole.
      example: the values of a row but for 'image' and 'error', which say the columns and their types.
      about: what the rows are of; a later call has to be of the same.
      process: which one this is, from 0.
      processes: how many write the table.

    Attributes:
      rows: that an earlier call has written.
      errors: rows among them that say an error.

    Raises:
      UserError: there is a part of another call, or the disk does not take it.
    """

    def __init__(
        self, target: Path, example: Mapping[str, Any], about: Mapping[str, Any], process: int = 0, processes: int = 1
    ):
        self._target, self._example = target, example
        self._columns = ["image", *example, "error"]
        self._parts = [target.with_name(f"{target.name}{PART}")]
        if processes > 1:
            self._parts = [target.with_name(f"{target.name}{PART}{i}-of-{processes}") for i in range(processes)]
        self._part = self._parts[process]
        self.rows = self.errors = 0
        text = json.dumps(about, indent=2)
        try:
            if self._part.exists() and _about(self._part).exists():
                if _about(self._part).read_text("utf-8") != text:
                    raise UserError(
                        f"{printable(self._part)} is of another call, with other images, another checkpoint or other "
                        "options: remove it, or give another file."
                    )
                self._keep_whole_rows()
            else:
                target.parent.mkdir(parents=True, exist_ok=True)
                _about(self._part).write_text(text, "utf-8")
                self._part.write_text(self._header(), "utf-8")
            self._file = self._part.open("a", encoding="utf-8", newline="")
        except OSError as error:
            raise self._cannot(error) from error

    def _cannot(self, error: OSError) -> UserError:
        return UserError(
            f"cannot write {printable(self._part)} ({reason(error)}): make room, or give another file; the same "
            "command goes on behind its last row."
        )

    def _header(self) -> str:
        if self._target.suffix != ".csv":
            return ""
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerow(self._columns)
        return text.getvalue()

    def _keep_whole_rows(self) -> None:
        """Cuts off what a stopped call left of its last row, and counts the others."""
        whole = len(self._header().encode())
        with self._part.open("rb") as file:
            file.seek(whole)
            for line in file:
                if not line.endswith(b"\n"):
                    break
                whole += len(line)
                self.rows += 1
                text = line.decode("utf-8")
                self.errors += not text.endswith(",\n") if self._target.suffix == ".csv" else '"error": ' in text
        os.truncate(self._part, whole)

    def append(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Writes rows, and gives them to the operating system."""
        text = io.StringIO()
        if self._target.suffix == ".csv":
            csv.DictWriter(text, self._columns, lineterminator="\n").writerows(rows)
        else:
            text.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        try:
            self._file.write(text.getvalue())
            self._file.flush()
        except OSError as error:
            raise self._cannot(error) from error

    def close(self) -> None:
        """Closes the part of this process, which stays."""
        with contextlib.suppress(OSError):  # of rows that the disk has not taken, as `append` has said
            self._file.close()

    def finish(self) -> None:
        """Makes the table of the parts of all processes, when these are whole, and removes them.

        Raises:
          UserError: parts of other processes are on other disks or of other images, or the disk does not take them.
        """
        if missing := [part for part in self._parts if not part.exists()]:
            raise UserError(
                f"there is no {printable(missing[0])}, which another process has on a disk of its own: join the parts "
                "by hand, a row of each in turn, or give a file on a disk that all processes share."
            )
        joined, made = (self._target.with_name(f"{self._target.name}{end}") for end in (".joined", ".unfinished"))
        try:
            if len({_about(part).read_bytes() for part in self._parts}) > 1:
                raise UserError(
                    f"{printable(self._parts[0])} and the parts of other processes are of different images or "
                    "checkpoints: remove them, and start again when all processes see the same."
                )
            lines = self._join(joined) if len(self._parts) > 1 else self._parts[0]
            if self._target.suffix == ".parquet":
                _write_parquet(lines, made, self._example)
                os.replace(made, self._target)
            else:
                os.replace(lines, self._target)
            for path in (joined, *self._parts, *map(_about, self._parts)):
                path.unlink(missing_ok=True)
        except OSError as error:
            raise self._cannot(error) from error

    def _join(self, file: Path) -> Path:
        """Writes the rows of all parts, one of each in turn."""
        with contextlib.ExitStack() as stack:
            parts: list[Iterator[bytes]] = [stack.enter_context(part.open("rb")) for part in self._parts]
            joined = stack.enter_context(file.open("wb"))
            if self._header():
                joined.write({next(part) for part in parts}.pop())
            for rows in itertools.zip_longest(*parts, fillvalue=b""):
                joined.writelines(rows)
        return file


def _about(part: Path) -> Path:
    return part.with_name(f"{part.name}.json")


def _write_parquet(lines: Path, file: Path, example: Mapping[str, Any]) -> None:
    """Writes rows, each a line of JSON, as Parquet; what a row lacks is null."""
    import pyarrow as pa  # these take half a second
    import pyarrow.json
    import pyarrow.parquet

    types = {str: pa.string(), float: pa.float64(), list: pa.list_(pa.float32())}
    fields = {"image": pa.string(), **{name: types[type(value)] for name, value in example.items()}}
    schema = pa.schema({**fields, "error": pa.string()})
    if not lines.stat().st_size:  # pyarrow refuses an empty file
        pyarrow.parquet.write_table(schema.empty_table(), file)
        return
    reader = pyarrow.json.open_json(
        lines,
        read_options=pyarrow.json.ReadOptions(block_size=_BLOCK),
        parse_options=pyarrow.json.ParseOptions(explicit_schema=schema, unexpected_field_behavior="error"),
    )
    with reader, pyarrow.parquet.ParquetWriter(file, schema) as writer:
        for batch in reader:
            writer.write_batch(batch)
