"""MobileNetV1 in the files of TensorFlow's programs for phones and browsers: names, classes and folded norms.

A batch norm that was folded into the convolution before it left its scale in the kernel and its shift in a bias. A
model of ours has the norm, so it gets one that only adds the bias: scale 1, mean 0 and the variance 1 - epsilon.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from maxmap.backbones import mobilenet
from maxmap.backbones.mobilenet import MobileNetV1
from maxmap.convert.torch import as_array
from maxmap.models import Classifier

BACKGROUND_CLASSES = 1001  # of TensorFlow's networks for ImageNet, whose first class is no class of ImageNet's
_EPSILON = 1e-3  # TensorFlow's
_LARGEST_EPSILON = 1e-2  # that networks have; a variance further from 1 was learned


@dataclass
class Network:
    """What a file holds.

    Attributes:
      tensors: by name.
      name: of the model, if the file says it.
      image_size: of the input, if the file says it.
      notes: what was done to the values, a phrase each.
    """

    tensors: dict[str, np.ndarray] = field(default_factory=dict)
    name: str | None = None
    image_size: int | None = None
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Convolution:
    """A convolution of a network file.

    Attributes:
      weight: `[O, I / groups, kh, kw]`.
      bias: `[O]`.
      stride: of both axes.
      depthwise: one group for each channel.
    """

    weight: np.ndarray
    bias: np.ndarray
    stride: int
    depthwise: bool

    def describe(self) -> str:
        """Returns a phrase for messages."""
        return _describe(self.weight.shape[-1], self.stride, self.depthwise)


def _describe(size: int, stride: int, depthwise: bool) -> str:
    return f"a {'depthwise ' * depthwise}{size}x{size} convolution of stride {stride}"


def trunk_layers() -> Iterator[tuple[str, int, int, bool]]:
    """Yields name, kernel size, stride and whether it is depthwise of each convolution of MobileNetV1's trunk."""
    yield "layers.0.0.0", 3, 2, False
    for stage, depth in enumerate(MobileNetV1.depths):
        for unit in range(depth):
            name = f"layers.{stage}.{unit if stage else unit + 1}"
            yield f"{name}.0", 3, 2 if stage and not unit else 1, True
            yield f"{name}.3", 1, 1, False


TRUNK = tuple(trunk_layers())


def name_trunk(convolutions: Sequence[Convolution]) -> dict[str, np.ndarray]:
    """Returns the state dict of MobileNetV1's trunk under canonical names.

    Args:
      convolutions: in the order in which they run.

    Raises:
      ValueError: a phrase that says which convolution is not MobileNetV1's.
    """
    tensors = {}
    for index, (name, size, stride, depthwise) in enumerate(TRUNK):
        wanted = _describe(size, stride, depthwise)
        if index >= len(convolutions):
            raise ValueError(f"it has {len(convolutions)} convolutions in front of the pooling, not {len(TRUNK)}")
        found = convolutions[index]
        if found.weight.shape[2:] != (size, size) or (found.stride, found.depthwise) != (stride, depthwise):
            raise ValueError(f"its convolution {index + 1} is {found.describe()}, not {wanted}")
        tensors[f"{name}.weight"] = found.weight
        norm = f"{name[:-1]}{int(name[-1]) + 1}"
        tensors |= {f"{norm}.{key}": value for key, value in _identity_norm(found.bias).items()}
    if len(convolutions) > len(TRUNK):
        raise ValueError(f"it has {len(convolutions)} convolutions in front of the pooling, not {len(TRUNK)}")
    return tensors


def name_classifier(weight: np.ndarray, bias: np.ndarray) -> tuple[dict[str, np.ndarray], list[str]]:
    """Returns the classifier under canonical names, without the class "background", and what was done to it.

    Args:
      weight: `[K, C]`.
      bias: `[K]`.
    """
    notes = []
    if len(weight) == BACKGROUND_CLASSES:
        weight, bias = weight[1:], bias[1:]
        notes.append(f"left out the first of {BACKGROUND_CLASSES:,} classes, background: the others are ImageNet's")
    return {"fc.2.weight": weight, "fc.2.bias": bias}, notes


def _identity_norm(bias: np.ndarray) -> dict[str, np.ndarray]:
    return {
        "weight": np.ones_like(bias),
        "bias": bias,
        "running_mean": np.zeros_like(bias),
        "running_var": np.full_like(bias, 1 - _EPSILON),
    }


def tensorflow_name(stem_width: int) -> str | None:
    """Returns the name of the TensorFlow model with a stem of this width; None if there is none."""
    variants = ((name, variant.fields) for name, variant in mobilenet.VARIANTS.items() if name.endswith("_tf"))
    return next((name for name, fields in variants if fields["stem_width"] == stem_width), None)


def identity_variances(tensors: Mapping[str, Any], model: Classifier) -> dict[str, np.ndarray]:
    """Returns new variances for norms of MobileNetV1 that stand for folded ones under another epsilon than the model's.

    Such a norm has the scale 1, the mean 0 and one variance a little below 1 for all channels. It changes nothing under
    the epsilon that it was written for, and under the model's with the variance that is returned.

    Args:
      tensors: of a state dict, under any names.
      model: of any backbone; for another than MobileNetV1 there is nothing to change.
    """
    changed: dict[str, np.ndarray] = {}
    if not isinstance(model.backbone, MobileNetV1):
        return changed
    epsilon = model.backbone.epsilon
    for key in tensors:
        stem = key.removesuffix("running_var")
        if stem == key or not {f"{stem}weight", f"{stem}running_mean"} <= tensors.keys():
            continue
        variance, scale, mean = (
            as_array(tensors[f"{stem}{leaf}"]) for leaf in ("running_var", "weight", "running_mean")
        )
        if variance.dtype.kind != "f" or not variance.size:
            continue
        written_for = 1 - float(variance.flat[0])
        is_identity = np.all(variance == variance.flat[0]) and np.all(scale == 1) and np.all(mean == 0)
        if is_identity and 0 < written_for < _LARGEST_EPSILON and abs(written_for - epsilon) > 1e-6:
            changed[key] = np.full_like(variance, 1 - epsilon)
    return changed


def dequantised(stored: np.ndarray, scale: np.ndarray, zero: np.ndarray, axis: int) -> np.ndarray:
    """Returns (stored - zero) * scale in float32.

    Args:
      stored: integers.
      scale: one, or one for each entry of the axis.
      zero: integers, as many as scales.
      axis: that several scales belong to.
    """
    aligned = [1] * stored.ndim
    if scale.size > 1:
        aligned[axis] = scale.size
    with np.errstate(all="ignore"):  # what is not finite is refused later, with its name
        shifted = stored.astype(np.int64) - zero.astype(np.int64).reshape(aligned)
        return shifted.astype(np.float32) * scale.astype(np.float32).reshape(aligned)


def dequantisation_note(counts: Mapping[str, int]) -> list[str]:
    """Returns the phrase that says how many entries of which integer types became float32, in a list; [] for none."""
    if not counts:
        return []
    of = ", ".join(f"{count} of {dtype}" for dtype, count in counts.items())
    return [f"dequantised {sum(counts.values())} entries by their scales: {of}"]
