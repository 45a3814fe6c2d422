"""How large the programs are that JAX traces: `python -m benchmarks.graph [MODEL...]`.

It prints the operations (equations of the jaxpr, those of inner functions and loops too) of the forward pass and of the
training step, in all and by block; nothing is compiled. Of blocks that occur more than once it prints the mean. What
Flax calls by a module's name belongs to it, in the backward pass too; the rest of a training step is mixing, loss and
optimizer, some operations for every parameter.
"""

import argparse
import re
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.speed import MODELS
from maxmap.benchmark import training_step
from maxmap.models import Classifier, block_paths, create_model

# The parts of a MaxViT block are counted on their own; the blocks of the other families as a whole.
PARTS = {"conv": "MBConv", "attn_block": "window attention", "attn_grid": "grid attention"}
BLOCKS = ("stem", *PARTS.values(), "block", "rest of backbone", "head", "rest")


def operations(jaxpr: Any) -> int:
    """Counts the equations of a jaxpr; those of inner ones instead of the equation that holds them."""
    return sum(sum(map(operations, inner)) if (inner := _inner(equation)) else 1 for equation in _open(jaxpr).eqns)


def by_block(jaxpr: Any, blocks: Sequence[Sequence[str]]) -> dict[str, tuple[int, float]]:
    """Returns for every kind of block how many there are and the mean of their operations.

    Args:
      jaxpr: of a model.
      blocks: of that model, see `maxmap.models.block_paths`.
    """
    counts: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    _collect(jaxpr, "", [paths[-1] for paths in blocks[1:]], counts)
    return {kind: (len(of), sum(of.values()) / len(of)) for kind in BLOCKS if (of := counts.get(kind))}


def trace(model: Classifier, task: str) -> Any:
    """Returns the jaxpr of the forward pass or the training step for a batch of 8."""
    size = model.backbone.image_size
    size = (size, size) if isinstance(size, int) else tuple(size)
    key = jax.random.key(0)
    if task == "forward":
        images = jax.ShapeDtypeStruct((8, *size, 3), jnp.float32)
        return jax.make_jaxpr(model.apply)(jax.eval_shape(model.init, key, images), images)
    step, create_state = training_step(model, jnp.dtype(jnp.float32))
    state = jax.eval_shape(create_state, jax.random.key(0))
    images = jax.ShapeDtypeStruct((8, *size, 3), jnp.uint8)
    return jax.make_jaxpr(step)(state, {"image": images, "label": jax.ShapeDtypeStruct((8,), jnp.int32)}, key)


def _open(jaxpr: Any) -> Any:
    return getattr(jaxpr, "jaxpr", jaxpr)


def _inner(equation: Any) -> list[Any]:
    """The jaxprs among the parameters of an equation; a custom derivative's own rules are functions, not jaxprs."""
    leaves = jax.tree.leaves(list(equation.params.values()), is_leaf=lambda leaf: hasattr(leaf, "eqns"))
    return [leaf for leaf in leaves if hasattr(leaf, "eqns")]


def _collect(jaxpr: Any, above: str, blocks: Sequence[str], counts: dict[str, dict[str, int]]) -> None:
    for equation in _open(jaxpr).eqns:
        name = f"{above}/{equation.source_info.name_stack}"
        if inner := _inner(equation):
            for each in inner:
                _collect(each, name, blocks, counts)
        else:
            kind, which = _block(name, blocks)
            counts[kind][which] += 1


def _block(name: str, blocks: Sequence[str]) -> tuple[str, str]:
    """Returns the kind of block that an operation belongs to, and which of `blocks`."""
    parts = re.split(r"[/()]+", name)
    if "head" in parts:
        return "head", ""
    if "backbone" not in parts:
        return "rest", ""
    if "stem" in parts:
        return "stem", ""
    path = f"/{'/'.join(parts)}/"
    block = next((block for block in blocks if f"/{block}/" in path), None)
    if block is None:
        return "rest of backbone", ""
    return next((PARTS[part] for part in parts if part in PARTS), "block"), block


def main() -> None:
    """Prints a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=MODELS, help="(default: the nine of the benchmark)")
    models = parser.parse_args().models
    print(f"| model | task | in all | {' | '.join(BLOCKS)} |\n|{'---|' * (len(BLOCKS) + 3)}")
    for name in models:
        model = create_model(name)
        blocks = block_paths(model)
        for task in ("forward", "train"):
            jaxpr = trace(model, task)
            found = by_block(jaxpr, blocks)
            cells = []
            for kind in BLOCKS:
                number, mean = found.get(kind, (0, 0.0))
                cells.append("" if not number else f"{mean:.0f}" if number == 1 else f"{number} x {mean:.0f}")
            print(f"| {name} | {task} | {operations(jaxpr):,} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
