"""The images of a folder, found by the folder reader of training: their splits and classes, and what is not read."""

import os
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from maxmap.data.folders import class_folders, holds_folders, image_files, split_folder
from maxmap.data.masks import IMAGES, MASK_FOLDERS
from maxmap.errors import UserError

SPLITS = ("train", "val", "valid", "validation", "test")  # names that folders of splits usually have


class Contents(NamedTuple):
    """The images of a folder.

    Attributes:
      folder: As the user named it.
      splits: Names of the splits; '' is the folder itself.
      roots: Folder of each split.
      classes: Names of the class folders of all splits, sorted.
      files: Path of each image below the folder of its class.
      split: Number of the split of each image, int32 [N].
      label: Number of the class of each image, int32 [N].
      ignored: Paths of files that are no images.
      refused: One sentence for each class folder that training refuses; its images are not among the others.
    """

    folder: str
    splits: list[str]
    roots: list[str]
    classes: list[str]
    files: list[str]
    split: np.ndarray
    label: np.ndarray
    ignored: list[str]
    refused: list[str]

    def path(self, index: int) -> str:
        """Returns the path of an image."""
        return os.path.join(self.roots[self.split[index]], self.classes[self.label[index]], self.files[index])


def read_contents(folder: str, splits: Sequence[str] = ()) -> Contents:
    """Finds the images of a folder.

    Args:
      folder: With a folder for each split, or with class folders.
      splits: Names of the splits; none: those of `SPLITS` that are there, if one of them is train or val, else the
        folder itself.

    Raises:
      UserError: There is no such folder or split, it holds no class folders, or images lie beside them; or it holds
        images and masks.
    """
    if not os.path.isdir(folder):
        raise UserError(
            f"there is no folder {folder}: give one with train/CLASS/ and val/CLASS/, or with CLASS/ alone."
        )
    for masks in MASK_FOLDERS:
        if all(holds_folders(os.path.join(folder, name)) for name in (IMAGES, masks)):
            raise UserError(
                f"{folder} has {IMAGES} and {masks}, and check is for folders of classes: `maxmap show-batch "
                f"--config=segmentation:own --config.data.path={folder}` reads them as training does."
            )
    if splits:
        roots = {name: split_folder(folder, name) for name in dict.fromkeys(splits)}
    else:
        roots = {name: os.path.join(folder, name) for name in SPLITS if holds_folders(os.path.join(folder, name))}
        if not {"train", "val"} & roots.keys():
            roots = {"": folder}
    own = [class_folders(root) for root in roots.values()]
    classes = sorted(set().union(*own))
    number = {name: i for i, name in enumerate(classes)}
    files: list[str] = []
    places: list[tuple[int, int, int]] = []  # split, class, images
    ignored, refused = [], []
    for split, (root, names) in enumerate(zip(roots.values(), own, strict=True)):
        for name in names:
            below = os.path.join(root, name)
            try:
                found = image_files(below)
            except UserError as error:
                refused.append(str(error))
                continue
            files += found.images
            places.append((split, number[name], len(found.images)))
            ignored += [os.path.join(below, file) for file in found.left_out]
    table = np.array(places, np.int32).reshape(-1, 3)
    split_of, label = (np.repeat(table[:, column], table[:, 2]) for column in (0, 1))
    return Contents(folder, list(roots), list(roots.values()), classes, files, split_of, label, ignored, refused)
