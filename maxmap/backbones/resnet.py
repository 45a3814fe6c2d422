"""ResNet-50, as timm has it and as MAP's authors changed it.

He et al. 2015, "Deep Residual Learning" (arXiv:1512.03385). `resnet50` is timm's (v1.5: the stride is in the 3x3
convolution). `resnet50_se_deep` is the backbone of `map_resnet50` in Lab-LVM/imagenet-models: a stem of three
convolutions, squeeze-excitation (Hu et al. 2018), GELU inside of the blocks, and a last stage of half the width.
"""

import functools
from collections.abc import Sequence

import jax.numpy as jnp
from flax import linen as nn
from jax import lax

from maxmap.backbones import Variant
from maxmap.fused import (
    bottleneck_activated,
    bottleneck_first,
    bottleneck_last,
    channel_sums,
    fuses_bottleneck,
    takes_pairs,
    unpair,
)
from maxmap.layers.folded import FoldedBatchNorm, fold_batch_norm
from maxmap.layers.paired import convolve_in_pairs
from maxmap.layers.primitives import (
    ACTIVATIONS,
    DERIVATIVES,
    FUNCTIONS,
    BatchNorm,
    Block,
    Conv,
    DropPath,
    batch_in_one_part,
    drop_path_rates,
    he_fan_out,
)
from maxmap.layers.residual import kept_samples
from maxmap.operations import Array, convolve, max_pool, upcast
from maxmap.ranges import Count, DropRate, Pixels

EXPANSION = 4  # output channels of a block over its inner channels
EPSILON = 1e-5  # of the norms
SQUEEZE = 16  # output channels of a block over those of its squeeze-excitation


class Bottleneck(Block):
    """1x1, 3x3 and 1x1 convolution with a residual path; the scale of the last norm starts at zero.

    Attributes:
      channels: output channels.
      stride: of the 3x3 convolution and of the residual path.
      squeeze: MAP's form, with GELU between the convolutions and squeeze-excitation after them.
      drop_path: rate of dropping the branch.
    """

    channels: int
    stride: int
    squeeze: bool
    drop_path: float

    @nn.compact
    def __call__(self, x: Array, *, train: bool) -> Array:
        width = self.channels // EXPANSION
        at_once = train and not self.is_initializing() and batch_in_one_part()
        if at_once and fuses_bottleneck(x, width, self.channels):
            return self._trained_at_once(x, width)
        act = self._activation()
        y = _conv_norm(x, self._names(1), width, activation=act, train=train)
        y = _conv_norm(y, self._names(2), width, 3, self.stride, activation=act, train=train)
        y = _conv_norm(y, self._names(3), self.channels, zero_scale=True, train=train)
        if self.squeeze:
            y = y * self._gate(jnp.mean(y, axis=(1, 2), keepdims=True), train=train)
        return nn.relu(self._shortcut(x, train=train) + DropPath(self.drop_path)(y, train=train))

    def _names(self, i: int) -> tuple[str, str]:
        """Names of the i-th convolution and its norm."""
        return (f"conv{i}_0", f"conv{i}_1") if self.squeeze else (f"conv{i}", f"bn{i}")

    def _activation(self) -> str:
        return "gelu" if self.squeeze else "relu"

    def _gate(self, mean: Array, *, train: bool) -> Array:
        """Squeeze-excitation's factors, from the means of the maps, both `[B, 1, 1, C]`."""
        # A norm of one pixel an image gains nothing by a kernel that activates it as well.
        gate = _conv_norm(mean, ("se_1_0", "se_1_1"), self.channels // SQUEEZE, train=train)
        gate = ACTIVATIONS[self._activation()](gate)
        return nn.sigmoid(Conv(self.channels, kernel_init=he_fan_out(), name="se_2")(gate))

    def _shortcut(self, x: Array, *, train: bool) -> Array:
        if self.stride > 1 or x.shape[-1] != self.channels:
            return _conv_norm(x, ("downsample_0", "downsample_1"), self.channels, 1, self.stride, train=train)
        return x

    def _trained_at_once(self, x: Array, width: int) -> Array:
        """What training computes, with operations that fuse the norms and the residual path with the convolutions.

        The last norm is linear in what the last convolution reads, so that its statistics and squeeze-excitation's
        means follow from the moments of that.
        """
        names = [self._names(i) for i in (1, 2, 3)]
        norms = [
            FoldedBatchNorm(channels, train=True, name=name[1])
            for channels, name in zip((width, width, self.channels), names, strict=True)
        ]
        shapes = ((x.shape[-1], width, 1), (width, width, 3), (width, self.channels, 1))
        kernels = [
            Conv(out_channels, size, bias=False, name=name[0]).weights(in_channels)[0]
            for (in_channels, out_channels, size), name in zip(shapes, names, strict=True)
        ]
        activation = self._activation()
        function = FUNCTIONS[activation]

        y, x, mean, var = bottleneck_first(
            x,
            kernels[0][0, 0],
            norms[0].scale,
            norms[0].bias,
            norms[0].near(),
            function,
            DERIVATIVES.get(activation),
            EPSILON,
        )
        norms[0].follow(mean, var, y.size // width)
        y = convolve(y, kernels[1].astype(y.dtype), stride=self.stride, padding=1)
        y, sums = channel_sums(y, norms[1].near())
        factor, summand = _fold(norms[1], sums, y.size // width)
        near = lax.stop_gradient(function(upcast(norms[1].bias)))  # the mean of what is activated is the norm's bias
        y, total, square = bottleneck_activated(y, factor, summand, near, function)

        dot = functools.partial(jnp.matmul, precision="highest")
        count, kernel = y.size // width, upcast(kernels[2][0, 0])
        offset = jnp.sum(total, axis=0) / count
        covariance = square / count - jnp.outer(offset, offset)
        mean, var = dot(offset, kernel), jnp.maximum(jnp.sum(kernel * dot(covariance, kernel), axis=0), 0)
        norms[2].follow(mean + dot(near, kernel), var, count)
        factor, summand = fold_batch_norm(mean, var, norms[2].scale, norms[2].bias, EPSILON)
        weights = kernel * factor[None]
        gate = jnp.broadcast_to(kept_samples(y, self.drop_path, train=True)[:, None], (y.shape[0], self.channels))
        if self.squeeze:
            means = dot(total * (y.shape[0] / count), weights) + summand[None]
            excited = self._gate(means.astype(x.dtype)[:, None, None], train=True)
            gate = gate * upcast(excited[:, 0, 0])
        return bottleneck_last(y, weights, summand, gate, self._shortcut(x, train=True))


def _fold(norm: FoldedBatchNorm, sums: Array, count: int) -> tuple[Array, Array]:
    """Factor and summand of a norm, whose running statistics follow.

    Args:
      norm: of a map.
      sums: sum and sum of squares of what the map has over `norm.near()`, `[2, C]`.
      count: pixels of the map.
    """
    offset = sums[0] / count
    mean, var = norm.near() + offset, jnp.maximum(sums[1] / count - jnp.square(offset), 0)
    norm.follow(mean, var, count)
    return fold_batch_norm(mean, var, norm.scale, norm.bias, EPSILON)


def _conv_norm(
    x: Array,
    names: tuple[str, str],
    channels: int,
    kernel_size: int = 1,
    stride: int = 1,
    *,
    zero_scale: bool = False,
    activation: str | None = None,
    pairs: bool = False,
    train: bool,
) -> Array:
    """Convolution without bias, a batch norm whose scale starts at one, or at zero with `zero_scale`, an activation.

    With `pairs` the result has pairs of pixels, and so has `x` at stride 1; see `maxmap.layers.paired`.
    """
    conv = Conv(channels, kernel_size, stride, kernel_size // 2, bias=False, kernel_init=he_fan_out(), name=names[0])
    scale_init = nn.initializers.zeros if zero_scale else nn.initializers.ones
    norm = BatchNorm(EPSILON, scale_init=scale_init, name=names[1])
    if pairs:
        return norm(convolve_in_pairs(conv, x), train=train, activation=activation, pixels=2)
    return norm(conv(x), train=train, activation=activation)


class ResNet(nn.Module):
    """ResNet with bottleneck blocks.

    Attributes:
      image_size: height and width, or one number for both; any other size works too.
      embed_dim: channels of the stages.
      depths: blocks of the stages.
      drop_path: stochastic depth, rising linearly over all blocks from 0 to this rate. In MAP's form it ends one step
        short of this rate, as published.
      squeeze: MAP's form, with a stem of three 3x3 convolutions, squeeze-excitation, and GELU inside of the blocks.
    """

    image_size: Pixels | tuple[Pixels, Pixels] = 224
    embed_dim: Sequence[Count] = (256, 512, 1024, 2048)
    depths: Sequence[Count] = (3, 4, 6, 3)
    drop_path: DropRate = 0.0
    squeeze: bool = False

    @nn.nowrap
    def num_features(self) -> int:
        """Feature maps that a call returns."""
        return 1 + len(self.depths)

    @nn.nowrap
    def validate(self) -> None:
        """Raises ValueError, one sentence, if the fields do not fit each other."""
        if len(self.embed_dim) != len(self.depths):
            raise ValueError("embed_dim and depths need one entry for each stage")
        step = SQUEEZE if self.squeeze else EXPANSION
        for channels in self.embed_dim:
            if channels % step:
                near = max(round(channels / step), 1) * step
                raise ValueError(f"embed_dim {channels} is not a multiple of {step}; the nearest that is one is {near}")

    @nn.compact
    def __call__(self, x: Array, *, train: bool = False) -> list[Array]:
        """Maps images `[B, H, W, C]` to the stem's map before its pooling and the map of every stage."""
        if self.squeeze:
            batch, height, width, _ = x.shape
            pairs = not self.is_initializing() and takes_pairs((batch, -(-height // 2), -(-width // 2), 64))
            for i in range(3):
                names, stride = (f"stem_{i}_0", f"stem_{i}_1"), 1 if i else 2
                x = _conv_norm(x, names, 64, 3, stride, activation="gelu", pairs=pairs, train=train)
            x, beside = unpair(x) if pairs else (x, x)
        else:
            beside = x = _conv_norm(x, ("conv1", "bn1"), 64, 7, 2, activation="relu", train=train)
        features = [beside]
        x = max_pool(x, 3, 2, 1)
        rates = iter(drop_path_rates(self.drop_path, sum(self.depths), endpoint=not self.squeeze))
        for stage, (channels, depth) in enumerate(zip(self.embed_dim, self.depths, strict=True)):
            for i in range(depth):
                stride = 2 if stage and i == 0 else 1
                block = Bottleneck(channels, stride, self.squeeze, next(rates), name=f"layer{stage + 1}_{i}")
                x = block(x, train=train)
            features.append(x)
        return features


class SEResNet(ResNet):
    """MAP's form of ResNet, whose parameters have other names."""

    embed_dim: Sequence[Count] = (256, 512, 1024, 1024)
    squeeze: bool = True


VARIANTS = {
    "resnet50": Variant(ResNet, {"norm": "none"}, {}),
    "resnet50_se_deep": Variant(SEResNet, {"norm": "none", "init_scheme": "trunc_normal"}, {}),
}
