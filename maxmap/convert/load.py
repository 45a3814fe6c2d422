"""Foreign checkpoints as models: from a name or a file to variables and to a checkpoint of ours, and back."""

import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from flax import traverse_util
from safetensors import SafetensorError
from safetensors.numpy import save_file

from maxmap import checkpoint, storage, tasks, wordnet
from maxmap.classes import require_distinct
from maxmap.convert import hub
from maxmap.convert.adapt import LoadReport, adapt, trace_shapes, with_classes
from maxmap.convert.buffers import buffers
from maxmap.convert.mobilenet import identity_variances
from maxmap.convert.sources import ForeignCheckpoint, read_source
from maxmap.convert.torch import as_array, image_kernels, match_entries, read_entries, to_torch, torch_name
from maxmap.convert.wrappers import KeyMatch, leave_out
from maxmap.data.preprocessing import changed, in_words, of_channels
from maxmap.errors import UserError, nearest, shortened
from maxmap.models import MODELS, Classifier, classifies_pixels, create_model
from maxmap.ranges import Count, CountOrZero, Pixels

# Microsoft's order of 21,841 classes is not released, and its map to 1,000 (Swin's map22kto1k.txt) fits no known one.
_OWN_ORDERS = {("microsoft", 21841)}


@dataclass(frozen=True)
class ConvertedModel:
    """A foreign checkpoint, converted for one of our models.

    Attributes:
      model: the model.
      variables: its variables as NumPy arrays, which may lie in the mapped file.
      info: what our checkpoints store about themselves: 'model', 'classes', 'preprocessing', 'weights', 'source'.
      report: what happened to each entry.
      assumed: what neither the source nor the user says of the preprocessing, in words; empty for nothing.
    """

    model: Classifier
    variables: dict[str, Any]
    info: dict[str, Any]
    report: LoadReport
    assumed: str = ""


def read_model(path: str | Path, *, ema: bool = True) -> tuple[dict[str, Any], dict[str, Any]]:
    """Reads a model from one of our checkpoints or from a foreign one.

    Args:
      path: folder of a run or of a converted checkpoint; else the name of a published checkpoint ('map_pit_s',
        'timm/maxvit_tiny_tf_224.in1k') or of a repository on the Hugging Face hub, or its folder.
      ema: take the averaged variables if there are any.

    Returns:
      The variables as NumPy arrays, and the info with 'step' and 'weights' ("ema" or "raw").

    Raises:
      UserError: there is no such checkpoint, or it does not fit the model that it names.
    """
    if storage.in_bucket(path):
        return checkpoint.read_variables(path, ema=ema)
    path = storage.expand(path)
    exists = os.path.exists(path)  # unlike Path.exists, it is False for a name that cannot be
    if not exists:
        _check_name(str(path))
    # The name of a repository may start with hf://, which looks like the scheme of a bucket's path.
    if (exists or not hub.is_name(path)) and (not exists or checkpoint.read_info(path) is not None):
        return checkpoint.read_variables(path, ema=ema)
    converted = read_foreign(path)
    return converted.variables, {**converted.info, "step": 0}


def read_foreign(
    source: str | Path,
    *,
    name: str | None = None,
    head: str | None = None,
    ema: bool | None = None,
    num_classes: CountOrZero | None = None,
    image_size: Pixels | None = None,
    in_channels: Count | None = None,
    resize: str | None = None,
    class_map: Sequence[int] | None = None,
    classes: Sequence[str] | None = None,
    ignore: Sequence[str] = (),
    preprocessing: Mapping[str, Any] | None = None,
    classifier: str | Path | None = None,
) -> ConvertedModel:
    """Reads a checkpoint of PyTorch, safetensors, TensorFlow, TFLite, TensorFlow.js or ONNX into one of our models.

    Args:
      source: file or folder, here or in a bucket (gs://, s3://), or the name of a published checkpoint.
      name: of the model; None if the source names it (a published name, a config.json, TensorFlow's MobileNetV1).
      head: of the model, a key of `HEADS` or `PIXEL_HEADS`; None for the one that the source or the name gives.
      ema: averaged weights; see `read_source`.
      num_classes: of the model; None for as many as the source has. Where the classes of both are ImageNet's, each
        keeps its weights; see `maxmap.wordnet.rows`.
      image_size: of the model; None for the size that the source or the model's name gives.
      in_channels: of the images; None for those of the source.
      resize: how position tables are resized; None for "bilinear" from TensorFlow, as its graph does, else "bicubic".
      class_map: see `adapt`.
      classes: names of the classes; None for those of the source.
      ignore: shell patterns of entries that are no part of the model; they are left out.
      preprocessing: fields of the preprocessing, in place of those that the source says or that are assumed; see
        `maxmap.data.preprocessing.changed`.
      classifier: see `read_source`.

    Raises:
      UserError: the source cannot be read, or does not fit.
    """
    found, row = _find_source(source, ema, classifier)
    name = name or row.get("model") or found.architecture or _architecture(found, source)
    said = hub.preprocessing_of(found.config) if _has_preprocessing(found) else row.get("preprocessing", {})
    given = changed({}, **(preprocessing or {}))
    own = _own_fields(found, source)
    fields = _sized(name, image_size or said.get("image_size") or found.image_size)
    if own and own["model"]["name"] == name:
        fields = {**own["model"], **({"image_size": image_size} if image_size else {})}
    fields |= {"head": head} if head else {}
    model = create_model(**fields | {"num_classes": 1})
    shapes, of_classes = trace_shapes(model)
    tensors = leave_out(found.tensors, ignore)
    variances = identity_variances(tensors, model)
    tensors |= variances
    match = match_entries(tensors, model, shapes)
    in_source = _count_classes(tensors, match, {torch_name(path, model) for path in of_classes})
    count = in_source if class_map is None else len(class_map)
    count = fields["num_classes"] = count if num_classes is None else num_classes
    names = list(classes) if classes else _class_names(found, count, match.naming.dialect)
    if class_map is None and count not in (0, in_source):
        class_map = wordnet.rows(names, _class_names(found, in_source, match.naming.dialect))
    entries, faults = read_entries(tensors, model, shapes, match)
    model = with_classes(model, fields["num_classes"])
    _check_classes(classes, fields["num_classes"])
    resize = resize or ("bilinear" if found.kind == "tensorflow" else "bicubic")
    leaves, report = adapt(
        entries, model, faults, match=match, in_channels=in_channels, resize=resize, class_map=class_map
    )
    report.prefix, report.ignored = match.prefix, [key for key in found.tensors if key not in tensors]
    usual, whose = (said, "") if said else hub.published_preprocessing(name, in_source, _side(model))
    preprocessing = usual | ({"image_size": image_size} if image_size else {}) | given
    dense = classifies_pixels(model)
    if dense:
        preprocessing |= {"crop_pct": 1.0, "crop_mode": "border"} | given
        report.notes.append("every pixel has a class, so the network sees images whole")
    for path in image_kernels(shapes)[:1]:
        for key in ("mean", "std"):
            preprocessing[key] = of_channels(preprocessing[key], leaves[path].shape[2], key)
    report.notes += found.notes
    for entry in (match.names[key] for key in variances):
        report.loaded.remove(entry)
        report.changed[entry] = "fitted to the model's epsilon, because the norm stands for a folded one,"
    info = {
        "model": fields,
        "classes": names,
        "preprocessing": preprocessing,
        "weights": own["weights"] if own else found.weights,
        "source": {"path": str(source), "kind": found.kind, "dialect": match.naming.dialect},
    }
    if dense:
        info["task"] = tasks.describe(tasks.Segmentation())
    sure = {"image_size", *given} | ({"crop_pct", "crop_mode"} if dense else set())
    assumed = {key: preprocessing[key] for key in usual if not said and key not in sure}
    return ConvertedModel(
        model,
        traverse_util.unflatten_dict(leaves),
        info,
        report,
        f"{in_words(assumed)}, as {whose}" if assumed else "",
    )


def _check_classes(classes: Sequence[str] | None, count: int) -> None:
    """Raises UserError unless the names that the user gives for the classes are distinct, and one for each class."""
    if classes and len(classes) != count:
        raise UserError(f"there are {len(classes)} names of {count} classes: give one for each.")
    if classes:
        require_distinct(classes, "the list of class names")


def _sized(name: str, size: int | None) -> dict[str, Any]:
    """Returns the fields of a model; the size of the images is one of them if it is not that of the name."""
    if size is None or create_model(name).backbone.image_size == size:
        return {"name": name}
    return {"name": name, "image_size": size}


def _side(model: Classifier) -> int:
    size = model.backbone.image_size
    return size if isinstance(size, int) else size[0]


def convert(source: str | Path, dest: str | Path, *, overwrite: bool = False, **options: Any) -> ConvertedModel:
    """Writes a foreign checkpoint as one of ours. The target appears complete or not at all.

    Args:
      source: see `read_foreign`.
      dest: folder to write, which `init_from`, `--mode=eval` and `predict` can read.
      overwrite: replace a checkpoint at `dest`.
      **options: see `read_foreign`.

    Raises:
      UserError: the source does not fit, or `dest` exists. Nothing was written.
    """
    if storage.in_bucket(dest):
        raise UserError(
            f"{dest} is in a bucket, where no folder can be renamed: convert to a local folder and copy that."
        )
    dest = Path(storage.expand(dest)).absolute()
    storage.recover(dest)
    if dest.exists() and not overwrite:
        raise UserError(f"{dest} is there already: give another folder, or --overwrite.")
    if dest.exists() and not (dest / checkpoint.FOLDER).is_dir():
        raise UserError(f"{dest} holds something other than a checkpoint: give another folder.")
    converted = read_foreign(source, **options)
    checkpoint.write_variables(dest, converted.variables, {**converted.info, "step": 0}, overwrite=overwrite)
    return converted


def export_target(file: str | Path, endings: Sequence[str], overwrite: bool) -> Path:
    """Returns the local file that an export is to write.

    Raises:
      UserError: it is in a bucket, has another ending, or is there and not to be replaced.
    """
    if storage.in_bucket(file):
        raise UserError(f"{file} is in a bucket: export to a local file and copy that.")
    file = Path(storage.expand(file))
    storage.recover(file)
    if file.suffix not in endings:
        known = " or ".join(filter(None, (", ".join(endings[:-1]), endings[-1])))
        raise UserError(f"{file} has no known ending: give a name in {known}.")
    if file.exists() and not overwrite:
        raise UserError(f"{file} is there already: give another name, or --overwrite.")
    return file


def read_weights(source: str | Path, ema: bool | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """Reads a checkpoint as `read_model` does; UserError if it has no averaged weights, and `ema` is True.

    Args:
      source: see `read_model`.
      ema: True for the averaged weights, False for the raw ones; None for the averaged ones if there are any.
    """
    variables, info = read_model(source, ema=ema is not False)
    if ema and info["weights"] != "ema":
        raise UserError(f"{source} has no averaged weights: leave --ema out.")
    return variables, info


def export(
    source: str | Path,
    file: str | Path,
    *,
    dialect: str | None = None,
    ema: bool | None = None,
    overwrite: bool = False,
) -> str:
    """Writes one of our checkpoints as .safetensors or by torch.save. The file appears complete or not at all.

    Args:
      source: see `read_model`.
      file: to write; its ending (.safetensors, .pth or .bin) gives the format.
      dialect: see `to_torch`.
      ema: True for the averaged weights, False for the raw ones; None for the averaged ones if there are any.
      overwrite: replace the file.

    Returns:
      A line of text that names the file, the names and the weights.

    Raises:
      UserError: there is no checkpoint, or the file exists or has another ending.
    """
    file = export_target(file, (".safetensors", ".pth", ".bin"), overwrite)
    variables, info = read_weights(source, ema)
    model = create_model(**info["model"])
    state_dict = to_torch(variables, model, dialect)
    if dialect is None:  # timm and the authors have these names too, and torch makes the counters itself
        state_dict |= buffers(state_dict, model)
    state_dict = {key: np.array(value, order="C") for key, value in state_dict.items()}
    if file.suffix == ".safetensors":
        with storage.atomic_target(file, overwrite=overwrite) as unfinished:
            try:
                save_file(state_dict, unfinished, metadata={"format": "pt"})
            except SafetensorError as error:
                raise UserError(f"cannot write {file} ({error}): make room there, or give another name.") from None
    else:
        try:
            import torch
        except ImportError:
            raise UserError(
                f"{file} can be written by PyTorch only: install the extra 'torch', or give a name in .safetensors."
            ) from None
        with storage.atomic_target(file, overwrite=overwrite) as unfinished:
            try:
                torch.save({key: torch.from_numpy(value) for key, value in state_dict.items()}, unfinished)
            except RuntimeError as error:  # what torch says of a full disk
                reason = str(error).partition("\n")[0]
                raise UserError(f"cannot write {file} ({reason}): make room there, or give another name.") from None
    return f"{file}: {len(state_dict)} entries, {dialect or 'canonical'} names, {info['weights']} weights"


def _find_source(
    source: str | Path, ema: bool | None, classifier: str | Path | None
) -> tuple[ForeignCheckpoint, Mapping[str, Any]]:
    """Reads a source, downloading a published one; also returns its row of `published`, empty for other sources."""
    if storage.in_bucket(source):
        return read_source(hub.download_bucket(str(source)), ema=ema, classifier=classifier), {}
    path = Path(storage.expand(source))
    exists = os.path.exists(path) or os.path.isfile(f"{path}.index")
    if not exists:
        _check_name(str(source))
    if exists or not hub.is_name(source):
        return read_source(path, ema=ema, classifier=classifier), {}
    found = read_source(hub.download(str(source)), ema=ema, classifier=classifier)
    return found, hub.published().get(hub.full_name(source), {})


def _check_name(name: str) -> None:
    """Raises UserError for a model's name, which does not say which of its published checkpoints is meant."""
    if name in MODELS and not hub.is_name(name):
        named = [full for full in hub.published() if full.partition("/")[2].partition(".")[0] == name]
        there = f"write {' or '.join(named)}" if named else "give the folder of a run or of a converted checkpoint"
        raise UserError(f"{name} is neither a folder nor the name of a published checkpoint: {there}.")


def _own_fields(found: ForeignCheckpoint, source: str | Path) -> Mapping[str, Any] | None:
    """Returns what the config.json of a repository says that `maxmap.push` wrote; None for others."""
    own = found.config.get("maxmap")
    if own is None:
        return None
    known = isinstance(own, Mapping) and isinstance(own.get("model"), Mapping) and own.get("weights") in ("ema", "raw")
    if not known or not isinstance(own["model"].get("name"), str) or not all(type(key) is str for key in own["model"]):
        raise UserError(f"'maxmap' in the config.json of {source} does not describe a model: get the file again.")
    depths = own["model"].get("depths", [])
    if not isinstance(depths, list) or sum(n for n in depths if type(n) is int) > len(found.tensors):
        raise UserError(f"the config.json of {source} names more blocks than the weights have: get the files again.")
    return own


def _has_preprocessing(found: ForeignCheckpoint) -> bool:
    return "pretrained_cfg" in found.config or "input_size" in found.config


def _architecture(found: ForeignCheckpoint, source: str | Path) -> str:
    """Returns the name of the model that the source's config gives."""
    key, name = "architecture", found.config.get("architecture")
    if name is None and isinstance(found.config.get("model"), Mapping):
        key, name = "model", found.config["model"].get("name")
    if name is None:
        raise UserError(f"{source} does not say which model it is of: give --model of 'maxmap list' to convert.")
    if not isinstance(name, str):
        raise UserError(f"'{key}' in the config.json of {source} is {shortened(name)}: give --model with a name.")
    if name not in MODELS:
        raise UserError(
            f"{source} is of the model {shortened(name)}, which maxmap does not have; the nearest are "
            f"{nearest(name, MODELS)}."
        )
    return name


def _count_classes(tensors: Mapping[str, Any], match: KeyMatch, classifier: Collection[str]) -> int:
    """Returns the number of classes of a state dict, read from the entries with these canonical names."""
    shapes = [as_array(tensors[key]).shape for key, name in match.names.items() if name in classifier]
    return max((int(shape[0]) for shape in shapes if shape), default=0)


def _class_names(found: ForeignCheckpoint, count: int, dialect: str) -> list[str]:
    """Returns the source's names of the classes, else the WordNet ids of ImageNet's set of this size, else numbers."""
    names, numbered = found.config.get("label_names"), found.config.get("id2label")
    if names is None and isinstance(numbered, Mapping):  # of transformers
        names = [numbered.get(str(number)) for number in range(len(numbered))]
    if isinstance(names, list) and len(names) == count == len({name for name in names if isinstance(name, str)}):
        return names
    known = None if (dialect, count) in _OWN_ORDERS else wordnet.classes(count)
    return known or [str(number) for number in range(count)]
