"""The commands that turn one checkpoint into another or compare two: average, convert, export, push and verify."""

import argparse
import time
from pathlib import Path
from typing import Any

from maxmap import checkpoint, evaluation_commands, storage
from maxmap.arguments import Number, local_path
from maxmap.classes import read_names, read_numbers
from maxmap.convert.dialects import DIALECTS
from maxmap.convert.load import convert, export, read_foreign
from maxmap.convert.resize import RESIZES
from maxmap.convert.verify import REPORT, TOLERANCES, verify
from maxmap.cost import count_parameters
from maxmap.data.preprocessing import in_words
from maxmap.errors import UserError, printable
from maxmap.models import HEADS, PIXEL_HEADS
from maxmap.onnx.export import ENDING as ONNX
from maxmap.onnx.export import export_onnx
from maxmap.programs import ENDING as STABLEHLO
from maxmap.programs import PLATFORMS, export_program
from maxmap.push import push


def add_average(command: argparse.ArgumentParser) -> None:
    """Fills the parser of `average`."""
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


def add_convert(command: argparse.ArgumentParser) -> None:
    """Fills the parser of `convert`."""
    command.add_argument(
        "source", type=storage.expand, help="file, folder or published name, for example timm/maxvit_tiny_tf_224.in1k"
    )
    command.add_argument(
        "dest", type=storage.expand, help="folder to write; init_from, --mode=eval and predict take it"
    )
    command.add_argument("--model", dest="name", help="name from 'list', where the source does not say it")
    command.add_argument("--head", choices=HEADS | PIXEL_HEADS, help="of the source, in place of the model's own")
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


def add_export(command: argparse.ArgumentParser) -> None:
    """Fills the parser of `export`."""
    command.add_argument("source", type=storage.expand, help="folder of a run or of a converted checkpoint")
    command.add_argument(
        "file",
        type=local_path,
        help=f".safetensors or .pth to write; {STABLEHLO} or {ONNX} for a program that runs without maxmap",
    )
    command.add_argument("--dialect", choices=DIALECTS, help="whose names (default: timm's or the author's)")
    command.add_argument(
        "--platforms",
        nargs="+",
        choices=PLATFORMS,
        help=f"where a {STABLEHLO} program is to run (default: {', '.join(PLATFORMS)})",
    )
    command.add_argument("--pixels", action="store_true", help="the program takes pixels from 0 to 255")
    _add_ema(command)
    command.add_argument("--overwrite", action="store_true", help="replace what is there")
    command.set_defaults(run=export_command)


def add_push(command: argparse.ArgumentParser) -> None:
    """Fills the parser of `push`."""
    command.add_argument("source", type=storage.expand, help="folder of a run or of a converted checkpoint")
    command.add_argument("repository", metavar="OWNER/NAME", help="on the Hugging Face hub; it is made if it is new")
    command.add_argument("--private", action="store_true", help="show a new repository to its owner alone")
    _add_ema(command)
    command.set_defaults(run=push_command)


def add_verify(command: argparse.ArgumentParser) -> None:
    """Fills the parser of `verify`."""
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


def average_command(workdirs: list[str], out: str, last: int, raw: bool) -> None:
    """Writes the mean of checkpoints as a checkpoint of the model alone."""
    variables, info = checkpoint.average_checkpoints(workdirs, last=last, ema=not raw)
    checkpoint.write_variables(out, variables, info)
    used = ", ".join(f"{printable(workdir)} step {step}" for workdir, step in info["averaged"])
    print(f"{printable(out)}: {info['weights']} weights of {used}")


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


def export_command(
    source: str, file: Path, dialect: str | None, platforms: list[str] | None, pixels: bool, **options: Any
) -> None:
    """Writes a checkpoint of ours for others."""
    program = file.suffix in (STABLEHLO, ONNX)
    if program and dialect is not None:
        raise UserError("a program has no names of parameters: leave out --dialect.")
    if platforms and file.suffix != STABLEHLO:
        raise UserError(f"--platforms belongs to a program of JAX: give a name in {STABLEHLO}, or leave it out.")
    if pixels and not program:
        raise UserError(f"--pixels belongs to a program: give a name in {STABLEHLO} or {ONNX}, or leave it out.")
    if file.suffix == STABLEHLO:
        print(printable(export_program(source, file, platforms=platforms or PLATFORMS, pixels=pixels, **options)))
        return
    if file.suffix == ONNX:
        print(printable(export_onnx(source, file, pixels=pixels, **options)))
        return
    print(printable(export(source, file, dialect=dialect, **options)))


def push_command(source: str, repository: str, **options: Any) -> None:
    """Writes a checkpoint to the Hugging Face hub."""
    print(printable(push(source, repository, **options)))


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
