"""Semantic segmentation: a class for every pixel, by UPerNet on any backbone's feature maps."""

from collections.abc import Sequence

import jax.numpy as jnp
from flax import linen as nn
from flax.core import FrozenDict

from maxmap.layers.blocks import ConvNormAct
from maxmap.layers.pooling import adaptive_average, bilinear, require_levels, top_down
from maxmap.layers.primitives import Conv, Initializer, LayerNorm, he_fan_out
from maxmap.operations import Array
from maxmap.ranges import Count, DropRate, Level, Positive

_INITS: FrozenDict[str, Initializer] = FrozenDict(kernel_init=he_fan_out())
_CLASSIFIER_INITS: FrozenDict[str, Initializer] = FrozenDict(
    kernel_init=nn.initializers.normal(0.01), bias_init=nn.initializers.zeros
)


def _conv(channels: int, kernel_size: int, name: str) -> ConvNormAct:
    return ConvNormAct(channels, kernel_size, activation="relu", inits=_INITS, name=name)


class UPerNetHead(nn.Module):
    """UPerNet (Xiao et al., ECCV 2018) as mmsegmentation trains it on ConvNeXt, Swin and CSWin, with its names.

    It pools the coarsest map to grids, builds a feature pyramid down to the finest, and classifies all levels at once.
    While training, a second, small classifier of one map (an FCN head) helps the backbone.

    Attributes:
      num_classes: K.
      channels: of every map inside.
      levels: which of the feature maps it reads, finest first; negative numbers count from the last.
      pool_scales: sides of the grids that the coarsest map is averaged to.
      auxiliary_level: which of the feature maps the second classifier reads.
      auxiliary_channels: of the second classifier.
      norm: normalises each map that is read over its channels. A backbone has no last norm of its own.
      epsilon: of these norms.
      dropout: rate of dropping channels before both classifiers.
    """

    num_classes: Count
    channels: Count = 512
    levels: Sequence[Level] = (-4, -3, -2, -1)
    pool_scales: Sequence[Count] = (1, 2, 3, 6)
    auxiliary_level: Level = -2
    auxiliary_channels: Count = 256
    norm: bool = True
    epsilon: Positive = 1e-6
    dropout: DropRate = 0.1

    @nn.nowrap
    def validate(self, num_features: int) -> None:
        """Raises ValueError, one sentence, if the fields do not fit each other or a backbone's `num_features` maps."""
        require_levels(num_features, self.levels, "UPerNet")
        if self.auxiliary_level % num_features not in {level % num_features for level in self.levels}:
            raise ValueError(
                f"UPerNet's auxiliary_level {self.auxiliary_level} is none of the levels that it reads, {self.levels}"
            )

    @nn.compact
    def __call__(self, features: Sequence[Array], *, train: bool = False) -> dict[str, Array]:
        """Classifies the pixels of the finest map that it reads.

        Args:
          features: `[B, H, W, C]`, finer ones first.
          train: with dropout, batch statistics and the second classifier.

        Returns:
          'logits' `[1, B, H, W, K]` with the finest level's H and W, and 'embedding' `[B, channels]`, the mean of what
          the classifier reads. While training also 'auxiliary' `[1, B, h, w, K]`.

        Raises:
          ValueError: The fields do not fit.
        """
        self.validate(len(features))
        maps = [features[level] for level in self.levels]
        if self.norm:
            maps = [LayerNorm(self.epsilon, name=f"norm{i}")(x) for i, x in enumerate(maps)]
        decode = _DecodeHead(self.num_classes, self.channels, self.pool_scales, self.dropout, name="decode_head")
        outputs = decode(maps, train=train)
        if train or self.is_initializing():
            place = [level % len(features) for level in self.levels].index(self.auxiliary_level % len(features))
            auxiliary = _FCNHead(self.num_classes, self.auxiliary_channels, self.dropout, name="auxiliary_head")
            outputs["auxiliary"] = auxiliary(maps[place], train=train)
        return outputs


class _DecodeHead(nn.Module):
    """mmsegmentation's `UPerHead`; for the attributes see `UPerNetHead`."""

    num_classes: int
    channels: int
    pool_scales: Sequence[int]
    dropout: float

    @nn.compact
    def __call__(self, maps: Sequence[Array], *, train: bool) -> dict[str, Array]:
        *finer, coarsest = maps
        size = coarsest.shape[1:3]
        pooled = [coarsest]
        for i, scale in enumerate(self.pool_scales):
            x = adaptive_average(coarsest, (scale, scale))
            pooled.append(bilinear(_conv(self.channels, 1, f"psp_modules_{i}_1")(x, train=train), size))
        context = _conv(self.channels, 3, "bottleneck")(jnp.concatenate(pooled, axis=-1), train=train)

        lateral = [_conv(self.channels, 1, f"lateral_convs_{i}")(x, train=train) for i, x in enumerate(finer)]
        *merged, context = top_down([*lateral, context], bilinear)
        levels = [_conv(self.channels, 3, f"fpn_convs_{i}")(x, train=train) for i, x in enumerate(merged)] + [context]
        levels = [bilinear(x, levels[0].shape[1:3]) for x in levels]
        x = _conv(self.channels, 3, "fpn_bottleneck")(jnp.concatenate(levels, axis=-1), train=train)
        return {"logits": _classify(x, self, train)[None], "embedding": jnp.mean(x, axis=(1, 2))}


class _FCNHead(nn.Module):
    """mmsegmentation's `FCNHead` with one convolution; for the attributes see `UPerNetHead`."""

    num_classes: int
    channels: int
    dropout: float

    @nn.compact
    def __call__(self, x: Array, *, train: bool) -> Array:
        return _classify(_conv(self.channels, 3, "convs_0")(x, train=train), self, train)[None]


def _classify(x: Array, head: _DecodeHead | _FCNHead, train: bool) -> Array:
    """Maps `[B, H, W, C]` to logits `[B, H, W, K]`; dropout is of whole channels."""
    x = nn.Dropout(head.dropout, broadcast_dims=(1, 2))(x, deterministic=not train)
    return Conv(head.num_classes, name="conv_seg", **_CLASSIFIER_INITS)(x)
