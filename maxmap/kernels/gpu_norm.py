"""Batch normalisation with an activation and a gate behind it, for GPUs.

One kernel reads every map once for all of its sums. XLA would write the activation's derivative in float32, because
several sums read it.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from maxmap.kernels.batch_norm import in_parts, normalised, spread, statistics
from maxmap.kernels.target import Array, accumulator, inside_triton, over_batch, platform, upcast

Ref = Any
Function = Callable[[Array], Array]

ROWS, CHANNELS = 64, 64  # of a tile


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7, 8))
def activated(
    x: Array,
    scale: Array,
    bias: Array,
    near: Array,
    gate: Array | None,
    epsilon: float,
    parts: int,
    function: Function,
    derivative: Function,
) -> tuple[Array, Array, Array]:
    """Computes gate * function(batch_norm(x)).

    Neither the norm's output nor the function's is kept: the backward pass computes them from `x`, which costs
    arithmetic and no memory. It reads `x` and the gradient twice, once for all sums.

    Args:
      x: `[B, ..., C]`.
      scale, bias, near, epsilon, parts: see `batch_norm`.
      gate: factors, `[B, 1, ..., C]`; None for 1.
      function: of one value.
      derivative: of the function, in other terms, see `maxmap.operations.activate`.

    Returns:
      The result in the type of `x`; mean and biased variance, see `batch_norm`.
    """
    return _activated_forward(x, scale, bias, near, gate, epsilon, parts, function, derivative)[0]


def _activated_forward(
    x: Array,
    scale: Array,
    bias: Array,
    near: Array,
    gate: Array | None,
    epsilon: float,
    parts: int,
    function: Function,
    derivative: Function,
) -> tuple[tuple[Array, Array, Array], tuple[Array | None, ...]]:
    mean, var, inverse = statistics(x, near, epsilon, parts)
    y = function(normalised(x, scale, bias, mean, inverse))
    if gate is not None:
        y = y * upcast(in_parts(gate, parts))
    return (y.reshape(x.shape).astype(x.dtype), mean, var), (x, scale, bias, gate, mean, inverse)


def _activated_backward(
    epsilon: float,
    parts: int,
    function: Function,
    derivative: Function,
    residuals: tuple[Array, ...],
    grads: tuple[Array, Array, Array],
) -> tuple[Array | None, ...]:
    x, scale, bias, gate, mean, inverse = residuals
    of_gate, *of_norm = _sums(x, grads[0], _table(mean, inverse, scale, bias), parts, function, derivative)
    factor = jnp.ones((1, 1), scale.dtype) if gate is None else upcast(gate).reshape(of_gate.shape)
    of_bias, of_scale = (jnp.sum((total * factor).reshape(parts, -1, total.shape[-1]), axis=1) for total in of_norm)
    grad = upcast(in_parts(grads[0], parts))
    if gate is not None:
        grad = grad * upcast(in_parts(gate, parts))
        of_gate = of_gate.reshape(gate.shape).astype(gate.dtype)
    grads = _of_inputs(x, grad, of_bias, of_scale, scale, bias, mean, inverse, derivative)
    return *grads, jnp.zeros_like(scale), None if gate is None else of_gate


activated.defvjp(_activated_forward, _activated_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6, 7))
def pooled(
    x: Array,
    scale: Array,
    bias: Array,
    near: Array,
    epsilon: float,
    parts: int,
    function: Function,
    derivative: Function,
) -> Array:
    """Averages function(batch_norm(x)) over all axes but the first and the last; see `activated`.

    Returns:
      `[B, 1, ..., C]` in the type of `x`.
    """
    return _pooled_forward(x, scale, bias, near, epsilon, parts, function, derivative)[0]


def _pooled_forward(
    x: Array,
    scale: Array,
    bias: Array,
    near: Array,
    epsilon: float,
    parts: int,
    function: Function,
    derivative: Function,
) -> tuple[Array, tuple[Array, ...]]:
    mean, _, inverse = statistics(x, near, epsilon, parts)
    total, *of_norm = _sums(x, None, _table(mean, inverse, scale, bias), parts, function, derivative)
    shape, pixels = (x.shape[0], *(1,) * (x.ndim - 2), x.shape[-1]), math.prod(x.shape[1:-1])
    return (total / pixels).reshape(shape).astype(x.dtype), (x, scale, bias, mean, inverse, *of_norm)


def _pooled_backward(
    epsilon: float,
    parts: int,
    function: Function,
    derivative: Function,
    residuals: tuple[Array, ...],
    grad: Array,
) -> tuple[Array, Array, Array, Array]:
    x, scale, bias, mean, inverse, *of_norm = residuals
    grad = upcast(grad) / math.prod(x.shape[1:-1])
    factor = grad.reshape(of_norm[0].shape)
    of_bias, of_scale = (jnp.sum((total * factor).reshape(parts, -1, total.shape[-1]), axis=1) for total in of_norm)
    grads = _of_inputs(x, in_parts(grad, parts), of_bias, of_scale, scale, bias, mean, inverse, derivative)
    return *grads, jnp.zeros_like(scale)


pooled.defvjp(_pooled_forward, _pooled_backward)


def _of_inputs(
    x: Array,
    grad: Array,
    of_bias: Array,
    of_scale: Array,
    scale: Array,
    bias: Array,
    mean: Array,
    inverse: Array,
    derivative: Function,
) -> tuple[Array, Array, Array]:
    """Returns the gradients of `x`, scale and bias from that of the function's output and the sums for each part."""
    grad = grad * derivative(normalised(x, scale, bias, mean, inverse))
    rows = upcast(in_parts(x, len(mean)))
    count = math.prod(rows.shape[1:-1])
    multiplier = inverse * scale[None]
    factor = -multiplier * inverse * of_scale / count
    constant = -multiplier * of_bias / count - factor * mean
    grad_x = grad * spread(multiplier, rows) + rows * spread(factor, rows) + spread(constant, rows)
    of_scale, of_bias = (jnp.sum(total, axis=0).astype(scale.dtype) for total in (of_scale, of_bias))
    return grad_x.reshape(x.shape).astype(x.dtype), of_scale, of_bias


def _table(mean: Array, inverse: Array, scale: Array, bias: Array) -> Array:
    """Returns the statistics as `gpu_norm.sums` takes them."""
    rows = (mean, inverse, *(jnp.broadcast_to(value[None], mean.shape) for value in (scale, bias)))
    return jnp.stack(rows, axis=1)


def _sums(
    x: Array, grad: Array | None, table: Array, parts: int, function: Function, derivative: Function
) -> tuple[Array, Array, Array]:
    """Sums g f(z), g f'(z) and g f'(z) n over the pixels of every image; n is `x` normalised, z = scale n + bias.

    Args:
      x: `[B, ..., C]`.
      grad: g, like `x`; None for 1.
      table: mean, inverse deviation, scale and bias, `[parts, 4, C]` in float32 or wider.
      parts: of the batch, which have their own statistics.
      function: f.
      derivative: f'.

    Returns:
      Three sums, `[B, C]` in the type of `table`.
    """
    batch, channels = x.shape[0], x.shape[-1]
    maps = [value.reshape(batch, -1, channels) for value in (x, grad) if value is not None]
    by_image = jnp.repeat(table, batch // parts, axis=0) if parts > 1 else table
    run = functools.partial(_run, function, derivative)
    return over_batch(run, (maps, by_image), (0, 0 if parts > 1 else None), (0, 0, 0))


def _run(function: Function, derivative: Function, maps: list[Array], table: Array) -> tuple[Array, ...]:
    batch, pixels, channels = maps[0].shape
    columns = min(CHANNELS, max(16, pl.next_power_of_2(channels)))
    tile = pl.BlockSpec((None, pl.cdiv(pixels, ROWS) * ROWS, columns), lambda b, c: (b, 0, c))
    one = pl.BlockSpec((None, columns), lambda b, c: (b, c))
    shared = len(table) == 1
    constants = pl.BlockSpec((None, 4, columns), lambda b, c: (0 if shared else b, 0, c))
    return tuple(
        pl.pallas_call(
            functools.partial(_kernel, function, derivative, (pixels, channels)),
            out_shape=[jax.ShapeDtypeStruct((batch, channels), table.dtype)] * 3,
            grid=(batch, pl.cdiv(channels, columns)),
            in_specs=[*[tile] * len(maps), constants],
            out_specs=[one] * 3,
            compiler_params=triton.CompilerParams(num_warps=4),
            interpret=platform() == "cpu",
            name="batch_norm_sums",
        )(*maps, table)
    )


def _kernel(function: Function, derivative: Function, sizes: tuple[int, int], x_ref: Ref, *refs: Ref) -> None:
    grad_refs, table_ref, outs = refs[:-4], refs[-4], refs[-3:]
    pixels, channels = sizes
    columns = x_ref.shape[1]
    wide = accumulator(x_ref.dtype)
    inside = pl.program_id(1) * columns + lax.broadcasted_iota(jnp.int32, (columns,), 0) < channels
    rows = (triton.load(table_ref.at[pl.ds(i, 1), :], mask=inside[None], other=0) for i in range(4))
    mean, inverse, scale, bias = rows

    def step(i: Array, totals: tuple[Array, ...]) -> tuple[Array, ...]:
        start = i * ROWS
        mask = (start + lax.broadcasted_iota(jnp.int32, (ROWS, columns), 0) < pixels) & inside[None]
        at = pl.ds(start, ROWS)
        n = (triton.load(x_ref.at[at, :], mask=mask, other=0).astype(wide) - mean) * inverse
        z = n * scale + bias
        grad = mask.astype(wide)
        for ref in grad_refs:
            grad = triton.load(ref.at[at, :], mask=mask, other=0).astype(wide)
        with inside_triton():
            value, slope = function(z), derivative(z)
        of_norm = grad * slope
        terms = (grad * value, of_norm, of_norm * n)
        return tuple(total + jnp.sum(term, axis=0) for total, term in zip(totals, terms, strict=True))

    zeros = jnp.zeros((columns,), wide)
    totals = lax.fori_loop(0, pl.cdiv(pixels, ROWS), step, (zeros, zeros, zeros))
    for out, total in zip(outs, totals, strict=True):
        triton.store(out, total.astype(out.dtype), mask=inside)
