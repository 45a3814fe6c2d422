"""What training carries from step to step."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from flax import struct
from jax.sharding import AbstractMesh, Mesh

from maxmap.operations import Array
from maxmap.sharding import state_sharding


@struct.dataclass
class TrainState:
    """The state of training; a pytree.

    Attributes:
      step: number of optimizer steps taken, int32.
      params: parameters, float32.
      model_state: the model's other collections: 'batch_stats', and 'constants' if the model has any.
      opt_state: state of the optimizer.
      ema: averages of 'params' and 'batch_stats', and the constants; None without averaging.
    """

    step: Array
    params: Any
    model_state: Mapping[str, Any]
    opt_state: Any
    ema: Mapping[str, Any] | None

    def variables(self) -> dict[str, Any]:
        """Returns the newest variables, as `model.apply` takes them."""
        return {"params": self.params, **self.model_state}

    def items(self) -> dict[str, Any]:
        """Returns the items of a checkpoint; see `maxmap.checkpoint`."""
        items = {"variables": self.variables(), "training": {"step": self.step, "opt_state": self.opt_state}}
        return items if self.ema is None else items | {"ema": self.ema}

    @classmethod
    def from_items(cls, items: Mapping[str, Any]) -> "TrainState":
        """Returns the state whose `items` these are."""
        model_state = dict(items["variables"])
        params = model_state.pop("params")
        training = items["training"]
        return cls(training["step"], params, model_state, training["opt_state"], items.get("ema"))


def create(
    model: nn.Module, optimizer: optax.GradientTransformation, key: Array, images: jax.ShapeDtypeStruct, *, ema: bool
) -> TrainState:
    """Returns the state before the first step; call it under `jax.eval_shape` or `jax.jit`.

    Args:
      model: module with `init(key, images)`.
      optimizer: initialises its own state.
      key: PRNG key of the initial parameters.
      images: shape and type of a batch.
      ema: keep averages.
    """
    variables = dict(model.init(key, jnp.zeros(images.shape, images.dtype)))
    params = variables.pop("params")
    # Copies, because a step donates the buffers of its input, and a buffer can be donated only once.
    average = jax.tree.map(jnp.copy, {"params": params, **variables}) if ema else None
    return TrainState(jnp.zeros((), jnp.int32), params, variables, optimizer.init(params), average)


def abstract(tree: Any, mesh: Mesh | AbstractMesh) -> Any:
    """Returns shape, type and sharding of every array of a state, or of another tree that is split as a state is."""
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=state_sharding(leaf.shape, mesh)), tree
    )
