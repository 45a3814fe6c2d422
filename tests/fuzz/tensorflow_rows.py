"""TensorFlow checkpoints: bytes of both files changed; entries that state other things, with checksums made again."""

import random
from pathlib import Path
from typing import Any

import numpy as np

from maxmap.checksums import masked_crc32c
from maxmap.convert.sources import read_source
from tests.fuzz.changes import spoil, spoil_one
from tests.fuzz.rows import Files, Row

INDEX, DATA, STATE = "model.ckpt-7.index", "model.ckpt-7.data-00000-of-00001", "checkpoint"


def varint(value):
    parts = []
    while value > 127:
        parts.append(value & 127 | 128)
        value >>= 7
    return bytes([*parts, value])


def block(entries):
    """A block of a table; `entries` gives the shared length, the suffix of the key, and the value."""
    content = b"".join(
        varint(shared) + varint(len(key)) + varint(len(value)) + key + value for shared, key, value in entries
    )
    content += bytes(4) + (1).to_bytes(4, "little")
    return content, content + b"\0" + masked_crc32c(content + b"\0").to_bytes(4, "little")


def table(blocks, handles=None):
    """A file of blocks, with valid checksums; `handles` are those of the block of blocks."""
    file, own = b"", []
    for entries in blocks:
        content, stored = block(entries)
        own.append(varint(len(file)) + varint(len(content)))
        file += stored
    content, stored = block([(0, bytes([i]), handle) for i, handle in enumerate(handles or own)])
    handle = varint(0) + varint(0) + varint(len(file)) + varint(len(content))
    return file + stored + handle.ljust(40, b"\0") + (0xDB4775248B80FB57).to_bytes(8, "little")


def entry(dimensions, length, start=0, kind=1, checksum=b""):
    """An entry of a variable with `dimensions`, by default of float32 and at offset 0."""
    shape = b"".join(b"\x12" + varint(len(size := b"\x08" + varint(n))) + size for n in dimensions)
    place = b"\x20" + varint(start) + b"\x28" + varint(length)
    return b"\x08" + varint(kind) + b"\x12" + varint(len(shape)) + shape + place + checksum


def _entries() -> tuple[dict[bytes, bytes], bytes]:
    """The entries of a few variables by name, and the bytes of these."""
    random_numbers = np.random.default_rng(0)
    entries, data = {b"": b"\x08\x01"}, b""
    for name, shape in (
        ("head/fc/kernel", (4, 3)),
        ("maxvit/block_00_00/attention/o/weight", (2, 4, 8)),
        ("maxvit/block_00_00/attention/q/bias", (2, 4)),
        ("maxvit/block_00_00/mbconv/depthwise_conv/depthwise_kernel", (3, 3, 8, 1)),
        ("maxvit/stem/conv_0/bias", (4,)),
        ("maxvit/stem/conv_0/kernel", (3, 3, 3, 4)),
        ("maxvit/stem/conv_0/kernel/ExponentialMovingAverage", (3, 3, 3, 4)),
    ):
        values = random_numbers.standard_normal(shape).astype(np.float32).tobytes()
        checksum = b"\x35" + masked_crc32c(values).to_bytes(4, "little")
        entries[name.encode()] = entry(shape, len(values), len(data), checksum=checksum)
        data += values
    return entries, data


def _files(entries: dict[bytes, bytes], data: bytes) -> Files:
    blocks = [[(0, key, value) for key, value in sorted(entries.items())]]
    return {INDEX: table(blocks), DATA: data, STATE: f'model_checkpoint_path: "{INDEX[:-6]}"\n'.encode()}


def _valid() -> list[Files]:
    return [_files(*_entries())]


def _spoil(files: Files, rng: random.Random) -> Files:
    """Changes bytes of a file; else an entry, its key or how it is stored, with the checksums of blocks made again."""
    if rng.random() < 0.4:
        return spoil_one(files, rng)
    entries, _ = _entries()
    key = rng.choice(sorted(entries))
    if rng.random() < 0.3:
        entries[spoil(key, rng)] = entries.pop(key)
    else:
        entries[key] = spoil(entries[key], rng)
    rows = [(0, key, value) for key, value in sorted(entries.items())]
    if rng.random() < 0.2:
        at = rng.randrange(len(rows))
        shared = rng.choice((1, 5, len(rows[at - 1][1]), 2**40))
        rows[at] = (shared, rows[at][1][shared:], rows[at][2])
    if rng.random() < 0.1:
        rng.shuffle(rows)
    return {**files, INDEX: table([rows])}


def _hostile() -> dict[str, Files]:
    one = entry([1], 4)
    indices = {
        "prefixes": table([[(0, b"k" * 20_000, one)] + [(20_000, b"%05d" % i, one) for i in range(5000)]]),
        "one block 200 times": table([[(0, b"a", b"")]], [varint(0) + varint(12)] * 200),
        "names that do not ascend": table([[(0, b"b", one), (0, b"a", one)]]),
        "varint of a megabyte": table([[(0, b"a", b"\x08" + b"\x80" * (1 << 20))]]),
        "65 dimensions": table([[(0, b"a", entry([1] * 65, 4))]]),
        "60,000 dimensions": table([[(0, b"a", entry([2**63 - 1] * 60_000, 4))]]),
        "2^40 numbers": table([[(0, b"a", entry([2**40], 2**42))]]),
        "no numbers, but 2^62": table([[(0, b"a", entry([0, 2**62], 0))]]),
        "an offset of 2^63": table([[(0, b"a", entry([1], 4, 2**63))]]),
        "a name of a megabyte": table([[(0, b"a" * (1 << 20), entry([2], 4))]]),
        "a compressed block": table([[(0, b"a", one)]]).replace(b"\0" * 4 + b"\1\0\0\0\0", b"\0" * 4 + b"\1\0\0\0\1"),
        "nothing": bytes(100),
    }
    return {name: {INDEX: index, DATA: bytes(8)} for name, index in indices.items()}


def _read(folder: Path) -> Any:
    found = read_source(folder)
    return found.tensors, found.weights


ROWS = (
    Row(
        "TensorFlow checkpoint",
        ("maxmap.convert.tensorflow", "maxmap.protobuf"),
        2500,
        _valid,
        _spoil,
        _read,
        _hostile,
    ),
)
