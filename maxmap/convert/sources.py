"""Foreign checkpoint files as dicts of arrays. Nothing in a file is run.

`safetensors_files`, `torch_files`, `tensorflow`, `tfjs`, `tflite` and `onnx` read the formats, without those libraries.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from maxmap.convert import tensorflow, tfjs, tflite
from maxmap.convert.manifests import is_beside, read_json
from maxmap.convert.mobilenet import Network
from maxmap.convert.onnx import read_onnx
from maxmap.convert.safetensors_files import read_safetensors
from maxmap.convert.torch_files import read_torch
from maxmap.errors import UserError, printable, shortened

RAW_KEYS = ("state_dict", "model", "model_state_dict", "module", "params", "network", "net", "weights")
AVERAGED_KEYS = ("state_dict_ema", "model_ema", "ema_state_dict", "params_ema", "ema")
WEIGHTS = ("model.safetensors", "pytorch_model.bin", "model.safetensors.index.json", "pytorch_model.bin.index.json")

_MOST_CONTAINERS = 10  # around a state dict


@dataclass(frozen=True)
class ForeignCheckpoint:
    """The state dict of a foreign checkpoint.

    Attributes:
      tensors: arrays by name, in the mapped file if possible.
      weights: "raw" or "ema".
      kind: "safetensors", "torch", "tensorflow", "tfjs", "tflite" or "onnx".
      config: the config.json of a Hugging Face repository, else empty.
      architecture: name of the model, if the weights say it.
      image_size: pixels of a side, if the file says it.
      notes: what was done to the values on the way, a phrase each.
    """

    tensors: Mapping[str, Any]
    weights: str
    kind: str
    config: Mapping[str, Any] = field(default_factory=dict)
    architecture: str | None = None
    image_size: int | None = None
    notes: Sequence[str] = ()


def read_source(
    path: str | Path, *, ema: bool | None = None, classifier: str | Path | None = None
) -> ForeignCheckpoint:
    """Reads a checkpoint file, or a folder of the Hugging Face hub, of TensorFlow or of TensorFlow.js.

    Args:
      path: file or folder. Its content decides on the format, not its name.
      ema: True for averaged weights, False for raw ones. None prefers raw ones from PyTorch, averaged ones from
        TensorFlow.
      classifier: another file, whose entries are added: that of the classifier, where `path` has the trunk alone.

    Raises:
      UserError: there is no such file, it is damaged, or it holds something other than a state dict.
    """
    found = _read_path(Path(path).expanduser(), ema)
    return found if classifier is None else _joined(found, _read_path(Path(classifier).expanduser(), ema), classifier)


def _joined(trunk: ForeignCheckpoint, classifier: ForeignCheckpoint, path: str | Path) -> ForeignCheckpoint:
    """Returns a checkpoint with the entries of two."""
    twice = sorted(trunk.tensors.keys() & classifier.tensors.keys())
    if twice:
        raise UserError(
            f"{printable(path)} has {len(twice)} entries that the source has too, the first of them "
            f"{shortened(twice[0])}: give the file of the classifier alone."
        )
    notes = [*trunk.notes, *(f"{note} (classifier)" for note in classifier.notes)]
    return replace(trunk, tensors={**trunk.tensors, **classifier.tensors}, notes=notes)


def _read_path(path: Path, ema: bool | None) -> ForeignCheckpoint:
    """Reads a file or a folder."""
    try:
        if tensorflow.is_checkpoint(path):
            return ForeignCheckpoint(*tensorflow.read_checkpoint(path, ema=ema), kind="tensorflow")
        if (path / tfjs.NAME).is_file() or (path.name == tfjs.NAME and path.is_file()):
            return _of_network(tfjs.read_tfjs(path / tfjs.NAME if path.is_dir() else path), "tfjs", ema, path)
        if path.is_dir():
            return _read_repository(path, ema)
        return _read_shards(path, ema) if path.name.endswith(".index.json") else _read_file(path, ema)
    except OSError as error:
        raise UserError(f"{printable(path)} cannot be read ({error.strerror or shortened(error)}).") from None


def _read_file(path: Path, ema: bool | None) -> ForeignCheckpoint:
    """Reads a single file of weights."""
    if not path.is_file():
        raise UserError(
            f"there is no checkpoint {printable(path)}: give a file, a folder or the name of a published one."
        )
    with path.open("rb") as file:
        start = file.read(9)
    # Safetensors come first, because the length of their header may begin with the byte that a pickle begins with.
    if path.suffix == ".safetensors" or start[5:] == b"\0\0\0{":
        return ForeignCheckpoint(*_find_state_dict(read_safetensors(path), ema, path), kind="safetensors")
    if start[:4] == b"PK\x03\x04" or start[:1] == b"\x80":
        return ForeignCheckpoint(*_find_state_dict(read_torch(path), ema, path), kind="torch")
    if start[4:8] == tflite.MARK:
        return _of_network(tflite.read_tflite(path), "tflite", ema, path)
    if path.suffix == ".onnx" or start[:1] == b"\x08":  # the first field of ONNX is its version
        return _of_network(read_onnx(path), "onnx", ema, path)
    raise UserError(
        f"{path} is no checkpoint: it is damaged, or neither safetensors, a file of torch.save, TFLite nor ONNX."
    )


def _of_network(network: Network, kind: str, ema: bool | None, path: Path) -> ForeignCheckpoint:
    """Returns what a program's file holds as a checkpoint."""
    if ema:
        raise UserError(f"{path} has no averaged weights: leave --ema out.")
    return ForeignCheckpoint(network.tensors, "raw", kind, {}, network.name, network.image_size, tuple(network.notes))


def _read_repository(folder: Path, ema: bool | None) -> ForeignCheckpoint:
    """Reads weights and config from the folder of a Hugging Face repository, or from its entry in the cache."""
    if (folder / "refs" / "main").is_file():  # an entry of the hub's cache, which keeps each version in its own folder
        folder = _snapshot(folder)
    config = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    weights = next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)
    if weights is None:
        found = [path for path in sorted(folder.iterdir()) if path.suffix in (".safetensors", ".pth", ".bin", ".tar")]
        if len(found) > 1:
            raise UserError(f"{folder} has {len(found)} files of weights: name one of them.")
        if not found:
            raise UserError(f"there is no checkpoint in {folder}: give the folder of a run, or a file of weights.")
        weights = found[0]
    source = _read_shards(weights, ema) if weights.name.endswith(".index.json") else _read_file(weights, ema)
    return replace(source, config=config)


def _snapshot(entry: Path) -> Path:
    """Returns the folder of the version that an entry of the hub's cache names as its newest."""
    with (entry / "refs" / "main").open("rb") as file:
        version = file.read(100).decode(errors="replace").strip()
    folder = entry / "snapshots" / version
    if not is_beside(version) or not folder.is_dir():
        raise UserError(
            f"{entry} names the version {shortened(version)!r}, but {entry / 'snapshots'} has no such folder: download "
            "it again, or give a folder in there."
        )
    return folder


def _read_shards(index: Path, ema: bool | None) -> ForeignCheckpoint:
    """Reads the files that an index names. Each must hold exactly the entries that the index gives for it."""
    names_in: dict[str, set[str]] = {}
    for name, file in shards_of(index).items():
        names_in.setdefault(file, set()).add(name)
    tensors: dict[str, Any] = {}
    kind = ""
    for file, wanted in sorted(names_in.items()):
        shard = _read_file(index.parent / file, ema)
        kind = shard.kind
        if set(shard.tensors) != wanted:
            differing = sorted(wanted ^ set(shard.tensors))
            raise UserError(
                f"the shard {shortened(file)} and the index {index} do not agree on {len(differing)} entries, the "
                f"first of them {shortened(differing[0])}: get both again."
            )
        tensors |= shard.tensors
    return ForeignCheckpoint(tensors, "ema" if ema else "raw", kind)


def shards_of(index: Path) -> dict[str, str]:
    """Returns the name of the file for each entry of an index."""
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not names or not all(isinstance(file, str) for file in names.values()):
        raise UserError(f"{index} is no index of shards: it has no 'weight_map' from entries to files.")
    elsewhere = next((file for file in names.values() if not is_beside(file) or file.endswith(".json")), None)
    if elsewhere is not None:
        raise UserError(f"{index} names the shard {shortened(elsewhere)}, which is not beside it, or holds no weights.")
    return names


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
            what = ", ".join(shortened(repr(key), 40) for key in list(content)[:5]) or "nothing"
        raise UserError(f"{path} holds no state dict but {what}: give a file with 'state_dict' or 'model'.")
    if not all(isinstance(key, str) for key in content):
        raise UserError(f"{path} has entries without a name: give a file with a state dict.")
    return content, weights


def _has_any(value: Any, keys: Iterable[str]) -> bool:
    return isinstance(value, Mapping) and any(key in value for key in keys)
