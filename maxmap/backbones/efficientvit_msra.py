"""EfficientViT of Microsoft Research Asia: attention whose heads work one after another, between convolutions.

Liu et al. 2023, "EfficientViT: Memory Efficient Vision Transformer with Cascaded Group Attention" (arXiv:2305.07027).
Names and parameters are those of timm 1.0.31; the authors' own names are a dialect of the converter. MIT's network of
the same name is another one: `efficientvit.py`.
"""

import functools
from collections.abc import Callable, Iterator, Sequence

import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import linen as nn

from maxmap.backbones import Variant
from maxmap.layers.blocks import ConvNormAct, Residual, SqueezeExcite, relative_index
from maxmap.layers.padding import next_multiple, pad_map
from maxmap.layers.parameters import parameter
from maxmap.layers.primitives import Block, drop_path_rates, pair, require_divisor
from maxmap.operations import Array, softmax
from maxmap.ranges import Count, DropRate, Pixels

PATCH = 16  # pixels of the image for one of the first map
EXPANSION = 2  # hidden channels of the feed-forward branches over their input's
MERGING = 4  # inner channels of the block that halves the map over its input's
SQUEEZE = 4  # those over the channels of its squeeze-excitation

zeros = nn.initializers.zeros


class FeedForward(nn.Module):
    """Two 1x1 convolutions with norms and a ReLU between them; the scale of the last norm starts at zero."""

    @nn.compact
    def __call__(self, x: Array, *, train: bool) -> Array:
        channels = x.shape[-1]
        x = ConvNormAct(EXPANSION * channels, activation="relu", name="pw1")(x, train=train)
        return ConvNormAct(channels, scale_init=zeros, name="pw2")(x, train=train)


def distance_index(side: int) -> np.ndarray:
    """Where the table of a square's distances, down and across, has that of each query and key, `[side^2, side^2]`."""
    down, across = (np.abs(offset - (side - 1)) for offset in relative_index((side, side)))
    return down * side + across


class CascadedAttention(nn.Module):
    """Attention over a whole map, in heads of which each adds the output of the one before to its own input.

    Attributes:
      heads: number of them; they divide the channels.
      key_dim: channels of the queries and keys of a head.
      kernels: sizes of the heads' depthwise convolutions of the queries.
    """

    heads: int
    key_dim: int
    kernels: Sequence[int]

    @nn.compact
    def __call__(self, x: Array, *, train: bool) -> Array:
        """Maps `[B, S, S, C]` to `[B, S, S, C]`; the bias of the logits belongs to this S."""
        side, channels = x.shape[1], x.shape[-1]
        table = parameter(self, "attention_biases", zeros, (self.heads, side**2))
        biases = table[:, distance_index(side)]  # [heads, N, N]
        outputs: list[Array] = []
        for i, own in enumerate(jnp.split(x, self.heads, axis=-1)):
            y = own + outputs[-1] if outputs else own
            y = ConvNormAct(2 * self.key_dim + channels // self.heads, name=f"qkvs_{i}")(y, train=train)
            q, k, v = jnp.split(y, [self.key_dim, 2 * self.key_dim], axis=-1)
            q = ConvNormAct(self.key_dim, self.kernels[i], groups=self.key_dim, name=f"dws_{i}")(q, train=train)
            q, k, v = (rearrange(part, "b h w d -> b (h w) d") for part in (q, k, v))
            logits = jnp.einsum("bqd,bkd->bqk", q * self.key_dim**-0.5, k) + biases[i : i + 1].astype(q.dtype)
            # Where one key has all the weight, division behind the product would leave rounding errors for gradients,
            # which grow from head to head.
            outputs.append(rearrange(softmax(logits) @ v, "b (h w) d -> b h w d", h=side))
        x = nn.relu(jnp.concatenate(outputs, axis=-1))
        return ConvNormAct(channels, scale_init=zeros, name="proj_1")(x, train=train)


class WindowAttention(nn.Module):
    """Cascaded attention inside of square windows; a map that they do not divide is padded with zeros.

    Attributes:
      window: side of the windows.
      attention: constructor of the attention.
    """

    window: int
    attention: Callable[..., nn.Module]

    @nn.compact
    def __call__(self, x: Array, *, train: bool) -> Array:
        height, width = x.shape[1:3]
        x = pad_map(x, next_multiple((height, width), pair(self.window)))
        rows, columns = x.shape[1] // self.window, x.shape[2] // self.window
        x = rearrange(x, "b (i h) (j w) c -> (b i j) h w c", i=rows, j=columns)
        x = self.attention(name="attn")(x, train=train)
        return rearrange(x, "(b i j) h w c -> b (i h) (j w) c", i=rows, j=columns)[:, :height, :width]


def _depthwise(channels: int, **fields: Callable[..., Array]) -> Callable[..., nn.Module]:
    """Constructor of a depthwise 3x3 convolution with a norm."""
    return functools.partial(ConvNormAct, channels, 3, groups=channels, **fields)


class SandwichBlock(Block):
    """Window attention between two depthwise convolutions and two feed-forward branches, each with a residual.

    Attributes:
      attention: constructor of the attention.
      drop_path: rates of dropping the five branches.
    """

    attention: Callable[..., nn.Module]
    drop_path: Sequence[float]

    @nn.compact
    def __call__(self, x: Array, *, train: bool) -> Array:
        depthwise = _depthwise(x.shape[-1], scale_init=zeros)
        branches = {
            "dw0": depthwise,
            "ffn0": FeedForward,
            "mixer": self.attention,
            "dw1": depthwise,
            "ffn1": FeedForward,
        }
        for (name, branch), rate in zip(branches.items(), self.drop_path, strict=True):
            x = Residual(branch, rate, "m", name=name)(x, train=train)
        return x


class PatchMerging(nn.Module):
    """An inverted bottleneck with squeeze-excitation and without a residual, which halves the map.

    Attributes:
      channels: output channels.
    """

    channels: int

    @nn.compact
    def __call__(self, x: Array, *, train: bool) -> Array:
        hidden = MERGING * x.shape[-1]
        x = ConvNormAct(hidden, activation="relu", name="conv1")(x, train=train)
        x = ConvNormAct(hidden, 3, 2, groups=hidden, activation="relu", name="conv2")(x, train=train)
        x = SqueezeExcite(hidden // SQUEEZE, name="se")(x)
        return ConvNormAct(self.channels, name="conv3")(x, train=train)


class Downsample(nn.Module):
    """Patch merging between two pairs of a depthwise convolution and a feed-forward branch, each with a residual.

    Attributes:
      channels: output channels.
      drop_path: rates of dropping the four branches.
    """

    channels: int
    drop_path: Sequence[float]

    @nn.compact
    def __call__(self, x: Array, *, train: bool) -> Array:
        def residuals(x: Array, name: str, rates: Sequence[float]) -> Array:
            for i, (branch, rate) in enumerate(zip((_depthwise(x.shape[-1]), FeedForward), rates, strict=True)):
                x = Residual(branch, rate, "m", name=f"{name}_{i}")(x, train=train)
            return x

        x = residuals(x, "res1", self.drop_path[:2])
        x = PatchMerging(self.channels, name="patchmerge")(x, train=train)
        return residuals(x, "res2", self.drop_path[2:])


class Stage(nn.Module):
    """Blocks, after a downsampling in all stages but the first.

    Attributes:
      downsample: constructor of the downsampling; None for none.
      blocks: constructors of the blocks.
    """

    downsample: Callable[..., nn.Module] | None
    blocks: Sequence[Callable[..., nn.Module]]

    @nn.compact
    def __call__(self, x: Array, *, train: bool) -> Array:
        if self.downsample is not None:
            x = self.downsample(name="downsample")(x, train=train)
        for i, block in enumerate(self.blocks):
            x = block(name=f"blocks_{i}")(x, train=train)
        return x


class PatchEmbedding(nn.Module):
    """Four 3x3 convolutions with stride 2, norms, and ReLUs between them.

    Attributes:
      channels: output channels, a multiple of 8.
    """

    channels: int

    @nn.compact
    def __call__(self, x: Array, *, train: bool) -> Array:
        for i, share in enumerate((8, 4, 2, 1), start=1):
            activation = None if share == 1 else "relu"
            conv = ConvNormAct(self.channels // share, 3, 2, activation=activation, name=f"conv{i}")
            x = conv(x, train=train)
        return x


class EfficientViTMSRA(nn.Module):
    """The backbone: a stem with stride 16, then stages, of which all but the first halve the map.

    Attributes:
      image_size: height and width, or one number for both; the smaller decides on the windows. With these windows any
        other size works too.
      embed_dim: channels of the stages.
      depths: blocks of the stages.
      heads: of the attention of the stages.
      key_dim: channels of the queries and keys of a head.
      kernels: sizes of the heads' convolutions of the queries, for at least as many heads as a stage has.
      window: largest side of the windows; a smaller map is one window.
      drop_path: stochastic depth, rising linearly over all residual branches from 0 to this rate. The published
        networks have none.
    """

    image_size: Pixels | tuple[Pixels, Pixels] = 224
    embed_dim: Sequence[Count] = (64, 128, 192)
    depths: Sequence[Count] = (1, 2, 3)
    heads: Sequence[Count] = (4, 4, 4)
    key_dim: Count = 16
    kernels: Sequence[Count] = (5, 5, 5, 5)
    window: Count = 7
    drop_path: DropRate = 0.0

    @nn.nowrap
    def num_features(self) -> int:
        """Feature maps that a call returns."""
        return 1 + len(self.depths)

    @nn.nowrap
    def validate(self) -> None:
        """Raises ValueError, one sentence, if the fields do not fit each other."""
        if not len(self.embed_dim) == len(self.depths) == len(self.heads):
            raise ValueError("embed_dim, depths and heads need one entry for each stage")
        for stage, (channels, heads) in enumerate(zip(self.embed_dim, self.heads, strict=True)):
            require_divisor(heads, "heads", channels, f"channels of stage {stage}")
        if max(self.heads) > len(self.kernels):
            raise ValueError(f"kernels has {len(self.kernels)} entries, and a stage has {max(self.heads)} heads")
        if even := [size for size in self.kernels if size % 2 == 0]:
            raise ValueError(f"a kernel of size {even[0]} would shift the map; the sizes have to be odd")
        if self.embed_dim[0] % 8:
            near = max(round(self.embed_dim[0] / 8), 1) * 8
            raise ValueError(f"embed_dim {self.embed_dim[0]} of the stem is not a multiple of 8; the nearest is {near}")
        if min(pair(self.image_size)) < PATCH:
            raise ValueError(f"image side {min(pair(self.image_size))} is too small; the least is {PATCH}")

    @nn.compact
    def __call__(self, x: Array, *, train: bool = False) -> list[Array]:
        """Maps images `[B, H, W, C]` to the stem's map and the map of every stage."""
        features = [PatchEmbedding(self.embed_dim[0], name="patch_embed")(x, train=train)]
        branches = 5 * sum(self.depths) + 4 * (len(self.depths) - 1)
        rates = iter(drop_path_rates(self.drop_path, branches))
        side = min(pair(self.image_size)) // PATCH
        for stage in range(len(self.depths)):
            side = -(-side // 2) if stage else side
            features.append(self._stage(stage, side, rates)(features[-1], train=train))
        return features

    @nn.nowrap
    def _stage(self, stage: int, side: int, rates: Iterator[float]) -> Stage:
        """Returns a stage whose map has this side, which takes the rates of its branches."""
        downsample = None
        if stage:
            downsample = functools.partial(Downsample, self.embed_dim[stage], [next(rates) for _ in range(4)])
        attention = functools.partial(CascadedAttention, self.heads[stage], self.key_dim, self.kernels)
        mixer = functools.partial(WindowAttention, min(self.window, side), attention)
        blocks = [
            functools.partial(SandwichBlock, mixer, [next(rates) for _ in range(5)]) for _ in range(self.depths[stage])
        ]
        return Stage(downsample, blocks, name=f"stages_{stage}")


CLASSIFIER = {"norm": "after", "norm_type": "batch", "epsilon": 1e-5, "init_scheme": "trunc_normal"}
_M1 = {"embed_dim": (128, 144, 192), "heads": (2, 3, 3), "kernels": (7, 5, 3, 3)}
VARIANTS = {
    "efficientvit_m0": Variant(EfficientViTMSRA, CLASSIFIER, {}),
    "efficientvit_m1": Variant(EfficientViTMSRA, CLASSIFIER, _M1),
    "efficientvit_m2": Variant(EfficientViTMSRA, CLASSIFIER, _M1 | {"embed_dim": (128, 192, 224), "heads": (4, 3, 2)}),
    "efficientvit_m3": Variant(EfficientViTMSRA, CLASSIFIER, {"embed_dim": (128, 240, 320), "heads": (4, 3, 4)}),
    "efficientvit_m4": Variant(EfficientViTMSRA, CLASSIFIER, _M1 | {"embed_dim": (128, 256, 384), "heads": (4, 4, 4)}),
    "efficientvit_m5": Variant(
        EfficientViTMSRA, CLASSIFIER, _M1 | {"embed_dim": (192, 288, 384), "heads": (3, 3, 4), "depths": (1, 3, 4)}
    ),
}
