"""MobileNetV1 (Howard et al. 2017, arXiv:1704.04861) in the forms in which its weights were released.

The network is the same everywhere: a stem and 13 depthwise-separable units. The releases differ in details that change
every logit, so a file of weights needs the model that it was trained as:

| models | whose | activation | padding | epsilon | widths |
|---|---|---|---|---|---|
| mobilenet_v1 | Lab-LVM/imagenet-models | ReLU | 1 | 1e-5 | 1.0 |
| mobilenet_v1_*_tf | TensorFlow's and Keras's, also as TFLite | ReLU6 | "same" | 1e-3 | 0.25, 0.5, 0.75, 1.0 |
| mobilenetv1_* | timm's | ReLU6 | 1 | 1e-5 | 1.0, 1.25 |
| mobilenet_v1_025_leaky | biubug6/Pytorch_Retinaface's | LeakyReLU 0.1 | 1 | 1e-5 | 0.25 |
"""

from collections.abc import Sequence

from flax import linen as nn

from maxmap.backbones import Variant
from maxmap.layers.primitives import ACTIVATIONS, BatchNorm, Block, Conv, require_one_of
from maxmap.operations import Array, Padding
from maxmap.ranges import Count, CountOrZero, DropRate, Pixels, Positive

PADDINGS: dict[str, Padding] = {"one": 1, "same": "same"}


class ConvUnit(Block):
    """Convolutions one after another, each with a norm and an activation: the stem or a depthwise-separable unit.

    Attributes:
      layers: pairs of convolution and norm. They are submodules of the backbone, because the reference's names have no
        level for the unit.
      activation: after each norm, a key of `ACTIVATIONS`.
    """

    layers: Sequence[tuple[nn.Module, nn.Module]]
    activation: str

    def __call__(self, x: Array, *, train: bool) -> Array:
        for conv, norm in self.layers:
            x = ACTIVATIONS[self.activation](norm(conv(x), train=train))
        return x


class MobileNetV1(nn.Module):
    """Depthwise-separable convolutions without shortcuts.

    Attributes:
      image_size: height and width, or one number for both; any other size works too.
      stem_width: channels of the first convolution.
      embed_dim: channels of the stages.
      depths: depthwise-separable units of the stages. The first unit of a stage halves the map, except in the first
        stage, which holds the stem.
      head_width: channels of a 1x1 convolution behind the stages, whose map is returned too; 0 for none.
      activation: after each norm, a key of `ACTIVATIONS`.
      padding: of the 3x3 convolutions: "one" pixel on every side, or TensorFlow's "same", which pads a map of even size
        below and on the right alone where the stride is 2.
      epsilon: of the norms.
      drop_path: 0, there is no residual branch to drop.
    """

    image_size: Pixels | tuple[Pixels, Pixels] = 224
    stem_width: Count = 32
    embed_dim: Sequence[Count] = (64, 128, 256, 512, 1024)
    depths: Sequence[Count] = (1, 2, 2, 6, 2)
    head_width: CountOrZero = 0
    activation: str = "relu"
    padding: str = "one"
    epsilon: Positive = 1e-5
    drop_path: DropRate = 0.0

    @nn.nowrap
    def num_features(self) -> int:
        """Feature maps that a call returns."""
        return len(self.depths) + bool(self.head_width)

    @nn.nowrap
    def validate(self) -> None:
        """Raises ValueError, one sentence, if the fields do not fit each other."""
        if len(self.embed_dim) != len(self.depths):
            raise ValueError("embed_dim and depths need one entry for each stage")
        if self.drop_path:
            raise ValueError(f"MobileNetV1 has no residual branches, so drop_path can only be 0, not {self.drop_path}")
        require_one_of(self.activation, "activation", ACTIVATIONS)
        require_one_of(self.padding, "padding", PADDINGS)

    @nn.compact
    def __call__(self, x: Array, *, train: bool = False) -> list[Array]:
        """Maps images `[B, H, W, C]` to the maps of the stages; the first has half the size of the images."""

        def layer(
            name: str, index: int, channels: int, kernel_size: int = 1, stride: int = 1, groups: int = 1
        ) -> tuple[nn.Module, nn.Module]:
            padding = PADDINGS[self.padding] if kernel_size > 1 else 0
            conv = Conv(channels, kernel_size, stride, padding, groups, bias=False, name=f"{name}_{index}")
            return conv, BatchNorm(self.epsilon, name=f"{name}_{index + 1}")

        def unit(name: str, *layers: tuple[nn.Module, nn.Module]) -> ConvUnit:
            return ConvUnit(layers, self.activation, name=name)

        stem = layer("layers_0_0", 0, self.stem_width, kernel_size=3, stride=2)
        x = unit("layers_0_0", stem)(x, train=train)
        features = []
        for stage, (channels, depth) in enumerate(zip(self.embed_dim, self.depths, strict=True)):
            for i in range(depth):
                name = f"layers_{stage}_{i if stage else i + 1}"
                stride = 2 if stage and i == 0 else 1
                width = x.shape[-1]
                depthwise = layer(name, 0, width, kernel_size=3, stride=stride, groups=width)
                # The reference counts convolution, norm and ReLU of both convolutions through.
                x = unit(name, depthwise, layer(name, 3, channels))(x, train=train)
            features.append(x)
        if self.head_width:
            name = f"layers_{len(self.depths)}_0"
            features.append(unit(name, layer(name, 0, self.head_width))(x, train=train))
        return features


def _widened(width: float) -> dict[str, Count | tuple[Count, ...]]:
    """Returns the channels for a width multiplier, as TensorFlow and timm round them for the released widths."""
    return {
        "stem_width": round(MobileNetV1.stem_width * width),
        "embed_dim": tuple(round(channels * width) for channels in MobileNetV1.embed_dim),
    }


_CLASSIFIER = {"norm": "none"}
_TENSORFLOW = {"activation": "relu6", "padding": "same", "epsilon": 1e-3}
VARIANTS = {
    "mobilenet_v1": Variant(MobileNetV1, _CLASSIFIER, {}),
    **{
        f"mobilenet_v1_{round(100 * width):03}_tf": Variant(MobileNetV1, _CLASSIFIER, _TENSORFLOW | _widened(width))
        for width in (0.25, 0.5, 0.75, 1.0)
    },
    "mobilenet_v1_025_leaky": Variant(MobileNetV1, _CLASSIFIER, {"activation": "leaky_relu"} | _widened(0.25)),
    "mobilenetv1_100": Variant(MobileNetV1, _CLASSIFIER, {"activation": "relu6"}),
    "mobilenetv1_100h": Variant(MobileNetV1, _CLASSIFIER, {"activation": "relu6", "head_width": 1024}),
    "mobilenetv1_125": Variant(MobileNetV1, _CLASSIFIER, {"activation": "relu6"} | _widened(1.25)),
}
