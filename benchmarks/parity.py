"""Compares every model with its reference implementation, in float64 and with every parameter random.

    make parity                                       every model that fits into 20 GB, one after another
    make parity ARGS="--resume 'maxvit_*' resnet50"   the rows that are still missing, of these models

The reference is timm if timm has the name, else the golden files hold the results of the authors' code. The rule of
`tests/reference.py` draws every leaf, also norm scales and running statistics. The images are noise of the model's own
size. A row holds the largest difference of a logit, relative to the standard deviation of its branch's logits, and of a
value in a feature map, relative to the largest value in that map. Each model runs in a process of its own, which frees
its memory at its end.

With random weights some deep networks are chaotic: they amplify a rounding of their input ten million times. If a
difference is above 1e-9, the model runs again on images whose values are all moved to a neighbour in float64. The
tolerance is then ten times the change of the result, since no two orders of summation agree better. A mistake in a port
is larger than a rounding, and the network amplifies it as much.

The table is written after every row; `python -m maxmap list` reads it. Rows that do not run again stay. The exit status
is 1 if one of the rows asked for is above its tolerance.
"""

import argparse
import csv
import os
import re
import resource
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from maxmap.convert.torch import from_torch
from maxmap.convert.verify import keeping_float64
from maxmap.convert.wrappers import DERIVED
from maxmap.cost import cost
from maxmap.heads.map import MAPHead
from maxmap.models import Classifier, create_model, list_models
from tests.reference import fill, fill_state_dict, import_timm, read_manifest

ROOT = Path(__file__).resolve().parent.parent
COLUMNS = (
    "name",
    "parameters",
    "gflops",
    "against",
    "logits",
    "features",
    "tolerance",
    "ok",
    "seconds",
    "gigabytes",
    "note",
)
TOLERANCE = 1e-9
ROUNDINGS = 10  # tolerance of a chaotic model, in changes by a rounding of the input
FASTERVIT_TOLERANCE = 1e-7  # the reference computes its table of offsets in float32, which changes results by 2e-8

# Models without a reference, other than for a missing golden file, and why.
WITHOUT_REFERENCE = {
    "ga_resnet50": "no released code",
    "ga_vit_small": "no released code",
    **dict.fromkeys(list_models("fcaformer_*"), "from the paper, no reference"),
    "map_maxvit_mini_32": "maxmap's own",
    "mobilenet_v1_025_leaky": "compared with its released weights, docs/conversion.md",
    **dict.fromkeys(list_models("mobilenet_v1_*_tf"), "compared with its released weights, docs/conversion.md"),
    "maxvit_mini_32": "maxmap's own",
    "resnet50_se_deep": "published with the MAP head only, see map_resnet50",
}


@dataclass(frozen=True)
class Reference:
    """Weights, images and results of the reference.

    Attributes:
      source: "timm" or "goldens".
      weights: the state dict, float64.
      images: `[B, H, W, 3]`.
      logits: `[G, B, K]`.
      distill: `[G, B, K]` of a head with self-distillation, else None.
      features: NHWC maps of the stages, or their means over height and width `[B, C]`; the stem's may come first.
    """

    source: str
    weights: dict[str, np.ndarray]
    images: np.ndarray
    logits: np.ndarray
    distill: np.ndarray | None
    features: list[np.ndarray]


def noise(batch: int, height: int, width: int) -> np.ndarray:
    """Returns images `[batch, height, width, 3]`; for `(2, 224, 224)` they are those of the golden files."""
    images = np.random.RandomState(0).standard_normal((batch, 3, height, width)).astype(np.float32)
    return images.transpose(0, 2, 3, 1).astype(np.float64)


def from_timm(model: Classifier, name: str, images: np.ndarray) -> Reference | None:
    """Runs timm's model of this name; returns None if timm does not have it.

    The names of MetaFormers with 384 pixels end in "_384" here, but not in timm.
    """
    timm = import_timm()
    import torch

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    known = [candidate for candidate in (name, name.removesuffix("_384")) if timm.is_model(candidate)]
    if not known:
        return None
    reference = timm.create_model(known[0], num_classes=1000)  # some of its tags are for 21k or 12k classes
    weights = {
        key: fill(key, value.shape).astype(np.float64)
        for key, value in reference.state_dict().items()
        if not DERIVED.fullmatch(key)
    }
    tensors = {key: torch.from_numpy(value) for key, value in weights.items()}
    reference.load_state_dict(tensors, strict=False, assign=True)
    reference.double().eval()
    for module in reference.modules():
        if hasattr(module, "rel_coords_log"):  # timm computes these logarithms of integers in float32
            log = module.rel_coords_log
            module.rel_coords_log = log.sign() * log.abs().expm1().round().log1p()
    options: dict[str, Any] = {}
    if name.startswith("mobilevit_"):  # the convolution behind the stages is not a part of the last one
        options["exclude_final_conv"] = True
    if name.startswith("vit_"):  # one map after every block there, one after every group of blocks here
        options["indices"] = [int(i) - 1 for i in np.cumsum(model.backbone.depths)]
    with torch.inference_mode(), keeping_float64():
        x = torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))
        last, maps = reference.forward_intermediates(x, norm=False, **options)
        logits = reference.forward_head(last).numpy()[None]
    return Reference("timm", weights, images, logits, None, [m.numpy().transpose(0, 2, 3, 1) for m in maps])


def from_goldens(folder: Path, name: str) -> Reference | None:
    """Reads the golden files of a model; returns None if there are none."""
    if not (folder / f"{name}.npz").is_file():
        return None
    manifest = read_manifest(folder, name)
    filled = fill_state_dict(manifest["state_dict"])
    weights = {key: value.astype(np.float64) for key, value in filled.items()}
    with np.load(folder / f"{name}.npz") as file:
        arrays = {key.removesuffix("_f64"): file[key] for key in file if key.endswith("_f64")}
    logits = arrays["head_logits"] if "head_logits" in arrays else arrays["logits"][None]
    features = [arrays[key] for key in sorted(arrays) if key.startswith("feature_")]
    if not features:
        raise ValueError(f"{folder / name}.npz holds no feature maps: give --goldens the folder of the whole files")
    features = features[:5]  # the sixth of GA's models belongs to the head
    return Reference("goldens", weights, noise(2, 224, 224), logits, arrays.get("distill_logits"), features)


Run = Callable[[Any, Any], tuple[list[jax.Array], dict[str, jax.Array]]]


def compiled(model: Classifier) -> Run:
    """Compiles a function from variables and images to features and outputs, with 'distill' if the head has it."""

    def both(model: Classifier, images: jax.Array) -> tuple[list[jax.Array], dict[str, jax.Array]]:
        features = model.backbone(images)
        return features, model.head(features)

    @jax.jit
    def run(variables: Any, images: jax.Array) -> tuple[list[jax.Array], dict[str, jax.Array]]:
        features, outputs = model.apply(variables, images, method=both)
        if isinstance(model.head, MAPHead) and model.head.self_distill:
            light = model.clone(head=model.head.clone(light=True))  # the same parameters; predicts with the others
            other = light.apply(variables, features, method=lambda model, features: model.head(features))
            outputs["distill"] = other["logits"]
        return features, outputs

    return run


def shown(model: Classifier, features: list[jax.Array]) -> list[jax.Array]:
    """Removes the features that no reference returns: those inside of the third stage or behind the last."""
    taps = getattr(model.backbone, "taps", 0)
    features = [*features[:3], *features[3 + taps :]]
    behind = getattr(model.backbone, "class_token", False) or getattr(model.backbone, "head_width", 0)
    return features[:-1] if behind else features


def largest(pairs: Iterable[tuple[jax.Array, np.ndarray]], scale: Callable[[np.ndarray], float]) -> float:
    """Returns the largest difference in pairs of arrays, ours and theirs, relative to `scale` of theirs."""
    errors = []
    for ours, theirs in pairs:
        if ours.shape != theirs.shape:
            raise ValueError(f"shapes differ: {ours.shape} here, {theirs.shape} in the reference")
        errors.append(np.abs(np.asarray(ours) - theirs).max() / scale(theirs))
    return float(np.max(errors))  # NaN if one of them is


def differences(model: Classifier, run: Run, variables: Any, reference: Reference) -> tuple[float, float]:
    """Returns the largest differences of logits and of features."""
    features, outputs = run(variables, reference.images)
    branches = list(zip(outputs["logits"], reference.logits, strict=True))
    if reference.distill is not None:
        branches += zip(outputs["distill"], reference.distill, strict=True)
    maps = shown(model, features)[-len(reference.features) :]  # timm's often begin after the stem's
    pairs = zip(maps, reference.features, strict=True)
    pairs = [(ours if theirs.ndim == 4 else ours.mean((1, 2)), theirs) for ours, theirs in pairs]
    return largest(branches, np.std), largest(pairs, lambda theirs: np.abs(theirs).max())


def rounding(run: Run, variables: Any, images: np.ndarray, times: int = 3) -> float:
    """Returns the largest change of the results, measured as in `differences`, by a rounding of all images."""
    features, outputs = run(variables, images)
    changes = []
    for seed in range(times):
        upwards = np.random.RandomState(seed).rand(*images.shape) < 0.5
        nudged = np.nextafter(images, np.where(upwards, np.inf, -np.inf))
        other_features, other_outputs = run(variables, nudged)
        changes.append(largest(zip(other_outputs["logits"], outputs["logits"], strict=True), np.std))
        changes.append(largest(zip(other_features, features, strict=True), lambda map: np.abs(map).max()))
    return max(changes)


def gigabytes(parameters: int, batch: int, features: list[Any]) -> float:
    """Estimates the memory of a comparison in float64.

    The weights exist twice. The largest buffers are a multiple of the largest feature map, since PyTorch unfolds the
    patches of a convolution in float64. The programs themselves need the rest.
    """
    widest = max(feature.size for feature in features)
    return 1.0 + 8e-9 * (2.5 * parameters + 40 * batch * widest)


def compare(name: str, goldens: Path, limit: float) -> dict[str, Any]:
    """Returns a model's row of the table."""
    start = time.perf_counter()
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_enable_x64", True)
    model = create_model(name)
    size = model.backbone.image_size
    height, width = (size, size) if isinstance(size, int) else size
    batch = 2 if height <= 256 else 1

    def trace(model: Classifier, images: jax.Array) -> list[jax.Array]:
        features = model.backbone(images)
        model.head(features)
        return features

    images = jax.ShapeDtypeStruct((1, height, width, 3), jnp.float32)
    features, _ = jax.eval_shape(lambda images: model.init_with_output(jax.random.key(0), images, method=trace), images)
    parameters, operations = cost(model)
    row: dict[str, Any] = {"name": name, "parameters": parameters, "gflops": f"{operations / 1e9:.2f}"}
    estimate = gigabytes(parameters, batch, features)
    if name in WITHOUT_REFERENCE:
        return row | {"note": WITHOUT_REFERENCE[name]}
    if estimate > limit:
        return row | {"note": f"too large: about {estimate:.0f} GB of memory, the limit is {limit:g}"}
    reference = from_timm(model, name, noise(batch, height, width)) or from_goldens(goldens, name)
    if reference is None:
        return row | {"note": "not in timm, and no golden file"}
    if reference.source == "timm" and re.match("(ca|conv)former", name):
        # timm's copy of the head has another epsilon than the authors' code and our model (docs/references.md).
        model = create_model(name, head={"hidden_epsilon": 1e-6})
        row["note"] = "with timm's hidden_epsilon, 1e-6"
    variables = from_torch(reference.weights, model)
    run = compiled(model)
    logits, maps = differences(model, run, variables, reference)
    tolerance = FASTERVIT_TOLERANCE if "faster_vit" in name else TOLERANCE
    if max(logits, maps) > tolerance:
        change = rounding(run, variables, reference.images)
        tolerance = max(tolerance, ROUNDINGS * change)
        row["note"] = f"chaotic: a rounding of the input changes it by {change:.0e}"
    return row | {
        "against": reference.source,
        "logits": f"{logits:.1e}",
        "features": f"{maps:.1e}",
        "tolerance": f"{tolerance:.0e}",
        "ok": "yes" if logits <= tolerance and maps <= tolerance else "no",
        "seconds": round(time.perf_counter() - start),
        "gigabytes": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, 1),
    }


def compare_apart(name: str, goldens: Path, limit: float) -> dict[str, Any]:
    """Runs `compare` in a process of its own; an error becomes a row too."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        try:
            return pool.submit(compare, name, goldens, limit).result()
        except BrokenProcessPool:
            return {"name": name, "ok": "no", "note": "the process was killed, perhaps for want of memory"}
        except Exception as error:
            return {"name": name, "ok": "no", "note": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"}


def read(path: Path) -> dict[str, dict[str, Any]]:
    """Returns the rows of a table by name; none if the file does not exist."""
    if not path.is_file():
        return {}
    with path.open(newline="", encoding="utf-8") as file:
        return {row["name"]: row for row in csv.DictReader(file)}


def write(rows: dict[str, dict[str, Any]], table: Path, markdown: Path) -> None:
    """Writes the rows of all known models, in alphabetical order."""
    ordered = [rows[name] for name in list_models() if name in rows]
    with table.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(ordered)
    lines = [COLUMNS, ("---",) * len(COLUMNS), *([str(row.get(c) or "") for c in COLUMNS] for row in ordered)]
    text = "".join(f"| {' | '.join(cells)} |\n" for cells in lines)
    about = "What `make parity` measured; `benchmarks/parity.py` says how and explains the columns."
    markdown.write_text(f"# Parity\n\n{about}\n\n{text}", "utf-8")


def main() -> int:
    """Runs the rows that the command line asks for."""
    parser = argparse.ArgumentParser(
        prog="make parity", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("patterns", nargs="*", default=["*"], help="names or shell patterns (default: all models)")
    parser.add_argument("--goldens", type=Path, default=ROOT / "tests" / "goldens", help="folder of golden files")
    parser.add_argument("--out", type=Path, default=ROOT / "maxmap" / "parity.csv", help="the table")
    parser.add_argument("--markdown", type=Path, default=ROOT / "docs" / "parity.md", help="the same to read")
    parser.add_argument("--limit-gb", type=float, default=20, help="largest estimated memory of a row (default: 20)")
    parser.add_argument("--resume", action="store_true", help="keep the rows within their tolerance that the table has")
    arguments = parser.parse_args()

    names = sorted({name for pattern in arguments.patterns for name in list_models(pattern)})
    if not names:
        parser.error(f"no model matches {' '.join(arguments.patterns)}")
    rows = read(arguments.out)
    print(
        f"{'model':28} {'parameters':>13}  {'against':8} {'logits':>8} {'features':>8}  {'limit':6} {'s':>5} {'GB':>5}"
    )
    for name in names:
        if not (arguments.resume and rows.get(name, {}).get("ok") == "yes"):
            rows[name] = compare_apart(name, arguments.goldens, arguments.limit_gb)
            write(rows, arguments.out, arguments.markdown)
        cell = {column: "" for column in COLUMNS} | rows[name]
        print(
            f"{name:28} {cell['parameters']:>13}  {cell['against']:8} {cell['logits']:>8} {cell['features']:>8}  "
            f"{cell['tolerance']:6} {cell['seconds']:>5} {cell['gigabytes']:>5}  {cell['ok']} {cell['note']}".rstrip(),
            flush=True,
        )
    above = [name for name in names if rows[name].get("ok") == "no"]
    if above:
        print(f"above the tolerance or failed: {', '.join(above)}")
    return 1 if above else 0


if __name__ == "__main__":
    sys.exit(main())
