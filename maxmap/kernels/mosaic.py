"""What kernels in Pallas for TPUs share (Mosaic is their compiler). Programs for a CPU run them in an interpreter."""

import contextlib
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from maxmap.kernels.target import Array, accumulator, platform, short_erf

Ref = Any  # JAX's reference to an array in memory, with a shape and a type

IMAGES = 16  # of one program: the rows of a register tile in bfloat16
LANES = 128  # channels of a register
VMEM = 100 * 2**20  # bytes of a TPU's fast memory that a program may take


def call(
    kernel: Callable[..., None], name: str, grid: Sequence[int], out_shape: Sequence[Any], **specs: Any
) -> Callable[..., Sequence[Array]]:
    """A `pallas_call` whose programs run one after another, the last axis of the grid fastest."""
    one_by_one: Literal["arbitrary"] = "arbitrary"

    def body(*refs: Ref) -> None:
        with short_erf() if refs[0].dtype == jnp.bfloat16 else contextlib.nullcontext():
            kernel(*refs)

    return pl.pallas_call(
        body,
        name=name,
        out_shape=out_shape,
        grid=tuple(grid),
        compiler_params=pltpu.CompilerParams(dimension_semantics=(one_by_one,) * len(grid), vmem_limit_bytes=VMEM),
        interpret=platform() == "cpu",
        **specs,
    )


def lanes_of(channels: int) -> int:
    """Channels of one program."""
    return LANES if channels % LANES == 0 else channels


def part(i: Array, size: int, total: int) -> Any:
    """The i-th part of an axis that an array holds whole."""
    return pl.ds(pl.multiple_of(i * size, size), size) if size < total else slice(None)


def whole(x: Array | jax.ShapeDtypeStruct) -> pl.BlockSpec:
    """All of an array, for every program."""
    return pl.BlockSpec(x.shape, lambda *_: (0,) * len(x.shape))


def product(a: Array, b: Array, axis: int = 1, other: int = 0) -> Array:
    """Matrix product over an axis of each, summed in float32 or wider."""
    return lax.dot_general(a, b, (((axis,), (other,)), ((), ())), preferred_element_type=accumulator(a.dtype))
