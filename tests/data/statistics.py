"""Random images, and the test that a share of random events is the expected one."""

import math

import numpy as np


def random_images(seed, *shape):
    """Returns uint8 noise."""
    return np.random.RandomState(seed).randint(0, 256, shape, dtype=np.uint8)


def assert_share(hits, expected):
    """Fails if the share of `hits` is more than five standard deviations of a binomial share away."""
    hits = np.asarray(hits)
    assert abs(hits.mean() - expected) < 5 * math.sqrt(expected * (1 - expected) / hits.size)
