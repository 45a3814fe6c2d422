"""Images that are copies of each other, found among many by their perceptual hashes."""

import itertools

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

BITS = 64  # of a hash


def find_groups(hashes: np.ndarray, distance: int) -> list[np.ndarray]:
    """Groups images whose hashes differ in few bits; a group holds what a chain of such pairs connects.

    Args:
      hashes: uint64 [N].
      distance: Bits in which the hashes of copies differ at most.

    Returns:
      The numbers of the images of each group of two or more, sorted, the largest group first.
    """
    distinct, which = np.unique(hashes, return_inverse=True)
    first, second = _close_pairs(distinct, distance)
    graph = coo_array((np.ones(len(first), bool), (first, second)), shape=(len(distinct),) * 2)
    _, component = connected_components(graph, directed=False)
    group = component[which]
    order = np.argsort(group, kind="stable")
    members = np.split(order, np.flatnonzero(np.diff(group[order])) + 1)
    return sorted((each for each in members if len(each) > 1), key=lambda each: (-len(each), each[0]))


def _close_pairs(hashes: np.ndarray, distance: int) -> tuple[np.ndarray, np.ndarray]:
    """Finds pairs of distinct hashes that differ in at most `distance` bits, some of them more than once.

    Multi-index hashing (Norouzi, Punjani and Fleet, CVPR 2012): if the bits are cut into distance + 1 bands, such a
    pair is equal in at least one of them. So for each band the hashes are sorted by it, and only those of equal bands
    are compared: each with the next, then each with the one after, for all bands at once.
    """
    firsts, seconds = [np.zeros(0, np.intp)], [np.zeros(0, np.intp)]
    edges = np.linspace(0, BITS, distance + 2).astype(int)
    for low, high in itertools.pairwise(edges.tolist()):
        band = hashes >> np.uint64(low) & np.uint64((1 << (high - low)) - 1)
        order = np.argsort(band, kind="stable")
        band, ordered = band[order], hashes[order]
        at, step = np.arange(len(hashes)), 0
        while len(at):
            step += 1
            at = at[at + step < len(hashes)]
            at = at[band[at] == band[at + step]]
            close = at[np.bitwise_count(ordered[at] ^ ordered[at + step]) <= distance]
            firsts.append(order[close])
            seconds.append(order[close + step])
    return np.concatenate(firsts), np.concatenate(seconds)
