"""How fast a model is on the devices of this machine: `python -m maxmap benchmark MODEL`."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from maxmap.cost import count_parameters, multiply_adds
from maxmap.layers.primitives import pair
from maxmap.losses import softmax_cross_entropy
from maxmap.models import Classifier, average, create_model
from maxmap.ranges import Count, Pixels, Positive, check_arguments
from maxmap.sharding import check_batch, make_mesh, replicated, split_batch, traced_on
from maxmap.train.step import cast

DTYPES = ("float32", "bfloat16")
_LEAST = 5  # batches that are timed, however long they take

# A program of a state and images; the state that it returns goes into the next call.
Step = Callable[[Any, jax.Array], tuple[Any, jax.Array]]


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
    device = jax.devices()[0]
    dtype = dtype or ("float32" if device.platform == "cpu" else "bfloat16")
    height, width = pair(network.backbone.image_size)
    one = jax.ShapeDtypeStruct((1, height, width, 3), jnp.float32)
    variables = jax.jit(lambda key: network.init(key, jnp.zeros(one.shape)), out_shardings=replicated(mesh))(
        jax.random.key(0)
    )
    facts = {
        "parameters": count_parameters(variables["params"]),
        "gflops": multiply_adds(network.apply, variables, one) / 1e9,
    }
    step, state = (_training_step if train else _forward_pass)(network, dict(variables), jnp.dtype(dtype))
    noise = np.random.default_rng(0).standard_normal((batch_size, height, width, 3), np.float32)
    images, state = jax.device_put(noise, split_batch(mesh)), jax.device_put(state, replicated(mesh))

    def on_mesh(state: Any, images: jax.Array) -> tuple[Any, jax.Array]:
        with traced_on(mesh):
            return step(state, images)

    began = time.perf_counter()
    program = jax.jit(on_mesh, donate_argnums=0).lower(state, images).compile()
    compile_seconds = time.perf_counter() - began
    times = _time(program, state, images, seconds)
    memory, median = program.memory_analysis(), statistics.median(times)
    return {
        "model": model,
        "head": head,
        "task": "training step" if train else "forward pass",
        "batch_size": batch_size,
        "image_size": height if height == width else [height, width],
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


def _forward_pass(model: Classifier, variables: dict[str, Any], dtype: jnp.dtype) -> tuple[Step, Any]:
    def step(variables: Any, images: jax.Array) -> tuple[Any, jax.Array]:
        return variables, average(model.apply(variables, images.astype(dtype)))

    return step, {**variables, "params": cast(variables["params"], dtype)}


def _training_step(model: Classifier, variables: dict[str, Any], dtype: jnp.dtype) -> tuple[Step, Any]:
    optimizer = optax.adamw(1e-3)

    def step(state: Any, images: jax.Array) -> tuple[Any, jax.Array]:
        params, others, optimizer_state = state

        def loss(params: Any) -> tuple[jax.Array, Any]:
            trained = {**others, "params": cast(params, dtype)}
            rngs = {"dropout": jax.random.key(0)}
            outputs, new = model.apply(trained, images.astype(dtype), train=True, rngs=rngs, mutable=list(others))
            logits = average(outputs)
            targets = jax.nn.one_hot(jnp.arange(logits.shape[0]) % logits.shape[1], logits.shape[1])
            return jnp.mean(softmax_cross_entropy(logits, targets)), new

        gradient, new = jax.grad(loss, has_aux=True)(params)
        updates, optimizer_state = optimizer.update(gradient, optimizer_state, params)
        params = optax.apply_updates(params, updates)
        return (params, {**others, **new}, optimizer_state), optax.tree.norm(gradient)

    params = variables.pop("params")
    return step, (params, variables, optimizer.init(params))


def _time(program: Any, state: Any, images: jax.Array, seconds: float) -> list[float]:
    """Returns the seconds of every call after the first two."""
    for _ in range(2):
        state, result = program(state, images)
    jax.block_until_ready(result)
    times: list[float] = []
    while len(times) < _LEAST or sum(times) < seconds:
        began = time.perf_counter()
        state, result = program(state, images)
        jax.block_until_ready((state, result))
        times.append(time.perf_counter() - began)
    return times
