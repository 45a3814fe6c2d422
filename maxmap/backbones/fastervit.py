"""FasterViT: convolution stages, then window attention with carrier tokens (Hatamizadeh et al. 2023).

The license of the published code forbids commercial use, so this file was written from the paper and from a description
of what the code computes. Parameters have the author's names, so that his checkpoints can be read. The position tables,
which his code keeps in buffers, are computed at every call.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import linen as nn

from maxmap.backbones import Variant
from maxmap.layers.blocks import Mlp, SelfAttention, relative_index
from maxmap.layers.padding import pad_map, real_pixels
from maxmap.layers.parameters import parameter
from maxmap.layers.primitives import (
    ACTIVATIONS,
    TRUNC_NORMAL,
    BatchNorm,
    Block,
    Conv,
    DropPath,
    LayerNorm,
    Linear,
    average_pool,
    drop_path_rates,
    pair,
    require_divisor,
)
from maxmap.operations import Array, scaled, upcast
from maxmap.ranges import Count, CountOrZero, DropRate, NonNegative, Pixels, Positive

_HIDDEN = 512  # width of the MLPs of the position tables


class ConvPatchEmbed(nn.Module):
    """Two 3x3 convolutions with stride 2, each with its norm and ReLU.

    Attributes:
      hidden: channels of the first convolution.
      channels: of the second.
    """

    hidden: int
    channels: int

    @nn.compact
    def __call__(self, x: Array, *, train: bool) -> Array:
        for conv, channels in ((0, self.hidden), (3, self.channels)):
            x = Conv(channels, 3, stride=2, padding=1, bias=False, name=f"conv_down_{conv}")(x)
            x = nn.relu(BatchNorm(1e-4, name=f"conv_down_{conv + 1}")(x, train=train))
        return x


class Downsample(nn.Module):
    """Halves the map and doubles its channels by a LayerNorm and a 3x3 convolution with stride 2."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = LayerNorm(1e-6, name="norm")(x)
        return Conv(2 * x.shape[-1], 3, stride=2, padding=1, bias=False, name="reduction_0")(x)


class ConvBlock(Block):
    """Two 3x3 convolutions with norms and a GELU between them, in a residual branch; no activation after the sum.

    Attributes:
      drop_path: rate of dropping the branch.
    """

    drop_path: float

    @nn.compact
    def __call__(self, x: Array, *, train: bool) -> Array:
        conv = functools.partial(Conv, x.shape[-1], 3, padding=1)
        y = BatchNorm(name="norm1")(conv(name="conv1")(x), train=train)
        y = BatchNorm(name="norm2")(conv(name="conv2")(ACTIVATIONS["gelu"](y)), train=train)
        return x + DropPath(self.drop_path)(y, train=train)


class ConvLevel(nn.Module):
    """Convolution blocks and the downsampling.

    Attributes:
      rates: drop path rate of each block.
    """

    rates: Sequence[float]

    @nn.compact
    def __call__(self, x: Array, *, train: bool) -> Array:
        for i, rate in enumerate(self.rates):
            x = ConvBlock(rate, name=f"blocks_{i}")(x, train=train)
        return Downsample(name="downsample")(x)


class _PositionMlp(nn.Module):
    """A small MLP of coordinates, as in Swin V2 (Liu et al. 2022).

    Attributes:
      channels: output channels.
    """

    channels: int

    def mlp(self, coordinates: np.ndarray) -> Array:
        """Maps `[..., 2]` to `[..., channels]`, in the type of the coordinates and not of the model."""
        x = Linear(_HIDDEN, name="cpb_mlp_0", **TRUNC_NORMAL)(jnp.asarray(coordinates))
        return Linear(self.channels, bias=False, name="cpb_mlp_2", **TRUNC_NORMAL)(nn.relu(x))


class PositionCode(_PositionMlp):
    """Position code that is added to the tokens of a square, computed from their coordinates.

    Attributes:
      channels: of the tokens.
      side: of the square; at least 2.
    """

    side: int

    @nn.compact
    def __call__(self) -> Array:
        """Returns `[N, channels]`, N = side * side in row-major order."""
        half = self.side // 2
        y, x = np.divmod(np.arange(self.side**2), self.side)
        return self.mlp((np.stack([y, x], axis=-1) - half) / half)


class PositionBias(_PositionMlp):
    """Bias of the attention logits of a square's tokens, computed from the offset between query and key.

    Attributes:
      channels: heads of the attention.
      side: of the square; at least 2.
      carriers: number of tokens before the square's own; their queries and keys get no bias.
    """

    side: int
    carriers: int = 0

    @nn.compact
    def __call__(self) -> Array:
        """Returns `[heads, N, N]` (query, key), N = carriers + side * side."""
        dy, dx = relative_index((self.side, self.side))
        table = self.mlp(self.offsets())  # [2 side - 1, 2 side - 1, heads]
        bias = rearrange(16 * nn.sigmoid(table)[dy, dx], "q k h -> h q k")
        return jnp.pad(bias, [(0, 0), (self.carriers, 0), (self.carriers, 0)])

    def offsets(self) -> np.ndarray:
        """Returns the scaled logarithm of every offset (dy, dx), `[2 side - 1, 2 side - 1, 2]`."""
        # In float32 as in the reference, even if the model computes in float64: the weights were trained with it.
        steps = np.arange(1 - self.side, self.side, dtype=np.float32) / np.float32(self.side - 1)
        steps = np.sign(steps) * np.log2(np.abs(steps * 8) + 1) / np.log2(np.float32(8))
        return np.stack(np.meshgrid(steps, steps, indexing="ij"), axis=-1)


class AttentionBlock(Block):
    """Attention and an MLP inside of windows, after the same for the carrier tokens of all windows, if there are any.

    Attributes:
      heads: of the attention.
      windows: per side of the map.
      window: side of a window, in pixels.
      carriers: side of a window's square of carrier tokens; 0 for none.
      mlp_ratio: hidden channels of the MLPs divided by the map's channels.
      layer_scale: initial factor of every residual branch; None for no factors.
      drop_path: rate of dropping each residual branch: per window, or per image for the carriers' own branches.
      propagate: adds every window's carriers to its pixels at the end.
    """

    heads: int
    windows: int
    window: int
    carriers: int
    mlp_ratio: float
    layer_scale: float | None
    drop_path: float
    propagate: bool

    @nn.compact
    def __call__(
        self, x: Array, tokens: Array | None, keys: Array | None, token_keys: Array | None, *, train: bool
    ) -> tuple[Array, Array | None]:
        """Maps the pixels of the windows and the carrier tokens of the map.

        Args:
          x: `[B * windows^2, window^2, C]`.
          tokens: `[B, (carriers * windows)^2, C]`, row by row over the whole map; None without carriers.
          keys: which of the carriers and pixels of a window are not padding, bool `[windows^2, carriers^2 + window^2]`;
            None for all.
          token_keys: the same of the map's carriers, `[1, (carriers * windows)^2]`.
          train: drops paths.

        Returns:
          The same two.
        """
        channels = x.shape[-1]
        gammas: dict[int, Array] = {}
        if self.layer_scale is not None:
            initial = nn.initializers.constant(self.layer_scale)
            for i in (1, 2, 3, 4) if self.carriers else (3, 4):
                gammas[i] = parameter(self, f"gamma{i}", initial, (channels,))

        def layer_scale(y: Array, gamma: int) -> Array:
            return scaled(y, gammas[gamma]) if gammas else y

        def transform(x: Array, prefix: str, side: int, carriers: int, keys: Array | None, gamma: int) -> Array:
            """A transformer block on `carriers` carrier tokens and the `side * side` tokens of a square."""
            bias = functools.partial(PositionBias, self.heads, side, carriers, name="pos_emb_funct")
            attention = SelfAttention(self.heads, TRUNC_NORMAL, bias, name=f"{prefix}attn")
            mlp = Mlp(int(self.mlp_ratio * channels), channels, inits=TRUNC_NORMAL, name=f"{prefix}mlp")
            branches: tuple[Callable[..., Array], ...] = (lambda x, train: attention(x, train=train, keys=keys), mlp)
            for i, branch in enumerate(branches):
                y = branch(LayerNorm(1e-5, name=f"{prefix}norm{i + 1}")(x), train=train)
                x = x + DropPath(self.drop_path)(layer_scale(y, gamma + i), train=train)
            return x

        x = x + PositionCode(channels, self.window, name="pos_embed")()[None].astype(x.dtype)
        count = self.carriers**2
        axes = {"i": self.windows, "j": self.windows, "s": self.carriers, "u": self.carriers}
        if tokens is not None:
            side = self.carriers * self.windows
            tokens = tokens + PositionCode(channels, side, name="hat_pos_embed")()[None].astype(x.dtype)
            tokens = transform(tokens, "hat_", side, 0, token_keys, gamma=1)
            tokens = rearrange(tokens, "b (i s j u) c -> (b i j) (s u) c", **axes)
            x = jnp.concatenate([tokens, x], axis=1)
        x = transform(x, "", self.window, count, keys, gamma=3)
        if tokens is None:
            return x, None
        tokens, x = x[:, :count], x[:, count:]
        if self.propagate:
            nearest = np.arange(self.window) * self.carriers // self.window
            carried = rearrange(upcast(tokens), "b (s u) c -> b s u c", s=self.carriers)[:, nearest][:, :, nearest]
            # The reference reuses the factor of the carriers' attention here.
            x = (upcast(x) + layer_scale(rearrange(carried, "b p q c -> b (p q) c"), gamma=1)).astype(x.dtype)
        return x, rearrange(tokens, "(b i j) (s u) c -> b (i s j u) c", **axes)


class Tokenizer(nn.Module):
    """Computes carrier tokens from a map: a depthwise convolution, then averages over squares that may overlap.

    Attributes:
      side: tokens per side of the square map.
      size: side of that map in pixels; what is outside of the map at hand counts in no average.
    """

    side: int
    size: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Maps `[B, H, W, C]` to `[B, side^2, C]`, row by row."""
        channels = x.shape[-1]
        x = Conv(channels, 3, padding=1, groups=channels, name="pos_embed")(x)
        stride = self.size // self.side
        square = self.size - (self.side - 1) * stride
        # Squares that lie outside of the map have no mean; the last ones on it may stick out.
        squares = [min(-(-n // stride), self.side) for n in x.shape[1:3]]
        over = [(0, (count - 1) * stride + square - n) for count, n in zip(squares, x.shape[1:3], strict=True)]
        x = pad_map(average_pool(x, square, stride, over), (self.side, self.side))
        return rearrange(x, "b h w c -> b (h w) c")


class AttentionLevel(nn.Module):
    """Attention blocks on the windows of a map, then a downsampling in all levels but the last.

    Attributes:
      rates: drop path rate of each block.
      windows: per side of the map; a single window has no carriers.
      carriers: side of a window's square of carrier tokens; 0 for none.
      propagate: adds the carriers to the pixels at the end of the last block.
      downsample: ends with half the size and twice the channels.
      heads, mlp_ratio, layer_scale: see `AttentionBlock`.
    """

    rates: Sequence[float]
    windows: int
    carriers: int
    propagate: bool
    downsample: bool
    heads: int
    mlp_ratio: float
    layer_scale: float | None

    @nn.compact
    def __call__(self, x: Array, *, train: bool) -> Array:
        """Maps `[B, H, W, C]` to the same, or to half the size and twice the channels.

        A map that the windows do not divide, or that is not square, is padded for the attention, which leaves the
        padding out.
        """
        carriers = self.carriers if self.windows > 1 else 0
        size = x.shape[1:3]
        window = max(-(-max(size) // self.windows), least_window(carriers))
        side = self.windows * window
        tokens = Tokenizer(carriers * self.windows, side, name="global_tokenizer")(x) if carriers else None
        keys, token_keys = None, None
        if size != (side, side):
            keys, token_keys = real_keys(size, self.windows, window, carriers)
        axes = {"i": self.windows, "j": self.windows, "p": window, "q": window}
        x = rearrange(pad_map(x, (side, side)), "b (i p) (j q) c -> (b i j) (p q) c", **axes)
        block = functools.partial(
            AttentionBlock, self.heads, self.windows, window, carriers, self.mlp_ratio, self.layer_scale
        )
        for i, rate in enumerate(self.rates):
            propagate = self.propagate and i == len(self.rates) - 1
            x, tokens = block(rate, propagate, name=f"blocks_{i}")(x, tokens, keys, token_keys, train=train)
        x = rearrange(x, "(b i j) (p q) c -> b (i p) (j q) c", **axes)[:, : size[0], : size[1]]
        return Downsample(name="downsample")(x) if self.downsample else x


def least_window(carriers: int) -> int:
    """Returns the least side of a window, in pixels: position codes need two, and carriers one for each of them."""
    return max(2, carriers)


def real_keys(size: Sequence[int], windows: int, window: int, carriers: int) -> tuple[Array, Array]:
    """Returns which keys of the windows and of the map's carriers are not padding; see `AttentionBlock`.

    Args:
      size: height and width of the map, without its padding.
      windows: per side of the padded map.
      window: side of a window, in pixels.
      carriers: side of a window's square of carrier tokens; 0 for none.
    """
    side = windows * window
    axes = {"i": windows, "j": windows}
    keys = rearrange(real_pixels(size, (side, side)), "1 (i p) (j q) 1 -> (i j) (p q)", **axes)
    tokens = jnp.zeros((1, 0), bool)
    if carriers:
        # A carrier is the mean of a square; it counts if the square's first pixel does.
        stride = side // (carriers * windows)
        real = real_pixels([-(-n // stride) for n in size], (carriers * windows,) * 2)
        tokens = real.reshape(1, -1)
        keys = jnp.concatenate([rearrange(real, "1 (i s) (j u) 1 -> (i j) (s u)", **axes), keys], axis=1)
    # What a window that is all padding computes is cut off in the end; without keys it would not be a number.
    return keys | ~keys.any(axis=1, keepdims=True), tokens


class FasterViT(nn.Module):
    """The backbone: two levels of convolution blocks and two of attention blocks; each level doubles the channels.

    Attributes:
      image_size: pixels, one number or (height, width); the map of the attention levels has to be square.
      embed_dim: channels of the first level.
      stem_width: channels of the first convolution.
      depths: number of blocks of the four levels.
      heads: of the attention in the last two levels.
      windows: per side of the map, in the last two levels; the windows grow with the images.
      carriers: side of a window's square of carrier tokens, in the last two levels; 0 for none. A level with a single
        window has none.
      propagate: adds the carriers to the pixels at the end of a level.
      layer_scale: initial factor of every residual branch of attention blocks; None for no factors.
      mlp_ratio: hidden channels of the MLPs divided by the level's channels.
      drop_path: stochastic depth, rising linearly over all blocks from 0 to this rate.
      pad: takes images whose maps the windows do not divide, and oblong ones, too. Their maps are padded to squares for
        the attention, which leaves the padding out; nothing else sees it.
    """

    image_size: Pixels | tuple[Pixels, Pixels] = 224
    embed_dim: Count = 64
    stem_width: Count = 64
    depths: Sequence[Count] = (2, 3, 6, 5)
    heads: Sequence[Count] = (8, 16)
    windows: Sequence[Count] = (2, 1)
    carriers: Sequence[CountOrZero] = (2, 0)
    propagate: bool = False
    layer_scale: NonNegative | None = None
    mlp_ratio: Positive = 4.0
    drop_path: DropRate = 0.0
    pad: bool = False

    @nn.nowrap
    def num_features(self) -> int:
        """Feature maps that a call returns."""
        return 5

    @nn.nowrap
    def validate(self) -> None:
        """Raises ValueError, one sentence, if the fields do not fit each other."""
        for field, length in (("depths", 4), ("heads", 2), ("windows", 2), ("carriers", 2)):
            if len(getattr(self, field)) != length:
                raise ValueError(f"{field} has {len(getattr(self, field))} entries; FasterViT needs {length}")
        for channels, heads in zip((4 * self.embed_dim, 8 * self.embed_dim), self.heads, strict=True):
            require_divisor(heads, "heads", channels, "channels")
        self._check_size(pair(self.image_size))

    @nn.nowrap
    def _check_size(self, size: tuple[int, int]) -> None:
        """Raises ValueError unless the windows divide the maps of the attention levels, with room for the carriers."""
        if self.pad:
            return
        if size[0] != size[1]:
            raise ValueError(
                f"FasterViT needs square images, not {size[0]} x {size[1]}; the nearest is {size[0]}; set "
                "pad for any size"
            )
        least = least_window(max(self.carriers))
        step = math.lcm(16 * self.windows[0], 32 * self.windows[1])
        nearest = max(round(size[0] / step), least) * step
        for level, windows in enumerate(self.windows, 2):
            n = -(-size[0] // 2 ** (level + 2))
            if n % windows or n < least * windows:
                raise ValueError(
                    f"image size {size[0]} gives a map of {n} pixels in level {level}, which {windows} windows of "
                    f"{least} pixels or more do not divide; the nearest size that works is {nearest}; set "
                    "pad for any size"
                )

    @nn.compact
    def __call__(self, x: Array, *, train: bool = False) -> list[Array]:
        """Maps images `[B, H, H, C]` to the map of the patch embedding and that of every level, after downsampling."""
        self._check_size(x.shape[1:3])
        x = ConvPatchEmbed(self.stem_width, self.embed_dim, name="patch_embed")(x, train=train)
        features = [x]
        rates = drop_path_rates(self.drop_path, sum(self.depths))
        for level, depth in enumerate(self.depths):
            own, rates = rates[:depth], rates[depth:]
            if level < 2:
                x = ConvLevel(own, name=f"levels_{level}")(x, train=train)
            else:
                x = AttentionLevel(
                    own,
                    self.windows[level - 2],
                    self.carriers[level - 2],
                    self.propagate,
                    downsample=level < 3,
                    heads=self.heads[level - 2],
                    mlp_ratio=self.mlp_ratio,
                    layer_scale=self.layer_scale,
                    name=f"levels_{level}",
                )(x, train=train)
            features.append(x)
        return features


_LARGE: dict[str, Any] = {"propagate": True, "layer_scale": 1e-5}
_4: dict[str, Any] = {"embed_dim": 196, "depths": (3, 3, 12, 5), "heads": (16, 32), **_LARGE}

CLASSIFIER = {"norm": "before", "norm_type": "batch", "epsilon": 1e-5, "init_scheme": "trunc_normal"}
VARIANTS = {
    "faster_vit_0_224": Variant(FasterViT, CLASSIFIER, {}),
    "faster_vit_1_224": Variant(FasterViT, CLASSIFIER, {"embed_dim": 80, "stem_width": 32, "depths": (1, 3, 8, 5)}),
    "faster_vit_2_224": Variant(FasterViT, CLASSIFIER, {"embed_dim": 96, "depths": (3, 3, 8, 5)}),
    "faster_vit_3_224": Variant(FasterViT, CLASSIFIER, {"embed_dim": 128, "depths": (3, 3, 12, 5), **_LARGE}),
    "faster_vit_4_224": Variant(FasterViT, CLASSIFIER, _4),
    "faster_vit_5_224": Variant(FasterViT, CLASSIFIER, _4 | {"embed_dim": 320}),
    "faster_vit_6_224": Variant(FasterViT, CLASSIFIER, _4 | {"embed_dim": 320, "depths": (3, 3, 16, 8)}),
} | {
    # Trained on ImageNet-21k, without carriers: one window covers the map of either attention level.
    f"faster_vit_4_21k_{size}": Variant(FasterViT, CLASSIFIER, {"image_size": size, "windows": (1, 1), **_4})
    for size in (224, 384, 512, 768)
}
