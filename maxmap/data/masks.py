"""Images with masks, which give every pixel a class: `<path>/images/<split>/NAME.jpg`, `<path>/masks/<split>/NAME.png`.

A mask is a PNG of one channel, grey or with a palette, of the size of its image. Its values are the numbers of the
classes; 255 is a pixel that does not count. The names of the classes are the lines of `<path>/classes.txt`.
"""

import contextlib
import os
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from maxmap.classes import match, read_names
from maxmap.data.bands import open_bands
from maxmap.data.folders import Listing, image_files
from maxmap.data.images import MAX_PIXELS, broken_is_oserror, read_values, stated_png_size
from maxmap.data.labelled import ImageSource, LabelledImage
from maxmap.errors import UserError, printable, reason, shortened
from maxmap.metrics import IGNORED

IMAGES, CLASSES, ENDING = "images", "classes.txt", ".png"
MASK_FOLDERS = ("masks", "annotations")  # the second one is ADE20K's
_LOOKED_AT = 50  # masks in which several classes are looked for
_LAYOUT = (
    "give a folder with images/train/NAME.jpg and masks/train/NAME.png, the same for val, and classes.txt, with "
    "--config.data.path=<path>."
)


class MaskFiles(NamedTuple):
    """How the masks of a data set are stored.

    Attributes:
      folder: that lies beside 'images'; None for the first of `MASK_FOLDERS` that is there.
      reduce_zero_label: whether 0 is ignored and k + 1 stands for class k, as in ADE20K.
    """

    folder: str | None = None
    reduce_zero_label: bool = False


class MaskSource:
    """Image files and a mask for each, in folders of their own; see the top of this module."""

    label_shape: tuple[int, ...] | None = None
    numbered = False

    def __init__(
        self,
        path: str | os.PathLike | None,
        split: str,
        classes: Sequence[str] | None = None,
        files: MaskFiles | None = None,
    ):
        path, files = _require_folder(path), files or MaskFiles()
        self._images = _split_folder(path, IMAGES, split)
        self._masks = _split_folder(path, files.folder or _mask_folder(path), split)
        self._names = image_files(self._images, "folder").images
        exists = Listing(self._masks)
        missing = [name for name in self._names if not exists(_png(name))]
        if missing:
            raise UserError(
                f"{printable(os.path.join(self._images, missing[0]))} has no mask {printable(self._mask(missing[0]))} "
                f"({len(missing)} such): add it, or move the image away."
            )
        own = _class_names(path, classes)
        self.classes = tuple(classes or own)
        self._first = int(files.reduce_zero_label)  # value of the first class
        self._classes_of = np.full(IGNORED + 1, -1, np.int16)
        self._classes_of[self._first : self._first + len(own)] = match(own, self.classes, path, "the training split")
        self._classes_of[[*range(self._first), IGNORED]] = IGNORED

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, index: int) -> LabelledImage:
        with open(self.name(index), "rb") as file:
            image = file.read()
        with broken_is_oserror():
            size = open_bands(image, channels=3, exif=False, max_pixels=MAX_PIXELS).size
        name = self._mask(self._names[index])
        try:
            with open(name, "rb") as file:
                return LabelledImage(image, self._classes_in(read_values(file.read(), size)))
        except OSError as error:
            raise OSError(f"its mask {printable(name)}: {reason(error)}") from error

    def name(self, index: int) -> str:
        """Returns the path of the image."""
        return os.path.join(self._images, self._names[index])

    def labels(self) -> np.ndarray | None:
        return None

    def mask_sizes(self) -> np.ndarray:
        return np.array([stated_png_size(self._mask(name)) for name in self._names], np.int64)

    def _mask(self, name: str) -> str:
        return os.path.join(self._masks, _png(name))

    def _classes_in(self, values: np.ndarray) -> np.ndarray:
        """Maps the values of a mask to classes, uint8 `[H, W]`; OSError for a value of no class."""
        classes = self._classes_of[np.minimum(values, IGNORED)]
        wrong = (classes < 0) | (values > IGNORED)
        if wrong.any():
            last = self._first + int(np.sum((self._classes_of >= 0) & (self._classes_of < IGNORED))) - 1
            raise OSError(
                f"it has the value {values[wrong][0]}, and classes are {self._first} to {last}, of {CLASSES}, with "
                f"{IGNORED}{' and 0' if self._first else ''} for pixels that do not count"
            )
        return classes.astype(np.uint8)


def check_classes(train: ImageSource | None, val: ImageSource | None) -> None:
    """Raises UserError if training masks show one class alone, as masks of 0 and 255 do, or evaluation masks none."""
    for source, fewest, most in ((train, 2, _LOOKED_AT), (val, 1, None)):
        if source is None:
            continue
        found = np.zeros(IGNORED, bool)
        for index in np.unique(np.linspace(0, len(source) - 1, min(most or len(source), len(source))).astype(int)):
            with contextlib.suppress(OSError):  # it is counted when it is read
                found |= np.bincount(np.ravel(source[int(index)].label), minlength=IGNORED + 1)[:IGNORED] > 0
            if found.sum() >= fewest:
                break
        else:
            names = [source.classes[k] for k in np.flatnonzero(found)]
            raise UserError(
                f"the masks of {printable(source.name(0))} and other images show "
                f"{f'the class {printable(names[0])!r} alone' if names else 'no class'}, beside ignored pixels (value "
                f"{IGNORED}): number the classes 0, 1, 2, ... in the masks."
            )


def _png(name: str) -> str:
    """Returns the name of the mask of an image."""
    return os.path.splitext(name)[0] + ENDING


def _require_folder(path: str | os.PathLike | None) -> str:
    if path is None:
        raise UserError(f"no path to images and masks is set: {_LAYOUT}")
    path = os.path.expanduser(os.fspath(path))
    if not os.path.isdir(path):
        raise UserError(f"there is no folder {printable(path)}: {_LAYOUT}")
    return path


def _mask_folder(path: str) -> str:
    return next((name for name in MASK_FOLDERS if os.path.isdir(os.path.join(path, name))), MASK_FOLDERS[0])


def _split_folder(path: str, kind: str, split: str) -> str:
    folder = os.path.join(path, kind, split)
    if os.path.isdir(folder):
        return folder
    above = os.path.join(path, kind)
    if not os.path.isdir(above):
        raise UserError(f"folder {printable(path)} has no folder {kind!r}: {_LAYOUT}")
    present = shortened(", ".join(sorted(os.listdir(above))) or "nothing")
    raise UserError(
        f"folder {printable(above)} has no split {split!r}, only {present}: rename one, or name the splits with "
        "--config.data.train_split and --config.data.val_split."
    )


def _class_names(path: str, classes: Sequence[str] | None) -> Sequence[str]:
    """Returns the names of the classes in the order of their numbers; `classes` are those of the config."""
    file = os.path.join(path, CLASSES)
    written = os.path.exists(file)
    if not written and classes is None:
        raise UserError(
            f"there is no {printable(file)}: write the name of each class into it, a line each, in the order of the "
            "numbers in the masks."
        )
    names = read_names(file) if written or classes is None else classes
    if (count := max(len(names), len(classes or ()))) > IGNORED:
        raise UserError(f"{printable(file)} or the config names {count} classes, and masks have {IGNORED} at most.")
    return names
