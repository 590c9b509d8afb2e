"""Chooses the few leaves that are measured, and in which order."""

from __future__ import annotations

import math

import numpy as np

from .errors import HarpError
from .hierarchy import Hierarchy


def choose_leaves(
    hierarchy: Hierarchy, max_measurements: int | None = None, similarity: np.ndarray | None = None
) -> np.ndarray:
    """Leaves to measure, in measuring order.

    First one representative a parent, the leaf nearest the parent's centroid; then always the leaf farthest from those
    chosen (k-center; Gonzalez, 1985), so that wide parents get their second leaf first. Representatives are themselves
    visited farthest first, beginning with the one nearest the mean of all leaf centroids, so that a run cut short has
    still seen the whole pool. Below one measurement a parent: k-center over all leaves. Ties go to the smaller id.

    With similarities, every other measurement is that of the leaf most similar to one of the tasks, farthest first,
    until there is one for each task: they are the likeliest to help and show whether similarity can be believed.

    Args:
        hierarchy: the pool's leaves and parents.
        max_measurements: number of leaves wanted, at least 1; more than there are leaves means all of them.
            Default: one and a half a parent, rounded up. From one a parent upwards, a larger number begins with the
            smaller design.
        similarity: (G, D) of every leaf to the examples of each task; a task to which all are alike has no likeliest.

    Returns:
        (m,) int64 leaf ids, no id twice.

    Raises:
        HarpError: max_measurements is below 1.
    """
    n_parents = len(hierarchy.large)
    if max_measurements is None:
        max_measurements = math.ceil(1.5 * n_parents)
    if max_measurements < 1:
        raise HarpError(f"max_measurements must be at least 1, but is {max_measurements}.")
    count = min(max_measurements, hierarchy.n_leaves)
    centroids = hierarchy.centroids
    likely = np.zeros(hierarchy.n_leaves, bool)
    if similarity is not None:
        likely[similarity[:, np.ptp(similarity, axis=0) > 0].argmax(axis=0)] = True
    representative = np.zeros(hierarchy.n_leaves, bool)
    if count >= n_parents:
        representative[_representatives(hierarchy)] = True
    free = np.ones(hierarchy.n_leaves, bool)
    # The first is the candidate nearest the mean, all others are those farthest from the ones before them.
    gap = -_squared_distances(centroids, centroids.mean(axis=0))
    order: list[int] = []
    while len(order) < count:
        wanted = [likely, representative] if len(order) % 2 == 0 else [representative]
        candidates = next((some for some in (free & kind for kind in wanted) if some.any()), free)
        leaf = int(np.where(candidates, gap, -np.inf).argmax())
        distance = _squared_distances(centroids, centroids[leaf])
        gap = np.minimum(gap, distance) if order else distance
        order.append(leaf)
        free[leaf] = False
        representative[hierarchy.parent == hierarchy.parent[leaf]] = False
    return np.array(order, dtype=np.int64)


def _representatives(hierarchy: Hierarchy) -> np.ndarray:
    """(n_parents,) the leaf nearest each parent's centroid, in ascending order of id."""
    difference = hierarchy.centroids - hierarchy.parent_centroids[hierarchy.parent]
    # A parent of two equal leaves is equally far from both but for rounding, which must not decide.
    distance = np.einsum("ij,ij->i", difference, difference).round(6)
    order = np.lexsort((distance, hierarchy.parent))
    _, first = np.unique(hierarchy.parent[order], return_index=True)
    return np.sort(order[first])


def _squared_distances(points: np.ndarray, point: np.ndarray) -> np.ndarray:
    difference = points - point
    return np.einsum("ij,ij->i", difference, difference)
