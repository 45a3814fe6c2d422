"""Files that hold many examples, read by index: tar archives, and TFRecord without TensorFlow.

Both are made for reading from front to back. Here the headers are read once, and then each example is read where it
lies, so that any order costs the same.
"""

import os
import struct
import tarfile
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from maxmap.errors import UserError
from maxmap.protobuf import Message


class TarMember(NamedTuple):
    """A file in a tar archive: its name, and where its bytes lie."""

    name: str
    offset: int
    size: int


def tar_members(path: str) -> list[TarMember]:
    """Lists the files of an uncompressed tar archive, in order; names do not start with './'.

    Raises:
      UserError: the archive is cut off, compressed or no archive.
    """
    try:
        with tarfile.open(path, "r:") as tar:
            members = [TarMember(m.name.removeprefix("./"), m.offset_data, m.size) for m in tar if m.isfile()]
            # tarfile notices a cut in the first header only: it takes any other archive for complete.
            if members and members[-1].offset + members[-1].size > os.path.getsize(path):
                raise tarfile.ReadError("unexpected end of data")
    except (tarfile.TarError, OSError) as error:
        raise UserError(
            f"{path} cannot be read as an uncompressed tar archive ({error}): unpack a .gz or .xz, or copy it again."
        ) from error
    return members


def record_positions(path: str) -> list[tuple[int, int]]:
    """Lists offset and length of every record of a TFRecord file, without a look at the checksums.

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
                    raise OSError("it ends inside a record")
                positions.append((offset + 12, length))
                offset += 16 + length
    except OSError as error:
        raise UserError(f"{path} cannot be read as TFRecord ({error.strerror or error}): prepare it anew.") from error
    return positions


class TFRecords:
    """The examples of TFRecord files by index: 'image', the bytes of an image file, and 'label', its class number.

    Args:
      instructions: TFDS's `FileInstruction`s: from each file's `examples_in_shard` records, `take` are read after the
        first `skip`.

    Raises:
      UserError: a file is damaged or holds another number of records.
    """

    def __init__(self, instructions: Sequence):
        self._files = [os.fspath(instruction.filename) for instruction in instructions]
        parts = [np.empty((0, 3), np.int64)]
        for number, instruction in enumerate(instructions):
            positions = record_positions(self._files[number])
            if len(positions) != instruction.examples_in_shard:
                raise UserError(
                    f"{self._files[number]} has {len(positions)} records, but the data set's dataset_info.json says "
                    f"{instruction.examples_in_shard}: copy the file again, or prepare the data set anew."
                )
            chosen = positions[instruction.skip : instruction.skip + instruction.take]
            parts.append(np.array([(number, *position) for position in chosen], np.int64).reshape(-1, 3))
        self._positions = np.concatenate(parts)  # [N, 3]: file, offset, length

    def __len__(self) -> int:
        return len(self._positions)

    def __getitem__(self, index: int) -> dict[str, Any]:
        number, offset, length = self._positions[index].tolist()
        example = parse_example(read_at(self._files[number], offset, length))
        try:
            return {"image": example["image"][0], "label": example["label"][0]}
        except LookupError as error:
            raise OSError(f"a record of {self._files[number]} lacks an image or its label") from error


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
