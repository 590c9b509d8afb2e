"""How similar each leaf of the pool is to the examples of each task."""

from __future__ import annotations

import numpy as np

from .hierarchy import Hierarchy

# Pool rows that each proxy row looks at.
NEIGHBOURS = 50
_BLOCK = 1 << 16


def leaf_similarity(
    features: np.ndarray, hierarchy: Hierarchy, proxy_features: np.ndarray, task: np.ndarray, n_tasks: int
) -> np.ndarray:
    """How much more often a leaf holds the nearest neighbours of a task's proxy rows than its size alone explains.

    With s the share of the `NEIGHBOURS` nearest pool rows of the task's proxy rows that lie in the leaf, and p the
    leaf's share of the pool, the similarity is s / p: 1 for chance, 0 for none.

    Args:
        features: (n, d) unit-norm pool features, read in blocks.
        hierarchy: the leaf of every pool row.
        proxy_features: (n_proxy, d) unit-norm.
        task: (n_proxy,) int, task of every proxy row, 0..n_tasks-1.
        n_tasks: number of tasks D.

    Returns:
        (G, D) similarities, at least 0.
    """
    count = min(NEIGHBOURS, len(features))
    best = np.full((len(proxy_features), count), -np.inf, np.float32)
    rows = np.zeros((len(proxy_features), count), np.int64)
    for start in range(0, len(features), _BLOCK):
        block = proxy_features @ np.asarray(features[start : start + _BLOCK]).T
        seen = np.concatenate([best, block], axis=1)
        ids = np.concatenate([rows, np.broadcast_to(np.arange(start, start + block.shape[1]), block.shape)], axis=1)
        # Stable, so that of equally near rows the first ones count.
        nearest = np.argsort(-seen, axis=1, kind="stable")[:, :count]
        best, rows = np.take_along_axis(seen, nearest, axis=1), np.take_along_axis(ids, nearest, axis=1)
    votes = np.zeros((hierarchy.n_leaves, n_tasks))
    np.add.at(votes, (hierarchy.leaf[rows], task[:, None]), 1)
    return votes / votes.sum(axis=0) / (hierarchy.sizes / len(features))[:, None]
