"""The program: `maxmap` where the package is installed, `python -m maxmap` and main.py in a checkout.

The table `COMMANDS` is all that its start needs. A command's module is imported when the command is named, because what
takes part in its parser (models, ranges of numbers) needs JAX.
"""

import argparse
import pkgutil
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple, NoReturn

from maxmap import runtime
from maxmap.arguments import Parser, split_overrides
from maxmap.errors import UserError, sentence


class Command(NamedTuple):
    """A command.

    Attributes:
      fill: Where the function is that adds its arguments to a parser, and what it runs as `run`.
      help: What it is for.
      computes: Whether it uses JAX.
    """

    fill: str
    help: str
    computes: bool = True


COMMANDS = {
    "recipes": Command("maxmap.recipes_command:add_recipes", "the recipes that --config takes", computes=False),
    "list": Command("maxmap.model_commands:add_list", "models or published checkpoints, with what they cost and reach"),
    "check": Command(
        "maxmap.check_command:add_check", "look at a folder of images before training, and split it", computes=False
    ),
    "train": Command("maxmap.training_commands:add_train", "train a recipe, or evaluate a run (--mode=eval)"),
    "show-batch": Command(
        "maxmap.training_commands:add_show_batch", "draw an augmented training batch with its targets"
    ),
    "samples": Command(
        "maxmap.training_commands:add_samples", "write some evaluation images of a config's data as files"
    ),
    "plan": Command(
        "maxmap.training_commands:add_plan", "memory, traffic and speed of a config on hardware one has not got yet"
    ),
    "predict": Command(
        "maxmap.evaluation_commands:add_predict", "name what images show, with the preprocessing of the checkpoint"
    ),
    "embed": Command("maxmap.evaluation_commands:add_embed", "the embeddings of many images, as a table"),
    "validate": Command("maxmap.evaluation_commands:add_validate", "accuracy of a checkpoint on labelled images"),
    "report": Command(
        "maxmap.report_command:add_report", "write a page about a checkpoint: how good it is, and where it errs"
    ),
    "explain": Command(
        "maxmap.evaluation_commands:add_explain", "where a network looked, and what its branches add to a logit"
    ),
    "serve": Command("maxmap.serve_command:add_serve", "answer over HTTP what images show, with a page for people"),
    "average": Command(
        "maxmap.checkpoint_commands:add_average", "average checkpoints; of a single one, keep the EMA weights alone"
    ),
    "convert": Command(
        "maxmap.checkpoint_commands:add_convert",
        "turn a checkpoint of PyTorch, TensorFlow, TFLite or ONNX into one of ours",
    ),
    "export": Command(
        "maxmap.checkpoint_commands:add_export", "write a checkpoint for PyTorch, or as a program (ONNX, StableHLO)"
    ),
    "push": Command("maxmap.checkpoint_commands:add_push", "write a checkpoint to the Hugging Face hub"),
    "verify": Command(
        "maxmap.checkpoint_commands:add_verify", "compare a converted checkpoint with its source, both running"
    ),
    "benchmark": Command(
        "maxmap.model_commands:add_benchmark", "speed and memory of a model on this machine's devices"
    ),
}


def start(argv: Sequence[str] | None = None) -> NoReturn:
    """Runs a command as this process, which is prepared for it, and exits; without `argv`, the process's arguments."""
    sys.exit(main(sys.argv[1:] if argv is None else argv, own_process=True))


def main(argv: Sequence[str], *, own_process: bool = False) -> int:
    """Runs a command; returns 2, after one sentence, for a mistake of the user's, and 130 for Ctrl-C.

    Args:
      argv: The arguments of the command line.
      own_process: Whether the process is there for the command alone, which then changes settings of it.
    """
    if own_process:
        runtime.prepare_to_print()
    rest, overrides = split_overrides(argv)
    name = next((argument for argument in rest if argument in COMMANDS), None)
    try:
        parser = make_parser([name] if name else [])
        arguments = vars(parser.parse_args(rest))
        if "overrides" in arguments:
            arguments["overrides"] = overrides
        elif overrides:
            parser.error(f"this command reads no config: leave out {' '.join(overrides)}")
        if own_process and name and COMMANDS[name].computes:
            runtime.prepare_to_compute()
        return arguments.pop("run")(**arguments) or 0
    except UserError as error:
        print(f"maxmap: {sentence(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("maxmap: interrupted.", file=sys.stderr)
        return 130


def make_parser(filled: Iterable[str] = tuple(COMMANDS)) -> argparse.ArgumentParser:
    """Returns the parser of all commands; only the commands in `filled` have their arguments."""
    prog = "maxmap" if Path(sys.argv[0]).name == "maxmap" else "python -m maxmap"
    parser = Parser(prog=prog, description="Train, evaluate, convert and measure vision models.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    parsers = {
        name: commands.add_parser(name, help=command.help, description=f"{command.help[0].upper()}{command.help[1:]}.")
        for name, command in COMMANDS.items()
    }
    for name in filled:
        pkgutil.resolve_name(COMMANDS[name].fill)(parsers[name])
    return parser


if __name__ == "__main__":
    start()
