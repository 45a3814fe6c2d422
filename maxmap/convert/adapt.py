"""Fits converted leaves to a model with other classes, another image size, other channels or another head.

Conversion and `init_from` both use `adapt`. Its report names every leaf that it changes, drops or initialises.
"""

import functools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from maxmap.convert.resize import RESIZED_LEAVES, RESIZES, resize_table, table_size, to_float32
from maxmap.convert.torch import (
    LeafPath,
    LeafShapes,
    image_kernels,
    leaf_shapes,
    raise_faults,
    require_whole,
    torch_name,
)
from maxmap.convert.wrappers import KeyMatch
from maxmap.errors import UserError
from maxmap.layers.primitives import pair
from maxmap.models import Classifier
from maxmap.runtime import jit_to_run_once
from maxmap.shapes import eval_shape_of_init

_PROBE_CLASSES = 10_007  # a size that no model has anywhere else, so it marks the leaves of the classifier
_SHOWN = 4  # names that the summary shows of each group


@dataclass
class LoadReport:
    """What happened to each leaf, by canonical name. Its text is a summary to print.

    Attributes:
      loaded: leaves that were taken without a change.
      changed: leaves that were changed, with the change in words.
      dropped: leaves of the source that the model does not have.
      initialised: leaves of the model that the source does not have.
      prefix: that was taken off the keys of a foreign source; empty for none.
      ignored: entries of a foreign source that were left out on request.
      notes: what was done to a foreign source while it was read, a phrase each.
    """

    loaded: list[str] = field(default_factory=list)
    changed: dict[str, str] = field(default_factory=dict)
    dropped: list[str] = field(default_factory=list)
    initialised: list[str] = field(default_factory=list)
    prefix: str = ""
    ignored: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        by_change: dict[str, list[str]] = {}
        for name, change in self.changed.items():
            by_change.setdefault(change, []).append(name)
        groups = {"dropped": self.dropped} | by_change
        groups |= {"initialised": self.initialised, "left out on request": self.ignored}
        lines = [f"loaded {len(self.loaded)} entries as they were"]
        lines += [f"took the prefix {self.prefix} off the names"] * bool(self.prefix)
        for what, names in groups.items():
            more = [f"and {len(names) - _SHOWN} more"] if len(names) > _SHOWN else []
            lines += [f"{what} {len(names)}: {', '.join([*names[:_SHOWN], *more])}"] * bool(names)
        return "\n".join([*self.notes, *lines])


def adapt(
    source: Mapping[LeafPath, np.ndarray],
    model: Classifier,
    faults: Iterable[str] = (),
    *,
    match: KeyMatch | None = None,
    in_channels: int | None = None,
    resize: str = "bicubic",
    class_map: Sequence[int] | None = None,
    other_classes: bool = False,
    other_head: bool = False,
    seed: int = 0,
) -> tuple[dict[LeafPath, np.ndarray], LoadReport]:
    """Fits leaves to a model with other classes, another image size or other channels.

    Args:
      source: leaves by path, in any floating-point type.
      model: that the leaves are fitted to.
      faults: faults found so far; the error lists them too.
      match: how the keys of a foreign source fit the model, for the error; None for one of ours.
      in_channels: channels of the images; None for those of the source.
      resize: "bicubic" (timm's way for position embeddings, and its simple way for tables of offsets), "bilinear" (the
        official TensorFlow code) or "geometric" (timm's way for tables of offsets when it loads a checkpoint).
      class_map: for each class of the model the number of one of the source, or -1 for the mean of all classes.
      other_classes: initialise the classifier even if source and model have the same number of classes.
      other_head: initialise the head if source and model have no leaf of it in common.
      seed: of the initialisation.

    Returns:
      The model's leaves by path, in float32, unchanged ones as views of the source; and the report.

    Raises:
      UserError: leaves are missing, left over, fused or of a shape that cannot be changed.
    """
    _check_resize(resize)
    if match is None:
        require_whole(source, model)
    shapes, classifier = trace_shapes(model)
    shapes, input_kernels = _set_channels(shapes, source, in_channels)
    optional, unwanted = _may_differ(source, model, shapes, classifier, other_head)
    class_maps, all_faults = dict.fromkeys(classifier, class_map), list(faults)
    report, leaves = LoadReport(), {}
    for path, leaf in shapes.items():
        name, value = torch_name(path, model), source.get(path)
        if value is None:
            report.initialised.append(name) if path in optional else all_faults.append(f"missing: {name}")
        elif value.shape == leaf.shape and not class_maps.get(path) and not (other_classes and path in classifier):
            report.loaded.append(name)
            leaves[path] = to_float32(value)
        elif path in classifier and _differ_in_classes(value.shape, leaf.shape) and not class_map:
            report.dropped.append(name)
            report.initialised.append(name)
        elif changed := _change(value, path, leaf.shape, path in input_kernels, class_maps.get(path), resize):
            leaves[path], report.changed[name] = changed
        else:
            all_faults.append(f"misshapen: {name} is {value.shape}, the model has {leaf.shape}")
    for path, name in [(path, torch_name(path, model)) for path in source if path not in shapes]:
        report.dropped.append(name) if path in unwanted else all_faults.append(f"left over: {name}")
    raise_faults(all_faults, match)
    return leaves | _initialise(model, [path for path in shapes if path not in leaves], seed), report


def _check_resize(resize: str) -> None:
    if resize not in RESIZES:
        raise UserError(f"there is no resize '{resize}', only {', '.join(RESIZES)}.")


def trace_shapes(model: Classifier) -> tuple[LeafShapes, set[LeafPath]]:
    """Returns the shapes of a model's leaves, and the paths of the leaves that depend on the number of classes.

    Args:
      model: without classes, the second result holds all leaves that it would have with classes only.
    """
    probed = leaf_shapes(with_classes(model, _PROBE_CLASSES))
    classes = model.head.num_classes
    if not classes:
        shapes = leaf_shapes(model)
        return shapes, probed.keys() - shapes.keys()
    classifier = {path for path, leaf in probed.items() if leaf.shape[-1:] == (_PROBE_CLASSES,)}
    return {
        path: jax.ShapeDtypeStruct((*leaf.shape[:-1], classes), leaf.dtype) if path in classifier else leaf
        for path, leaf in probed.items()
    }, classifier


def with_classes(model: Classifier, num_classes: int) -> Classifier:
    """Returns a model with another number of classes."""
    return model.clone(head=model.head.clone(num_classes=num_classes))


def _set_channels(
    shapes: LeafShapes, source: Mapping[LeafPath, np.ndarray], in_channels: int | None
) -> tuple[LeafShapes, list[LeafPath]]:
    """Returns the shapes for images of `in_channels` (None: as in the source), and the paths of the input kernels."""
    paths, changed = image_kernels(shapes), dict(shapes)
    for path in paths:
        if path in source and source[path].ndim == 4:
            height, width, _, features = shapes[path].shape
            channels = source[path].shape[2] if in_channels is None else in_channels
            changed[path] = jax.ShapeDtypeStruct((height, width, channels, features), shapes[path].dtype)
    return changed, paths


def _may_differ(
    source: Mapping[LeafPath, np.ndarray],
    model: Classifier,
    shapes: LeafShapes,
    classifier: set[LeafPath],
    other_head: bool,
) -> tuple[set[LeafPath], set[LeafPath]]:
    """Returns the leaves that the source may lack, and the leaves that the model may lack; see `adapt`."""
    old_head, head = ({path for path in paths if path[1] == "head"} for paths in (source, shapes))
    optional, unwanted = set(), set(classifier)
    if other_head and old_head.isdisjoint(head):
        optional, unwanted = head, unwanted | old_head
    auxiliary = {path for path in head if path[2] == "auxiliary_head"}  # which only training has
    if auxiliary.isdisjoint(source):
        optional = optional | auxiliary
    if classifier & shapes.keys() and classifier.isdisjoint(source):
        # Only a model with classes has these leaves: an MLP head has hidden layers before the classifier.
        optional = optional | (shapes.keys() - leaf_shapes(with_classes(model, 0)).keys())
    return optional, unwanted


def _change(
    value: np.ndarray,
    path: LeafPath,
    shape: tuple[int, ...],
    is_input_kernel: bool,
    class_map: Sequence[int] | None,
    resize: str,
) -> tuple[np.ndarray, str] | None:
    """Changes a leaf to another shape; returns it and the change in words, None if it may not be changed.

    Args:
      value: the leaf in the source.
      path: of the leaf.
      shape: in the model.
      is_input_kernel: whether the leaf is a kernel that reads the images.
      class_map: for leaves of the classifier, see `adapt`; None for others.
      resize: see `adapt`.
    """
    if class_map and _differ_in_classes(value.shape, shape):
        mapped = _map_classes(value, class_map, shape[-1])
        means = list(class_map).count(-1)
        others = f", {means} of them the mean of all" if means else ""
        return mapped, f"mapped from {value.shape[-1]} to {shape[-1]} classes{others}"
    if is_input_kernel and value.shape[:2] + value.shape[3:] == shape[:2] + shape[3:]:
        return _change_channels(value, shape[2]), f"changed from {value.shape[2]} to {shape[2]} channels"
    if path[-1] in RESIZED_LEAVES:
        resized = resize_table(value, path[-1], shape, resize)
        if resized is not None:
            size = functools.partial(table_size, path[-1])
            return resized, f"resized ({resize}) from {size(value.shape)} to {size(shape)}"
    return None


def _differ_in_classes(one: tuple[int, ...], other: tuple[int, ...]) -> bool:
    """Whether two shapes of a leaf of the classifier have at most another number of classes."""
    return len(one) == len(other) and one[:-1] == other[:-1]


def _initialise(model: Classifier, paths: Sequence[LeafPath], seed: int) -> dict[LeafPath, np.ndarray]:
    """Initialises leaves of the head."""
    if not paths:
        return {}
    height, width = pair(model.backbone.image_size)
    images = jax.ShapeDtypeStruct((1, height, width, 3), jnp.float32)
    features, _ = eval_shape_of_init(model.backbone.init_with_output, jax.random.key(0), images)

    def initialise(key: jax.Array) -> dict[LeafPath, jax.Array]:
        variables = model.head.init(key, [jnp.zeros(leaf.shape) for leaf in features])
        flat = traverse_util.flatten_dict(variables)
        return {path: flat[path[:1] + path[2:]] for path in paths}

    return jax.tree.map(np.asarray, dict(jit_to_run_once(initialise)(jax.random.key(seed))))


def _map_classes(value: np.ndarray, class_map: Sequence[int], classes: int) -> np.ndarray:
    chosen = np.asarray(class_map)
    if chosen.shape != (classes,) or chosen.min() < -1 or chosen.max() >= value.shape[-1]:
        raise UserError(
            f"the class map has {chosen.size} numbers from {chosen.min()} to {chosen.max()}: give {classes}, one for "
            f"each class of the model, from 0 to {value.shape[-1] - 1}, or -1 for the mean of all."
        )
    value = to_float32(value)
    return np.where(chosen == -1, value.mean(-1, keepdims=True), value[..., chosen])


def _change_channels(kernel: np.ndarray, channels: int) -> np.ndarray:
    """Changes the input channels by timm's rule.

    One channel takes the sum over the source's channels. Several channels repeat them in turn, scaled by their number
    divided by `channels`.
    """
    kernel = to_float32(kernel)
    if channels == 1:
        return kernel.sum(2, keepdims=True)
    count = kernel.shape[2]
    return kernel[:, :, np.arange(channels) % count] * np.float32(count / channels)
