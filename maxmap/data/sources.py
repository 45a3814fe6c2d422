"""Labelled images by index: a folder per class, tar archives, scikit-learn's digits, or TFDS without TensorFlow."""

import glob
import os
from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

import numpy as np

from maxmap.data.archives import Member, parse_example, read_at, record_positions, tar_members
from maxmap.errors import UserError, nearest

SOURCES = ("digits", "folder", "tar", "tfds")

IMAGE_ENDINGS = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".avif", ".gif"),
    *(".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm", ".jp2"),
)

_WAYS = (
    "give a folder tree <path>/train/<class>/*.jpg and <path>/val/<class>/*.jpg with --config.data.path=<path>, or a "
    "TFDS data set with --config.data.source=tfds --config.data.name=<name>, or try `make demo`, which needs no data"
)


class Record(NamedTuple):
    """One labelled image: the bytes of an image file or a uint8 array [H, W, C], and its class number."""

    image: bytes | np.ndarray
    label: int


class Source(Protocol):
    """Labelled images by index; picklable, and safe to read from several threads."""

    classes: tuple[str, ...]

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Record: ...

    def name(self, index: int) -> str:
        """Returns what to call an image in a message: its path, or `digits/train[12]`."""
        ...


def open_source(
    source: str,
    path: str | os.PathLike | None = None,
    split: str = "train",
    *,
    name: str | None = None,
    classes: Sequence[str] | None = None,
) -> Source:
    """Opens one split of a data set.

    Args:
        source: 'folder', 'tar', 'tfds' or 'digits'.
        path: folder: the folder that holds `<split>/<class>/*.jpg`. tar: the folder that
            holds `<split>*.tar`. tfds: the data_dir (None: TFDS's own).
        split: the split's name; of a TFDS data set also a slice such as 'train[:10%]'.
        name: the TFDS data set, such as 'imagenet2012' or 'cifar10'.
        classes: the class names in the order of the labels; None: those of this split, in the source's order.

    Raises:
        UserError: the source is unknown, or the split is missing, empty or malformed.
    """
    if source == "folder":
        return FolderSource(path, split, classes)
    if source == "tar":
        return TarSource(path, split, classes)
    if source == "tfds":
        return TfdsSource(name, path, split, classes)
    if source == "digits":
        return DigitsSource(split, classes)
    raise UserError(
        f"unknown data source {source!r} (--config.data.source): did you mean {nearest(source, SOURCES, 1)!r}? "
        f"Known are {', '.join(SOURCES)}"
    )


class FolderSource:
    """Image files in one folder per class, `<path>/<split>/<class>/**/<file>`; classes are sorted by name."""

    def __init__(self, path: str | os.PathLike | None, split: str, classes: Sequence[str] | None = None):
        self._root = _split_folder(path, split)
        own = _class_folders(self._root)
        labels = _labels(own, classes, self._root)
        self.classes = tuple(classes or own)
        # ImageNet is 1.28 million names: one blob of bytes and two arrays take a tenth of what a list of
        # strings takes, cost the garbage collector nothing and pickle at once.
        names, counts = [], []
        for own_class in own:
            files = sorted(_image_files(os.path.join(self._root, own_class)))
            if not files:
                raise UserError(
                    f"class folder {os.path.join(self._root, own_class)} holds no images: add some or remove the folder"
                )
            names += [os.fsencode(os.path.join(own_class, file)) for file in files]
            counts.append(len(files))
        self._names = b"".join(names)
        self._ends = np.cumsum(np.fromiter(map(len, names), np.int64, len(names)))
        self._labels = np.repeat(labels, counts)

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> Record:
        with open(self.name(index), "rb") as file:
            return Record(file.read(), int(self._labels[index]))

    def name(self, index: int) -> str:
        """Returns the path of the file."""
        start = self._ends[index - 1] if index else 0
        return os.path.join(self._root, os.fsdecode(self._names[start : self._ends[index]]))


class TarSource:
    """Image files in uncompressed tar archives, `<path>/<split>*.tar` or `<path>/<split>/*.tar`, of one of two kinds.

    Plain: the folder that a file lies in is its class, `<class>/<file>.jpg` with any folders around it.
    WebDataset: files of the same name and other endings belong together, an image and a `.cls` with its number. The
    class names are the lines of `<path>/classes.txt`, else the numbers.

    The headers are read once, at a few seconds for a million files; the order of the images is that in the archives.
    """

    def __init__(self, path: str | os.PathLike | None, split: str, classes: Sequence[str] | None = None):
        self._tars = _tar_files(path, split)
        folder = os.path.expanduser(os.fspath(path or ""))
        members = [(number, member) for number, tar in enumerate(self._tars) for member in tar_members(tar)]
        members = [(number, m) for number, m in members if not os.path.basename(m.name).startswith(".")]
        images = [(number, m) for number, m in members if _is_image(m.name)]
        where = f"{self._tars[0]}{', ...' if len(self._tars) > 1 else ''}"
        if not images:
            raise UserError(f"{where} holds no images: their names should end in {' '.join(IMAGE_ENDINGS)}")
        numbers = {(number, _stem(m.name)): m for number, m in members if m.name.endswith(".cls")}
        if numbers:
            given = [self._number(number, m, numbers) for number, m in images]
            own = _class_names(folder, max(given) + 1)
            self.classes = tuple(classes or own)
            bad = next((i for i, label in enumerate(given) if not 0 <= label < len(self.classes)), None)
            if bad is not None:
                raise UserError(
                    f"{images[bad][1].name} in {self._tars[images[bad][0]]} has the label {given[bad]}, but there are "
                    f"{len(self.classes)} classes, 0 to {len(self.classes) - 1}: correct the label or the class names"
                )
            self._labels = np.array(given, np.int32)
        else:
            folders = [os.path.basename(os.path.dirname(m.name)) for _, m in images]
            if "" in folders:
                raise UserError(
                    f"{images[folders.index('')][1].name} in {where} lies in no folder, which would be its class, and "
                    "has no .cls beside it: pack the images by class, or as WebDataset"
                )
            found = sorted(set(folders))
            of = dict(zip(found, _labels(found, classes, where), strict=True))
            self.classes = tuple(classes or found)
            self._labels = np.array([of[name] for name in folders], np.int32)
        self._tar = np.array([number for number, _ in images], np.int32)
        self._offset = np.array([m.offset for _, m in images], np.int64)
        self._size = np.array([m.size for _, m in images], np.int64)
        self._names = b"".join(os.fsencode(m.name) for _, m in images)
        self._ends = np.cumsum([len(os.fsencode(m.name)) for _, m in images])

    def _number(self, number: int, image: Member, numbers: dict[tuple[int, str], Member]) -> int:
        member = numbers.get((number, _stem(image.name)))
        if member is None:
            raise UserError(f"{image.name} in {self._tars[number]} has no .cls beside it: add one, or leave it out")
        text = read_at(self._tars[number], member.offset, member.size).strip()
        if not text.isdigit():
            raise UserError(
                f"{member.name} in {self._tars[number]} holds {text!r}, which is no class number: correct it"
            )
        return int(text)

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> Record:
        tar = self._tars[self._tar[index]]
        return Record(read_at(tar, int(self._offset[index]), int(self._size[index])), int(self._labels[index]))

    def name(self, index: int) -> str:
        """Returns the archive and the name in it, for example `train-000.tar/n01440764/1.JPEG`."""
        start = self._ends[index - 1] if index else 0
        return f"{self._tars[self._tar[index]]}/{os.fsdecode(self._names[start : self._ends[index]])}"


class DigitsSource:
    """scikit-learn's 1797 handwritten digits, 8x8 px as RGB; a fixed fifth of them is 'val'."""

    def __init__(self, split: str, classes: Sequence[str] | None = None):
        from sklearn.datasets import load_digits  # a second to import, and only the demo needs it

        if split not in ("train", "val"):
            raise UserError(f"the digits have no split {split!r}: they have 'train' and 'val'")
        digits = load_digits()
        held_out = -(-len(digits.target) // 5)
        # RandomState's streams never change with NumPy's version, so the split is the same everywhere.
        order = np.random.RandomState(0).permutation(len(digits.target))
        chosen = order[:held_out] if split == "val" else order[held_out:]
        own = tuple(str(name) for name in digits.target_names)
        grey = np.round(digits.images[chosen] * (255 / 16)).astype(np.uint8)
        self.classes = tuple(classes or own)
        self._split = split
        self._images = np.repeat(grey[..., None], 3, axis=-1)  # [N, 8, 8, 3]
        self._labels = _labels(own, classes, f"digits/{split}")[digits.target[chosen]]

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> Record:
        return Record(self._images[index], int(self._labels[index]))

    def name(self, index: int) -> str:
        """Returns for example `digits/train[12]`."""
        return f"digits/{self._split}[{index}]"


class TfdsSource:
    """A TFDS image-classification set prepared as array_record or TFRecord, read without TensorFlow.

    Both are read by index, so every promise about the order of training holds for both.

    Images stay encoded until a worker decodes them. Split 'val' stands for 'validation' or 'test', whichever the
    data set has.
    """

    def __init__(
        self,
        name: str | None,
        path: str | os.PathLike | None,
        split: str,
        classes: Sequence[str] | None = None,
    ):
        if not name:
            raise UserError("data source 'tfds' needs the data set's name, for example --config.data.name=imagenette")
        try:
            import tensorflow_datasets as tfds
        except ImportError as error:
            raise UserError(
                "data source 'tfds' needs the package tensorflow-datasets: "
                "`pip install tensorflow-datasets` (TensorFlow itself is not needed)"
            ) from error
        data_dir = None if path is None else os.path.expanduser(path)
        try:
            builder = tfds.builder(name, data_dir=data_dir)
        except tfds.core.DatasetNotFoundError as error:
            raise UserError(
                f"TFDS knows no data set {name!r} (--config.data.name): the nearest are "
                f"{nearest(name, tfds.list_builders(with_community_datasets=False))}"
            ) from error
        _check_prepared(builder, name, data_dir)
        features = dict(builder.info.features.items())
        if not (
            isinstance(features.get("image"), tfds.features.Image)
            and isinstance(features.get("label"), tfds.features.ClassLabel)
        ):
            raise UserError(
                f"TFDS data set {name!r} is no image-classification set: it needs features 'image' and 'label', "
                f"and has {', '.join(sorted(features))}"
            )
        self._split = _tfds_split(split, list(builder.info.splits))
        try:
            if builder.info.file_format.value == "tfrecord":
                self._data = _TFRecords(builder.info.splits[self._split].file_instructions)
            else:
                self._data = builder.as_data_source(self._split, decoders={"image": tfds.decode.SkipDecoding()})
        except UserError:
            raise
        except ValueError as error:
            raise UserError(
                f"TFDS data set {name!r} has no split {split!r}: it has {', '.join(builder.info.splits)}"
            ) from error
        own = tuple(features["label"].names)
        self.classes = tuple(classes or own)
        self._name = name
        self._labels = _labels(own, classes, f"TFDS data set {name!r}")

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, index: int) -> Record:
        example = self._data[int(index)]
        return Record(example["image"], int(self._labels[example["label"]]))

    def name(self, index: int) -> str:
        """Returns for example `imagenet2012/validation[12]`."""
        return f"{self._name}/{self._split}[{index}]"


class _TFRecords:
    """The examples of TFRecord files by index: 'image', the bytes of an image file, and 'label'."""

    def __init__(self, instructions: Sequence):
        self._files = [os.fspath(instruction.filename) for instruction in instructions]
        parts = []
        for number, instruction in enumerate(instructions):
            positions = record_positions(self._files[number])
            if len(positions) < instruction.skip + instruction.examples_in_shard - instruction.skip:
                raise UserError(
                    f"{self._files[number]} has {len(positions)} records, fewer than it should: fetch it anew"
                )
            chosen = positions[instruction.skip :][: instruction.take if instruction.take >= 0 else None]
            parts.append(np.array([(number, *position) for position in chosen], np.int64).reshape(-1, 3))
        self._positions = np.concatenate(parts)  # [N, 3]: file, offset, length

    def __len__(self) -> int:
        return len(self._positions)

    def __getitem__(self, index: int) -> dict:
        number, offset, length = self._positions[index].tolist()
        example = parse_example(read_at(self._files[number], offset, length))
        return {"image": example["image"][0], "label": example["label"][0]}


def _labels(own: Sequence[str], classes: Sequence[str] | None, where: str) -> np.ndarray:
    """Returns the label of each own class; `classes`, where given, rules their order."""
    if classes is None:
        return np.arange(len(own), dtype=np.int32)
    number = {name: label for label, name in enumerate(classes)}
    unknown = [name for name in own if name not in number]
    if unknown:
        raise UserError(
            f"class {unknown[0]!r} of {where} ({len(unknown)} such) is not among the {len(number)} classes that rule "
            f"the labels, those of the training split: rename it (nearest: {nearest(unknown[0], number)}), remove it, "
            "or add it to the training split"
        )
    return np.array([number[name] for name in own], np.int32)


def _split_folder(path: str | os.PathLike | None, split: str) -> str:
    if path is None:
        raise UserError(f"no path to the images is set: {_WAYS}")
    path = os.path.expanduser(path)
    root = os.path.join(path, split)
    if not os.path.isdir(path):
        raise UserError(f"no images found: there is no folder {path}: {_WAYS}")
    if not os.path.isdir(root):
        present = ", ".join(sorted(entry.name for entry in _visible(path) if entry.is_dir()))
        if not present:
            raise UserError(f"no images found: folder {path} has no subfolder {split!r}, nor any other: {_WAYS}")
        raise UserError(
            f"folder {path} has no split {split!r}, only {present}: rename one, or name the splits with "
            "--config.data.train_split and --config.data.val_split"
        )
    return root


def _class_folders(root: str) -> list[str]:
    entries = _visible(root)
    folders = sorted(entry.name for entry in entries if entry.is_dir())
    if not folders:
        raise UserError(f"{root} holds no class folders: put the images of each class in a folder {root}/<class>/")
    stray = [entry.path for entry in entries if _is_image(entry.name) and entry.is_file()]
    if stray:
        raise UserError(f"image {min(stray)} lies outside the class folders ({len(stray)} such): move it into one")
    return folders


def _visible(folder: str) -> list[os.DirEntry]:
    with os.scandir(folder) as entries:
        return [entry for entry in entries if not entry.name.startswith(".")]


def _image_files(folder: str) -> Iterator[str]:
    """Yields the image files in `folder` and below, relative to it; scandir needs no stat per file."""
    for entry in _visible(folder):
        if entry.is_dir():
            yield from (os.path.join(entry.name, file) for file in _image_files(entry.path))
        elif _is_image(entry.name):
            yield entry.name
        else:
            raise UserError(
                f"{entry.path} lies in a class folder but does not end as an image does ({' '.join(IMAGE_ENDINGS)}): "
                "remove it, move it away or rename it"
            )


def _is_image(name: str) -> bool:
    return name.lower().endswith(IMAGE_ENDINGS)


def _tar_files(path: str | os.PathLike | None, split: str) -> list[str]:
    if path is None:
        raise UserError(f"no path to the images is set: {_WAYS}")
    folder = glob.escape(os.path.expanduser(os.fspath(path)))
    patterns = (f"{glob.escape(split)}*.tar", f"*-{glob.escape(split)}-*.tar", f"{glob.escape(split)}/*.tar")
    for pattern in patterns:
        if files := sorted(glob.glob(os.path.join(folder, pattern))):
            return files
    present = sorted(os.path.basename(file) for file in glob.glob(os.path.join(folder, "*.tar*")))
    lie = f"{', '.join(present[:5])} lie there" if present else "there are none"
    raise UserError(
        f"no tar archives of the split {split!r} in {path}, which should be {split}*.tar or {split}/*.tar: {lie}; "
        "rename them, or name the splits with --config.data.train_split and --config.data.val_split"
    )


def _stem(name: str) -> str:
    """The part of a name that WebDataset's members share: up to the first dot of the last part."""
    folder, file = os.path.split(name)
    return os.path.join(folder, file.split(".")[0])


def _class_names(folder: str, count: int) -> list[str]:
    file = os.path.join(folder, "classes.txt")
    if not os.path.exists(file):
        return [str(number) for number in range(count)]
    with open(file, encoding="utf-8") as lines:
        return [line.strip() for line in lines if line.strip()]


def _tfds_split(split: str, present: Sequence[str]) -> str:
    if split != "val" or "val" in present:
        return split
    return next((name for name in ("validation", "test") if name in present), split)


def _check_prepared(builder, name: str, data_dir: str | None) -> None:
    where = f" --data_dir={data_dir}" if data_dir else ""
    command = f"`tfds build {name} --file_format=array_record{where}` (this, unlike reading it, needs TensorFlow)"
    if not builder.info.splits:
        raise UserError(
            f"TFDS data set {name!r} is not prepared in {builder.data_dir}: prepare it with {command}, "
            "or name the folder that holds it with --config.data.path"
        )
    if builder.info.file_format.value not in ("array_record", "parquet", "tfrecord"):
        raise UserError(
            f"TFDS data set {name!r} is prepared in {builder.data_dir} as {builder.info.file_format.value}, which "
            f"cannot be read by index: prepare it in another --data_dir with {command}"
        )
