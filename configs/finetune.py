"""Fine-tuning a published network on images of your own: three presets by how many there are.

  python main.py --config=configs/finetune.py:small --workdir=runs/mine --config.data.path=FOLDER \\
    --config.init_from=CHECKPOINT [--config.model.name=caformer_s18]

FOLDER holds train/<class>/*.jpg and val/<class>/*.jpg; CHECKPOINT is a converted checkpoint or the folder of a run.
Without it training starts from nothing, which these presets are not made for.

======== ===================== =============================================
preset   training images       hardware
======== ===================== =============================================
small    up to about 5,000     one GPU, minutes; two CPU cores, hours
medium   5,000 to 100,000      one GPU, an hour or a few
large    more than 100,000     eight GPUs or TPU cores
======== ===================== =============================================

No accuracy is published for them: they are starting points. What keeps them from collapsing:

- AdamW with a low rate, a warm-up, clipping at a norm of 1.0 and a rate that decays from block to block towards the
  stem, so that the new head's first gradients do not wash out what was learnt;
- the weights' average has a memory of some epochs, not of 10,000 steps, which a short run never fills;
- the fewer images, the less is mixed and dropped, so that the few are seen as they are;
- no decorrelation of the branches of a MAP or Gramian head. That term has no lower bound, and beside softmax over a few
  classes it weighs much more than over the 1,000 that -0.8 was tuned for. To use it, watch the branches' accuracies.

Evaluation crops as MaxViT's at 224 pixels; a checkpoint's own preprocessing is in its card.
"""

from typing import Any

from ml_collections import ConfigDict, config_dict

# What a preset changes in the config below.
PRESETS: dict[str, dict[str, Any]] = {
    "small": {
        "epochs": 50,
        "batch_size": 32,
        "ema_decay": 0.99,
        "model.drop_path": 0.1,
        "data.scale": (0.35, 1.0),
        "augment.rand_augment": "rand-m5-mstd0.5-inc1",
        "optim.layer_decay": 0.75,
        "schedule.lr": 1e-4,
        "checkpoint.every": 500,
    },
    "medium": {
        "epochs": 30,
        "batch_size": 128,
        "ema_decay": 0.999,
        "model.drop_path": 0.1,
        "data.scale": (0.2, 1.0),
        "augment.rand_augment": "rand-m7-mstd0.5-inc1",
        "mix.mixup": 0.1,
        "mix.cutmix": 0.5,
        "mix.prob": 0.5,
        "optim.layer_decay": 0.8,
        "schedule.lr": 2e-4,
        "checkpoint.every": 500,
    },
    "large": {
        "epochs": 30,
        "batch_size": 512,
        "ema_decay": 0.9998,
        "model.drop_path": 0.2,
        "data.scale": (0.08, 1.0),
        "augment.rand_augment": "rand-m9-mstd0.5-inc1",
        "mix.mixup": 0.8,
        "mix.cutmix": 1.0,
        "erase.prob": 0.25,
        "optim.layer_decay": 0.85,
        "schedule.lr": 5e-4,
        "checkpoint.every": 1000,
    },
}


def get_config(preset: str = "small") -> ConfigDict:
    """Returns the config of one of the `PRESETS`."""
    if preset not in PRESETS:
        raise ValueError(f"configs/finetune.py:{preset} is no preset: they are {', '.join(PRESETS)}.")
    config = ConfigDict()
    config.seed = 0
    config.epochs = 30
    config.steps = config_dict.placeholder(int)
    config.batch_size = 128
    config.accumulate = 1
    config.dtype = "bfloat16"
    config.batch_norm = "sync"
    config.ema_decay = config_dict.placeholder(float)
    config.init_from = config_dict.placeholder(str)
    config.mesh = ConfigDict({"data": -1, "fsdp": 1})
    config.model = ConfigDict(
        {
            "name": "maxvit_tiny_tf_224",
            "head": config_dict.placeholder(str),
            "num_classes": config_dict.placeholder(int),
            "drop_path": 0.0,
        }
    )
    config.data = ConfigDict(
        {
            "source": "folder",
            "path": "data/mine",
            "name": config_dict.placeholder(str),
            "train_split": "train",
            "val_split": "val",
            "image_size": 224,
            "scale": (0.08, 1.0),
            "ratio": (3 / 4, 4 / 3),
            "interpolation": "random",
            "crop_pct": 0.95,
            "crop_mode": "center",
            "eval_interpolation": "bicubic",
            "mean": (0.485, 0.456, 0.406),
            "std": (0.229, 0.224, 0.225),
            "workers": 0,
            "check": 2000,
        }
    )
    config.augment = ConfigDict({"hflip": 0.5, "rand_augment": config_dict.placeholder(str)})
    config.mix = ConfigDict({"mixup": 0.0, "cutmix": 0.0, "prob": 1.0, "switch_prob": 0.5, "smoothing": 0.1})
    config.erase = ConfigDict({"prob": 0.0, "mode": "pixel"})
    config.optim = ConfigDict({"name": "adamw", "weight_decay": 0.05, "clip_norm": 1.0, "layer_decay": 1.0})
    config.schedule = ConfigDict(
        {"name": "cosine", "lr": 1e-4, "warmup_epochs": 3, "warmup_lr": 0.0, "min_lr": 1e-6, "per": "step"}
    )
    config.loss = ConfigDict({"name": "softmax", "decorrelation": 0.0})
    config.evaluate = ConfigDict({"batch_size": 256, "every_epochs": 1})
    config.checkpoint = ConfigDict({"every": 500, "keep": 2})
    config.log = ConfigDict({"every": 50})
    config.update_from_flattened_dict(PRESETS[preset])
    return config
