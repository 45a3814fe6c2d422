"""The kernels for squeeze-excitation on TPUs in Pallas' interpreter, and lowered as for a TPU."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from maxmap.kernels import squeeze
from maxmap.operations import compiled_for
from tests.zoo import assert_close, numbers

pytestmark = pytest.mark.usefixtures("quick_compilation")

# Pixels, batch, channels, output channels: one tile, and several of each axis.
SIZES = {"one": (20, 16, 24, 8), "several": (900, 32, 256, 8)}


def gate(mean, weights):
    return jax.nn.sigmoid(jnp.tanh(mean @ weights) @ weights.T)


def operands(size, dtype):
    pixels, batch, channels, out_channels = size
    shapes = [(pixels, batch, channels), (channels,), (channels,), (channels, 4), (channels, out_channels)]
    x, factor, summand, gating, weights, bias, residual, direction = (
        jnp.asarray(numbers(i, *shape), dtype)
        for i, shape in enumerate([*shapes, (out_channels,), *[(pixels, batch, out_channels)] * 2])
    )
    keep = jnp.asarray(1.25 * (np.arange(batch) % 4 > 0), jnp.promote_types(dtype, jnp.float32))
    return (x, factor, summand, (gating,), weights / channels**0.5, bias, keep, residual), direction


def plain(x, factor, summand, gating, weights, bias, keep, residual):
    z = jnp.tanh(x * factor[None, None] + summand[None, None])
    branch = (z * gate(jnp.mean(z, axis=0), *gating)[None]) @ weights + bias[None, None]
    return residual + lax.stop_gradient(keep)[None, :, None] * branch


def pulled(function, args, direction):
    def run(args, direction):
        y, pull = jax.vjp(function, *args)
        return y, pull(direction.astype(y.dtype))

    return jax.jit(run)(args, direction)


ours = functools.partial(squeeze.squeeze_project, block=squeeze.Block(jnp.tanh, gate))


@pytest.mark.parametrize("size", SIZES)
def test_the_kernels_equal_their_definition(size, x64):
    args, direction = operands(SIZES[size], jnp.float64)
    jax.tree.map(assert_close, pulled(ours, args, direction), pulled(plain, args, direction))


def test_bfloat16_is_rounded_in_products_only():
    """Beside a computation in float32 from the same numbers: one rounding of the result, one of each operand."""
    half, direction = operands(SIZES["one"], jnp.bfloat16)
    exact = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), half)
    wanted = pulled(plain, exact, direction)
    found = pulled(ours, half, direction)
    for result, leaf in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert jnp.linalg.norm((result.astype(jnp.float32) - leaf).ravel()) <= 2**-8 * jnp.linalg.norm(leaf.ravel())
    y, (*of_operands, of_keep, of_residual) = found
    assert {leaf.dtype for leaf in jax.tree.leaves((y, of_operands, of_residual))} == {jnp.dtype(jnp.bfloat16)}
    assert of_keep.dtype == jnp.float32


def test_the_kernels_are_written_for_a_tpu():
    """Lowers to Mosaic, which needs no TPU: every operation of both directions is one that it has."""
    args, direction = operands(SIZES["several"], jnp.bfloat16)
    with compiled_for("tpu"):
        traced = jax.jit(lambda args, direction: jax.vjp(ours, *args)[1](direction)).trace(args, direction)
    assert traced.lower(lowering_platforms=("tpu",)).as_text().count("tpu_custom_call") == 4
