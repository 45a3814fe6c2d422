"""A small MaxViT with a MAP head on scikit-learn's handwritten digits: real data that needs no download.

  python main.py --config=configs/quickstart.py --workdir=runs/quickstart

Hardware: two CPU cores. Target: at least 97.0 % top-1 on a fixed held-out fifth (360 of 1,797 images). The README has
the figures of three seeds.
"""

from ml_collections import ConfigDict, config_dict


def get_config() -> ConfigDict:
    """Returns the config."""
    config = ConfigDict()
    config.seed = 0
    config.epochs = 25
    config.steps = config_dict.placeholder(int)
    config.batch_size = 64
    config.accumulate = 1
    config.dtype = "float32"
    config.batch_norm = "sync"
    config.ema_decay = 0.99
    config.init_from = config_dict.placeholder(str)
    config.mesh = ConfigDict({"data": -1, "fsdp": 1})
    config.model = ConfigDict({"name": "map_maxvit_mini_32", "drop_path": 0.05})
    config.data = ConfigDict(
        {
            "source": "digits",
            "image_size": 32,
            "scale": (0.6, 1.0),
            "interpolation": "bicubic",
            "crop_pct": 1.0,
            "eval_interpolation": "bicubic",
            "mean": (0.5, 0.5, 0.5),
            "std": (0.5, 0.5, 0.5),
        }
    )
    config.augment = ConfigDict({"hflip": 0.0})  # a mirrored digit is another sign
    config.mix = ConfigDict({"smoothing": 0.1})
    config.erase = ConfigDict({"prob": 0.0})
    config.optim = ConfigDict({"name": "adamw", "weight_decay": 0.05, "clip_norm": 1.0})
    config.schedule = ConfigDict({"name": "cosine", "lr": 2e-3, "warmup_epochs": 4, "min_lr": 1e-5, "per": "step"})
    config.loss = ConfigDict({"name": "softmax", "decorrelation": -0.8})
    config.evaluate = ConfigDict({"batch_size": 128, "every_epochs": 5})
    config.checkpoint = ConfigDict({"every": 220, "keep": 2})
    config.log = ConfigDict({"every": 20})
    return config
