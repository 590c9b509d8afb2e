"""Which rows of the pool are most similar to each proxy row, and how similar that makes each leaf to each task."""

from __future__ import annotations

import numpy as np

from .hierarchy import Hierarchy

# Pool rows that each proxy row looks at.
NEIGHBOURS = 50
# Pool rows compared at once, and numbers that makes at most.
_BLOCK = 1 << 14
_ENTRIES = 1 << 22


def leaf_similarity(nearest: np.ndarray, hierarchy: Hierarchy, task: np.ndarray, n_tasks: int) -> np.ndarray:
    """How much more often a leaf holds the nearest neighbours of a task's proxy rows than its size alone explains.

    With s the share of the nearest pool rows of the task's proxy rows that lie in the leaf, and p the leaf's share of
    the pool, the similarity is s / p: 1 for chance, 0 for none.

    Args:
        nearest: (n_proxy, k) from `nearest_rows`.
        hierarchy: the leaf of every pool row.
        task: (n_proxy,) int, task of every proxy row, 0..n_tasks-1.
        n_tasks: number of tasks D.

    Returns:
        (G, D) similarities, at least 0; just 1 for tasks of which no row has neighbours.
    """
    votes = np.zeros((hierarchy.n_leaves, n_tasks))
    known = nearest[:, 0] >= 0
    np.add.at(votes, (hierarchy.leaf[nearest[known]], task[known, None]), 1)
    share = hierarchy.sizes[:, None] / len(hierarchy.leaf)
    total = votes.sum(axis=0)
    return np.where(total > 0, votes / np.maximum(total, 1) / share, 1.0)


def nearest_rows(features: np.ndarray, proxy_features: np.ndarray) -> np.ndarray:
    """The pool rows most similar to each proxy row, `NEIGHBOURS` of them or all there are.

    Args:
        features: (n, d) unit-norm pool features, read in blocks.
        proxy_features: (n_proxy, d) unit-norm, or zero where nothing is known of a row.

    Returns:
        (n_proxy, k) int64 rows of the pool, most similar first, equally similar ones in a random order that is always
        the same, so that leaves with copies of a row share its votes; -1 where nothing is known of a proxy row.
    """
    n_proxy, count = len(proxy_features), min(NEIGHBOURS, len(features))
    best = np.full((n_proxy, count), -np.inf, np.float32)
    rows = np.zeros((n_proxy, count), np.int64)
    tie = np.random.default_rng(0).permutation(len(features))
    largest = max(count, min(_BLOCK, _ENTRIES // n_proxy))
    stop = 0
    while stop < len(features):
        # Each block is at most as long as all before it, so that few of its rows come before the best of those: as the
        # order of ties is random, also where all tie.
        start, stop = stop, min(stop + largest, max(2 * stop, count))
        block = proxy_features @ np.asarray(features[start:stop]).T
        # Later rows count where they come before the last of the best so far.
        last, least = best[:, -1:], tie[rows[:, -1:]]
        proxy, row = np.nonzero((block > last) | ((block == last) & (tie[start:stop] < least)))
        owner = np.concatenate([np.repeat(np.arange(n_proxy), count), proxy])
        values = np.concatenate([best.ravel(), block[proxy, row]])
        ids = np.concatenate([rows.ravel(), start + row])
        order = np.lexsort((tie[ids], -values, owner))
        first = np.searchsorted(owner[order], np.arange(n_proxy))
        nearest = order[first[:, None] + np.arange(count)]
        best, rows = values[nearest], ids[nearest]
    rows[~proxy_features.any(axis=1)] = -1
    return rows
