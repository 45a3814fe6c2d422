"""Labelled images by index, of six kinds of data set.

They are a folder for each class, tar archives, CSV files, scikit-learn's digits, TFDS's data sets, read without
TensorFlow, and folders of images and masks (`maxmap.data.masks`). All but the CSV files and the masks give each image
one class.
"""

import contextlib
import os
import sys
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from maxmap.classes import match, read_names
from maxmap.data.archives import TarMember, TFRecords, read_at, require_tar_files, tar_members
from maxmap.data.folders import class_folders, image_files, is_image, split_folder
from maxmap.data.images import IMAGE_ENDINGS
from maxmap.data.labelled import ImageSource, LabelledImage
from maxmap.data.masks import MaskFiles, MaskSource
from maxmap.data.tables import Columns, read_table
from maxmap.data.tfds_folders import check_prepared, damaged_is_user_error, open_builder, resolve_split
from maxmap.errors import UserError, nearest, reason, shortened

SOURCES = ("csv", "digits", "folder", "masks", "tar", "tfds")

# So many classes have no names of their own: a .cls that states more is damaged, and one that is longer too.
_MOST_UNNAMED_CLASSES, _LONGEST_LABEL = 1_000_000, 32


def open_source(
    source: str,
    path: str | os.PathLike | None = None,
    split: str = "train",
    *,
    name: str | None = None,
    classes: Sequence[str] | None = None,
    verify: bool = True,
    task: str = "single_label",
    columns: Columns | None = None,
    masks: MaskFiles | None = None,
) -> ImageSource:
    """Opens one split of a data set.

    Args:
      source: kind of data set, one of `SOURCES`.
      path: folder that holds `<split>/<class>/*.jpg` ('folder'), `<split>*.tar` ('tar') or `<split>.csv` ('csv'); for
        'csv' also a file with a column that names splits; the data_dir of 'tfds', where None is TFDS's own.
      split: name of the split; for 'tfds' also a slice such as 'train[:10%]', for 'tar' also a single archive.
      name: name of a TFDS data set, such as 'imagenet2012' or 'cifar10'.
      classes: class names in the order of the labels; None: those of this split, in the source's order.
      verify: whether to check the checksums of TFRecord files.
      task: how the images are labelled, a key of `maxmap.tasks.TASKS`: 'segmentation' is for 'masks' only, all others
        but 'single_label' for 'csv' only.
      columns: of a CSV file.
      masks: how masks are stored; None for the usual way.

    Raises:
      UserError: the source is unknown, or the split is missing, empty or malformed.
    """
    if (source == "masks") != (task == "segmentation") and source in SOURCES:
        raise UserError(
            f"config.data.source is {source!r} and config.data.task is {task!r}, and masks are labels of pixels: set "
            "--config.data.source=masks with --config.data.task=segmentation, or neither."
        )
    if source == "masks":
        return MaskSource(path, split, classes, masks)
    if source == "csv":
        if columns is None:
            raise UserError("data source 'csv' needs the names of its columns: give columns.")
        return CsvSource(path, split, task, columns, classes)
    if task != "single_label" and source in SOURCES:
        raise UserError(
            f"data source {source!r} gives each image one class, and config.data.task is {task!r}: label the images in "
            "a CSV file, --config.data.source=csv."
        )
    if source == "folder":
        return FolderSource(path, split, classes)
    if source == "tar":
        return TarSource(path, split, classes)
    if source == "tfds":
        return TfdsSource(name, path, split, classes, verify)
    if source == "digits":
        return DigitsSource(split, classes)
    raise UserError(
        f"unknown data source {source!r} (--config.data.source): did you mean {nearest(source, SOURCES, 1)!r}? "
        f"Known are {', '.join(SOURCES)}."
    )


class _Names:
    """Many names, kept as one blob of bytes and their ends.

    ImageNet has 1.28 million names. This takes a tenth of the memory of a list, pickles at once and gives the garbage
    collector nothing to do.
    """

    def __init__(self, names: Iterable[str]):
        encoded = [os.fsencode(name) for name in names]
        self._bytes = b"".join(encoded)
        self._ends = np.cumsum(np.fromiter(map(len, encoded), np.int64, len(encoded)))

    def __getitem__(self, index: int) -> str:
        start = self._ends[index - 1] if index else 0
        return os.fsdecode(self._bytes[start : self._ends[index]])


class FolderSource:
    """Image files in one folder per class, `<path>/<split>/<class>/**/<file>`; classes are sorted by name."""

    label_shape: tuple[int, ...] = ()

    def __init__(self, path: str | os.PathLike | None, split: str, classes: Sequence[str] | None = None):
        self._root = split_folder(path, split)
        own_classes = class_folders(self._root)
        labels = _class_labels(own_classes, classes, self._root)
        self.numbered = False
        self.classes = tuple(classes or own_classes)
        names, counts, left_out = [], [], []
        for own_class in own_classes:
            found = image_files(os.path.join(self._root, own_class))
            names += [os.path.join(own_class, file) for file in found.images]
            left_out += [os.path.join(own_class, file) for file in found.left_out]
            counts.append(len(found.images))
        if left_out:
            _tell_left_out(self._root, left_out)
        self._names = _Names(names)
        self._labels = np.repeat(labels, counts)

    def __len__(self) -> int:
        return len(self._labels)

    def labels(self) -> np.ndarray | None:
        return self._labels

    def __getitem__(self, index: int) -> LabelledImage:
        with open(self.name(index), "rb") as file:
            return LabelledImage(file.read(), int(self._labels[index]))

    def name(self, index: int) -> str:
        """Returns the path of the file."""
        return os.path.join(self._root, self._names[index])


class CsvSource:
    """Image files that a CSV file lists and labels, in its order; see `maxmap.data.tables`."""

    numbered = False

    def __init__(
        self,
        path: str | os.PathLike | None,
        split: str,
        task: str,
        columns: Columns,
        classes: Sequence[str] | None = None,
    ):
        table = read_table(path, split, task, columns, classes)
        if classes is not None and table.classes != tuple(classes):
            raise UserError("data.classes is set, and data.label_columns names the outputs already: leave it out.")
        self.classes, self._labels = table.classes, table.labels
        self.label_shape = self._labels.shape[1:]
        self._folder, self._names = table.folder, _Names(table.names)

    def __len__(self) -> int:
        return len(self._labels)

    def labels(self) -> np.ndarray | None:
        return self._labels

    def __getitem__(self, index: int) -> LabelledImage:
        label = self._labels[index]
        with open(self.name(index), "rb") as file:
            return LabelledImage(file.read(), label if self.label_shape else int(label))

    def name(self, index: int) -> str:
        """Returns the path of the file."""
        return os.path.join(self._folder, self._names[index])


class TarSource:
    """Image files in uncompressed tar archives, `<path>/<split>*.tar` or `<path>/<split>/*.tar`, of one of two kinds.

    In a plain archive the folder that a file lies in is its class, `<class>/<file>.jpg` with any folders around it.
    In a WebDataset archive a `.cls` file of the same name lies beside each image and holds the number of its class. The
    class names are the lines of `<path>/classes.txt`, else the numbers.

    The headers are read once, at a few seconds for a million files; the images keep the order of the archives.
    """

    label_shape: tuple[int, ...] = ()

    def __init__(self, path: str | os.PathLike | None, split: str, classes: Sequence[str] | None = None):
        self._tars = require_tar_files(path, split)
        members = [(number, member) for number, tar in enumerate(self._tars) for member in tar_members(tar)]
        members = [(number, m) for number, m in members if not os.path.basename(m.name).startswith(".")]
        images = [(number, m) for number, m in members if is_image(m.name)]
        if not images:
            raise UserError(f"{self._where()} holds no images: their names should end in {' '.join(IMAGE_ENDINGS)}.")
        label_files = {(number, _sample_key(m.name)): m for number, m in members if m.name.endswith(".cls")}
        if label_files:
            labels = [self._read_label(number, m, label_files) for number, m in images]
            own_classes = _read_class_names(path)
            self.numbered = own_classes is None and not classes
            if own_classes is None:
                own_classes = list(classes or map(str, range(max(labels) + 1)))
            self._check_labels(images, labels, len(own_classes))
            self.classes = tuple(classes or own_classes)
            self._labels = _class_labels(own_classes, classes, f"{path}/classes.txt")[labels]
        else:
            folders = self._class_folders(images)
            own_classes, self.numbered = sorted(set(folders)), False
            label_of = dict(zip(own_classes, _class_labels(own_classes, classes, self._where()), strict=True))
            self.classes = tuple(classes or own_classes)
            self._labels = np.array([label_of[folder] for folder in folders], np.int32)
        self._tar = np.array([number for number, _ in images], np.int32)
        self._offset = np.array([m.offset for _, m in images], np.int64)
        self._size = np.array([m.size for _, m in images], np.int64)
        self._names = _Names(m.name for _, m in images)

    def __len__(self) -> int:
        return len(self._labels)

    def labels(self) -> np.ndarray | None:
        return self._labels

    def __getitem__(self, index: int) -> LabelledImage:
        tar = self._tars[self._tar[index]]
        return LabelledImage(read_at(tar, int(self._offset[index]), int(self._size[index])), int(self._labels[index]))

    def name(self, index: int) -> str:
        """Returns the archive and the name in it, for example `train-000.tar/n01440764/1.JPEG`."""
        return f"{self._tars[self._tar[index]]}/{self._names[index]}"

    def _where(self) -> str:
        return f"{self._tars[0]}{', ...' if len(self._tars) > 1 else ''}"

    def _read_label(self, number: int, image: TarMember, label_files: dict[tuple[int, str], TarMember]) -> int:
        member = label_files.get((number, _sample_key(image.name)))
        if member is None:
            raise UserError(f"{image.name} in {self._tars[number]} has no .cls beside it: add one, or leave it out.")
        text = read_at(self._tars[number], member.offset, min(member.size, _LONGEST_LABEL)).strip()
        if not text.isdigit() or member.size > _LONGEST_LABEL or int(text) >= _MOST_UNNAMED_CLASSES:
            raise UserError(
                f"{member.name} in {self._tars[number]} holds {text!r}, which is no class number from 0 to "
                f"{_MOST_UNNAMED_CLASSES - 1}: correct it."
            )
        return int(text)

    def _check_labels(self, images: Sequence[tuple[int, TarMember]], labels: Sequence[int], count: int) -> None:
        for (number, image), label in zip(images, labels, strict=True):
            if label >= count:
                raise UserError(
                    f"{image.name} in {self._tars[number]} has the label {label}, but there are {count} "
                    f"classes, 0 to {count - 1}: correct the label or the class names."
                )

    def _class_folders(self, images: Sequence[tuple[int, TarMember]]) -> list[str]:
        folders = [os.path.basename(os.path.dirname(image.name)) for _, image in images]
        if "" in folders:
            number, image = images[folders.index("")]
            raise UserError(
                f"{image.name} in {self._tars[number]} lies in no folder, which would be its class, and has no .cls "
                "beside it: pack the images by class, or as WebDataset."
            )
        return folders


class DigitsSource:
    """scikit-learn's 1797 handwritten digits, 8x8 px as RGB; a fixed fifth of them is 'val'."""

    label_shape: tuple[int, ...] = ()

    def __init__(self, split: str, classes: Sequence[str] | None = None):
        from sklearn.datasets import load_digits  # a second to import, and only the demo needs it

        if split not in ("train", "val"):
            raise UserError(f"the digits have no split {split!r}: they have 'train' and 'val'.")
        digits = load_digits()
        held_out = -(-len(digits.target) // 5)
        # RandomState's streams never change with NumPy's version, so the split is the same everywhere.
        order = np.random.RandomState(0).permutation(len(digits.target))
        chosen = order[:held_out] if split == "val" else order[held_out:]
        own_classes = tuple(str(name) for name in digits.target_names)
        grey = np.round(digits.images[chosen] * (255 / 16)).astype(np.uint8)
        self.classes = tuple(classes or own_classes)
        self.numbered = False
        self._split = split
        self._images = np.repeat(grey[..., None], 3, axis=-1)  # [N, 8, 8, 3]
        self._labels = _class_labels(own_classes, classes, f"digits/{split}")[digits.target[chosen]]

    def __len__(self) -> int:
        return len(self._labels)

    def labels(self) -> np.ndarray | None:
        return self._labels

    def __getitem__(self, index: int) -> LabelledImage:
        return LabelledImage(self._images[index], int(self._labels[index]))

    def name(self, index: int) -> str:
        """Returns for example `digits/train[12]`."""
        return f"digits/{self._split}[{index}]"


class TfdsSource:
    """A TFDS image-classification set prepared as array_record, Parquet or TFRecord, read without TensorFlow.

    All are read by index, so every promise about the order of training holds for all. Images stay encoded until a
    thread decodes them. A data set without a split 'val' gives its split 'validation' or 'test' under that name.
    """

    label_shape: tuple[int, ...] = ()

    def __init__(
        self,
        name: str | None,
        path: str | os.PathLike | None,
        split: str,
        classes: Sequence[str] | None = None,
        verify: bool = True,
    ):
        if not name:
            raise UserError("data source 'tfds' needs the data set's name, for example --config.data.name=imagenette.")
        try:
            import tensorflow_datasets as tfds
        except ImportError as error:
            raise UserError(
                "data source 'tfds' needs the package tensorflow-datasets: "
                "`pip install tensorflow-datasets` (TensorFlow itself is not needed)."
            ) from error
        data_dir = None if path is None else os.path.expanduser(path)
        with damaged_is_user_error(name):
            builder = open_builder(name, data_dir)
            check_prepared(builder, name, data_dir)
            features = dict(builder.info.features.items())
            if not (
                isinstance(features.get("image"), tfds.features.Image)
                and isinstance(features.get("label"), tfds.features.ClassLabel)
            ):
                raise UserError(
                    f"TFDS data set {name!r} is no image-classification set: it needs features 'image' and 'label', "
                    f"and has {shortened(', '.join(sorted(features)))}."
                )
            self._split = resolve_split(split, list(builder.info.splits))
            self._data = self._open(builder, name, split, verify)
            own_classes = tuple(features["label"].names)
            self.numbered = False
            self.classes = tuple(classes or own_classes)
            self._name = name
            self._labels = _class_labels(own_classes, classes, f"TFDS data set {name!r}")
        self._check_labelled()

    def _open(self, builder: Any, name: str, split: str, verify: bool) -> Any:
        """Returns the examples of the split by index."""
        import tensorflow_datasets as tfds

        try:
            found = builder.info.splits[self._split]
        except ValueError as error:
            raise UserError(
                f"TFDS data set {name!r} has no split {split!r}: it has {shortened(', '.join(builder.info.splits))}."
            ) from error
        if not found.num_examples:
            raise UserError(f"the split {split!r} of TFDS data set {name!r} holds no images: choose another.")
        if builder.info.file_format.value == "tfrecord":
            return TFRecords(found.file_instructions, verify)
        return builder.as_data_source(self._split, decoders={"image": tfds.decode.SkipDecoding()})

    def __len__(self) -> int:
        return len(self._data)

    def labels(self) -> np.ndarray | None:
        return None

    def __getitem__(self, index: int) -> LabelledImage:
        image, label = self._read(index)
        if not 0 <= label < len(self._labels):
            raise OSError(f"{self.name(index)} has the label {label}, and there are {len(self._labels)} classes")
        return LabelledImage(image, int(self._labels[label]))

    def _read(self, index: int) -> LabelledImage:
        """Reads an example with its own label."""
        try:
            example = self._data[int(index)]
            return LabelledImage(example["image"], int(example["label"]))
        except Exception as error:  # each format has errors of its own for a damaged file
            raise OSError(f"{self.name(index)} cannot be read: {reason(error)}") from error

    def _check_labelled(self) -> None:
        """Raises UserError if the labels are -1, which is how TFDS marks a split that has none."""
        for index in {0, len(self) // 2, len(self) - 1}:
            with contextlib.suppress(OSError):  # it is counted when it is read
                if self._read(index).label == -1:
                    raise UserError(
                        f"the split {self._split!r} of TFDS data set {self._name!r} has no labels "
                        f"({self.name(index)} has -1): choose another with --config.data.train_split or "
                        "--config.data.val_split."
                    )

    def name(self, index: int) -> str:
        """Returns for example `imagenet2012/validation[12]`."""
        return f"{self._name}/{self._split}[{index}]"


def _class_labels(own_classes: Sequence[str], classes: Sequence[str] | None, where: str) -> np.ndarray:
    """Returns the label of each class of a source: its index in `classes` where they are given, else its own."""
    return match(own_classes, own_classes if classes is None else classes, where, "the training split")


def _tell_left_out(root: str, names: Sequence[str]) -> None:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    print(
        f"maxmap: {len(names)} entries of {root} are no images and left out: {', '.join(names[:3])}{more}.",
        file=sys.stderr,
    )


def _sample_key(name: str) -> str:
    """Returns WebDataset's key of a file, which the files of a sample share: its name up to the first dot."""
    folder, file = os.path.split(name)
    return os.path.join(folder, file.split(".")[0])


def _read_class_names(path: str | os.PathLike | None) -> list[str] | None:
    """Returns the class names in `<path>/classes.txt`; None if there is no such file."""
    file = os.path.join(os.path.expanduser(os.fspath(path or "")), "classes.txt")
    return read_names(file) if os.path.exists(file) else None
