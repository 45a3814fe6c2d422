"""The five GA recipes (Ryu et al., ICCV 2023; the commands of Lab-LVM/imagenet-models, GA/README.md) on ImageNet-1K.

  python main.py --config=configs/gramian.py:convnext_tiny --workdir=runs/ga_convnext_tiny --config.data.path=IMAGENET

============== ===================== ========== ================ =======
recipe         model                 parameters published        top-1 %
============== ===================== ========== ================ =======
convnext_tiny  ga_convnext_tiny_688  47,821,324 48.7 M, 6.3 GMAC 83.2
convnext_small ga_convnext_small_688 70,116,364 70.4 M, 10.5     83.9
convnext_base  ga_convnext_base_976 123,688,396 124.3 M, 19.0    84.3
cswin_tiny     ga_cswin_tiny_p42     41,990,024 42.0 M, 6.1      84.1
cswin_small    ga_cswin_small_p54    54,312,776 54.3 M, 8.7      84.7
============== ===================== ========== ================ =======

Published with two GPUs, 128 images each, 4 micro-batches a step (1,024). IMAGENET: see configs/map.py.

What the released commands say and do not do, or do and do not say:

- the model names in the commands are registered nowhere, and no registered ConvNeXt has the published count: the models
  here are the nearest, the CSWin ones those with the published counts;
- what the commands leave out is the defaults of their train.py: RandAugment m9, three repeats, mixup 0.2, no erasing,
  3 epochs of warm-up, no cool-down;
- LAMB ignores `--momentum 0.8` and clips the gradient at a norm of 1.0 by itself;
- evaluation there adds the branches' logits, so its loss is another one than here; the accuracy is the same;
- below 128 images per GPU the Gram matrix is computed in float64 there; here it is float32 whatever the batch.

Here the compute type is bfloat16 where the commands say `--amp`, which is float16 with loss scaling. Batch norms see
the images of one device, as there (`batch_norm`); on many more devices than published, "sync" may be the better choice.
"""

from typing import Any

from ml_collections import ConfigDict, config_dict

# What a recipe changes in the config below; the crop is that of the models' own configurations.
RECIPES: dict[str, dict[str, Any]] = {
    "convnext_tiny": {"model.name": "ga_convnext_tiny_688"},
    "convnext_small": {"model.name": "ga_convnext_small_688", "model.drop_path": 0.4, "model.head.drop_path": 0.4},
    "convnext_base": {"model.name": "ga_convnext_base_976", "model.drop_path": 0.5, "model.head.drop_path": 0.5},
    "cswin_tiny": {"model.name": "ga_cswin_tiny_p42", "data.crop_pct": 0.9, "schedule.lr": 2e-3},
    "cswin_small": {
        "model.name": "ga_cswin_small_p54",
        "model.drop_path": 0.4,
        "model.head.drop_path": 0.4,
        "data.crop_pct": 0.9,
        "schedule.lr": 2e-3,
    },
}


def get_config(recipe: str = "convnext_tiny") -> ConfigDict:
    """Returns the config of one of the `RECIPES`."""
    if recipe not in RECIPES:
        raise ValueError(f"configs/gramian.py:{recipe} is no recipe: they are {', '.join(RECIPES)}.")
    config = ConfigDict()
    config.seed = 42
    config.epochs = 300
    config.steps = config_dict.placeholder(int)
    config.batch_size = 1024
    config.accumulate = 4
    config.dtype = "bfloat16"
    config.batch_norm = "averaged"
    config.ema_decay = config_dict.placeholder(float)
    config.init_from = config_dict.placeholder(str)
    config.mesh = ConfigDict({"data": -1, "fsdp": 1})
    # The head's aggregation and branches have the backbone's rate of stochastic depth.
    config.model = ConfigDict(
        {"name": "", "num_classes": config_dict.placeholder(int), "drop_path": 0.2, "head": {"drop_path": 0.2}}
    )
    config.data = ConfigDict(
        {
            "source": "folder",
            "path": "data/imagenet",
            "name": config_dict.placeholder(str),
            "train_split": "train",
            "val_split": "val",
            "image_size": 224,
            "scale": (0.08, 1.0),
            "ratio": (3 / 4, 4 / 3),
            "interpolation": "random",
            "repeats": 3,
            "crop_pct": 0.875,
            "crop_mode": "center",
            "eval_interpolation": "bicubic",
            "mean": (0.485, 0.456, 0.406),
            "std": (0.229, 0.224, 0.225),
            "workers": 0,
            "check": 2000,
        }
    )
    config.augment = ConfigDict({"hflip": 0.5, "rand_augment": "rand-m9-mstd0.5-inc1"})
    config.mix = ConfigDict({"mixup": 0.2, "cutmix": 1.0, "prob": 1.0, "switch_prob": 0.5, "smoothing": 0.1})
    config.erase = ConfigDict({"prob": 0.0})
    # timm's LAMB clips at a norm of 1.0 itself.
    config.optim = ConfigDict({"name": "lamb_timm", "weight_decay": 0.05, "eps": 1e-8})
    config.schedule = ConfigDict(
        {
            "name": "cosine",
            "lr": 5e-3,
            "warmup_epochs": 3,
            "warmup_lr": 1e-6,
            "min_lr": 1e-6,
            "cooldown_epochs": 0,
            "per": "epoch",
        }
    )
    config.loss = ConfigDict({"name": "bce", "decorrelation": -0.8})
    config.evaluate = ConfigDict({"batch_size": 1024, "every_epochs": 1})
    config.checkpoint = ConfigDict({"every": 1251, "keep": 3})
    config.log = ConfigDict({"every": 50})
    config.update_from_flattened_dict(RECIPES[recipe])
    return config
