"""A picture of a training batch as the network sees it: look at it before training."""

from pathlib import Path
from typing import Annotated, TypeAlias

import jax
import numpy as np

from maxmap.pictures import draw_grid, lay_mask, save_picture
from maxmap.ranges import Count, Range, check_arguments
from maxmap.recipe import Recipe
from maxmap.schedule import MOST_STEPS
from maxmap.train.build import Images, make_prepare

Step: TypeAlias = Annotated[int, Range(at_least=0, at_most=MOST_STEPS)]


def show_batch(recipe: Recipe, path: str | Path, *, step: Step = 0, count: Count = 16) -> None:
    """Writes the first images of a step's first micro-batch, augmented, mixed and erased, with their targets or masks.

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
    about = Images.of(data)
    prepare = make_prepare(recipe, about)
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
    if about.task.dense:
        pixels = np.stack([lay_mask(*pair) for pair in zip(pixels, np.asarray(targets[:count]), strict=True)])
    captions = [about.task.caption(target, data.classes) for target in np.asarray(targets[:count])]
    save_picture(draw_grid(pixels, captions), path)
