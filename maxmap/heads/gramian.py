"""GA: Gramian attention heads (Ryu et al., ICCV 2023), as Lab-LVM/imagenet-models has them.

All feature maps are aggregated to one map, or the last one is taken, and several branches read it. A branch reduces the
map's channels, turns the Gram matrix of the result into one class token, lets the token attend to the map, and
classifies it. The branches are trained to differ from each other; the prediction is the mean of their logits.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from einops import rearrange
from flax import linen as nn

from maxmap.layers.blocks import ConvNeXtBlock, CSWinBlock, GroupedMlp, SqueezeExcite
from maxmap.layers.parameters import parameter
from maxmap.layers.pooling import (
    Weights,
    adaptive_average,
    behind_norm,
    bilinear,
    gram_projection,
    map_logits,
    map_values,
    normalise_map,
)
from maxmap.layers.primitives import (
    CONV_INITS,
    LINEAR_INITS,
    BatchNorm,
    Conv,
    DropPath,
    Initializer,
    LayerNorm,
    Linear,
    require_divisor,
    require_one_of,
)
from maxmap.operations import Array, broadcast, scaled, softmax
from maxmap.ranges import Count, CountOrZero, DropRate, Positive

HEAD_DIM = 32  # channels of an attention head in the "cswin" blocks


def concatenate_features(features: Sequence[Array]) -> Array:
    """Concatenates the channels of all feature maps except the stem's, at the size of the second to last map.

    Larger maps are reduced by averaging, smaller ones enlarged by bilinear interpolation.
    """
    size = features[-2].shape[1:3]
    maps = features[1:] if len(features) > 2 else features
    return jnp.concatenate([x if x.shape[1:3] == size else _resize(x, size) for x in maps], axis=-1)


def _resize(x: Array, size: Sequence[int]) -> Array:
    return (adaptive_average if x.shape[1] > size[0] else bilinear)(x, size)


class BottleneckAggregation(nn.Module):
    """Aggregation by a residual bottleneck with squeeze-excitation; the shortcut is a 1x1 convolution with a norm.

    Attributes:
      channels: output channels.
      inits: initialisers of all convolutions.
      drop_path: rate of dropping the residual branch.
    """

    channels: int
    inits: Mapping[str, Initializer]
    drop_path: float

    @nn.compact
    def __call__(self, x: Array, *, train: bool) -> Array:
        width = self.channels // 4
        shortcut = Conv(self.channels, name="downsample_0", **self.inits)(x)
        shortcut = BatchNorm(name="downsample_1")(shortcut, train=train)
        y = Conv(width, bias=False, name="conv1", **self.inits)(x)
        y = nn.relu(BatchNorm(name="bn1")(y, train=train))
        y = Conv(width, 3, padding=1, bias=False, name="conv2", **self.inits)(y)
        y = nn.relu(BatchNorm(name="bn2")(y, train=train))
        y = SqueezeExcite(max((width // 4 + 4) // 8, 1) * 8, inits=self.inits, name="se")(y)
        y = Conv(self.channels, bias=False, name="conv3", **self.inits)(y)
        y = BatchNorm(name="bn3")(y, train=train)
        return nn.relu(DropPath(self.drop_path)(y, train=train) + shortcut)


class ConvNorm(nn.Module):
    """A 1x1 convolution and a LayerNorm, under the reference's names.

    Attributes:
      channels: output channels.
      inits: initialisers of the convolution.
    """

    channels: int
    inits: Mapping[str, Initializer]

    @nn.compact
    def __call__(self, x: Array) -> Array:
        return LayerNorm(1e-5, name="norm")(Conv(self.channels, name="conv", **self.inits)(x))


class ConvNeXtLayer(nn.Module):
    """One ConvNeXt block, under the reference's name.

    Attributes:
      drop_path: rate of dropping the residual branch.
    """

    drop_path: float

    @nn.compact
    def __call__(self, x: Array, *, train: bool) -> Array:
        return ConvNeXtBlock(self.drop_path, name="blocks_0")(x, train=train)


def cswin_block(x: Array, mlp_groups: int, drop_path: float, name: str) -> CSWinBlock:
    """Returns a CSWin block for the map `x`: its stripes cover half of a side, or all of a side of odd length."""
    size = x.shape[1:3]
    stripe = tuple(n if n % 2 else n // 2 for n in size)
    return CSWinBlock(x.shape[-1] // HEAD_DIM, None if stripe == size else stripe, mlp_groups, drop_path, name=name)


class ClassAttention(nn.Module):
    """Attention of one token over itself and the map (Touvron et al. 2021, CaiT).

    Attributes:
      width: channels of the queries, keys and values of all heads together.
      heads: of the attention.
      init_scheme: see `GramianHead`.
    """

    width: int
    heads: int
    init_scheme: str

    @nn.compact
    def __call__(self, token: Array, x: Array, norm: Weights) -> Array:
        """Maps the token `[B, 1, D]` and the map `[B, N, D]` to a token `[B, 1, D]`.

        Args:
          token: after its norm.
          x: normalised, without scale and bias.
          norm: scale and bias for `x`.
        """
        linear = functools.partial(Linear, self.width, bias=False, **LINEAR_INITS[self.init_scheme])
        split = functools.partial(rearrange, pattern="b n (h d) -> b n h d", h=self.heads)
        k, v = linear(name="k"), linear(name="v")
        q = split(linear(name="q")(token))
        q = q * q.shape[-1] ** -0.5
        of_map = [behind_norm(norm, part.weights(x.shape[-1]), x.dtype) for part in (k, v)]
        own = jnp.einsum("bthd,bshd->bhts", q, split(k(token)))
        probabilities = softmax(jnp.concatenate([own, map_logits(q, x, *of_map[0])], axis=-1))
        self.sow("intermediates", "attention", probabilities)  # for `maxmap.explain`
        out = jnp.einsum("bhts,bshd->bthd", probabilities[..., :1], split(v(token)))
        out = rearrange(out + map_values(probabilities[..., 1:], x, *of_map[1]), "b q h d -> b q (h d)")
        return Linear(x.shape[-1], name="proj", **LINEAR_INITS[self.init_scheme])(out)


class ClassAttentionBlock(nn.Module):
    """Class attention and a grouped MLP, each with a residual path and a layer scale.

    Attributes:
      width, heads, init_scheme: see `ClassAttention`.
      mlp: constructor of the grouped MLP.
    """

    width: int
    heads: int
    init_scheme: str
    mlp: Callable[..., nn.Module]

    @nn.compact
    def __call__(self, token: Array, x: Array) -> Array:
        """Maps the token `[B, 1, D]` and the map `[B, N, D]`, normalised already, to a token `[B, 1, D]`."""

        def layer_scale(name: str, y: Array) -> Array:
            return scaled(y, parameter(self, name, nn.initializers.constant(1e-4), y.shape[-1:]))

        norm = LayerNorm(1e-5, name="norm1")
        attention = ClassAttention(self.width, self.heads, self.init_scheme, name="attn")
        token = token + layer_scale("gamma_1", attention(norm(token), x, norm.weights(x.shape[-1])))
        mlp = self.mlp(name="mlp")
        return token + layer_scale("gamma_2", mlp(LayerNorm(1e-5, name="norm2")(token)[:, None])[:, 0])


class GramianHead(nn.Module):
    """Gramian attention.

    Attributes:
      num_classes: K; 0 returns each branch's token in place of logits.
      channels: D, channels of the aggregated map and of the tokens; without aggregation those of the last map.
      branches: G.
      aggregation: "bottleneck" or "cswin", the block that aggregates all feature maps to one, or "none" for the last
        map alone.
      aggregation_mlp_groups: groups of the MLP in the "cswin" aggregation.
      block: "convnext" or "cswin", the block in front of each branch's Gram matrix.
      gram_channels: P, channels of the map from which the Gram matrix is computed.
      contraction_groups: groups of the convolution from D to P channels.
      embedding_groups: groups of the convolution from the P(P+1)/2 Gram values to the token.
      heads: of the class attention.
      attention_width: channels of all its heads together; None for D // 4.
      mlp_ratio: hidden channels of the class attention's MLP divided by D.
      mlp_groups: groups of that MLP.
      init_scheme: "torch" (PyTorch's defaults), "trunc_normal" (weights with a deviation of 0.02, biases 0),
        "trunc_normal_linear" (the same for linear maps only) or "he" (convolutions by He's rule). The blocks follow
        their own families.
      drop_path: rate of dropping the residual branches of the aggregation and of the blocks. The recipes give the
        backbone's.
    """

    num_classes: CountOrZero
    channels: Count = 512
    branches: Count = 5
    aggregation: str = "bottleneck"
    aggregation_mlp_groups: Count = 1
    block: str = "convnext"
    gram_channels: Count = 192
    contraction_groups: Count = 1
    embedding_groups: Count = 8
    heads: Count = 8
    attention_width: Count | None = None
    mlp_ratio: Positive = 4.0
    mlp_groups: Count = 4
    init_scheme: str = "trunc_normal"
    drop_path: DropRate = 0.0

    @nn.nowrap
    def validate(self, num_features: int) -> None:
        """Checks that the fields fit each other and the backbone.

        Args:
          num_features: feature maps of the backbone.

        Raises:
          ValueError: they do not; one sentence.
        """
        if num_features < 2:
            raise ValueError(f"the Gramian head needs 2 feature maps or more, the backbone has {num_features}")
        choices = {
            "aggregation": ("bottleneck", "cswin", "none"),
            "block": ("convnext", "cswin"),
            "init_scheme": tuple(CONV_INITS),
        }
        for field, allowed in choices.items():
            require_one_of(getattr(self, field), f"the Gramian head's {field}", allowed)

        divides = functools.partial(require_divisor, owner="the Gramian head's ")
        divides(self.contraction_groups, "contraction_groups", self.channels, "channels")
        divides(self.contraction_groups, "contraction_groups", self.gram_channels, "gram_channels")
        divides(self.embedding_groups, "embedding_groups", self.channels, "channels")
        gram_size = self.gram_channels * (self.gram_channels + 1) // 2
        divides(self.embedding_groups, "embedding_groups", gram_size, "Gram values")
        divides(self.heads, "heads", self.attention_width or self.channels // 4, "attention channels")
        divides(self.mlp_groups, "mlp_groups", self.channels, "channels")
        divides(self.mlp_groups, "mlp_groups", int(self.mlp_ratio * self.channels), "hidden channels")
        if self.aggregation == "cswin":
            divides(self.aggregation_mlp_groups, "aggregation_mlp_groups", self.channels, "channels")
        for kind, field in ((self.aggregation, "channels"), (self.block, "gram_channels")):
            channels = getattr(self, field)
            step = 2 * HEAD_DIM
            if kind == "cswin" and channels % step:
                near = max(round(channels / step), 1) * step
                raise ValueError(
                    f"the Gramian head's {field} {channels} are not a multiple of {step}, which a 'cswin' block needs; "
                    f"the nearest is {near}"
                )

    @nn.nowrap
    def attended_size(self, features: Sequence[Array]) -> tuple[int, int]:
        """Returns height and width of the map that the tokens attend to, N = height * width in row-major order."""
        height, width = features[-1 if self.aggregation == "none" else -2].shape[1:3]
        return height, width

    @nn.nowrap
    def attention_of(self, sown: Mapping[str, Any]) -> Array:
        """Returns how the tokens attend to the map, the mean over the heads.

        Args:
          sown: what a call sowed as 'intermediates'.

        Returns:
          `[G, B, 1, N]`.
        """
        maps = [sown[f"ga_{k}"]["attn"]["attention"][0] for k in range(self.branches)]
        return jnp.stack([jnp.mean(heads, axis=1)[..., 1:] for heads in maps])

    @nn.nowrap
    def shares(self, params: Mapping[str, Any], outputs: Mapping[str, Array], classes: Array) -> tuple[Array, Array]:
        """Splits each branch's logit of a class into what its token and what the bias adds; see `MAPHead.shares`."""
        bias = jnp.stack([params[f"fc_{k}"]["bias"][classes] for k in range(self.branches)])
        logits = outputs["logits"][:, jnp.arange(len(classes)), classes]
        return (logits - bias)[..., None], bias

    @nn.compact
    def __call__(self, features: Sequence[Array], *, train: bool = False) -> dict[str, Array]:
        """Maps feature maps `[B, H, W, C]` to branches.

        Returns:
          'logits' `[G, B, K]` and 'embedding' `[B, G * D]`.

        Raises:
          ValueError: The fields do not fit each other or the maps.
        """
        self.validate(len(features))
        x = self._aggregate(features, train)
        pixels = normalise_map(x, 1e-5)
        tokens, logits = [], []
        for k in range(self.branches):
            token = self._branch(k, x, pixels, train)
            tokens.append(token)
            if self.num_classes:
                logits.append(Linear(self.num_classes, name=f"fc_{k}", **LINEAR_INITS[self.init_scheme])(token))
        return {
            "logits": jnp.stack(logits if self.num_classes else tokens),
            "embedding": jnp.concatenate(tokens, axis=-1),
        }

    @nn.nowrap
    def _aggregate(self, features: Sequence[Array], train: bool) -> Array:
        """Maps feature maps `[B, H, W, C]` to one `[B, H, W, D]`; the references call the result a fifth stage."""
        if self.aggregation == "none":
            if features[-1].shape[-1] != self.channels:
                raise ValueError(
                    f"the Gramian head without aggregation reads the last map, which has {features[-1].shape[-1]} "
                    f"channels, not {self.channels}; set channels"
                )
            return features[-1]
        x = concatenate_features(features)
        inits = CONV_INITS[self.init_scheme]
        if self.aggregation == "bottleneck":
            return BottleneckAggregation(self.channels, inits, self.drop_path, name="stages_4")(x, train=train)
        x = ConvNorm(self.channels, inits, name="stage5_1")(x)
        return cswin_block(x, self.aggregation_mlp_groups, self.drop_path, name="stage5_2")(x, train=train)

    @nn.nowrap
    def _branch(self, k: int, x: Array, pixels: Array, train: bool) -> Array:
        """Maps the aggregated map, as `[B, H, W, D]` and normalised as `[B, N, D]`, to branch `k`'s token `[B, D]`."""
        conv = functools.partial(Conv, **CONV_INITS[self.init_scheme])
        y = conv(self.gram_channels, groups=self.contraction_groups, name=f"gram_contraction_{k}_0")(x)
        y = BatchNorm(name=f"gram_contraction_{k}_1")(y, train=train)
        if self.block == "convnext":
            layer = ConvNeXtLayer(self.drop_path, name=f"gram_layer_{k}")
        else:
            layer = cswin_block(y, 1, self.drop_path, name=f"gram_layer_{k}_1")
        y = layer(y, train=train)
        embedding = conv(self.channels, groups=self.embedding_groups, name=f"gram_embedding_{k}_0")
        y, kernel, bias = nn.dtypes.promote_dtype(y, *embedding.weights(y.shape[-1] * (y.shape[-1] + 1) // 2))
        values = gram_projection(y, kernel[0, 0], self.embedding_groups)
        values = embedding.output(values + broadcast(bias, values.shape))
        token = BatchNorm(name=f"gram_embedding_{k}_1")(values, train=train)[:, None]  # [B, 1, D]
        width = self.attention_width or self.channels // 4
        mlp = functools.partial(GroupedMlp, self.mlp_groups, self.mlp_ratio, inits=CONV_INITS[self.init_scheme])
        block = ClassAttentionBlock(width, self.heads, self.init_scheme, mlp, name=f"ga_{k}")
        return block(token, pixels)[:, 0]
