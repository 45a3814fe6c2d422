"""The command line's parser, types of its arguments beside text, and configs with their changes.

The types are numbers with a range, and paths.
"""

import argparse
import re
import typing
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from maxmap import storage
from maxmap.errors import printable
from maxmap.ranges import fits, type_text

# How shtab, which writes the script that completes commands in a shell, knows an argument that is a file.
_FILES = {"bash": "_shtab_compgen_files", "zsh": "_files", "tcsh": "f"}


class Parser(argparse.ArgumentParser):
    """A parser that answers a mistake with one sentence, as all of maxmap does, in place of all its options."""

    def add_argument(self, *names: Any, **options: Any) -> argparse.Action:
        action = super().add_argument(*names, **options)
        if options.get("type") in (storage.expand, local_path):
            action.complete = _FILES  # type: ignore[attr-defined]
        return action

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"maxmap: {message.rstrip('.')}; {self.prog} --help lists what it takes.\n")


class Number:
    """Reads an argument that is a number, and refuses what does not fit the parameter that it is for.

    Args:
      function: That takes the number.
      parameter: Its name there; the annotation says what fits. Of several numbers, it says what fits each.
    """

    def __init__(self, function: Callable[..., Any], parameter: str):
        wanted = typing.get_type_hints(function, include_extras=True)[parameter]
        # Of several, such as the mean of each colour, an argument is one.
        several = [kind for kind in (wanted, *typing.get_args(wanted)) if typing.get_origin(kind) in (tuple, Sequence)]
        self.wanted = typing.get_args(several[0])[0] if several else wanted

    def __call__(self, text: str) -> int | float:
        for kind in (int, float):
            try:
                value = kind(text)
            except ValueError:
                continue
            if fits(value, self.wanted):
                return value
            break
        wanted = type_text(self.wanted).removesuffix(" or None")
        raise argparse.ArgumentTypeError(f"'{printable(text)}' is out of range: give a value of type {wanted}.")


def local_path(text: str) -> Path:
    """Reads an argument that is a path on this machine."""
    if storage.in_bucket(text):  # as a path it would be a folder 'gs:' here
        raise argparse.ArgumentTypeError(f"{text} is in a bucket: give a path on this machine")
    return Path(storage.expand(text))


def add_checkpoint(command: argparse.ArgumentParser) -> None:
    """Adds the argument for a checkpoint, as `maxmap.load` takes it."""
    command.add_argument(
        "checkpoint", type=storage.expand, help="folder of a run or of a converted checkpoint, or a published name"
    )


def add_processes(command: argparse.ArgumentParser) -> None:
    """Adds the arguments of `maxmap.sharding.initialize_processes`, by the same names."""
    from maxmap.sharding import initialize_processes  # which needs JAX, as some commands do not

    command.add_argument("--coordinator", help="HOST:PORT of the first process, where nothing else tells it")
    command.add_argument(
        "--num_processes", type=Number(initialize_processes, "num_processes"), help="how many processes work together"
    )
    command.add_argument(
        "--process_id", type=Number(initialize_processes, "process_id"), help="which of them this is, from 0"
    )


def add_config(command: argparse.ArgumentParser, name: str = "--config") -> None:
    """Adds the argument for a config; the command's function takes it, and the `overrides` of `split_overrides`."""
    required: dict[str, Any] = {"required": True} if name.startswith("-") else {}
    command.add_argument(
        name, help="recipe of `maxmap recipes`, or a file; --config.KEY=VALUE changes a value", **required
    )
    command.set_defaults(overrides=())


def split_overrides(argv: Iterable[str]) -> tuple[list[str], list[str]]:
    """Separates the arguments `--config.KEY=VALUE` of a command line from the others; returns the others first."""
    overrides = [argument for argument in argv if re.match(r"--?config\.", argument)]
    return [argument for argument in argv if argument not in overrides], overrides
