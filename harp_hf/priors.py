"""What a prior says about related leaves: those near in feature space, or in the same parent or large region."""

from __future__ import annotations

from typing import Literal

import numpy as np

from .hierarchy import Hierarchy

Prior = Literal["smooth", "nested"]

# Length scales of the smooth prior, in median distances between measured leaves.
LENGTH_SCALES = (0.25, 0.4, 0.65, 1.0, 1.6)
# Shares of the nested prior's shared variance that lie at the level of large regions; parents have the rest.
LARGE_SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)


def correlations(
    prior: Prior, hierarchy: Hierarchy, rows: np.ndarray, columns: np.ndarray, measured: np.ndarray
) -> np.ndarray:
    """Correlations of the shared part of the effects of leaves, one matrix for each point of the prior's grid.

    "smooth": squared exponential in the distance of centroids, at every length scale. "nested": 1 in the same parent,
    less in the same large region alone, at every share of that in the variance.

    Args:
        prior: "smooth" or "nested".
        hierarchy: relates the leaves.
        rows: (r,) leaf ids.
        columns: (c,) leaf ids.
        measured: (m,) ids of the measured leaves, whose median distance is the unit of length.

    Returns:
        (K, r, c).
    """
    if prior == "nested":
        parent, large = hierarchy.parent, hierarchy.large[hierarchy.parent]
        same_parent = (parent[rows][:, None] == parent[columns]).astype(np.float64)
        same_large = (large[rows][:, None] == large[columns]).astype(np.float64)
        return np.stack([share * same_large + (1 - share) * same_parent for share in LARGE_SHARES])
    among = _squared_distances(hierarchy, measured, measured)[np.triu_indices(len(measured), 1)]
    middle = float(np.median(among)) if len(among) else 0.0
    # Centroids that coincide have distances of mere rounding, which are no unit.
    unit = middle if middle > 1e-4 else 1.0
    distances = _squared_distances(hierarchy, rows, columns)
    return np.stack([np.exp(-0.5 * distances / (unit * scale**2)) for scale in LENGTH_SCALES])


def _squared_distances(hierarchy: Hierarchy, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    a, b = (hierarchy.centroids[leaves].astype(np.float64) for leaves in (rows, columns))
    return np.maximum((a**2).sum(axis=1)[:, None] + (b**2).sum(axis=1) - 2 * a @ b.T, 0)
