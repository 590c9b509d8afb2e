"""Moves rows between leaves, which a division from the top down has drawn too coarsely."""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator

import numpy as np

from .clustering import compare, group_sums, in_chunks, members_of, own_distances, split, unit

# Rows move to the nearest of this many leaves around their own.
NEIGHBOURS = 128
# Parents in which a row looks for its leaf.
PROBES = 4
# Rows compared with all parents at once.
SEARCHED = 2_048


def exchange(
    features: np.ndarray, leaf: np.ndarray, parent: np.ndarray, centroids: np.ndarray, leaf_size: int | None = None
) -> int:
    """Move rows, in place, to the nearest leaf around their own; returns how many.

    One Lloyd step over near leaves: it repairs borders drawn early by a coarse division, for a bounded cost a row.
    With a `leaf_size` sizes stay in bounds, and those rows move first that gain most.
    """
    moves: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    members = members_of(leaf, len(parent))
    for number, candidates in _near_leaves(centroids, parent):
        if not len(members[number]):
            continue
        similarities = compare(features, members[number], centroids[candidates])
        best = similarities.argmax(axis=1)
        gain = similarities.max(axis=1) - similarities[:, np.searchsorted(candidates, number)]
        better = gain > 1e-6
        moves.append((members[number][better], candidates[best[better]], gain[better]))
    rows, targets, gains = (np.concatenate(part) for part in zip(*moves, strict=True))
    if leaf_size is None:
        leaf[rows] = targets
        return len(rows)
    sizes = np.bincount(leaf, minlength=len(parent)).tolist()
    moved = 0
    for i in np.lexsort((rows, -gains)).tolist():
        row, source, target = rows[i], leaf[rows[i]], targets[i]
        if 2 * (sizes[source] - 1) >= leaf_size and sizes[target] < 2 * leaf_size:
            sizes[source] -= 1
            sizes[target] += 1
            leaf[row] = target
            moved += 1
    return moved


def search(features: np.ndarray, leaf: np.ndarray, parent: np.ndarray, centroids: np.ndarray) -> None:
    """Move every row, in place, to the nearest leaf in the `PROBES` parents nearest to it."""
    children = members_of(parent, int(parent.max()) + 1)
    middles = unit(group_sums(centroids, parent, len(children)))
    probes = np.empty((len(features), min(PROBES, len(children))), np.int32)
    for rows in in_chunks(np.arange(len(features)), SEARCHED):
        similarities = features[rows] @ middles.T
        for k in range(probes.shape[1]):
            probes[rows, k] = similarities.argmax(axis=1)
            similarities[np.arange(len(rows)), probes[rows, k]] = -np.inf
    nearest = own_distances(features, leaf, centroids)
    for own, places in zip(children, members_of(probes.ravel(), len(children)), strict=True):
        for rows in in_chunks(places // probes.shape[1]):
            distances = 1 - features[rows] @ centroids[own].T
            best = distances.argmin(axis=1)
            distance = distances[np.arange(len(rows)), best]
            nearer = distance < nearest[rows] - 1e-6
            leaf[rows[nearer]] = own[best[nearer]]
            nearest[rows[nearer]] = distance[nearer]


def _near_leaves(centroids: np.ndarray, parent: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Every leaf with the ids, ascending, of the `NEIGHBOURS` leaves nearest to it and its own.

    They are looked for among the leaves of the nearest parents, twice as many as are wanted.
    """
    if len(parent) <= NEIGHBOURS:
        yield from ((number, np.arange(len(parent))) for number in range(len(parent)))
        return
    n_parents = int(parent.max()) + 1
    children = members_of(parent, n_parents)
    middles = unit(group_sums(centroids, parent, n_parents))
    wide = math.ceil(2 * NEIGHBOURS * n_parents / len(parent))
    for number, own in enumerate(children):
        near = np.argsort(-(middles @ middles[number]), kind="stable")[:wide]
        around = np.sort(np.concatenate([children[place] for place in np.union1d(near, number)]))
        similarities = centroids[own] @ centroids[around].T
        for k, leaf in enumerate(own.tolist()):
            nearest = np.argsort(-similarities[k], kind="stable")[:NEIGHBOURS]
            yield leaf, np.union1d(around[nearest], leaf)


def rebalance(
    features: np.ndarray,
    leaf: np.ndarray,
    parent: np.ndarray,
    centroids: np.ndarray,
    leaf_size: int,
    rng: np.random.Generator,
) -> tuple[np.ndarray, np.ndarray]:
    """Bring sizes back into bounds, and the number of leaves to what the pool's size asks for.

    Leaves that are too small are dissolved, the smallest first; leaves that are too large are divided, and as many
    others as are missing, those first whose rows are farthest from their centroid in all.

    Returns:
        (n,) leaf of every row, and for each leaf which one it comes from.
    """
    groups = members_of(leaf, len(parent))
    width = np.bincount(leaf, own_distances(features, leaf, centroids), len(parent))
    small = [(len(rows), number) for number, rows in enumerate(groups) if 2 * len(rows) < leaf_size]
    near = dict(_near_leaves(centroids, parent)) if small else {}
    alive = np.ones(len(parent), bool)
    heapq.heapify(small)
    while small:
        size, number = heapq.heappop(small)
        if size != len(groups[number]):
            continue  # it has grown since
        rows, groups[number], alive[number] = groups[number], np.empty(0, np.int64), False
        others = near[number][alive[near[number]]]
        others = others if len(others) else np.flatnonzero(alive)
        targets = others[(features[rows] @ centroids[others].T).argmax(axis=1)]
        for target in np.unique(targets).tolist():
            groups[target] = np.concatenate([groups[target], rows[targets == target]])
            if 2 * len(groups[target]) < leaf_size:
                heapq.heappush(small, (len(groups[target]), target))
    missing = round(len(leaf) / leaf_size) - int(alive.sum())
    parts = {number: [np.sort(groups[number])] for number in np.flatnonzero(alive).tolist()}
    for number in sorted(parts, key=lambda number: (-width[number], number)):
        size = len(groups[number])
        if size > 2 * leaf_size or (missing > 0 and 2 * size >= 3 * leaf_size):
            parts[number] = list(split(features, parts[number][0], leaf_size, rng))
            missing -= len(parts[number]) - 1
    leaf = np.empty_like(leaf)
    for number, rows in enumerate(rows for some in parts.values() for rows in some):
        leaf[rows] = number
    return leaf, np.repeat(list(parts), [len(some) for some in parts.values()])
