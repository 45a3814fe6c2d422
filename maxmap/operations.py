"""How single operations are computed: convolutions, linear maps, pooling, activations, softmax, attention, sums.

`IMPLEMENTATIONS` names the way of each operation by target platform; maxmap/kernels/ has the ways that XLA does not
have. All ways of an operation give the same results, which tests/test_operations.py shows in float64. Nothing here has
parameters: `maxmap.layers` has the modules.
"""

import collections
import functools
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import linen as nn
from jax import lax

from maxmap.kernels import batch_norm as one_pass
from maxmap.kernels import cpu, xla
from maxmap.kernels.target import (
    Array,
    accumulator,
    compiled_for,
    devices,
    kernel_calls,
    kernel_name,
    local_batch,
    platform,
    upcast,
)
from maxmap.kernels.xla import Pads

Padding = int | str
Function = Callable[[Array], Array]  # of single values

# The way of each operation, by the platform that a program is compiled for (see `compiled_for`).
#
# pointwise    1x1 convolutions, and convolutions whose stride is their size: "lax" (XLA's convolution) or "matmul"
# depthwise    convolutions: "lax", "shifted_sum" (a sum of shifted products) or "pallas" (kernels for TPUs)
# expand       1x1 convolutions with a depthwise one behind: "plain" or "pallas" (the map between stays on the chip)
# dense        all other convolutions without groups: "lax" or "im2col" (the kernel's gradient from patches)
# sum          in layer norms, and in gradients of parameters that all positions share: "lax" or "matmul" (with ones)
# batch_norm   while training: "two_pass" (the mean, then centred squares), "one_pass" (with its own backward pass) or
#              "activated" (together with the activation and the gate behind it)
# max_pool     the backward pass: "lax" (XLA's select-and-scatter) or "compare" (input with output, once more)
# activation   the backward pass: "recompute" (from the input, which is all that is kept) or "autodiff" (JAX's own)
# attention    "plain" (matrix products) or "pallas" (one kernel for GPUs; see maxmap/kernels/pallas.py)
# windows      attention inside of windows of a map: "plain" (they become an axis of the batch) or "maps" (one kernel
#              for GPUs that reads and writes maps; see maxmap/kernels/gpu_attention.py)
# block        norm, attention and residual path: "plain" (one by one) or "fused" (one kernel for TPUs; see
#              maxmap/kernels/tpu_attention.py)
# mlp          norm, MLP and residual path: "plain" (one by one), "fused" (one kernel for TPUs; see
#              maxmap/kernels/tpu_mlp.py) or "rows" (one for GPUs; see maxmap/kernels/gpu_mlp.py)
# resize       of maps for heads, in the order "images_first" [B, H, W, C] or "images_last" [H, W, B, C]; the latter is
#              the order in memory of XLA's maps on TPUs, which slices do not keep by themselves
# bottleneck   1x1 convolutions, norms and residual path of ResNet's blocks: "plain" or "pallas" (kernels for TPUs)
#
# The CPU's own ways pay because XLA's CPU backend takes 6 times as long for a 1x1 convolution as for the same matrix
# product, 17 times as long for a depthwise convolution as for shifted products, and up to 3 times as long for the
# kernel's gradient of other convolutions as for products of patches. Recomputed activations save memory everywhere.
IMPLEMENTATIONS = {
    "cpu": {
        "pointwise": "matmul",
        "depthwise": "shifted_sum",
        "expand": "plain",
        "dense": "im2col",
        "sum": "matmul",
        "batch_norm": "two_pass",
        "max_pool": "compare",
        "activation": "recompute",
        "attention": "plain",
        "windows": "plain",
        "block": "plain",
        "resize": "images_first",
        "mlp": "plain",
        "bottleneck": "plain",
    },
    # Every platform that has no entry.
    "default": {
        "pointwise": "lax",
        "depthwise": "lax",
        "expand": "plain",
        "dense": "lax",
        "sum": "lax",
        "batch_norm": "one_pass",
        "max_pool": "lax",
        "activation": "recompute",
        "attention": "plain",
        "windows": "plain",
        "block": "plain",
        "resize": "images_first",
        "mlp": "plain",
        "bottleneck": "plain",
    },
    # No platform: see `plain_operations`.
    "plain": {
        "pointwise": "lax",
        "depthwise": "lax",
        "expand": "plain",
        "dense": "lax",
        "sum": "lax",
        "batch_norm": "two_pass",
        "max_pool": "lax",
        "activation": "autodiff",
        "attention": "plain",
        "windows": "plain",
        "block": "plain",
        "resize": "images_first",
        "mlp": "plain",
        "bottleneck": "plain",
    },
}
IMPLEMENTATIONS["tpu"] = IMPLEMENTATIONS["default"] | {
    "depthwise": "pallas",
    "expand": "pallas",
    "block": "fused",
    "bottleneck": "pallas",
    "mlp": "fused",
    "resize": "images_last",
}
IMPLEMENTATIONS["gpu"] = IMPLEMENTATIONS["default"] | {"batch_norm": "activated", "windows": "maps", "mlp": "rows"}

KERNELS = ("activated", "fused", "maps", "pallas", "rows")  # ways that are kernels written by hand
_kernels = jax.make_user_context("auto")


def kernels(choice: str) -> AbstractContextManager[None]:
    """Traces programs with the kernels that are written by hand, or without them.

    Args:
      choice: "auto" takes those that the target platform's entry of `IMPLEMENTATIONS` names; "plain" takes none.
    """
    if choice not in ("auto", "plain"):
        raise ValueError(f"kernels '{choice}' is not one of auto, plain")
    return _kernels(choice)


def implementation(kind: str) -> str:
    """Returns the way in which operations of `kind` are computed on the platform that programs are compiled for.

    To choose another way, set `IMPLEMENTATIONS["cpu", "gpu" or "tpu"][kind]` before the model is traced.
    """
    way = IMPLEMENTATIONS.get(platform(), IMPLEMENTATIONS["default"])[kind]
    return IMPLEMENTATIONS["default"][kind] if way in KERNELS and _kernels.value == "plain" else way


def plain_operations() -> AbstractContextManager[None]:
    """Traces programs in which every operation has its plain form on every platform, to count multiply-adds in it."""
    return compiled_for("plain")


def kernels_of(traced: jax.stages.Traced) -> str:
    """Returns which kernels that are written by hand a traced program calls, and how often; "none" for none."""
    counts = collections.Counter(re.sub(r"_\d.*", "", kernel_name(call)) for call in kernel_calls(traced.jaxpr))
    return ", ".join(f"{count} x {name}" for name, count in sorted(counts.items())) or "none"


def softmax(logits: Array) -> Array:
    """Softmax over the last axis, computed in float32 or wider, returned in the type of `logits`."""
    return nn.softmax(upcast(logits), axis=-1).astype(logits.dtype)


def attention(
    q: Array, k: Array, v: Array, bias: Array | None = None, dropout: Callable[[Array], Array] | None = None
) -> Array:
    """Multi-head attention in the way of the platform.

    The "pallas" kernel takes at most 128 tokens and no dropout; otherwise the "plain" way computes it.

    Args:
      q: queries `[..., H, Q, D]`, scaled.
      k: keys `[..., H, K, D]`.
      v: values `[..., H, K, D]`.
      bias: of the logits, `[H, Q, K]`.
      dropout: of the weights; None for none.

    Returns:
      `[..., H, Q, D]`.
    """
    if dropout is None and implementation("attention") == "pallas":
        from maxmap.kernels import pallas  # takes half a second to import

        if max(q.shape[-2], k.shape[-2]) <= pallas.LARGEST_WINDOW and local_batch(q.shape[0]) is not None:
            windows = (x.reshape(-1, *x.shape[-3:]) for x in (q, k, v))
            return pallas.window_attention(*windows, bias).reshape(q.shape)
    logits = jnp.einsum("...qd,...kd->...qk", q, k)
    if bias is not None:
        repeated = broadcast(bias.reshape(-1).astype(logits.dtype), (logits.size // bias.size, bias.size))
        logits = logits + repeated.reshape(logits.shape)
    return attend(logits, v, dropout)


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
      weights: see `maxmap.kernels.tpu_attention.attention_block`.
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
      weights: see `maxmap.kernels.tpu_mlp.mlp_block`.
      activation: of hidden values `[R, F]` and weights 'activation' `[weights, F]`.
      epsilon: of the norm.
      residual: `[B, H, W, C]`; None for `x`.

    Returns:
      `[B, H, W, C]`.
    """
    path = None if residual is x else residual
    if implementation("mlp") == "rows":
        from maxmap.kernels import gpu_mlp

        return gpu_mlp.mlp_block(x, weights, activation, epsilon, path)
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


def attend(logits: Array, values: Array, dropout: Callable[[Array], Array] | None = None) -> Array:
    """Averages values with the softmax of logits as weights.

    It divides by the sum of the weights after the product with the values, which has fewer entries than the weights.

    Args:
      logits: `[..., queries, keys]`.
      values: `[..., keys, D]`.
      dropout: of the weights; None for none.

    Returns:
      `[..., queries, D]`, in the type of `values`; the softmax is computed in float32 or wider.
    """
    logits = upcast(logits)
    weights = jnp.exp(logits - lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True)))
    total = jnp.sum(weights, axis=-1, keepdims=True)
    weights = weights.astype(values.dtype)
    if dropout is not None:
        weights = dropout(weights)
    return (upcast(weights @ values) / total).astype(values.dtype)


def broadcast(x: Array, shape: tuple[int, ...]) -> Array:
    """Broadcasts one value per channel, `[C]`, to all positions of `shape`, `[..., C]`.

    The gradient is a sum over the positions, in float32 or wider.
    """
    return _broadcast(x, shape, implementation("sum"))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _broadcast(x: Array, shape: tuple[int, ...], way: str) -> Array:
    return jnp.broadcast_to(x[(None,) * (len(shape) - 1)], shape)


def _broadcast_forward(x: Array, shape: tuple[int, ...], way: str) -> tuple[Array, None]:
    return _broadcast(x, shape, way), None


def _broadcast_backward(shape: tuple[int, ...], way: str, _: None, grad: Array) -> tuple[Array]:
    rows = grad.reshape(-1, shape[-1])
    total = cpu.sum_rows(rows) if way == "matmul" else jnp.sum(rows, axis=0, dtype=accumulator(rows.dtype))
    return (total.astype(grad.dtype),)


_broadcast.defvjp(_broadcast_forward, _broadcast_backward)


def scaled(x: Array, factor: Array) -> Array:
    """Multiplies `x` `[..., C]` by one factor per channel `[C]`, in the type of `x`."""
    return x * broadcast(factor.astype(x.dtype), x.shape)


def layer_norm(x: Array, scale: Array, bias: Array, epsilon: float) -> Array:
    """Normalises `[..., C]` over C, computed in float32 or wider, returned in the type of `x`.

    The variance is computed in two passes, because the one-pass form cancels in float32.
    """
    rows, scale, bias = upcast(x).reshape(-1, x.shape[-1]), upcast(scale), upcast(bias)
    if implementation("sum") == "matmul":
        return cpu.layer_norm(rows, scale, bias, epsilon).reshape(x.shape).astype(x.dtype)
    centred = rows - jnp.mean(rows, axis=-1, keepdims=True)
    variance = jnp.mean(jnp.square(centred), axis=-1, keepdims=True)
    y = centred * (lax.rsqrt(variance + epsilon) * scale[None]) + bias[None]
    return y.reshape(x.shape).astype(x.dtype)


def batch_norm(
    x: Array, scale: Array, bias: Array, near: Array, epsilon: float, parts: int = 1
) -> tuple[Array, Array, Array]:
    """Normalises each of several equal parts of a batch over all axes but the last, in float32 or wider.

    Args:
      x: `[B, ..., C]`.
      scale: `[C]`.
      bias: `[C]`.
      near: an estimate of the mean, `[C]`, from which the "one_pass" way measures, so that its sums do not cancel.
      epsilon: added to the variance.
      parts: number of parts, each of consecutive samples; it divides B.

    Returns:
      The normalised `x` in its type; mean and biased variance, both `[parts, C]`. Gradients pass only by the first.
    """
    scale, bias = upcast(scale), upcast(bias)
    if implementation("batch_norm") != "two_pass":
        return one_pass.batch_norm(x, scale, bias, near.astype(scale.dtype), epsilon, parts)
    rows = upcast(x).reshape(parts, -1, *x.shape[1:])  # [parts, B / parts, ..., C]
    axes = tuple(range(1, rows.ndim - 1))
    mean = jnp.mean(rows, axis=axes, keepdims=True)
    var = jnp.mean(jnp.square(rows - mean), axis=axes, keepdims=True)
    y = affine(rows, mean, var, scale, bias, epsilon).reshape(x.shape).astype(x.dtype)
    mean, var = (lax.stop_gradient(value).reshape(parts, -1) for value in (mean, var))
    return y, mean, var


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


def affine(x: Array, mean: Array, var: Array, scale: Array, bias: Array, epsilon: float) -> Array:
    """Normalises `x` `[..., C]` with given statistics, which may have as many axes or one; all in float32 or wider."""
    expand = (1,) * (x.ndim - 1) + (-1,)
    mean, var, scale, bias = (v if v.ndim == x.ndim else v.reshape(expand) for v in (mean, var, scale, bias))
    multiplier = lax.rsqrt(var + epsilon) * scale
    return x * multiplier + (bias - mean * multiplier)


def activate(x: Array, function: Callable[[Array], Array], derivative: Callable[[Array], Array]) -> Array:
    """Applies an activation function in float32 or wider; returns the type of `x`.

    The backward pass of the "recompute" way computes the derivative from the input. With JAX's own, the forward pass
    writes the costly parts of the function for the backward pass to read: more memory, and no less time.

    Args:
      x: of any shape.
      function: of one value.
      derivative: of the function, written in other terms than the function: what both have in common, XLA would compute
        once and keep for the backward pass.
    """
    if implementation("activation") == "recompute":
        return _recomputed(x, function, derivative)
    return function(upcast(x)).astype(x.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _recomputed(x: Array, function: Callable[[Array], Array], derivative: Callable[[Array], Array]) -> Array:
    return function(upcast(x)).astype(x.dtype)


def _recomputed_forward(
    x: Array, function: Callable[[Array], Array], derivative: Callable[[Array], Array]
) -> tuple[Array, Array]:
    return _recomputed(x, function, derivative), x


def _recomputed_backward(
    function: Callable[[Array], Array], derivative: Callable[[Array], Array], x: Array, grad: Array
) -> tuple[Array]:
    return ((upcast(grad) * derivative(upcast(x))).astype(grad.dtype),)


_recomputed.defvjp(_recomputed_forward, _recomputed_backward)


def max_pool(x: Array, size: int, stride: int, padding: int) -> Array:
    """Largest value of every window; the first of several equal ones gets the gradient, as in PyTorch.

    XLA's own backward pass agrees on a CPU. Its specification leaves the order of comparison, and so the choice between
    equal values, to each platform.

    Args:
      x: `[B, H, W, C]`.
      size: of the windows.
      stride: of both axes.
      padding: on every side; it is never the largest.

    Returns:
      `[B, H', W', C]`.
    """
    if implementation("max_pool") == "compare":
        return cpu.max_pool(x, size, stride, padding)
    return xla.max_pool(x, size, stride, padding)


def linear(x: Array, kernel: Array, bias: Array | None = None) -> Array:
    """Linear map of the last axis. All other axes become one, because XLA's CPU backend takes longer with several."""
    y = x.reshape(-1, x.shape[-1]) @ kernel
    if bias is not None:
        y = y + broadcast(bias, y.shape)
    return y.reshape(*x.shape[:-1], kernel.shape[-1])


def _explicit_padding(padding: Padding, size: Sequence[int], kernel_size: int, stride: int) -> Pads:
    """Returns `(before, after)` for height and width; "same" is TensorFlow's rule, the smaller half first."""
    if padding != "same":
        return ((int(padding), int(padding)),) * 2
    totals = [max((-(-n // stride) - 1) * stride + kernel_size - n, 0) for n in size]
    return tuple((total // 2, total - total // 2) for total in totals)


def convolve(x: Array, kernel: Array, *, stride: int = 1, padding: Padding = 0, groups: int = 1) -> Array:
    """2-d cross-correlation of NHWC maps in the way of the platform.

    Args:
      x: `[B, H, W, C]`.
      kernel: `[kh, kw, C / groups, O]`, output channels grouped contiguously as in PyTorch.
      stride: of both axes.
      padding: zeros on every side, or "same" for TensorFlow's rule.
      groups: of channels.

    Returns:
      `[B, H', W', O]`.
    """
    kh, kw, _, out_channels = kernel.shape
    channels = x.shape[-1]
    if kh == kw == stride > 1 and padding == 0 and groups == 1 and implementation("pointwise") == "matmul":
        height, width = (n // stride * stride for n in x.shape[1:3])  # pixels beyond the last patch are not read
        x = rearrange(x[:, :height, :width], "b (h i) (w j) c -> b h w (i j c)", i=stride, j=stride)
        return linear(x, kernel.reshape(-1, out_channels))
    if (kh, kw) == (1, 1) and padding in (0, "same") and implementation("pointwise") == "matmul":
        x = x[:, ::stride, ::stride]
        if groups == 1:
            return linear(x, kernel[0, 0])
        # The groups become the first axis, as in a batched product: otherwise XLA transposes the kernel pixel by pixel.
        batch, height, width, _ = x.shape
        x = rearrange(x, "b h w (g i) -> g (b h w) i", g=groups)
        y = x @ rearrange(kernel[0, 0], "i (g o) -> g i o", g=groups)
        return rearrange(y, "g (b h w) o -> b h w (g o)", b=batch, h=height, w=width)
    pads = _explicit_padding(padding, x.shape[1:3], kh, stride)
    if groups == channels and out_channels % channels == 0 and implementation("depthwise") == "shifted_sum":
        x = jnp.repeat(x, out_channels // channels, axis=-1)  # output channel o reads input channel o // multiplier
        return cpu.depthwise_convolution(x, kernel[:, :, 0], stride, pads)
    if groups == channels == out_channels and implementation("depthwise") == "pallas":
        from maxmap.kernels import depthwise  # takes half a second to import

        if depthwise.fits(x.shape, channels, kh, stride, pads, devices()):
            window = depthwise.Window(kh, stride, (pads[0][0], pads[1][0]))
            y = depthwise.depthwise(x.transpose(1, 2, 0, 3), kernel[:, :, 0], window)
            return y.transpose(2, 0, 1, 3)
    if groups == 1 and implementation("dense") == "im2col":
        return cpu.convolution(x, kernel, stride, pads)
    return xla.convolution(x, kernel, stride, pads, groups)


def expansion(
    shape: Sequence[int],
    channels: int,
    kernel_size: int,
    function: Callable[[Array], Array],
    *,
    stride: int,
    padding: Padding,
    shortcut: str,
) -> Callable[..., tuple[Array, Array, tuple[Array, ...], Array, Array]] | None:
    """Finds the operation that expands maps and convolves them depthwise without leaving the chip in between.

    Args:
      shape: of the maps, `[B, H, W, I]`.
      channels: C, to which they are expanded.
      kernel_size: k, of the depthwise convolution.
      function: the activation in between, of single values.
      stride: of the depthwise convolution, both axes.
      padding: of the depthwise convolution; see `convolve`.
      shortcut: "same" for the map itself, "mean" for its 2x2 means, or "none".

    Returns:
      None where the platform has no kernel for that. Otherwise a function of a map, an estimate of its mean `[I]`, a
      function `fold`, a tuple of arrays for it, and a kernel `[k, k, 1, C]`. `fold`, of the map's mean `[I]` and
      covariance `[I, I]` and the arrays, returns weights `[I, C]` and a bias `[C]`. The function convolves
      function(map @ weights + bias). It returns the result `[B, H', W', C]`; its sum and sum of squares over all
      pixels, `[2, C]`; a tuple with the shortcut, or none; mean and covariance, by which no gradient passes.
    """
    if implementation("expand") != "pallas":
        return None
    from maxmap.kernels import depthwise, normalised  # takes half a second to import

    pads = _explicit_padding(padding, shape[1:3], kernel_size, stride)
    if not depthwise.fits(shape, channels, kernel_size, stride, pads, devices()):
        return None
    window = depthwise.Window(kernel_size, stride, (pads[0][0], pads[1][0]), function)

    def expand(
        x: Array, near: Array, fold: Callable[..., tuple[Array, Array]], folding: tuple[Array, ...], kernel: Array
    ) -> tuple[Array, Array, tuple[Array, ...], Array, Array]:
        front = normalised.Front(window, fold, shortcut)
        x = x.transpose(1, 2, 0, 3)
        y, sums, beside, mean, covariance = normalised.expand(x, near, folding, kernel[:, :, 0], front)
        return y.transpose(2, 0, 1, 3), sums, tuple(z.transpose(2, 0, 1, 3) for z in beside), mean, covariance

    return expand


def squeeze_project(
    x: Array,
    factor: Array,
    summand: Array,
    gating: tuple[Array, ...],
    weights: Array,
    bias: Array,
    *,
    function: Callable[[Array], Array],
    gate: Callable[..., Array],
) -> Array:
    """Norm, activation, squeeze-excitation and 1x1 convolution in one operation, behind an `expansion`.

    With z = function(x * factor + summand) it computes z * gate(mean of z over the pixels, *gating) @ weights + bias.

    Args:
      x: what an `expansion` returns, `[B, H, W, C]`.
      factor: `[C]`.
      summand: `[C]`.
      gating: arguments of the gate behind the mean.
      weights: `[C, O]`.
      bias: `[O]`.
      function: an activation, of single values.
      gate: a function of the mean `[B, C]` and other arrays; it returns factors `[B, C]`.

    Returns:
      `[B, H, W, O]`.
    """
    from maxmap.kernels import squeeze  # takes half a second to import

    batch, height, width, channels = x.shape
    pixels = x.transpose(1, 2, 0, 3).reshape(-1, batch, channels)
    y = squeeze.squeeze_project(pixels, factor, summand, gating, weights, bias, squeeze.Block(function, gate))
    return y.reshape(height, width, batch, -1).transpose(2, 0, 1, 3)


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
