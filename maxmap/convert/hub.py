"""Published checkpoints: the table of their names and preprocessing (maxmap/pretrained.csv), and their download."""

import contextlib
import csv
import fnmatch
import functools
import logging
import os
import shutil
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)

from maxmap import storage
from maxmap.convert.sources import shards_of
from maxmap.data.decode import CROP_MODES, FILTERS, IMAGENET_MEAN, IMAGENET_STD
from maxmap.errors import UserError, nearest, shortened
from maxmap.runtime import cache_folder

TABLE = resources.files("maxmap") / "pretrained.csv"
NORMALISATIONS = {
    "imagenet": {"mean": list(IMAGENET_MEAN), "std": list(IMAGENET_STD)},
    "half": {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]},
    "none": {"mean": [0.0, 0.0, 0.0], "std": [1.0, 1.0, 1.0]},
}
# Where they differ from the usual: models whose weights are published in more than one file, or at no known address.
_UNLISTED: dict[str, dict[str, Any]] = {
    "mobilenet_v1_*_tf": {"interpolation": "bilinear", **NORMALISATIONS["half"]},
    "mobilenet_v1_025_leaky": {"interpolation": "bilinear"},
}
_FILES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
_PREFIXES = ("timm/", "hub:", "hf-hub:", "hf_hub:", "hf://")
_ENDINGS = (".safetensors", ".pth", ".pth.tar", ".pt", ".bin", ".ckpt", ".tar", ".npz", ".tflite", ".onnx")
_PATIENCE = 10  # seconds until a server has to answer
_LARGEST_IMAGE = 10_000  # pixels of a side
_LARGEST_NUMBER = 1_000_000  # in means and deviations
_MOST_CHANNELS = 100  # of images


@functools.cache
def published() -> dict[str, dict[str, Any]]:
    """Returns the published checkpoints by name: 'model', 'classes', 'preprocessing', 'licence', 'url' and 'top1'.

    'top1' is in percent on ImageNet-1k, from timm's results-imagenet.csv (August 2026) or the authors' tables; None
    where they say nothing. A name with an owner and without a 'url' is a repository on the Hugging Face hub. timm's
    default tag of each model comes before its other tags.
    """
    with TABLE.open(encoding="utf-8") as file:
        return {
            row["name"]: {
                "model": row["model"],
                "classes": int(row["classes"]),
                "preprocessing": {
                    "image_size": int(row["image_size"]),
                    "crop_pct": float(row["crop_pct"]),
                    "crop_mode": row["crop_mode"],
                    "interpolation": row["interpolation"],
                    **NORMALISATIONS[row["normalisation"]],
                },
                "licence": row["licence"],
                "url": row["url"],
                "top1": float(row["top1"]) if row["top1"] else None,
            }
            for row in csv.DictReader(file)
        }


def published_preprocessing(model: str, classes: int, image_size: int) -> tuple[dict[str, Any], str]:
    """Returns the preprocessing of a published checkpoint of a model, the usual one if there is none; and whose it is.

    Args:
      model: name of the model.
      classes: checkpoints with as many classes are preferred.
      image_size: of those, the ones with as many pixels; the result has this size in any case.
    """
    rows = [(name, row) for name, row in published().items() if row["model"] == model]
    rows.sort(key=lambda row: (row[1]["classes"] != classes, row[1]["preprocessing"]["image_size"] != image_size))
    for name, row in rows:
        return {**row["preprocessing"], "image_size": image_size}, f"{name} has it"
    usual = {"crop_pct": 0.875, "crop_mode": "center", "interpolation": "bicubic", **NORMALISATIONS["imagenet"]}
    differing = next((other for pattern, other in _UNLISTED.items() if fnmatch.fnmatch(model, pattern)), {})
    whose = f"the weights released for {model} have it" if differing else "most networks for ImageNet have it"
    return {"image_size": image_size, **usual, **differing}, whose


def full_name(source: str | Path) -> str:
    """Returns a checkpoint's name without the hub's prefix; a timm name with a tag, but without owner, gets "timm/".

    A path that is no name comes back as it is.
    """
    name = str(source)
    for prefix in _PREFIXES[1:]:
        name = name.removeprefix(prefix)
    model, dot, tag = name.partition(".")
    return f"timm/{name}" if dot and model in _timm_models() and f".{tag}" not in _ENDINGS else name


def is_name(source: str | Path) -> bool:
    """Whether a source is the name of a published checkpoint or of a repository, and not a path."""
    name = full_name(source)
    return name in published() or name.startswith("timm/") or str(source).startswith(_PREFIXES)


@functools.cache
def _timm_models() -> set[str]:
    """Returns the names of timm's published checkpoints without owner and tag."""
    return {name.removeprefix("timm/").partition(".")[0] for name in published() if name.startswith("timm/")}


def download(name: str) -> Path:
    """Downloads a published checkpoint, or finds it in the cache.

    The usual variables set the hub's cache, offline mode, token and mirror: HF_HOME, HF_HUB_CACHE, HF_HUB_OFFLINE,
    HF_TOKEN and HF_ENDPOINT. A hub that does not answer is asked once; then only the cache is searched.

    Args:
      name: a key of `published`, with or without "timm/", or hub:<owner>/<repository> on the Hugging Face hub.

    Returns:
      The file, or the folder of a repository.

    Raises:
      UserError: there is no such checkpoint, or it cannot be downloaded now.
    """
    name = full_name(name)
    url = published().get(name, {}).get("url")
    if not url and name.startswith("timm/") and name not in published():
        close = nearest(name, published())
        raise UserError(f"there is no checkpoint {name} for a model of maxmap; the nearest are {close}.")
    fault = None
    try:
        if url and storage.in_bucket(url):
            return download_bucket(url)
        if url and not url.startswith("hf://"):
            return _download_url(url)
        owner, repository, *file = (url or f"hf://{name}/").removeprefix("hf://").split("/", 2)
        repository, wanted = f"{owner}/{repository}", [part for part in file if part]
        with quiet():
            fault = _hub_fault(repository, (wanted or ["config.json"])[0])
            if wanted:
                return Path(_download_from_hub(repository, wanted[0], cached_only=fault is not None))
            return _download_repository(repository, cached_only=fault is not None)
    except GatedRepoError:
        raise UserError(
            f"{name} needs its owner's permission: ask on its page, and set HF_TOKEN to your token."
        ) from None
    except RepositoryNotFoundError:
        raise UserError(f"the hub has no repository {name}, or does not show it to your token (HF_TOKEN).") from None
    except LocalEntryNotFoundError as error:
        raise UserError(
            f"{name} is not in the cache and the hub cannot be reached ({fault or one_line(error)}): download it "
            "where there is a network, or give a file."
        ) from None
    except UserError:
        raise
    except Exception as error:  # the hub's library lets errors of its network libraries through
        raise UserError(f"{name} cannot be downloaded ({one_line(error)}): try again, or give a file.") from None


def one_line(error: Exception) -> str:
    """Returns what an exception of the hub's library says, on one line and cut."""
    text = shortened(" ".join(str(error).split()))
    return f"{type(error).__name__}: {text}" if str(error) else type(error).__name__


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keeps the hub's library from printing warnings of its own."""
    logger = logging.getLogger("huggingface_hub")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _hub_fault(repository: str, file: str) -> str | None:
    """Asks the hub for a file once, without a second try; returns why there was no answer, None if there was one.

    A refusal, such as that of a file which does not exist, is an answer.
    """
    url = huggingface_hub.hf_hub_url(repository, file, endpoint=os.environ.get("HF_ENDPOINT"))
    try:
        huggingface_hub.get_hf_file_metadata(url, timeout=_PATIENCE)
    except HfHubHTTPError as error:
        status = error.response.status_code
        return f"it answers with the status {status}" if status >= 500 or status in (408, 429) else None
    except OfflineModeIsEnabled:
        return "HF_HUB_OFFLINE is set"
    except Exception as error:  # of the network library
        return one_line(error)
    return None


def _download_from_hub(repository: str, file: str, *, cached_only: bool) -> str:
    endpoint = os.environ.get("HF_ENDPOINT")
    return huggingface_hub.hf_hub_download(repository, file, endpoint=endpoint, local_files_only=cached_only)


def _download_repository(name: str, *, cached_only: bool) -> Path:
    """Downloads config and weights of a repository; returns their folder in the cache."""
    folder = None
    with contextlib.suppress(EntryNotFoundError):  # there may be weights alone
        folder = Path(_download_from_hub(name, "config.json", cached_only=cached_only)).parent
    for file in _FILES:
        try:
            path = Path(_download_from_hub(name, file, cached_only=cached_only))
        except EntryNotFoundError as error:
            missing = error
            continue
        if file.endswith(".index.json"):
            for shard in sorted(set(shards_of(path).values())):
                _download_from_hub(name, shard, cached_only=cached_only)
        return folder or path.parent
    if isinstance(missing, LocalEntryNotFoundError):
        raise missing
    raise UserError(f"the repository {name} has none of the files {', '.join(_FILES)}: give a file of weights.")


def _download_url(url: str) -> Path:
    """Downloads a file into maxmap's cache, where it appears complete or not at all."""
    cache = cache_folder()
    path = cache / url.rpartition("/")[2]
    if path.is_file():
        return path
    cache.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with urllib.request.urlopen(url, timeout=_PATIENCE) as answer, unfinished.open("wb") as file:
            size = answer.headers.get("Content-Length")
            while piece := answer.read(1 << 20):
                file.write(piece)
        if size is not None and unfinished.stat().st_size != int(size):
            raise UserError(f"{url} ended too early: try again.")
        os.replace(unfinished, path)
    except (urllib.error.URLError, TimeoutError) as error:
        raise UserError(
            f"{url} cannot be downloaded ({error}): get the file in another way and give its path."
        ) from None
    finally:
        unfinished.unlink(missing_ok=True)
    return path


def download_bucket(address: str) -> Path:
    """Copies a checkpoint from a bucket into maxmap's cache, where it appears complete or not at all.

    Args:
      address: gs://... or s3://...: a file, a folder, or the prefix of a TensorFlow checkpoint's files.

    Returns:
      The copy: a file, a folder, or a prefix.

    Raises:
      UserError: there is no such checkpoint, or the bucket cannot be read.
    """
    remote, local = storage.resolve(address), cache_folder() / address.replace("://", "/").rstrip("/")
    with storage.bucket_errors(address, "be read"):
        beside = local.parent / f"{local.name}.files"
        if remote.is_file():
            files, folder, copy = [remote], beside, beside / remote.name
        elif remote.is_dir():
            files = [file for file in remote.iterdir() if _is_of_checkpoint(file.name)]
            folder = copy = local
        else:
            near = list(remote.parent.iterdir()) if remote.parent.is_dir() else []
            files = [file for file in near if file.name.startswith(f"{remote.name}.")]
            folder, copy = beside, beside / remote.name
        if not files:
            raise UserError(f"there is no checkpoint {address}: look at the address.")
        if not all((folder / file.name).is_file() for file in files):
            with storage.atomic_target(folder, overwrite=True) as unfinished:
                unfinished.mkdir()
                for file in files:
                    with file.open("rb") as source, (unfinished / file.name).open("wb") as target:
                        shutil.copyfileobj(source, target, 1 << 24)
    return copy


def _is_of_checkpoint(name: str) -> bool:
    """Whether a file in the folder of a TensorFlow checkpoint is a part of it, and no graph or log of the training."""
    return not name.endswith((".meta", ".pbtxt")) and "tfevents" not in name


def preprocessing_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the preprocessing that the config.json of a timm repository gives; an absent part is the usual one.

    Raises:
      UserError: a part of it is of another type, or out of range.
    """
    nested = config.get("pretrained_cfg") or {}
    if not isinstance(nested, Mapping):
        raise _config_error("pretrained_cfg", nested, "an object")
    settings = {**config, **nested}

    def get(key: str, usual: Any, valid: Callable[[Any], bool], wanted: str) -> Any:
        value = usual if settings.get(key) is None else settings[key]
        if not valid(value):
            raise _config_error(key, value, wanted)
        return value

    sizes = get("input_size", None, _are_sizes, f"a list of channels, height and width, up to {_LARGEST_IMAGE} pixels")
    share = get("crop_pct", 0.875, lambda v: _is_number(v) and 0.1 <= v <= 2, "a number from 0.1 to 2")
    exif = get("exif", None, lambda v: v is None or isinstance(v, bool), "true or false")
    return ({} if exif is None else {"exif": exif}) | {
        "image_size": sizes[-1],
        "crop_pct": float(share),
        "crop_mode": get("crop_mode", "center", lambda v: v in list(CROP_MODES), f"one of {', '.join(CROP_MODES)}"),
        "interpolation": get("interpolation", "bicubic", lambda v: v in list(FILTERS), f"one of {', '.join(FILTERS)}"),
        "mean": [float(value) for value in get("mean", None, _are_numbers, "a list of numbers")],
        "std": [
            float(value)
            for value in get("std", None, lambda v: _are_numbers(v) and min(v) > 0, "a list of positive numbers")
        ],
    }


def _config_error(key: str, value: Any, wanted: str) -> UserError:
    return UserError(f"'{key}' in the config.json is {shortened(value)}: it has to be {wanted}.")


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < _LARGEST_NUMBER  # also False for NaN


def _are_numbers(values: Any) -> bool:
    return isinstance(values, list) and 1 <= len(values) <= _MOST_CHANNELS and all(map(_is_number, values))


def _are_sizes(values: Any) -> bool:
    return (
        _are_numbers(values) and len(values) == 3 and all(type(v) is int and 1 <= v <= _LARGEST_IMAGE for v in values)
    )
