"""Figures against their definitions, worked out by hand or by brute force."""

import math

import numpy as np
import pytest

from maxmap import metrics


def by_definition(truth: list[int], scores: list[float]) -> float:
    """The precision at every distinct score, times the share of the positives that it adds."""
    total, before = 0.0, 0
    for score in sorted(set(scores), reverse=True):
        taken = [t for t, s in zip(truth, scores, strict=True) if s >= score]
        total += (sum(taken) - before) / sum(truth) * sum(taken) / len(taken)
        before = sum(taken)
    return total


def test_average_precision_is_its_definition():
    # Ranks of the right ones: 1, 3 and 4, so (1/1 + 2/3 + 3/4) / 3.
    truth, scores = np.array([1, 0, 1, 1, 0]), np.array([0.9, 0.8, 0.7, 0.6, 0.1])
    assert metrics.average_precision(truth, scores) == pytest.approx((1 + 2 / 3 + 3 / 4) / 3, abs=1e-15)
    assert metrics.average_precision(np.zeros(5), scores) is None
    random = np.random.default_rng(0)
    for _ in range(20):
        truth, scores = random.integers(0, 2, 30), random.integers(0, 8, 30) / 8  # ties in plenty
        wanted = by_definition(truth.tolist(), scores.tolist())
        assert metrics.average_precision(truth, scores) == pytest.approx(wanted, abs=1e-14)


def test_a_score_that_is_no_number_ranks_last():
    truth, scores = np.array([1, 0, 1, 0]), np.array([np.nan, 0.2, 0.9, 0.1])
    assert metrics.average_precision(truth, scores) == by_definition([1, 0, 1, 0], [-1, 0.2, 0.9, 0.1]) == 0.75


def test_the_best_threshold_is_that_of_the_largest_f1():
    truth, scores = np.array([1, 1, 0, 1, 0]), np.array([0.9, 0.5, 0.6, 0.4, 0.1])
    f1 = {t: 2 * truth[scores >= t].sum() / (np.sum(scores >= t) + 3) for t in scores}
    assert metrics.best_threshold(truth, scores) == (0.4, pytest.approx(f1[0.4])) and f1[0.4] == max(f1.values())


def test_precision_recall_and_f1_of_counts():
    precision, recall, f1 = metrics.precision_recall_f1(np.array([2, 0]), np.array([4, 0]), np.array([5, 0]))
    np.testing.assert_allclose([precision, recall, f1], [[0.5, 0], [0.4, 0], [4 / 9, 0]])


def test_ranks_of_ties_are_means():
    np.testing.assert_array_equal(metrics.average_ranks(np.array([3.0, 1, 3, 2, 3])), [4, 1, 4, 2, 4])


def test_correlations_by_hand():
    x, y = np.array([1.0, 2, 3]), np.array([1.0, 3, 2])
    assert metrics.pearson(x, y) == pytest.approx(0.5)
    # Ranks 1.5 1.5 3 4 and 1 2 4 3: deviations -1 -1 .5 1.5 and -1.5 -.5 1.5 .5, so 3.5 / sqrt(4.5 * 5).
    x, y = np.array([0.0, 0, 1, 9]), np.array([0.1, 0.2, 5, 4])
    assert metrics.spearman(x, y) == pytest.approx(3.5 / math.sqrt(4.5 * 5))
    assert metrics.spearman(x, -(x**3)) == pytest.approx(-1)
    for odd in (np.full(4, 0.1), np.array([1, 2, np.nan, 3]), np.array([1, 2, np.inf, 3])):
        assert metrics.pearson(x, odd) == metrics.pearson(odd, x) == 0
    assert metrics.spearman(x, np.full(4, 0.1)) == 0


def test_r_squared_by_hand():
    truth = np.array([1.0, 2, 6])  # mean 3, squares 4 + 1 + 9
    assert metrics.r_squared(truth, np.array([1.0, 4, 5])) == pytest.approx(1 - 5 / 14)
    assert metrics.r_squared(truth, np.full(3, 3.0)) == 0
    assert metrics.r_squared(np.ones(2), np.ones(2)) == 1 and metrics.r_squared(np.ones(2), np.zeros(2)) == 0
    assert metrics.r_squared(truth, np.array([1, np.nan, 2])) == -np.inf
