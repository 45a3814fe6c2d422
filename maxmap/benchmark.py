"""How fast a model is on the devices of this machine: `python -m maxmap benchmark MODEL`."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from maxmap.cost import count_parameters, multiply_adds
from maxmap.data.augment import normalize
from maxmap.layers.primitives import pair
from maxmap.losses import total_loss
from maxmap.models import Classifier, average, classifies_pixels, create_model
from maxmap.optim import make_optimizer
from maxmap.ranges import Count, Pixels, Positive, check_arguments
from maxmap.runtime import jit_to_run_once
from maxmap.sharding import check_batch, make_mesh, replicated, split_batch, to_devices, traced_on
from maxmap.train.state import TrainState, create
from maxmap.train.step import cast, make_train_step

DTYPES = ("float32", "bfloat16")
_LEAST = 5  # batches that are timed, however long they take

# A function of a state and inputs, whose new state goes into the next call; state; inputs; shapes of the variables.
_Task = tuple[Callable[..., Any], Any, tuple[Any, ...], Any]


def benchmark(
    model: str,
    *,
    head: str | None = None,
    batch_size: Count = 16,
    image_size: Pixels | None = None,
    dtype: str | None = None,
    train: bool = False,
    seconds: Positive = 10.0,
) -> dict[str, Any]:
    """Measures a model with random weights on random images; all devices share the batch.

    Args:
      model: name of the model.
      head: in place of the model's own.
      batch_size: images at a time, on all devices together.
      image_size: pixels; None for the model's own.
      dtype: of the computation; None for float32 on a CPU, else bfloat16.
      train: a training step (forward, backward, AdamW with float32 weights) in place of the forward pass.
      seconds: to measure for, at least.

    Returns:
      'images_per_second'; 'milliseconds' of a batch, the median, with 'milliseconds_low' and 'milliseconds_high' of the
      'batches' that were timed; 'gigabytes' of a device's memory as the compiler says, None where it says nothing;
      'compile_seconds'; 'parameters'; 'gflops', 10^9 multiply-adds of one image's forward pass; and
      what was measured on what.

    Raises:
      UserError: a value that does not fit.
    """
    check_arguments(benchmark, "", locals())
    network, mesh = create_model(model, head=head, image_size=image_size), make_mesh()
    check_batch(batch_size, mesh, "the batch size")
    device, size = jax.devices()[0], pair(network.backbone.image_size)
    dtype = dtype or ("float32" if device.platform == "cpu" else "bfloat16")
    task = _training if train else _forward_pass
    step, state, inputs, variables = task(network, (batch_size, *size, 3), jnp.dtype(dtype), mesh)
    facts = {
        "parameters": count_parameters(variables["params"]),
        "gflops": multiply_adds(network.apply, variables, jax.ShapeDtypeStruct((1, *size, 3), jnp.float32)) / 1e9,
    }
    began = time.perf_counter()
    program = jax.jit(step, donate_argnums=0).lower(state, *inputs).compile()
    compile_seconds = time.perf_counter() - began
    times = _time(program, state, inputs, seconds)
    memory, median = program.memory_analysis(), statistics.median(times)
    return {
        "model": model,
        "head": head,
        "task": "training step" if train else "forward pass",
        "batch_size": batch_size,
        "image_size": size[0] if size[0] == size[1] else size,
        "dtype": dtype,
        "device": device.device_kind,
        "devices": mesh.size,
        "images_per_second": batch_size / median,
        "milliseconds": 1e3 * median,
        "milliseconds_low": 1e3 * min(times),
        "milliseconds_high": 1e3 * max(times),
        "batches": len(times),
        "gigabytes": None if memory is None else 1e-9 * (memory.argument_size_in_bytes + memory.temp_size_in_bytes),
        "compile_seconds": compile_seconds,
        **facts,
    }


def training_step(
    model: Classifier, dtype: jnp.dtype, *, mesh: Mesh | None = None, kernels: str = "auto"
) -> tuple[Callable[..., Any], Callable[[jax.Array], TrainState]]:
    """Returns the step that training takes, with AdamW and without augmentation, and what makes its first state.

    Args:
      model: with 1,000 classes.
      dtype: of the computation.
      mesh: see `maxmap.train.step.make_train_step`.
      kernels: see `maxmap.operations.kernels`.

    Returns:
      The step, of state, batch and key, with uint8 images of any number in the batch; and a function of a key that
      returns the state.
    """
    optimizer = make_optimizer(1e-4, name="adamw", weight_decay=0.05)

    def prepare(key: jax.Array, images: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
        targets = labels if labels.ndim == 3 else jax.nn.one_hot(labels, 1000)
        return normalize(images, (0.5,) * 3, (0.5,) * 3), targets

    step = make_train_step(model, optimizer, total_loss, prepare, mesh=mesh, dtype=dtype, kernels=kernels)
    one = jax.ShapeDtypeStruct((1, *pair(model.backbone.image_size), 3), jnp.float32)
    return step, lambda key: create(model, optimizer, key, one, ema=False)


def _training(model: Classifier, shape: tuple[int, ...], dtype: jnp.dtype, mesh: Mesh) -> _Task:
    step, create_state = training_step(model, dtype, mesh=mesh)
    state = jit_to_run_once(create_state, replicated(mesh))(jax.random.key(0))
    random = np.random.default_rng(0)
    labels = random.integers(0, 1000, shape[:3] if classifies_pixels(model) else shape[:1], np.int32)
    batch = {"image": random.integers(0, 256, shape, np.uint8), "label": labels}
    inputs = (to_devices(batch, mesh), jax.device_put(jax.random.key(0), replicated(mesh)))
    return step, state, inputs, jax.eval_shape(lambda: state.variables())


def _forward_pass(model: Classifier, shape: tuple[int, ...], dtype: jnp.dtype, mesh: Mesh) -> _Task:
    def step(variables: Any, images: jax.Array) -> tuple[Any, jax.Array]:
        with traced_on(mesh):
            return variables, average(model.apply(variables, images))

    def initial(key: jax.Array) -> dict[str, Any]:
        variables = dict(model.init(key, jnp.zeros((1, *shape[1:]))))
        return {**variables, "params": cast(variables["params"], dtype)}

    variables = jit_to_run_once(initial, replicated(mesh))(jax.random.key(0))
    images = np.random.default_rng(0).standard_normal(shape, np.float32).astype(dtype)
    return step, variables, (jax.device_put(images, split_batch(mesh)),), jax.eval_shape(lambda: variables)


def _time(program: Any, state: Any, inputs: tuple[Any, ...], seconds: float) -> list[float]:
    """Returns the seconds of every call after the first two."""
    for _ in range(2):
        state, result = program(state, *inputs)
    jax.block_until_ready(result)
    times: list[float] = []
    while len(times) < _LEAST or sum(times) < seconds:
        began = time.perf_counter()
        state, result = program(state, *inputs)
        jax.block_until_ready((state, result))
        times.append(time.perf_counter() - began)
    return times
