"""The official TensorFlow checkpoints of MaxViT (google-research/maxvit), read without TensorFlow.

A checkpoint of TensorFlow is a table in LevelDB's format (`.index`: names, shapes and places) and the raw bytes of the
variables (`.data-*`), which stay in the mapped file. Reading that takes less code than installing TensorFlow does time.
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from maxmap.errors import UserError

_MAGIC = (0xDB4775248B80FB57).to_bytes(8, "little")
_FOOTER = 48  # bytes
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

# Official names to timm's; attention in windows has no number, attention in the grid has "_1".
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
    """Whether a path names a TensorFlow checkpoint: its folder, its prefix or one of its files."""
    return _prefix(path) is not None


def read_checkpoint(path: Path, *, ema: bool | None = None) -> tuple[dict[str, np.ndarray], str]:
    """Reads an official checkpoint under timm's names and in PyTorch's layout.

    Args:
      path: of the folder (the newest checkpoint that its file `checkpoint` names), or the prefix of the files.
      ema: the averaged variables, which the official driver reads, or the raw ones; None for the averaged ones where
        there are any.

    Returns:
      The arrays, position tables as stored; and which weights they are, "ema" or "raw".

    Raises:
      UserError: the checkpoint is damaged or of another kind.
    """
    prefix = _prefix(path)
    assert prefix is not None
    variables = read_variables(prefix)
    averages = {name.removesuffix(_AVERAGE): value for name, value in variables.items() if name.endswith(_AVERAGE)}
    if ema and not averages:
        raise UserError(f"{path} has no averaged variables: leave --ema out.")
    averaged = bool(averages) and ema is not False
    # What an optimizer keeps of a variable is named <variable>/<slot>.
    raw = {name: value for name, value in variables.items() if name.rpartition("/")[0] not in variables}
    chosen = averages if averaged else {name: value for name, value in raw.items() if not name.endswith(_AVERAGE)}
    return from_tensorflow(
        {name: v for name, v in chosen.items() if name != "global_step"}
    ), "ema" if averaged else "raw"


def from_tensorflow(variables: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Names and lays out the variables of the official MaxViT as timm's state dict; `from_torch` does the rest.

    Args:
      variables: by name, for example 'maxvit/stem/conv_0/kernel'. What is no variable of MaxViT keeps its name.

    Returns:
      The state dict; position tables keep the size that they are stored in, 13 x 13 at every resolution.
    """
    state_dict: dict[str, np.ndarray] = {}
    parts: dict[str, dict[str, np.ndarray]] = {}  # of queries, keys and values, which timm has in one
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
    """Returns timm's name of a variable, None for what is no variable of MaxViT."""
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
    """Reads every numeric variable below a checkpoint's prefix, by name, as arrays in the mapped files."""
    index = prefix.with_name(prefix.name + ".index")
    try:
        return dict(_read_variables(prefix, index.read_bytes()))
    except (IndexError, ValueError, KeyError, OSError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"the TensorFlow checkpoint {prefix} is damaged or not complete ({error}): get it again."
        ) from None


def _read_variables(prefix: Path, index: bytes) -> Iterator[tuple[str, np.ndarray]]:
    if index[-8:] != _MAGIC:
        raise ValueError("the index does not end as one does")
    _, _, position = _handle(index, len(index) - _FOOTER)  # of what describes the table
    offset, size, _ = _handle(index, position)
    files: dict[int, np.ndarray] = {}
    shards = 1
    for _, handle in _read_block(index, offset, size):
        offset, size, _ = _handle(handle, 0)
        for name, value in _read_block(index, offset, size):
            fields = _read_message(value)
            if not name:  # the header
                shards = fields.get(1, [1])[0]
                continue
            dtype = _TYPES.get(fields.get(1, [0])[0])
            if dtype is None:  # text, such as the graph of objects
                continue
            if 7 in fields:
                raise UserError(f"the TensorFlow checkpoint {prefix} has the partitioned variable {name.decode()}.")
            shape = [_read_message(dim).get(1, [0])[0] for dim in _read_message(fields.get(2, [b""])[0]).get(2, [])]
            shard, start, length = (fields.get(number, [0])[0] for number in (3, 4, 5))
            if shard not in files:
                file = prefix.with_name(f"{prefix.name}.data-{shard:05}-of-{shards:05}")
                files[shard] = np.memmap(file, np.uint8, "r")
            if (
                start + length > files[shard].size
                or length != int(np.prod(np.array(shape, object))) * np.dtype(dtype).itemsize
            ):
                raise ValueError(f"{name.decode()} is cut off")
            yield name.decode(), np.asarray(files[shard][start : start + length]).view(dtype).reshape(shape)


def _prefix(path: Path) -> Path | None:
    """The prefix of the files of a TensorFlow checkpoint, None if there is none."""
    if path.is_dir():
        state = path / "checkpoint"
        named = re.search(r'^model_checkpoint_path: "(.*)"', state.read_text(), re.M) if state.is_file() else None
        found = sorted(path.glob("*.index"))
        path = path / Path(named[1]).name if named else found[-1] if found else path / "none"
    if path.suffix == ".index" or ".data-" in path.name:
        path = path.with_name(re.sub(r"\.(index|data-\d+-of-\d+)$", "", path.name))
    return path if path.with_name(path.name + ".index").is_file() else None


def _read_block(data: bytes, offset: int, size: int) -> Iterator[tuple[bytes, bytes]]:
    """Keys and values of a block of the table; a key shares its beginning with the one before."""
    if data[offset + size]:
        raise ValueError("its index is compressed")
    block = data[offset : offset + size]
    restarts = int.from_bytes(block[-4:], "little")
    position, end, key = 0, size - 4 - 4 * restarts, b""
    while position < end:
        shared, position = _varint(block, position)
        rest, position = _varint(block, position)
        length, position = _varint(block, position)
        key = key[:shared] + block[position : position + rest]
        position += rest
        yield key, block[position : position + length]
        position += length


def _handle(data: bytes, position: int) -> tuple[int, int, int]:
    """Offset and size of a block, and where the next handle is."""
    offset, position = _varint(data, position)
    size, position = _varint(data, position)
    return offset, size, position


def _read_message(data: bytes) -> dict[int, list[Any]]:
    """The fields of a protocol buffer: numbers, or bytes for what is nested."""
    fields: dict[int, list[Any]] = {}
    position = 0
    while position < len(data):
        tag, position = _varint(data, position)
        kind = tag & 7
        value: int | bytes
        if kind == 0:
            value, position = _varint(data, position)
        else:
            length = {1: 8, 5: 4}.get(kind)
            if length is None:
                length, position = _varint(data, position)
            value = data[position : position + length]
            position += length
        fields.setdefault(tag >> 3, []).append(value)
    return fields


def _varint(data: bytes, position: int) -> tuple[int, int]:
    """An integer in groups of 7 bits, the lowest first, and the position after it."""
    value = shift = 0
    while True:
        byte = data[position]
        value |= (byte & 127) << shift
        position, shift = position + 1, shift + 7
        if byte < 128:
            return value, position
