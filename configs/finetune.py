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

- AdamW with a low rate, a warm-up of 3 epochs or a tenth of a shorter run, clipping at a norm of 1.0 and a rate that
  decays from block to block towards the stem, so that the new head's first gradients do not wash out what was learnt;
- the weights' average has a memory of some epochs, not of 10,000 steps, which a short run never fills;
- the fewer images, the less is mixed and dropped, so that the few are seen as they are;
- no decorrelation of the branches of a MAP or Gramian head. That term has no lower bound, and beside softmax over a few
  classes it weighs much more than over the 1,000 that -0.8 was tuned for. To use it, watch the branches' accuracies.

Evaluation crops as MaxViT's at 224 pixels; a checkpoint's own preprocessing is in its card.
"""

from typing import Any

from ml_collections import ConfigDict

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
    config = ConfigDict(
        {
            "dtype": "bfloat16",
            "model": {"name": "maxvit_tiny_tf_224"},
            "data": {"source": "folder", "path": "data/mine", "crop_pct": 0.95},
            "augment": {},
            "mix": {"smoothing": 0.1},
            "erase": {},
            "optim": {"name": "adamw", "weight_decay": 0.05, "clip_norm": 1.0},
            "schedule": {"warmup_epochs": 3, "warmup_max_share": 0.1, "warmup_lr": 0.0, "per": "step"},
            "evaluate": {"batch_size": 256},
            "checkpoint": {"every": 500, "keep": 2},
        }
    )
    config.update_from_flattened_dict(PRESETS[preset])
    return config
