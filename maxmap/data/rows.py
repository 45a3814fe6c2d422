"""How the rows of a batch are made: read, decoded and cropped, one image after the other.

The objects here go to threads and worker processes, so they can be pickled.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from PIL import Image

from maxmap.data import decode
from maxmap.data.labelled import ImageSource
from maxmap.data.order import SampleOrder
from maxmap.data.randaugment import RandAugment
from maxmap.data.randaugment_host import rand_augment_image
from maxmap.errors import UserError

Batch = dict[str, np.ndarray]
Label = int | np.ndarray

# So many broken images in a row have another cause, such as a disk that is gone.
_MOST_BROKEN = 100


@dataclasses.dataclass(frozen=True)
class TrainRows:
    """Makes the training rows at given positions of the order.

    Attributes:
      source: the training images.
      crop: makes of an image, its label and a random generator what the row has of them: uint8 [image_size, image_size,
        channels], and a label.
      empty: makes so many rows without content.
      order: which image and which generator belong to a position.
    """

    source: ImageSource
    crop: Callable[..., tuple[np.ndarray, Label]]
    empty: Callable[[int], Batch]
    order: SampleOrder

    def __call__(self, positions: range) -> Batch:
        rows = self.empty(len(positions))
        for row, position in enumerate(positions):
            image, label, index, skipped = self._sample(position)
            rows["image"][row] = image
            rows["label"][row] = label
            rows["index"][row] = index
            rows["skipped"][row] = skipped
        return rows

    def _sample(self, position: int) -> tuple[np.ndarray, Label, int, int]:
        """Returns crop, label and index of the sample, and the index of a broken image that it replaces, else -1."""
        skipped = -1
        for offset in range(_MOST_BROKEN):
            index = self.order.index(position + offset)
            try:
                image, label = self.source[index]
                return *self.crop(image, label, self.order.generator(position)), index, skipped
            except OSError:
                skipped = index if offset == 0 else skipped
        raise UserError(
            f"{_MOST_BROKEN} training images in a row cannot be read, from {self.source.name(skipped)} on: see "
            "whether the disk is still there, or check more files at the start with a larger --config.data.check."
        )


@dataclasses.dataclass(frozen=True)
class EvalRows:
    """Makes the evaluation rows of given indices; beyond the end of the split they are empty.

    Attributes:
      source: the evaluation images.
      crop: makes of an image and its label what the row has of them.
      empty: makes so many rows without content.
    """

    source: ImageSource
    crop: Callable[..., tuple[np.ndarray, Label]]
    empty: Callable[[int], Batch]

    def __call__(self, indices: range) -> Batch:
        rows = self.empty(len(indices))
        rows["mask"] = np.zeros(len(indices), bool)
        for row, index in enumerate(indices):
            if index >= len(self.source):
                break
            rows["index"][row] = index
            try:
                rows["image"][row], rows["label"][row] = self.crop(*self.source[index])
                rows["mask"][row] = True
            except OSError:
                rows["skipped"][row] = index
        return rows


def preprocessed_crop(
    image: bytes | np.ndarray | Image.Image, preprocessing: Mapping[str, Any], max_pixels: int
) -> np.ndarray:
    """Decodes and crops an image for evaluation, as `decode.eval_crop` with the settings of `Data.preprocessing`."""
    return decode.eval_crop(
        image,
        size=preprocessing["image_size"],
        crop_pct=preprocessing["crop_pct"],
        mode=preprocessing["crop_mode"],
        interpolation=preprocessing["interpolation"],
        mean=preprocessing["mean"],
        exif=preprocessing.get("exif", False),  # older checkpoints and those of others do not say
        max_pixels=max_pixels,
    )


def augmented_crop(
    image: bytes | np.ndarray,
    rng: np.random.Generator,
    *,
    crop: Callable[..., np.ndarray],
    policy: RandAugment,
    fill: tuple[int, ...],
) -> np.ndarray:
    """Crops an image for training and applies RandAugment to the crop."""
    return np.asarray(rand_augment_image(Image.fromarray(crop(image, rng)), rng, policy, fill))


def beside_label(image: Any, label: Label, *drawn: Any, crop: Callable[..., np.ndarray]) -> tuple[np.ndarray, Label]:
    """Crops an image, whose label is of the image as a whole; `drawn` is what else the crop takes."""
    return crop(image, *drawn), label


def empty_rows(num: int, *, image: tuple[int, ...], label: tuple[int, ...], dtype: np.typing.DTypeLike) -> Batch:
    """Returns rows without content, of images of a shape [H, W, C] and labels of a shape and type."""
    return {
        "image": np.zeros((num, *image), np.uint8),
        "label": np.zeros((num, *label), dtype),
        "index": np.full(num, -1, np.int64),
        "skipped": np.full(num, -1, np.int64),
    }
