"""Opens a data set that TFDS prepared, perhaps on the machine of somebody else. Nothing that its files name is run."""

import contextlib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from maxmap.errors import UserError, nearest, reason, shortened
from maxmap.small_files import read_json

_OWN_FEATURES = re.compile(r"tensorflow_datasets\.core\.features\.[\w.]+")
_CLASS_KEYS = ("pythonClassName", "python_class_name", "type")  # "type" in files of older versions
_DEEPEST = 100  # features inside of each other


def open_builder(name: str, data_dir: str | None) -> Any:
    """Returns TFDS's builder of a data set.

    TFDS imports the module of every class that a `features.json` names. So the file is read here first.

    Args:
      name: of the data set, perhaps with a configuration and a version.
      data_dir: folder of all data sets; None for TFDS's own.

    Raises:
      UserError: there is no such data set, its files are damaged, or they name a class that is not TFDS's.
    """
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core.utils import file_utils

    for folder in file_utils.list_data_dirs(given_data_dir=data_dir):
        _check_features(Path(folder), re.split("[/:]", name)[0])
    try:
        return tfds.builder(name, data_dir=data_dir)
    except tfds.core.DatasetNotFoundError as error:
        raise UserError(
            f"TFDS knows no data set {name!r} (--config.data.name): the nearest are "
            f"{nearest(name, tfds.list_builders(with_community_datasets=False))}."
        ) from error


@contextlib.contextmanager
def damaged_is_user_error(name: str) -> Iterator[None]:
    """Turns into one sentence what TFDS raises for damaged files of a data set, which may be any exception."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"the files of TFDS data set {name!r} are damaged or of another version ({shortened(reason(error))}): copy "
            "them again, or prepare the data set anew."
        ) from error


def _check_features(folder: Path, name: str) -> None:
    """Raises UserError if a `features.json` of a data set names a class that is not one of TFDS's features."""
    if not folder.is_dir():
        return
    # TFDS takes a name in either spelling, `my_set` or `MySet`.
    for entry in folder.iterdir():
        if entry.name.replace("_", "").lower() == name.replace("_", "").lower():
            for file in sorted(entry.rglob("features.json")):
                try:
                    _check_names(read_json(file), file, 0)
                except UserError:
                    raise
                except (OSError, ValueError) as error:
                    raise UserError(
                        f"{file} is damaged ({shortened(reason(error))}): copy it again, or prepare the data set anew."
                    ) from None


def _check_names(value: Any, file: Path, depth: int) -> None:
    if depth > _DEEPEST:
        raise ValueError(f"it has more than {_DEEPEST} objects inside of each other")
    if isinstance(value, dict):
        for key, part in value.items():
            if key in _CLASS_KEYS and isinstance(part, str) and not _OWN_FEATURES.fullmatch(part):
                raise UserError(
                    f"{file} is refused: TFDS would import {shortened(part)}, which is none of its own features: "
                    "prepare the data set with those."
                )
            _check_names(part, file, depth + 1)
    elif isinstance(value, list):
        for part in value:
            _check_names(part, file, depth + 1)


def resolve_split(split: str, present: Sequence[str]) -> str:
    """Returns the name of a split, among those present; 'val' may be 'validation' or 'test'."""
    if split != "val" or "val" in present:
        return split
    return next((name for name in ("validation", "test") if name in present), split)


def check_prepared(builder: Any, name: str, data_dir: str | None) -> None:
    """Raises UserError unless a data set is prepared in a form that can be read by index."""
    where = f" --data_dir={data_dir}" if data_dir else ""
    command = f"`tfds build {name} --file_format=array_record{where}` (this, unlike reading it, needs TensorFlow)"
    if not builder.info.splits:
        raise UserError(
            f"TFDS data set {name!r} is not prepared in {builder.data_dir}: prepare it with {command}, "
            "or name the folder that holds it with --config.data.path."
        )
    if builder.info.file_format.value not in ("array_record", "parquet", "tfrecord"):
        raise UserError(
            f"TFDS data set {name!r} is prepared in {builder.data_dir} as {builder.info.file_format.value}, which "
            f"cannot be read by index: prepare it in another --data_dir with {command}."
        )
