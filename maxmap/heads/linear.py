"""The plain classifier: global average pooling, norm, an optional hidden layer, one linear map."""

from collections.abc import Sequence

import jax.numpy as jnp
from flax import linen as nn

from maxmap.layers.blocks import ConvNormAct
from maxmap.layers.primitives import (
    ACTIVATIONS,
    TRUNC_NORMAL,
    BatchNorm,
    Initializer,
    LayerNorm,
    Linear,
    require_one_of,
)
from maxmap.operations import Array
from maxmap.ranges import Count, CountOrZero, DropRate, NonNegative, Positive

# Initialisers of the linear maps by scheme.
INITS: dict[str, dict[str, Initializer]] = {
    "torch": {},
    "trunc_normal": TRUNC_NORMAL,
    "normal": {"kernel_init": nn.initializers.normal(0.01), "bias_init": nn.initializers.zeros},
}


class _Hidden(nn.Module):
    """The hidden layer under MaxViT's name, `pre_logits.fc`.

    Attributes:
      channels: of the layer.
      init_scheme: see `LinearHead`.
    """

    channels: int
    init_scheme: str

    @nn.compact
    def __call__(self, x: Array) -> Array:
        return Linear(self.channels, name="fc", **INITS[self.init_scheme])(x)


class _MlpClassifier(nn.Module):
    """The hidden layer, its norm and the last linear map under MetaFormer's names, `fc.{fc1,norm,fc2}`.

    Attributes:
      hidden: channels of the hidden layer.
      num_classes, activation, dropout, init_scheme: see `LinearHead`.
      epsilon: of the norm.
    """

    hidden: int
    num_classes: int
    activation: str
    epsilon: float
    dropout: float
    init_scheme: str

    @nn.compact
    def __call__(self, x: Array, *, train: bool) -> Array:
        """Maps `[B, C]` to logits `[B, K]`."""
        inits = INITS[self.init_scheme]
        x = ACTIVATIONS[self.activation](Linear(self.hidden, name="fc1", **inits)(x))
        x = nn.Dropout(self.dropout)(LayerNorm(self.epsilon, name="norm")(x), deterministic=not train)
        return Linear(self.num_classes, name="fc2", **inits)(x)


class LinearHead(nn.Module):
    """Classifies the mean of the last feature map.

    Attributes:
      num_classes: K; 0 returns the embedding in place of logits.
      branches: G classifiers that read the same embedding; their losses can differ (GA's baseline of several heads).
      norm: "before" the pooling (of the map), "after" it (of the mean), or "none".
      norm_type: "layer" or "batch".
      epsilon: of the norm, and of the LayerNorm of the neck.
      neck: channels of a 1x1 convolution in front of the pooling and of a hidden layer behind it, whose output is the
        embedding (EfficientViT); () for none. Neither has a bias. A batch norm follows the first, a LayerNorm the
        second, and the activation both.
      hidden_ratio: channels of the hidden layer divided by the map's; 0 for no hidden layer.
      hidden_epsilon: of a LayerNorm after the hidden layer, which then is a part of the classifier (MetaFormer's MLP
        head). None for no such norm: the hidden layer then is a part of the embedding (MaxViT).
      activation: after the hidden layer, or of the neck.
      dropout: before the last linear map.
      bias: of the last linear map.
      init_scheme: "torch" (PyTorch's defaults), "trunc_normal" (weights with a deviation of 0.02, biases 0) or "normal"
        (weights with a deviation of 0.01, biases 0).
    """

    num_classes: CountOrZero
    branches: Count = 1
    norm: str = "before"
    norm_type: str = "layer"
    epsilon: Positive = 1e-6
    neck: Sequence[Count] = ()
    hidden_ratio: NonNegative = 0.0
    hidden_epsilon: Positive | None = None
    activation: str = "tanh"
    dropout: DropRate = 0.0
    bias: bool = True
    init_scheme: str = "torch"

    @nn.nowrap
    def validate(self, num_features: int) -> None:
        """Raises ValueError, one sentence, if the fields do not fit."""
        choices = {
            "norm": ("before", "after", "none"),
            "norm_type": ("layer", "batch"),
            "activation": tuple(ACTIVATIONS),
            "init_scheme": tuple(INITS),
        }
        for field, allowed in choices.items():
            require_one_of(getattr(self, field), f"the linear head's {field}", allowed)
        if len(self.neck) not in (0, 2):
            raise ValueError(f"the linear head's neck needs two numbers of channels or none, not {len(self.neck)}")

    @nn.compact
    def __call__(
        self, features: Sequence[Array], *, train: bool = False, pool: bool = True
    ) -> dict[str, Array] | Array:
        """Classifies feature maps.

        Args:
          features: the last one, `[B, H, W, C]`, is read.
          train: with dropout and batch statistics.
          pool: False stops in front of the pooling.

        Returns:
          'logits' `[G, B, K]` and 'embedding' `[B, D]`. Without `pool` the map `[B, H, W, C]` that would be pooled.

        Raises:
          ValueError: The fields do not fit.
        """
        self.validate(len(features))

        def normalize(x: Array) -> Array:
            if self.norm_type == "batch":
                return BatchNorm(self.epsilon, name="norm")(x, train=train)
            return LayerNorm(self.epsilon, name="norm")(x)

        x = features[-1]
        if self.norm == "before":
            x = normalize(x)
        if not pool:
            return x
        if self.neck:
            x = ConvNormAct(self.neck[0], activation=self.activation, norm="norm", name="in_conv")(x, train=train)
        x = jnp.mean(x, axis=(1, 2))  # [B, C]
        if self.norm == "after":
            x = normalize(x)
        if self.neck:
            x = Linear(self.neck[1], bias=False, name="classifier_0", **INITS[self.init_scheme])(x)
            x = ACTIVATIONS[self.activation](LayerNorm(self.epsilon, name="classifier_1")(x))
        hidden = round(self.hidden_ratio * x.shape[-1])
        if hidden and self.hidden_epsilon is None:
            x = ACTIVATIONS[self.activation](_Hidden(hidden, self.init_scheme, name="pre_logits")(x))
        if not self.num_classes:
            return {"logits": x[None], "embedding": x}
        names = ["fc"] if self.branches == 1 else [f"fc_{k}" for k in range(self.branches)]
        return {"logits": jnp.stack([self._classify(x, hidden, name, train) for name in names]), "embedding": x}

    @nn.nowrap
    def _classify(self, x: Array, hidden: int, name: str, train: bool) -> Array:
        """Maps the embedding `[B, D]` to one branch's logits `[B, K]`."""
        if hidden and self.hidden_epsilon is not None:
            fields = (self.num_classes, self.activation, self.hidden_epsilon, self.dropout, self.init_scheme)
            return _MlpClassifier(hidden, *fields, name=name)(x, train=train)
        x = nn.Dropout(self.dropout)(x, deterministic=not train)
        return Linear(self.num_classes, bias=self.bias, name=name, **INITS[self.init_scheme])(x)
