"""The MLP of a transformer block for GPUs: norm, both linear maps, activation and residual path in one kernel.

The hidden channels, four times as many as the map has, stay on the chip in the forward pass. The backward pass computes
them again and writes them once, for the products that give the gradients of the weights.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from maxmap.kernels.branch import in_types_of_kernels, keep_of, mlp_weights, residual_branch
from maxmap.kernels.target import Array, accumulator, inside_triton, platform

Ref = Any
Activation = Callable[[Array, Array | None], Array]  # of hidden values `[R, F]`; the weights are None

CHANNELS = 512  # at most: a program holds two of its rows' tiles in registers
TILE = 64 * 256  # entries of a program's rows at a time, at most


class Sizes(NamedTuple):
    """What a kernel knows of its shapes: an image's pixels, channels, hidden channels, the activation and the norm."""

    pixels: int
    channels: int
    hidden: int
    activation: Activation
    epsilon: float
    residual: bool

    @property
    def columns(self) -> int:
        """Channels of a tile."""
        return max(16, pl.next_power_of_2(self.channels))

    @property
    def rows(self) -> int:
        """Pixels of a program: as many as pad an image least."""
        allowed = [n for n in (64, 32, 16) if n * self.columns <= TILE]
        return min(allowed, key=lambda n: -(-self.pixels // n) * n)

    @property
    def step(self) -> int:
        """Hidden channels at a time: a program holds that many of both kernels in shared memory."""
        return next(n for n in (64, 32, 16) if self.hidden % n == 0 and n * self.columns <= TILE)


def fits(channels: int, hidden: int) -> bool:
    """Whether there is a kernel for these numbers of channels."""
    return channels <= CHANNELS and hidden % 16 == 0


def mlp_block(
    x: Array, weights: Mapping[str, Any], activation: Activation, epsilon: float, residual: Array | None = None
) -> Array:
    """Computes residual + keep * fc2(activation(fc1(norm(x)))).

    Args:
      x: `[B, ..., C]`.
      weights: 'norm_scale' and 'norm_bias' `[C]`, 'fc1_kernel' `[C, F]`, 'fc1_bias' `[F]`, 'fc2_kernel' `[F, C]`,
        'fc2_bias' `[C]`, 'keep' `[B]`: the factor of the branch for every sample, without a gradient. All but the
        kernels may be None.
      activation: of hidden values `[R, F]`; it has no weights.
      epsilon: of the norm.
      residual: like `x`; None for `x`.

    Returns:
      Like `x`.
    """
    kernels = (weights["fc1_kernel"], weights["fc2_kernel"])
    dtype = jnp.result_type(x, *kernels)
    x, residual = x.astype(dtype), None if residual is None else residual.astype(dtype)
    batch, channels = x.shape[0], x.shape[-1]
    hidden = weights["fc1_kernel"].shape[1]
    maps = [part.reshape(batch, -1, channels) for part in (x, residual) if part is not None]
    sizes = Sizes(maps[0].shape[1], channels, hidden, activation, epsilon, residual is not None)
    arranged = mlp_weights(weights, channels, hidden)
    arranged |= {name: arranged[name].astype(dtype) for name in ("fc1_kernel", "fc2_kernel")}
    arranged = in_types_of_kernels(arranged, dtype)
    forward, backward = (functools.partial(run, sizes) for run in (_run_forward, _run_backward))
    keep = keep_of(weights, batch, 1, dtype)
    return residual_branch(forward, backward, 0, maps, arranged, keep).reshape(x.shape)


def _run_forward(sizes: Sizes, maps: list[Array], weights: dict[str, Array], keep: Array) -> tuple[Array]:
    inputs = dict(zip(("x", "residual"), maps, strict=False)) | weights | {"keep": keep}
    out = {"x": jax.ShapeDtypeStruct(maps[0].shape, maps[0].dtype)}
    return (_call(sizes, _forward_kernel, "mlp_forward", inputs, out)["x"],)


def _run_backward(
    sizes: Sizes, maps: list[Array], weights: dict[str, Array], keep: Array, grad: Array
) -> tuple[Array, dict[str, Array]]:
    (x,) = maps
    batch, pixels, channels = x.shape
    wide, programs = accumulator(x.dtype), pl.cdiv(pixels, sizes.rows)
    out = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name in ("x", "normal")}
    out |= {name: jax.ShapeDtypeStruct((batch, pixels, sizes.hidden), x.dtype) for name in ("active", "hidden")}
    out["of_channels"] = jax.ShapeDtypeStruct((batch, programs, 3, channels), wide)
    out["of_hidden"] = jax.ShapeDtypeStruct((batch, programs, 1, sizes.hidden), wide)
    found = _call(sizes, _backward_kernel, "mlp_backward", {"x": x, "grad": grad, **weights, "keep": keep}, out)
    of_channels = jnp.sum(found["of_channels"], axis=(0, 1))

    def product(a: Array, b: Array) -> Array:
        return jnp.einsum("rc,rf->cf", *(part.reshape(-1, part.shape[-1]) for part in (a, b)))

    return found["x"], {
        "norm": of_channels[:2],
        "fc1_kernel": product(found["normal"], found["hidden"]),
        "fc1_bias": jnp.sum(found["of_hidden"], axis=(0, 1)),
        "fc2_kernel": product(found["active"], grad),
        "fc2_bias": of_channels[2:],
    }


def _call(
    sizes: Sizes,
    kernel: Callable[..., None],
    name: str,
    inputs: Mapping[str, Array],
    out: Mapping[str, jax.ShapeDtypeStruct],
) -> dict[str, Array]:
    """Runs a kernel for every image and `sizes.rows` of its pixels."""
    batch = inputs["x"].shape[0]
    columns = {sizes.channels: sizes.columns, sizes.hidden: sizes.hidden}

    def spec(name: str, x: Array | jax.ShapeDtypeStruct) -> pl.BlockSpec:
        if name == "keep":
            return pl.BlockSpec((1, 1), lambda b, i: (b, 0))
        if len(x.shape) == 3:
            return pl.BlockSpec((None, sizes.rows, columns[x.shape[2]]), lambda b, i: (b, i, 0))
        if len(x.shape) == 4:
            return pl.BlockSpec((None, None, x.shape[2], columns[x.shape[3]]), lambda b, i: (b, i, 0, 0))
        first = columns[x.shape[0]] if name.endswith("kernel") else x.shape[0]
        return pl.BlockSpec((first, columns[x.shape[1]]), lambda b, i: (0, 0))

    def body(*refs: Ref) -> None:
        ins = dict(zip(inputs, refs, strict=False))
        kernel(sizes, ins, dict(zip(out, refs[len(inputs) :], strict=True)))

    results = pl.pallas_call(
        body,
        out_shape=list(out.values()),
        grid=(batch, pl.cdiv(sizes.pixels, sizes.rows)),
        in_specs=[spec(name, x) for name, x in inputs.items()],
        out_specs=[spec(name, x) for name, x in out.items()],
        compiler_params=triton.CompilerParams(num_warps=4 if sizes.columns <= 128 else 8, num_stages=1),
        interpret=platform() == "cpu",
        name=name,
    )(*inputs.values())
    return dict(zip(out, results, strict=True))


def _masks(sizes: Sizes) -> tuple[Array, Array]:
    """Which rows `[R, 1]` and channels `[1, C]` of a tile are no padding."""
    rows = pl.program_id(1) * sizes.rows + lax.broadcasted_iota(jnp.int32, (sizes.rows, 1), 0)
    return rows < sizes.pixels, lax.broadcasted_iota(jnp.int32, (1, sizes.columns), 1) < sizes.channels


def _tile(ref: Ref, mask: Array) -> Array:
    return triton.load(ref, mask=jnp.broadcast_to(mask, ref.shape), other=0)


def _normalized(x: Array, inside: Array, sizes: Sizes) -> tuple[Array, Array]:
    """Returns the rows normalised, and the factor that did it; in float32 or wider."""
    x = x.astype(accumulator(x.dtype))
    centred = jnp.where(inside, x - jnp.sum(x, axis=1, keepdims=True) / sizes.channels, 0)
    variance = jnp.sum(centred * centred, axis=1, keepdims=True) / sizes.channels
    inverse = lax.rsqrt(variance + sizes.epsilon)
    return centred * inverse, inverse


def _product(a: Array, b: Array) -> Array:
    return jnp.dot(a, b, preferred_element_type=accumulator(a.dtype))


def _row(ref: Ref, row: int, inside: Array) -> Array:
    return triton.load(ref.at[pl.ds(row, 1), :], mask=inside, other=0)


def _parts(ins: Mapping[str, Ref], i: Array, inside: Array, sizes: Sizes) -> tuple[Any, Array, Array, Array]:
    """Returns a slice of the hidden channels, and both kernels and the first bias there."""
    part = pl.ds(i * sizes.step, sizes.step)
    shape = (sizes.columns, sizes.step)
    inside = lax.broadcasted_iota(jnp.int32, shape, 0) < sizes.channels
    first = triton.load(ins["fc1_kernel"].at[:, part], mask=inside, other=0)
    second = triton.load(ins["fc2_kernel"].at[part, :], mask=inside.T, other=0)
    return part, first, second, triton.load(ins["fc1_bias"].at[:, part])


def _inputs(ins: Mapping[str, Ref], sizes: Sizes) -> tuple[Array, Array, Array, Array, Array, Array]:
    """Returns the norm's output, the rows normalised, their factors, two masks, and the sample's factor."""
    rows, channels = _masks(sizes)
    inside = rows & channels
    normal, inverse = _normalized(_tile(ins["x"], inside), channels, sizes)
    y = (normal * _row(ins["norm"], 0, channels) + _row(ins["norm"], 1, channels)).astype(ins["x"].dtype)
    return y, normal, inverse, inside, channels, triton.load(ins["keep"])


def _forward_kernel(sizes: Sizes, ins: Mapping[str, Ref], outs: Mapping[str, Ref]) -> None:
    y, _, _, inside, channels, keep = _inputs(ins, sizes)

    def step(i: Array, branch: Array) -> Array:
        _, first, second, bias = _parts(ins, i, channels, sizes)
        with inside_triton():
            active = sizes.activation(_product(y, first) + bias, None)
        return branch + _product(active.astype(y.dtype), second)

    branch = lax.fori_loop(0, sizes.hidden // sizes.step, step, jnp.zeros(y.shape, accumulator(y.dtype)))
    branch = branch + _row(ins["fc2_bias"], 0, channels)
    start = _tile(ins["residual" if sizes.residual else "x"], inside).astype(branch.dtype)
    triton.store(outs["x"], (start + keep * branch).astype(y.dtype), mask=inside)


def _backward_kernel(sizes: Sizes, ins: Mapping[str, Ref], outs: Mapping[str, Ref]) -> None:
    y, normal, inverse, inside, channels, keep = _inputs(ins, sizes)
    rows, _ = _masks(sizes)
    triton.store(outs["normal"], y, mask=inside)
    grad = _tile(ins["grad"], inside)
    branch = (grad * keep).astype(y.dtype)
    valid = jnp.broadcast_to(rows, (sizes.rows, sizes.step))

    def step(i: Array, of_y: Array) -> Array:
        part, first, second, bias = _parts(ins, i, channels, sizes)
        with inside_triton():
            active, vjp = jax.vjp(lambda hidden: sizes.activation(hidden, None), _product(y, first) + bias)
            (of_hidden,) = vjp(_product(branch, second.T))
        of_hidden = jnp.where(valid, of_hidden, 0)
        triton.store(outs["of_hidden"].at[:, part], jnp.sum(of_hidden, axis=0, keepdims=True))
        of_hidden = of_hidden.astype(y.dtype)
        triton.store(outs["hidden"].at[:, part], of_hidden, mask=valid)
        triton.store(outs["active"].at[:, part], (active * keep).astype(y.dtype), mask=valid)
        return of_y + _product(of_hidden, first.T)

    of_y = lax.fori_loop(0, sizes.hidden // sizes.step, step, jnp.zeros(y.shape, accumulator(y.dtype)))
    grad = grad.astype(of_y.dtype)
    for i, total in enumerate((of_y * normal, of_y, grad * keep)):
        triton.store(outs["of_channels"].at[pl.ds(i, 1), :], jnp.sum(total, axis=0, keepdims=True), mask=channels)
    of_normal = of_y * _row(ins["norm"], 0, channels)
    mean, slope = (jnp.sum(part, axis=1, keepdims=True) / sizes.channels for part in (of_normal, of_normal * normal))
    of_x = inverse * (of_normal - mean - normal * slope)
    of_x = of_x if sizes.residual else grad + of_x
    triton.store(outs["x"], of_x.astype(y.dtype), mask=inside)
