"""What a source of labelled images has, whatever kind of data set it reads."""

from typing import NamedTuple, Protocol

import numpy as np


class LabelledImage(NamedTuple):
    """The bytes of an image file or a uint8 array [H, W, C], and its label.

    That is the number of its class, a row of K numbers, or a mask: uint8 [H, W], the class of every pixel.
    """

    image: bytes | np.ndarray
    label: int | np.ndarray


class ImageSource(Protocol):
    """Labelled images by index; picklable, and safe to read from several threads."""

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the classes, or of the K numbers."""
        ...

    @property
    def numbered(self) -> bool:
        """Whether the classes have no names, only numbers."""
        ...

    @property
    def label_shape(self) -> tuple[int, ...] | None:
        """() where a label is the number of a class, (K,) where it is a row of numbers, None where it is a mask."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> LabelledImage: ...

    def name(self, index: int) -> str:
        """Returns what to call an image in a message: its path, or `digits/train[12]`."""
        ...

    def labels(self) -> np.ndarray | None:
        """Returns the labels of all images, int `[N]` or float `[N, K]`; None if each has to be read for its own."""
        ...


class MaskedImages(ImageSource, Protocol):
    """Images with masks."""

    def mask_sizes(self) -> np.ndarray:
        """Returns width and height of every mask, int64 `[N, 2]`; 0 for one that cannot be read."""
        ...
