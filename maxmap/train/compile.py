"""The training step of a recipe, compiled for accelerators that are not here: what their compilers say of it."""

from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from maxmap.accelerators import program, topology
from maxmap.accelerators.hardware import HARDWARE, slice_of
from maxmap.data.preprocessing import of_channels
from maxmap.data.tables import column_names
from maxmap.errors import UserError, printable
from maxmap.recipe import Recipe
from maxmap.tasks import TASKS, unfitted
from maxmap.train.build import Images, make_step
from maxmap.train.plan import CLASSES, Devices, plan
from maxmap.train.teacher import check_count, read_teacher

IMAGENET = 1_281_167  # images of an epoch where no data set is opened


def compile_step(recipe: Recipe, devices: Devices, hardware: str, save: str | Path | None = None) -> dict[str, Any]:
    """Compiles the step as training would run it; opens no data set.

    Args:
      recipe: As for training; as many classes as its teacher has, else 1,000, where it does not set
        `model.num_classes`.
      devices: Of the job: as many as a slice of that hardware has.
      hardware: A key of `HARDWARE`.
      save: File for the text of the compiled program; None for none.

    Returns:
      What `program.compile_for` reports of one device, with 'hardware', 'devices', 'topology', 'mesh',
      'images_per_device' (of a step), 'images_per_second' (of all devices), 'flops' (of the model on a device, without
      what remat computes again), 'share_of_peak' and 'network_seconds' (as `plan` counts them).

    Raises:
      UserError: no slice has so many devices, the compiler is not installed, or the step does not fit.
    """
    lowered, planned, mesh = lower_step(recipe, devices, hardware)
    found, text = program.compile_lowered(lowered)
    if save is not None:
        try:
            Path(save).write_text(text, encoding="utf-8")
        except OSError as error:
            raise UserError(f"cannot write {printable(save)} ({error.strerror}): give another --save.") from error
    flops = 6.0 * planned["multiply_adds"]
    return {
        "model": recipe.model.keywords["name"],
        "hardware": hardware,
        "devices": devices,
        "topology": slice_of(hardware, devices),
        "mesh": dict(mesh.shape),
        "dtype": recipe.dtype,
        "images_per_device": planned["images_per_device"],
        "images_per_second": recipe.batch_size / found["seconds"],
        "flops": flops,
        "share_of_peak": flops / found["seconds"] / HARDWARE[hardware].flops,
        "network_seconds": planned["network_seconds"],
        **found,
    }


def lower_step(recipe: Recipe, devices: Devices, hardware: str) -> tuple[program.Lowered, dict[str, Any], Mesh]:
    """Traces the step that `compile_step` compiles; returns it, what `plan` says of the job, and the job's mesh."""
    available = topology.devices_of(hardware, devices)
    planned = plan(recipe, devices, hardware, 1.0)
    mesh = recipe.mesh(available)
    data = recipe.data.keywords
    name, columns = data["task"], column_names(data["label_columns"])
    teacher = read_teacher(recipe)
    known = CLASSES if teacher is None else len(teacher.info["classes"])
    classes = len(columns) if TASKS[name].complete else recipe.model.keywords.get("num_classes", known)
    if teacher is not None:
        check_count(teacher, classes)
    mean, std = (of_channels(data[key], data["channels"], f"data.{key}") for key in ("mean", "std"))
    images = Images(data["image_size"], classes, mean, std, unfitted(name, classes))
    step = make_step(recipe, mesh, images, max(1, IMAGENET // recipe.batch_size), teacher)
    return program.lower_for(hardware, step.function, *step.arguments()), planned, mesh


def describe_step(found: dict[str, Any]) -> str:
    """Returns what `compile_step` found as text."""
    lines = program.describe(found, found["hardware"])
    images, devices = found["images_per_device"], found["devices"]
    speed = (
        f"{found['images_per_second']:,.0f} images/s, {found['images_per_second'] / devices:,.0f} a device; "
        f"{found['flops'] / 1e12:.2f} TFLOP a step and device, {100 * found['share_of_peak']:.1f} % of the peak; "
        f"network {1e3 * found['network_seconds']:.1f} ms if nothing overlaps, not counted"
    )
    return "\n".join(
        [
            f"{found['model']}, {found['dtype']}, on {devices} x {found['hardware']} ({found['topology']}), mesh "
            f"{found['mesh']['data']} x {found['mesh']['fsdp']} (data x fsdp), {images} images a step on each device",
            f"These are estimates of the compiler, {found['compiler']} (jax {found['jax']}), not measurements; it took "
            f"{found['compile_seconds']:.0f} s.",
            "",
            *lines[:2],
            speed,
            *lines[2:],
        ]
    )
