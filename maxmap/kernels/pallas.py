"""Kernels in Pallas for GPUs. Programs for a CPU run them in Pallas' interpreter, which is for tests."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from maxmap.kernels.target import Array, accumulator, over_batch, platform

Ref = Any  # JAX's reference to an array in memory, with a shape and a type

# Tokens of a window. One program keeps the logits of a whole window in registers: 128 x 128 logits in float32 fill a
# quarter of a multiprocessor's registers.
LARGEST_WINDOW = 128
# Windows of one program in the backward pass. The program sums the bias's gradient over these windows and writes the
# sum once: a sixteenth of the memory that one gradient for each window would take.
WINDOWS_PER_PROGRAM = 16


@jax.custom_vjp
def window_attention(q: Array, k: Array, v: Array, bias: Array | None) -> Array:
    """Computes softmax(q k^T + bias) v for many small windows; the logits never leave the chip, in both passes.

    Matrix products take the input's type and sum in float32 or wider; bias and softmax are computed in that wider type.
    Only the inputs are kept for the backward pass, which computes the weights again.

    Args:
      q: `[W, H, Q, D]`, scaled; W windows of at most `LARGEST_WINDOW` queries.
      k: `[W, H, K, D]`, at most as many keys.
      v: `[W, H, K, D]`.
      bias: of the logits, `[H, Q, K]`, or None.

    Returns:
      `[W, H, Q, D]` in the type of `v`.
    """
    return _forward(q, k, v, bias)[0]


def _forward(q: Array, k: Array, v: Array, bias: Array | None) -> tuple[Array, tuple[Array | None, ...]]:
    (out,) = over_batch(_run_forward, (q, k, v, bias), (0, 0, 0, None), (0,))
    return out, (q, k, v, bias)


def _run_forward(q: Array, k: Array, v: Array, bias: Array | None) -> Sequence[Array]:
    return _call(_forward_kernel, [q, k, v], bias, [jax.ShapeDtypeStruct(q.shape, v.dtype)], group=None)


def _backward(residuals: tuple[Array, Array, Array, Array | None], grad: Array) -> tuple[Array | None, ...]:
    return over_batch(_run_backward, (*residuals, grad), (0, 0, 0, None, 0), (0, 0, 0, None))


def _run_backward(q: Array, k: Array, v: Array, bias: Array | None, grad: Array) -> tuple[Array | None, ...]:
    out = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (q, k, v)]
    if bias is None:
        return *_call(_backward_kernel, [q, k, v, grad], None, out, group=WINDOWS_PER_PROGRAM), None
    parts = jax.ShapeDtypeStruct((pl.cdiv(len(q), WINDOWS_PER_PROGRAM), *bias.shape), accumulator(bias.dtype))
    *grads, of_bias = _call(_backward_kernel, [q, k, v, grad], bias, [*out, parts], group=WINDOWS_PER_PROGRAM)
    return *grads, jnp.sum(of_bias, axis=0).astype(bias.dtype)


window_attention.defvjp(_forward, _backward)


def _call(
    kernel: Callable[..., None],
    inputs: Sequence[Array],
    bias: Array | None,
    out: Sequence[jax.ShapeDtypeStruct],
    *,
    group: int | None,
) -> Sequence[Array]:
    """Runs one program of a kernel for every head and every `group` windows, on tiles padded to powers of two.

    Args:
      kernel: of one program; it takes references to the inputs, to the bias unless it is None, and to the outputs.
      inputs: `[windows, heads, tokens, channels]`.
      bias: `[heads, queries, keys]`, the same for all windows, or None.
      out: shapes of the outputs. The first three are like the inputs; the fourth, the bias's gradient, has one part for
        each program.
      group: windows of one program; None for one window, without an axis for it.

    Returns:
      The outputs.
    """
    windows, heads, queries, _ = inputs[0].shape
    keys = inputs[1].shape[2]
    in_specs = [pl.BlockSpec((group, None, *_padded(x)), lambda i, head: (i, head, 0, 0)) for x in inputs]
    out_specs = [pl.BlockSpec((group, None, *_padded(x)), lambda i, head: (i, head, 0, 0)) for x in out[:3]]
    out_specs += [pl.BlockSpec((None, None, *_padded(x)), lambda i, head: (i, head, 0, 0)) for x in out[3:]]
    if bias is not None:
        in_specs.append(pl.BlockSpec((None, *_padded(bias)), lambda i, head: (head, 0, 0)))
    return pl.pallas_call(
        functools.partial(kernel, sizes=(windows, queries, keys, inputs[0].shape[3]), biased=bias is not None),
        out_shape=out,
        grid=(pl.cdiv(windows, group or 1), heads),
        in_specs=in_specs,
        out_specs=out_specs,
        # Explicitly Triton: the default for GPUs differs between versions of JAX.
        compiler_params=triton.CompilerParams(num_warps=4 if max(queries, keys) <= 64 else 8),
        interpret=platform() == "cpu",
    )(*inputs, *([] if bias is None else [bias]))


def _padded(x: Array | jax.ShapeDtypeStruct) -> tuple[int, int]:
    """The last two axes of a tile: powers of two, and at least 16, which Triton's matrix product needs."""
    rows, columns = (max(16, pl.next_power_of_2(n)) for n in x.shape[-2:])
    return rows, columns


def _forward_kernel(*refs: Ref, sizes: tuple[int, int, int, int], biased: bool) -> None:
    q_ref, k_ref, v_ref, *bias_ref, out_ref = refs
    _, queries, keys, channels = sizes
    q, k, v = (_read(ref, n, channels) for ref, n in ((q_ref, queries), (k_ref, keys), (v_ref, keys)))
    weights, total = _weights(q, k, _read(bias_ref[0], queries, keys) if biased else None, keys)
    _write(out_ref, _product(weights.astype(v.dtype), v) / total, queries, channels)


def _backward_kernel(*refs: Ref, sizes: tuple[int, int, int, int], biased: bool) -> None:
    q_ref, k_ref, v_ref, grad_ref, *rest = refs
    windows, queries, keys, channels = sizes
    bias = _read(rest.pop(0), queries, keys) if biased else None
    grad_q_ref, grad_k_ref, grad_v_ref, *grad_bias_ref = rest

    def window(i: Array, total_grad: Array) -> Array:
        q, grad = (_read(ref.at[i], queries, channels) for ref in (q_ref, grad_ref))
        k, v = (_read(ref.at[i], keys, channels) for ref in (k_ref, v_ref))
        weights, total = _weights(q, k, bias, keys)
        weights = weights / total
        grad_weights = _product(grad, v.T)
        grad_logits = weights * (grad_weights - jnp.sum(weights * grad_weights, axis=1, keepdims=True))
        _write(grad_q_ref.at[i], _product(grad_logits.astype(k.dtype), k), queries, channels)
        _write(grad_k_ref.at[i], _product(grad_logits.T.astype(q.dtype), q), keys, channels)
        _write(grad_v_ref.at[i], _product(weights.T.astype(grad.dtype), grad), keys, channels)
        return total_grad + grad_logits

    rows, columns = q_ref.shape[1], k_ref.shape[1]
    total_grad = jnp.zeros((rows, columns), accumulator(q_ref.dtype))
    left = jnp.minimum(windows - pl.program_id(0) * WINDOWS_PER_PROGRAM, WINDOWS_PER_PROGRAM)
    total_grad = lax.fori_loop(0, left.astype(int), window, total_grad)
    if biased:
        _write(grad_bias_ref[0], total_grad, queries, keys)


def _weights(q: Array, k: Array, bias: Array | None, keys: int) -> tuple[Array, Array]:
    """Returns exp(logits - maximum), which is zero for keys that pad the tile, and its sum over the keys."""
    logits = _product(q, k.T)
    if bias is not None:
        logits = logits + bias.astype(logits.dtype)
    logits = jnp.where(lax.broadcasted_iota(jnp.int32, logits.shape, 1) < keys, logits, -jnp.inf)
    weights = jnp.exp(logits - jnp.max(logits, axis=1, keepdims=True))
    return weights, jnp.sum(weights, axis=1, keepdims=True)


def _product(a: Array, b: Array) -> Array:
    return jnp.dot(a, b, preferred_element_type=accumulator(a.dtype))


def _inside(shape: tuple[int, ...], rows: int, columns: int) -> Array:
    return (lax.broadcasted_iota(jnp.int32, shape, 0) < rows) & (lax.broadcasted_iota(jnp.int32, shape, 1) < columns)


def _read(ref: Ref, rows: int, columns: int) -> Array:
    """Loads a tile; entries beyond the array are zero."""
    return triton.load(ref, mask=_inside(ref.shape, rows, columns), other=0)


def _write(ref: Ref, x: Array, rows: int, columns: int) -> None:
    triton.store(ref, x.astype(ref.dtype), mask=_inside(ref.shape, rows, columns))
