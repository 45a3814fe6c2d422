"""Files of safetensors, read without their library: the arrays stay in the mapped file, where it would copy them.

bfloat16 needs no torch here. The format is described in https://github.com/huggingface/safetensors.
"""

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from maxmap.convert.manifests import is_size
from maxmap.errors import UserError, shortened

_TYPES: dict[str, Any] = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U64": np.uint64,
    "U32": np.uint32,
    "U16": np.uint16,
    "U8": np.uint8,
    "BOOL": np.bool_,
}
_LONGEST_HEADER = 16 << 20  # bytes; the header of a large model has one megabyte
_MOST_DIMENSIONS = 64  # NumPy's limit


def read_safetensors(path: Path) -> dict[str, np.ndarray]:
    """Reads a file: length of the header, header in JSON, then the bytes of each entry.

    Returns:
      The arrays by name, in the mapped file.

    Raises:
      UserError: the file is damaged or of another kind.
    """
    try:
        size = path.stat().st_size
        if size < 8:
            raise ValueError(f"it has {size} bytes")
        memory = np.memmap(path, np.uint8, "r")
        start = 8 + int.from_bytes(memory[:8].tobytes(), "little")
        if start > min(size, _LONGEST_HEADER):
            raise ValueError(f"its header would end at byte {start} of {size}")
        header = _read_header(memory[8:start].tobytes())
        entries = {key: _check_entry(key, entry) for key, entry in header.items()}
        tensors, end_of_last = {}, 0
        for key, (dtype, shape, begin, end) in sorted(entries.items(), key=lambda entry: entry[1][2:]):
            if begin != end_of_last:
                raise ValueError(f"its entry {shortened(key)} does not follow the one before")
            if end - begin != math.prod(shape) * dtype.itemsize or end > size - start:
                raise ValueError(f"its entry {shortened(key)} is cut off or of another size than its shape")
            tensors[key] = np.asarray(memory[start + begin : start + end]).view(dtype).reshape(shape)
            end_of_last = end
        if end_of_last != size - start:
            raise ValueError(f"it has {size - start - end_of_last} bytes that belong to no entry")
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged or no safetensors file, {shortened(error)}: get it again.") from None
    return tensors


def _read_header(text: bytes) -> dict[str, Any]:
    """Returns the entries of the header; raises ValueError if it is no JSON object or has an entry twice."""

    def reject_duplicates(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
        unique: dict[str, Any] = {}
        for key, value in pairs:
            if key in unique:
                raise ValueError(f"it has the entry {shortened(key)} twice")
            unique[key] = value
        return unique

    try:
        header = json.loads(text.decode(), object_pairs_hook=reject_duplicates)
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"its header cannot be read ({shortened(error)})") from None
    if not isinstance(header, dict):
        raise ValueError("its header cannot be read (it is no object)")
    header.pop("__metadata__", None)
    return header


def _check_entry(key: str, entry: Any) -> tuple[np.dtype, tuple[int, ...], int, int]:
    """Returns type, shape, begin and end of an entry; raises ValueError if one of them cannot be."""
    if not isinstance(entry, dict) or {"dtype", "shape", "data_offsets"} - entry.keys():
        raise ValueError(f"its header cannot be read (the entry {shortened(key)} lacks type, shape or offsets)")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _TYPES:
        raise ValueError(f"its header cannot be read (the entry {shortened(key)} has the type {shortened(dtype)})")
    if not isinstance(shape, list) or len(shape) > _MOST_DIMENSIONS or not all(map(is_size, shape)):
        raise ValueError(f"its header cannot be read (the entry {shortened(key)} has the shape {shortened(shape)})")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(is_size, offsets)):
        raise ValueError(f"its header cannot be read (the entry {shortened(key)} has the offsets {shortened(offsets)})")
    return np.dtype(_TYPES[dtype]), tuple(shape), *offsets
