"""Files that hold many examples, read by index: tar archives, and TFRecord without TensorFlow.

Both are made for reading from front to back. Here they are looked through once, header by header, and each example is
then read where it lies, so that any order costs the same.
"""

import os
import struct
import tarfile
from collections.abc import Iterator
from typing import NamedTuple

from maxmap.errors import UserError


class Member(NamedTuple):
    """A file inside of a tar archive: its name, and where its bytes lie."""

    name: str
    offset: int
    size: int


def tar_members(path: str) -> list[Member]:
    """Lists the files of an uncompressed tar archive, in order; names do not start with './'.

    Raises:
      UserError: the archive is cut off, compressed or no archive.
    """
    try:
        with tarfile.open(path, "r:") as tar:
            members = [Member(m.name.removeprefix("./"), m.offset_data, m.size) for m in tar if m.isfile()]
            # tarfile takes an archive that ends in the middle for a whole one, unless its first header is cut.
            if members and members[-1].offset + members[-1].size > os.path.getsize(path):
                raise tarfile.ReadError("unexpected end of data")
    except (tarfile.TarError, OSError) as error:
        raise UserError(
            f"{path} cannot be read as an uncompressed tar archive ({error}): unpack a .gz or .xz, or fetch it anew"
        ) from error
    return members


def record_positions(path: str) -> list[tuple[int, int]]:
    """Lists offset and length of every record of a TFRecord file; checksums are not looked at.

    Raises:
      UserError: the file is missing, cut off or no TFRecord file.
    """
    positions, offset = [], 0
    try:
        with open(path, "rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            while offset < size:  # length, its checksum, the record, its checksum
                header = os.pread(file.fileno(), 8, offset)
                length = struct.unpack("<Q", header)[0] if len(header) == 8 else size
                if offset + 16 + length > size:
                    raise OSError("it ends inside of a record")
                positions.append((offset + 12, length))
                offset += 16 + length
    except OSError as error:
        raise UserError(f"{path} cannot be read as TFRecord ({error.strerror or error}): prepare it anew") from error
    return positions


def read_at(path: str, offset: int, size: int) -> bytes:
    """Reads a part of a file; raises OSError if it is shorter."""
    with open(path, "rb", buffering=0) as file:
        data = os.pread(file.fileno(), size, offset)
    if len(data) < size:
        raise OSError(f"{path} ends before byte {offset + size}")
    return data


def parse_example(record: bytes) -> dict[str, list[bytes] | list[int]]:
    """Parses a serialised `tf.train.Example`: feature name -> values; floats are left out.

    https://protobuf.dev/programming-guides/encoding, and TensorFlow's example.proto and feature.proto.
    """
    features: dict[str, list[bytes] | list[int]] = {}
    for _, all_features in _fields(record):
        for _, entry in _fields(all_features):
            pair = dict(_fields(entry))
            for kind, values in _fields(pair.get(2, b"")):
                if kind == 1:
                    features[pair[1].decode()] = [value for _, value in _fields(values)]
                elif kind == 3:
                    numbers = []
                    for _, packed in _fields(values):
                        numbers += list(_varints(packed)) if isinstance(packed, bytes) else [packed]
                    features[pair[1].decode()] = numbers
    return features


def _fields(message: bytes) -> Iterator[tuple[int, bytes]]:
    """Yields the number and the bytes of every field of a message; an integer is yielded as it is."""
    at = 0
    while at < len(message):
        tag, at = _varint(message, at)
        if tag & 7 == 0:
            value, at = _varint(message, at)
            yield tag >> 3, value  # type: ignore[misc]
            continue
        if tag & 7 == 2:
            size, at = _varint(message, at)
        elif tag & 7 in (1, 5):
            size = 8 if tag & 7 == 1 else 4
        else:
            raise OSError(f"a record has a field of the unknown kind {tag & 7}")
        yield tag >> 3, message[at : at + size]
        at += size


def _varint(message: bytes, at: int) -> tuple[int, int]:
    """Reads 7 bits a byte, least first, until a byte is below 128."""
    value = shift = 0
    while True:
        if at >= len(message):
            raise OSError("a record is cut off")
        value |= (message[at] & 127) << shift
        at += 1
        if message[at - 1] < 128:
            return value, at
        shift += 7


def _varints(packed: bytes) -> Iterator[int]:
    at = 0
    while at < len(packed):
        value, at = _varint(packed, at)
        yield value
