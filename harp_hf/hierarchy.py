"""Groups the rows of the pool into large regions, parents and leaves by spherical k-means."""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import cached_property

import numpy as np

from .clustering import in_chunks, mean_directions, own_distances, split
from .errors import HarpError
from .refinement import exchange, rebalance, search

# After the division rows move to the nearest leaves around their own, this many times.
EXCHANGES = 6
# In a pool of more leaves than this the division has put rows far from where they belong, and given some places too
# many leaves and others too few. So rows move whatever the sizes, this many times before and after each looks for its
# leaf in the parents nearest to it; then leaves that are left too small are dissolved and wide ones divided.
CROWD = 128
FREE_EXCHANGES = 2


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
    centroids = mean_directions(features, leaf, len(parent))
    if len(parent) > CROWD:
        for step in range(2 * FREE_EXCHANGES + 1):
            if step == FREE_EXCHANGES:
                search(features, leaf, parent, centroids)
            else:
                exchange(features, leaf, parent, centroids)
            centroids = mean_directions(features, leaf, len(parent))
        leaf, kept = rebalance(features, leaf, parent, centroids, leaf_size, rng)
        parents, parent = np.unique(parent[kept], return_inverse=True)
        large = np.unique(large[parents], return_inverse=True)[1]
        centroids = mean_directions(features, leaf, len(parent))
    for _ in range(EXCHANGES if len(parent) > 1 else 0):
        if not exchange(features, leaf, parent, centroids, leaf_size):
            break
        centroids = mean_directions(features, leaf, len(parent))
    return Hierarchy(
        leaf=leaf,
        parent=parent.astype(np.int32),
        large=large.astype(np.int32),
        centroids=centroids,
        parent_centroids=mean_directions(features, parent[leaf], len(large)),
        distance=own_distances(features, leaf, centroids),
    )


def _check(features: np.ndarray, leaf_size: int, branching: int) -> None:
    if leaf_size < 1 or branching < 1:
        raise HarpError(f"leaf_size and branching must be at least 1, but are {leaf_size} and {branching}.")
    if features.ndim != 2 or 0 in features.shape:
        raise HarpError(f"Features must be a matrix (rows, dimensions) and not empty, but are {features.shape}.")
    for rows in in_chunks(np.arange(len(features))):
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
    for number, region in enumerate(split(features, everything, leaf_size * branching**2, rng)):
        for group in split(features, region, leaf_size * branching, rng):
            for rows in split(features, group, leaf_size, rng):
                leaf[rows] = len(parent)
                parent.append(len(large))
            large.append(number)
    return leaf, np.array(parent), np.array(large)
