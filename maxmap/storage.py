"""How files are kept, in a folder or in a bucket: paths, writing that leaves no half file, errors in plain words.

A bucket is one of Google Cloud Storage (gs://bucket/run) or of S3 (s3://bucket/run). All files go through etils.epath.
"""

import contextlib
import errno
import fcntl
import hashlib
import importlib.util
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import fsspec
from etils import epath

from maxmap.errors import UserError, printable, reason

_UNFINISHED, _NEW, _OLD = ".unfinished", "new", "old"
_LONGEST_PREFIX = 100  # characters of the target's name
_TRIES = 100  # to replace a folder that others replace too
BUCKETS = {"gs": ("gcs", "gcsfs"), "s3": ("s3", "s3fs")}  # by scheme: the extra of pyproject.toml, what it installs

# Orbax writes arrays by tensorstore, whose errors have no numbers but these texts.
_DISK_TEXT = re.compile(r"No space left|Disk quota|File too large|Read-only|Permission denied|Input/output error", re.I)
_BUCKET_TEXT = re.compile(r"PERMISSION_DENIED|UNAUTHENTICATED|UNAVAILABLE|FAILED_PRECONDITION|NOT_FOUND")
_DISK_NUMBERS = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EIO),
    *(errno.EEXIST, errno.ENOTDIR),
)
_BUCKET_PACKAGES = {"aiohttp", "botocore", "gcsfs", "google", "requests", "s3fs"}  # which raise errors of their own

# Where TensorFlow is installed, etils would load it to reach a bucket. That takes seconds and a gigabyte of memory, and
# TensorFlow looks for credentials in other ways than gcsfs does.
os.environ.setdefault("EPATH_USE_TF", "false")
for _extra, _ in BUCKETS.values():  # the extras have the names that fsspec gives to the file systems
    # Tensorstore writes into a bucket past fsspec, so a listing that fsspec has cached lacks the new files.
    fsspec.config.conf.setdefault(_extra, {})["use_listings_cache"] = False


def in_bucket(path: str | Path) -> bool:
    """Whether a path is in a bucket: gs://bucket/run or s3://bucket/run."""
    return os.fspath(path).startswith(tuple(f"{scheme}://" for scheme in BUCKETS))


def expand(path: str | Path) -> str:
    """Returns a path with the home folder in place of a `~` at its start; a bucket's path stays as it is."""
    return os.path.expanduser(os.fspath(path))


def resolve(path: str | Path) -> epath.Path:
    """Returns a path as orbax takes it: absolute, or in a bucket; a `~` at its start is the home folder.

    Raises:
      UserError: the path is a URL of something else, or the package that talks to such buckets is not installed.
    """
    path = expand(path)
    if "://" not in path:
        return epath.Path(os.path.abspath(path))
    if not in_bucket(path):
        raise UserError(f"{path} is neither a folder nor in a bucket: write a path, gs://BUCKET/FOLDER or s3://...")
    extra, package = BUCKETS[path.partition("://")[0]]
    if importlib.util.find_spec(package) is None:
        raise UserError(f"{path} needs the package {package}: pip install {package}, or install maxmap with [{extra}].")
    return epath.Path(path)


def write_text(path: str | Path | epath.Path, text: str) -> None:
    """Writes a file as a whole: a reader finds the old text or the new one, never a part, even after a crash."""
    if in_bucket(path):
        resolve(path).write_text(text)  # a bucket shows an object only when all of it has arrived
        return
    path = Path(expand(path))
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.unfinished")  # two processes may write the same file
    with unfinished.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(unfinished, path)


@contextlib.contextmanager
def atomic_target(target: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yields a path to write a file or a folder to, which becomes `target` by one rename at the end of the block.

    So the target is whole or absent, even after a kill or with two writers. A folder that is replaced is first moved
    aside; if the process is killed before the new one is there, the next call for the same target brings it back.

    Args:
      target: local file or folder. Folders above it are made.
      overwrite: replace what is there. An empty folder is replaced in any case.

    Raises:
      UserError: the target exists or cannot be written.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        recover(target)
        if not overwrite:
            _refuse_existing(target)
        with _private_folder(target) as private:
            # The name of the target stays, because some writers choose the format by the ending.
            unfinished = private / _NEW / target.name
            yield unfinished
            _move(unfinished, target, private / _OLD / target.name, overwrite)
    except OSError as error:
        raise UserError(
            f"cannot write {target} ({error.strerror or error}): make room there, or give another name."
        ) from error


def recover(target: Path) -> None:
    """Brings back what a killed writer of `target` had moved aside, and removes what it left unfinished."""
    left = re.compile(rf"{re.escape(_private_prefix(target))}[a-z0-9_]+{re.escape(_UNFINISHED)}")
    beside = list(target.parent.iterdir()) if target.parent.is_dir() else []
    for private in [path for path in beside if left.fullmatch(path.name)]:
        with contextlib.suppress(OSError):  # its writer is at work, or the file system locks no folders
            descriptor = os.open(private, os.O_RDONLY)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                _dissolve(private, target)
            finally:
                os.close(descriptor)


@contextlib.contextmanager
def _private_folder(target: Path) -> Iterator[Path]:
    """Makes a folder beside a target. Its lock ends with this process, which tells others that it is abandoned."""
    descriptor = None
    while descriptor is None:
        private = Path(tempfile.mkdtemp(_UNFINISHED, _private_prefix(target), target.parent))
        try:
            descriptor = os.open(private, os.O_RDONLY)
            with contextlib.suppress(OSError):  # some network file systems lock no folders
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            for folder in (_NEW, _OLD):
                (private / folder).mkdir()
        except FileNotFoundError:  # another process took it for an abandoned one before the lock
            if descriptor is not None:
                os.close(descriptor)
            descriptor = None
    try:
        yield private
    finally:
        _dissolve(private, target)
        os.close(descriptor)


def _private_prefix(target: Path) -> str:
    return f".{target.name[:_LONGEST_PREFIX]}."


def _dissolve(private: Path, target: Path) -> None:
    """Removes the folder of a writer; the old target goes back to its place if nothing is there."""
    old = private / _OLD / target.name
    if os.path.lexists(old) and not os.path.lexists(target):
        os.rename(old, target)
    shutil.rmtree(private, ignore_errors=True)


def _refuse_existing(target: Path) -> None:
    empty = target.is_dir() and not any(target.iterdir())
    if os.path.lexists(target) and not empty:
        raise UserError(f"{target} is there already: give another name, or --overwrite where the command has it.")


def _move(unfinished: Path, target: Path, old: Path, overwrite: bool) -> None:
    """Renames `unfinished` to `target`; a folder that is there goes to `old` first."""
    if not overwrite:
        _refuse_existing(target)
    for _ in range(_TRIES):  # another writer may put its own folder there in between
        try:
            os.replace(unfinished, target)
            return
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR) or not overwrite:
                raise
        with contextlib.suppress(FileNotFoundError):
            os.rename(target, Path(tempfile.mkdtemp(dir=old.parent)) / "older" if os.path.lexists(old) else old)
    raise OSError("other processes keep writing it")


def walk(folder: epath.Path) -> Iterator[epath.Path]:
    """Yields every file below a folder."""
    for entry in folder.iterdir():
        if entry.is_dir():
            yield from walk(entry)
        else:
            yield entry


def sha256(file: epath.Path) -> str:
    """Returns the SHA-256 checksum of a file in hexadecimal digits."""
    with file.open("rb") as opened:
        digest = hashlib.sha256()
        while block := opened.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


@contextlib.contextmanager
def disk_errors(path: str | Path, action: str, kept: Callable[[], str]) -> Iterator[None]:
    """Turns an error of the disk or bucket into one sentence; every other error is a bug and passes unchanged.

    Args:
      path: folder that is written to, perhaps in a bucket.
      action: what `path` cannot do if there is an error, for example "take step 3".
      kept: returns what is safe nevertheless, for the sentence; called only if there is an error.

    Raises:
      UserError: the disk is full, read-only, broken, or closed to the user; or see `bucket_errors`.
    """
    try:
        with bucket_errors(path, action):
            yield
    except Exception as error:
        reason = _DISK_TEXT.search(str(error))
        if isinstance(error, UserError) or (reason is None and getattr(error, "errno", None) not in _DISK_NUMBERS):
            raise
        raise UserError(
            f"{path} cannot {action} ({reason[0] if reason else error}); {kept()}: make room, or the folder writable, "
            "and start again."
        ) from error


def write_named(path: str | Path | epath.Path, text: str) -> None:
    """Writes a file that the user named, as `write_text` does.

    Raises:
      UserError: it cannot be written there.
    """
    try:
        with bucket_errors(os.fspath(path), "be written"):
            write_text(path, text)
    except OSError as error:
        raise UserError(f"cannot write {printable(path)} ({reason(error)}): give another file.") from error


@contextlib.contextmanager
def bucket_errors(path: str | Path, action: str) -> Iterator[None]:
    """Turns an error of a bucket into one sentence; without a bucket, every error passes unchanged.

    Args:
      path: folder that is read or written, perhaps in a bucket.
      action: what `path` cannot do if there is an error, for example "be read".

    Raises:
      UserError: the bucket does not exist, is closed to the user, or cannot be reached.
    """
    try:
        yield
    except Exception as error:
        refused = (
            isinstance(error, ConnectionError | TimeoutError)
            or (isinstance(error, OSError) and error.errno is None)  # an error with a number is of this machine
            or type(error).__module__.partition(".")[0] in _BUCKET_PACKAGES
            or _BUCKET_TEXT.search(str(error)) is not None
        )
        if not in_bucket(path) or isinstance(error, UserError) or not refused:
            raise
        raise UserError(
            f"{path} cannot {action} ({' '.join(str(error).split()) or type(error).__name__}): look at the bucket's "
            "name, your rights and the network, and start again."
        ) from error
