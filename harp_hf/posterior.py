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
from typing import Literal

import numpy as np
from scipy.stats import chi2, false_discovery_control

from .errors import HarpError
from .hierarchy import Hierarchy

Prior = Literal["smooth", "nested"]

# Length scales of the smooth prior, in median distances between measured leaves.
LENGTH_SCALES = (0.25, 0.4, 0.65, 1.0, 1.6)
# Shares of the nested prior's shared variance that lie at the level of large regions; parents have the rest.
LARGE_SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)
# Standard deviations on the grid, for the shared and for the leaf's own part, in scales of the data.
GRID = (0.0, 0.25, 0.55, 0.9, 1.4)
# Noise added to every measurement, in squared scales of the data, which keeps exact measurements solvable.
JITTER = 1e-8
# The task's pooled variance counts as much as this many rows of the leaf's own. A leaf with an effect has answers that
# vary, so its own variance is large just because of the effect: taken at its word, a clear effect passes for noise.
PRIOR_ROWS = 100
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


def measured_effects(
    scores: np.ndarray, null: np.ndarray, task: np.ndarray, n_tasks: int, *, replicates: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Effect of every measured leaf on every task, and its variance.

    The effect is the mean paired difference over the task's n rows. The variance of one difference is shrunk towards
    the task's pooled variance as if that had been seen on k = `PRIOR_ROWS` more rows (the posterior mean form of
    Smyth, 2004, with fixed prior degrees of freedom):

        v = (SS + k * pooled) / (n - 1 + k),    pooled = (sum of SS over leaves + 1/2) / (m (n - 1) + 1),

    where SS is the leaf's sum of squares around its effect. The half (Jeffreys' half a changed answer) keeps v above
    zero where nothing changed anywhere. The variance of the effect is v / n.

    Args:
        scores: (m, n_proxy) score in [0, 1] of every proxy row after finetuning on each measured leaf; a leaf
            finetuned several times has the mean over its runs here.
        null: (n_proxy,) scores of the base model on the same rows.
        task: (n_proxy,) int, task of every row, 0..n_tasks-1.
        n_tasks: number of tasks D; each needs at least one row.
        replicates: (m, R, D) task means of every run, NaN where a leaf had fewer than R runs. Their pooled run-to-run
            variance of each task, divided by the leaf's number of runs, is added; nothing where no leaf was repeated.

    Returns:
        effects (m, D) and variances (m, D), the variances above zero.

    Raises:
        HarpError: shapes do not match, a score is not finite, or a task has no rows.
    """
    if scores.ndim != 2 or null.shape != scores.shape[1:] or task.shape != null.shape:
        raise HarpError(
            f"Scores of shape {scores.shape} do not fit null scores of shape {null.shape} "
            f"and tasks of shape {task.shape}."
        )
    if not np.isfinite(scores).all() or not np.isfinite(null).all():
        raise HarpError("Scores must be finite, but hold NaN or infinity.")
    rows = np.bincount(task, minlength=n_tasks)
    if len(rows) > n_tasks or not rows.all():
        raise HarpError(f"Each of {n_tasks} tasks needs proxy rows, but rows per task are {rows.tolist()}.")
    differences = scores.astype(np.float64) - null
    member = np.eye(n_tasks)[task]
    effects = differences @ member / rows
    squares = (differences - effects[:, task]) ** 2 @ member
    pooled = (squares.sum(axis=0) + 0.5) / (len(scores) * (rows - 1) + 1)
    variances = (squares + PRIOR_ROWS * pooled) / (rows - 1 + PRIOR_ROWS) / rows
    if replicates is not None:
        variances = variances + _run_variance(replicates)
    return effects, variances


def _run_variance(replicates: np.ndarray) -> np.ndarray:
    """(m, D) variance of the mean over a leaf's runs, from the pooled run-to-run variance of each task."""
    runs = np.isfinite(replicates).sum(axis=1)
    if not runs.all():
        raise HarpError("Every measured leaf needs the task means of at least one run.")
    around = replicates - np.nanmean(replicates, axis=1, keepdims=True)
    pooled = np.nansum(around**2, axis=(0, 1)) / np.maximum((runs - 1).sum(axis=0), 1)
    return pooled / runs


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
    _check(effects, variances, measured, hierarchy, prior)
    _check_similarity(similarity, (hierarchy.n_leaves, effects.shape[1]))
    others = np.setdiff1d(np.arange(hierarchy.n_leaves), measured)
    correlations = _smooth if prior == "smooth" else _nested
    among = correlations(hierarchy, measured, measured)
    across = correlations(hierarchy, others, measured)
    mean = np.empty((hierarchy.n_leaves, effects.shape[1]))
    variance = np.empty_like(mean)
    # Solved in units of the data's own scale, so that no number below depends on the units of the scores.
    scales = _scales(effects, variances)
    y, noise = effects / scales, variances / scales**2
    signal, leaf = (axis.ravel() ** 2 for axis in np.meshgrid(GRID, GRID))
    log_prior = -0.5 * (signal + leaf)
    trends: list[Trend | None] = [None] * len(scales)
    if similarity is not None:
        spread = similarity.std(axis=0)
        z = (similarity - similarity.mean(axis=0)) / np.where(spread > 0, spread, 1)
        tasks = range(len(scales))
        slopes = [slope(y[:, d], noise[:, d], among, signal, leaf, log_prior, z[measured, d]) for d in tasks]
        trends = [Trend(z[measured, d], z[others, d], *pooled_slope(np.delete(slopes, d, axis=0))) for d in tasks]
    for d, scale in enumerate(scales):
        parts = average(y[:, d], noise[:, d], among, across, signal, leaf, log_prior, trends[d])
        mean[measured, d], mean[others, d] = parts.measured_mean * scale, parts.other_mean * scale
        variance[measured, d] = parts.measured_variance * scale**2
        variance[others, d] = parts.other_variance * scale**2
    return Posterior(mean, np.sqrt(variance), _notes(measured, hierarchy, prior))


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
    trend: Trend | None = None,
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
    """
    m, u = len(effects), across.shape[1]
    if trend is None:
        trend = Trend(np.zeros(m), np.zeros(u), 0.0, 0.0)
    noise = noise + JITTER
    expected = trend.mean * trend.measured
    expected = expected + (effects - expected).mean()
    y = effects - expected
    z = trend.measured
    solved = [
        _solve(y, noise, correlation, signal, leaf, trend.variance * np.outer(z, z)) for correlation in among
    ]  # fmt: skip
    log_weights = np.array([log_likelihood + log_prior for *_, log_likelihood in solved])
    weights = np.exp(log_weights - log_weights.max())
    weights /= weights.sum()

    mean_m, square_m = np.zeros(m), np.zeros(m)
    mean_o, square_o = np.zeros(u), np.zeros(u)
    # What the covariances of the other leaves are made of: signal times correlation, and the trend's share.
    lift = np.concatenate([
        signal[:, None, None] * np.eye(m), np.broadcast_to(trend.variance * z, (len(signal), 1, m))
    ], axis=1)  # fmt: skip
    for w, (precision, pull, level, _), correlation in zip(weights, solved, across, strict=True):
        residual = precision @ y
        means = y - noise * residual
        mean_m += w @ means
        square_m += w @ (means**2 + noise - noise**2 * np.diagonal(precision, axis1=1, axis2=2))
        # For the other leaves mean and variance are linear and quadratic in (c, 1), and c is linear in the correlation
        # and z: the average over pairs of variances is taken inside that form, once for all leaves.
        features = np.concatenate([correlation, trend.other[:, None]], axis=1)
        gain = np.einsum("pij,pj->pi", lift, residual)
        shift = y @ pull.T
        mean_o += features @ (w @ gain) + w @ shift
        quadratic = (w[:, None] * gain).T @ gain
        quadratic -= np.tensordot(w, lift @ precision @ lift.transpose(0, 2, 1), axes=1)
        linear = 2 * (w @ (shift[:, None] * gain - np.einsum("pij,pj->pi", lift, pull)))
        square_o += np.einsum("ij,ij->i", features @ quadratic + linear, features)
        square_o += w @ (shift**2 + signal + leaf + level) + w.sum() * trend.variance * trend.other**2
    centre = expected[0] - trend.mean * z[0]
    return Averaged(
        mean_m + expected,
        np.maximum(square_m - mean_m**2, 0),
        mean_o + centre + trend.mean * trend.other,
        np.maximum(square_o - mean_o**2, 0),
    )


def slope(
    effects: np.ndarray,
    noise: np.ndarray,
    among: np.ndarray,
    signal: np.ndarray,
    leaf: np.ndarray,
    log_prior: np.ndarray,
    z: np.ndarray,
) -> tuple[float, float]:
    """Slope of one task's effects on a covariate and its variance, by generalised least squares.

    With P the restricted precision: slope z'Py / z'Pz, variance 1 / z'Pz; averaged over the grid as in `average`,
    where integrating out the slope adds (z'Py)^2 / 2 z'Pz - log(z'Pz) / 2 to the log weight.

    Args:
        effects, noise, among, signal, leaf, log_prior: As in `average`.
        z: (m,) the covariate.

    Returns:
        slope and variance; the variance is infinite where the covariate does not vary.
    """
    if np.ptp(z) == 0:
        return 0.0, np.inf
    y = effects - effects.mean()
    solved = [_solve(y, noise + JITTER, correlation, signal, leaf) for correlation in among]
    curvature = np.array([precision @ z @ z for precision, *_ in solved])
    slopes = np.array([precision @ y @ z for precision, *_ in solved]) / curvature
    log_weights = np.array([log_likelihood + log_prior for *_, log_likelihood in solved])
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


def _solve(
    y: np.ndarray,
    noise: np.ndarray,
    correlation: np.ndarray,
    signal: np.ndarray,
    leaf: np.ndarray,
    fixed: np.ndarray | float = 0.0,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """For p pairs of variances: P (p, m, m), u/q (p, m), 1/q (p,) and the restricted log-likelihood (p,).

    `fixed` (m, m) is added to the covariance of every pair.

    P does not change when a constant is added to all of V. So V is centred and the common level, which cancels out of
    P, given the size of the rest: V itself is close to singular where leaves are nearly perfectly correlated.
    """
    m = len(y)
    covariance = signal[:, None, None] * correlation + fixed
    covariance[:, np.arange(m), np.arange(m)] += leaf[:, None] + noise
    column = covariance.mean(axis=1)
    total = column.mean(axis=1)
    centred = covariance - column[:, :, None] - column[:, None, :] + total[:, None, None]
    size = np.trace(centred, axis1=1, axis2=2) / (m - 1) if m > 1 else np.ones(len(signal))
    centred += (size / m)[:, None, None]
    precision = np.linalg.inv(centred) - (1 / size / m)[:, None, None]
    pull = np.einsum("pij,pj->pi", precision, column)
    # log|V| + log q is the log determinant of what is left after centring, but for a constant.
    log_determinant = np.linalg.slogdet(centred)[1] - np.log(size)
    log_likelihood = -0.5 * (log_determinant + precision @ y @ y)
    return precision, 1 / m - pull, total - np.einsum("pi,pi->p", column, pull), log_likelihood


def active_tasks(effects: np.ndarray, variances: np.ndarray, *, fdr: float = 0.1) -> np.ndarray:
    """Tasks whose measured effects are distinguishable from none.

    The sum of squared effects over their variances is chi-square with m degrees of freedom where there is no effect;
    Benjamini-Hochberg holds the false discovery rate over tasks.

    Args:
        effects: (m, D) measured effects.
        variances: (m, D) their variances, above 0.
        fdr: share of false discoveries allowed, in (0, 1).

    Returns:
        (D,) bool, True for active tasks.
    """
    p_values = chi2.sf((effects**2 / variances).sum(axis=0), df=len(effects))
    return false_discovery_control(p_values) <= fdr


def _check(effects: np.ndarray, variances: np.ndarray, measured: np.ndarray, hierarchy: Hierarchy, prior: str) -> None:
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


def _check_similarity(similarity: np.ndarray | None, shape: tuple[int, int]) -> None:
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


def _smooth(hierarchy: Hierarchy, rows: np.ndarray, measured: np.ndarray) -> np.ndarray:
    """(K, rows, m) squared-exponential correlations at every length scale."""
    distances = _squared_distances(hierarchy, rows, measured)
    among = _squared_distances(hierarchy, measured, measured)[np.triu_indices(len(measured), 1)]
    middle = float(np.median(among)) if len(among) else 0.0
    # Centroids that coincide have distances of mere rounding, which are no unit.
    unit = middle if middle > 1e-4 else 1.0
    return np.stack([np.exp(-0.5 * distances / (unit * scale**2)) for scale in LENGTH_SCALES])


def _squared_distances(hierarchy: Hierarchy, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    a, b = (hierarchy.centroids[leaves].astype(np.float64) for leaves in (rows, columns))
    return np.maximum((a**2).sum(axis=1)[:, None] + (b**2).sum(axis=1) - 2 * a @ b.T, 0)


def _nested(hierarchy: Hierarchy, rows: np.ndarray, measured: np.ndarray) -> np.ndarray:
    """(K, rows, m) correlations of leaves that share a parent or a large region, at every share between the two."""
    parent = hierarchy.parent
    large = hierarchy.large[parent]
    same_parent = (parent[rows][:, None] == parent[measured]).astype(np.float64)
    same_large = (large[rows][:, None] == large[measured]).astype(np.float64)
    return np.stack([share * same_large + (1 - share) * same_parent for share in LARGE_SHARES])


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
