"""From the measured effects of a few leaves to mean and sd of the effect of every leaf on every task.

Each task is on its own: effects are Gaussian with an unknown mean, a part shared between related leaves and a part of
the leaf's own,

    phi = mu + shared + own,    cov(shared) = signal^2 R,    cov(own) = leaf^2 I,    measured = phi + noise,

where the correlation R is what a prior says about related leaves ("smooth": near in feature space, "nested": in the
same parent or large region). mu has a flat prior; the posterior is averaged over a grid of R, signal and leaf weighted
by restricted marginal likelihood (Patterson and Thompson, 1971) times half-normal priors on the standard deviations.

Where it is known how similar each leaf is to the examples of each task, beta times this similarity is added to mu, and
the tasks tell each other how far similarity can be believed: beta is Gaussian around a mean that they share.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.stats import chi2

from .errors import HarpError
from .hierarchy import Hierarchy
from .kriging import Trend, average, likelihoods, normalised
from .priors import Prior, correlations

# Standard deviations on the grid, for the shared and for the leaf's own part, in scales of the data. No leaf is just
# what its neighbours and its similarity make it: without an own part, one leaf that alone is similar to a task and
# does it much good explains all that was measured, and the effects of all others pass for known exactly.
SHARED_GRID = (0.0, 0.25, 0.55, 0.9, 1.4)
OWN_GRID = (0.15, 0.3, 0.55, 0.9, 1.4)
# Noise added to every measurement, in squared scales of the data, which keeps exact measurements solvable.
JITTER = 1e-8
# Prior of the slope on similarity, for effects in scales of the data and similarity in its own standard deviations:
# the sd of the mean over tasks, and the possible sds of tasks around it.
SLOPE_SD = 0.5
SLOPE_SPREADS = (0.1, 0.25, 0.5, 1.0)
# Below this many measurements the answer rests mostly on the prior.
FEW = 8


@dataclass(frozen=True, eq=False)
class Posterior:
    """What is known about every leaf.

    Attributes:
        mean: (G, D) posterior mean of the effect of every leaf on every task.
        sd: (G, D) its standard deviation.
        notes: one sentence for each circumstance that weakens the answer.
    """

    mean: np.ndarray
    sd: np.ndarray
    notes: tuple[str, ...] = ()


def infer(
    effects: np.ndarray,
    variances: np.ndarray,
    measured: np.ndarray,
    hierarchy: Hierarchy,
    *,
    prior: Prior = "smooth",
    similarity: np.ndarray | None = None,
) -> Posterior:
    """Posterior mean and sd of the effect of every leaf, measured or not, on every task.

    Args:
        effects: (m, D) measured effects.
        variances: (m, D) their variances, at least 0.
        measured: (m,) leaf ids, no id twice.
        hierarchy: relates the leaves, by centroids ("smooth") or by parents and large regions ("nested").
        prior: "smooth" is a squared-exponential kernel on the distance between leaf centroids plus a leaf term;
            "nested" the sum of effects of large region, parent and leaf.
        similarity: (G, D) of every leaf to the examples of each task, on any scale; None leaves it out, as the paper
            does.

    Returns:
        Posterior of all leaves; its notes say where few measurements leave the answer to the prior.

    Raises:
        HarpError: the prior is unknown, nothing was measured, or numbers or shapes do not fit.
    """
    measured = np.asarray(measured, dtype=np.int64)
    model = standardise(effects, variances, measured, hierarchy, prior, similarity)
    others = np.setdiff1d(np.arange(hierarchy.n_leaves), measured)
    across = correlations(prior, hierarchy, others, measured, measured)
    mean = np.empty((hierarchy.n_leaves, effects.shape[1]))
    variance = np.empty_like(mean)
    for d, scale in enumerate(model.scales):
        z = model.covariate[:, d]
        parts = average(
            model.effects[:, d], model.noise[:, d], model.among, across, model.signal, model.leaf, model.log_prior,
            Trend(z[measured], z[others], *model.slopes[d]), model.likelihoods[d],
        )  # fmt: skip
        mean[measured, d], mean[others, d] = parts.measured_mean * scale, parts.other_mean * scale
        variance[measured, d] = parts.measured_variance * scale**2
        variance[others, d] = parts.other_variance * scale**2
    return Posterior(mean, np.sqrt(variance), _notes(measured, hierarchy, prior))


@dataclass(frozen=True, eq=False)
class Standardised:
    """The model of all tasks in units of each task's own scale, so that nothing depends on the units of the scores.

    Attributes:
        scales: (D,) the unit of each task.
        effects: (m, D) measured effects.
        noise: (m, D) their variances.
        among: (K, m, m) correlations of the shared part among measured leaves.
        signal: (p,) variances of the shared part on the grid.
        leaf: (p,) variances of the leaf's own part.
        log_prior: (p,) log prior weights of the pairs.
        covariate: (G, D) similarity in its own standard deviations; zero where it is not used.
        slopes: (D, 2) mean and variance of the prior of each task's slope on it, which the other tasks tell.
        likelihoods: (D, 3, K, p) what [`likelihoods`] gives for each task.
    """

    scales: np.ndarray
    effects: np.ndarray
    noise: np.ndarray
    among: np.ndarray
    signal: np.ndarray
    leaf: np.ndarray
    log_prior: np.ndarray
    covariate: np.ndarray
    slopes: np.ndarray
    likelihoods: np.ndarray


def standardise(
    effects: np.ndarray,
    variances: np.ndarray,
    measured: np.ndarray,
    hierarchy: Hierarchy,
    prior: Prior,
    similarity: np.ndarray | None,
) -> Standardised:
    """The model that [`infer`] solves; arguments and errors as there."""
    _check(effects, variances, measured, hierarchy, prior, similarity)
    n_tasks = effects.shape[1]
    scales = _scales(effects, variances)
    y, noise = effects / scales, variances / scales**2 + JITTER
    among = correlations(prior, hierarchy, measured, measured, measured)
    signal, leaf = (axis.ravel() ** 2 for axis in np.meshgrid(SHARED_GRID, OWN_GRID))
    log_prior = -0.5 * (signal + leaf)
    z, slopes = np.zeros((hierarchy.n_leaves, n_tasks)), np.zeros((n_tasks, 2))
    if similarity is not None:
        middle, spread = similarity.mean(axis=0), similarity.std(axis=0)
        varies = spread > 1e-9 * np.abs(middle)  # else all of it is rounding
        z = np.where(varies, (similarity - middle) / np.where(varies, spread, 1), 0)
    known = [likelihoods(y[:, d], z[measured, d], noise[:, d], among, signal, leaf) for d in range(n_tasks)]
    if similarity is not None:
        found = [slope(known[d], log_prior, z[measured, d]) for d in range(n_tasks)]
        slopes = np.array([pooled_slope(np.delete(found, d, axis=0)) for d in range(n_tasks)])
    return Standardised(scales, y, noise, among, signal, leaf, log_prior, z, slopes, np.array(known))


def slope(known: np.ndarray, log_prior: np.ndarray, z: np.ndarray) -> tuple[float, float]:
    """Slope of one task's effects on a covariate and its variance, by generalised least squares.

    With P the restricted precision: slope z'Py / z'Pz, variance 1 / z'Pz; averaged over the grid as in [`average`],
    where integrating out the slope adds (z'Py)^2 / 2 z'Pz - log(z'Pz) / 2 to the log weight.

    Args:
        known: (3, K, p) what [`likelihoods`] gives for the effects and the covariate.
        log_prior: (p,) log prior weights of the pairs of variances.
        z: (m,) the covariate.

    Returns:
        slope and variance; the variance is infinite where the covariate does not vary.
    """
    if np.ptp(z) == 0:
        return 0.0, np.inf
    log_likelihood, product, curvature = known
    slopes = product / curvature
    weights = normalised(log_likelihood + log_prior + 0.5 * (slopes**2 * curvature - np.log(curvature)))
    mean = float((weights * slopes).sum())
    return mean, float((weights * (1 / curvature + (slopes - mean) ** 2)).sum())


def pooled_slope(slopes: np.ndarray) -> tuple[float, float]:
    """What the slopes of some tasks say of the slope of one more: mean and variance of its prior.

    Slopes of tasks are Gaussian around a common mean of prior sd `SLOPE_SD`, with a spread averaged over
    `SLOPE_SPREADS` by its marginal likelihood.

    Args:
        slopes: (k, 2) estimate and variance of each; k may be 0.
    """
    estimate, variance = np.asarray(slopes, np.float64).reshape(-1, 2).T
    square = np.square(SLOPE_SPREADS)
    precision = 1 / (variance + square[:, None])
    total = 1 / SLOPE_SD**2 + precision.sum(axis=1)
    mean = precision @ estimate / total
    log_weights = 0.5 * (np.log(np.where(precision > 0, precision, 1)).sum(axis=1) - np.log(total))
    log_weights -= 0.5 * (precision @ estimate**2 - mean**2 * total)
    weights = normalised(log_weights)
    centre = weights @ mean
    return float(centre), float(weights @ (1 / total + square + mean**2) - centre**2)


def _check(
    effects: np.ndarray,
    variances: np.ndarray,
    measured: np.ndarray,
    hierarchy: Hierarchy,
    prior: str,
    similarity: np.ndarray | None,
) -> None:
    if prior not in ("smooth", "nested"):
        raise HarpError(f"prior must be 'smooth' or 'nested', but is {prior!r}.")
    if len(measured) == 0:
        raise HarpError("Nothing can be inferred without a single measured leaf.")
    if effects.ndim != 2 or effects.shape != variances.shape or measured.shape != effects.shape[:1]:
        raise HarpError(
            f"Effects of shape {effects.shape} do not fit variances of shape {variances.shape} "
            f"and measured leaves of shape {measured.shape}."
        )
    if len(np.unique(measured)) < len(measured) or measured.min() < 0 or measured.max() >= hierarchy.n_leaves:
        raise HarpError(f"Measured leaves must be distinct ids from 0 to {hierarchy.n_leaves - 1}.")
    if not np.isfinite(effects).all() or not np.isfinite(variances).all() or (variances < 0).any():
        raise HarpError("Effects must be finite, and variances finite and at least 0.")
    shape = (hierarchy.n_leaves, effects.shape[1])
    if similarity is not None and (similarity.shape != shape or not np.isfinite(similarity).all()):
        raise HarpError(f"Similarities must be {shape[0]} x {shape[1]} finite numbers, one for each leaf and task.")


def _scales(effects: np.ndarray, variances: np.ndarray) -> np.ndarray:
    """(D,) prior scale of a task's standard deviations: the upper quartile of the spread its effects allow.

    A few measurements allow a wide range of spreads, so the scale widens as they get fewer. One measurement shows no
    spread at all: the effects of leaves are then taken to differ as much as it differs from zero.
    """
    m = len(effects)
    noise = variances.mean(axis=0)
    if m == 1:
        squared = effects[0] ** 2 + noise
    else:
        squared = np.maximum(((effects - effects.mean(axis=0)) ** 2).sum(axis=0) / chi2.ppf(0.25, m - 1), noise)
    return np.sqrt(np.where(squared > 0, squared, np.finfo(np.float64).tiny ** 0.25))


def _notes(measured: np.ndarray, hierarchy: Hierarchy, prior: str) -> tuple[str, ...]:
    notes = []
    if len(measured) < min(FEW, hierarchy.n_leaves):
        notes.append(
            f"Only {len(measured)} of {hierarchy.n_leaves} leaves were measured, so how much leaves differ is mostly "
            "assumed: effects are pooled over the whole pool and standard deviations are wide."
        )
    elif prior == "nested" and np.bincount(hierarchy.parent[measured]).max() < 2:
        notes.append(
            "No parent has two measured leaves, so the spread within parents cannot be told from that between them."
        )
    return tuple(notes)
