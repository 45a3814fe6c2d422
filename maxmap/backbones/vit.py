"""ViT: the plain vision transformer (Dosovitskiy et al. 2021), with timm's names, fields and parameters.

Heads read maps, but timm's classifier reads the class token. So a backbone with a class token returns it as the last
feature, a map of one pixel `[B, 1, 1, C]`. The mean over that map is the token, and the linear head needs no special
case. PiT follows the same convention.
"""

from collections.abc import Sequence

import jax.numpy as jnp
from einops import rearrange
from flax import linen as nn

from maxmap.backbones import Variant
from maxmap.layers.blocks import PatchEmbed, ViTBlock
from maxmap.layers.padding import next_multiple, pad_map
from maxmap.layers.parameters import parameter
from maxmap.layers.primitives import (
    TRUNC_NORMAL,
    drop_path_rates,
    pair,
    require_divisor,
    require_image_size,
    trunc_normal_02,
)
from maxmap.operations import Array
from maxmap.ranges import Count, DropRate, Pixels, Positive


class ViT(nn.Module):
    """The backbone: patch embedding and pre-norm transformer blocks of one width.

    Attributes:
      image_size: pixels that the position table is made for, one number or (height, width).
      patch_size: side of the patches.
      embed_dim: channels.
      depths: blocks of each group; a feature map is returned after each group.
      heads: of the attention.
      mlp_ratio: hidden channels of the MLPs divided by `embed_dim`.
      drop_path: stochastic depth, rising linearly over all blocks from 0 to this rate.
      attn_drop: dropout of the attention probabilities.
      proj_drop: dropout after the attention's projection and both linear maps of the MLPs.
      pad: takes images that patches do not divide, too: zeros fill their last patches.
      class_token: puts a learned token before the patch tokens and returns it as the last feature, a map of one pixel.
    """

    image_size: Pixels | tuple[Pixels, Pixels] = 224
    patch_size: Count = 16
    embed_dim: Count = 384
    depths: Sequence[Count] = (3, 3, 3, 3)
    heads: Count = 6
    mlp_ratio: Positive = 4.0
    drop_path: DropRate = 0.0
    attn_drop: DropRate = 0.0
    proj_drop: DropRate = 0.0
    class_token: bool = True
    pad: bool = False

    @nn.nowrap
    def num_features(self) -> int:
        """Feature maps that a call returns."""
        return 1 + len(self.depths) + int(self.class_token)

    @nn.nowrap
    def validate(self) -> None:
        """Raises ValueError, one sentence, if the fields do not fit each other."""
        require_divisor(self.heads, "heads", self.embed_dim, "channels")
        for axis, pixels in zip(("height", "width"), pair(self.image_size), strict=True):
            if pixels % self.patch_size and not self.pad:
                nearest = max(round(pixels / self.patch_size), 1) * self.patch_size
                raise ValueError(
                    f"image {axis} {pixels} is not a multiple of the patch size {self.patch_size}; the nearest size "
                    f"that works is {nearest}; set pad for any size"
                )

    @nn.compact
    def __call__(self, x: Array, *, train: bool = False) -> list[Array]:
        """Maps images `[B, H, W, C]` to the map of embedded patches, one map per group of blocks, the class token."""
        require_image_size(x, self.image_size, "the position table is")
        x = pad_map(x, next_multiple(x.shape[1:3], pair(self.patch_size)))
        x = PatchEmbed(self.embed_dim, self.patch_size, self.patch_size, "proj", name="patch_embed")(x)
        height = x.shape[1]
        x = rearrange(x, "b h w c -> b (h w) c")
        first = int(self.class_token)  # index of the first patch token
        if self.class_token:
            token = parameter(self, "cls_token", nn.initializers.normal(1e-6), (1, 1, self.embed_dim)).astype(x.dtype)
            x = jnp.concatenate([jnp.broadcast_to(token, (x.shape[0], *token.shape[1:])), x], axis=1)
        x = x + parameter(self, "pos_embed", trunc_normal_02, (1, *x.shape[1:])).astype(x.dtype)

        def patches(x: Array) -> Array:
            return rearrange(x[:, first:], "b (h w) c -> b h w c", h=height)

        features = [patches(x)]
        rates = iter(enumerate(drop_path_rates(self.drop_path, sum(self.depths))))
        for depth in self.depths:
            for _ in range(depth):
                i, rate = next(rates)
                x = ViTBlock(
                    self.heads, self.mlp_ratio, rate, TRUNC_NORMAL, self.attn_drop, self.proj_drop, name=f"blocks_{i}"
                )(x, train=train)
            features.append(patches(x))
        return [*features, x[:, None, :1]] if self.class_token else features


CLASSIFIER = {"norm": "before", "init_scheme": "trunc_normal"}
VARIANTS = {
    "vit_small_patch16_224": Variant(ViT, CLASSIFIER, {"embed_dim": 384, "heads": 6}),
    "vit_base_patch16_224": Variant(ViT, CLASSIFIER, {"embed_dim": 768, "heads": 12}),
}
