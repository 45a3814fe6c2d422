"""Operations in the ways of every platform: against torch, against their definitions, and as traced programs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax import lax

from maxmap import operations
from maxmap.layers.blocks import ConvNeXtBlock
from maxmap.layers.primitives import ACTIVATIONS, BatchNorm, Conv, LayerNorm, Linear, StarReLU
from maxmap.operations import attend, broadcast, compiled_for, convolve, implementation, layer_norm, max_pool
from tests.zoo import assert_close, nchw, nhwc, numbers, quick, with_gradients

PLATFORMS = ("cpu", "tpu", "plain")


@pytest.fixture(params=PLATFORMS)
def platform(request):
    """Traces the test's programs for each platform; all of them are computed on this one."""
    with compiled_for(request.param):
        yield request.param


# Kernel size, stride, padding, groups, input and output channels.
CONVOLUTIONS = {
    "pointwise": (1, 1, 0, 1, 6, 4),
    "pointwise with stride": (1, 2, 0, 1, 6, 4),
    "pointwise in groups": (1, 1, 0, 2, 6, 4),
    "pointwise in groups with stride": (1, 2, 0, 3, 6, 9),
    "padded pointwise": (1, 2, 1, 1, 6, 4),
    "depthwise": (3, 1, 1, 6, 6, 6),
    "depthwise with stride": (3, 2, 1, 6, 6, 6),
    "depthwise with multiplier": (7, 2, 3, 4, 4, 8),
    "full": (3, 2, 1, 1, 3, 5),
    "patches": (4, 4, 0, 1, 3, 5),
    "in groups": (3, 1, 1, 2, 4, 6),
}


@pytest.mark.parametrize("case", CONVOLUTIONS)
def test_convolutions_equal_torch(case, platform, x64):
    import torch

    kernel_size, stride, padding, groups, channels, out_channels = CONVOLUTIONS[case]
    x, kernel = numbers(0, 2, 9, 8, channels), numbers(1, kernel_size, kernel_size, channels // groups, out_channels)
    images, weights = nchw(x).requires_grad_(), torch.from_numpy(kernel.transpose(3, 2, 0, 1)).requires_grad_()
    wanted = torch.nn.functional.conv2d(images, weights, None, stride, padding, 1, groups)
    direction = numbers(2, *nhwc(wanted).shape)
    wanted.backward(nchw(direction))
    ours, (gradient, kernel_gradient) = with_gradients(
        functools.partial(convolve, stride=stride, padding=padding, groups=groups), direction, x, kernel
    )
    assert_close(ours, nhwc(wanted))
    assert_close(gradient, nhwc(images.grad))
    assert_close(kernel_gradient, weights.grad.numpy().transpose(2, 3, 1, 0))


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("kernel_size, stride", [(1, 2), (2, 1), (2, 2), (3, 1), (3, 2), (5, 2), (7, 4)])
@pytest.mark.parametrize("size", [(7, 8), (9, 10)])
def test_same_padding_is_tensorflows(size, kernel_size, stride, groups, x64):
    x, kernel = jnp.asarray(numbers(0, 1, *size, 4)), numbers(1, kernel_size, kernel_size, 4 // groups, 4)
    wanted = lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )
    assert_close(quick(lambda x, k: convolve(x, k, stride=stride, padding="same", groups=groups), x, kernel), wanted)


@pytest.mark.parametrize("size, stride, padding", [(3, 2, 1), (2, 2, 0), (3, 1, 1)])
def test_max_pool_equals_torch(size, stride, padding, platform, x64):
    """Whole numbers, so that windows have several largest values, of which the first gets the gradient."""
    from torch.nn.functional import max_pool2d

    x = np.round(numbers(0, 2, 9, 8, 3))
    images = nchw(x).requires_grad_()
    wanted = max_pool2d(images, size, stride, padding)
    direction = numbers(1, *nhwc(wanted).shape)
    wanted.backward(nchw(direction))
    ours, (gradient,) = with_gradients(lambda x: max_pool(x, size, stride, padding), direction, x)
    assert_close(ours, nhwc(wanted))
    assert_close(gradient, nhwc(images.grad))


def test_layer_norm_equals_torch(platform, x64):
    import torch

    x, scale, bias, direction = 3 + numbers(0, 2, 3, 5), numbers(1, 5), numbers(2, 5), numbers(3, 2, 3, 5)
    leaves = [torch.from_numpy(value).requires_grad_() for value in (x, scale, bias)]
    wanted = torch.nn.functional.layer_norm(leaves[0], (5,), *leaves[1:], eps=0.1)
    wanted.backward(torch.from_numpy(direction))
    ours, gradients = with_gradients(lambda *leaves: layer_norm(*leaves, 0.1), direction, x, scale, bias)
    assert_close(ours, wanted.detach())
    for gradient, leaf in zip(gradients, leaves, strict=True):
        assert_close(gradient, leaf.grad)


def test_a_parameter_at_every_position_gets_the_sum_of_the_gradients(platform, x64):
    direction = numbers(0, 2, 3, 4, 5)
    y, (gradient,) = with_gradients(lambda x: broadcast(x, (2, 3, 4, 5)), direction, numbers(1, 5))
    assert_close(y, np.broadcast_to(numbers(1, 5), (2, 3, 4, 5)))
    assert_close(gradient, direction.sum((0, 1, 2)))


def test_sums_over_positions_are_of_float32(platform):
    """Ten thousand ones in bfloat16 are more than its eight bits can count one by one."""
    gradient = jax.grad(lambda x: jnp.sum(broadcast(x, (100, 100, 2)).astype(jnp.float32)))
    assert_close(gradient(jnp.ones(2, jnp.bfloat16)).astype(jnp.float32), [10_000.0, 10_000.0], 2**-8)


@pytest.mark.parametrize("name", ["hard_swish", "silu", "gelu", "gelu_tanh"])
def test_activations_equal_torch(name, platform, x64):
    import torch
    from torch.nn.functional import gelu, hardswish, silu

    theirs = {"hard_swish": hardswish, "silu": silu, "gelu": gelu}
    theirs["gelu_tanh"] = functools.partial(gelu, approximate="tanh")
    x, direction = 3 * numbers(0, 100), numbers(1, 100)
    leaf = torch.from_numpy(x).requires_grad_()
    wanted = theirs[name](leaf)
    wanted.backward(torch.from_numpy(direction))
    ours, (gradient,) = with_gradients(ACTIVATIONS[name], direction, x)
    assert_close(ours, wanted.detach())
    assert_close(gradient, leaf.grad)


def test_softmax_is_computed_in_float32():
    logits = jnp.asarray(8 * numbers(0, 3, 50), jnp.bfloat16)
    exact = jax.nn.softmax(logits.astype(jnp.float32))
    assert operations.softmax(logits).dtype == jnp.bfloat16
    assert np.array_equal(operations.softmax(logits), exact.astype(jnp.bfloat16))


def test_attention_is_a_softmax_of_any_size(x64):
    """Logits far beyond what exp can take, and weights that underflow."""
    logits, values = 1000 * numbers(0, 2, 3, 4, 5), numbers(1, 2, 3, 5, 6)
    ours, vjp = jax.vjp(attend, logits, values)
    wanted, wanted_vjp = jax.vjp(lambda logits, values: jax.nn.softmax(logits) @ values, logits, values)
    assert_close(ours, wanted)
    for gradient, wanted_gradient in zip(vjp(ours), wanted_vjp(ours), strict=True):
        np.testing.assert_allclose(gradient, wanted_gradient, atol=1e-12)


def test_platforms_without_an_entry_use_the_default(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "abacus")
    assert implementation("depthwise") == operations.IMPLEMENTATIONS["default"]["depthwise"]


def test_the_context_ends_and_can_be_nested():
    before = implementation("depthwise")
    with compiled_for("tpu"):
        with compiled_for("cpu"):
            assert implementation("depthwise") == "shifted_sum"
        assert implementation("depthwise") == "pallas"
    assert implementation("depthwise") == before


class Net(nn.Module):
    """Every operation that has several ways, behind each other."""

    @nn.compact
    def __call__(self, x, *, train=False):
        x = Conv(16, 3, padding=1, name="dense")(x)
        x = BatchNorm(name="batch")(max_pool(x, 3, 2, 1), train=True)
        x = ConvNeXtBlock(name="depthwise")(x)
        x = StarReLU(name="star")(Conv(16, name="pointwise")(x))
        x = ACTIVATIONS["gelu"](Linear(16, name="linear")(LayerNorm(name="norm")(x)))
        q = x.reshape(x.shape[0], 1, -1, 16)
        return operations.attention(q, q, q)


def loss(variables, x):
    y, _ = Net().apply(variables, x, mutable=["batch_stats"])
    return jnp.sum(y)


step = jax.jit(jax.grad(loss))  # one function for all platforms: the caches of JAX have to tell them apart


def traced(platform, function=step):
    """The program of `function` for a platform."""
    x = jax.ShapeDtypeStruct((2, 8, 8, 3), jnp.float32)
    variables = jax.eval_shape(Net().init, jax.random.key(0), x)
    with compiled_for(platform):
        return function.trace(variables, x).jaxpr


def equations(jaxpr):
    """All equations of a program, those of inner functions, loops and branches included, but not those of kernels."""
    for equation in jaxpr.eqns:
        yield jaxpr, equation
        if equation.primitive.name == "pallas_call":
            continue
        for parameter in jax.tree.leaves(equation.params, is_leaf=lambda leaf: hasattr(leaf, "eqns")):
            if hasattr(parameter, "eqns"):
                yield from equations(getattr(parameter, "jaxpr", parameter))


def marks(jaxpr):
    """What in a program shows the CPU's own ways, and what shows XLA's depthwise convolution and max pooling."""
    found = set()
    for inside, equation in equations(jaxpr):
        kind = equation.primitive.name
        if kind in ("cond", "optimization_barrier", "scan", "select_and_scatter_add"):
            found.add(kind)
        elif kind == "conv_general_dilated" and equation.params["feature_group_count"] > 1:
            found.add("depthwise convolution")
        elif kind == "dot_general":
            constant = {
                other.outvars[0]
                for other in inside.eqns
                if other.primitive.name == "broadcast_in_dim" and not other.invars[0].aval.shape
            }
            found |= {"sum as a product"} if constant & set(equation.invars) else set()
    return found


def test_programs_for_accelerators_have_no_detour_of_the_cpus():
    """The gradients of a network with every operation; the same search finds all detours in the CPU's program."""
    # A sum of shifted products stands behind a barrier in a branch; gradients of kernels are computed row by row.
    assert marks(traced("cpu")) == {"cond", "optimization_barrier", "scan", "sum as a product"}
    for platform in ("tpu", "gpu"):
        assert marks(traced(platform)) == {"depthwise convolution", "select_and_scatter_add"}


def test_a_jitted_function_is_traced_for_each_platform():
    """In any order, and as often as one likes: no platform gets the program of another from a cache."""
    programs = [str(traced(platform)) for platform in ("cpu", "tpu", "gpu", "cpu", "tpu")]
    cpu, tpu, gpu, *again = programs
    assert len({cpu, tpu, gpu}) == 3
    assert again == [cpu, tpu]


def test_inner_jitted_functions_follow_the_platform():
    """`lax.scan`, `jax.checkpoint` and an inner `jax.jit` keep what they traced; so does the backward pass."""
    inner = jax.jit(lambda x, kernel: convolve(x, kernel, padding=1, groups=4))
    kept = jax.checkpoint(lambda x, kernel: inner(x, kernel))

    def run(kernel, x):
        return jnp.sum(lax.scan(lambda x, _: (kept(x, kernel), None), x, length=2)[0])

    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((3, 3, 1, 4), (1, 5, 5, 4))]
    programs = {}
    for platform in ("cpu", "tpu", "cpu"):
        with compiled_for(platform):
            programs.setdefault(platform, []).append(str(jax.make_jaxpr(jax.grad(run))(*arguments)))
    assert programs["cpu"][0] == programs["cpu"][1]
    assert all("optimization_barrier" in program for program in programs["cpu"])
    assert "optimization_barrier" not in programs["tpu"][0] and "conv_general_dilated" in programs["tpu"][0]


def test_gradients_follow_the_platform_of_the_forward_pass():
    """The backward pass may be traced behind the end of the context."""
    with compiled_for("tpu"):
        _, vjp = jax.vjp(lambda x: broadcast(x, (4, 2)), jnp.ones(2))
    assert "dot_general" not in str(jax.make_jaxpr(vjp)(jnp.ones((4, 2))))
