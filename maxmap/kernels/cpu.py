"""Operations that XLA's CPU backend computes slowly, written in other operations that it computes fast.

docs/performance.md has the measurements. Every function equals XLA's own operation, gradients included.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from maxmap.kernels import xla
from maxmap.kernels.target import Array, accumulator, upcast
from maxmap.kernels.xla import Pads


def unfused(function: Callable[..., Array], *operands: Array) -> Array:
    """Returns `function(*operands)`, which XLA's CPU compiler does not fuse into the operations that read the result.

    Fused, a sum of shifted products would be computed again in every operation that reads it. The compiler fuses
    nothing across the border of a conditional, so the function stands in a branch that is always taken. The barrier
    hides the constant condition until the compiler has simplified all conditionals.
    """
    like = jax.eval_shape(function, *operands)
    return lax.cond(lax.optimization_barrier(True), function, lambda *_: jnp.zeros(like.shape, like.dtype), *operands)


def sum_rows(x: Array) -> Array:
    """Sums `[N, C]` over N in float32 or wider, as a matrix product, which XLA does not fuse with its operands.

    XLA fuses a plain sum with every cheap operation that leads to its terms, back through the residual path and across
    blocks, and computes these operations again for each parameter.
    """
    return jnp.matmul(jnp.ones((1, x.shape[0]), x.dtype), x, preferred_element_type=accumulator(x.dtype))[0]


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def layer_norm(x: Array, scale: Array, bias: Array, epsilon: float) -> Array:
    """Normalises `[N, C]` over C. All sums are matrix products, for the reason that `sum_rows` gives.

    Args:
      x: `[N, C]`, in float32 or wider.
      scale: `[C]`.
      bias: `[C]`.
      epsilon: added to the variance.

    Returns:
      `[N, C]`.
    """
    return _layer_norm_forward(x, scale, bias, epsilon)[0]


def _layer_norm_forward(x: Array, scale: Array, bias: Array, epsilon: float) -> tuple[Array, tuple[Array, ...]]:
    weights = jnp.full((x.shape[1], 1), 1 / x.shape[1], x.dtype)
    mean = x @ weights
    inverse = lax.rsqrt(jnp.square(x - mean) @ weights + epsilon)
    return (x - mean) * inverse * scale[None] + bias[None], (x, mean, inverse, scale)


def _layer_norm_backward(
    epsilon: float, residuals: tuple[Array, Array, Array, Array], grad: Array
) -> tuple[Array, Array, Array]:
    x, mean, inverse, scale = residuals
    normalised = (x - mean) * inverse
    product = grad * normalised
    weights = scale[:, None] / x.shape[1]
    grad_x = inverse * (grad * scale[None] - grad @ weights - normalised * (product @ weights))
    return grad_x, sum_rows(product), sum_rows(grad)


layer_norm.defvjp(_layer_norm_forward, _layer_norm_backward)


def _shifted(x: Array, i: int, j: int, stride: int, size: tuple[int, int]) -> Array:
    """The pixels of a padded map that weight (i, j) of a kernel is multiplied with, at all `size` positions."""
    height, width = size
    return x[:, i : i + stride * (height - 1) + 1 : stride, j : j + stride * (width - 1) + 1 : stride]


# Under jit, this and the backward passes below are traced once for all layers of one shape.
@functools.partial(jax.jit, static_argnames="stride")
def _shifted_sum(x: Array, kernel: Array, stride: int) -> Array:
    """Valid depthwise convolution of `x` [B, H, W, C] with `kernel` [kh, kw, C] as a sum of shifted products."""
    kh, kw, _ = kernel.shape
    size = ((x.shape[1] - kh) // stride + 1, (x.shape[2] - kw) // stride + 1)
    offsets = [(i, j) for i in range(kh) for j in range(kw)]
    products = (_shifted(x, i, j, stride, size) * kernel[i, j][None, None, None] for i, j in offsets)
    return functools.reduce(jnp.add, products)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def depthwise_convolution(x: Array, kernel: Array, stride: int, pads: Pads) -> Array:
    """Depthwise convolution as a sum of shifted products.

    Args:
      x: `[B, H, W, C]`.
      kernel: `[kh, kw, C]`.
      stride: of both axes.
      pads: zeros before and after, for height and width.

    Returns:
      `[B, H', W', C]`.
    """
    padded = jnp.pad(x, [(0, 0), *pads, (0, 0)])  # outside of `unfused`: fused with what computes x, it costs nothing
    return unfused(functools.partial(_shifted_sum, stride=stride), padded, kernel)


def _depthwise_forward(x: Array, kernel: Array, stride: int, pads: Pads) -> tuple[Array, tuple[Array, Array]]:
    return depthwise_convolution(x, kernel, stride, pads), (x, kernel)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _depthwise_backward(stride: int, pads: Pads, residuals: tuple[Array, Array], grad: Array) -> tuple[Array, Array]:
    x, kernel = residuals
    grad_x = _depthwise_input_gradient(grad, kernel, stride, pads, x.shape[1:3])
    return grad_x, _depthwise_kernel_gradient(x, grad, kernel, stride, pads)


depthwise_convolution.defvjp(_depthwise_forward, _depthwise_backward)


def _depthwise_input_gradient(grad: Array, kernel: Array, stride: int, pads: Pads, size: tuple[int, ...]) -> Array:
    """The transposed convolution: `grad`, spread by the stride and padded, convolved with the flipped kernel.

    Rows and columns at the far edge that the forward pass does not read get a zero gradient.

    Args:
      grad: `[B, H', W', C]`.
      kernel: `[kh, kw, C]`.
      stride: of both axes.
      pads: of the forward pass.
      size: H and W of the input.

    Returns:
      `[B, H, W, C]`.
    """
    dilation = [(0, 0, 0)]  # padding before, after, and zeros between neighbours
    for pixels, n, k, (before, after) in zip(size, grad.shape[1:3], kernel.shape[:2], pads, strict=True):
        unread = pixels + before + after - (stride * (n - 1) + k)
        dilation.append((k - 1 - before, k - 1 + unread - after, stride - 1))
    dilated_grad = lax.pad(grad, jnp.zeros((), grad.dtype), [*dilation, (0, 0, 0)])
    return unfused(functools.partial(_shifted_sum, stride=1), dilated_grad, kernel[::-1, ::-1])


def _depthwise_kernel_gradient(x: Array, grad: Array, kernel: Array, stride: int, pads: Pads) -> Array:
    """Sums of products of the input and `grad`, one for every weight, computed in float32 or wider.

    A loop takes a few rows at a time and adds their products to one sum per weight, image, column and channel; these
    sums are reduced at the end. XLA's CPU backend takes ten times as long for one reduction over batch, height and
    width, and as long with one operation for each weight and row. The loop runs over rows and not over images, because
    the batch may be split over several devices.

    Args:
      x: `[B, H, W, C]`.
      grad: `[B, H', W', C]`.
      kernel: `[kh, kw, C]`, for its shape and type.
      stride: of both axes.
      pads: of the forward pass.

    Returns:
      `[kh, kw, C]`.
    """
    kh, kw, channels = kernel.shape
    batch, height, width, _ = grad.shape
    rows = _rows_per_step(height)
    missing = -height % rows
    grad = jnp.pad(grad, [(0, 0), (0, missing), (0, 0), (0, 0)])
    (above, below), sides = pads
    x = jnp.pad(x, [(0, 0), (above, below + missing * stride), sides, (0, 0)])

    def add_rows(step: Array, totals: list[Array]) -> list[Array]:
        g = lax.dynamic_slice_in_dim(grad, step * rows, rows, axis=1)
        lines = lax.dynamic_slice_in_dim(x, step * rows * stride, (rows - 1) * stride + kh, axis=1)

        def products(i: int, j: int) -> Array:
            columns = lines[:, :, j : j + stride * (width - 1) + 1 : stride]
            return functools.reduce(jnp.add, (upcast(columns[:, i + r * stride] * g[:, r]) for r in range(rows)))

        return [total + jnp.stack([products(i, j) for j in range(kw)]) for i, total in enumerate(totals)]

    zeros = jnp.zeros((kw, batch, width, channels), accumulator(kernel.dtype))
    totals = lax.fori_loop(0, (height + missing) // rows, add_rows, [zeros] * kh)
    gradient = jnp.stack([jnp.sum(total, axis=(1, 2)) for total in totals])
    return gradient.reshape(kernel.shape).astype(kernel.dtype)


def _rows_per_step(height: int) -> int:
    """The number of rows, from 4 to 8, for which a map of `height` rows needs the least padding."""
    return min(range(min(8, height), min(4, height) - 1, -1), key=lambda rows: -height % rows)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def convolution(x: Array, kernel: Array, stride: int, pads: Pads) -> Array:
    """XLA's convolution; the kernel's gradient is a product of patches (im2col) and the output's gradient.

    XLA's CPU backend computes the kernel's gradient as a convolution with a kernel as large as the map, which takes up
    to three times as long.

    Args:
      x: `[B, H, W, C]`.
      kernel: `[kh, kw, C, O]`.
      stride: of both axes.
      pads: zeros before and after, for height and width.

    Returns:
      `[B, H', W', O]`.
    """
    return xla.convolution(x, kernel, stride, pads)


def _convolution_forward(x: Array, kernel: Array, stride: int, pads: Pads) -> tuple[Array, tuple[Array, Array]]:
    return xla.convolution(x, kernel, stride, pads), (x, kernel)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _convolution_backward(stride: int, pads: Pads, residuals: tuple[Array, Array], grad: Array) -> tuple[Array, Array]:
    x, kernel = residuals
    (grad_x,) = jax.linear_transpose(lambda x: xla.convolution(x, kernel, stride, pads), x)(grad)
    kh, kw, channels, out_channels = kernel.shape
    batch, height, width, _ = grad.shape
    x = jnp.pad(x, [(0, 0), *pads, (0, 0)])
    # As many rows at a time as keep their patches in a core's cache. Not images: the batch may be split over devices.
    rows = max(n for n in range(1, height + 1) if height % n == 0 and (n == 1 or batch * n * width <= 1024))

    def add_rows(step: Array, total: Array) -> Array:
        g = lax.dynamic_slice_in_dim(grad, step * rows, rows, axis=1)
        lines = lax.dynamic_slice_in_dim(x, step * rows * stride, (rows - 1) * stride + kh, axis=1)
        patches = [_shifted(lines, i, j, stride, (rows, width)) for i in range(kh) for j in range(kw)]
        columns = jnp.concatenate(patches, axis=-1).reshape(-1, kh * kw * channels)
        return total + upcast(columns.T @ g.reshape(-1, out_channels))

    total = jnp.zeros((kh * kw * channels, out_channels), accumulator(kernel.dtype))
    total = lax.fori_loop(0, height // rows, add_rows, total)
    return grad_x, total.reshape(kernel.shape).astype(kernel.dtype)


convolution.defvjp(_convolution_forward, _convolution_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def max_pool(x: Array, size: int, stride: int, padding: int) -> Array:
    """XLA's max pooling; the backward pass finds the largest pixels by comparing again.

    XLA's CPU backend keeps the index of the largest pixel of every window for the backward pass.

    Args:
      x: `[B, H, W, C]`.
      size: of the windows.
      stride: of both axes.
      padding: on every side.

    Returns:
      `[B, H', W', C]`.
    """
    return xla.max_pool(x, size, stride, padding)


def _max_pool_forward(x: Array, size: int, stride: int, padding: int) -> tuple[Array, tuple[Array, Array]]:
    y = max_pool(x, size, stride, padding)
    return y, (x, y)


def _max_pool_backward(
    size: int, stride: int, padding: int, residuals: tuple[Array, Array], grad: Array
) -> tuple[Array]:
    x, y = residuals
    windows = (y.shape[1], y.shape[2])
    pads = [(0, 0), (padding, padding), (padding, padding), (0, 0)]
    padded = jnp.pad(x, pads, constant_values=-jnp.inf)
    zero, found = jnp.zeros((), grad.dtype), jnp.zeros(y.shape, bool)
    parts = []
    for offset in ((i, j) for i in range(size) for j in range(size)):
        largest = (_shifted(padded, *offset, stride, windows) == y) & ~found  # the first of several equal pixels
        found |= largest
        dilation = [
            (before, pixels - before - stride * (n - 1) - 1, stride - 1)
            for before, pixels, n in zip(offset, padded.shape[1:3], windows, strict=True)
        ]
        parts.append(lax.pad(jnp.where(largest, grad, zero), zero, [(0, 0, 0), *dilation, (0, 0, 0)]))
    inside = [slice(before, n - after) for n, (before, after) in zip(padded.shape, pads, strict=True)]
    return (functools.reduce(jnp.add, parts)[tuple(inside)],)


max_pool.defvjp(_max_pool_forward, _max_pool_backward)
