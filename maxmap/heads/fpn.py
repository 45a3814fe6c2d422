"""A feature pyramid for detectors: maps of equal width at every stride, each with what the coarser ones know."""

from collections.abc import Sequence

from flax import linen as nn

from maxmap.layers.blocks import ConvNormAct
from maxmap.layers.pooling import nearest, select_levels, top_down
from maxmap.layers.primitives import LayerNorm, xavier_uniform
from maxmap.operations import Array
from maxmap.ranges import Count, CountOrZero, Level, Positive

_INITS = {"kernel_init": xavier_uniform, "bias_init": nn.initializers.zeros}


class FeaturePyramid(nn.Module):
    """Feature pyramid network (Lin et al., CVPR 2017), with the names and the arithmetic of mmdetection's `FPN`.

    It is no head of a classifier: a detector's own heads read its maps. docs/detection.md has an example.

    Attributes:
      channels: of every map that it returns.
      levels: which of the feature maps it reads, finest first; negative numbers count from the last.
      extra: further maps, each made of every second pixel of the one before, for detectors that want larger strides.
      norm: normalises each map that it reads over its channels, as detectors on ConvNeXt and Swin do. A backbone has no
        last norm of its own.
      epsilon: of the norms.
    """

    channels: Count = 256
    levels: Sequence[Level] = (-3, -2, -1)
    extra: CountOrZero = 0
    norm: bool = False
    epsilon: Positive = 1e-6

    @nn.compact
    def __call__(self, features: Sequence[Array]) -> list[Array]:
        """Returns maps `[B, H_i, W_i, channels]`, finest first: one of each level's size, then the extra ones.

        Args:
          features: `[B, H, W, C]`, finer ones first, as `model.apply(variables, images, method="features")` returns.
        """
        maps = select_levels(features, self.levels, "the feature pyramid")
        if self.norm:
            maps = [LayerNorm(self.epsilon, name=f"norm{i}")(x) for i, x in enumerate(maps)]
        maps = [self._conv(1, f"lateral_convs_{i}")(x) for i, x in enumerate(maps)]
        maps = [self._conv(3, f"fpn_convs_{i}")(x) for i, x in enumerate(top_down(maps, nearest))]
        for _ in range(self.extra):
            maps.append(maps[-1][:, ::2, ::2])
        return maps

    @nn.nowrap
    def _conv(self, kernel_size: int, name: str) -> ConvNormAct:
        return ConvNormAct(self.channels, kernel_size, bias=True, norm=None, inits=_INITS, name=name)
