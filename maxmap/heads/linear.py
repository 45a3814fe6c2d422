"""The plain classifier: global average pooling, norm, an optional hidden layer, one linear map."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import linen as nn

from maxmap.layers import ACTIVATIONS, BatchNorm, LayerNorm, Linear

Array = jax.Array


class _Hidden(nn.Module):
    """The hidden layer, under the reference's name `pre_logits.fc`."""

    channels: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        return Linear(self.channels, name="fc")(x)


class LinearHead(nn.Module):
    """Classifies the mean of the last feature map.

    Attributes:
      num_classes: K; 0 returns the embedding in place of logits.
      norm: "before" the pooling (of the map), "after" it, or "none".
      norm_type: "layer" or "batch".
      epsilon: of the norm.
      hidden_ratio: width of the hidden layer relative to the map's channels; 0 for no hidden layer.
      activation: after the hidden layer.
      dropout: before the last linear map.
    """

    num_classes: int
    norm: str = "before"
    norm_type: str = "layer"
    epsilon: float = 1e-6
    hidden_ratio: float = 0.0
    activation: str = "tanh"
    dropout: float = 0.0

    @nn.nowrap
    def validate(self, num_features: int) -> None:
        """Raises ValueError, one sentence, if the fields do not fit."""
        for field, allowed in (("norm", ("before", "after", "none")), ("norm_type", ("layer", "batch"))):
            if getattr(self, field) not in allowed:
                raise ValueError(
                    f"the linear head's {field} '{getattr(self, field)}' is not one of {', '.join(allowed)}"
                )

    @nn.compact
    def __call__(self, features: Sequence[Array], *, train: bool = False) -> dict[str, Array]:
        """Maps feature maps, the last `[B, H, W, C]`, to 'logits' `[1, B, K]` and 'embedding' `[B, D]`."""

        def normalize(x: Array) -> Array:
            if self.norm_type == "batch":
                return BatchNorm(self.epsilon, name="norm")(x, train=train)
            return LayerNorm(self.epsilon, name="norm")(x)

        x = features[-1]
        if self.norm == "before":
            x = normalize(x)
        x = jnp.mean(x, axis=(1, 2))  # [B, C]
        if self.norm == "after":
            x = normalize(x)
        if self.hidden_ratio:
            width = round(self.hidden_ratio * x.shape[-1])
            x = ACTIVATIONS[self.activation](_Hidden(width, name="pre_logits")(x))
        logits = nn.Dropout(self.dropout)(x, deterministic=not train)
        if self.num_classes:
            logits = Linear(self.num_classes, name="fc")(logits)
        return {"logits": logits[None], "embedding": x}
