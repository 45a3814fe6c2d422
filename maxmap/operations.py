"""How single operations are computed: convolutions, linear maps, softmax and attention, with their backward passes.

Where a platform has a faster way than XLA's own, `IMPLEMENTATIONS` names it; every way gives the same result, which
tests/test_layers.py shows in float64. Nothing here has parameters: `maxmap.layers` has the modules.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import linen as nn
from jax import lax

Array = jax.Array
Padding = int | str
Pads = tuple[tuple[int, int], ...]

# XLA's own way for everything.
PLAIN = {"pointwise": "lax", "depthwise": "lax", "dense": "lax", "sum": "lax", "attention": "plain"}

# How convolutions of each kind and attention are computed, by platform; platforms that are not listed use "default".
# XLA's CPU backend runs a 1x1 convolution about 6 times slower than the same matrix product, a depthwise one about 17
# times slower than a sum of shifted products, and the kernel's gradient of any other up to 3 times slower than products
# of patches.
IMPLEMENTATIONS = {
    "cpu": {"pointwise": "matmul", "depthwise": "shifts", "dense": "patches", "sum": "matmul", "attention": "plain"},
    "default": dict(PLAIN),
}

_plainly = ContextVar("plainly", default=False)


@contextlib.contextmanager
def plainly() -> Iterator[None]:
    """What is traced inside is computed as in `PLAIN` on every platform: the form in which operations are counted."""
    token = _plainly.set(True)
    try:
        yield
    finally:
        _plainly.reset(token)


def implementation(kind: str) -> str:
    """Returns how convolutions of `kind` ("pointwise", "depthwise" or "dense"), "sum" or "attention" are computed here.

    "sum" is of the sums in layer norms and in the gradients of parameters that every position shares. To choose another
    way, set `IMPLEMENTATIONS["cpu" or "default"][kind]` before the model is traced: "lax" or what the CPU has, and for
    attention "plain" or "pallas" (one GPU; see maxmap/kernels.py).
    """
    if _plainly.get():
        return PLAIN[kind]
    return IMPLEMENTATIONS.get(jax.default_backend(), IMPLEMENTATIONS["default"])[kind]


def computed_once(function: Callable[..., Array], *operands: Array) -> Array:
    """Returns `function(*operands)`, which XLA's CPU compiler will neither merge with what reads it nor repeat there.

    It merges a sum of shifted products into every operation that reads the sum, each of which then computes it anew.
    Nothing is merged across the border of a branch, and the barrier hides that this one is always taken for as long as
    conditionals are simplified.
    """
    like = jax.eval_shape(function, *operands)
    return lax.cond(lax.optimization_barrier(True), function, lambda *_: jnp.zeros(like.shape, like.dtype), *operands)


def upcast(x: Array) -> Array:
    """Casts to float32, or leaves float64: the island in which statistics, softmax and Gram products are computed."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def softmax(logits: Array) -> Array:
    """Softmax over the last axis, computed in float32 or wider, returned in the type of `logits`."""
    return nn.softmax(upcast(logits), axis=-1).astype(logits.dtype)


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
        everywhere = broadcast(bias.reshape(-1).astype(logits.dtype), (logits.size // bias.size, bias.size))
        logits = logits + everywhere.reshape(logits.shape)
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
    logits = upcast(logits)
    weights = jnp.exp(logits - lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True)))
    total = jnp.sum(weights, axis=-1, keepdims=True)
    weights = weights.astype(values.dtype)
    if dropout is not None:
        weights = dropout(weights)
    return (upcast(weights @ values) / total).astype(values.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def broadcast(x: Array, shape: tuple[int, ...]) -> Array:
    """A parameter of every channel, `[C]`, at every position of `shape`, `[..., C]`.

    Its gradient is a sum over the positions, in float32 or wider. As a sum, XLA's CPU backend merges it with all that
    leads to its terms and computes that again for every parameter: in deep networks what the residuals add up to, block
    after block. As a matrix product it takes what is there.
    """
    return jnp.broadcast_to(x[(None,) * (len(shape) - 1)], shape)


def _broadcast_forward(x: Array, shape: tuple[int, ...]) -> tuple[Array, None]:
    return broadcast(x, shape), None


def _broadcast_backward(shape: tuple[int, ...], _: None, grad: Array) -> tuple[Array]:
    return (_sum_of_rows(grad.reshape(-1, shape[-1])).astype(grad.dtype),)


broadcast.defvjp(_broadcast_forward, _broadcast_backward)


def _sum_of_rows(x: Array) -> Array:
    """Sums `[N, C]` over N, in float32 or wider."""
    dtype = upcast(x[:0]).dtype
    if implementation("sum") == "lax":
        return jnp.sum(x, axis=0, dtype=dtype)
    return jnp.matmul(jnp.ones((1, x.shape[0]), x.dtype), x, preferred_element_type=dtype)[0]


def layer_norm(x: Array, scale: Array, bias: Array, epsilon: float) -> Array:
    """Normalises `[..., C]` over C, with the variance in two passes, because the one-pass form cancels in float32.

    The result is in the type of `x`, computed in float32 or wider. Where sums are matrix products (see `broadcast`), so
    are its backward pass's.
    """
    rows, scale, bias = upcast(x).reshape(-1, x.shape[-1]), upcast(scale), upcast(bias)
    if implementation("sum") == "matmul":
        return _layer_norm(rows, scale, bias, epsilon).reshape(x.shape).astype(x.dtype)
    centred = rows - jnp.mean(rows, axis=-1, keepdims=True)
    variance = jnp.mean(jnp.square(centred), axis=-1, keepdims=True)
    y = centred * (lax.rsqrt(variance + epsilon) * scale[None]) + bias[None]
    return y.reshape(x.shape).astype(x.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _layer_norm(x: Array, scale: Array, bias: Array, epsilon: float) -> Array:
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
    return grad_x, _sum_of_rows(product), _sum_of_rows(grad)


_layer_norm.defvjp(_layer_norm_forward, _layer_norm_backward)


def linear(x: Array, kernel: Array, bias: Array | None = None) -> Array:
    """Linear map of the last axis; on two axes, because XLA's CPU backend is much faster on those than on more."""
    y = x.reshape(-1, x.shape[-1]) @ kernel
    if bias is not None:
        y = y + broadcast(bias, y.shape)
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


@functools.partial(jax.jit, static_argnames="stride")  # traced once for all layers of a shape; so are those below
def _shift_sum(x: Array, kernel: Array, stride: int) -> Array:
    """Valid depthwise convolution of `x` [B, H, W, C] with `kernel` [kh, kw, C] as a sum of shifted products."""
    kh, kw, _ = kernel.shape
    size = ((x.shape[1] - kh) // stride + 1, (x.shape[2] - kw) // stride + 1)
    taps = [(i, j) for i in range(kh) for j in range(kw)]
    products = (_shifted(x, i, j, stride, size) * kernel[i, j][None, None, None] for i, j in taps)
    return functools.reduce(jnp.add, products)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def depthwise_shifts(x: Array, kernel: Array, stride: int, pads: Pads) -> Array:
    """Depthwise convolution as a sum of shifted products, with its own backward pass.

    Args:
      x: `[B, H, W, C]`.
      kernel: `[kh, kw, C]`.
      stride: of both axes.
      pads: zeros before and after, for height and width.

    Returns:
      `[B, H', W', C]`.
    """
    padded = jnp.pad(x, [(0, 0), *pads, (0, 0)])  # not within: it may be merged with what computes x
    return computed_once(functools.partial(_shift_sum, stride=stride), padded, kernel)


def _rows_at_a_time(height: int) -> int:
    """Four to eight rows, of which the fewest have to be added to a map of `height`."""
    return min(range(min(8, height), min(4, height) - 1, -1), key=lambda rows: -height % rows)


def _depthwise_forward(x: Array, kernel: Array, stride: int, pads: Pads) -> tuple[Array, tuple[Array, Array]]:
    return depthwise_shifts(x, kernel, stride, pads), (x, kernel)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _depthwise_backward(stride: int, pads: Pads, residuals: tuple[Array, Array], grad: Array) -> tuple[Array, Array]:
    x, kernel = residuals
    kh, kw, channels = kernel.shape
    batch, height, width, _ = grad.shape
    # What the forward pass did not read at the far edge gets a zero gradient, and of the zeros around none is computed.
    around = [(0, 0, 0)]
    for axis, (n, k, (before, after)) in enumerate(zip((height, width), (kh, kw), pads, strict=True)):
        rest = x.shape[1 + axis] + before + after - (stride * (n - 1) + k)
        around.append((k - 1 - before, k - 1 + rest - after, stride - 1))
    dilated_grad = lax.pad(grad, jnp.zeros((), grad.dtype), [*around, (0, 0, 0)])
    grad_x = computed_once(functools.partial(_shift_sum, stride=1), dilated_grad, kernel[::-1, ::-1])

    # Some rows at a time, and a sum of products for every column: XLA's CPU reduction over (batch, height, width) at
    # once is ten times slower, and so is an operation for each tap of each row. The batch stays whole, since it may lie
    # on several devices.
    rows = _rows_at_a_time(height)
    missing = -height % rows
    grad = jnp.pad(grad, [(0, 0), (0, missing), (0, 0), (0, 0)])
    (above, below), sides = pads
    x = jnp.pad(x, [(0, 0), (above, below + missing * stride), sides, (0, 0)])

    def add_rows(step: Array, totals: list[Array]) -> list[Array]:
        g = lax.dynamic_slice_in_dim(grad, step * rows, rows, axis=1)
        lines = lax.dynamic_slice_in_dim(x, step * rows * stride, (rows - 1) * stride + kh, axis=1)

        def tap(i: int, j: int) -> Array:
            columns = lines[:, :, j : j + stride * (width - 1) + 1 : stride]
            return functools.reduce(jnp.add, (upcast(columns[:, i + r * stride] * g[:, r]) for r in range(rows)))

        return [total + jnp.stack([tap(i, j) for j in range(kw)]) for i, total in enumerate(totals)]

    zeros = jnp.zeros((kw, batch, width, channels), jnp.promote_types(kernel.dtype, jnp.float32))
    totals = lax.fori_loop(0, (height + missing) // rows, add_rows, [zeros] * kh)
    grad_kernel = jnp.stack([jnp.sum(total, axis=(1, 2)) for total in totals])
    return grad_x, grad_kernel.reshape(kernel.shape).astype(kernel.dtype)


depthwise_shifts.defvjp(_depthwise_forward, _depthwise_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def max_pool(x: Array, size: int, stride: int, padding: int) -> Array:
    """Largest value of every window of `[B, H, W, C]`; the first of several such gets the gradient, as in PyTorch.

    The backward pass is its own: XLA's CPU backend carries the index of every pixel along.
    """
    around = ((0, 0), (padding, padding), (padding, padding), (0, 0))
    return lax.reduce_window(x, -jnp.inf, lax.max, (1, size, size, 1), (1, stride, stride, 1), around)


def _max_pool_forward(x: Array, size: int, stride: int, padding: int) -> tuple[Array, tuple[Array, Array]]:
    y = max_pool(x, size, stride, padding)
    return y, (x, y)


def _max_pool_backward(
    size: int, stride: int, padding: int, residuals: tuple[Array, Array], grad: Array
) -> tuple[Array]:
    x, y = residuals
    windows = (y.shape[1], y.shape[2])
    around = [(0, 0), (padding, padding), (padding, padding), (0, 0)]
    padded = jnp.pad(x, around, constant_values=-jnp.inf)
    zero, found = jnp.zeros((), grad.dtype), jnp.zeros(y.shape, bool)
    parts = []
    for i in range(size):
        for j in range(size):
            largest = (_shifted(padded, i, j, stride, windows) == y) & ~found
            found |= largest
            rest = (
                n - tap - stride * (m - 1) - 1 for n, m, tap in zip(padded.shape[1:3], windows, (i, j), strict=True)
            )
            spots = [(0, 0, 0), *((tap, r, stride - 1) for tap, r in zip((i, j), rest, strict=True)), (0, 0, 0)]
            parts.append(lax.pad(jnp.where(largest, grad, zero), zero, spots))
    inside = [slice(before, n - after) for n, (before, after) in zip(padded.shape, around, strict=True)]
    return (functools.reduce(jnp.add, parts)[tuple(inside)],)


max_pool.defvjp(_max_pool_forward, _max_pool_backward)


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


@functools.partial(jax.jit, static_argnums=(0, 1))
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
        return total + upcast(patches.T @ g.reshape(-1, out_channels))

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
    if kh == kw == stride > 1 and padding == 0 and groups == 1 and implementation("pointwise") == "matmul":
        height, width = (n // stride * stride for n in x.shape[1:3])  # what is over is not read
        x = rearrange(x[:, :height, :width], "b (h i) (w j) c -> b h w (i j c)", i=stride, j=stride)
        return linear(x, kernel.reshape(-1, out_channels))
    if (kh, kw) == (1, 1) and padding in (0, "same") and implementation("pointwise") == "matmul":
        x = x[:, ::stride, ::stride]
        if groups == 1:
            return linear(x, kernel[0, 0])
        # Groups in front, as `matmul` wants them: left to itself, XLA transposes the kernel pixel by pixel.
        batch, height, width, _ = x.shape
        x = rearrange(x, "b h w (g i) -> g (b h w) i", g=groups)
        y = x @ rearrange(kernel[0, 0], "i (g o) -> g i o", g=groups)
        return rearrange(y, "g (b h w) o -> b h w (g o)", b=batch, h=height, w=width)
    pads = _explicit_padding(padding, x.shape[1:3], kh, stride)
    if groups == channels and out_channels % channels == 0 and implementation("depthwise") == "shifts":
        x = jnp.repeat(x, out_channels // channels, axis=-1)  # output channel o reads input channel o // multiplier
        return depthwise_shifts(x, kernel[:, :, 0], stride, pads)
    if groups == 1 and implementation("dense") == "patches":
        return convolve_by_patches(x, kernel, stride, pads)
    return _lax_convolution(x, kernel, stride, pads, groups)
