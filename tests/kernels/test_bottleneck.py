"""The kernels for bottleneck blocks on TPUs in Pallas' interpreter, and lowered as for a TPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from maxmap import operations
from maxmap.backbones.resnet import Bottleneck
from maxmap.kernels import bottleneck
from maxmap.operations import compiled_for
from tests.marks import cases
from tests.zoo import assert_close, numbers, quick

pytestmark = pytest.mark.usefixtures("quick_compilation")

# Height, width, batch, channels in front, inside and behind: one program, and several of each axis.
SIZES = {"one": (2, 2, 16, 8, 8, 24), "several": (6, 34, 32, 192, 64, 2048)}


@pytest.fixture
def chosen(monkeypatch):
    monkeypatch.setitem(
        operations.IMPLEMENTATIONS, "cpu", operations.IMPLEMENTATIONS["default"] | {"bottleneck": "pallas"}
    )


def plain_first(x, weights, scale, bias, near):
    y = x @ weights
    mean = jnp.mean(y, axis=(0, 1, 2), keepdims=True)
    var = jnp.mean((y - mean) ** 2, axis=(0, 1, 2), keepdims=True)
    z = jnp.tanh((y - mean) / jnp.sqrt(var + 1e-3) * scale[None, None, None] + bias[None, None, None])
    return z, x, *(jax.lax.stop_gradient(value).ravel() for value in (mean, var))


def plain_activated(x, factor, summand, near):
    y = (
        jnp.tanh(x * factor[None, None, None] + summand[None, None, None])
        - jax.lax.stop_gradient(near)[None, None, None]
    )
    return y, jnp.sum(y, axis=(0, 1)), jnp.einsum("hwbi,hwbj->ij", y, y)


def plain_last(x, weights, bias, gate, residual):
    return jax.nn.relu(residual + gate[None, None] * (x @ weights + bias[None, None, None]))


def first(*args):
    return bottleneck.first(*args, jnp.tanh, lambda x: 1 / jnp.cosh(x) ** 2, 1e-3)


def activated(*args):
    return bottleneck.activated(*args, jnp.tanh)


# Ours, its definition, shapes of the arguments, and which of them have no gradient.
OPERATIONS = {
    "first": (first, plain_first, "hwbi ic c c c", {4}),
    "activated": (activated, plain_activated, "hwbc c c c", {3}),
    "last": (bottleneck.last, plain_last, "hwbc co o bo hwbo", set()),
}


def operands(name, size, dtype):
    """Arguments of an operation, and directions of its results."""
    sizes = dict(zip("hwbico", SIZES[size], strict=True))
    shapes = [tuple(sizes[axis] for axis in axes) for axes in OPERATIONS[name][2].split()]
    args = [
        jnp.asarray(numbers(i, *shape) / (shape[0] ** 0.5 if i == 1 else 1), dtype) for i, shape in enumerate(shapes)
    ]
    results = jax.eval_shape(OPERATIONS[name][0], *args)
    return args, jax.tree.map(lambda leaf: jnp.asarray(numbers(9, *leaf.shape), leaf.dtype), results)


def pulled(name, which, args, directions):
    fixed = OPERATIONS[name][3]

    def run(args, directions):
        y, pull = jax.vjp(OPERATIONS[name][which], *args)
        grads = pull(jax.tree.map(lambda direction, leaf: direction.astype(leaf.dtype), directions, y))
        return y, [grad for i, grad in enumerate(grads) if i not in fixed]

    return jax.jit(run)(args, directions)


@pytest.mark.parametrize("size", cases(SIZES, long=["several"]))
@pytest.mark.parametrize("name", OPERATIONS)
def test_the_kernels_equal_their_definition(name, size, x64):
    args, directions = operands(name, size, jnp.float64)
    jax.tree.map(assert_close, pulled(name, 0, args, directions), pulled(name, 1, args, directions))


@pytest.mark.parametrize("name", OPERATIONS)
def test_bfloat16_is_rounded_in_products_only(name):
    """Beside a computation in float32 from the same numbers: one rounding of the result, one of each operand."""
    half, directions = operands(name, "one", jnp.bfloat16)
    exact = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), half)
    ours, wanted = (jax.tree.leaves(pulled(name, i, args, directions)) for i, args in enumerate((half, exact)))
    for result, leaf in zip(ours, wanted, strict=True):
        assert jnp.linalg.norm((result.astype(jnp.float32) - leaf).ravel()) < 2**-7 * jnp.linalg.norm(leaf.ravel())


@pytest.mark.parametrize("name", OPERATIONS)
def test_the_kernels_are_written_for_a_tpu(name):
    """Lowers to Mosaic, which needs no TPU: every operation of both directions is one that it has."""
    args, directions = operands(name, "several", jnp.bfloat16)
    with compiled_for("tpu"):
        traced = jax.jit(lambda *args: pulled(name, 0, *args)).trace(args, directions)
    assert traced.lower(lowering_platforms=("tpu",)).as_text().count("tpu_custom_call") == 2


BLOCKS = {
    "plain": (256, 1, False, 0.0),
    "dropped": (256, 1, False, 0.5),
    "squeeze": (256, 1, True, 0.0),
    "stride": (512, 2, True, 0.0),
}


def block_and_gradients(name, batch):
    """A function of a block's variables, images and directions; all of them."""
    block, x = Bottleneck(*BLOCKS[name]), jnp.asarray(1 + numbers(0, batch, 4, 4, 256))
    shapes = jax.eval_shape(lambda x: block.init(jax.random.key(0), x, train=False), x)
    leaves, tree = jax.tree.flatten(shapes)
    variables = tree.unflatten([jnp.asarray(0.2 + numbers(i, *leaf.shape) ** 2) for i, leaf in enumerate(leaves)])
    direction = jnp.asarray(
        numbers(1, *jax.eval_shape(lambda v, x: block.apply(v, x, train=False), variables, x).shape)
    )

    def run(variables, x, direction):
        def train(params, x):
            rngs = {"dropout": jax.random.key(1)}
            return block.apply(variables | {"params": params}, x, train=True, mutable=["batch_stats"], rngs=rngs)

        y, pull, new = jax.vjp(train, variables["params"], x, has_aux=True)
        return y, new, pull(direction)

    return run, (variables, x, direction)


def close(ours, wanted):
    """Some gradients are zero but for rounding: of kernels in front of a norm, along themselves."""
    np.testing.assert_allclose(ours, wanted, rtol=1e-9, atol=1e-9 * max(1, np.abs(wanted).max()))


@pytest.mark.parametrize("name", cases(BLOCKS, long=("plain", "squeeze")))  # the others have both
def test_blocks_are_the_same_with_kernels(name, x64, chosen, monkeypatch):
    run, args = block_and_gradients(name, 16)
    assert str(jax.make_jaxpr(run)(*args)).count("pallas_call") == 6
    ours = quick(lambda *args: run(*args), *args)
    monkeypatch.setitem(operations.IMPLEMENTATIONS, "cpu", operations.IMPLEMENTATIONS["default"])
    jax.tree.map(close, ours, quick(lambda *args: run(*args), *args))


def test_other_blocks_have_none(chosen):
    block = Bottleneck(256, 1, False, 0.0)
    for shape, batch in ((256, 15), (96, 16)):  # images left over; channels that fill no registers
        x = jnp.zeros((batch, 4, 4, shape))
        variables = jax.eval_shape(lambda x: block.init(jax.random.key(0), x, train=False), x)
        traced = jax.make_jaxpr(lambda v, x: block.apply(v, x, train=True, mutable=["batch_stats"]))(variables, x)
        assert "pallas_call" not in str(traced)


def test_devices_share_the_batch(x64, chosen):
    """Each has its images; statistics and gradients are sums over all of them."""
    run, args = block_and_gradients("squeeze", 32)
    wanted = quick(lambda *args: run(*args), *args)
    mesh = jax.make_mesh((2, 1), ("data", "fsdp"), devices=jax.devices()[:2], axis_types=(AxisType.Auto,) * 2)
    split = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))

    def shared(*args):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return run(*args)

    jax.tree.map(close, quick(shared, args[0], *jax.device_put(args[1:], split)), wanted)
