"""Primitives: activations, initialisers, convolution, linear map, norms, stochastic depth.

All of them take NHWC maps or `[..., C]` tokens, compute in the type of their input and keep statistics in float32 or
wider, so that one precision policy outside of the model is enough.
"""

import contextlib
import contextvars
import functools
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax

from maxmap.errors import UserError
from maxmap.fused import activated_batch_norm, activates_batch_norm
from maxmap.kernels.target import erf
from maxmap.layers.parameters import parameter
from maxmap.operations import (
    Array,
    Padding,
    activate,
    affine,
    batch_norm,
    broadcast,
    convolve,
    implementation,
    layer_norm,
    linear,
    scaled,
    upcast,
)

Initializer = Callable[..., Array]


def _gelu(x: Array) -> Array:
    """x * Phi(x) by erf, because erfc, as in Flax, takes three times as long on a CPU."""
    return x * (0.5 + 0.5 * erf(x * math.sqrt(0.5)))


def _gelu_derivative(x: Array) -> Array:
    return 0.5 - 0.5 * erf(-x * math.sqrt(0.5)) + x * jnp.exp(-0.5 * jnp.square(x)) / math.sqrt(2 * math.pi)


def _gelu_tanh(x: Array) -> Array:
    return nn.gelu(x, approximate=True)


def _gelu_tanh_derivative(x: Array) -> Array:
    """The derivative of x * s(2 u) with the logistic function s, another form of x / 2 * (1 + tanh(u))."""
    s = nn.sigmoid(math.sqrt(8 / math.pi) * (x + 0.044715 * x**3))
    return s + x * s * (1 - s) * math.sqrt(8 / math.pi) * (1 + 3 * 0.044715 * jnp.square(x))


def _silu_derivative(x: Array) -> Array:
    s = 0.5 + 0.5 * jnp.tanh(0.5 * x)
    return s * (1 + x * (1 - s))


def _hard_swish_derivative(x: Array) -> Array:
    return jnp.where(x < -3, 0.0, jnp.where(x > 3, 1.0, x / 3 + 0.5)).astype(x.dtype)


# The functions alone, of values in float32 or wider.
FUNCTIONS: dict[str, Callable[[Array], Array]] = {
    "relu": nn.relu,
    "relu6": nn.relu6,
    "relu2": lambda x: jnp.square(nn.relu(x)),
    "leaky_relu": functools.partial(nn.leaky_relu, negative_slope=0.1),
    "hard_swish": nn.hard_swish,
    "silu": nn.silu,
    "gelu": _gelu,
    "gelu_tanh": _gelu_tanh,
    "tanh": jnp.tanh,
}
# The derivatives of the costly ones, in terms that the functions do not share; see `maxmap.operations.activate`.
DERIVATIVES = {
    "hard_swish": _hard_swish_derivative,
    "silu": _silu_derivative,
    "gelu": _gelu_derivative,
    "gelu_tanh": _gelu_tanh_derivative,
}
# The functions as networks use them: of values in any type, the costly ones with a backward pass of their own.
ACTIVATIONS: dict[str, Callable[[Array], Array]] = FUNCTIONS | {
    name: functools.partial(activate, function=FUNCTIONS[name], derivative=derivative)
    for name, derivative in DERIVATIVES.items()
}

# Initialisers under the names of the PyTorch schemes that the reference networks use.
trunc_normal_02 = nn.initializers.truncated_normal(stddev=0.02, lower=-100.0, upper=100.0)  # cut at -2 and 2
torch_kernel = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")  # U(+-1/sqrt(fan_in))
xavier_uniform = nn.initializers.xavier_uniform()


def he_fan_out(groups: int = 1) -> Initializer:
    """Normal(0, sqrt(2 / fan_out)) with fan_out = kernel height * width * output channels / groups."""
    return nn.initializers.variance_scaling(2.0 * groups, "fan_out", "normal")


def torch_bias(fan_in: int) -> Initializer:
    """U(-1/sqrt(fan_in), 1/sqrt(fan_in)), PyTorch's default for the biases of linear and convolution layers."""
    bound = 1 / math.sqrt(fan_in)
    return lambda key, shape, dtype=jnp.float32: jax.random.uniform(key, shape, dtype, -bound, bound)


# Initialisers of a head's `Conv` and `Linear` layers, by scheme. With "he" the biases of convolutions follow PyTorch's
# default, as in the reference.
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
    """Returns height and width of a size that is one number for both, or the two."""
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def round_to_eight(width: float) -> int:
    """Returns the nearest multiple of 8, or the next one where that is over 10 % less (MobileNet's rule)."""
    rounded = max(8, int(width + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * width else rounded


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


def require_image_size(images: Array, image_size: int | Sequence[int], what: str) -> None:
    """Raises ValueError unless images `[B, H, W, C]` have the size that `what` is made for."""
    height, width = pair(image_size)
    if images.shape[1:3] != (height, width):
        raise ValueError(
            f"the images are {images.shape[1]} x {images.shape[2]} pixels, {what} for {height} x {width}; "
            "set image_size"
        )


def require_pixels(size: Sequence[int], stages: int) -> None:
    """Raises ValueError if images are too small to leave a pixel: strides are 4 of the stem and 2 between stages."""
    least = 4 * 2 ** (stages - 1)
    if min(size) < least:
        raise ValueError(f"image side {min(size)} is too small for {stages} stages; the least is {least}")


def require_one_of(value: str, what: str, allowed: Iterable[str]) -> None:
    """Raises ValueError, one sentence, unless a choice is one of the allowed."""
    if value not in (allowed := list(allowed)):
        raise ValueError(f"{what} '{value}' is not one of {', '.join(allowed)}")


def batch_in_one_part() -> bool:
    """Tells whether all batch norms normalise the batch as a whole; see `batch_norm_groups`, `frozen_batch_norms`."""
    return _batch_groups.get()[0] == 1 and not _frozen_norms.get()


class Block(nn.Module):
    """Marks the modules that a backbone repeats. Rematerialisation and layer-wise learning rates go by it."""


class Conv(nn.Module):
    """2-d convolution of NHWC maps.

    Attributes:
      channels: output channels.
      kernel_size: of both axes.
      stride: of both axes.
      padding: zeros on every side, or "same" for TensorFlow's rule.
      groups: of channels; equal to the input channels for a depthwise convolution.
      bias: adds one per output channel.
      kernel_init: of the kernel; None for PyTorch's default.
      bias_init: of the bias; None for PyTorch's default.
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
    def weights(self, channels: int) -> tuple[Array, Array | None]:
        """Returns the kernel `[k, k, channels / groups, self.channels]`, and the bias or None."""
        k = self.kernel_size
        if channels % self.groups or self.channels % self.groups:
            raise ValueError(f"{self.groups} groups do not divide {channels} input and {self.channels} output channels")
        shape = (k, k, channels // self.groups, self.channels)
        kernel = parameter(self, "kernel", self.kernel_init or torch_kernel, shape)
        if not self.bias:
            return kernel, None
        return kernel, parameter(self, "bias", self.bias_init or torch_bias(math.prod(shape[:3])), (self.channels,))

    def __call__(self, x: Array) -> Array:
        x, kernel, bias = nn.dtypes.promote_dtype(x, *self.weights(x.shape[-1]))
        x = convolve(x, kernel, stride=self.stride, padding=self.padding, groups=self.groups)
        return x if bias is None else x + broadcast(bias, x.shape)

    def output(self, x: Array) -> Array:
        """Returns `x` `[..., self.channels]`, which the caller computed by `weights`: norms of it can be folded."""
        return x


class Linear(nn.Module):
    """Linear map of the last axis, with PyTorch's default initialisation unless told otherwise.

    Attributes:
      channels: output channels.
      bias: adds one per output channel.
      kernel_init: of the kernel; None for PyTorch's default.
      bias_init: of the bias; None for PyTorch's default.
    """

    channels: int
    bias: bool = True
    kernel_init: Initializer | None = None
    bias_init: Initializer | None = None

    @nn.compact
    def weights(self, channels: int) -> tuple[Array, Array | None]:
        """Returns the kernel `[channels, self.channels]`, and the bias or None."""
        kernel = parameter(self, "kernel", self.kernel_init or torch_kernel, (channels, self.channels))
        if not self.bias:
            return kernel, None
        return kernel, parameter(self, "bias", self.bias_init or torch_bias(channels), (self.channels,))

    def __call__(self, x: Array) -> Array:
        x, kernel, bias = nn.dtypes.promote_dtype(x, *self.weights(x.shape[-1]))
        return linear(x, kernel, bias)


# The number of groups of a batch that have their own statistics, and whether only those of the first group are kept.
_batch_groups: contextvars.ContextVar[tuple[int, bool]] = contextvars.ContextVar("batch groups", default=(1, False))


@contextlib.contextmanager
def batch_norm_groups(groups: int, *, keep_first: bool = False) -> Iterator[None]:
    """Traces functions in which every `BatchNorm` normalises each of several equal parts of the batch by itself.

    Args:
      groups: number of parts, each of consecutive samples; it has to divide the batch.
      keep_first: the running statistics follow the first part, and not the mean over all parts.
    """
    token = _batch_groups.set((groups, keep_first))
    try:
        yield
    finally:
        _batch_groups.reset(token)


# Regexes of the paths of parameters that are not trained.
_frozen_norms: contextvars.ContextVar[tuple[str, ...]] = contextvars.ContextVar("frozen batch norms", default=())


@contextlib.contextmanager
def frozen_batch_norms(patterns: Sequence[str]) -> Iterator[None]:
    """Traces functions in which a `BatchNorm` whose scale matches one of the regexes evaluates, also in training."""
    token = _frozen_norms.set(tuple(patterns))
    try:
        yield
    finally:
        _frozen_norms.reset(token)


def folded_bias(norm: nn.Module, *, train: bool) -> Array | None:
    """Returns what `maxmap.fuse` left of a batch norm, in float32 or wider; None for a whole norm.

    It is a bias `[C]`, or a single 0 if nothing is left. The layer beside the norm has taken in the rest, so UserError
    says that such a norm cannot train.
    """
    whole = norm.has_variable("params", "scale") or norm.has_variable("batch_stats", "mean")
    if norm.is_initializing() or whole or not norm.has_variable("params", "bias"):
        return None
    if train:
        raise UserError("the model is fused for inference and cannot train: train it first, then fuse it.")
    return upcast(jnp.asarray(norm.get_variable("params", "bias")))


class BatchNorm(nn.Module):
    """Batch normalisation over all axes but the last, as PyTorch keeps its statistics.

    While training it normalises with the biased variance of the batch and stores the unbiased one. Flax's own layer
    stores the biased variance, which differs much where few values enter (Gram tokens, squeeze-excitation). Under jit
    with a sharded batch the statistics are those of the global batch ("sync BN"), unless `batch_norm_groups` says
    otherwise.

    Without `train` it also takes what `maxmap.fuse` leaves of a norm; see `folded_bias`.

    Attributes:
      epsilon: added to the variance.
      momentum: share of the old running statistics that is kept (PyTorch's 0.1 is 0.9 here).
      scale_init: of the scale; with zeros, a residual branch adds nothing at first.
    """

    epsilon: float = 1e-5
    momentum: float = 0.9
    scale_init: Initializer = nn.initializers.ones

    @nn.compact
    def __call__(
        self,
        x: Array,
        *,
        train: bool = False,
        activation: str | None = None,
        gate: Callable[[Array], Array] | None = None,
        pixels: int = 1,
    ) -> Array:
        """Normalises maps or tokens.

        Args:
          x: `[B, ..., C]`.
          train: normalises with the statistics of the batch.
          activation: behind the norm, a key of `ACTIVATIONS`; None for none.
          gate: multiplies the activation's output by a function of its mean over all axes but the first and the last,
            `[B, 1, ..., C]`; None for 1.
          pixels: that lie side by side in the last axis, `[B, ..., pixels * C]`; see `maxmap.layers.paired`.
        """
        channels = x.shape[-1] // pixels
        frozen = any(re.search(pattern, "/".join((*self.path, "scale"))) for pattern in _frozen_norms.get())
        if (rest := folded_bias(self, train=train and not frozen)) is not None:
            rest = jnp.tile(rest, pixels) if rest.ndim else None
            return _activated(
                lambda x: x if rest is None else upcast(x) + broadcast(rest, x.shape), x, activation, gate
            )
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, (channels,), jnp.float32)
        running_var = self.variable("batch_stats", "var", jnp.ones, (channels,), jnp.float32)
        scale = parameter(self, "scale", self.scale_init, (channels,))
        bias = parameter(self, "bias", nn.initializers.zeros, (channels,))
        if not train or frozen:
            values = (running_mean.value, running_var.value, upcast(scale), upcast(bias))
            mean, var, scale, bias = (jnp.tile(value, pixels) for value in values)
            return _activated(lambda x: affine(upcast(x), mean, var, scale, bias, self.epsilon), x, activation, gate)
        parts, keep_first = _batch_groups.get()
        inputs = (scale, bias, running_mean.value, self.epsilon, parts)
        if activation in DERIVATIVES and activates_batch_norm(x):
            function, derivative = FUNCTIONS[activation], DERIVATIVES[activation]
            y, mean, var = activated_batch_norm(x, *inputs, function, derivative, gate)
        else:
            y, mean, var = batch_norm(x, *inputs, pixels)
            y = _activated(lambda y: y, y, activation, gate)
        if not self.is_initializing():
            count = x.size // channels // parts
            for running, new in ((running_mean, mean), (running_var, var * (count / max(count - 1, 1)))):
                new = new[0] if keep_first else jnp.mean(new, axis=0)
                running.value = self.momentum * running.value + (1 - self.momentum) * new
        return y


def _activated(
    norm: Callable[[Array], Array], x: Array, activation: str | None, gate: Callable[[Array], Array] | None
) -> Array:
    """Computes y = activation(norm(x)) in the type of `x`, and y * gate(mean of y); see `BatchNorm`."""

    def run(x: Array) -> Array:
        # Between the two nothing is rounded, or a TPU's compiler does not fuse them with the convolution in front.
        y = norm(x)
        return (y if activation is None else ACTIVATIONS[activation](y)).astype(x.dtype)

    y = run(x)
    if gate is None:
        return y
    if implementation("batch_norm") == "activated":  # computed once more for the mean, instead of written and read
        return y * gate(spatial_mean(run(lax.optimization_barrier(x))))
    return y * gate(spatial_mean(y))


def spatial_mean(x: Array) -> Array:
    """Averages `[B, ..., C]` over all axes but the first and the last, `[B, 1, ..., C]`."""
    return jnp.mean(x, axis=tuple(range(1, x.ndim - 1)), keepdims=True)


class LayerNorm(nn.Module):
    """Layer normalisation over the last axis (Ba et al. 2016), in float32 or wider.

    Attributes:
      epsilon: added to the variance.
      use_bias: adds one per channel after the scale.
    """

    epsilon: float = 1e-6
    use_bias: bool = True

    @nn.compact
    def weights(self, channels: int) -> tuple[Array, Array | None]:
        """Returns the scale `[channels]`, and the bias or None."""
        scale = parameter(self, "scale", nn.initializers.ones, (channels,))
        return scale, parameter(self, "bias", nn.initializers.zeros, (channels,)) if self.use_bias else None

    def __call__(self, x: Array) -> Array:
        scale, bias = self.weights(x.shape[-1])
        return layer_norm(x, scale, jnp.zeros_like(scale) if bias is None else bias, self.epsilon)


def map_norm(epsilon: float, *, use_bias: bool = True, name: str) -> nn.LayerNorm:
    """Returns a norm over all values of each sample, with a scale and a bias per channel: GroupNorm with one group."""
    return nn.LayerNorm(
        epsilon=epsilon,
        use_bias=use_bias,
        use_fast_variance=False,
        reduction_axes=(-3, -2, -1),
        feature_axes=-1,
        name=name,
    )


class Scale(nn.Module):
    """One learned factor per channel, 1 at first."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        return scaled(x, parameter(self, "scale", nn.initializers.ones, x.shape[-1:]))


class LayerScale(nn.Module):
    """One learned factor per channel for the output of a residual branch (Touvron et al. 2021, CaiT).

    Attributes:
      initial: value of all factors at the start.
    """

    initial: float

    @nn.compact
    def weights(self, channels: int) -> Array:
        """Returns the factors `[channels]`."""
        return parameter(self, "gamma", nn.initializers.constant(self.initial), (channels,))

    def __call__(self, x: Array) -> Array:
        return scaled(x, self.weights(x.shape[-1]))


class StarReLU(nn.Module):
    """`scale * relu(x)**2 + bias` with one learned scale and one learned bias (Yu et al. 2022, MetaFormer).

    They start at 1 and 0, as in the authors' code and in timm. The paper derives 0.8944 and -0.4472 from the moments of
    a normal distribution.
    """

    @nn.compact
    def weights(self) -> tuple[Array, Array]:
        """Returns scale and bias, both `[1]`."""
        return parameter(self, "scale", nn.initializers.ones, (1,)), parameter(
            self, "bias", nn.initializers.zeros, (1,)
        )

    def __call__(self, x: Array) -> Array:
        scale, bias = (
            broadcast(jnp.broadcast_to(value.astype(x.dtype), x.shape[-1:]), x.shape) for value in self.weights()
        )
        return scale * jnp.square(nn.relu(x)) + bias


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
    """Rates of `depth` blocks, rising linearly from 0 to `rate`; without `endpoint` they end one step short of it."""
    return [rate * i / (max(depth - 1, 1) if endpoint else depth) for i in range(depth)]


def average_pool(x: Array, size: int, stride: int, padding: Sequence[tuple[int, int]] = ((0, 0), (0, 0))) -> Array:
    """Average pooling of NHWC maps; padding is not counted. Flax divides by counts in float32; the type stays `x`'s."""
    return nn.avg_pool(x, (size, size), (stride, stride), list(padding), count_include_pad=False).astype(x.dtype)
