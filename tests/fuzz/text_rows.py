"""Texts: names of classes, class maps, ReaL's labels, tables of labels, and the log of a run."""

import json
import random
from pathlib import Path
from typing import Any

from maxmap.classes import match, read_names, read_numbers
from maxmap.data.tables import Columns, read_table, split_names
from maxmap.labels import read_real
from maxmap.train.report import draw_curves, drop_after
from tests.fuzz.changes import spoil, spoil_json, spoil_one
from tests.fuzz.rows import Files, Row

NAMES, MAP, REAL, LOG, TABLE = "classes.txt", "map.txt", "real.json", "metrics.jsonl", "labels.csv"
_KNOWN = ("ant", "bee", "cat", "dog", "Zürich")


def _valid_labels() -> list[Files]:
    names = "\ufeff" + "".join(f"{name}\n" for name in _KNOWN)
    real = json.dumps([[1, 2], [], [7], [999]] * 5).encode()
    return [{NAMES: names.encode(), MAP: b"2\n0\n1\n-1\n", REAL: real}]


def _spoil_labels(files: Files, rng: random.Random) -> Files:
    if rng.random() < 0.3:
        return {**files, REAL: spoil_json(json.loads(files[REAL]), rng)}
    if rng.random() < 0.3:
        lines = files[NAMES].split(b"\n")
        others = (b"", b"ant", b"\xe2\x80\xa8", b"\0", b"x" * 100_000, b"\x1b[2J", b"../../ant", b" ant ")
        lines.insert(rng.randrange(len(lines)), rng.choice(others))
        return {**files, NAMES: b"\n".join(lines)}
    if rng.random() < 0.3:
        others = (b"", b"9" * 4000, b"9" * 5000, b"1e3", b"-2", b"0x10", "٣".encode(), b"1_0", b"2.0", b"9" * 30)
        return {**files, MAP: files[MAP] + rng.choice(others) + b"\n0\n"}
    return spoil_one(files, rng)


def _hostile_labels() -> dict[str, Files]:
    (valid,) = _valid_labels()
    others = {
        "200,000 names, the last one twice": (NAMES, b"\n".join(b"%d" % i for i in range(200_000)) + b"\n199999"),
        "200,000 names of others": (NAMES, b"\n".join(b"class %d" % i for i in range(200_000))),
        "a name of a megabyte": (NAMES, b"x" * 1_000_000),
        "100 MB of names": (NAMES, b"a\nb\n" * 25_000_000),
        "a byte that is no UTF-8": (NAMES, b"ant\n\xff\n"),
        "a class number of 5,000 digits": (MAP, b"9" * 5000),
        "a class number of 30 digits": (MAP, b"0\n" + b"9" * 30),
        "a class number of words": (MAP, b"ant\n" * 3),
        "a class number of a megabyte": (MAP, b"x" * 1_000_000),
        "nested": (REAL, b"[" * 10_000 + b"]" * 10_000),
        "objects": (REAL, b'{"": 1}'),
        "an object": (REAL, b"{}"),
        "a label of 5,000 digits": (REAL, b"[[" + b"9" * 5000 + b"]]"),
        "a negative label": (REAL, b"[[-1]]"),
        "a label of truth": (REAL, b"[[true]]"),
        "a label of a megabyte": (REAL, b'[["' + b"x" * 1_000_000 + b'"]]'),
    }
    return {name: {**valid, file: data} for name, (file, data) in others.items()}


def _read_labels(folder: Path) -> Any:
    names = read_names(folder / NAMES)
    return (
        names,
        match(names, _KNOWN, "the folder", "the training split"),
        read_numbers(folder / MAP),
        read_real(folder / REAL),
    )


_READ = {
    "single_label": ("label",),
    "multi_label": ("tags",),
    "distribution": ("1", "2", "3"),
    "numbers": ("age", "1"),
}
_HEADER = b"image,split,label,tags,1,2,3,age\n"


def _table(*rows: bytes) -> Files:
    photos = {f"photos/{k}.png": b"" for k in range(4)}
    first = (b"photos/0.png,val,ant,bee|cat,1,2,3,1e3\n", b'"photos/1.png",val," bee, cat",,0.5,.5,0,-1.5\n')
    return {TABLE: _HEADER + b"".join((*first, *rows)), **photos}


def _spoil_table(files: Files, rng: random.Random) -> Files:
    if rng.random() < 0.3:
        return {**files, TABLE: spoil(files[TABLE], rng)}
    lines = [line.split(b",") for line in files[TABLE].split(b"\n")]
    others = (
        b"",
        b" ",
        b"nan",
        b"-1",
        b"1e999",
        b"9" * 5000,
        b"1_0",
        "٣".encode(),
        b"\0",
        b"\xff",
        b"|",
        b'"',
        b"a|",
        b",",
    )
    others += (
        b"../photos/2.png",
        b"/photos/2.png",
        b"photos/2.png",
        b"photos",
        b".",
        b"\x1b[2J",
        b"x" * 150_000,
        b"\r",
    )
    for _ in range(rng.choice((1, 1, 3))):
        line = rng.choice(lines)
        line[rng.randrange(len(line))] = rng.choice(others)
    return {**files, TABLE: b"\n".join(map(b",".join, lines))}


def _hostile_tables() -> dict[str, Files]:
    texts = {
        "nothing": b"",
        "blank lines": b"\n" * 1_000_000,
        "a megabyte without a comma": b"x" * 1_000_000,
        "200,000 columns": b",".join(b"%d" % k for k in range(200_000)) + b"\n",
        "two columns of one name": b"image,image,label\n",
        "a quote that never ends": _HEADER + b'"' + b"x" * 1_000_000,
        "10 MB of commas": _HEADER + b"," * 10_000_000,
        "a number of 5,000 digits": _HEADER + b"photos/0.png,val,a,a,1,2,3," + b"9" * 5000 + b"\n",
        "no UTF-8": _HEADER + b"\xff",
    }
    return {name: {**_table(), TABLE: text} for name, text in texts.items()} | {
        "an image twice": _table(b"photos/0.png,val,ant,,1,2,3,4\n"),
        "an image that is none": _table(b"photos/9.png,val,ant,,1,2,3,4\n"),
    }


def _odd_tables() -> dict[str, Files]:
    return {
        "200,000 rows of another split": _table(b"x,train,ant,,1,2,3,4\n" * 200_000),
        "100,000 labels of an image": _table(b"photos/2.png,val,ant," + b"|".join([b"a"] * 60_000) + b",1,2,3,4\n"),
        "the smallest share": _table(b"photos/2.png,val,ant,,5e-324,0,0,4\n"),
        "the largest shares": _table(b"photos/2.png,val,ant,,3e38,3e38,3e38,4\n"),
    }


def _read_table(folder: Path) -> Any:
    found: list[Any] = [split_names(folder / TABLE, "split")]
    for task, labels in _READ.items():
        table = read_table(folder / TABLE, "val", task, Columns("image", labels, "split", "|"))
        found.append((table.names, table.labels, table.classes))
    return found


def _rows() -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for step in (1, 2, 3):
        train = {"epoch": step / 2, "loss": 2.0 / step, "learning_rate": 1e-3}
        rows.append({"kind": "train", "step": step, **train})
        rows.append({"kind": "eval", "step": step, "epoch": step / 2, "loss": 2.0, "top1": 50.0, "top5": 90.0})
    return rows


def _logged(rows: list[Any]) -> bytes:
    return b"".join(spoil_lines(row) + b"\n" for row in rows)


def spoil_lines(row: Any) -> bytes:
    return row if isinstance(row, bytes) else json.dumps(row).encode()


def _spoil_log(files: Files, rng: random.Random) -> Files:
    if rng.random() < 0.4:
        return {LOG: spoil(files[LOG], rng)}
    rows: list[Any] = list(_rows())
    for _ in range(rng.choice((1, 1, 3))):
        at = rng.randrange(len(rows))
        rows[at] = spoil_json(rows[at], rng) if isinstance(rows[at], dict) else b""
    return {LOG: _logged(rows)}


def _odd_log() -> dict[str, Files]:
    values: dict[str, Any] = {
        "nan": float("nan"),
        "infinity": float("inf"),
        "a number of 400 digits": 10**400,
        "the largest": 1.7e308,
        "the smallest": 5e-324,
        "a negative epoch": -1e250,
    }
    files = {}
    for name, value in values.items():
        rows = [row | {key: value for key in ("epoch", "loss", "learning_rate", "top1")} for row in _rows()]
        files[name] = _logged([*_rows(), *rows[:2]])
    files["a step of 400 digits"] = _logged([*_rows(), _rows()[0] | {"step": 10**400}])
    files["nested"] = _logged([*_rows(), b'{"kind":' * 10_000])
    files["a line of 10 MB"] = _logged([*_rows(), b"x" * 10_000_000])
    files["bytes"] = bytes(range(256)) * 100
    files["200,000 lines"] = _logged([json.dumps(_rows()[0]).encode()] * 200_000)
    return {name: {LOG: data} for name, data in files.items()}


def _read_log(folder: Path) -> Any:
    """What a run does with the log of the run before: it drops lines, goes on and draws its curves."""
    drop_after(folder / LOG, 2)
    draw_curves(folder / LOG, folder / "curves.png")
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    return (folder / LOG).read_bytes()


ROWS = (
    Row(
        "label files and class maps",
        ("maxmap.classes", "maxmap.labels", "maxmap.small_files"),
        1000,
        _valid_labels,
        _spoil_labels,
        _read_labels,
        _hostile_labels,
    ),
    Row(
        "tables of labels",
        ("maxmap.data.tables",),
        1000,
        lambda: [_table(), _table(b"photos/3.png,train,ant,bee,1,2,3,4\n")],
        _spoil_table,
        _read_table,
        _hostile_tables,
        _odd_tables,
    ),
    Row(
        "metrics.jsonl",
        ("maxmap.train.report",),
        250,
        lambda: [{LOG: _logged(_rows())}],
        _spoil_log,
        _read_log,
        odd=_odd_log,
    ),
)
