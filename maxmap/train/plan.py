"""Whether a recipe fits on some hardware and what it costs there, counted from shapes before a machine is rented.

State and traffic are exact counts of what the step does (maxmap.sharding). The activations are an upper bound: all that
the forward pass keeps for the backward pass, before XLA fuses operations and computes some of it twice. XLA for CPUs
needs 1.1 to 1.9 times less in float32 (`python -m benchmarks.memory`, docs/performance.md), for a TPU or a GPU `TAKEN`.
Times follow from the figures that the makers state; `maxmap.train.compile` asks the compiler of the hardware.
"""

import math
from collections.abc import Mapping
from typing import Annotated, Any, TypeAlias

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType

from maxmap import tasks
from maxmap.accelerators.hardware import HARDWARE
from maxmap.cost import count_parameters, multiply_adds
from maxmap.errors import UserError
from maxmap.models import Classifier
from maxmap.operations import compiled_for
from maxmap.ranges import Fraction, Range
from maxmap.recipe import Recipe
from maxmap.shapes import eval_shape_of_init
from maxmap.sharding import DATA, FSDP, check_batch, state_sharding
from maxmap.train.build import Images, make_loss, make_optimizer
from maxmap.train.state import create
from maxmap.train.step import cast
from maxmap.train.teacher import read_teacher

# Shares of that bound that the compilers of a v5e and an H100 took, whatever for, for the steps of MaxViT-T, ResNet-50
# with MAP, ConvNeXt-T and CAFormer-S18 in bfloat16 with 64 or 128 images a device (commit 7248d86).
TAKEN = (0.37, 0.68)

CLASSES = 1000  # where a recipe does not say how many

Devices: TypeAlias = Annotated[int, Range(at_least=1, at_most=1_000_000)]


def plan(recipe: Recipe, devices: Devices, hardware: str, utilisation: Fraction) -> dict[str, Any]:
    """Counts what a recipe needs.

    Args:
      recipe: As for training; 1,000 classes where it does not set `model.num_classes`.
      devices: Of the job.
      hardware: A key of `HARDWARE`.
      utilisation: Share of the peak that the model's arithmetic reaches, 0 to 1; a guess until it is measured.

    Returns:
      'memory' (bytes per device, by purpose), 'sent' (bytes that a device sends per step, by purpose), 'multiply_adds'
      (of the forward pass of a step on a device), 'flops' (of the whole step there, with what remat computes again and
      what a teacher answers),
      'compute_seconds', 'network_seconds', 'efficiency' (if nothing overlaps), 'fits' and 'largest_batch' (images at a
      time on a device).
    """
    machine, accumulate, teacher = HARDWARE[hardware], recipe.accumulate, read_teacher(recipe)
    mesh = _mesh(devices, **recipe.mesh.keywords)
    check_batch(recipe.batch_size // accumulate, mesh, "config.batch_size / config.accumulate =")
    local = recipe.batch_size // accumulate // devices
    model = recipe.model(num_classes=recipe.model.keywords.get("num_classes", CLASSES))
    dtype, size, channels = jnp.dtype(recipe.dtype), *(recipe.data.keywords[key] for key in ("image_size", "channels"))
    optimizer = make_optimizer(recipe, model, 1e-3)
    one = jax.ShapeDtypeStruct((1, size, size, channels), jnp.float32)
    averaged = recipe.ema_decay is not None
    state = eval_shape_of_init(lambda: create(model, optimizer, jax.random.key(0), one, ema=averaged))
    params = jax.eval_shape(lambda params: cast(params, dtype), state.params)

    with compiled_for(machine.platform):
        shape = (local, size, size, channels)
        kept, operations = _trace_step(recipe, model, params, state.model_state, shape, dtype)
    # The backward pass takes twice the forward pass, and with remat the blocks once more.
    flops = 2 * accumulate * operations * (4 if recipe.model.keywords.get("remat") else 3)
    memory = {
        "parameters": _held(state.params, mesh),
        "optimizer": _held(state.opt_state, mesh),
        "averages": _held(state.ema, mesh),
        "batch statistics": _held(state.model_state, mesh),
        f"parameters in {dtype.name}, gathered": _bytes(params),
        "gradients": _bytes(params) + _held(state.params, mesh),
        "activations, at most": kept - _bytes(params),
        "images": local * size * size * channels * (1 + dtype.itemsize),
    }
    sent = _traffic(params, mesh, accumulate)
    if teacher is not None:
        taught = teacher.variables["params"]
        memory["teacher"] = _held(teacher.variables, mesh) + _bytes(_split(taught, mesh))  # its parts, then gathered
        sent["teacher gathered"] = _traffic(taught, mesh, 1)["parameters gathered"]
        side = teacher.info["preprocessing"]["image_size"]
        with compiled_for(machine.platform):
            batch = jax.ShapeDtypeStruct((local, side, side, channels), dtype)
            flops += 2 * accumulate * multiply_adds(teacher.model.apply, teacher.variables, batch)
    growing = memory["activations, at most"] + memory["images"]
    compute = flops / (machine.flops * utilisation)
    network = sum(sent.values()) / machine.bandwidth
    return {
        "parameters": count_parameters(state.params),
        "mesh": dict(mesh.shape),
        "images_per_device": local * accumulate,
        "memory": memory,
        "sent": sent,
        "multiply_adds": accumulate * operations,
        "flops": flops,
        "compute_seconds": compute,
        "network_seconds": network,
        "efficiency": compute / (compute + network),
        "fits": sum(memory.values()) <= machine.memory,
        "largest_batch": largest_batch(machine.memory, sum(memory.values()) - growing, growing / local),
    }


def _trace_step(
    recipe: Recipe, model: Classifier, params: Any, others: Any, images: tuple[int, ...], dtype: jnp.dtype
) -> tuple[int, int]:
    """Returns the bytes that the forward pass keeps for the backward pass, parameters included, and multiply-adds.

    The loss counts where it is of pixels: it keeps more than many a network.
    """
    data, classes = recipe.data.keywords, recipe.model.keywords.get("num_classes", CLASSES)
    about = Images(images[1], classes, data["mean"], data["std"], tasks.unfitted(data["task"], classes))

    def forward(params: Any, others: Any, images: Any) -> Any:
        return model.apply(
            {"params": params, **others},
            images,
            train=True,
            rngs={"dropout": jax.random.key(0)},
            mutable=["batch_stats"],
        )

    def learned(params: Any, others: Any, images: Any) -> Any:
        outputs, mutated = forward(params, others, images)
        if not about.task.dense:
            return outputs, mutated
        return make_loss(recipe, about)(outputs, jnp.zeros(images.shape[:3], jnp.int32))[0], mutated

    def backward(params: Any, others: Any, images: Any) -> Any:
        return jax.vjp(lambda params: learned(params, others, images), params)[1]

    batch = jax.ShapeDtypeStruct(images, dtype)
    return _bytes(jax.eval_shape(backward, params, others, batch)), multiply_adds(forward, params, others, batch)


def _traffic(params: Any, mesh: AbstractMesh, accumulate: int) -> dict[str, float]:
    """Returns the bytes that a device sends in a step, by purpose; `params` are in the type that is sent."""
    data, fsdp = mesh.shape[DATA], mesh.shape[FSDP]
    split = _bytes(_split(params, mesh))
    scattered = split * (fsdp - 1) / fsdp
    parts = 2 * (split / fsdp) * (data - 1) / data
    # Arrays that are too small to be split are summed over all devices at once.
    small = 2 * (_bytes(params) - split) * (mesh.size - 1) / mesh.size
    return {
        "parameters gathered": scattered,
        "gradients summed over fsdp": accumulate * (scattered + (small if data == 1 else 0)),
        "gradients summed over data": accumulate * (parts + small if data > 1 else 0),
    }


def _split(params: Any, mesh: AbstractMesh) -> list[Any]:
    """Returns the arrays that are split over "fsdp"."""
    return [leaf for leaf in jax.tree.leaves(params) if not state_sharding(leaf.shape, mesh).is_fully_replicated]


def largest_batch(memory: float, fixed: float, per_image: float) -> int:
    """Returns how many images fit into so many bytes beside what is there whatever the batch; 0: none."""
    return max(0, int((memory - fixed) // per_image))


def describe(found: Mapping[str, Any], devices: int, hardware: str, utilisation: float) -> str:
    """Returns the plan as text."""
    machine, total = HARDWARE[hardware], sum(found["memory"].values())
    compute, network = 1e3 * found["compute_seconds"], 1e3 * found["network_seconds"]
    images = devices * found["images_per_device"] / (found["compute_seconds"] + found["network_seconds"])
    lines = [
        f"{found['parameters']:,} parameters on {devices} x {hardware}, mesh {found['mesh']['data']} x "
        f"{found['mesh']['fsdp']} (data x fsdp), {found['images_per_device']} images a step on each device",
        "",
        f"memory per device: {total / 1e9:.2f} of {machine.memory / 1e9:.0f} GB"
        + ("" if found["fits"] else ": DOES NOT FIT; raise fsdp or accumulate, or set model.remat"),
        *(f"  {size / 1e9:8.3f} GB  {name}" for name, size in found["memory"].items()),
        f"at least {found['largest_batch']} images at a time would fit on a device; compilers took {TAKEN[0]:.0%} to "
        f"{TAKEN[1]:.0%} of the activations' bound, and --compile asks the one of this hardware",
        "",
        f"sent per device and step: {sum(found['sent'].values()) / 1e9:.3f} GB",
        *(f"  {size / 1e9:8.3f} GB  {name}" for name, size in found["sent"].items()),
        "",
        f"a step: {found['flops'] / 1e12:.2f} TFLOP per device, {compute:.1f} ms at {100 * utilisation:.0f} % of "
        f"{machine.flops / 1e12:.0f} TFLOP/s; network {network:.1f} ms at {machine.bandwidth / 1e9:.0f} GB/s",
        f"efficiency against one device: {100 * found['efficiency']:.1f} % if nothing overlaps, more if XLA overlaps",
        f"images per second: {images:.0f} if nothing overlaps",
    ]
    return "\n".join(lines)


def _mesh(devices: int, *, data: int = -1, fsdp: int = 1) -> AbstractMesh:
    if fsdp < 1 or devices % fsdp or data not in (-1, devices // fsdp):
        raise UserError(f"config.mesh (data {data}, fsdp {fsdp}) does not make {devices} devices.")
    return AbstractMesh((devices // fsdp, fsdp), (DATA, FSDP), axis_types=(AxisType.Auto,) * 2)


def _bytes(tree: Any) -> int:
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _held(tree: Any, mesh: Any) -> int:
    """Bytes of a tree on one device."""
    return sum(
        math.prod(state_sharding(leaf.shape, mesh).shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )
