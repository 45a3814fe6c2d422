"""What the benchmarks count: operations by block, bytes by batch."""

import functools
import importlib

import jax
import jax.numpy as jnp
import pytest

from benchmarks import graph, memory
from maxmap.models import block_paths, create_model
from maxmap.train.plan import largest_batch
from tests.marks import cases
from tests.tiny import ROOT

SMALL = functools.partial(
    create_model,
    "maxvit_mini_32",
    **{"window_size": 2, "stem_width": (8, 8), "embed_dim": (8,), "block_types": ("M",), "strides": (2,)},
    transformer={"head_dim": 8},
    image_size=8,
)


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks").glob("[a-z]*.py")), ids=lambda path: path.stem)
def test_every_benchmark_imports(path):
    importlib.import_module(f"benchmarks.{path.stem}")


@pytest.mark.parametrize("task", cases(["forward", "train"], long=["train"]))
@pytest.mark.usefixtures("plain_convolutions")
def test_every_operation_belongs_to_a_block(task):
    model, deeper = SMALL(depths=(3,)), SMALL(depths=(4,))
    jaxpr = graph.trace(model, task)
    blocks = graph.by_block(jaxpr, block_paths(model))
    assert sum(number * mean for number, mean in blocks.values()) == pytest.approx(graph.operations(jaxpr))
    assert {blocks[part][0] for part in graph.PARTS.values()} == {3} and {"stem", "head"} <= blocks.keys()
    # One block more changes nothing but the number of blocks, outside of the optimizer.
    more = graph.by_block(graph.trace(deeper, task), block_paths(deeper))
    assert {part: more[part][0] for part in graph.PARTS.values()} == dict.fromkeys(graph.PARTS.values(), 4)
    assert more["stem"] == blocks["stem"] and more["head"] == blocks["head"]
    assert ("rest" in blocks) == (task == "train")


def test_operations_of_inner_functions_count_and_their_calls_do_not():
    def function(x):
        return jax.lax.fori_loop(0, 3, lambda _, x: jnp.sin(x) + 1, jax.jit(jnp.cos)(x))

    # cos; sin and add, and the counter's own add; a loop whose length is known is a scan
    assert graph.operations(jax.make_jaxpr(function)(1.0)) == 4


@pytest.mark.long
@pytest.mark.usefixtures("plain_convolutions")
def test_memory_grows_with_the_batch_as_predicted(monkeypatch):
    monkeypatch.setattr(memory, "create_model", lambda name, remat: SMALL(depths=(1,), remat=remat))
    fixed, per_image = memory.measure("small", "float32", False, (32, 96))
    program, (state, _, _) = memory.compile_step("small", 192, "float32", False)
    assert memory.held(program) == pytest.approx(fixed + 192 * per_image, rel=0.02)
    assert fixed > sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))


def test_largest_batch():
    assert largest_batch(100, 10, 30) == 3 and largest_batch(99, 10, 30) == 2 and largest_batch(5, 10, 30) == 0
