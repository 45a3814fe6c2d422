"""Maps whose size windows do not divide: what is appended to them, and what attention leaves out of it."""

from collections.abc import Sequence

import jax.numpy as jnp

from maxmap.operations import Array


def divides(window: Sequence[int], size: Sequence[int]) -> bool:
    """Tells whether windows of a height and width cover a map of a height and width without a rest."""
    return all(side % step == 0 for side, step in zip(size, window, strict=True))


def next_multiple(size: Sequence[int], window: Sequence[int]) -> tuple[int, int]:
    """Returns the height and width of the smallest map that holds one of `size` and that windows divide."""
    height, width = (-(-side // step) * step for side, step in zip(size, window, strict=True))
    return height, width


def pad_map(x: Array, size: Sequence[int]) -> Array:
    """Appends zeros below and to the right of a map `[B, H, W, C]`, up to a height and width."""
    if x.shape[1:3] == tuple(size):
        return x
    return jnp.pad(x, [(0, 0), *((0, new - old) for old, new in zip(x.shape[1:3], size, strict=True)), (0, 0)])


def real_pixels(size: Sequence[int], padded: Sequence[int]) -> Array:
    """Returns which pixels of a padded map are not padding: bool `[1, *padded, 1]`, a map of one channel."""
    rows, columns = (jnp.arange(new) < old for old, new in zip(size, padded, strict=True))
    return (rows[:, None] & columns[None])[None, :, :, None]
