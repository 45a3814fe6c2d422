"""Shapes of new variables are the same whether equal modules are traced once or every time."""

from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from maxmap.layers.primitives import Linear
from maxmap.models import create_model
from maxmap.shapes import eval_shape_of_init
from tests.zoo import run


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("name", ["test_maxvit", "fcaformer_l1"])
def test_shapes_and_types_are_jaxs(name, dtype, plain_convolutions):
    """Of features, outputs and variables; the second call answers from the cache."""
    model = create_model(name, image_size=64, head="map")

    def init(images):
        return model.init_with_output(jax.random.key(0), images, method=run)

    images = jax.ShapeDtypeStruct((2, 64, 64, 3), dtype)
    wanted = jax.eval_shape(init, images)
    assert eval_shape_of_init(init, images) == wanted
    assert eval_shape_of_init(init, images) == wanted


class Counted(nn.Module):
    """A linear map with a field, and a list of those who traced it."""

    width: int
    traces: ClassVar[list[str]] = []

    @nn.compact
    def __call__(self, x: jax.Array, scale: float = 1.0) -> jax.Array:
        self.traces.append(self.name)
        return scale * Linear(self.width, name="linear")(x)


class Chain(nn.Module):
    scale: float = 1.0

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for i, width in enumerate((4, 4, 4, 6)):
            x = Counted(width, name=f"part_{i}")(x, self.scale)
        return x


def test_a_module_is_traced_again_where_something_differs():
    """Its fields, its arguments' shapes and types, other arguments, and float64 mode; not its name."""

    def traced(x, scale=1.0):
        Counted.traces.clear()
        params = eval_shape_of_init(Chain(scale).init, jax.random.key(0), x)["params"]
        assert [params[f"part_{i}"]["linear"]["kernel"].shape for i in range(4)] == [(4, 4), (4, 4), (4, 4), (4, 6)]
        return Counted.traces, params["part_1"]["linear"]["kernel"].dtype

    assert traced(np.zeros((2, 4), np.float32)) == (["part_0", "part_3"], jnp.float32)
    assert traced(np.ones((2, 4), np.float32)) == ([], jnp.float32)
    assert traced(np.zeros((3, 4), np.float32)) == (["part_0", "part_3"], jnp.float32)
    assert traced(np.zeros((2, 4), np.float16))[0] == ["part_0"]  # which returns float32
    assert traced(np.zeros((2, 4), np.float32), scale=2.0)[0] == ["part_0", "part_3"]
    with jax.enable_x64(True):
        assert traced(np.zeros((2, 4), np.float32))[0] == ["part_0", "part_1", "part_3"]  # part_0 returns float64


class WithoutFirst(Counted):
    """The linear map of the class above, on one channel less."""

    def __call__(self, x: jax.Array, scale: float = 1.0) -> jax.Array:
        return super().__call__(x[:, 1:], scale)


def test_a_call_of_the_class_above_is_another_call():
    """It has the same module and the same name."""
    for channels in (4, 3):
        params = eval_shape_of_init(WithoutFirst(5).init, jax.random.key(0), np.zeros((2, channels)))["params"]
        assert params["linear"]["kernel"].shape == (channels - 1, 5)


class Twice(nn.Module):
    """A module that is called twice, in the second call with what it has learned of the first."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        part = Remembering(name="part")
        return part(part(x))


class Remembering(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        calls = sum(self.has_variable("memory", f"call_{i}") for i in range(2))
        self.variable("memory", f"call_{calls}", lambda: x)
        return x


def test_a_second_call_adds_to_the_variables_of_the_first():
    for _ in range(2):
        found = eval_shape_of_init(Twice().init, jax.random.key(0), np.zeros((2, 3)))
        assert set(found["memory"]["part"]) == {"call_0", "call_1"}


def test_variables_are_drawn_afterwards():
    """JAX keeps what it traces; zeros in the place of parameters must not be found again."""
    init, x = Chain().init, np.zeros((2, 4), np.float32)
    eval_shape_of_init(init, jax.random.key(0), x)
    variables = jax.jit(init)(jax.random.key(0), x)
    assert all(np.any(part["linear"]["kernel"]) for part in variables["params"].values())
