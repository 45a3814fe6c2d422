"""Parameters of modules."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.errors import ScopeParamShapeError

Array = jax.Array


def parameter(module: nn.Module, name: str, init: Callable[..., Array], shape: Sequence[int]) -> Array:
    """Returns `module.param(name, init, shape)`, without tracing the initialiser where the parameter is there.

    Flax traces it at every call, only to compare the shapes. That was 45 % of the time in which MaxViT-T's forward pass
    is traced, and 27 % of its gradient's.

    Args:
      module: inside of a compact method or `setup`.
      name: of the parameter.
      init: a function of a key and the shape.
      shape: of the parameter.

    Raises:
      ScopeParamShapeError: the parameter has another shape.
    """
    if not module.has_variable("params", name):
        return module.param(name, init, shape)
    value = module.get_variable("params", name)
    if jnp.shape(value) != tuple(shape):
        raise ScopeParamShapeError(name, module.scope.path_text, jnp.shape(value), tuple(shape))
    return value
