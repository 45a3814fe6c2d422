"""Training: losses, optimizers, schedules, the step and the loop."""

from maxmap.train.loop import run

__all__ = ["run"]
