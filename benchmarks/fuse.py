"""What `maxmap.fuse` does to models: `python -m benchmarks.fuse [MODEL...]`.

    python -m benchmarks.fuse --norms                    how many batch norms it folds, for one model of each family
    python -m benchmarks.fuse --batch 8 --rounds 15      the time of a forward pass here, whole and fused, in turns

A forward pass is jitted, in float32 with random weights, and returns the mean of the branches' logits. Tables have the
model, the figure before and the figure behind; the ratio of times above 1 is a gain. What it does for a TPU,
`python -m benchmarks.accelerators fused` asks the compiler.
"""

import argparse
import statistics
import time
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import traverse_util

from maxmap.errors import UserError
from maxmap.layers.primitives import pair
from maxmap.models import Classifier, average, create_model, fuse

TIMED = ("maxvit_tiny_tf_224", "resnet50", "map_resnet50", "mobilenet_v1")
COUNTED = (
    *("maxvit_tiny_tf_224", "coatnet_0_rw_224", "maxvit_rmlp_nano_rw_256", "mobilenet_v1", "resnet50"),
    *("efficientvit_b0", "efficientvit_m0", "faster_vit_0_224", "fastvit_sa12", "mobilevit_s", "mobilevitv2_100"),
    *("map_maxvit_tiny_tf_224", "map_resnet50", "map_convnext_tiny", "map_pit_s", "ga_convnext_tiny_688"),
    *("ga_cswin_tiny", "convnext_tiny"),
)


def forms(name: str) -> list[tuple[Classifier, Mapping[str, Any]]]:
    """Returns a model as it trains and as `fuse` makes it, with shapes for variables; FastViT has a form in between."""
    model = create_model(name)
    images = jax.ShapeDtypeStruct((1, *pair(model.backbone.image_size), 3), jnp.float32)
    found = [(model, jax.eval_shape(model.init, jax.random.key(0), images))]
    for _ in range(2 if hasattr(model.backbone, "fuse") else 1):
        fused: list[Classifier] = []

        def run(variables: Any, fused: list[Classifier] = fused) -> Any:
            model, folded = fuse(found[-1][0], variables)
            fused.append(model)
            return folded

        try:
            variables = jax.eval_shape(run, found[-1][1])
        except UserError:
            break
        found.append((fused[0], variables))
    return found


def whole_norms(variables: Mapping[str, Any]) -> int:
    """Counts the batch norms that keep their statistics."""
    return sum(path[-1] == "mean" for path in traverse_util.flatten_dict(dict(variables.get("batch_stats", {}))))


def timed(name: str, batch: int, rounds: int) -> list[float]:
    """Returns the median milliseconds of each form of a model, measured in turns."""
    calls = []
    for model, shapes in forms(name):
        variables = jax.tree.map(lambda leaf: jax.random.uniform(jax.random.key(leaf.size), leaf.shape), shapes)
        images = jax.random.normal(jax.random.key(0), (batch, *pair(model.backbone.image_size), 3))
        run = jax.jit(lambda v, x, model=model: average(model.apply(v, x))).lower(variables, images).compile()
        calls.append((run, variables, images))
    times: list[list[float]] = [[] for _ in calls]
    for _ in range(rounds + 1):
        for (run, variables, images), found in zip(calls, times, strict=True):
            began = time.perf_counter()
            jax.block_until_ready(run(variables, images))
            found.append(1e3 * (time.perf_counter() - began))
    return [statistics.median(found[1:]) for found in times]


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*")
    parser.add_argument("--norms", action="store_true")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=15)
    given = parser.parse_args()
    for name in given.models or (COUNTED if given.norms else TIMED):
        if given.norms:
            counts = [whole_norms(variables) for _, variables in forms(name)]
            print(f"| `{name}` | {counts[0]} | {counts[-1]} |", flush=True)
        else:
            times = timed(name, given.batch, given.rounds)
            print(f"| `{name}` | {times[0]:.1f} | {times[-1]:.1f} | {times[0] / times[-1]:.2f} |", flush=True)


if __name__ == "__main__":
    main()
