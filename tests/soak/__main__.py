"""Runs that are killed, starved and lied to, at random moments: what survives? `make soak`, or python -m tests.soak.

Every try trains the tests' network in processes of its own, injects a fault, starts the run again, and compares all
that it ends with (parameters, optimizer state, averages, batch statistics, metrics, evaluation, the samples of every
step) with the run that nothing happened to: bit for bit, unless another number of devices is the point.

  --only REGEX   the faults whose names match          --jobs N   tries at a time
  --seed N       of the random moments                 --tries N  kills at random moments
"""

import argparse
import os
import re
import shutil
import sys
import tempfile
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
from absl import logging

from maxmap import checkpoint
from tests.kill_at_writes import COMMANDS
from tests.soak.bench import Bench, Try
from tests.soak.places import (
    CORRUPT_SUMS,
    backup,
    copied,
    corrupt_cache,
    cut_log,
    damage,
    flip_a_bit,
    full_cache,
    full_disk,
    kill_command,
    largest,
    moved,
    own_files_alone,
    read_only,
    read_only_cache,
    stale_lock,
    two_writers,
)
from tests.soak.runs import (
    changed_config,
    clock,
    elastic,
    harm_data,
    kill_again_and_again,
    kill_at,
    kill_at_start,
    kill_one_of_two,
    kill_somewhen,
    kill_worker,
    terminate,
    terminate_one_of_two,
    two_runs,
)
from tests.tiny_run import PLACES

# Only root can mount a small disk.
SMALL_DISKS: dict[str, Try] = {
    "disk full while saving": full_disk,
    "disk read-only": read_only,
    "cache of compiled programs on a full disk": full_cache,
    "cache of compiled programs read-only": read_only_cache,
}


def tries(kills: int) -> list[tuple[str, Try]]:
    """Every try with the name of its fault."""
    return [
        *[("kill -9 at a random moment", kill_somewhen)] * kills,
        *[(f"kill -9 in: {place}", kill_at(place, count)) for place in PLACES for count in (1, 4)],
        ("kill -9 five times in one run", kill_again_and_again),
        *[("kill -9 at the start, before any checkpoint", kill_at_start)] * 3,
        *[("SIGTERM at a random moment", terminate)] * 5,
        *[("kill -9 of one of two processes", kill_one_of_two(place)) for place in ("step", "evaluation", "save")] * 2,
        ("SIGTERM to one of two processes", terminate_one_of_two),
        ("other devices: 8, 4, 1", elastic(("8x1", 8), ("4x1", 16), ("1x1", 24))),
        ("other devices: 8, 4x2 with fsdp, 1x8", elastic(("8x1", 8), ("4x2", 16), ("1x8", 24))),
        ("other devices: 1x8, 2 processes of 4, 1", elastic(("1x8", 8), ("2x4 processes", 16), ("1x1", 24))),
        ("newest checkpoint truncated", damage(lambda folder: os.truncate(largest(folder), 100))),
        ("newest checkpoint with a flipped bit", damage(flip_a_bit)),
        ("newest checkpoint lacks a file", damage(lambda folder: largest(folder).unlink())),
        ("newest checkpoint half written", damage(lambda folder: (folder / checkpoint.SUMS).unlink())),
        *[(f"newest checkpoint with checksums {how}", damage(harm)) for how, harm in CORRUPT_SUMS.items()],
        *(SMALL_DISKS.items() if os.geteuid() == 0 else []),
        ("cache of compiled programs corrupt", corrupt_cache),
        *[(f"data file in mid-epoch: {event}", harm_data(event)) for event in ("vanish", "shrink", "unreadable")],
        ("worker process of the loader killed", kill_worker),
        ("clock set back by a day", clock),
        ("two runs in one workdir", two_runs),
        ("config changed between runs", changed_config),
        ("metrics.jsonl cut in mid-line", cut_log),
        ("lock file of a dead run", stale_lock),
        ("workdir moved", moved),
        ("workdir copied while the run writes it", copied),
        ("workdir brought back from an older backup", backup),
        ("umask 077", own_files_alone),
        *[(f"{kind}: killed at every write of its target", kill_command(kind)) for kind in COMMANDS],
        ("two commands write one target", two_writers),
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tries", type=int, default=20)
    arguments = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    logging.set_verbosity(logging.ERROR)
    if os.geteuid() != 0:
        print(f"not tried, since only root can mount a small disk: {', '.join(SMALL_DISKS)}", flush=True)
    began = time.monotonic()
    root = Path(tempfile.mkdtemp(prefix="soak"))
    bench = Bench(root, arguments.seed)
    chosen = [(name, attempt) for name, attempt in tries(arguments.tries) if re.search(arguments.only, name)]
    table: dict[str, list[int]] = {name: [0, 0] for name, _ in chosen}

    def attempt(number: int) -> None:
        name, what = chosen[number]
        workdir = root / f"try{number}"
        try:
            what(bench, workdir)
            table[name][0] += 1
        except Exception:
            table[name][1] += 1
            print(f"--- lost: {name} ({workdir})\n{traceback.format_exc()[-3000:]}", flush=True)
        else:
            print(f"survived: {name}", flush=True)
            for path in root.glob(f"try{number}*"):
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    with ThreadPoolExecutor(arguments.jobs) as pool:
        list(pool.map(attempt, range(len(chosen))))
    print(f"\n{len(chosen)} tries in {(time.monotonic() - began) / 60:.0f} min\n")
    print("| fault | tries | survived | lost |\n|---|---|---|---|")
    for name, (survived, lost) in table.items():
        print(f"| {name} | {survived + lost} | {survived} | {lost} |")
    lost = sum(lost for _, lost in table.values())
    if not lost:
        shutil.rmtree(root)
    return 1 if lost else 0


if __name__ == "__main__":
    sys.exit(main())
