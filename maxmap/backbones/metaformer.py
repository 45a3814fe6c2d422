"""MetaFormer baselines: IdentityFormer, RandFormer, PoolFormerV2, ConvFormer and CAFormer.

Yu et al. 2022, "MetaFormer Baselines for Vision" (arXiv:2210.13452). Names and parameters are those of timm 1.0.31;
IdentityFormer and RandFormer, which timm lacks, follow the same scheme. sail-sg/metaformer is the authors' code.

The two codes differ in the epsilon of the norm inside of the MLP head of ConvFormer and CAFormer: it is 1e-6 in timm,
and 1e-5 in the authors' code, with which the published weights were trained and measured. Named models have 1e-5;
`create_model("caformer_s18", head={"hidden_epsilon": 1e-6})` is timm's.
"""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import linen as nn

from maxmap.backbones import Variant
from maxmap.fused import fuses_attention, fuses_mlp, fuses_separable, separable_expand, separable_project
from maxmap.layers.primitives import (
    TRUNC_NORMAL,
    Block,
    Conv,
    DropPath,
    LayerNorm,
    Linear,
    Scale,
    StarReLU,
    average_pool,
    drop_path_rates,
    map_norm,
    require_image_size,
    require_one_of,
)
from maxmap.layers.residual import Compute, kept_samples, mlp_weights, residual_attention, residual_mlp
from maxmap.operations import Array, attention
from maxmap.ranges import Count, DropRate, Pixels

HEAD_DIM = 32


def _norm(kind: str, name: str) -> nn.Module:
    """Returns a norm without bias, over the "channels" of each pixel or the whole "map" of each image."""
    if kind == "channels":
        return LayerNorm(1e-6, use_bias=False, name=name)
    return map_norm(1e-6, use_bias=False, name=name)


class RandomMixing(nn.Module):
    """Mixes all pixels by a fixed random matrix whose rows sum to one.

    The matrix is drawn once and never trained, so it is no parameter but 'random_matrix' `[N, N]` in the collection
    'constants', with N = height * width in row-major order.
    """

    @nn.compact
    def __call__(self, x: Array) -> Array:
        height, width = x.shape[1:3]
        n = height * width

        def draw() -> Array:
            return nn.softmax(jax.random.uniform(self.make_rng("params"), (n, n), jnp.float32), axis=-1)

        matrix = self.variable("constants", "random_matrix", draw).value
        mixed = jnp.einsum("mn,bnc->bmc", matrix.astype(x.dtype), rearrange(x, "b h w c -> b (h w) c"))
        return rearrange(mixed, "b (h w) c -> b h w c", h=height)


class PoolMixing(nn.Module):
    """The mean of each pixel's 3x3 neighbourhood minus the pixel; padding is not counted."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        return average_pool(x, 3, 1, ((1, 1), (1, 1))) - x


class ConvMixing(nn.Module):
    """Separable convolution: 1x1 to twice the channels, StarReLU, depthwise 7x7, 1x1 back; no biases."""

    @nn.nowrap
    def fuses(self, x: Array) -> bool:
        """Whether kernels can compute the 1x1 convolutions together with what stands around them."""
        return fuses_separable(x)

    @nn.compact
    def __call__(self, x: Array, *, compute: "Separable | None" = None) -> Array:
        """Maps `[B, H, W, C]` to `[B, H, W, C]`; or `compute` does it, given the weights."""
        channels = x.shape[-1]
        conv = functools.partial(Conv, bias=False, **TRUNC_NORMAL)
        pwconv1, pwconv2 = conv(2 * channels, name="pwconv1"), conv(channels, name="pwconv2")
        dwconv = conv(2 * channels, 7, padding=3, groups=2 * channels, name="dwconv")
        act = StarReLU(name="act1")
        if compute is None:
            return pwconv2(dwconv(act(pwconv1(x))))
        kernels = (pwconv1.weights(channels)[0][0, 0], pwconv2.weights(2 * channels)[0][0, 0])
        return compute(*kernels, _star_relu_factors(act, 2 * channels), dwconv)


# Computes a separable convolution from both 1x1 kernels, the activation's weights and the depthwise convolution.
Separable = Callable[[Array, Array, Array, Callable[[Array], Array]], Array]


class AttentionMixing(nn.Module):
    """Self-attention over the whole map in heads of 32 channels, without positions and biases."""

    @nn.nowrap
    def fuses(self, x: Array) -> bool:
        """Whether a kernel can compute the attention together with what stands around it."""
        return fuses_attention(x, (x.shape[1], x.shape[2]), HEAD_DIM)

    @nn.compact
    def __call__(
        self, x: Array, *, train: bool = False, compute: Callable[[dict[str, Array | None]], Array] | None = None
    ) -> Array:
        """Maps `[B, H, W, C]` to `[B, H, W, C]`; or `compute` does it, given the weights."""
        del train  # there is no dropout
        height, channels = x.shape[1], x.shape[-1]
        linear = functools.partial(Linear, bias=False, **TRUNC_NORMAL)
        qkv, proj = linear(3 * channels, name="qkv"), linear(channels, name="proj")
        if compute is not None:
            kernel = rearrange(qkv.weights(channels)[0], "c (three e) -> c three e", three=3)
            absent = dict.fromkeys(("qkv_bias", "bias", "proj_bias"))
            return compute({"qkv_kernel": kernel, "proj_kernel": proj.weights(channels)[0], **absent})
        q, k, v = rearrange(qkv(x), "b h w (three n d) -> three b n (h w) d", three=3, d=HEAD_DIM)
        out = attention(q * HEAD_DIM**-0.5, k, v)
        return proj(rearrange(out, "b n (h w) d -> b h w (n d)", h=height))


# None is the identity: the branch adds the normalised input.
MIXERS: dict[str, type[nn.Module] | None] = {
    "attention": AttentionMixing,
    "conv": ConvMixing,
    "pool": PoolMixing,
    "random": RandomMixing,
    "identity": None,
}


class StarReLUMlp(nn.Module):
    """Two linear maps without biases and a StarReLU between them, where the channels are four times as many.

    Attributes:
      layer: `Linear`, or `Conv` where the reference keeps 4-d weights.
    """

    layer: type[nn.Module]

    @nn.nowrap
    def fuses(self, x: Array, *, train: bool) -> bool:
        """Whether a kernel can compute the MLP together with what stands around it, see `residual_mlp`."""
        del train  # there is no dropout
        return fuses_mlp(x, 4 * x.shape[-1], weighted=True)

    @nn.compact
    def __call__(self, x: Array, *, train: bool, compute: Compute | None = None) -> Array:
        """Maps `[..., C]` to `[..., C]`; `compute` does it instead, given the activation and the weights."""
        del train
        channels = x.shape[-1]
        fc1 = self.layer(4 * channels, bias=False, name="fc1", **TRUNC_NORMAL)
        act, fc2 = StarReLU(name="act"), self.layer(channels, bias=False, name="fc2", **TRUNC_NORMAL)
        if compute is None:
            return fc2(act(fc1(x)))
        factors = _star_relu_factors(act, 4 * channels)
        return compute(_star_relu, mlp_weights(fc1, fc2, channels) | {"activation": factors})


def _star_relu_factors(act: StarReLU, channels: int) -> Array:
    """The weights that `_star_relu` takes."""
    return jnp.stack([jnp.broadcast_to(value, (channels,)) for value in act.weights()])


def _star_relu(x: Array, weights: Array | None) -> Array:
    """StarReLU of `[R, F]` with scale and bias `[2, F]`."""
    assert weights is not None
    return weights[0:1] * jnp.square(nn.relu(x)) + weights[1:2]


class MetaFormerBlock(Block):
    """Token mixer and MLP, each with a norm in front and a residual path.

    Attributes:
      mixer: one of `MIXERS`.
      norm: "channels" or "map", see `_norm`.
      residual_scale: multiplies the residual paths, not the branches, by learned factors.
      drop_path: rate of dropping each branch.
    """

    mixer: str
    norm: str
    residual_scale: bool
    drop_path: float

    @nn.compact
    def __call__(self, x: Array, *, train: bool) -> Array:
        def residual(x: Array, name: str) -> Array:
            return Scale(name=name)(x) if self.residual_scale else x

        norm, path = _norm(self.norm, "norm1"), residual(x, "res_scale1")
        kind = MIXERS[self.mixer]
        mixer = None if kind is None else kind(name="token_mixer")
        if isinstance(mixer, AttentionMixing) and isinstance(norm, LayerNorm) and mixer.fuses(x):
            heads = x.shape[-1] // HEAD_DIM
            size = x.shape[1], x.shape[2]
            x = residual_attention(
                x, norm, mixer, "window", size, heads, HEAD_DIM**-0.5, self.drop_path, train=train, residual=path
            )
        elif isinstance(mixer, ConvMixing) and isinstance(norm, LayerNorm) and mixer.fuses(x):
            x = _residual_separable(x, norm, mixer, self.drop_path, train=train, residual=path)
        else:
            y = norm(x)
            x = path + DropPath(self.drop_path)(y if mixer is None else mixer(y), train=train)
        mlp, norm = StarReLUMlp(Linear if self.mixer == "attention" else Conv, name="mlp"), _norm(self.norm, "norm2")
        path = residual(x, "res_scale2")
        if isinstance(norm, LayerNorm):
            return residual_mlp(x, norm, mlp, self.drop_path, train=train, residual=path)
        return path + DropPath(self.drop_path)(mlp(norm(x), train=train), train=train)


def _residual_separable(
    x: Array, norm: LayerNorm, mixer: ConvMixing, drop_path: float, *, train: bool, residual: Array
) -> Array:
    """Computes residual + DropPath(mixer(norm(x))) with two kernels and a depthwise convolution between them."""
    keep = kept_samples(x, drop_path, train)

    def compute(first: Array, last: Array, factors: Array, depthwise: Callable[[Array], Array]) -> Array:
        scale, first, last = norm.weights(x.shape[-1])[0], first.astype(x.dtype), last.astype(x.dtype)
        y, beside = separable_expand(x, scale, first, factors, _star_relu, norm.epsilon)
        return separable_project(depthwise(y), last, keep, beside if residual is x else residual)

    return mixer(x, compute=compute)


class Stem(nn.Module):
    """7x7 convolution with stride 4, then a norm.

    Attributes:
      channels: output channels.
    """

    channels: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = Conv(self.channels, 7, stride=4, padding=2, name="conv", **TRUNC_NORMAL)(x)
        return _norm("channels", "norm")(x)


class Downsample(nn.Module):
    """A norm, then a 3x3 convolution with stride 2.

    Attributes:
      channels: output channels.
    """

    channels: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = _norm("channels", "norm")(x)
        return Conv(self.channels, 3, stride=2, padding=1, name="conv", **TRUNC_NORMAL)(x)


class MetaFormerStage(nn.Module):
    """MetaFormer blocks, after a downsampling in all stages but the first.

    Attributes:
      channels: output channels.
      downsample: halves the map first.
      mixer, norm, residual_scale: see `MetaFormerBlock`.
      drop_path: rates of the blocks.
    """

    channels: int
    downsample: bool
    mixer: str
    norm: str
    residual_scale: bool
    drop_path: Sequence[float]

    @nn.compact
    def __call__(self, x: Array, *, train: bool) -> Array:
        if self.downsample:
            x = Downsample(self.channels, name="downsample")(x)
        for i, rate in enumerate(self.drop_path):
            x = MetaFormerBlock(self.mixer, self.norm, self.residual_scale, rate, name=f"blocks_{i}")(x, train=train)
        return x


class MetaFormer(nn.Module):
    """The MetaFormer family's backbone.

    Attributes:
      image_size: height and width, or one number for both. Random matrices are made for this size; models without them
        take any size.
      embed_dim: channels of the stages.
      depths: blocks of the stages.
      mixers: token mixers of the stages: "attention", "conv", "pool", "random" or "identity".
      norm: of the blocks, over the "channels" of a pixel or over the whole "map" of an image.
      drop_path: stochastic depth, rising linearly over all blocks from 0 to this rate.
    """

    image_size: Pixels | tuple[Pixels, Pixels] = 224
    embed_dim: Sequence[Count] = (64, 128, 320, 512)
    depths: Sequence[Count] = (3, 3, 9, 3)
    mixers: Sequence[str] = ("conv", "conv", "attention", "attention")
    norm: str = "channels"
    drop_path: DropRate = 0.0

    @nn.nowrap
    def num_features(self) -> int:
        """Feature maps that a call returns."""
        return 1 + len(self.depths)

    @nn.nowrap
    def validate(self) -> None:
        """Raises ValueError, one sentence, if the fields do not fit each other."""
        if not len(self.embed_dim) == len(self.depths) == len(self.mixers):
            raise ValueError("embed_dim, depths and mixers need one entry for each stage")
        for stage, (mixer, channels) in enumerate(zip(self.mixers, self.embed_dim, strict=True)):
            require_one_of(mixer, "the mixer", MIXERS)
            if mixer == "attention" and channels % HEAD_DIM:
                near = max(round(channels / HEAD_DIM), 1) * HEAD_DIM
                raise ValueError(
                    f"attention heads of {HEAD_DIM} channels do not divide the {channels} channels of stage {stage}; "
                    f"the nearest number that works is {near}"
                )
        require_one_of(self.norm, "the norm", ("channels", "map"))

    @nn.compact
    def __call__(self, x: Array, *, train: bool = False) -> list[Array]:
        """Maps images `[B, H, W, C]` to the stem's map and the map of every stage."""
        if "random" in self.mixers:
            require_image_size(x, self.image_size, "the random matrices are")
        if min(x.shape[1:3]) < 3:  # the 7x7 convolution of the stem pads by 2
            raise ValueError(f"image side {min(x.shape[1:3])} is too small; the least is 3")
        x = Stem(self.embed_dim[0], name="stem")(x)
        features = [x]
        rates = drop_path_rates(self.drop_path, sum(self.depths))
        for i, (channels, depth, mixer) in enumerate(zip(self.embed_dim, self.depths, self.mixers, strict=True)):
            stage_rates, rates = rates[:depth], rates[depth:]
            x = MetaFormerStage(channels, i > 0, mixer, self.norm, i >= 2, stage_rates, name=f"stages_{i}")(
                x, train=train
            )
            features.append(x)
        return features


# Mixers and norm of the families, then depths and widths of the sizes.
PRESETS = {
    "identityformer": {"mixers": ("identity",) * 4, "norm": "map"},
    "randformer": {"mixers": ("identity", "identity", "random", "random"), "norm": "map"},
    "poolformerv2": {"mixers": ("pool",) * 4, "norm": "map"},
    "convformer": {"mixers": ("conv",) * 4, "norm": "channels"},
    "caformer": {"mixers": ("conv", "conv", "attention", "attention"), "norm": "channels"},
}
_S, _M = (64, 128, 320, 512), (96, 192, 384, 768)
_SIMPLE_SIZES = {
    "s12": {"depths": (2, 2, 6, 2), "embed_dim": _S},
    "s24": {"depths": (4, 4, 12, 4), "embed_dim": _S},
    "s36": {"depths": (6, 6, 18, 6), "embed_dim": _S},
    "m36": {"depths": (6, 6, 18, 6), "embed_dim": _M},
    "m48": {"depths": (8, 8, 24, 8), "embed_dim": _M},
}
_CONV_SIZES = {
    "s18": {"depths": (3, 3, 9, 3), "embed_dim": _S},
    "s36": {"depths": (3, 12, 18, 3), "embed_dim": _S},
    "m36": {"depths": (3, 12, 18, 3), "embed_dim": (96, 192, 384, 576)},
    "b36": {"depths": (3, 12, 18, 3), "embed_dim": (128, 256, 512, 768)},
}

CLASSIFIER = {"norm": "after", "init_scheme": "trunc_normal"}
_MLP_CLASSIFIER = CLASSIFIER | {"hidden_ratio": 4.0, "activation": "relu2", "hidden_epsilon": 1e-5}

VARIANTS = {
    f"{family}_{size}": Variant(MetaFormer, CLASSIFIER, PRESETS[family] | fields)
    for family in ("identityformer", "randformer", "poolformerv2")
    for size, fields in _SIMPLE_SIZES.items()
} | {
    f"{family}_{size}{suffix}": Variant(
        MetaFormer, _MLP_CLASSIFIER, {"image_size": pixels, **PRESETS[family], **fields}
    )
    for family in ("convformer", "caformer")
    for size, fields in _CONV_SIZES.items()
    for suffix, pixels in (("", 224), ("_384", 384))
}
