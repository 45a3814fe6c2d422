"""Takes pairs of pixels apart that lie side by side in the channels, in Pallas for TPUs.

Maps are `[H, W, B, C]`; see maxmap/kernels/depthwise.py.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jax.experimental import pallas as pl

from maxmap.kernels.mosaic import IMAGES, LANES, Ref, call
from maxmap.kernels.target import Array, accumulator, over_batch

ROWS = 8  # of one program, at most
PAIRS = 1024  # of one program, at most: three blocks of float32, twice each, are 84 MB of the memory on the chip


def fits(shape: Sequence[int], devices: int) -> bool:
    """Tells whether there is a kernel for maps `[B, H, W, C]` on so many devices: pairs fill a register's lanes."""
    batch, _, width, channels = shape
    return batch % (IMAGES * devices) == 0 and width % 2 == 0 and width <= 2 * PAIRS and 2 * channels == LANES


@jax.custom_vjp
def unpair(x: Array) -> tuple[Array, Array]:
    """Maps `[H, W / 2, B, 2 C]` to `[H, W, B, C]`, twice for two readers: their gradients are added in the kernel."""
    (y,) = over_batch(_unpair_call, (x,), (2,), (2,))
    return y, y


def _unpair_forward(x: Any) -> tuple[tuple[Array, Array], None]:
    return unpair(x.value), None


def _unpair_backward(_: None, grads: tuple[Any, Any]) -> tuple[Array]:
    found = [grad for grad in grads if not isinstance(grad, SymbolicZero)]  # one that nobody reads has no gradient
    if not found:
        height, width, batch, channels = grads[0].shape
        return (jnp.zeros((height, width // 2, batch, 2 * channels), grads[0].dtype),)
    return over_batch(_pair_call, found, (2,) * len(found), (2,))


unpair.defvjp(_unpair_forward, _unpair_backward, symbolic_zeros=True)


def _specs(height: int, pairs: int, channels: int) -> tuple[tuple[int, ...], pl.BlockSpec, pl.BlockSpec]:
    """The rows' part of the grid, and blocks of maps with pairs and without, `[H, W / 2, 2, B, C]`."""
    rows = max(n for n in range(1, ROWS + 1) if height % n == 0 and n * pairs <= PAIRS)
    paired = pl.BlockSpec((rows, pairs, IMAGES, 2 * channels), lambda b, t: (t, 0, b, 0))
    single = pl.BlockSpec((rows, pairs, 2, IMAGES, channels), lambda b, t: (t, 0, 0, b, 0))
    return (height // rows,), paired, single


def _unpair_call(x: Array) -> tuple[Array]:
    height, pairs, batch, twice = x.shape
    channels = twice // 2
    rows, paired, single = _specs(height, pairs, channels)

    def kernel(x_ref: Ref, y_ref: Ref) -> None:
        for place in range(2):
            y_ref[:, :, place] = x_ref[..., place * channels : (place + 1) * channels]

    out = jax.ShapeDtypeStruct((height, pairs, 2, batch, channels), x.dtype)
    name = f"unpair_{'x'.join(map(str, x.shape))}"
    (y,) = call(kernel, name, (batch // IMAGES, *rows), [out], in_specs=[paired], out_specs=[single])(x)
    return (y.reshape(height, 2 * pairs, batch, channels),)


def _pair_call(*maps: Array) -> tuple[Array]:
    """Adds maps, and puts pairs of their pixels side by side."""
    (height, width, batch, channels), dtype = maps[0].shape, maps[0].dtype
    rows, paired, single = _specs(height, width // 2, channels)

    def kernel(*refs: Ref) -> None:
        *read, y_ref = refs
        for place in range(2):
            total = sum(ref[:, :, place].astype(accumulator(dtype)) for ref in read)
            y_ref[..., place * channels : (place + 1) * channels] = jnp.asarray(total).astype(dtype)

    out = jax.ShapeDtypeStruct((height, width // 2, batch, 2 * channels), dtype)
    name = f"pair_{'x'.join(map(str, maps[0].shape))}_{len(maps)}"
    specs = {"in_specs": [single] * len(maps), "out_specs": [paired]}
    (y,) = call(kernel, name, (batch // IMAGES, *rows), [out], **specs)(
        *(x.reshape(height, width // 2, 2, batch, channels) for x in maps)
    )
    return (y,)
