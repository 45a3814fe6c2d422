"""The commands that tell of models: list and benchmark.

`list` imports what it prints from as it needs it, because it should print at once.
"""

import argparse
import csv
import fnmatch
import json
from importlib import resources
from typing import Any

from maxmap import storage
from maxmap.arguments import Number
from maxmap.errors import UserError, nearest
from maxmap.layers.primitives import pair
from maxmap.models import FAMILIES, HEADS, MODELS, PIXEL_HEADS, create_model

PARITY = resources.files("maxmap") / "parity.csv"  # what `make parity` measured


def add_list(command: argparse.ArgumentParser) -> None:
    """Fills the parser of `list`."""
    command.add_argument("pattern", nargs="?", default="*", help="shell pattern, for example 'map_*'")
    command.add_argument("--family", choices=FAMILIES, help="only this family of backbones")
    command.add_argument(
        "--head", choices=HEADS | PIXEL_HEADS, help="only this head; one that no model has by name, on every backbone"
    )
    command.add_argument(
        "--pretrained", action="store_true", help="published checkpoints, which `convert` takes by name"
    )
    command.set_defaults(run=list_command)


def add_benchmark(command: argparse.ArgumentParser) -> None:
    """Fills the parser of `benchmark`."""
    from maxmap.benchmark import DTYPES, benchmark

    command.add_argument("model", help="name from 'list'")
    command.add_argument("--head", choices=HEADS | PIXEL_HEADS, help="in place of the model's own")
    command.add_argument("--batch-size", type=Number(benchmark, "batch_size"), default=16, help="images (default: 16)")
    command.add_argument("--image-size", type=Number(create_model, "image_size"), help="pixels (default: the model's)")
    command.add_argument("--dtype", choices=DTYPES, help="(default: float32 on a CPU, else bfloat16)")
    command.add_argument("--train", action="store_true", help="a training step with AdamW, not a forward pass")
    command.add_argument(
        "--seconds", type=Number(benchmark, "seconds"), default=10, help="to measure for, at least (default: 10)"
    )
    command.add_argument("--json", type=storage.expand, dest="json_file", help="file for the result")
    command.set_defaults(run=benchmark_command)


def list_command(pattern: str, family: str | None, head: str | None, pretrained: bool) -> None:
    """Prints models, or published checkpoints, that match."""
    known = {name: name for name in MODELS}
    if pretrained:
        from maxmap.convert.hub import published

        known = {name: row["model"] for name, row in published().items()}
    family_of = {backbone: name for name, variants in FAMILIES.items() for backbone in variants}
    kinds = {name: (family_of[model.backbone], model.head["name"]) for name, model in MODELS.items()}
    if head in PIXEL_HEADS and not pretrained:
        known = {name: name for name in family_of}
        kinds |= {name: (family_of[name], head) for name in known}
    # A checkpoint is found by its own name and by that of its model.
    names = [n for n, model in known.items() if any(fnmatch.fnmatch(text, pattern) for text in (n, model))]
    what = "published checkpoint" if pretrained else "model"
    if not names:
        raise UserError(f"no {what} matches '{pattern}'; the nearest names are {nearest(pattern, known)}.")
    names = [n for n in names if family in (None, kinds[known[n]][0]) and head in (None, kinds[known[n]][1])]
    if not names:
        raise UserError(f"no {what} that matches '{pattern}' has family {family or '*'} and head {head or '*'}.")
    if head in PIXEL_HEADS and not pretrained:
        names = [name for name in names if _fits(name, head)]
        if not names:
            raise UserError(f"the head {head} fits no backbone that matches '{pattern}'.")
    with PARITY.open(encoding="utf-8") as file:
        measured = {row["name"]: row for row in csv.DictReader(file)}
    if pretrained:
        _print_checkpoints(names, measured)
    else:
        _print_models(sorted(names), kinds, measured, head if head in PIXEL_HEADS else None)


def _fits(backbone: str, head: str) -> bool:
    """Whether a backbone has the maps that a head reads."""
    try:
        create_model(backbone, head=head)
    except UserError:
        return False
    return True


def _print_models(
    names: list[str], kinds: dict[str, tuple[str, str]], measured: dict[str, dict[str, str]], head: str | None
) -> None:
    """Prints models with their costs as `make parity` wrote them down, since tracing takes a second each.

    With another head than their own they are traced.
    """
    longest, family = max(map(len, names)), max(map(len, FAMILIES))
    print(
        f"{'model':{longest}}  {'family':{family}}  {'head':8}  {'parameters':>13}  {'GFLOPs':>7}  {'image':>7}  parity"
    )
    for name in names:
        model, row = create_model(name, head=head), {} if head else measured.get(name, {})
        height, width = pair(model.backbone.image_size)
        if row:
            parameters, billions = int(row["parameters"]), float(row["gflops"])
        else:
            from maxmap.cost import cost

            parameters, operations = cost(model)
            billions = operations / 1e9
        print(
            f"{name:{longest}}  {kinds[name][0]:{family}}  {kinds[name][1]:8}  {parameters:13,}  {billions:7.2f}  "
            f"{f'{height}x{width}':>7}  {row['against'] if row.get('ok') == 'yes' else '-'}",
            flush=True,
        )


def _print_checkpoints(names: list[str], measured: dict[str, dict[str, str]]) -> None:
    """Prints published checkpoints, the best first; parameters are those of the model with 1,000 classes."""
    from maxmap.convert.hub import published

    rows = {name: published()[name] for name in names}
    longest, longest_model = (max(map(len, texts)) for texts in (rows, [row["model"] for row in rows.values()]))
    print(
        f"{'checkpoint':{longest}}  {'model':{longest_model}}  {'top-1 %':>7}  {'size':>4}  {'classes':>7}  "
        f"{'parameters':>11}  {'licence':15}  source"
    )
    for name, row in sorted(rows.items(), key=lambda item: -(item[1]["top1"] or 0)):
        model, top1 = row["model"], row["top1"]
        parameters = f"{int(measured[model]['parameters']):,}" if model in measured else "-"
        print(
            f"{name:{longest}}  {model:{longest_model}}  {'-' if top1 is None else f'{top1:.2f}':>7}  "
            f"{row['preprocessing']['image_size']:4}  {row['classes'] or '-':>7}  {parameters:>11}  "
            f"{row['licence'] or '-':15}  {row['url'] or f'https://huggingface.co/{name}'}"
        )


def benchmark_command(json_file: str | None, **options: Any) -> None:
    """Prints, and writes if asked, how fast a model is here."""
    from maxmap.benchmark import benchmark

    result = benchmark(**options)
    print(
        f"{result['model']}, {result['task']}, {result['batch_size']} images of {result['image_size']} px, "
        f"{result['dtype']}, on {result['devices']} x {result['device']}"
    )
    print(
        f"{result['images_per_second']:.1f} images/s, {result['milliseconds']:.1f} ms a batch (median of "
        f"{result['batches']}; {result['milliseconds_low']:.1f} to {result['milliseconds_high']:.1f})"
    )
    memory = "" if result["gigabytes"] is None else f"{result['gigabytes']:.2f} GB for arguments and temporaries, "
    print(
        f"{result['parameters']:,} parameters, {result['gflops']:.2f} GFLOPs an image forward, {memory}"
        f"compiled in {result['compile_seconds']:.1f} s"
    )
    if json_file:
        storage.write_named(json_file, json.dumps(result, indent=2) + "\n")
