"""What the kernels of whole residual branches share on TPUs: their layout, norm and residual path.

The kernels take maps as `[H, W, B, C]`. XLA's convolutions for TPUs keep maps in that order, so the transposes around a
kernel move nothing. The last two axes of a block, images and channels, lie in tiles of 8 x 128. Windows, strides and
shifts concern the first two axes alone, along which a kernel moves without cost.
"""

import functools
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from maxmap.kernels import mosaic
from maxmap.kernels.mosaic import Ref
from maxmap.kernels.target import Array, accumulator


def images_per_program(batch: int | None) -> int:
    """Returns how many of a device's images a program takes: they fill a tile of bfloat16 or float32. 0: no kernel."""
    return next((images for images in (16, 8) if batch and batch % images == 0), 0)


def round_up(number: int, step: int) -> int:
    """Returns the least multiple of `step` that is not below `number`."""
    return -(-number // step) * step


def normalized(x: Array, epsilon: float) -> tuple[Array, Array]:
    """Returns rows of `[R, C]` with mean 0 and variance 1, and the factors `[R, 1]` that gave them the variance."""
    centred = x - jnp.mean(x, axis=-1, keepdims=True)
    factor = lax.rsqrt(jnp.mean(jnp.square(centred), axis=-1, keepdims=True) + epsilon)
    return centred * factor, factor


def normalized_gradient(normal: Array, factor: Array, grad: Array) -> Array:
    """Returns the gradient of `x`, given that of `normalized(x)`, all `[R, C]`."""
    mean, slope = (jnp.mean(part, axis=-1, keepdims=True) for part in (grad, grad * normal))
    return factor * (grad - mean - normal * slope)


def rows(ref: Ref) -> Array:
    """Reads a block `[..., images, C]` as rows `[R, C]` in float32 or wider; the images of a pixel are neighbours."""
    x = ref[...]
    return x.astype(accumulator(x.dtype)).reshape(-1, x.shape[-1])


def kept(x: Array, keep: Array) -> Array:
    """Multiplies rows `[R, C]` by the factors `[images, C]` of their images."""
    return (x.reshape(-1, *keep.shape) * keep[None]).reshape(x.shape)


def accumulate(axes: int, refs: Sequence[Ref], parts: Sequence[Array]) -> None:
    """Adds parts to outputs that all programs of a grid with so many axes share; the first program starts them."""
    first = functools.reduce(operator.and_, [pl.program_id(axis) == 0 for axis in range(axes)])

    @pl.when(first)
    def _() -> None:
        for ref in refs:
            ref[...] = jnp.zeros(ref.shape, ref.dtype)

    for ref, part in zip(refs, parts, strict=True):
        ref[...] += part


def call(
    kernel: Callable[..., None],
    name: str,
    grid: tuple[int, ...],
    inputs: Mapping[str, tuple[Array, pl.BlockSpec]],
    outputs: Mapping[str, tuple[jax.ShapeDtypeStruct, pl.BlockSpec]],
    scratch: Sequence[Any] = (),
) -> Sequence[Array]:
    """Runs a kernel once for every point of a grid.

    Args:
      kernel: of one program; it takes a dict of references to the inputs, one to the outputs, and the scratch.
      name: of the kernel, in profiles and in the compiler's files; different for different shapes.
      grid: numbers of programs.
      inputs: arrays and their blocks, by name.
      outputs: shapes and blocks of the results, by name.
      scratch: memory of a program.
    """

    def body(*refs: Ref) -> None:
        ins, rest = refs[: len(inputs)], refs[len(inputs) :]
        outs, memory = rest[: len(outputs)], rest[len(outputs) :]
        kernel(dict(zip(inputs, ins, strict=True)), dict(zip(outputs, outs, strict=True)), *memory)

    run = mosaic.call(
        body,
        name,
        grid,
        [shape for shape, _ in outputs.values()],
        in_specs=[spec for _, spec in inputs.values()],
        out_specs=[spec for _, spec in outputs.values()],
        scratch_shapes=list(scratch),
    )
    return run(*(x for x, _ in inputs.values()))
