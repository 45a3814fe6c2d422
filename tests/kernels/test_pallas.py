"""The kernels in Pallas' interpreter against the plain implementation, and lowered as for a GPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maxmap import operations
from maxmap.backbones.maxxvit.attention import TransformerFields, WindowAttention
from maxmap.kernels import pallas
from maxmap.layers.blocks import SelfAttention, StripeAttention
from maxmap.operations import attention, compiled_for
from maxmap.sharding import make_mesh, split_batch, traced_on

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture
def chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(operations.IMPLEMENTATIONS, "cpu", operations.IMPLEMENTATIONS["cpu"] | {"attention": "pallas"})


def numbers(dtype: str, *shapes: tuple[int, ...]) -> list[jax.Array]:
    generator = np.random.default_rng(0)
    return [jnp.asarray(generator.normal(size=shape), dtype) for shape in shapes]


def both_ways(attend, q, k, v, bias, grad):
    """The output and the gradients of everything that goes in."""

    def run(*inputs):
        out, vjp = jax.vjp(attend, *inputs)
        return out, *vjp(grad)

    return jax.jit(run)(q, k, v, bias)


def plain(q, k, v, bias):
    return attention(q, k, v, bias)


# Windows, heads, queries, keys, channels of a head; more windows than a program takes, tiles with and without padding.
CASES = [
    ((pallas.WINDOWS_PER_PROGRAM + 3, 2, 49, 49, 32), "float64", True, 1e-11),
    ((3, 1, 1, 50, 24), "float64", False, 1e-11),
    ((2, 2, 16, 16, 16), "float32", False, 1e-4),
    ((2, 3, 98, 98, 8), "float32", True, 1e-4),
    ((2, 2, 49, 49, 32), "bfloat16", True, 0.1),
]


@pytest.mark.parametrize(("sizes", "dtype", "biased", "tolerance"), CASES)
def test_window_attention_equals_the_plain_one(sizes, dtype, biased, tolerance, x64):
    windows, heads, queries, keys, channels = sizes
    q, k, v, bias, grad = numbers(
        dtype,
        (windows, heads, queries, channels),
        *((windows, heads, keys, channels),) * 2,
        (heads, queries, keys),
        (windows, heads, queries, channels),
    )
    inputs = (q, k, v, bias if biased else None, grad)
    ours, wanted = both_ways(pallas.window_attention, *inputs), both_ways(plain, *inputs)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(wanted), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(np.asarray(a, np.float64), np.asarray(b, np.float64), atol=tolerance)


def test_window_attention_takes_logits_of_any_size(x64):
    q, k, v = numbers("float64", (2, 2, 49, 16), (2, 2, 49, 16), (2, 2, 49, 16))
    np.testing.assert_allclose(
        pallas.window_attention(1000 * q, k, v, None), attention(1000 * q, k, v), rtol=1e-9, atol=1e-12
    )


def test_eight_devices_compute_what_one_does(x64, chosen):
    sizes = [(16, 2, 9, 8)] * 3
    q, k, v, bias, grad = numbers("float64", *sizes, (2, 9, 9), sizes[0])
    wanted = both_ways(plain, q, k, v, bias, grad)
    mesh = make_mesh()
    q, k, v, grad = jax.device_put((q, k, v, grad), split_batch(mesh))
    with traced_on(mesh):
        ours = both_ways(plain, q, k, v, bias, grad)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-11)


LAYERS = {
    "window": (
        WindowAttention(64, 64, (4, 4), TransformerFields(rel_pos_type="bias_tf", attn_drop=0.5), "normal"),
        [(2, 3, 16, 64)],
        {"train": False},
    ),
    "tokens": (SelfAttention(2), [(3, 20, 32)], {}),
    "stripes": (StripeAttention(2, (4, 2)), [(2, 4, 4, 32)] * 3, {}),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layers_take_the_kernel_where_it_is_chosen(name, x64, chosen, monkeypatch):
    layer, shapes, options = LAYERS[name]
    inputs = numbers("float64", *shapes)
    like, tree = jax.tree.flatten(jax.eval_shape(lambda: layer.init(jax.random.key(0), *inputs, **options)))
    variables = tree.unflatten(numbers("float64", *(leaf.shape for leaf in like)))
    ours = jax.jit(lambda *inputs: layer.apply(variables, *inputs, **options)).trace(*inputs)
    monkeypatch.setitem(operations.IMPLEMENTATIONS["cpu"], "attention", "plain")
    wanted = jax.jit(lambda *inputs: layer.apply(variables, *inputs, **options)).trace(*inputs)
    assert "pallas_call" in str(ours.jaxpr) and "pallas_call" not in str(wanted.jaxpr)
    results = (traced.lower().compile()(*inputs) for traced in (ours, wanted))
    np.testing.assert_allclose(*results, atol=1e-10)


@pytest.mark.parametrize(("tokens", "rate"), [(pallas.LARGEST_WINDOW + 1, 0.0), (16, 0.5)])
def test_what_the_kernel_cannot_is_computed_plainly(tokens, rate, chosen):
    layer = SelfAttention(1, attn_drop=rate)
    x = jnp.zeros((1, tokens, 16))

    def run(x):
        keys = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
        return layer.init_with_output(keys, x, train=True)

    assert "pallas_call" not in str(jax.make_jaxpr(run)(x))


@pytest.mark.parametrize("biased", [True, False])
def test_window_attention_is_written_for_a_gpu(biased):
    """Lowers to Triton, which needs no GPU: every operation of both directions is one that it has."""
    shape = jax.ShapeDtypeStruct((20, 2, 49, 32), jnp.bfloat16)
    bias = jax.ShapeDtypeStruct((2, 49, 49), jnp.float32) if biased else None

    def run(q, k, v, bias, grad):
        out, vjp = jax.vjp(pallas.window_attention, q, k, v, bias)
        return out, vjp(grad)

    with compiled_for("gpu"):
        traced = jax.jit(run).trace(shape, shape, shape, bias, shape)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("__gpu$xla.gpu.triton") == 2
