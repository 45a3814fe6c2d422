"""For whoever builds on a model: which feature maps it has, and the output of any module by its name."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from maxmap.errors import UserError, nearest
from maxmap.layers.primitives import pair
from maxmap.models import Classifier
from maxmap.operations import Array, kernels


@dataclass(frozen=True)
class FeatureInfo:
    """One map of `model.apply(variables, images, method="features")`.

    Attributes:
      channels: of the map.
      stride: pixels of the image for one of the map, rounded.
      module: the module whose output the map is, for example "stages_2"; None if it is rearranged behind a module.
    """

    channels: int
    stride: int
    module: str | None


def feature_info(model: Classifier) -> list[FeatureInfo]:
    """Describes the feature maps of a model at its own image size; it traces the model and computes nothing."""
    height, width = pair(model.backbone.image_size)
    makers: dict[int, tuple[str, Any]] = {}  # by the identity of the output, which is kept so that it stays unique
    maps: list[Array] = []

    def record(call: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        result = call(*args, **kwargs)
        if context.method_name == "__call__" and len(context.module.path) > 1:  # not the backbone itself
            last = result[-1] if isinstance(result, list | tuple) else result  # a stage's own map, behind tapped ones
            makers[id(last)] = ("/".join(context.module.path[1:]), last)
        return result

    def run(images: Array) -> list[Array]:
        with nn.intercept_methods(record), kernels("plain"):
            maps[:] = model.init_with_output(jax.random.key(0), images, method="features")[0]
        return maps

    shapes = jax.eval_shape(run, jax.ShapeDtypeStruct((1, height, width, 3), jnp.float32))
    modules = [makers.get(id(x), (None,))[0] for x in maps]
    return [FeatureInfo(x.shape[-1], round(height / x.shape[1]), m) for x, m in zip(shapes, modules, strict=True)]


def intermediates(
    model: Classifier, variables: Mapping[str, Any], images: Array, names: Sequence[str]
) -> dict[str, Any]:
    """Returns what modules inside of a model compute for images; it can be called under `jax.jit`.

    Args:
      model: of `create_model` or `load`.
      variables: of the model.
      images: float `[B, H, W, C]`, normalised.
      names: of modules, as the parameters have them: "backbone/stages_2/blocks_1", "head", or as PyTorch writes them,
        "stages.2.blocks.1"; the part "backbone" may be left out.

    Returns:
      Each module's output by the name that was given. A module that is called several times gives its last output.

    Raises:
      UserError: there is no such module, or it is not called.
    """
    outputs: dict[str, Any] = {}

    def record(call: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        result = call(*args, **kwargs)
        if context.method_name == "__call__":
            outputs["/".join(context.module.path)] = result
        return result

    with nn.intercept_methods(record), kernels("plain"):  # a kernel does not call the modules that it computes
        model.clone(remat=False).apply(variables, images)
    return {name: outputs[_path(name, outputs)] for name in names}


def _path(name: str, known: Mapping[str, Any]) -> str:
    """Returns the path of the module that a user names."""
    parts: list[str] = []
    for part in name.replace("/", ".").split("."):
        if part.isdecimal() and parts:  # PyTorch's "stages.2" is "stages_2" here
            parts[-1] += f"_{part}"
        else:
            parts.append(part)
    path = "/".join(parts)
    found = [candidate for candidate in (path, f"backbone/{path}") if candidate in known]
    if not found:
        raise UserError(f"the model calls no module '{name}'; the nearest names are {nearest(name, list(known))}.")
    return found[0]
