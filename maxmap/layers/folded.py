"""Batch norms whose parameters enter other operations: those that compute several layers, and convolutions."""

import collections
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import traverse_util
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from maxmap.kernels.target import programs_in
from maxmap.layers.parameters import parameter
from maxmap.layers.primitives import BatchNorm, Conv, Linear, folded_bias
from maxmap.operations import Array, upcast

Path = tuple[str, ...]  # of a module


def fold_batch_norm(mean: Array, var: Array, scale: Array, bias: Array, epsilon: float) -> tuple[Array, Array]:
    """Factor and summand of a batch norm, all arrays `[C]`, in float32 or wider."""
    factor = lax.rsqrt(var + epsilon) * upcast(scale)
    return factor, upcast(bias) - mean * factor


class FoldedBatchNorm(nn.Module):
    """What a `BatchNorm` keeps, for operations that fuse it and know its input's moments; see `fold_batch_norm`.

    Parameters and running statistics are those of a `BatchNorm`, under the same names; see also `folded_bias`.

    Attributes:
      channels: of the input.
      train: the running statistics will follow.
      momentum: see `BatchNorm`.
    """

    channels: int
    train: bool = False
    momentum: float = 0.9

    def setup(self) -> None:
        """Declares what `BatchNorm` declares."""
        self.rest = folded_bias(self, train=self.train)
        if self.rest is not None:
            return
        self.scale = parameter(self, "scale", nn.initializers.ones, (self.channels,))
        self.bias = parameter(self, "bias", nn.initializers.zeros, (self.channels,))
        self.running_mean = self.variable("batch_stats", "mean", jnp.zeros, (self.channels,), jnp.float32)
        self.running_var = self.variable("batch_stats", "var", jnp.ones, (self.channels,), jnp.float32)

    def near(self) -> Array:
        """The running mean `[C]`, near which the input's mean is."""
        return self.running_mean.value

    def fold(self, epsilon: float) -> tuple[Array, Array]:
        """Factor and summand `[C]` by the running statistics, in float32 or wider."""
        if self.rest is not None:
            return jnp.ones(self.channels, self.rest.dtype), jnp.broadcast_to(self.rest, self.channels)
        return fold_batch_norm(self.running_mean.value, self.running_var.value, self.scale, self.bias, epsilon)

    def follow(self, mean: Array, var: Array, count: int) -> None:
        """Updates the running statistics.

        Args:
          mean: of the input over `count` values, `[C]`, in float32 or wider.
          var: biased variance, `[C]`.
          count: number of values.
        """
        unbiased = var * (count / max(count - 1, 1))
        for running, new in ((self.running_mean, mean), (self.running_var, unbiased)):
            running.value = self.momentum * running.value + (1 - self.momentum) * lax.stop_gradient(new)


class Neighbours(NamedTuple):
    """Batch norms that a convolution or a linear map can take in; see `neighbours`.

    Attributes:
      behind: path of a norm to that of the layer whose output it reads, and nothing else reads.
      ahead: path of a norm to that of the layer that reads its output, and nothing else reads: a linear map, or a
        convolution without padding and groups.
      epsilons: of all norms.
    """

    behind: dict[Path, Path]
    ahead: dict[Path, Path]
    epsilons: dict[Path, float]


def neighbours(function: Callable[..., Any], *args: Any) -> Neighbours:
    """Finds the batch norms beside convolutions and linear maps. It traces a function that calls modules, once each."""
    epsilons: dict[Path, float] = {}
    uses: collections.Counter[Path] = collections.Counter()

    def mark(call: Callable, args: tuple, kwargs: dict, context: nn.module.InterceptorContext) -> Any:
        module, method = context.module, context.method_name
        path = "/".join(module.path)
        norm, layer = type(module) is BatchNorm, type(module) in (Conv, Linear)
        if layer and method == "output":
            return checkpoint_name(call(*args, **kwargs), f"from {path}")
        if layer and method == "weights":
            uses[module.path] += 1
        if not (norm or layer) or method != "__call__":
            return call(*args, **kwargs)
        x, *others = args
        if norm:
            uses[module.path] += 1
            epsilons[module.path] = module.epsilon
        if norm or isinstance(module, Linear) or (module.padding, module.groups) == (0, 1):
            x = checkpoint_name(x, f"into {path}")
        y = call(x, *others, **kwargs)
        activated = kwargs.get("activation") or kwargs.get("gate")
        return y if activated else checkpoint_name(y, f"from {path}")

    with nn.intercept_methods(mark):
        program = jax.make_jaxpr(function)(*args)
    found = Neighbours({}, {}, epsilons)
    for first, second in _only_readers(program):
        (start, source), (end, target) = first.split(), second.split()
        paths = tuple(source.split("/")), tuple(target.split("/"))
        if (start, end) != ("from", "into") or any(uses[path] != 1 for path in paths):
            continue
        if paths[1] in epsilons and paths[0] not in epsilons:
            found.behind[paths[1]] = paths[0]
        elif paths[0] in epsilons and paths[1] not in epsilons:
            found.ahead[paths[0]] = paths[1]
    return found


def _only_readers(program: Any) -> Iterator[tuple[str, str]]:
    """Yields pairs of names: the second names what the first does, and nothing else reads it under the first."""
    program = getattr(program, "jaxpr", program)
    read = [variable for equation in program.eqns for variable in equation.invars] + list(program.outvars)
    readers = collections.Counter(variable for variable in read if not hasattr(variable, "val"))
    names: dict[Any, str] = {}
    for equation in program.eqns:
        if equation.primitive.name == "name":
            (x,), (y,) = equation.invars, equation.outvars
            names[y] = equation.params["name"]
            if x in names and readers[x] == 1:
                yield names[x], names[y]
        for inner in programs_in(equation):
            yield from _only_readers(inner)


def fold_batch_norms(variables: Mapping[str, Any], found: Neighbours) -> dict[str, Any]:
    """Takes batch norms into the layers beside them, which evaluates to the same; see `folded_bias` for what is left.

    Args:
      variables: whole or folded before.
      found: `neighbours` of the modules.
    """
    params, stats = (traverse_util.flatten_dict(variables.get(key, {})) for key in ("params", "batch_stats"))

    def whole(norm: Path) -> bool:
        return (*norm, "scale") in params

    def taken(norm: Path) -> tuple[Array, Array]:
        mean, var = (stats.pop((*norm, leaf)) for leaf in ("mean", "var"))
        return fold_batch_norm(
            mean, var, params.pop((*norm, "scale")), params.pop((*norm, "bias")), found.epsilons[norm]
        )

    for norm, layer in found.behind.items():
        if whole(norm):
            factor, params[*norm, "bias"] = taken(norm)
            for path in ((*layer, "kernel"), (*layer, "bias")):
                if path in params:
                    params[path] = _scaled(params[path], factor, -1)
    next_norms = {layer: norm for norm, layer in found.behind.items()}
    for norm, layer in found.ahead.items():
        bias = (*(layer if (*layer, "bias") in params else next_norms.get(layer, ())), "bias")
        if whole(norm) and bias in params:
            factor, summand = taken(norm)
            params[*norm, "bias"] = jnp.zeros((), summand.dtype)
            kernel = params[*layer, "kernel"]
            columns = upcast(kernel).reshape(-1, *kernel.shape[-2:])
            shift = jnp.einsum("kio,i->o", columns, summand, precision="highest")
            params[bias] = (params[bias] + shift).astype(params[bias].dtype)
            params[*layer, "kernel"] = _scaled(kernel, factor, -2)
    folded = {"params": traverse_util.unflatten_dict(params), "batch_stats": traverse_util.unflatten_dict(stats)}
    return {**variables, **folded}


def _scaled(leaf: Array, factor: Array, axis: int) -> Array:
    """Multiplies a leaf by factors along one axis, counted from the last; the type stays the leaf's."""
    shape = [1] * leaf.ndim
    shape[axis] = -1
    return (leaf * factor.reshape(shape)).astype(leaf.dtype)
