"""The pool by source: how many rows each gave and lost, and what its rows are expected to do to every task.

The source of a row is told, never used: features, leaves, measurements and the selection do not depend on it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .hierarchy import Hierarchy
from .kriging import grid_weights, solve
from .posterior import standardise
from .priors import Prior, correlations

# Half the width of a 90 % interval, in standard deviations.
Z90 = 1.645
# Leaves whose correlations with all others are held at once.
_CHUNK = 256


@dataclass(frozen=True, eq=False)
class Labels:
    """The source of every row.

    Attributes:
        names (`list[str]`): Names of the S sources, each of at least one row.
        row (`np.ndarray`): (n,) int32, source of every row of the pool, 0..S-1.
    """

    names: list[str]
    row: np.ndarray


@dataclass(frozen=True, eq=False)
class Sources(Labels):
    """The sources, and the posterior of the mean φ over the rows of each.

    Attributes:
        mean (`np.ndarray`): (S, D) posterior mean of the source's mean φ on every task.
        sd (`np.ndarray`): (S, D) its standard deviation.
    """

    mean: np.ndarray
    sd: np.ndarray


def infer_sources(
    labels: Labels,
    effects: np.ndarray,
    variances: np.ndarray,
    measured: np.ndarray,
    hierarchy: Hierarchy,
    *,
    prior: Prior = "smooth",
    similarity: np.ndarray | None = None,
) -> Sources:
    """Posterior of the mean φ over each source's rows; arguments as of [`~harp_hf.posterior.infer`].

    φ belongs to leaves, and a row has that of its leaf: the mean over a source's rows is that of its leaves, each
    weighted by the share of the source's rows in it. Where leaves hold rows of several sources, so does what is known
    of them.
    """
    weights = np.zeros((len(labels.names), hierarchy.n_leaves))
    np.add.at(weights, (labels.row, hierarchy.leaf), 1)
    weights /= weights.sum(axis=1, keepdims=True)
    mean, sd = weighted_means(effects, variances, measured, hierarchy, weights, prior=prior, similarity=similarity)
    return Sources(labels.names, labels.row, mean, sd)


def weighted_means(
    effects: np.ndarray,
    variances: np.ndarray,
    measured: np.ndarray,
    hierarchy: Hierarchy,
    weights: np.ndarray,
    *,
    prior: Prior = "smooth",
    similarity: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Posterior mean and sd of weighted means of leaf effects, with the covariance between leaves.

    The model and the grid are those of [`~harp_hf.posterior.infer`]; a weight of 1 on one leaf gives what it gives for
    that leaf. For weights a, and with the notation of [`~harp_hf.posterior.average`], one point of the grid has

        c = signal R[measured] a + leaf a[measured],    mean = y'u/q + c'P y,
        variance = signal a'R a + leaf a'a + 1/q - 2 c'u/q - c'P c

    (universal kriging of a sum), and mean and variance are averaged over the grid as there, so that what is not known
    of the grid counts too; a trend adds what it adds there, at the weighted mean of the covariate. Effects of near
    leaves err together and the level is shared by all: the sd falls far more slowly than with the square root of the
    number of leaves. Time grows with the square of the number of leaves.

    Args:
        effects: (m, D) measured effects.
        variances: (m, D) their variances.
        measured: (m,) leaf ids, no id twice.
        hierarchy: relates the G leaves.
        weights: (S, G) not negative, each row summing to 1.
        prior: "smooth" or "nested".
        similarity: (G, D), as in [`~harp_hf.posterior.infer`].

    Returns:
        (S, D) posterior means and (S, D) standard deviations.
    """
    model = standardise(effects, variances, measured, hierarchy, prior, similarity)
    across, within = _combined_correlations(hierarchy, measured, weights, prior)
    signal, leaf = model.signal, model.leaf
    own, squares = weights[:, measured], (weights**2).sum(axis=1)
    mean, sd = np.empty((len(weights), effects.shape[1])), np.empty((len(weights), effects.shape[1]))
    for d, (scale, (slope, slope_variance)) in enumerate(zip(model.scales, model.slopes, strict=True)):
        z = model.covariate[:, d]
        y = model.effects[:, d] - slope * z[measured]
        centre = y.mean()
        y = y - centre
        at = weights @ z
        common = slope_variance * np.outer(at, z[measured])
        fixed = slope_variance * np.outer(z[measured], z[measured])
        means, squared = [], []
        for correlation, shared, level_of in zip(model.among, across, within, strict=True):
            precision, trend, level = solve(model.noise[:, d], correlation, signal, leaf, fixed)
            c = signal[:, None, None] * shared + leaf[:, None, None] * own + common
            found = (trend @ y)[:, None] + np.einsum("psm,pm->ps", c, precision @ y)
            before = signal[:, None] * level_of + leaf[:, None] * squares + level[:, None] + slope_variance * at**2
            explained = np.einsum("psm,psm->ps", c @ precision + 2 * trend[:, None], c)
            means.append(found)
            squared.append(found**2 + np.maximum(before - explained, 0))
        share = grid_weights(model.likelihoods[d], model.log_prior, slope, slope_variance)
        averaged = np.einsum("kp,kps->s", share, np.array(means))
        spread = np.einsum("kp,kps->s", share, np.array(squared)) - averaged**2
        mean[:, d] = (averaged + centre + slope * at) * scale
        sd[:, d] = np.sqrt(np.maximum(spread, 0)) * scale
    return mean, sd


def _combined_correlations(
    hierarchy: Hierarchy, measured: np.ndarray, weights: np.ndarray, prior: Prior
) -> tuple[np.ndarray, np.ndarray]:
    """Correlations of what weighted means share: (K, S, m) with measured leaves, and (K, S) with themselves."""
    leaves = np.arange(hierarchy.n_leaves)
    across, within = np.zeros(1), np.zeros(1)
    for start in range(0, len(leaves), _CHUNK):
        rows = leaves[start : start + _CHUNK]
        to_all = correlations(prior, hierarchy, rows, leaves, measured)
        across = across + weights[:, rows] @ to_all[:, :, measured]
        within = within + np.stack([((weights[:, rows] @ to) * weights).sum(axis=1) for to in to_all])
    return across, within


def tabulate(
    sources: Sources, tasks: Sequence[str], leaf: np.ndarray, measured: np.ndarray, chosen: np.ndarray
) -> list[dict[str, Any]]:
    """The table by source, the one with most rows first.

    Args:
        sources: Sources of the n rows, and their posterior.
        tasks: Names of the D tasks.
        leaf: (n,) leaf of every row.
        measured: Leaves that were finetuned on.
        chosen: Rows of the pool that are chosen.

    Returns:
        `list[dict]`: For every source `source`, `rows`, `chosen` (rows), `leaves` (that hold its rows),
        `measured_leaves` (of those), and `phi_<task>` and `phi_sd_<task>`, mean and sd of its mean φ.
    """
    count = len(sources.names)
    rows = np.bincount(sources.row, minlength=count)
    picked = np.bincount(sources.row[chosen], minlength=count)
    source, held = np.divmod(np.unique(sources.row.astype(np.int64) * len(leaf) + leaf), len(leaf))
    leaves = np.bincount(source, minlength=count)
    known = np.bincount(source[np.isin(held, measured)], minlength=count)
    table = []
    for s in np.argsort(-rows, kind="stable").tolist():
        line: dict[str, Any] = {"source": sources.names[s], "rows": int(rows[s]), "chosen": int(picked[s]),
                                "leaves": int(leaves[s]), "measured_leaves": int(known[s])}  # fmt: skip
        for d, task in enumerate(tasks):
            line[f"phi_{task}"], line[f"phi_sd_{task}"] = float(sources.mean[s, d]), float(sources.sd[s, d])
        table.append(line)
    return table
