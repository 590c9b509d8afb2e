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

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from scipy.linalg.blas import dtrmm
from scipy.linalg.lapack import dpotrf, dpotri, dpotrs
from scipy.stats import chi2

from .errors import HarpError
from .hierarchy import Hierarchy
from .priors import Prior, correlations

# Standard deviations on the grid, for the shared and for the leaf's own part, in scales of the data.
GRID = (0.0, 0.25, 0.55, 0.9, 1.4)
# Noise added to every measurement, in squared scales of the data, which keeps exact measurements solvable.
JITTER = 1e-8
# Prior of the slope on similarity, for effects in scales of the data and similarity in its own standard deviations:
# the sd of the mean over tasks, and the possible sds of tasks around it.
SLOPE_SD = 0.5
SLOPE_SPREADS = (0.1, 0.25, 0.5, 1.0)
# Points of the grid that weigh less are left out of the average.
NEGLIGIBLE = 1e-9
# Leaves whose variances are computed at once.
_BLOCK = 2048
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
    signal, leaf = (axis.ravel() ** 2 for axis in np.meshgrid(GRID, GRID))
    log_prior = -0.5 * (signal + leaf)
    z, slopes = np.zeros((hierarchy.n_leaves, n_tasks)), np.zeros((n_tasks, 2))
    if similarity is not None:
        spread = similarity.std(axis=0)
        z = (similarity - similarity.mean(axis=0)) / np.where(spread > 0, spread, 1)
    known = [likelihoods(y[:, d], z[measured, d], noise[:, d], among, signal, leaf) for d in range(n_tasks)]
    if similarity is not None:
        found = [
            slope(y[:, d], noise[:, d], among, signal, leaf, log_prior, z[measured, d], known[d])
            for d in range(n_tasks)
        ]
        slopes = np.array([pooled_slope(np.delete(found, d, axis=0)) for d in range(n_tasks)])
    return Standardised(scales, y, noise, among, signal, leaf, log_prior, z, slopes, np.array(known))


@dataclass(frozen=True, eq=False)
class Trend:
    """A covariate: its values at the m measured and u other leaves, and the Gaussian prior of its slope."""

    measured: np.ndarray
    other: np.ndarray
    mean: float
    variance: float


@dataclass(frozen=True, eq=False)
class Averaged:
    """Posterior of one task: (m,) means and variances of the measured leaves, (u,) of the others."""

    measured_mean: np.ndarray
    measured_variance: np.ndarray
    other_mean: np.ndarray
    other_variance: np.ndarray


def average(
    effects: np.ndarray,
    noise: np.ndarray,
    among: np.ndarray,
    across: np.ndarray,
    signal: np.ndarray,
    leaf: np.ndarray,
    log_prior: np.ndarray,
    trend: Trend,
    known: np.ndarray | None = None,
) -> Averaged:
    """Posterior of one task, averaged over K correlations x p pairs of variances; K = p = 1 fixes them.

    With V the covariance of the measurements, u = V^-1 1, q = 1' u and P = V^-1 - u u'/q (the restricted precision),
    generalised least squares gives mu = u'y/q, and universal kriging (Rasmussen and Williams, 2006, section 2.7):

        measured leaf:  mean y - N P y,        variance N - N P N               (N the diagonal of noise)
        another leaf:   mean mu + c' P y,      variance signal + leaf - c' P c - 2 c'u/q + 1/q
        log weight:     -(log|V| + log q + y' P y) / 2 + log_prior

    The variance of the average is the mean variance plus the variance of the means. A trend adds its mean slope times
    the covariate z to mu, and its slope's variance times zz' to the covariances.

    Args:
        effects: (m,) measured effects y.
        noise: (m,) their variances.
        among: (K, m, m) correlation of the shared part among measured leaves.
        across: (K, u, m) the same between all other leaves and the measured ones.
        signal: (p,) variances of the shared part.
        leaf: (p,) variances of the leaf's own part.
        log_prior: (p,) log prior weights of the pairs.
        trend: a covariate and the prior of its slope.
        known: (3, K, p) what [`likelihoods`] gives for these effects and this covariate, where it has been computed.
    """
    m, u, z = len(effects), across.shape[1], trend.measured
    centre = (effects - trend.mean * z).mean()
    y = effects - trend.mean * z - centre
    fixed = trend.variance * np.outer(z, z)
    found = likelihoods(effects, z, noise, among, signal, leaf) if known is None else known
    log_weights = log_prior + _with_trend(found, trend.mean, trend.variance)
    weights = np.exp(log_weights - log_weights.max())
    weights /= weights.sum()

    mean_m, square_m = np.zeros(m), np.zeros(m)
    mean_o, square_o = np.zeros(u), np.zeros(u)
    for every, correlation, matrix in zip(weights, across, among, strict=True):
        kept = every > NEGLIGIBLE
        if not kept.any():
            continue
        w, signals, leaves = every[kept], signal[kept], leaf[kept]
        precision, pull, level, _ = solve(y, noise, matrix, signals, leaves, fixed)
        residual = precision @ y
        means = y - noise * residual
        mean_m += w @ means
        square_m += w @ (means**2 + noise - noise**2 * np.diagonal(precision, axis1=1, axis2=2))
        # For the other leaves mean and variance are linear and quadratic in (c, 1), and c is linear in the correlation
        # and z: the average over pairs of variances is taken inside that form, once for all leaves.
        gain, lost = (_lifted(vectors, signals, z, trend.variance) for vectors in (residual, pull))
        shift = y @ pull.T
        mean_o += correlation @ (w @ gain)[:m] + trend.other * (w @ gain)[m] + w @ shift
        quadratic = (w[:, None] * gain).T @ gain
        quadratic[:m, :m] -= np.tensordot(w * signals**2, precision, axes=1)
        along = precision @ z
        border = trend.variance * (w * signals) @ along
        quadratic[:m, m] -= border
        quadratic[m, :m] -= border
        quadratic[m, m] -= trend.variance**2 * (w @ (along @ z))
        linear = 2 * (w @ (shift[:, None] * gain - lost))
        square_o += _quadratic_form(quadratic, linear, correlation, trend.other)
        square_o += w @ (shift**2 + signals + leaves + level) + w.sum() * trend.variance * trend.other**2
    return Averaged(
        mean_m + centre + trend.mean * z,
        np.maximum(square_m - mean_m**2, 0),
        mean_o + centre + trend.mean * trend.other,
        np.maximum(square_o - mean_o**2, 0),
    )


def _lifted(vectors: np.ndarray, signal: np.ndarray, z: np.ndarray, variance: float) -> np.ndarray:
    """(p, m + 1): what (p, m) vectors weigh a leaf's correlations and its covariate by."""
    return np.concatenate([signal[:, None] * vectors, variance * (vectors @ z)[:, None]], axis=1)


def _quadratic_form(quadratic: np.ndarray, linear: np.ndarray, near: np.ndarray, last: np.ndarray) -> np.ndarray:
    """(u,) x'Qx + l'x for every x of (u, m) `near` with one more number, `last` (u,), and a symmetric Q."""
    m = near.shape[1]
    # x'Qx is twice that of the half above the diagonal, which BLAS multiplies by in half the time.
    half = np.triu(quadratic[:m, :m])
    half[np.diag_indices(m)] /= 2
    found = last * (linear[m] + quadratic[m, m] * last)
    for start in range(0, len(near), _BLOCK):
        rows = slice(start, start + _BLOCK)
        product = dtrmm(2.0, half, near[rows].T, trans_a=1).T
        product += linear[:m] + np.outer(2 * last[rows], quadratic[m, :m])
        found[rows] += np.einsum("ij,ij->i", product, near[rows])
    return found


def _with_trend(found: np.ndarray, mean: float, variance: float) -> np.ndarray:
    """(K, p) restricted log-likelihoods where the slope on the covariate is Gaussian, from those without a slope."""
    log_likelihood, product, curvature = found
    left = product - mean * curvature
    inflation = 1 + variance * curvature
    explained = mean * (product + left) + variance * left**2 / inflation
    return log_likelihood + 0.5 * (explained - np.log(inflation))


def slope(
    effects: np.ndarray,
    noise: np.ndarray,
    among: np.ndarray,
    signal: np.ndarray,
    leaf: np.ndarray,
    log_prior: np.ndarray,
    z: np.ndarray,
    known: np.ndarray | None = None,
) -> tuple[float, float]:
    """Slope of one task's effects on a covariate and its variance, by generalised least squares.

    With P the restricted precision: slope z'Py / z'Pz, variance 1 / z'Pz; averaged over the grid as in `average`,
    where integrating out the slope adds (z'Py)^2 / 2 z'Pz - log(z'Pz) / 2 to the log weight.

    Args:
        effects, noise, among, signal, leaf, log_prior: As in `average`.
        z: (m,) the covariate.
        known: As in `average`.

    Returns:
        slope and variance; the variance is infinite where the covariate does not vary.
    """
    if np.ptp(z) == 0:
        return 0.0, np.inf
    found = likelihoods(effects, z, noise, among, signal, leaf) if known is None else known
    log_likelihood, product, curvature = found
    slopes = product / curvature
    log_weights = log_likelihood + log_prior
    log_weights += 0.5 * (slopes**2 * curvature - np.log(curvature))
    weights = np.exp(log_weights - log_weights.max())
    weights /= weights.sum()
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
    weights = np.exp(log_weights - log_weights.max())
    weights /= weights.sum()
    centre = weights @ mean
    return float(centre), float(weights @ (1 / total + square + mean**2) - centre**2)


def solve(
    y: np.ndarray,
    noise: np.ndarray,
    correlation: np.ndarray,
    signal: np.ndarray,
    leaf: np.ndarray,
    fixed: np.ndarray | float = 0.0,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """For p pairs of variances: P (p, m, m), u/q (p, m), 1/q (p,) and the restricted log-likelihood (p,).

    `fixed` (m, m) is added to the covariance of every pair.
    """
    m = len(y)
    column = signal[:, None] * correlation.mean(axis=0) + (leaf[:, None] + noise) / m
    column += np.mean(np.broadcast_to(fixed, (m, m)), axis=0)
    total = column.mean(axis=1)
    precision, log_determinant = np.empty((len(signal), m, m)), np.empty(len(signal))
    for k, (matrix, size) in enumerate(_centred(noise, correlation, signal, leaf, fixed)):
        factor = _factor(matrix)
        # log|V| + log q is the log determinant of what is left after centring, but for a constant.
        log_determinant[k] = 2 * np.log(factor.diagonal()).sum() - np.log(size)
        lower = dpotri(factor, lower=1)[0]
        np.add(lower, lower.T, out=precision[k])
        precision[k][np.diag_indices(m)] /= 2
        precision[k] -= 1 / size / m
    pull = np.einsum("pij,pj->pi", precision, column)
    log_likelihood = -0.5 * (log_determinant + precision @ y @ y)
    return precision, 1 / m - pull, total - np.einsum("pi,pi->p", column, pull), log_likelihood


def likelihoods(
    effects: np.ndarray, z: np.ndarray, noise: np.ndarray, among: np.ndarray, signal: np.ndarray, leaf: np.ndarray
) -> np.ndarray:
    """(3, K, p): the restricted log-likelihood of effects y, z'Py and z'Pz, without inverting anything.

    Arguments as in [`average`], with z (m,) the covariate.
    """
    vectors = np.stack([effects - effects.mean(), z - z.mean()], axis=1)
    found = np.empty((3, len(among), len(signal)))
    for k, correlation in enumerate(among):
        for j, (matrix, size) in enumerate(_centred(noise, correlation, signal, leaf)):
            factor = _factor(matrix)
            products = vectors.T @ dpotrs(factor, vectors, lower=1)[0]
            log_determinant = 2 * np.log(factor.diagonal()).sum() - np.log(size)
            found[:, k, j] = -0.5 * (log_determinant + products[0, 0]), products[1, 0], products[1, 1]
    return found


def _centred(
    noise: np.ndarray, correlation: np.ndarray, signal: np.ndarray, leaf: np.ndarray, fixed: np.ndarray | float = 0.0
) -> Iterator[tuple[np.ndarray, float]]:
    """For every pair of variances V (m, m) centred, with a common level of the size of the rest, and that size.

    P does not change when a constant is added to all of V. So V is centred and the common level, which cancels out of
    P, given the size of the rest: V itself is close to singular where leaves are nearly perfectly correlated.
    """
    m = len(noise)
    shared, own = _around_means(correlation), _around_means(np.diag(noise) + fixed)
    diagonal = np.diag_indices(m)
    for s, g in zip(signal.tolist(), leaf.tolist(), strict=True):
        matrix = s * shared
        matrix += own
        # Centring takes g / m from all of g I.
        matrix[diagonal] += g
        size = (float(np.trace(matrix)) - g) / (m - 1) if m > 1 else 1.0
        matrix += (size - g) / m
        yield matrix, size


def _around_means(matrix: np.ndarray) -> np.ndarray:
    """A symmetric matrix, its rows and columns around their means."""
    column = matrix.mean(axis=0)
    return matrix - column - column[:, None] + column.mean()


def _factor(matrix: np.ndarray) -> np.ndarray:
    """Lower Cholesky factor of a positive definite matrix."""
    factor, failed = dpotrf(matrix, lower=1)
    if failed:
        raise np.linalg.LinAlgError("A covariance is not positive definite.")
    return factor


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
    if len(measured) < FEW:
        notes.append(
            f"Only {len(measured)} of {hierarchy.n_leaves} leaves were measured, so how much leaves differ is mostly "
            "assumed: effects are pooled over the whole pool and standard deviations are wide."
        )
    elif prior == "nested" and np.bincount(hierarchy.parent[measured]).max() < 2:
        notes.append(
            "No parent has two measured leaves, so the spread within parents cannot be told from that between them."
        )
    return tuple(notes)
