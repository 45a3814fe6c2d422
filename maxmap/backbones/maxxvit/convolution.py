"""The stem and the convolution blocks."""

import functools
from collections.abc import Mapping

import jax.numpy as jnp
from flax import linen as nn

from maxmap.layers.blocks import Mlp, SqueezeExcite, SqueezeExciteParameters, squeeze_gate
from maxmap.layers.primitives import (
    ACTIVATIONS,
    BatchNorm,
    Block,
    Conv,
    DropPath,
    FoldedBatchNorm,
    Initializer,
    LayerNorm,
    LayerScale,
    Parameters,
    average_pool,
    batch_in_one_part,
    he_fan_out,
    plain_activation,
)
from maxmap.operations import Array, expansion, max_pool, moments, squeeze_project, upcast
from maxmap.ranges import Count, CountOrZero, DropRate, Fraction, NonNegative, Positive

POOLS = ("avg2", "avg3", "max")


def conv_inits(scheme: str, groups: int = 1) -> dict[str, Initializer]:
    """Returns the initialisers of a convolution by scheme: "vit_eff", "normal", or "torch" for PyTorch's defaults."""
    if scheme == "torch":
        return {}
    kernel_init = he_fan_out(groups) if scheme == "vit_eff" else nn.initializers.normal(0.02)
    return {"kernel_init": kernel_init, "bias_init": nn.initializers.zeros}


def pool(x: Array, kind: str) -> Array:
    """Halves a map.

    Args:
      x: `[B, H, W, C]`.
      kind: "avg2" for the 2x2 mean, "avg3" for the 3x3 mean that counts the padding, "max" for the 3x3 maximum.
    """
    if kind == "avg2":
        return average_pool(x, 2, 2)
    if kind == "avg3":
        return nn.avg_pool(x, (3, 3), (2, 2), [(1, 1), (1, 1)])
    return max_pool(x, 3, 2, 1)


def layer_or_batch_norm(x: Array, kind: str, epsilon: float, name: str, train: bool) -> Array:
    """Normalises a map by a LayerNorm (`kind` "layer") or a BatchNorm ("batch"), a submodule of the caller."""
    if kind == "batch":
        return BatchNorm(epsilon, name=name)(x, train=train)
    return LayerNorm(epsilon, name=name)(x)


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
        conv = functools.partial(Conv, kernel_size=3, padding=self.padding, **conv_inits(self.init_scheme))
        x = conv(self.width[0], stride=2, bias=self.bias[0], name="conv1")(x)
        x = ACTIVATIONS[self.activation](layer_or_batch_norm(x, self.norm, self.epsilon, "norm1", train))
        return conv(self.width[1], bias=self.bias[1], name="conv2")(x)


class Shortcut(nn.Module):
    """The residual path. A block with stride pools it; a 1x1 convolution follows where the channels change.

    Attributes:
      channels: output channels.
      stride: 1 or 2.
      pool_type: see `pool`.
      bias: of the convolution.
      inits: 'kernel_init' and 'bias_init' of the convolution; PyTorch's defaults for what is not given.
      always: a block with stride has the convolution even where the channels stay.
    """

    channels: int
    stride: int
    pool_type: str
    bias: bool
    inits: Mapping[str, Initializer]
    always: bool = False

    @nn.compact
    def __call__(self, x: Array) -> Array:
        if self.stride == 2:
            x = pool(x, self.pool_type)
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
        act = ACTIVATIONS[self.activation]
        inits = conv_inits(self.init_scheme)
        width = _round_to_eight(4 * (self.channels if self.expand_output else x.shape[-1]))
        se_width = int(self.se_ratio * (self.channels if self.expand_output else width))
        squeeze_excite = functools.partial(SqueezeExcite, se_width, self.se_activation, inits)
        shortcut = Shortcut(
            self.channels, self.stride, self.pool_type, self.output_bias, inits, self.always_expand, name="shortcut"
        )(x)

        x, sums = self._expanded(x, width, train=train)
        if self.se_early:
            x = squeeze_excite(name="se_early")(x)
        if sums is not None and not self.se_early:
            x = self._projected(x, sums, se_width)
        else:
            x = act(BatchNorm(self.epsilon, name="norm2")(x, train=train))
            if not self.se_early:
                x = squeeze_excite(name="se")(x)
            x = Conv(self.channels, bias=self.output_bias, name="conv3_1x1", **inits)(x)
        return DropPath(self.drop_path)(x, train=train) + shortcut

    def _expanded(self, x: Array, width: int, *, train: bool) -> tuple[Array, Array | None]:
        """Returns the depthwise convolution's output and, where one operation computed all, its sums."""
        act, inits = ACTIVATIONS[self.activation], conv_inits(self.init_scheme)
        depthwise_inits = conv_inits(self.init_scheme, groups=width)
        pooled = self.stride == 2 and self.stride_mode == "pool"
        stride = 1 if pooled else self.stride
        linear = not self.pre_norm_act and not pooled  # from the first norm to the second
        expand = None
        if train and not self.is_initializing() and batch_in_one_part():
            size = [n // 2 if pooled else n for n in x.shape[1:3]]
            function = plain_activation(self.activation)
            shape = (x.shape[0], *size, x.shape[-1])
            expand = expansion(shape, width, 3, function, stride=stride, padding=self.padding)
        if expand is None or not linear:
            x = BatchNorm(self.epsilon, name="pre_norm")(x, train=train)
            x = act(x) if self.pre_norm_act else x
            x = pool(x, "avg2") if pooled else x
        if expand is not None:
            kernel, _ = Parameters((1, 1, x.shape[-1], width), name="conv1_1x1")()
            weights, bias = self._folded(x, kernel[0, 0], normalise=linear)
            depthwise, _ = Parameters((3, 3, 1, width), name="conv2_kxk")()
            return expand(x, weights, bias, depthwise)
        x = Conv(width, bias=False, name="conv1_1x1", **inits)(x)
        x = act(BatchNorm(self.epsilon, name="norm1")(x, train=train))
        conv = functools.partial(Conv, width, 3, groups=width, bias=False, name="conv2_kxk", **depthwise_inits)
        return conv(stride=stride, padding=self.padding)(x), None

    def _projected(self, x: Array, sums: Array, se_width: int) -> Array:
        """What follows the depthwise convolution, in one operation, from its output and the sums of that."""
        width = x.shape[-1]
        count = x.size // width
        mean = sums[0] / count
        var = jnp.maximum(sums[1] / count - jnp.square(mean), 0)
        factor, summand = FoldedBatchNorm(width, self.epsilon, name="norm2")(mean, var, count)
        gating = SqueezeExciteParameters(width, se_width, name="se")()
        kernel, bias = Parameters((1, 1, width, self.channels), name="conv3_1x1")()
        gate = functools.partial(squeeze_gate, activation=self.se_activation)
        function = plain_activation(self.activation)
        return squeeze_project(x, factor, summand, gating, kernel[0, 0], bias, function=function, gate=gate)

    def _folded(self, x: Array, kernel: Array, *, normalise: bool) -> tuple[Array, Array]:
        """Weights and bias of the map from `x` to the second norm's output, with or without the first norm.

        The first norm and the 1x1 convolution are linear: the second norm's statistics follow from the moments of `x`.
        """
        channels, width = kernel.shape
        count = x.size // channels
        dot = functools.partial(jnp.matmul, precision="highest")
        kernel = upcast(kernel)
        if normalise:
            norm = FoldedBatchNorm(channels, self.epsilon, name="pre_norm")
            mean, covariance = moments(x.transpose(1, 2, 0, 3), norm.near())
            factor, summand = norm(mean, jnp.diagonal(covariance), count)
            mean = mean * factor + summand
            weights, bias = kernel * factor[:, None], dot(summand, kernel)
        else:
            mean, covariance = moments(x.transpose(1, 2, 0, 3), jnp.zeros(channels, kernel.dtype))
            weights, bias = kernel, jnp.zeros(width, kernel.dtype)
        var = jnp.sum(weights * dot(covariance, weights), axis=0)
        factor, summand = FoldedBatchNorm(width, self.epsilon, name="norm1")(dot(mean, kernel), var, count)
        return weights * factor[None], bias * factor + summand


def _round_to_eight(width: int) -> int:
    """Returns the nearest multiple of 8, or the next one where that is over 10 % less (MobileNet's rule)."""
    rounded = max(8, int(width + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * width else rounded


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
        shortcut = Shortcut(self.channels, self.stride, "avg2", True, inits, name="shortcut")(x)
        depthwise = functools.partial(Conv, groups=groups, name="conv_dw", **conv_inits(self.init_scheme, groups))
        x = depthwise(self.channels, 7, stride=self.stride, padding=3)(x)
        x = LayerNorm(self.epsilon, name="norm")(x)
        x = Mlp(4 * self.channels, self.channels, self.activation, inits, layer=Conv, name="mlp")(x, train=train)
        x = LayerScale(self.init_values, name="ls")(x)
        return DropPath(self.drop_path)(x, train=train) + shortcut
