"""A source seen otherwise: with labels of another order, or a part of its images."""

import dataclasses
from typing import cast

import numpy as np

from maxmap.data.labelled import ImageSource, LabelledImage, MaskedImages
from maxmap.errors import UserError
from maxmap.metrics import IGNORED


@dataclasses.dataclass
class Relabelled:
    """A source whose labels follow the order of other classes, which may be more.

    Attributes:
      source: The images.
      classes: In the order of the new labels.
      labels_of: For each label of the source the new one.
    """

    source: ImageSource
    classes: tuple[str, ...]
    labels_of: np.ndarray
    numbered: bool = False

    @property
    def label_shape(self) -> tuple[int, ...] | None:
        return (len(self.classes),) if self.source.label_shape else self.source.label_shape

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> LabelledImage:
        image, label = self.source[index]
        if self.label_shape is None:
            numbers = np.full(IGNORED + 1, IGNORED, np.uint8)
            numbers[: len(self.labels_of)] = self.labels_of
            return LabelledImage(image, numbers[label])
        return LabelledImage(
            image, self._relabelled(np.asarray(label)) if self.label_shape else int(self.labels_of[label])
        )

    def name(self, index: int) -> str:
        return self.source.name(index)

    def labels(self) -> np.ndarray | None:
        own = self.source.labels()
        if own is None:
            return None
        return self._relabelled(own) if self.label_shape else self.labels_of[own]

    def mask_sizes(self) -> np.ndarray:
        return cast(MaskedImages, self.source).mask_sizes()

    def _relabelled(self, own: np.ndarray) -> np.ndarray:
        """Moves the columns of labels `[..., K]`; those of classes that the source does not have are 0."""
        labels = np.zeros((*own.shape[:-1], len(self.classes)), own.dtype)
        labels[..., self.labels_of] = own
        return labels


@dataclasses.dataclass
class Part:
    """Some images of a source, in its order.

    Attributes:
      source: All images.
      indices: Those of the part, int `[N]`.
    """

    source: ImageSource
    indices: np.ndarray

    @property
    def classes(self) -> tuple[str, ...]:
        return self.source.classes

    @property
    def numbered(self) -> bool:
        return self.source.numbered

    @property
    def label_shape(self) -> tuple[int, ...] | None:
        return self.source.label_shape

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> LabelledImage:
        return self.source[int(self.indices[index])]

    def name(self, index: int) -> str:
        return self.source.name(int(self.indices[index]))

    def labels(self) -> np.ndarray | None:
        own = self.source.labels()
        return None if own is None else own[self.indices]

    def mask_sizes(self) -> np.ndarray:
        return cast(MaskedImages, self.source).mask_sizes()[self.indices]


def divide(source: ImageSource, folds: int, fold: int, seed: int) -> tuple[Part, Part]:
    """Divides images into as many folds as for cross-validation.

    The folds differ by one image at most, in all and, where each image has one class, in every class.

    Args:
      source: All images.
      folds: How many folds.
      fold: Which of them is the second part, from 0.
      seed: Of the draw, which is the same for every fold.

    Returns:
      The images of the other folds, and those of this one.

    Raises:
      UserError: There is no such fold, or there are fewer images than folds.
    """
    if fold >= folds:
        raise UserError(f"data.fold is {fold}: give one of the folds, from 0 to {folds - 1}.")
    if len(source) < folds:
        raise UserError(f"there are {len(source)} training images for data.folds={folds}: give fewer folds.")
    order = np.random.RandomState(seed).permutation(len(source))  # whose streams never change with NumPy's version
    labels = source.labels()
    if labels is not None and labels.ndim == 1:
        order = order[np.argsort(labels[order], kind="stable")]
    numbers = np.empty(len(source), np.int64)
    numbers[order] = np.arange(len(source)) % folds
    return Part(source, np.flatnonzero(numbers != fold)), Part(source, np.flatnonzero(numbers == fold))
