"""The kernels for TPUs in Pallas' interpreter against the plain modules, forward and backward, and over a mesh."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from maxmap import operations
from maxmap.backbones.maxxvit.attention import PartitionAttention, TransformerBlock, TransformerFields
from maxmap.backbones.metaformer import MetaFormerBlock
from maxmap.kernels import tpu_attention, tpu_mlp
from maxmap.kernels.target import erf, short_erf
from maxmap.layers.blocks import ConvNeXtBlock, CSWinBlock
from maxmap.sharding import make_mesh, split_batch, traced_on
from tests.marks import cases
from tests.zoo import QUICK


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> None:
    ways = {"block": "fused", "mlp": "fused"}
    monkeypatch.setitem(operations.IMPLEMENTATIONS, "cpu", operations.IMPLEMENTATIONS["cpu"] | ways)


def run(module: nn.Module, variables: Any, x: jax.Array, grad: jax.Array, train: bool = False) -> Any:
    """The output, and the gradients of the parameters and of the input."""

    def apply(variables: Any, x: jax.Array) -> jax.Array:
        return module.apply(variables, x, train=train, rngs={"dropout": jax.random.key(3)})

    out, vjp = jax.vjp(apply, variables, x)
    return out, *vjp(grad)


def setting(module: nn.Module, shape: tuple[int, ...], dtype: str) -> tuple[Any, jax.Array, jax.Array]:
    """Variables, maps and a direction of the gradient, every leaf random."""
    generator = np.random.default_rng(0)

    def numbers(shape: tuple[int, ...]) -> jax.Array:
        return jnp.asarray(generator.normal(size=shape), dtype)

    x, grad = numbers(shape), numbers(shape)
    like = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, *shape[1:])))
    return jax.tree.map(lambda leaf: numbers(leaf.shape) * 0.5, like), x, grad


def trace(module: nn.Module, arguments: tuple[Any, ...], train: bool = False) -> tuple[Any, int]:
    """The program of both directions, and how many kernels there are in it."""
    program = jax.jit(lambda *arguments: run(module, *arguments, train), compiler_options=QUICK)
    traced = program.trace(*arguments)
    return traced, str(traced.jaxpr).count("pallas_call[")


def plainly(module: nn.Module, arguments: tuple[Any, ...], train: bool = False) -> Any:
    """Results without kernels."""
    with operations.kernels("plain"):
        return trace(module, arguments, train)[0].lower().compile()(*arguments)


def both(module: nn.Module, shape: tuple[int, ...], dtype: str, train: bool = False) -> tuple[Any, Any, Any]:
    """Results without and with kernels; and how many kernels there were."""
    arguments = setting(module, shape, dtype)
    traced, kernels = trace(module, arguments, train)
    return plainly(module, arguments, train), traced.lower().compile()(*arguments), kernels


def close(ours: Any, wanted: Any, tolerance: float) -> None:
    for (path, leaf), expected in zip(jax.tree.leaves_with_path(ours), jax.tree.leaves(wanted), strict=True):
        assert leaf.dtype == expected.dtype
        expected = np.asarray(expected, np.float64)
        # Some gradients are sums that cancel: that of a bias that all logits of a head share is 0.
        error = np.abs(np.asarray(leaf, np.float64) - expected).max() / max(np.abs(expected).max(), 1)
        assert error <= tolerance, f"{jax.tree_util.keystr(path)}: {error}"


def attention(window: tuple[int, int], kind: str, channels: int, **fields: Any) -> PartitionAttention:
    return PartitionAttention(channels, TransformerFields(**fields), window, (("attn", kind),))


TF = {"head_first": False, "rel_pos_type": "bias_tf", "activation": "gelu_tanh"}
# Windows and grid cells of 7 x 7 and other sizes, heads that fill tiles of lanes and that do not, one head to a tile,
# several windows to a map, several programs to a batch, a layer scale, torchvision's scale, positions by an MLP.
MODULES: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "window": (attention((7, 7), "window", 64, **TF), (8, 14, 7, 64)),
    "grid": (attention((5, 4), "grid", 96, init_values=0.1), (24, 5, 8, 96)),
    "narrow": (attention((4, 3), "grid", 64, head_dim=16, rel_pos_type="mlp"), (8, 4, 6, 64)),
    "wide": (attention((3, 3), "window", 256, head_dim=128, scale_by_width=True), (8, 3, 6, 256)),
    "large": (attention((9, 8), "window", 32), (8, 9, 8, 32)),
    "whole map": (TransformerBlock(160, TransformerFields()), (8, 5, 5, 160)),
    "convnext": (ConvNeXtBlock(), (8, 5, 6, 96)),
    "cswin": (CSWinBlock(2, (3, 3)), (8, 3, 3, 64)),
}


@pytest.mark.parametrize("name", cases(MODULES, long=("grid", "narrow", "large", "wide", "whole map")))
def test_kernels_equal_the_plain_modules(name: str, fused: None, x64: None) -> None:
    module, shape = MODULES[name]
    wanted, ours, kernels = both(module, shape, "float64")
    assert kernels == (2 if name in ("convnext", "cswin") else 4)
    close(ours, wanted, 1e-11)


FLOAT32 = 1e-4  # a value has 24 bits; sums of a few hundred products lose a few of them


def test_kernels_equal_the_plain_modules_in_float32(fused: None) -> None:
    wanted, ours, _ = both(*MODULES["convnext"], "float32")
    close(ours, wanted, FLOAT32)


def test_bfloat16_kernels_are_no_further_from_float32_than_the_plain_way(fused: None) -> None:
    module, shape = MODULES["window"][0], (8, 7, 7, 64)
    exact, in_float32, _ = both(module, shape, "float32")
    close(in_float32, exact, FLOAT32)
    wanted, ours, _ = both(module, shape, "bfloat16")
    close(ours, wanted, 0.06)  # a value has 8 bits

    def distance(results: Any) -> float:
        pairs = zip(jax.tree.leaves(results), jax.tree.leaves(exact), strict=True)
        errors = [np.linalg.norm(np.asarray(a, np.float64) - b) / np.linalg.norm(b) for a, b in pairs]
        return float(np.mean(errors))

    assert distance(ours) <= distance(wanted)


def test_the_short_error_function_errs_less_than_bfloat16_rounds() -> None:
    x = jnp.linspace(-9, 9, 4001)
    with short_erf():
        ours, slope = jax.jvp(erf, (x,), (jnp.ones_like(x),))
    wanted, slope_wanted = jax.jvp(erf, (x,), (jnp.ones_like(x),))
    assert jnp.abs(ours - wanted).max() < 4e-6
    np.testing.assert_allclose(slope, slope_wanted, rtol=1e-5, atol=1e-7)


@pytest.mark.long
def test_stochastic_depth_drops_the_same_samples(fused: None, x64: None) -> None:
    module = PartitionAttention(32, TransformerFields(), (2, 2), (("attn", "grid"),), drop_path=0.5)
    wanted, ours, kernels = both(module, (8, 4, 4, 32), "float64", train=True)
    assert kernels == 4
    close(ours, wanted, 1e-11)


class ConvFormerBlock(nn.Module):
    """A MetaFormer block without its MLP's kernel in the way: maps of 16 channels have 64 hidden ones."""

    residual_scale: bool

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        return MetaFormerBlock("conv", "channels", self.residual_scale, 0.5, name="block")(x, train=train)


@pytest.mark.parametrize("residual_scale", cases([False, True], long=[False]))
def test_separable_convolutions_are_the_same_with_kernels(residual_scale: bool, fused: None, x64: None) -> None:
    wanted, ours, kernels = both(ConvFormerBlock(residual_scale), (16, 4, 5, 16), "float64", train=True)
    assert kernels == 4
    close(ours, wanted, 1e-11)


@pytest.mark.parametrize("fields", [{"attn_drop": 0.1}, {"proj_drop": 0.1}])
def test_dropout_is_left_to_the_plain_way(fields: dict[str, float], fused: None) -> None:
    module = PartitionAttention(32, TransformerFields(**fields), (2, 2), (("attn", "grid"),))
    _, kernels = trace(module, setting(module, (8, 4, 4, 32), "float32"), train=True)
    assert kernels == (2 if "attn_drop" in fields else 0)  # the MLP has no attention


def test_batches_that_no_program_divides_are_left_to_the_plain_way(fused: None) -> None:
    module = attention((2, 2), "grid", 32)
    _, kernels = trace(module, setting(module, (4, 4, 4, 32), "float32"))
    assert kernels == 0


@pytest.mark.parametrize(
    ("allowed", "fits"),
    [
        (True, tpu_attention.fits(8, (16, 16), 32)),
        (False, tpu_attention.fits(8, (17, 16), 32)),
        (False, tpu_attention.fits(8, (7, 7), 48)),
        (False, tpu_attention.fits(12, (7, 7), 32)),
        (True, tpu_mlp.fits(16, 384)),
        (False, tpu_mlp.fits(16, 320)),
    ],
)
def test_what_fits(allowed: bool, fits: bool) -> None:
    assert fits == allowed


@pytest.mark.long
def test_each_device_computes_its_own_part_of_the_batch(fused: None, x64: None) -> None:
    module, shape = attention((2, 2), "grid", 32), (32, 4, 4, 32)
    mesh = make_mesh(data=2, fsdp=2)
    variables, x, grad = setting(module, shape, "float64")
    wanted = plainly(module, (variables, x, grad))

    def step(x: jax.Array, grad: jax.Array) -> Any:
        with traced_on(mesh):
            return run(module, variables, x, grad)

    split = split_batch(mesh)
    compiled = jax.jit(step, in_shardings=(split, split), compiler_options=QUICK).lower(x, grad).compile()
    close(compiled(jax.device_put(x, split), jax.device_put(grad, split)), wanted, 1e-11)
    assert "all-gather" not in compiled.as_text()  # of maps; each device has its part from the start to the end
