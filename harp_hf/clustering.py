"""Divides rows into groups of bounded size by spherical k-means, and measures groups."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import numpy as np

# Bounds the cost of one division to rows x dimensions x FAN_OUT, however many groups are wanted in the end.
FAN_OUT = 24
# k-means learns its centroids from this many rows a centroid; all rows are then assigned to them.
TRAINING_ROWS = 256
LLOYD_ITERATIONS = 12
# Rows read from a memory-mapped matrix at once.
CHUNK = 32_768


def split(features: np.ndarray, rows: np.ndarray, target: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Divide rows into groups of target/2 to 2*target rows (one group where there are too few for two)."""
    wanted = round(len(rows) / target)
    if wanted < 2:
        yield rows
        return
    centroids = _kmeans(features, rows, min(wanted, FAN_OUT), rng)
    labels = _absorb_small(compare(features, rows, centroids), smallest=(target + 1) // 2)
    groups = [rows[labels == label] for label in np.unique(labels)]
    if len(groups) == 1 and len(rows) <= 2 * target:
        yield rows
        return
    for group in groups if len(groups) > 1 else _halve(features, rows, centroids):
        yield from split(features, group, target, rng)


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
    lean = compare(features, rows, centroids[:2]) @ np.array([1, -1], np.float32)
    order = rows[np.argsort(lean, kind="stable")]
    return [np.sort(order[: len(rows) // 2]), np.sort(order[len(rows) // 2 :])]


def compare(features: np.ndarray, rows: np.ndarray, centroids: np.ndarray) -> np.ndarray:
    return np.concatenate([features[chunk] @ centroids.T for chunk in in_chunks(rows)])


def members_of(labels: np.ndarray, count: int) -> list[np.ndarray]:
    order = np.argsort(labels, kind="stable")
    return np.split(order, np.cumsum(np.bincount(labels, minlength=count))[:-1])


def mean_directions(features: np.ndarray, labels: np.ndarray, count: int) -> np.ndarray:
    """Unit-norm mean directions (count, d); where a group's rows cancel out, the direction of its first row.

    Zero for a group without rows.
    """
    sums = group_sums(features, labels, count)
    cancelled = np.linalg.norm(sums, axis=1) < 1e-5
    for label in np.flatnonzero(cancelled & (np.bincount(labels, minlength=count) > 0)):
        rows = features[np.flatnonzero(labels == label)]
        sums[label] = rows[np.any(rows != 0, axis=1).argmax()]
    return unit(sums)


def group_sums(features: np.ndarray, labels: np.ndarray, count: int) -> np.ndarray:
    return np.stack([features[rows].sum(axis=0, dtype=np.float64) for rows in members_of(labels, count)])


def unit(vectors: np.ndarray) -> np.ndarray:
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    return (vectors / np.where(norms > 0, norms, 1)).astype(np.float32)


def own_distances(features: np.ndarray, leaf: np.ndarray, centroids: np.ndarray) -> np.ndarray:
    chunks = in_chunks(np.arange(len(leaf)))
    similarities = [np.einsum("ij,ij->i", features[rows], centroids[leaf[rows]]) for rows in chunks]
    return np.clip(1 - np.concatenate(similarities), 0, 2).astype(np.float32)


def in_chunks(rows: np.ndarray, size: int = CHUNK) -> Iterator[np.ndarray]:
    for start in range(0, len(rows), size):
        yield rows[start : start + size]
