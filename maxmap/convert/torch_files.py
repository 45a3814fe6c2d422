"""Files of `torch.save`, read without PyTorch: zip archives (PyTorch 1.6 and later) and the older sequence of pickles.

Both hold a pickle, which names tensors, and the bytes of the tensors' storages. `pickles.Unpickler` reads the pickle. A
tensor becomes a NumPy array in the mapped file, after its storage, type, shape and strides were checked. An archive has
checksums, which are checked too; the older format has none.
"""

import concurrent.futures
import io
import math
import mmap
import struct
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from maxmap.convert.pickles import Name, RefusedGlobalError, Unpickler, call
from maxmap.errors import UserError, shortened

_MAGIC = 119547037146038801333356  # what a file before PyTorch 1.6 begins with
_VERSION = 1001
_LARGEST_PICKLE = 256 << 20  # bytes
_MOST_DIMENSIONS = 64  # NumPy's limit
_ALIGNMENT = 8  # bytes, the most that a type needs
_FREE_SIZE = 1 << 20  # numbers that a tensor with strides of zero may have beyond the size of the file
_LARGEST_DIRECTORY = 8 << 20  # bytes of a zip archive; that of 6,000 tensors has half a megabyte
_LARGEST_GAP = 24  # bytes between the parts of a zip archive: size and checksum may stand behind a part
_END = struct.Struct("<4s4x2H2I2x")  # signature, entries on this disk and in all, size and position of the directory
_END_64 = struct.Struct("<4s20x2Q2Q")
_LOCATOR_64 = struct.Struct("<4s4xQ4x")  # signature, position of the record above
_LOCAL_HEADER = struct.Struct("<4s2xHH8xIIHH")  # signature, flags, method, sizes, lengths of the name and extra field
_DAMAGE = (ValueError, TypeError, IndexError, KeyError, OverflowError, AttributeError, struct.error)

_STORAGES: dict[str, Any] = {
    "DoubleStorage": np.float64,
    "FloatStorage": np.float32,
    "HalfStorage": np.float16,
    "BFloat16Storage": ml_dtypes.bfloat16,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "ShortStorage": np.int16,
    "CharStorage": np.int8,
    "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
    "ComplexFloatStorage": np.complex64,
    "ComplexDoubleStorage": np.complex128,
    "UntypedStorage": np.uint8,
}
_TYPES: dict[str, Any] = {
    "bool": np.bool_,
    **{name: np.dtype(name) for name in ("uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64")},
    **{name: np.dtype(name) for name in ("float16", "float32", "float64", "complex64", "complex128")},
    "bfloat16": ml_dtypes.bfloat16,
    "float8_e4m3fn": ml_dtypes.float8_e4m3fn,
    "float8_e4m3fnuz": ml_dtypes.float8_e4m3fnuz,
    "float8_e5m2": ml_dtypes.float8_e5m2,
    "float8_e5m2fnuz": ml_dtypes.float8_e5m2fnuz,
    "float8_e8m0fnu": ml_dtypes.float8_e8m0fnu,
}
# Names without a function: storages and types, also the names of tensor types that settings mention.
_INERT = rf"torch\.(cuda\.|storage\.)?({'|'.join(_STORAGES)})|torch\.({'|'.join(_TYPES)})|torch\.(cuda\.)?\w*Tensor"


@dataclass
class Storage:
    """Bytes that tensors share.

    Attributes:
      dtype: of its numbers.
      data: the bytes, `[N]` of uint8; None while a file is only searched for its storages.
    """

    dtype: np.dtype
    data: np.ndarray | None


def read_torch(path: Path) -> Any:
    """Reads a file of torch.save.

    Returns:
      What was saved, as plain data: tensors as NumPy arrays in the mapped file, an OrderedDict as a dict, a device as
      its name.

    Raises:
      UserError: the file is damaged, or names something other than numbers and plain settings.
    """
    try:
        if zipfile.is_zipfile(path):
            return _read_zip(path)
        return _read_sequence(path)
    except UserError:
        raise
    except RefusedGlobalError as error:
        raise UserError(
            f"{path} is refused: it would run or build {shortened(error, 80)}, and only numbers and plain settings are "
            f"read from a pickle: let its owner save the weights alone, {_saving(path.name)}."
        ) from None
    except (*_DAMAGE, OSError, EOFError, NotImplementedError, zipfile.BadZipFile, RuntimeError) as error:
        raise UserError(f"{path} is damaged or no file of torch.save ({shortened(error)}): get it again.") from None


def _saving(name: str) -> str:
    """Returns a line of Python that saves the weights alone, whether a file holds a module or a dict of settings."""
    return (
        f"import torch; x = torch.load({name[:80]!r}, weights_only=False); x = x.get('state_dict', x.get('model', x)) "
        "if isinstance(x, dict) else x; x = getattr(x, 'state_dict', lambda: x)(); "
        "torch.save({k: v for k, v in x.items() if torch.is_tensor(v)}, 'weights.pth')"
    )


def _read_zip(path: Path) -> Any:
    members = _zip_members(path)
    memory = np.memmap(path, np.uint8, "r")
    pickles = [name for name in members if name.endswith("/data.pkl") and name.count("/") == 1]
    if len(pickles) != 1:
        raise ValueError("it has no data.pkl")
    folder = pickles[0].removesuffix("data.pkl")
    if f"{folder}constants.pkl" in members:
        raise UserError(f"{path} is refused: it holds a TorchScript program: give a file of torch.save.")
    if f"{folder}byteorder" in members and members[f"{folder}byteorder"].bytes(memory).tobytes() != b"little":
        raise UserError(f"{path} has big-endian numbers: save it again on a little-endian machine.")

    read: dict[_Member, np.ndarray] = {}

    def load_storage(kind: Any, key: Any, location: Any, count: Any) -> Storage:
        dtype = _storage_dtype(kind)
        member = members.get(f"{folder}data/{key}") if type(key) is str else None
        if member is None:
            raise ValueError("its pickle names a storage that is not in the file")
        if type(count) is not int or count * dtype.itemsize != member.end - member.start:
            raise ValueError(f"its storage {key} is not as long as the pickle says")
        if member not in read:
            read[member] = _aligned(member.bytes(memory))
        return Storage(dtype, read[member])

    pickled = members[pickles[0]]
    if pickled.end - pickled.start > _LARGEST_PICKLE:
        raise ValueError(f"its pickle has {pickled.end - pickled.start:,} bytes")
    pickled.check(memory)
    content = _unpickler(load_storage, memory.size).load(io.BytesIO(pickled.bytes(memory).tobytes()))
    with concurrent.futures.ThreadPoolExecutor() as pool:
        list(pool.map(lambda member: member.check(memory), read))
    return content


@dataclass(frozen=True)
class _Member:
    """A part of an archive: where its bytes begin and end, and their checksum."""

    name: str
    start: int
    end: int
    checksum: int

    def bytes(self, memory: np.ndarray) -> np.ndarray:
        """Returns its bytes in the mapped file."""
        return memory[self.start : self.end]

    def check(self, memory: np.ndarray) -> None:
        """Raises ValueError if its bytes are damaged."""
        # torch.serialization.set_crc32_options(False) writes zeros in place of the checksums.
        if self.checksum and zlib.crc32(self.bytes(memory).data) != self.checksum:
            raise ValueError(f"the checksum of its part {shortened(self.name)} is another")


def _zip_members(path: Path) -> dict[str, _Member]:
    """Returns the parts of an archive by name, after checking that all headers agree.

    torch.save does not compress, so the parts are the bytes of the file.
    """
    found: dict[str, _Member] = {}
    with path.open("rb") as file:
        directory = _directory_start(file, path.stat().st_size)
        archive = zipfile.ZipFile(file)
        if archive.start_dir != directory:
            raise ValueError("its directory has two places")
        end_of_last = 0
        for member in sorted(archive.infolist(), key=lambda member: member.header_offset):
            if member.compress_type != zipfile.ZIP_STORED or member.file_size != member.compress_size:
                raise UserError(
                    f"{path} is refused: it is compressed, which torch.save does not do, and may unpack to anything."
                )
            start = _local_start(file, member)
            end = start + member.file_size
            if member.header_offset < end_of_last or end > directory:
                raise UserError(f"{path} is refused: its parts overlap, or reach beyond the file.")
            if member.header_offset > end_of_last + _LARGEST_GAP * bool(found):
                raise UserError(f"{path} is refused: it has bytes that belong to no part.")
            if member.filename in found:
                raise UserError(f"{path} is refused: it has a part twice.")
            found[member.filename], end_of_last = _Member(member.filename, start, end, member.CRC), end
        if end_of_last + _LARGEST_GAP < directory:
            raise UserError(f"{path} is refused: it has bytes that belong to no part.")
    return found


def _directory_start(file: io.BufferedReader, size: int) -> int:
    """Returns where the directory of an archive begins; raises ValueError unless it is the last thing in the file.

    `zipfile` searches for a directory and reads all of it. Here its size is compared with the file's before.
    """

    def read(layout: struct.Struct, position: int) -> tuple[Any, ...]:
        file.seek(max(0, position))
        return layout.unpack(file.read(layout.size))

    end = size - _END.size
    signature, _, _, length, start = read(_END, end)
    if signature != b"PK\5\6":
        raise ValueError("it does not end as an archive does")
    signature, record = read(_LOCATOR_64, end - _LOCATOR_64.size) if end >= _LOCATOR_64.size else (b"", 0)
    if signature == b"PK\6\7":
        end -= _LOCATOR_64.size + _END_64.size
        signature, _, _, length, start = read(_END_64, record)
        if signature != b"PK\6\6" or record != end:
            raise ValueError("its directory is not where the end of the file says")
    if length > _LARGEST_DIRECTORY or start + length != end:
        raise ValueError(f"its directory of {length:,} bytes is too large or not at its place")
    return start


def _local_start(file: io.BufferedReader, member: zipfile.ZipInfo) -> int:
    """Returns where the bytes of a part begin; raises ValueError if its own header and the directory differ."""
    if member.header_offset < 0:
        raise ValueError("its directory names a place before the file")
    file.seek(member.header_offset)
    header = _LOCAL_HEADER.unpack(file.read(_LOCAL_HEADER.size))
    signature, flags, method, *sizes, name_length, extra_length = header
    # A size may stand behind the bytes (flag 8, then it is zero here) or in the extra field (all bits set).
    allowed = {member.file_size, 0xFFFFFFFF, *([0] if flags & 8 else [])}
    name = file.read(name_length).decode("utf-8" if flags & 0x800 else "cp437")
    if (signature, flags, method) != (b"PK\3\4", member.flag_bits, member.compress_type) or flags & 0x2041:
        raise ValueError("its directory and the header of a part differ")
    if name != member.filename or not allowed.issuperset(sizes):
        raise ValueError("its directory and the header of a part differ")
    return member.header_offset + _LOCAL_HEADER.size + name_length + extra_length


def _read_sequence(path: Path) -> Any:
    """Reads the format before PyTorch 1.6: five pickles, then each storage as its length and its bytes."""
    memory = np.memmap(path, np.uint8, "r")
    with path.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as file:
        if _plain(file) != _MAGIC or _plain(file) != _VERSION:
            raise ValueError("it does not begin as one does")
        system = _plain(file)
        if type(system) is not dict or system.get("little_endian") is not True:
            raise ValueError("its numbers are not little-endian")
        begin = file.tell()
        # The storages stand behind the pickle, so the first reading only learns their types and lengths.
        declared: dict[str, tuple[np.dtype, int]] = {}

        def declare(kind: Any, key: Any, location: Any, count: Any, view: Any = None) -> Storage:
            dtype = _storage_dtype(kind)
            if type(key) is not str or type(count) is not int or declared.setdefault(key, (dtype, count))[1] != count:
                raise ValueError("its pickle names a storage in two ways")
            return Storage(dtype, None)

        _unpickler(declare, memory.size).load(file)
        keys = _plain(file)
        if type(keys) is not list or not all(type(key) is str for key in keys) or sorted(keys) != sorted(declared):
            raise ValueError("its list of storages is not that of its pickle")
        position = file.tell()
        storages: dict[str, np.ndarray] = {}
        for key in keys:
            dtype, count = declared[key]
            start, position = position + 8, position + 8 + count * dtype.itemsize
            if int.from_bytes(memory[start - 8 : start].tobytes(), "little") != count or position > memory.size:
                raise ValueError(f"its storage {key} is cut off or not as long as the pickle says")
            storages[key] = _aligned(memory[start:position])

        def load_storage(kind: Any, key: str, location: Any, count: int, view: Any = None) -> Storage:
            dtype, data = _storage_dtype(kind), storages[key]
            if view is not None:
                _, offset, length = view
                if not _natural(offset, length) or (offset + length) * dtype.itemsize > data.size:
                    raise ValueError(f"a view of its storage {key} reaches beyond the end")
                data = data[offset * dtype.itemsize : (offset + length) * dtype.itemsize]
            return Storage(dtype, data)

        file.seek(begin)
        return _unpickler(load_storage, memory.size).load(file)


def _plain(file: mmap.mmap) -> Any:
    """Reads a pickle that holds no tensors."""

    def refuse(*_: Any) -> Any:
        raise ValueError("it has a tensor in a wrong place")

    return Unpickler("(?!)", {}, refuse).load(file)


def _unpickler(load_storage: Callable[..., Storage], file_size: int) -> Unpickler:
    """Returns a reader of the pickle; `load_storage` gets what follows "storage" in a persistent id."""

    def persistent(identity: Any) -> Storage:
        if type(identity) is not tuple or identity[0] not in ("storage", b"storage"):
            raise ValueError("its pickle asks for something other than a storage")
        return call(load_storage, identity[1:])

    def tensor(
        storage: Any, offset: Any, shape: Any, strides: Any, grad: Any = False, hooks: Any = None, metadata: Any = None
    ) -> np.ndarray | None:
        if metadata:
            raise ValueError("it has a conjugate or negative view of a tensor, save a copy of the tensor instead")
        return _tensor(storage, storage.dtype, offset, shape, strides, file_size)

    def tensor_of_type(
        storage: Any, offset: Any, shape: Any, strides: Any, grad: Any, hooks: Any, kind: Any, metadata: Any = None
    ) -> np.ndarray | None:
        if metadata or type(kind) is not Name or kind.path.removeprefix("torch.") not in _TYPES:
            raise ValueError("it has a tensor of an unknown type")
        dtype = np.dtype(_TYPES[kind.path.removeprefix("torch.")])
        return _tensor(storage, dtype, offset, shape, strides, file_size)

    def from_type(function: Any, kind: Any, arguments: Any, state: Any) -> Any:
        """A tensor with attributes, which are left out."""
        known = {f"torch._utils.{name}": builder for name, builder in rebuild.items()}
        if type(function) is not Name or function.path not in known:
            raise ValueError("it has a tensor of an unknown class")
        return call(known[function.path], arguments)

    rebuild: dict[str, Callable[..., Any]] = {
        "_rebuild_tensor": tensor,
        "_rebuild_tensor_v2": tensor,
        "_rebuild_tensor_v3": tensor_of_type,
        "_rebuild_parameter": lambda data, *_: data,
        "_rebuild_parameter_with_state": lambda data, *_: data,
    }
    functions = {f"torch._utils.{name}": builder for name, builder in rebuild.items()}
    functions["torch._tensor._rebuild_from_type_v2"] = from_type
    functions["torch.Size"] = lambda sizes=(): sizes
    functions["torch.device"] = lambda kind, index=None: kind
    return Unpickler(_INERT, functions, persistent)


def _storage_dtype(kind: Any) -> np.dtype:
    name = kind.path.rpartition(".")[2] if type(kind) is Name else ""
    if name not in _STORAGES:
        raise ValueError("it has a storage of an unknown type")
    return np.dtype(_STORAGES[name])


def _natural(*numbers: Any) -> bool:
    """Whether all are integers from 0 to the largest size that an array may have."""
    return all(type(number) is int and 0 <= number < 1 << 62 for number in numbers)


def _tensor(storage: Any, dtype: np.dtype, offset: Any, shape: Any, strides: Any, file_size: int) -> np.ndarray | None:
    """Returns a view of a storage; None where it has no bytes yet.

    Args:
      storage: what the file gives as storage; it and the next ones are checked here.
      dtype: of the tensor.
      offset: of the first number, in numbers.
      shape: of the tensor.
      strides: in numbers.
      file_size: in bytes.
    """
    if type(storage) is not Storage or type(shape) is not tuple or type(strides) is not tuple:
        raise ValueError("it has a tensor without storage, shape or strides")
    if len(shape) != len(strides) or len(shape) > _MOST_DIMENSIONS or not _natural(offset, *shape, *strides):
        raise ValueError(f"it has a tensor of {len(shape)} dimensions with shape or strides that cannot be")
    count = math.prod(shape)
    if count > max(file_size, _FREE_SIZE):
        raise ValueError(f"it has a tensor of {count:,} numbers, more than the file has bytes")
    if storage.data is None:
        return None
    if not count:
        return np.empty(shape, dtype)
    last = offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    if (last + 1) * dtype.itemsize > storage.data.size:
        raise ValueError("it has a tensor that reaches beyond its storage")
    # The stride of a single number is never used, and may be anything.
    steps = [
        stride * dtype.itemsize if size > 1 else dtype.itemsize for size, stride in zip(shape, strides, strict=True)
    ]
    return np.ndarray(shape, dtype, storage.data, offset * dtype.itemsize, steps)


def _aligned(data: np.ndarray) -> np.ndarray:
    """Returns bytes at an address that any number may have: the bytes themselves, or a copy."""
    return data if data.ctypes.data % _ALIGNMENT == 0 else data.copy()
