"""Resizing of position tables to another image size: position embeddings and tables of relative offsets."""

import math
from collections.abc import Sequence

import numpy as np

RESIZES = ("bicubic", "bilinear", "geometric")
RESIZED_LEAVES = (
    "relative_position_bias_table",
    "attention_biases",
    "pos_embed",
)  # the leaves that `resize_table` takes


def to_float32(value: np.ndarray) -> np.ndarray:
    """Returns an array in float32, the array itself if it is that already."""
    return value if value.dtype == np.float32 else value.astype(np.float32)


def resize_table(value: np.ndarray, kind: str, shape: Sequence[int], resize: str) -> np.ndarray | None:
    """Resizes a position table to another shape.

    Where a shape does not give height and width, they are equal. The largest square holds the positions; the rows
    before it hold tokens, which stay as they are.

    Args:
      value: offsets `[heads, H, W]` or `[H * W, heads]`; distances `[heads, H * W]`; positions `[1, H, W, C]` or
        `[1, tokens + H * W, C]`.
      kind: "relative_position_bias_table" for offsets, "attention_biases" for distances or "pos_embed" for positions.
      shape: of the result.
      resize: one of `RESIZES`.

    Returns:
      The table in float32; None if more than height and width differ.
    """
    if value.ndim != len(shape):
        return None
    value = to_float32(value)
    if kind == "pos_embed" and value.ndim == 4 and value.shape[3] == shape[3]:
        return _resize_map(value, shape[1:3], resize, antialias=True)
    if kind == "pos_embed" and value.ndim == 3 and value.shape[2] == shape[2]:
        (old, tokens), (new, new_tokens) = _square(value.shape[1]), _square(shape[1])
        grid = value[:, tokens:].reshape(1, old, old, -1)
        resized = _resize_map(grid, (new, new), resize, antialias=True).reshape(1, new**2, -1)
        return np.concatenate([value[:, :tokens], resized], axis=1) if tokens == new_tokens else None
    if kind == "attention_biases" and value.shape[0] == shape[0] and resize != "geometric":
        (old, rest), (new, new_rest) = _square(value.shape[1]), _square(shape[1])
        if not rest and not new_rest:
            grid = value.reshape(-1, old, old, 1)
            return _resize_map(grid, (new, new), resize, antialias=True).reshape(shape)
    if kind == "relative_position_bias_table" and value.ndim == 3 and value.shape[0] == shape[0]:
        return _resize_map(value[..., None], shape[1:], resize, antialias=False)[..., 0]
    if kind == "relative_position_bias_table" and value.ndim == 2 and value.shape[1] == shape[1]:
        (old, rest), (new, new_rest) = _square(value.shape[0]), _square(shape[0])
        if not rest and not new_rest:
            grid = value.reshape(1, old, old, -1)
            return _resize_map(grid, (new, new), resize, antialias=False).reshape(shape)
    return None


def _square(count: int) -> tuple[int, int]:
    """Returns the side of the largest square of at most `count` pixels, and the number of pixels left."""
    side = math.isqrt(count)
    return side, count - side**2


def table_size(kind: str, shape: Sequence[int]) -> str:
    """Returns height and width of a table of a kind that `resize_table` takes as text, for example "13x13"."""
    if kind == "attention_biases":
        return "{0}x{0}".format(_square(shape[1])[0])
    if len(shape) == 2 or (len(shape) == 3 and shape[0] == 1):
        return "{0}x{0}".format(_square(shape[0] if len(shape) == 2 else shape[1])[0])
    return f"{shape[1]}x{shape[2]}"


def _resize_map(maps: np.ndarray, size: Sequence[int], resize: str, antialias: bool) -> np.ndarray:
    """Resizes maps `[B, H, W, C]`; it computes in float64 and returns float32."""
    rows, columns = (_matrix(old, new, resize, antialias) for old, new in zip(maps.shape[1:3], size, strict=True))
    return np.einsum("oh,bhwc,pw->bopc", rows, maps, columns, optimize=True).astype(np.float32)


def _matrix(old: int, new: int, resize: str, antialias: bool) -> np.ndarray:
    """Returns the weights `[new, old]` of an interpolation along one axis with half-pixel centres, as in PyTorch.

    Bicubic interpolation uses Keys' kernel, with a = -0.5 if antialiased and a = -0.75 if not. Antialiasing widens the
    kernel when the map shrinks, and gives pixels beyond the edge no weight. Without it the edge pixel is repeated.
    """
    if resize == "geometric":
        return _geometric(old, new)
    scale = old / new
    antialias = antialias and resize == "bicubic"
    stretch = max(scale, 1) if antialias else 1.0
    reach = (2 if resize == "bicubic" else 1) * stretch
    centres = (np.arange(new) + 0.5) * scale - 0.5
    taps = np.floor(centres)[:, None] + np.arange(-math.ceil(reach), math.ceil(reach) + 1)
    distance = np.abs(taps - centres[:, None]) / stretch
    weights = np.maximum(1 - distance, 0) if resize == "bilinear" else _cubic(distance, -0.5 if antialias else -0.75)
    if antialias:
        weights = np.where((taps >= 0) & (taps < old), weights, 0)
        weights /= weights.sum(1, keepdims=True)
    matrix = np.zeros((new, old))
    np.add.at(matrix, (np.arange(new)[:, None], np.clip(taps, 0, old - 1).astype(int)), weights)
    return matrix


def _cubic(x: np.ndarray, a: float) -> np.ndarray:
    """Returns the values of Keys' cubic kernel (1981) at distances `x` with parameter `a`."""
    near = ((a + 2) * x - (a + 3)) * x**2 + 1
    far = a * (((x - 5) * x + 8) * x - 4)
    return np.where(x <= 1, near, np.where(x < 2, far, 0))


def _geometric(old: int, new: int) -> np.ndarray:
    """Returns weights `[new, old]` that interpolate linearly between offsets spaced geometrically, as in timm.

    The new offsets are integers. The old ones lie at distances that grow by a ratio. The ratio, found by bisection of
    (1.01, 1.5) to 1e-6, puts the outermost old offset at `new // 2`. As in timm, the last midpoint is the result.
    Beyond the ends the outermost value is repeated.
    """
    low, high = 1.01, 1.5
    while high - low > 1e-6:
        ratio = (low + high) / 2
        low, high = (low, ratio) if sum(ratio**i for i in range(old // 2)) > new // 2 else (ratio, high)
    steps = np.cumsum([0.0, *(ratio**i for i in range(old // 2))])
    known = np.concatenate([-steps[:0:-1], steps])
    wanted = np.arange(-(new // 2), new // 2 + 1)
    return np.stack([np.interp(wanted, known, one) for one in np.eye(old)], axis=1)
