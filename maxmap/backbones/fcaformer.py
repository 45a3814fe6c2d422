"""FcaFormer: attention of a block over its own tokens and over those that the blocks before it merged.

Zhang et al. 2023, "FcaFormer: Forward Cross Attention in Hybrid Vision Transformer" (arXiv:2211.07198). The authors'
code has no licence, so this follows the paper alone, and there is nothing to compare it with: no published weights fit
it. What the paper does not say, or what we could not read of it, is our choice. docs/references.md lists these choices.
"""

import functools
from collections.abc import Sequence

import jax.numpy as jnp
from einops import rearrange
from flax import linen as nn

from maxmap.backbones import Variant
from maxmap.layers.blocks import ConvNeXtBlock, Mlp
from maxmap.layers.parameters import parameter
from maxmap.layers.primitives import (
    TRUNC_NORMAL,
    Block,
    Conv,
    DropPath,
    LayerNorm,
    Linear,
    drop_path_rates,
    pair,
    require_divisor,
    require_one_of,
    require_pixels,
)
from maxmap.operations import Array, attention
from maxmap.ranges import Count, DropRate, NonNegative, Pixels, Positive

BLOCKS = ("conv", "attention")
EPSILON = 1e-6  # of all norms, ConvNeXt's

norm = functools.partial(LayerNorm, EPSILON)


class CrossAttention(nn.Module):
    """Multi-head attention of a map's tokens over themselves and over cross tokens.

    Attributes:
      heads: number of them; they divide the channels.
    """

    heads: int

    @nn.compact
    def __call__(self, x: Array, cross: Sequence[Array]) -> Array:
        """Maps `[B, H, W, C]` to `[B, H, W, C]`; `cross` are maps `[B, h, w, C]`, one of each block before this one."""
        height, width, channels = x.shape[1:]
        tokens = [rearrange(tokens, "b h w c -> b (h w) c") for tokens in (x, *cross)]
        if cross:
            scales = parameter(self, "cross_scale", nn.initializers.ones, (len(cross), channels))
            scaled = zip(tokens[1:], scales.astype(x.dtype), strict=True)
            tokens[1:] = [merged * scale[None, None] for merged, scale in scaled]
        q = Linear(channels, name="q", **TRUNC_NORMAL)(tokens[0])
        kv = Linear(2 * channels, name="kv", **TRUNC_NORMAL)(jnp.concatenate(tokens, axis=1))
        q = rearrange(q, "b n (h d) -> b h n d", h=self.heads)
        k, v = rearrange(kv, "b n (two h d) -> two b h n d", two=2, h=self.heads)
        y = rearrange(attention(q * q.shape[-1] ** -0.5, k, v), "b h (i j) d -> b i j (h d)", i=height, j=width)
        return Linear(channels, name="proj", **TRUNC_NORMAL)(y)


class CrossAttentionBlock(Block):
    """Attention over own and cross tokens, token merge and enhancement, and an MLP (figure 1 of the paper).

    Attributes:
      heads: of the attention.
      mlp_ratio: hidden channels of the MLP divided by the map's.
      merge_kernel: size of the depthwise convolution that merges tokens; None if no later block reads them.
      merge_stride: its stride.
      drop_path: rate of dropping each residual branch.
    """

    heads: int
    mlp_ratio: float
    merge_kernel: int | None
    merge_stride: int
    drop_path: float

    @nn.compact
    def __call__(self, x: Array, cross: Sequence[Array], *, train: bool) -> tuple[list[Array], Array]:
        """Maps `[B, H, W, C]` and `cross` to the next block's `cross`, with this block's tokens, and to the output."""
        channels = x.shape[-1]
        y = CrossAttention(self.heads, name="attn")(norm(name="norm1")(x), cross)
        x = x + DropPath(self.drop_path)(y, train=train)
        y = norm(name="norm2")(x)
        depthwise = functools.partial(Conv, channels, groups=channels, **TRUNC_NORMAL)
        if self.merge_kernel is not None:
            size = self.merge_kernel
            merge = depthwise(size, stride=self.merge_stride, padding=size // 2, name="merge")
            cross = [*cross, merge(y)]
        y = depthwise(3, padding=1, name="enhance")(y)
        y = Mlp(int(self.mlp_ratio * channels), channels, inits=TRUNC_NORMAL, name="mlp")(y, train=train)
        return list(cross), x + DropPath(self.drop_path)(y, train=train)


class FcaFormerStage(nn.Module):
    """Blocks of one kind, after a norm and a strided convolution in all stages but the first.

    Attributes:
      channels: output channels.
      downsample: halves the map at the start.
      heads: of the attention; None for ConvNeXt's blocks.
      drop_path: rates of the blocks.
      init_values: initial layer scale of ConvNeXt's blocks.
      mlp_ratio: of the attention blocks.
      merge_kernel: size of the convolutions that merge tokens.
      merge_stride: their stride.
    """

    channels: int
    downsample: bool
    heads: int | None
    drop_path: Sequence[float]
    init_values: float
    mlp_ratio: float
    merge_kernel: int
    merge_stride: int

    @nn.compact
    def __call__(self, x: Array, *, train: bool) -> Array:
        if self.downsample:
            x = norm(name="downsample_0")(x)
            x = Conv(self.channels, 2, stride=2, name="downsample_1", **TRUNC_NORMAL)(x)
        cross: list[Array] = []
        for i, rate in enumerate(self.drop_path):
            if self.heads is None:
                x = ConvNeXtBlock(rate, self.init_values, name=f"blocks_{i}")(x, train=train)
                continue
            kernel = self.merge_kernel if i + 1 < len(self.drop_path) else None
            block = CrossAttentionBlock(self.heads, self.mlp_ratio, kernel, self.merge_stride, rate, name=f"blocks_{i}")
            cross, x = block(x, cross, train=train)
        return x


class FcaFormer(nn.Module):
    """FcaFormer's hybrid backbone: stages of ConvNeXt's blocks, then stages of blocks with forward cross attention.

    Attributes:
      image_size: height and width, or one number for both; other sizes work too.
      embed_dim: channels of the stages.
      depths: blocks of the stages.
      blocks: of each stage, "conv" for ConvNeXt's or "attention".
      head_dim: channels of an attention head.
      mlp_ratio: hidden channels of the attention blocks' MLPs divided by the map's.
      merge_kernel: size of the depthwise convolutions that merge tokens into cross tokens, an odd number.
      merge_stride: their stride.
      drop_path: stochastic depth, rising linearly over all blocks from 0 to this rate.
      init_values: initial layer scale of ConvNeXt's blocks.
    """

    image_size: Pixels | tuple[Pixels, Pixels] = 224
    embed_dim: Sequence[Count] = (96, 192, 320, 480)
    depths: Sequence[Count] = (2, 2, 7, 2)
    blocks: Sequence[str] = ("conv", "conv", "attention", "attention")
    head_dim: Count = 32
    mlp_ratio: Positive = 4.0
    merge_kernel: Count = 5
    merge_stride: Count = 2
    drop_path: DropRate = 0.0
    init_values: NonNegative = 1e-6

    @nn.nowrap
    def num_features(self) -> int:
        """Feature maps that a call returns."""
        return 1 + len(self.depths)

    @nn.nowrap
    def validate(self) -> None:
        """Raises ValueError, one sentence, if the fields do not fit each other."""
        if not len(self.embed_dim) == len(self.depths) == len(self.blocks):
            raise ValueError("embed_dim, depths and blocks need one entry for each stage")
        for stage, (channels, kind) in enumerate(zip(self.embed_dim, self.blocks, strict=True)):
            require_one_of(kind, "blocks", BLOCKS)
            if kind == "attention":
                require_divisor(self.head_dim, "channels of a head", channels, f"channels of stage {stage}")
        if self.merge_kernel % 2 == 0:
            raise ValueError(
                f"merge_kernel {self.merge_kernel} is not an odd number; the next is {self.merge_kernel + 1}"
            )
        require_pixels(pair(self.image_size), len(self.depths))

    @nn.compact
    def __call__(self, x: Array, *, train: bool = False) -> list[Array]:
        """Maps images `[B, H, W, C]` to the stem's map and the map of every stage."""
        require_pixels(x.shape[1:3], len(self.depths))
        x = Conv(self.embed_dim[0], 4, stride=4, name="stem_0", **TRUNC_NORMAL)(x)
        features = [norm(name="stem_1")(x)]
        rates = iter(drop_path_rates(self.drop_path, sum(self.depths)))
        for i, (channels, depth, kind) in enumerate(zip(self.embed_dim, self.depths, self.blocks, strict=True)):
            stage = FcaFormerStage(
                channels,
                downsample=i > 0,
                heads=channels // self.head_dim if kind == "attention" else None,
                drop_path=[next(rates) for _ in range(depth)],
                init_values=self.init_values,
                mlp_ratio=self.mlp_ratio,
                merge_kernel=self.merge_kernel,
                merge_stride=self.merge_stride,
                name=f"stages_{i}",
            )
            features.append(stage(features[-1], train=train))
        return features


CLASSIFIER = {"norm": "after", "init_scheme": "trunc_normal"}
VARIANTS = {
    "fcaformer_l1": Variant(FcaFormer, CLASSIFIER, {"embed_dim": (64, 128, 192, 320), "depths": (2, 2, 6, 2)}),
    "fcaformer_l2": Variant(FcaFormer, CLASSIFIER, {}),
    "fcaformer_l3": Variant(FcaFormer, CLASSIFIER, {"depths": (2, 2, 14, 3)}),
    "fcaformer_l4": Variant(FcaFormer, CLASSIFIER, {"embed_dim": (128, 256, 480, 768), "depths": (3, 3, 14, 3)}),
}
