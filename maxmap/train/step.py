"""One training step: a pure function of state, batch and key."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from jax.sharding import Mesh

from maxmap import operations
from maxmap.layers.primitives import batch_norm_groups, frozen_batch_norms
from maxmap.operations import Array
from maxmap.optim import trainable_mask
from maxmap.sharding import gather, shard, traced_on
from maxmap.train.state import TrainState

Metrics = dict[str, Array]
Prepare = Callable[[Array, Array, Array], tuple[Array, Array]]
Loss = Callable[[Mapping[str, Array], Array], tuple[Array, Metrics]]

Answers = Callable[[Any, Array], Array]
Gradients = Callable[[Any, Any, Any, Array, Array, Array], tuple[Any, Any, Metrics]]


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
    kernels: str = "auto",
    freeze: Sequence[str] = (),
    answers: Answers | None = None,
) -> Callable[..., tuple[TrainState, Metrics]]:
    """Builds the training step.

    Args:
      model: Flax module that maps images to outputs.
      optimizer: Optax transformation.
      loss: Maps outputs and targets to a scalar and its parts.
      prepare: Maps key, uint8 images `[B, H, W, C]` and labels `[B]` to float images and targets `[B, K]`.
      mesh: Of the state and the batch; None for one device. A step gathers the parameters once, in `dtype`. It sums the
        gradients over the devices; each device keeps and updates its own part.
      dtype: Type that the model computes in; parameters, statistics and losses stay in float32.
      ema_decay: Share of the old average that a step keeps; None for no average.
      accumulate: Micro-batches of a step. Each is prepared on its own, and batch norms see one at a time; gradients and
        metrics are means over them.
      batch_norm: Whose samples a batch norm sees; see `_make_gradients`.
      kernels: See `maxmap.operations.kernels`.
      freeze: Regexes of the paths of parameters that are not trained; see `maxmap.optim.make_optimizer`.
      answers: Maps a teacher's variables and prepared images to logits, which the loss gets among the outputs as
        'teacher'; None for no teacher.

    Returns:
      A function of state, batch, key and, with a teacher, its variables; it returns the next state and metrics:
      'loss', its parts, 'grad_norm' and 'skipped'. 'skipped' is 1 where loss or gradients are not finite; the step then
      changes only the step number.
    """
    gradients = _make_gradients(
        model, loss, prepare, answers, mesh=mesh, dtype=dtype, batch_norm=batch_norm, freeze=tuple(freeze)
    )

    def step(
        state: TrainState, batch: Mapping[str, Array], key: Array, teacher: Any = None
    ) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(key, state.step)
        full, teacher = gather(cast(state.params, dtype), mesh), _gathered(teacher, mesh)
        with traced_on(mesh), operations.kernels(kernels):
            if accumulate == 1:
                grads, model_state, metrics = gradients(
                    full, teacher, state.model_state, batch["image"], batch["label"], key
                )
            else:
                grads, model_state, metrics = _accumulate(gradients, accumulate, full, teacher, state, batch, key)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        ema = state.ema
        if ema_decay is not None:
            ema = _average(ema, {"params": params, **model_state}, ema_decay)
        norm = optax.tree.norm(grads)
        finite = jnp.isfinite(metrics.pop("objective")) & jnp.isfinite(norm)
        new = TrainState(state.step + 1, params, model_state, opt_state, ema)
        # A skipped step counts too, because the order of the samples is a function of the step number alone.
        old = dataclasses.replace(state, step=new.step)
        state = jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, old)
        return state, {**metrics, "grad_norm": norm, "skipped": (~finite).astype(jnp.int32)}

    return step


def _gathered(teacher: Any, mesh: Mesh | None) -> Any:
    """Gathers the parameters of a teacher, where there is one."""
    return teacher and {**teacher, "params": gather(teacher["params"], mesh)}


def _make_gradients(
    model: nn.Module,
    loss: Loss,
    prepare: Prepare,
    answers: Answers | None,
    *,
    mesh: Mesh | None,
    dtype: jnp.dtype,
    batch_norm: str,
    freeze: tuple[str, ...],
) -> Gradients:
    """Builds the function that computes the gradients of one micro-batch; those of frozen parameters are zero.

    `batch_norm` says whose samples a batch norm sees:

    - "sync": those of the micro-batch on all devices.
    - "averaged": each device its own, as in PyTorch. The running statistics are the mean over the devices. This equals
      PyTorch's separate statistics after their average at the end of an epoch (`--dist-bn reduce`), because averages
      over devices and over time commute.
    - "per_device": each device its own, and the running statistics are those of the first device (`--dist-bn ''`, and
      DDP, which broadcasts the first device's buffers).

    Returns:
      A function of parameters, the teacher's variables, the model's other collections, images, labels and key that
      returns gradients, updated collections and metrics; 'objective' among these is the value that was differentiated.
    """
    devices = 1 if mesh is None else mesh.devices.size
    groups = {"sync": 1, "averaged": devices, "per_device": devices}[batch_norm]

    def gradients(
        full: Any, teacher: Any, model_state: Any, images: Array, labels: Array, key: Array
    ) -> tuple[Any, Any, Metrics]:
        prepare_key, model_key = jax.random.split(key)
        images, targets = prepare(prepare_key, images, labels)
        taught = {} if answers is None else {"teacher": answers(teacher, images)}

        def objective(params: Any) -> tuple[Array, tuple[Any, Metrics]]:
            trained = trainable_mask(params, freeze)  # nothing goes back beyond the first of these
            params = jax.tree.map(lambda x, learns: x if learns else jax.lax.stop_gradient(x), params, trained)
            keep_first = batch_norm == "per_device"
            with batch_norm_groups(groups, keep_first=keep_first), frozen_batch_norms(freeze):
                outputs, mutated = model.apply(
                    {"params": params, **model_state},
                    images.astype(dtype),
                    train=True,
                    rngs={"dropout": model_key},
                    mutable=["batch_stats"],
                )
            value, metrics = loss({**outputs, **taught}, targets)
            return value, (mutated, metrics)

        (value, (mutated, metrics)), grads = jax.value_and_grad(objective, has_aux=True)(full)
        return (
            shard(cast(grads, jnp.promote_types(dtype, jnp.float32)), mesh),
            {**model_state, **mutated},
            metrics | {"objective": value},
        )

    return gradients


def _accumulate(
    gradients: Gradients,
    count: int,
    full: Any,
    teacher: Any,
    state: TrainState,
    batch: Mapping[str, Array],
    key: Array,
) -> tuple[Any, Any, Metrics]:
    """Computes the gradients of `count` micro-batches one after another, and returns their means."""

    def split(x: Array) -> Array:
        # Every count-th row, so that each micro-batch is spread over all devices as the batch is.
        return jnp.moveaxis(x.reshape(x.shape[0] // count, count, *x.shape[1:]), 1, 0)

    def micro(carry: tuple[Any, Any], part: tuple[Array, Array, Array]) -> tuple[tuple[Any, Any], Metrics]:
        total, model_state = carry
        grads, model_state, metrics = gradients(full, teacher, model_state, part[0], part[1], part[2])
        return (jax.tree.map(jnp.add, total, grads), model_state), metrics

    parts = (split(batch["image"]), split(batch["label"]), jax.random.split(key, count))
    start = (jax.tree.map(jnp.zeros_like, state.params), state.model_state)
    (grads, model_state), metrics = jax.lax.scan(micro, start, parts)
    return jax.tree.map(lambda g: g / count, grads), model_state, jax.tree.map(jnp.mean, metrics)


def make_diagnosis(
    model: nn.Module,
    loss: Loss,
    prepare: Prepare,
    *,
    mesh: Mesh | None = None,
    dtype: jnp.dtype = jnp.float32,
    answers: Answers | None = None,
) -> Callable[..., dict[str, Any]]:
    """Builds a function of the arguments of `make_train_step`'s that finds out where a step's values are not finite.

    It returns three trees: 'parameters', 'gradients' (of every parameter) and 'outputs' (of every layer). Each leaf has
    'largest', the largest finite magnitude, and 'not_finite', the number of values that are not finite. Augmentation
    and dropout equal those of the training step if that has a single micro-batch.
    """

    def describe(x: Array) -> dict[str, Array]:
        x = x.astype(jnp.float32)
        finite = jnp.isfinite(x)
        return {"largest": jnp.max(jnp.where(finite, jnp.abs(x), 0)), "not_finite": jnp.sum(~finite)}

    def diagnose(state: TrainState, batch: Mapping[str, Array], key: Array, teacher: Any = None) -> dict[str, Any]:
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
            return loss({**outputs, **taught}, targets)[0], captured["intermediates"]

        full = gather(cast(state.params, dtype), mesh)
        with operations.kernels("plain"):  # a kernel hides the outputs of the layers inside of it
            taught = {} if answers is None else {"teacher": answers(_gathered(teacher, mesh), images)}
            grads, outputs = jax.grad(objective, has_aux=True)(full)
        found = {"outputs": outputs, "gradients": grads, "parameters": state.params}
        return jax.tree.map(describe, found)

    return diagnose


def _average(average: Any, new: Any, decay: float) -> Any:
    """Moves the averages of parameters and batch statistics; other collections are constants."""
    moved = {
        name: jax.tree.map(lambda a, b: decay * a + (1 - decay) * b, average[name], new[name])
        for name in ("params", "batch_stats")
        if name in average
    }
    return {**average, **moved}
