"""Speed beside timm on the same machine: `make bench`.

Every contender runs in a process of its own; they take turns, round after round, so that a machine that other work
slows down slows all of them. The table gives medians and the ratio to timm in eager mode, round by round, with its
smallest and largest value. Beside them stand what this machine could do at best: the model's floating-point operations
over the rate of a large matrix product, and the bytes that the compiled program moves, as XLA counts them, over the
rate of a large copy, both measured first.

    make bench                                                    the models below, forward pass and training step
    make bench ARGS="maxvit_tiny_tf_224 --contenders maxmap timm 'timm compiled' --batch best"

Images have the model's own size. On a CPU it computes in float32, elsewhere in bfloat16. The training step is forward,
backward and AdamW. The plain models beside `map_*` and `ga_*`, which timm lacks, are those of their backbones. Batch 1
is for the latency of the forward pass; contenders that do not fit in memory together are measured one after another,
which the note says; "best" doubles the batch until that gains nothing more or memory ends, with
every contender alone on the machine. "first s" is from the start of a process to its first result, with nothing
compiled before; on a CPU the contenders start side by side. The first model's training step starts alone, and the time
of a second process is beside it, which finds the programs of the first one, as the commands do (`maxmap.runtime`).

flaim (`pip install --no-deps flaim`) has some of the models; it was written for an older JAX and is given the one name
that it misses. By default it is left out on a CPU, and so is timm with torch.compile: for the forward pass of MaxViT-T
alone that compiles more than a hundred C++ files, some minutes on two cores; max-autotune tries out variants of them
besides. "onnxruntime" and "openvino" (`pip install openvino`) run what `maxmap export FILE.onnx` writes: forward passes
in float32 on a CPU. All can be asked for.
"""

import argparse
import contextlib
import csv
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.contenders import PLAIN

MODELS = (
    *("maxvit_tiny_tf_224", "map_maxvit_tiny_tf_224", "maxvit_base_tf_224", "coatnet_1_rw_224", "caformer_s18"),
    *("convnext_tiny", "map_convnext_tiny", "map_resnet50", "ga_convnext_tiny_688"),
)
CONTENDERS = (
    *("maxmap", "maxmap plain", "maxmap pallas", "timm", "timm compiled", "timm max-autotune", "flaim"),
    *("onnxruntime", "openvino"),
)
# What is compared where nothing else is asked for: contenders and batches.
DEFAULTS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "cpu": (("maxmap", "timm"), ("1", "8")),
    "gpu": (CONTENDERS[:-2], ("1", "256")),
}
LARGEST_BATCH = 4096  # at which the search for the best one ends
GAIN = 1.03  # in images per second, below which it ends too
COLUMNS = (
    *(
        "model",
        "task",
        "batch",
        "search",
        "dtype",
        "contender",
        "milliseconds",
        "images_per_second",
        "ratio",
        "ratio_low",
    ),
    *("ratio_high", "first_seconds", "first_again_seconds", "peak_gigabytes", "gflop", "flop_limit_ms", "gigabytes"),
    *("byte_limit_ms", "version", "device", "note"),
)
BUSY = 0.4  # load per core before the first measurement above which the table warns


class Contender:
    """A process of `benchmarks.contenders`, built and ready to compute."""

    def __init__(self, job: dict[str, Any], log: Path, cache: str):
        environment = {
            **os.environ,
            "JAX_COMPILATION_CACHE_DIR": cache,
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",  # as `maxmap.runtime` sets it
            "XLA_PYTHON_CLIENT_PREALLOCATE": "false",  # contenders share the memory of the device
            "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1",  # the first result is timed as for a new program, like JAX's
            "TF_CPP_MIN_LOG_LEVEL": "3",
        }
        self.error = log
        with log.open("w") as stream:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.contenders", json.dumps(job)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stream,
                text=True,
                env=environment,
            )
        self.facts = self._read()

    def _read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("{"):  # compilers print to the same stream
                return json.loads(line)
        if self.process.wait() < 0:
            raise RuntimeError(f"killed by signal {-self.process.returncode}, which is 9 where memory ends")
        lines = [line for line in self.error.read_text(errors="replace").splitlines() if line.strip()]
        raise RuntimeError(lines[-1][:200] if lines else "ended without a word")

    def seconds(self, times: int) -> float:
        """Computes so many times; returns the seconds that it took."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{times}\n")
        self.process.stdin.flush()
        return self._read()["seconds"]

    def close(self) -> int:
        """Ends the process; returns the peak of its memory in bytes."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        peak = self._read()["peak"]
        self.process.wait()
        return peak


def compare(
    job: dict[str, Any],
    contenders: list[str],
    rounds: int,
    seconds: float,
    out: Path,
    *,
    again: bool = False,
    together: bool = False,
) -> list[dict[str, Any]]:
    """Measures one task of one model; returns a row for every contender, with a note for one that fails.

    Args:
      job: what contenders are given, but for their name.
      contenders: their names.
      rounds: turns of each.
      seconds: of a turn, about.
      out: folder for their errors.
      again: also time a second process of maxmap's, which finds the programs of the first.
      together: start all contenders at once, unless `again`: on a CPU, where none of them chooses by measuring.
    """
    running: dict[str, Contender] = {}
    rows = {name: {**job, "contender": name} for name in contenders}
    caches = {name: tempfile.TemporaryDirectory() for name in contenders}
    times: dict[str, int] = {}
    rounds_of: dict[str, list[float]] = {name: [] for name in contenders}

    def start(name: str) -> Contender:
        return Contender({**job, "contender": name}, out / f"{name}.log", caches[name].name)

    @contextlib.contextmanager
    def noted(name: str) -> Iterator[None]:
        try:
            yield
        except (RuntimeError, OSError) as error:
            rows[name]["note"] = f"does not run: {error}"
            running.pop(name, None)

    with ThreadPoolExecutor(len(contenders) if together and not again else 1) as pool:
        started = {name: pool.submit(start, name) for name in contenders}
    for name in contenders:
        with noted(name):
            running[name] = started[name].result()
            times[name] = max(1, round(seconds / max(running[name].seconds(1), 1e-4)))
    for _ in range(rounds):
        for name, each in list(running.items()):
            with noted(name):
                rounds_of[name].append(each.seconds(times[name]) / times[name])
    for name, each in list(running.items()):
        with noted(name):
            median = statistics.median(rounds_of[name])
            rows[name] |= {
                "milliseconds": 1000 * median,
                "images_per_second": job["batch"] / median,
                "rounds": [job["batch"] / seconds for seconds in rounds_of[name]],
                "first_seconds": each.facts.pop("first"),
                "peak_gigabytes": 1e-9 * each.close(),
                **each.facts,
            }
            if again and name.startswith("maxmap"):
                second = start(name)
                rows[name]["first_again_seconds"] = second.facts["first"]
                second.close()
    for cache in caches.values():
        cache.cleanup()
    return list(rows.values())


def find_best(
    job: dict[str, Any], contenders: list[str], rounds: int, seconds: float, out: Path
) -> list[dict[str, Any]]:
    """Measures one task of one model at the batch that is best for each contender; returns a row for every one."""
    rows = []
    for name in contenders:
        batch, (best,) = 1, compare({**job, "batch": 1}, [name], rounds, seconds, out)
        while "rounds" in best and batch < LARGEST_BATCH:
            batch *= 2
            (row,) = compare({**job, "batch": batch}, [name], rounds, seconds, out)
            gain = row.get("images_per_second", 0) / best["images_per_second"]
            best = row if gain > 1 else best
            if not gain or (gain < GAIN and batch > 8):
                break
        rows.append(best)
    return rows


def relate(rows: list[dict[str, Any]], limits: dict[str, float], gflops: Mapping[str, float]) -> None:
    """Adds to the rows of one task of one model the ratios to timm and the machine's limits.

    Args:
      rows: of its contenders.
      limits: of the machine: 'tflops' and 'gigabytes_per_second'.
      gflops: multiply-adds of an image in the forward pass, in billions, by model.
    """
    of = {row["contender"]: row for row in rows}
    model = rows[0]["model"]
    plain = PLAIN.get(model)
    for name, row in of.items():
        if "rounds" not in row:
            continue
        if "rounds" in of.get("timm", {}):
            ratios = [ours / theirs for ours, theirs in zip(row["rounds"], of["timm"]["rounds"], strict=True)]
            row |= {"ratio": statistics.median(ratios), "ratio_low": min(ratios), "ratio_high": max(ratios)}
        if plain and name.startswith(("timm", "flaim")):
            row["note"] = f"{plain}, without this head"
            continue
        if model in gflops:  # the backward pass has two products for each of the forward pass
            row["gflop"] = 2 * gflops[model] * row["batch"] * (1 if row["task"] == "forward" else 3)
            row["flop_limit_ms"] = row["gflop"] / limits["tflops"]
        # The bytes of our program; one that moves fewer has a lower limit.
        counted = row if "gigabytes" in row else next((other for other in rows if "gigabytes" in other), None)
        if counted:
            row["gigabytes"] = row["batch"] / counted["batch"] * counted["gigabytes"]
            row["byte_limit_ms"] = 1000 * row["gigabytes"] / limits["gigabytes_per_second"]


def show(rows: list[dict[str, Any]]) -> str:
    """Returns rows as a Markdown table."""
    columns = {
        "model": "{model}",
        "task": "{task}",
        "batch": "{batch} {search}",
        "contender": "{contender}",
        "ms": "{milliseconds:.1f}",
        "images/s": "{images_per_second:.1f}",
        "x timm (low to high)": "{ratio:.2f} ({ratio_low:.2f} to {ratio_high:.2f})",
        "first s": "{first_seconds:.0f}",
        "again": "{first_again_seconds:.0f}",
        "peak GB": "{peak_gigabytes:.1f}",
        "limit ms: FLOPs": "{flop_limit_ms:.1f}",
        "bytes": "{byte_limit_ms:.1f}",
        "note": "{note}",
    }

    def cell(template: str, row: dict[str, Any]) -> str:
        try:
            return template.format(**row)
        except KeyError:
            return ""

    lines = [tuple(columns), ("---",) * len(columns)]
    lines += [tuple(cell(template, row) for template in columns.values()) for row in rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Draws images per second as bars, one group for every model and task."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    def group(row: dict[str, Any]) -> tuple[str, str, str]:
        return row["model"], row["task"], row["search"] or f"{row['batch']}"

    groups = list(dict.fromkeys(map(group, rows)))
    names = list(dict.fromkeys(row["contender"] for row in rows))
    figure, axes = plt.subplots(figsize=(9, 0.3 * (len(names) + 1) * len(groups) + 1))
    for i, name in enumerate(names):
        own = {group(row): row.get("ratio", 0.0) for row in rows if row["contender"] == name}
        speeds = [own.get(each, 0.0) for each in groups]
        heights = [g * (len(names) + 1) + i for g in range(len(groups))]
        axes.barh(heights, speeds, label=name)
    axes.set_yticks(
        [g * (len(names) + 1) + (len(names) - 1) / 2 for g in range(len(groups))],
        [f"{model}\n{task}, batch {batch}" for model, task, batch in groups],
    )
    axes.axvline(1, color="black", linewidth=0.8)
    axes.invert_yaxis()
    axes.set_xlabel("speed relative to timm, eager, channels last")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _batch(text: str) -> str:
    if text != "best" and int(text) < 1:
        raise ValueError
    return text


def main() -> int:
    """Runs what the command line asks for; prints and writes the table."""
    parser = argparse.ArgumentParser(
        prog="make bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="*", default=MODELS, help="(default: the nine of docs/performance.md)")
    parser.add_argument("--tasks", nargs="+", choices=("forward", "train"), default=("forward", "train"))
    parser.add_argument(
        "--contenders", nargs="+", choices=CONTENDERS, help="(default: maxmap and timm on a CPU, all on a GPU)"
    )
    parser.add_argument(
        "--batch",
        nargs="+",
        type=_batch,
        help="images at a time, or 'best' (default: 1 and 8 on a CPU, 1 and 256 on a GPU)",
    )
    parser.add_argument(
        "--alone", action="store_true", help="no turns: for batches that do not fit beside each other on a device"
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="(default: float32 on a CPU, else bfloat16)")
    parser.add_argument("--rounds", type=int, default=3, help="turns of every contender (default: 3)")
    parser.add_argument("--seconds", type=float, default=1.0, help="of a turn, about (default: 1)")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/bench"), help="folder of the table (default: runs/bench)"
    )
    arguments = parser.parse_args()

    arguments.out.mkdir(parents=True, exist_ok=True)
    load = os.getloadavg()[0] / len(os.sched_getaffinity(0))
    busy = f"this machine was busy: {load:.1f} processes per core before the first measurement" if load > BUSY else ""
    if busy:
        print(f"warning: {busy}", flush=True)
    kind = "gpu" if Path("/dev/nvidia0").exists() else "cpu"
    dtype = arguments.dtype or {"cpu": "float32", "gpu": "bfloat16"}[kind]
    contenders = arguments.contenders or DEFAULTS[kind][0]
    batches = arguments.batch or DEFAULTS[kind][1]
    with tempfile.TemporaryDirectory() as cache:
        limits = Contender({"contender": "limits", "dtype": dtype}, arguments.out / "contender.log", cache).facts
    print(f"limits: {limits['tflops']:.2f} TFLOP/s, {limits['gigabytes_per_second']:.1f} GB/s", flush=True)

    from maxmap.model_commands import PARITY  # takes seconds to import

    with PARITY.open(encoding="utf-8") as file:
        gflops = {row["name"]: float(row["gflops"]) for row in csv.DictReader(file)}
    rows = []
    work = itertools.product(arguments.models, arguments.tasks, batches)
    for model, task, batch in work:
        if task == "train" and batch == "1" and len(batches) > 1:
            continue
        job = {"model": model, "task": task, "dtype": dtype}
        how = (arguments.rounds, arguments.seconds, arguments.out)
        alone = arguments.alone
        if batch == "best":
            new, alone = find_best(job, contenders, *how), False
        elif not alone:
            again = task == "train" and model == arguments.models[0]
            new = compare({**job, "batch": int(batch)}, contenders, *how, again=again, together=kind == "cpu")
            alone = any("killed" in row.get("note", "") for row in new)  # what fits alone may not fit beside another
        if alone:
            new = [row for name in contenders for row in compare({**job, "batch": int(batch)}, [name], *how)]
            for row in new:
                row.setdefault("note", "alone, without turns")
        for row in new:
            row["search"] = batch if batch == "best" else ""
        relate(new, limits, gflops)
        rows += new
        with (arguments.out / "speed.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS, restval="", extrasaction="ignore", lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
        print(show(new), flush=True)
    head = f"{time.strftime('%Y-%m-%d')}, {dtype}, {limits['tflops']:.2f} TFLOP/s, "
    head += f"{limits['gigabytes_per_second']:.1f} GB/s. {busy}\n\n"
    (arguments.out / "speed.md").write_text(head + show(rows), encoding="utf-8")
    draw(rows, arguments.out / "speed.png")
    print(f"{head}{show(rows)}\nwrote {arguments.out}/speed.csv, speed.md, speed.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
