"""Fine-tuning a trained network on your own images: presets by the number of images.

  python main.py --config=configs/finetune.py:small --workdir=runs/mine --config.data.path=FOLDER \\
    --config.init_from=CHECKPOINT [--config.model.name=caformer_s18]

FOLDER holds train/<class>/*.jpg and val/<class>/*.jpg. CHECKPOINT is a published name such as
timm/maxvit_tiny_tf_224.in1k, a converted checkpoint or the folder of a run. Without it training starts from random
weights; the presets are not made for that. On a CPU add --config.dtype=float32.

======== ===================== =============================================
preset   training images       hardware
======== ===================== =============================================
small    up to about 5,000     one GPU, minutes; two CPU cores, hours
medium   5,000 to 100,000      one GPU, an hour or a few
large    more than 100,000     eight GPUs or TPU cores
probe    any number            the same, in a part of the time
======== ===================== =============================================

"probe" trains the head alone and leaves the network in front of it as it is: the quick test of what its features are
worth on your images, and often the best for less than some ten images a class. `optim.freeze` takes other parts, too.

The presets are starting points: nobody has published an accuracy for them. The README has one small result. Choices:

- AdamW with a low rate, a warm-up of 3 epochs or a tenth of a shorter run, and clipping at a norm of 1.0. The rate
  decays from block to block towards the stem, so that the first gradients of the new head do not destroy what the
  network has learnt.
- The average of the weights has a memory of some epochs. A short run never fills a memory of 10,000 steps.
- With fewer images, mixing and dropping are weaker, so that the network sees the images as they are.
- The branches of a MAP or Gramian head are not decorrelated. That term has no lower bound. Its weight of -0.8 was tuned
  for softmax over 1,000 classes; over a few classes it weighs much more. To use it, watch the branches' accuracies.

Evaluation crops as MaxViT's does at 224 pixels. The card of a checkpoint says its own preprocessing. Photos are turned
as their EXIF orientation says (`data.exif`); published networks were trained without that.
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
    "probe": {
        "epochs": 30,
        "batch_size": 64,
        "data.scale": (0.35, 1.0),
        "optim.freeze": ("^backbone/",),
        "schedule.lr": 1e-3,
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
            "data": {"source": "folder", "path": "data/mine", "crop_pct": 0.95, "exif": True},
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
