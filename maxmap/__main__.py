"""The commands beside training: python -m maxmap list, predict, validate, convert, export and more."""

import argparse
import csv
import json
import re
import sys
import time
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging
from PIL import Image

from maxmap import checkpoint, config, evaluation_commands, runtime, storage
from maxmap.accelerators.hardware import HARDWARE
from maxmap.arguments import Number, Parser, local_path
from maxmap.classes import read_names, read_numbers
from maxmap.convert.dialects import DIALECTS
from maxmap.convert.load import convert, export, read_foreign
from maxmap.convert.resize import RESIZES
from maxmap.convert.verify import REPORT, TOLERANCES, verify
from maxmap.cost import cost, count_parameters
from maxmap.data.preprocessing import in_words
from maxmap.errors import UserError, nearest, printable, sentence
from maxmap.models import FAMILIES, HEADS, MODELS, create_model, list_models
from maxmap.ranges import Count
from maxmap.recipe import Recipe
from maxmap.train.compile import compile_step, describe_step
from maxmap.train.plan import describe, plan
from maxmap.train.preview import show_batch

_LONGEST_NAME = 50  # characters of a class in the name of a file
PARITY = resources.files("maxmap") / "parity.csv"  # what `make parity` measured


def list_command(pattern: str, family: str | None, head: str | None) -> None:
    """Prints the models that match; their costs as `make parity` wrote them down, since tracing takes a second each."""
    family_of = {backbone: name for name, variants in FAMILIES.items() for backbone in variants}
    rows = [(name, family_of[MODELS[name].backbone], MODELS[name].head["name"]) for name in list_models(pattern)]
    if not rows:
        raise UserError(f"no model matches '{pattern}'; the nearest names are {nearest(pattern, list_models())}.")
    rows = [row for row in rows if family in (None, row[1]) and head in (None, row[2])]
    if not rows:
        raise UserError(f"no model that matches '{pattern}' has family {family or '*'} and head {head or '*'}.")
    with PARITY.open(encoding="utf-8") as file:
        measured = {row["name"]: row for row in csv.DictReader(file)}
    longest = max(len(name) for name, _, _ in rows)
    print(f"{'model':{longest}}  {'family':10}  {'head':8}  {'parameters':>13}  {'GFLOPs':>7}  {'image':>7}  parity")
    for name, its_family, its_head in rows:
        model, row = create_model(name), measured.get(name, {})
        size = model.backbone.image_size
        height, width = (size, size) if isinstance(size, int) else size
        if row:
            parameters, billions = int(row["parameters"]), float(row["gflops"])
        else:
            parameters, operations = cost(model)
            billions = operations / 1e9
        print(
            f"{name:{longest}}  {its_family:10}  {its_head:8}  {parameters:13,}  {billions:7.2f}  "
            f"{f'{height}x{width}':>7}  {row['against'] if row.get('ok') == 'yes' else '-'}",
            flush=True,
        )


def convert_command(source: str, dest: str, class_map: Path | None, classes: Path | None, **options: Any) -> None:
    """Writes a checkpoint of others as one of ours, and prints what was done to its entries."""
    began = time.perf_counter()
    preprocessing = evaluation_commands.take_preprocessing(options)
    loaded = convert(
        source,
        dest,
        class_map=None if class_map is None else read_numbers(class_map),
        classes=None if classes is None else read_names(classes),
        preprocessing=preprocessing,
        **options,
    )
    about, model = loaded.info["source"], loaded.info["model"]
    count = count_parameters(loaded.variables["params"])
    print(
        f"{model['name']}, {count:,} parameters, {model['num_classes']} classes, from {about['kind']} "
        f"({about['dialect']} names, {loaded.info['weights']} weights)"
    )
    print(loaded.report)
    print(f"preprocessing: {in_words(loaded.info['preprocessing'])}")
    if loaded.assumed:
        print(f"assumed, as the source does not say it: {loaded.assumed}; options such as --crop-pct and --mean set it")
    print(f"written to {printable(dest)} in {time.perf_counter() - began:.1f} s")


def export_command(source: str, file: Path, **options: Any) -> None:
    """Writes a checkpoint of ours for others."""
    print(printable(export(source, file, **options)))


def verify_command(path: str, against: str, **options: Any) -> int:
    """Prints how far a checkpoint is from its source; returns 1 past the tolerance."""
    report = verify(path, against, **options)
    print(f"{report['identical']} of {report['entries']} entries have the same bits as {printable(against)}")
    for dtype in TOLERANCES if report["reference"] else ():
        row = report[dtype]
        maps = ", ".join(f"{value:.1e}" for value in row["features"])
        print(
            f"{dtype} against {report['reference']}: logits {row['logits']:.1e} of their std ({row['logits_max']:.1e}"
            f" at most), gradient {row['gradient']:.1e}, top-1 the same for {100 * row['top1']:.0f} %, "
            f"feature maps {maps}; tolerance {row['tolerance']:.0e}"
        )
    if not report["reference"]:
        print("no installed reference implementation has this model, so the values alone were compared")
    print(f"{'ok' if report['ok'] else 'NOT THE SAME'}; the report is {printable(path)}/{REPORT}")
    return 0 if report["ok"] else 1


def samples_command(recipe: Recipe, folder: Path, count: Count) -> None:
    """Writes evaluation images of a config's data as PNG files, spread over the split, named by number and class."""
    data = recipe.data()
    if data.val is None:
        raise UserError("the config has no evaluation split: set --config.data.val_split.")
    for index in np.linspace(0, len(data.val) - 1, min(count, len(data.val))).astype(int):
        image, label = data.val[int(index)]
        # What other systems do not take in a file's name goes, the separator of folders first.
        name = re.sub(r"[^\w .+-]", "_", data.classes[label])[:_LONGEST_NAME]
        suffix = (Path(data.val.name(int(index))).suffix or ".jpg") if isinstance(image, bytes) else ".png"
        path = folder / f"{index:05}_{name}{suffix}"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if isinstance(image, bytes):
                path.write_bytes(image)
            else:
                Image.fromarray(image).save(path)
        except OSError as error:
            raise UserError(f"cannot write {printable(path)} ({error.strerror}): give another folder.") from error
        print(printable(path))


def plan_command(
    recipe: Recipe,
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
    if compile_it:
        found = compile_step(recipe, devices, hardware, save)
        text = describe_step(found)
    else:
        found = plan(recipe, devices, hardware, utilisation)
        text = describe(found, devices, hardware, utilisation)
    print(json.dumps(found, indent=2) if as_json else text)


def average_command(workdirs: list[str], out: str, last: int, raw: bool) -> None:
    """Writes the mean of checkpoints as a checkpoint of the model alone."""
    variables, info = checkpoint.average_checkpoints(workdirs, last=last, ema=not raw)
    checkpoint.write_variables(out, variables, info)
    used = ", ".join(f"{printable(workdir)} step {step}" for workdir, step in info["averaged"])
    print(f"{printable(out)}: {info['weights']} weights of {used}")


def show_batch_command(recipe: Recipe, out: Path, step: int, count: int) -> None:
    """Writes a picture of an augmented training batch with its targets."""
    show_batch(recipe, out, step=step, count=count)
    print(printable(out))


def main(argv: list[str] | None = None) -> int:
    """Runs a command; returns 2, after one sentence, for a mistake of the user's, and 130 for Ctrl-C."""
    parser = make_parser()
    rest, overrides = config.split_overrides(sys.argv[1:] if argv is None else argv)
    arguments = vars(parser.parse_args(rest))
    if overrides and "config" not in arguments:
        parser.error(f"this command reads no config: leave out {' '.join(overrides)}")
    logging.set_verbosity(logging.ERROR)  # orbax logs every file that it writes
    run = arguments.pop("run")
    try:
        if "config" in arguments:
            arguments["recipe"] = config.bind(config.read(arguments.pop("config"), overrides))
        return run(**arguments) or 0
    except UserError as error:
        print(f"maxmap: {sentence(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("maxmap: interrupted.", file=sys.stderr)
        return 130


def make_parser() -> argparse.ArgumentParser:
    """Returns the parser of all commands."""
    parser = Parser(prog="python -m maxmap", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_model_commands(commands)
    _add_conversion_commands(commands)
    _add_config_commands(commands)
    return parser


def _add_model_commands(commands: Any) -> None:
    command = commands.add_parser(
        "list", help="models: parameters, multiply-adds (most papers' GFLOPs), image size, parity"
    )
    command.add_argument("pattern", nargs="?", default="*", help="shell pattern, for example 'map_*'")
    command.add_argument("--family", choices=FAMILIES, help="only this family of backbones")
    command.add_argument("--head", choices=HEADS, help="only this head")
    command.set_defaults(run=list_command)

    evaluation_commands.add_commands(commands)

    command = commands.add_parser("average", help="average checkpoints; of a single one, keep the EMA weights alone")
    command.add_argument("workdirs", type=storage.expand, nargs="+", help="folders of runs of the same model")
    command.add_argument("--out", type=storage.expand, required=True, help="folder for the new checkpoint")
    command.add_argument(
        "--last",
        type=Number(checkpoint.average_checkpoints, "last"),
        default=1,
        help="newest checkpoints of each run (default: 1)",
    )
    command.add_argument("--raw", action="store_true", help="the raw weights, not their moving averages")
    command.set_defaults(run=average_command)


def _add_conversion_commands(commands: Any) -> None:
    command = commands.add_parser(
        "convert", help="turn a checkpoint of PyTorch, TensorFlow, TFLite or ONNX into one of ours"
    )
    command.add_argument(
        "source", type=storage.expand, help="file, folder or published name, for example timm/maxvit_tiny_tf_224.in1k"
    )
    command.add_argument(
        "dest", type=storage.expand, help="folder to write; init_from, --mode=eval and predict take it"
    )
    command.add_argument("--model", dest="name", help="name from 'list', where the source does not say it")
    _add_ema(command)
    command.add_argument(
        "--num-classes",
        type=Number(read_foreign, "num_classes"),
        help="classes of the model (default: those of the source)",
    )
    command.add_argument(
        "--image-size",
        type=Number(read_foreign, "image_size"),
        help="pixels that the model is for (default: those of its name)",
    )
    command.add_argument(
        "--in-channels",
        type=Number(read_foreign, "in_channels"),
        help="channels of the images (default: those of the source)",
    )
    command.add_argument("--resize", choices=RESIZES, help="of position tables (default: bilinear from TensorFlow)")
    evaluation_commands.add_preprocessing(command, "what the source says")
    command.add_argument(
        "--class-map", type=local_path, help="file: for every new class the old one's number, -1 the mean"
    )
    command.add_argument("--classes", type=local_path, help="file with the name of a class in every line")
    command.add_argument(
        "--ignore",
        action="append",
        default=[],
        metavar="PATTERN",
        help="leave out these entries, for example 'criterion.*'",
    )
    _add_classifier(command)
    command.add_argument("--overwrite", action="store_true", help="replace what is there")
    command.set_defaults(run=convert_command)

    command = commands.add_parser("export", help="write a checkpoint for PyTorch, under the reference's names")
    command.add_argument("source", type=storage.expand, help="folder of a run or of a converted checkpoint")
    command.add_argument("file", type=local_path, help=".safetensors or .pth to write")
    command.add_argument("--dialect", choices=DIALECTS, help="whose names (default: timm's or the author's)")
    _add_ema(command)
    command.add_argument("--overwrite", action="store_true", help="replace what is there")
    command.set_defaults(run=export_command)

    command = commands.add_parser("verify", help="compare a converted checkpoint with its source, both running")
    command.add_argument("path", type=storage.expand, help="folder of the checkpoint")
    command.add_argument("--against", type=storage.expand, required=True, help="the source that it was converted from")
    command.add_argument(
        "--tolerance", type=Number(verify, "tolerance"), help="largest relative difference in float64 (default: 1e-9)"
    )
    _add_ema(command)
    _add_classifier(command)
    command.set_defaults(run=verify_command)


def _add_ema(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--ema", action=argparse.BooleanOptionalAction, help="averaged weights, or raw ones (default: what is usual)"
    )


def _add_classifier(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--classifier",
        type=local_path,
        metavar="FILE",
        help="file of the classifier, where the source has the trunk alone",
    )


def _add_config_commands(commands: Any) -> None:
    about = "config file; --config.KEY=VALUE changes a value"
    command = commands.add_parser("samples", help="write some evaluation images of a config's data as files")
    command.add_argument("config", help=about)
    command.add_argument("folder", type=local_path, help="where to")
    command.add_argument("--count", type=Number(samples_command, "count"), default=6, help="images (default: 6)")
    command.set_defaults(run=samples_command)

    command = commands.add_parser("plan", help="memory, traffic and speed of a config on hardware one has not got yet")
    command.add_argument("--config", required=True, help=about)
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

    command = commands.add_parser("show-batch", help="draw an augmented training batch with its targets")
    command.add_argument("--config", required=True, help=about)
    command.add_argument("--out", type=local_path, default=Path("batch.png"), help="picture (default: batch.png)")
    command.add_argument("--step", type=Number(show_batch, "step"), default=0, help="of the run (default: 0)")
    command.add_argument("--count", type=Number(show_batch, "count"), default=16, help="images (default: 16)")
    command.set_defaults(run=show_batch_command)


if __name__ == "__main__":
    runtime.prepare()
    sys.exit(main())
