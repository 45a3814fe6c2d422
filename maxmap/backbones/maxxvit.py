"""MaxViT, CoAtNet, CoAtNeXt, MaxxViT and MaxxViT-V2: convolution stages and multi-axis attention.

Tu et al. 2022, "MaxViT: Multi-Axis Vision Transformer"; Dai et al. 2021, "CoAtNet". Names, fields and parameters are
those of timm 1.0.31; the `tf` variants are the shape of the official TensorFlow code.
"""

import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import linen as nn
from flax.core import FrozenDict

from maxmap.layers.blocks import Mlp, relative_index
from maxmap.layers.primitives import (
    ACTIVATIONS,
    BatchNorm,
    Conv,
    DropPath,
    Initializer,
    LayerNorm,
    LayerScale,
    Linear,
    average_pool,
    drop_path_rates,
    he_fan_out,
    pair,
    require_divisor,
    require_one_of,
    trunc_normal_02,
    xavier_uniform,
)
from maxmap.operations import attention, max_pool

Array = jax.Array

zeros = nn.initializers.zeros
_normal_02 = nn.initializers.normal(0.02)


def _conv_init(scheme: str, groups: int = 1) -> dict[str, Initializer]:
    """Initialisers of a convolution in the stem or in a convolution block."""
    return {"kernel_init": he_fan_out(groups) if scheme == "vit_eff" else _normal_02, "bias_init": zeros}


def _attention_init(scheme: str, mlp: bool = False) -> dict[str, Initializer]:
    """Initialisers of a linear map in an attention block; its FFN (`mlp`) starts with tiny random biases."""
    if scheme == "vit_eff":
        return {"kernel_init": xavier_uniform, "bias_init": nn.initializers.normal(1e-6) if mlp else zeros}
    return {"kernel_init": _normal_02, "bias_init": zeros}


def pool(x: Array, kind: str) -> Array:
    """Halves a map: "avg2" is the 2x2 mean, "avg3" the 3x3 mean with padding counted, "max" the 3x3 maximum."""
    if kind == "avg2":
        return average_pool(x, 2, 2)
    if kind == "avg3":
        return nn.avg_pool(x, (3, 3), (2, 2), [(1, 1), (1, 1)])
    if kind == "max":
        return max_pool(x, 3, 2, 1)
    raise ValueError(f"there is no pooling '{kind}', only 'avg2', 'avg3' and 'max'")


def _norm(kind: str, epsilon: float, name: str, x: Array, train: bool) -> Array:
    if kind == "batch":
        return BatchNorm(epsilon, name=name)(x, train=train)
    return LayerNorm(epsilon, name=name)(x)


class Stem(nn.Module):
    """Two 3x3 convolutions, the first with stride 2; no norm or activation after the second."""

    width: tuple[int, int]
    bias: tuple[bool, bool]
    norm: str
    activation: str
    epsilon: float
    padding: int | str
    init_scheme: str

    @nn.compact
    def __call__(self, x: Array, *, train: bool) -> Array:
        conv = functools.partial(Conv, kernel_size=3, padding=self.padding, **_conv_init(self.init_scheme))
        x = conv(self.width[0], stride=2, bias=self.bias[0], name="conv1")(x)
        x = ACTIVATIONS[self.activation](_norm(self.norm, self.epsilon, "norm1", x, train))
        return conv(self.width[1], bias=self.bias[1], name="conv2")(x)


class Shortcut(nn.Module):
    """The residual path: pooled when the block has a stride, widened by a 1x1 convolution when the widths differ.

    With `always`, a pooled path has the convolution at equal widths too.
    """

    channels: int
    stride: int
    pool_type: str
    bias: bool
    inits: Mapping[str, Initializer]
    always: bool = False

    @nn.compact
    def __call__(self, x: Array) -> Array:
        if self.stride == 2:
            x = pool(x, self.pool_type)
        if x.shape[-1] != self.channels or (self.always and self.stride == 2):
            x = Conv(self.channels, bias=self.bias, name="expand", **self.inits)(x)
        return x


class SqueezeExcite(nn.Module):
    """Channel gates from the mean of the map (Hu et al. 2018)."""

    width: int
    activation: str
    init_scheme: str

    @nn.compact
    def __call__(self, x: Array) -> Array:
        inits = _conv_init(self.init_scheme)
        gate = jnp.mean(x, axis=(1, 2), keepdims=True)
        gate = ACTIVATIONS[self.activation](Conv(self.width, name="fc1", **inits)(gate))
        return x * nn.sigmoid(Conv(x.shape[-1], name="fc2", **inits)(gate))


def _scaled(x: Array, initial: float | None, name: str) -> Array:
    return x if initial is None else LayerScale(initial, name=name)(x)


class MBConv(nn.Module):
    """Inverted bottleneck with squeeze-excitation and a batch norm in front (MaxViT's and CoAtNet's convolution block).

    Attributes:
      channels: output channels.
      stride: 1 or 2.
      drop_path: rate of dropping the residual branch.
      init_scheme: scheme of the initialisers, "vit_eff" or "normal".
      expand_output: the inner width is 4 times the output width, otherwise 4 times the input width.
      pre_norm_act: activation after the first norm.
      output_bias: bias in the last 1x1 convolution and in the shortcut's.
      stride_mode: "dw" strides the depthwise convolution, "pool" averages before the first 1x1 convolution.
      pool_type: of the shortcut, see `pool`.
      always_expand: a shortcut with stride has its 1x1 convolution at equal widths too.
      padding: "same" for TensorFlow's rule, otherwise 1 on every side.
      se_early: squeeze-excitation before the second norm instead of after it.
      se_activation: inside squeeze-excitation.
      se_ratio: its width, relative to the output width (`expand_output`) or to the inner width.
      activation: after the norms.
      epsilon: of the norms.
    """

    channels: int
    stride: int = 1
    drop_path: float = 0.0
    init_scheme: str = "vit_eff"
    expand_output: bool = True
    pre_norm_act: bool = False
    output_bias: bool = True
    stride_mode: str = "dw"
    pool_type: str = "avg2"
    always_expand: bool = False
    padding: int | str = 1
    se_early: bool = False
    se_activation: str = "silu"
    se_ratio: float = 0.25
    activation: str = "gelu"
    epsilon: float = 1e-5

    @nn.compact
    def __call__(self, x: Array, *, train: bool = False) -> Array:
        act = ACTIVATIONS[self.activation]
        inits = _conv_init(self.init_scheme)
        width = _divisible(4 * (self.channels if self.expand_output else x.shape[-1]))
        se_width = int(self.se_ratio * (self.channels if self.expand_output else width))
        squeeze_excite = functools.partial(SqueezeExcite, se_width, self.se_activation, self.init_scheme)
        shortcut = Shortcut(
            self.channels, self.stride, self.pool_type, self.output_bias, inits, self.always_expand, name="shortcut"
        )(x)

        x = BatchNorm(self.epsilon, name="pre_norm")(x, train=train)
        if self.pre_norm_act:
            x = act(x)
        if self.stride == 2 and self.stride_mode == "pool":
            x = pool(x, "avg2")
        x = Conv(width, bias=False, name="conv1_1x1", **inits)(x)
        x = act(BatchNorm(self.epsilon, name="norm1")(x, train=train))
        x = Conv(
            width,
            3,
            stride=self.stride if self.stride_mode == "dw" else 1,
            padding=self.padding,
            groups=width,
            bias=False,
            name="conv2_kxk",
            **_conv_init(self.init_scheme, groups=width),
        )(x)
        if self.se_early:
            x = squeeze_excite(name="se_early")(x)
        x = act(BatchNorm(self.epsilon, name="norm2")(x, train=train))
        if not self.se_early:
            x = squeeze_excite(name="se")(x)
        x = Conv(self.channels, bias=self.output_bias, name="conv3_1x1", **inits)(x)
        return DropPath(self.drop_path)(x, train=train) + shortcut


def _divisible(width: int, divisor: int = 8) -> int:
    """The nearest multiple of `divisor`, one more if that lost over 10 % (MobileNet's rule)."""
    rounded = max(divisor, int(width + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < 0.9 * width else rounded


class ConvNeXtBlock(nn.Module):
    """Depthwise 7x7 convolution, LayerNorm and an FFN (Liu et al. 2022), as timm's maxxvit family has it.

    Attributes:
      channels: output channels.
      stride: 1 or 2.
      drop_path: rate of dropping the residual branch.
      init_scheme: scheme of the initialisers, "vit_eff", "normal" or "torch".
      init_values: initial layer scale.
      activation: of the FFN.
      epsilon: of the norm.
    """

    channels: int
    stride: int = 1
    drop_path: float = 0.0
    init_scheme: str = "vit_eff"
    init_values: float = 1e-6
    activation: str = "gelu"
    epsilon: float = 1e-6

    @nn.compact
    def __call__(self, x: Array, *, train: bool = False) -> Array:
        def inits(groups: int = 1) -> dict[str, Initializer]:
            return {} if self.init_scheme == "torch" else _conv_init(self.init_scheme, groups)

        shortcut = Shortcut(self.channels, self.stride, "avg2", True, inits(), name="shortcut")(x)
        groups = x.shape[-1]
        x = Conv(self.channels, 7, stride=self.stride, padding=3, groups=groups, name="conv_dw", **inits(groups))(x)
        x = LayerNorm(self.epsilon, name="norm")(x)
        x = Mlp(4 * self.channels, self.channels, self.activation, inits(), layer=Conv, name="mlp")(x, train=train)
        x = LayerScale(self.init_values, name="ls")(x)
        return DropPath(self.drop_path)(x, train=train) + shortcut


class RelativePositionBias(nn.Module):
    """Bias of the attention logits from the offset between query and key.

    Attributes:
      window: height and width.
      heads: of the attention.
      kind: "bias" (table `[(2h-1)(2w-1), heads]`), "bias_tf" (table `[heads, 2h-1, 2w-1]`, read at key - query), or
        "mlp" (Liu et al. 2022, Swin V2: a small MLP of the log-spaced offset).
      hidden: width of that MLP.
    """

    window: tuple[int, int]
    heads: int
    kind: str
    hidden: int
    init_scheme: str

    @nn.compact
    def __call__(self, *, train: bool) -> Array:
        h, w = self.window
        dy, dx = relative_index(self.window)
        if self.kind == "mlp":
            offsets = np.stack(np.meshgrid(np.arange(1.0 - h, h), np.arange(1.0 - w, w), indexing="ij"), -1)
            spaced = jnp.asarray(np.sign(offsets) * np.log1p(np.abs(offsets)))  # [2h-1, 2w-1, 2]
            inits = _attention_init(self.init_scheme, mlp=True)
            # timm has this dropout in the code, not in a field.
            mlp = Mlp(self.hidden, self.heads, "relu", inits, hidden_dropout=0.125, name="mlp")
            return rearrange(mlp(spaced, train=train)[dy, dx], "q k h -> h q k")
        if self.kind == "bias":
            shape = ((2 * h - 1) * (2 * w - 1), self.heads)
            table = self.param("relative_position_bias_table", trunc_normal_02, shape)
            return rearrange(table[dy * (2 * w - 1) + dx], "q k h -> h q k")
        table = self.param("relative_position_bias_table", _normal_02, (self.heads, 2 * h - 1, 2 * w - 1))
        return table[:, 2 * h - 2 - dy, 2 * w - 2 - dx]


class Attention(nn.Module):
    """Multi-head self-attention inside of windows, with a relative position bias.

    Attributes:
      channels: output channels.
      width: of queries, keys and values together over the heads.
      window: height and width; a window has N = height * width tokens.
      layer: `Linear`, or `Conv` where the reference keeps 4-d weights.
      head_dim, head_first, scale_by_width, rel_pos_type, rel_pos_dim, init_scheme: see `_TransformerFields`.
      attn_drop, proj_drop: dropout of the attention probabilities and of the output.
    """

    channels: int
    width: int
    window: tuple[int, int]
    layer: Callable[..., nn.Module]
    head_dim: int
    head_first: bool
    scale_by_width: bool
    rel_pos_type: str
    rel_pos_dim: int
    attn_drop: float
    proj_drop: float
    init_scheme: str

    @nn.compact
    def __call__(self, x: Array, *, train: bool) -> Array:
        """Maps windows `[B, windows, N, C]` to `[B, windows, N, channels]`."""
        heads = self.width // self.head_dim
        inits = _attention_init(self.init_scheme)
        order = "h three d" if self.head_first else "three h d"
        qkv = self.layer(3 * self.width, name="qkv", **inits)(x)
        q, k, v = rearrange(qkv, f"b w n ({order}) -> three b w h n d", three=3, h=heads)
        bias = RelativePositionBias(
            self.window, heads, self.rel_pos_type, self.rel_pos_dim, self.init_scheme, name="rel_pos"
        )(train=train)
        scale = (self.width if self.scale_by_width else self.head_dim) ** -0.5
        dropout = nn.Dropout(self.attn_drop, deterministic=False)
        x = rearrange(
            attention(q * scale, k, v, bias, dropout if train and self.attn_drop else None), "b w h n d -> b w n (h d)"
        )
        x = self.layer(self.channels, name="proj", **inits)(x)
        return nn.Dropout(self.proj_drop)(x, deterministic=not train)


class _TransformerFields(nn.Module):
    """Fields that every attention block of the family shares.

    Attributes:
      channels: output channels.
      drop_path: rate of dropping each residual branch.
      init_scheme: scheme of the initialisers, "vit_eff" or "normal".
      head_dim: channels per head.
      head_first: the fused qkv output is ordered (heads, qkv, head_dim), otherwise (qkv, heads, head_dim).
      scale_by_width: logits are divided by the root of all heads' channels, as in torchvision, not of one head's.
      expand_first: a block that widens attends in the output width, otherwise in the input width.
      shortcut_bias: bias in the shortcut's 1x1 convolution.
      pool_type: "avg2" or "max", for a block with stride.
      rel_pos_type: "bias", "bias_tf" or "mlp".
      rel_pos_dim: hidden width of the "mlp" position bias.
      init_values: initial layer scale, None for none.
      activation: of the FFN.
      norm: "layer" or "batch", for whole-map attention.
      epsilon: of the norms.
      attn_drop, proj_drop: dropout of the attention probabilities; of the projections.
    """

    channels: int
    drop_path: float = 0.0
    init_scheme: str = "vit_eff"
    head_dim: int = 32
    head_first: bool = True
    scale_by_width: bool = False
    expand_first: bool = True
    shortcut_bias: bool = True
    pool_type: str = "avg2"
    rel_pos_type: str = "bias"
    rel_pos_dim: int = 512
    init_values: float | None = None
    activation: str = "gelu"
    norm: str = "layer"
    epsilon: float = 1e-6
    attn_drop: float = 0.0
    proj_drop: float = 0.0

    def attention(self, name: str, **fields: Any) -> Attention:
        shared = ("head_dim", "scale_by_width", "rel_pos_type", "rel_pos_dim", "attn_drop", "proj_drop", "init_scheme")
        fields = {"layer": Linear, "head_first": self.head_first} | fields
        return Attention(**{field: getattr(self, field) for field in shared}, **fields, name=name)

    def mlp(self, layer: Callable[..., nn.Module], output_dropout: float) -> Mlp:
        return Mlp(
            4 * self.channels,
            self.channels,
            self.activation,
            _attention_init(self.init_scheme, mlp=True),
            layer=layer,
            hidden_dropout=self.proj_drop,
            dropout=output_dropout,
            name="mlp",
        )


class NormPool(nn.Module):
    """Norm of a map, then pooling: the first norm of a block with stride, whose name has one more part."""

    kind: str
    epsilon: float
    pool_type: str

    @nn.compact
    def __call__(self, x: Array, *, train: bool) -> Array:
        return pool(_norm(self.kind, self.epsilon, "norm", x, train), self.pool_type)


class TransformerBlock(_TransformerFields):
    """Attention over the whole map and an FFN: CoAtNet's block.

    Attributes:
      stride: 1 or 2.
      others: see `_TransformerFields`.
    """

    stride: int = 1

    @nn.compact
    def __call__(self, x: Array, *, train: bool = False) -> Array:
        width = self.channels if self.expand_first else x.shape[-1]
        shortcut = Shortcut(
            self.channels,
            self.stride,
            self.pool_type,
            self.shortcut_bias,
            _attention_init(self.init_scheme),
            name="shortcut",
        )(x)
        if self.stride == 2:
            x = NormPool(self.norm, self.epsilon, self.pool_type, name="norm1")(x, train=train)
        else:
            x = _norm(self.norm, self.epsilon, "norm1", x, train)
        window = x.shape[1:3]
        x = rearrange(x, "b h w c -> b 1 (h w) c")
        # The reference does not hand `head_first` on to this block: its order is always head-first.
        attention = self.attention(
            "attn", channels=self.channels, width=width, window=window, layer=Conv, head_first=True
        )
        x = rearrange(attention(x, train=train), "b 1 (h w) c -> b h w c", h=window[0])
        x = shortcut + DropPath(self.drop_path)(_scaled(x, self.init_values, "ls1"), train=train)
        y = self.mlp(Conv, 0.0)(_norm(self.norm, self.epsilon, "norm2", x, train), train=train)
        return x + DropPath(self.drop_path)(_scaled(y, self.init_values, "ls2"), train=train)


_PARTITIONS = {
    # A window holds neighbours; a grid cell holds pixels at equal distances over the whole map.
    "window": "b (i p) (j q) c -> b (i j) (p q) c",
    "grid": "b (p i) (q j) c -> b (i j) (p q) c",
}


def partition(x: Array, kind: str, window: tuple[int, int]) -> Array:
    """Splits a map `[B, H, W, C]` into `[B, windows, N, C]` by "window" or by "grid" with `window` pixels each."""
    return rearrange(x, _PARTITIONS[kind], p=window[0], q=window[1])


def departition(x: Array, kind: str, window: tuple[int, int], size: Sequence[int]) -> Array:
    """Undoes `partition`; `size` is the height and width of the map."""
    split, whole = _PARTITIONS[kind].split(" -> ")[::-1]
    (p, q), (height, width) = window, size
    return rearrange(x, f"{split} -> {whole}", p=p, q=q, i=height // p, j=width // q)


class PartitionAttention(_TransformerFields):
    """Attention inside of windows or of grid cells, and an FFN: one half of MaxViT's multi-axis attention.

    Attributes:
      kind: "window" or "grid".
      window: height and width.
      others: see `_TransformerFields`.
    """

    kind: str = "window"
    window: tuple[int, int] = (7, 7)

    @nn.compact
    def __call__(self, x: Array, *, train: bool = False) -> Array:
        y = partition(LayerNorm(self.epsilon, name="norm1")(x), self.kind, self.window)
        attention = self.attention("attn", channels=self.channels, width=self.channels, window=self.window)
        y = departition(attention(y, train=train), self.kind, self.window, x.shape[1:3])
        x = x + DropPath(self.drop_path)(_scaled(y, self.init_values, "ls1"), train=train)
        y = self.mlp(Linear, self.proj_drop)(LayerNorm(self.epsilon, name="norm2")(x), train=train)
        return x + DropPath(self.drop_path)(_scaled(y, self.init_values, "ls2"), train=train)


class ParallelPartitionAttention(_TransformerFields):
    """Window and grid attention side by side, each with half of the output channels, and one FFN.

    Attributes:
      window: height and width, of both.
      others: see `_TransformerFields`.
    """

    window: tuple[int, int] = (7, 7)

    @nn.compact
    def __call__(self, x: Array, *, train: bool = False) -> Array:
        y = LayerNorm(self.epsilon, name="norm1")(x)
        halves = []
        for kind, name in (("window", "attn_block"), ("grid", "attn_grid")):
            attention = self.attention(name, channels=self.channels // 2, width=self.channels, window=self.window)
            half = attention(partition(y, kind, self.window), train=train)
            halves.append(departition(half, kind, self.window, x.shape[1:3]))
        y = jnp.concatenate(halves, axis=-1)
        x = x + DropPath(self.drop_path)(_scaled(y, self.init_values, "ls1"), train=train)
        y = self.mlp(Linear, self.proj_drop)(LayerNorm(self.epsilon, name="norm2")(x), train=train)
        return x + DropPath(self.drop_path)(_scaled(y, self.init_values, "ls2"), train=train)


class MultiAxisBlock(nn.Module):
    """MaxViT's block: convolution, window attention, grid attention.

    Attributes:
      conv: makes the convolution block, given its name.
      attention: makes a `PartitionAttention`, given its kind and name.
      block_attention: False leaves the window attention out (MaxxViT-V2).
    """

    conv: Callable[..., nn.Module]
    attention: Callable[..., nn.Module]
    block_attention: bool

    @nn.compact
    def __call__(self, x: Array, *, train: bool = False) -> Array:
        x = self.conv(name="conv")(x, train=train)
        if self.block_attention:
            x = self.attention(kind="window", name="attn_block")(x, train=train)
        return self.attention(kind="grid", name="attn_grid")(x, train=train)


class ParallelMultiAxisBlock(nn.Module):
    """Two convolution blocks, then window and grid attention in parallel.

    Attributes:
      convs: make the convolution blocks, given their names.
      attention: makes the `ParallelPartitionAttention`, given its name.
    """

    convs: Sequence[Callable[..., nn.Module]]
    attention: Callable[..., nn.Module]

    @nn.compact
    def __call__(self, x: Array, *, train: bool = False) -> Array:
        for i, conv in enumerate(self.convs):
            x = conv(name=f"conv_{i}")(x, train=train)
        return self.attention(name="attn")(x, train=train)


class Stage(nn.Module):
    """Blocks one after another.

    Attributes:
      blocks: make the blocks, given their names.
    """

    blocks: Sequence[Callable[..., nn.Module]]

    @nn.compact
    def __call__(self, x: Array, *, train: bool = False) -> Array:
        for i, block in enumerate(self.blocks):
            x = block(name=f"blocks_{i}")(x, train=train)
        return x


_CONV_BLOCKS: dict[str, Any] = {"mbconv": MBConv, "convnext": ConvNeXtBlock}
# What fields of the blocks can be.
_CHOICES: dict[str, Iterable[str]] = {
    "activation": ACTIVATIONS,
    "norm": ("layer", "batch"),
    "pool_type": ("avg2", "avg3", "max"),
    "rel_pos_type": ("bias", "bias_tf", "mlp"),
    "se_activation": ACTIVATIONS,
    "stride_mode": ("dw", "pool"),
}


class MaxxViT(nn.Module):
    """The maxxvit family's backbone.

    Attributes:
      image_size: height and width, or one number for both, that windows and tables are made for. Larger images work
        where the window still divides every stage's map.
      embed_dim: channels of the stages.
      depths: blocks of the stages.
      block_types: of the stages: "C" convolution, "T" transformer over the whole map, "M" multi-axis, "PM" parallel
        multi-axis, or a tuple of these for the blocks of a stage, whose last one is repeated.
      strides: of the stages' first blocks.
      stem_width: channels of the stem's convolutions, or one number for both.
      stem_bias: biases in the stem's convolutions, or one value for both.
      window_size: of window and grid attention; None for `image_size` over the total stride.
      drop_path: stochastic depth, rising linearly over all blocks from 0 to this rate.
      drop_path_endpoint: False ends one step short of the rate (Google's MaxViT).
      block_attention: False leaves the window attention out of the "M" blocks.
      init_scheme: scheme of the initialisers, "vit_eff" or "normal".
      conv_block: "mbconv" or "convnext".
      conv: fields of `MBConv` or `ConvNeXtBlock`.
      transformer: fields of `TransformerBlock` and the partition attention blocks.
    """

    image_size: int | tuple[int, int] = 224
    embed_dim: Sequence[int] = (96, 192, 384, 768)
    depths: Sequence[int] = (2, 3, 5, 2)
    block_types: Sequence[str | Sequence[str]] = ("C", "C", "T", "T")
    strides: Sequence[int] = (2, 2, 2, 2)
    stem_width: int | tuple[int, int] = 64
    stem_bias: bool | tuple[bool, bool] = False
    window_size: int | tuple[int, int] | None = None
    drop_path: float = 0.0
    drop_path_endpoint: bool = True
    block_attention: bool = True
    init_scheme: str = "vit_eff"
    conv_block: str = "mbconv"
    conv: Mapping[str, Any] = FrozenDict()
    transformer: Mapping[str, Any] = FrozenDict()

    @nn.nowrap
    def window(self) -> tuple[int, int]:
        """Height and width of the attention windows."""
        if self.window_size is not None:
            return pair(self.window_size)
        height, width = pair(self.image_size)
        ratio = 2 * math.prod(self.strides)
        return max(height // ratio, 1), max(width // ratio, 1)

    @nn.nowrap
    def num_features(self) -> int:
        """Feature maps that a call returns."""
        return 1 + len(self.depths)

    @nn.nowrap
    def validate(self) -> None:
        """Raises ValueError, one sentence, if the fields do not fit each other."""
        lengths = {len(self.embed_dim), len(self.depths), len(self.block_types), len(self.strides)}
        if len(lengths) != 1:
            raise ValueError("embed_dim, depths, block_types and strides need one entry for each stage")
        require_one_of(self.conv_block, "conv_block", _CONV_BLOCKS)
        require_one_of(self.init_scheme, "init_scheme", ("vit_eff", "normal"))
        for fields, block in ((self.conv, _CONV_BLOCKS[self.conv_block]), (self.transformer, _TransformerFields)):
            unknown = sorted(set(fields) - set(block.__dataclass_fields__))
            if unknown:
                raise ValueError(f"there is no field '{unknown[0]}' in {block.__name__.strip('_')}")
            for field in sorted(set(fields) & set(_CHOICES)):
                require_one_of(fields[field], field, _CHOICES[field])
        self._check_stages()
        self._check_size(pair(self.image_size), made_for=True)

    @nn.nowrap
    def _check_stages(self) -> None:
        """Raises ValueError unless all blocks are of a known kind and heads divide their attention's channels."""
        fields = _TransformerFields(1, **self.transformer, parent=None)
        before = pair(self.stem_width)[1]
        for stage, channels in enumerate(self.embed_dim):
            for kind in _kinds(self.block_types[stage], self.depths[stage]):
                require_one_of(kind, f"a block of stage {stage}", ("C", "T", "M", "PM"))
                if kind != "C":
                    width = before if kind == "T" and not fields.expand_first else channels
                    require_divisor(fields.head_dim, "channels per head", width, f"channels of stage {stage}")
                before = channels

    @nn.nowrap
    def _check_size(self, size: Sequence[int], made_for: bool = False) -> None:
        """Raises ValueError unless the windows divide the map of every stage that has them.

        Windows follow the size that the model is `made_for`, unless given; for other sizes they stay.
        """
        partitioned = [
            bool({"M", "PM"} & set(_kinds(*stage))) for stage in zip(self.block_types, self.depths, strict=True)
        ]
        for axis, (pixels, window) in enumerate(zip(size, self.window(), strict=True)):
            n = pixels // 2
            for stage, stride in enumerate(self.strides):
                n = -(-n // stride)
                if partitioned[stage] and n % window:
                    step = 2 * math.prod(self.strides) * (1 if made_for and self.window_size is None else window)
                    nearest = max(round(pixels / step), 1) * step
                    raise ValueError(
                        f"image {('height', 'width')[axis]} {pixels} gives a map of {n} pixels in stage {stage}, which "
                        f"windows of {window} do not divide; the nearest size that works is {nearest}"
                    )

    @nn.compact
    def __call__(self, x: Array, *, train: bool = False) -> list[Array]:
        """Maps images `[B, H, W, C]` to the stem's map and the map of every stage."""
        self._check_size(x.shape[1:3])
        conv_fields, fields = dict(self.conv), dict(self.transformer)
        conv_class = _CONV_BLOCKS[self.conv_block]
        like = conv_class(channels=1, **conv_fields, parent=None)  # the stem follows the convolution blocks
        x = Stem(
            pair(self.stem_width),
            (self.stem_bias, self.stem_bias) if isinstance(self.stem_bias, bool) else tuple(self.stem_bias),
            "layer" if self.conv_block == "convnext" else "batch",
            like.activation,
            like.epsilon,
            getattr(like, "padding", 1),
            self.init_scheme,
            name="stem",
        )(x, train=train)
        features = [x]
        rates = iter(drop_path_rates(self.drop_path, sum(self.depths), endpoint=self.drop_path_endpoint))
        for stage, depth in enumerate(self.depths):
            channels = self.embed_dim[stage]
            blocks = []
            for i, kind in enumerate(_kinds(self.block_types[stage], depth)):
                common = {"channels": channels, "drop_path": next(rates), "init_scheme": self.init_scheme}
                stride = self.strides[stage] if i == 0 else 1
                conv = functools.partial(conv_class, stride=stride, **common, **conv_fields)
                block: Callable[..., nn.Module]
                if kind == "C" and self.conv_block == "convnext":
                    # The reference leaves lone ConvNeXt blocks as PyTorch makes them.
                    block = functools.partial(conv, init_scheme="torch")
                elif kind == "C":
                    block = conv
                elif kind == "T":
                    block = functools.partial(TransformerBlock, stride=stride, **common, **fields)
                elif kind == "M":
                    attention = functools.partial(PartitionAttention, window=self.window(), **common, **fields)
                    block = functools.partial(MultiAxisBlock, conv, attention, self.block_attention)
                else:
                    attention = functools.partial(ParallelPartitionAttention, window=self.window(), **common, **fields)
                    convs = (conv, functools.partial(conv, stride=1))
                    block = functools.partial(ParallelMultiAxisBlock, convs, attention)
                blocks.append(block)
            x = Stage(blocks, name=f"stages_{stage}")(x, train=train)
            features.append(x)
        return features


def _kinds(types: str | Sequence[str], depth: int) -> list[str]:
    """The kinds of the `depth` blocks of a stage; the last one given is repeated."""
    types = [types] if isinstance(types, str) else list(types)
    return types[:depth] + types[-1:] * (depth - len(types))


_RW_CONV = {"expand_output": False, "output_bias": False, "activation": "silu"}
PRESETS: dict[str, dict[str, Any]] = {
    "plain": {"conv": {}, "transformer": {}},
    "rw_coat": {
        "conv": _RW_CONV | {"pre_norm_act": True, "stride_mode": "pool", "se_activation": "relu"},
        "transformer": {"expand_first": False},
    },
    "rw_max": {"conv": _RW_CONV | {"se_ratio": 0.0625}, "transformer": {"expand_first": False}},
    "next": {
        "conv_block": "convnext",
        "conv": {},
        "transformer": {"expand_first": False, "rel_pos_type": "mlp", "init_values": 1e-6},
    },
    "tf": {
        "conv": {"padding": "same", "activation": "gelu_tanh", "epsilon": 1e-3},
        "transformer": {"head_first": False, "rel_pos_type": "bias_tf", "activation": "gelu_tanh", "epsilon": 1e-5},
    },
}

_PICO, _NANO, _SMALL, _LARGE = (32, 64, 128, 256), (64, 128, 256, 512), (96, 192, 384, 768), (128, 256, 512, 1024)
_XLARGE = (192, 384, 768, 1536)
_M, _PM, _CT = ("M",) * 4, ("PM",) * 4, ("C", "C", "T", "T")


def _config(preset: str, embed_dim: Sequence[int], depths: Sequence[int], **fields: Any) -> dict[str, Any]:
    """A preset with differences; `conv` and `transformer` are merged field by field."""
    base = PRESETS[preset]
    merged = {key: base[key] | fields.pop(key, {}) for key in ("conv", "transformer")}
    return {**base, "embed_dim": embed_dim, "depths": depths, **fields, **merged}


def _coat(preset: str, embed_dim: Sequence[int], depths: Sequence[int], **fields: Any) -> dict[str, Any]:
    return _config(preset, embed_dim, depths, **({"stem_width": (embed_dim[0] // 3, embed_dim[0] // 3 * 2)} | fields))


def _max(preset: str, embed_dim: Sequence[int], depths: Sequence[int], **fields: Any) -> dict[str, Any]:
    return _config(preset, embed_dim, depths, **({"stem_width": (32, 64), "block_types": _M} | fields))


def _tf(embed_dim: Sequence[int], depths: Sequence[int], stem_width: int) -> dict[str, Any]:
    return _config("tf", embed_dim, depths, block_types=_M, stem_width=stem_width, stem_bias=True)


_MLP = {"rel_pos_type": "mlp"}
_DW = {"stride_mode": "dw"}
_DW_SILU = _DW | {"se_activation": "silu"}
_S32, _S64, _S96 = {"stem_width": (32, 64)}, {"stem_width": (64, 128)}, {"stem_width": (96, 192)}
_COAT_RMAX = {"output_bias": True, "se_ratio": 0.25}

# Every configuration with the image sizes that it is named for; the sizes' first is also the default.
CONFIGS: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    "coatnet_pico_rw": (_coat("rw_max", _NANO, (2, 3, 5, 2), conv=_COAT_RMAX, **_S32), (224,)),
    "coatnet_nano_rw": (
        _coat("rw_max", _NANO, (3, 4, 6, 3), conv=_COAT_RMAX | {"stride_mode": "pool"}, **_S32),
        (224,),
    ),
    "coatnet_0_rw": (
        _coat("rw_coat", _SMALL, (2, 3, 7, 2), conv={"se_early": True}, transformer={"shortcut_bias": False}),
        (224,),
    ),
    "coatnet_1_rw": (
        _coat("rw_coat", _SMALL, (2, 6, 14, 2), conv=_DW | {"se_early": True}, transformer={"shortcut_bias": False}),
        (224,),
    ),
    "coatnet_2_rw": (_coat("rw_coat", _LARGE, (2, 6, 14, 2), conv=_DW_SILU, **_S64), (224,)),
    "coatnet_3_rw": (
        _coat("rw_coat", _XLARGE, (2, 6, 14, 2), conv=_DW_SILU, transformer={"init_values": 1e-6}, **_S96),
        (224,),
    ),
    "coatnet_bn_0_rw": (
        _coat(
            "rw_coat",
            _SMALL,
            (2, 3, 7, 2),
            conv=_DW | {"se_early": True},
            transformer={"shortcut_bias": False, "norm": "batch"},
        ),
        (224,),
    ),
    "coatnet_rmlp_nano_rw": (
        _coat("rw_max", _NANO, (3, 4, 6, 3), conv=_COAT_RMAX, transformer=_MLP | {"rel_pos_dim": 384}, **_S32),
        (224,),
    ),
    "coatnet_rmlp_0_rw": (_coat("rw_coat", _SMALL, (2, 3, 7, 2), conv=_DW, transformer=_MLP), (224,)),
    "coatnet_rmlp_1_rw": (
        _coat(
            "rw_coat",
            _SMALL,
            (2, 6, 14, 2),
            conv={"pool_type": "max", "se_early": True},
            transformer=_MLP | {"shortcut_bias": False, "pool_type": "max", "rel_pos_dim": 384},
        ),
        (224,),
    ),
    "coatnet_rmlp_1_rw2": (_coat("rw_coat", _SMALL, (2, 6, 14, 2), conv=_DW, transformer=_MLP), (224,)),
    "coatnet_rmlp_2_rw": (
        _coat("rw_coat", _LARGE, (2, 6, 14, 2), conv=_DW_SILU, transformer=_MLP | {"init_values": 1e-6}, **_S64),
        (224, 384),
    ),
    "coatnet_rmlp_3_rw": (
        _coat("rw_coat", _XLARGE, (2, 6, 14, 2), conv=_DW_SILU, transformer=_MLP | {"init_values": 1e-6}, **_S96),
        (224,),
    ),
    "coatnet_nano_cc": (
        _coat("rw_coat", _NANO, (3, 4, 6, 3), block_types=("C", "C", ("C", "T"), ("C", "T")), **_S32),
        (224,),
    ),
    "coatnext_nano_rw": (
        _coat(
            "next",
            _NANO,
            (3, 4, 6, 3),
            init_scheme="normal",
            conv={"init_values": 1e-5},
            transformer={"rel_pos_type": "bias", "init_values": None},
            **_S32,
        ),
        (224,),
    ),
    "coatnet_0": (_config("plain", _SMALL, (2, 3, 5, 2)), (224,)),
    "coatnet_1": (_config("plain", _SMALL, (2, 6, 14, 2)), (224,)),
    "coatnet_2": (_config("plain", _LARGE, (2, 6, 14, 2), stem_width=128), (224,)),
    "coatnet_3": (_config("plain", _XLARGE, (2, 6, 14, 2), stem_width=192), (224,)),
    "coatnet_4": (_config("plain", _XLARGE, (2, 12, 28, 2), stem_width=192), (224,)),
    "coatnet_5": (_config("plain", (256, 512, 1280, 2048), (2, 12, 28, 2), stem_width=192), (224,)),
    "maxvit_pico_rw": (_max("rw_max", _PICO, (2, 2, 5, 2), stem_width=(24, 32)), (256,)),
    "maxvit_nano_rw": (_max("rw_max", _NANO, (1, 2, 3, 1)), (256,)),
    "maxvit_tiny_rw": (_max("rw_max", _NANO, (2, 2, 5, 2)), (224, 256)),
    "maxvit_tiny_pm": (_max("rw_max", _NANO, (2, 2, 5, 2), block_types=_PM), (256,)),
    "maxvit_rmlp_pico_rw": (
        _max("rw_max", _PICO, (2, 2, 5, 2), stem_width=(24, 32), transformer=_MLP),
        (256,),
    ),
    "maxvit_rmlp_nano_rw": (_max("rw_max", _NANO, (1, 2, 3, 1), transformer=_MLP), (256,)),
    "maxvit_rmlp_tiny_rw": (_max("rw_max", _NANO, (2, 2, 5, 2), transformer=_MLP), (256,)),
    "maxvit_rmlp_small_rw": (
        _max("rw_max", _SMALL, (2, 2, 5, 2), transformer=_MLP | {"init_values": 1e-6}),
        (224, 256),
    ),
    "maxvit_rmlp_base_rw": (_max("rw_max", _SMALL, (2, 6, 14, 2), transformer=_MLP), (224, 384)),
    "maxxvit_rmlp_nano_rw": (_max("next", _NANO, (1, 2, 3, 1), init_scheme="normal"), (256,)),
    "maxxvit_rmlp_tiny_rw": (_max("next", _NANO, (2, 2, 5, 2)), (256,)),
    "maxxvit_rmlp_small_rw": (_max("next", _SMALL, (2, 2, 5, 2), stem_width=(48, 96)), (256,)),
    "maxxvitv2_nano_rw": (
        _max(
            "next",
            _SMALL,
            (1, 2, 3, 1),
            stem_width=(48, 96),
            init_scheme="normal",
            block_attention=False,
            transformer={"rel_pos_type": "bias"},
        ),
        (256,),
    ),
    "maxxvitv2_rmlp_base_rw": (
        _max("next", _LARGE, (2, 6, 12, 2), stem_width=(64, 128), block_attention=False),
        (224, 384),
    ),
    "maxxvitv2_rmlp_large_rw": (
        _max("next", (160, 320, 640, 1280), (2, 6, 16, 2), stem_width=(80, 160), block_attention=False),
        (224,),
    ),
    "maxvit_tiny_tf": (_tf(_NANO, (2, 2, 5, 2), 64), (224, 384, 512)),
    "maxvit_small_tf": (_tf(_SMALL, (2, 2, 5, 2), 64), (224, 384, 512)),
    "maxvit_base_tf": (_tf(_SMALL, (2, 6, 14, 2), 64), (224, 384, 512)),
    "maxvit_large_tf": (_tf(_LARGE, (2, 6, 14, 2), 128), (224, 384, 512)),
    "maxvit_xlarge_tf": (_tf(_XLARGE, (2, 6, 14, 2), 192), (224, 384, 512)),
}

VARIANTS: dict[str, functools.partial[MaxxViT]] = {
    f"{name}_{size}": functools.partial(MaxxViT, image_size=size, **fields)
    for name, (fields, sizes) in CONFIGS.items()
    for size in sizes
} | {
    "test_maxvit": functools.partial(
        MaxxViT, image_size=160, **_max("rw_max", (32, 64, 96, 128), (1, 1, 1, 1), stem_width=(16, 32))
    ),
    "test_coatnet": functools.partial(
        MaxxViT,
        image_size=160,
        **_coat(
            "rw_max",
            (32, 64, 96, 128),
            (1, 1, 2, 1),
            conv=_COAT_RMAX | {"stride_mode": "pool"},
            stem_width=(16, 32),
        ),
    ),
    # torchvision's MaxViT-T, another graph than timm's and Google's.
    "maxvit_t": functools.partial(
        MaxxViT,
        image_size=224,
        **_config(
            "plain",
            _NANO,
            (2, 2, 5, 2),
            block_types=_M,
            stem_bias=(False, True),
            init_scheme="normal",
            conv={"pool_type": "avg3", "always_expand": True, "epsilon": 1e-3},
            transformer={"head_first": False, "scale_by_width": True, "epsilon": 1e-5},
        ),
    ),
    # Ours, for images of about 32 pixels (digits, CIFAR): two stages, maps of 8 and 4 pixels.
    "maxvit_mini_32": functools.partial(
        MaxxViT,
        image_size=32,
        window_size=4,
        strides=(2, 2),
        **_config(
            "tf",
            (32, 96),
            (1, 2),
            block_types=("M", "M"),
            stem_width=(24, 32),
            stem_bias=True,
            transformer={"head_dim": 16},
        ),
    ),
}
