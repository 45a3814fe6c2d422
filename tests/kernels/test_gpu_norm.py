"""Batch norm with its activation and gate, in Pallas' interpreter, against the plain operations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from maxmap import operations
from maxmap.kernels import gpu_norm
from maxmap.layers.blocks import SqueezeExcite
from maxmap.layers.primitives import ACTIVATIONS, BatchNorm, batch_norm_groups
from maxmap.operations import compiled_for
from maxmap.shapes import eval_shape_of_init
from maxmap.sharding import make_mesh, split_batch, traced_on
from tests.marks import cases


class Net(nn.Module):
    """A norm with what may stand behind it."""

    activation: str
    gated: bool

    @nn.compact
    def __call__(self, x, *, train):
        gate = SqueezeExcite(4, "silu", name="se").gate if self.gated else None
        return BatchNorm(0.1, name="norm")(x, train=train, activation=self.activation, gate=gate)


class Plain(nn.Module):
    """The same, one module after another."""

    activation: str
    gated: bool

    @nn.compact
    def __call__(self, x, *, train):
        y = ACTIVATIONS[self.activation](BatchNorm(0.1, name="norm")(x, train=train))
        return SqueezeExcite(4, "silu", name="se")(y) if self.gated else y


@pytest.fixture
def chosen(monkeypatch):
    ways = operations.IMPLEMENTATIONS["cpu"] | {"batch_norm": "activated"}
    monkeypatch.setitem(operations.IMPLEMENTATIONS, "cpu", ways)


def numbers(shapes, dtype="float64"):
    generator = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: jnp.asarray(1 + generator.normal(size=leaf.shape), dtype), shapes)


def both_directions(net, variables, x, direction, train=True):
    """Output, running statistics, and gradients of parameters and input."""

    def apply(params, x):
        return net.apply({**variables, "params": params}, x, train=train, mutable=["batch_stats"])

    def run(params, x):
        y, vjp, new = jax.vjp(apply, params, x, has_aux=True)
        return y, new, vjp(direction)

    return jax.jit(run)(variables["params"], x)


def setting(net, shape, dtype="float64"):
    x = jax.ShapeDtypeStruct(shape, dtype)
    variables = eval_shape_of_init(lambda x: net.init(jax.random.key(0), x, train=True), x)
    variables = numbers(variables, dtype)
    variables["batch_stats"] = jax.tree.map(jnp.abs, variables["batch_stats"])
    x, direction = numbers([x, x], dtype)
    return variables, 3 * x, direction


def assert_equal(ours, wanted, tolerance=1e-10):
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(wanted), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(np.asarray(a, np.float64), np.asarray(b, np.float64), atol=tolerance)


# More pixels and channels than a tile, and fewer.
CASES = [
    ((4, 9, 9, gpu_norm.CHANNELS + 3), True, "gelu", 1),
    ((6, 3, 2, 5), True, "silu", 2),
    ((6, 3, 2, 5), False, "gelu_tanh", 1),
    ((6, 5), False, "gelu", 3),
]


@pytest.mark.parametrize(("shape", "gated", "activation", "groups"), cases(CASES, long=CASES[1:3]))
def test_one_kernel_equals_one_module_after_another(shape, gated, activation, groups, x64, chosen):
    variables, x, direction = setting(Plain(activation, gated), shape)
    with batch_norm_groups(groups):
        ours, wanted = (
            both_directions(net, variables, x, direction) for net in (Net(activation, gated), Plain(activation, gated))
        )
    assert_equal(ours, wanted)


def test_running_statistics_are_used_outside_of_training(x64, chosen):
    variables, x, direction = setting(Plain("gelu", True), (2, 5, 5, 6))
    ours, wanted = (
        both_directions(net, variables, x, direction, train=False) for net in (Net("gelu", True), Plain("gelu", True))
    )
    assert_equal(ours, wanted)


def test_eight_devices_compute_what_one_does(x64, chosen):
    net = Net("gelu", True)
    variables, x, direction = setting(net, (16, 3, 3, 6))
    wanted = both_directions(net, variables, x, direction)
    mesh = make_mesh()
    x, direction = jax.device_put((x, direction), split_batch(mesh))
    with traced_on(mesh):
        ours = both_directions(net, variables, x, direction)
    assert_equal(ours, wanted)


def test_it_is_written_for_a_gpu():
    net = Net("gelu", True)
    variables, x, direction = setting(net, (4, 9, 9, 24), "bfloat16")

    def run(variables, x, direction):
        return both_directions(net, variables, x, direction)

    with compiled_for("gpu"):
        traced = jax.jit(run).trace(variables, x, direction)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("__gpu$xla.gpu.triton") == 2  # one in each direction
