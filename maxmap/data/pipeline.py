"""Batches on the host: which image comes when, decoded and cropped on threads.

The order of the samples and every random crop are functions of (seed, step) alone, so that a run can stop at any
step, go on from there, and see the same batches on any number of processes. Grain does the threads, the processes
and the prefetching; what is ours is the order and how one row is made.
"""

import dataclasses
import functools
import os
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any

import grain
import numpy as np
from PIL import Image

from maxmap.data import decode
from maxmap.data.decode import IMAGENET_MEAN, IMAGENET_STD
from maxmap.data.randaugment import RandAugment, fill_color, parse_rand_augment
from maxmap.data.randaugment_host import rand_augment_image
from maxmap.data.sources import Source, open_source
from maxmap.errors import UserError, nearest

Batch = dict[str, np.ndarray]

# Rows that grain hands to a thread at a time. With 1 it costs 115 us of CPU per image, more than a crop of 32 px does;
# with 8 it is 12 us, with 32 it is 8. A whole batch gains nothing further, holds a batch per thread in memory, and
# delays the first one until a single thread has made all of it.
_CHUNK = 32

# Broken images in a row after which something else is wrong, such as a disk that is gone.
_MOST_BROKEN = 100

# timm's RepeatAugSampler, after DeiT's: an epoch with repeated augmentation is a multiple of this.
_REPEATS_ROUND = 256


def open_data(
    source: str,
    path: str | os.PathLike | None = None,
    *,
    name: str | None = None,
    image_size: int = 224,
    eval_image_size: int | None = None,
    train_split: str | None = "train",
    val_split: str | None = "val",
    classes: Sequence[str] | None = None,
    scale: Sequence[float] = (0.08, 1.0),
    ratio: Sequence[float] = (3 / 4, 4 / 3),
    interpolation: str = "random",
    draft: bool = True,
    rand_augment: str | None = None,
    repeats: int = 1,
    crop_pct: float = 0.875,
    crop_mode: str = "center",
    eval_interpolation: str = "bicubic",
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
    threads: int | None = None,
    workers: int = 0,
    prefetch: int = 2,
    check: int = 2000,
) -> "Data":
    """Opens the training and the evaluation split of a data set, and looks at its images before training.

    Args:
        source, path, name: see `sources.open_source`.
        image_size: side of the training crop in pixels.
        eval_image_size: side of the evaluation crop; None: image_size.
        train_split: name of the training split; None: evaluation only.
        val_split: name of the evaluation split; None: training only.
        classes: the class names in the order of the labels; None: those of the training split (else the evaluation
            split), in the source's order.
        scale, ratio, interpolation, draft: of the random crop, see `decode.train_crop`.
        rand_augment: RandAugment with Pillow on the decoding threads, such as 'rand-m9-mstd0.5-inc1', in place of
            that on the device (`augment.augment`): faster only where warps are slow there and cores are idle here.
        repeats: repeated augmentation (Hoffer et al., 2020): how many crops of an image follow one another. As in
            timm an epoch does not grow with it, but is the first floor(n / 256) * 256 of the repeated samples.
        crop_pct, crop_mode, eval_interpolation: of the evaluation crop, see `decode.eval_crop`.
        mean, std: per channel, of images from 0 to 1. Batches are not normalised: the values go into
            `Data.preprocessing`, and the mean is the border of crop_mode 'border'.
        threads: decoding threads per process; None: as many as the machine has cores.
        workers: further processes that decode, each with `threads` threads; 0: decode in this process. Worth a try
            for small images, where Python's lock keeps threads from sharing the work; photographs do not need it.
        prefetch: batches that are made ahead.
        check: how many images of each split are decoded before training, evenly spread; 0: none, and broken images
            are left out and counted during training.

    Raises:
        UserError: the data is missing, malformed or broken, or an option is out of range.
    """
    _check_options(
        interpolation=interpolation,
        eval_interpolation=eval_interpolation,
        crop_mode=crop_mode,
        crop_pct=crop_pct,
        scale=scale,
        ratio=ratio,
        least_one={
            "image_size": image_size,
            "eval_image_size": image_size if eval_image_size is None else eval_image_size,
            "repeats": repeats,
            "threads": 1 if threads is None else threads,
            "prefetch": prefetch,
        },
    )
    train_crop = functools.partial(
        decode.train_crop,
        size=image_size,
        scale=tuple(scale),
        ratio=tuple(ratio),
        interpolation=interpolation,
        draft=draft,
    )
    if rand_augment:
        policy = parse_rand_augment(rand_augment)
        train_crop = functools.partial(_augmented_crop, crop=train_crop, policy=policy, fill=fill_color(mean))
    if train_split is None and val_split is None:
        raise UserError("neither --config.data.train_split nor --config.data.val_split is set: set at least one")
    train = val = None
    if train_split is not None:
        train = open_source(source, path, train_split, name=name, classes=classes)
        classes = train.classes
    if val_split is not None:
        val = open_source(source, path, val_split, name=name, classes=classes)
    splits = [split for split in (train, val) if split is not None]
    if check:
        for split in splits:
            decode.check_images(split, check)
    return Data(
        classes=splits[0].classes,
        train=train,
        val=val,
        image_size=image_size,
        train_crop=train_crop,
        preprocessing={
            "image_size": eval_image_size or image_size,
            "crop_pct": float(crop_pct),
            "crop_mode": crop_mode,
            "interpolation": eval_interpolation,
            "mean": [float(value) for value in mean],
            "std": [float(value) for value in std],
        },
        repeats=repeats,
        threads=threads or os.cpu_count() or 1,
        workers=workers,
        prefetch=prefetch,
    )


@dataclasses.dataclass(frozen=True)
class Data:
    """A training and an evaluation split, and how their images become batches; made by `open_data`.

    Attributes:
        classes: class names in the order of the labels.
        train, val: the sources (`train.name(i)` is the path of image i), or None.
        preprocessing: the evaluation transform as JSON holds it: image_size, crop_pct, crop_mode, interpolation,
            mean, std. With it `preprocess` does to one image what `eval_batches` does.
    """

    classes: tuple[str, ...]
    train: Source | None
    val: Source | None
    image_size: int
    train_crop: Callable[..., np.ndarray]
    preprocessing: dict[str, Any]
    repeats: int
    threads: int
    workers: int
    prefetch: int

    @property
    def num_train(self) -> int:
        """Images in the training split."""
        return 0 if self.train is None else len(self.train)

    @property
    def num_eval(self) -> int:
        """Images in the evaluation split."""
        return 0 if self.val is None else len(self.val)

    def steps_per_epoch(self, batch_size: int) -> int:
        """Returns how many batches of `batch_size` (over all processes) an epoch has.

        What does not fill the last batch is left out, so that epochs and steps align: other images every epoch.

        Raises:
            UserError: there is no training split, or an epoch does not fill one batch.
        """
        num = len(self._training())
        length = _epoch_length(num, self.repeats)
        if not 1 <= batch_size <= length:
            with_repeats = f" with --config.data.repeats={self.repeats}" if self.repeats > 1 else ""
            raise UserError(
                f"batch size {batch_size} does not fit an epoch of {length} samples ({num} training "
                f"images{with_repeats}): choose one from 1 to {length}, or give more images"
            )
        return length // batch_size

    def train_batches(
        self,
        batch_size: int,
        *,
        seed: int,
        num_steps: int,
        start_step: int = 0,
        process_index: int = 0,
        process_count: int = 1,
    ) -> Generator[Batch, None, None]:
        """Makes this process's rows of the training batches start_step ... start_step + num_steps - 1.

        Row r of step s is sample p = s * batch_size + r of the run: an image and a crop that depend on (seed, p)
        only. Process k of n gets the rows [k, k + 1) * batch_size / n of each batch. An image that cannot be decoded
        is replaced by the next one in the order that can.

        Returns:
            a generator, to be closed (`close()`) where it is left early, of dicts: image uint8 [b, H, W, 3], label
            int32 [b], index int64 [b] (in the training split), skipped int64 [b] (the index of the broken image
            that this row replaces, else -1).

        Raises:
            UserError: the batch size does not fit the epoch or the processes, or the seed is negative; while
                iterating: 100 images in a row are broken.
        """
        steps_per_epoch = self.steps_per_epoch(batch_size)
        if batch_size % process_count:
            raise UserError(
                f"batch size {batch_size} cannot be shared by {process_count} processes: choose a multiple of it"
            )
        if seed < 0:
            raise UserError(f"seed {seed} is negative: choose 0 or more")
        train = self._training()
        rows = _TrainRows(
            source=train,
            crop=self.train_crop,
            image_size=self.image_size,
            order=_Order(len(train), self.repeats, steps_per_epoch * batch_size, seed),
        )
        chunks = _Chunks(batch_size // process_count, process_index, process_count, start_step, num_steps)
        return self._stream(chunks, rows)

    def eval_batches(
        self, batch_size: int, *, process_index: int = 0, process_count: int = 1
    ) -> Generator[Batch, None, None]:
        """Makes this process's rows of the evaluation batches: every image of the split once, in order.

        All processes get the same number of batches of the same size, ceil(batch_size / process_count); rows that
        are left over at the end are zeros with mask False. So is the image of a row that cannot be decoded.

        Returns:
            a generator, to be closed (`close()`) where it is left early, of dicts: image uint8 [b, H, W, 3], label
            int32 [b], mask bool [b], index int64 [b] (in the evaluation split; -1: no image), skipped int64 [b]
            (the index where the image is broken, else -1).
        """
        if self.val is None:
            raise UserError("there is no evaluation data: set --config.data.val_split")
        if batch_size < 1:
            raise UserError(f"batch size {batch_size} for evaluation is too small: choose at least 1")
        local = -(-batch_size // process_count)
        num_steps = -(-len(self.val) // (local * process_count))
        chunks = _Chunks(local, process_index, process_count, 0, num_steps)
        return self._stream(chunks, _EvalRows(self.val, self.preprocessing))

    def _training(self) -> Source:
        if self.train is None:
            raise UserError("there is no training data: set --config.data.train_split")
        return self.train

    def _stream(self, chunks: "_Chunks", rows: Callable[[range], Batch]) -> Generator[Batch, None, None]:
        ahead = max(self.threads, self.prefetch * chunks.per_batch)
        data = grain.MapDataset.source(chunks).map(rows)
        data = data.to_iter_dataset(grain.ReadOptions(num_threads=self.threads, prefetch_buffer_size=ahead))
        if self.workers:
            _let_grain_read_its_flags()
            # Before batching: a worker takes every workers-th element, which has to be a chunk.
            data = data.mp_prefetch(
                grain.MultiprocessingOptions(num_workers=self.workers, per_worker_buffer_size=-(-ahead // self.workers))
            )
        return _closing(iter(data.batch(chunks.per_batch, drop_remainder=True, batch_fn=_concatenate)))


def preprocess(image: bytes | str | os.PathLike | np.ndarray, preprocessing: Mapping[str, Any]) -> np.ndarray:
    """Does to one image what `eval_batches` does to a data set.

    Args:
        image: a path, the bytes of an image file, or a uint8 array [H, W, 3].
        preprocessing: `Data.preprocessing`, as a checkpoint stores it.

    Returns:
        uint8 [image_size, image_size, 3], not yet normalised.

    Raises:
        UserError: the file is missing or cannot be decoded.
    """
    where = "the image"
    try:
        if isinstance(image, str | os.PathLike):
            where = os.fspath(image)
            with open(image, "rb") as file:
                image = file.read()
        return _eval_crop(image, preprocessing)
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"cannot read {where} ({reason}): give the path of an image file that is whole") from error


def _augmented_crop(
    image: bytes | np.ndarray,
    rng: np.random.Generator,
    *,
    crop: Callable[..., np.ndarray],
    policy: RandAugment,
    fill: tuple[int, ...],
) -> np.ndarray:
    return np.asarray(rand_augment_image(Image.fromarray(crop(image, rng)), rng, policy, fill))


def _eval_crop(image: bytes | np.ndarray, preprocessing: Mapping[str, Any]) -> np.ndarray:
    return decode.eval_crop(
        image,
        size=preprocessing["image_size"],
        crop_pct=preprocessing["crop_pct"],
        mode=preprocessing["crop_mode"],
        interpolation=preprocessing["interpolation"],
        mean=preprocessing["mean"],
    )


def _epoch_length(num: int, repeats: int) -> int:
    """Samples in an epoch, before the last partial batch is dropped."""
    if repeats == 1 or num < _REPEATS_ROUND:
        return num
    return num // _REPEATS_ROUND * _REPEATS_ROUND


def _generator(seed: int, stream: int, number: int) -> np.random.Generator:
    """A generator for each (seed, stream, number): Philox has 2^64 independent streams per key, at no set-up cost."""
    return np.random.Generator(np.random.Philox(key=seed, counter=(0, 0, stream, number)))


@functools.lru_cache(maxsize=2)  # two: at the end of an epoch some threads are in the next one already
def _permutation(num: int, seed: int, epoch: int) -> np.ndarray:
    return _generator(seed, 0, epoch).permutation(num)


@dataclasses.dataclass(frozen=True)
class _Order:
    """The endless order of training samples: position -> index in the source."""

    num: int
    repeats: int
    epoch_length: int
    seed: int

    def index(self, position: int) -> int:
        epoch, offset = divmod(position, self.epoch_length)
        return int(_permutation(self.num, self.seed, epoch)[offset // self.repeats])

    def generator(self, position: int) -> np.random.Generator:
        return _generator(self.seed, 1, position)


@dataclasses.dataclass(frozen=True)
class _Chunks:
    """The positions of this process's rows, in chunks that do not cross a batch: chunk number -> range."""

    local_batch: int
    process_index: int
    process_count: int
    start_step: int
    num_steps: int

    @property
    def per_batch(self) -> int:
        return -(-self.local_batch // _CHUNK)

    def __len__(self) -> int:
        return self.num_steps * self.per_batch

    def __getitem__(self, number: int) -> range:
        step, chunk = divmod(int(number), self.per_batch)
        first = ((self.start_step + step) * self.process_count + self.process_index) * self.local_batch
        return range(
            first + chunk * self.local_batch // self.per_batch,
            first + (chunk + 1) * self.local_batch // self.per_batch,
        )


@dataclasses.dataclass(frozen=True)
class _TrainRows:
    """Positions in the order -> training rows."""

    source: Source
    crop: Callable[..., np.ndarray]
    image_size: int
    order: _Order

    def __call__(self, positions: range) -> Batch:
        rows = _empty(len(positions), self.image_size)
        for row, position in enumerate(positions):
            image, label, index, skipped = self._sample(position)
            rows["image"][row] = image
            rows["label"][row] = label
            rows["index"][row] = index
            rows["skipped"][row] = skipped
        return rows

    def _sample(self, position: int) -> tuple[np.ndarray, int, int, int]:
        skipped = -1
        for offset in range(_MOST_BROKEN):
            index = self.order.index(position + offset)
            try:
                image, label = self.source[index]
                return self.crop(image, self.order.generator(position)), label, index, skipped
            except OSError:
                skipped = index if offset == 0 else skipped
        raise UserError(
            f"{_MOST_BROKEN} training images in a row cannot be read, from {self.source.name(skipped)} on: see "
            "whether the disk is still there, and look at more files with a larger --config.data.check"
        )


@dataclasses.dataclass(frozen=True)
class _EvalRows:
    """Positions in the evaluation split, and beyond its end, -> rows."""

    source: Source
    preprocessing: Mapping[str, Any]

    def __call__(self, positions: range) -> Batch:
        rows = _empty(len(positions), self.preprocessing["image_size"])
        rows["mask"] = np.zeros(len(positions), bool)
        for row, index in enumerate(positions):
            if index >= len(self.source):
                break
            rows["index"][row] = index
            try:
                image, label = self.source[index]
                rows["image"][row] = _eval_crop(image, self.preprocessing)
                rows["label"][row] = label
                rows["mask"][row] = True
            except OSError:
                rows["skipped"][row] = index
        return rows


def _empty(num: int, size: int) -> Batch:
    return {
        "image": np.zeros((num, size, size, 3), np.uint8),
        "label": np.zeros(num, np.int32),
        "index": np.full(num, -1, np.int64),
        "skipped": np.full(num, -1, np.int64),
    }


def _concatenate(chunks: Sequence[Batch]) -> Batch:
    if len(chunks) == 1:
        return chunks[0]
    return {name: np.concatenate([chunk[name] for chunk in chunks]) for name in chunks[0]}


def _closing(batches: grain.DatasetIterator) -> Generator[Batch, None, None]:
    """Ends the threads and workers after the last batch, on `close()`, or when nobody holds the generator any more."""
    try:
        yield from batches
    except RuntimeError as error:
        if "Worker process was terminated" not in str(error):
            raise
        raise UserError(
            "a worker process of the loader was killed, often for want of memory: start again, which goes on from the "
            "last checkpoint, with fewer --config.data.workers."
        ) from error
    finally:
        batches.close()


def _let_grain_read_its_flags() -> None:
    """Grain's workers read absl flags and fail where nobody has parsed any, as in a notebook or a test."""
    from absl import flags

    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()


def _check_options(
    *,
    interpolation: str,
    eval_interpolation: str,
    crop_mode: str,
    crop_pct: float,
    scale: Sequence[float],
    ratio: Sequence[float],
    least_one: Mapping[str, int],
) -> None:
    decode.check_filter(interpolation, "--config.data.interpolation", extra=("random",))
    decode.check_filter(eval_interpolation, "--config.data.eval_interpolation")
    if crop_mode not in decode.CROP_MODES:
        raise UserError(
            f"unknown crop mode {crop_mode!r} (--config.data.crop_mode): did you mean "
            f"{nearest(crop_mode, decode.CROP_MODES, 1)!r}? Known are {', '.join(decode.CROP_MODES)}"
        )
    if not crop_pct > 0:
        raise UserError(f"--config.data.crop_pct={crop_pct} must be positive, such as 0.875")
    for name, (low, high) in {"scale": scale, "ratio": ratio}.items():
        if not 0 < low <= high:
            raise UserError(f"--config.data.{name}=({low}, {high}) must be a range of positive numbers, low to high")
    for name, value in least_one.items():
        if value < 1:
            raise UserError(f"--config.data.{name}={value} must be at least 1")
