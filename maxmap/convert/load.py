"""Checkpoints of others as models: from a name or a file to variables, and to a checkpoint of our own."""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import util
from pathlib import Path
from typing import Any

import numpy as np
from flax import traverse_util
from safetensors import SafetensorError
from safetensors.numpy import save_file

from maxmap import checkpoint
from maxmap.convert import hub
from maxmap.convert.adapt import LoadReport, adapt, trace_shapes, with_classes
from maxmap.convert.sources import ForeignCheckpoint, read_source
from maxmap.convert.torch import canonical_names, detect_dialect, read_entries, to_torch, torch_name
from maxmap.errors import UserError, nearest
from maxmap.models import MODELS, Classifier, create_model


@dataclass(frozen=True)
class ConvertedModel:
    """A checkpoint of others that fits a model.

    Attributes:
      model: the model.
      variables: of it, as NumPy arrays that may lie in the mapped file.
      info: what a checkpoint of our own says of itself: 'model', 'classes', 'preprocessing', 'weights', 'source'.
      changes: what was done to the entries.
    """

    model: Classifier
    variables: dict[str, Any]
    info: dict[str, Any]
    report: LoadReport


def read_model(path: str | Path, *, ema: bool = True) -> tuple[dict[str, Any], dict[str, Any]]:
    """Reads a model, wherever it is.

    Args:
      path: folder of a run or of a converted checkpoint; else the name of a published checkpoint ('map_pit_s',
        'timm/maxvit_tiny_tf_224.in1k') or of a repository on the Hugging Face hub, or its folder.
      ema: the averaged variables where there are any, else the raw ones.

    Returns:
      The variables as NumPy arrays, and the info with 'step' and 'weights' ("ema" or "raw").

    Raises:
      UserError: there is no such checkpoint, or it does not fit the model that it is said to be of.
    """
    if checkpoint.in_bucket(path):
        return checkpoint.read_variables(path, ema=ema)
    there = Path(path).exists()
    # What names a repository is no path, though hf:// looks like the scheme of one.
    if (there or not hub.is_name(path)) and (not there or checkpoint.read_info(path) is not None):
        return checkpoint.read_variables(path, ema=ema)
    loaded = read_foreign(path)
    return loaded.variables, {**loaded.info, "step": 0}


def read_foreign(
    source: str | Path,
    *,
    name: str | None = None,
    ema: bool | None = None,
    num_classes: int | None = None,
    image_size: int | None = None,
    in_channels: int | None = None,
    resize: str | None = None,
    class_map: Sequence[int] | None = None,
    classes: Sequence[str] | None = None,
) -> ConvertedModel:
    """Reads a checkpoint of PyTorch, safetensors or TensorFlow into one of our models.

    Args:
      source: file or folder, or the name of a published checkpoint.
      name: of the model; None where the source says it (a published name, a config.json).
      ema: averaged weights; see `read_source`.
      num_classes: of the model; None for as many as the source has.
      image_size: that the model is for; None for the one that the source or the name is made for.
      in_channels: of the images; None for those of the source.
      resize: how position tables are resized; None for "bilinear" from TensorFlow, as its graph does, else "bicubic".
      class_map: see `adapt`.
      classes: names of the classes; None for those of the source.

    Raises:
      UserError: the source cannot be read, or does not fit.
    """
    row: Mapping[str, Any] = {}
    where = Path(source)
    if not where.exists() and not where.with_name(where.name + ".index").is_file() and hub.is_name(source):
        row = hub.published().get(str(source), {})
        where = hub.download(str(source))
    found = read_source(where, ema=ema)
    if name is None:
        name = row.get("model") or _architecture(found, source)
    preprocessing = None
    if "pretrained_cfg" in found.config or "input_size" in found.config:
        preprocessing = hub.preprocessing_of(found.config)
    elif row:
        preprocessing = row["preprocessing"]
    fields: dict[str, Any] = {"name": name}
    size = image_size or (preprocessing or {}).get("image_size")
    if size is not None and create_model(name).backbone.image_size != size:
        fields["image_size"] = size
    model = create_model(**fields, num_classes=1)
    shapes, classifier = trace_shapes(model)
    in_source = _classes_in(found, {torch_name(path, model): path for path in classifier})
    fields["num_classes"] = in_source if num_classes is None else num_classes
    if class_map is not None and num_classes is None:
        fields["num_classes"] = len(class_map)
    entries, faults = read_entries(found.tensors, model, shapes)
    model = with_classes(model, fields["num_classes"])
    resize = resize or ("bilinear" if found.kind == "tensorflow" else "bicubic")
    leaves, changes = adapt(entries, model, faults, in_channels=in_channels, resize=resize, class_map=class_map)
    if preprocessing is None:
        size = model.backbone.image_size
        size = size if isinstance(size, int) else size[0]
        preprocessing = hub.published_preprocessing(name, in_source, size)
    info = {
        "model": fields,
        "classes": list(classes or _class_names(found, fields["num_classes"])),
        "preprocessing": preprocessing | ({"image_size": image_size} if image_size else {}),
        "weights": found.weights,
        "source": {
            "path": str(source),
            "kind": found.kind,
            "dialect": detect_dialect(found.tensors),
        },
    }
    if len(info["classes"]) != fields["num_classes"]:
        raise UserError(
            f"there are {len(info['classes'])} names of {fields['num_classes']} classes: give one for each."
        )
    return ConvertedModel(model, traverse_util.unflatten_dict(leaves), info, changes)


def convert(source: str | Path, dest: str | Path, *, overwrite: bool = False, **options: Any) -> ConvertedModel:
    """Writes a checkpoint of others as one of our own, which appears whole or not at all.

    Args:
      source, **options: see `read_foreign`.
      dest: folder that `init_from`, `--mode=eval` and `predict` take.
      overwrite: replace what is there.

    Raises:
      UserError: the source does not fit, or `dest` is there; nothing was written.
    """
    if checkpoint.in_bucket(dest):
        raise UserError(f"{dest} is in a bucket, which has no folders to rename: convert to a folder, and copy that.")
    dest = Path(dest).absolute()
    if dest.exists() and not overwrite:
        raise UserError(f"{dest} is there already: give another folder, or --overwrite.")
    if dest.exists() and not (dest / checkpoint.FOLDER).is_dir():
        raise UserError(f"{dest} holds something other than a checkpoint: give another folder.")
    loaded = read_foreign(source, **options)
    unfinished, old = (dest.with_name(f".{dest.name}.{what}") for what in ("unfinished", "old"))
    try:
        for left in (unfinished, old):
            if left.exists():
                shutil.rmtree(left)
        checkpoint.write_variables(unfinished, loaded.variables, {**loaded.info, "step": 0})
        if dest.exists():
            dest.rename(old)
        unfinished.rename(dest)
    except OSError as error:
        raise UserError(f"cannot write {dest} ({error.strerror or error}).") from None
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)
    return loaded


def export(
    source: str | Path,
    file: str | Path,
    *,
    dialect: str | None = None,
    ema: bool | None = None,
    overwrite: bool = False,
) -> str:
    """Writes a checkpoint of ours as .safetensors, or by torch.save; the file appears whole or not at all.

    Args:
      source: see `read_model`.
      file: to write; its ending decides on the format.
      dialect: see `to_torch`.
      ema: the averaged weights, or the raw ones; None for the averaged ones where there are any.
      overwrite: replace the file.

    Returns:
      A line that says what was written.

    Raises:
      UserError: there is no checkpoint, or the file is there or of another format.
    """
    file = Path(file)
    if file.suffix not in (".safetensors", ".pth", ".bin"):
        raise UserError(f"{file} ends in none of .safetensors, .pth and .bin, which are the formats there are.")
    if file.exists() and not overwrite:
        raise UserError(f"{file} is there already: give another name, or --overwrite.")
    variables, info = read_model(source, ema=ema is not False)
    if ema and info["weights"] != "ema":
        raise UserError(f"{source} has no averaged weights: leave --ema out.")
    model = create_model(**info["model"])
    state_dict = {key: np.array(v, order="C") for key, v in to_torch(variables, model, dialect).items()}
    unfinished = file.with_name(f".{file.name}.unfinished")
    try:
        if file.suffix == ".safetensors":
            save_file(state_dict, unfinished, metadata={"format": "pt"})
        else:
            try:
                import torch
            except ImportError:
                raise UserError(
                    "only PyTorch writes such a file: install the extra 'torch', or name .safetensors."
                ) from None
            torch.save({key: torch.from_numpy(value) for key, value in state_dict.items()}, unfinished)
        unfinished.replace(file)
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot write {file} ({error}).") from None
    finally:
        unfinished.unlink(missing_ok=True)
    return f"{file}: {len(state_dict)} entries, {dialect or 'canonical'} names, {info['weights']} weights"


def _architecture(found: ForeignCheckpoint, source: str | Path) -> str:
    name = found.config.get("architecture") or found.config.get("model", {}).get("name")
    if name is None:
        raise UserError(f"{source} does not say which model it is of: give --model with a name of 'maxmap list'.")
    if name not in MODELS:
        raise UserError(
            f"{source} is of the model {name}, which is none here; the nearest are {nearest(name, MODELS)}."
        )
    return name


def _classes_in(found: ForeignCheckpoint, classifier: Mapping[str, Any]) -> int:
    """Counts the classes that a state dict is made for, by the entries that decide on them."""
    shapes = [found.tensors[key].shape for key, name in canonical_names(found.tensors).items() if name in classifier]
    return int(shapes[0][0]) if shapes and len(shapes[0]) else 0


def _class_names(found: ForeignCheckpoint, count: int) -> list[str]:
    """The names that the source has, else ImageNet's WordNet ids for a thousand classes, else numbers."""
    names = found.config.get("label_names")
    if isinstance(names, list) and len(names) == count:
        return [str(name) for name in names]
    package = util.find_spec("tensorflow_datasets")
    if count == 1000 and package is not None and package.submodule_search_locations:
        labels = Path(package.submodule_search_locations[0], "datasets", "imagenet2012", "labels.txt")
        if labels.is_file():
            return labels.read_text().split()
    return [str(number) for number in range(count)]
