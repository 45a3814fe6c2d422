"""Learning-rate schedules: timm's clock (once per epoch, warm-up counted inside) or one value per step."""

import dataclasses
import math
import numbers
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from maxmap.errors import UserError, nearest

# How the rate falls from 1 to 0 as the share of the decay that is still ahead falls from 1 to 0.
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
    name: str = "cosine",
    warmup_epochs: float = 0,
    warmup_steps: int | None = None,
    warmup_lr: float = 1e-6,
    min_lr: float = 1e-6,
    decay_epochs: float | None = None,
    cooldown_epochs: int = 0,
    warmup_prefix: bool = False,
    per: str = "epoch",
) -> Schedule:
    """Warm-up from `warmup_lr` to `lr`, then a decay to `min_lr`, which the cool-down keeps.

    The clock t counts epochs or steps; W, E and D are warmup_epochs, epochs and decay_epochs on that clock::

        t < W:  warmup_lr + (lr - warmup_lr) * t / W
        else:   min_lr + (lr - min_lr) * shape(left),   left = clip(E - t, 0, D) / D

        cosine  shape = (1 - cos(pi * left)) / 2, D = E         (SGDR, Loshchilov and Hutter 2017, one cycle)
        linear  shape = left,                     D = E
        wsd     shape = left,                     D as given    (warm-up, stable, decay: Hu et al. 2024)
        constant  the rate stays at lr; min_lr is not used

    As in timm, the warm-up is counted inside the E epochs: t is not shifted by W, so the rate at t = W lies already
    below `lr`. `warmup_prefix=True` puts the warm-up before them: the decay starts at t = W, the run is W longer.

    Args:
      steps_per_epoch: updates in an epoch.
      epochs: length of the decay; the cool-down comes on top (and the warm-up, with `warmup_prefix`).
      lr: the peak, per update.
      name: 'cosine', 'linear', 'wsd' or 'constant'.
      warmup_epochs: 0 for none; a whole number for per='epoch', else rounded to whole steps.
      warmup_steps: the warm-up in steps instead, for recipes that say it so; needs per='step' and no warmup_epochs.
      warmup_lr: where the warm-up starts.
      min_lr: where the decay ends.
      decay_epochs: for 'wsd' only, and needed there: how long before the end of `epochs` the decay starts.
      cooldown_epochs: epochs at the end of the run after the decay; at `min_lr`, or `lr` if constant.
      warmup_prefix: whether the warm-up precedes the `epochs` instead of being counted inside them.
      per: 'epoch' holds the rate over each epoch, as all published recipes do; 'step' changes it every step, with
        every length multiplied by steps_per_epoch.

    Returns:
      A `Schedule`. It takes a Python or a traced integer and returns a default float; the clock is exact integer
      arithmetic, so float32 costs rounding of the rate only, however long the run.

    Raises:
      UserError: for an unknown name and for values that make no schedule.
    """
    if name not in SHAPES:
        raise UserError(
            f"schedule.name is {name!r}, which is not one of {sorted(SHAPES)}; did you mean {nearest(name, SHAPES, 1)}?"
        )
    if per not in CLOCKS:
        raise UserError(f"schedule.per is {per!r}: give one of {CLOCKS}.")
    _check("steps_per_epoch", steps_per_epoch, "a whole number of at least 1", lambda n: n >= 1 and n == int(n))
    _check("epochs", epochs, "a whole number of at least 1", lambda n: n >= 1 and n == int(n))
    _check("cooldown_epochs", cooldown_epochs, "a whole number of at least 0", lambda n: n >= 0 and n == int(n))
    _check("lr", lr, "a rate above 0", lambda rate: rate > 0)
    _check("warmup_lr", warmup_lr, "a rate of at least 0", lambda rate: rate >= 0)
    if name != "constant":
        _check("min_lr", min_lr, f"a rate from 0 to lr = {lr}", lambda rate: 0 <= rate <= lr)
    if (name == "wsd") != (decay_epochs is not None):
        raise UserError("schedule.decay_epochs goes with name='wsd': give it there, in epochs, and nowhere else.")

    whole = "a whole number of at least 0 (fractions need per='step')" if per == "epoch" else "a number of at least 0"

    def ticks(key: str, length: float) -> int:
        _check(key, length, whole, lambda n: n >= 0 and (per == "step" or n == int(n)))
        return int(length) if per == "epoch" else round(length * steps_per_epoch)

    if warmup_steps is None:
        warmup = ticks("warmup_epochs", warmup_epochs)
    else:
        if per != "step" or warmup_epochs:
            raise UserError(
                "schedule.warmup_steps goes with per='step' and without warmup_epochs: give one of the two."
            )
        _check("warmup_steps", warmup_steps, "a whole number of at least 0", lambda n: n >= 0 and n == int(n))
        warmup = int(warmup_steps)
    span = ticks("epochs", epochs)
    decay = span if decay_epochs is None else ticks("decay_epochs", decay_epochs)
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
        # A weighted mean, not min_lr + (lr - min_lr) * height: exact at both ends.
        return jnp.where(tick < warmup, warming, lr * height + min_lr * (1 - height))

    ticks_per_epoch = 1 if per == "epoch" else steps_per_epoch
    total_epochs = epochs + cooldown_epochs + (-(-warmup // ticks_per_epoch) if warmup_prefix else 0)
    return Schedule(rate, int(steps_per_epoch), int(total_epochs))


def _check(key: str, value: Any, wanted: str, is_right: Callable[[float], bool]) -> None:
    is_number = isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)
    if not is_number or not is_right(value):
        raise UserError(f"schedule.{key} is {value!r}: give {wanted}.")
