"""The state: what it starts with, and that a checkpoint's items are all of it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from maxmap.sharding import make_mesh, replicated
from maxmap.train.state import TrainState, abstract, create
from tests.tiny import Tiny, assert_equal

pytestmark = pytest.mark.usefixtures("quick_compilation")

IMAGES = jax.ShapeDtypeStruct((1, 8, 8, 3), jnp.float32)


def test_items_are_the_whole_state():
    for ema in (True, False):
        state = create(Tiny(3), optax.adam(1e-3), jax.random.key(0), IMAGES, ema=ema)
        items = state.items()
        assert items.keys() == {"variables", "training"} | ({"ema"} if ema else set())
        assert_equal(TrainState.from_items(items), state)


def test_the_average_starts_equal_but_in_buffers_of_its_own():
    state = jax.jit(lambda key: create(Tiny(3), optax.sgd(0.1), key, IMAGES, ema=True))(jax.random.key(0))
    assert_equal(state.ema, state.variables())
    buffers = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(state)]
    assert len(set(buffers)) == len(buffers)  # a step donates its input, which no two leaves may then share


def test_initialisation_does_not_depend_on_the_batch_or_the_mesh():
    def at(devices, batch):
        images = jax.ShapeDtypeStruct((batch, 8, 8, 3), jnp.float32)
        mesh = make_mesh(data=devices)
        made = jax.jit(
            lambda key: create(Tiny(3), optax.adam(1e-3), key, images, ema=True), out_shardings=replicated(mesh)
        )(jax.random.key(3))
        assert all(leaf.sharding.device_set == set(mesh.devices.flat) for leaf in jax.tree.leaves(made))
        return made

    assert_equal(at(1, 1), at(4, 8))


def test_abstract_has_shapes_types_and_places():
    state = create(Tiny(3), optax.adam(1e-3), jax.random.key(0), IMAGES, ema=True)
    mesh = make_mesh(data=2)
    like = abstract(jax.eval_shape(lambda: state), mesh)
    for leaf, described in zip(jax.tree.leaves(state), jax.tree.leaves(like), strict=True):
        assert (described.shape, described.dtype) == (leaf.shape, leaf.dtype)
        assert described.sharding == replicated(mesh)
    assert np.shape(state.step) == () and state.step.dtype == jnp.int32
