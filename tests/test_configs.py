"""Every config builds, its sections are arguments of one function each, and the flagship is the published recipe."""

import inspect
import runpy
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from maxmap import evaluate
from maxmap.data import augment, mix, pipeline
from maxmap.errors import call
from maxmap.losses import total_loss
from maxmap.models import create_model
from maxmap.optim import make_optimizer
from maxmap.schedule import make_schedule
from maxmap.sharding import make_mesh
from maxmap.train import loop
from tests.tiny import ROOT

SECTIONS: dict[str, Callable[..., Any]] = {
    "mesh": make_mesh,
    "data": pipeline.open_data,
    "augment": augment.augment,
    "mix": mix.mix,
    "erase": augment.erase,
    "optim": make_optimizer,
    "schedule": make_schedule,
    "loss": total_loss,
    "evaluate": evaluate.settings,
    "checkpoint": loop._saving,
    "log": loop._logging,
}
CONFIGS = sorted(f"configs/{path.name}" for path in (ROOT / "configs").glob("*.py"))
# The names that a file with several recipes takes after the colon.
TABLES = ("RECIPES", "PRESETS", "HEADS")


def builds(file: str) -> list[str]:
    module = runpy.run_path(str(ROOT / file))
    return [file, *(f"{file}:{name}" for table in TABLES for name in module.get(table, ()))]


BUILDS = [name for file in CONFIGS for name in builds(file)]


def load(name: str) -> dict[str, Any]:
    file, *argument = name.split(":")
    return runpy.run_path(str(ROOT / file))["get_config"](*argument).to_dict()


def effective(section: str, values: dict[str, Any]) -> dict[str, Any]:
    """A section with the defaults of its function."""
    bound = inspect.signature(SECTIONS[section]).bind_partial(**values)
    bound.apply_defaults()
    return dict(bound.arguments)


def test_the_configs_that_are_promised_exist():
    assert {"configs/quickstart.py", "configs/cifar10.py", "configs/maxvit_tiny_map.py"} <= set(CONFIGS)


@pytest.mark.parametrize("name", BUILDS)
def test_sections_are_keyword_arguments(name):
    config = load(name)
    evaluate.check_config(config)
    loop._check_numbers(config)
    for section, function in SECTIONS.items():
        parameters = inspect.signature(function).parameters
        unknown = config[section].keys() - parameters.keys()
        assert not unknown, f"config.{section} has {unknown}, which {function.__name__} does not take"


@pytest.mark.parametrize("name", BUILDS)
def test_a_config_builds(name):
    config = load(name)
    kwargs = {key: value for key, value in config["model"].items() if value is not None}
    model = call(create_model, "model", kwargs | {"num_classes": 10})
    assert model.head.num_classes == 10
    for section in ("evaluate", "checkpoint", "log"):
        call(SECTIONS[section], section, config[section])
    schedule = call(make_schedule, "schedule", config["schedule"], steps_per_epoch=5000, epochs=config["epochs"])
    assert float(schedule(schedule.total_steps // 2)) > 0
    optimizer = call(make_optimizer, "optim", config["optim"], schedule, blocks=[["stem"]])
    optimizer.init({"kernel": jnp.zeros((2, 2))})
    assert config["batch_size"] % config["accumulate"] == 0


# Tracing takes a second: one config for each way to augment.
TRACED = {repr([load(name)[key] for key in ("augment", "mix", "erase", "loss")]): name for name in BUILDS}


@pytest.mark.parametrize("name", TRACED.values())
def test_what_happens_to_a_batch_can_be_traced(name):
    config = load(name)
    mean = config["data"]["mean"]
    size = 32
    batch = jax.ShapeDtypeStruct((4, size, size, 3), jnp.uint8)

    def prepare(key, images, labels):
        images = call(augment.augment, "augment", config["augment"], key, images, mean=mean)
        images, targets = call(mix.mix, "mix", config["mix"], key, images, labels, num_classes=10)
        images = call(augment.erase, "erase", config["erase"], key, augment.normalize(images, mean, mean))
        return images, targets

    images, targets = jax.eval_shape(prepare, jax.random.key(0), batch, jax.ShapeDtypeStruct((4,), jnp.int32))
    assert (images.shape, images.dtype, targets.shape) == (batch.shape, jnp.float32, (4, 10))
    outputs = {"logits": jax.ShapeDtypeStruct((4, 4, 10), jnp.float32)}
    loss, parts = jax.eval_shape(lambda o, t: call(total_loss, "loss", config["loss"], o, t), outputs, targets)
    assert loss.shape == () and "loss" in parts


def test_the_data_of_the_quickstart_needs_nothing():
    data = call(pipeline.open_data, "data", load("configs/quickstart.py")["data"])
    assert (data.num_train, data.num_eval, len(data.classes)) == (1437, 360, 10)


@pytest.mark.parametrize("name", ["linear", "gramian"])
def test_the_trial_differs_in_the_head_alone(name):
    one, other = load("configs/cifar10.py:map"), load(f"configs/cifar10.py:{name}")
    head = other["model"].pop("head")
    assert one == other and head["name"] == name
    assert one == load("configs/cifar10.py")
    map_model, other_model = create_model(**one["model"]), create_model(**other["model"], head=head)
    assert map_model.backbone == other_model.backbone and type(map_model.head) is not type(other_model.head)


@pytest.mark.parametrize("file", ["cifar10", "map", "gramian", "metaformer", "maxvit", "finetune"])
def test_a_recipe_that_there_is_not(file):
    with pytest.raises(ValueError, match=f"{file}.py:linaer is no .*: .* are "):
        load(f"configs/{file}.py:linaer")


def test_the_flagship_is_one_of_the_map_recipes():
    one, other = load("configs/maxvit_tiny_map.py"), load("configs/map.py:maxvit_tiny")
    assert other["data"].pop("eval_image_size") is None
    assert one == other


def test_a_training_set_that_a_preset_is_for_fills_an_epoch():
    for preset, images in {"small": 100, "medium": 5000, "large": 100_000}.items():
        assert images // load(f"configs/finetune.py:{preset}")["batch_size"] >= 3


def test_the_flagship_is_the_published_recipe():
    config = load("configs/maxvit_tiny_map.py")
    top = {key: value for key, value in config.items() if not isinstance(value, dict)}
    assert top == {
        "seed": 42,
        "epochs": 300,
        "steps": None,
        "batch_size": 4096,
        "accumulate": 32,  # of 64 images on each of two GPUs
        "dtype": "bfloat16",
        "batch_norm": "averaged",
        "ema_decay": None,
        "init_from": None,
    }
    assert config["batch_size"] // config["accumulate"] == 2 * 64
    model = {key: value for key, value in config["model"].items() if value is not None}
    assert model == {"name": "map_maxvit_tiny_tf_224", "drop_path": 0.2}

    def has(section: str, **wanted: Any) -> None:
        values = effective(section, config[section])
        assert {key: values[key] for key in wanted} == wanted

    has(
        "data",
        image_size=224,
        eval_image_size=None,
        scale=(0.08, 1.0),
        ratio=(3 / 4, 4 / 3),
        interpolation="random",
        repeats=3,
        crop_pct=0.95,
        crop_mode="center",
        eval_interpolation="bicubic",
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
    )
    has("augment", hflip=0.5, vflip=0.0, rand_augment="rand-m15-mstd0.5-inc1", color_jitter=None)
    has("mix", mixup=0.8, cutmix=1.0, prob=1.0, switch_prob=0.5, smoothing=0.1)
    has("erase", prob=0.25, mode="pixel", min_area=0.02, max_area=1 / 3, min_aspect=0.3, count=1)
    has("optim", name="lamb_timm", weight_decay=0.05, eps=1e-6, clip_norm=1.0)
    has(
        "schedule",
        name="cosine",
        lr=8e-3,
        warmup_epochs=30,
        warmup_lr=1e-6,
        min_lr=1e-5,
        cooldown_epochs=10,
        warmup_prefix=False,
        per="epoch",
    )
    has(
        "loss",
        name="bce",
        decorrelation=-0.8,
        distillation=1.0,
        target_threshold=None,
        term_reduction="batch_class_mean",
    )
    has("mesh", data=-1)


def test_the_flagship_runs_as_long_as_published():
    config = load("configs/maxvit_tiny_map.py")
    # ImageNet with repeated augmentation: an epoch of floor(1281167 / 256) * 256 samples.
    steps_per_epoch = 1281167 // 256 * 256 // config["batch_size"]
    schedule = call(
        make_schedule, "schedule", config["schedule"], steps_per_epoch=steps_per_epoch, epochs=config["epochs"]
    )
    assert steps_per_epoch == 312 and schedule.total_epochs == 310
    rates = {epoch: float(schedule(epoch * steps_per_epoch)) for epoch in (0, 15, 300, 309)}
    assert rates == pytest.approx({0: 1e-6, 15: (1e-6 + 8e-3) / 2, 300: 1e-5, 309: 1e-5}, rel=1e-4)
