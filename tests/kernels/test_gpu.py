"""Window attention on maps, and the MLP, for GPUs: in Pallas' interpreter, against one module after another."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maxmap import operations
from maxmap.backbones.maxxvit.attention import PartitionAttention, TransformerFields
from maxmap.kernels import gpu_attention, gpu_mlp
from maxmap.layers.blocks import ConvNeXtBlock
from maxmap.operations import compiled_for
from maxmap.shapes import eval_shape_of_init
from maxmap.sharding import make_mesh, split_batch, traced_on
from tests.marks import cases

pytestmark = pytest.mark.usefixtures("quick_compilation")

WAYS = {"windows": "maps", "mlp": "rows"}
PLAIN = dict.fromkeys(WAYS, "plain")
FIELDS = TransformerFields(head_dim=8, rel_pos_type="bias_tf", activation="gelu_tanh")


@pytest.fixture
def choose(monkeypatch):
    def choose(ways):
        monkeypatch.setitem(operations.IMPLEMENTATIONS, "cpu", operations.IMPLEMENTATIONS["cpu"] | ways)

    return choose


def numbers(shapes, dtype="float64", seed=0):
    generator = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jnp.asarray(generator.normal(size=leaf.shape), dtype), shapes)


def setting(block, shape, dtype="float64"):
    x = jax.ShapeDtypeStruct(shape, dtype)
    params = eval_shape_of_init(lambda x: block.init(jax.random.key(0), x), x)
    return numbers(params, dtype), *numbers([x, x], dtype, 1)


def both_directions(block, params, x, direction):
    """A block's output while training, and the gradients of its parameters and its input."""

    def run(params, x, direction):
        def apply(params, x):
            return block.apply(params, x, train=True, rngs={"dropout": jax.random.key(2)})

        y, vjp = jax.vjp(apply, params, x)
        return y, vjp(direction)

    return jax.jit(run).trace(params, x, direction)


def assert_equal(ours, wanted, tolerance=1e-9):
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(wanted), strict=True):
        assert a.dtype == b.dtype
        scale = max(1.0, float(jnp.max(jnp.abs(b))))
        np.testing.assert_allclose(np.asarray(a, np.float64), np.asarray(b, np.float64), atol=tolerance * scale)


def partition(channels, window, *kinds, **fields):
    names = {"window": "attn_block", "grid": "attn_grid"}
    fields = FIELDS.__dict__ | fields
    attentions = [(names[kind] if len(kinds) > 1 else "attn", kind) for kind in kinds]
    return PartitionAttention(channels, TransformerFields(**fields), window, attentions, drop_path=0.5)


# Tiles with and without padding of rows, columns and channels; both orders of channels; images and pixels that do not
# fill a program; a layer scale; two attentions side by side.
BLOCKS = {
    "windows of 7": (partition(16, (7, 7), "window"), (3, 14, 7, 16)),
    "grid of 7": (partition(16, (7, 7), "grid"), (2, 14, 14, 16)),
    "grid not square": (partition(24, (2, 3), "grid", head_dim=12, head_first=False), (2, 4, 6, 24)),
    "windows of 4": (partition(32, (4, 4), "window", head_dim=16, init_values=0.5, activation="gelu"), (2, 8, 4, 32)),
    "both": (partition(32, (4, 4), "window", "grid", rel_pos_type="bias"), (2, 8, 8, 32)),
    "no attention": (ConvNeXtBlock(drop_path=0.5), (4, 9, 9, 20)),
}


@pytest.mark.parametrize("name", cases(BLOCKS, long=("windows of 7", "grid of 7", "windows of 4", "no attention")))
def test_kernels_equal_one_module_after_another(name, x64, choose):
    block, shape = BLOCKS[name]
    inputs = setting(block, shape)
    choose(WAYS)
    ours = both_directions(block, *inputs)
    choose(PLAIN)
    wanted = both_directions(block, *inputs)
    assert "pallas_call" in str(ours.jaxpr) and "pallas_call" not in str(wanted.jaxpr)
    assert_equal(*(traced.lower().compile()(*inputs) for traced in (ours, wanted)))


@pytest.mark.long
def test_eight_devices_compute_what_one_does(x64, choose):
    choose(WAYS)
    block, _ = BLOCKS["windows of 7"]
    params, x, direction = setting(block, (16, 7, 7, 16))
    wanted = both_directions(block, params, x, direction).lower().compile()(params, x, direction)
    mesh = make_mesh()
    x, direction = jax.device_put((x, direction), split_batch(mesh))
    with traced_on(mesh):
        traced = both_directions(block, params, x, direction)
        ours = traced.lower().compile()(params, x, direction)
    assert_equal(ours, wanted)


def test_what_the_kernels_cannot_is_computed_plainly(choose):
    choose(WAYS)
    assert not gpu_attention.fits((16, 16)) and not gpu_mlp.fits(gpu_mlp.CHANNELS + 1, 4096)
    block = partition(16, (4, 4), "window", attn_drop=0.5, proj_drop=0.5)
    inputs = setting(block, (2, 8, 8, 16), "float32")
    assert "pallas_call" not in str(both_directions(block, *inputs).jaxpr)


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh"])
def test_they_are_written_for_a_gpu(activation):
    """Lowers to Triton, which needs no GPU: every operation of both directions is one that it has."""
    block = partition(32, (7, 7), "window", activation=activation)
    params, x, direction = setting(block, (2, 14, 14, 32), "bfloat16")
    with compiled_for("gpu"):
        traced = both_directions(block, params, x, direction)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("__gpu$xla.gpu.triton") == 4


def test_the_error_function_in_triton():
    from maxmap.kernels.target import erf, inside_triton

    x = jnp.linspace(-6, 6, 1001, dtype=jnp.float32)
    with compiled_for("gpu"), inside_triton():
        ours = erf(x)
    np.testing.assert_allclose(ours, jax.lax.erf(x), atol=1e-6)
