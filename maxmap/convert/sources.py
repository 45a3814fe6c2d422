"""Foreign checkpoint files as dicts of arrays. Nothing in a file is run.

Safetensors are read here, not by their library: the arrays stay in the mapped file, where the library would copy a
large model, and bfloat16 needs no torch. `torch_files` and `tensorflow` read the other formats, without those
frameworks too.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from maxmap.convert import tensorflow
from maxmap.convert.torch_files import read_torch
from maxmap.errors import UserError

RAW_KEYS = ("state_dict", "model", "model_state_dict", "module", "params", "network", "net", "weights")
AVERAGED_KEYS = ("state_dict_ema", "model_ema", "ema_state_dict", "params_ema", "ema")
WEIGHTS = ("model.safetensors", "pytorch_model.bin", "model.safetensors.index.json", "pytorch_model.bin.index.json")

_SAFETENSORS_TYPES: dict[str, Any] = {
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
_MOST_CONTAINERS = 10  # around a state dict
_LONGEST_HEADER = 100_000_000  # bytes, the limit of the safetensors library


@dataclass(frozen=True)
class ForeignCheckpoint:
    """The state dict of a foreign checkpoint.

    Attributes:
      tensors: arrays by name, in the mapped file if possible.
      weights: "raw" or "ema".
      kind: "safetensors", "torch" or "tensorflow".
      config: the config.json of a Hugging Face repository, else empty.
    """

    tensors: Mapping[str, Any]
    weights: str
    kind: str
    config: Mapping[str, Any] = field(default_factory=dict)


def read_source(path: str | Path, *, ema: bool | None = None) -> ForeignCheckpoint:
    """Reads a checkpoint file, or a folder of the Hugging Face hub or of TensorFlow.

    Args:
      path: file or folder. Its content decides on the format, not its name.
      ema: True for averaged weights, False for raw ones. None prefers raw ones from PyTorch, averaged ones from
        TensorFlow.

    Raises:
      UserError: there is no such file, it is damaged, or it holds something other than a state dict.
    """
    path = Path(path).expanduser()
    if tensorflow.is_checkpoint(path):
        return ForeignCheckpoint(*tensorflow.read_checkpoint(path, ema=ema), kind="tensorflow")
    if path.is_dir():
        return _read_repository(path, ema)
    if not path.is_file():
        raise UserError(f"there is no checkpoint {path}: give a file, a folder or the name of a published one.")
    if path.name.endswith(".index.json"):
        return _read_shards(path, ema)
    with path.open("rb") as file:
        start = file.read(9)
    # Safetensors come first, because the length of their header may begin with the byte that a pickle begins with.
    if path.suffix == ".safetensors" or start[5:] == b"\0\0\0{":
        return ForeignCheckpoint(*_find_state_dict(_read_safetensors(path), ema, path), kind="safetensors")
    if start[:4] == b"PK\x03\x04" or start[:1] == b"\x80":
        return ForeignCheckpoint(*_find_state_dict(read_torch(path), ema, path), kind="torch")
    raise UserError(f"{path} is no checkpoint: it is damaged, or neither safetensors nor a file of torch.save.")


def _read_repository(folder: Path, ema: bool | None) -> ForeignCheckpoint:
    """Reads weights and config from the folder of a Hugging Face repository, or from its entry in the cache."""
    reference = folder / "refs" / "main"
    if reference.is_file():  # an entry of the hub's cache, which keeps each version in a folder of its own
        folder = folder / "snapshots" / reference.read_text().strip()
    config = _read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    weights = next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)
    if weights is None:
        found = [path for path in sorted(folder.iterdir()) if path.suffix in (".safetensors", ".pth", ".bin", ".tar")]
        if len(found) > 1:
            raise UserError(f"{folder} has {len(found)} files of weights: name one of them.")
        if not found:
            raise UserError(f"there is no checkpoint in {folder}: give the folder of a run, or a file of weights.")
        weights = found[0]
    source = read_source(weights, ema=ema)
    return ForeignCheckpoint(source.tensors, source.weights, source.kind, config)


def _read_shards(index: Path, ema: bool | None) -> ForeignCheckpoint:
    """Reads the files that an index names. Each must hold exactly the entries that the index gives for it."""
    names = shards_of(index)
    tensors: dict[str, Any] = {}
    kind = ""
    for file in sorted(set(names.values())):
        shard = read_source(index.parent / file, ema=ema)
        kind = shard.kind
        wanted = {name for name, its_file in names.items() if its_file == file}
        if set(shard.tensors) != wanted:
            differing = sorted(wanted ^ set(shard.tensors))
            raise UserError(
                f"the shard {file} and the index {index} do not agree on {len(differing)} entries, the first of them "
                f"{differing[0]}."
            )
        tensors |= shard.tensors
    return ForeignCheckpoint(tensors, "ema" if ema else "raw", kind)


def shards_of(index: Path) -> dict[str, str]:
    """Returns the name of the file for each entry of an index."""
    names = _read_json(index).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(file, str) for file in names.values()):
        raise UserError(f"{index} is no index of shards: it has no 'weight_map' from entries to files.")
    elsewhere = next((file for file in names.values() if Path(file).name != file), None)
    if elsewhere is not None:
        raise UserError(f"{index} names the shard {elsewhere}, which is not beside it.")
    return names


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, OSError, RecursionError) as error:
        raise UserError(f"{path} is no JSON file ({error}).") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no JSON object.")
    return content


def _read_safetensors(path: Path) -> dict[str, np.ndarray]:
    """Reads a file of safetensors: length of the header, header in JSON, then the bytes of each entry."""

    def damaged(why: str) -> UserError:
        return UserError(f"{path} is damaged or no safetensors file, {why}: get it again.")

    def reject_duplicates(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
        unique: dict[str, Any] = {}
        for key, value in pairs:
            if key in unique:
                raise damaged(f"it has the entry {key} twice")
            unique[key] = value
        return unique

    size = path.stat().st_size
    if size < 8:
        raise damaged(f"it has {size} bytes")
    memory = np.memmap(path, np.uint8, "r")
    start = 8 + int.from_bytes(memory[:8].tobytes(), "little")
    if start > min(size, _LONGEST_HEADER):
        raise damaged(f"its header would end at byte {start} of {size}")
    try:
        header = json.loads(memory[8:start].tobytes(), object_pairs_hook=reject_duplicates)
        header.pop("__metadata__", None)
        entries = {
            key: (_SAFETENSORS_TYPES[e["dtype"]], tuple(e["shape"]), *e["data_offsets"]) for key, e in header.items()
        }
    except UserError:
        raise
    except (ValueError, TypeError, AttributeError, KeyError, RecursionError) as error:
        raise damaged(f"its header cannot be read ({type(error).__name__} {error})") from None
    tensors, end_of_last = {}, 0
    for key, (dtype, shape, begin, end) in sorted(entries.items(), key=lambda entry: entry[1][2:]):
        if not all(isinstance(n, int) and n >= 0 for n in (*shape, begin, end)) or begin != end_of_last:
            raise damaged(f"its entry {key} does not follow the one before")
        count = int(np.prod(np.array(shape, object)))  # Python's integers: no overflow
        if end - begin != count * np.dtype(dtype).itemsize or end > size - start:
            raise damaged(f"its entry {key} is cut off or of another size than its shape")
        tensors[key] = np.asarray(memory[start + begin : start + end]).view(dtype).reshape(shape)
        end_of_last = end
    if end_of_last != size - start:
        raise damaged(f"it has {size - start - end_of_last} bytes that belong to no entry")
    return tensors


def _find_state_dict(content: Any, ema: bool | None, path: Path) -> tuple[Mapping[str, Any], str]:
    """Opens the containers around a state dict.

    Args:
      content: what a file holds.
      ema: see `read_source`.
      path: of the file, for messages.

    Returns:
      The state dict, and its kind of weights: "raw" or "ema".
    """
    weights = "raw"
    for _ in range(_MOST_CONTAINERS):  # a pickle may hold a container that holds itself
        if not isinstance(content, Mapping):
            break
        inside = {key for key, value in content.items() if isinstance(value, Mapping)}
        averaged, raw = (next((key for key in keys if key in inside), None) for keys in (AVERAGED_KEYS, RAW_KEYS))
        if ema and averaged is None and weights == "raw" and (raw is None or not _has_any(content[raw], AVERAGED_KEYS)):
            raise UserError(f"{path} has no averaged weights: leave --ema out.")
        key = averaged if (ema and weights == "raw") or (raw is None and ema is not False) else raw
        if key is None:
            break
        weights = "ema" if key in AVERAGED_KEYS else weights
        content = content[key]
    if not isinstance(content, Mapping) or not any(hasattr(value, "shape") for value in content.values()):
        what = type(content).__name__
        if isinstance(content, Mapping):
            what = ", ".join(repr(key)[:40] for key in list(content)[:5]) or "nothing"
        raise UserError(f"{path} holds no state dict but {what}: give a file with 'state_dict' or 'model'.")
    if not all(isinstance(key, str) for key in content):
        raise UserError(f"{path} has entries without a name: give a file with a state dict.")
    return content, weights


def _has_any(value: Any, keys: Iterable[str]) -> bool:
    return isinstance(value, Mapping) and any(key in value for key in keys)
