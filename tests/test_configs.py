"""Every config builds and says what its recipe says, and the flagship is the published recipe."""

import runpy
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from maxmap import tasks
from maxmap.config import _fixed_schema, bind, read
from maxmap.errors import UserError
from maxmap.recipe_files import TABLES, describe, names
from maxmap.schedule import make_schedule
from maxmap.train.build import Images, make_prepare
from tests.tiny import ROOT

CONFIGS = sorted(f"configs/{path.name}" for path in (ROOT / "configs").glob("*.py"))


def builds(file: str) -> list[str]:
    module = runpy.run_path(str(ROOT / file))
    return [file, *(f"{file}:{name}" for table in TABLES for name in module.get(table, ()))]


BUILDS = [name for file in CONFIGS for name in builds(file)]


def load(name: str) -> dict[str, Any]:
    return read(ROOT / name)


def test_a_recipe_is_found_by_its_name_and_tells_its_arguments(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where there is no configs/
    found = [
        name if argument is None else f"{name}:{argument}"
        for name in names()
        for argument in [None, *describe(name).arguments]
    ]
    assert [f"configs/{name.replace(':', '.py:') if ':' in name else name + '.py'}" for name in found] == BUILDS
    assert read("finetune:medium") == read("finetune.py:medium") == load("configs/finetune.py:medium")
    assert read("map:maxvit_tiny") == read("maxvit_tiny_map")  # one file reads the other
    (tmp_path / "finetune.py").write_text((ROOT / "configs/quickstart.py").read_text())
    assert read("finetune.py") == read("quickstart")  # a file that is there is meant


@pytest.mark.parametrize("name", names())
def test_a_recipe_begins_with_a_sentence(name):
    assert describe(name).about == (ROOT / f"configs/{name}.py").read_text().splitlines()[0].removeprefix('"""')


def test_the_configs_that_are_promised_exist():
    assert {"configs/quickstart.py", "configs/cifar10.py", "configs/maxvit_tiny_map.py"} <= set(CONFIGS)


@pytest.mark.parametrize("name", BUILDS)
def test_a_config_builds(name):
    recipe = bind(load(name))
    model = recipe.model(num_classes=10)
    assert model.head.num_classes == 10
    schedule = recipe.schedule(steps_per_epoch=5000, epochs=recipe.epochs)
    assert float(schedule(schedule.total_steps // 2)) > 0
    blocks = [["backbone/stem"], ["backbone/block"]]
    params = {"backbone": {"block": {"kernel": jnp.zeros((2, 2))}}, "head": {"fc": {"kernel": jnp.zeros((2, 2))}}}
    state = recipe.optim(schedule, blocks=blocks).init(params)
    assert sum(leaf.size for leaf in jax.tree.leaves(state)) >= 4  # a moment at least


@pytest.mark.parametrize("name", BUILDS)
def test_a_file_says_nothing_that_a_default_says(name):
    """So that what stands in a recipe is the recipe."""
    file, *argument = name.split(":")
    module = runpy.run_path(str(ROOT / file))
    said = module["get_config"](*argument).to_dict()
    tables = [changes for table in TABLES for changes in module.get(table, {}).values() if changes]
    allowed = {path for changes in tables for path in changes}  # one recipe of a table may have the default
    for path, key in _fixed_schema().items():
        section, _, last = path.rpartition(".")
        at = said.get(section, {}) if section else said
        if last in at and path not in allowed:
            assert at[last] != key.default, f"{name} says {path} = {at[last]!r}, which is the default"


# Tracing takes a second: one config for each way to augment.
TRACED = {
    repr([config[key] for key in ("augment", "mix", "erase", "loss")]): name
    for name, config in zip(BUILDS, map(load, BUILDS), strict=True)
}


@pytest.mark.parametrize("name", TRACED.values())
def test_what_happens_to_a_batch_can_be_traced(name):
    recipe = bind(load(name))
    pre = {key: recipe.values["data"][key] for key in ("mean", "std")}
    task = tasks.unfitted(recipe.values["data"]["task"], 10)
    prepare = make_prepare(recipe, Images(32, 10, **pre, task=task))
    batch, labels = jax.ShapeDtypeStruct((4, 32, 32, 3), jnp.uint8), task.label_like(4, 10, 32)
    images, targets = jax.eval_shape(prepare, jax.random.key(0), batch, labels)
    wanted = labels.shape if task.dense else (4, 10)
    assert (images.shape, images.dtype, targets.shape) == (batch.shape, jnp.float32, wanted)
    outputs = {"logits": jax.ShapeDtypeStruct((4, 4, 8, 8, 10) if task.dense else (4, 4, 10), jnp.float32)}
    loss, parts = jax.eval_shape(recipe.loss, outputs, targets)
    assert loss.shape == () and "loss" in parts


def test_the_data_of_the_quickstart_needs_nothing():
    data = bind(load("configs/quickstart.py")).data()
    assert (data.num_train, data.num_eval, len(data.classes)) == (1437, 360, 10)


@pytest.mark.parametrize("name", ["linear", "gramian"])
def test_the_trial_differs_in_the_head_alone(name):
    one, other = (load(f"configs/cifar10.py:{head}") for head in ("map", name))
    assert {**other, "model": {**other["model"], "head": None}} == one == load("configs/cifar10.py")
    ours, its = (bind(values).model(num_classes=10) for values in (one, other))
    assert ours.backbone == its.backbone and type(ours.head) is not type(its.head)


@pytest.mark.parametrize("file", ["cifar10", "map", "gramian", "metaformer", "maxvit", "finetune"])
def test_a_recipe_that_there_is_not(file):
    with pytest.raises(UserError, match=f"{file}.py:linaer is no .*: .* are "):
        load(f"configs/{file}.py:linaer")


def test_the_flagship_is_one_of_the_map_recipes():
    assert load("configs/maxvit_tiny_map.py") == load("configs/map.py:maxvit_tiny")


def test_a_training_set_that_a_preset_is_for_fills_an_epoch():
    for preset, images in {"small": 100, "medium": 5000, "large": 100_000}.items():
        assert images // load(f"configs/finetune.py:{preset}")["batch_size"] >= 3


@pytest.mark.parametrize("file", CONFIGS)
def test_only_fine_tuning_turns_photos(file):
    """The published networks were trained without the EXIF orientation."""
    assert load(file)["data"]["exif"] == (file == "configs/finetune.py")


@pytest.mark.parametrize("name", builds("configs/finetune.py"))
def test_a_short_run_has_a_short_warm_up(name):
    """A preset keeps its warm-up in a run of its own length, and a run of one or two epochs learns too."""
    section, epochs = load(name)["schedule"], load(name)["epochs"]

    def rates(epochs: int, **changes: Any) -> jax.Array:
        return make_schedule(steps_per_epoch=9, epochs=epochs, **{**section, **changes})(jnp.arange(9 * epochs))

    assert jnp.array_equal(rates(epochs), rates(epochs, warmup_max_share=None))
    for epochs in (1, 2):
        warmup = {"warmup_epochs": 0, "warmup_steps": round(section["warmup_max_share"] * 9 * epochs)}
        assert jnp.array_equal(rates(epochs), rates(epochs, warmup_max_share=None, **warmup))
        assert float(max(rates(epochs))) > 0.85 * section["lr"]


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
        "kernels": "auto",
        "ema_decay": None,
        "init_from": None,
    }
    assert config["batch_size"] // config["accumulate"] == 2 * 64
    assert bind(config).model.keywords == {"name": "map_maxvit_tiny_tf_224", "drop_path": 0.2}

    def has(section: str, **wanted: Any) -> None:
        assert {key: config[section][key] for key in wanted} == wanted

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
        warmup_max_share=None,
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
    schedule = bind(config).schedule(steps_per_epoch=steps_per_epoch, epochs=config["epochs"])
    assert steps_per_epoch == 312 and schedule.total_epochs == 310
    rates = {epoch: float(schedule(epoch * steps_per_epoch)) for epoch in (0, 15, 300, 309)}
    assert rates == pytest.approx({0: 1e-6, 15: (1e-6 + 8e-3) / 2, 300: 1e-5, 309: 1e-5}, rel=1e-4)
