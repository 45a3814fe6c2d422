"""One step of training, on a network that compiles in a second."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

from maxmap.losses import total_loss
from maxmap.optim import make_optimizer
from maxmap.train.state import TrainState, create
from maxmap.train.step import cast, make_train_step
from tests.tiny import Tiny, assert_equal, copied

pytestmark = pytest.mark.usefixtures("quick_compilation")

KEY = jax.random.key(7)


def prepare(key, images, labels):
    """No augmentation: pixels as they are, one-hot targets."""
    del key
    return images / 255.0, jax.nn.one_hot(labels, 3)


def batch(size: int = 8, seed: int = 0) -> dict[str, jax.Array]:
    rng = np.random.default_rng(seed)
    images, labels = rng.integers(0, 256, (size, 8, 8, 3)), np.arange(size) % 3
    return {"image": jnp.asarray(images, jnp.uint8), "label": jnp.asarray(labels, jnp.int32)}


def new_state(model: nn.Module, optimizer: optax.GradientTransformation, *, ema: bool = True) -> TrainState:
    images = jax.ShapeDtypeStruct((1, 8, 8, 3), jnp.float32)
    return jax.jit(lambda key: create(model, optimizer, key, images, ema=ema))(jax.random.key(0))


def in_float64(state: TrainState, optimizer: optax.GradientTransformation) -> TrainState:
    """A state as if everything had been initialised in float64."""
    params, model_state = cast(state.params, jnp.float64), cast(state.model_state, jnp.float64)
    return state.replace(params=params, model_state=model_state, opt_state=optimizer.init(params))


def test_the_loss_falls_on_a_fixed_batch():
    model, optimizer = Tiny(3, drop_path=0.1), optax.adam(1e-2)
    step = jax.jit(make_train_step(model, optimizer, total_loss, prepare))
    state, losses, data = new_state(model, optimizer, ema=False), [], batch()
    for _ in range(60):
        state, metrics = step(state, data, KEY)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0] / 4
    assert int(state.step) == 60


def test_everything_kept_is_float32_while_the_model_computes_in_bfloat16():
    seen = {}

    class Spy(nn.Module):
        @nn.compact
        def __call__(self, images, *, train=False):
            outputs = Tiny(3, name="tiny")(images, train=train)
            if not self.is_initializing():
                kernel = self.variables["params"]["tiny"]["conv"]["kernel"]
                seen.update(images=images.dtype, kernel=kernel.dtype, logits=outputs["logits"].dtype)
            return outputs

    model, optimizer = Spy(), optax.adamw(1e-3)
    state = new_state(model, optimizer)
    step = make_train_step(model, optimizer, total_loss, prepare, dtype=jnp.bfloat16, ema_decay=0.9)
    after, metrics = jax.eval_shape(step, state, batch(), KEY)
    assert seen == dict.fromkeys(("images", "kernel", "logits"), jnp.bfloat16)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(lambda x: (x.shape, x.dtype), state)
    floats = [x.dtype for x in jax.tree.leaves((after, metrics)) if jnp.issubdtype(x.dtype, jnp.floating)]
    assert set(floats) == {jnp.dtype(jnp.float32)}


def test_a_bfloat16_step_is_near_the_float32_one_but_not_it():
    model, optimizer = Tiny(3), optax.sgd(0.1)
    state = new_state(model, optimizer, ema=False)

    def after(dtype):
        return jax.jit(make_train_step(model, optimizer, total_loss, prepare, dtype=dtype))(state, batch(), KEY)

    (one, exact), (other, rounded) = after(jnp.float32), after(jnp.bfloat16)
    error = optax.tree.norm(jax.tree.map(jnp.subtract, one.params, other.params))
    moved = optax.tree.norm(jax.tree.map(jnp.subtract, one.params, state.params))
    assert 1e-5 < error / moved < 0.05
    np.testing.assert_allclose(rounded["loss"], exact["loss"], rtol=0.01)


def test_the_average_is_that_of_parameters_and_statistics():
    model, optimizer, decay = Tiny(3), optax.sgd(0.3), 0.8
    state = new_state(model, optimizer)
    assert_equal(state.ema, state.variables())
    step = jax.jit(make_train_step(model, optimizer, total_loss, prepare, ema_decay=decay))
    expected = copied(state.ema)
    for _ in range(3):
        state, _ = step(state, batch(), KEY)
        for name in ("params", "batch_stats"):
            new = copied(state.variables()[name])
            expected[name] = jax.tree.map(lambda a, b: decay * a + (1 - decay) * b, expected[name], new)
    assert state.ema.keys() == {"params", "batch_stats", "constants"}
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-6, atol=1e-7), state.ema, expected)
    moved = jax.tree.map(lambda a, b: bool(np.any(a != b)), state.ema, state.variables())
    assert all(jax.tree.leaves([moved["params"], moved["batch_stats"]]))


def test_constants_never_change():
    model, optimizer = Tiny(3), optax.sgd(0.3)
    state = new_state(model, optimizer)
    before = copied(state.model_state["constants"])
    step = jax.jit(make_train_step(model, optimizer, total_loss, prepare, ema_decay=0.5))
    for _ in range(2):
        state, _ = step(state, batch(), KEY)
    assert_equal(before, copied(state.model_state["constants"]))
    assert_equal(before, copied(state.ema["constants"]))


@pytest.mark.usefixtures("x64")
def test_a_frozen_network_is_a_function_in_front_of_what_trains():
    """Two steps equal those of the classifiers alone on the features that the frozen part computes for evaluation."""
    freeze = ("^conv/", "^norm/", "^mlp/")
    model, optimizer = Tiny(3), make_optimizer(0.3, name="adamw", weight_decay=0.1, freeze=freeze)
    state = new_state(model, optimizer, ema=False)
    state = in_float64(state, optimizer)
    # Statistics of a network that was trained, and not those of a fresh one, which would hide a fault.
    noise = jax.tree.map(lambda x: jnp.asarray(0.5 + np.random.default_rng(0).random(x.shape)), state.model_state)
    state = state.replace(model_state={**state.model_state, "batch_stats": noise["batch_stats"]})
    step = jax.jit(make_train_step(model, optimizer, total_loss, prepare, dtype=jnp.float64, freeze=freeze))
    names = ("head_0", "head_1")

    images, targets = prepare(None, batch()["image"], batch()["label"])
    _, seen = model.apply(state.variables(), images, capture_intermediates=lambda m, _: m.name == "mlp")
    x = seen["intermediates"]["mlp"]["__call__"][0]
    conv = model.apply(state.variables(), images, capture_intermediates=lambda m, _: m.name == "norm")[1]
    x = jnp.mean(nn.gelu(conv["intermediates"]["norm"]["__call__"][0]) + x, axis=(1, 2))
    x = x * state.model_state["constants"]["scale"]

    def loss(heads):
        logits = jnp.stack([x @ heads[name]["kernel"] + heads[name]["bias"][None] for name in names])
        return total_loss({"logits": logits}, targets)[0]

    heads = {name: state.params[name] for name in names}
    alone = make_optimizer(0.3, name="adamw", weight_decay=0.1)
    moments, frozen = alone.init(heads), copied({**state.params, **dict.fromkeys(names)})
    statistics = copied(state.model_state)
    for _ in range(2):
        state, metrics = step(state, batch(), KEY)
        gradient = jax.grad(loss)(heads)
        np.testing.assert_allclose(metrics["grad_norm"], optax.tree.norm(gradient), rtol=1e-9)
        updates, moments = alone.update(gradient, moments, heads)
        heads = optax.apply_updates(heads, updates)
    for name in names:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9), state.params[name], heads[name])
    assert_equal(copied({**state.params, **dict.fromkeys(names)}), frozen)
    assert_equal(copied(state.model_state), statistics)
    kept = sum(leaf.size for leaf in jax.tree.leaves(state.opt_state))
    assert kept < 3 * sum(leaf.size for leaf in jax.tree.leaves(heads))  # two moments of what trains, and counters


@pytest.mark.usefixtures("x64")
def test_micro_batches_add_up_to_the_batch():
    model, optimizer = Tiny(3, norm=False, constant=False), optax.adam(1e-2)
    state = in_float64(new_state(model, optimizer, ema=False), optimizer)

    def after(accumulate):
        step = make_train_step(model, optimizer, total_loss, prepare, dtype=jnp.float64, accumulate=accumulate)
        return jax.jit(step)(state, batch(), KEY)

    (one, metrics), (other, micro_metrics) = after(1), after(4)
    # Every row differs from the others, so a row that came twice or never would show.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12), one.params, other.params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12), metrics, micro_metrics)


def test_micro_batches_are_prepared_each_with_a_key_of_its_own():
    def noisy(key, images, labels):
        noise = jax.random.uniform(key, images.shape[:1])[:, None]
        return images / 255.0, noise * jnp.ones((1, 3)) + 0 * jax.nn.one_hot(labels, 3)

    def target_sum(outputs, targets):
        return 0.0 * jnp.sum(outputs["logits"]), {"sum": jnp.sum(targets), "square": jnp.sum(targets) ** 2}

    model, optimizer = Tiny(3, norm=False, constant=False), optax.sgd(0.0)
    state = new_state(model, optimizer, ema=False)
    step = make_train_step(model, optimizer, target_sum, noisy, accumulate=4)
    _, metrics = jax.jit(step)(state, batch(), KEY)
    assert float(metrics["square"] - metrics["sum"] ** 2) > 1e-3  # the variance over the micro-batches


def test_batch_norm_sees_every_micro_batch():
    model, optimizer = Tiny(3), optax.sgd(0.0)
    state = new_state(model, optimizer, ema=False)
    step = make_train_step(model, optimizer, total_loss, prepare, accumulate=2)
    after, _ = jax.jit(step)(state, batch(4), KEY)
    images = np.asarray(batch(4)["image"]) / 255.0
    mean = np.zeros(8)
    for rows in (images[0::2], images[1::2]):
        x = model.apply(
            state.variables(),
            jnp.asarray(rows, jnp.float32),
            capture_intermediates=lambda module, _: module.name == "conv",
            mutable=["intermediates"],
        )[1]["intermediates"]["conv"]["__call__"][0]
        mean = 0.9 * mean + 0.1 * np.asarray(x).mean(axis=(0, 1, 2))
    np.testing.assert_allclose(after.model_state["batch_stats"]["norm"]["mean"], mean, rtol=1e-5, atol=1e-7)


def test_grad_norm_is_that_of_the_gradient():
    # Gradient descent at a rate of 1 moves the parameters by the gradient.
    model, optimizer = Tiny(3), optax.sgd(1.0)
    state = new_state(model, optimizer, ema=False)
    after, metrics = jax.jit(make_train_step(model, optimizer, total_loss, prepare))(state, batch(), KEY)
    gradient = [
        np.asarray(a) - np.asarray(b) for a, b in zip(*map(jax.tree.leaves, (state.params, after.params)), strict=True)
    ]
    norm = np.sqrt(sum(np.sum(np.square(g, dtype=np.float64)) for g in gradient))
    np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=1e-5)


def test_a_step_is_a_function_of_state_batch_and_key():
    model, optimizer = Tiny(3, drop_path=0.5, dropout=0.5), optax.sgd(0.1)
    state = new_state(model, optimizer)
    step = jax.jit(make_train_step(model, optimizer, total_loss, prepare, ema_decay=0.9))
    assert_equal(step(state, batch(), KEY), step(state, batch(), KEY))
    other, _ = step(state, batch(), jax.random.key(8))
    assert np.any(other.params["conv"]["kernel"] != step(state, batch(), KEY)[0].params["conv"]["kernel"])


@pytest.mark.parametrize("rate", [0.0, 0.5])
def test_every_step_drops_anew(rate):
    # Nothing is learned, so only what is dropped can change the loss.
    model, optimizer = Tiny(3, dropout=rate, norm=False), optax.sgd(0.0)
    state = new_state(model, optimizer, ema=False)
    step = jax.jit(make_train_step(model, optimizer, total_loss, prepare))
    losses = set()
    for _ in range(4):
        state, metrics = step(state, batch(), KEY)
        losses.add(float(metrics["loss"]))
    assert len(losses) == (4 if rate else 1)
