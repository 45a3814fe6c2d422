"""The stem and the convolution blocks."""

import functools
from collections.abc import Mapping

from flax import linen as nn

from maxmap.layers.blocks import Mlp, SqueezeExcite
from maxmap.layers.primitives import (
    ACTIVATIONS,
    BatchNorm,
    Block,
    Conv,
    DropPath,
    Initializer,
    LayerNorm,
    LayerScale,
    average_pool,
    he_fan_out,
)
from maxmap.operations import Array, max_pool
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
        conv = functools.partial(Conv, kernel_size=3, padding=self.padding, **conv_inits(self.init_scheme))
        x = conv(self.width[0], stride=2, bias=self.bias[0], name="conv1")(x)
        x = layer_or_batch_norm(x, self.norm, self.epsilon, "norm1", train, self.activation)
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
        inits = conv_inits(self.init_scheme)
        width = _round_to_eight(4 * (self.channels if self.expand_output else x.shape[-1]))
        se_width = int(self.se_ratio * (self.channels if self.expand_output else width))
        squeeze_excite = functools.partial(SqueezeExcite, se_width, self.se_activation, inits)
        shortcut = Shortcut(
            self.channels, self.stride, self.pool_type, self.output_bias, inits, self.always_expand, name="shortcut"
        )(x)

        activation = self.activation if self.pre_norm_act else None
        x = BatchNorm(self.epsilon, name="pre_norm")(x, train=train, activation=activation)
        if self.stride == 2 and self.stride_mode == "pool":
            x = pool(x, "avg2")
        x = Conv(width, bias=False, name="conv1_1x1", **inits)(x)
        x = BatchNorm(self.epsilon, name="norm1")(x, train=train, activation=self.activation)
        x = Conv(
            width,
            3,
            stride=self.stride if self.stride_mode == "dw" else 1,
            padding=self.padding,
            groups=width,
            bias=False,
            name="conv2_kxk",
            **conv_inits(self.init_scheme, groups=width),
        )(x)
        if self.se_early:
            x = squeeze_excite(name="se_early")(x)
        gate = None if self.se_early else squeeze_excite(name="se").gate
        x = BatchNorm(self.epsilon, name="norm2")(x, train=train, activation=self.activation, gate=gate)
        x = Conv(self.channels, bias=self.output_bias, name="conv3_1x1", **inits)(x)
        return DropPath(self.drop_path)(x, train=train) + shortcut


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
