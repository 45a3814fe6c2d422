"""MobileNetV1 as Lab-LVM/imagenet-models has it.

Howard et al. 2017, "MobileNets" (arXiv:1704.04861). The activation is ReLU: timm's `mobilenetv1_100`, the same network
with ReLU6, is another function.
"""

from collections.abc import Sequence

from flax import linen as nn

from maxmap.backbones import Variant
from maxmap.layers.primitives import BatchNorm, Block, Conv
from maxmap.operations import Array
from maxmap.ranges import Count, DropRate, Pixels


class ConvUnit(Block):
    """Convolutions one after another, each with a norm and ReLU: the stem or a depthwise-separable unit.

    Attributes:
      layers: pairs of convolution and norm. They are submodules of the backbone, because the reference's names have no
        level for the unit.
    """

    layers: Sequence[tuple[nn.Module, nn.Module]]

    def __call__(self, x: Array, *, train: bool) -> Array:
        for conv, norm in self.layers:
            x = nn.relu(norm(conv(x), train=train))
        return x


class MobileNetV1(nn.Module):
    """Depthwise-separable convolutions without shortcuts.

    Attributes:
      image_size: height and width, or one number for both; any other size works too.
      stem_width: channels of the first convolution.
      embed_dim: channels of the stages.
      depths: depthwise-separable units of the stages. The first unit of a stage halves the map, except in the first
        stage, which holds the stem.
      drop_path: 0, there is no residual branch to drop.
    """

    image_size: Pixels | tuple[Pixels, Pixels] = 224
    stem_width: Count = 32
    embed_dim: Sequence[Count] = (64, 128, 256, 512, 1024)
    depths: Sequence[Count] = (1, 2, 2, 6, 2)
    drop_path: DropRate = 0.0

    @nn.nowrap
    def num_features(self) -> int:
        """Feature maps that a call returns."""
        return len(self.depths)

    @nn.nowrap
    def validate(self) -> None:
        """Raises ValueError, one sentence, if the fields do not fit each other."""
        if len(self.embed_dim) != len(self.depths):
            raise ValueError("embed_dim and depths need one entry for each stage")
        if self.drop_path:
            raise ValueError(f"MobileNetV1 has no residual branches, so drop_path can only be 0, not {self.drop_path}")

    @nn.compact
    def __call__(self, x: Array, *, train: bool = False) -> list[Array]:
        """Maps images `[B, H, W, C]` to the maps of the stages; the first has half the size of the images."""

        def layer(name: str, index: int, channels: int, **fields: int) -> tuple[nn.Module, nn.Module]:
            conv = Conv(channels, bias=False, name=f"{name}_{index}", **fields)
            return conv, BatchNorm(name=f"{name}_{index + 1}")

        stem = layer("layers_0_0", 0, self.stem_width, kernel_size=3, stride=2, padding=1)
        x = ConvUnit([stem], name="layers_0_0")(x, train=train)
        features = []
        for stage, (channels, depth) in enumerate(zip(self.embed_dim, self.depths, strict=True)):
            for i in range(depth):
                name = f"layers_{stage}_{i if stage else i + 1}"
                stride = 2 if stage and i == 0 else 1
                width = x.shape[-1]
                depthwise = layer(name, 0, width, kernel_size=3, stride=stride, padding=1, groups=width)
                # The reference counts convolution, norm and ReLU of both convolutions through.
                x = ConvUnit([depthwise, layer(name, 3, channels)], name=name)(x, train=train)
            features.append(x)
        return features


VARIANTS = {"mobilenet_v1": Variant(MobileNetV1, {"norm": "none"}, {})}
