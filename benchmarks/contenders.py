"""One contender of `benchmarks/speed.py`, in a process of its own.

    python -m benchmarks.contenders '{"contender": "maxmap", "model": "maxvit_tiny_tf_224", "task": "forward", ...}'

It builds the model with random weights and random images that lie on the device, computes once, and prints a line of
JSON: seconds until that first result from the start of the process, and what it knows of the program. Then, for every
number that it reads from its standard input, it computes so many times and prints the seconds that they took. At the
end of its input it prints the peak of its memory.
"""

import importlib.metadata
import inspect
import json
import resource
import sys
import time
from collections.abc import Callable
from typing import Any

START = time.perf_counter()  # before the frameworks are imported: that time counts

Work = tuple[Callable[[int], None], Callable[[], int], dict[str, Any]]  # compute n times and wait; peak bytes; facts

# Models that only maxmap has are set beside the plain model that their backbone was taken from.
PLAIN = {
    "map_maxvit_tiny_tf_224": "maxvit_tiny_tf_224",
    "map_convnext_tiny": "convnext_tiny",
    "map_resnet50": "resnet50",
    "ga_convnext_tiny_688": "convnext_tiny",
}


def host_peak() -> int:
    """Returns the peak of this process's memory in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def jax_peak() -> int:
    """Returns the peak of the memory of JAX's device in bytes."""
    import jax

    stats = jax.devices()[0].memory_stats()
    return stats["peak_bytes_in_use"] if stats else host_peak()


def maxmap(model: str, task: str, batch: int, dtype: str, way: str) -> Work:
    """Ours: the model as `evaluate` applies it, or the training step as `main.py` takes it.

    `way` is "" for the kernels of the platform, "plain" for no kernels, "pallas" for that of attention in any case.
    """
    import jax
    import jax.numpy as jnp

    from maxmap.benchmark import training_step
    from maxmap.models import average, create_model
    from maxmap.operations import IMPLEMENTATIONS, kernels
    from maxmap.runtime import freed_memory

    freed_memory.keep()  # as main.py does
    built = create_model(model)
    size = built.backbone.image_size
    size = (size, size) if isinstance(size, int) else tuple(size)
    kind = jnp.dtype(dtype)
    key = jax.random.key(0)
    if way == "pallas":
        for ways in IMPLEMENTATIONS.values():
            ways["attention"] = way
    context = kernels("plain" if way == "plain" else "auto")
    if task == "forward":
        shapes = jax.eval_shape(built.init, key, jax.ShapeDtypeStruct((1, *size, 3), jnp.float32))
        variables = jax.tree.map(lambda leaf: _random(leaf.shape), shapes)
        variables["params"] = jax.tree.map(lambda leaf: leaf.astype(kind), variables["params"])
        variables = jax.device_put(variables)
        images = jax.random.normal(key, (batch, *size, 3)).astype(kind)
        program = jax.jit(lambda variables, images: average(built.apply(variables, images)))
        with context:
            program = program.lower(variables, images).compile()
        run = _repeated(lambda: program(variables, images))
    else:
        step, create_state = training_step(built, kind, kernels="plain" if way == "plain" else "auto")
        like = jax.eval_shape(create_state, key)
        state = jax.device_put(jax.tree.map(lambda leaf: _random(leaf.shape, leaf.dtype), like))
        images = jax.random.randint(key, (batch, *size, 3), 0, 256).astype(jnp.uint8)
        inputs = {"image": images, "label": jax.random.randint(key, (batch,), 0, 1000)}
        program = jax.jit(step, donate_argnums=0).lower(state, inputs, key).compile()

        def once() -> jax.Array:
            nonlocal state
            state, metrics = program(state, inputs, key)
            return metrics["loss"]

        run = _repeated(once, freed_memory.trim_if_grown)
    run(1)
    cost = program.cost_analysis() or {}
    facts = {
        "version": f"jax {jax.__version__}",
        "device": jax.devices()[0].device_kind,
        "gigabytes": 1e-9 * cost.get("bytes accessed", 0.0),
    }
    return run, jax_peak, facts


def _repeated(once: Callable[[], Any], after: Callable[[], None] = lambda: None) -> Callable[[int], None]:
    """Returns what computes `once` so many times and waits; on a CPU as a run does, for each time, and then `after`."""
    import jax

    on_cpu = jax.default_backend() == "cpu"

    def run(times: int) -> None:
        for _ in range(times):
            result = once()
            if on_cpu:
                result.block_until_ready()
                after()
        result.block_until_ready()

    return run


def _random(shape: tuple[int, ...], dtype: Any = "float32") -> Any:
    """Random numbers that keep activations near 1, made on the host: initialising would compile more programs."""
    import numpy as np

    if not np.issubdtype(dtype, np.floating):
        return np.zeros(shape, dtype)
    z = np.random.default_rng(0).standard_normal(shape, np.float32)
    leaf = z * np.prod(shape[:-1]) ** -0.5 if len(shape) > 1 else 0.5 + 0.1 * np.abs(z)
    return leaf.astype(dtype)


def exported(model: str, task: str, batch: int, dtype: str, runtime: str) -> Work:
    """Our forward pass as an ONNX graph, run by onnxruntime or OpenVINO on the CPU, by their own choice of threads."""
    import tempfile
    from pathlib import Path

    import jax
    import numpy as np
    import onnx

    from maxmap.models import average, create_model
    from maxmap.onnx.lower import lower
    from maxmap.onnx.proto import write

    if (task, dtype) != ("forward", "float32"):
        raise ValueError("an ONNX graph has the forward pass in float32 alone")
    built = create_model(model)
    size = built.backbone.image_size
    image = jax.ShapeDtypeStruct((*((size, size) if isinstance(size, int) else size), 3), np.float32)
    shapes = jax.eval_shape(built.init, jax.random.key(0), jax.ShapeDtypeStruct((1, *image.shape), np.float32))
    variables = jax.tree.map(lambda leaf: _random(leaf.shape), shapes)
    graph, output = lower(lambda variables, images: average(built.apply(variables, images)), variables, image)
    images = np.random.default_rng(0).standard_normal((batch, *image.shape), np.float32)
    with tempfile.NamedTemporaryFile(suffix=".onnx") as file:
        write(onnx, Path(file.name), graph, image, output, {})
        if runtime == "onnxruntime":
            import onnxruntime

            session = onnxruntime.InferenceSession(file.name, providers=["CPUExecutionProvider"])

            def once() -> Any:
                return session.run(None, {"images": images})
        else:
            import openvino

            compiled = openvino.Core().compile_model(file.name, "CPU", {"PERFORMANCE_HINT": "LATENCY"})

            def once() -> Any:
                return compiled([images])

    def run(times: int) -> None:
        for _ in range(times):
            once()

    run(1)
    facts = {"version": f"{runtime} {importlib.metadata.version(runtime)}", "device": f"{len(_cores())} threads"}
    return run, host_peak, facts


def timm(model: str, task: str, batch: int, dtype: str, compile: str | None) -> Work:
    """timm's model, channels last: in half precision for the forward pass, with autocast in training."""
    import torch

    from tests.reference import import_timm

    built_by = import_timm()
    threads = max(torch.get_num_threads(), len(_cores()))
    torch.set_num_threads(threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    kind = {"float32": torch.float32, "bfloat16": torch.bfloat16}[dtype]
    built = built_by.create_model(PLAIN.get(model, model)).to(device, memory_format=torch.channels_last)
    size = built.default_cfg["input_size"][1:]
    torch.backends.cudnn.benchmark = True
    images = torch.randn(batch, 3, *size, device=device).to(memory_format=torch.channels_last)
    if task == "forward":
        built = built.eval().to(kind)
        images = images.to(kind)
    computed = built if compile is None else torch.compile(built, mode=compile)
    if task == "forward":

        def once() -> Any:
            with torch.inference_mode():
                return computed(images)

    else:
        built.train()
        labels = torch.randint(0, 1000, (batch,), device=device)
        optimizer = torch.optim.AdamW(built.parameters(), 1e-4, weight_decay=0.05, fused=device == "cuda")

        def once() -> Any:
            with torch.autocast(device, kind, enabled=kind != torch.float32):
                loss = torch.nn.functional.cross_entropy(computed(images), labels)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            return loss

    def run(times: int) -> None:
        for _ in range(times):
            once()
        if device == "cuda":
            torch.cuda.synchronize()

    run(1)
    facts = {
        "version": f"timm {importlib.metadata.version('timm')}, torch {torch.__version__}",
        "device": torch.cuda.get_device_name() if device == "cuda" else f"{threads} threads",
    }
    return run, (torch.cuda.max_memory_allocated if device == "cuda" else host_peak), facts


FLAIM = {"maxvit_tiny_tf_224": "maxvit_tiny_224", "maxvit_base_tf_224": "maxvit_base_224"}  # the others by timm's name


def flaim(model: str, task: str, batch: int, dtype: str) -> Work:
    """flaim's model under `jax.jit` as it was published; its training step is that of timm's."""
    import jax
    import jax.numpy as jnp
    import optax

    from maxmap.runtime import freed_memory

    freed_memory.keep()
    jax.random.KeyArray = jax.Array  # flaim 0.0.5 names the type of JAX before 0.4.24 in its annotations
    from flaim.models.factory import CONFIGS

    name = PLAIN.get(model, model)
    fields = dict(CONFIGS[FLAIM.get(name, name)], n_classes=1000)
    fields.pop("norm_stats", None)
    built = fields.pop("model_cls")(**fields)
    takes_training = "training" in inspect.signature(type(built).__call__).parameters
    kind, key = jnp.dtype(dtype), jax.random.key(0)
    images = jax.random.normal(key, (batch, 224, 224, 3)).astype(kind)

    def apply(variables: Any, images: jax.Array, training: bool) -> tuple[jax.Array, Any]:
        mode = {"training": training} if takes_training else {}
        return built.apply(variables, images, **mode, mutable=["batch_stats"], rngs={"dropout": key})

    def cast(params: Any) -> Any:
        return jax.tree.map(lambda leaf: leaf.astype(kind), params)

    mode = {"training": False} if takes_training else {}
    shapes = jax.eval_shape(lambda key: built.init(key, jnp.zeros((1, 224, 224, 3)), **mode), key)
    variables = jax.device_put(jax.tree.map(lambda leaf: _random(leaf.shape, leaf.dtype), dict(shapes)))
    params, others = variables.pop("params"), variables
    if task == "forward":
        params = cast(params)
        program = jax.jit(lambda params, others, images: apply({"params": params, **others}, images, False)[0])
        program = program.lower(params, others, images).compile()
        run = _repeated(lambda: program(params, others, images))
    else:
        optimizer = optax.adamw(1e-4, weight_decay=0.05)
        labels = jax.random.randint(key, (batch,), 0, 1000)

        def step(params: Any, others: Any, state: Any, images: jax.Array) -> Any:
            def loss(params: Any) -> Any:
                logits, mutated = apply({"params": cast(params), **others}, images, True)
                logits = logits.astype(jnp.float32)
                return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), mutated

            (value, mutated), grads = jax.value_and_grad(loss, has_aux=True)(params)
            updates, state = optimizer.update(grads, state, params)
            return optax.apply_updates(params, updates), {**others, **mutated}, state, value

        state = optimizer.init(params)
        program = jax.jit(step, donate_argnums=(0, 1, 2)).lower(params, others, state, images).compile()

        def once() -> jax.Array:
            nonlocal params, others, state
            params, others, state, value = program(params, others, state, images)
            return value

        run = _repeated(once, freed_memory.trim_if_grown)
    run(1)
    facts = {
        "version": f"flaim {importlib.metadata.version('flaim')}, jax {jax.__version__}",
        "device": jax.devices()[0].device_kind,
    }
    return run, jax_peak, facts


def _cores() -> list[int]:
    import os

    return sorted(os.sched_getaffinity(0))


def limits(dtype: str) -> dict[str, float]:
    """Returns what this machine reaches: TFLOP/s of a large matrix product, GB/s of a large copy (read and written)."""
    import jax
    import jax.numpy as jnp

    fast = jax.default_backend() != "cpu"
    n = 8192 if fast else 2048
    a = jax.random.normal(jax.random.key(0), (n, n)).astype(dtype)
    x = jnp.ones((1 << 30 if fast else 1 << 26,), jnp.float32)

    def best(function: Callable[[], jax.Array]) -> float:
        function().block_until_ready()
        seconds = []
        for _ in range(5):
            start = time.perf_counter()
            for _ in range(5):
                result = function()
            result.block_until_ready()
            seconds.append((time.perf_counter() - start) / 5)
        return min(seconds)

    product, copy = jax.jit(jnp.matmul), jax.jit(lambda x: x + 1)
    return {
        "tflops": 2e-12 * n**3 / best(lambda: product(a, a)),
        "gigabytes_per_second": 2e-9 * x.nbytes / best(lambda: copy(x)),
    }


def main() -> None:
    """Builds what the argument describes and computes as often as it is told."""
    job = json.loads(sys.argv[1])
    contender = job.pop("contender")
    if contender == "limits":
        print(json.dumps(limits(**job)), flush=True)
        return
    if contender.startswith("maxmap"):
        work = maxmap(**job, way=contender.removeprefix("maxmap").strip())
    elif contender == "flaim":
        work = flaim(**job)
    elif contender in ("onnxruntime", "openvino"):
        work = exported(**job, runtime=contender)
    else:
        mode = {"timm": None, "timm compiled": "default", "timm max-autotune": "max-autotune-no-cudagraphs"}[contender]
        work = timm(**job, compile=mode)
    run, peak, facts = work
    print(json.dumps({"first": time.perf_counter() - START, **facts}), flush=True)
    for line in sys.stdin:
        start = time.perf_counter()
        run(int(line))
        print(json.dumps({"seconds": time.perf_counter() - start}), flush=True)
    print(json.dumps({"peak": peak()}), flush=True)


if __name__ == "__main__":
    main()
