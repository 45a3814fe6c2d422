"""ConvNeXt: a convolutional network with the proportions of a hierarchical transformer.

Liu et al. 2022, "A ConvNet for the 2020s". Names and parameters are those of timm 1.0.31; the authors' own names are a
dialect of the converter.
"""

from collections.abc import Sequence

from flax import linen as nn

from maxmap.backbones import Variant
from maxmap.layers.blocks import ConvNeXtBlock, tapped_blocks
from maxmap.layers.primitives import TRUNC_NORMAL, Conv, LayerNorm, drop_path_rates, pair, require_pixels
from maxmap.operations import Array
from maxmap.ranges import Count, CountOrZero, DropRate, NonNegative, Pixels


class ConvNeXtStage(nn.Module):
    """ConvNeXt blocks, after a norm and a strided convolution in all stages but the first.

    Attributes:
      channels: output channels.
      downsample: halves the map at the start.
      drop_path: rates of the blocks.
      init_values: initial layer scale.
      taps: numbers of the blocks whose outputs are returned too; the first block is 1.
    """

    channels: int
    downsample: bool
    drop_path: Sequence[float]
    init_values: float
    taps: Sequence[int] = ()

    @nn.compact
    def __call__(self, x: Array, *, train: bool = False) -> list[Array]:
        """Maps `[B, H, W, C]` to the maps after the tapped blocks and, last, the stage's own."""
        if self.downsample:
            x = LayerNorm(1e-6, name="downsample_0")(x)
            x = Conv(self.channels, 2, stride=2, name="downsample_1", **TRUNC_NORMAL)(x)
        features = []
        for i, rate in enumerate(self.drop_path):
            x = ConvNeXtBlock(rate, self.init_values, name=f"blocks_{i}")(x, train=train)
            if i + 1 in self.taps:
                features.append(x)
        return [*features, x]


class ConvNeXt(nn.Module):
    """ConvNeXt's backbone.

    Attributes:
      image_size: height and width, or one number for both; other sizes work too.
      embed_dim: channels of the stages.
      depths: blocks of the stages.
      drop_path: stochastic depth, rising linearly over all blocks from 0 to this rate.
      drop_path_endpoint: the last block has the full rate. Otherwise the rates end one step short of it, for a head
        whose blocks have the full rate (GA).
      init_values: initial layer scale.
      taps: number of maps from inside of the third stage that are returned before the stage's own.
    """

    image_size: Pixels | tuple[Pixels, Pixels] = 224
    embed_dim: Sequence[Count] = (96, 192, 384, 768)
    depths: Sequence[Count] = (3, 3, 9, 3)
    drop_path: DropRate = 0.0
    drop_path_endpoint: bool = True
    init_values: NonNegative = 1e-6
    taps: CountOrZero = 0

    @nn.nowrap
    def num_features(self) -> int:
        """Feature maps that a call returns."""
        return 1 + len(self.depths) + self.taps

    @nn.nowrap
    def validate(self) -> None:
        """Raises ValueError, one sentence, if the fields do not fit each other."""
        if len(self.embed_dim) != len(self.depths):
            raise ValueError("embed_dim and depths need one entry for each stage")
        tapped_blocks(self.depths, self.taps)
        require_pixels(pair(self.image_size), len(self.depths))

    @nn.compact
    def __call__(self, x: Array, *, train: bool = False) -> list[Array]:
        """Maps images `[B, H, W, C]` to the stem's map, the tapped maps and the map of every stage, in order."""
        require_pixels(x.shape[1:3], len(self.depths))
        x = Conv(self.embed_dim[0], 4, stride=4, name="stem_0", **TRUNC_NORMAL)(x)
        features = [LayerNorm(1e-6, name="stem_1")(x)]
        rates = iter(drop_path_rates(self.drop_path, sum(self.depths), endpoint=self.drop_path_endpoint))
        for i, (channels, depth) in enumerate(zip(self.embed_dim, self.depths, strict=True)):
            stage = ConvNeXtStage(
                channels,
                downsample=i > 0,
                drop_path=[next(rates) for _ in range(depth)],
                init_values=self.init_values,
                taps=tapped_blocks(self.depths, self.taps) if i == 2 else (),
                name=f"stages_{i}",
            )
            features += stage(features[-1], train=train)
        return features


CLASSIFIER = {"norm": "after", "init_scheme": "trunc_normal"}
VARIANTS = {
    "convnext_tiny": Variant(ConvNeXt, CLASSIFIER, {}),
    "convnext_small": Variant(ConvNeXt, CLASSIFIER, {"depths": (3, 3, 27, 3)}),
    "convnext_base": Variant(ConvNeXt, CLASSIFIER, {"depths": (3, 3, 27, 3), "embed_dim": (128, 256, 512, 1024)}),
}
