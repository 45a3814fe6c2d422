"""The MLP of a transformer block for TPUs: norm, both linear maps, activation and residual path in one kernel.

The hidden channels, four times as many as the map has, stay on the chip; the backward pass computes them again.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from maxmap.kernels.branch import in_types_of_kernels, keep_of, mlp_weights, residual_branch
from maxmap.kernels.mosaic import LANES, Ref, product, whole
from maxmap.kernels.target import Array, accumulator, local_batch
from maxmap.kernels.tpu import accumulate, call, images_per_program, kept, normalized, normalized_gradient, rows

ROWS = 1024  # tokens of a program, at most
HIDDEN = 512  # hidden channels that a program computes at a time, at most

# Of hidden values `[R, F]` and weights of the activation `[weights, F]`.
Activation = Callable[[Array, Array | None], Array]


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What a kernel knows of its shapes.

    Attributes:
      positions: of a program; a position has one token in every image.
      images: of a program.
      activation: between the linear maps.
      epsilon: of the norm.
      residual: the residual path has an input of its own.
    """

    positions: int
    images: int
    activation: Activation
    epsilon: float
    residual: bool


def fits(batch: int, hidden: int) -> bool:
    """Whether there is a kernel for a device's part of a batch and a number of hidden channels."""
    return images_per_program(batch) > 0 and hidden % LANES == 0


def mlp_block(
    x: Array,
    weights: Mapping[str, Any],
    activation: Activation,
    epsilon: float,
    residual: Array | None = None,
) -> Array:
    """Computes residual + keep * fc2(activation(fc1(norm(x + shift)))).

    Arguments and result: see `maxmap.fused.mlp_block`; maps are `[H, W, B, C]` here.
    """
    height, width, batch, channels = x.shape
    hidden = weights["fc1_kernel"].shape[1]
    images = images_per_program(local_batch(batch))
    most = max(1, ROWS // images)
    positions = max(n for n in range(1, most + 1) if height * width % n == 0)
    sizes = Sizes(positions, images, activation, epsilon, residual is not None)
    arranged = mlp_weights(weights, channels, hidden)
    if weights["activation"] is not None:
        arranged["activation"] = weights["activation"]
    if weights.get("shift") is not None:
        arranged["shift"] = weights["shift"][None]
    arranged = in_types_of_kernels(arranged, x.dtype)
    keep = keep_of(weights, batch, channels, x.dtype)
    maps = [part.reshape(height * width, batch, channels) for part in (x, residual) if part is not None]
    run = functools.partial(_run, sizes)
    return residual_branch(functools.partial(run, grad=None), run, 1, maps, arranged, keep).reshape(x.shape)


# Compiled by itself so that it is traced once for all blocks of the same shapes: tracing takes seconds.
@functools.partial(jax.jit, static_argnums=0)
def _run(
    sizes: Sizes, maps: list[Array], weights: dict[str, Array], keep: Array, grad: Array | None
) -> tuple[Any, ...]:
    """Runs the kernel of one pass: the output alone, or the gradients of `x` and of the weights."""
    positions, batch, channels = maps[0].shape
    spec = pl.BlockSpec((sizes.positions, sizes.images, channels), lambda i, b: (i, b, 0))
    inputs = {name: (part, spec) for name, part in zip(("x", "residual"), maps, strict=False)}
    inputs |= {name: (w, whole(w)) for name, w in weights.items()}
    inputs["keep"] = (keep, pl.BlockSpec((sizes.images, channels), lambda i, b: (b, 0)))
    outputs = {"x": (jax.ShapeDtypeStruct(maps[0].shape, maps[0].dtype), spec)}
    kernel, step = _forward_kernel, "forward"
    if grad is not None:
        kernel, step = _backward_kernel, "backward"
        inputs["grad"] = (grad, spec)
        for name, w in weights.items():
            shape = jax.ShapeDtypeStruct(w.shape, accumulator(w.dtype))
            outputs[name] = (shape, whole(shape))
    name = f"mlp_{step}_{positions}x{batch}x{channels}_{weights['fc1_kernel'].shape[1]}"
    grid = (positions // sizes.positions, batch // sizes.images)
    out, *rest = call(functools.partial(kernel, sizes), name, grid, inputs, outputs)
    return (out,) if grad is None else (out, dict(zip(weights, rest, strict=True)))


def _parts(hidden: int) -> list[slice]:
    """The hidden channels, so many at a time."""
    step = next(n for n in (HIDDEN, HIDDEN // 2, LANES) if hidden % n == 0)
    return [slice(start, start + step) for start in range(0, hidden, step)]


def _shifted(x: Array, ins: Mapping[str, Ref]) -> Array:
    return x + ins["shift"][...] if "shift" in ins else x


def _scaled(normal: Array, ins: Mapping[str, Ref]) -> Array:
    return (normal * ins["norm"][0:1, :] + ins["norm"][1:2, :]).astype(ins["x"].dtype)


def _forward_kernel(sizes: Sizes, ins: Mapping[str, Ref], outs: Mapping[str, Ref]) -> None:
    x, dtype = rows(ins["x"]), ins["x"].dtype
    y = _scaled(normalized(_shifted(x, ins), sizes.epsilon)[0], ins)
    branch = ins["fc2_bias"][...]
    for part in _parts(ins["fc1_kernel"].shape[1]):
        hidden = product(y, ins["fc1_kernel"][:, part]) + ins["fc1_bias"][:, part]
        active = sizes.activation(hidden, ins["activation"][:, part] if "activation" in ins else None)
        branch = branch + product(active.astype(dtype), ins["fc2_kernel"][part, :])
    start = rows(ins["residual"]) if sizes.residual else x
    outs["x"][...] = (start + kept(branch, ins["keep"][...])).astype(dtype).reshape(outs["x"].shape)


def _backward_kernel(sizes: Sizes, ins: Mapping[str, Ref], outs: Mapping[str, Ref]) -> None:
    x, dtype = rows(ins["x"]), ins["x"].dtype
    normal, factor = normalized(_shifted(x, ins), sizes.epsilon)
    y = _scaled(normal, ins)
    grad = rows(ins["grad"])
    branch = kept(grad, ins["keep"][...])
    sums = {"fc2_bias": branch.sum(axis=0, keepdims=True)}
    branch = branch.astype(dtype)
    of_y = jnp.zeros(x.shape, x.dtype)
    found: dict[str, list[Array]] = {"fc1_kernel": [], "fc1_bias": [], "fc2_kernel": [], "activation": []}
    for part in _parts(ins["fc1_kernel"].shape[1]):
        hidden = product(y, ins["fc1_kernel"][:, part]) + ins["fc1_bias"][:, part]
        of_active = product(branch, ins["fc2_kernel"][part, :], 1, 1)
        active, vjp = jax.vjp(sizes.activation, hidden, ins["activation"][:, part] if "activation" in ins else None)
        of_hidden, of_weights = vjp(of_active)
        found["fc2_kernel"].append(product(active.astype(dtype), branch, 0, 0))
        found["fc1_bias"].append(of_hidden.sum(axis=0, keepdims=True))
        if "activation" in ins:
            found["activation"].append(of_weights)
        of_hidden = of_hidden.astype(dtype)
        found["fc1_kernel"].append(product(y, of_hidden, 0, 0))
        of_y = of_y + product(of_hidden, ins["fc1_kernel"][:, part], 1, 1)
    sums |= {
        name: jnp.concatenate(parts, axis=0 if name == "fc2_kernel" else 1) for name, parts in found.items() if parts
    }
    sums["norm"] = jnp.concatenate([(of_y * part).sum(axis=0, keepdims=True) for part in (normal, jnp.ones_like(of_y))])
    of_x = normalized_gradient(normal, factor, of_y * ins["norm"][0:1, :])
    if "shift" in ins:
        sums["shift"] = of_x.sum(axis=0, keepdims=True)
    accumulate(2, [outs[name] for name in sums], list(sums.values()))
    of_x = of_x if sizes.residual else grad + of_x
    outs["x"][...] = of_x.astype(dtype).reshape(outs["x"].shape)
