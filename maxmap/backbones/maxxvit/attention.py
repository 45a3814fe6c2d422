"""Attention over a whole map, inside of windows and inside of grid cells, and the blocks that are made of it."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import linen as nn

from maxmap.backbones.maxxvit.convolution import LayerScale, Shortcut, layer_or_batch_norm, pool
from maxmap.fused import attends_in_maps, fuses_attention, map_attention
from maxmap.layers.blocks import Mlp, relative_index
from maxmap.layers.padding import divides, next_multiple, pad_map, real_pixels
from maxmap.layers.parameters import parameter
from maxmap.layers.primitives import (
    Block,
    Conv,
    DropPath,
    Initializer,
    LayerNorm,
    Linear,
    trunc_normal_02,
    xavier_uniform,
)
from maxmap.layers.residual import residual_attention, residual_mlp
from maxmap.operations import Array, attention, scaled
from maxmap.ranges import Count, DropRate, NonNegative, Positive


@dataclass(frozen=True)
class TransformerFields:
    """What all attention blocks of a backbone have in common.

    Attributes:
      head_dim: channels per head.
      head_first: the output of the fused qkv projection is ordered (heads, qkv, head_dim), otherwise (qkv, heads,
        head_dim).
      scale_by_width: divides the logits by the root of all heads' channels, as torchvision does, instead of one head's.
      expand_first: a block that changes the channels attends in the output channels, otherwise in the input channels.
      shortcut_bias: bias of the shortcut's 1x1 convolution.
      pool_type: of a block with stride, see `pool`.
      rel_pos_type: see `RelativePositionBias`.
      rel_pos_dim: see `RelativePositionBias`.
      init_values: initial layer scale; None for no layer scale.
      activation: of the MLP.
      norm: "layer" or "batch", of the blocks that attend over the whole map.
      epsilon: of the norms.
      attn_drop: dropout of the attention probabilities.
      proj_drop: dropout of the projections.
    """

    head_dim: Count = 32
    head_first: bool = True
    scale_by_width: bool = False
    expand_first: bool = True
    shortcut_bias: bool = True
    pool_type: str = "avg2"
    rel_pos_type: str = "bias"
    rel_pos_dim: Count = 512
    init_values: NonNegative | None = None
    activation: str = "gelu"
    norm: str = "layer"
    epsilon: Positive = 1e-6
    attn_drop: DropRate = 0.0
    proj_drop: DropRate = 0.0


def linear_inits(scheme: str, mlp: bool = False) -> dict[str, Initializer]:
    """Returns the initialisers of a linear map by scheme, "vit_eff" or "normal".

    Args:
      scheme: of the backbone.
      mlp: the linear map belongs to an MLP, whose biases start at tiny random values with "vit_eff".
    """
    zeros = nn.initializers.zeros
    if scheme == "vit_eff":
        return {"kernel_init": xavier_uniform, "bias_init": nn.initializers.normal(1e-6) if mlp else zeros}
    return {"kernel_init": nn.initializers.normal(0.02), "bias_init": zeros}


class RelativePositionBias(nn.Module):
    """Bias of the attention logits that depends on the offset between query and key.

    Attributes:
      window: height and width.
      heads: of the attention.
      kind: "bias" for a table `[(2h-1)(2w-1), heads]`, "bias_tf" for a table `[heads, 2h-1, 2w-1]` that is read at
        key - query, "mlp" for a small MLP of the offset on a logarithmic scale (Liu et al. 2022, Swin V2).
      hidden: width of that MLP.
      init_scheme: see `linear_inits`.
    """

    window: tuple[int, int]
    heads: int
    kind: str
    hidden: int
    init_scheme: str

    @nn.compact
    def __call__(self, *, train: bool) -> Array:
        """Returns `[heads, N, N]` (query, key), N = height * width in row-major order."""
        h, w = self.window
        dy, dx = relative_index(self.window)
        if self.kind == "mlp":
            offsets = np.stack(np.meshgrid(np.arange(1.0 - h, h), np.arange(1.0 - w, w), indexing="ij"), -1)
            spaced = jnp.asarray(np.sign(offsets) * np.log1p(np.abs(offsets)))  # [2h-1, 2w-1, 2]
            inits = linear_inits(self.init_scheme, mlp=True)
            # timm has this dropout in the code, not in a field.
            mlp = Mlp(self.hidden, self.heads, "relu", inits, hidden_dropout=0.125, name="mlp")
            return rearrange(mlp(spaced, train=train)[dy, dx], "q k h -> h q k")
        if self.kind == "bias":
            flat = ((2 * h - 1) * (2 * w - 1), self.heads)
            table = parameter(self, "relative_position_bias_table", trunc_normal_02, flat)
            return rearrange(table[dy * (2 * w - 1) + dx], "q k h -> h q k")
        shape = (self.heads, 2 * h - 1, 2 * w - 1)
        table = parameter(self, "relative_position_bias_table", nn.initializers.normal(0.02), shape)
        return table[:, 2 * h - 2 - dy, 2 * w - 2 - dx]


class WindowAttention(nn.Module):
    """Multi-head self-attention inside of windows, with a relative position bias.

    Attributes:
      channels: output channels.
      width: of queries, keys and values, over all heads together.
      window: height and width; a window has N = height * width tokens.
      fields: of the backbone.
      init_scheme: see `linear_inits`.
      layer: `Linear`, or `Conv` where the reference keeps 4-d weights.
      head_first: see `TransformerFields`; None for what stands there.
    """

    channels: int
    width: int
    window: tuple[int, int]
    fields: TransformerFields
    init_scheme: str
    layer: Callable[..., nn.Module] = Linear
    head_first: bool | None = None

    @nn.compact
    def __call__(
        self,
        x: Array,
        *,
        train: bool,
        compute: Callable[[dict[str, Array | None]], Array] | None = None,
        kind: str | None = None,
    ) -> Array:
        """Maps windows `[B, windows, N, C]` to `[B, windows, N, channels]`; or `compute` does it, given the weights.

        With the kind of its windows, "window" or "grid", `x` is a map `[B, H, W, C]`, and so is what is returned. A map
        that windows do not divide is padded for the attention, which leaves the padding out.
        """
        fields, inits = self.fields, linear_inits(self.init_scheme)
        heads = self.width // fields.head_dim
        head_first = fields.head_first if self.head_first is None else self.head_first
        order = "h three d" if head_first else "three h d"
        qkv_layer = self.layer(3 * self.width, name="qkv", **inits)
        proj = self.layer(self.channels, name="proj", **inits)
        bias = RelativePositionBias(
            self.window, heads, fields.rel_pos_type, fields.rel_pos_dim, self.init_scheme, name="rel_pos"
        )(train=train)
        if compute is not None:
            return compute(self._weights(qkv_layer, proj, x.shape[-1], order) | {"bias": bias})
        if kind is not None and self._reads_maps(x, train):
            x = map_attention(qkv_layer(x), bias, kind, self.window, heads, head_first, self.scale())
            return nn.Dropout(fields.proj_drop)(proj(x), deterministic=not train)
        size, keys = x.shape[1:3], None
        padded = size if kind is None else next_multiple(size, self.window)
        if kind is not None:
            x = partition(pad_map(x, padded), kind, self.window)
        if kind is not None and padded != size:
            keys = partition(real_pixels(size, padded), kind, self.window)[0, :, :, 0]  # [windows, N]
        q, k, v = rearrange(qkv_layer(x), f"b w n ({order}) -> three b w h n d", three=3, h=heads)
        dropout = nn.Dropout(fields.attn_drop, deterministic=False)
        x = rearrange(
            attention(q * self.scale(), k, v, bias, dropout if train and fields.attn_drop else None, keys),
            "b w h n d -> b w n (h d)",
        )
        x = nn.Dropout(fields.proj_drop)(proj(x), deterministic=not train)
        return x if kind is None else departition(x, kind, self.window, padded)[:, : size[0], : size[1]]

    @nn.nowrap
    def _reads_maps(self, x: Array, train: bool) -> bool:
        """Whether a kernel attends inside of a map's windows."""
        return (
            divides(self.window, x.shape[1:3])
            and not (train and self.fields.attn_drop)
            and attends_in_maps(x, self.window)
        )

    @nn.nowrap
    def fuses(self, x: Array, *, train: bool) -> bool:
        """Whether a kernel can compute the attention together with what stands around it, see `residual_attention`."""
        fields = self.fields
        dropped = train and (fields.attn_drop or fields.proj_drop)
        return not dropped and divides(self.window, x.shape[1:3]) and fuses_attention(x, self.window, fields.head_dim)

    @nn.nowrap
    def residual(
        self, x: Array, norm: LayerNorm, kind: str, drop_path: float, *, train: bool, gamma: Array | None
    ) -> Array:
        """Computes x + DropPath(gamma * attention(norm(x))) of a map in one kernel, see `residual_attention`."""
        heads = self.width // self.fields.head_dim
        return residual_attention(
            x, norm, self, kind, self.window, heads, self.scale(), drop_path, train=train, gamma=gamma
        )

    @nn.nowrap
    def scale(self) -> float:
        """Returns the factor of the queries."""
        return (self.width if self.fields.scale_by_width else self.fields.head_dim) ** -0.5

    @nn.nowrap
    def _weights(self, qkv: nn.Module, proj: nn.Module, channels: int, order: str) -> dict[str, Array | None]:
        """Returns the weights of the projections as `fused.attention_block` takes them."""
        kernel, bias = qkv.weights(channels)
        sizes = {"three": 3, "d": self.fields.head_dim}
        proj_kernel, proj_bias = proj.weights(self.width)
        return {
            "qkv_kernel": rearrange(kernel.reshape(kernel.shape[-2:]), f"c ({order}) -> c three (h d)", **sizes),
            "qkv_bias": rearrange(bias, f"({order}) -> three (h d)", **sizes),
            "proj_kernel": proj_kernel.reshape(proj_kernel.shape[-2:]),
            "proj_bias": proj_bias,
        }


class NormPool(nn.Module):
    """A norm, then pooling: what the reference calls the first norm of a block with stride.

    Attributes:
      kind: "layer" or "batch".
      epsilon: of the norm.
      pool_type: see `pool`.
    """

    kind: str
    epsilon: float
    pool_type: str

    @nn.compact
    def __call__(self, x: Array, *, train: bool) -> Array:
        return pool(layer_or_batch_norm(x, self.kind, self.epsilon, "norm", train), self.pool_type)


def _mlp(channels: int, fields: TransformerFields, scheme: str, layer: Callable[..., nn.Module], dropout: float) -> Mlp:
    """Returns the MLP of an attention block, a submodule of the caller; `dropout` is that of its output."""
    return Mlp(
        4 * channels,
        channels,
        fields.activation,
        linear_inits(scheme, mlp=True),
        layer=layer,
        hidden_dropout=fields.proj_drop,
        dropout=dropout,
        name="mlp",
    )


def _gamma(channels: int, initial: float | None, name: str) -> Array | None:
    """Returns the factors of a layer scale, a submodule of the caller, unless its initial value is None."""
    return None if initial is None else LayerScale(initial, name=name).weights(channels)


def _scale(x: Array, gamma: Array | None) -> Array:
    return x if gamma is None else scaled(x, gamma)


class TransformerBlock(Block):
    """Attention over the whole map and an MLP: CoAtNet's block.

    Attributes:
      channels: output channels.
      fields: of the backbone.
      stride: 1 or 2.
      drop_path: rate of dropping each residual branch.
      init_scheme: see `linear_inits`.
    """

    channels: int
    fields: TransformerFields
    stride: int = 1
    drop_path: float = 0.0
    init_scheme: str = "vit_eff"

    @nn.compact
    def __call__(self, x: Array, *, train: bool = False) -> Array:
        fields = self.fields
        width = self.channels if fields.expand_first else x.shape[-1]
        shortcut = Shortcut(
            self.channels,
            self.stride,
            fields.pool_type,
            fields.shortcut_bias,
            linear_inits(self.init_scheme),
            name="shortcut",
        )(x)
        size = shortcut.shape[1:3]
        # The reference does not pass `head_first` on to this block: its order is always head-first.
        attention = WindowAttention(
            self.channels, width, size, fields, self.init_scheme, layer=Conv, head_first=True, name="attn"
        )
        gamma = functools.partial(_gamma, self.channels, fields.init_values)
        layer_norms, same = fields.norm == "layer", self.stride == 1 and x.shape[-1] == self.channels
        if same and layer_norms and attention.fuses(x, train=train):
            norm = LayerNorm(fields.epsilon, name="norm1")
            x = attention.residual(x, norm, "window", self.drop_path, train=train, gamma=gamma("ls1"))
        else:
            if self.stride == 2:
                x = NormPool(fields.norm, fields.epsilon, fields.pool_type, name="norm1")(x, train=train)
            else:
                x = layer_or_batch_norm(x, fields.norm, fields.epsilon, "norm1", train)
            x = attention(rearrange(x, "b h w c -> b 1 (h w) c"), train=train)
            x = rearrange(x, "b 1 (h w) c -> b h w c", h=size[0])
            x = shortcut + DropPath(self.drop_path)(_scale(x, gamma("ls1")), train=train)
        mlp = _mlp(self.channels, fields, self.init_scheme, Conv, 0.0)
        if layer_norms:
            norm = LayerNorm(fields.epsilon, name="norm2")
            return residual_mlp(x, norm, mlp, self.drop_path, train=train, gamma=gamma("ls2"))
        y = mlp(layer_or_batch_norm(x, fields.norm, fields.epsilon, "norm2", train), train=train)
        return x + DropPath(self.drop_path)(_scale(y, gamma("ls2")), train=train)


_PARTITIONS = {
    # A window holds neighbours; a grid cell holds pixels at equal distances over the whole map.
    "window": "b (i p) (j q) c -> b (i j) (p q) c",
    "grid": "b (p i) (q j) c -> b (i j) (p q) c",
}


def partition(x: Array, kind: str, window: tuple[int, int]) -> Array:
    """Splits a map `[B, H, W, C]` into windows or grid cells `[B, windows, N, C]`.

    Args:
      x: the map.
      kind: "window" or "grid".
      window: height and width, of N = height * width pixels.
    """
    return rearrange(x, _PARTITIONS[kind], p=window[0], q=window[1])


def departition(x: Array, kind: str, window: tuple[int, int], size: Sequence[int]) -> Array:
    """Undoes `partition`; `size` is the height and width of the map."""
    split, whole = _PARTITIONS[kind].split(" -> ")[::-1]
    (p, q), (height, width) = window, size
    return rearrange(x, f"{split} -> {whole}", p=p, q=q, i=height // p, j=width // q)


class PartitionAttention(nn.Module):
    """Attention inside of windows, of grid cells, or of both side by side, and an MLP.

    Attributes:
      channels: output channels.
      fields: of the backbone.
      window: height and width of a window and of a grid cell.
      attentions: pairs of a name and a kind, "window" or "grid". Two of them make half of the output channels each.
      drop_path: rate of dropping each residual branch.
      init_scheme: see `linear_inits`.
    """

    channels: int
    fields: TransformerFields
    window: tuple[int, int]
    attentions: Sequence[tuple[str, str]]
    drop_path: float = 0.0
    init_scheme: str = "vit_eff"

    @nn.compact
    def __call__(self, x: Array, *, train: bool = False) -> Array:
        fields = self.fields
        norm = LayerNorm(fields.epsilon, name="norm1")
        gamma = functools.partial(_gamma, self.channels, fields.init_values)
        attentions = [
            WindowAttention(
                self.channels // len(self.attentions), self.channels, self.window, fields, self.init_scheme, name=name
            )
            for name, _ in self.attentions
        ]
        kinds = [kind for _, kind in self.attentions]
        if len(kinds) == 1 and attentions[0].fuses(x, train=train):
            x = attentions[0].residual(x, norm, kinds[0], self.drop_path, train=train, gamma=gamma("ls1"))
        else:
            y, parts = norm(x), []
            for attention, kind in zip(attentions, kinds, strict=True):
                parts.append(attention(y, train=train, kind=kind))
            y = parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=-1)
            x = x + DropPath(self.drop_path)(_scale(y, gamma("ls1")), train=train)
        norm = LayerNorm(fields.epsilon, name="norm2")
        mlp = _mlp(self.channels, fields, self.init_scheme, Linear, fields.proj_drop)
        return residual_mlp(x, norm, mlp, self.drop_path, train=train, gamma=gamma("ls2"))


class MultiAxisBlock(Block):
    """Convolution blocks and then attention blocks, one after another: MaxViT's block.

    Attributes:
      parts: each makes one of those blocks.
    """

    parts: Sequence[Callable[[], nn.Module]]

    @nn.compact
    def __call__(self, x: Array, *, train: bool = False) -> Array:
        for part in self.parts:
            x = part()(x, train=train)
        return x
