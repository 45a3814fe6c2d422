"""A small MaxViT from scratch on CIFAR-10 as a folder of images, with one of three heads, all else equal.

  python main.py --config=configs/cifar10.py --workdir=runs/cifar10_map --config.data.path=FOLDER
  python main.py --config=configs/cifar10.py:gramian --workdir=runs/cifar10_gramian --config.data.path=FOLDER
  python main.py --config=configs/cifar10.py:linear --workdir=runs/cifar10_linear --config.data.path=FOLDER

FOLDER holds train/<class>/*.jpg and val/<class>/*.jpg; with `--config.data.source=tfds --config.data.name=cifar10` it
is a TFDS data directory instead. Hardware: two CPU cores, half an hour. Target: at least 70 % top-1; docs/head_study.md
has the results of the heads.
"""

from typing import Any

from ml_collections import ConfigDict

# The MAP model's backbone has the exact GELU; so have the others, which replace its head only. The Gramian head is as
# large as its models' relative to the backbone: two branches over the same 8 x 8 map of 96 channels as MAP's.
HEADS: dict[str, dict[str, Any] | None] = {
    "map": None,
    "gramian": {
        "name": "gramian",
        "channels": 96,
        "branches": 2,
        "gram_channels": 48,
        "heads": 3,
        "attention_width": 48,
        "init_scheme": "torch",
    },
    "linear": {"name": "linear", "norm": "after", "epsilon": 1e-5, "hidden_ratio": 1.0},
}


def get_config(head: str = "map") -> ConfigDict:
    """Returns the config with one of the `HEADS`; everything but the head is equal."""
    if head not in HEADS:
        raise ValueError(f"configs/cifar10.py:{head} is no config: the heads are {', '.join(HEADS)}.")
    return ConfigDict(
        {
            "epochs": 8,
            "batch_size": 128,
            "ema_decay": 0.99,
            "model": {"name": "map_maxvit_mini_32", **({"head": HEADS[head]} if HEADS[head] else {})},
            "data": {
                "source": "folder",
                "path": "data/cifar10",
                "image_size": 32,
                "scale": (0.5, 1.0),
                "interpolation": "bilinear",
                "crop_pct": 1.0,
                "mean": (0.4914, 0.4822, 0.4465),
                "std": (0.247, 0.2435, 0.2616),
            },
            "mix": {"smoothing": 0.1},
            "optim": {"name": "adamw", "weight_decay": 0.05, "clip_norm": 1.0},
            "schedule": {"lr": 2e-3, "warmup_epochs": 1, "min_lr": 1e-5, "per": "step"},
            "loss": {"decorrelation": -0.8},  # without effect on the linear head, which has one branch
            "evaluate": {"batch_size": 500},
            "checkpoint": {"keep": 2},
        }
    )
