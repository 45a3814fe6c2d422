"""Residual branches that a kernel can compute as a whole: norm, attention or MLP, stochastic depth and residual path.

Where the target platform has no kernel for a branch, its modules are called one after another.
"""

import functools
from collections.abc import Callable
from typing import Protocol

import jax.numpy as jnp

from maxmap.fused import attention_block, mlp_block
from maxmap.layers.primitives import FUNCTIONS, Conv, DropPath, LayerNorm, Linear
from maxmap.operations import Array, broadcast, scaled

Weights = dict[str, Array | None]
# Computes an MLP from its activation and its weights.
Compute = Callable[[Callable[[Array, Array | None], Array], Weights], Array]


class FusedMlp(Protocol):
    """An MLP that hands its weights to `compute` where a kernel computes it."""

    def fuses(self, x: Array, *, train: bool) -> bool:
        """Whether there is a kernel."""

    def __call__(self, x: Array, *, train: bool, compute: Compute | None = None) -> Array: ...


@functools.cache
def unweighted(activation: str) -> Callable[[Array, Array | None], Array]:
    """Returns an activation as `fused.mlp_block` takes it; the same object each time, as JAX's caches need it."""
    return lambda x, _: FUNCTIONS[activation](x)


def mlp_weights(fc1: Linear | Conv, fc2: Linear | Conv, channels: int) -> Weights:
    """Returns the weights of two linear maps or 1x1 convolutions as `fused.mlp_block` takes them."""
    found: Weights = {"activation": None}
    for name, layer, inputs in (("fc1", fc1, channels), ("fc2", fc2, fc1.channels)):
        kernel, found[f"{name}_bias"] = layer.weights(inputs)
        found[f"{name}_kernel"] = kernel.reshape(kernel.shape[-2:])
    return found


def residual_mlp(
    x: Array,
    norm: LayerNorm,
    mlp: FusedMlp,
    drop_path: float,
    *,
    train: bool,
    gamma: Array | None = None,
    residual: Array | None = None,
    shift: Array | None = None,
) -> Array:
    """Computes residual + DropPath(gamma * mlp(norm(x + shift))); the modules are the caller's.

    Args:
      x: `[B, H, W, C]`.
      norm: of the channels.
      mlp: a module with `fuses` and `compute` as `Mlp` has them.
      drop_path: rate of dropping the branch.
      train: drops.
      gamma: `[C]`; None for 1.
      residual: `[B, H, W, C]`; None for `x`.
      shift: `[C]`, for example the bias of a convolution, whose gradient a kernel sums; None for 0.
    """
    start = x if residual is None else residual
    if mlp.fuses(x, train=train):
        keep = kept_samples(x, drop_path, train)

        def compute(activation: Callable[[Array, Array | None], Array], weights: Weights) -> Array:
            scale, bias = norm.weights(x.shape[-1])
            weights = scaled_output(weights, "fc2", gamma) | {"norm_scale": scale, "norm_bias": bias, "keep": keep}
            weights["shift"] = shift
            return mlp_block(x, weights, activation, norm.epsilon, residual)

        return mlp(x, train=train, compute=compute)
    x = x if shift is None else x + broadcast(shift.astype(x.dtype), x.shape)
    y = mlp(norm(x), train=train)
    y = y if gamma is None else scaled(y, gamma)
    return start + DropPath(drop_path)(y, train=train)


def kept_samples(x: Array, drop_path: float, train: bool) -> Array:
    """Returns the factor by which stochastic depth multiplies every sample of a batch `[B, ...]`, float32 `[B]`.

    It makes a `DropPath` of the caller's and draws the same random numbers as that does for the batch itself.
    """
    ones = jnp.ones((x.shape[0],) + (1,) * (x.ndim - 1), jnp.float32)
    return DropPath(drop_path)(ones, train=train).reshape(-1)


def scaled_output(weights: Weights, name: str, gamma: Array | None) -> Weights:
    """Multiplies the outputs of a linear map among `weights` by factors `[C]`: its kernel's columns and its bias."""
    if gamma is None:
        return weights
    kernel, bias = weights[f"{name}_kernel"], weights[f"{name}_bias"]
    assert kernel is not None
    return weights | {f"{name}_kernel": kernel * gamma[None], f"{name}_bias": None if bias is None else bias * gamma}


def residual_attention(
    x: Array,
    norm: LayerNorm,
    attention: Callable[..., Array],
    kind: str,
    window: tuple[int, int],
    heads: int,
    scale: float,
    drop_path: float,
    *,
    train: bool,
    gamma: Array | None = None,
    residual: Array | None = None,
) -> Array:
    """Computes residual + DropPath(gamma * attention(norm(x))) in one kernel; the modules are the caller's.

    Args:
      x: `[B, H, W, C]`.
      norm: of the channels.
      attention: a module that calls its argument `compute` with the weights that `fused.attention_block` takes.
      kind: of the windows, "window" or "grid".
      window: height and width of a window or grid cell.
      heads: of the attention.
      scale: factor of the queries.
      drop_path: rate of dropping the branch.
      train: drops.
      gamma: `[C]`; None for 1.
      residual: `[B, H, W, C]`; None for `x`.
    """
    keep = kept_samples(x, drop_path, train)

    def compute(weights: Weights) -> Array:
        norm_scale, norm_bias = norm.weights(x.shape[-1])
        weights = scaled_output(weights, "proj", gamma)
        weights |= {"norm_scale": norm_scale, "norm_bias": norm_bias, "keep": keep}
        return attention_block(x, weights, kind, window, heads, scale, norm.epsilon, residual)

    return attention(x, train=train, compute=compute)
