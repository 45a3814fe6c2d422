"""Speed beside timm on the same machine: `make bench`.

Every contender runs in a process of its own; they take turns, round after round, so that a machine that other work
slows down slows all of them. The table gives medians and the ratio to timm in eager mode, round by round, with its
smallest and largest value. Beside them stand what this machine could do at best: the model's floating-point operations
over the rate of a large matrix product, and the bytes that the compiled program moves, as XLA counts them, over the
rate of a large copy, both measured first.

    make bench                                                    the models below, forward pass and training step
    make bench ARGS="maxvit_tiny_tf_224 --contenders maxmap timm 'timm compiled' --batch 256"

Images have the model's own size. On a CPU it computes in float32, elsewhere in bfloat16. The training step is forward,
backward and AdamW. The plain models beside `map_*` and `ga_*`, which timm lacks, are those of their backbones.
"""

import argparse
import csv
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.contenders import PLAIN

MODELS = (
    *("maxvit_tiny_tf_224", "map_maxvit_tiny_tf_224", "maxvit_base_tf_224", "coatnet_1_rw_224", "caformer_s18"),
    *("convnext_tiny", "map_convnext_tiny", "map_resnet50", "ga_convnext_tiny_688"),
)
CONTENDERS = ("maxmap", "timm", "timm compiled", "timm max-autotune")
COLUMNS = (
    *("model", "task", "batch", "dtype", "contender", "milliseconds", "images_per_second", "ratio", "ratio_low"),
    *("ratio_high", "first_seconds", "peak_gigabytes", "gflop", "flop_limit_ms", "gigabytes", "byte_limit_ms"),
    *("version", "device", "note"),
)
BUSY = 0.4  # load per core before the first measurement above which the table warns


class Contender:
    """A process of `benchmarks.contenders`, built and ready to compute."""

    def __init__(self, job: dict[str, Any], log: Path):
        environment = {
            **os.environ,
            "XLA_PYTHON_CLIENT_PREALLOCATE": "false",  # contenders share the memory of the device
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


def compare(job: dict[str, Any], contenders: list[str], rounds: int, seconds: float, out: Path) -> list[dict[str, Any]]:
    """Measures one task of one model; returns a row for every contender."""
    running: dict[str, Contender] = {}
    rows = {name: {**job, "contender": name} for name in contenders}
    for name in contenders:
        try:
            running[name] = Contender({**job, "contender": name}, out / "contender.log")
        except RuntimeError as error:
            rows[name]["note"] = f"does not run: {error}"
    times = {name: max(1, round(seconds / max(each.seconds(1), 1e-4))) for name, each in running.items()}
    rounds_of: dict[str, list[float]] = {name: [] for name in running}
    for _ in range(rounds):
        for name, each in running.items():
            rounds_of[name].append(each.seconds(times[name]) / times[name])
    for name, each in running.items():
        median = statistics.median(rounds_of[name])
        rows[name] |= {
            "milliseconds": 1000 * median,
            "images_per_second": job["batch"] / median,
            "first_seconds": each.facts.pop("first"),
            "peak_gigabytes": 1e-9 * each.close(),
            **each.facts,
        }
        if "timm" in running:
            ratios = [theirs / ours for theirs, ours in zip(rounds_of["timm"], rounds_of[name], strict=True)]
            rows[name] |= {"ratio": statistics.median(ratios), "ratio_low": min(ratios), "ratio_high": max(ratios)}
            if job["model"] in PLAIN and name == "maxmap":
                rows[name]["note"] = f"timm: {PLAIN[job['model']]}, without this head"
    return list(rows.values())


def show(rows: list[dict[str, Any]]) -> str:
    """Returns rows as a Markdown table."""
    columns = {
        "model": "{model}",
        "task": "{task}",
        "batch": "{batch}",
        "contender": "{contender}",
        "ms": "{milliseconds:.1f}",
        "images/s": "{images_per_second:.1f}",
        "x timm (low to high)": "{ratio:.2f} ({ratio_low:.2f} to {ratio_high:.2f})",
        "first s": "{first_seconds:.0f}",
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

    groups = list(dict.fromkeys((row["model"], row["task"], row["batch"]) for row in rows))
    names = list(dict.fromkeys(row["contender"] for row in rows))
    figure, axes = plt.subplots(figsize=(9, 0.3 * (len(names) + 1) * len(groups) + 1))
    for i, name in enumerate(names):
        own = {(row["model"], row["task"], row["batch"]): row for row in rows if row["contender"] == name}
        speeds = [own.get(group, {}).get("ratio", 0.0) for group in groups]
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


def main() -> int:
    """Runs what the command line asks for; prints and writes the table."""
    parser = argparse.ArgumentParser(
        prog="make bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="*", default=MODELS, help="(default: the nine of the README's table)")
    parser.add_argument("--tasks", nargs="+", choices=("forward", "train"), default=("forward", "train"))
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=("maxmap", "timm"))
    parser.add_argument("--batch", type=int, nargs="+", default=[8], help="images at a time (default: 8)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="(default: float32 on a CPU, else bfloat16)")
    parser.add_argument("--rounds", type=int, default=5, help="turns of every contender (default: 5)")
    parser.add_argument("--seconds", type=float, default=1.5, help="of a turn, about (default: 1.5)")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/bench"), help="folder of the table (default: runs/bench)"
    )
    arguments = parser.parse_args()

    arguments.out.mkdir(parents=True, exist_ok=True)
    load = os.getloadavg()[0] / len(os.sched_getaffinity(0))
    busy = f"this machine was busy: {load:.1f} processes per core before the first measurement" if load > BUSY else ""
    if busy:
        print(f"warning: {busy}", flush=True)
    dtype = arguments.dtype or ("bfloat16" if Path("/dev/nvidia0").exists() else "float32")
    limits = Contender({"contender": "limits", "dtype": dtype}, arguments.out / "contender.log").facts
    print(f"limits: {limits['tflops']:.2f} TFLOP/s, {limits['gigabytes_per_second']:.1f} GB/s", flush=True)

    rows = []
    for model in arguments.models:
        for task in arguments.tasks:
            for batch in arguments.batch:
                job = {"model": model, "task": task, "batch": batch, "dtype": dtype}
                new = compare(job, arguments.contenders, arguments.rounds, arguments.seconds, arguments.out)
                for row in new:
                    if "gflop" in row:
                        row["flop_limit_ms"] = row["gflop"] / limits["tflops"]
                        row["byte_limit_ms"] = 1000 * row["gigabytes"] / limits["gigabytes_per_second"]
                rows += new
                with (arguments.out / "speed.csv").open("w", newline="", encoding="utf-8") as file:
                    writer = csv.DictWriter(file, COLUMNS, restval="", lineterminator="\n")
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
