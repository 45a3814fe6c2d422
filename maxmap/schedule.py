"""Learning rate schedules, on timm's clock of epochs or on a clock of steps.

The clock t counts epochs or steps (`per`). W, E and D are the lengths of warm-up, epochs and decay on that clock::

    t < W:  warmup_lr + (lr - warmup_lr) * t / W
    else:   min_lr + (lr - min_lr) * shape(left),   left = clip(E - t, 0, D) / D

    cosine  shape = (1 - cos(pi * left)) / 2, D = E         (SGDR, Loshchilov and Hutter 2017, one cycle)
    linear  shape = left,                     D = E
    wsd     shape = left,                     D as given    (warm-up, stable, decay: Hu et al. 2024)
    constant  the rate stays at lr; min_lr is not used

As in timm, the warm-up lies inside the E epochs: t is not shifted by W, so the rate at t = W is already below `lr`.
With `warmup_prefix` the warm-up comes before them: the decay starts at t = W, and the run is W longer.
"""

import dataclasses
import math
import numbers
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp

from maxmap.errors import UserError, nearest

# The height of the rate, 1 to 0, by the remaining share of the decay, 1 to 0.
SHAPES: dict[str, Callable[[jax.Array], jax.Array]] = {
    # (1 + cos(pi * (1 - left))) / 2, written so that it keeps its relative precision near the end in float32.
    "cosine": lambda left: jnp.square(jnp.sin(jnp.pi / 2 * left)),
    "linear": lambda left: left,
    "wsd": lambda left: left,
    "constant": jnp.ones_like,
}
CLOCKS = ("epoch", "step")


@dataclasses.dataclass(frozen=True)
class Schedule:
    """A learning rate as a function of the step, and how long the run is; an optax schedule.

    Its clock is exact integer arithmetic, so only the rate itself is rounded, however long the run.

    Attributes:
      rate: step -> learning rate; the step counts finished updates, so the first update uses rate(0).
      steps_per_epoch: updates in an epoch.
      total_epochs: length of the run, the cool-down included.
    """

    rate: Callable[[jax.typing.ArrayLike], jax.Array]
    steps_per_epoch: int
    total_epochs: int

    @property
    def total_steps(self) -> int:
        return self.steps_per_epoch * self.total_epochs

    def __call__(self, step: jax.typing.ArrayLike) -> jax.Array:
        return self.rate(step)


def make_schedule(
    *,
    steps_per_epoch: int,
    epochs: int,
    lr: float,
    name: Literal["cosine", "linear", "wsd", "constant"] = "cosine",
    warmup_epochs: float = 0,
    warmup_steps: int | None = None,
    warmup_lr: float = 1e-6,
    min_lr: float = 1e-6,
    decay_epochs: float | None = None,
    cooldown_epochs: int = 0,
    warmup_prefix: bool = False,
    per: Literal["epoch", "step"] = "epoch",
) -> Schedule:
    """Builds a warm-up from `warmup_lr` to `lr` and a decay to `min_lr`; the formulas stand at the top of this file.

    Args:
      steps_per_epoch: Updates in an epoch.
      epochs: Length of the decay; the cool-down comes on top, and so does the warm-up with `warmup_prefix`.
      lr: The highest rate, per update.
      name: Shape of the decay.
      warmup_epochs: Length of the warm-up, 0 for none; a whole number for per='epoch'.
      warmup_steps: Length of the warm-up in steps, for recipes that give it so; needs per='step' and no warmup_epochs.
      warmup_lr: Rate at the start of the warm-up.
      min_lr: Rate at the end of the decay.
      decay_epochs: How long before the end of the epochs the decay of 'wsd' starts; for 'wsd' only.
      cooldown_epochs: Epochs at the last rate after the decay.
      warmup_prefix: Whether the warm-up comes before the epochs instead of inside them.
      per: 'epoch' keeps the rate over each epoch, as all published recipes do; 'step' changes it every step.

    Raises:
      UserError: The name is unknown, or the values make no schedule.
    """
    _check_rates(name, per, lr, warmup_lr, min_lr)
    _check("steps_per_epoch", steps_per_epoch, "a whole number of at least 1", lambda n: n >= 1 and n == int(n))
    _check("epochs", epochs, "a whole number of at least 1", lambda n: n >= 1 and n == int(n))
    _check("cooldown_epochs", cooldown_epochs, "a whole number of at least 0", lambda n: n >= 0 and n == int(n))
    if (name == "wsd") != (decay_epochs is not None):
        raise UserError("schedule.decay_epochs goes with name='wsd': give it there, in epochs, and nowhere else.")
    ticks_per_epoch = 1 if per == "epoch" else steps_per_epoch
    warmup = _warmup_ticks(warmup_epochs, warmup_steps, ticks_per_epoch, per)
    span = epochs * ticks_per_epoch
    decay = span if decay_epochs is None else _ticks("decay_epochs", decay_epochs, ticks_per_epoch, per)
    if warmup > span and not warmup_prefix:
        raise UserError(f"the schedule's warm-up of {warmup} {per}s must fit into the {span} {per}s of the run.")
    if name == "wsd" and not 1 <= decay <= (span if warmup_prefix else span - warmup):
        raise UserError(f"schedule.decay_epochs is {decay_epochs!r}: warm-up and decay must fit into {epochs} epochs.")
    end = span + warmup if warmup_prefix else span

    def rate(step: jax.typing.ArrayLike) -> jax.Array:
        step = jnp.asarray(step)
        tick = step // steps_per_epoch if per == "epoch" else step
        warming = warmup_lr + (lr - warmup_lr) * (tick.astype(float) / max(warmup, 1))
        height = SHAPES[name](jnp.clip(end - tick, 0, decay).astype(float) / decay)
        # Exact at both ends, where min_lr + (lr - min_lr) * height is not.
        return jnp.where(tick < warmup, warming, lr * height + min_lr * (1 - height))

    total_epochs = epochs + cooldown_epochs + (-(-warmup // ticks_per_epoch) if warmup_prefix else 0)
    return Schedule(rate, int(steps_per_epoch), int(total_epochs))


def _check_rates(name: str, per: str, lr: float, warmup_lr: float, min_lr: float) -> None:
    if name not in SHAPES:
        raise UserError(
            f"schedule.name is {name!r}, which is not one of {sorted(SHAPES)}; did you mean {nearest(name, SHAPES, 1)}?"
        )
    if per not in CLOCKS:
        raise UserError(f"schedule.per is {per!r}: give one of {CLOCKS}.")
    _check("lr", lr, "a rate above 0", lambda rate: rate > 0)
    _check("warmup_lr", warmup_lr, "a rate of at least 0", lambda rate: rate >= 0)
    if name != "constant":
        _check("min_lr", min_lr, f"a rate from 0 to lr = {lr}", lambda rate: 0 <= rate <= lr)


def _warmup_ticks(epochs: float, steps: int | None, ticks_per_epoch: int, per: str) -> int:
    """Returns the length of the warm-up on the clock."""
    if steps is None:
        return _ticks("warmup_epochs", epochs, ticks_per_epoch, per)
    if per != "step" or epochs:
        raise UserError("schedule.warmup_steps goes with per='step' and without warmup_epochs: give one of the two.")
    _check("warmup_steps", steps, "a whole number of at least 0", lambda n: n >= 0 and n == int(n))
    return int(steps)


def _ticks(key: str, epochs: float, ticks_per_epoch: int, per: str) -> int:
    """Returns a length in epochs on the clock, rounded to whole steps."""
    wanted = "a whole number of at least 0 (fractions need per='step')" if per == "epoch" else "a number of at least 0"
    _check(key, epochs, wanted, lambda n: n >= 0 and (per == "step" or n == int(n)))
    return round(epochs * ticks_per_epoch)


def _check(key: str, value: Any, wanted: str, is_right: Callable[[float], bool]) -> None:
    is_number = isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)
    if not is_number or not is_right(value):
        raise UserError(f"schedule.{key} is {value!r}: give {wanted}.")
