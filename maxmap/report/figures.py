"""The numbers of a report, from the labels and predictions of N images."""

import itertools
import math
from typing import NamedTuple

import numpy as np

from maxmap.metrics import ratio

_95_PERCENT = 1.959963984540054  # standard deviations of a normal distribution on each side


class PerClass(NamedTuple):
    """What holds for each of K classes.

    Attributes:
      support: images of the class, `[K]`.
      precision: share of the images named so that are of the class, `[K]`; NaN where no image is named so.
      recall: share of the images of the class that are named so, `[K]`; NaN for a class without images.
    """

    support: np.ndarray
    precision: np.ndarray
    recall: np.ndarray


class Confusion(NamedTuple):
    """So many `images` of the class `label` are taken for the class `best`: a `share` of those of `label`."""

    label: int
    best: int
    images: int
    share: float


class Calibration(NamedTuple):
    """How well probabilities tell how often a prediction is right (Guo et al., ICML 2017).

    Attributes:
      images: in each of M bins of equal width, `[M]`; bin m has the probabilities in (m / M, (m + 1) / M], the first
        one also 0.
      confidence: mean probability in each bin, `[M]`; NaN in an empty one.
      accuracy: share of right predictions in each bin, `[M]`; NaN in an empty one.
      error: the expected calibration error (ECE): the mean over the images of |accuracy - confidence| of their bin.
    """

    images: np.ndarray
    confidence: np.ndarray
    accuracy: np.ndarray
    error: float


class Agreement(NamedTuple):
    """How often G branches name the same class.

    Attributes:
      pairs: share of the images for which two branches name the same class, `[G, G]`.
      all: share of the images for which all branches do.
      accuracy_agreed: share of right predictions among these images; NaN if there are none.
      accuracy_split: and among the others.
    """

    pairs: np.ndarray
    all: float
    accuracy_agreed: float
    accuracy_split: float


def wilson(right: int, total: int) -> tuple[float, float]:
    """Returns the ends of the 95 % confidence interval of a share, `right` of `total` (Wilson, 1927)."""
    z2 = _95_PERCENT**2
    middle = (right + z2 / 2) / (total + z2)
    half = _95_PERCENT / (total + z2) * math.sqrt(right * (total - right) / total + z2 / 4)
    return max(0.0, middle - half), min(1.0, middle + half)


def per_class(label: np.ndarray, best: np.ndarray, classes: int) -> PerClass:
    """Returns support, precision and recall; `label` and `best` are int `[N]`."""
    support, named = (np.bincount(x, minlength=classes) for x in (label, best))
    right = np.bincount(label[label == best], minlength=classes)
    return PerClass(support, ratio(right, named, math.nan), ratio(right, support, math.nan))


def confusions(label: np.ndarray, best: np.ndarray) -> list[Confusion]:
    """Returns every pair of classes of which one is taken for the other, the most frequent first."""
    wrong = label != best
    pairs, counts = np.unique(np.stack([label[wrong], best[wrong]]), axis=1, return_counts=True)
    support = np.bincount(label)
    found = [
        Confusion(int(one), int(other), int(count), float(count / support[one]))
        for (one, other), count in zip(pairs.T, counts, strict=True)
    ]
    return sorted(found, key=lambda each: (-each.images, -each.share, each.label, each.best))


def calibration(probability: np.ndarray, right: np.ndarray, bins: int) -> Calibration:
    """Returns how well the probabilities of predictions, float `[N]`, fit whether they are right, bool `[N]`.

    A probability that is not a number counts as 0.
    """
    probability = np.nan_to_num(probability)
    place = np.searchsorted(np.arange(1, bins) / bins, probability, side="left")
    images = np.bincount(place, minlength=bins)
    confidence, accuracy = (
        ratio(np.bincount(place, weights=values, minlength=bins), images, math.nan) for values in (probability, right)
    )
    gaps = np.nan_to_num(np.abs(accuracy - confidence))
    return Calibration(images, confidence, accuracy, float(np.sum(images * gaps) / len(right)))


def agreement(branch: np.ndarray, right: np.ndarray) -> Agreement:
    """Returns how often branches agree.

    Args:
      branch: the class that each branch names, int `[G, N]`.
      right: whether the prediction of all together is right, bool `[N]`.
    """
    pairs = np.ones((len(branch), len(branch)))
    for one, other in itertools.combinations(range(len(branch)), 2):
        pairs[one, other] = pairs[other, one] = np.mean(branch[one] == branch[other])
    agreed = np.all(branch == branch[:1], axis=0)
    accuracies = (float(np.mean(right[part])) if part.any() else math.nan for part in (agreed, ~agreed))
    return Agreement(pairs, float(np.mean(agreed)), *accuracies)


def most_wrong(rank: np.ndarray, label_probability: np.ndarray, count: int) -> np.ndarray:
    """Returns the positions of the wrong predictions whose label has the lowest probability, at most `count`."""
    wrong = np.flatnonzero(rank > 1)
    return wrong[np.argsort(np.nan_to_num(label_probability[wrong]), kind="stable")[:count]]


def least_certain(probability: np.ndarray, count: int) -> np.ndarray:
    """Returns the positions of the predictions with the lowest probability, at most `count`."""
    return np.argsort(np.nan_to_num(probability), kind="stable")[:count]
