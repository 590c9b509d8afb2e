"""Groups the rows of the pool into large regions, parents and leaves by spherical k-means."""

from __future__ import annotations

import heapq
import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, fields
from functools import cached_property

import numpy as np

from .errors import HarpError

# Bounds the cost of one division to rows x dimensions x FAN_OUT, however many groups are wanted in the end.
FAN_OUT = 24
# k-means learns its centroids from this many rows a centroid; all rows are then assigned to them.
TRAINING_ROWS = 256
LLOYD_ITERATIONS = 12
# After the division rows move to the nearest of this many leaves around their own, this many times.
NEIGHBOURS = 128
EXCHANGES = 6
# In a pool of more leaves than this the division has put rows far from where they belong, and given some places too
# many leaves and others too few. So rows move whatever the sizes, this many times before and after each looks for its
# leaf in as many parents nearest to it; then leaves that are left too small are dissolved and wide ones divided.
CROWD = 128
FREE_EXCHANGES = 2
PROBES = 4
# Rows read from a memory-mapped matrix at once.
CHUNK = 32_768
# Rows compared with all parents at once.
SEARCHED = 2_048


@dataclass(frozen=True, eq=False)
class Hierarchy:
    """The pool in three levels; every row is in exactly one leaf, every leaf in one parent, every parent in one large.

    Attributes:
        leaf: (n,) int32, leaf of every row, 0..n_leaves-1, no id left out.
        parent: (n_leaves,) int32, parent of every leaf.
        large: (n_parents,) int32, large region of every parent.
        centroids: (n_leaves, d) float32, unit-norm mean direction of the leaf's rows (zero if all of them are).
        parent_centroids: (n_parents, d) float32, the same for parents.
        distance: (n,) float32, cosine distance of each row to its leaf's centroid, in [0, 2].
    """

    leaf: np.ndarray
    parent: np.ndarray
    large: np.ndarray
    centroids: np.ndarray
    parent_centroids: np.ndarray
    distance: np.ndarray

    @property
    def n_leaves(self) -> int:
        return len(self.parent)

    @property
    def sizes(self) -> np.ndarray:
        """(n_leaves,) number of rows in every leaf."""
        return np.bincount(self.leaf, minlength=self.n_leaves)

    def rows(self, leaf: int) -> np.ndarray:
        """Row indices of one leaf, nearest to its centroid first (ties: smaller row)."""
        if not 0 <= leaf < self.n_leaves:
            raise HarpError(f"There is no leaf {leaf}: the hierarchy has leaves 0 to {self.n_leaves - 1}.")
        order, starts = self._by_leaf
        return order[starts[leaf] : starts[leaf + 1]]

    def arrays(self) -> dict[str, np.ndarray]:
        """All fields by name, as the constructor takes them."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @cached_property
    def _by_leaf(self) -> tuple[np.ndarray, np.ndarray]:
        return np.lexsort((self.distance, self.leaf)), np.concatenate(([0], np.cumsum(self.sizes)))


def build_hierarchy(features: np.ndarray, *, leaf_size: int = 128, branching: int = 5, seed: int = 0) -> Hierarchy:
    """Group rows by direction: large regions, divided into parents, divided into leaves.

    Every leaf holds between `leaf_size / 2` and `2 * leaf_size` rows; only a pool of fewer than `leaf_size / 2` rows
    becomes one smaller leaf. The same features and seed give the same hierarchy. Time grows like
    n x d x log(n), as every division has a bounded fan-out; only once are rows compared with all parents.

    Args:
        features: (n, d) float32, unit-norm or zero rows; may be memory-mapped.
        leaf_size: rows a leaf aims at, at least 1.
        branching: leaves a parent and parents a large region aim at, at least 1.
        seed: decides the training rows and starting points of k-means.

    Raises:
        HarpError: features are not a non-empty matrix of finite numbers, or a size is below 1.
    """
    _check(features, leaf_size, branching)
    features = np.asarray(features)  # a plain view: a memory-mapped array is slow to index
    rng = np.random.default_rng(seed)
    leaf, parent, large = _divide(features, leaf_size, branching, rng)
    centroids = _centroids(features, leaf, len(parent))
    if len(parent) > CROWD:
        for step in range(2 * FREE_EXCHANGES + 1):
            if step == FREE_EXCHANGES:
                _search(features, leaf, parent, centroids)
            else:
                _exchange(features, leaf, parent, centroids)
            centroids = _centroids(features, leaf, len(parent))
        leaf, kept = _rebalance(features, leaf, parent, centroids, leaf_size, rng)
        parents, parent = np.unique(parent[kept], return_inverse=True)
        large = np.unique(large[parents], return_inverse=True)[1]
        centroids = _centroids(features, leaf, len(parent))
    for _ in range(EXCHANGES if len(parent) > 1 else 0):
        if not _exchange(features, leaf, parent, centroids, leaf_size):
            break
        centroids = _centroids(features, leaf, len(parent))
    return Hierarchy(
        leaf=leaf,
        parent=parent.astype(np.int32),
        large=large.astype(np.int32),
        centroids=centroids,
        parent_centroids=_centroids(features, parent[leaf], len(large)),
        distance=_distances(features, leaf, centroids),
    )


def _check(features: np.ndarray, leaf_size: int, branching: int) -> None:
    if leaf_size < 1 or branching < 1:
        raise HarpError(f"leaf_size and branching must be at least 1, but are {leaf_size} and {branching}.")
    if features.ndim != 2 or 0 in features.shape:
        raise HarpError(f"Features must be a matrix (rows, dimensions) and not empty, but are {features.shape}.")
    for rows in _chunks(np.arange(len(features))):
        bad = ~np.isfinite(features[rows]).all(axis=1)
        if bad.any():
            raise HarpError(f"Features must be finite, but row {rows[bad.argmax()]} holds NaN or infinity.")


def _divide(
    features: np.ndarray, leaf_size: int, branching: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Leaf of every row, parent of every leaf and large region of every parent, from the top down."""
    leaf = np.empty(len(features), np.int32)
    parent: list[int] = []
    large: list[int] = []
    everything = np.arange(len(features))
    for number, region in enumerate(_split(features, everything, leaf_size * branching**2, rng)):
        for group in _split(features, region, leaf_size * branching, rng):
            for rows in _split(features, group, leaf_size, rng):
                leaf[rows] = len(parent)
                parent.append(len(large))
            large.append(number)
    return leaf, np.array(parent), np.array(large)


def _split(features: np.ndarray, rows: np.ndarray, target: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Divide rows into groups of target/2 to 2*target rows (one group where there are too few for two)."""
    wanted = round(len(rows) / target)
    if wanted < 2:
        yield rows
        return
    centroids = _kmeans(features, rows, min(wanted, FAN_OUT), rng)
    labels = _absorb_small(_similarities(features, rows, centroids), smallest=(target + 1) // 2)
    groups = [rows[labels == label] for label in np.unique(labels)]
    if len(groups) == 1 and len(rows) <= 2 * target:
        yield rows
        return
    for group in groups if len(groups) > 1 else _halve(features, rows, centroids):
        yield from _split(features, group, target, rng)


def _kmeans(features: np.ndarray, rows: np.ndarray, k: int, rng: np.random.Generator) -> np.ndarray:
    """Centroids (k, d) learned from a sample of the rows; some may repeat where there are few distinct rows."""
    sample = rows
    if len(rows) > k * TRAINING_ROWS:
        sample = np.sort(rng.choice(rows, k * TRAINING_ROWS, replace=False))
    points = np.ascontiguousarray(features[sample], dtype=np.float32)
    seed = int(rng.integers(2**31 - 1))
    try:
        import faiss
    except ImportError:
        return _sklearn_centroids(points, k, seed)
    model = faiss.Kmeans(
        points.shape[1],
        k,
        niter=LLOYD_ITERATIONS,
        spherical=True,
        seed=seed,
        min_points_per_centroid=1,
        max_points_per_centroid=len(points),
    )
    threads = faiss.omp_get_max_threads()
    # So little work is slowed down by several threads, which would also make the sums depend on their number.
    faiss.omp_set_num_threads(1)
    try:
        model.train(points)
    finally:
        faiss.omp_set_num_threads(threads)
    return np.asarray(model.centroids)


def _sklearn_centroids(points: np.ndarray, k: int, seed: int) -> np.ndarray:
    from sklearn.cluster import KMeans

    with warnings.catch_warnings():
        # scikit-learn warns when there are fewer distinct rows than clusters, which is dealt with afterwards.
        warnings.simplefilter("ignore")
        centers = KMeans(k, n_init=1, max_iter=LLOYD_ITERATIONS, random_state=seed).fit(points).cluster_centers_
    norms = np.linalg.norm(centers, axis=1, keepdims=True)
    return (centers / np.where(norms > 0, norms, 1)).astype(np.float32)


def _similarities(features: np.ndarray, rows: np.ndarray, centroids: np.ndarray) -> np.ndarray:
    return np.concatenate([features[chunk] @ centroids.T for chunk in _chunks(rows)])


def _absorb_small(similarities: np.ndarray, smallest: int) -> np.ndarray:
    """Nearest cluster of every row, after dissolving clusters of fewer than `smallest` rows, the smallest first."""
    similarities = similarities.copy()
    labels = similarities.argmax(axis=1)
    while True:
        sizes = np.bincount(labels, minlength=similarities.shape[1])
        small = np.flatnonzero((sizes > 0) & (sizes < smallest))
        if not len(small):
            return labels
        dissolved = small[sizes[small].argmin()]
        similarities[:, dissolved] = -np.inf
        homeless = labels == dissolved
        # An empty cluster may take rows again only if it lies where a whole group of them is nearest to it.
        labels[homeless] = similarities[homeless].argmax(axis=1)


def _halve(features: np.ndarray, rows: np.ndarray, centroids: np.ndarray) -> list[np.ndarray]:
    """Two equal halves across the line between two centroids, for rows k-means cannot divide (such as duplicates)."""
    lean = _similarities(features, rows, centroids[:2]) @ np.array([1, -1], np.float32)
    order = rows[np.argsort(lean, kind="stable")]
    return [np.sort(order[: len(rows) // 2]), np.sort(order[len(rows) // 2 :])]


def _exchange(
    features: np.ndarray, leaf: np.ndarray, parent: np.ndarray, centroids: np.ndarray, leaf_size: int | None = None
) -> int:
    """Move rows, in place, to the nearest leaf around their own; returns how many.

    One Lloyd step over near leaves: it repairs borders drawn early by a coarse division, for a bounded cost a row.
    With a `leaf_size` sizes stay in bounds, and those rows move first that gain most.
    """
    moves: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    members = _members(leaf, len(parent))
    for number, candidates in _near_leaves(centroids, parent):
        if not len(members[number]):
            continue
        similarities = _similarities(features, members[number], centroids[candidates])
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


def _search(features: np.ndarray, leaf: np.ndarray, parent: np.ndarray, centroids: np.ndarray) -> None:
    """Move every row, in place, to the nearest leaf in the `PROBES` parents nearest to it."""
    children = _members(parent, int(parent.max()) + 1)
    middles = _unit(_sums(centroids, parent, len(children)))
    probes = np.empty((len(features), min(PROBES, len(children))), np.int32)
    for rows in _chunks(np.arange(len(features)), SEARCHED):
        similarities = features[rows] @ middles.T
        for k in range(probes.shape[1]):
            probes[rows, k] = similarities.argmax(axis=1)
            similarities[np.arange(len(rows)), probes[rows, k]] = -np.inf
    nearest = _distances(features, leaf, centroids)
    for own, places in zip(children, _members(probes.ravel(), len(children)), strict=True):
        for rows in _chunks(places // probes.shape[1]):
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
    children = _members(parent, n_parents)
    middles = _unit(_sums(centroids, parent, n_parents))
    wide = math.ceil(2 * NEIGHBOURS * n_parents / len(parent))
    for number, own in enumerate(children):
        near = np.argsort(-(middles @ middles[number]), kind="stable")[:wide]
        around = np.sort(np.concatenate([children[place] for place in np.union1d(near, number)]))
        similarities = centroids[own] @ centroids[around].T
        for k, leaf in enumerate(own.tolist()):
            nearest = np.argsort(-similarities[k], kind="stable")[:NEIGHBOURS]
            yield leaf, np.union1d(around[nearest], leaf)


def _rebalance(
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
    groups = _members(leaf, len(parent))
    width = np.bincount(leaf, _distances(features, leaf, centroids), len(parent))
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
            parts[number] = list(_split(features, parts[number][0], leaf_size, rng))
            missing -= len(parts[number]) - 1
    leaf = np.empty_like(leaf)
    for number, rows in enumerate(rows for some in parts.values() for rows in some):
        leaf[rows] = number
    return leaf, np.repeat(list(parts), [len(some) for some in parts.values()])


def _members(labels: np.ndarray, count: int) -> list[np.ndarray]:
    order = np.argsort(labels, kind="stable")
    return np.split(order, np.cumsum(np.bincount(labels, minlength=count))[:-1])


def _centroids(features: np.ndarray, labels: np.ndarray, count: int) -> np.ndarray:
    """Unit-norm mean directions (count, d); where a group's rows cancel out, the direction of its first row.

    Zero for a group without rows.
    """
    sums = _sums(features, labels, count)
    cancelled = np.linalg.norm(sums, axis=1) < 1e-5
    for label in np.flatnonzero(cancelled & (np.bincount(labels, minlength=count) > 0)):
        rows = features[np.flatnonzero(labels == label)]
        sums[label] = rows[np.any(rows != 0, axis=1).argmax()]
    return _unit(sums)


def _sums(features: np.ndarray, labels: np.ndarray, count: int) -> np.ndarray:
    return np.stack([features[rows].sum(axis=0, dtype=np.float64) for rows in _members(labels, count)])


def _unit(vectors: np.ndarray) -> np.ndarray:
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    return (vectors / np.where(norms > 0, norms, 1)).astype(np.float32)


def _distances(features: np.ndarray, leaf: np.ndarray, centroids: np.ndarray) -> np.ndarray:
    chunks = _chunks(np.arange(len(leaf)))
    similarities = [np.einsum("ij,ij->i", features[rows], centroids[leaf[rows]]) for rows in chunks]
    return np.clip(1 - np.concatenate(similarities), 0, 2).astype(np.float32)


def _chunks(rows: np.ndarray, size: int = CHUNK) -> Iterator[np.ndarray]:
    for start in range(0, len(rows), size):
        yield rows[start : start + size]
