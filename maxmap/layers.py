"""Layers that at least two families or heads share: convolution, norms, activations, drop path, initialisers.

All of them take NHWC maps or `[..., C]` tokens, compute in the type of their input and keep statistics in float32 or
wider, so that one precision policy outside of the model is enough.
"""

import functools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import linen as nn
from jax import lax

Array = jax.Array
Initializer = Callable[..., Array]
Padding = int | str

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "relu": nn.relu,
    "relu6": nn.relu6,
    "silu": nn.silu,
    "gelu": functools.partial(nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(nn.gelu, approximate=True),
    "tanh": jnp.tanh,
}

# How a convolution of each kind is computed, by platform; platforms that are not listed use "default".
# XLA's CPU backend runs a 1x1 convolution about 6 times slower than the same matrix product, and a depthwise one about
# 17 times slower than a sum of shifted products.
IMPLEMENTATIONS = {
    "cpu": {"pointwise": "matmul", "depthwise": "shifts"},
    "default": {"pointwise": "lax", "depthwise": "lax"},
}


def implementation(kind: str) -> str:
    """Returns how convolutions of `kind` ("pointwise" or "depthwise") are computed on this platform."""
    return IMPLEMENTATIONS.get(jax.default_backend(), IMPLEMENTATIONS["default"])[kind]


# Initialisers, by the names of the PyTorch schemes that the reference networks use.
trunc_normal_02 = nn.initializers.truncated_normal(stddev=0.02, lower=-100.0, upper=100.0)  # cut at +-2, 100 sigma
torch_kernel = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")  # U(+-1/sqrt(fan_in))
xavier_uniform = nn.initializers.xavier_uniform()


def he_fan_out(groups: int = 1) -> Initializer:
    """Normal(0, sqrt(2 / fan_out)) with fan_out = kernel height * width * output channels / groups."""
    return nn.initializers.variance_scaling(2.0 * groups, "fan_out", "normal")


def torch_bias(fan_in: int) -> Initializer:
    """U(-1/sqrt(fan_in), 1/sqrt(fan_in)), PyTorch's default for the biases of linear and convolution layers."""
    bound = 1 / math.sqrt(fan_in)
    return lambda key, shape, dtype=jnp.float32: jax.random.uniform(key, shape, dtype, -bound, bound)


def wide(x: Array) -> Array:
    """Casts to float32, or leaves float64: the island in which statistics, softmax and Gram products are computed."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def softmax(logits: Array) -> Array:
    """Softmax over the last axis, computed in float32 or wider, returned in the type of `logits`."""
    return nn.softmax(wide(logits), axis=-1).astype(logits.dtype)


def _explicit_padding(padding: Padding, size: Sequence[int], kernel_size: int, stride: int) -> list[tuple[int, int]]:
    """`(before, after)` for height and width; "same" is TensorFlow's rule, the smaller half first."""
    if padding != "same":
        return [(int(padding), int(padding))] * 2
    totals = [max((-(-n // stride) - 1) * stride + kernel_size - n, 0) for n in size]
    return [(total // 2, total - total // 2) for total in totals]


def _shifted(x: Array, i: int, j: int, stride: int, size: tuple[int, int]) -> Array:
    """The pixels of a padded map that tap (i, j) of a kernel reads."""
    height, width = size
    return x[:, i : i + stride * (height - 1) + 1 : stride, j : j + stride * (width - 1) + 1 : stride]


def _shift_sum(x: Array, kernel: Array, stride: int) -> Array:
    """Valid depthwise convolution of `x` [B, H, W, C] with `kernel` [kh, kw, C] as a sum of shifted products."""
    kh, kw, _ = kernel.shape
    size = ((x.shape[1] - kh) // stride + 1, (x.shape[2] - kw) // stride + 1)
    taps = [(i, j) for i in range(kh) for j in range(kw)]
    return sum(_shifted(x, i, j, stride, size) * kernel[i, j][None, None, None] for i, j in taps)


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

    # Row by row: XLA's CPU reduction over (batch, height, width) at once is several times slower.
    def add_row(row: Array, total: Array) -> Array:
        b, h = row // height, row % height
        g = lax.dynamic_slice(grad, (b, h, 0, 0), (1, 1, width, channels))
        rows = lax.dynamic_slice(x, (b, h * stride, 0, 0), (1, kh, x.shape[2], channels))
        taps = [_shifted(rows, i, j, stride, (1, width)) for i in range(kh) for j in range(kw)]
        return total + jnp.stack([jnp.sum(wide(tap * g), axis=(0, 1, 2)) for tap in taps])

    total = jnp.zeros((kh * kw, channels), jnp.promote_types(kernel.dtype, jnp.float32))
    grad_kernel = lax.fori_loop(0, batch * height, add_row, total)
    return grad_x, grad_kernel.reshape(kernel.shape).astype(kernel.dtype)


depthwise_shifts.defvjp(_depthwise_forward, _depthwise_backward)


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
            return x @ kernel[0, 0]
        x = rearrange(x, "b h w (g i) -> b h w g i", g=groups)
        y = jnp.einsum("bhwgi,igo->bhwgo", x, rearrange(kernel[0, 0], "i (g o) -> i g o", g=groups))
        return rearrange(y, "b h w g o -> b h w (g o)")
    pads = _explicit_padding(padding, x.shape[1:3], kh, stride)
    if groups == channels and out_channels % channels == 0 and implementation("depthwise") == "shifts":
        x = jnp.repeat(x, out_channels // channels, axis=-1)  # output channel o reads input channel o // multiplier
        x = jnp.pad(x, [(0, 0), *pads, (0, 0)])
        return depthwise_shifts(x, kernel[:, :, 0], stride)
    return lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        pads,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )


class Conv(nn.Module):
    """2-d convolution of NHWC maps.

    Attributes:
      channels: output channels.
      kernel_size: of both axes.
      stride: of both axes.
      padding: zeros on every side, or "same" for TensorFlow's rule.
      groups: of channels; equal to the input channels for a depthwise convolution.
      bias: adds one per output channel.
      kernel_init, bias_init: initialisers; None for PyTorch's defaults.
    """

    channels: int
    kernel_size: int = 1
    stride: int = 1
    padding: Padding = 0
    groups: int = 1
    bias: bool = True
    kernel_init: Initializer | None = None
    bias_init: Initializer | None = None

    @nn.compact
    def __call__(self, x: Array) -> Array:
        k = self.kernel_size
        if x.shape[-1] % self.groups or self.channels % self.groups:
            raise ValueError(
                f"{self.groups} groups do not divide {x.shape[-1]} input and {self.channels} output channels"
            )
        shape = (k, k, x.shape[-1] // self.groups, self.channels)
        kernel = self.param("kernel", self.kernel_init or torch_kernel, shape)
        bias = None
        if self.bias:
            bias = self.param("bias", self.bias_init or torch_bias(math.prod(shape[:3])), (self.channels,))
        x, kernel, bias = nn.dtypes.promote_dtype(x, kernel, bias)
        x = convolve(x, kernel, stride=self.stride, padding=self.padding, groups=self.groups)
        return x if bias is None else x + bias[None, None, None]


class Linear(nn.Module):
    """Linear map of the last axis, with PyTorch's default initialisation unless told otherwise.

    Attributes:
      channels: output channels.
      bias: adds one per output channel.
      kernel_init, bias_init: initialisers; None for PyTorch's defaults.
    """

    channels: int
    bias: bool = True
    kernel_init: Initializer | None = None
    bias_init: Initializer | None = None

    @nn.compact
    def __call__(self, x: Array) -> Array:
        kernel = self.param("kernel", self.kernel_init or torch_kernel, (x.shape[-1], self.channels))
        bias = None
        if self.bias:
            bias = self.param("bias", self.bias_init or torch_bias(x.shape[-1]), (self.channels,))
        x, kernel, bias = nn.dtypes.promote_dtype(x, kernel, bias)
        y = x @ kernel
        return y if bias is None else y + bias.reshape((1,) * (y.ndim - 1) + (-1,))


class BatchNorm(nn.Module):
    """Batch normalisation over all axes but the last, as PyTorch keeps its statistics.

    While training it normalises with the biased variance of the batch and stores the unbiased one; Flax's own
    layer stores the biased one, which differs visibly where few values enter (Gram tokens, squeeze-excitation).
    Under jit with a sharded batch the statistics are those of the global batch ("sync BN").

    Attributes:
      epsilon: added to the variance.
      momentum: share of the old running statistics that is kept (PyTorch's 0.1 is 0.9 here).
    """

    epsilon: float = 1e-5
    momentum: float = 0.9

    @nn.compact
    def __call__(self, x: Array, *, train: bool = False) -> Array:
        channels = x.shape[-1]
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, (channels,), jnp.float32)
        running_var = self.variable("batch_stats", "var", jnp.ones, (channels,), jnp.float32)
        scale = self.param("scale", nn.initializers.ones, (channels,))
        bias = self.param("bias", nn.initializers.zeros, (channels,))
        expand = (1,) * (x.ndim - 1) + (-1,)
        if train:
            axes = tuple(range(x.ndim - 1))
            mean = jnp.mean(wide(x), axis=axes)
            var = jnp.mean(jnp.square(wide(x) - mean.reshape(expand)), axis=axes)
            if not self.is_initializing():
                count = math.prod(x.shape[:-1])
                unbiased = var * (count / max(count - 1, 1))
                keep = self.momentum
                running_mean.value = keep * running_mean.value + (1 - keep) * lax.stop_gradient(mean)
                running_var.value = keep * running_var.value + (1 - keep) * lax.stop_gradient(unbiased)
        else:
            mean, var = running_mean.value, running_var.value
        multiplier = lax.rsqrt(var + self.epsilon) * wide(scale)
        shift = wide(bias) - mean * multiplier
        return (wide(x) * multiplier.reshape(expand) + shift.reshape(expand)).astype(x.dtype)


def LayerNorm(epsilon: float = 1e-6, *, use_bias: bool = True, name: str | None = None) -> nn.LayerNorm:  # noqa: N802
    """LayerNorm over the last axis; the variance in two passes, because the one-pass form cancels in float32."""
    return nn.LayerNorm(epsilon=epsilon, use_bias=use_bias, use_fast_variance=False, name=name)


class DropPath(nn.Module):
    """Stochastic depth (Huang et al. 2016): drops a residual branch per sample, and scales the kept ones by 1/(1-rate).

    Attributes:
      rate: probability of dropping a sample's branch.
    """

    rate: float

    @nn.compact
    def __call__(self, x: Array, *, train: bool = False) -> Array:
        return nn.Dropout(self.rate, broadcast_dims=tuple(range(1, x.ndim)))(x, deterministic=not train)


def drop_path_rates(rate: float, depth: int) -> list[float]:
    """Rates that rise linearly from 0 at the first of `depth` blocks to `rate` at the last."""
    return [rate * i / max(depth - 1, 1) for i in range(depth)]


def average_pool(x: Array, size: int, stride: int, padding: Sequence[tuple[int, int]] = ((0, 0), (0, 0))) -> Array:
    """Average pooling of NHWC maps; padding is not counted."""
    return nn.avg_pool(x, (size, size), (stride, stride), list(padding), count_include_pad=False)


def channel_shuffle(x: Array, groups: int) -> Array:
    """Reorders channels `h'[j * C/g + i] = h[i * g + j]`, the direction of the released MAP and GA heads."""
    return rearrange(x, "... (c g) -> ... (g c)", g=groups)
