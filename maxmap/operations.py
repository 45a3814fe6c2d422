"""How single operations are computed: convolutions, linear maps, softmax and attention, with their backward passes.

Where a platform has a faster way than XLA's own, `IMPLEMENTATIONS` names it; every way gives the same result, which
tests/test_layers.py shows in float64. Nothing here has parameters: `maxmap.layers` has the modules.
"""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import linen as nn
from jax import lax

Array = jax.Array
Padding = int | str
Pads = tuple[tuple[int, int], ...]

# How convolutions of each kind and attention are computed, by platform; platforms that are not listed use "default".
# XLA's CPU backend runs a 1x1 convolution about 6 times slower than the same matrix product, a depthwise one about 17
# times slower than a sum of shifted products, and the kernel's gradient of any other up to 3 times slower than products
# of patches.
IMPLEMENTATIONS = {
    "cpu": {"pointwise": "matmul", "depthwise": "shifts", "dense": "patches", "attention": "plain"},
    "default": {"pointwise": "lax", "depthwise": "lax", "dense": "lax", "attention": "plain"},
}


def implementation(kind: str) -> str:
    """Returns how convolutions of `kind` ("pointwise", "depthwise" or "dense"), or "attention", are computed here.

    To choose another way, set `IMPLEMENTATIONS["cpu" or "default"][kind]` before the model is traced: "lax" or what the
    CPU has for convolutions, "plain" or "pallas" (one GPU; see maxmap/kernels.py) for attention.
    """
    return IMPLEMENTATIONS.get(jax.default_backend(), IMPLEMENTATIONS["default"])[kind]


def wide(x: Array) -> Array:
    """Casts to float32, or leaves float64: the island in which statistics, softmax and Gram products are computed."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def softmax(logits: Array) -> Array:
    """Softmax over the last axis, computed in float32 or wider, returned in the type of `logits`."""
    return nn.softmax(wide(logits), axis=-1).astype(logits.dtype)


def attention(
    q: Array, k: Array, v: Array, bias: Array | None = None, dropout: Callable[[Array], Array] | None = None
) -> Array:
    """Multi-head attention, computed in the way that `implementation` names for the platform.

    The kernel takes at most 128 tokens and no dropout; what does not fit it is computed plainly.

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
        from maxmap import kernels  # takes half a second to import

        if max(q.shape[-2], k.shape[-2]) <= kernels.LARGEST_WINDOW:
            windows = (x.reshape(-1, *x.shape[-3:]) for x in (q, k, v))
            return kernels.window_attention(*windows, bias).reshape(q.shape)
    logits = jnp.einsum("...qd,...kd->...qk", q, k)
    if bias is not None:
        logits = logits + bias.reshape((1,) * (logits.ndim - 3) + bias.shape).astype(logits.dtype)
    return attend(logits, v, dropout)


def attend(logits: Array, values: Array, dropout: Callable[[Array], Array] | None = None) -> Array:
    """Averages values with the softmax of logits as weights; divides after the product, where there is less to divide.

    Args:
      logits: `[..., queries, keys]`.
      values: `[..., keys, D]`.
      dropout: of the weights; None for none.

    Returns:
      `[..., queries, D]`, in the type of `values`; the softmax is computed in float32 or wider.
    """
    logits = wide(logits)
    weights = jnp.exp(logits - lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True)))
    total = jnp.sum(weights, axis=-1, keepdims=True)
    weights = weights.astype(values.dtype)
    if dropout is not None:
        weights = dropout(weights)
    return (wide(weights @ values) / total).astype(values.dtype)


def linear(x: Array, kernel: Array, bias: Array | None = None) -> Array:
    """Linear map of the last axis; on two axes, because XLA's CPU backend is much faster on those than on more."""
    y = x.reshape(-1, x.shape[-1]) @ kernel
    if bias is not None:
        y = y + bias[None]
    return y.reshape(*x.shape[:-1], kernel.shape[-1])


def _explicit_padding(padding: Padding, size: Sequence[int], kernel_size: int, stride: int) -> Pads:
    """`(before, after)` for height and width; "same" is TensorFlow's rule, the smaller half first."""
    if padding != "same":
        return ((int(padding), int(padding)),) * 2
    totals = [max((-(-n // stride) - 1) * stride + kernel_size - n, 0) for n in size]
    return tuple((total // 2, total - total // 2) for total in totals)


def _shifted(x: Array, i: int, j: int, stride: int, size: tuple[int, int]) -> Array:
    """The pixels of a padded map that tap (i, j) of a kernel reads."""
    height, width = size
    return x[:, i : i + stride * (height - 1) + 1 : stride, j : j + stride * (width - 1) + 1 : stride]


def _shift_sum(x: Array, kernel: Array, stride: int) -> Array:
    """Valid depthwise convolution of `x` [B, H, W, C] with `kernel` [kh, kw, C] as a sum of shifted products."""
    kh, kw, _ = kernel.shape
    size = ((x.shape[1] - kh) // stride + 1, (x.shape[2] - kw) // stride + 1)
    taps = [(i, j) for i in range(kh) for j in range(kw)]
    products = (_shifted(x, i, j, stride, size) * kernel[i, j][None, None, None] for i, j in taps)
    return functools.reduce(jnp.add, products)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def depthwise_shifts(x: Array, kernel: Array, stride: int) -> Array:
    """Valid depthwise convolution as a sum of shifted products, with its own backward pass.

    Args:
      x: padded map `[B, H, W, C]`.
      kernel: `[kh, kw, C]`.
      stride: of both axes.

    Returns:
      `[B, (H - kh) // stride + 1, (W - kw) // stride + 1, C]`.
    """
    return _shift_sum(x, kernel, stride)


def _depthwise_forward(x: Array, kernel: Array, stride: int) -> tuple[Array, tuple[Array, Array]]:
    return _shift_sum(x, kernel, stride), (x, kernel)


def _depthwise_backward(stride: int, residuals: tuple[Array, Array], grad: Array) -> tuple[Array, Array]:
    x, kernel = residuals
    kh, kw, channels = kernel.shape
    batch, height, width, _ = grad.shape
    # What the forward pass did not read at the far edge gets a zero gradient.
    rest = [x.shape[1 + a] - (stride * (n - 1) + k) for a, (n, k) in enumerate(((height, kh), (width, kw)))]
    spread = [(0, 0, 0), *((k - 1, k - 1 + r, stride - 1) for k, r in zip((kh, kw), rest, strict=True)), (0, 0, 0)]
    grad_x = _shift_sum(lax.pad(grad, jnp.zeros((), grad.dtype), spread), kernel[::-1, ::-1], 1)

    # Row by row, and a sum of products for every column: XLA's CPU reduction over (batch, height, width) at once is
    # four times slower. The batch stays whole, since it may lie on several devices.
    def add_row(row: Array, totals: list[Array]) -> list[Array]:
        g = lax.dynamic_slice_in_dim(grad, row, 1, axis=1)
        rows = lax.dynamic_slice_in_dim(x, row * stride, kh, axis=1)
        taps = (_shifted(rows, i, j, stride, (1, width)) for i in range(kh) for j in range(kw))
        return [total + wide(tap * g) for total, tap in zip(totals, taps, strict=True)]

    zeros = jnp.zeros((batch, 1, width, channels), jnp.promote_types(kernel.dtype, jnp.float32))
    totals = lax.fori_loop(0, height, add_row, [zeros] * (kh * kw))
    grad_kernel = jnp.stack([jnp.sum(total, axis=(0, 1, 2)) for total in totals])
    return grad_x, grad_kernel.reshape(kernel.shape).astype(kernel.dtype)


depthwise_shifts.defvjp(_depthwise_forward, _depthwise_backward)


def _lax_convolution(x: Array, kernel: Array, stride: int, pads: Pads, groups: int = 1) -> Array:
    return lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        pads,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def convolve_by_patches(x: Array, kernel: Array, stride: int, pads: Pads) -> Array:
    """Convolution whose kernel's gradient is computed as products of patches and gradients.

    XLA's CPU backend computes that gradient as a convolution with a kernel as large as the map, up to three times
    slower; the forward pass and the gradient of the map are its own.

    Args:
      x: `[B, H, W, C]`.
      kernel: `[kh, kw, C, O]`.
      stride: of both axes.
      pads: zeros before and after, for height and width.

    Returns:
      `[B, H', W', O]`.
    """
    return _lax_convolution(x, kernel, stride, pads)


def _patches_forward(x: Array, kernel: Array, stride: int, pads: Pads) -> tuple[Array, tuple[Array, Array]]:
    return _lax_convolution(x, kernel, stride, pads), (x, kernel)


def _patches_backward(stride: int, pads: Pads, residuals: tuple[Array, Array], grad: Array) -> tuple[Array, Array]:
    x, kernel = residuals
    (grad_x,) = jax.linear_transpose(lambda x: _lax_convolution(x, kernel, stride, pads), x)(grad)
    kh, kw, channels, out_channels = kernel.shape
    batch, height, width, _ = grad.shape
    x = jnp.pad(x, [(0, 0), *pads, (0, 0)])
    # So many rows at a time that their patches stay in a core's cache; the batch may lie on several devices.
    rows = max(n for n in range(1, height + 1) if height % n == 0 and (n == 1 or batch * n * width <= 1024))

    def add_rows(step: Array, total: Array) -> Array:
        g = lax.dynamic_slice_in_dim(grad, step * rows, rows, axis=1)
        lines = lax.dynamic_slice_in_dim(x, step * rows * stride, (rows - 1) * stride + kh, axis=1)
        taps = [_shifted(lines, i, j, stride, (rows, width)) for i in range(kh) for j in range(kw)]
        patches = jnp.concatenate(taps, axis=-1).reshape(-1, kh * kw * channels)
        return total + wide(patches.T @ g.reshape(-1, out_channels))

    total = jnp.zeros((kh * kw * channels, out_channels), jnp.promote_types(kernel.dtype, jnp.float32))
    total = lax.fori_loop(0, height // rows, add_rows, total)
    return grad_x, total.reshape(kernel.shape).astype(kernel.dtype)


convolve_by_patches.defvjp(_patches_forward, _patches_backward)


def convolve(x: Array, kernel: Array, *, stride: int = 1, padding: Padding = 0, groups: int = 1) -> Array:
    """2-d cross-correlation of NHWC maps, computed in the way that `implementation` names for the platform.

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
    if (kh, kw) == (1, 1) and padding in (0, "same") and implementation("pointwise") == "matmul":
        x = x[:, ::stride, ::stride]
        if groups == 1:
            return linear(x, kernel[0, 0])
        x = rearrange(x, "b h w (g i) -> b h w g i", g=groups)
        y = jnp.einsum("bhwgi,igo->bhwgo", x, rearrange(kernel[0, 0], "i (g o) -> i g o", g=groups))
        return rearrange(y, "b h w g o -> b h w (g o)")
    pads = _explicit_padding(padding, x.shape[1:3], kh, stride)
    if groups == channels and out_channels % channels == 0 and implementation("depthwise") == "shifts":
        x = jnp.repeat(x, out_channels // channels, axis=-1)  # output channel o reads input channel o // multiplier
        x = jnp.pad(x, [(0, 0), *pads, (0, 0)])
        return depthwise_shifts(x, kernel[:, :, 0], stride)
    if groups == 1 and implementation("dense") == "patches":
        return convolve_by_patches(x, kernel, stride, pads)
    return _lax_convolution(x, kernel, stride, pads, groups)
