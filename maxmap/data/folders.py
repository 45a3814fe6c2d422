"""Finds the image files of a folder tree, `<path>/<split>/<class>/**/<file>`, and says what is odd about the tree."""

import os
from typing import NamedTuple

from maxmap.data.images import IMAGE_ENDINGS
from maxmap.errors import UserError, reason

HOW_TO_GIVE_IMAGES = (
    "give a folder tree <path>/train/<class>/*.jpg and <path>/val/<class>/*.jpg with --config.data.path=<path>, or a "
    "TFDS data set with --config.data.source=tfds --config.data.name=<name>, or try `make demo`, which needs no data."
)

# Images that are not read. Other files are left out of a class folder, but to leave out these would lose pictures.
_UNREAD_ENDINGS = (
    *(".heic", ".heif", ".jxl", ".svg", ".psd", ".tga", ".ico", ".eps", ".jxr", ".j2k", ".jpf", ".jpx", ".exr", ".hdr"),
    *(".raw", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".rw2"),
)


class ImageFiles(NamedTuple):
    """What a class folder holds, as paths relative to it.

    Attributes:
      images: image files, sorted.
      left_out: other files, and links that lead back to a folder that they lie in.
    """

    images: list[str]
    left_out: list[str]


def is_image(name: str) -> bool:
    """Whether a file's name ends as that of an image does."""
    return name.lower().endswith(IMAGE_ENDINGS)


def holds_folders(folder: str) -> bool:
    """Whether there is such a folder, with folders in it."""
    return os.path.isdir(folder) and any(map(_is_folder, _visible_entries(folder)))


def split_folder(path: str | os.PathLike | None, split: str) -> str:
    """Returns the folder of a split.

    Raises:
      UserError: there is none.
    """
    if path is None:
        raise UserError(f"no path to the images is set: {HOW_TO_GIVE_IMAGES}")
    path = os.path.expanduser(path)
    root = os.path.join(path, split)
    if not os.path.isdir(path):
        raise UserError(f"no images found: there is no folder {path}: {HOW_TO_GIVE_IMAGES}")
    if os.path.isdir(root):
        return root
    folders = sorted((entry for entry in _visible_entries(path) if _is_folder(entry)), key=lambda entry: entry.name)
    if not folders:
        raise UserError(
            f"no images found: folder {path} has no subfolder {split!r}, nor any other: {HOW_TO_GIVE_IMAGES}"
        )
    name_splits = "name the splits with --config.data.train_split and --config.data.val_split."
    present = ", ".join(entry.name for entry in folders[:20]) + (", ..." if len(folders) > 20 else "")
    if any(is_image(file.name) for folder in folders[:20] for file in _visible_entries(folder.path)):
        raise UserError(
            f"folder {path} has no split {split!r}, but {present} hold images, as folders of classes do: move the "
            f"class folders into {os.path.join(path, 'train')} and some images of each class into a folder of the same "
            f"name in {os.path.join(path, 'val')}, or {name_splits} "
            "`python -m maxmap validate` evaluates on such a folder as it is."
        )
    raise UserError(f"folder {path} has no split {split!r}, only {present}: rename one, or {name_splits}")


def class_folders(root: str) -> list[str]:
    """Returns the names of the class folders of a split, sorted.

    Raises:
      UserError: there are none, one is a link that leads nowhere, or images lie beside them.
    """
    entries = _visible_entries(root)
    for entry in sorted(entries, key=lambda entry: entry.name):
        if entry.is_symlink() and not os.path.exists(entry.path):
            raise UserError(
                f"{entry.path} is a link to {os.readlink(entry.path)}, which does not exist: mend or remove the link."
            )
        if entry.is_symlink() and _identity(entry.path) == _identity(root):
            raise UserError(f"{entry.path} is a link to the folder that it lies in: remove it.")
    folders = sorted(entry.name for entry in entries if _is_folder(entry))
    if not folders:
        raise UserError(f"{root} holds no class folders: put the images of each class in a folder {root}/<class>/.")
    stray = [entry.path for entry in entries if is_image(entry.name) and not _is_folder(entry)]
    if stray:
        raise UserError(f"image {min(stray)} lies outside the class folders ({len(stray)} such): move it into one.")
    return folders


def image_files(folder: str, what: str = "class folder") -> ImageFiles:
    """Finds the image files of a folder, in it and below; `what` it is, for messages.

    Raises:
      UserError: it holds images of a kind that cannot be read, or no images, or it cannot be listed.
    """
    found = ImageFiles([], [])
    _walk(folder, "", (_identity(os.path.dirname(folder)),), found)
    found.images.sort()
    found.left_out.sort()
    unread = [name for name in found.left_out if name.lower().endswith(_UNREAD_ENDINGS)]
    if unread:
        raise UserError(
            f"{os.path.join(folder, unread[0])} is an image of a kind that cannot be read ({len(unread)} such): "
            f"convert it to one of {' '.join(IMAGE_ENDINGS)}, or move it away."
        )
    if not found.images:
        others = f", only {len(found.left_out)} other files such as {found.left_out[0]}" if found.left_out else ""
        raise UserError(f"{what} {folder} holds no images{others}: add some or remove the folder.")
    return found


def _walk(folder: str, prefix: str, above: tuple[tuple[int, int], ...], found: ImageFiles) -> None:
    """Adds what lies in a folder and below; `above` identifies the folders around it."""
    above = (*above, _identity(folder))
    for entry in _visible_entries(folder):
        name = os.path.join(prefix, entry.name)
        if not _is_folder(entry):
            (found.images if is_image(entry.name) else found.left_out).append(name)
        elif entry.is_symlink() and _identity(entry.path) in above:
            found.left_out.append(name)
        else:
            _walk(entry.path, name, above, found)


def _identity(folder: str) -> tuple[int, int]:
    status = os.stat(folder)
    return status.st_dev, status.st_ino


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads to itself
        return False


def _visible_entries(folder: str) -> list[os.DirEntry]:
    try:
        with os.scandir(folder) as entries:
            return [entry for entry in entries if not entry.name.startswith(".")]
    except OSError as error:
        raise UserError(f"the folder {folder} cannot be listed ({reason(error)}): make it readable.") from error


class Listing:
    """Whether files exist, by listing each folder once: a million questions would take a network disk minutes."""

    def __init__(self, root: str):
        self._root = root
        self._folders: dict[str, frozenset[str]] = {}

    def __call__(self, name: str) -> bool:
        """Returns whether there is a file of that name, relative to the root."""
        folder, file = os.path.split(name)
        if folder not in self._folders:
            try:
                with os.scandir(os.path.join(self._root, folder)) as entries:
                    self._folders[folder] = frozenset(entry.name for entry in entries if entry.is_file())
            except (OSError, ValueError):
                self._folders[folder] = frozenset()
        return file in self._folders[folder]
