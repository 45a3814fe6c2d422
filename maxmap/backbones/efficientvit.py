"""EfficientViT of MIT's Han Lab: convolutions, and multi-scale attention whose cost is linear in the pixels.

Cai et al. 2023, "EfficientViT: Lightweight Multi-Scale Attention for High-Resolution Dense Prediction"
(arXiv:2205.14756). Names and parameters are those of timm 1.0.31; the authors' own names are a dialect of the
converter. Microsoft's network of the same name is another one: `efficientvit_msra.py`.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax.numpy as jnp
from einops import rearrange
from flax import linen as nn

from maxmap.backbones import Variant
from maxmap.layers.blocks import ConvNormAct, Residual, Stage
from maxmap.layers.primitives import (
    ACTIVATIONS,
    Block,
    Conv,
    drop_path_rates,
    require_divisor,
    require_one_of,
)
from maxmap.operations import Array, upcast
from maxmap.ranges import Count, DropRate, Pixels, Positive

EPSILON = 1e-5  # added to the sum of the attention's weights, as timm does
# The convolutions of a local branch: name, kernel size, and whether it is depthwise.
LOCAL = {
    "res": (("conv1", 3, False), ("conv2", 3, False)),
    "ds": (("depth_conv", 3, True), ("point_conv", 1, False)),
    "mb": (("inverted_conv", 1, False), ("depth_conv", 3, True), ("point_conv", 1, False)),
    "fused": (("spatial_conv", 3, False), ("point_conv", 1, False)),
}


class LocalBranch(nn.Module):
    """Convolutions with norms, and with activations behind all but the last.

    Attributes:
      kind: a key of `LOCAL`.
      channels: output channels.
      expand: inner channels divided by the input's.
      activation: behind the inner norms.
      epsilon: of the norms.
      few_norms: the inner convolutions have biases in place of norms.
      stride: 1 or 2.
    """

    kind: str
    channels: int
    expand: float
    activation: str
    epsilon: float
    few_norms: bool = False
    stride: int = 1

    @nn.compact
    def __call__(self, x: Array, *, train: bool) -> Array:
        hidden = round(self.expand * x.shape[-1])
        *inner, (last, size, _) = LOCAL[self.kind]
        for name, kernel_size, depthwise in inner:
            layer = ConvNormAct(
                hidden,
                kernel_size,
                self.stride if kernel_size > 1 else 1,
                groups=hidden if depthwise else 1,
                activation=self.activation,
                bias=self.few_norms,
                norm=None if self.few_norms else "norm",
                epsilon=self.epsilon,
                name=name,
            )
            x = layer(x, train=train)
        return ConvNormAct(self.channels, size, norm="norm", epsilon=self.epsilon, name=last)(x, train=train)


def relu_attention(q: Array, k: Array, v: Array) -> Array:
    """Attention with the weights relu(q) . relu(k), which sums over the keys once for all queries.

    It is computed in float32 or wider: the sums grow with the number of pixels.

    Args:
      q: queries `[..., N, D]`.
      k: keys `[..., N, D]`.
      v: values `[..., N, E]`.

    Returns:
      `[..., N, E]`, in the type of `v`.
    """
    product = functools.partial(jnp.einsum, precision="highest")
    q, k = nn.relu(upcast(q)), nn.relu(upcast(k))
    sums = product("...nd,...ne->...de", k, upcast(v))
    total = product("...nd,...d->...n", q, jnp.sum(k, axis=-2))
    return (product("...nd,...de->...ne", q, sums) / (total[..., None] + EPSILON)).astype(v.dtype)


class MultiScaleAttention(nn.Module):
    """ReLU attention in heads of tokens of two scales: pixels, and sums over their 5x5 neighbourhoods.

    Attributes:
      head_dim: channels of a head.
      epsilon: of the norm.
    """

    head_dim: int
    epsilon: float

    @nn.compact
    def __call__(self, x: Array, *, train: bool) -> Array:
        channels = x.shape[-1]
        pixels = ConvNormAct(3 * channels, norm=None, name="qkv")(x)
        conv = functools.partial(Conv, 3 * channels, bias=False)
        around = conv(kernel_size=5, padding=2, groups=3 * channels, name="aggreg_0_0")(pixels)
        around = conv(groups=3 * channels // self.head_dim, name="aggreg_0_1")(around)
        tokens = jnp.concatenate([pixels, around], axis=-1)
        q, k, v = rearrange(tokens, "b h w (n three d) -> three b n (h w) d", three=3, d=self.head_dim)
        x = rearrange(relu_attention(q, k, v), "b n (h w) d -> b h w (n d)", h=x.shape[1])
        return ConvNormAct(channels, norm="norm", epsilon=self.epsilon, name="proj")(x, train=train)


class HalvingBlock(Block):
    """A branch with stride 2, without a residual path.

    Attributes:
      branch: constructor of the branch.
    """

    branch: Callable[..., nn.Module]

    @nn.compact
    def __call__(self, x: Array, *, train: bool) -> Array:
        return self.branch(name="main")(x, train=train)


class AttentionBlock(Block):
    """Multi-scale attention, then an inverted bottleneck.

    Attributes:
      attention, local: constructors of the branches.
      drop_path: rates of dropping the two branches.
    """

    attention: Callable[..., nn.Module]
    local: Callable[..., nn.Module]
    drop_path: tuple[float, float]

    @nn.compact
    def __call__(self, x: Array, *, train: bool) -> Array:
        x = Residual(self.attention, self.drop_path[0], "main", name="context_module")(x, train=train)
        return Residual(self.local, self.drop_path[1], "main", name="local_module")(x, train=train)


class Stem(nn.Module):
    """A 3x3 convolution with stride 2, then local blocks.

    Attributes:
      first: constructor of the convolution.
      blocks: constructors of the blocks.
    """

    first: Callable[..., nn.Module]
    blocks: Sequence[Callable[..., nn.Module]]

    @nn.compact
    def __call__(self, x: Array, *, train: bool) -> Array:
        x = self.first(name="in_conv")(x, train=train)
        for i, block in enumerate(self.blocks):
            x = block(name=f"res{i}")(x, train=train)
        return x


class EfficientViT(nn.Module):
    """The backbone: a stem and stages, each of which begins with a block that halves the map.

    Stages with attention, and all from the third on, have norms behind the last convolution of each branch alone.

    Attributes:
      image_size: height and width, or one number for both; any other size works too.
      stem_width: channels of the stem.
      stem_depth: local blocks of the stem.
      stem_block: their kind, "ds" (depthwise-separable) or "res" (two 3x3 convolutions).
      embed_dim: channels of the stages.
      depths: blocks of the stages behind the one that halves the map.
      blocks: kinds of the stages' blocks: "mb" (inverted bottleneck), "fused" (the same with one 3x3 convolution in
        place of the first two) or "attention" (which begins with an "mb" block).
      expand: inner channels of the blocks divided by their input's, by stage.
      downsample_expand: the same for the blocks that halve the map, divided by the stage's `expand`.
      head_dim: channels of an attention head.
      activation: behind the inner norms.
      epsilon: of the norms.
      drop_path: stochastic depth. It rises linearly over all N residual branches from rate / N to this rate, as in the
        authors' code, whose trainer also raises it with the epochs.
    """

    image_size: Pixels | tuple[Pixels, Pixels] = 224
    stem_width: Count = 8
    stem_depth: Count = 1
    stem_block: str = "ds"
    embed_dim: Sequence[Count] = (16, 32, 64, 128)
    depths: Sequence[Count] = (1, 1, 2, 2)
    blocks: Sequence[str] = ("mb", "mb", "attention", "attention")
    expand: Sequence[Positive] = (4, 4, 4, 4)
    downsample_expand: Positive = 1
    head_dim: Count = 16
    activation: str = "hard_swish"
    epsilon: Positive = 1e-5
    drop_path: DropRate = 0.0

    @nn.nowrap
    def num_features(self) -> int:
        """Feature maps that a call returns."""
        return 1 + len(self.depths)

    @nn.nowrap
    def validate(self) -> None:
        """Raises ValueError, one sentence, if the fields do not fit each other."""
        if not len(self.embed_dim) == len(self.depths) == len(self.blocks) == len(self.expand):
            raise ValueError("embed_dim, depths, blocks and expand need one entry for each stage")
        require_one_of(self.stem_block, "stem_block", ("ds", "res"))
        require_one_of(self.activation, "activation", ACTIVATIONS)
        for stage, (kind, channels) in enumerate(zip(self.blocks, self.embed_dim, strict=True)):
            require_one_of(kind, f"the block of stage {stage}", ("mb", "fused", "attention"))
            if kind == "attention":
                require_divisor(self.head_dim, "channels per head", channels, f"channels of stage {stage}")

    @nn.compact
    def __call__(self, x: Array, *, train: bool = False) -> list[Array]:
        """Maps images `[B, H, W, C]` to the stem's map and the map of every stage."""
        attention = sum(depth for depth, kind in zip(self.depths, self.blocks, strict=True) if kind == "attention")
        branches = self.stem_depth + sum(self.depths) + attention
        rates = iter(drop_path_rates(self.drop_path, branches + 1)[1:])
        fields = {"activation": self.activation, "epsilon": self.epsilon}
        first = functools.partial(ConvNormAct, self.stem_width, 3, 2, norm="norm", **fields)
        local = functools.partial(LocalBranch, self.stem_block, self.stem_width, 1, **fields)
        blocks = [functools.partial(Residual, local, next(rates), "main") for _ in range(self.stem_depth)]
        features = [Stem(first, blocks, name="stem")(x, train=train)]
        for stage in range(len(self.depths)):
            features.append(Stage(self._blocks(stage, rates), name=f"stages_{stage}")(features[-1], train=train))
        return features

    @nn.nowrap
    def _blocks(self, stage: int, rates: Iterator[float]) -> Sequence[Callable[..., nn.Module]]:
        """Returns the constructors of a stage's blocks, which take the rates of their residual branches."""
        kind, expand = self.blocks[stage], self.expand[stage]
        local = functools.partial(
            LocalBranch,
            "mb" if kind == "attention" else kind,
            self.embed_dim[stage],
            activation=self.activation,
            epsilon=self.epsilon,
            few_norms=stage > 1 or kind == "attention",
        )
        attention = functools.partial(MultiScaleAttention, self.head_dim, self.epsilon)
        branch = functools.partial(local, expand)
        halving = functools.partial(local, expand * self.downsample_expand, stride=2)
        blocks: list[Callable[..., nn.Module]] = [functools.partial(HalvingBlock, halving)]
        for _ in range(self.depths[stage]):
            if kind == "attention":
                blocks.append(functools.partial(AttentionBlock, attention, branch, (next(rates), next(rates))))
            else:
                blocks.append(functools.partial(Residual, branch, next(rates), "main"))
        return blocks


class EfficientViTLarge(EfficientViT):
    """The L series, with dense 3x3 convolutions at the start; the authors give its parameters other names."""

    stem_width: Count = 32
    stem_block: str = "res"
    embed_dim: Sequence[Count] = (64, 128, 256, 512)
    depths: Sequence[Count] = (1, 1, 6, 6)
    blocks: Sequence[str] = ("fused", "fused", "mb", "attention")
    expand: Sequence[Positive] = (4, 4, 4, 6)
    downsample_expand: Positive = 4
    head_dim: Count = 32
    activation: str = "gelu_tanh"
    epsilon: Positive = 1e-7


def _variant(backbone: type[EfficientViT], conv: int, hidden: int, **fields: Any) -> Variant:
    """Returns a published network, whose classifier has a convolution and a hidden layer of these channels."""
    classifier = {"neck": (conv, hidden), "activation": backbone.activation, "epsilon": backbone.epsilon}
    return Variant(backbone, {"norm": "none", **classifier}, fields)


_B, _L = (functools.partial(_variant, backbone) for backbone in (EfficientViT, EfficientViTLarge))
VARIANTS = {
    "efficientvit_b0": _B(1024, 1280),
    "efficientvit_b1": _B(1536, 1600, stem_width=16, embed_dim=(32, 64, 128, 256), depths=(1, 2, 3, 4)),
    "efficientvit_b2": _B(2304, 2560, stem_width=24, embed_dim=(48, 96, 192, 384), depths=(2, 3, 4, 6), head_dim=32),
    "efficientvit_b3": _B(2304, 2560, stem_width=32, embed_dim=(64, 128, 256, 512), depths=(3, 5, 6, 9), head_dim=32),
    "efficientvit_l1": _L(3072, 3200),
    "efficientvit_l2": _L(3072, 3200, depths=(2, 2, 8, 8)),
    "efficientvit_l3": _L(6144, 6400, stem_width=64, embed_dim=(128, 256, 512, 1024), depths=(2, 2, 8, 8)),
}
