"""The official TensorFlow checkpoints of MaxViT (google-research/maxvit), read without TensorFlow.

A TensorFlow checkpoint is a table in LevelDB's format (`.index`: names, shapes and offsets) and the raw bytes of the
variables (`.data-*`), which stay in the mapped file. Its entries are protocol buffers, see `maxmap.protobuf`.
"""

import contextlib
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from maxmap.checksums import masked_crc32c
from maxmap.errors import UserError, shortened
from maxmap.protobuf import Message, read_bytes, read_varint

_MAGIC = (0xDB4775248B80FB57).to_bytes(8, "little")
_FOOTER = 48  # bytes
_TRAILER = 5  # bytes behind each block: its compression and its checksum
_EXPANSION = 64  # how many times as long as the index all names together may be, which share their beginnings there
_MOST_DIMENSIONS = 64  # NumPy's limit
_LARGEST_STATE = 1 << 16  # bytes of the file `checkpoint`, which names the newest one
_TYPES: dict[int, Any] = {
    1: np.float32,
    2: np.float64,
    3: np.int32,
    4: np.uint8,
    5: np.int16,
    6: np.int8,
    9: np.int64,
    10: np.bool_,
    14: ml_dtypes.bfloat16,
    19: np.float16,
}
_AVERAGE = "/ExponentialMovingAverage"

# Official names to timm's. Attention in windows has no number in its name, attention in the grid has "_1".
MODULES = (
    (r"stem/conv_0", "stem.conv1"),
    (r"stem/norm_0", "stem.norm1"),
    (r"stem/conv_1", "stem.conv2"),
    (r"mbconv/shortcut_conv", "conv.shortcut.expand"),
    (r"mbconv/pre_norm", "conv.pre_norm"),
    (r"mbconv/expand_conv", "conv.conv1_1x1"),
    (r"mbconv/expand_norm", "conv.norm1"),
    (r"mbconv/depthwise_conv", "conv.conv2_kxk"),
    (r"mbconv/depthwise_norm", "conv.norm2"),
    (r"mbconv/se/reduce_conv2d", "conv.se.fc1"),
    (r"mbconv/se/expand_conv2d", "conv.se.fc2"),
    (r"mbconv/shrink_conv", "conv.conv3_1x1"),
    (r"attn_layer_norm(_1)?", "norm1"),
    (r"attention(_1)?", "attn.rel_pos"),
    (r"attention(_1)?/([qkv])", r"attn.\2"),
    (r"attention(_1)?/o", "attn.proj"),
    (r"ffn_layer_norm(_1)?", "norm2"),
    (r"ffn(_1)?/expand_dense", "mlp.fc1"),
    (r"ffn(_1)?/shrink_dense", "mlp.fc2"),
    (r"final_layer_norm", "head.norm"),
    (r"cls_head/inner_dense", "head.pre_logits.fc"),
    (r"cls_head/logit_dense", "head.fc"),
)
_LEAVES = {
    "kernel": "weight",
    "depthwise_kernel": "weight",
    "weight": "weight",
    "bias": "bias",
    "gamma": "weight",
    "beta": "bias",
    "moving_mean": "running_mean",
    "moving_variance": "running_var",
    "relative_bias": "relative_position_bias_table",
}


def is_checkpoint(path: Path) -> bool:
    """Returns whether a path names a TensorFlow checkpoint: its folder, its prefix or one of its files."""
    return _prefix(path) is not None


def read_checkpoint(path: Path, *, ema: bool | None = None) -> tuple[dict[str, np.ndarray], str]:
    """Reads an official checkpoint under timm's names and in PyTorch's layout.

    Args:
      path: the checkpoint's folder (its file `checkpoint` names the newest), the prefix of its files or one of them.
      ema: whether to read the averaged variables, as the official driver does, or the raw ones; None: the averaged ones
        if there are any.

    Returns:
      The arrays, with the position tables as stored, and which weights they are, "ema" or "raw".

    Raises:
      UserError: the checkpoint is damaged or of another kind.
    """
    prefix = _prefix(path)
    assert prefix is not None
    entries = _read_index(prefix)
    averages = {name.removesuffix(_AVERAGE): name for name in entries if name.endswith(_AVERAGE)}
    if ema and not averages:
        raise UserError(f"{path} has no averaged variables: leave --ema out.")
    averaged = bool(averages) and ema is not False
    # An optimizer's state of a variable is named <variable>/<slot>.
    raw = {name: name for name in entries if name.rpartition("/")[0] not in entries and not name.endswith(_AVERAGE)}
    stored = {name: key for name, key in (averages if averaged else raw).items() if name != "global_step"}
    values = _read_values(prefix, {key: entries[key] for key in stored.values()})
    return from_tensorflow({name: values[key] for name, key in stored.items()}), "ema" if averaged else "raw"


def from_tensorflow(variables: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Turns the variables of the official MaxViT into timm's state dict, which `from_torch` reads.

    Args:
      variables: by name, for example 'maxvit/stem/conv_0/kernel'. A variable that is not MaxViT's keeps its name.

    Returns:
      The state dict. Position tables keep their stored size, which is 13 x 13 at every resolution.
    """
    state_dict: dict[str, np.ndarray] = {}
    parts: dict[str, dict[str, np.ndarray]] = {}  # queries, keys and values, which are one tensor in timm
    for name, value in variables.items():
        key = timm_name(name)
        if key is None:
            state_dict[name] = value
            continue
        value = _to_torch_layout(value, *name.split("/")[-2:])
        which = re.fullmatch(r"(.*\.attn\.)([qkv])(\.\w+)", key)
        if which:
            parts.setdefault(f"{which[1]}qkv{which[3]}", {})[which[2]] = value
        else:
            state_dict[key] = value
    for key, qkv in parts.items():
        state_dict[key] = np.concatenate([qkv[letter] for letter in "qkv" if letter in qkv])
    return state_dict


def timm_name(name: str) -> str | None:
    """Returns timm's name of a variable, None if it is no variable of MaxViT."""
    match = re.fullmatch(r"maxvit/(?:block_(\d+)_(\d+)/)?(.+)/(\w+)", name)
    if match is None or match[4] not in _LEAVES:
        return None
    stage, block, module, leaf = match.groups()
    for pattern, replacement in MODULES:
        found = re.fullmatch(pattern, module)
        if found:
            partition = ""
            if stage is not None and not module.startswith("mbconv"):
                partition = "attn_grid." if "_1" in found.groups() else "attn_block."
            where = "" if stage is None else f"stages.{int(stage)}.blocks.{int(block)}."
            return f"{where}{partition}{found.expand(replacement)}.{_LEAVES[leaf]}"
    return None


def _to_torch_layout(value: np.ndarray, module: str, leaf: str) -> np.ndarray:
    if leaf == "kernel":
        return value.transpose(3, 2, 0, 1)
    if leaf == "depthwise_kernel":
        return value.transpose(2, 3, 0, 1)
    if leaf == "weight":  # [C, heads, D] of q, k and v, [heads, D, C] of o, [C, C'] of others
        return value.reshape(-1, value.shape[-1] if module == "o" else value[0].size).T
    return value.ravel() if leaf == "bias" else value  # [heads, D] of q, k and v


def read_variables(prefix: Path) -> dict[str, np.ndarray]:
    """Reads every numeric variable of a checkpoint, after a check of its checksum.

    Args:
      prefix: what the checkpoint's file names have in common, for example 'model.ckpt-92002'.

    Returns:
      The variables by name, as arrays in the mapped files.

    Raises:
      UserError: a file is missing or damaged, or a variable is partitioned.
    """
    return _read_values(prefix, _read_index(prefix))


@dataclass(frozen=True)
class _Entry:
    """A variable as the index describes it.

    Attributes:
      dtype: of its numbers.
      shape: of the variable.
      file: that holds its bytes.
      start: of its bytes in the file.
      length: number of its bytes.
      checksum: of its bytes, None if the index has none.
    """

    dtype: np.dtype
    shape: tuple[int, ...]
    file: str
    start: int
    length: int
    checksum: int | None


@contextlib.contextmanager
def _damage(prefix: Path) -> Iterator[None]:
    """Turns what damaged files raise into one sentence."""
    try:
        yield
    except UserError:
        raise
    except (ValueError, OSError, OverflowError) as error:
        raise UserError(
            f"the TensorFlow checkpoint {prefix} is damaged or not complete ({shortened(error)}): get it again."
        ) from None


def _read_index(prefix: Path) -> dict[str, _Entry]:
    """Reads the entry of each numeric variable, as tensor_bundle.proto describes them."""
    entries: dict[str, _Entry] = {}
    shards = 1
    with _damage(prefix):
        for key, value in _read_table(_index_bytes(prefix.with_name(prefix.name + ".index"))):
            entry, name = Message(value), key.decode()
            if not name:  # the header
                shards = entry.integer(1, default=1)
                if entry.integer(2):
                    raise ValueError("its numbers are big-endian")
                continue
            dtype = _TYPES.get(entry.integer(1))
            if dtype is None:  # text, such as the graph of objects
                continue
            if 7 in entry:
                raise UserError(f"the TensorFlow checkpoint {prefix} has the partitioned variable {shortened(name)}.")
            sizes = [size for shape in entry.messages(2) for size in shape.strings(2)]
            if len(sizes) > _MOST_DIMENSIONS:
                raise ValueError(f"{shortened(name)} has {len(sizes)} dimensions")
            shape = tuple(Message(size).integer(1) for size in sizes)
            shard, start, length = (entry.integer(number) for number in (3, 4, 5))
            if length != math.prod(shape) * np.dtype(dtype).itemsize:
                raise ValueError(f"{shortened(name)} is cut off")
            file = f"{prefix.name}.data-{shard:05}-of-{shards:05}"
            entries[name] = _Entry(np.dtype(dtype), shape, file, start, length, entry.fixed32(6))
    return entries


def _read_values(prefix: Path, entries: Mapping[str, _Entry]) -> dict[str, np.ndarray]:
    """Returns the variables as arrays in the mapped files, after checking their checksums."""
    files: dict[str, np.ndarray] = {}
    values = {}
    with _damage(prefix):
        for name, entry in entries.items():
            if entry.file not in files:
                files[entry.file] = np.memmap(prefix.with_name(entry.file), np.uint8, "r")
            data: Any = np.asarray(files[entry.file][entry.start : entry.start + entry.length])
            if data.size != entry.length:
                raise ValueError(f"{shortened(name)} is cut off")
            if entry.checksum is not None and masked_crc32c(data) != entry.checksum:
                raise ValueError(f"{shortened(name)} has another checksum than the index says")
            values[name] = data.view(entry.dtype).reshape(entry.shape)
    return values


def _prefix(path: Path) -> Path | None:
    """Returns the prefix of a TensorFlow checkpoint's files, None if there is no checkpoint."""
    if path.is_dir():
        named = re.search(r'^model_checkpoint_path: "(.*)"', _state(path / "checkpoint"), re.M)
        found = sorted(path.glob("*.index"))
        path = path / Path(named[1]).name if named else found[-1] if found else path / "none"
    if path.suffix == ".index" or ".data-" in path.name:
        path = path.with_name(re.sub(r"\.(index|data-\d+-of-\d+)$", "", path.name))
    return path if path.with_name(path.name + ".index").is_file() else None


def _state(file: Path) -> str:
    if not file.is_file():
        return ""
    with file.open("rb") as opened:
        return opened.read(_LARGEST_STATE).decode(errors="replace")


def _index_bytes(path: Path) -> bytes:
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - _FOOTER))
        if not file.read().endswith(_MAGIC):
            raise ValueError("the index does not end as a table's index does")
        file.seek(0)
        return file.read()


def _read_table(index: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Yields the keys and values of a table in LevelDB's format, uncompressed and with one level of blocks below it.

    The blocks may not overlap and the keys have to ascend, so that the work is bounded by the size of the index.
    """
    if len(index) < _FOOTER:
        raise ValueError("the index is cut off")
    _, _, position = _read_handle(index, len(index) - _FOOTER)  # of a block that describes the table
    offset, size, _ = _read_handle(index, position)
    last, names, end_of_last = None, 0, 0
    for _, handle in _read_block(index, offset, size):
        offset, size, _ = _read_handle(handle, 0)
        if offset < end_of_last:
            raise ValueError("the blocks of its index overlap")
        end_of_last = offset + size + _TRAILER
        for key, value in _read_block(index, offset, size):
            names += len(key)
            if names > _EXPANSION * len(index):
                raise ValueError(f"its names are {_EXPANSION} times as long as the index")
            if last is not None and key <= last:
                raise ValueError("the names in its index do not ascend")
            last = key
            yield key, value


def _read_block(data: bytes, offset: int, size: int) -> Iterator[tuple[bytes, bytes]]:
    """Yields the keys and values of a block; each key is stored without what it shares with the key before."""
    block, position = read_bytes(data, offset, size)
    trailer, _ = read_bytes(data, position, _TRAILER)
    if masked_crc32c(block + trailer[:1]) != int.from_bytes(trailer[1:], "little"):
        raise ValueError("a block of its index has another checksum than it says")
    if trailer[:1] != b"\0":
        raise ValueError("its index is compressed")
    restarts = int.from_bytes(block[-4:], "little")
    position, end, key = 0, size - 4 - 4 * restarts, b""
    if end < 0:
        raise ValueError("a block of its index is cut off")
    while position < end:
        shared, position = read_varint(block, position)
        added, position = read_varint(block, position)
        length, position = read_varint(block, position)
        if shared > len(key):
            raise ValueError("a name in its index is cut off")
        suffix, position = read_bytes(block, position, added)
        value, position = read_bytes(block, position, length)
        key = key[:shared] + suffix
        yield key, value


def _read_handle(data: bytes, position: int) -> tuple[int, int, int]:
    """Returns offset and size of a block, and the position after this handle."""
    offset, position = read_varint(data, position)
    size, position = read_varint(data, position)
    return offset, size, position
