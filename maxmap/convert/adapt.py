"""Changing what was trained: other classes, another image size, other channels, another head on the same backbone.

One function for converted files and for `init_from`; whatever it does to a leaf, it says.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from maxmap.convert.torch import LeafPath, LeafShapes, image_kernel, leaf_shapes, raise_faults, torch_name
from maxmap.errors import UserError
from maxmap.models import Classifier

RESIZES = ("bicubic", "bilinear", "geometric")
_TABLES = ("relative_position_bias_table", "pos_embed")
_PROBE_CLASSES = 10_007  # a number of classes that is no other size in any model
_TRACED: dict[str, LeafShapes] = {}  # the last one: a conversion needs it for the source and for the model
_SHOWN = 4  # names of a kind that the summary shows


@dataclass
class LoadReport:
    """What was done to the leaves, by canonical name; its text is the summary to print.

    Attributes:
      loaded: as they were.
      changed: with what was done to them.
      dropped: of the source, that the model has no use for.
      initialised: that the source does not have.
    """

    loaded: list[str] = field(default_factory=list)
    changed: dict[str, str] = field(default_factory=dict)
    dropped: list[str] = field(default_factory=list)
    initialised: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        by_change: dict[str, list[str]] = {}
        for name, change in self.changed.items():
            by_change.setdefault(change, []).append(name)
        groups = {"dropped": self.dropped} | by_change | {"initialised": self.initialised}
        lines = [f"loaded {len(self.loaded)} entries as they were"]
        for what, names in groups.items():
            more = [f"and {len(names) - _SHOWN} more"] if len(names) > _SHOWN else []
            lines += [f"{what} {len(names)}: {', '.join([*names[:_SHOWN], *more])}"] * bool(names)
        return "\n".join(lines)


def adapt(
    source: Mapping[LeafPath, np.ndarray],
    model: Classifier,
    faults: Iterable[str] = (),
    *,
    in_channels: int | None = None,
    resize: str = "bicubic",
    class_map: Sequence[int] | None = None,
    other_head: bool = False,
    seed: int = 0,
) -> tuple[dict[LeafPath, np.ndarray], LoadReport]:
    """Fits leaves to a model with other classes, image size or channels.

    A classifier for another number of classes is initialised, unless there is a class map. Position tables are
    resized; what models compute from an MLP of the offset needs nothing. The kernel that reads the images is summed
    over the colours for one channel, else repeated and scaled by 3 / channels.

    Args:
      source: leaves by path, in any floating-point type.
      model: that they shall fit.
      faults: of reading the source, to be raised with those found here.
      in_channels: of the images; None for those of the source.
      resize: "bicubic" (as timm resizes position embeddings, and tables of offsets in its simple way), "bilinear" (as
        the official TensorFlow code) or "geometric" (as timm resizes tables of offsets when it loads a checkpoint).
      class_map: for every class of the model the class of the source that it is, -1 for the mean of all.
      other_head: where source and model have no leaf of the head in common, the model's head is initialised.
      seed: of what is initialised.

    Returns:
      The model's leaves by path, in float32, as views of the source where nothing changes; and what was done.

    Raises:
      UserError: names everything that does not fit and may not be changed.
    """
    if resize not in RESIZES:
        raise UserError(f"there is no resize '{resize}', only {', '.join(RESIZES)}.")
    shapes, classifier = trace_shapes(model)
    stem = image_kernel(shapes)
    if stem is not None and stem in source:
        channels = source[stem].shape[2] if in_channels is None else in_channels
        shape = (*shapes[stem].shape[:2], channels, shapes[stem].shape[3])
        shapes = {**shapes, stem: jax.ShapeDtypeStruct(shape, shapes[stem].dtype)}
    heads = [{path for path in leaves if path[1] == "head"} for leaves in (source, shapes)]
    new_head = other_head and heads[0].isdisjoint(heads[1])
    # Of a source without a classifier more may be missing than what has the classes for a size.
    headless = classifier.isdisjoint(source) and bool(classifier & shapes.keys())
    extra = shapes.keys() - leaf_shapes(with_classes(model, 0)).keys() if headless else set()
    report, all_faults = LoadReport(), list(faults)
    leaves: dict[LeafPath, np.ndarray] = {}
    for path, wanted in shapes.items():
        name, shape, value = torch_name(path, model), wanted.shape, source.get(path)
        if value is None:
            if (new_head and path in heads[1]) or path in extra:
                report.initialised.append(name)
            else:
                all_faults.append(f"missing: {name}")
            continue
        fits = value.shape[:-1] == shape[:-1]
        if value.shape == shape and not (class_map and path in classifier):
            report.loaded.append(name)
            leaves[path] = value
        elif path in classifier and fits and not class_map:
            report.dropped.append(name)
            report.initialised.append(name)
        elif path in classifier and fits and class_map:
            report.changed[name] = f"mapped from {value.shape[-1]} to {shape[-1]} classes"
            leaves[path] = _map_classes(value, class_map, shape[-1])
        elif path == stem and value.shape[:2] + value.shape[3:] == shape[:2] + shape[3:]:
            report.changed[name] = f"changed from {value.shape[2]} to {shape[2]} channels"
            leaves[path] = _change_channels(value, shape[2])
        elif path[-1] in _TABLES and (resized := _resize_table(value, path[-1], shape, resize)) is not None:
            report.changed[name] = f"resized ({resize}) from {_sizes(value.shape)} to {_sizes(shape)}"
            leaves[path] = resized
        else:
            all_faults.append(f"misshapen: {name} is {value.shape}, the model has {shape}")
    for path in source.keys() - shapes.keys():
        name = torch_name(path, model)
        if path in classifier or (new_head and path in heads[0]):
            report.dropped.append(name)
        else:
            all_faults.append(f"left over: {name}")
    raise_faults(all_faults)
    leaves = {path: _float32(value) for path, value in leaves.items()}
    return leaves | _initialise(model, [path for path in shapes if path not in leaves], seed), report


def trace_shapes(model: Classifier) -> tuple[LeafShapes, set[LeafPath]]:
    """Returns the shapes of a model's leaves, and which of them the number of classes decides on."""
    classes = model.head.num_classes
    with_mark = with_classes(model, _PROBE_CLASSES)
    key = repr(with_mark)  # Flax modules have no hash
    if key not in _TRACED:
        _TRACED.clear()
        _TRACED[key] = leaf_shapes(with_mark)
    marked = _TRACED[key]
    if not classes:
        shapes = leaf_shapes(model)
        return shapes, marked.keys() - shapes.keys()
    classifier = {path for path, leaf in marked.items() if leaf.shape[-1:] == (_PROBE_CLASSES,)}
    return {
        path: jax.ShapeDtypeStruct((*leaf.shape[:-1], classes), leaf.dtype) if path in classifier else leaf
        for path, leaf in marked.items()
    }, classifier


def with_classes(model: Classifier, num_classes: int) -> Classifier:
    """Returns a model with another number of classes."""
    return model.clone(head=model.head.clone(num_classes=num_classes))


def _float32(value: np.ndarray) -> np.ndarray:
    return value if value.dtype == np.float32 else value.astype(np.float32)


def _initialise(model: Classifier, paths: Sequence[LeafPath], seed: int) -> dict[LeafPath, np.ndarray]:
    """Initialises leaves of the head."""
    if not paths:
        return {}
    size = model.backbone.image_size
    height, width = (size, size) if isinstance(size, int) else size
    images = jax.ShapeDtypeStruct((1, height, width, 3), jnp.float32)
    features, _ = jax.eval_shape(model.backbone.init_with_output, jax.random.key(0), images)

    def initialise(key: jax.Array) -> dict[LeafPath, jax.Array]:
        variables = model.head.init(key, [jnp.zeros(leaf.shape) for leaf in features])
        flat = traverse_util.flatten_dict(variables)
        return {path: flat[path[:1] + path[2:]] for path in paths}

    return jax.tree.map(np.asarray, dict(jax.jit(initialise)(jax.random.key(seed))))


def _map_classes(value: np.ndarray, class_map: Sequence[int], classes: int) -> np.ndarray:
    chosen = np.asarray(class_map)
    if chosen.shape != (classes,) or chosen.min() < -1 or chosen.max() >= value.shape[-1]:
        raise UserError(
            f"the class map has {chosen.size} numbers from {chosen.min()} to {chosen.max()}: give {classes}, one for "
            f"each class of the model, from 0 to {value.shape[-1] - 1}, or -1 for the mean of all."
        )
    value = _float32(value)
    return np.where(chosen == -1, value.mean(-1, keepdims=True), value[..., chosen])


def _change_channels(kernel: np.ndarray, channels: int) -> np.ndarray:
    """The rule of timm: one channel is the sum of the colours, more are the colours in turn at 3 / channels."""
    kernel = _float32(kernel)
    if channels == 1:
        return kernel.sum(2, keepdims=True)
    count = kernel.shape[2]
    return kernel[:, :, np.arange(channels) % count] * np.float32(count / channels)


def _resize_table(value: np.ndarray, kind: str, shape: Sequence[int], resize: str) -> np.ndarray | None:
    """Resizes a position table to another shape; None if that cannot be.

    Offsets are `[heads, H, W]` or `[H * W, heads]`, positions `[1, H, W, C]` or `[1, tokens + H * W, C]`. Where height
    and width are not in the shape they are equal, and the tokens are what is too many for a square.
    """
    if value.ndim != len(shape):
        return None
    value = _float32(value)
    if kind == "pos_embed" and value.ndim == 4 and value.shape[3] == shape[3]:
        return _resize_map(value, shape[1:3], resize, antialias=True)
    if kind == "pos_embed" and value.ndim == 3 and value.shape[2] == shape[2]:
        (old, tokens), (new, new_tokens) = _square(value.shape[1]), _square(shape[1])
        grid = value[:, tokens:].reshape(1, old, old, -1)
        resized = _resize_map(grid, (new, new), resize, antialias=True).reshape(1, new**2, -1)
        return np.concatenate([value[:, :tokens], resized], axis=1) if tokens == new_tokens else None
    if kind == "relative_position_bias_table" and value.ndim == 3 and value.shape[0] == shape[0]:
        return _resize_map(value[..., None], shape[1:], resize, antialias=False)[..., 0]
    if kind == "relative_position_bias_table" and value.ndim == 2 and value.shape[1] == shape[1]:
        (old, rest), (new, new_rest) = _square(value.shape[0]), _square(shape[0])
        if not rest and not new_rest:
            grid = value.reshape(1, old, old, -1)
            return _resize_map(grid, (new, new), resize, antialias=False).reshape(shape)
    return None


def _square(count: int) -> tuple[int, int]:
    """The side of the largest square of at most `count` pixels, and how many are left."""
    side = math.isqrt(count)
    return side, count - side**2


def _sizes(shape: Sequence[int]) -> str:
    """The part of a table's shape that is resized."""
    if len(shape) == 2 or (len(shape) == 3 and shape[0] == 1):
        return "{0}x{0}".format(_square(shape[0] if len(shape) == 2 else shape[1])[0])
    return f"{shape[1]}x{shape[2]}"


def _resize_map(maps: np.ndarray, size: Sequence[int], resize: str, antialias: bool) -> np.ndarray:
    """Resizes maps `[B, H, W, C]`; computes in float64."""
    rows, columns = (_matrix(old, new, resize, antialias) for old, new in zip(maps.shape[1:3], size, strict=True))
    return np.einsum("oh,bhwc,pw->bopc", rows, maps, columns, optimize=True).astype(np.float32)


def _matrix(old: int, new: int, resize: str, antialias: bool) -> np.ndarray:
    """Weights `[new, old]` of an interpolation along one axis, half-pixel centres.

    Cubic interpolation is Keys' with a = -0.5 where it is antialiased and -0.75 where not, which are PyTorch's two.
    Antialiasing widens the kernel where the map shrinks and leaves out what lies beyond the edge; otherwise the edge is
    repeated.
    """
    if resize == "geometric":
        return _geometric(old, new)
    scale = old / new
    antialias = antialias and resize == "bicubic"
    stretch = max(scale, 1) if antialias else 1.0
    reach = (2 if resize == "bicubic" else 1) * stretch
    centres = (np.arange(new) + 0.5) * scale - 0.5
    taps = np.floor(centres)[:, None] + np.arange(-math.ceil(reach), math.ceil(reach) + 1)
    distance = np.abs(taps - centres[:, None]) / stretch
    weights = np.maximum(1 - distance, 0) if resize == "bilinear" else _cubic(distance, -0.5 if antialias else -0.75)
    if antialias:
        weights = np.where((taps >= 0) & (taps < old), weights, 0)
        weights /= weights.sum(1, keepdims=True)
    matrix = np.zeros((new, old))
    np.add.at(matrix, (np.arange(new)[:, None], np.clip(taps, 0, old - 1).astype(int)), weights)
    return matrix


def _cubic(x: np.ndarray, a: float) -> np.ndarray:
    """Keys' cubic kernel (1981), of distances."""
    near = ((a + 2) * x - (a + 3)) * x**2 + 1
    far = a * (((x - 5) * x + 8) * x - 4)
    return np.where(x <= 1, near, np.where(x < 2, far, 0))


def _geometric(old: int, new: int) -> np.ndarray:
    """Linear interpolation from offsets whose distances grow geometrically to offsets in steps of one.

    The ratio is the one in (1.01, 1.5) that makes the outermost offset come out at `new // 2`; found by bisection to
    1e-6, of which the last midpoint counts, as in timm. Beyond the ends the outermost value holds.
    """
    low, high = 1.01, 1.5
    while high - low > 1e-6:
        ratio = (low + high) / 2
        low, high = (low, ratio) if sum(ratio**i for i in range(old // 2)) > new // 2 else (ratio, high)
    steps = np.cumsum([0.0, *(ratio**i for i in range(old // 2))])
    known = np.concatenate([-steps[:0:-1], steps])
    wanted = np.arange(-(new // 2), new // 2 + 1)
    return np.stack([np.interp(wanted, known, one) for one in np.eye(old)], axis=1)
