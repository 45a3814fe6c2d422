"""Learning rate schedules, on timm's clock of epochs or on a clock of steps.

The clock t counts epochs or steps (`per`). W, E and D are the lengths of warm-up, epochs and decay on that clock:

    t < W:  warmup_lr + (lr - warmup_lr) * t / W
    else:   min_lr + (lr - min_lr) * shape(left),   left = clip(E - t, 0, D) / D

    cosine  shape = (1 - cos(pi * left)) / 2, D = E         (SGDR, Loshchilov and Hutter 2017, one cycle)
    linear  shape = left,                     D = E
    wsd     shape = left,                     D as given    (warm-up, stable, decay: Hu et al. 2024)
    constant  the rate stays at lr; min_lr is not used
    step    the rate is lr * decay_rate ** floor(t / D), D as given; min_lr is not used

As in timm, the warm-up lies inside the E epochs: t is not shifted by W, so the rate at t = W is already below `lr`.
With `warmup_prefix` the warm-up comes before them: the decay starts at t = W, and the run is W longer.
"""

import dataclasses
from collections.abc import Callable
from typing import Literal, NoReturn

import jax
import jax.numpy as jnp

from maxmap.errors import UserError
from maxmap.ranges import Count, CountOrZero, Fraction, NonNegative, Positive, Share, check_arguments

# The height of the rate, 1 to 0, by the remaining share of the decay, 1 to 0.
SHAPES: dict[str, Callable[[jax.Array], jax.Array]] = {
    # (1 + cos(pi * (1 - left))) / 2, written so that it keeps its relative precision near the end in float32.
    "cosine": lambda left: jnp.square(jnp.sin(jnp.pi / 2 * left)),
    "linear": lambda left: left,
    "wsd": lambda left: left,
    "constant": jnp.ones_like,
}
MOST_STEPS = 2**31 - 1  # of a run: JAX counts them in 32 bits


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

    def __post_init__(self) -> None:
        if self.total_steps > MOST_STEPS:
            raise UserError(
                f"{self.total_epochs} epochs of {self.steps_per_epoch} steps are more than the {MOST_STEPS} steps that "
                "a run can have: lower --config.epochs."
            )

    @property
    def total_steps(self) -> int:
        return self.steps_per_epoch * self.total_epochs

    def __call__(self, step: jax.typing.ArrayLike) -> jax.Array:
        return self.rate(step)


def make_schedule(
    *,
    steps_per_epoch: Count,
    epochs: Count,
    lr: Positive,
    name: Literal["cosine", "linear", "wsd", "constant", "step"] = "cosine",
    warmup_epochs: NonNegative = 0,
    warmup_steps: CountOrZero | None = None,
    warmup_max_share: Share | None = None,
    warmup_lr: NonNegative = 1e-6,
    min_lr: NonNegative = 1e-6,
    decay_epochs: Positive | None = None,
    decay_rate: Fraction | None = None,
    cooldown_epochs: CountOrZero = 0,
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
      warmup_steps: Length of the warm-up in steps; needs per='step' and no warmup_epochs.
      warmup_max_share: Part of the epochs to which a longer warm-up is cut; None to refuse one that does not fit.
      warmup_lr: Rate at the start of the warm-up.
      min_lr: Rate at the end of the decay.
      decay_epochs: How long before the end of the epochs the decay of 'wsd' starts; for 'step' how long the rate stays.
      decay_rate: By what 'step' multiplies the rate every decay_epochs; for 'step' only.
      cooldown_epochs: Epochs at the last rate after the decay.
      warmup_prefix: Whether the warm-up comes before the epochs instead of inside them.
      per: 'epoch' keeps the rate over each epoch, as all published recipes do; 'step' changes it every step.

    Raises:
      UserError: A value is out of range, or the values make no schedule.
    """
    check_arguments(make_schedule, "schedule", locals())
    _check_combination(name, lr, min_lr, decay_epochs, decay_rate)
    ticks_per_epoch = 1 if per == "epoch" else steps_per_epoch
    span = epochs * ticks_per_epoch
    warmup = _warmup_ticks(warmup_epochs, warmup_steps, ticks_per_epoch, per)
    if warmup_max_share is not None:
        warmup = min(warmup, round(warmup_max_share * span))
    if warmup > span and not warmup_prefix:
        _refuse_warmup("warmup_epochs" if warmup_steps is None else "warmup_steps", warmup, span, per)
    decay = span if decay_epochs is None else _ticks("decay_epochs", decay_epochs, ticks_per_epoch, per)
    if name == "wsd" and not 1 <= decay <= (span if warmup_prefix else span - warmup):
        raise UserError(f"schedule.decay_epochs is {decay_epochs!r}: warm-up and decay must fit into {epochs} epochs.")
    if name == "step" and decay < 1:
        raise UserError(f"schedule.decay_epochs is {decay_epochs!r}: give a step of the run or more.")
    end = span + warmup if warmup_prefix else span

    def rate(step: jax.typing.ArrayLike) -> jax.Array:
        step = jnp.asarray(step)
        tick = step // steps_per_epoch if per == "epoch" else step
        warming = warmup_lr + (lr - warmup_lr) * (tick.astype(float) / max(warmup, 1))
        if decay_rate is not None:
            steps = (jnp.clip(tick - (end - span), 0, span - 1) // decay).astype(float)
            return jnp.where(tick < warmup, warming, lr * decay_rate**steps)
        height = SHAPES[name](jnp.clip(end - tick, 0, decay).astype(float) / decay)
        # Exact at both ends, where min_lr + (lr - min_lr) * height is not.
        return jnp.where(tick < warmup, warming, lr * height + min_lr * (1 - height))

    total_epochs = epochs + cooldown_epochs + (-(-warmup // ticks_per_epoch) if warmup_prefix else 0)
    return Schedule(rate, steps_per_epoch, total_epochs)


def _check_combination(
    name: str, lr: float, min_lr: float, decay_epochs: float | None, decay_rate: float | None
) -> None:
    if name not in ("constant", "step") and min_lr > lr:
        raise UserError(f"schedule.min_lr is {min_lr!r}: give a rate from 0 to lr = {lr!r}.")
    if (name in ("wsd", "step")) != (decay_epochs is not None):
        raise UserError(
            "schedule.decay_epochs goes with name='wsd' and 'step': give it there, in epochs, and nowhere else."
        )
    if (name == "step") != (decay_rate is not None):
        raise UserError("schedule.decay_rate goes with name='step': give it there, such as 0.1, and nowhere else.")


def _refuse_warmup(key: str, warmup: int, span: int, per: str) -> NoReturn:
    raise UserError(
        f"the warm-up of {warmup} {per}s (schedule.{key}) does not fit into the {span} {per}s of the run (epochs): "
        f"lower --config.schedule.{key}, raise --config.epochs, or cut every warm-up to a tenth of the epochs with "
        "--config.schedule.warmup_max_share=0.1."
    )


def _warmup_ticks(epochs: float, steps: int | None, ticks_per_epoch: int, per: str) -> int:
    """Returns the length of the warm-up on the clock."""
    if steps is None:
        return _ticks("warmup_epochs", epochs, ticks_per_epoch, per)
    if per != "step" or epochs:
        raise UserError("schedule.warmup_steps goes with per='step' and without warmup_epochs: give one of the two.")
    return steps


def _ticks(key: str, epochs: float, ticks_per_epoch: int, per: str) -> int:
    """Returns a length in epochs on the clock, rounded to whole steps."""
    if per == "epoch" and epochs != int(epochs):
        raise UserError(f"schedule.{key} is {epochs!r}: give a whole number (fractions need per='step').")
    return round(epochs * ticks_per_epoch)
