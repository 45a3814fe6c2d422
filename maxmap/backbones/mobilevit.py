"""MobileViT: inverted residuals, and transformers over the pixels at one place of all patches.

v1: Mehta and Rastegari 2022, "MobileViT: Light-weight, General-purpose, and Mobile-friendly Vision Transformer"
(arXiv:2110.02178). v2: the same authors 2022, "Separable Self-attention for Mobile Vision Transformers"
(arXiv:2206.02680). Names and parameters are those of timm 1.0.31. Where 2x2 patches do not divide a map, it is resized:
v1 aligns the edges and resizes back, v2 aligns the centres of the corner pixels and does not.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from einops import rearrange
from flax import linen as nn

from maxmap.backbones import Variant
from maxmap.layers.blocks import ConvNormAct, Mlp, ViTBlock
from maxmap.layers.pooling import bilinear
from maxmap.layers.primitives import (
    Block,
    Conv,
    DropPath,
    LayerNorm,
    drop_path_rates,
    he_fan_out,
    map_norm,
    require_divisor,
    round_to_eight,
)
from maxmap.operations import Array, attend
from maxmap.ranges import Count, CountOrZero, DropRate, Pixels, Positive

PATCH = 2  # side of the patches
EPSILON = 1e-5  # of all norms
MLP_RATIO = 2.0
HE = {"kernel_init": he_fan_out(), "bias_init": nn.initializers.zeros}
NORMAL = {"kernel_init": nn.initializers.normal(0.01), "bias_init": nn.initializers.zeros}


def _conv_norm_act(
    channels: int, kernel_size: int = 1, groups: int = 1, activation: str | None = "silu", **fields: Any
) -> ConvNormAct:
    """Returns a convolution with He's initialisation, its norm and its activation."""
    inits = {"kernel_init": he_fan_out(groups)}
    return ConvNormAct(channels, kernel_size, groups=groups, activation=activation, inits=inits, **fields)


class InvertedResidual(Block):
    """1x1, depthwise 3x3 and 1x1 convolution, with a residual path where the map keeps its shape (MobileNetV2's block).

    The scale of the last norm of a residual branch starts at zero.

    Attributes:
      channels: output channels.
      expand: inner channels divided by the input's.
      stride: of the depthwise convolution.
      drop_path: rate of dropping the residual branch.
    """

    channels: int
    expand: float
    stride: int
    drop_path: float

    @nn.compact
    def __call__(self, x: Array, *, train: bool) -> Array:
        hidden = round_to_eight(self.expand * x.shape[-1])
        residual = self.stride == 1 and x.shape[-1] == self.channels
        scale_init = nn.initializers.zeros if residual else nn.initializers.ones
        y = _conv_norm_act(hidden, name="conv1_1x1")(x, train=train)
        y = _conv_norm_act(hidden, 3, hidden, stride=self.stride, name="conv2_kxk")(y, train=train)
        last = _conv_norm_act(self.channels, activation=None, scale_init=scale_init, name="conv3_1x1")
        y = last(y, train=train)
        return x + DropPath(self.drop_path)(y, train=train) if residual else y


def _whole_patches(x: Array) -> tuple[int, int]:
    """Returns the size of a map, rounded up to whole patches."""
    return -(-x.shape[1] // PATCH) * PATCH, -(-x.shape[2] // PATCH) * PATCH


class FusionBlock(Block):
    """MobileViT v1's block: a local convolution, transformers over the patches, and a fusion with the input.

    Attributes:
      dim: channels of the transformers.
      depth: number of transformer blocks.
      heads: of the attention.
      drop_path: rate of dropping each residual branch of the transformers.
    """

    dim: int
    depth: int
    heads: int
    drop_path: float

    @nn.compact
    def __call__(self, x: Array, *, train: bool) -> Array:
        channels, size = x.shape[-1], x.shape[1:3]
        y = _conv_norm_act(channels, 3, name="conv_kxk")(x, train=train)
        y = Conv(self.dim, bias=False, name="conv_1x1", **HE)(y)
        whole = _whole_patches(y)
        y = y if size == whole else bilinear(y, whole)
        y = rearrange(y, "b (h i) (w j) c -> (b i j) (h w) c", i=PATCH, j=PATCH)
        for i in range(self.depth):
            block = ViTBlock(
                self.heads,
                MLP_RATIO,
                self.drop_path,
                NORMAL,
                activation="silu",
                epsilon=EPSILON,
                name=f"transformer_{i}",
            )
            y = block(y, train=train)
        y = LayerNorm(EPSILON, name="norm")(y)
        y = rearrange(y, "(b i j) (h w) c -> b (h i) (w j) c", i=PATCH, j=PATCH, h=whole[0] // PATCH)
        y = y if size == whole else bilinear(y, size)
        y = _conv_norm_act(channels, name="conv_proj")(y, train=train)
        return _conv_norm_act(channels, 3, name="conv_fusion")(jnp.concatenate([x, y], axis=-1), train=train)


class SeparableAttention(nn.Module):
    """One context for all tokens, the mean of the keys with learned weights, multiplies the values."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Maps `[B, P, N, C]` to `[B, P, N, C]`; the N tokens of each of P pixels attend to each other."""
        channels = x.shape[-1]
        qkv = Conv(1 + 2 * channels, name="qkv_proj", **HE)(x)
        query, key, value = jnp.split(qkv, [1, 1 + channels], axis=-1)
        context = attend(rearrange(query, "b p n 1 -> b p 1 n"), key)  # [B, P, 1, C]
        return Conv(channels, name="out_proj", **HE)(nn.relu(value) * context)


class SeparableTransformer(Block):
    """Separable attention and an MLP, each behind a norm over the whole map and with a residual.

    Attributes:
      drop_path: rate of dropping each residual branch.
    """

    drop_path: float

    @nn.compact
    def __call__(self, x: Array, *, train: bool) -> Array:
        """Maps `[B, P, N, C]` to `[B, P, N, C]`."""
        channels = x.shape[-1]
        mlp = Mlp(int(MLP_RATIO * channels), channels, "silu", HE, layer=Conv, name="mlp")
        y = SeparableAttention(name="attn")(map_norm(EPSILON, name="norm1")(x))
        x = x + DropPath(self.drop_path)(y, train=train)
        y = mlp(map_norm(EPSILON, name="norm2")(x), train=train)
        return x + DropPath(self.drop_path)(y, train=train)


class SeparableBlock(Block):
    """MobileViT v2's block: a depthwise convolution, and transformers with separable attention over the patches.

    Attributes:
      dim: channels of the transformers.
      depth: number of transformer blocks.
      drop_path: rate of dropping each residual branch of the transformers.
    """

    dim: int
    depth: int
    drop_path: float

    @nn.compact
    def __call__(self, x: Array, *, train: bool) -> Array:
        channels, size = x.shape[-1], _whole_patches(x)
        x = x if size == x.shape[1:3] else bilinear(x, size, align_corners=True)
        x = _conv_norm_act(channels, 3, channels, name="conv_kxk")(x, train=train)
        x = Conv(self.dim, bias=False, name="conv_1x1", **HE)(x)
        x = rearrange(x, "b (h i) (w j) c -> b (i j) (h w) c", i=PATCH, j=PATCH)
        for i in range(self.depth):
            x = SeparableTransformer(self.drop_path, name=f"transformer_{i}")(x, train=train)
        x = map_norm(EPSILON, name="norm")(x)
        x = rearrange(x, "b (i j) (h w) c -> b (h i) (w j) c", i=PATCH, h=size[0] // PATCH)
        return _conv_norm_act(channels, activation=None, name="conv_proj")(x, train=train)


class MobileViT(nn.Module):
    """The backbone: a stem with stride 2, then stages, of which all but the first halve the map.

    Attributes:
      image_size: height and width, or one number for both; any other size works too.
      stem_width: channels of the stem.
      embed_dim: channels of the stages.
      depths: inverted residuals of the stages.
      expand: inner channels of the inverted residuals divided by their input's.
      separable: the transformers are v2's; otherwise v1's.
      transformer_depths: transformer blocks behind the inverted residuals of the stages; 0 for none.
      transformer_dim: their channels, for each stage, of which those without transformers are not read.
      heads: of v1's attention.
      head_width: channels of a 1x1 convolution behind the stages, whose map is returned too; 0 for none.
      drop_path: stochastic depth, rising linearly over all blocks of the stages from 0 to this rate. All transformers
        between two convolutions have one rate.
    """

    image_size: Pixels | tuple[Pixels, Pixels] = 256
    stem_width: Count = 16
    embed_dim: Sequence[Count] = (32, 64, 96, 128, 160)
    depths: Sequence[Count] = (1, 3, 1, 1, 1)
    expand: Positive = 4.0
    separable: bool = False
    transformer_depths: Sequence[CountOrZero] = (0, 0, 2, 4, 3)
    transformer_dim: Sequence[CountOrZero] = (0, 0, 144, 192, 240)
    heads: Count = 4
    head_width: CountOrZero = 640
    drop_path: DropRate = 0.0

    @nn.nowrap
    def num_features(self) -> int:
        """Feature maps that a call returns."""
        return 1 + len(self.depths) + bool(self.head_width)

    @nn.nowrap
    def validate(self) -> None:
        """Raises ValueError, one sentence, if the fields do not fit each other."""
        lengths = {len(field) for field in (self.embed_dim, self.depths, self.transformer_depths, self.transformer_dim)}
        if len(lengths) > 1:
            raise ValueError("embed_dim, depths, transformer_depths and transformer_dim need one entry for each stage")
        for stage, (depth, dim) in enumerate(zip(self.transformer_depths, self.transformer_dim, strict=True)):
            if depth and not dim:
                raise ValueError(f"stage {stage} has transformers, so transformer_dim cannot be 0 there")
            if depth and not self.separable:
                require_divisor(self.heads, "heads", dim, f"transformer channels of stage {stage}")

    @nn.compact
    def __call__(self, x: Array, *, train: bool = False) -> list[Array]:
        """Maps images `[B, H, W, C]` to the stem's map, the map of every stage and that of the last convolution."""
        x = _conv_norm_act(self.stem_width, 3, stride=2, name="stem")(x, train=train)
        features = [x]
        blocks = sum(self.depths) + sum(map(bool, self.transformer_depths))
        rates = iter(drop_path_rates(self.drop_path, blocks))
        stages = zip(self.embed_dim, self.depths, self.transformer_depths, self.transformer_dim, strict=True)
        for stage, (channels, depth, transformers, dim) in enumerate(stages):
            for i in range(depth):
                stride = 2 if stage and i == 0 else 1
                block = InvertedResidual(channels, self.expand, stride, next(rates), name=f"stages_{stage}_{i}")
                x = block(x, train=train)
            if transformers:
                kind = SeparableBlock if self.separable else functools.partial(FusionBlock, heads=self.heads)
                block = kind(dim=dim, depth=transformers, drop_path=next(rates), name=f"stages_{stage}_{depth}")
                x = block(x, train=train)
            features.append(x)
        if self.head_width:
            features.append(_conv_norm_act(self.head_width, name="final_conv")(x, train=train))
        return features


class MobileViTV2(MobileViT):
    """The form with separable attention; the authors name its modules otherwise."""

    stem_width: Count = 32
    embed_dim: Sequence[Count] = (64, 128, 256, 384, 512)
    depths: Sequence[Count] = (1, 2, 1, 1, 1)
    expand: Positive = 2.0
    separable: bool = True
    transformer_dim: Sequence[CountOrZero] = (0, 0, 128, 192, 256)
    head_width: CountOrZero = 0


def _v2(width: float) -> Variant:
    """Returns v2 with all channels of the network multiplied."""
    embed_dim = tuple(int(width * channels) for channels in MobileViTV2.embed_dim)
    fields = {
        "stem_width": int(width * MobileViTV2.stem_width),
        "embed_dim": embed_dim,
        "transformer_dim": (0, 0, *(round_to_eight(channels / 2) for channels in embed_dim[2:])),
    }
    return Variant(MobileViTV2, CLASSIFIER, fields)


CLASSIFIER = {"norm": "none", "init_scheme": "normal"}
VARIANTS = {
    "mobilevit_xxs": Variant(
        MobileViT,
        CLASSIFIER,
        {
            "embed_dim": (16, 24, 48, 64, 80),
            "expand": 2.0,
            "transformer_dim": (0, 0, 64, 80, 96),
            "head_width": 320,
        },
    ),
    "mobilevit_xs": Variant(
        MobileViT,
        CLASSIFIER,
        {"embed_dim": (32, 48, 64, 80, 96), "transformer_dim": (0, 0, 96, 120, 144), "head_width": 384},
    ),
    "mobilevit_s": Variant(MobileViT, CLASSIFIER, {}),
    **{f"mobilevitv2_{round(100 * width):03}": _v2(width) for width in (0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0)},
}
