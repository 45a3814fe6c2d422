"""The numbers of a report: each against a plain loop over the images, or a number worked out by hand."""

import math

import numpy as np
import pytest
from scipy.stats import binomtest

from maxmap.metrics import confusion_matrix
from maxmap.report.figures import (
    Confusion,
    agreement,
    calibration,
    confusions,
    least_certain,
    most_wrong,
    per_class,
    wilson,
)

LABEL, BEST = np.array([0, 0, 0, 1, 1, 3, 3, 3]), np.array([0, 1, 1, 1, 0, 3, 0, 0])  # nothing is of class 2


@pytest.mark.parametrize(("right", "total"), [(0, 1), (1, 1), (0, 360), (350, 360), (360, 360), (41234, 50_000)])
def test_the_interval_is_wilsons(right, total):
    wanted = binomtest(right, total).proportion_ci(0.95, method="wilson")
    assert wilson(right, total) == pytest.approx((wanted.low, wanted.high), abs=1e-12)


def test_the_classes_by_hand():
    found = per_class(LABEL, BEST, 4)
    assert found.support.tolist() == [3, 2, 0, 3]
    np.testing.assert_array_equal(found.recall, [1 / 3, 1 / 2, math.nan, 1 / 3])
    np.testing.assert_array_equal(found.precision, [1 / 4, 1 / 3, math.nan, 1])
    assert confusion_matrix(LABEL, BEST, 4).tolist() == [[1, 2, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0], [2, 0, 0, 1]]
    assert confusions(LABEL, BEST) == [
        Confusion(0, 1, 2, pytest.approx(2 / 3)),
        Confusion(3, 0, 2, pytest.approx(2 / 3)),
        Confusion(1, 0, 1, 0.5),
    ]
    assert confusions(LABEL, LABEL) == []


def test_the_classes_by_counting():
    rng = np.random.default_rng(0)
    label, best = rng.integers(0, 30, (2, 400))
    matrix, found = confusion_matrix(label, best, 31), per_class(label, best, 31)
    for k in range(31):
        of_class, named = ([i for i in range(400) if which[i] == k] for which in (label, best))
        for other in range(31):
            assert matrix[k, other] == sum(best[i] == other for i in of_class)
        assert found.support[k] == len(of_class)
        if k < 30:
            assert found.recall[k] == pytest.approx(np.mean([best[i] == k for i in of_class]))
            assert found.precision[k] == pytest.approx(np.mean([label[i] == k for i in named]))
    pairs = {(each.label, each.best): each.images for each in confusions(label, best)}
    assert pairs == {(i, j): matrix[i, j] for i, j in np.argwhere(matrix) if i != j}


@pytest.mark.parametrize("bins", [1, 10, 15])
def test_calibration_by_counting(bins):
    """With probabilities on the edges of the bins, 0, 1 and one that is no number."""
    rng = np.random.default_rng(bins)
    probability = np.concatenate([rng.random(200), np.arange(bins + 1) / bins, [math.nan]])
    right = rng.random(len(probability)) < 0.6
    found = calibration(probability, right, bins)
    error = 0.0
    for m in range(bins):
        low, high = m / bins, (m + 1) / bins
        inside = [
            i for i, value in enumerate(np.nan_to_num(probability)) if low < value <= high or (m == 0 and value == 0)
        ]
        confidence, accuracy = np.mean(np.nan_to_num(probability)[inside]), np.mean(right[inside])
        assert found.images[m] == len(inside)
        assert (found.confidence[m], found.accuracy[m]) == pytest.approx((confidence, accuracy))
        error += len(inside) / len(probability) * abs(accuracy - confidence)
    assert found.error == pytest.approx(error)


def test_calibration_by_hand():
    """Two images at 0.9 of which one is right, two at 0.2 that are wrong; 13 of 15 bins are empty."""
    found = calibration(np.array([0.9, 0.9, 0.2, 0.2]), np.array([True, False, False, False]), 15)
    assert found.error == pytest.approx(0.5 * 0.4 + 0.5 * 0.2)
    assert found.images.tolist() == [0, 0, 2, *[0] * 10, 2, 0] and np.isnan(found.accuracy).sum() == 13


def test_agreement_by_hand():
    branch = np.array([[0, 1, 2, 2], [0, 1, 2, 0], [0, 1, 1, 1]])
    found = agreement(branch, np.array([True, False, True, True]))
    np.testing.assert_array_equal(found.pairs, [[1, 0.75, 0.5], [0.75, 1, 0.5], [0.5, 0.5, 1]])
    assert (found.all, found.accuracy_agreed, found.accuracy_split) == (0.5, 0.5, 1.0)
    assert math.isnan(agreement(branch[:1], np.ones(4, bool)).accuracy_split)


def test_which_images_are_shown():
    rank, of_label = np.array([1, 2, 9, 2, 3]), np.array([0.01, 0.4, 0.3, math.nan, 0.0])
    assert most_wrong(rank, of_label, 3).tolist() == [3, 4, 2] and most_wrong(rank, of_label, 9).tolist() == [
        3,
        4,
        2,
        1,
    ]
    assert least_certain(np.array([0.9, 0.2, 0.5]), 2).tolist() == [1, 2]
