"""PiT: a vision transformer that pools its tokens between stages (Heo et al. 2021).

Names and parameters are those of timm's `pit_s_224`, which has a class token. MAP's `pit_s` is the same network without
a class token. A class token is returned as the last feature, a map of one pixel, as in ViT.
"""

import functools
from collections.abc import Callable, Sequence

import jax.numpy as jnp
from einops import rearrange
from flax import linen as nn

from maxmap.backbones import Variant
from maxmap.layers.blocks import PatchEmbed, ViTBlock
from maxmap.layers.parameters import parameter
from maxmap.layers.primitives import (
    Conv,
    Linear,
    drop_path_rates,
    pair,
    require_divisor,
    require_image_size,
    trunc_normal_02,
)
from maxmap.operations import Array
from maxmap.ranges import Count, DropRate, Pixels, Positive


class TokenPooling(nn.Module):
    """Halves the map and widens it by a depthwise convolution; widens the class token by a linear map.

    Attributes:
      channels: output channels, a multiple of the input's.
    """

    channels: int

    @nn.compact
    def __call__(self, x: Array, token: Array | None) -> tuple[Array, Array | None]:
        x = Conv(self.channels, 3, stride=2, padding=1, groups=x.shape[-1], name="conv")(x)
        return x, None if token is None else Linear(self.channels, name="fc")(token)


class PiTStage(nn.Module):
    """Transformer blocks on the class token and the pixels, after a pooling in all stages but the first.

    Attributes:
      channels: of the stage.
      pool: begins with the pooling.
      blocks: constructors of the `ViTBlock`s.
    """

    channels: int
    pool: bool
    blocks: Sequence[Callable[..., nn.Module]]

    @nn.compact
    def __call__(self, x: Array, token: Array | None, *, train: bool) -> tuple[Array, Array | None]:
        """Maps `[B, H, W, C]` and the class token `[B, 1, C]`, if there is one, to the same of `channels`."""
        if self.pool:
            x, token = TokenPooling(self.channels, name="pool")(x, token)
        height = x.shape[1]
        x = rearrange(x, "b h w c -> b (h w) c")
        if token is not None:
            x = jnp.concatenate([token, x], axis=1)
        for i, block in enumerate(self.blocks):
            x = block(name=f"blocks_{i}")(x, train=train)
        if token is not None:
            token, x = x[:, :1], x[:, 1:]
        return rearrange(x, "b (h w) c -> b h w c", h=height), token


class PiT(nn.Module):
    """The backbone: overlapping patches, then stages of transformer blocks with a pooling between stages.

    Attributes:
      image_size: pixels that the position table is made for, one number or (height, width).
      patch_size: side of the patches.
      stride: between patches.
      embed_dim: channels of each stage, each a multiple of the one before.
      depths: number of blocks of each stage.
      heads: of the attention of each stage.
      mlp_ratio: hidden channels of the MLPs divided by the stage's channels.
      class_token: puts a learned token before the pixels and returns it as the last feature, a map of one pixel.
      drop_path: stochastic depth, rising linearly over all blocks from 0 to this rate; without a class token it ends
        one step short of this rate, as in MAP's code.
      attn_drop: dropout of the attention probabilities.
      proj_drop: dropout after the attention's projection and both linear maps of the MLPs.
    """

    image_size: Pixels | tuple[Pixels, Pixels] = 224
    patch_size: Count = 16
    stride: Count = 8
    embed_dim: Sequence[Count] = (144, 288, 576)
    depths: Sequence[Count] = (2, 6, 4)
    heads: Sequence[Count] = (3, 6, 12)
    mlp_ratio: Positive = 4.0
    class_token: bool = False
    drop_path: DropRate = 0.0
    attn_drop: DropRate = 0.0
    proj_drop: DropRate = 0.0

    @nn.nowrap
    def validate(self) -> None:
        """Raises ValueError, one sentence, if the fields do not fit each other."""
        if not len(self.embed_dim) == len(self.depths) == len(self.heads):
            raise ValueError("embed_dim, depths and heads need one entry for each stage")
        for channels, heads in zip(self.embed_dim, self.heads, strict=True):
            require_divisor(heads, "heads", channels, "channels")
        for before, channels in zip(self.embed_dim, self.embed_dim[1:], strict=False):
            if channels % before:
                near = max(round(channels / before), 1) * before
                raise ValueError(
                    f"the pooling widens by a whole factor, but {before} channels do not divide {channels}; the "
                    f"nearest that they divide is {near}"
                )
        for axis, pixels in zip(("height", "width"), pair(self.image_size), strict=True):
            if pixels < self.patch_size:
                raise ValueError(
                    f"image {axis} {pixels} is smaller than a patch; the nearest size that works is {self.patch_size}"
                )

    @nn.nowrap
    def num_features(self) -> int:
        """Feature maps that a call returns."""
        return 1 + len(self.depths) + int(self.class_token)

    @nn.compact
    def __call__(self, x: Array, *, train: bool = False) -> list[Array]:
        """Maps images `[B, H, W, C]` to the map of embedded patches, the map of each stage and the class token."""
        require_image_size(x, self.image_size, "the position table is")
        x = PatchEmbed(self.embed_dim[0], self.patch_size, self.stride, "conv", name="patch_embed")(x)
        x = x + parameter(self, "pos_embed", trunc_normal_02, (1, *x.shape[1:])).astype(x.dtype)
        token = None
        if self.class_token:
            token = parameter(self, "cls_token", trunc_normal_02, (1, 1, x.shape[-1])).astype(x.dtype)
            token = jnp.broadcast_to(token, (x.shape[0], *token.shape[1:]))
        features = [x]
        rates = iter(drop_path_rates(self.drop_path, sum(self.depths), endpoint=self.class_token))
        for stage, (channels, depth, heads) in enumerate(zip(self.embed_dim, self.depths, self.heads, strict=True)):
            blocks = [
                functools.partial(
                    ViTBlock,
                    heads,
                    self.mlp_ratio,
                    next(rates),
                    attn_drop=self.attn_drop,
                    proj_drop=self.proj_drop,
                )
                for _ in range(depth)
            ]
            x, token = PiTStage(channels, stage > 0, blocks, name=f"transformers_{stage}")(x, token, train=train)
            features.append(x)
        return features if token is None else [*features, token[:, None]]


VARIANTS = {
    "pit_s_224": Variant(PiT, {"norm": "before"}, {"class_token": True}),
    "pit_s": Variant(PiT, {"norm": "none"}, {}),
}
