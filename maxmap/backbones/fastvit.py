"""FastViT: convolutions that train as several branches, which one convolution replaces for inference.

Vasu et al. 2023, "FastViT: A Fast Hybrid Vision Transformer using Structural Reparameterization" (arXiv:2303.14189);
its branches are MobileOne's (Vasu et al. 2022, arXiv:2206.04040). Names and parameters are those of timm 1.0.31, in
both forms; `maxmap.fuse` makes the second of the first.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from einops import rearrange
from flax import linen as nn

from maxmap.backbones import Variant
from maxmap.layers.blocks import ConvNormAct, SelfAttention, SqueezeExcite
from maxmap.layers.folded import fold_batch_norm
from maxmap.layers.parameters import parameter
from maxmap.layers.primitives import (
    ACTIVATIONS,
    TRUNC_NORMAL,
    BatchNorm,
    Block,
    Conv,
    DropPath,
    drop_path_rates,
    require_one_of,
)
from maxmap.operations import Array, scaled
from maxmap.ranges import Count, CountOrZero, DropRate, NonNegative, Pixels, Positive

EPSILON = 1e-5  # of the norms
HEAD_DIM = 32
SQUEEZE = 16  # channels of the last convolution over those of its squeeze-excitation
MIXERS = ("repmixer", "attention")
Tree = Mapping[str, Any]  # of a module's parameters, or of its running statistics


class MobileOne(nn.Module):
    """A convolution with a norm, one of 1x1 and a norm of the input alone, added; one convolution if fused.

    Attributes:
      channels: output channels.
      kernel_size: of the convolution; of size 1 there is none of 1x1 beside it.
      stride: of both convolutions.
      groups: of both convolutions.
      fused: the form for inference.
      activation: behind the sum, a key of `ACTIVATIONS`; None for none.
      squeeze: squeeze-excitation stands in front of the activation.
    """

    channels: int
    kernel_size: int
    stride: int
    groups: int
    fused: bool
    activation: str | None = None
    squeeze: bool = False

    @nn.compact
    def __call__(self, x: Array, *, train: bool) -> Array:
        if self.fused:
            y = _fused(self.channels, self.kernel_size, self.stride, self.groups)(x)
        else:
            layer = functools.partial(ConvNormAct, self.channels, stride=self.stride, groups=self.groups)
            y = layer(kernel_size=self.kernel_size, name="conv_kxk_0")(x, train=train)
            if self.kernel_size > 1:
                y = y + layer(name="conv_scale")(x, train=train)
            if self.stride == 1 and x.shape[-1] == self.channels:
                y = y + BatchNorm(EPSILON, name="identity")(x, train=train)
        if self.squeeze:
            y = SqueezeExcite(self.channels // SQUEEZE, name="se")(y)
        return y if self.activation is None else ACTIVATIONS[self.activation](y)


def _fused(channels: int, kernel_size: int, stride: int, groups: int) -> Conv:
    """Returns the convolution that replaces the branches of a module."""
    return Conv(channels, kernel_size, stride, kernel_size // 2, groups, name="reparam_conv")


class LargeKernel(nn.Module):
    """Depthwise convolutions of 7x7 and 3x3 with stride 2 and norms, added; one convolution if fused.

    Attributes:
      channels: output channels, a multiple of the input's.
      fused: the form for inference.
    """

    channels: int
    fused: bool

    @nn.compact
    def __call__(self, x: Array, *, train: bool) -> Array:
        if self.fused:
            return _fused(self.channels, 7, 2, x.shape[-1])(x)
        layer = functools.partial(ConvNormAct, self.channels, stride=2, groups=x.shape[-1])
        large = layer(kernel_size=7, name="large_conv")(x, train=train)
        return large + layer(kernel_size=3, name="small_conv")(x, train=train)


class Downsample(nn.Module):
    """Halves a map by depthwise convolutions, and mixes the channels.

    Attributes:
      channels: output channels.
      fused: the form for inference.
    """

    channels: int
    fused: bool

    @nn.compact
    def __call__(self, x: Array, *, train: bool) -> Array:
        x = LargeKernel(self.channels, self.fused, name="proj_0")(x, train=train)
        return MobileOne(self.channels, 1, 1, 1, self.fused, "gelu", name="proj_1")(x, train=train)


class ChannelScale(nn.Module):
    """Layer scale, whose factors have the shape `[C, 1, 1]` of the reference.

    Attributes:
      initial: value of all factors at the start.
    """

    initial: float

    @nn.compact
    def __call__(self, x: Array) -> Array:
        gamma = parameter(self, "gamma", nn.initializers.constant(self.initial), (x.shape[-1], 1, 1))
        return scaled(x, gamma.reshape(-1))


class InputNorm(nn.Module):
    """A batch norm under the name of the branch of `MobileOne` that it is."""

    @nn.compact
    def __call__(self, x: Array, *, train: bool) -> Array:
        return BatchNorm(EPSILON, name="identity")(x, train=train)


class RepMixer(nn.Module):
    """Mixes pixels by a depthwise 3x3 convolution on a residual path, less a norm of the input; one if fused.

    Attributes:
      init_values: initial layer scale.
      fused: the form for inference.
    """

    init_values: float
    fused: bool

    @nn.compact
    def __call__(self, x: Array, *, train: bool) -> Array:
        channels = x.shape[-1]
        if self.fused:
            return _fused(channels, 3, 1, channels)(x)
        y = MobileOne(channels, 3, 1, channels, self.fused, name="mixer")(x, train=train)
        y = y - InputNorm(name="norm")(x, train=train)
        return x + ChannelScale(self.init_values, name="layer_scale")(y)


class PositionEncoding(nn.Module):
    """Adds a depthwise 7x7 convolution of the map (Chu et al. 2021, arXiv:2102.10882); one convolution if fused.

    Attributes:
      fused: the form for inference.
    """

    fused: bool

    @nn.compact
    def __call__(self, x: Array) -> Array:
        channels = x.shape[-1]
        if self.fused:
            return _fused(channels, 7, 1, channels)(x)
        return x + Conv(channels, 7, padding=3, groups=channels, name="pos_enc")(x)


class ConvMlp(nn.Module):
    """A depthwise 7x7 convolution with a norm, and two 1x1 convolutions with GELU between them.

    Attributes:
      hidden: channels between the two.
    """

    hidden: int

    @nn.compact
    def __call__(self, x: Array, *, train: bool) -> Array:
        channels = x.shape[-1]
        x = ConvNormAct(channels, 7, groups=channels, inits=TRUNC_NORMAL, name="conv")(x, train=train)
        x = ACTIVATIONS["gelu"](Conv(self.hidden, name="fc1", **TRUNC_NORMAL)(x))
        return Conv(channels, name="fc2", **TRUNC_NORMAL)(x)


class FastViTBlock(Block):
    """A token mixer and an MLP.

    Attributes:
      mixer: one of `MIXERS`.
      mlp_ratio: hidden channels of the MLP divided by the map's.
      drop_path: rate of dropping each residual branch but RepMixer's.
      init_values: initial layer scale.
      fused: the form for inference.
    """

    mixer: str
    mlp_ratio: float
    drop_path: float
    init_values: float
    fused: bool

    @nn.compact
    def __call__(self, x: Array, *, train: bool) -> Array:
        channels, height = x.shape[-1], x.shape[1]
        name = "layer_scale"
        if self.mixer == "repmixer":
            x = RepMixer(self.init_values, self.fused, name="token_mixer")(x, train=train)
        else:
            y = rearrange(BatchNorm(EPSILON, name="norm")(x, train=train), "b h w c -> b (h w) c")
            attention = SelfAttention(channels // HEAD_DIM, TRUNC_NORMAL, qkv_bias=False, name="token_mixer")
            y = rearrange(attention(y, train=train), "b (h w) c -> b h w c", h=height)
            y = ChannelScale(self.init_values, name="layer_scale_1")(y)
            x = x + DropPath(self.drop_path)(y, train=train)
            name = "layer_scale_2"
        y = ConvMlp(int(self.mlp_ratio * channels), name="mlp")(x, train=train)
        y = ChannelScale(self.init_values, name=name)(y)
        return x + DropPath(self.drop_path)(y, train=train)


class Stage(nn.Module):
    """Blocks, after a downsampling in all stages but the first, and after a position encoding where they attend.

    Attributes:
      channels: output channels.
      downsample: halves the map first.
      mixer, mlp_ratio, init_values, fused: see `FastViTBlock`.
      drop_path: rates of the blocks.
    """

    channels: int
    downsample: bool
    mixer: str
    mlp_ratio: float
    drop_path: Sequence[float]
    init_values: float
    fused: bool

    @nn.compact
    def __call__(self, x: Array, *, train: bool) -> Array:
        if self.downsample:
            x = Downsample(self.channels, self.fused, name="downsample")(x, train=train)
        if self.mixer == "attention":
            x = PositionEncoding(self.fused, name="pos_emb")(x)
        for i, rate in enumerate(self.drop_path):
            block = FastViTBlock(self.mixer, self.mlp_ratio, rate, self.init_values, self.fused, name=f"blocks_{i}")
            x = block(x, train=train)
        return x


class FastViT(nn.Module):
    """The backbone: a stem with stride 4, then stages, of which all but the first halve the map.

    Attributes:
      image_size: height and width, or one number for both; any other size works too.
      embed_dim: channels of the stages.
      depths: blocks of the stages.
      mixers: token mixers of the stages, "repmixer" or "attention".
      mlp_ratio: hidden channels of the MLPs divided by the stage's channels.
      head_width: channels of a convolution behind the stages, a multiple of the last stage's, whose map is returned
        too; 0 for none.
      drop_path: stochastic depth, rising linearly over all blocks from 0 to this rate.
      init_values: initial layer scale.
      fused: the form for inference; see `maxmap.fuse`.
    """

    image_size: Pixels | tuple[Pixels, Pixels] = 256
    embed_dim: Sequence[Count] = (64, 128, 256, 512)
    depths: Sequence[Count] = (2, 2, 6, 2)
    mixers: Sequence[str] = ("repmixer",) * 4
    mlp_ratio: Positive = 4.0
    head_width: CountOrZero = 1024
    drop_path: DropRate = 0.0
    init_values: NonNegative = 1e-5
    fused: bool = False

    @nn.nowrap
    def num_features(self) -> int:
        """Feature maps that a call returns."""
        return 1 + len(self.depths) + bool(self.head_width)

    @nn.nowrap
    def validate(self) -> None:
        """Raises ValueError, one sentence, if the fields do not fit each other."""
        if not len(self.embed_dim) == len(self.depths) == len(self.mixers):
            raise ValueError("embed_dim, depths and mixers need one entry for each stage")
        for stage, (channels, mixer) in enumerate(zip(self.embed_dim, self.mixers, strict=True)):
            require_one_of(mixer, f"the mixer of stage {stage}", MIXERS)
            self._require_multiple(channels, HEAD_DIM if mixer == "attention" else 1, f"channels of stage {stage}")
        for stage, (before, channels) in enumerate(zip(self.embed_dim, self.embed_dim[1:], strict=False), start=1):
            self._require_multiple(channels, before, f"channels of stage {stage}")
        if self.head_width:
            self._require_multiple(self.head_width, self.embed_dim[-1], "channels of the last convolution")

    @nn.nowrap
    def _require_multiple(self, number: int, step: int, what: str) -> None:
        if number % step:
            near = max(round(number / step), 1) * step
            raise ValueError(f"{number} {what} are not a multiple of {step}; the nearest is {near}")

    @nn.compact
    def __call__(self, x: Array, *, train: bool = False) -> list[Array]:
        """Maps images `[B, H, W, C]` to the stem's map, the map of every stage and that of the last convolution."""
        width = self.embed_dim[0]
        for i, (kernel_size, stride, groups) in enumerate(((3, 2, 1), (3, 2, width), (1, 1, 1))):
            stem = MobileOne(width, kernel_size, stride, groups, self.fused, "gelu", name=f"stem_{i}")
            x = stem(x, train=train)
        features = [x]
        rates = iter(drop_path_rates(self.drop_path, sum(self.depths)))
        for i, (channels, depth, mixer) in enumerate(zip(self.embed_dim, self.depths, self.mixers, strict=True)):
            stage = Stage(
                channels,
                i > 0,
                mixer,
                self.mlp_ratio,
                [next(rates) for _ in range(depth)],
                self.init_values,
                self.fused,
                name=f"stages_{i}",
            )
            features.append(stage(features[-1], train=train))
        if self.head_width:
            last = functools.partial(MobileOne, squeeze=True, activation="gelu", name="final_conv")
            features.append(last(self.head_width, 3, 1, self.embed_dim[-1], self.fused)(features[-1], train=train))
        return features

    @nn.nowrap
    def fuse(self, params: Tree, batch_stats: Tree) -> tuple["FastViT", Tree, Tree]:
        """Returns the backbone for inference, its parameters and its running statistics."""
        return self.clone(fused=True), *_fuse(params, batch_stats)


def _fuse(params: Tree, stats: Tree) -> tuple[Tree, Tree]:
    """Replaces the branches of a module, or of those inside of it, by one convolution."""
    if "kernel" in params or "scale" in params or "gamma" in params:
        return params, stats
    if "pos_enc" in params:
        return {"reparam_conv": _sum(params["pos_enc"], identity=True)}, {}
    if "large_conv" in params:
        branches = [_fold(params[name], stats[name]) for name in ("large_conv", "small_conv")]
        return {"reparam_conv": _sum(*branches)}, {}
    if "mixer" in params:
        return {"reparam_conv": _fuse_mixer(params, stats)}, {}
    if "conv_kxk_0" in params:
        others = {key: value for key, value in params.items() if key == "se"}
        return {"reparam_conv": _fuse_mobile_one(params, stats), **others}, {}
    fused = {key: _fuse(value, stats.get(key, {})) for key, value in params.items()}
    return {key: leaves for key, (leaves, _) in fused.items()}, {key: rest for key, (_, rest) in fused.items() if rest}


def _factor(norm: Tree, stats: Tree) -> tuple[Array, Array]:
    """Returns factor and summand of a batch norm with stored statistics."""
    return fold_batch_norm(stats["mean"], stats["var"], norm["scale"], norm["bias"], EPSILON)


def _fold(params: Tree, stats: Tree) -> dict[str, Array]:
    """Returns the convolution that a `ConvNormAct` without activation is."""
    factor, summand = _factor(params["bn"], stats["bn"])
    return {"kernel": params["conv"]["kernel"] * factor[None, None, None], "bias": summand}


def _centre(kernel: Array, factor: Array) -> Array:
    """Returns a kernel of the same shape that multiplies every channel by a factor."""
    size, inputs = kernel.shape[0], kernel.shape[2]
    values = factor[None] if inputs == 1 else jnp.diag(factor)
    return jnp.zeros_like(kernel).at[size // 2, size // 2].set(values)


def _sum(largest: Tree, *others: Tree, identity: bool = False) -> dict[str, Array]:
    """Adds convolutions of one stride, and the input itself if asked; the first has the largest kernel."""
    kernel, bias = largest["kernel"], largest["bias"]
    for other in others:
        margin = (kernel.shape[0] - other["kernel"].shape[0]) // 2
        kernel = kernel + jnp.pad(other["kernel"], ((margin, margin), (margin, margin), (0, 0), (0, 0)))
        bias = bias + other["bias"]
    return {"kernel": kernel + _centre(kernel, jnp.ones_like(bias)) if identity else kernel, "bias": bias}


def _fuse_mobile_one(params: Tree, stats: Tree) -> dict[str, Array]:
    conv = _sum(*(_fold(params[name], stats[name]) for name in ("conv_kxk_0", "conv_scale") if name in params))
    if "identity" in params:
        factor, summand = _factor(params["identity"], stats["identity"])
        conv = {"kernel": conv["kernel"] + _centre(conv["kernel"], factor), "bias": conv["bias"] + summand}
    return conv


def _fuse_mixer(params: Tree, stats: Tree) -> dict[str, Array]:
    conv = _fuse_mobile_one(params["mixer"], stats["mixer"])
    factor, summand = _factor(params["norm"]["identity"], stats["norm"]["identity"])
    gamma = params["layer_scale"]["gamma"].reshape(-1)
    kernel = (conv["kernel"] - _centre(conv["kernel"], factor)) * gamma[None, None, None]
    return _sum({"kernel": kernel, "bias": (conv["bias"] - summand) * gamma}, identity=True)


class FastViTSA(FastViT):
    """The form with attention in the last stage; the authors number its modules otherwise."""

    mixers: Sequence[str] = ("repmixer", "repmixer", "repmixer", "attention")


CLASSIFIER = {"norm": "none", "init_scheme": "trunc_normal"}
_36 = {"depths": (6, 6, 18, 6), "init_values": 1e-6}
VARIANTS = {
    "fastvit_t8": Variant(
        FastViT,
        CLASSIFIER,
        {"embed_dim": (48, 96, 192, 384), "depths": (2, 2, 4, 2), "mlp_ratio": 3.0, "head_width": 768},
    ),
    "fastvit_t12": Variant(FastViT, CLASSIFIER, {"mlp_ratio": 3.0}),
    "fastvit_s12": Variant(FastViT, CLASSIFIER, {}),
    "fastvit_sa12": Variant(FastViTSA, CLASSIFIER, {}),
    "fastvit_sa24": Variant(FastViTSA, CLASSIFIER, {"depths": (4, 4, 12, 4)}),
    "fastvit_sa36": Variant(FastViTSA, CLASSIFIER, _36),
    "fastvit_ma36": Variant(
        FastViTSA,
        CLASSIFIER,
        _36 | {"embed_dim": (76, 152, 304, 608), "head_width": 1216},
    ),
}
