"""What makes a row of an image and its label, bound to the options of `maxmap.data.pipeline.open_data`."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import numpy as np

from maxmap.data import decode
from maxmap.data.labelled import ImageSource, MaskedImages
from maxmap.data.order import SampleOrder
from maxmap.data.paired import check_whole, eval_pair, finest, train_pair
from maxmap.data.preprocessing import check_crop_mode
from maxmap.data.randaugment import fill_color, parse_rand_augment
from maxmap.data.rows import (
    Batch,
    EvalRows,
    Label,
    TrainRows,
    augmented_crop,
    beside_label,
    empty_rows,
    preprocessed_crop,
)
from maxmap.errors import UserError


def train_rows(
    train: ImageSource, crop: Callable[..., tuple[np.ndarray, Label]], size: int, channels: int, order: SampleOrder
) -> TrainRows:
    """Returns what makes training rows of images of `size` pixels."""
    return TrainRows(train, crop, _empty(train, size, channels), order)


def eval_rows(val: ImageSource, preprocessing: Mapping[str, Any], max_pixels: int) -> EvalRows:
    """Returns what makes evaluation rows; an image with more than `max_pixels` counts as broken."""
    size, channels = preprocessing["image_size"], len(preprocessing["mean"])
    if val.label_shape is not None:
        crop = functools.partial(preprocessed_crop, preprocessing=preprocessing, max_pixels=max_pixels)
        return EvalRows(val, functools.partial(beside_label, crop=crop), _empty(val, size, channels))
    check_whole(preprocessing)
    finer = finest(cast(MaskedImages, val).mask_sizes(), preprocessing)
    pair = functools.partial(eval_pair, preprocessing=preprocessing, finer=finer, max_pixels=max_pixels)
    return EvalRows(val, pair, _empty(val, size, channels, finer**2))


def _empty(source: ImageSource, size: int, channels: int, *per_pixel: int) -> Callable[[int], Batch]:
    """Returns what makes rows without content; `per_pixel` is how many pixels of a mask lie at a pixel of an image."""
    shape = source.label_shape
    label = (size, size, *per_pixel) if shape is None else shape
    dtype = np.uint8 if shape is None else np.float32 if shape else np.int32
    return functools.partial(empty_rows, image=(size, size, channels), label=label, dtype=dtype)


def make_train_crop(
    task: str,
    size: int,
    scale: Sequence[float],
    ratio: Sequence[float],
    zoom: tuple[float, float],
    interpolation: str,
    decoding: Mapping[str, Any],
    rand_augment: str | None,
    mean: Sequence[float],
) -> Callable[..., tuple[np.ndarray, Label]]:
    """Returns what makes a training crop of an image, a label and a random generator, after a check of its options."""
    decode.check_filter(interpolation, "--config.data.interpolation", extra=("random",))
    for name, (low, high) in {"scale": scale, "ratio": ratio, "zoom": zoom}.items():
        if low > high:
            raise UserError(f"--config.data.{name}=({low}, {high}) is no range: give the smaller number first.")
    if task == "segmentation":
        if rand_augment:
            raise UserError("data.rand_augment turns images and not their masks: leave it out, or see augment.")
        decoding = {key: decoding[key] for key in ("draft", "max_pixels")}
        return functools.partial(
            train_pair, size=size, zoom=zoom, interpolation=interpolation, mean=tuple(mean), **decoding
        )
    crop = functools.partial(
        decode.train_crop,
        size=size,
        scale=tuple(scale),
        ratio=tuple(ratio),
        interpolation=interpolation,
        **decoding,
    )
    if rand_augment:
        policy = parse_rand_augment(rand_augment)
        crop = functools.partial(augmented_crop, crop=crop, policy=policy, fill=fill_color(mean))
    return functools.partial(beside_label, crop=crop)


def make_preprocessing(
    task: str,
    image_size: int,
    eval_image_size: int | None,
    crop_pct: float,
    crop_mode: str,
    interpolation: str,
    mean: list[float],
    std: list[float],
    exif: bool,
) -> dict[str, Any]:
    """Returns `Data.preprocessing`, after a check of its options."""
    decode.check_filter(interpolation, "--config.data.eval_interpolation")
    check_crop_mode(crop_mode, "--config.data.crop_mode")
    preprocessing = {
        "image_size": eval_image_size or image_size,
        "crop_pct": float(crop_pct),
        "crop_mode": crop_mode,
        "interpolation": interpolation,
        "mean": mean,
        "std": std,
        "exif": exif,
    }
    if task == "segmentation":
        check_whole(preprocessing)
    return preprocessing
