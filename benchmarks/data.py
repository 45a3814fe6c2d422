"""Images a core feeds, beside timm's `create_loader` with the same recipe, on this machine.

    python -m benchmarks.data FOLDER            FOLDER holds train/<class>/*.JPEG, or name another split with --split

Every contender is a process of its own on one core, with no helper threads or processes, so that its processor time is
all of its work; they take turns, round after round. The rate is images per second of processor time, which other work
on the machine does not change much; the ratio to timm is taken round by round. The recipe is MAP's: a random crop of
224 pixels by bilinear or bicubic, flip, RandAugment m9, mixup 0.8 or CutMix 1.0, erasing 0.25.

================  ====================================================================================================
timm              crop, flip, RandAugment with PIL, mixing in the collation; normalisation and erasing by its prefetcher
maxmap            decoding and crop: all that a host with an accelerator does
maxmap, host      the same, and RandAugment with PIL on the host (`data.rand_augment`)
maxmap, all       the same as the first, and everything else, in JAX, on this very core
================  ====================================================================================================
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

BATCH, SIZE, CLASSES = 64, 224, 1000
AUGMENT = "rand-m9-inc1"  # without noise: at magnitude 10 timm posterises to 0 bits, which Pillow 13 refuses
CONTENDERS = ("timm", "maxmap", "maxmap, host", "maxmap, all")


def timm_batches(folder: str, split: str) -> Iterator[Any]:
    """Batches of timm's loader without worker processes."""
    import torch

    from tests.reference import import_timm

    import_timm()
    from timm.data import FastCollateMixup, create_dataset, create_loader
    from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

    torch.set_num_threads(1)
    mix = {"mixup_alpha": 0.8, "cutmix_alpha": 1.0, "prob": 1.0, "switch_prob": 0.5, "label_smoothing": 0.1}
    loader = create_loader(
        create_dataset("", folder, split=split, is_training=True),
        input_size=(3, SIZE, SIZE),
        batch_size=BATCH,
        is_training=True,
        use_prefetcher=True,
        re_prob=0.25,
        re_mode="pixel",
        auto_augment=AUGMENT,
        interpolation="random",
        mean=IMAGENET_DEFAULT_MEAN,
        std=IMAGENET_DEFAULT_STD,
        num_workers=0,
        collate_fn=FastCollateMixup(**mix, num_classes=CLASSES),
        pin_memory=False,
        device=torch.device("cpu"),
        persistent_workers=False,
    )
    while True:
        yield from loader


def maxmap_batches(folder: str, split: str, *, on_host: bool, everything: bool) -> Iterator[Any]:
    """Our batches on one thread, and with `everything` the step's own preparation of them."""
    import jax

    from maxmap.data import augment, mix
    from maxmap.data.decode import IMAGENET_MEAN, IMAGENET_STD
    from maxmap.data.pipeline import open_data

    data = open_data(
        "folder",
        folder,
        train_split=split,
        val_split=None,
        image_size=SIZE,
        rand_augment=AUGMENT if on_host else None,
        threads=1,
        check=0,
    )

    @jax.jit
    def prepare(key: jax.Array, images: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
        keys = jax.random.split(key, 3)
        images = augment.augment(keys[0], images, mean=IMAGENET_MEAN, rand_augment=AUGMENT)
        images, targets = mix.mix(keys[1], images, labels, num_classes=CLASSES, mixup=0.8, cutmix=1.0, smoothing=0.1)
        return augment.erase(keys[2], augment.normalize(images, IMAGENET_MEAN, IMAGENET_STD), prob=0.25), targets

    key = jax.random.key(0)
    for step, batch in enumerate(data.train_batches(BATCH, seed=0, num_steps=10**6)):
        if everything:
            yield jax.block_until_ready(prepare(jax.random.fold_in(key, step), batch["image"], batch["label"]))
        else:
            yield batch


def contend(name: str, folder: str, split: str) -> None:
    """Makes as many batches as every line of the input says; prints the processor seconds since the line before.

    Not only those of these batches: what a contender makes ahead between the rounds counts too.
    """
    makers: dict[str, Callable[[], Iterator[Any]]] = {
        "timm": lambda: timm_batches(folder, split),
        "maxmap": lambda: maxmap_batches(folder, split, on_host=False, everything=False),
        "maxmap, host": lambda: maxmap_batches(folder, split, on_host=True, everything=False),
        "maxmap, all": lambda: maxmap_batches(folder, split, on_host=False, everything=True),
    }
    batches = makers[name]()
    next(batches)  # imports and compiles
    print("ready", flush=True)
    before = time.process_time()
    for line in sys.stdin:
        for _ in range(int(line)):
            next(batches)
        now = time.process_time()
        print(now - before, flush=True)
        before = now


class Contender:
    """A process of `contend` on one core."""

    def __init__(self, name: str, folder: str, split: str, core: int):
        command = [sys.executable, "-m", "benchmarks.data", folder, "--split", split, "--contender", name]
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "JAX_PLATFORMS": "cpu"},
            preexec_fn=lambda: os.sched_setaffinity(0, {core}),
        )
        self._read()

    def _read(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"a contender ended with {self.process.wait()}: run it with --contender to see why")
        return line

    def measure(self, batches: int) -> float:
        """Returns the processor seconds of so many batches."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{batches}\n")
        self.process.stdin.flush()
        return float(self._read())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="of the images")
    parser.add_argument("--split", default="train", help="subfolder (default: train)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batches", type=int, default=3, help=f"of {BATCH} images in a round (default: 3)")
    parser.add_argument("--contender", choices=CONTENDERS, help="be this one")
    arguments = parser.parse_args()
    if arguments.contender:
        contend(arguments.contender, arguments.folder, arguments.split)
        return
    core = sorted(os.sched_getaffinity(0))[-1]
    running = {name: Contender(name, arguments.folder, arguments.split, core) for name in CONTENDERS}
    seconds: dict[str, list[float]] = {name: [] for name in CONTENDERS}
    for _ in range(arguments.rounds):
        for name, contender in running.items():
            seconds[name].append(contender.measure(arguments.batches))
    images = arguments.batches * BATCH
    print("| contender | images per second of one core | ratio to timm (low to high) |\n|---|---|---|")
    for name in CONTENDERS:
        ratios = [theirs / ours for theirs, ours in zip(seconds["timm"], seconds[name], strict=True)]
        rate = images / statistics.median(seconds[name])
        print(f"| {name} | {rate:.0f} | {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}) |")
    for contender in running.values():
        contender.process.kill()


if __name__ == "__main__":
    main()
