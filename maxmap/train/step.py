"""One training step: a pure function of state, batch and key."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from jax.sharding import Mesh

from maxmap.layers.primitives import batch_norm_groups
from maxmap.sharding import gather, shard
from maxmap.train.state import TrainState

Array = jax.Array
Metrics = dict[str, Array]
Prepare = Callable[[Array, Array, Array], tuple[Array, Array]]
Loss = Callable[[Mapping[str, Array], Array], tuple[Array, Metrics]]

BATCH_NORMS = ("sync", "averaged", "per_device")


def cast(tree: Any, dtype: jnp.dtype) -> Any:
    """Casts the floating-point leaves of a tree."""
    return jax.tree.map(lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree)


def make_train_step(
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    loss: Loss,
    prepare: Prepare,
    *,
    mesh: Mesh | None = None,
    dtype: jnp.dtype = jnp.float32,
    ema_decay: float | None = None,
    accumulate: int = 1,
    batch_norm: str = "sync",
) -> Callable[[TrainState, Mapping[str, Array], Array], tuple[TrainState, Metrics]]:
    """Builds the step.

    Args:
      model: Flax module that maps images to outputs.
      optimizer: optax transformation.
      loss: maps outputs and targets to a scalar and its parts.
      prepare: maps key, uint8 images `[B, H, W, C]` and labels `[B]` to float images and targets `[B, K]`.
      mesh: of the state and the batch, None for one device. Parameters are gathered once a step, in `dtype`; gradients
        are summed over the devices, each of which keeps its part, and only that part is updated.
      dtype: that the model computes in; parameters, statistics and losses stay in float32.
      ema_decay: share of the old average that is kept, constant; None for no averaging.
      accumulate: micro-batches of a step, one after another, each prepared (and mixed) on its own; gradients and
        metrics are their means, and batch norms see each one.
      batch_norm: whose samples a batch norm looks at while training. "sync": those of the (micro-)batch on all devices.
        "averaged": each device those on it, as PyTorch does; the running statistics are their mean over the devices,
        which is what torch's separate ones come to when they are averaged at the end of an epoch (`--dist-bn reduce`),
        since averaging over devices and over time commute. "per_device": the same, and the running statistics are those
        of the first device alone (`--dist-bn ''` and DDP, which broadcasts the first one's buffers).

    Returns:
      A function of state, batch and key that returns the next state and metrics: 'loss', its parts, 'grad_norm' and
      'skipped', which is 1 where loss or gradients are not finite: then nothing of the state moves but its step.
    """

    devices = 1 if mesh is None else mesh.devices.size
    groups = {"sync": 1, "averaged": devices, "per_device": devices}[batch_norm]

    def gradients(full: Any, model_state: Any, images: Array, labels: Array, key: Array) -> tuple[Any, Any, Metrics]:
        prepare_key, model_key = jax.random.split(key)
        images, targets = prepare(prepare_key, images, labels)

        def objective(params: Any) -> tuple[Array, tuple[Any, Metrics]]:
            with batch_norm_groups(groups, keep_first=batch_norm == "per_device"):
                outputs, mutated = model.apply(
                    {"params": params, **model_state},
                    images.astype(dtype),
                    train=True,
                    rngs={"dropout": model_key},
                    mutable=["batch_stats"],
                )
            value, metrics = loss(outputs, targets)
            return value, (mutated, metrics)

        (value, (mutated, metrics)), grads = jax.value_and_grad(objective, has_aux=True)(full)
        return (
            shard(cast(grads, jnp.promote_types(dtype, jnp.float32)), mesh),
            {**model_state, **mutated},
            metrics | {"objective": value},
        )

    def step(state: TrainState, batch: Mapping[str, Array], key: Array) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(key, state.step)
        images, labels = batch["image"], batch["label"]
        full = gather(cast(state.params, dtype), mesh)
        if accumulate == 1:
            grads, model_state, metrics = gradients(full, state.model_state, images, labels, key)
        else:

            def split(x: Array) -> Array:
                # Every accumulate-th row, so that a micro-batch lies on all devices as the batch does.
                return jnp.moveaxis(x.reshape(x.shape[0] // accumulate, accumulate, *x.shape[1:]), 1, 0)

            def micro(carry: tuple[Any, Any], part: tuple[Array, Array, Array]) -> tuple[tuple[Any, Any], Metrics]:
                total, model_state = carry
                grads, model_state, metrics = gradients(full, model_state, part[0], part[1], part[2])
                return (jax.tree.map(jnp.add, total, grads), model_state), metrics

            parts = (split(images), split(labels), jax.random.split(key, accumulate))
            start = (jax.tree.map(jnp.zeros_like, state.params), state.model_state)
            (grads, model_state), metrics = jax.lax.scan(micro, start, parts)
            grads = jax.tree.map(lambda g: g / accumulate, grads)
            metrics = jax.tree.map(jnp.mean, metrics)

        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        ema = state.ema
        if ema_decay is not None:
            ema = _average(ema, {"params": params, **model_state}, ema_decay)
        norm = optax.tree.norm(grads)
        finite = jnp.isfinite(metrics.pop("objective")) & jnp.isfinite(norm)
        new = TrainState(state.step + 1, params, model_state, opt_state, ema)
        # The batch of a step that is left out is gone: the order of the samples is a function of the step alone.
        old = dataclasses.replace(state, step=new.step)
        state = jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, old)
        return state, {**metrics, "grad_norm": norm, "skipped": (~finite).astype(jnp.int32)}

    return step


def make_diagnosis(
    model: nn.Module, loss: Loss, prepare: Prepare, *, mesh: Mesh | None = None, dtype: jnp.dtype = jnp.float32
) -> Callable[[TrainState, Mapping[str, Array], Array], dict[str, Any]]:
    """Builds a function of state, batch and key that takes a step's numbers apart; it changes nothing.

    It returns, for every parameter ('parameters'), its gradient ('gradients') and the output of every layer
    ('outputs'), 'largest', the largest magnitude of what is finite, and 'not_finite', how many values are not.
    Augmentation and dropout are those of the step where it is a single micro-batch.
    """

    def describe(x: Array) -> dict[str, Array]:
        x = x.astype(jnp.float32)
        finite = jnp.isfinite(x)
        return {"largest": jnp.max(jnp.where(finite, jnp.abs(x), 0)), "not_finite": jnp.sum(~finite)}

    def diagnose(state: TrainState, batch: Mapping[str, Array], key: Array) -> dict[str, Any]:
        prepare_key, model_key = jax.random.split(key)
        images, targets = prepare(prepare_key, batch["image"], batch["label"])

        def objective(params: Any) -> tuple[Array, Any]:
            outputs, captured = model.apply(
                {"params": params, **state.model_state},
                images.astype(dtype),
                train=True,
                rngs={"dropout": model_key},
                mutable=["batch_stats", "intermediates"],
                capture_intermediates=True,
            )
            return loss(outputs, targets)[0], captured["intermediates"]

        full = gather(cast(state.params, dtype), mesh)
        grads, outputs = jax.grad(objective, has_aux=True)(full)
        found = {"outputs": outputs, "gradients": grads, "parameters": state.params}
        return jax.tree.map(describe, found)

    return diagnose


def _average(average: Any, new: Any, decay: float) -> Any:
    """Moves the average of parameters and batch statistics; other collections are constant."""
    moved = {
        name: jax.tree.map(lambda a, b: decay * a + (1 - decay) * b, average[name], new[name])
        for name in ("params", "batch_stats")
        if name in average
    }
    return {**average, **moved}
