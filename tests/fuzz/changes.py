"""Ways to spoil bytes and JSON, all by a seeded generator."""

import json
import random
import re
from collections.abc import Callable
from typing import Any

from tests.fuzz.rows import Files

_NUMBERS = (0, 1, 2, 4, 64, 65, 127, 128, 255, 256, 0x7FFF, 0x8000, 0xFFFF, 2**31 - 1, 2**31, 2**32 - 1, 2**40)
_NUMBERS += (2**62, 2**63 - 1, 2**63, 2**64 - 1, -1, -512)
_DEEP = "a list 10,000 lists deep"  # stands in the text for that
_ODD: tuple[Any, ...] = (
    *(None, True, 0, -1, 1, 65, 2**31, 2**40, 2**63, 2**64, 10**4000, 0.5, -0.0, 1e308, float("nan"), float("inf")),
    *("", "a\0b", "\ud800", "../../etc/passwd", "/dev/zero", ".", "x" * 5000, "9" * 4000, "1", "F32", "é\u2028\x1b[2J"),
    *([], {}, [[]], [None], {"": {}}, [0] * 65, [1] * 1000, ["a"] * 100, _DEEP),
)


def spoil(data: bytes, rng: random.Random) -> bytes:
    """Changes bytes somewhere, most often once; the beginning and the end are hit more often than the middle."""
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4, 16))):
        rng.choice(_CHANGES)(changed, _position(len(changed), rng), rng)
    return bytes(changed)


def _position(size: int, rng: random.Random) -> int:
    if rng.random() < 0.4:
        return rng.randrange(size + 1)
    near = min(size, int(2 ** rng.uniform(0, 12)))
    return near if rng.random() < 0.6 else size - near


def _flip(data: bytearray, at: int, rng: random.Random) -> None:
    if at < len(data):
        data[at] ^= 1 << rng.randrange(8)


def _byte(data: bytearray, at: int, rng: random.Random) -> None:
    data[at : at + 1] = bytes([rng.randrange(256)])


def _number(data: bytearray, at: int, rng: random.Random) -> None:
    size = rng.choice((1, 2, 4, 8))
    value = rng.choice(_NUMBERS) % (1 << 8 * size)
    data[at : at + size] = value.to_bytes(size, rng.choice(("little", "big")))


def _cut(data: bytearray, at: int, rng: random.Random) -> None:
    del data[at:]


def _remove(data: bytearray, at: int, rng: random.Random) -> None:
    del data[at : at + int(2 ** rng.uniform(0, 10))]


def _repeat(data: bytearray, at: int, rng: random.Random) -> None:
    data[at:at] = data[at : at + int(2 ** rng.uniform(0, 10))] * rng.choice((1, 1, 2, 100))


def _splice(data: bytearray, at: int, rng: random.Random) -> None:
    start = rng.randrange(len(data) + 1)
    piece = data[start : start + int(2 ** rng.uniform(1, 10))]
    data[at : at + len(piece)] = piece


def _insert(data: bytearray, at: int, rng: random.Random) -> None:
    data[at:at] = rng.choice((bytes(8), b"\xff" * 8, b"9" * 4000, rng.randbytes(16), bytes(600)))


def _digits(data: bytearray, at: int, rng: random.Random) -> None:
    """Replaces a number that is written in digits."""
    if match := re.compile(rb"\d+").search(data, at):
        data[match.start() : match.end()] = rng.choice((b"-1", b"0", b"65", b"1e999", b"9" * 4500, b"1099511627776"))


_CHANGES: tuple[Callable[[bytearray, int, random.Random], None], ...] = (
    *(_flip, _flip, _byte, _number, _number, _number, _cut, _remove, _repeat, _splice, _insert, _digits),
)


def spoil_one(files: Files, rng: random.Random) -> Files:
    """Spoils the bytes of one file of several."""
    name = rng.choice(sorted(files))
    if len(files) > 1 and rng.random() < 0.05:
        return {other: data for other, data in files.items() if other != name}
    return {**files, name: spoil(files[name], rng)}


def spoil_json(value: Any, rng: random.Random) -> bytes:
    """Returns a text in which some values or keys are others."""
    for _ in range(rng.choice((1, 1, 2, 5))):
        value = _changed(value, rng)
    text = json.dumps(value)
    return text.replace(json.dumps(_DEEP), "[" * 10_000 + "]" * 10_000).encode()


def _changed(value: Any, rng: random.Random) -> Any:
    """Returns a copy with a change at a random place."""
    if not isinstance(value, dict | list) or not value or rng.random() < 0.1:
        return rng.choice(_ODD)
    copy = dict(value) if isinstance(value, dict) else list(value)
    key = rng.choice(sorted(copy)) if isinstance(copy, dict) else rng.randrange(len(copy))
    kind = rng.random()
    if kind < 0.15:
        del copy[key]
    elif kind < 0.25 and isinstance(copy, dict):
        copy[rng.choice(("", "__metadata__", "a\0b", "x" * 5000, "\ud800", f"{key}."))] = copy.pop(key)
    else:
        copy[key] = _changed(copy[key], rng)
    return copy
