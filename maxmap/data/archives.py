"""Files that hold many examples, read by index: tar archives, and TFRecord without TensorFlow.

Both are made for reading from front to back. Here they are looked through once, header by header, and each example is
then read where it lies, so that any order costs the same.
"""

import os
import struct
import tarfile
from typing import NamedTuple

from maxmap.errors import UserError
from maxmap.protobuf import Message


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
    """Parses an encoded `tf.train.Example`, without its lists of floats.

    The fields are those of TensorFlow's example.proto and feature.proto.

    Returns:
      The values of each feature by its name.

    Raises:
      OSError: the record is damaged.
    """
    features: dict[str, list[bytes] | list[int]] = {}
    try:
        for all_features in Message(record).messages(1):
            for entry in all_features.messages(1):
                name = b"".join(entry.strings(1)).decode()
                for feature in entry.messages(2):
                    for values in feature.messages(1):
                        features[name] = values.strings(1)
                    for values in feature.messages(3):
                        features[name] = values.integers(1)
    except ValueError as error:  # the name is no UTF-8, or the message is malformed
        raise OSError(f"a record cannot be parsed: {error}") from error
    return features
