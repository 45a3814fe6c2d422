"""MAP: multi-token attention pooling with Gram tokens (Lee et al., WACV 2025), as Lab-LVM/imagenet-models has it.

All feature maps are fused to one map, which several branches read. A branch computes a few tokens from the Gram matrix
of the map, lets them attend to the map, and classifies them. The prediction is the mean of the branches' logits. Other
libraries call another method MAP: attention pooling with one learned query.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import linen as nn

from maxmap.layers.blocks import GroupedMlp
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
    ACTIVATIONS,
    CONV_INITS,
    LINEAR_INITS,
    BatchNorm,
    Conv,
    LayerNorm,
    Linear,
    require_divisor,
    require_one_of,
)
from maxmap.operations import Array, convolve, layer_norm, softmax, upcast
from maxmap.ranges import Count, CountOrZero, DropRate, Positive, Range

NORM_EPSILON = 1e-5  # of the norm in front of a classifier


def resize_to(x: Array, size: Sequence[int]) -> Array:
    """Resizes a map `[B, H, W, C]` as MAP's multi-scale fusion does; the height alone decides in which way.

    A smaller map is enlarged by adaptive average pooling, which for whole factors repeats pixels. A larger map is
    reduced by bilinear interpolation without antialiasing. The released weights were trained with this choice.
    """
    if x.shape[1] == size[0]:
        return x
    return (adaptive_average if x.shape[1] < size[0] else bilinear)(x, size)


class MultiScale(nn.Module):
    """Fuses all feature maps at the size of one of them.

    Attributes:
      channels: D of the fused map.
      level: index of the feature map whose size the fused map takes.
      activation: after the norm.
      init_scheme: see `MAPHead`.
    """

    channels: int
    level: int
    activation: str
    init_scheme: str

    @nn.compact
    def __call__(self, features: Sequence[Array], *, train: bool) -> Array:
        size = features[self.level].shape[1:3]
        conv = Conv(self.channels, bias=False, name="concat_conv_0", **CONV_INITS[self.init_scheme])
        kernel, _ = conv.weights(sum(feature.shape[-1] for feature in features))
        *features, kernel = nn.dtypes.promote_dtype(*features, kernel)
        kernels = jnp.split(kernel, np.cumsum([feature.shape[-1] for feature in features])[:-1], axis=2)
        parts = list(zip(features, kernels, strict=True))
        # Smaller maps are enlarged after the convolution, which is linear: it has fewer pixels to read there.
        small = [part for part in parts if part[0].shape[1] < size[0]]
        others = [part for part in parts if part[0].shape[1] >= size[0]]
        x = convolve(
            jnp.concatenate([resize_to(feature, size) for feature, _ in others], axis=-1),
            jnp.concatenate([kernel for _, kernel in others], axis=2),
        )
        for feature, kernel in small:
            x = x + resize_to(convolve(feature, kernel), size)
        return ACTIVATIONS[self.activation](BatchNorm(name="concat_conv_1")(conv.output(x), train=train))


class GramTokens(nn.Module):
    """Tokens from the Gram matrix of a reduced map.

    Attributes:
      tokens: T.
      gram_channels: P, channels of the reduced map.
      token_channels: Q, channels of a token.
      gram_groups: groups of the convolution from the P(P+1)/2 Gram values to the tokens.
      init_scheme: see `MAPHead`.
    """

    tokens: int
    gram_channels: int
    token_channels: int
    gram_groups: int
    init_scheme: str

    @nn.compact
    def __call__(self, x: Array, *, train: bool) -> Array:
        """Maps `[B, H, W, D]` to `[B, T, Q]`."""
        conv = functools.partial(Conv, bias=False, **CONV_INITS[self.init_scheme])
        x = BatchNorm(name="ch_reduction_1")(conv(self.gram_channels, name="ch_reduction_0")(x), train=train)
        second_order = self.gram_channels * (self.gram_channels + 1) // 2
        reduction = conv(self.tokens * self.token_channels, groups=self.gram_groups, name="bp_reduction_0")
        kernel, _ = reduction.weights(second_order)
        x, kernel = nn.dtypes.promote_dtype(x, kernel)
        v = reduction.output(gram_projection(x, kernel[0, 0], self.gram_groups, self.tokens))
        v = BatchNorm(name="bp_reduction_1")(v, train=train)
        return rearrange(v, "b (q t) -> b t q", t=self.tokens)


class TokenAttention(nn.Module):
    """Attention of the tokens over the tokens and the map (Touvron et al. 2021, CaiT).

    Attributes:
      channels: D of the map and of the output.
      width: E, channels of the queries, keys and values of all heads together.
      heads: H.
      interactive: mixes the heads by a linear map before the softmax and by another one after it.
      dropout: of the attention probabilities.
      proj_dropout: of the output.
      init_scheme: see `MAPHead`.
    """

    channels: int
    width: int
    heads: int
    interactive: bool
    dropout: float
    proj_dropout: float
    init_scheme: str

    @nn.compact
    def __call__(self, tokens: Array, x: Array, norm: Weights, *, train: bool) -> Array:
        """Maps tokens `[B, T, Q]` and the map `[B, N, D]` to tokens `[B, T, D]`.

        Args:
          tokens: after their norm.
          x: normalised, without scale and bias.
          norm: scale and bias for `x`.
          train: with dropout.
        """
        inits = LINEAR_INITS[self.init_scheme]
        linear = functools.partial(Linear, self.width, **inits)
        split = functools.partial(rearrange, pattern="b n (h d) -> b n h d", h=self.heads)
        count, same = tokens.shape[1], tokens.shape[-1] == x.shape[-1]
        q = split(linear(name="q")(tokens))
        q = q * q.shape[-1] ** -0.5
        k, v = ((2 * (linear(name=n),)) if same else (linear(name=f"{n}1"), linear(name=f"{n}2")) for n in "kv")
        of_map = [behind_norm(norm, of_x.weights(x.shape[-1]), x.dtype) for _, of_x in (k, v)]
        logits = jnp.einsum("bthd,bshd->bhts", q, split(k[0](tokens)))
        logits = jnp.concatenate([logits, map_logits(q, x, *of_map[0])], axis=-1)
        if self.interactive:
            logits = logits + _mix(Linear(self.heads, name="w1", **inits), logits)
        probabilities = softmax(logits)
        if self.interactive:
            probabilities = probabilities + _mix(Linear(self.heads, name="w2", **inits), probabilities)
        self.sow("intermediates", "attention", probabilities)  # for `maxmap.explain`
        probabilities = nn.Dropout(self.dropout)(probabilities, deterministic=not train)
        out = jnp.einsum("bhts,bshd->bthd", probabilities[..., :count], split(v[0](tokens)))
        out = rearrange(out + map_values(probabilities[..., count:], x, *of_map[1]), "b t h d -> b t (h d)")
        out = Linear(self.channels, name="proj", **inits)(out)
        return nn.Dropout(self.proj_dropout)(out, deterministic=not train)


def _mix(linear: Linear, x: Array) -> Array:
    """Applies a linear map to the heads' values at every query and key of `[B, H, T, N]`."""
    x, kernel, bias = nn.dtypes.promote_dtype(x, *linear.weights(x.shape[1]))
    return jnp.einsum("bhtn,hg->bgtn", x, kernel) + bias[None, :, None, None]


class TokenAttentionBlock(nn.Module):
    """Class attention, then a grouped MLP, each with a residual path.

    Where the tokens have other channels than the map, the attention has no residual path.

    Attributes:
      attention: constructor of the `TokenAttention`.
      mlp: constructor of the grouped MLP.
    """

    attention: Callable[..., nn.Module]
    mlp: Callable[..., nn.Module]

    @nn.compact
    def __call__(self, tokens: Array, x: Array, *, train: bool) -> Array:
        """Maps tokens `[B, T, Q]` and the map `[B, N, D]`, normalised already, to tokens `[B, T, D]`."""
        attention = self.attention(name="attn")
        if tokens.shape[-1] == x.shape[-1]:
            norm = LayerNorm(1e-6, name="norm1")
            tokens = tokens + attention(norm(tokens), x, norm.weights(x.shape[-1]), train=train)
        else:
            of_tokens, of_map = LayerNorm(1e-6, name="norm1_1"), LayerNorm(1e-6, name="norm1_2")
            tokens = attention(of_tokens(tokens), x, of_map.weights(x.shape[-1]), train=train)
        y = LayerNorm(1e-6, name="norm2")(tokens)[:, None]
        return tokens + self.mlp(name="mlp")(y, train=train)[:, 0]


class Branch(nn.Module):
    """One branch: tokens from the fused map, then class attention.

    Attributes:
      gram_tokens: constructor of the `GramTokens`; None for learned tokens.
      tokens: T.
      self_distill: appends the mean of the tokens as one more token.
      layers: number of class attention blocks.
      block: constructor of a `TokenAttentionBlock`.
    """

    gram_tokens: Callable[..., nn.Module] | None
    tokens: int
    self_distill: bool
    layers: int
    block: Callable[..., nn.Module]

    @nn.compact
    def __call__(self, x: Array, pixels: Array, *, train: bool) -> Array:
        """Maps the fused map, as `[B, H, W, D]` and normalised as `[B, N, D]`, to tokens `[B, T (+ 1), D]`."""
        if self.gram_tokens is None:
            learned = parameter(self, "x_cls", nn.initializers.zeros, (1, self.tokens, x.shape[-1]))
            tokens = jnp.broadcast_to(learned.astype(x.dtype), (x.shape[0], *learned.shape[1:]))
        else:
            tokens = self.gram_tokens(name="gram_token_extraction")(x, train=train)
        if self.self_distill:
            tokens = jnp.concatenate([tokens, jnp.mean(tokens, axis=1, keepdims=True)], axis=1)
        for i in range(self.layers):
            tokens = self.block(name=f"attention_{i}")(tokens, pixels, train=train)
        return tokens


class MultiBranchPooling(nn.Module):
    """Fusion of the feature maps, then the branches.

    Attributes:
      channels: D.
      level: index of the feature map whose size the fused map takes; 0 or -1 for the last feature map alone.
      activation: of the fusion.
      branches: G.
      branch: constructor of a `Branch`.
      init_scheme: see `MAPHead`.
    """

    channels: int
    level: int
    activation: str
    branches: int
    branch: Callable[..., nn.Module]
    init_scheme: str

    @nn.compact
    def __call__(self, features: Sequence[Array], *, train: bool) -> list[Array]:
        """Maps feature maps to G lists of tokens `[B, T (+ 1), D]`."""
        if self.level > 0:
            fusion = MultiScale(self.channels, self.level, self.activation, self.init_scheme, name="multi_scale")
            x = fusion(features, train=train)
        else:
            x = features[-1]
            if x.shape[-1] != self.channels:
                x = Conv(self.channels, bias=False, name="channel_convertor_0", **CONV_INITS[self.init_scheme])(x)
                x = nn.relu(BatchNorm(name="channel_convertor_1")(x, train=train))
        pixels = normalise_map(x, 1e-6)
        return [self.branch(name=f"mmcap_{g}")(x, pixels, train=train) for g in range(self.branches)]


class NormClassifier(nn.Module):
    """LayerNorm over all values of the flattened tokens, then dropout and a linear map.

    Attributes:
      num_classes: K.
      dropout: before the linear map.
      init_scheme: see `MAPHead`.
    """

    num_classes: int
    dropout: float
    init_scheme: str

    @nn.compact
    def __call__(self, x: Array, *, train: bool) -> Array:
        x = nn.Dropout(self.dropout)(LayerNorm(NORM_EPSILON, name="norm")(x), deterministic=not train)
        return Linear(self.num_classes, name="head", **LINEAR_INITS[self.init_scheme])(x)


class MAPHead(nn.Module):
    """Multi-token attention pooling.

    Attributes:
      num_classes: K; 0 returns each branch's flattened tokens in place of logits.
      channels: D, channels of the fused map and of the tokens after the attention.
      level: index of the feature map whose size the fused map takes; 0 or less for the last feature map alone.
      activation: of the fusion.
      branches: G.
      tokens: T per branch.
      self_distill: adds the mean token and a second classifier per branch, which learns from the first.
      light: predicts with the second classifiers. While training, the first ones get no gradient.
      gram: computes the tokens from the Gram matrix; False for learned tokens.
      gram_channels: P, channels of the map from which the Gram matrix is computed.
      token_channels: Q, channels of the Gram tokens; None for D. Other channels than D allow one attention block only,
        which then has no residual path around the attention.
      gram_groups: groups of the convolution from the Gram values to the tokens.
      layers: number of class attention blocks.
      heads: of the class attention.
      attention_width: E, channels of all its heads together; None for D.
      interactive: mixes the attention heads.
      mlp_ratio: hidden channels of the MLP divided by D.
      mlp_groups: groups of the MLP's convolutions.
      classifier: "norm" (LayerNorm first) or "linear".
      attention_dropout: of the attention probabilities.
      token_dropout: after the attention's projection and inside of the MLP.
      dropout: before the linear maps of the classifiers; "norm" classifiers only, as in the reference.
      init_scheme: "torch" (PyTorch's defaults), "trunc_normal" (weights with a deviation of 0.02, biases 0),
        "trunc_normal_linear" (the same for linear maps only) or "he" (convolutions by He's rule, linear maps as in
        "trunc_normal"). A published head follows the scheme of its backbone.
    """

    num_classes: CountOrZero
    channels: Count = 384
    level: Annotated[int, Range(at_least=-1)] = 3
    activation: str = "gelu"
    branches: Count = 4
    tokens: Count = 2
    self_distill: bool = True
    light: bool = False
    gram: bool = True
    gram_channels: Count = 384
    token_channels: Count | None = None
    gram_groups: Count = 24
    layers: Count = 1
    heads: Count = 12
    attention_width: Count | None = None
    interactive: bool = False
    mlp_ratio: Positive = 4.0
    mlp_groups: Count = 2
    classifier: str = "norm"
    attention_dropout: DropRate = 0.05
    token_dropout: DropRate = 0.05
    dropout: DropRate = 0.0
    init_scheme: str = "torch"

    @nn.nowrap
    def validate(self, num_features: int) -> None:
        """Raises ValueError, one sentence, if the fields do not fit each other or a backbone's `num_features` maps."""
        second_order = self.gram_channels * (self.gram_channels + 1) // 2
        token_channels = self.token_channels or self.channels
        width = self.attention_width or self.channels

        divides = functools.partial(require_divisor, owner="the MAP head's ")
        if self.level >= num_features:
            raise ValueError(
                f"the MAP head's level {self.level} is out of range: the backbone has {num_features} feature maps, "
                f"so the highest level is {num_features - 1}"
            )
        if self.gram:
            divides(self.tokens, "tokens", second_order, "Gram values")
            divides(self.gram_groups, "gram_groups", second_order, "Gram values")
            divides(self.gram_groups, "gram_groups", self.tokens * token_channels, "token values")
        divides(self.heads, "heads", width, "attention channels")
        divides(self.mlp_groups, "mlp_groups", self.channels, "channels")
        divides(self.mlp_groups, "mlp_groups", int(self.mlp_ratio * self.channels), "hidden channels")
        choices = {"activation": ACTIVATIONS, "classifier": ("norm", "linear"), "init_scheme": LINEAR_INITS}
        for field, allowed in choices.items():
            require_one_of(getattr(self, field), f"the MAP head's {field}", allowed)
        if token_channels != self.channels and (self.layers > 1 or not self.gram):
            raise ValueError(
                "the MAP head's token_channels differ from its channels, which needs Gram tokens and one layer"
            )
        if self.light and not self.self_distill:
            raise ValueError(
                "the MAP head's light mode predicts with the self-distillation classifiers: set self_distill"
            )

    @nn.nowrap
    def attended_size(self, features: Sequence[Array]) -> tuple[int, int]:
        """Returns height and width of the map that the tokens attend to, N = height * width in row-major order."""
        height, width = features[self.level if self.level > 0 else -1].shape[1:3]
        return height, width

    @nn.nowrap
    def attention_of(self, sown: Mapping[str, Any]) -> Array:
        """Returns how the tokens that are classified attend to the map, in the last block: the mean over its heads.

        Args:
          sown: what a call sowed as 'intermediates'.

        Returns:
          `[G, B, T, N]`; with `light` T is 1, the token of the second classifiers. With `interactive` heads it may be
          negative.
        """
        blocks = [sown["mmcap"][f"mmcap_{g}"][f"attention_{self.layers - 1}"] for g in range(self.branches)]
        maps = jnp.stack([jnp.mean(block["attn"]["attention"][0], axis=1) for block in blocks])
        own = self.tokens + self.self_distill  # keys in front of the map's
        return maps[:, :, self.tokens :, own:] if self.light else maps[:, :, : self.tokens, own:]

    @nn.nowrap
    def shares(self, params: Mapping[str, Any], outputs: Mapping[str, Array], classes: Array) -> tuple[Array, Array]:
        """Splits each branch's logit of a class into what its tokens add to it.

        The classifiers are linear behind a norm over the values of all tokens, so the parts add up to the logit.

        Args:
          params: Of the head.
          outputs: Of the head, for B images.
          classes: `[B]`, the class of each image.

        Returns:
          What the tokens add, `[G, B, T]`, and what the bias adds, `[G, B]`.
        """
        if self.light:
            layers = [params[f"self_dt_heads_{g}"]["head"] for g in range(self.branches)]
            bias = jnp.stack([layer["bias"][classes] for layer in layers])
            logits = outputs["logits"][:, jnp.arange(len(classes)), classes]
            return (logits - bias)[..., None], bias
        values = rearrange(outputs["embedding"], "b (g n) -> g b n", g=self.branches)
        added, biases = [], []
        for g in range(self.branches):
            layer, x = params[f"heads_{g}"], values[g]
            if self.classifier == "norm":
                x = layer_norm(x, layer["norm"]["scale"], layer["norm"]["bias"], NORM_EPSILON)
                layer = layer["head"]
            parts = upcast(x) * upcast(layer["kernel"])[:, classes].T
            added.append(jnp.sum(rearrange(parts, "b (t d) -> b t d", t=self.tokens), axis=-1))
            biases.append(layer["bias"][classes])
        return jnp.stack(added), jnp.stack(biases)

    @nn.compact
    def __call__(self, features: Sequence[Array], *, train: bool = False) -> dict[str, Array]:
        """Maps feature maps `[B, H, W, C]` to branches.

        Returns:
          'logits' `[G, B, K]`, 'embedding' `[B, G * T * D]`, and while training with self-distillation 'distill'
          `[G, B, K]`.

        Raises:
          ValueError: The fields do not fit each other or the maps.
        """
        self.validate(len(features))
        pooling = MultiBranchPooling(
            self.channels,
            self.level,
            self.activation,
            self.branches,
            self._branch_constructor(),
            self.init_scheme,
            name="mmcap",
        )
        tokens = jnp.stack(pooling(features, train=train))  # [G, B, T (+ 1), D]
        main = rearrange(tokens[:, :, : self.tokens], "g b t d -> g b (t d)")
        outputs = {"logits": main, "embedding": rearrange(main, "g b n -> b (g n)")}
        if not self.num_classes:
            return outputs
        outputs["logits"] = self._classify(main, train)
        if self.self_distill:
            normed = functools.partial(NormClassifier, self.num_classes, self.dropout, self.init_scheme)
            distill = [
                normed(name=f"self_dt_heads_{g}")(tokens[g, :, self.tokens], train=train) for g in range(self.branches)
            ]
            if train:
                outputs["distill"] = jnp.stack(distill)
            elif self.light:
                outputs["logits"] = jnp.stack(distill)
        return outputs

    @nn.nowrap
    def _branch_constructor(self) -> functools.partial[nn.Module]:
        gram_tokens = functools.partial(
            GramTokens,
            self.tokens,
            self.gram_channels,
            self.token_channels or self.channels,
            self.gram_groups,
            self.init_scheme,
        )
        attention = functools.partial(
            TokenAttention,
            self.channels,
            self.attention_width or self.channels,
            self.heads,
            self.interactive,
            self.attention_dropout,
            self.token_dropout,
            self.init_scheme,
        )
        # The released networks use ReLU here, whatever the activation of the fusion.
        inits = CONV_INITS[self.init_scheme]
        mlp = functools.partial(GroupedMlp, self.mlp_groups, self.mlp_ratio, "relu", self.token_dropout, inits)
        block = functools.partial(TokenAttentionBlock, attention, mlp)
        return functools.partial(
            Branch, gram_tokens if self.gram else None, self.tokens, self.self_distill, self.layers, block
        )

    @nn.nowrap
    def _classify(self, tokens: Array, train: bool) -> Array:
        """Maps each branch's flattened tokens `[G, B, T * D]` to the logits `[G, B, K]` of the first classifiers."""
        classifier: Any
        if self.classifier == "norm":
            classifier = functools.partial(NormClassifier, self.num_classes, self.dropout, self.init_scheme)
        else:
            classifier = functools.partial(_LinearClassifier, self.num_classes, **LINEAR_INITS[self.init_scheme])
        if self.light:
            classifier = _without_gradient(classifier, self.is_initializing())
        return jnp.stack([classifier(name=f"heads_{g}")(tokens[g], train=train) for g in range(self.branches)])


class _LinearClassifier(Linear):
    """A linear map that takes and ignores `train`, to be called like `NormClassifier`."""

    def __call__(self, x: Array, *, train: bool = False) -> Array:
        del train
        return super().__call__(x)


def _without_gradient(classifier: functools.partial[nn.Module], initializing: bool) -> Callable[..., nn.Module]:
    """Returns the constructor of a classifier whose parameters get no gradient."""

    def make(name: str) -> nn.Module:
        frozen = nn.map_variables(classifier.func, "params", trans_in_fn=jax.lax.stop_gradient, init=initializing)
        return frozen(*classifier.args, **classifier.keywords, name=name)

    return make
