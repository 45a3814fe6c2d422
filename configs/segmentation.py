"""Semantic segmentation by UPerNet on ConvNeXt, as published for ADE20K, and for images and masks of your own.

  python main.py --config=configs/segmentation.py:own --workdir=runs/masks --config.data.path=FOLDER \\
    --config.init_from=timm/convnext_tiny.fb_in1k

FOLDER holds images/train/NAME.jpg, masks/train/NAME.png, the same for val, and classes.txt; docs/segmentation.md has
the rest. On a CPU add --config.dtype=float32. Any backbone with four feature maps takes the place of ConvNeXt,
--config.model.name=caformer_s18.

====== ================ ========== ===================== =============================
recipe for              backbone   published mIoU        mean of scales and mirror images
====== ================ ========== ===================== =============================
own    images of yours  ConvNeXt-T
tiny   ADE20K           ConvNeXt-T 46.11                 46.62
small  ADE20K           ConvNeXt-S 48.56                 49.02
base   ADE20K           ConvNeXt-B 48.71                 49.54
====== ================ ========== ===================== =============================

For ADE20K, FOLDER is ADEChallengeData2016 with a classes.txt of its 150 names. From ConvNeXt's paper (Liu et al., CVPR
2022) and its configs in mmsegmentation: AdamW at 1e-4 with a weight decay of 0.05, a warm-up of 1,500 steps and a
linear decay to 0 at 160,000, 16 crops of 512 pixels a step, the shorter side at half to double of that, stochastic
depth, a start from weights of ImageNet-1K.

What departs from it:

- The rate decays from block to block by 0.965, there by 0.9 from one group of three blocks to the next.
- Brightness, contrast and saturation change by up to 0.4 and the hue does not; there they change half the time.
- The loss is a mean over the pixels that count, there over all.
- bfloat16, there float16 with a scaled loss.
- The evaluation while training sees the whole image, its longer side at 704 pixels. There it has a shorter side of 512
  and is seen in windows: `validate --image-size=704 --window=512`.

Nobody has trained these recipes here on ADE20K.
"""

from typing import Any

from ml_collections import ConfigDict

_ADE20K: dict[str, Any] = {
    "epochs": 127,
    "steps": 160_000,
    "batch_size": 16,
    "model.num_classes": 150,
    "data.train_split": "training",
    "data.val_split": "validation",
    "data.path": "data/ADEChallengeData2016",
    "data.reduce_zero_label": True,
    "schedule.warmup_steps": 1500,
    "schedule.warmup_lr": 1e-10,
    "evaluate.every_epochs": 10,
}
# What a recipe changes in the config below.
RECIPES: dict[str, dict[str, Any]] = {
    "own": {
        "epochs": 100,
        "batch_size": 8,
        "ema_decay": 0.99,
        "model.name": "convnext_tiny",
        "model.drop_path": 0.2,
        "data.path": "data/mine",
        "schedule.warmup_epochs": 3,
        "schedule.warmup_max_share": 0.1,
        "evaluate.every_epochs": 5,
    },
    "tiny": {**_ADE20K, "model.name": "convnext_tiny", "model.drop_path": 0.4},
    "small": {**_ADE20K, "model.name": "convnext_small", "model.drop_path": 0.3},
    "base": {**_ADE20K, "model.name": "convnext_base", "model.drop_path": 0.4},
}


def get_config(recipe: str = "own") -> ConfigDict:
    """Returns the config of one of the `RECIPES`."""
    if recipe not in RECIPES:
        raise ValueError(f"configs/segmentation.py:{recipe} is no recipe: they are {', '.join(RECIPES)}.")
    config = ConfigDict(
        {
            "dtype": "bfloat16",
            "model": {"head": "upernet"},
            "data": {
                "source": "masks",
                "task": "segmentation",
                "image_size": 512,
                "eval_image_size": 704,
                "crop_pct": 1.0,
                "crop_mode": "border",
            },
            "augment": {"color_jitter": 0.4},
            "optim": {"name": "adamw", "weight_decay": 0.05, "layer_decay": 0.965},
            "schedule": {"name": "linear", "lr": 1e-4, "min_lr": 0.0, "per": "step"},
            "evaluate": {"batch_size": 8},
        }
    )
    config.update_from_flattened_dict(RECIPES[recipe])
    return config
