"""The recipes' values against tables of what was published, and their rates against timm's own, epoch by epoch."""

import json
from typing import Any

import numpy as np
import pytest

from maxmap.config import bind
from tests.test_configs import builds, load

# A column of the tables: where its value stands.
COLUMNS = {
    "model": "model.name",
    "drop": "model.drop_path",
    "batch": "batch_size",
    "micro": "accumulate",
    "epochs": "epochs",
    "ema": "ema_decay",
    "dtype": "dtype",
    "opt": "optim.name",
    "eps": "optim.eps",
    "wd": "optim.weight_decay",
    "clip": "optim.clip_norm",
    "sched": "schedule.name",
    "lr": "schedule.lr",
    "warm": "schedule.warmup_epochs",
    "wsteps": "schedule.warmup_steps",
    "wlr": "schedule.warmup_lr",
    "min": "schedule.min_lr",
    "cool": "schedule.cooldown_epochs",
    "per": "schedule.per",
    "loss": "loss.name",
    "decor": "loss.decorrelation",
    "smooth": "mix.smoothing",
    "mixup": "mix.mixup",
    "cutmix": "mix.cutmix",
    "aug": "augment.rand_augment",
    "jitter": "augment.color_jitter",
    "flip": "augment.hflip",
    "erase": "erase.prob",
    "repeats": "data.repeats",
    "px": "data.image_size",
    "crop": "data.crop_pct",
    "mode": "data.crop_mode",
    "mean": "data.mean",
}

MAP = """
recipe         model                  batch micro epochs opt       eps  lr   wd   warm min  clip loss    smooth aug                   mixup erase repeats drop ema    px  crop
mobilenet_v1   map_mobilenet_v1       1024  1     100    lamb_timm 1e-6 5e-3 0.02 3    1e-6 -    bce     0.0    rand-m7-mstd0.5-inc1  0.1   0.0   1       0.0  -      160 0.95
resnet50       map_resnet50           1024  4     300    lamb_timm 1e-6 5e-3 0.02 3    1e-6 -    bce     0.1    rand-m20-mstd0.5-inc1 0.1   0.25  3       0.1  -      224 0.95
pit_s          map_pit_s              1024  2     300    adamw     1e-8 1e-3 0.05 3    1e-6 -    softmax 0.1    rand-m9-mstd0.5-inc1  0.8   0.25  3       0.1  -      224 0.95
convnext_tiny  map_convnext_tiny      1024  4     300    lamb_timm 1e-8 5e-3 0.05 3    1e-6 -    bce     0.1    rand-m9-mstd0.5-inc1  0.8   0.25  3       0.1  0.9999 224 0.875
convnext_small map_convnext_small     1024  4     300    lamb_timm 1e-8 5e-3 0.05 3    1e-6 -    bce     0.1    rand-m9-mstd0.5-inc1  0.8   0.25  3       0.4  0.9999 224 0.875
maxvit_tiny    map_maxvit_tiny_tf_224 4096  32    300    lamb_timm 1e-6 8e-3 0.05 30   1e-5 1.0  bce     0.1    rand-m15-mstd0.5-inc1 0.8   0.25  3       0.2  -      224 0.95
faster_vit_3   map_faster_vit_3_224   4096  16    300    lamb_timm 1e-8 5e-3 0.05 35   5e-6 5.0  softmax 0.1    rand-m15-mstd0.5-inc1 0.8   0.25  3       0.3  -      224 0.95
"""  # noqa: E501
MAP_ALL = {"cutmix": 1.0, "sched": "cosine", "wlr": 1e-6, "cool": 10, "per": "epoch", "decor": -0.8, "jitter": None}

GRAMIAN = """
recipe         model                 lr   drop crop
convnext_tiny  ga_convnext_tiny_688  5e-3 0.2  0.875
convnext_small ga_convnext_small_688 5e-3 0.4  0.875
convnext_base  ga_convnext_base_976  5e-3 0.5  0.875
cswin_tiny     ga_cswin_tiny_p42     2e-3 0.2  0.9
cswin_small    ga_cswin_small_p54    2e-3 0.4  0.9
"""
GRAMIAN_ALL = {
    **{"batch": 1024, "micro": 4, "epochs": 300, "opt": "lamb_timm", "eps": 1e-8, "wd": 0.05, "clip": None},
    **{"sched": "cosine", "warm": 3, "wlr": 1e-6, "min": 1e-6, "cool": 0, "per": "epoch", "loss": "bce"},
    **{"decor": -0.8, "smooth": 0.1, "aug": "rand-m9-mstd0.5-inc1", "mixup": 0.2, "cutmix": 1.0, "erase": 0.0},
    **{"repeats": 3, "px": 224, "ema": None},
}

METAFORMER = """
recipe             opt       lr   warm drop
identityformer_s12 adamw     4e-3 5    0.1
identityformer_s24 adamw     4e-3 5    0.1
identityformer_s36 adamw     4e-3 5    0.2
identityformer_m36 adamw     4e-3 5    0.3
identityformer_m48 adamw     4e-3 5    0.4
randformer_s12     adamw     4e-3 5    0.1
randformer_s24     adamw     4e-3 5    0.1
randformer_s36     adamw     4e-3 5    0.2
randformer_m36     adamw     4e-3 5    0.3
randformer_m48     adamw     4e-3 5    0.3
poolformerv2_s12   adamw     4e-3 5    0.1
poolformerv2_s24   adamw     4e-3 5    0.1
poolformerv2_s36   adamw     4e-3 5    0.2
poolformerv2_m36   adamw     4e-3 5    0.3
poolformerv2_m48   adamw     4e-3 5    0.4
convformer_s18     adamw     4e-3 20   0.2
convformer_s36     adamw     4e-3 20   0.3
convformer_m36     adamw     4e-3 20   0.4
convformer_b36     adamw     4e-3 20   0.6
caformer_s18       lamb_timm 8e-3 20   0.15
caformer_s36       lamb_timm 8e-3 20   0.3
caformer_m36       lamb_timm 8e-3 20   0.4
caformer_b36       lamb_timm 8e-3 20   0.6
"""
METAFORMER_SHARED = {"wd": 0.05, "smooth": 0.1, "aug": "rand-m9-mstd0.5-inc1", "erase": 0.25, "repeats": 1, "eps": None}
METAFORMER_SHARED |= {"loss": "softmax", "dtype": "float32", "crop": 1.0, "micro": 4, "clip": None, "per": "epoch"}
METAFORMER_ALL = METAFORMER_SHARED | {
    **{"batch": 4096, "epochs": 300, "sched": "cosine", "wlr": 1e-6, "min": 1e-5, "cool": 10},
    **{"mixup": 0.8, "cutmix": 1.0, "ema": None, "px": 224},
}
METAFORMER_384 = """
recipe             opt       lr   drop
convformer_s18_384 adamw     5e-5 0.3
convformer_s36_384 adamw     5e-5 0.5
convformer_m36_384 adamw     5e-5 0.8
convformer_b36_384 adamw     5e-5 0.8
caformer_s18_384   lamb_timm 1e-4 0.3
caformer_s36_384   lamb_timm 1e-4 0.5
caformer_m36_384   lamb_timm 1e-4 0.7
caformer_b36_384   lamb_timm 1e-4 0.8
"""
METAFORMER_384_ALL = METAFORMER_SHARED | {
    **{"batch": 1024, "epochs": 30, "sched": "constant", "warm": 0, "cool": 0, "mixup": 0.0, "cutmix": 0.0},
    **{"ema": 0.9999, "px": 384},
}
HEAD_DROPOUT = {
    **{"caformer_s18": 0.0, "caformer_s36": 0.4, "caformer_m36": 0.4, "caformer_b36": 0.5},
    **{"convformer_s18_384": 0.4, "convformer_s36_384": 0.4, "convformer_m36_384": 0.5, "convformer_b36_384": 0.5},
    **{"caformer_s18_384": 0.4, "caformer_s36_384": 0.4, "caformer_m36_384": 0.4, "caformer_b36_384": 0.5},
}

MAXVIT = """
recipe      model               epochs lr   drop sched  wsteps warm wd   smooth loss    mixup aug                  ema
tiny        maxvit_tiny_tf_224   300   3e-3 0.2  cosine 10000  0    0.05 0.1    softmax 0.8   rand-m15-n2-p1-mmax15 0.9999
small       maxvit_small_tf_224  300   3e-3 0.3  cosine 10000  0    0.05 0.1    softmax 0.8   rand-m15-n2-p1-mmax15 0.9999
base        maxvit_base_tf_224   300   3e-3 0.4  cosine 10000  0    0.05 0.1    softmax 0.8   rand-m15-n2-p1-mmax15 0.9999
large       maxvit_large_tf_224  300   3e-3 0.6  cosine 10000  0    0.05 0.1    softmax 0.8   rand-m15-n2-p1-mmax15 0.9999
xlarge      maxvit_xlarge_tf_224 300   1e-3 0.7  cosine 10000  0    0.05 0.1    softmax 0.8   rand-m15-n2-p1-mmax15 0.9999
base_21k    maxvit_base_tf_224   90    1e-3 0.3  linear -      5    0.01 1e-4   bce     0.0   rand-m5-n2-p1         -
large_21k   maxvit_large_tf_224  90    1e-3 0.4  linear -      5    0.01 1e-4   bce     0.0   rand-m5-n2-p1         -
xlarge_21k  maxvit_xlarge_tf_224 90    1e-3 0.6  linear -      5    0.01 1e-4   bce     0.0   rand-m5-n2-p1         -
base_jft    maxvit_base_tf_224   14    1e-3 0.0  linear 20000  0    0.01 0.0    bce     0.0   rand-m5-n2-p1         -
large_jft   maxvit_large_tf_224  14    1e-3 0.0  linear 20000  0    0.01 0.0    bce     0.0   rand-m5-n2-p1         -
xlarge_jft  maxvit_xlarge_tf_224 14    1e-3 0.0  linear 20000  0    0.01 0.0    bce     0.0   rand-m5-n2-p1         -
"""  # noqa: E501
MAXVIT_SHARED = {"opt": "adamw", "clip": 1.0, "cutmix": 0.0, "erase": 0.0, "repeats": 1, "dtype": "bfloat16"}
MAXVIT_ALL = MAXVIT_SHARED | {"batch": 4096, "min": 1e-5, "per": "step", "px": 224, "mode": "center"}
MAXVIT_TUNED = """
recipe     drop mixup
tiny       0.2  0.8
small      0.3  0.8
base       0.4  0.8
large      0.6  0.8
base_21k   0.4  0.0
large_21k  0.5  0.0
xlarge_21k 0.9  0.0
base_jft   0.1  0.0
large_jft  0.2  0.0
xlarge_jft 0.2  0.0
"""
MAXVIT_TUNED_ALL = MAXVIT_SHARED | {
    **{"batch": 512, "epochs": 30, "lr": 5e-5, "sched": "constant", "warm": 0, "wsteps": None, "wd": 1e-8},
    **{"smooth": 0.1, "loss": "softmax", "ema": 0.9999, "aug": "rand-m15-n2-p1-mmax15", "mode": "squash", "crop": 1.0},
    **{"mean": (0.5, 0.5, 0.5)},
}


def rows(table: str) -> dict[str, dict[str, Any]]:
    """Recipe -> column -> value; '-' is None, and what reads as a number is one."""
    header, *lines = (line.split() for line in table.strip().splitlines())

    def value(text: str) -> Any:
        try:
            return None if text == "-" else json.loads(text)
        except json.JSONDecodeError:
            return text

    return {line[0]: dict(zip(header[1:], map(value, line[1:]), strict=True)) for line in lines}


CASES: dict[str, dict[str, Any]] = {}
for file, table, shared in (
    ("map", MAP, MAP_ALL),
    ("gramian", GRAMIAN, GRAMIAN_ALL),
    ("metaformer", METAFORMER, METAFORMER_ALL),
    ("metaformer", METAFORMER_384, METAFORMER_384_ALL),
    ("maxvit", MAXVIT, MAXVIT_ALL),
):
    CASES |= {f"configs/{file}.py:{name}": shared | row for name, row in rows(table).items()}
for name, row in rows(MAXVIT_TUNED).items():
    for pixels in (384, 512):
        its = {"px": pixels, "model": f"maxvit_{name.split('_')[0]}_tf_{pixels}"}
        CASES[f"configs/maxvit.py:{name}_{pixels}"] = MAXVIT_TUNED_ALL | row | its


def test_no_recipe_is_left_out():
    files = [f"configs/{file}.py" for file in ("map", "gramian", "metaformer", "maxvit")]
    assert {name for file in files for name in builds(file)[1:]} == set(CASES)
    assert [sum(name.startswith(file) for name in CASES) for file in files] == [7, 5, 31, 31]


@pytest.mark.parametrize("name", CASES)
def test_the_values_are_the_published_ones(name):
    config = load(name)
    wanted = {"flip": 0.5} | CASES[name]
    found = {}
    for column in wanted:
        section, _, key = COLUMNS[column].rpartition(".")
        if section == "model":  # MobileNet has no stochastic depth, and its recipe names none
            found[column] = config["model"].get(key, 0.0)
        elif section:
            found[column] = config[section][key]
        else:
            found[column] = config[key]
    assert found == wanted


@pytest.mark.parametrize("name", CASES)
def test_the_model_has_what_the_recipe_says(name):
    config = load(name)
    model = bind(config).model()
    assert model.backbone.drop_path == config["model"].get("drop_path", 0.0)
    short = name.split(":")[1]
    if "metaformer" in name:
        assert config["model"]["name"] == short  # three of the released scripts name another one
        assert model.head.dropout == HEAD_DROPOUT.get(short, 0.0)
    if "gramian" in name:
        assert model.head.drop_path == model.backbone.drop_path
    if "maxvit.py" in name:
        assert not model.backbone.drop_path_endpoint


# The golden's key -> our recipe.
RATES = {
    **{f"map_{name}": f"configs/map.py:{name}" for name in rows(MAP)},
    **{f"ga_{a}_{b[0]}": f"configs/gramian.py:{a}_{b}" for a, b in (name.split("_") for name in rows(GRAMIAN))},
    "metaformer_train_caformer_s18": "configs/metaformer.py:caformer_s18",
    "metaformer_train_convformer_s18": "configs/metaformer.py:convformer_s18",
    "metaformer_train_identityformer_s12": "configs/metaformer.py:identityformer_s12",
    "metaformer_finetune_caformer_s18_384": "configs/metaformer.py:caformer_s18_384",
    "metaformer_finetune_convformer_s18_384": "configs/metaformer.py:convformer_s18_384",
}


def test_every_published_rate_is_compared(goldens):
    with np.load(goldens / "schedules.npz") as stored:
        assert {key for key in stored.files if "per_update" not in key} == set(RATES)


@pytest.mark.parametrize("key", RATES)
def test_the_rate_of_every_epoch_is_timms(key, goldens, x64):
    config = load(RATES[key])
    schedule = bind(config).schedule(steps_per_epoch=7, epochs=config["epochs"])
    with np.load(goldens / "schedules.npz") as stored:
        wanted = stored[key]
    assert schedule.total_epochs == len(wanted)
    steps = np.arange(schedule.total_steps)
    np.testing.assert_allclose(schedule(steps), np.repeat(wanted, 7), rtol=1e-12)


def test_maxvits_warm_up_is_ten_thousand_steps(x64):
    config = load("configs/maxvit.py:tiny")
    schedule = bind(config).schedule(steps_per_epoch=312, epochs=config["epochs"])
    assert [float(schedule(step)) for step in (0, 5000, 9999)] == pytest.approx([0, 1.5e-3, 2.9997e-3], rel=1e-12)
    assert float(schedule(312 * 300 - 1)) == pytest.approx(1e-5, rel=1e-6)


@pytest.mark.parametrize(("name", "drop_path"), [("tiny", 0.4), ("small", 0.3), ("base", 0.4)])
def test_segmentation(name, drop_path):
    """The values of ConvNeXt's configs for ADE20K, of 20,210 training images, in mmsegmentation."""
    config = load(f"configs/segmentation.py:{name}")
    recipe = bind(config)
    model, data = recipe.model(), recipe.data.keywords
    assert (model.head.num_classes, model.head.channels, model.head.auxiliary_channels) == (150, 512, 256)
    assert config["model"]["name"] == f"convnext_{name}" and model.backbone.drop_path == drop_path
    assert (recipe.batch_size, recipe.steps, recipe.loss.keywords["auxiliary"]) == (16, 160_000, 0.4)
    assert (data["image_size"], data["zoom"], data["reduce_zero_label"]) == (512, (0.5, 2.0), True)
    assert (config["optim"]["name"], config["optim"]["weight_decay"]) == ("adamw", 0.05)
    rate = recipe.schedule(steps_per_epoch=20_210 // 16, epochs=recipe.epochs)
    assert rate.total_steps >= 160_000
    found = [float(rate(step)) for step in (0, 750, 1500, 80_750, 159_999)]
    # The linear decay ends 401 steps later, at the end of an epoch, and begins at the first step.
    np.testing.assert_allclose(found, [1e-10, 5e-5, 1e-4, 5e-5, 0], atol=1e-6)


@pytest.mark.parametrize("pixels", [224, 384, 512])
def test_aesthetics(pixels):
    """The values that MaxViT's paper states."""
    recipe = bind(load(f"configs/aesthetics.py:tiny_{pixels}"))
    model = recipe.model(num_classes=10)
    assert (model.backbone.image_size, recipe.data.keywords["image_size"]) == (pixels, pixels)
    assert (model.head.dropout, model.backbone.drop_path) == (0.75, 0.5)
    schedule = recipe.schedule(steps_per_epoch=5, epochs=recipe.epochs)
    wanted = [1e-3 * 0.9 ** (epoch // 10) for epoch in range(schedule.total_epochs)]
    np.testing.assert_allclose([schedule(5 * epoch) for epoch in range(schedule.total_epochs)], wanted, rtol=1e-6)
    optimizer = recipe.optim(0.1)
    params = {"head": {"kernel": np.ones((2, 2), np.float32)}}
    state, updates = optimizer.init(params), []
    for _ in range(2):
        update, state = optimizer.update(params, state, params)
        updates.append(update["head"]["kernel"][0, 0])
    np.testing.assert_allclose(updates, [-0.1, -0.19], rtol=1e-6)  # momentum of 0.9, which Nesterov's would not be
    assert recipe.loss.keywords["name"] == "emd" and recipe.data.keywords["task"] == "distribution"
