"""How single operations are computed: convolutions, linear maps, pooling, activations, softmax, attention, sums.

`IMPLEMENTATIONS` names the way of each operation by target platform; maxmap/kernels/ has the ways that XLA does not
have. All ways of an operation give the same results, which tests/test_operations.py shows in float64. Nothing here has
parameters: `maxmap.layers` has the modules.
"""

import collections
import functools
import re
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

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
# stem         convolutions to 64 channels at high resolution: "plain" or "pallas" (on pairs of pixels, which a kernel
#              takes apart; see maxmap/layers/paired.py)
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
        "stem": "plain",
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
        "stem": "plain",
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
        "stem": "plain",
        "bottleneck": "plain",
    },
}
IMPLEMENTATIONS["onnx"] = IMPLEMENTATIONS["plain"]  # a program to write as a graph; see `one_call`
IMPLEMENTATIONS["tpu"] = IMPLEMENTATIONS["default"] | {
    "depthwise": "pallas",
    "expand": "pallas",
    "block": "fused",
    "bottleneck": "pallas",
    "mlp": "fused",
    "resize": "images_last",
    "stem": "pallas",
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


def one_call(name: str, function: Callable[..., Array], *operands: Array | None, **attributes: Any) -> Array:
    """Calls a function. In a program for ONNX, which has operators for some functions, the call keeps its name."""
    if platform() == "onnx":
        function = lax.composite(function, name=name)
    return function(*operands, **attributes)


def softmax(logits: Array) -> Array:
    """Softmax over the last axis, computed in float32 or wider, returned in the type of `logits`."""
    return one_call("softmax", _softmax, logits)


def _softmax(logits: Array) -> Array:
    return nn.softmax(upcast(logits), axis=-1).astype(logits.dtype)


def attention(
    q: Array,
    k: Array,
    v: Array,
    bias: Array | None = None,
    dropout: Callable[[Array], Array] | None = None,
    keys: Array | None = None,
) -> Array:
    """Multi-head attention in the way of the platform.

    The "pallas" kernel takes at most 128 tokens, all keys and no dropout; otherwise the "plain" way computes it.

    Args:
      q: queries `[..., H, Q, D]`, scaled.
      k: keys `[..., H, K, D]`.
      v: values `[..., H, K, D]`.
      bias: of the logits, `[H, Q, K]`.
      dropout: of the weights; None for none.
      keys: which keys of W windows count, bool `[W, K]`, at least one in each; None for all. The axes in front of H
        count windows, those of an image together.

    Returns:
      `[..., H, Q, D]`.
    """
    if dropout is None and keys is None and implementation("attention") == "pallas":
        from maxmap.kernels import pallas  # takes half a second to import

        if max(q.shape[-2], k.shape[-2]) <= pallas.LARGEST_WINDOW and local_batch(q.shape[0]) is not None:
            windows = (x.reshape(-1, *x.shape[-3:]) for x in (q, k, v))
            return pallas.window_attention(*windows, bias).reshape(q.shape)
    logits = jnp.einsum("...qd,...kd->...qk", q, k)
    if bias is not None:
        repeated = broadcast(bias.reshape(-1).astype(logits.dtype), (logits.size // bias.size, bias.size))
        logits = logits + repeated.reshape(logits.shape)
    if keys is not None:
        grouped = logits.reshape(-1, len(keys), *logits.shape[-3:])
        logits = jnp.where(keys[:, None, None], grouped, -jnp.inf).reshape(logits.shape)
    return attend(logits, v, dropout)


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
    return one_call("attend", _attend, logits, values) if dropout is None else _attend(logits, values, dropout)


def _attend(logits: Array, values: Array, dropout: Callable[[Array], Array] | None = None) -> Array:
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
    return one_call("layer_norm", _layer_norm, x, scale, bias, epsilon=epsilon)


def _layer_norm(x: Array, scale: Array, bias: Array, *, epsilon: float) -> Array:
    rows, scale, bias = upcast(x).reshape(-1, x.shape[-1]), upcast(scale), upcast(bias)
    if implementation("sum") == "matmul":
        return cpu.layer_norm(rows, scale, bias, epsilon).reshape(x.shape).astype(x.dtype)
    centred = rows - jnp.mean(rows, axis=-1, keepdims=True)
    variance = jnp.mean(jnp.square(centred), axis=-1, keepdims=True)
    y = centred * (lax.rsqrt(variance + epsilon) * scale[None]) + bias[None]
    return y.reshape(x.shape).astype(x.dtype)


def batch_norm(
    x: Array, scale: Array, bias: Array, near: Array, epsilon: float, parts: int = 1, pixels: int = 1
) -> tuple[Array, Array, Array]:
    """Normalises each of several equal parts of a batch over all axes but the last, in float32 or wider.

    Args:
      x: `[B, ..., C]`.
      scale: `[C]`.
      bias: `[C]`.
      near: an estimate of the mean, `[C]`, from which the "one_pass" way measures, so that its sums do not cancel.
      epsilon: added to the variance.
      parts: number of parts, each of consecutive samples; it divides B.
      pixels: that lie side by side in the last axis of `x`, `[B, ..., pixels * C]`; the "one_pass" way alone has more
        than 1.

    Returns:
      The normalised `x` in its type; mean and biased variance, both `[parts, C]`. Gradients pass only by the first.
    """
    scale, bias = upcast(scale), upcast(bias)
    if implementation("batch_norm") != "two_pass":
        return one_pass.batch_norm(x, scale, bias, near.astype(scale.dtype), epsilon, parts, pixels)
    rows = upcast(x).reshape(parts, -1, *x.shape[1:])  # [parts, B / parts, ..., C]
    axes = tuple(range(1, rows.ndim - 1))
    mean = jnp.mean(rows, axis=axes, keepdims=True)
    var = jnp.mean(jnp.square(rows - mean), axis=axes, keepdims=True)
    y = affine(rows, mean, var, scale, bias, epsilon).reshape(x.shape).astype(x.dtype)
    mean, var = (lax.stop_gradient(value).reshape(parts, -1) for value in (mean, var))
    return y, mean, var


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
    return one_call(function.__name__.lstrip("_"), function, upcast(x)).astype(x.dtype)


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
    return one_call("linear", _linear, x, kernel, bias)


def _linear(x: Array, kernel: Array, bias: Array | None) -> Array:
    y = x.reshape(-1, x.shape[-1]) @ kernel
    if bias is not None:
        y = y + broadcast(bias, y.shape)
    return y.reshape(*x.shape[:-1], kernel.shape[-1])


def explicit_padding(padding: Padding, size: Sequence[int], kernel_size: int, stride: int) -> Pads:
    """Returns `(before, after)` for height and width; "same" is TensorFlow's rule, the smaller half first."""
    if padding != "same":
        return ((int(padding), int(padding)),) * 2
    totals = [max((-(-n // stride) - 1) * stride + kernel_size - n, 0) for n in size]
    return tuple((total // 2, total - total // 2) for total in totals)


def depthwise_maps(
    x: Array, kernel: Array, stride: int, pads: Pads, *, beside: bool = False
) -> tuple[Array, ...] | None:
    """Convolves maps with one kernel per channel in the kernel of the platform; None where it has none for them.

    Args:
      x: `[B, H, W, C]`.
      kernel: `[k, k, 1, C]`.
      stride: of both axes.
      pads: zeros before and after height and width.
      beside: returns `x` too.

    Returns:
      `[B, H', W', C]`, and `x` if asked for, to be read in its stead by another path: the gradients are added in the
      kernel.
    """
    if implementation("depthwise") != "pallas":
        return None
    from maxmap.kernels import depthwise  # takes half a second to import

    if not depthwise.fits(x.shape, x.shape[-1], len(kernel), stride, pads, devices()):
        return None
    window = depthwise.Window(len(kernel), stride, (pads[0][0], pads[1][0]))
    found = depthwise.depthwise(x.transpose(1, 2, 0, 3), kernel[:, :, 0], window, beside)
    return tuple(y.transpose(2, 0, 1, 3) for y in found)


def convolve_beside(x: Array, kernel: Array, padding: int) -> tuple[Array, Array]:
    """Depthwise convolution at stride 1, and `x`, to be read in its stead by the residual path.

    Args:
      x: `[B, H, W, C]`.
      kernel: `[k, k, 1, C]`.
      padding: zeros on every side.
    """
    found = depthwise_maps(x, kernel, 1, ((padding, padding),) * 2, beside=True)
    if found is None:
        return convolve(x, kernel, padding=padding, groups=x.shape[-1]), x
    return found[0], found[1]


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
    pads = explicit_padding(padding, x.shape[1:3], kh, stride)
    if groups == channels and out_channels % channels == 0 and implementation("depthwise") == "shifted_sum":
        x = jnp.repeat(x, out_channels // channels, axis=-1)  # output channel o reads input channel o // multiplier
        return cpu.depthwise_convolution(x, kernel[:, :, 0], stride, pads)
    if groups == channels == out_channels and (found := depthwise_maps(x, kernel, stride, pads)):
        return found[0]
    if groups == 1 and implementation("dense") == "im2col":
        return cpu.convolution(x, kernel, stride, pads)
    return xla.convolution(x, kernel, stride, pads, groups)
