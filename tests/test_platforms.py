"""Programs for accelerators have none of the detours that XLA's CPU backend needs: read in the traced programs."""

from collections import Counter
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.extend.core import Literal

from maxmap.models import create_model
from maxmap.operations import compiled_for, kernels
from tests.marks import cases

# A small network of each family whose operations have ways of their own on a CPU.
NETWORKS = {
    "map_maxvit_mini_32": {
        "depths": (2,),
        "embed_dim": (32,),
        "block_types": ("M",),
        "strides": (2,),
        "image_size": 16,
        "head": {"level": 0, "heads": 2, "channels": 32},
    },
    "convnext_tiny": {"depths": (1, 1), "embed_dim": (32, 64), "image_size": 16},
    "caformer_s18": {"depths": (1, 1), "embed_dim": (32, 32), "mixers": ("conv", "attention"), "image_size": 32},
    "map_mobilenet_v1": {"depths": (1, 1, 1), "stem_width": 8, "embed_dim": (8, 16, 32), "image_size": 32},
}


def equations(jaxpr: Any) -> Iterator[Any]:
    """Every equation of a program, but not of the kernels written by hand."""
    for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        yield equation
        if equation.primitive.name != "pallas_call":
            for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda leaf: hasattr(leaf, "eqns")):
                if hasattr(inner, "eqns"):
                    yield from equations(inner)


def detours(jaxpr: Any) -> Counter[str]:
    """How often a program has what only XLA's CPU backend gains from."""
    found, ones = Counter(), set()
    for equation in equations(jaxpr):
        name = equation.primitive.name
        first = equation.invars[0] if equation.invars else None
        if name == "optimization_barrier" and first.aval.dtype == bool:
            found["branch"] += 1  # around sums of shifted products, see maxmap/kernels/cpu.py
        if name == "broadcast_in_dim" and isinstance(first, Literal) and first.val == 1:
            ones.add(equation.outvars[0])
        if name == "dot_general" and any(variable in ones for variable in equation.invars if not is_literal(variable)):
            found["sum as a product with ones"] += 1
    return found


def is_literal(variable: Any) -> bool:
    return isinstance(variable, Literal)


def traced(name: str, platform: str, choice: str) -> Any:
    """The program of a network's forward and backward pass for 16 images."""
    model = create_model(name, num_classes=8, **NETWORKS[name])
    size = model.backbone.image_size
    images = jax.ShapeDtypeStruct((16, size, size, 3), jnp.bfloat16)

    def loss(params: Any, others: Any, images: Any) -> Any:
        rngs = {"dropout": jax.random.key(0)}
        outputs = model.apply({"params": params, **others}, images, train=True, mutable=["batch_stats"], rngs=rngs)[0]
        return jnp.sum(outputs["logits"].astype(jnp.float32))

    with compiled_for(platform), kernels(choice):
        variables = jax.eval_shape(model.init, jax.random.key(0), images)
        params = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16), variables["params"])
        others = {key: value for key, value in variables.items() if key != "params"}
        return jax.make_jaxpr(jax.grad(loss))(params, others, images)


@pytest.mark.parametrize(
    ("name", "platform", "choice"),
    [
        ("map_maxvit_mini_32", "tpu", "plain"),
        *((name, target, "auto") for name in NETWORKS for target in ("tpu", "gpu")),
    ],
)
def test_programs_for_accelerators_have_no_detours_made_for_the_cpu(name: str, platform: str, choice: str) -> None:
    program = traced(name, platform, choice)
    assert detours(program) == {}
    grouped = [
        equation
        for equation in equations(program)
        if equation.primitive.name == "conv_general_dilated" and equation.params["feature_group_count"] > 1
    ]
    kernels_used = Counter(equation.primitive.name for equation in equations(program))["pallas_call"]
    assert grouped or (platform, choice) == ("tpu", "auto")  # depthwise convolutions, not sums of shifted products
    # On GPUs there is none for an MLP whose activation has weights, and none for a batch norm with ReLU.
    without = platform == "gpu" and name in ("caformer_s18", "map_mobilenet_v1")
    assert (kernels_used > 0) == (choice == "auto" and not without)


@pytest.mark.parametrize("name", cases(["map_maxvit_mini_32", "convnext_tiny"], long=["map_maxvit_mini_32"]))
def test_the_test_finds_the_detours_of_the_cpu(name: str) -> None:
    assert set(detours(traced(name, "cpu", "auto"))) == {"branch", "sum as a product with ones"}
