"""Batches on the host: decoded and cropped on threads, in an order that depends on (seed, step) alone.

A run can therefore stop at any step, go on from there, and see the same batches on any number of processes. Grain runs
the threads and the processes and makes batches ahead; `order` says which image comes when, `rows` makes a row of it.
"""

import dataclasses
import functools
import os
from collections.abc import Callable, Generator, Sequence
from typing import Annotated, Any, Literal

import grain
import numpy as np

from maxmap.classes import match
from maxmap.data import decode
from maxmap.data.crops import eval_rows, make_preprocessing, make_train_crop, train_rows
from maxmap.data.decode import IMAGENET_MEAN, IMAGENET_STD
from maxmap.data.images import MAX_PIXELS
from maxmap.data.labelled import ImageSource
from maxmap.data.masks import MaskFiles, check_classes
from maxmap.data.order import Chunks, SampleOrder, epoch_length
from maxmap.data.preprocessing import CropShare, Deviation, Mean, of_channels
from maxmap.data.rows import Batch, Label
from maxmap.data.sources import open_source
from maxmap.data.tables import Columns, column_names
from maxmap.data.views import Relabelled, divide
from maxmap.errors import UserError
from maxmap.ranges import CountOrZero, Fraction, Pixels, Positive, Range, Share, check_arguments

_PREFETCH = 2  # batches that are made ahead
_MOST_THREADS = 1024  # of a process, and of worker processes

# Options of `open_data` that say how labels are read.
LABELLING = (
    *("source", "task", "image_column", "label_columns", "split_column", "separator"),
    *("mask_folder", "reduce_zero_label"),
)


def open_data(
    source: str,
    path: str | os.PathLike | None = None,
    *,
    name: str | None = None,
    image_size: Pixels = 224,
    channels: Annotated[int, Range(at_least=1, at_most=512)] = 3,
    eval_image_size: Pixels | None = None,
    train_split: str | None = "train",
    val_split: str | None = "val",
    folds: Annotated[int, Range(at_least=2)] | None = None,
    fold: CountOrZero = 0,
    fold_seed: Annotated[int, Range(at_least=0, at_most=2**32 - 1)] = 0,
    classes: Sequence[str] | None = None,
    task: Literal["single_label", "multi_label", "distribution", "numbers", "segmentation"] = "single_label",
    mask_folder: str | None = None,
    reduce_zero_label: bool = False,
    image_column: str = "image",
    label_columns: str | Sequence[str] = "label",
    split_column: str = "split",
    separator: str = "|",
    thresholds: Share | Sequence[tuple[str, Share]] = 0.5,
    class_weights: Literal["inverse"] | Sequence[tuple[str, Positive]] | None = None,
    scale: tuple[Fraction, Fraction] = (0.08, 1.0),
    ratio: tuple[Positive, Positive] = (3 / 4, 4 / 3),
    zoom: tuple[Positive, Positive] = (0.5, 2.0),
    interpolation: str = "random",
    draft: bool = True,
    exif: bool = False,
    rand_augment: str | None = None,
    repeats: Annotated[int, Range(at_least=1, at_most=100)] = 1,
    balanced: bool = False,
    crop_pct: CropShare = 0.875,
    crop_mode: str = "center",
    eval_interpolation: str = "bicubic",
    mean: Sequence[Mean] = IMAGENET_MEAN,
    std: Sequence[Deviation] = IMAGENET_STD,
    threads: Annotated[int, Range(at_least=1, at_most=_MOST_THREADS)] | None = None,
    workers: Annotated[int, Range(at_least=0, at_most=_MOST_THREADS)] = 0,
    check: CountOrZero = 2000,
    max_pixels: Annotated[int, Range(at_least=1, at_most=MAX_PIXELS)] = MAX_PIXELS,
    verify: bool = True,
) -> "Data":
    """Opens the training and the evaluation split of a data set, and checks some of their images.

    Args:
      source: kind of data set: 'folder', 'tar', 'csv', 'tfds', 'digits' or 'masks'.
      path: folder of the images, archives or CSV files, or a CSV file; for 'tfds' the data_dir, where None is TFDS's
        own; for 'masks' the folder of images/<split>, masks/<split> and classes.txt.
      name: name of a TFDS data set, such as 'imagenet2012' or 'cifar10'.
      image_size: side of the training crop in pixels.
      channels: of the images: 3 for colours, 1 for grey, 4 for RGBA, else those of .npy and TIFF files.
      eval_image_size: side of the evaluation crop in pixels; None: image_size.
      train_split: name of the training split; None: evaluation only.
      val_split: name of the evaluation split; None: training only.
      folds: into how many parts the training split is divided for cross-validation; None to read val_split.
      fold: which of the folds is evaluated, from 0; the others are trained on.
      fold_seed: seed of the draw of the folds.
      classes: class names in the order of the labels; None: those of the training split, else of the evaluation split.
      task: how a CSV file labels images: by one class, several labels, shares of ordered scores, or numbers; for
        'masks' it is 'segmentation', a class for every pixel.
      mask_folder: for 'masks', the folder beside 'images' that holds the masks; None for 'masks' or 'annotations'.
      reduce_zero_label: for 'masks', whether 0 is ignored and k + 1 stands for class k, as in ADE20K.
      image_column: column of a CSV file with the path of each image, relative to the file.
      label_columns: column of a CSV file with the labels, or several in order, for all but 'single_label'.
      split_column: column of a CSV file with the split of each image; a folder has a file for each split.
      separator: what stands between the labels of an image for 'multi_label' in one column.
      thresholds: from which probability on an image counts as having a label, for 'multi_label': a number for all, or
        pairs of a label and its number.
      class_weights: what each class counts in the loss: pairs of a class and its weight, 1 for the others; 'inverse'
        for the inverse of its frequency in the training split.
      scale: range of a random crop's area, as a fraction of the image's.
      ratio: range of a random crop's width / height.
      zoom: for 'segmentation', in place of scale and ratio: range of the shorter side of an image before the crop, in
        sides of the crop.
      interpolation: filter of the training resize; 'random' draws bilinear or bicubic for each image.
      draft: whether large JPEGs are decoded at a reduced size where the crop is still larger than the output.
      exif: whether images are turned as their EXIF orientation says, in training and evaluation; published recipes do
        not, photos of phones need it.
      rand_augment: RandAugment on the decoding threads instead of the device, such as 'rand-m9-mstd0.5-inc1'.
      repeats: repeated augmentation: how many crops of an image follow one another (Hoffer et al., 2020).
      balanced: whether an epoch has as many samples of one class as of another; images of a small class come several
        times, those of a large one in turns over the epochs. Not for 'tfds', whose labels are not known in advance.
      crop_pct: part of the resized side that the evaluation crop keeps.
      crop_mode: which side the evaluation resize fits: 'center' the shorter, 'squash' both, 'border' the longer.
      eval_interpolation: filter of the evaluation resize.
      mean: mean of each channel in 0..1, which normalisation subtracts; three values fit any number of channels, see
        `maxmap.data.preprocessing.of_channels`.
      std: standard deviation of each channel in 0..1, by which normalisation divides.
      threads: decoding threads of each process; None: as many as the machine has cores.
      workers: further decoding processes, each with `threads` threads; they help with small images.
      check: how many images of each split are decoded before training; 0: none, broken ones are counted as they come.
      max_pixels: pixels of the largest image that is decoded, up to 178,956,970; larger ones count as broken.
      verify: whether the checksums of TFRecord files are checked; a record with another checksum counts as broken.

    Raises:
      UserError: the data is missing, malformed or broken, or an option is out of range.
    """
    check_arguments(open_data, "data", locals())
    if rand_augment and channels != 3:
        raise UserError(f"data.rand_augment is for colours, and data.channels is {channels}: leave one of them out.")
    if task == "segmentation" and channels != 3:
        raise UserError(f"data.task='segmentation' is for colours, and data.channels is {channels}: leave that out.")
    mean, std = of_channels(mean, channels, "data.mean"), of_channels(std, channels, "data.std")
    decoding = {"channels": channels, "draft": draft, "exif": exif, "max_pixels": max_pixels}
    train_crop = make_train_crop(task, image_size, scale, ratio, zoom, interpolation, decoding, rand_augment, mean)
    preprocessing = make_preprocessing(
        task, image_size, eval_image_size, crop_pct, crop_mode, eval_interpolation, mean, std, exif
    )
    columns = Columns(image_column, column_names(label_columns), split_column, separator)
    masks = MaskFiles(mask_folder, reduce_zero_label)
    open_split = functools.partial(
        open_source, source, path, name=name, verify=verify, task=task, columns=columns, masks=masks
    )
    if folds is None:
        train, val = _open_splits(open_split, train_split, val_split, classes)
    elif train_split is None:
        raise UserError("data.folds divides the training split: set --config.data.train_split.")
    else:
        train, val = divide(open_split(train_split, classes=classes), folds, fold, fold_seed)
    for split in (train, val):
        if check and split is not None:
            decode.check_images(split, check, channels, max_pixels)
    if check and task == "segmentation":
        check_classes(train, val)
    if balanced and task != "single_label":
        raise UserError(
            f"data.balanced needs one class for each image, and config.data.task is {task!r}: leave it out."
        )
    if balanced and train is not None and train.labels() is None:
        raise UserError("data.balanced needs the labels of all images in advance, which 'tfds' has not: leave it out.")
    return Data(
        train,
        val,
        image_size,
        train_crop,
        preprocessing,
        repeats,
        threads or os.cpu_count() or 1,
        workers,
        max_pixels,
        balanced,
        task,
        thresholds,
        class_weights,
    )


@dataclasses.dataclass(frozen=True)
class Data:
    """A training and an evaluation split, and how their images become batches; made by `open_data`.

    Batches are not normalised: the device does that with the mean and deviation in `preprocessing`.

    Attributes:
      train: the training images (`train.name(i)` is the path of image i), or None.
      val: the evaluation images, or None.
      image_size: side of a training image in pixels.
      train_crop: makes the training image and its label of an image file, a label and a random generator.
      preprocessing: the evaluation transform as JSON holds it: image_size, crop_pct, crop_mode, interpolation, mean,
        std, exif. With it `maxmap.data.preprocessing.cropped` does to one image what `eval_batches` does.
      repeats: how many crops of an image follow one another. As in timm an epoch does not grow with it, but is the
        first floor(n / 256) * 256 of the repeated samples.
      threads: decoding threads of each process.
      workers: decoding processes beside this one.
      max_pixels: an evaluation image with more pixels counts as broken; `train_crop` has the same bound.
      balanced: whether a training epoch has as many samples of one class as of another.
      task: how the images are labelled, which `maxmap.tasks.of_data` reads, as it does the next two.
      thresholds: see `open_data`.
      class_weights: see `open_data`.
    """

    train: ImageSource | None
    val: ImageSource | None
    image_size: int
    train_crop: Callable[..., tuple[np.ndarray, Label]]
    preprocessing: dict[str, Any]
    repeats: int
    threads: int
    workers: int
    max_pixels: int
    balanced: bool = False
    task: str = "single_label"
    thresholds: float | Sequence[tuple[str, float]] = 0.5
    class_weights: str | Sequence[tuple[str, float]] | None = None

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names in the order of the labels."""
        source = self.train if self.train is not None else self.val
        assert source is not None
        return source.classes

    @property
    def numbered(self) -> bool:
        """Whether the classes have no names, only numbers."""
        source = self.train if self.train is not None else self.val
        return source is not None and source.numbered

    def with_classes(self, classes: Sequence[str], whose: str) -> "Data":
        """Returns the same data with labels in the order of other classes, found by their names.

        Args:
          classes: Names in the order of the new labels; the data may have fewer.
          whose: What has these classes, for the message: 'the checkpoint in run'.

        Raises:
          UserError: The data has a class that is not among them.
        """
        if tuple(classes) == self.classes:
            return self
        labels = match(self.classes, classes, "the data", whose)

        def relabel(source: ImageSource | None) -> ImageSource | None:
            return None if source is None else Relabelled(source, tuple(classes), labels)

        return dataclasses.replace(self, train=relabel(self.train), val=relabel(self.val))

    @property
    def channels(self) -> int:
        """Channels of the images."""
        return len(self.preprocessing["mean"])

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

        The samples that do not fill the last batch are left out; they are others in every epoch.

        Raises:
          UserError: there is no training split, or an epoch does not fill one batch.
        """
        num_images = len(self._training_source())
        length = epoch_length(num_images, self.repeats)
        if not 1 <= batch_size <= length:
            with_repeats = f" with --config.data.repeats={self.repeats}" if self.repeats > 1 else ""
            raise UserError(
                f"batch size {batch_size} does not fit an epoch of {length} samples ({num_images} training "
                f"images{with_repeats}): choose one from 1 to {length}, or give more images."
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
        only. Process k of n gets the rows [k, k + 1) * batch_size / n of each batch. The next image in the order
        replaces an image that cannot be decoded.

        Returns:
          A generator, to be closed (`close()`) where it is left early, of dicts: image uint8 [b, H, W, C], label int32
          [b], float32 [b, K] or uint8 [b, H, W], index int64 [b] (in the training split), skipped int64 [b] (the index
          of the broken image that this row replaces, else -1).

        Raises:
          UserError: the batch size does not fit the epoch or the processes, or the seed is negative; while iterating:
            100 images in a row are broken.
        """
        steps_per_epoch = self.steps_per_epoch(batch_size)
        if batch_size % process_count:
            raise UserError(
                f"batch size {batch_size} cannot be shared by {process_count} processes: choose a multiple of it."
            )
        if seed < 0:
            raise UserError(f"seed {seed} is negative: choose 0 or more.")
        train = self._training_source()
        labels = train.labels() if self.balanced else None
        order = SampleOrder(len(train), self.repeats, steps_per_epoch * batch_size, seed, labels)
        chunks = Chunks(batch_size // process_count, process_index, process_count, start_step, num_steps)
        return self._stream(chunks, train_rows(train, self.train_crop, self.image_size, self.channels, order))

    def eval_batches(
        self, batch_size: int, *, process_index: int = 0, process_count: int = 1
    ) -> Generator[Batch, None, None]:
        """Makes this process's rows of the evaluation batches: every image of the split once, in order.

        All processes get the same number of batches of ceil(batch_size / process_count) rows. The rows beyond the last
        image are zeros with mask False, and so is the row of an image that cannot be decoded.

        Returns:
          A generator, to be closed (`close()`) where it is left early, of dicts: image uint8 [b, H, W, C], label int32
          [b], float32 [b, K] or uint8 [b, H, W, N] (see `maxmap.data.paired.eval_pair`), mask bool [b], index int64 [b]
          (in the evaluation split; -1: no image), skipped int64 [b] (the index where the image is broken, else -1).

        Raises:
          UserError: there is no evaluation split, or the batch size is below 1.
        """
        if self.val is None:
            raise UserError("there is no evaluation data: set --config.data.val_split.")
        if batch_size < 1:
            raise UserError(f"batch size {batch_size} for evaluation is too small: choose at least 1.")
        local = -(-batch_size // process_count)
        num_steps = -(-len(self.val) // (local * process_count))
        chunks = Chunks(local, process_index, process_count, 0, num_steps)
        return self._stream(chunks, eval_rows(self.val, self.preprocessing, self.max_pixels))

    def _training_source(self) -> ImageSource:
        if self.train is None:
            raise UserError("there is no training data: set --config.data.train_split.")
        return self.train

    def _stream(self, chunks: Chunks, make_rows: Callable[[range], Batch]) -> Generator[Batch, None, None]:
        ahead = max(self.threads, _PREFETCH * chunks.per_batch)
        data = grain.MapDataset.source(chunks).map(make_rows)
        data = data.to_iter_dataset(grain.ReadOptions(num_threads=self.threads, prefetch_buffer_size=ahead))
        if self.workers:
            _let_grain_read_its_flags()
            # Before batching: a worker takes every workers-th element, which has to be a chunk.
            data = data.mp_prefetch(
                grain.MultiprocessingOptions(num_workers=self.workers, per_worker_buffer_size=-(-ahead // self.workers))
            )
        return _closing(iter(data.batch(chunks.per_batch, drop_remainder=True, batch_fn=_concatenate)))


def _open_splits(
    open_split: Callable[..., ImageSource],
    train_split: str | None,
    val_split: str | None,
    classes: Sequence[str] | None,
) -> tuple[ImageSource | None, ImageSource | None]:
    """Opens both splits, with the classes of the training split for both."""
    if train_split is None and val_split is None:
        raise UserError("neither --config.data.train_split nor --config.data.val_split is set: set at least one.")
    train = val = None
    if train_split is not None:
        train = open_split(train_split, classes=classes)
        classes = train.classes
    if val_split is not None:
        val = open_split(val_split, classes=classes)
    return train, val


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
