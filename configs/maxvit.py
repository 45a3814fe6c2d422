"""MaxViT (Tu et al., ECCV 2022): training on ImageNet-1K, fine-tuning, and the 21K and JFT columns of the paper.

  python main.py --config=configs/maxvit.py:tiny --workdir=runs/maxvit_tiny --config.data.path=IMAGENET
  python main.py --config=configs/maxvit.py:tiny_384 --workdir=runs/maxvit_tiny_384 --config.data.path=IMAGENET \\
    --config.init_from=runs/maxvit_tiny

============================ ===================== ==========================================
recipe                       what                  published top-1 on ImageNet-1K in %
============================ ===================== ==========================================
tiny small base large        1K, 224 px            83.62, 84.45, 84.95, 85.17
xlarge                       1K, 224 px            84.8 (TensorFlow Model Garden's own rerun)
tiny_384 .. large_384        1K to 1K              85.24, 85.74, 86.34, 86.40
tiny_512 .. large_512        1K to 1K              85.72, 86.19, 86.66, 86.70
base_21k large_21k           21K, 224 px           (pre-training)
  xlarge_21k
base_21k_384 .. xlarge_...   21K to 1K             88.24, 88.32, 88.51
base_21k_512 .. xlarge_...   21K to 1K             88.38, 88.46, 88.70
base_jft large_jft           JFT-300M, 224 px      (pre-training; the data are not public)
  xlarge_jft
base_jft_384 .. xlarge_...   JFT to 1K             88.69, 89.12, 89.36
base_jft_512 .. xlarge_...   JFT to 1K             88.82, 89.41, 89.53
============================ ===================== ==========================================

Published on TPUs, 4,096 images a step (512 in fine-tuning). IMAGENET: see configs/map.py; for 21K and JFT it is the
same kind of folder with their classes. The values are those of google-research/maxvit's hparams (1K, and Tiny's
fine-tuning) and of table 12 of the paper (all else). No training code was released.

What the released files get wrong or leave open, and what stands here:

- table 12 says that pre-training has no average of weights, the hparams of 1K say 0.9999: 0.9999 for 1K;
- the hparams of 512 px fine-tuning lack their model and raise an error: here they are those of 384 px;
- XL is registered nowhere; its 1K run is the Model Garden's: rate 1e-3, stochastic depth 0.7;
- "RandAugment 2, 15" is TensorFlow's, which applies both operations always and does not stop at magnitude 10; here it
  is timm's set of operations with p1 and mmax15, whose ranges of translation, resampling and fill are others;
- mixup there is one draw for each TPU core, here one for a micro-batch;
- whether the cosine starts before or after the 10,000 steps of warm-up is not said: here the warm-up is inside;
- the sigmoid loss of 21K is here the mean over classes, which clipping at a norm of 1.0 sees as a smaller gradient;
- the released evaluation crops 224/256 of the image at 224 px and resizes with TensorFlow's old bicubic filter; at 384
  and 512 px the author advises the whole image, squashed. Here PIL's filters do the same.
"""

from typing import Any

from ml_collections import ConfigDict

# Stochastic depth by column of the paper's table 12.
DROP_PATH: dict[str, dict[str, float]] = {
    "": {"tiny": 0.2, "small": 0.3, "base": 0.4, "large": 0.6, "xlarge": 0.7},
    "_21k": {"base": 0.3, "large": 0.4, "xlarge": 0.6},
    "_jft": {"base": 0.0, "large": 0.0, "xlarge": 0.0},
}
FINE_TUNE_DROP_PATH: dict[str, dict[str, float]] = {
    "": {"tiny": 0.2, "small": 0.3, "base": 0.4, "large": 0.6},
    "_21k": {"base": 0.4, "large": 0.5, "xlarge": 0.9},
    "_jft": {"base": 0.1, "large": 0.2, "xlarge": 0.2},
}

_HALVES = {"data.mean": (0.5, 0.5, 0.5), "data.std": (0.5, 0.5, 0.5)}

# What pre-training on each set changes in the config below.
PRE_TRAIN: dict[str, dict[str, Any]] = {
    "": {"ema_decay": 0.9999, "schedule.warmup_steps": 10000},
    "_21k": _HALVES
    | {
        "epochs": 90,
        "augment.rand_augment": "rand-m5-n2-p1",
        "mix.mixup": 0.0,
        "mix.smoothing": 1e-4,
        "optim.weight_decay": 0.01,
        "schedule.name": "linear",
        "schedule.lr": 1e-3,
        "schedule.warmup_epochs": 5,
        "loss.name": "bce",
    },
    "_jft": _HALVES
    | {
        "epochs": 14,
        "augment.rand_augment": "rand-m5-n2-p1",
        "mix.mixup": 0.0,
        "mix.smoothing": 0.0,
        "optim.weight_decay": 0.01,
        "schedule.name": "linear",
        "schedule.lr": 1e-3,
        "schedule.warmup_steps": 20000,
        "loss.name": "bce",
    },
}
FINE_TUNE: dict[str, Any] = _HALVES | {
    "epochs": 30,
    "batch_size": 512,
    "ema_decay": 0.9999,
    "data.crop_pct": 1.0,
    "data.crop_mode": "squash",
    "optim.weight_decay": 1e-8,
    "schedule.name": "constant",
    "schedule.lr": 5e-5,
}


def _recipes() -> dict[str, dict[str, Any]]:
    """What each recipe changes in the config below."""
    recipes: dict[str, dict[str, Any]] = {}
    for column, rates in DROP_PATH.items():
        for size, rate in rates.items():
            recipes[size + column] = {"model.name": f"maxvit_{size}_tf_224", "model.drop_path": rate} | PRE_TRAIN[
                column
            ]
    recipes["xlarge"]["schedule.lr"] = 1e-3
    for column, rates in FINE_TUNE_DROP_PATH.items():
        for size, rate in rates.items():
            for pixels in (384, 512):
                recipes[f"{size}{column}_{pixels}"] = FINE_TUNE | {
                    "model.name": f"maxvit_{size}_tf_{pixels}",
                    "model.drop_path": rate,
                    "data.image_size": pixels,
                    "mix.mixup": 0.0 if column else 0.8,
                }
    return recipes


RECIPES = _recipes()


def get_config(recipe: str = "tiny") -> ConfigDict:
    """Returns the config of one of the `RECIPES`; those that end in _384 or _512 fine-tune another run."""
    if recipe not in RECIPES:
        raise ValueError(f"configs/maxvit.py:{recipe} is no recipe: they are {', '.join(RECIPES)}.")
    config = ConfigDict(
        {
            "seed": 42,
            "epochs": 300,
            "batch_size": 4096,
            "dtype": "bfloat16",
            "model": {"drop_path_endpoint": False},  # Google's stochastic depth ends one block short of the rate
            "data": {"source": "folder", "path": "data/imagenet", "interpolation": "bicubic"},
            "augment": {"rand_augment": "rand-m15-n2-p1-mmax15"},
            "mix": {"mixup": 0.8, "smoothing": 0.1},
            "optim": {"name": "adamw", "weight_decay": 0.05, "clip_norm": 1.0},
            "schedule": {"lr": 3e-3, "warmup_lr": 0.0, "min_lr": 1e-5, "per": "step"},
            "loss": {},
        }
    )
    config.update_from_flattened_dict(RECIPES[recipe])
    return config
