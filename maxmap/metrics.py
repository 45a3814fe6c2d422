"""Figures of a whole evaluation split, exact: over every image at once, in float64."""

import numpy as np

IGNORED = 255  # in place of a class: a pixel that does not count, in ADE20K's, Cityscapes' and PASCAL VOC's masks


def average_precision(truth: np.ndarray, scores: np.ndarray) -> float | None:
    """Returns the average precision of one class: the mean, over its images, of the precision at their rank.

    Images with equal scores share the precision behind the last of them; there is no interpolation. A score that is not
    a number ranks last.

    Args:
      truth: whether an image has the class, `[N]`.
      scores: `[N]`, larger for more likely.

    Returns:
      0 to 1; None where no image has the class.
    """
    from sklearn.metrics import average_precision_score  # a second to import, and few evaluations need it

    return float(average_precision_score(truth, _ranked(scores))) if truth.any() else None


def best_threshold(truth: np.ndarray, scores: np.ndarray) -> tuple[float, float]:
    """Returns the score from which on images count as having the class, so that F1 is largest, and that F1."""
    from sklearn.metrics import precision_recall_curve

    precision, recall, thresholds = precision_recall_curve(truth, _ranked(scores))
    f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-300)
    best = int(np.argmax(f1[:-1]))  # the last one is of no image at all
    return float(thresholds[best]), float(f1[best])


def _ranked(scores: np.ndarray) -> np.ndarray:
    """Returns scores that are numbers: scikit-learn refuses others."""
    return np.where(np.isnan(scores), -1.0, np.asarray(scores, np.float64))


def confusion_matrix(truth: np.ndarray, found: np.ndarray, classes: int) -> np.ndarray:
    """Counts pairs of the right class, the rows, and the one that was found: int64 `[K, K]` of ints `[N]`."""
    pairs = classes * truth.astype(np.int64) + found
    return np.bincount(pairs, minlength=classes**2).reshape(classes, classes)


def ratio(part: np.ndarray, whole: np.ndarray, empty: float) -> np.ndarray:
    """Returns part / whole in float64, `empty` where the whole is 0."""
    part, whole = np.asarray(part, np.float64), np.asarray(whole, np.float64)
    return np.divide(part, whole, out=np.full_like(part, empty), where=whole > 0)


def precision_recall_f1(right: np.ndarray, given: np.ndarray, found: np.ndarray) -> tuple[np.ndarray, ...]:
    """Returns precision, recall and F1; each is 0 where its denominator is.

    Args:
      right: number of answers that are right.
      given: number of answers.
      found: number of answers that there should be.
    """
    return ratio(right, given, 0.0), ratio(right, found, 0.0), ratio(2 * right, given + found, 0.0)


def pearson(x: np.ndarray, y: np.ndarray) -> float:
    """Returns the linear correlation (PLCC) of two rows `[N]`; 0 where one of them is constant or not finite."""
    if any(not np.isfinite(row).all() or np.ptp(row) == 0 for row in (x, y)):
        return 0.0
    x, y = (row / np.linalg.norm(row) for row in (np.float64(x) - np.mean(x), np.float64(y) - np.mean(y)))
    return float(np.sum(x * y))


def spearman(x: np.ndarray, y: np.ndarray) -> float:
    """Returns the rank correlation (SRCC) of two rows `[N]`: the linear one of their ranks; ties have their mean."""
    return pearson(average_ranks(x), average_ranks(y))


def average_ranks(values: np.ndarray) -> np.ndarray:
    """Returns the ranks of values `[N]`, 1 for the smallest; equal values have the mean of their ranks."""
    _, places, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[places]


def r_squared(truth: np.ndarray, values: np.ndarray) -> float:
    """Returns the coefficient of determination of two rows `[N]`: 1 - squared error / variance of the truth.

    Where the truth is constant it is 1 for a perfect row and 0 for any other; -inf where a value is not finite.
    """
    truth, values = np.asarray(truth, np.float64), np.asarray(values, np.float64)
    error = np.sum(np.square(truth - values))
    spread = np.sum(np.square(truth - np.mean(truth)))
    if not np.isfinite(error):
        return -np.inf
    if spread == 0:
        return float(error == 0)
    return float(1 - error / spread)
