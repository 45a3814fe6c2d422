"""Groups of copies: what a comparison of all pairs finds."""

import numpy as np
import pytest

from maxmap.check.duplicates import find_groups


def by_all_pairs(hashes: np.ndarray, distance: int) -> list[list[int]]:
    """The same, by a comparison of every hash with every other, and joining until nothing changes."""
    names = list(range(len(hashes)))
    close = np.bitwise_count(hashes[:, None] ^ hashes[None, :]) <= distance
    for _ in names:
        names = [min(names[j] for j in np.flatnonzero(row)) for row in close]
    groups = [[i for i, other in enumerate(names) if other == name] for name in sorted(set(names))]
    return sorted((group for group in groups if len(group) > 1), key=lambda group: (-len(group), group[0]))


@pytest.mark.parametrize("distance", [0, 1, 4, 10])
def test_groups_are_those_of_all_pairs(distance):
    rng = np.random.default_rng(distance)
    centres = rng.integers(0, 2**64, 12, np.uint64)
    flips = rng.integers(0, 64, (150, 6), np.uint64)
    used = np.arange(6) < rng.integers(0, 7, 150)[:, None]  # up to six bits of each are turned
    masks = np.bitwise_xor.reduce(np.where(used, np.uint64(1) << flips, np.uint64(0)), axis=1)
    hashes = np.concatenate([centres[rng.integers(0, 12, 150)] ^ masks, rng.integers(0, 2**64, 50, np.uint64)])
    found = [group.tolist() for group in find_groups(hashes, distance)]
    assert found == by_all_pairs(hashes, distance) and found


@pytest.mark.parametrize("hashes", [[], [7], [7, 8]])
def test_no_groups(hashes):
    assert find_groups(np.array(hashes, np.uint64), 0) == []


def test_many_images_of_few_hashes():
    """Fifty thousand images, of which all pairs would be a billion: equal hashes cost nothing."""
    hashes = np.arange(50_000, dtype=np.uint64) % 5 << np.uint64(10)
    assert [len(group) for group in find_groups(hashes, 0)] == [10_000] * 5
    assert [len(group) for group in find_groups(hashes, 1)] == [50_000]
