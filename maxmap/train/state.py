"""What training carries from step to step."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from flax import struct
from jax.sharding import Mesh

from maxmap.sharding import by_shape

Array = jax.Array


@struct.dataclass
class TrainState:
    """The state of training; a pytree.

    Attributes:
      step: int32, optimizer steps taken.
      params: float32.
      model_state: the model's other collections: 'batch_stats', and 'constants' where a model has any.
      opt_state: of the optimizer.
      ema: averages of 'params' and 'batch_stats' with the constants beside them, None without averaging.
    """

    step: Array
    params: Any
    model_state: Mapping[str, Any]
    opt_state: Any
    ema: Mapping[str, Any] | None

    def variables(self) -> dict[str, Any]:
        """The newest variables, as `model.apply` takes them."""
        return {"params": self.params, **self.model_state}

    def items(self) -> dict[str, Any]:
        """The trees that a checkpoint holds; see `maxmap.checkpoint`."""
        items = {"variables": self.variables(), "training": {"step": self.step, "opt_state": self.opt_state}}
        return items if self.ema is None else items | {"ema": self.ema}

    @classmethod
    def from_items(cls, items: Mapping[str, Any]) -> "TrainState":
        """The inverse of `items`."""
        model_state = dict(items["variables"])
        params = model_state.pop("params")
        training = items["training"]
        return cls(training["step"], params, model_state, training["opt_state"], items.get("ema"))


def create(
    model: nn.Module, optimizer: optax.GradientTransformation, key: Array, images: jax.ShapeDtypeStruct, *, ema: bool
) -> TrainState:
    """Initialises everything; call it under `jax.eval_shape` or `jax.jit`.

    Args:
      model: with `init(key, images)`.
      optimizer: whose state goes with it.
      key: PRNG key.
      images: shape and type of a batch.
      ema: keep averages.
    """
    variables = dict(model.init(key, jnp.zeros(images.shape, images.dtype)))
    params = variables.pop("params")
    # A copy, because a step donates its input: no buffer may be in it twice.
    average = jax.tree.map(jnp.copy, {"params": params, **variables}) if ema else None
    return TrainState(jnp.zeros((), jnp.int32), params, variables, optimizer.init(params), average)


def abstract(state: TrainState, mesh: Mesh) -> TrainState:
    """Adds where every array of an abstract state lies on the mesh."""
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=by_shape(leaf.shape, mesh)), state
    )
