"""The backbone: a stem, then stages of convolution, transformer and multi-axis blocks."""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from flax import linen as nn
from flax.core import FrozenDict

from maxmap.backbones.maxxvit.attention import MultiAxisBlock, PartitionAttention, TransformerBlock, TransformerFields
from maxmap.backbones.maxxvit.convolution import POOLS, ConvStem, MBConv, StridedConvNeXtBlock
from maxmap.fused import unpair
from maxmap.layers.blocks import Stage
from maxmap.layers.primitives import ACTIVATIONS, drop_path_rates, pair, require_divisor, require_one_of
from maxmap.operations import Array
from maxmap.ranges import Count, DropRate, Pixels, check_fields

CONV_BLOCKS: dict[str, Any] = {"mbconv": MBConv, "convnext": StridedConvNeXtBlock}
# The fields of these blocks that the backbone itself sets.
SET_BY_BACKBONE = {"channels", "stride", "drop_path", "init_scheme", "parent", "name"}
# What fields of the blocks can be.
CHOICES: dict[str, Iterable[str]] = {
    "activation": ACTIVATIONS,
    "norm": ("layer", "batch"),
    "pool_type": POOLS,
    "rel_pos_type": ("bias", "bias_tf", "mlp"),
    "se_activation": ACTIVATIONS,
    "stride_mode": ("dw", "pool"),
}


class MaxxViT(nn.Module):
    """The maxxvit family's backbone.

    Attributes:
      image_size: height and width, or one number for both, that windows and position tables are made for. Larger images
        work where the windows still divide the map of every stage.
      pad: takes images whose maps the windows do not divide, too. Their maps are padded for the attention, which leaves
        the padding out; nothing else sees it.
      embed_dim: channels of the stages.
      depths: blocks of the stages.
      block_types: kinds of the blocks, one entry for each stage: "C" for convolution, "T" for a transformer block over
        the whole map, "M" for multi-axis, "PM" for parallel multi-axis. An entry may also be a tuple of kinds for the
        stage's first blocks; the last of them is repeated.
      strides: of the stages' first blocks.
      stem_width: channels of the stem's two convolutions, or one number for both.
      stem_bias: biases of the stem's two convolutions, or one value for both.
      window_size: of window and grid attention; None for `image_size` divided by the total stride.
      drop_path: stochastic depth, rising linearly over all blocks from 0 to this rate.
      drop_path_endpoint: False ends one step short of the rate (Google's MaxViT).
      block_attention: False leaves the window attention out of the "M" blocks.
      init_scheme: of the initialisers, "vit_eff" or "normal".
      conv_block: "mbconv" or "convnext".
      conv: fields of `MBConv` or `StridedConvNeXtBlock`.
      transformer: fields of `TransformerFields`.
    """

    image_size: Pixels | tuple[Pixels, Pixels] = 224
    embed_dim: Sequence[Count] = (96, 192, 384, 768)
    depths: Sequence[Count] = (2, 3, 5, 2)
    block_types: Sequence[str | Sequence[str]] = ("C", "C", "T", "T")
    strides: Sequence[Count] = (2, 2, 2, 2)
    stem_width: Count | tuple[Count, Count] = 64
    stem_bias: bool | tuple[bool, bool] = False
    window_size: Count | tuple[Count, Count] | None = None
    drop_path: DropRate = 0.0
    drop_path_endpoint: bool = True
    block_attention: bool = True
    init_scheme: str = "vit_eff"
    conv_block: str = "mbconv"
    conv: Mapping[str, Any] = FrozenDict()
    transformer: Mapping[str, Any] = FrozenDict()
    pad: bool = False

    @nn.nowrap
    def window(self) -> tuple[int, int]:
        """Returns height and width of the attention windows."""
        if self.window_size is not None:
            return pair(self.window_size)
        height, width = pair(self.image_size)
        ratio = 2 * math.prod(self.strides)
        if self.pad:
            return -(-height // ratio), -(-width // ratio)
        return max(height // ratio, 1), max(width // ratio, 1)

    @nn.nowrap
    def num_features(self) -> int:
        """Returns the number of feature maps that a call returns."""
        return 1 + len(self.depths)

    @nn.nowrap
    def nested_fields(self) -> dict[str, dict[str, Any]]:
        """Returns `conv` and `transformer` with the defaults of the fields that they leave out."""
        defaults = {"conv": _defaults(CONV_BLOCKS[self.conv_block]), "transformer": _defaults(TransformerFields)}
        return {name: {**fields, **getattr(self, name)} for name, fields in defaults.items()}

    @nn.nowrap
    def validate(self) -> None:
        """Raises ValueError, one sentence, if the fields do not fit each other."""
        lengths = {len(self.embed_dim), len(self.depths), len(self.block_types), len(self.strides)}
        if len(lengths) != 1:
            raise ValueError("embed_dim, depths, block_types and strides need one entry for each stage")
        require_one_of(self.conv_block, "conv_block", CONV_BLOCKS)
        require_one_of(self.init_scheme, "init_scheme", ("vit_eff", "normal"))
        for name, owner in (("conv", CONV_BLOCKS[self.conv_block]), ("transformer", TransformerFields)):
            fields = getattr(self, name)
            unknown = sorted(set(fields) - set(_defaults(owner)))
            if unknown:
                raise ValueError(f"there is no field '{unknown[0]}' in {owner.__name__}")
            check_fields(owner, f"model.{name}", fields)
            for field in sorted(set(fields) & set(CHOICES)):
                require_one_of(fields[field], field, CHOICES[field])
        self._check_stages()
        self._check_size(pair(self.image_size), made_for=True)

    @nn.nowrap
    def _check_stages(self) -> None:
        """Raises ValueError unless all kinds of blocks are known and heads divide the channels that they attend in."""
        fields = TransformerFields(**self.transformer)
        before = pair(self.stem_width)[1]
        for stage, channels in enumerate(self.embed_dim):
            for kind in self._kinds(stage):
                require_one_of(kind, f"a block of stage {stage}", ("C", "T", "M", "PM"))
                if kind != "C":
                    width = before if kind == "T" and not fields.expand_first else channels
                    require_divisor(fields.head_dim, "channels per head", width, f"channels of stage {stage}")
                before = channels

    @nn.nowrap
    def _check_size(self, size: Sequence[int], made_for: bool = False) -> None:
        """Raises ValueError unless the windows divide the map of every stage that has them.

        Args:
          size: height and width of the images.
          made_for: `size` is `image_size`, which the windows follow unless `window_size` is given.
        """
        partitioned = [bool({"M", "PM"} & set(self._kinds(stage))) for stage in range(len(self.depths))]
        for axis, (pixels, window) in enumerate(zip(size, self.window(), strict=True)):
            n = -(-pixels // 2)
            for stage, stride in enumerate(self.strides):
                n = -(-n // stride)
                least = 2 * math.prod(self.strides[: stage + 1])
                if "T" in self._kinds(stage) and pixels < least:
                    raise ValueError(
                        f"image {('height', 'width')[axis]} {pixels} leaves no pixel in stage {stage}; the nearest "
                        f"size that works is {2 * math.prod(self.strides)}"
                    )
                if partitioned[stage] and n % window and not self.pad:
                    step = 2 * math.prod(self.strides) * (1 if made_for and self.window_size is None else window)
                    nearest = max(round(pixels / step), 1) * step
                    raise ValueError(
                        f"image {('height', 'width')[axis]} {pixels} gives a map of {n} pixels in stage {stage}, which "
                        f"windows of {window} do not divide; the nearest size that works is {nearest}; "
                        "set pad for any size"
                    )

    @nn.nowrap
    def _kinds(self, stage: int) -> list[str]:
        """Returns the kinds of the blocks of a stage."""
        given, depth = self.block_types[stage], self.depths[stage]
        kinds = [given] if isinstance(given, str) else list(given)
        return kinds[:depth] + kinds[-1:] * (depth - len(kinds))

    @nn.compact
    def __call__(self, x: Array, *, train: bool = False) -> list[Array]:
        """Maps images `[B, H, W, C]` to the stem's map and the map of every stage."""
        self._check_size(x.shape[1:3])
        conv = self.nested_fields()["conv"]  # the stem follows the convolution blocks
        width = pair(self.stem_width)
        x = ConvStem(
            width,
            (self.stem_bias, self.stem_bias) if isinstance(self.stem_bias, bool) else tuple(self.stem_bias),
            "layer" if self.conv_block == "convnext" else "batch",
            conv["activation"],
            conv["epsilon"],
            conv.get("padding", 1),
            self.init_scheme,
            name="stem",
        )(x, train=train)
        x, beside = unpair(x) if x.shape[-1] == 2 * width[1] else (x, x)
        features = [beside]
        rates = iter(drop_path_rates(self.drop_path, sum(self.depths), endpoint=self.drop_path_endpoint))
        for stage, channels in enumerate(self.embed_dim):
            blocks = [
                self._make_block(kind, channels, self.strides[stage] if i == 0 else 1, next(rates))
                for i, kind in enumerate(self._kinds(stage))
            ]
            x = Stage(blocks, name=f"stages_{stage}")(x, train=train)
            features.append(x)
        return features

    @nn.nowrap
    def _make_block(self, kind: str, channels: int, stride: int, drop_path: float) -> Callable[..., nn.Module]:
        """Returns what makes a block of a kind, given its name."""
        common = {"channels": channels, "drop_path": drop_path, "init_scheme": self.init_scheme}
        conv: Callable[..., nn.Module] = functools.partial(CONV_BLOCKS[self.conv_block], **common, **self.conv)
        if kind == "C" and self.conv_block == "convnext":
            # The reference leaves ConvNeXt blocks that stand alone as PyTorch makes them.
            return functools.partial(conv, stride=stride, init_scheme="torch")
        if kind == "C":
            return functools.partial(conv, stride=stride)
        fields = TransformerFields(**self.transformer)
        if kind == "T":
            return functools.partial(TransformerBlock, fields=fields, stride=stride, **common)
        first = functools.partial(conv, stride=stride)
        attend = functools.partial(PartitionAttention, fields=fields, window=self.window(), **common)
        if kind == "PM":
            both = (("attn_block", "window"), ("attn_grid", "grid"))
            parts = [
                functools.partial(first, name="conv_0"),
                functools.partial(conv, name="conv_1"),
                functools.partial(attend, attentions=both, name="attn"),
            ]
        else:
            parts = [functools.partial(first, name="conv")]
            if self.block_attention:
                parts.append(functools.partial(attend, attentions=(("attn", "window"),), name="attn_block"))
            parts.append(functools.partial(attend, attentions=(("attn", "grid"),), name="attn_grid"))
        return functools.partial(MultiAxisBlock, parts)


def _defaults(owner: Any) -> dict[str, Any]:
    """Returns the fields of a block that `conv` or `transformer` can set, with their defaults."""
    return {f.name: f.default for f in dataclasses.fields(owner) if f.name not in SET_BY_BACKBONE}
