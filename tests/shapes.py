"""Squares and discs with their masks, as folders of images and masks, and a config that learns them."""

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tests.tiny import settings_for

CLASSES = ("ground", "square", "disc")


def draw(seed: int, height: int = 40, width: int = 48) -> tuple[np.ndarray, np.ndarray]:
    """An image [H, W, 3] and its mask: 0 bluish ground, 1 reddish square, 2 greenish disc, 255 along edges."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[:height, :width]
    image, mask = np.zeros((height, width, 3)), np.zeros((height, width), np.uint8)
    image[..., 2] = 0.8
    for kind in rng.permutation([1, 2]):
        y, x, radius = rng.integers(8, height - 8), rng.integers(8, width - 8), rng.integers(8, 13)
        far = np.maximum(abs(rows - y), abs(columns - x)) if kind == 1 else np.hypot(rows - y, columns - x)
        mask[far <= radius + 1.5] = 255
        mask[far <= radius - 1] = kind
        image[far <= radius] = rng.uniform(0, 0.4, 3) + 0.6 * np.eye(3)[kind - 1]
    image = 255 * (image + rng.normal(0, 0.1, image.shape))
    return image.clip(0, 255).astype(np.uint8), mask


def write_shapes(root: Path, train: int = 64, val: int = 22) -> Path:
    """Writes `root/{images,masks}/{train,val}/<number>.png` and `root/classes.txt`; every third image is enlarged."""
    for split, count in (("train", train), ("val", val)):
        for kind in ("images", "masks"):
            (root / kind / split).mkdir(parents=True)
        for i in range(count):
            times = np.ones((2, 2), np.uint8) if i % 3 == 2 else np.ones((1, 1), np.uint8)
            image, mask = draw(i + 1000 * (split == "val"))
            Image.fromarray(np.kron(image, times[..., None])).save(root / "images" / split / f"{i:03}.png")
            Image.fromarray(np.kron(mask, times)).save(root / "masks" / split / f"{i:03}.png")
    (root / "classes.txt").write_text("".join(f"{name}\n" for name in CLASSES))
    return root


def settings(path: Path, **changes: Any) -> dict[str, Any]:
    """A config for the folder of `write_shapes`; changes are as in `tests.tiny.settings_for`."""
    values = settings_for(path)
    levels = {"levels": (-2, -1), "pool_scales": (1, 3)}  # of two maps: each is a part of the program to compile
    head = {"name": "upernet", "channels": 16, "auxiliary_channels": 16, "norm": False, **levels}
    fields = {"image_size": 32, "embed_dim": (16, 32), "depths": (1, 1)}
    values |= {"model": {"name": "resnet50", "head": head, **fields}, "mix": {}, "loss": {}, "ema_decay": None}
    values["data"] |= {"source": "masks", "task": "segmentation", "image_size": 32, "eval_image_size": 48}
    values["data"] |= {"crop_mode": "border", "zoom": (0.8, 1.4)}
    del values["data"]["scale"]
    values["schedule"] = {"lr": 1e-2, "per": "step"}
    for name, value in changes.items():
        section, _, key = name.rpartition("__")
        (values[section] if section else values)[key] = value
    return values
