"""Aesthetic scores of photographs, AVA, by MaxViT-T as in MaxViT's paper (Tu et al., ECCV 2022).

  python main.py --config=configs/aesthetics.py:tiny_224 --workdir=runs/aesthetics --config.data.path=AVA \\
    --config.init_from=timm/maxvit_tiny_tf_224.in1k

AVA (Murray, Marchesotti and Perronnin 2012) is a CSV file with a row for each photograph: the columns image, split
(train or val) and 1 to 10, which count the people who gave that score. docs/labels.md makes it of AVA.txt.

======== =============== ===============
recipe   published PLCC  published SRCC
======== =============== ===============
tiny_224 0.707           0.685
tiny_384 0.736           0.699
tiny_512 0.745           0.708
======== =============== ===============

The network has a softmax over the ten scores and learns the earth mover's distance with r = 2, after NIMA (Talebi and
Milanfar 2018). `eval.json` has PLCC and SRCC of the mean score, and `predict` says mean and deviation.

From the paper: momentum of 0.9, a rate of 1e-3 that falls by a factor of 0.9 every ten epochs, dropout of 0.75 before
the last layer, stochastic depth of 0.5, a start from weights of ImageNet-1K. No code was released, and the paper leaves
open what stands here by our choice: 50 epochs, 256 images a step, no weight decay, crops of three quarters of the
photograph or more, mirrored half the time, and an evaluation of the whole photograph, squashed. Its test split is not
named either. Nobody has trained this recipe here.
"""

from typing import Any

from ml_collections import ConfigDict

# What a recipe changes in the config below.
RECIPES: dict[str, dict[str, Any]] = {
    f"tiny_{pixels}": {"model.name": f"maxvit_tiny_tf_{pixels}", "data.image_size": pixels}
    for pixels in (224, 384, 512)
}


def get_config(recipe: str = "tiny_224") -> ConfigDict:
    """Returns the config of one of the `RECIPES`."""
    if recipe not in RECIPES:
        raise ValueError(f"configs/aesthetics.py:{recipe} is no recipe: they are {', '.join(RECIPES)}.")
    config = ConfigDict(
        {
            "seed": 42,
            "epochs": 50,
            "batch_size": 256,
            "dtype": "bfloat16",
            # Google's stochastic depth ends one block short of the rate.
            "model": {"drop_path": 0.5, "drop_path_endpoint": False, "head": {"dropout": 0.75}},
            "data": {
                "source": "csv",
                "path": "data/ava.csv",
                "task": "distribution",
                "label_columns": tuple(str(score) for score in range(1, 11)),
                "scale": (0.75, 1.0),
                "crop_pct": 1.0,
                "crop_mode": "squash",
                "mean": (0.5, 0.5, 0.5),
                "std": (0.5, 0.5, 0.5),
            },
            "optim": {"name": "momentum", "momentum": 0.9},
            "schedule": {"name": "step", "lr": 1e-3, "decay_rate": 0.9, "decay_epochs": 10},
            "loss": {"name": "emd"},
        }
    )
    config.update_from_flattened_dict(RECIPES[recipe])
    return config
