"""Schedules, against the rates that timm gives for the published recipes (tests/goldens/schedules.*) and by hand."""

import json
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from maxmap.errors import UserError
from maxmap.schedule import make_schedule

GOLDENS = pathlib.Path(__file__).parent / "goldens"
RATES = np.load(GOLDENS / "schedules.npz")
RECIPES = json.loads((GOLDENS / "schedules.json").read_text())


def recipe_schedule(key, steps_per_epoch):
    recipe = RECIPES[key]
    if recipe["sched"] == "None":  # the fine-tuning scripts: no scheduler, so no warm-up and no cool-down either
        return make_schedule(steps_per_epoch=steps_per_epoch, epochs=recipe["epochs"], lr=recipe["lr"], name="constant")
    return make_schedule(
        steps_per_epoch=recipe["updates_per_epoch"] or steps_per_epoch,
        epochs=recipe["epochs"],
        lr=recipe["lr"],
        name=recipe["sched"],
        warmup_epochs=recipe["warmup_epochs"],
        warmup_lr=recipe["warmup_lr"],
        min_lr=recipe["min_lr"],
        cooldown_epochs=recipe["cooldown_epochs"],
        per="step" if recipe["updates_per_epoch"] else "epoch",
    )


def test_every_recipe_is_there():
    assert len(RECIPES) == 19
    assert {key for key in RECIPES if RECIPES[key]["updates_per_epoch"]} == {
        "map_maxvit_tiny_per_update_5",
        "map_convnext_tiny_per_update_5",
    }


@pytest.mark.parametrize("key", sorted(RECIPES))
def test_rates_of_the_recipes(key, x64):
    schedule = recipe_schedule(key, steps_per_epoch=7)
    assert schedule.total_epochs == RECIPES[key]["total_epochs"]
    steps = np.arange(schedule.total_steps)
    wanted = RATES[key] if RECIPES[key]["updates_per_epoch"] else np.repeat(RATES[key], 7)
    assert len(wanted) == len(steps)
    np.testing.assert_allclose(jax.vmap(schedule)(steps), wanted, rtol=1e-12)


@pytest.mark.parametrize("key", sorted(RECIPES))
def test_rates_of_the_recipes_in_float32(key):
    """Relative precision holds to the end, where 1 + cos would have cancelled."""
    schedule = recipe_schedule(key, steps_per_epoch=7)
    rates = jax.vmap(schedule)(jnp.arange(schedule.total_steps))
    wanted = RATES[key] if RECIPES[key]["updates_per_epoch"] else np.repeat(RATES[key], 7)
    assert rates.dtype == jnp.float32
    np.testing.assert_allclose(rates, wanted, rtol=1e-6)


def test_the_clock_is_exact_after_millions_of_steps():
    """Neither the step nor the epoch may pass through a float: 2**24 + 1 is no float32."""
    schedule = make_schedule(steps_per_epoch=55_947, epochs=300, lr=1.0, min_lr=0.0, name="linear")
    edge = 300 * 55_947 - 55_947  # 16,728,153: the first step of the last epoch
    assert edge + 55_947 > 2**24
    np.testing.assert_allclose([schedule(edge - 1), schedule(edge)], [2 / 300, 1 / 300], rtol=1e-6)
    assert schedule(edge + 55_946) == schedule(edge)
    assert schedule(edge + 55_947) == 0.0

    each = make_schedule(steps_per_epoch=2**20, epochs=32, lr=1.0, min_lr=0.0, name="linear", per="step")
    np.testing.assert_allclose([each(2**25 - step) for step in range(1, 6)], np.arange(1, 6) / 2**25, rtol=1e-6)


def rates_of(**options):
    schedule = make_schedule(**{"steps_per_epoch": 1, "lr": 1.0, "min_lr": 0.1, "warmup_lr": 0.2, **options})
    return np.array([schedule(step) for step in range(schedule.total_steps)])


def test_linear_by_hand(x64):
    wanted = [0.2, 0.6, 0.1 + 0.9 * 3 / 5, 0.1 + 0.9 * 2 / 5, 0.1 + 0.9 / 5, 0.1]
    rates = rates_of(name="linear", epochs=5, warmup_epochs=2, cooldown_epochs=1)
    np.testing.assert_allclose(rates, wanted, rtol=1e-14)


def test_wsd_by_hand(x64):
    rates = rates_of(name="wsd", epochs=7, warmup_epochs=2, decay_epochs=3, cooldown_epochs=2)
    np.testing.assert_allclose(rates, [0.2, 0.6, 1.0, 1.0, 1.0, 0.7, 0.4, 0.1, 0.1], rtol=1e-14)


def test_constant_warms_up_and_stays(x64):
    np.testing.assert_allclose(
        rates_of(name="constant", epochs=3, warmup_epochs=1, cooldown_epochs=1), [0.2, 1, 1, 1], rtol=1e-14
    )


def test_step_by_hand(x64):
    options = {"name": "step", "epochs": 7, "decay_epochs": 3, "decay_rate": 0.5}
    rates = rates_of(**options, cooldown_epochs=2)
    np.testing.assert_allclose(rates, [1, 1, 1, 0.5, 0.5, 0.5, 0.25, 0.25, 0.25], rtol=1e-14)
    np.testing.assert_allclose(rates_of(**options, warmup_epochs=2)[:4], [0.2, 0.6, 1, 0.5], rtol=1e-14)
    prefixed = rates_of(**options, warmup_epochs=2, warmup_prefix=True)
    np.testing.assert_allclose(prefixed, [0.2, 0.6, *rates[:7]], rtol=1e-14)


@pytest.mark.parametrize("name", ["cosine", "linear", "constant"])
def test_warmup_prefix_shifts_the_decay(name, x64):
    prefixed = rates_of(name=name, epochs=6, warmup_epochs=3, cooldown_epochs=2, warmup_prefix=True)
    np.testing.assert_allclose(prefixed[:3], [0.2, 0.2 + 0.8 / 3, 0.2 + 1.6 / 3], rtol=1e-14)
    np.testing.assert_allclose(prefixed[3:], rates_of(name=name, epochs=6, cooldown_epochs=2), rtol=1e-14)


def test_per_step_takes_parts_of_epochs(x64):
    schedule = make_schedule(
        steps_per_epoch=312, epochs=300, lr=3e-3, warmup_epochs=10_000 / 312, warmup_lr=0.0, per="step"
    )
    np.testing.assert_allclose(schedule(9_999), 3e-3 * 0.9999, rtol=1e-12)
    wanted = 1e-6 + (3e-3 - 1e-6) * (1 + math.cos(math.pi * 10_000 / 93_600)) / 2
    np.testing.assert_allclose(schedule(10_000), wanted, rtol=1e-12)


@pytest.mark.parametrize("prefix", [False, True])
def test_a_warm_up_in_steps(prefix, x64):
    steps = make_schedule(steps_per_epoch=4, epochs=3, lr=1.0, warmup_steps=6, warmup_prefix=prefix, per="step")
    epochs = make_schedule(steps_per_epoch=4, epochs=3, lr=1.0, warmup_epochs=1.5, warmup_prefix=prefix, per="step")
    assert steps.total_steps == epochs.total_steps == (20 if prefix else 12)
    np.testing.assert_array_equal(steps(np.arange(20)), epochs(np.arange(20)))


def test_a_warm_up_is_cut_to_its_largest_share(x64):
    def peaks(**options):
        schedule = make_schedule(steps_per_epoch=10, epochs=4, lr=1.0, name="constant", per="step", **options)
        return int(np.argmax(schedule(np.arange(schedule.total_steps))))

    assert peaks(warmup_epochs=30, warmup_max_share=0.25) == peaks(warmup_steps=999, warmup_max_share=0.25) == 10
    assert peaks(warmup_epochs=0.5, warmup_max_share=0.25) == 5  # a shorter one stays
    assert peaks(warmup_epochs=3, warmup_max_share=0) == 0
    prefixed = make_schedule(
        steps_per_epoch=1, epochs=4, lr=1.0, warmup_epochs=9, warmup_max_share=0.5, warmup_prefix=True
    )
    assert prefixed.total_steps == 4 + 2


@pytest.mark.parametrize("per", ["epoch", "step"])
def test_traced_and_python_steps_agree(per):
    schedule = make_schedule(steps_per_epoch=4, epochs=10, lr=1e-3, warmup_epochs=2, per=per)
    traced = jax.jit(schedule)
    for step in [0, 3, 4, 7, 8, 39, 40, 1000]:
        np.testing.assert_allclose(traced(jnp.int32(step)), schedule(step), rtol=1e-6)
        assert schedule(step).shape == ()


def test_optax_takes_it_as_a_schedule():
    schedule = make_schedule(steps_per_epoch=1, epochs=4, lr=1.0, warmup_epochs=1, warmup_lr=0.5)
    optimizer = optax.sgd(schedule)
    state = optimizer.init(jnp.zeros(()))
    for step in range(3):
        update, state = optimizer.update(jnp.ones(()), state)
        assert update == -schedule(step)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"name": "cosin"}, "cosine"),
        ({"per": "update"}, "epoch"),
        ({"epochs": 0}, "schedule.epochs"),
        ({"epochs": 1.5}, "schedule.epochs"),
        ({"steps_per_epoch": 0}, "schedule.steps_per_epoch"),
        ({"cooldown_epochs": -1}, "schedule.cooldown_epochs"),
        ({"lr": 0.0}, "schedule.lr"),
        ({"lr": "5e-3"}, "schedule.lr"),
        ({"lr": math.nan}, "schedule.lr"),
        ({"warmup_lr": -1e-6}, "schedule.warmup_lr"),
        ({"min_lr": 2.0}, "schedule.min_lr"),
        ({"warmup_epochs": 1.5}, "per='step'"),
        ({"warmup_epochs": -1}, "schedule.warmup_epochs"),
        (
            {"warmup_epochs": 11},
            "warm-up of 11 epochs .* the 10 epochs .*: lower --config.schedule.warmup_epochs, raise",
        ),
        ({"warmup_steps": 3}, "per='step'"),
        ({"warmup_steps": 3, "warmup_epochs": 1, "per": "step"}, "warmup_epochs"),
        ({"warmup_steps": 1.5, "per": "step"}, "schedule.warmup_steps"),
        (
            {"warmup_steps": 21, "per": "step"},
            r"warm-up of 21 steps \(schedule.warmup_steps\) .* --config.epochs, .*=0.1",
        ),
        (
            {"epochs": 99999999999},
            "99999999999 epochs of 2 steps are more than the 2147483647 .*: lower --config.epochs",
        ),
        ({"name": "wsd"}, "schedule.decay_epochs"),
        ({"decay_epochs": 3}, "name='wsd'"),
        ({"name": "step", "decay_epochs": 3}, "schedule.decay_rate"),
        ({"name": "step", "decay_rate": 0.1}, "schedule.decay_epochs"),
        ({"decay_rate": 0.1}, "name='step'"),
        ({"name": "step", "decay_rate": 0.1, "decay_epochs": 0.1, "per": "step"}, "give a step of the run or more"),
        ({"name": "wsd", "decay_epochs": 0}, "schedule.decay_epochs"),
        ({"name": "wsd", "decay_epochs": 6, "warmup_epochs": 5}, "schedule.decay_epochs"),
    ],
)
def test_wrong_options_are_named(options, words):
    with pytest.raises(UserError, match=words):
        make_schedule(**{"steps_per_epoch": 2, "epochs": 10, "lr": 1.0, **options})
