"""Published checkpoints: the table of their names and preprocessing (maxmap/pretrained.csv), and their download."""

import contextlib
import csv
import functools
import os
import urllib.error
import urllib.request
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)

from maxmap.convert.sources import shards_of
from maxmap.data.decode import IMAGENET_MEAN, IMAGENET_STD
from maxmap.errors import UserError, nearest

TABLE = resources.files("maxmap") / "pretrained.csv"
NORMALISATIONS = {
    "imagenet": {"mean": list(IMAGENET_MEAN), "std": list(IMAGENET_STD)},
    "half": {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]},
}
_FILES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
_PREFIXES = ("timm/", "hf-hub:", "hf_hub:", "hf://")


@functools.cache
def published() -> dict[str, dict[str, Any]]:
    """Returns the published checkpoints by name: 'model', 'classes', 'preprocessing', 'licence' and 'url'.

    A name with an owner and without a 'url' is a repository on the Hugging Face hub. timm's default tag of each model
    comes before its other tags.
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
            }
            for row in csv.DictReader(file)
        }


def published_preprocessing(model: str, classes: int, image_size: int) -> dict[str, Any]:
    """Returns the preprocessing of a published checkpoint of a model, the usual one if there is none.

    Args:
      model: name of the model.
      classes: checkpoints with as many classes are preferred.
      image_size: of those, the ones with as many pixels; the result has this size in any case.
    """
    rows = [row for row in published().values() if row["model"] == model]
    rows.sort(key=lambda row: (row["classes"] != classes, row["preprocessing"]["image_size"] != image_size))
    if rows:
        return {**rows[0]["preprocessing"], "image_size": image_size}
    usual = {"crop_pct": 0.875, "crop_mode": "center", "interpolation": "bicubic", **NORMALISATIONS["imagenet"]}
    return {"image_size": image_size, **usual}


def is_name(source: str | Path) -> bool:
    """Whether a source is the name of a published checkpoint or of a repository, and not a path."""
    return str(source) in published() or str(source).startswith(_PREFIXES)


def download(name: str) -> Path:
    """Downloads a published checkpoint, or finds it in the cache.

    The usual variables set the hub's cache, offline mode, token and mirror: HF_HOME, HF_HUB_CACHE, HF_HUB_OFFLINE,
    HF_TOKEN and HF_ENDPOINT.

    Args:
      name: a key of `published`, or hf://<owner>/<repository> on the Hugging Face hub.

    Returns:
      The file, or the folder of a repository.

    Raises:
      UserError: there is no such checkpoint, or it cannot be downloaded now.
    """
    for prefix in _PREFIXES[1:]:
        name = name.removeprefix(prefix)
    url = published().get(name, {}).get("url")
    if not url and name.startswith("timm/") and name not in published():
        close = nearest(name, published())
        raise UserError(f"there is no checkpoint {name} for a model of maxmap; the nearest are {close}.")
    try:
        if not url:
            return _download_repository(name)
        if url.startswith("hf://"):
            owner, repository, file = url.removeprefix("hf://").split("/", 2)
            return Path(_download_from_hub(f"{owner}/{repository}", file))
        return _download_url(url)
    except GatedRepoError:
        raise UserError(
            f"{name} needs its owner's permission: ask on its page, and set HF_TOKEN to your token."
        ) from None
    except RepositoryNotFoundError:
        raise UserError(f"the hub has no repository {name}, or does not show it to your token (HF_TOKEN).") from None
    except LocalEntryNotFoundError:
        raise UserError(
            f"{name} is not in the cache and the hub cannot be reached (HF_HUB_OFFLINE, or no network): download it "
            "where there is a network, or give a file."
        ) from None
    except UserError:
        raise
    except Exception as error:  # the hub's library lets errors of its network libraries through
        raise UserError(f"{name} cannot be downloaded ({type(error).__name__}: {error}).") from None


def _download_from_hub(repository: str, file: str) -> str:
    return huggingface_hub.hf_hub_download(repository, file, endpoint=os.environ.get("HF_ENDPOINT"))


def _download_repository(name: str) -> Path:
    """Downloads config and weights of a repository; returns their folder in the cache."""
    folder = None
    with contextlib.suppress(LocalEntryNotFoundError):  # offline the cache may hold the weights alone
        folder = Path(_download_from_hub(name, "config.json")).parent
    for file in _FILES:
        try:
            path = Path(_download_from_hub(name, file))
        except (EntryNotFoundError, LocalEntryNotFoundError) as error:
            missing = error
            continue
        if file.endswith(".index.json"):
            for shard in sorted(set(shards_of(path).values())):
                _download_from_hub(name, shard)
        return folder or path.parent
    raise missing


def _download_url(url: str) -> Path:
    """Downloads a file into maxmap's cache, where it appears complete or not at all."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "maxmap"
    path = cache / url.rpartition("/")[2]
    if path.is_file():
        return path
    cache.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with urllib.request.urlopen(url, timeout=60) as answer, unfinished.open("wb") as file:
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


def preprocessing_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the preprocessing that the config.json of a timm repository gives."""
    settings = {**config, **config.get("pretrained_cfg", {})}
    sizes = settings["input_size"]
    return {
        "image_size": int(sizes[-1]),
        "crop_pct": float(settings.get("crop_pct") or 0.875),
        "crop_mode": settings.get("crop_mode") or "center",
        "interpolation": settings.get("interpolation") or "bicubic",
        "mean": [float(value) for value in settings["mean"]],
        "std": [float(value) for value in settings["std"]],
    }
