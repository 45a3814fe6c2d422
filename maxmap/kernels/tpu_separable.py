"""The two ends of a separable convolution's residual branch for TPUs, around a depthwise convolution.

`expand` is norm, linear map and activation; `project` is linear map, stochastic depth and residual path. Each reads and
writes its maps once in each direction, and the gradients of both paths are added on the chip.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from maxmap.kernels.mosaic import Ref, product, whole
from maxmap.kernels.target import Array, accumulator, local_batch, over_batch
from maxmap.kernels.tpu import accumulate, call, images_per_program, kept, normalized, normalized_gradient, rows
from maxmap.kernels.tpu_mlp import Activation

ROWS = 1024  # tokens of a program, at most


def fits(batch: int) -> bool:
    """Whether there are kernels for a device's part of a batch."""
    return images_per_program(batch) > 0


def expand(
    x: Array, scale: Array, kernel: Array, factors: Array, activation: Activation, epsilon: float
) -> tuple[Array, Array]:
    """Computes activation(norm(x) @ kernel).

    Arguments and result: see `maxmap.fused.separable_expand`; maps are `[H, W, B, C]` here.
    """
    wide = accumulator(x.dtype)
    weights = {"scale": scale.astype(wide)[None], "kernel": kernel, "factors": factors.astype(wide)}
    y, beside = _expand(activation, epsilon, _positions(x), weights)
    return y.reshape(*x.shape[:3], -1), beside.reshape(x.shape)


def project(x: Array, kernel: Array, keep: Array, residual: Array) -> Array:
    """Computes residual + keep * (x @ kernel).

    Arguments and result: see `maxmap.fused.separable_project`; maps are `[H, W, B, C]` here.
    """
    keep = jnp.broadcast_to(keep.astype(accumulator(x.dtype))[:, None], (x.shape[2], kernel.shape[1]))
    return _project(_positions(x), kernel, keep, _positions(residual)).reshape(residual.shape)


def _positions(x: Array) -> Array:
    return x.reshape(-1, *x.shape[2:])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _expand(activation: Activation, epsilon: float, x: Array, weights: dict[str, Array]) -> tuple[Array, Array]:
    return _expand_forward(activation, epsilon, x, weights)[0]


def _expand_forward(activation: Activation, epsilon: float, x: Array, weights: dict[str, Array]) -> Any:
    (y,) = over_batch(functools.partial(_run_expand, activation, epsilon), (x, weights), (1, None), (1,))
    return (y, x), (x, weights)


def _expand_backward(activation: Activation, epsilon: float, residuals: Any, grads: tuple[Array, Array]) -> Any:
    x, weights = residuals
    run = functools.partial(_run_expand_backward, activation, epsilon)
    of_x, of_weights = over_batch(run, (x, *grads, weights), (1, 1, 1, None), (1, None))
    return of_x, {name: g.astype(weights[name].dtype) for name, g in of_weights.items()}


_expand.defvjp(_expand_forward, _expand_backward)


@jax.custom_vjp
def _project(x: Array, kernel: Array, keep: Array, residual: Array) -> Array:
    return _project_forward(x, kernel, keep, residual)[0]


def _project_forward(x: Array, kernel: Array, keep: Array, residual: Array) -> tuple[Array, tuple[Array, ...]]:
    (y,) = over_batch(_run_project, (x, kernel, keep, residual), (1, None, 0, 1), (1,))
    return y, (x, kernel, keep)


def _project_backward(residuals: tuple[Array, ...], grad: Array) -> tuple[Array, ...]:
    x, kernel, keep = residuals
    of_x, of_kernel = over_batch(_run_project_backward, (x, kernel, keep, grad), (1, None, 0, 1), (1, None))
    return of_x, of_kernel.astype(kernel.dtype), jnp.zeros_like(keep), grad


_project.defvjp(_project_forward, _project_backward)


class _Tiles:
    """A grid of positions and images over maps `[P, B, C]`."""

    def __init__(self, x: Array) -> None:
        positions, batch, _ = x.shape
        self.images = images_per_program(local_batch(batch))
        most = max(1, ROWS // self.images)
        self.positions = max(n for n in range(1, most + 1) if positions % n == 0)
        self.grid = (positions // self.positions, batch // self.images)

    def map(self, x: Array | jax.ShapeDtypeStruct) -> pl.BlockSpec:
        return pl.BlockSpec((self.positions, self.images, x.shape[-1]), lambda i, b: (i, b, 0))

    def keep(self, x: Array) -> pl.BlockSpec:
        return pl.BlockSpec((self.images, x.shape[-1]), lambda i, b: (b, 0))


def _name(kind: str, x: Array, channels: int) -> str:
    return f"separable_{kind}_{'x'.join(map(str, x.shape))}_{channels}"


def _write(ref: Ref, x: Array) -> None:
    ref[...] = x.astype(ref.dtype).reshape(ref.shape)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _run_expand(activation: Activation, epsilon: float, x: Array, weights: dict[str, Array]) -> Sequence[Array]:
    tiles, channels = _Tiles(x), weights["kernel"].shape[1]

    def kernel(ins: Mapping[str, Ref], outs: Mapping[str, Ref]) -> None:
        y = (normalized(rows(ins["x"]), epsilon)[0] * ins["scale"][...]).astype(ins["x"].dtype)
        _write(outs["y"], activation(product(y, ins["kernel"][...]), ins["factors"][...]))

    out = jax.ShapeDtypeStruct((*x.shape[:2], channels), x.dtype)
    inputs = {"x": (x, tiles.map(x))} | {name: (leaf, whole(leaf)) for name, leaf in weights.items()}
    return call(kernel, _name("expand", x, channels), tiles.grid, inputs, {"y": (out, tiles.map(out))})


@functools.partial(jax.jit, static_argnums=(0, 1))
def _run_expand_backward(
    activation: Activation, epsilon: float, x: Array, of_y: Array, of_beside: Array, weights: dict[str, Array]
) -> tuple[Array, dict[str, Array]]:
    tiles, channels = _Tiles(x), weights["kernel"].shape[1]

    def kernel(ins: Mapping[str, Ref], outs: Mapping[str, Ref]) -> None:
        dtype = ins["x"].dtype
        normal, factor = normalized(rows(ins["x"]), epsilon)
        y = (normal * ins["scale"][...]).astype(dtype)
        _, vjp = jax.vjp(activation, product(y, ins["kernel"][...]), ins["factors"][...])
        of_hidden, of_factors = vjp(rows(ins["of_y"]))
        of_hidden = of_hidden.astype(dtype)
        of_normal = product(of_hidden, ins["kernel"][...], 1, 1)
        of_scale = (of_normal * normal).sum(axis=0, keepdims=True)
        found = {"scale": of_scale, "kernel": product(y, of_hidden, 0, 0), "factors": of_factors}
        accumulate(2, [outs[name] for name in found], list(found.values()))
        of_x = normalized_gradient(normal, factor, of_normal * ins["scale"][...])
        _write(outs["x"], of_x + rows(ins["of_beside"]))

    maps = {"x": x, "of_y": of_y, "of_beside": of_beside}
    inputs = {name: (leaf, tiles.map(leaf)) for name, leaf in maps.items()}
    inputs |= {name: (leaf, whole(leaf)) for name, leaf in weights.items()}
    outputs = {"x": (jax.ShapeDtypeStruct(x.shape, x.dtype), tiles.map(x))}
    for name, leaf in weights.items():
        shape = jax.ShapeDtypeStruct(leaf.shape, accumulator(leaf.dtype))
        outputs[name] = (shape, whole(shape))
    of_x, *rest = call(kernel, _name("expand_backward", x, channels), tiles.grid, inputs, outputs)
    return of_x, dict(zip(weights, rest, strict=True))


@jax.jit
def _run_project(x: Array, weights: Array, keep: Array, residual: Array) -> Sequence[Array]:
    tiles = _Tiles(x)

    def kernel(ins: Mapping[str, Ref], outs: Mapping[str, Ref]) -> None:
        y = kept(product(ins["x"][...].reshape(-1, x.shape[-1]), ins["kernel"][...]), ins["keep"][...])
        _write(outs["y"], rows(ins["residual"]) + y)

    inputs = {
        "x": (x, tiles.map(x)),
        "residual": (residual, tiles.map(residual)),
        "kernel": (weights, whole(weights)),
        "keep": (keep, tiles.keep(keep)),
    }
    out = jax.ShapeDtypeStruct(residual.shape, residual.dtype)
    name = _name("project", x, weights.shape[1])
    return call(kernel, name, tiles.grid, inputs, {"y": (out, tiles.map(out))})


@jax.jit
def _run_project_backward(x: Array, weights: Array, keep: Array, grad: Array) -> Sequence[Array]:
    tiles = _Tiles(x)

    def kernel(ins: Mapping[str, Ref], outs: Mapping[str, Ref]) -> None:
        branch = kept(rows(ins["grad"]), ins["keep"][...]).astype(x.dtype)
        pixels = ins["x"][...].reshape(-1, x.shape[-1])
        accumulate(2, [outs["kernel"]], [product(pixels, branch, 0, 0)])
        _write(outs["x"], product(branch, ins["kernel"][...], 1, 1))

    inputs = {
        "x": (x, tiles.map(x)),
        "grad": (grad, tiles.map(grad)),
        "kernel": (weights, whole(weights)),
        "keep": (keep, tiles.keep(keep)),
    }
    of_kernel = jax.ShapeDtypeStruct(weights.shape, accumulator(weights.dtype))
    outputs = {"x": (jax.ShapeDtypeStruct(x.shape, x.dtype), tiles.map(x)), "kernel": (of_kernel, whole(of_kernel))}
    return call(kernel, _name("project_backward", x, weights.shape[1]), tiles.grid, inputs, outputs)
