"""Files that hold many examples, read by index: tar archives, and TFRecord without TensorFlow.

Both are made for reading from front to back. Here the headers are read once, and then each example is read where it
lies, so that any order costs the same.
"""

import glob
import io
import os
import struct
import tarfile
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from maxmap.checksums import masked_crc32c
from maxmap.data.folders import HOW_TO_GIVE_IMAGES
from maxmap.data.images import IMAGE_ENDINGS
from maxmap.errors import UserError, reason
from maxmap.protobuf import Message


class TarMember(NamedTuple):
    """A file in a tar archive: its name, and where its bytes lie."""

    name: str
    offset: int
    size: int


def tar_files(path: str | os.PathLike, split: str) -> list[str]:
    """Returns the tar archives of a split in a folder: `<split>*.tar`, `<split>/*.tar`, or the archive of this name.

    All archives have the split ''.
    """
    folder, name = glob.escape(os.path.expanduser(os.fspath(path))), glob.escape(split)
    patterns = [name if split.endswith(".tar") else f"{name}*.tar", f"*-{name}-*.tar", os.path.join(name, "*.tar")]
    found = (sorted(glob.glob(os.path.join(folder, pattern))) for pattern in patterns)
    return next(filter(None, found), [])


def require_tar_files(path: str | os.PathLike | None, split: str) -> list[str]:
    """Returns the tar archives of a split; UserError says what there is where there are none."""
    if path is None:
        raise UserError(f"no path to the images is set: {HOW_TO_GIVE_IMAGES}")
    if files := tar_files(path, split):
        return files
    folder = glob.escape(os.path.expanduser(os.fspath(path)))
    present = sorted(os.path.basename(file) for file in glob.glob(os.path.join(folder, "*.tar*")))
    lie = f"{', '.join(present[:5])} lie there" if present else "there are none"
    raise UserError(
        f"no tar archives of the split {split!r} in {path}, which should be {split}*.tar or {split}/*.tar: {lie}; "
        "rename them, or name the splits with --config.data.train_split and --config.data.val_split."
    )


class _BoundedFile(io.FileIO):
    """A file for tarfile, which reads as many bytes as a header states, and reads on and on for some that lie."""

    def __init__(self, path: str):
        super().__init__(path)
        self.size = os.fstat(self.fileno()).st_size
        self._ended = False

    def read(self, size: int | None = -1, /) -> bytes:
        left = self.size - self.tell()
        if left <= 0 and self._ended:
            raise OSError("unexpected end of data")
        self._ended = left <= 0
        return super().read(left if size is None or size < 0 else max(0, min(size, left))) or b""


def tar_members(path: str) -> list[TarMember]:
    """Lists the files of an uncompressed tar archive, in order; names do not start with './'.

    A hard link has the position of the file that it names.

    Raises:
      UserError: the archive is cut off, damaged, compressed or no archive, or an image in it is a symbolic link.
    """
    members: dict[str, TarMember] = {}
    listed = []
    try:
        with _BoundedFile(path) as file, tarfile.open(fileobj=file, mode="r:") as tar:
            end = 0
            for info in tar:
                # tarfile stops at a damaged header without a word, and notices a cut in the first header only.
                if info.offset < end or info.offset_data < info.offset or info.size < 0:
                    raise tarfile.ReadError(f"the header at byte {info.offset} is damaged")
                end = info.offset_data
                if (member := _member(info, members, file.size)) is not None:
                    members[info.name] = member
                    listed.append(member)
            _check_tar_end(file, tar.offset, file.size)
    except Exception as error:  # for hostile headers tarfile raises almost anything
        raise UserError(
            f"{path} cannot be read as an uncompressed tar archive ({reason(error)}): unpack a .gz or .xz, copy it "
            "again, or pack it anew."
        ) from error
    return listed


def _member(info: tarfile.TarInfo, members: Mapping[str, TarMember], size: int) -> TarMember | None:
    """Returns where the bytes of an entry lie; None for a folder or a device."""
    name = info.name.removeprefix("./")
    if info.issym() and name.lower().endswith(IMAGE_ENDINGS):
        raise tarfile.ReadError(f"{name!r} is a symbolic link: pack the files that the links name, tar --dereference")
    if info.islnk():
        if info.linkname not in members:
            raise tarfile.ReadError(f"{name!r} is a link to {info.linkname!r}, which does not stand before it")
        return members[info.linkname]._replace(name=name)
    if not info.isfile():
        return None
    if info.issparse():
        raise tarfile.ReadError(f"{name!r} is a sparse file: pack it without --sparse")
    if info.offset_data + info.size > size:
        raise tarfile.ReadError("unexpected end of data")
    return TarMember(name, info.offset_data, info.size)


def _check_tar_end(file: io.FileIO, offset: int, size: int) -> None:
    """Raises ReadError unless only zeros follow the last member: a block of 512 that ends it, and a filling."""
    if offset + 512 > size:
        raise tarfile.ReadError("it is cut off: the blocks that end an archive are missing")
    file.seek(offset)
    if any(file.read(512)):
        raise tarfile.ReadError(f"the header at byte {offset} is damaged")
    while file.tell() < size:
        block = file.read(1 << 16)
        if block.count(0) < len(block):
            raise tarfile.ReadError(f"it ends at byte {offset}, but more follows: unpack archives that were joined")


def record_positions(path: str, verify: bool = True) -> list[tuple[int, int]]:
    """Lists offset and length of every record of a TFRecord file.

    Args:
      path: of the file.
      verify: whether to check the checksum of every length.

    Raises:
      UserError: the file is missing, cut off, damaged or no TFRecord file.
    """
    positions, offset = [], 0
    try:
        with open(path, "rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            while offset < size:  # length, its checksum, the record, its checksum
                header = os.pread(file.fileno(), 12, offset)
                if len(header) < 12:
                    raise OSError("it ends inside a record")
                length, checksum = struct.unpack("<QI", header)
                if verify and checksum != masked_crc32c(header[:8]):
                    raise OSError(f"the length at byte {offset} is damaged: its checksum is another")
                if offset + 16 + length > size:
                    raise OSError("it ends inside a record")
                positions.append((offset + 12, length))
                offset += 16 + length
    except OSError as error:
        raise UserError(f"{path} cannot be read as TFRecord ({reason(error)}): prepare it anew.") from error
    return positions


class TFRecords:
    """The examples of TFRecord files by index: 'image', the bytes of an image file, and 'label', its class number.

    Args:
      instructions: TFDS's `FileInstruction`s: from each file's `examples_in_shard` records, `take` are read after the
        first `skip`.
      verify: whether to check the checksums, of lengths when the files are opened and of records when they are read.

    Raises:
      UserError: a file is damaged or holds another number of records.
    """

    def __init__(self, instructions: Sequence, verify: bool = True):
        self._verify = verify
        self._files = [os.fspath(instruction.filename) for instruction in instructions]
        parts = [np.empty((0, 3), np.int64)]
        for number, instruction in enumerate(instructions):
            positions = record_positions(self._files[number], verify)
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
        data = read_at(self._files[number], offset, length + 4)
        record, (checksum,) = data[:-4], struct.unpack("<I", data[-4:])
        if self._verify and checksum != masked_crc32c(record):
            raise OSError(f"the record at byte {offset} of {self._files[number]} is damaged: its checksum is another")
        example = parse_example(record)
        images, labels = example.get("image"), example.get("label")
        if not images or not labels or not isinstance(images[0], bytes) or not isinstance(labels[0], int):
            raise OSError(f"the record at byte {offset} of {self._files[number]} lacks an image or its label")
        label = labels[0] - (labels[0] >> 63 << 64)  # the file has two's complement
        return {"image": images[0], "label": label}


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
