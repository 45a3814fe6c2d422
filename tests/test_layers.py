"""The shared layers against lax, torch and their own definitions."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from maxmap import operations
from maxmap.layers import blocks, pooling, primitives
from maxmap.layers.primitives import BatchNorm, Conv, DropPath, LayerNorm, Linear
from maxmap.operations import attend, convolve, convolve_by_patches, depthwise_shifts
from tests.zoo import numbers, quick


def assert_close(ours, wanted, tolerance=1e-12):
    ours, wanted = np.asarray(ours), np.asarray(wanted)
    assert ours.shape == wanted.shape
    assert np.abs(ours - wanted).max() <= tolerance * np.abs(wanted).max()


def tensor(x):
    import torch

    return torch.from_numpy(np.ascontiguousarray(x))


def nchw(x):
    return tensor(x.transpose(0, 3, 1, 2))


def nhwc(x):
    return x.detach().numpy().transpose(0, 2, 3, 1)


# The window does not divide what stride 2 walks over: (10 - 3) % 2 and (12 - 7) % 2 leave a row or column unread.
# Some padded maps have 9 or 11 rows, which no number of rows that is taken at a time divides.
@pytest.mark.parametrize("pads", [((0, 0), (0, 0)), ((1, 2), (3, 0))])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", [(9, 10), (12, 11)])
@pytest.mark.parametrize("kernel_size", [3, 7])
def test_shifted_products_equal_a_depthwise_convolution(kernel_size, size, stride, pads, x64):
    x, kernel = numbers(0, 2, *size, 3), numbers(1, kernel_size, kernel_size, 3)

    def reference(x, kernel):
        return lax.conv_general_dilated(
            x,
            kernel[:, :, None],
            (stride, stride),
            pads,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=3,
        )

    wanted, wanted_vjp = jax.vjp(reference, x, kernel)
    direction = numbers(2, *wanted.shape)

    def run(x, kernel):
        y, vjp = jax.vjp(lambda x, kernel: depthwise_shifts(x, kernel, stride, pads), x, kernel)
        return y, vjp(direction)

    ours, gradients = quick(run, x, kernel)
    assert_close(ours, wanted)
    for gradient, wanted_gradient in zip(gradients, wanted_vjp(direction), strict=True):
        assert_close(gradient, wanted_gradient)


def test_depthwise_kernel_gradient_accumulates_in_float32():
    """A kernel in bfloat16: ten thousand ones add up to more than its eight bits can count one by one."""
    x, kernel = jnp.ones((1, 100, 100, 1), jnp.bfloat16), jnp.ones((1, 1, 1), jnp.bfloat16)
    gradient = jax.grad(lambda kernel: jnp.sum(depthwise_shifts(x, kernel, 1, ((0, 0), (0, 0))).astype(jnp.float32)))(
        kernel
    )
    assert gradient.dtype == jnp.bfloat16
    assert float(gradient[0, 0, 0]) == pytest.approx(10_000, rel=2**-8)


@pytest.mark.parametrize("stride, pads", [(1, ((1, 1), (1, 1))), (2, ((0, 1), (2, 0)))])
@pytest.mark.parametrize("rows", [34, 37])
def test_patches_equal_a_convolution(rows, stride, pads, x64):
    """Maps with more pixels than are taken at a time; 37 rows can only be taken one by one."""
    x, kernel = numbers(0, 2, rows, 40, 3), numbers(1, 3, 3, 3, 5)

    def reference(x, kernel):
        dims = ("NHWC", "HWIO", "NHWC")
        return lax.conv_general_dilated(x, kernel, (stride, stride), pads, dimension_numbers=dims)

    wanted, wanted_vjp = jax.vjp(reference, x, kernel)
    direction = numbers(2, *wanted.shape)
    ours, vjp = jax.vjp(lambda x, kernel: convolve_by_patches(x, kernel, stride, pads), x, kernel)
    assert_close(ours, wanted)
    for gradient, wanted_gradient in zip(vjp(direction), wanted_vjp(direction), strict=True):
        assert_close(gradient, wanted_gradient)


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


@pytest.mark.parametrize("implementation", operations.IMPLEMENTATIONS)
@pytest.mark.parametrize("case", CONVOLUTIONS)
def test_convolutions_equal_torch(case, implementation, x64, monkeypatch):
    from torch.nn.functional import conv2d

    monkeypatch.setitem(operations.IMPLEMENTATIONS, "cpu", operations.IMPLEMENTATIONS[implementation])
    kernel_size, stride, padding, groups, channels, out_channels = CONVOLUTIONS[case]
    x, kernel = numbers(0, 2, 9, 8, channels), numbers(1, kernel_size, kernel_size, channels // groups, out_channels)
    images, weights = nchw(x).requires_grad_(), tensor(kernel.transpose(3, 2, 0, 1)).requires_grad_()
    wanted = conv2d(images, weights, None, stride, padding, 1, groups)
    direction = numbers(2, *nhwc(wanted).shape)
    wanted.backward(nchw(direction))

    def run(x, kernel):
        y, vjp = jax.vjp(lambda x, k: convolve(x, k, stride=stride, padding=padding, groups=groups), x, kernel)
        return y, vjp(direction)

    ours, (gradient, kernel_gradient) = quick(run, x, kernel)
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


def test_platforms_without_an_entry_use_the_default(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "abacus")
    assert operations.implementation("depthwise") == operations.IMPLEMENTATIONS["default"]["depthwise"]


def test_convolution_names_groups_that_do_not_divide():
    with pytest.raises(ValueError, match="4 groups do not divide 6 input and 8 output channels"):
        Conv(8, groups=4).init(jax.random.key(0), jnp.zeros((1, 2, 2, 6)))


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


@pytest.mark.parametrize("shape", [(4, 3, 2, 5), (6, 5)])
def test_batch_norm_equals_torch(shape, x64):
    """Two training steps, their gradients and running statistics, then evaluation."""
    import torch

    theirs = torch.nn.BatchNorm1d(5, eps=1e-3, momentum=0.1).double()
    scale, bias = 1 + numbers(0, 5), numbers(1, 5)
    with torch.no_grad():
        theirs.weight.copy_(tensor(scale))
        theirs.bias.copy_(tensor(bias))
    norm = BatchNorm(epsilon=1e-3)
    params = {"scale": jnp.asarray(scale), "bias": jnp.asarray(bias)}
    stats = norm.init(jax.random.key(0), jnp.zeros(shape), train=True)["batch_stats"]
    assert np.array_equal(stats["mean"], np.zeros(5))  # initialising counts nothing
    assert np.array_equal(stats["var"], np.ones(5))
    stats = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), stats)
    for step in (2, 3):
        x, direction = 1 + 2 * numbers(step, *shape), numbers(10 + step, *shape)

        def loss(params, x, stats, direction):
            y, new = norm.apply({"params": params, "batch_stats": stats}, x, train=True, mutable=["batch_stats"])
            return jnp.sum(y * direction), (y, new["batch_stats"])

        gradients, (y, stats) = jax.grad(loss, (0, 1), has_aux=True)(params, jnp.asarray(x), stats, direction)
        theirs.zero_grad()
        x = tensor(x.reshape(-1, 5)).requires_grad_()
        wanted = theirs(x)
        (wanted * tensor(direction.reshape(-1, 5))).sum().backward()
        assert_close(y.reshape(-1, 5), wanted.detach())
        assert_close(gradients[0]["scale"], theirs.weight.grad)
        assert_close(gradients[0]["bias"], theirs.bias.grad)
        assert_close(gradients[1].reshape(-1, 5), x.grad, 1e-11)
        assert_close(stats["mean"], theirs.running_mean)
        assert_close(stats["var"], theirs.running_var)
    x = numbers(4, *shape)
    y = norm.apply({"params": params, "batch_stats": stats}, jnp.asarray(x))
    assert_close(y.reshape(-1, 5), theirs.eval()(tensor(x.reshape(-1, 5))).detach())


def test_batch_norm_keeps_float32_statistics_of_bfloat16():
    x = jnp.asarray(100 + numbers(0, 512, 2), jnp.bfloat16)
    norm = BatchNorm(momentum=0.0)
    variables = norm.init(jax.random.key(0), x)
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


@pytest.mark.parametrize("size, stride, padding", [(3, 2, 1), (2, 2, 0), (3, 1, 1)])
def test_max_pool_equals_torch(size, stride, padding, x64):
    """Whole numbers, so that windows have several largest values, of which the first gets the gradient."""
    from torch.nn.functional import max_pool2d

    x = np.round(numbers(0, 2, 9, 8, 3))
    images = nchw(x).requires_grad_()
    wanted = max_pool2d(images, size, stride, padding)
    direction = numbers(1, *nhwc(wanted).shape)
    wanted.backward(nchw(direction))

    def run(x):
        y, vjp = jax.vjp(lambda x: operations.max_pool(x, size, stride, padding), x)
        return y, vjp(direction)

    ours, (gradient,) = quick(run, x)
    assert_close(ours, nhwc(wanted))
    assert_close(gradient, nhwc(images.grad))


@pytest.mark.parametrize("implementation", operations.IMPLEMENTATIONS)
def test_layer_norm_equals_torch(implementation, x64, monkeypatch):
    from torch.nn.functional import layer_norm

    monkeypatch.setitem(operations.IMPLEMENTATIONS, "cpu", operations.IMPLEMENTATIONS[implementation])
    x, scale, bias, direction = 3 + numbers(0, 2, 3, 5), numbers(1, 5), numbers(2, 5), numbers(3, 2, 3, 5)
    leaves = [tensor(value).requires_grad_() for value in (x, scale, bias)]
    wanted = layer_norm(leaves[0], (5,), *leaves[1:], eps=0.1)
    wanted.backward(tensor(direction))

    def run(*leaves):
        y, vjp = jax.vjp(lambda *leaves: operations.layer_norm(*leaves, 0.1), *leaves)
        return y, vjp(direction)

    ours, gradients = quick(run, x, scale, bias)
    assert_close(ours, wanted.detach())
    for gradient, leaf in zip(gradients, leaves, strict=True):
        assert_close(gradient, leaf.grad)


@pytest.mark.parametrize("implementation", operations.IMPLEMENTATIONS)
def test_a_parameter_at_every_position_gets_the_sum_of_the_gradients(implementation, x64, monkeypatch):
    monkeypatch.setitem(operations.IMPLEMENTATIONS, "cpu", operations.IMPLEMENTATIONS[implementation])
    direction = numbers(0, 2, 3, 4, 5)
    y, vjp = jax.vjp(lambda x: operations.broadcast(x, (2, 3, 4, 5)), jnp.asarray(numbers(1, 5)))
    assert_close(y, np.broadcast_to(numbers(1, 5), (2, 3, 4, 5)))
    assert_close(vjp(jnp.asarray(direction))[0], direction.sum((0, 1, 2)))


@pytest.mark.parametrize("implementation", operations.IMPLEMENTATIONS)
def test_sums_over_positions_are_of_float32(implementation, monkeypatch):
    """Ten thousand ones in bfloat16 are more than its eight bits can count one by one."""
    monkeypatch.setitem(operations.IMPLEMENTATIONS, "cpu", operations.IMPLEMENTATIONS[implementation])
    gradient = jax.grad(lambda x: jnp.sum(operations.broadcast(x, (100, 100, 2)).astype(jnp.float32)))
    assert_close(gradient(jnp.ones(2, jnp.bfloat16)).astype(jnp.float32), [10_000.0, 10_000.0], 2**-8)


@pytest.mark.parametrize("name", ["silu", "gelu", "gelu_tanh"])
def test_activations_equal_torch(name, x64):
    from torch.nn.functional import gelu, silu

    theirs = {"silu": silu, "gelu": gelu, "gelu_tanh": functools.partial(gelu, approximate="tanh")}
    x, direction = 3 * numbers(0, 100), numbers(1, 100)
    leaf = tensor(x).requires_grad_()
    wanted = theirs[name](leaf)
    wanted.backward(tensor(direction))
    ours, vjp = jax.vjp(primitives.ACTIVATIONS[name], jnp.asarray(x))
    assert_close(ours, wanted.detach())
    assert_close(vjp(jnp.asarray(direction))[0], leaf.grad)


def test_softmax_is_computed_in_float32():
    logits = jnp.asarray(8 * numbers(0, 3, 50), jnp.bfloat16)
    exact = jax.nn.softmax(logits.astype(jnp.float32))
    assert operations.softmax(logits).dtype == jnp.bfloat16
    assert np.array_equal(operations.softmax(logits), exact.astype(jnp.bfloat16))


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


def test_gram_values_by_hand(x64):
    x = np.array([[[[1.0, 2.0], [3.0, -1.0]]]])  # two positions of two channels
    gram = np.array([1 + 9, 2 - 3, 4 + 1])  # 00, 01, 11
    assert_close(pooling.gram_values(jnp.asarray(x)), (gram / np.linalg.norm(gram))[None])
    assert np.array_equal(pooling.gram_values(jnp.zeros((1, 2, 2, 2))), np.zeros((1, 3)))


def test_gram_values_are_computed_in_float32():
    x = jnp.asarray(numbers(0, 1, 14, 14, 16), jnp.bfloat16)
    exact = pooling.gram_values(x.astype(jnp.float32))
    assert np.array_equal(pooling.gram_values(x), exact.astype(jnp.bfloat16))


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


def test_attention_is_a_softmax_of_any_size(x64):
    """Logits far beyond what exp can take, and weights that underflow."""
    logits, values = 1000 * numbers(0, 2, 3, 4, 5), numbers(1, 2, 3, 5, 6)
    ours, vjp = jax.vjp(attend, logits, values)
    wanted, wanted_vjp = jax.vjp(lambda logits, values: jax.nn.softmax(logits) @ values, logits, values)
    assert_close(ours, wanted)
    for gradient, wanted_gradient in zip(vjp(ours), wanted_vjp(ours), strict=True):
        np.testing.assert_allclose(gradient, wanted_gradient, atol=1e-12)
