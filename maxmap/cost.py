"""What a model costs: parameters and multiply-adds, counted from shapes."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from maxmap.layers.primitives import pair
from maxmap.models import Classifier
from maxmap.operations import plain_operations


def count_parameters(params: Any) -> int:
    """Returns the number of values in a tree of parameters."""
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(params))


def multiply_adds(function: Callable[..., Any], *arguments: Any) -> int:
    """Returns the multiply-adds of all matrix products and convolutions in a function, which it only traces.

    Papers call this number FLOPs, timm calls it GMACs. Activations, norms, additions and pooling do not count. The
    number does not depend on the platform.
    """
    return _multiply_adds(_trace(function, *arguments)[0])


def _trace(function: Callable[..., Any], *arguments: Any) -> tuple[Any, Any]:
    """Returns the program of a function in its plain form, and the shapes of its results."""
    with plain_operations():
        # A new function each time: JAX would return an earlier trace of the same function, perhaps of another form.
        return jax.make_jaxpr(lambda *arguments: function(*arguments), return_shape=True)(*arguments)


def _multiply_adds(jaxpr: Any) -> int:
    total = 0
    for equation in jaxpr.eqns:
        kind, parameters = equation.primitive.name, equation.params
        shapes = [variable.aval.shape for variable in equation.invars]
        outputs = math.prod(equation.outvars[0].aval.shape) if equation.outvars else 0
        if kind == "dot_general":
            (contracted, _), _ = parameters["dimension_numbers"]
            total += outputs * math.prod(shapes[0][axis] for axis in contracted)
        elif kind == "conv_general_dilated":
            out_channels = shapes[1][parameters["dimension_numbers"].rhs_spec[0]]
            total += outputs * math.prod(shapes[1]) // out_channels
        else:
            total += sum(_multiply_adds(inner) for inner in jax.tree.leaves(parameters) if hasattr(inner, "eqns"))
    return total


def cost(model: Classifier) -> tuple[int, int]:
    """Returns a model's number of parameters, and its multiply-adds for one image of its own size; only traces."""
    height, width = pair(model.backbone.image_size)
    images = jax.ShapeDtypeStruct((1, height, width, 3), jnp.float32)
    run, (_, variables) = _trace(model.init_with_output, jax.random.key(0), images)
    return count_parameters(variables["params"]), _multiply_adds(run)
