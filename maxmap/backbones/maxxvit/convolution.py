"""The stem and the convolution blocks."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from flax import linen as nn

from maxmap.fused import expand, expand_by_moments, expansion, squeeze_project, takes_pairs
from maxmap.layers.blocks import Mlp, SqueezeExcite, SqueezeExciteParameters, squeeze_gate
from maxmap.layers.folded import FoldedBatchNorm, fold_batch_norm
from maxmap.layers.paired import convolve_in_pairs
from maxmap.layers.primitives import (
    ACTIVATIONS,
    FUNCTIONS,
    BatchNorm,
    Block,
    Conv,
    DropPath,
    Initializer,
    LayerNorm,
    LayerScale,
    average_pool,
    batch_in_one_part,
    he_fan_out,
    round_to_eight,
)
from maxmap.layers.residual import kept_samples
from maxmap.operations import Array, max_pool, upcast
from maxmap.ranges import Count, CountOrZero, DropRate, Fraction, NonNegative, Positive

POOLS = ("avg2", "avg3", "max")


def conv_inits(scheme: str, groups: int = 1) -> dict[str, Initializer]:
    """Returns the initialisers of a convolution by scheme: "vit_eff", "normal", or "torch" for PyTorch's defaults."""
    if scheme == "torch":
        return {}
    kernel_init = he_fan_out(groups) if scheme == "vit_eff" else nn.initializers.normal(0.02)
    return {"kernel_init": kernel_init, "bias_init": nn.initializers.zeros}


def pool(x: Array, kind: str, *, ceil: bool = False) -> Array:
    """Halves a map.

    Args:
      x: `[B, H, W, C]`.
      kind: "avg2" for the 2x2 mean, "avg3" for the 3x3 mean that counts the padding, "max" for the 3x3 maximum.
      ceil: "avg2" of an odd side averages what is left in its last row or column, otherwise it leaves that out.
    """
    if kind == "avg2":
        return average_pool(x, 2, 2, [(0, side % 2 if ceil else 0) for side in x.shape[1:3]])
    if kind == "avg3":
        return nn.avg_pool(x, (3, 3), (2, 2), [(1, 1), (1, 1)])
    return max_pool(x, 3, 2, 1)


def layer_or_batch_norm(
    x: Array, kind: str, epsilon: float, name: str, train: bool, activation: str | None = None
) -> Array:
    """Normalises a map by a LayerNorm (`kind` "layer") or a BatchNorm ("batch"), a submodule of the caller.

    An activation may follow, a key of `ACTIVATIONS`.
    """
    if kind == "batch":
        return BatchNorm(epsilon, name=name)(x, train=train, activation=activation)
    x = LayerNorm(epsilon, name=name)(x)
    return x if activation is None else ACTIVATIONS[activation](x)


class ConvStem(nn.Module):
    """Two 3x3 convolutions, the first with stride 2. No norm or activation follows the second.

    Attributes:
      width: channels of the two convolutions.
      bias: of the two convolutions.
      norm: "layer" or "batch", after the first convolution.
      activation: after the norm.
      epsilon: of the norm.
      padding: "same" for TensorFlow's rule, otherwise zeros on every side.
      init_scheme: see `conv_inits`.
    """

    width: tuple[int, int]
    bias: tuple[bool, bool]
    norm: str
    activation: str
    epsilon: float
    padding: int | str
    init_scheme: str

    @nn.compact
    def __call__(self, x: Array, *, train: bool) -> Array:
        """Maps `[B, H, W, C]` to `[B, H / 2, W / 2, O]`, or to pairs of pixels `[B, H / 2, W / 4, 2 O]`."""
        conv = functools.partial(Conv, kernel_size=3, padding=self.padding, **conv_inits(self.init_scheme))
        first = conv(self.width[0], stride=2, bias=self.bias[0], name="conv1")
        second = conv(self.width[1], bias=self.bias[1], name="conv2")
        batch, height, width, _ = x.shape
        size = (batch, -(-height // 2), -(-width // 2))
        pairs = self.norm == "batch" and self.padding in (1, "same") and not self.is_initializing()
        if not (pairs and all(takes_pairs((*size, channels)) for channels in self.width)):
            x = first(x)
            return second(layer_or_batch_norm(x, self.norm, self.epsilon, "norm1", train, self.activation))
        x = convolve_in_pairs(first, x)
        x = BatchNorm(self.epsilon, name="norm1")(x, train=train, activation=self.activation, pixels=2)
        return convolve_in_pairs(second, x)


class Shortcut(nn.Module):
    """The residual path. A block with stride pools it; a 1x1 convolution follows where the channels change.

    Attributes:
      channels: output channels.
      stride: 1 or 2.
      pool_type: see `pool`.
      bias: of the convolution.
      inits: 'kernel_init' and 'bias_init' of the convolution; PyTorch's defaults for what is not given.
      always: a block with stride has the convolution even where the channels stay.
      ceil: of the pooling, see `pool`; as a convolution with stride, which keeps the last pixel of an odd side.
    """

    channels: int
    stride: int
    pool_type: str
    bias: bool
    inits: Mapping[str, Initializer]
    always: bool = False
    ceil: bool = False

    @nn.compact
    def __call__(self, x: Array, *, pooled: bool = False) -> Array:
        if self.stride == 2 and not pooled:
            x = pool(x, self.pool_type, ceil=self.ceil)
        if x.shape[-1] != self.channels or (self.always and self.stride == 2):
            x = Conv(self.channels, bias=self.bias, name="expand", **self.inits)(x)
        return x


class MBConv(Block):
    """Inverted bottleneck with squeeze-excitation and a batch norm in front: MaxViT's and CoAtNet's convolution block.

    Attributes:
      channels: output channels.
      stride: 1 or 2.
      drop_path: rate of dropping the residual branch.
      init_scheme: see `conv_inits`.
      expand_output: the inner width is 4 times the output channels, otherwise 4 times the input channels.
      pre_norm_act: an activation follows the first norm.
      output_bias: bias of the last 1x1 convolution and of the shortcut's.
      stride_mode: "dw" gives the stride to the depthwise convolution, "pool" averages before the first 1x1 convolution.
      pool_type: of the shortcut, see `pool`.
      always_expand: a shortcut with stride has its 1x1 convolution even where the channels stay.
      padding: "same" for TensorFlow's rule, otherwise zeros on every side.
      se_early: squeeze-excitation stands in front of the second norm, otherwise behind it.
      se_activation: inside the squeeze-excitation.
      se_ratio: width of the squeeze-excitation relative to the output channels (with `expand_output`) or to the inner
        width (without).
      activation: after the norms.
      epsilon: of the norms.
    """

    channels: Count
    stride: Count = 1
    drop_path: DropRate = 0.0
    init_scheme: str = "vit_eff"
    expand_output: bool = True
    pre_norm_act: bool = False
    output_bias: bool = True
    stride_mode: str = "dw"
    pool_type: str = "avg2"
    always_expand: bool = False
    padding: CountOrZero | str = 1
    se_early: bool = False
    se_activation: str = "silu"
    se_ratio: Fraction = 0.25
    activation: str = "gelu"
    epsilon: Positive = 1e-5

    @nn.compact
    def __call__(self, x: Array, *, train: bool = False) -> Array:
        inits = conv_inits(self.init_scheme)
        width = round_to_eight(4 * (self.channels if self.expand_output else x.shape[-1]))
        se_width = int(self.se_ratio * (self.channels if self.expand_output else width))
        squeeze_excite = functools.partial(SqueezeExcite, se_width, self.se_activation, inits)
        shortcut = Shortcut(
            self.channels,
            self.stride,
            self.pool_type,
            self.output_bias,
            inits,
            self.always_expand,
            ceil=not self._pooled(),
            name="shortcut",
        )

        window = None if self.is_initializing() else self._expansion(x.shape, width, train=train)
        sums = None
        if window is not None and train:
            x, sums, beside = self._expanded_at_once(x, width, window, shortcut)
        else:
            beside = shortcut(x)
            if window is not None:
                x = self._expanded_by_fixed_norms(x, width, window)
            else:
                x = self._expanded(x, width, train=train)
        if self.se_early:
            x = squeeze_excite(name="se_early")(x)
        if window is not None and not self.se_early:
            return self._projected(x, sums, se_width, kept_samples(x, self.drop_path, train), beside)
        gate = None if self.se_early else squeeze_excite(name="se").gate
        x = BatchNorm(self.epsilon, name="norm2")(x, train=train, activation=self.activation, gate=gate)
        x = Conv(self.channels, bias=self.output_bias, name="conv3_1x1", **inits)(x)
        return DropPath(self.drop_path)(x, train=train) + beside

    def _pooled(self) -> bool:
        return self.stride == 2 and self.stride_mode == "pool"

    def _expanded(self, x: Array, width: int, *, train: bool) -> Array:
        """All from the first norm to the depthwise convolution."""
        activation = self.activation if self.pre_norm_act else None
        x = BatchNorm(self.epsilon, name="pre_norm")(x, train=train, activation=activation)
        if self._pooled():
            x = pool(x, "avg2")
        x = Conv(width, bias=False, name="conv1_1x1", **conv_inits(self.init_scheme))(x)
        x = BatchNorm(self.epsilon, name="norm1")(x, train=train, activation=self.activation)
        return Conv(
            width,
            3,
            stride=1 if self._pooled() else self.stride,
            padding=self.padding,
            groups=width,
            bias=False,
            name="conv2_kxk",
            **conv_inits(self.init_scheme, groups=width),
        )(x)

    def _linear(self) -> bool:
        """Whether all between the input and the norm behind the first convolution is linear, pixel by pixel."""
        return not self.pre_norm_act and not self._pooled()

    def _beside(self) -> str:
        """The shortcut's part that `expand_by_moments` computes."""
        if not self._linear():
            return "none"
        return "same" if self.stride == 1 else "mean" if self.pool_type == "avg2" else "none"

    def _expansion(self, shape: Sequence[int], width: int, *, train: bool) -> Any:
        """See `maxmap.fused.expansion`; None also where batch norms do not train with the batch as a whole."""
        if train and not batch_in_one_part():
            return None
        batch, height, rows, channels = shape
        step = 2 if self._pooled() else 1
        return expansion(
            (batch, height // step, rows // step, channels),
            width,
            3,
            FUNCTIONS[self.activation],
            stride=self.stride // step,
            padding=self.padding,
        )

    def _before_expansion(self, x: Array, *, train: bool) -> Array:
        """What stands in front of the first convolution, where that is not linear."""
        x = BatchNorm(self.epsilon, name="pre_norm")(x, train=train)
        x = ACTIVATIONS[self.activation](x) if self.pre_norm_act else x
        return pool(x, "avg2") if self._pooled() else x

    def _expansion_kernels(self, channels: int, width: int) -> tuple[Array, Array]:
        """Kernels of the first convolution, `[I, C]`, and of the depthwise one, `[3, 3, 1, C]`."""
        kernel, _ = Conv(width, bias=False, name="conv1_1x1").weights(channels)
        depthwise, _ = Conv(width, 3, groups=width, bias=False, name="conv2_kxk").weights(width)
        return kernel[0, 0], depthwise

    def _expanded_by_fixed_norms(self, x: Array, width: int, window: Any) -> Array:
        """What `_expanded` returns without `train`: the norms are parts of the first convolution."""
        channels = x.shape[-1]
        first = FoldedBatchNorm(channels, name="pre_norm").fold(self.epsilon) if self._linear() else None
        if first is None:
            x = self._before_expansion(x, train=False)
        factor, bias = FoldedBatchNorm(width, name="norm1").fold(self.epsilon)
        kernel, depthwise = self._expansion_kernels(channels, width)
        weights = upcast(kernel) * factor[None]
        if first is not None:
            bias = bias + jnp.matmul(first[1], weights, precision="highest")
            weights = weights * first[0][:, None]
        return expand(window, x, weights, bias, depthwise)

    def _expanded_at_once(self, x: Array, width: int, window: Any, shortcut: "Shortcut") -> tuple[Array, Array, Array]:
        """What `_expanded` returns, its sums, and the shortcut."""
        channels, beside = x.shape[-1], None
        if self._linear():
            first = FoldedBatchNorm(channels, train=True, name="pre_norm")
            near, norm = first.near(), [first.scale, first.bias]
        else:
            beside = shortcut(x)
            x = self._before_expansion(x, train=True)
            first, near, norm = None, jnp.zeros(channels), []
        second = FoldedBatchNorm(width, train=True, name="norm1")
        kernel, depthwise = self._expansion_kernels(channels, width)
        fold = functools.partial(_fold, epsilon=self.epsilon)
        folding = (kernel, second.scale, second.bias, *norm)
        found = expand_by_moments(window, x, near, fold, folding, depthwise, shortcut=self._beside())
        y, sums, pooled, mean, covariance = found
        count = x.size // channels
        if first is not None:
            first.follow(mean, jnp.diagonal(covariance), count)
        *_, mean, var = _expanded_moments(mean, covariance, kernel, *norm, epsilon=self.epsilon)
        second.follow(mean, var, count)
        if beside is None:
            beside = shortcut(pooled[0], pooled=True) if pooled else shortcut(x)
        return y, sums, beside

    def _projected(self, x: Array, sums: Array | None, se_width: int, keep: Array, beside: Array) -> Array:
        """What follows the depthwise convolution, in one operation, from its output and, in training, its sums.

        The branch is multiplied by `keep` `[B]` and added to the shortcut `beside`.
        """
        width = x.shape[-1]
        norm = FoldedBatchNorm(width, train=sums is not None, name="norm2")
        if sums is None:
            factor, summand = norm.fold(self.epsilon)
        else:
            count = x.size // width
            mean = sums[0] / count
            var = jnp.maximum(sums[1] / count - jnp.square(mean), 0)
            norm.follow(mean, var, count)
            factor, summand = fold_batch_norm(mean, var, norm.scale, norm.bias, self.epsilon)
        gating = SqueezeExciteParameters(width, se_width, name="se")()
        kernel, bias = Conv(self.channels, bias=self.output_bias, name="conv3_1x1").weights(width)
        bias = jnp.zeros(self.channels, kernel.dtype) if bias is None else bias
        gate = functools.partial(squeeze_gate, activation=self.se_activation)
        function = FUNCTIONS[self.activation]
        return squeeze_project(
            x, factor, summand, gating, kernel[0, 0], bias, keep, beside, function=function, gate=gate
        )


def _expanded_moments(
    mean: Array, covariance: Array, kernel: Array, *first: Array, epsilon: float
) -> tuple[Array, Array, Array, Array]:
    """Follows the moments of a map through a batch norm, if there is one, and a 1x1 convolution.

    Args:
      mean: of the map, `[I]`, in float32 or wider.
      covariance: of the map, `[I, I]`.
      kernel: `[I, C]`.
      *first: scale and bias of the norm, `[I]`.
      epsilon: of the norm.

    Returns:
      Weights `[I, C]` and bias `[C]` of both together, and mean and variance `[C]` of the result.
    """
    dot = functools.partial(jnp.matmul, precision="highest")
    kernel = upcast(kernel)
    weights, bias = kernel, jnp.zeros_like(kernel[0])
    if first:
        scale, shift = first
        factor, summand = fold_batch_norm(mean, jnp.diagonal(covariance), scale, shift, epsilon)
        weights, bias = kernel * factor[:, None], dot(summand, kernel)
        mean = mean * factor + summand
    return weights, bias, dot(mean, kernel), jnp.sum(weights * dot(covariance, weights), axis=0)


def _fold(
    mean: Array, covariance: Array, kernel: Array, scale: Array, bias: Array, *first: Array, epsilon: float
) -> tuple[Array, Array]:
    """Weights and bias of norm, 1x1 convolution and norm together; see `_expanded_moments`."""
    weights, shift, mean, var = _expanded_moments(mean, covariance, kernel, *first, epsilon=epsilon)
    factor, summand = fold_batch_norm(mean, var, scale, bias, epsilon)
    return weights * factor[None], shift * factor + summand


class StridedConvNeXtBlock(Block):
    """ConvNeXt's block (Liu et al. 2022) in timm's form for this family: it can halve the map and change the channels.

    Attributes:
      channels: output channels.
      stride: 1 or 2.
      drop_path: rate of dropping the residual branch.
      init_scheme: see `conv_inits`.
      init_values: initial layer scale.
      activation: of the MLP.
      epsilon: of the norm.
    """

    channels: Count
    stride: Count = 1
    drop_path: DropRate = 0.0
    init_scheme: str = "vit_eff"
    init_values: NonNegative = 1e-6
    activation: str = "gelu"
    epsilon: Positive = 1e-6

    @nn.compact
    def __call__(self, x: Array, *, train: bool = False) -> Array:
        inits, groups = conv_inits(self.init_scheme), x.shape[-1]
        shortcut = Shortcut(self.channels, self.stride, "avg2", True, inits, ceil=True, name="shortcut")(x)
        depthwise = functools.partial(Conv, groups=groups, name="conv_dw", **conv_inits(self.init_scheme, groups))
        x = depthwise(self.channels, 7, stride=self.stride, padding=3)(x)
        x = LayerNorm(self.epsilon, name="norm")(x)
        x = Mlp(4 * self.channels, self.channels, self.activation, inits, layer=Conv, name="mlp")(x, train=train)
        x = LayerScale(self.init_values, name="ls")(x)
        return DropPath(self.drop_path)(x, train=train) + shortcut
