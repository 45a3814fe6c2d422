"""The shared layers against lax, torch and their own definitions."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax.errors import ScopeParamNotFoundError, ScopeParamShapeError
from jax.test_util import check_grads

from maxmap.layers import blocks, pooling, primitives
from maxmap.layers.primitives import BatchNorm, Conv, DropPath, LayerNorm, Linear, batch_norm_groups
from maxmap.operations import compiled_for
from tests.zoo import assert_close, nchw, nhwc, numbers

pytestmark = pytest.mark.usefixtures("quick_compilation")


def test_convolution_names_groups_that_do_not_divide():
    with pytest.raises(ValueError, match="4 groups do not divide 6 input and 8 output channels"):
        Conv(8, groups=4).init(jax.random.key(0), jnp.zeros((1, 2, 2, 6)))


def test_a_parameter_of_another_shape_is_named():
    """As Flax does, whose check traces the initialiser; ours does not."""

    def never(key, shape):
        raise AssertionError("the parameter is there")

    layer = Linear(3)
    variables = layer.init(jax.random.key(0), jnp.zeros((1, 5)))
    assert_close(
        Linear(3, kernel_init=never).apply(variables, jnp.ones((1, 5))), layer.apply(variables, jnp.ones((1, 5))), 0
    )
    with pytest.raises(ScopeParamShapeError) as ours:
        layer.apply(variables, jnp.zeros((1, 4)))
    with pytest.raises(ScopeParamShapeError) as flax:
        nn.Dense(3).apply(variables, jnp.zeros((1, 4)))
    assert str(ours.value) == str(flax.value)
    with pytest.raises(ScopeParamNotFoundError, match="kernel"):
        layer.apply({"params": {"bias": jnp.zeros(3)}}, jnp.zeros((1, 5)))


def test_bias_and_mixed_precision():
    """Parameters stay float32; a bfloat16 input and bfloat16 parameters are computed in bfloat16."""
    for layer in (Conv(3), Linear(3)):
        x = jnp.asarray(numbers(0, 2, 4, 4, 5), jnp.float32)
        variables = layer.init(jax.random.key(0), x)
        params = variables["params"]
        assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
        kernel = params["kernel"].reshape(5, 3)
        assert_close(layer.apply(variables, x), x @ kernel + params["bias"][None, None, None], 1e-6)
        half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), variables)
        assert layer.apply(half, x.astype(jnp.bfloat16)).dtype == jnp.bfloat16
    assert "bias" not in Linear(3, bias=False).init(jax.random.key(0), jnp.zeros((1, 5)))["params"]


@pytest.fixture(params=["cpu", "tpu"])
def platform(request):
    """Traces the test's programs for each platform; all of them are computed on this one."""
    with compiled_for(request.param):
        yield request.param


@pytest.mark.parametrize("shape", [(4, 3, 2, 5), (6, 5)])
def test_batch_norm_equals_torch(shape, platform, x64):
    """Two training steps, their gradients and running statistics, then evaluation."""
    import torch

    theirs = torch.nn.BatchNorm1d(5, eps=1e-3, momentum=0.1).double()
    scale, bias = 1 + numbers(0, 5), numbers(1, 5)
    with torch.no_grad():
        theirs.weight.copy_(torch.from_numpy(scale))
        theirs.bias.copy_(torch.from_numpy(bias))
    norm = BatchNorm(epsilon=1e-3)
    params = {"scale": jnp.asarray(scale), "bias": jnp.asarray(bias)}
    stats = norm.init(jax.random.key(0), jnp.zeros(shape), train=True)["batch_stats"]
    assert np.array_equal(stats["mean"], np.zeros(5))  # initialising counts nothing
    assert np.array_equal(stats["var"], np.ones(5))
    stats = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), stats)

    def loss(params, x, stats, direction):
        y, new = norm.apply({"params": params, "batch_stats": stats}, x, train=True, mutable=["batch_stats"])
        return jnp.sum(y * direction), (y, new["batch_stats"])

    learn = jax.jit(jax.grad(loss, (0, 1), has_aux=True))
    for step in (2, 3):
        x, direction = 1 + 2 * numbers(step, *shape), numbers(10 + step, *shape)
        gradients, (y, stats) = learn(params, x, stats, direction)
        theirs.zero_grad()
        x = torch.from_numpy(x.reshape(-1, 5)).requires_grad_()
        wanted = theirs(x)
        (wanted * torch.from_numpy(direction.reshape(-1, 5))).sum().backward()
        assert_close(y.reshape(-1, 5), wanted.detach())
        assert_close(gradients[0]["scale"], theirs.weight.grad)
        assert_close(gradients[0]["bias"], theirs.bias.grad)
        assert_close(gradients[1].reshape(-1, 5), x.grad, 1e-11)
        assert_close(stats["mean"], theirs.running_mean)
        assert_close(stats["var"], theirs.running_var)
    x = numbers(4, *shape)
    y = jax.jit(norm.apply)({"params": params, "batch_stats": stats}, x)
    assert_close(y.reshape(-1, 5), theirs.eval()(torch.from_numpy(x.reshape(-1, 5))).detach())


@pytest.mark.parametrize("groups, keep_first", [(2, False), (3, True)])
def test_batch_norms_of_groups_are_those_of_each_alone(groups, keep_first, platform, x64):
    x, direction = jnp.asarray(1 + numbers(0, 6, 3, 2, 5)), numbers(1, 6, 3, 2, 5)
    norm = BatchNorm()
    variables = norm.init(jax.random.key(0), x)
    variables["params"] = {"scale": jnp.asarray(1 + numbers(2, 5)), "bias": jnp.asarray(numbers(3, 5))}

    def pulled(x, direction):
        def run(params, x):
            return norm.apply(variables | {"params": params}, x, train=True, mutable=["batch_stats"])

        y, pull, new = jax.vjp(run, variables["params"], x, has_aux=True)
        return y, pull(direction), new["batch_stats"]

    with batch_norm_groups(groups, keep_first=keep_first):
        y, (of_params, of_x), stats = jax.jit(pulled)(x, direction)
    one = jax.jit(lambda x, direction: pulled(x, direction))  # another function: traced without groups
    alone = [one(*pair) for pair in zip(jnp.split(x, groups), np.split(direction, groups), strict=True)]
    assert_close(y, jnp.concatenate([y for y, _, _ in alone]))
    assert_close(of_x, jnp.concatenate([of_x for _, (_, of_x), _ in alone]))
    jax.tree.map(lambda leaf, *leaves: assert_close(leaf, sum(leaves)), of_params, *(one[0] for _, one, _ in alone))
    followed = alone[:1] if keep_first else alone
    jax.tree.map(
        lambda leaf, *leaves: assert_close(leaf, np.mean(leaves, axis=0)), stats, *(one for _, _, one in followed)
    )


@pytest.mark.parametrize("near", [0.0, 99.0])
def test_one_pass_statistics_measure_from_the_running_mean(near):
    """A mean of 100 deviations in float32: from 0, the squares cancel to 1e4 * 2**-24; from near the mean, they do not.

    The factor of 32 is for the sum of 4096 values one by one.
    """
    x = jnp.asarray(100 + numbers(0, 4096, 2), jnp.float32)
    norm = BatchNorm()
    variables = norm.init(jax.random.key(0), x)
    variables["batch_stats"]["mean"] += near
    with compiled_for("tpu"):
        y, new = norm.apply(variables, x, train=True, mutable=["batch_stats"])
    exact = np.asarray(x, np.float64)
    error = 32 * 2**-24 * (1 + (100 - near) ** 2)
    assert_close((new["batch_stats"]["var"] - 0.9) / 0.1, exact.var(0, ddof=1), max(error, 1e-5))
    assert_close(y, (exact - exact.mean(0)) / exact.std(0), max(error, 1e-4))


def test_batch_norm_keeps_float32_statistics_of_bfloat16(platform):
    x = jnp.asarray(100 + numbers(0, 512, 2), jnp.bfloat16)
    norm = BatchNorm(momentum=0.0)
    variables = norm.init(jax.random.key(0), x)
    variables["batch_stats"]["mean"] += 100  # from which the one-pass form measures
    y, new = norm.apply(variables, x, train=True, mutable=["batch_stats"])
    exact = np.asarray(x, np.float64)
    assert y.dtype == jnp.bfloat16
    assert_close(new["batch_stats"]["mean"], exact.mean(0), 1e-6)
    assert_close(new["batch_stats"]["var"], exact.var(0, ddof=1), 1e-5)


def test_layer_norm_does_not_cancel(x64):
    """A large mean: the one-pass variance would be wrong in the first digit in float32."""
    x = 1000 + numbers(0, 4, 64)
    norm = LayerNorm(1e-6)
    variables = norm.init(jax.random.key(0), jnp.asarray(x))
    exact = norm.apply(variables, jnp.asarray(x))
    single = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), variables)
    assert_close(exact, (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6))
    assert_close(norm.apply(single, jnp.asarray(x, jnp.float32)), exact, 1e-4)


def test_drop_path_drops_whole_samples_and_is_unbiased():
    x = jnp.asarray(1 + numbers(0, 4000, 2, 3) ** 2)
    dropped = DropPath(0.3).apply({}, x, train=True, rngs={"dropout": jax.random.key(0)})
    ratio = np.asarray(dropped / x)
    assert np.all(np.ptp(ratio.reshape(4000, -1), axis=1) < 1e-6)
    kept = ratio[:, 0, 0] > 0
    assert_close(ratio[kept], np.full(ratio[kept].shape, 1 / 0.7), 1e-6)
    assert abs(kept.mean() - 0.7) < 5 * math.sqrt(0.3 * 0.7 / 4000)
    assert np.array_equal(DropPath(0.3).apply({}, x), x)
    assert np.array_equal(DropPath(0.0).apply({}, x, train=True), x)


def test_drop_path_rates():
    assert primitives.drop_path_rates(0.3, 4) == pytest.approx([0.0, 0.1, 0.2, 0.3])
    assert primitives.drop_path_rates(0.3, 1) == [0.0]


def test_average_pool_does_not_count_padding(x64):
    from torch.nn.functional import avg_pool2d

    x = numbers(0, 2, 7, 8, 3)
    wanted = avg_pool2d(nchw(x), 3, 2, 1, count_include_pad=False)
    assert_close(primitives.average_pool(jnp.asarray(x), 3, 2, ((1, 1), (1, 1))), nhwc(wanted))
    assert_close(primitives.average_pool(jnp.asarray(x), 2, 2), nhwc(avg_pool2d(nchw(x), 2, 2)))


@pytest.mark.parametrize("size", [(14, 14), (7, 13), (5, 3), (4, 9), (1, 1)])
def test_resampling_equals_torch(size, x64):
    from torch.nn.functional import adaptive_avg_pool2d, interpolate

    x = numbers(0, 2, 7, 9, 3)
    wanted = adaptive_avg_pool2d(nchw(x), size)
    assert_close(pooling.adaptive_average(jnp.asarray(x), size), nhwc(wanted))
    wanted = interpolate(nchw(x), size, mode="bilinear", align_corners=False, antialias=False)
    assert_close(pooling.bilinear(jnp.asarray(x), size), nhwc(wanted))
    wanted = interpolate(nchw(x), size, mode="bilinear", align_corners=True)
    assert_close(pooling.bilinear(jnp.asarray(x), size, align_corners=True), nhwc(wanted))


def test_gram_projection(x64):
    """Of the upper triangle of the channels' second moments, row by row with its diagonal, at length one."""
    x = numbers(0, 2, 3, 4, 3)
    z = x.reshape(2, 12, 3)
    gram = np.einsum("bnp,bnq->bpq", z, z)
    wanted = np.stack([gram[:, i, j] for i in range(3) for j in range(i, 3)], axis=-1)
    wanted /= np.linalg.norm(wanted, axis=-1, keepdims=True)
    assert_close(pooling.gram_projection(jnp.asarray(x), jnp.eye(6), 1), wanted)
    assert np.array_equal(pooling.gram_projection(jnp.zeros((1, 2, 2, 3)), jnp.eye(6), 1), np.zeros((1, 6)))
    kernel = numbers(1, 3, 4)  # value i * 2 + t is at place t * 3 + i
    halves = [wanted[:, t::2] @ kernel[:, 2 * t : 2 * t + 2] for t in range(2)]
    assert_close(pooling.gram_projection(jnp.asarray(x), jnp.asarray(kernel), 2, 2), np.concatenate(halves, axis=-1))


def test_gradient_of_gram_projection(x64):
    x, kernel = jnp.asarray(numbers(0, 2, 3, 4, 4)), jnp.asarray(numbers(1, 5, 6))
    check_grads(lambda x, kernel: pooling.gram_projection(x, kernel, 2, 2), (x, kernel), 1, ["rev"])


def test_gram_matrices_are_computed_in_float32():
    """A mean far above the deviations, in bfloat16: the products must not be rounded before they are summed."""
    x = jnp.asarray(10 + numbers(0, 1, 14, 14, 8), jnp.bfloat16)
    ours, exact = (pooling.gram_projection(z, jnp.eye(36, dtype=z.dtype), 1) for z in (x, x.astype(jnp.float32)))
    assert np.allclose(ours.astype(jnp.float32), exact, rtol=2**-7, atol=0)  # rounded twice


def test_channel_shuffle_takes_every_gth_channel():
    assert blocks.channel_shuffle(jnp.arange(6)[None], 2).tolist() == [[0, 2, 4, 1, 3, 5]]
    assert blocks.channel_shuffle(jnp.arange(6)[None], 3).tolist() == [[0, 3, 1, 4, 2, 5]]


def draw(initializer, *shape):
    return np.asarray(initializer(jax.random.key(0), shape, jnp.float32), np.float64)


def assert_std(x, std):
    """Within five standard errors, for distributions with no heavier tails than the normal's."""
    assert abs(x.std() / std - 1) < 5 / math.sqrt(2 * x.size)
    assert abs(x.mean()) < 5 * std / math.sqrt(x.size)


def assert_uniform(x, bound):
    assert 0.99 * bound < np.abs(x).max() <= bound * (1 + 1e-6)
    assert_std(x, bound / math.sqrt(3))


def test_initialisers_follow_torch():
    import torch

    conv = torch.nn.Conv2d(64, 128, 3)
    assert_uniform(draw(primitives.torch_kernel, 3, 3, 64, 128), conv.weight.abs().max().item() * 1.0001)
    assert_uniform(draw(primitives.torch_kernel, 3, 3, 64, 128), 1 / math.sqrt(9 * 64))
    assert_uniform(draw(primitives.torch_bias(9 * 64), 4096), 1 / math.sqrt(9 * 64))
    assert_uniform(draw(primitives.torch_kernel, 100, 300), 1 / math.sqrt(100))
    assert_uniform(draw(primitives.xavier_uniform, 100, 300), math.sqrt(6 / 400))
    assert_uniform(draw(primitives.xavier_uniform, 1, 1, 100, 300), math.sqrt(6 / 400))
    assert_std(draw(primitives.trunc_normal_02, 100, 300), 0.02)
    assert_std(draw(primitives.he_fan_out(), 3, 3, 64, 128), math.sqrt(2 / (9 * 128)))
    assert_std(draw(primitives.he_fan_out(groups=1024), 3, 3, 1, 1024), math.sqrt(2 / 9))


def test_default_initialisation_of_the_layers():
    """A convolution's bias is drawn from its fan in, groups counted."""
    x = jnp.zeros((1, 8, 8, 64))
    params = Conv(4096, 3, groups=4).init(jax.random.key(0), x)["params"]
    assert_uniform(np.asarray(params["kernel"], np.float64), 1 / math.sqrt(9 * 16))
    assert_uniform(np.asarray(params["bias"], np.float64), 1 / math.sqrt(9 * 16))
    params = Linear(4096).init(jax.random.key(0), x)["params"]
    assert_uniform(np.asarray(params["bias"], np.float64), 1 / math.sqrt(64))
