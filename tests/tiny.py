"""What the tests of the run-time rooms share: a network that compiles in a second, a folder of images, a config."""

import contextlib
import json
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from PIL import Image

from maxmap import comparison, config, inference, models
from maxmap.layers.primitives import BatchNorm, Conv, DropPath, Linear
from maxmap.models import create_model as create_model

ROOT = Path(__file__).resolve().parent.parent
CLASSES = ("blue", "green", "red")


@contextlib.contextmanager
def compile_quickly() -> Iterator[None]:
    """Has XLA optimise little: for programs that compile far longer than they run."""
    jax.config.update("jax_disable_most_optimizations", True)
    try:
        yield
    finally:
        jax.config.update("jax_disable_most_optimizations", False)


class Tiny(nn.Module):
    """Convolution, norm, residual branch, mean, G linear classifiers; with batch statistics and a constant."""

    num_classes: int
    branches: int = 2
    drop_path: float = 0.0
    dropout: float = 0.0
    norm: bool = True
    constant: bool = True
    width: int = 8

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool = False) -> dict[str, jax.Array]:
        # No bias in front of a norm: it has no gradient but rounding, which Adam would blow up.
        x = Conv(self.width, kernel_size=3, stride=2, padding=1, bias=not self.norm, name="conv")(images)
        if self.norm:
            x = BatchNorm(name="norm")(x, train=train)
        x = nn.gelu(x)
        x = x + DropPath(self.drop_path)(Linear(self.width, name="mlp")(x), train=train)
        x = nn.Dropout(self.dropout)(jnp.mean(x, axis=(1, 2)), deterministic=not train)
        if self.constant:
            x = x * self.variable("constants", "scale", lambda: jnp.float32(0.5)).value.astype(x.dtype)
        logits = [Linear(self.num_classes, name=f"head_{g}")(x) for g in range(self.branches)]
        return {"logits": jnp.stack(logits)}


def use_models(create: Callable[..., Any], patch: pytest.MonkeyPatch) -> None:
    """Has everything in maxmap call `create` in place of `create_model`."""
    patch.setitem(config.SECTIONS, "model", config.Section(create))
    for module in (comparison, models, inference):
        patch.setattr(module, "create_model", create)


def create_tiny(name: str, *, num_classes: int | None = None, **fields: Any) -> Tiny:
    """Stands for `maxmap.models.create_model`."""
    assert name.startswith("tiny")
    return Tiny(num_classes=1000 if num_classes is None else num_classes, **fields)


def write_image(path: Path, number: int, color: int, size: int = 8) -> None:
    """Writes noise that is brighter in one of the colours."""
    noise = np.random.default_rng(number).integers(0, 130, (size, size, 3))
    noise[..., 2 - color] += 110
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(noise.astype(np.uint8)).save(path)


def write_folder(root: Path, train: int = 24, val: int = 11, classes: Sequence[str] = CLASSES) -> Path:
    """Writes `root/{train,val}/<class>/<number>.png` and returns `root`."""
    for split, count in (("train", train), ("val", val)):
        for i in range(count):
            label = i % len(classes)
            write_image(root / split / classes[label] / f"{i:03}.png", i + 1000 * (split == "val"), label % 3)
    return root


def settings_for(path: Path | None, **changes: Any) -> dict[str, Any]:
    """A config for the folder of `write_folder`: 3 steps an epoch, 9 in all; changes are `section__key=value`."""
    values: dict[str, Any] = {
        "seed": 0,
        "epochs": 3,
        "steps": None,
        "batch_size": 8,
        "accumulate": 1,
        "dtype": "float32",
        "batch_norm": "sync",
        "ema_decay": 0.75,
        "init_from": None,
        "mesh": {"data": 1},
        "model": {"name": "tiny", "drop_path": 0.25, "dropout": 0.125},
        "data": {
            "source": "folder",
            "path": None if path is None else str(path),
            "image_size": 8,
            "scale": (0.5, 1.0),
            "crop_pct": 1.0,
            "mean": (0.5, 0.5, 0.5),
            "std": (0.25, 0.25, 0.25),
            "threads": 1,
        },
        "augment": {"hflip": 0.5},
        "mix": {"smoothing": 0.1, "mixup": 0.2},
        "erase": {"prob": 0.0},
        "optim": {"name": "adamw", "weight_decay": 0.05, "clip_norm": 1.0},
        "schedule": {"name": "cosine", "lr": 2e-2, "warmup_epochs": 1, "per": "step"},
        "loss": {"name": "softmax", "decorrelation": -0.1},
        "evaluate": {"batch_size": 4, "every_epochs": 1},
        "checkpoint": {"every": 4, "keep": 2},
        "log": {"every": 2},
    }
    for name, value in changes.items():
        section, _, key = name.rpartition("__")
        (values[section] if section else values)[key] = value
    return values


def preprocessing() -> dict[str, Any]:
    """The preprocessing that a checkpoint of the tests' network carries."""
    colours = {"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]}
    return {"image_size": 8, "crop_pct": 1.0, "crop_mode": "center", "interpolation": "bicubic", **colours}


def free_port() -> int:
    """A port of this machine that nobody listens at."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a log such as `metrics.jsonl`."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def files(folder: Path) -> dict[str, bytes]:
    """The content of every file below a folder, by its path; nothing where there is no folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def assert_equal(one: Any, other: Any) -> None:
    """Compares two trees bit by bit, types included."""
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(one), jax.tree.leaves(other), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        assert a.dtype == b.dtype and a.shape == b.shape, jax.tree_util.keystr(path)
        assert np.array_equal(a, b, equal_nan=True), f"{jax.tree_util.keystr(path)} differs by {np.abs(a - b).max()}"


def copied(tree: Any) -> Any:
    """A copy on the host, which no donation can touch."""
    return jax.tree.map(np.array, tree)


def without_timings(row: Mapping[str, Any]) -> dict[str, Any]:
    """A line of `metrics.jsonl` without what depends on the clock."""
    return {key: value for key, value in row.items() if key not in ("images_per_second", "waiting_for_data")}
