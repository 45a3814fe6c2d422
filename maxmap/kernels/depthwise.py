"""Depthwise convolutions in Pallas for TPUs, alone or behind a 1x1 convolution and an activation.

Maps are `[H, W, B, C]`, XLA's own layout for convolutions on TPUs: shifts along height and width are offsets of whole
registers, of 8 images and 128 channels. The map between the two convolutions never leaves the chip: both directions
compute it from the input.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from maxmap.kernels.mosaic import IMAGES, LANES, Ref, call, lanes_of, part, product, whole
from maxmap.kernels.target import Array, accumulator, over_batch
from maxmap.kernels.xla import Pads

Index = int | Array
Map = Array | jax.ShapeDtypeStruct
Activation = Callable[[Array], Array]

ROWS = 14  # of the input, at most, in one program
COLUMNS = 8  # at most, that are computed at a time, in registers


@dataclasses.dataclass(frozen=True)
class Window:
    """A depthwise convolution.

    Attributes:
      size: of both axes of the kernel.
      stride: of both axes; it divides height and width of the input, and the output's are the quotients.
      pads: zeros before height and width.
      activation: of the values that the kernel reads, behind the 1x1 convolution.
    """

    size: int
    stride: int
    pads: tuple[int, int]
    activation: Activation | None = None

    def taps(self, axis: int, phase: int) -> list[tuple[int, int]]:
        """Kernel positions that meet input pixels `stride * n + phase`, and where: output pixel n + the second."""
        met = ((phase + self.pads[axis] - k, k) for k in range(self.size))
        return [(k, distance // self.stride) for distance, k in met if distance % self.stride == 0]

    def halo(self, axis: int) -> tuple[int, int]:
        """Output pixels before and after those of a tile whose gradients meet the tile's input pixels."""
        pad = self.pads[axis]
        return (self.size - 1 - pad) // self.stride, -(-pad // self.stride)


def fits(shape: Sequence[int], channels: int, kernel_size: int, stride: int, pads: Pads, devices: int) -> bool:
    """Tells whether the kernels take maps `[B, H, W, I]` to `channels` channels on so many devices."""
    batch, *size, _ = shape
    outputs = [(n + sum(pad) - kernel_size) // stride + 1 for n, pad in zip(size, pads, strict=True)]
    return (
        batch % (IMAGES * devices) == 0
        and kernel_size >= stride
        and all(n == stride * out for n, out in zip(size, outputs, strict=True))
        and all(pad[0] < kernel_size and kernel_size - stride >= pad[0] for pad in pads)
        and (channels % LANES == 0 or channels <= 4 * LANES)
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def depthwise(x: Array, kernel: Array, window: Window, beside: bool = False) -> tuple[Array, ...]:
    """Depthwise convolution of `[H, W, B, C]` with `[k, k, C]`.

    Returns:
      `[H', W', B, C]`; with `beside` also `x`, to be read in its stead by another path: the gradients are added in the
      kernel.
    """
    return _depthwise_forward(x, kernel, window, beside)[0]


def _depthwise_forward(
    x: Array, kernel: Array, window: Window, beside: bool
) -> tuple[tuple[Array, ...], tuple[Array, Array]]:
    y, _ = over_batch(functools.partial(_forward_call, window=window), (x, kernel), (2, None), (2, None))
    return (y, x) if beside else (y,), (x, kernel)


def _depthwise_backward(
    window: Window, beside: bool, residuals: tuple[Array, Array], grads: tuple[Array, ...]
) -> tuple[Array, Array]:
    x, kernel = residuals
    of_x, of_kernel = over_batch(
        functools.partial(_backward_alone_call, window=window),
        (x, kernel, *grads),
        (2, None, *[2] * len(grads)),
        (2, None),
    )
    return of_x, of_kernel.reshape(kernel.shape).astype(kernel.dtype)


depthwise.defvjp(_depthwise_forward, _depthwise_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def expand_depthwise(x: Array, pointwise: tuple[Array, ...], kernel: Array, window: Window) -> tuple[Array, Array]:
    """Convolves `activation(x @ weights + bias)` with one kernel per channel.

    Products have the type of `x` and sum in float32 or wider; all else is computed in that wider type.

    Args:
      x: `[H, W, B, I]`.
      pointwise: weights `[I, C]` and bias `[C]`.
      kernel: `[k, k, C]`.
      window: what the kernel does.

    Returns:
      The map `[H', W', B, C]` in the type of `x`, and its sum and sum of squares over all pixels, `[2, C]`, in float32
      or wider.
    """
    return forward(x, pointwise, kernel, window)[0]


def forward(
    x: Array, pointwise: tuple[Array, ...], kernel: Array, window: Window
) -> tuple[tuple[Array, Array], tuple[Array, tuple[Array, ...], Array, Array]]:
    """The results of `expand_depthwise`, and what its backward pass needs: the operands, `x` first, and the map."""
    compute = functools.partial(_forward_call, window=window)
    y, sums = over_batch(compute, (x, kernel, *pointwise), (2, None, *[None] * len(pointwise)), (2, None))
    return (y, sums), (x, pointwise, kernel, y)


def backward(
    window: Window, residuals: tuple[Array, tuple[Array, ...], Array, Array], grads: tuple[Array, Array]
) -> tuple[Array, tuple[Array, ...], Array]:
    """The gradients of `x`, of what belongs to the 1x1 convolution, and of the kernel."""
    x, pointwise, kernel, y = residuals
    shared = [None] * len(pointwise)
    of_x, of_kernel, *of_pointwise = over_batch(
        functools.partial(_backward_expanded_call, window=window),
        (x, grads[0], y, kernel, grads[1], *pointwise),
        (2, 2, 2, None, None, *shared),
        (2, None, *shared),
    )
    of_kernel = of_kernel.reshape(kernel.shape).astype(kernel.dtype)
    return of_x, tuple(g.astype(leaf.dtype) for g, leaf in zip(of_pointwise, pointwise, strict=True)), of_kernel


expand_depthwise.defvjp(forward, backward)


@dataclasses.dataclass(frozen=True)
class _Tiles:
    """How a call is cut: a grid of images, rows and channels, the last innermost, so that `x` is loaded once."""

    images: int
    rows: int  # of the output
    lanes: int
    grid: tuple[int, int, int]

    @classmethod
    def of(cls, y: Map, stride: int) -> "_Tiles":
        height, _, batch, channels = y.shape
        rows = max(n for n in range(1, height + 1) if height % n == 0 and (n == 1 or n * stride <= ROWS))
        lanes = lanes_of(channels)
        return cls(IMAGES, rows, lanes, (batch // IMAGES, height // rows, channels // lanes))

    def tile(self, x: Map, rows: int, *, whole: bool, halo: tuple[int, int] = (0, 0)) -> list[pl.BlockSpec]:
        """Blocks of `rows` rows of a map, and the single rows above and below; `whole` for all channels."""
        height, width, _, channels = x.shape
        lanes = channels if whole else self.lanes

        def spec(count: int, row: Callable[[Array], Array]) -> pl.BlockSpec:
            shape = (count, width, self.images, lanes)
            return pl.BlockSpec(shape, lambda b, t, c: (row(t), 0, b, 0 if whole else c))

        beside = [i - halo[0] for i in range(halo[0])] + [rows + i for i in range(halo[1])]
        rows_beside = (functools.partial(lambda i, t: jnp.clip(t * rows + i, 0, height - 1), i) for i in beside)
        return [spec(rows, lambda t: t), *(spec(1, row) for row in rows_beside)]

    def channels(self, x: Array) -> pl.BlockSpec:
        """Blocks of the last axis of a matrix."""
        return pl.BlockSpec((x.shape[0], self.lanes), lambda b, t, c: (0, c))


def _name(kind: str, x: Array, channels: int, window: Window) -> str:
    return f"depthwise{window.size}_{kind}_{'x'.join(map(str, x.shape))}_{channels}_stride{window.stride}"


def _pointwise(x: Array, pointwise: Sequence[Array]) -> list[Array]:
    """The weights in the type of products, and the bias in that of sums, as a matrix."""
    if not pointwise:
        return []
    weights, bias = pointwise
    return [weights.astype(x.dtype), bias.astype(accumulator(x.dtype))[None]]


def _forward_call(x: Array, kernel: Array, *pointwise: Array, window: Window) -> tuple[Array, Array]:
    (height, width, batch, _), channels, stride = x.shape, kernel.shape[-1], window.stride
    wide = accumulator(x.dtype)
    out = jax.ShapeDtypeStruct((height // stride, width // stride, batch, channels), x.dtype)
    out_sums = jax.ShapeDtypeStruct((2, 8, channels), wide)
    tiles = _Tiles.of(out, stride)
    halo = (window.pads[0], window.size - stride - window.pads[0])
    inputs = [kernel.reshape(-1, channels).astype(wide), *_pointwise(x, pointwise)]
    rows = tiles.rows * stride
    columns = -(-(window.size - stride) // stride) + width // stride
    x_specs = tiles.tile(x, rows, whole=bool(pointwise), halo=halo)
    y, sums = call(
        functools.partial(_forward_kernel, window=window, tiles=tiles, halo=halo),
        _name("forward", x, channels, window),
        tiles.grid,
        [out, out_sums],
        in_specs=[*x_specs, *map(tiles.channels, inputs)],
        out_specs=[*tiles.tile(out, tiles.rows, whole=False), whole(out_sums)],
        scratch_shapes=[pltpu.VMEM((rows + sum(halo), columns, stride, tiles.images, tiles.lanes), wide)],
    )(*[x] * len(x_specs), *inputs)
    return y, jnp.sum(sums, axis=1)


def _forward_kernel(*refs: Ref, window: Window, tiles: _Tiles, halo: tuple[int, int]) -> None:
    x_ref, *beside = refs[: 1 + sum(halo)]
    kernel_ref, *pointwise, y_ref, sums_ref, read_ref = refs[1 + sum(halo) :]
    b, t, c = (pl.program_id(axis) for axis in range(3))
    stride, rows, lanes = window.stride, x_ref.shape[0], part(c, tiles.lanes, sums_ref.shape[-1])
    columns = y_ref.shape[1]
    pads_before, pads_after = -(-window.pads[1] // stride), window.pads[1] // stride + columns

    @pl.when((b == 0) & (t == 0) & (c == 0))
    def _() -> None:
        _, end, *pixels = read_ref.shape
        for beyond in (range(pads_before), range(pads_after, end)):  # the columns beside the map stay zero
            for column in beyond:
                read_ref[:, column] = jnp.zeros((read_ref.shape[0], *pixels), read_ref.dtype)

    @pl.when((b == 0) & (t == 0))
    def _() -> None:
        sums_ref[:, :, lanes] = jnp.zeros((*sums_ref.shape[:2], tiles.lanes), sums_ref.dtype)

    def fill(to: Index, ref: Ref, row: Index, inside: Array | None = None) -> None:
        value = _expanded(ref, row, pointwise, window, read_ref.dtype)[0]
        if inside is not None:
            value = jnp.where(inside, value, 0)
        value = value.reshape(columns, stride, *value.shape[1:])
        for phase in range(stride):
            first, place = divmod(phase + window.pads[1], stride)
            read_ref[to, first : first + columns, place] = value[:, phase]

    for i, ref in enumerate(beside[: halo[0]]):
        fill(i, ref, 0, t * rows + i >= halo[0])
    lax.fori_loop(0, rows, lambda i, _: fill(halo[0] + i, x_ref, i), None)
    for i, ref in enumerate(beside[halo[0] :]):
        fill(halo[0] + rows + i, ref, 0, (t + 1) * rows + i < tiles.grid[1] * rows)

    step = _divisor(columns)

    def convolve(n: Array, _: None) -> None:
        row, first = lax.div(n, columns // step), lax.rem(n, columns // step) * step
        total = jnp.zeros((step, tiles.images, tiles.lanes), read_ref.dtype)
        for i in range(window.size):
            for phase in range(min(stride, window.size)):
                reach = (window.size - 1 - phase) // stride
                values = read_ref[row * stride + i, pl.ds(first, step + reach), phase]
                for j in range(reach + 1):
                    k = i * window.size + j * stride + phase
                    total += values[j : j + step] * kernel_ref[k : k + 1][None]
        y_ref[row, pl.ds(first, step)] = total.astype(y_ref.dtype)
        sums_ref[0, :, lanes] += _fold(total)
        sums_ref[1, :, lanes] += _fold(jnp.square(total))

    lax.fori_loop(0, y_ref.shape[0] * (columns // step), convolve, None)


def _backward_alone_call(
    x: Array, kernel: Array, of_y: Array, of_beside: Array | None = None, *, window: Window
) -> tuple[Array, ...]:
    return _backward_call(x, of_y, kernel, of_beside=of_beside, window=window)


def _backward_expanded_call(
    x: Array, of_y: Array, y: Array, kernel: Array, of_sums: Array, *pointwise: Array, window: Window
) -> tuple[Array, ...]:
    return _backward_call(x, of_y, kernel, y, of_sums, pointwise, window=window)


def _backward_call(
    x: Array,
    of_y: Array,
    kernel: Array,
    y: Array | None = None,
    of_sums: Array | None = None,
    pointwise: Sequence[Array] = (),
    *,
    of_beside: Array | None = None,
    window: Window,
) -> tuple[Array, ...]:
    """The gradients that follow from that of the map, and from those of its sums or of `x` beside it."""
    (_, width, _, in_channels), channels, stride = x.shape, kernel.shape[-1], window.stride
    wide = accumulator(x.dtype)
    tiles = _Tiles.of(of_y, stride)
    inputs = [kernel.reshape(-1, channels).astype(wide)]
    inputs += [] if of_sums is None else [of_sums.astype(wide)]
    inputs += _pointwise(x, pointwise)
    totals: list[tuple[int, ...]] = [(window.size**2, 8, channels)]
    totals += [(in_channels, channels), (8, channels)] if pointwise else []
    out = [jax.ShapeDtypeStruct(x.shape, x.dtype), *(jax.ShapeDtypeStruct(shape, wide) for shape in totals)]
    pixels = (tiles.images, tiles.lanes)
    line = (width // stride, stride, *pixels)
    line_dtypes = (wide, wide, x.dtype) if pointwise else (wide, wide)
    scratch = [
        pltpu.VMEM((tiles.rows + sum(window.halo(0)), width // stride + sum(window.halo(1)), *pixels), wide),
        *(pltpu.VMEM(line, dtype) for dtype in line_dtypes),
    ]
    if pointwise and tiles.grid[2] > 1:
        scratch.append(pltpu.VMEM((tiles.rows * stride, width * tiles.images, in_channels), wide))
    (x_spec,) = tiles.tile(x, tiles.rows * stride, whole=bool(pointwise))
    y_specs = tiles.tile(of_y, tiles.rows, whole=False, halo=window.halo(0))
    maps = [*[of_y] * len(y_specs), *([] if y is None else [y] * len(y_specs))]
    beside = [] if of_beside is None else [of_beside]
    of_x, of_kernel, *of_pointwise = call(
        functools.partial(_backward_kernel, window=window, tiles=tiles, beside=len(beside)),
        _name("backward", x, channels, window),
        tiles.grid,
        out,
        in_specs=[
            x_spec,
            *[x_spec] * len(beside),
            *y_specs * (len(maps) // len(y_specs)),
            *map(tiles.channels, inputs),
        ],
        out_specs=[x_spec, *map(whole, out[1:])],
        scratch_shapes=scratch,
    )(x, *beside, *maps, *inputs)
    of_kernel = jnp.sum(of_kernel, axis=1)
    if not pointwise:
        return of_x, of_kernel
    of_weights, of_bias = of_pointwise
    return of_x, of_kernel, of_weights, jnp.sum(of_bias, axis=0)


def _backward_kernel(*refs: Ref, window: Window, tiles: _Tiles, beside: int) -> None:
    halo, expands = window.halo(0), window.activation is not None
    count = 1 + sum(halo)
    x_ref, *beside_ref = refs[: 1 + beside]
    refs = refs[1 + beside :]
    of_y_refs, refs = refs[:count], refs[count:]
    if expands:
        y_refs, (kernel_ref, of_sums_ref, *pointwise), refs = refs[:count], refs[count : count + 4], refs[count + 4 :]
        of_x_ref, of_kernel_ref, *of_pointwise = refs[:4]
        grad_ref, value_ref, slope_ref, line_ref, *total_ref = refs[4:]
    else:
        kernel_ref, of_x_ref, of_kernel_ref, grad_ref, value_ref, line_ref = refs
        y_refs, pointwise, of_pointwise = of_y_refs, [], []
    b, t, c = (pl.program_id(axis) for axis in range(3))
    stride, lanes, rows = window.stride, part(c, tiles.lanes, of_kernel_ref.shape[-1]), tiles.rows
    columns, left = line_ref.shape[0], window.halo(1)[0]
    wide = grad_ref.dtype

    @pl.when((b == 0) & (t == 0) & (c == 0))
    def _() -> None:
        grad_ref[...] = jnp.zeros(grad_ref.shape, wide)
        for ref in (of_kernel_ref, *of_pointwise):
            ref[...] = jnp.zeros(ref.shape, wide)

    def fill(to: Index, of_y: Ref, y: Ref, row: Index, inside: Array | None = None) -> None:
        value = of_y[row].astype(wide)
        if expands:
            value += 2 * y[row].astype(wide) * of_sums_ref[1:2][None] + of_sums_ref[0:1][None]
        grad_ref[to, left : left + columns] = value if inside is None else jnp.where(inside, value, 0)

    for i in range(halo[0]):
        fill(i, of_y_refs[1 + i], y_refs[1 + i], 0, t * rows + i >= halo[0])
    lax.fori_loop(0, rows, lambda i, _: fill(halo[0] + i, of_y_refs[0], y_refs[0], i), None)
    for i in range(halo[1]):
        ref = 1 + halo[0] + i
        fill(halo[0] + rows + i, of_y_refs[ref], y_refs[ref], 0, (t + 1) * rows + i < tiles.grid[1] * rows)

    step = _divisor(columns)

    def chunk(n: Array, _: None, row: Array, phase: int) -> None:
        first = n * step
        for place in range(stride):
            value = value_ref[pl.ds(first, step), place]
            total = jnp.zeros(value.shape, wide)
            for i, down in window.taps(0, phase):
                for j, right in window.taps(1, place):
                    grad = grad_ref[row + down + halo[0], pl.ds(first + right + left, step)]
                    k = i * window.size + j
                    total += grad * kernel_ref[k : k + 1][None]
                    of_kernel_ref[k, :, lanes] += _fold(grad * value)
            if expands:
                total *= slope_ref[pl.ds(first, step), place]
                of_pointwise[1][:, lanes] += _fold(total)
            line_ref[pl.ds(first, step), place] = total.astype(line_ref.dtype)

    def row(n: Array, _: None) -> None:
        for phase in range(stride):
            at = n * stride + phase
            value, slope = _expanded(x_ref, at, pointwise, window, wide)
            value_ref[...] = value.reshape(value_ref.shape)
            if slope is not None:
                slope_ref[...] = slope.reshape(slope_ref.shape)
            lax.fori_loop(0, columns // step, functools.partial(chunk, row=n, phase=phase), None)
            if not expands:
                total = line_ref[...].reshape(of_x_ref.shape[1:])
                for ref in beside_ref:
                    total += ref[at].astype(wide)
                of_x_ref[at] = total.astype(of_x_ref.dtype)
                continue
            line = line_ref[...].reshape(-1, tiles.lanes)
            pixels = x_ref[at].reshape(-1, x_ref.shape[-1])
            of_pointwise[0][:, lanes] += product(pixels, line, 0, 0)
            total = product(line, pointwise[0][...], 1, 1)
            if total_ref:
                total += jnp.where(c == 0, 0, total_ref[0][at])
                total_ref[0][at] = total
            of_x_ref[at] = total.reshape(of_x_ref.shape[1:]).astype(of_x_ref.dtype)

    lax.fori_loop(0, rows, row, None)


def _expanded(
    ref: Ref, row: Index, pointwise: Sequence[Ref], window: Window, wide: jnp.dtype
) -> tuple[Array, Array | None]:
    """One row `[W, B, C]` of what the depthwise kernel reads, and the activation's slope there."""
    x = ref[row]
    if not pointwise or window.activation is None:
        return x.astype(wide), None
    h = product(x.reshape(-1, x.shape[-1]), pointwise[0][...], 1, 0) + pointwise[1][...]
    value, slope = jax.jvp(window.activation, (h,), (jnp.ones_like(h),))
    shape = (*x.shape[:-1], -1)
    return value.reshape(shape), slope.reshape(shape)


def _divisor(columns: int) -> int:
    return max(n for n in range(1, COLUMNS + 1) if columns % n == 0)


def _fold(x: Array) -> Array:
    """Sums `[n, images, C]` to one register of rows, `[8, C]`."""
    return jnp.sum(x.reshape(-1, 8, x.shape[-1]), axis=0)
