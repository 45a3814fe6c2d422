"""The commands that read a config: train, plan, samples and show-batch."""

import argparse
import json
import re
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from PIL import Image

from maxmap import evaluate, recipe_files
from maxmap.accelerators.hardware import HARDWARE
from maxmap.arguments import Number, add_config, add_processes, local_path
from maxmap.config import bind, explain, read
from maxmap.errors import UserError, printable
from maxmap.ranges import Count
from maxmap.sharding import initialize_processes
from maxmap.train import loop
from maxmap.train.compile import compile_step, describe_step
from maxmap.train.plan import describe, plan
from maxmap.train.preview import show_batch

_LONGEST_NAME = 50  # characters of a class in the name of a file


def add_train(command: argparse.ArgumentParser) -> None:
    """Fills the parser of `train`."""
    add_config(command)
    command.add_argument(
        "--workdir", help="folder of the run; the same one again goes on with it (default: runs/RECIPE)"
    )
    command.add_argument(
        "--mode", choices=("train", "eval"), default="train", help="train, or evaluate the newest checkpoint"
    )
    command.add_argument(
        "--help_config", action="store_true", help="list every key of the config: value, type, default and meaning"
    )
    command.add_argument(
        "--continue_with_changes",
        action="store_true",
        help="go on although the config changed what is computed",
    )
    add_processes(command)
    command.set_defaults(run=train_command)


def add_plan(command: argparse.ArgumentParser) -> None:
    """Fills the parser of `plan`."""
    add_config(command)
    command.add_argument("--devices", type=Number(plan, "devices"), required=True, help="how many")
    command.add_argument("--hardware", choices=HARDWARE, default="tpu-v4", help="of which kind (default: tpu-v4)")
    command.add_argument(
        "--utilisation",
        type=Number(plan, "utilisation"),
        default=0.3,
        help="share of the peak that the arithmetic reaches (default: 0.3)",
    )
    command.add_argument(
        "--compile",
        action="store_true",
        dest="compile_it",
        help="compile the step for that hardware, here, and print what the compiler says; minutes",
    )
    command.add_argument("--json", action="store_true", dest="as_json", help="print it as JSON")
    command.add_argument("--save", type=local_path, help="file for the compiled program's text")
    command.set_defaults(run=plan_command)


def add_samples(command: argparse.ArgumentParser) -> None:
    """Fills the parser of `samples`."""
    add_config(command, "config")
    command.add_argument("folder", type=local_path, help="where to")
    command.add_argument("--count", type=Number(samples_command, "count"), default=6, help="images (default: 6)")
    command.set_defaults(run=samples_command)


def add_show_batch(command: argparse.ArgumentParser) -> None:
    """Fills the parser of `show-batch`."""
    add_config(command)
    command.add_argument("--out", type=local_path, default=Path("batch.png"), help="picture (default: batch.png)")
    command.add_argument("--step", type=Number(show_batch, "step"), default=0, help="of the run (default: 0)")
    command.add_argument("--count", type=Number(show_batch, "count"), default=16, help="images (default: 16)")
    command.set_defaults(run=show_batch_command)


def train_command(
    config: str,
    overrides: Sequence[str],
    workdir: str | None,
    mode: str,
    help_config: bool,
    continue_with_changes: bool,
    coordinator: str | None,
    num_processes: int | None,
    process_id: int | None,
) -> None:
    """Trains, or evaluates a run, and prints the result as JSON."""
    values = read(config, overrides)
    if help_config:
        print(explain(values))
        return
    recipe = bind(values)
    workdir = workdir or f"runs/{recipe_files.find(config).path.stem}"
    initialize_processes(coordinator, num_processes, process_id)
    if mode == "train":
        result = loop.run(recipe, workdir, allow_changes=continue_with_changes)
    else:
        result = evaluate.run(recipe, workdir)
    if jax.process_index() == 0:
        print(json.dumps(result, indent=2))


def plan_command(
    config: str,
    overrides: Sequence[str],
    devices: int,
    hardware: str,
    utilisation: float,
    compile_it: bool,
    as_json: bool,
    save: Path | None,
) -> None:
    """Prints whether a recipe fits on devices that one does not have yet, and what its steps cost there."""
    if save is not None and not compile_it:
        raise UserError("there is no compiled program to save: give --compile, too.")
    recipe = bind(read(config, overrides))
    if compile_it:
        found = compile_step(recipe, devices, hardware, save)
        text = describe_step(found)
    else:
        found = plan(recipe, devices, hardware, utilisation)
        text = describe(found, devices, hardware, utilisation)
    print(json.dumps(found, indent=2) if as_json else text)


def samples_command(config: str, overrides: Sequence[str], folder: Path, count: Count) -> None:
    """Writes evaluation images of a config's data as PNG files, spread over the split, named by number and class."""
    data = bind(read(config, overrides)).data()
    if data.val is None:
        raise UserError("the config has no evaluation split: set --config.data.val_split.")
    for index in np.linspace(0, len(data.val) - 1, min(count, len(data.val))).astype(int):
        image, label = data.val[int(index)]
        # What other systems do not take in a file's name goes, the separator of folders first.
        class_name = f"_{data.classes[label]}" if isinstance(label, int) else ""
        name = re.sub(r"[^\w .+-]", "_", class_name)[: _LONGEST_NAME + 1]
        suffix = (Path(data.val.name(int(index))).suffix or ".jpg") if isinstance(image, bytes) else ".png"
        path = folder / f"{index:05}{name}{suffix}"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if isinstance(image, bytes):
                path.write_bytes(image)
            else:
                Image.fromarray(image).save(path)
        except OSError as error:
            raise UserError(f"cannot write {printable(path)} ({error.strerror}): give another folder.") from error
        print(printable(path))


def show_batch_command(config: str, overrides: Sequence[str], out: Path, step: int, count: int) -> None:
    """Writes a picture of an augmented training batch with its targets."""
    show_batch(bind(read(config, overrides)), out, step=step, count=count)
    print(printable(out))
