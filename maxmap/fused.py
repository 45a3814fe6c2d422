"""Operations that compute several layers at once, where the target platform has kernels for that.

`maxmap.operations.IMPLEMENTATIONS` says where. Each operation has a function beside it that says whether a kernel takes
given maps; where none does, the layers are called one after another.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from maxmap.kernels.target import (
    Array,
    accumulator,
    devices,
    local_batch,
    upcast,
)
from maxmap.operations import Function, Padding, broadcast, explicit_padding, implementation

if TYPE_CHECKING:
    from maxmap.kernels.depthwise import Window


def attends_in_maps(x: Array, window: tuple[int, int]) -> bool:
    """Whether `map_attention` has a kernel for maps like `x`, `[B, H, W, C]`, on the target platform."""
    if implementation("windows") != "maps" or local_batch(x.shape[0]) is None:
        return False
    from maxmap.kernels import gpu_attention  # takes half a second to import

    return gpu_attention.fits(window)


def map_attention(
    qkv: Array,
    bias: Array | None,
    kind: str,
    window: tuple[int, int],
    heads: int,
    head_first: bool,
    scale: float,
) -> Array:
    """Multi-head attention inside of windows or grid cells, in a kernel that reads and writes maps.

    Args:
      qkv: `[B, H, W, 3 E]`.
      bias: of the logits, `[heads, N, N]`, or None.
      kind: "window" or "grid".
      window: height and width of a window or grid cell that `attends_in_maps` allows, of N pixels.
      heads: of the attention; they divide E.
      head_first: the channels are ordered (heads, qkv, head_dim), otherwise (qkv, heads, head_dim).
      scale: factor of the queries.

    Returns:
      `[B, H, W, E]`.
    """
    from maxmap.kernels import gpu_attention

    return gpu_attention.attention(qkv, bias, kind, window, heads, head_first, scale)


def fuses_attention(x: Array, window: tuple[int, int], head_dim: int) -> bool:
    """Whether `attention_block` has a kernel for maps like `x`, `[B, H, W, C]`, on the target platform."""
    batch = local_batch(x.shape[0])
    if implementation("block") != "fused" or batch is None:
        return False
    from maxmap.kernels import tpu_attention  # takes half a second to import

    return tpu_attention.fits(batch, window, head_dim)


def attention_block(
    x: Array,
    weights: Mapping[str, Array | None],
    kind: str,
    window: tuple[int, int],
    heads: int,
    scale: float,
    epsilon: float,
    residual: Array | None = None,
) -> Array:
    """Computes residual + keep * proj(attention(qkv(norm(x)))) inside of windows or grid cells, in one kernel.

    Args:
      x: `[B, H, W, C]`, of a shape that `fuses_attention` allows.
      weights: 'norm_scale' and 'norm_bias' `[C]`, 'qkv_kernel' `[C, 3, E]`, 'qkv_bias' `[3, E]`, 'bias' of the logits
        `[heads, N, N]`, 'proj_kernel' `[E, C]`, 'proj_bias' `[C]`, 'keep' `[B]`: the factor of the branch for every
        sample, without a gradient. All but the kernels may be None.
      kind: "window" or "grid".
      window: height and width of a window or grid cell.
      heads: of the attention.
      scale: factor of the queries.
      epsilon: of the norm.
      residual: `[B, H, W, C]`; None for `x`.

    Returns:
      `[B, H, W, C]`.
    """
    from maxmap.kernels import tpu_attention

    path = None if residual is None or residual is x else _images_last(residual)
    y = tpu_attention.attention_block(_images_last(x), weights, kind, window, heads, scale, epsilon, path)
    return _images_first(y)


def fuses_mlp(x: Array, hidden: int, *, weighted: bool = False) -> bool:
    """Whether `mlp_block` has a kernel for maps like `x`, `[B, H, W, C]`, on the target platform.

    Args:
      x: the map.
      hidden: channels between the linear maps.
      weighted: the activation has weights.
    """
    batch, way = local_batch(x.shape[0]), implementation("mlp")
    if way == "plain" or batch is None:
        return False
    if way == "rows":
        from maxmap.kernels import gpu_mlp

        return not weighted and gpu_mlp.fits(x.shape[-1], hidden)
    from maxmap.kernels import tpu_mlp

    return tpu_mlp.fits(batch, hidden)


def mlp_block(
    x: Array,
    weights: Mapping[str, Array | None],
    activation: Callable[[Array, Array | None], Array],
    epsilon: float,
    residual: Array | None = None,
) -> Array:
    """Computes residual + keep * fc2(activation(fc1(norm(x + shift)))) in one kernel.

    Args:
      x: `[B, H, W, C]`, of a shape that `fuses_mlp` allows.
      weights: 'norm_scale' and 'norm_bias' `[C]`, 'fc1_kernel' `[C, F]`, 'fc1_bias' `[F]`, 'activation' `[weights, F]`,
        'fc2_kernel' `[F, C]`, 'fc2_bias' `[C]`, 'keep' `[B]`: the factor of the branch for every sample, without a
        gradient, 'shift' `[C]`. All but the kernels may be None; the shift may be left out.
      activation: of hidden values `[R, F]` and weights 'activation' `[weights, F]`.
      epsilon: of the norm.
      residual: `[B, H, W, C]`; None for `x`.

    Returns:
      `[B, H, W, C]`.
    """
    path = None if residual is x else residual
    if implementation("mlp") == "rows":
        from maxmap.kernels import gpu_mlp

        shift = weights.get("shift")
        if shift is not None:  # XLA adds it to the convolution in front
            path, x = x if path is None else path, x + broadcast(shift.astype(x.dtype), x.shape)
        kept = {name: w for name, w in weights.items() if name != "shift"}
        return gpu_mlp.mlp_block(x, kept, activation, epsilon, path)
    from maxmap.kernels import tpu_mlp

    path = None if path is None else _images_last(path)
    return _images_first(tpu_mlp.mlp_block(_images_last(x), weights, activation, epsilon, path))


def fuses_separable(x: Array) -> bool:
    """Whether the two operations below have kernels for maps like `x`, `[B, H, W, C]`, on the target platform."""
    batch = local_batch(x.shape[0])
    if implementation("block") != "fused" or batch is None:
        return False
    from maxmap.kernels import tpu_separable  # takes half a second to import

    return tpu_separable.fits(batch)


def separable_expand(
    x: Array,
    scale: Array,
    kernel: Array,
    factors: Array,
    activation: Callable[[Array, Array | None], Array],
    epsilon: float,
) -> tuple[Array, Array]:
    """Computes activation(norm(x) @ kernel), of maps that `fuses_separable` allows.

    Args:
      x: `[B, H, W, C]`.
      scale: of the norm, `[C]`.
      kernel: `[C, F]`.
      factors: weights of the activation, `[weights, F]`.
      activation: of values `[R, F]` and its weights.
      epsilon: of the norm.

    Returns:
      `[B, H, W, F]`; and `x`, to be read in its stead by the residual path: the gradients are added in the kernel.
    """
    from maxmap.kernels import tpu_separable

    y, beside = tpu_separable.expand(_images_last(x), scale, kernel, factors, activation, epsilon)
    return _images_first(y), _images_first(beside)


def separable_project(x: Array, kernel: Array, keep: Array, residual: Array) -> Array:
    """Computes residual + keep * (x @ kernel), of maps that `fuses_separable` allows.

    Args:
      x: `[B, H, W, F]`.
      kernel: `[F, C]`.
      keep: the factor of the branch for every sample, `[B]`, without a gradient.
      residual: `[B, H, W, C]`.

    Returns:
      `[B, H, W, C]`.
    """
    from maxmap.kernels import tpu_separable

    return _images_first(tpu_separable.project(_images_last(x), kernel, keep, _images_last(residual)))


def _images_last(x: Array) -> Array:
    """Transposes `[B, H, W, C]` to `[H, W, B, C]`, the order in memory of XLA's maps on TPUs: nothing moves."""
    return jnp.transpose(x, (1, 2, 0, 3))


def _images_first(x: Array) -> Array:
    return jnp.transpose(x, (2, 0, 1, 3))


def activates_batch_norm(x: Array) -> bool:
    """Whether `activated_batch_norm` is the way of the target platform for maps like `x`, `[B, ..., C]`."""
    return implementation("batch_norm") == "activated" and local_batch(x.shape[0]) is not None


def activated_batch_norm(
    x: Array,
    scale: Array,
    bias: Array,
    near: Array,
    epsilon: float,
    parts: int,
    function: Callable[[Array], Array],
    derivative: Callable[[Array], Array],
    gate: Callable[[Array], Array] | None = None,
) -> tuple[Array, Array, Array]:
    """Computes y = function(batch_norm(x)), or y * gate(mean of y over all axes but the first and the last).

    Where `activates_batch_norm` says no, one operation is to be called after another.

    Args:
      x, scale, bias, near, epsilon, parts: see `batch_norm`.
      function: of one value.
      derivative: of the function, see `activate`.
      gate: of the mean, `[B, 1, ..., C]`; None for none.

    Returns:
      See `batch_norm`.
    """
    from maxmap.kernels import gpu_norm  # takes half a second to import

    inputs = (x, upcast(scale), upcast(bias), near.astype(accumulator(scale.dtype)))
    options = (epsilon, parts, function, derivative)
    factor = None if gate is None else gate(gpu_norm.pooled(*inputs, *options))
    return gpu_norm.activated(*inputs, factor, *options)


def expansion(
    shape: Sequence[int],
    channels: int,
    kernel_size: int,
    function: Callable[[Array], Array],
    *,
    stride: int,
    padding: Padding,
) -> "Window | None":
    """Says how maps are expanded and convolved depthwise without leaving the chip in between.

    Args:
      shape: of the maps, `[B, H, W, I]`.
      channels: C, to which they are expanded.
      kernel_size: k, of the depthwise convolution.
      function: the activation in between, of single values.
      stride: of the depthwise convolution, both axes.
      padding: of the depthwise convolution; see `convolve`.

    Returns:
      For `expand` and `expand_by_moments`; None where the platform has no kernel for that.
    """
    if implementation("expand") != "pallas":
        return None
    from maxmap.kernels import depthwise  # takes half a second to import

    pads = explicit_padding(padding, shape[1:3], kernel_size, stride)
    if not depthwise.fits(shape, channels, kernel_size, stride, pads, devices()):
        return None
    return depthwise.Window(kernel_size, stride, (pads[0][0], pads[1][0]), function)


def expand(window: "Window", x: Array, weights: Array, bias: Array, kernel: Array) -> Array:
    """Convolves function(x @ weights + bias) depthwise.

    Args:
      window: of `expansion`.
      x: `[B, H, W, I]`.
      weights: `[I, C]`.
      bias: `[C]`.
      kernel: `[k, k, 1, C]`.

    Returns:
      `[B, H', W', C]`.
    """
    from maxmap.kernels import depthwise

    return _images_first(depthwise.expand_depthwise(_images_last(x), (weights, bias), kernel[:, :, 0], window)[0])


def expand_by_moments(
    window: "Window",
    x: Array,
    near: Array,
    fold: Callable[..., tuple[Array, Array]],
    folding: tuple[Array, ...],
    kernel: Array,
    *,
    shortcut: str,
) -> tuple[Array, Array, tuple[Array, ...], Array, Array]:
    """Does what `expand` does, with weights and a bias that follow from the moments of `x`: norms that train.

    Args:
      window: of `expansion`.
      x: `[B, H, W, I]`.
      near: an estimate of the mean of `x`, `[I]`.
      fold: returns weights `[I, C]` and a bias `[C]` of the mean of `x` `[I]`, its covariance `[I, I]` and `folding`.
      folding: arrays for `fold`.
      kernel: `[k, k, 1, C]`.
      shortcut: "same" for the map itself, "mean" for its 2x2 means, or "none".

    Returns:
      `[B, H', W', C]`; its sum and sum of squares over all pixels, `[2, C]`; a tuple with the shortcut, or none;
      mean and covariance, by which no gradient passes.
    """
    from maxmap.kernels import normalised

    front = normalised.Front(window, fold, shortcut)
    y, sums, beside, mean, covariance = normalised.expand(_images_last(x), near, folding, kernel[:, :, 0], front)
    return _images_first(y), sums, tuple(map(_images_first, beside)), mean, covariance


def squeeze_project(
    x: Array,
    factor: Array,
    summand: Array,
    gating: tuple[Array, ...],
    weights: Array,
    bias: Array,
    keep: Array,
    residual: Array,
    *,
    function: Callable[[Array], Array],
    gate: Callable[..., Array],
) -> Array:
    """Norm, activation, squeeze-excitation, 1x1 convolution and residual path in one operation, behind an `expand`.

    With z = function(x * factor + summand) it computes
    residual + keep * (z * gate(mean of z over the pixels, *gating) @ weights + bias).

    Args:
      x: what `expand` returns, `[B, H, W, C]`.
      factor: `[C]`.
      summand: `[C]`.
      gating: arguments of the gate behind the mean.
      weights: `[C, O]`.
      bias: `[O]`.
      keep: the factor of the branch for every sample, `[B]`, without a gradient.
      residual: `[B, H, W, O]`.
      function: an activation, of single values.
      gate: a function of the mean `[B, C]` and other arrays; it returns factors `[B, C]`.

    Returns:
      `[B, H, W, O]`.
    """
    from maxmap.kernels import squeeze  # takes half a second to import

    batch, height, width, _ = x.shape
    x, residual = (_images_last(part).reshape(height * width, batch, -1) for part in (x, residual))
    keep, block = keep.astype(accumulator(x.dtype)), squeeze.Block(function, gate)
    y = squeeze.squeeze_project(x, factor, summand, gating, weights, bias, keep, residual, block)
    return _images_first(y.reshape(height, width, batch, -1))


def takes_pairs(shape: Sequence[int]) -> bool:
    """Whether convolutions to maps `[B, H, W, C]` are to be computed on pairs of pixels; see `maxmap.layers.paired`."""
    if implementation("stem") != "pallas":
        return False
    from maxmap.kernels import pairs  # takes half a second to import

    return pairs.fits(shape, devices())


def unpair(x: Array) -> tuple[Array, Array]:
    """Takes pairs of pixels apart: `[B, H, W / 2, 2 C]` to `[B, H, W, C]`.

    Returns:
      The map twice, for two readers: their gradients are added in the kernel.
    """
    from maxmap.kernels import pairs

    y, beside = pairs.unpair(_images_last(x))
    return _images_first(y), _images_first(beside)


def fuses_bottleneck(x: Array, channels: int, out_channels: int) -> bool:
    """Whether the three operations below have kernels for maps like `x`, `[B, H, W, I]`, on the target platform.

    Args:
      x: what the block reads.
      channels: inside of the block.
      out_channels: of the block.
    """
    if implementation("bottleneck") != "pallas":
        return False
    from maxmap.kernels import bottleneck  # takes half a second to import

    outer = (x.shape[-1], out_channels)
    return all(bottleneck.fits(x.shape[0], channels, other, devices()) for other in outer)


def bottleneck_first(
    x: Array,
    weights: Array,
    scale: Array,
    bias: Array,
    near: Array,
    function: Function,
    derivative: Function | None,
    epsilon: float,
) -> tuple[Array, Array, Array, Array]:
    """A bottleneck's first 1x1 convolution, batch norm and activation, of maps that `fuses_bottleneck` allows.

    Args:
      x: `[B, H, W, I]`.
      weights: `[I, C]`.
      scale: of the norm, `[C]`.
      bias: of the norm, `[C]`.
      near: an estimate of the mean of what is normalised, `[C]`, without a gradient.
      function: an activation, of single values.
      derivative: of the activation; see `activate`. None for JAX's own.
      epsilon: of the norm.

    Returns:
      `[B, H, W, C]`; `x`, to be read in its stead by the residual path: the gradients are added in the kernel; mean and
      biased variance of what is normalised, both `[C]`, without a gradient.
    """
    from maxmap.kernels import bottleneck

    y, beside, mean, var = bottleneck.first(_images_last(x), weights, scale, bias, near, function, derivative, epsilon)
    return _images_first(y), _images_first(beside), mean, var


def bottleneck_activated(
    x: Array, factor: Array, summand: Array, near: Array, function: Callable[[Array], Array]
) -> tuple[Array, Array, Array]:
    """What a bottleneck's last convolution reads: function(x * factor + summand) - near, and its moments.

    Args:
      x: `[B, H, W, C]`.
      factor: `[C]`.
      summand: `[C]`.
      near: an estimate of the mean of the activations, `[C]`, without a gradient.
      function: an activation, of single values.

    Returns:
      `[B, H, W, C]`; its sums over the pixels `[B, C]` and over all products of channels `[C, C]`, in float32 or wider.
    """
    from maxmap.kernels import bottleneck

    y, total, square = bottleneck.activated(_images_last(x), factor, summand, near, function)
    return _images_first(y), total, square


def bottleneck_last(x: Array, weights: Array, bias: Array, gate: Array, residual: Array) -> Array:
    """A bottleneck's last 1x1 convolution and residual path: relu(residual + gate * (x @ weights + bias)).

    Args:
      x: `[B, H, W, C]`.
      weights: `[C, O]`.
      bias: `[O]`.
      gate: `[B, O]`.
      residual: `[B, H, W, O]`.

    Returns:
      `[B, H, W, O]`.
    """
    from maxmap.kernels import bottleneck

    return _images_first(bottleneck.last(_images_last(x), weights, bias, gate, _images_last(residual)))


def channel_sums(x: Array, near: Array) -> tuple[Array, Array]:
    """Returns `x` `[..., C]`, and sum and sum of squares of what it has over `near` `[C]`, in float32 or wider.

    The gradient of the sums is added to that of `x` before it is rounded.
    """
    return _channel_sums(x, near.astype(accumulator(x.dtype)))


@jax.custom_vjp
def _channel_sums(x: Array, near: Array) -> tuple[Array, Array]:
    axes = tuple(range(x.ndim - 1))
    deviation = upcast(x) - _as_rows(near, x)
    return x, jnp.stack([jnp.sum(deviation, axis=axes), jnp.sum(jnp.square(deviation), axis=axes)])


def _channel_sums_forward(x: Array, near: Array) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
    return _channel_sums(x, near), (x, near)


def _channel_sums_backward(residuals: tuple[Array, Array], grads: tuple[Array, Array]) -> tuple[Array, Array]:
    x, near = residuals
    of_sum, of_square = grads[1]
    of_x = upcast(grads[0]) + upcast(x) * _as_rows(2 * of_square, x) + _as_rows(of_sum - 2 * of_square * near, x)
    return of_x.astype(x.dtype), jnp.zeros_like(near)


_channel_sums.defvjp(_channel_sums_forward, _channel_sums_backward)


def _as_rows(values: Array, x: Array) -> Array:
    return values.reshape((1,) * (x.ndim - 1) + (-1,))
