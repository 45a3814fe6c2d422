"""The CPU's own ways against XLA's convolution, gradients included."""

import jax
import jax.numpy as jnp
import pytest

from maxmap.kernels import cpu, xla
from tests.zoo import assert_close, numbers, quick


def assert_same_way(ours, wanted, *args):
    """Compares results and gradients of two functions, by one program."""
    direction = numbers(2, *jax.eval_shape(wanted, *args).shape)

    def run(direction, *args):
        found = []
        for function in (ours, wanted):
            y, pull = jax.vjp(function, *args)
            found.append((y, *pull(direction)))
        return found

    for mine, theirs in zip(*quick(run, direction, *args), strict=True):
        assert_close(mine, theirs)


# The window does not divide what stride 2 walks over: (10 - 3) % 2 and (12 - 7) % 2 leave a row or column unread.
# Some padded maps have 9 or 11 rows, which no number of rows that is taken at a time divides.
@pytest.mark.parametrize("pads", [((0, 0), (0, 0)), ((1, 2), (3, 0))])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", [(9, 10), (12, 11)])
@pytest.mark.parametrize("kernel_size", [3, 7])
def test_depthwise_convolution_equals_xlas(kernel_size, size, stride, pads, x64):
    x, kernel = numbers(0, 2, *size, 3), numbers(1, kernel_size, kernel_size, 3)
    assert_same_way(
        lambda x, kernel: cpu.depthwise_convolution(x, kernel, stride, pads),
        lambda x, kernel: xla.convolution(x, kernel[:, :, None], stride, pads, 3),
        x,
        kernel,
    )


def test_depthwise_kernel_gradient_accumulates_in_float32():
    """A kernel in bfloat16: ten thousand ones add up to more than its eight bits can count one by one."""
    x, kernel = jnp.ones((1, 100, 100, 1), jnp.bfloat16), jnp.ones((1, 1, 1), jnp.bfloat16)

    def total(kernel):
        return jnp.sum(cpu.depthwise_convolution(x, kernel, 1, ((0, 0), (0, 0))).astype(jnp.float32))

    gradient = jax.grad(total)(kernel)
    assert gradient.dtype == jnp.bfloat16
    assert float(gradient[0, 0, 0]) == pytest.approx(10_000, rel=2**-8)


@pytest.mark.parametrize("stride, pads", [(1, ((1, 1), (1, 1))), (2, ((0, 1), (2, 0)))])
@pytest.mark.parametrize("rows", [34, 37])
def test_convolution_equals_xlas(rows, stride, pads, x64):
    """Maps with more pixels than are taken at a time; 37 rows can only be taken one by one."""
    x, kernel = numbers(0, 2, rows, 40, 3), numbers(1, 3, 3, 3, 5)
    assert_same_way(
        lambda x, kernel: cpu.convolution(x, kernel, stride, pads),
        lambda x, kernel: xla.convolution(x, kernel, stride, pads),
        x,
        kernel,
    )
