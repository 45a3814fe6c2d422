"""MaxViT-T with a MAP head on ImageNet-1K, the recipe of the MAP paper (WACV 2025): 84.348 % top-1, 96.876 % top-5.

  python main.py --config=configs/maxvit_tiny_map.py --workdir=runs/maxvit_map --config.data.path=IMAGENET

IMAGENET holds train/<class>/*.JPEG and val/<class>/*.JPEG; with `--config.data.source=tfds
--config.data.name=imagenet2012` it is a TFDS data directory. Published with two GPUs: 64 images each, 32 micro-batches
a step. On a TPU pod or many GPUs set `--config.accumulate=1`: the batch of 4,096 is over all devices.

Where the released script and this file differ: it says `--amp` (float16 with loss scaling), here the compute type is
bfloat16. Batch norms see the images of one device (`batch_norm`), 64 on two GPUs, as there.
"""

from ml_collections import ConfigDict, config_dict


def get_config() -> ConfigDict:
    """Returns the config."""
    config = ConfigDict()
    config.seed = 42
    config.epochs = 300
    config.steps = config_dict.placeholder(int)
    config.batch_size = 4096
    config.accumulate = 32
    config.dtype = "bfloat16"
    config.batch_norm = "averaged"
    config.ema_decay = config_dict.placeholder(float)
    config.init_from = config_dict.placeholder(str)
    config.mesh = ConfigDict({"data": -1, "fsdp": 1})
    config.model = ConfigDict(
        {"name": "map_maxvit_tiny_tf_224", "num_classes": config_dict.placeholder(int), "drop_path": 0.2}
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
            "crop_pct": 0.95,
            "crop_mode": "center",
            "eval_interpolation": "bicubic",
            "mean": (0.485, 0.456, 0.406),
            "std": (0.229, 0.224, 0.225),
            "workers": 0,
            "check": 2000,
        }
    )
    config.augment = ConfigDict({"hflip": 0.5, "rand_augment": "rand-m15-mstd0.5-inc1"})
    config.mix = ConfigDict({"mixup": 0.8, "cutmix": 1.0, "prob": 1.0, "switch_prob": 0.5, "smoothing": 0.1})
    config.erase = ConfigDict({"prob": 0.25, "mode": "pixel"})
    # timm's LAMB: it clips at a norm of 1.0 itself, after the recipe's own clipping at 1.0.
    config.optim = ConfigDict({"name": "lamb_timm", "weight_decay": 0.05, "eps": 1e-6, "clip_norm": 1.0})
    config.schedule = ConfigDict(
        {
            "name": "cosine",
            "lr": 8e-3,
            "warmup_epochs": 30,
            "warmup_lr": 1e-6,
            "min_lr": 1e-5,
            "cooldown_epochs": 10,
            "per": "epoch",
        }
    )
    config.loss = ConfigDict({"name": "bce", "decorrelation": -0.8})
    config.evaluate = ConfigDict({"batch_size": 1024, "every_epochs": 1})
    config.checkpoint = ConfigDict({"every": 312, "keep": 3})
    config.log = ConfigDict({"every": 50})
    return config
