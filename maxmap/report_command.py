"""The command report."""

import argparse
from pathlib import Path

from maxmap import storage
from maxmap.arguments import Number, add_checkpoint, local_path
from maxmap.errors import printable
from maxmap.report.evidence import gather
from maxmap.report.page import draw
from maxmap.validate import result_folder


def add_report(command: argparse.ArgumentParser) -> None:
    """Fills the parser of `report`."""
    add_checkpoint(command)
    command.add_argument(
        "images",
        type=local_path,
        nargs="?",
        help="labelled images, as `validate` takes them (default: the evaluation split of the run's recipe)",
    )
    command.add_argument("--split", help="folder or archives in IMAGES, or split of TFDS (default: val, validation)")
    command.add_argument("--tfds", metavar="NAME", help="data set in IMAGES, a TFDS directory")
    command.add_argument(
        "--out", type=storage.expand, help="page to write (default: report.html in the folder of the checkpoint)"
    )
    command.add_argument(
        "--shown",
        type=Number(gather, "shown"),
        default=12,
        help="of the most wrong images, and of the least certain ones (default: 12)",
    )
    command.add_argument(
        "--explain",
        action=argparse.BooleanOptionalAction,
        default=True,
        dest="explained",
        help="show where the network looked in the most wrong images (default: yes; compiles the network once more)",
    )
    command.set_defaults(run=report_command)


def report_command(
    checkpoint: str,
    images: Path | None,
    split: str | None,
    tfds: str | None,
    out: str | None,
    shown: int,
    explained: bool,
) -> None:
    """Writes a page about a checkpoint, and prints where it is and what it lacks."""
    evidence = gather(checkpoint, images, split=split, tfds=tfds, shown=shown, explained=explained)
    file = out or result_folder(checkpoint) / "report.html"
    storage.write_named(file, draw(evidence))
    for text in evidence.missing.values():
        print(f"missing: {printable(text)}")
    print(printable(file))
