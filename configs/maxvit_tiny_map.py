"""MaxViT-T with a MAP head on ImageNet-1K, the recipe of the MAP paper (WACV 2025): 84.348 % top-1, 96.876 % top-5.

  python main.py --config=configs/maxvit_tiny_map.py --workdir=runs/maxvit_map --config.data.path=IMAGENET

IMAGENET holds train/<class>/*.JPEG and val/<class>/*.JPEG; with `--config.data.source=tfds
--config.data.name=imagenet2012` it is a TFDS data directory. Published with two GPUs: 64 images each, 32 micro-batches
a step. On a TPU pod or many GPUs set `--config.accumulate=1`: the batch of 4,096 is over all devices.

Where the released script and this file differ: it says `--amp` (float16 with loss scaling), here the compute type is
bfloat16. Batch norms see the images of one device (`batch_norm`), 64 on two GPUs, as there.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Returns the config."""
    return ConfigDict(
        {
            "seed": 42,
            "epochs": 300,
            "batch_size": 4096,
            "accumulate": 32,
            "dtype": "bfloat16",
            "batch_norm": "averaged",
            "model": {"name": "map_maxvit_tiny_tf_224", "drop_path": 0.2},
            "data": {"source": "folder", "path": "data/imagenet", "repeats": 3, "crop_pct": 0.95},
            "augment": {"rand_augment": "rand-m15-mstd0.5-inc1"},
            "mix": {"mixup": 0.8, "cutmix": 1.0, "smoothing": 0.1},
            "erase": {"prob": 0.25},
            # timm's LAMB: it clips at a norm of 1.0 itself, after the recipe's own clipping at 1.0.
            "optim": {"name": "lamb_timm", "weight_decay": 0.05, "eps": 1e-6, "clip_norm": 1.0},
            "schedule": {"lr": 8e-3, "warmup_epochs": 30, "min_lr": 1e-5, "cooldown_epochs": 10},
            "loss": {"name": "bce", "decorrelation": -0.8},
        }
    )
