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

from ml_collections import ConfigDict

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
    config = ConfigDict(
        {
            "seed": 42,
            "epochs": 300,
            "batch_size": 1024,
            "accumulate": 4,
            "dtype": "bfloat16",
            "batch_norm": "averaged",
            # The head's aggregation and branches have the backbone's rate of stochastic depth.
            "model": {"drop_path": 0.2, "head": {"drop_path": 0.2}},
            "data": {"source": "folder", "path": "data/imagenet", "repeats": 3},
            "augment": {"rand_augment": "rand-m9-mstd0.5-inc1"},
            "mix": {"mixup": 0.2, "cutmix": 1.0, "smoothing": 0.1},
            # timm's LAMB clips at a norm of 1.0 itself.
            "optim": {"name": "lamb_timm", "weight_decay": 0.05, "eps": 1e-8},
            "schedule": {"lr": 5e-3, "warmup_epochs": 3},
            "loss": {"name": "bce", "decorrelation": -0.8},
        }
    )
    config.update_from_flattened_dict(RECIPES[recipe])
    return config
