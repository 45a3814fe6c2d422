"""The command check, which needs no JAX."""

import argparse
import json
from pathlib import Path

import numpy as np

from maxmap import storage
from maxmap.arguments import Number, local_path
from maxmap.check.contents import read_contents
from maxmap.check.findings import Findings, as_json, examine, inspect_all
from maxmap.check.page import draw
from maxmap.check.split import choose_val, write_split
from maxmap.check.text import describe
from maxmap.errors import UserError, printable


def add_check(command: argparse.ArgumentParser) -> None:
    """Fills the parser of `check`."""
    command.add_argument("folder", type=local_path, help="with train/CLASS/ and val/CLASS/, or with CLASS/ alone")
    command.add_argument("--splits", nargs="+", metavar="NAME", help="folders of the splits (default: train, val, ...)")
    command.add_argument(
        "--distance",
        type=Number(examine, "distance"),
        default=4,
        help="bits of 64 in which the perceptual hashes of copies differ at most (default: 4)",
    )
    command.add_argument(
        "--tiny",
        type=Number(examine, "tiny"),
        default=32,
        help="name images with a side under so many pixels (default: 32)",
    )
    command.add_argument("--json", type=storage.expand, dest="json_file", help="file for all that was found")
    command.add_argument("--html", type=storage.expand, dest="html_file", help="file for a page with thumbnails")
    command.add_argument(
        "--split",
        type=Number(choose_val, "share"),
        dest="share",
        metavar="SHARE",
        help="write train and val, with this share of each class in val, into the new folder --out",
    )
    command.add_argument("--seed", type=Number(choose_val, "seed"), default=0, help="of --split (default: 0)")
    command.add_argument("--out", type=local_path, help="of --split; its files are links to these, or copies")
    command.set_defaults(run=check_command)


def check_command(
    folder: Path,
    splits: list[str] | None,
    distance: int,
    tiny: int,
    json_file: str | None,
    html_file: str | None,
    share: float | None,
    seed: int,
    out: Path | None,
) -> int:
    """Prints, and writes if asked, what is odd about images; returns 1 if something hinders training."""
    if (share is None) != (out is None):
        raise UserError("--split=SHARE and --out=FOLDER belong together: give both, or none.")
    contents = read_contents(str(folder), splits or ())
    if share is not None and len(contents.splits) > 1:
        raise UserError(
            f"{folder} has the splits {', '.join(contents.splits)} already: to split one of them, give its folder."
        )
    if out is not None and out.resolve().is_relative_to(folder.resolve()):
        raise UserError(f"{out} lies in {folder}, whose folders are classes: give a folder outside.")
    findings = examine(contents, inspect_all(contents), distance=distance, tiny=tiny)
    print(describe(findings))
    if json_file is not None:
        storage.write_named(json_file, json.dumps(as_json(findings), indent=2, ensure_ascii=False) + "\n")
    if html_file is not None:
        storage.write_named(html_file, draw(findings))
    if share is not None and out is not None:
        _split(findings, share, seed, out)
    return 1 if findings.problems else 0


def _split(findings: Findings, share: float, seed: int, out: Path) -> None:
    """Writes the images that can be decoded as train and val."""
    good = np.flatnonzero(findings.readable())
    if not len(good):
        raise UserError(f"{findings.contents.folder} has no image that can be decoded, so there is nothing to split.")
    groups = [np.searchsorted(good, group) for group in findings.copies]
    val = choose_val(findings.contents.label[good], groups, share=share, seed=seed)
    write_split(findings.contents, good, val, out)
    left_out = f"; {len(findings.broken):,} broken left out" if len(findings.broken) else ""
    print(f"{printable(out)}: train {(~val).sum():,} images, val {val.sum():,}{left_out}")
