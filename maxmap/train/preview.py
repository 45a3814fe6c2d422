"""A picture of a training batch as the network sees it: look at it before training."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, TypeAlias

import jax
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from maxmap import storage
from maxmap.errors import UserError, printable
from maxmap.ranges import Count, Range, check_arguments
from maxmap.recipe import Recipe
from maxmap.schedule import MOST_STEPS
from maxmap.train.build import Images, make_prepare

Step: TypeAlias = Annotated[int, Range(at_least=0, at_most=MOST_STEPS)]

CELL = 160  # pixels of an image in the picture, or a little more
CAPTION = 30  # and of the two lines under it


def show_batch(recipe: Recipe, path: str | Path, *, step: Step = 0, count: Count = 16) -> None:
    """Writes the first images of a step's first micro-batch, augmented, mixed and erased, with their targets.

    These are the very images that a run of this recipe trains on, by (seed, step).

    Args:
      recipe: Of the run.
      path: of the picture; its ending says the format.
      step: of the run.
      count: images shown.

    Raises:
      UserError: something in the config or the data does not fit, or the picture cannot be written.
    """
    check_arguments(show_batch, "", locals())
    data = recipe.data()
    prepare = make_prepare(recipe, Images.of(data))
    key = jax.random.fold_in(jax.random.split(jax.random.key(recipe.seed))[1], step)
    accumulate = recipe.accumulate
    if accumulate > 1:
        key = jax.random.split(key, accumulate)[0]
    batches = data.train_batches(recipe.batch_size, seed=recipe.seed, start_step=step, num_steps=1)
    batch = next(batches)
    batches.close()
    images, labels = batch["image"][::accumulate], batch["label"][::accumulate]
    prepared, targets = jax.jit(prepare)(jax.random.split(key)[0], images, labels)
    mean, std = (np.asarray(data.preprocessing[name], np.float32) for name in ("mean", "std"))
    pixels = np.clip(np.rint(255 * (np.asarray(prepared[:count]) * std + mean)), 0, 255).astype(np.uint8)
    captions = [caption(target, data.classes) for target in np.asarray(targets[:count])]
    try:
        draw_grid(pixels, captions).save(storage.expand(path))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot write the picture {path} ({error}): give another --out, such as batch.png.") from error


def caption(target: np.ndarray, classes: Sequence[str]) -> str:
    """The two likeliest classes of a target `[K]`, a line each; the second only where mixing gave it weight."""
    order = np.argsort(-target, kind="stable")
    shown = [index for index in order[:2] if target[index] > np.min(target) + 0.005 or index == order[0]]
    return "\n".join(f"{100 * target[index]:.0f} % {printable(classes[index])}" for index in shown)


def draw_grid(images: np.ndarray, captions: Sequence[str]) -> Image.Image:
    """Draws images `[N, H, W, 3]` in rows, each with its caption below; small ones are enlarged by whole factors."""
    count, height, width, _ = images.shape
    times = max(1, CELL // max(height, width))
    columns = int(np.ceil(np.sqrt(count)))
    rows = -(-count // columns)
    cell = (times * width + 6, times * height + CAPTION)
    picture = Image.new("RGB", (columns * cell[0], rows * cell[1]), "white")
    draw = ImageDraw.Draw(picture)
    font = ImageFont.load_default(size=11)
    for i, (image, text) in enumerate(zip(images, captions, strict=True)):
        left, top = (i % columns) * cell[0] + 3, (i // columns) * cell[1] + 3
        enlarged = Image.fromarray(image).resize((times * width, times * height), Image.Resampling.NEAREST)
        picture.paste(enlarged, (left, top))
        lines = "\n".join(line[: max(8, times * width // 6)] for line in text.split("\n"))
        draw.multiline_text((left, top + times * height), lines, fill="black", font=font, spacing=1)
    return picture
