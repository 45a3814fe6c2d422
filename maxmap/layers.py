"""Layers that at least two families or heads share: norms, convolutions, activations, drop path, initialisers.

All of them take NHWC maps or `[..., C]` tokens, compute in the type of their input and keep statistics in float32 or
wider, so that one precision policy outside of the model is enough.
"""

import contextlib
import contextvars
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import linen as nn
from flax.core import FrozenDict
from jax import lax

from maxmap.operations import Padding, attention, convolve, layer_norm, linear, spread, wide
from maxmap.operations import implementation as implementation  # where users look for it

Array = jax.Array
Initializer = Callable[..., Array]


def _from_input(function: Callable[[Array], Array], derivative: Callable[[Array], Array]) -> Callable[[Array], Array]:
    """An activation, in float32 or wider, whose backward pass computes the derivative from the input.

    Left to itself, the forward pass writes what is expensive in it for the backward pass to read: more memory, and no
    less time. The two have to be written differently, or else XLA finds what they share and keeps it after all.
    """

    @jax.custom_vjp
    def activation(x: Array) -> Array:
        return function(wide(x)).astype(x.dtype)

    def forward(x: Array) -> tuple[Array, Array]:
        return activation(x), x

    def backward(x: Array, grad: Array) -> tuple[Array]:
        return ((wide(grad) * derivative(wide(x))).astype(grad.dtype),)

    activation.defvjp(forward, backward)
    return activation


def _gelu(x: Array) -> Array:
    """x * Phi(x), by erf, for erfc (as in Flax) takes 3 times as long on a CPU."""
    return x * (0.5 + 0.5 * lax.erf(x * math.sqrt(0.5)))


def _gelu_derivative(x: Array) -> Array:
    return 0.5 - 0.5 * lax.erf(-x * math.sqrt(0.5)) + x * jnp.exp(-0.5 * jnp.square(x)) / math.sqrt(2 * math.pi)


def _gelu_tanh_derivative(x: Array) -> Array:
    """Of x * s(2 u), s the logistic function: the same as x / 2 * (1 + tanh(u))."""
    s = nn.sigmoid(math.sqrt(8 / math.pi) * (x + 0.044715 * x**3))
    return s + x * s * (1 - s) * math.sqrt(8 / math.pi) * (1 + 3 * 0.044715 * jnp.square(x))


def _silu_derivative(x: Array) -> Array:
    s = 0.5 + 0.5 * jnp.tanh(0.5 * x)
    return s * (1 + x * (1 - s))


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "relu": nn.relu,
    "relu6": nn.relu6,
    "relu2": lambda x: jnp.square(nn.relu(x)),
    "silu": _from_input(nn.silu, _silu_derivative),
    "gelu": _from_input(_gelu, _gelu_derivative),
    "gelu_tanh": _from_input(functools.partial(nn.gelu, approximate=True), _gelu_tanh_derivative),
    "tanh": jnp.tanh,
}

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


# How a head is initialised: fields of its `Conv` and `Linear` layers by scheme. "he" leaves the convolutions' biases to
# PyTorch's default, as the reference does.
TRUNC_NORMAL: dict[str, Initializer] = {"kernel_init": trunc_normal_02, "bias_init": nn.initializers.zeros}
CONV_INITS: dict[str, dict[str, Initializer]] = {
    "torch": {},
    "trunc_normal": TRUNC_NORMAL,
    "trunc_normal_linear": {},
    "he": {"kernel_init": he_fan_out()},
}
LINEAR_INITS: dict[str, dict[str, Initializer]] = {
    "torch": {},
    "trunc_normal": TRUNC_NORMAL,
    "trunc_normal_linear": TRUNC_NORMAL,
    "he": TRUNC_NORMAL,
}


def pair(size: int | Sequence[int]) -> tuple[int, int]:
    """Height and width of a size, which is those two or one number for both."""
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def nearest_divisor(total: int, number: int, step: int = 1) -> int:
    """The multiple of `step` nearest to `number` that divides `total`."""
    divisors = (d for d in range(step, total + 1, step) if total % d == 0)
    return min(divisors, key=lambda d: abs(d - number), default=step)


def require_divisor(number: int, what: str, total: int, of: str, step: int = 1, owner: str = "") -> None:
    """Raises ValueError, one sentence with the nearest that works, unless a multiple of `step` divides `total`."""
    near = nearest_divisor(total, number, step)
    if near != number:
        multiples = f" by a multiple of {step}" if step > 1 else ""
        raise ValueError(f"{owner}{number} {what} do not divide {total} {of}{multiples}; the nearest that do is {near}")


def require_one_of(value: str, what: str, allowed: Iterable[str]) -> None:
    """Raises ValueError, one sentence, unless a choice is one of the allowed."""
    if value not in (allowed := list(allowed)):
        raise ValueError(f"{what} '{value}' is not one of {', '.join(allowed)}")


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
        return x if bias is None else x + spread(bias, x.shape)


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
        return linear(x, kernel, bias)


# Groups of a batch with statistics of their own, and whether those of the first alone are kept.
_batch_groups: contextvars.ContextVar[tuple[int, bool]] = contextvars.ContextVar("batch groups", default=(1, False))


@contextlib.contextmanager
def batch_norm_groups(groups: int, *, keep_first: bool = False) -> Iterator[None]:
    """While a function is traced: every `BatchNorm` normalises each of `groups` equal parts of the batch by itself.

    Args:
      groups: parts of consecutive samples; it has to divide the batch.
      keep_first: the running statistics follow the first part, and not the mean over all.
    """
    token = _batch_groups.set((groups, keep_first))
    try:
        yield
    finally:
        _batch_groups.reset(token)


class BatchNorm(nn.Module):
    """Batch normalisation over all axes but the last, as PyTorch keeps its statistics.

    While training it normalises with the biased variance of the batch and stores the unbiased one; Flax's own
    layer stores the biased one, which differs visibly where few values enter (Gram tokens, squeeze-excitation).
    Under jit with a sharded batch the statistics are those of the global batch ("sync BN"), unless `batch_norm_groups`
    says otherwise.

    Attributes:
      epsilon: added to the variance.
      momentum: share of the old running statistics that is kept (PyTorch's 0.1 is 0.9 here).
      scale_init: of the scale; zeros make a residual branch start as nothing.
    """

    epsilon: float = 1e-5
    momentum: float = 0.9
    scale_init: Initializer = nn.initializers.ones

    @nn.compact
    def __call__(self, x: Array, *, train: bool = False) -> Array:
        channels = x.shape[-1]
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, (channels,), jnp.float32)
        running_var = self.variable("batch_stats", "var", jnp.ones, (channels,), jnp.float32)
        scale = self.param("scale", self.scale_init, (channels,))
        bias = self.param("bias", nn.initializers.zeros, (channels,))
        y = wide(x)[None]  # [parts, B / parts, ..., C]
        if train:
            parts, keep_first = _batch_groups.get()
            y = y.reshape(parts, -1, *x.shape[1:])
            axes = tuple(range(1, y.ndim - 1))
            mean = jnp.mean(y, axis=axes, keepdims=True)
            var = jnp.mean(jnp.square(y - mean), axis=axes, keepdims=True)
            if not self.is_initializing():
                count = math.prod(y.shape[1:-1])
                unbiased = var * (count / max(count - 1, 1))
                for running, new in ((running_mean, mean), (running_var, unbiased)):
                    new = lax.stop_gradient(new).reshape(parts, channels)
                    new = new[0] if keep_first else jnp.mean(new, axis=0)
                    running.value = self.momentum * running.value + (1 - self.momentum) * new
        else:
            mean, var = (v.value.reshape((1,) * x.ndim + (-1,)) for v in (running_mean, running_var))
        expand = (1,) * x.ndim + (-1,)
        multiplier = lax.rsqrt(var + self.epsilon) * wide(scale).reshape(expand)
        shift = wide(bias).reshape(expand) - mean * multiplier
        return (y * multiplier + shift).reshape(x.shape).astype(x.dtype)


class LayerNorm(nn.Module):
    """Layer normalisation over the last axis (Ba et al. 2016), in float32 or wider.

    Attributes:
      epsilon: added to the variance.
      use_bias: adds one per channel after the scale.
    """

    epsilon: float = 1e-6
    use_bias: bool = True

    @nn.compact
    def __call__(self, x: Array) -> Array:
        scale = self.param("scale", nn.initializers.ones, x.shape[-1:])
        bias = self.param("bias", nn.initializers.zeros, x.shape[-1:]) if self.use_bias else jnp.zeros_like(scale)
        return layer_norm(x, scale, bias, self.epsilon)


class DropPath(nn.Module):
    """Stochastic depth (Huang et al. 2016): drops a residual branch per sample, and scales the kept ones by 1/(1-rate).

    Attributes:
      rate: probability of dropping a sample's branch.
    """

    rate: float

    @nn.compact
    def __call__(self, x: Array, *, train: bool = False) -> Array:
        return nn.Dropout(self.rate, broadcast_dims=tuple(range(1, x.ndim)))(x, deterministic=not train)


def drop_path_rates(rate: float, depth: int, *, endpoint: bool = True) -> list[float]:
    """Rates that rise linearly from 0 at the first of `depth` blocks to `rate` at the last, or one step short of it."""
    return [rate * i / (max(depth - 1, 1) if endpoint else depth) for i in range(depth)]


class Mlp(nn.Module):
    """Two linear maps of the last axis with an activation between.

    Attributes:
      hidden: channels in between.
      channels: output channels.
      activation: in between.
      inits: 'kernel_init' and 'bias_init' of both maps; PyTorch's defaults for what is not given.
      layer: `Linear`, or `Conv` where the reference keeps 4-d weights.
      hidden_dropout, dropout: after the activation, and at the end.
    """

    hidden: int
    channels: int
    activation: str = "gelu"
    inits: Mapping[str, Initializer] = FrozenDict()
    layer: Callable[..., nn.Module] = Linear
    hidden_dropout: float = 0.0
    dropout: float = 0.0

    @nn.compact
    def __call__(self, x: Array, *, train: bool) -> Array:
        x = ACTIVATIONS[self.activation](self.layer(self.hidden, name="fc1", **self.inits)(x))
        x = nn.Dropout(self.hidden_dropout)(x, deterministic=not train)
        x = self.layer(self.channels, name="fc2", **self.inits)(x)
        return nn.Dropout(self.dropout)(x, deterministic=not train)


class SelfAttention(nn.Module):
    """Multi-head attention of tokens over each other; the fused projection's output is ordered (qkv, heads, head_dim).

    Attributes:
      heads: of the attention; they divide the channels.
      inits: 'kernel_init' and 'bias_init' of both projections; PyTorch's defaults for what is not given.
      position_bias: makes the submodule, its name included, that returns a bias `[heads, N, N]` of the logits.
      attn_drop, proj_drop: dropout of the attention probabilities and of the output.
    """

    heads: int
    inits: Mapping[str, Initializer] = FrozenDict()
    position_bias: Callable[[], nn.Module] | None = None
    attn_drop: float = 0.0
    proj_drop: float = 0.0

    @nn.compact
    def __call__(self, x: Array, *, train: bool = False) -> Array:
        """Maps tokens `[B, N, C]` to `[B, N, C]`."""
        channels = x.shape[-1]
        qkv = Linear(3 * channels, name="qkv", **self.inits)(x)
        q, k, v = rearrange(qkv, "b n (three h d) -> three b h n d", three=3, h=self.heads)
        bias = None if self.position_bias is None else self.position_bias()()
        dropout = nn.Dropout(self.attn_drop, deterministic=False)
        x = rearrange(
            attention(q * q.shape[-1] ** -0.5, k, v, bias, dropout if train and self.attn_drop else None),
            "b h n d -> b n (h d)",
        )
        x = Linear(channels, name="proj", **self.inits)(x)
        return nn.Dropout(self.proj_drop)(x, deterministic=not train)


class ViTBlock(nn.Module):
    """Self-attention and an MLP, each behind a LayerNorm and with a residual (Dosovitskiy et al. 2021).

    Attributes:
      heads: of the attention.
      mlp_ratio: hidden width of the MLP relative to the channels.
      drop_path: rate of dropping each residual branch.
      inits: 'kernel_init' and 'bias_init' of all linear maps; PyTorch's defaults for what is not given.
      attn_drop, proj_drop: dropout of the attention probabilities; of the attention's output and in the MLP.
    """

    heads: int
    mlp_ratio: float = 4.0
    drop_path: float = 0.0
    inits: Mapping[str, Initializer] = FrozenDict()
    attn_drop: float = 0.0
    proj_drop: float = 0.0

    @nn.compact
    def __call__(self, x: Array, *, train: bool = False) -> Array:
        """Maps tokens `[B, N, C]` to `[B, N, C]`."""
        channels = x.shape[-1]
        attention = SelfAttention(
            self.heads, self.inits, attn_drop=self.attn_drop, proj_drop=self.proj_drop, name="attn"
        )
        mlp = Mlp(
            int(self.mlp_ratio * channels),
            channels,
            inits=self.inits,
            hidden_dropout=self.proj_drop,
            dropout=self.proj_drop,
            name="mlp",
        )
        y = attention(LayerNorm(1e-6, name="norm1")(x), train=train)
        x = x + DropPath(self.drop_path)(y, train=train)
        y = mlp(LayerNorm(1e-6, name="norm2")(x), train=train)
        return x + DropPath(self.drop_path)(y, train=train)


def relative_index(window: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Offsets query - key of all pairs of positions of a window, shifted to start at zero.

    Args:
      window: height and width.

    Returns:
      Vertical and horizontal offsets, both `[N, N]` (query, key), N = height * width in row-major order.
    """
    h, w = window
    y, x = np.divmod(np.arange(h * w), w)
    return y[:, None] - y[None] + h - 1, x[:, None] - x[None] + w - 1


def average_pool(x: Array, size: int, stride: int, padding: Sequence[tuple[int, int]] = ((0, 0), (0, 0))) -> Array:
    """Average pooling of NHWC maps; padding is not counted."""
    return nn.avg_pool(x, (size, size), (stride, stride), list(padding), count_include_pad=False)


def adaptive_average(x: Array, size: Sequence[int]) -> Array:
    """Resizes maps `[B, H, W, C]` to `size`; output i is the mean of inputs floor(i n / m) .. ceil((i+1) n / m) - 1."""

    def weights(n_in: int, n_out: int) -> np.ndarray:
        matrix = np.zeros((n_out, n_in))
        for i in range(n_out):
            start, stop = i * n_in // n_out, -(-(i + 1) * n_in // n_out)
            matrix[i, start:stop] = 1 / (stop - start)
        return matrix

    return _resample(x, size, weights)


def bilinear(x: Array, size: Sequence[int]) -> Array:
    """Resizes maps `[B, H, W, C]` to `size` by linear interpolation, half-pixel centres and no antialiasing."""

    def weights(n_in: int, n_out: int) -> np.ndarray:
        position = np.maximum((np.arange(n_out) + 0.5) * n_in / n_out - 0.5, 0)
        low = np.floor(position).astype(int)
        matrix = np.zeros((n_out, n_in))
        np.add.at(matrix, (np.arange(n_out), low), 1 - (position - low))
        np.add.at(matrix, (np.arange(n_out), np.minimum(low + 1, n_in - 1)), position - low)
        return matrix

    return _resample(x, size, weights)


def _resample(x: Array, size: Sequence[int], weights: Callable[[int, int], np.ndarray]) -> Array:
    """Applies the matrices `weights(n_in, n_out)` along height and width."""
    for axis, n_out in zip((1, 2), size, strict=True):
        n_in = x.shape[axis]
        matrix = weights(n_in, n_out)
        stride = n_in // n_out
        taps = {int(tap): matrix[0, tap].astype(x.dtype) for tap in np.flatnonzero(matrix[0])}
        same = all(np.array_equal(row, np.roll(matrix[0], i * stride)) for i, row in enumerate(matrix))
        if stride > 1 and same and len(taps) <= 4:
            # The same few pixels of every stretch of the map: strided views, instead of products that are mostly zero.
            last = stride * (n_out - 1) + 1
            views = (lax.slice_in_dim(x, tap, tap + last, stride, axis) * weight for tap, weight in taps.items())
            x = functools.reduce(jnp.add, views)
        else:
            x = jnp.einsum("oh,bhwc->bowc" if axis == 1 else "pw,bowc->bopc", jnp.asarray(matrix, x.dtype), x)
    return x


def gram_values(x: Array) -> Array:
    """Second-order statistics of maps `[B, H, W, P]`: the Gram matrix's upper triangle, L2-normalised, `[B, P(P+1)/2]`.

    The triangle is read row by row and has the diagonal. Second moments cancel and span many magnitudes, so that they
    are computed in float32 at full precision whatever the compute type.
    """
    z = rearrange(wide(x), "b h w p -> b (h w) p")
    z = z / z.shape[1]
    gram = jnp.einsum("bnp,bnq->bpq", z, z, precision=lax.Precision.HIGHEST)
    rows, columns = np.triu_indices(x.shape[-1])
    v = gram[:, rows, columns]
    norm = jnp.sqrt(jnp.maximum(jnp.sum(jnp.square(v), axis=-1, keepdims=True), 1e-24))
    return (v / norm).astype(x.dtype)


def channel_shuffle(x: Array, groups: int) -> Array:
    """Reorders channels `h'[j * C/g + i] = h[i * g + j]`, the direction of the released MAP and GA heads."""
    return rearrange(x, "... (c g) -> ... (g c)", g=groups)


class GroupedMlp(nn.Module):
    """Two grouped 1x1 convolutions of a map with an activation and a channel shuffle between.

    Attributes:
      groups: of both convolutions.
      ratio: hidden width relative to the channels.
      activation: between the convolutions.
      dropout: after the activation.
      inits: 'kernel_init' and 'bias_init' of both convolutions; PyTorch's defaults for what is not given.
    """

    groups: int
    ratio: float = 4.0
    activation: str = "gelu"
    dropout: float = 0.0
    inits: Mapping[str, Initializer] = FrozenDict()

    @nn.compact
    def __call__(self, x: Array, *, train: bool = False) -> Array:
        conv = functools.partial(Conv, groups=self.groups, **self.inits)
        hidden = ACTIVATIONS[self.activation](conv(int(self.ratio * x.shape[-1]), name="fc1")(x))
        hidden = nn.Dropout(self.dropout)(hidden, deterministic=not train)
        return conv(x.shape[-1], name="fc2")(channel_shuffle(hidden, self.groups))


class ConvNeXtBlock(nn.Module):
    """Depthwise 7x7 convolution, LayerNorm, MLP and layer scale on a residual branch (Liu et al. 2022).

    Attributes:
      drop_path: rate of dropping the branch.
      init_values: initial layer scale.
    """

    drop_path: float = 0.0
    init_values: float = 1e-6

    @nn.compact
    def __call__(self, x: Array, *, train: bool = False) -> Array:
        channels = x.shape[-1]
        y = Conv(channels, 7, padding=3, groups=channels, name="conv_dw", **TRUNC_NORMAL)(x)
        y = LayerNorm(1e-6, name="norm")(y)
        y = Mlp(4 * channels, channels, inits=TRUNC_NORMAL, name="mlp")(y, train=train)
        gamma = self.param("gamma", nn.initializers.constant(self.init_values), (channels,))
        y = y * spread(gamma.astype(y.dtype), y.shape)
        return x + DropPath(self.drop_path)(y, train=train)


class StripeAttention(nn.Module):
    """Attention inside of windows, plus a depthwise convolution of the values (CSWin's LePE).

    Attributes:
      heads: of the attention.
      window: height and width.
    """

    heads: int
    window: tuple[int, int]

    @nn.compact
    def __call__(self, q: Array, k: Array, v: Array) -> Array:
        """Maps queries, keys and values, all `[B, H, W, C]`, to `[B, H, W, C]`."""
        sizes = dict(zip(("h", "w"), self.window, strict=True))
        rows = v.shape[1] // self.window[0]
        columns = v.shape[2] // self.window[1]
        # Every window is padded as an image of its own: a stripe of width 1 sees zeros on both sides.
        local = rearrange(v, "b (i h) (j w) c -> (b i j) h w c", **sizes)
        position = Conv(v.shape[-1], 3, padding=1, groups=v.shape[-1], name="get_v")(local)
        q, k, v = (
            rearrange(part, "b (i h) (j w) (n d) -> (b i j) n (h w) d", n=self.heads, **sizes) for part in (q, k, v)
        )
        out = attention(q * q.shape[-1] ** -0.5, k, v)
        out = rearrange(out, "b n (h w) d -> b h w (n d)", **sizes)
        return rearrange(out + position, "(b i j) h w c -> b (i h) (j w) c", i=rows, j=columns)


class CSWinBlock(nn.Module):
    """Attention in vertical and horizontal stripes side by side, then an MLP (Dong et al. 2022).

    The first half of the channels attends in stripes of full height, the second half in stripes of full width. Where
    the stripes cover the map there is one branch: all channels attend over the whole map.

    Attributes:
      heads: of both halves together.
      stripe: height of the horizontal and width of the vertical stripes in pixels; None for one branch.
      mlp_groups: 1 for linear maps, more for grouped convolutions.
      drop_path: rate of dropping each residual branch.
    """

    heads: int
    stripe: tuple[int, int] | None
    mlp_groups: int = 1
    drop_path: float = 0.0

    @nn.compact
    def __call__(self, x: Array, *, train: bool = False) -> Array:
        height, width, channels = x.shape[1:]
        qkv = jnp.split(Linear(3 * channels, name="qkv", **TRUNC_NORMAL)(LayerNorm(1e-5, name="norm1")(x)), 3, axis=-1)
        if self.stripe is None or self.stripe == (height, width):
            y = StripeAttention(self.heads, (height, width), name="attns_0")(*qkv)
        else:
            windows = ((height, self.stripe[1]), (self.stripe[0], width))
            halves = zip(*(jnp.split(part, 2, axis=-1) for part in qkv), strict=True)
            branches = [
                StripeAttention(self.heads // 2, window, name=f"attns_{i}")(*half)
                for i, (window, half) in enumerate(zip(windows, halves, strict=True))
            ]
            y = jnp.concatenate(branches, axis=-1)
        x = x + DropPath(self.drop_path)(Linear(channels, name="proj", **TRUNC_NORMAL)(y), train=train)
        y = LayerNorm(1e-5, name="norm2")(x)
        if self.mlp_groups == 1:
            y = Mlp(4 * channels, channels, inits=TRUNC_NORMAL, name="mlp")(y, train=train)
        else:
            y = GroupedMlp(self.mlp_groups, name="mlp")(y, train=train)
        return x + DropPath(self.drop_path)(y, train=train)


def tapped(depths: Sequence[int], taps: int) -> list[int]:
    """Numbers, from 1, of the `taps` blocks inside of a backbone's third stage whose outputs are features too."""
    depth = depths[2] if len(depths) > 2 else 0
    if taps and taps >= depth:
        raise ValueError(
            f"{taps} taps do not fit inside of a third stage of {depth} blocks; the most is {max(depth - 1, 0)}"
        )
    step = depth // (taps + 1)
    return [step * (i + 1) for i in range(taps)]
