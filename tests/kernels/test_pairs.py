"""Convolutions on pairs of pixels beside the same on single ones, with the kernel that takes pairs apart."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from maxmap import operations
from maxmap.backbones.maxxvit.convolution import ConvStem
from maxmap.backbones.resnet import SEResNet
from maxmap.fused import unpair
from maxmap.operations import compiled_for
from tests.marks import cases
from tests.zoo import numbers, quick


class Twice(nn.Module):
    """A stem's map for two readers, as MaxViT's backbone has it."""

    stem: ConvStem

    def __call__(self, x, *, train):
        y = self.stem(x, train=train)
        return unpair(y) if y.shape[-1] == 2 * self.stem.width[1] else (y, y)


STEMS = {
    "resnet": SEResNet(embed_dim=(256,), depths=(0,)),
    "maxvit": Twice(ConvStem((64, 64), (True, True), "batch", "gelu_tanh", 1e-3, "same", "vit_eff")),
    "torch": Twice(ConvStem((64, 64), (False, False), "batch", "silu", 1e-5, 1, "vit_eff")),
}
SHAPE = (16, 6, 8, 3)


def results(stem, variables, x, directions):
    """Maps and new statistics in training, all gradients where one or both readers have some, and maps without."""

    def train(params, x):
        return stem.apply(variables | {"params": params}, x, train=True, mutable=["batch_stats"])

    maps, pull, new = jax.vjp(train, variables["params"], x, has_aux=True)
    beside = type(maps)((directions[0], jnp.zeros_like(directions[1])))
    return maps, new, pull(type(maps)(directions)), pull(beside), stem.apply(variables, x, train=False)


@pytest.mark.parametrize("name", cases(STEMS, long=["resnet", "torch"]))
def test_stems_on_pairs_are_the_same(name, x64, monkeypatch):
    stem, x = STEMS[name], jnp.asarray(numbers(0, *SHAPE))
    like = jax.eval_shape(lambda x: stem.init(jax.random.key(0), x, train=False), x)
    leaves, tree = jax.tree.flatten(like)
    variables = tree.unflatten([jnp.asarray(0.5 + numbers(i, *leaf.shape) ** 2) for i, leaf in enumerate(leaves)])
    maps = jax.eval_shape(lambda variables, x: stem.apply(variables, x, train=False), variables, x)
    directions = [jnp.asarray(numbers(i, *leaf.shape)) for i, leaf in enumerate(maps)]
    wanted = quick(lambda *args: results(stem, *args), variables, x, directions)
    ways = operations.IMPLEMENTATIONS["cpu"] | {"stem": "pallas", "batch_norm": "one_pass"}
    monkeypatch.setitem(operations.IMPLEMENTATIONS, "cpu", ways)
    assert "unpair" in str(jax.make_jaxpr(lambda *args: results(stem, *args))(variables, x, directions))
    ours = quick(lambda *args: results(stem, *args), variables, x, directions)
    jax.tree.map(lambda ours, wanted: np.testing.assert_allclose(ours, wanted, rtol=1e-9, atol=1e-9), ours, wanted)


def test_pairs_are_taken_apart_by_a_kernel_for_a_tpu():
    """Lowers to Mosaic, which needs no TPU. A map that nobody reads costs the backward pass nothing."""
    stem, x = STEMS["maxvit"], jnp.ones(SHAPE, jnp.bfloat16)
    variables = jax.eval_shape(lambda x: stem.init(jax.random.key(0), x, train=False), x)

    def run(variables, x):
        maps, pull = jax.vjp(lambda x: stem.apply(variables, x, train=True, mutable=["batch_stats"])[0][0], x)
        return pull(maps)

    with compiled_for("tpu"):
        traced = jax.jit(run).trace(variables, x)
    assert "name=pair_3x4x16x64_1" in str(traced.jaxpr)
    assert traced.lower(lowering_platforms=("tpu",)).as_text().count("tpu_custom_call") == 2
