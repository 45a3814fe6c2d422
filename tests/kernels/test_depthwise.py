"""The depthwise kernels for TPUs in Pallas' interpreter, and lowered as for a TPU."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from maxmap import operations
from maxmap.backbones.maxxvit.convolution import MBConv
from maxmap.errors import UserError
from maxmap.kernels import depthwise, xla
from maxmap.kernels.mosaic import LANES
from maxmap.layers.folded import fold_batch_norms, neighbours
from maxmap.operations import compiled_for, convolve
from tests.marks import cases
from tests.zoo import QUICK, assert_close, numbers, quick

# Height, width, batch, input and output channels, kernel size, stride, zeros before and after each axis.
EXPANDED = {
    "3x3": (4, 6, 16, 8, 24, 3, 1, (1, 1)),
    "several tiles": (15, 4, 32, 8, 256, 3, 1, (1, 1)),
    "stride 2": (18, 6, 16, 8, 16, 3, 2, (1, 1)),
    "stride 2, TensorFlow's padding": (18, 4, 16, 8, 256, 3, 2, (0, 1)),
}
ALONE = {
    "7x7": (16, 9, 16, 16, 16, 7, 1, (3, 3)),
    "5x5, stride 2": (18, 4, 16, 256, 256, 5, 2, (2, 2)),
    "1x1": (4, 2, 16, 8, 8, 1, 1, (0, 0)),
}


def convolved(case, function):
    """The plain form, on maps `[H, W, B, C]`, and the window of the kernels."""
    *_, out_channels, size, stride, pads = case

    def plain(x, pointwise, kernel):
        if pointwise:
            x = function(x @ pointwise[0] + pointwise[1][None, None, None])
        x, kernel = x.transpose(2, 0, 1, 3), kernel[:, :, None]
        y = xla.convolution(x, kernel, stride, (pads, pads), out_channels).transpose(1, 2, 0, 3)
        wide = y.astype(jnp.promote_types(y.dtype, jnp.float32))
        return y, jnp.stack([jnp.sum(wide, axis=(0, 1, 2)), jnp.sum(jnp.square(wide), axis=(0, 1, 2))])

    return plain, depthwise.Window(size, stride, (pads[0],) * 2, function)


def operands(case, dtype, *, expand):
    height, width, batch, channels, out_channels, size, _, _ = case
    x, kernel = numbers(0, height, width, batch, channels), numbers(1, size, size, out_channels)
    pointwise = (numbers(2, channels, out_channels) / channels**0.5, numbers(3, out_channels)) if expand else ()
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), [x, pointwise, kernel])


def pulled(function, args, directions):
    def run(*args):
        y, pull = jax.vjp(function, *args)
        return y, pull(tuple(direction.astype(leaf.dtype) for direction, leaf in zip(directions, y, strict=True)))

    # Of several tiles of channels the interpreter computes for longer than XLA compiles.
    return quick(run, *args) if args[-1].shape[-1] <= LANES else jax.jit(run)(*args)


def kernels(window, pointwise, *, beside=True):
    """The kernels' form of `convolved`: with the map's sums behind a 1x1 convolution, else with `x` beside or alone."""
    if pointwise:
        return functools.partial(depthwise.expand_depthwise, window=window)
    return lambda x, _, kernel: depthwise.depthwise(x, kernel, window, beside)


LONG = ("3x3", "several tiles", "stride 2", "5x5, stride 2")  # each has a neighbour that needs as much


@pytest.mark.parametrize("name", cases([*EXPANDED, *ALONE], long=LONG))
def test_the_kernels_equal_xlas(name, x64):
    """Results and all gradients, where the sums or what is beside the map have gradients too."""
    expand = name in EXPANDED
    case = EXPANDED[name] if expand else ALONE[name]
    height, width, batch, channels, out_channels, size, stride, pads = case
    assert depthwise.fits((batch, height, width, channels), out_channels, size, stride, (pads, pads), 1)
    plain, window = convolved(case, jnp.tanh if expand else None)
    args = operands(case, jnp.float64, expand=expand)
    wanted_form = plain if expand else lambda x, pointwise, kernel: (plain(x, pointwise, kernel)[0], x)
    directions = [numbers(i, *leaf.shape) for i, leaf in enumerate(jax.eval_shape(wanted_form, *args))]
    wanted = pulled(wanted_form, args, directions)
    jax.tree.map(assert_close, pulled(kernels(window, args[1]), args, directions), wanted)
    if name in ("7x7", "1x1"):  # the other way, where nothing is beside the map
        (y, _), (of_x, *others) = wanted
        found = pulled(kernels(window, (), beside=False), args, directions[:1])
        jax.tree.map(assert_close, found, ((y,), (of_x - directions[1], *others)))


def test_bfloat16_is_rounded_once():
    """The kernels round what XLA rounds, and less: they keep the map between the convolutions in float32."""
    case = EXPANDED["stride 2"]
    plain, window = convolved(case, jax.nn.silu)
    half = operands(case, jnp.bfloat16, expand=True)
    exact = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), half)
    directions = [numbers(i, *leaf.shape) * (1, 0)[i] for i, leaf in enumerate(jax.eval_shape(plain, *exact))]
    wanted = pulled(plain, exact, [direction.astype(jnp.bfloat16) for direction in map(jnp.asarray, directions)])
    ours = pulled(functools.partial(depthwise.expand_depthwise, window=window), half, directions)
    for result, leaf in zip(jax.tree.leaves(ours), jax.tree.leaves(wanted), strict=True):
        # One rounding of the result, and one of each product's operands, of 2**-9 on average half of that.
        error = jnp.linalg.norm((result.astype(jnp.float32) - leaf).ravel()) / jnp.linalg.norm(leaf.ravel())
        assert error < 2**-8


@pytest.fixture
def chosen(monkeypatch):
    ways = operations.IMPLEMENTATIONS["cpu"] | {"depthwise": "pallas", "expand": "pallas"}
    monkeypatch.setitem(operations.IMPLEMENTATIONS, "cpu", ways)


def test_convolutions_take_the_kernel_where_it_is_chosen(x64, chosen):
    x, kernel = numbers(0, 16, 8, 8, 6), numbers(1, 7, 7, 1, 6)
    ours = jax.jit(functools.partial(convolve, padding=3, groups=6)).trace(x, kernel)
    assert "pallas_call" in str(ours.jaxpr)
    assert_close(ours.lower().compile()(x, kernel), xla.convolution(x, kernel, 1, ((3, 3), (3, 3)), 6))
    for other in (x[:15], x[:, :7]):  # images left over; height and width of which the stride is no divisor
        traced = jax.make_jaxpr(functools.partial(convolve, stride=2, padding=3, groups=6))(other, kernel)
        assert "pallas_call" not in str(traced)


BLOCKS = {
    "plain": {"drop_path": 0.5},
    "stride": {"stride": 2, "padding": "same", "activation": "gelu_tanh"},
    "pooled": {"stride": 2, "stride_mode": "pool", "pre_norm_act": True, "activation": "silu"},
    "early": {"se_early": True, "expand_output": False},
}


def block_and_gradients(options, batch):
    """A function of a block's variables, images and directions, in training and without; all of them."""
    block, x = MBConv(16, **options), jnp.asarray(1 + numbers(0, batch, 4, 4, 8))
    leaves, tree = jax.tree.flatten(jax.eval_shape(block.init, jax.random.key(0), x))
    variables = tree.unflatten([jnp.asarray(0.5 + numbers(i, *leaf.shape) ** 2) for i, leaf in enumerate(leaves)])
    direction = jnp.asarray(numbers(1, *jax.eval_shape(block.apply, variables, x).shape))

    def run(variables, x, direction):
        def train(params, x):
            rngs = {"dropout": jax.random.key(2)}
            return block.apply(variables | {"params": params}, x, train=True, mutable=["batch_stats"], rngs=rngs)

        y, pull, new = jax.vjp(train, variables["params"], x, has_aux=True)
        return y, new, pull(direction), block.apply(variables, x)

    return run, (variables, x, direction)


@pytest.mark.parametrize("name", cases(BLOCKS, long=["stride", "pooled", "early"]))
def test_blocks_are_the_same_in_one_operation(name, x64, chosen, monkeypatch):
    run, args = block_and_gradients(BLOCKS[name], 16)
    ours = jax.jit(lambda *args: run(*args), compiler_options=QUICK).trace(*args)
    assert str(ours.jaxpr).count("name=depthwise3_forward") == 2  # in training and without
    monkeypatch.setitem(operations.IMPLEMENTATIONS, "cpu", operations.IMPLEMENTATIONS["default"])
    wanted = quick(lambda *args: run(*args), *args)
    # Some gradients are zero but for rounding: of biases in front of batch norms.
    jax.tree.map(
        lambda ours, wanted: np.testing.assert_allclose(ours, wanted, rtol=1e-9, atol=1e-9),
        ours.lower().compile()(*args),
        wanted,
    )


def test_folded_norms_are_parts_of_the_operation_too(x64, chosen):
    block, x = MBConv(16), jnp.asarray(1 + numbers(0, 16, 4, 4, 8))
    leaves, tree = jax.tree.flatten(jax.eval_shape(block.init, jax.random.key(0), x))
    variables = tree.unflatten([jnp.asarray(0.5 + numbers(i, *leaf.shape) ** 2) for i, leaf in enumerate(leaves)])
    folded = fold_batch_norms(variables, neighbours(lambda x: block.init_with_output(jax.random.key(0), x)[0], x))
    assert not folded["batch_stats"]
    ours, wanted = quick(lambda *each: [block.apply(v, x) for v in each], folded, variables)
    assert_close(ours, wanted)
    with pytest.raises(UserError, match="the model is fused for inference and cannot train"):
        jax.eval_shape(lambda v: block.apply(v, x, train=True, mutable=["batch_stats"]), folded)


@pytest.mark.long
def test_devices_share_the_batch(x64, chosen):
    """Each has its images; statistics and gradients are sums over all of them."""
    run, args = block_and_gradients(BLOCKS["stride"], 32)
    wanted = quick(lambda *args: run(*args), *args)
    mesh = jax.make_mesh((2, 1), ("data", "fsdp"), devices=jax.devices()[:2], axis_types=(AxisType.Auto,) * 2)
    split = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))

    def shared(*args):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return run(*args)

    ours = quick(shared, args[0], *jax.device_put(args[1:], split))
    jax.tree.map(lambda ours, wanted: np.testing.assert_allclose(ours, wanted, rtol=1e-9, atol=1e-9), ours, wanted)


@pytest.mark.parametrize("name", ["several tiles", "stride 2", "7x7"])
def test_the_kernels_are_written_for_a_tpu(name):
    """Lowers to Mosaic, which needs no TPU: every operation of both directions is one that it has."""
    case = (EXPANDED | ALONE)[name]
    _, window = convolved(case, jax.nn.silu if name in EXPANDED else None)
    args = operands(case, jnp.bfloat16, expand=name in EXPANDED)
    directions = [jnp.ones(leaf.shape, leaf.dtype) for leaf in jax.eval_shape(kernels(window, args[1]), *args)]

    def run(args, directions):
        y, pull = jax.vjp(kernels(window, args[1]), *args)
        return y, pull(tuple(directions))

    with compiled_for("tpu"):
        traced = jax.jit(run).trace(args, directions)
    assert traced.lower(lowering_platforms=("tpu",)).as_text().count("tpu_custom_call") == 2
