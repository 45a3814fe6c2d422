"""Devices change nothing: a step on eight is the step on one."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from maxmap.errors import UserError
from maxmap.models import create_model
from maxmap.sharding import check_batch, make_mesh, replicated, split_batch, to_devices
from maxmap.train.losses import total_loss
from maxmap.train.state import TrainState
from maxmap.train.step import cast, make_train_step
from tests.tiny import compile_quickly

MODEL = {
    "name": "map_maxvit_mini_32",
    "num_classes": 3,
    "image_size": 8,
    "window_size": 2,
    "stem_width": (8, 8),
    "embed_dim": (8,),
    "depths": (1,),
    "block_types": ("M",),
    "strides": (2,),
    "transformer": {"head_dim": 8},
    "drop_path": 0.5,
    "head": {"channels": 8, "level": 0, "gram_channels": 4, "gram_groups": 2, "heads": 2, "mlp_ratio": 2.0},
}


@pytest.fixture(scope="module", autouse=True)
def quick():
    with compile_quickly():
        yield


@pytest.mark.usefixtures("x64")
def test_eight_devices_train_as_one_does():
    # Batch norm over the whole batch, drop path and dropout with masks that do not know the devices, micro-batches.
    # Not Adam: it blows up the rounding in gradients that are zero by nature (biases that a norm or softmax cancels).
    model, optimizer = create_model(**MODEL), optax.sgd(1e-2, momentum=0.9)
    rng = np.random.default_rng(0)
    batches = [
        {
            "image": rng.integers(0, 256, (16, 8, 8, 3)).astype(np.uint8),
            "label": rng.integers(0, 3, 16).astype(np.int32),
        }
        for _ in range(3)
    ]
    variables = cast(dict(jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))), jnp.float64)
    params = variables.pop("params")
    ema = jax.tree.map(jnp.copy, {"params": params, **variables})
    start = TrainState(jnp.zeros((), jnp.int32), params, variables, optimizer.init(params), ema)

    def prepare(key, images, labels):
        flip = jax.random.bernoulli(key, shape=images.shape[:1])[:, None, None, None]
        images = jnp.where(flip, images[:, :, ::-1], images)
        return images / 255, jax.nn.one_hot(labels, 3, dtype=jnp.float64)

    def train(devices):
        mesh = make_mesh(data=devices)
        same, split = replicated(mesh), split_batch(mesh)
        step = make_train_step(model, optimizer, total_loss, prepare, dtype=jnp.float64, ema_decay=0.5, accumulate=2)
        state = jax.device_put(start, same)
        compiled = (
            jax.jit(step, in_shardings=(same, {"image": split, "label": split}, same), out_shardings=same)
            .lower(state, to_devices(batches[0], mesh), jax.random.key(1))
            .compile()
        )
        losses = []
        for batch in batches:
            state, metrics = compiled(state, to_devices(batch, mesh), jax.device_put(jax.random.key(1), same))
            losses.append(float(metrics["loss"]))
        return jax.device_get(state), losses

    (one, losses), (eight, sharded_losses) = train(1), train(8)
    np.testing.assert_allclose(sharded_losses, losses, rtol=1e-9)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9), eight, one)
    moved = jax.tree.map(lambda a, b: bool(np.any(a != b)), one.model_state["batch_stats"], variables["batch_stats"])
    assert all(jax.tree.leaves(moved)) and len(set(losses)) == 3


def test_a_mesh_has_one_axis_of_the_devices_asked_for():
    for asked, got in ((-1, 8), (1, 1), (3, 3)):
        mesh = make_mesh(data=asked)
        assert mesh.shape == {"data": got}
        assert set(mesh.devices.flat) <= set(jax.devices())


@pytest.mark.parametrize("devices", [0, 9, -2])
def test_devices_that_there_are_not(devices):
    with pytest.raises(UserError, match=rf"config.mesh.data is {devices}, but JAX sees 8 devices: .* -1 for all"):
        make_mesh(data=devices)


@pytest.mark.parametrize(("size", "nearest"), [(12, 16), (9, 8), (3, 8), (1, 8), (23, 24)])
def test_a_batch_that_does_not_divide(size, nearest):
    with pytest.raises(UserError, match=f"^batch {size} does not divide over 8 devices; the nearest .* is {nearest}.$"):
        check_batch(size, make_mesh(), "batch")
    check_batch(nearest, make_mesh(), "batch")


def test_rows_of_a_batch_go_to_the_devices_in_order():
    mesh = make_mesh(data=4)
    batch = to_devices({"image": np.arange(16).reshape(8, 2), "label": np.arange(8)}, mesh)
    assert batch["image"].sharding == split_batch(mesh)
    for i, device in enumerate(mesh.devices.flat):
        (shard,) = (s for s in batch["label"].addressable_shards if s.device == device)
        assert shard.data.tolist() == [2 * i, 2 * i + 1]
    np.testing.assert_array_equal(batch["image"], np.arange(16).reshape(8, 2))
