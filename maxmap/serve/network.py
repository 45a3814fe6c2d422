"""A checkpoint that computes batches of a few fixed sizes, each compiled once."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from maxmap.data.augment import normalize
from maxmap.explanation import explain
from maxmap.inference import decoded, load_classifier
from maxmap.operations import Array
from maxmap.pictures import overlay
from maxmap.programs import one_image
from maxmap.ranges import Count
from maxmap.tasks import SINGLE_LABEL, require_classes


class Network:
    """What a checkpoint says of images; one thread at a time may ask it.

    Args:
      path: of the checkpoint, as for `maxmap.load`.
      batch_sizes: images that are computed together. A batch is filled up with black images to the next size.

    Attributes:
      info: what the checkpoint says of itself; see `maxmap.load`.
      largest: of the batch sizes.

    Raises:
      UserError: there is no checkpoint, it has no classifier, or its task is another than one class per image.
    """

    def __init__(self, path: str | Path, batch_sizes: tuple[Count, ...]):
        self._model, variables, self.info = load_classifier(path)
        require_classes(self.info, "serve", path)
        self._variables = jax.device_put(variables)
        self._sizes, self.largest = sorted(batch_sizes), max(batch_sizes)

        def compute(variables: Mapping[str, Any], pixels: Array) -> Array:
            return decoded(self._model, SINGLE_LABEL, variables, self._normalised(pixels))

        self._compute = jax.jit(compute)

    def compile(self, *, explained: bool) -> None:
        """Runs every program that requests will need, `explain` only where it is asked for."""
        black = np.zeros((self.largest, *one_image(self.info, pixels=True).shape), np.uint8)
        for size in self._sizes:
            self.classify(black[:size])
        if explained:
            self.explain(black[0], 0)

    def classify(self, images: Sequence[np.ndarray] | np.ndarray) -> np.ndarray:
        """Returns the probabilities of the classes, `[N, K]`.

        Args:
          images: N crops, uint8 `[H, W, C]`, at most `largest`.
        """
        size = next(size for size in self._sizes if size >= len(images))
        batch = np.zeros((size, *images[0].shape), np.uint8)
        batch[: len(images)] = images
        return np.asarray(self._compute(self._variables, batch))[: len(images)]

    def explain(self, image: np.ndarray, label: int) -> np.ndarray:
        """Returns a crop `[H, W, C]` as uint8 `[H, W, 3]`, with Grad-CAM of a class; see `maxmap.explain`."""
        found = explain(self._model, self._variables, self._normalised(jnp.asarray(image)[None]), [label])
        return overlay(image, found.saliency[0])

    def _normalised(self, pixels: Array) -> Array:
        return normalize(pixels, self.info["preprocessing"]["mean"], self.info["preprocessing"]["std"])
