"""CSWin: attention in vertical and horizontal stripes that widen from stage to stage.

Dong et al. 2022, "CSWin Transformer: A General Vision Transformer Backbone with Cross-Shaped Windows". Names and
parameters are those of the authors' code.
"""

import itertools
from collections.abc import Callable, Sequence

from flax import linen as nn

from maxmap.backbones import Variant
from maxmap.layers.blocks import CSWinBlock, tapped_blocks
from maxmap.layers.primitives import ACTIVATIONS, Conv, LayerNorm, drop_path_rates, pair, require_divisor
from maxmap.operations import Array
from maxmap.ranges import Count, CountOrZero, DropRate, Pixels


class Merge(nn.Module):
    """Halves a map by a strided convolution, then a norm.

    Attributes:
      channels: output channels.
    """

    channels: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        return LayerNorm(1e-5, name="norm")(Conv(self.channels, 3, stride=2, padding=1, name="conv")(x))


class CSWin(nn.Module):
    """CSWin's backbone.

    Attributes:
      image_size: height and width, or one number for both, that the stripes are made for. Another size works if the
        stripes divide every stage's map.
      embed_dim: channels of the stages.
      depths: blocks of the stages.
      heads: of the attention, by stage.
      split_size: width of the stripes in pixels, by stage, without the last; None for a 32nd of the image's side. The
        last stage attends over its whole map, and so does a stage whose map is as small as its stripes.
      drop_path: stochastic depth, rising linearly over all blocks from 0 to this rate.
      deep_stem: three 3x3 convolutions in place of one 7x7 convolution.
      pad: takes images whose maps the stripes do not divide, too. Their maps are padded for the attention, which leaves
        the padding out; nothing else sees it.
      taps: number of maps from inside of the third stage that are returned before the stage's own.
    """

    image_size: Pixels | tuple[Pixels, Pixels] = 224
    embed_dim: Sequence[Count] = (64, 128, 256, 512)
    depths: Sequence[Count] = (1, 2, 21, 1)
    heads: Sequence[Count] = (2, 4, 8, 16)
    split_size: Sequence[Count | None] = (1, 2, None)
    drop_path: DropRate = 0.0
    deep_stem: bool = False
    taps: CountOrZero = 0
    pad: bool = False

    @nn.nowrap
    def validate(self) -> None:
        """Raises ValueError, one sentence, if the fields do not fit each other."""
        if len({len(self.embed_dim), len(self.depths), len(self.heads), len(self.split_size) + 1}) != 1:
            raise ValueError("embed_dim, depths and heads need one entry for each stage, split_size one less")
        for stage, (channels, heads) in enumerate(zip(self.embed_dim, self.heads, strict=True)):
            directions = 1 if stage == len(self.depths) - 1 else 2  # vertical and horizontal stripes share the heads
            require_divisor(heads, "heads", channels, f"channels of stage {stage}", step=directions)
        tapped_blocks(self.depths, self.taps)
        for axis, pixels in zip(("height", "width"), pair(self.image_size), strict=True):
            self._check_side(axis, pixels, self._stripes)

    @nn.nowrap
    def num_features(self) -> int:
        """Feature maps that a call returns."""
        return 1 + len(self.depths) + self.taps

    @nn.nowrap
    def _stripes(self, pixels: int) -> list[int]:
        """Width of the stripes of all stages but the last, along an image side of `pixels`."""
        side = -(-pixels // 32) if self.pad else max(pixels // 32, 1)
        return [stripe or side for stripe in self.split_size]

    @nn.nowrap
    def _maps(self, pixels: int) -> list[int]:
        """Side of the maps of all stages, along an image side of `pixels`."""
        n = -(-pixels // 4) if self.deep_stem else (pixels + 1) // 4
        return [-(-n // 2**stage) for stage in range(len(self.depths))]

    @nn.nowrap
    def _check_side(self, axis: str, pixels: int, stripes: Callable[[int], list[int]]) -> None:
        """Raises ValueError unless the stripes along an image side divide every stage's map."""

        def misfit(pixels: int) -> tuple[int, int, int] | None:
            for stage, (n, stripe) in enumerate(zip(self._maps(pixels), stripes(pixels), strict=False)):
                if n == 0 or (n % stripe and not self.pad):
                    return stage, n, stripe
            return None

        fault = misfit(pixels)
        if fault:
            stage, n, stripe = fault
            sizes = (p for step in itertools.count() for p in (pixels - step, pixels + step))
            near = next(p for p in sizes if p >= 32 and p % 4 == 0 and not misfit(p))
            raise ValueError(
                f"image {axis} {pixels} gives a map of {n} pixels in stage {stage}, which stripes of {stripe} do not "
                f"divide; the nearest size that works is {near}; set pad for any size"
            )

    @nn.compact
    def __call__(self, x: Array, *, train: bool = False) -> list[Array]:
        """Maps images `[B, H, W, C]` to the stem's map, the tapped maps and the map of every stage, in order."""
        stripes = [self._stripes(side) for side in pair(self.image_size)]
        for axis, pixels, fixed in zip(("height", "width"), x.shape[1:3], stripes, strict=True):
            self._check_side(axis, pixels, lambda _, fixed=fixed: fixed)
        x = self._stem(x)
        features = [x]
        rates = iter(drop_path_rates(self.drop_path, sum(self.depths)))
        last = len(self.depths) - 1
        for stage, depth in enumerate(self.depths):
            if stage:
                x = Merge(self.embed_dim[stage], name=f"merge{stage}")(x)
            stripe = None if stage == last else (stripes[0][stage], stripes[1][stage])
            if stripe == tuple(self._maps(side)[stage] for side in pair(self.image_size)):
                stripe = None
            taps = tapped_blocks(self.depths, self.taps) if stage == 2 else ()
            for i in range(depth):
                block = CSWinBlock(self.heads[stage], stripe, drop_path=next(rates), name=f"stage{stage + 1}_{i}")
                x = block(x, train=train)
                if i + 1 in taps:
                    features.append(x)
            features.append(x)
        return features

    @nn.nowrap
    def _stem(self, x: Array) -> Array:
        """Reduces images to a quarter of their size; the numbers in the names are those of the reference's layers."""
        channels = self.embed_dim[0]
        if not self.deep_stem:
            x = Conv(channels, 7, stride=4, padding=2, name="stage1_conv_embed_0")(x)
            return LayerNorm(1e-5, name="stage1_conv_embed_2")(x)
        for index, stride in ((0, 2), (5, 1), (10, 2)):
            x = ACTIVATIONS["gelu"](x) if index else x
            x = Conv(channels, 3, stride=stride, padding=1, bias=False, name=f"stage1_conv_embed_{index}")(x)
            x = LayerNorm(1e-5, name=f"stage1_conv_embed_{index + 2}")(x)
        return x


_SMALL = {"depths": (2, 4, 32, 2)}
_BASE = _SMALL | {"embed_dim": (96, 192, 384, 768), "heads": (4, 8, 16, 32)}
_LARGE = _SMALL | {"embed_dim": (144, 288, 576, 1152), "heads": (6, 12, 24, 24)}

CLASSIFIER = {"norm": "before", "epsilon": 1e-5, "init_scheme": "trunc_normal"}
VARIANTS = {
    "CSWin_64_12211_tiny_224": Variant(CSWin, CLASSIFIER, {}),
    "CSWin_64_24322_small_224": Variant(CSWin, CLASSIFIER, _SMALL),
    "CSWin_96_24322_base_224": Variant(CSWin, CLASSIFIER, _BASE),
    "CSWin_144_24322_large_224": Variant(CSWin, CLASSIFIER, _LARGE),
    "CSWin_96_24322_base_384": Variant(CSWin, CLASSIFIER, {"image_size": 384, **_BASE}),
    "CSWin_144_24322_large_384": Variant(CSWin, CLASSIFIER, {"image_size": 384, **_LARGE}),
}
