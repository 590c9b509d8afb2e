"""Universal kriging of the effects of one task, averaged over a grid of covariances.

Effects y of m measured leaves have an unknown constant mean and the covariance V = signal R + leaf I + noise.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from scipy.linalg.blas import dtrmm
from scipy.linalg.lapack import dpotrf, dpotri, dpotrs

# Points of the grid that weigh less are left out of the average.
NEGLIGIBLE = 1e-9
# Leaves whose variances are computed at once.
_BLOCK = 2048


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
    known: np.ndarray,
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
        known: (3, K, p) what [`likelihoods`] gives for these effects and this covariate.
    """
    m, u, z = len(effects), across.shape[1], trend.measured
    centre = (effects - trend.mean * z).mean()
    y = effects - trend.mean * z - centre
    fixed = trend.variance * np.outer(z, z)
    weights = grid_weights(known, log_prior, trend.mean, trend.variance)

    mean_m, square_m = np.zeros(m), np.zeros(m)
    mean_o, square_o = np.zeros(u), np.zeros(u)
    for every, correlation, matrix in zip(weights, across, among, strict=True):
        kept = every > NEGLIGIBLE
        if not kept.any():
            continue
        w, signals, leaves = every[kept], signal[kept], leaf[kept]
        precision, pull, level = solve(noise, matrix, signals, leaves, fixed)
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


def grid_weights(known: np.ndarray, log_prior: np.ndarray, mean: float, variance: float) -> np.ndarray:
    """(K, p) posterior weights of the points of the grid, which sum to 1.

    Args:
        known: (3, K, p) what [`likelihoods`] gives.
        log_prior: (p,) log prior weights of the pairs of variances.
        mean: Prior mean of the slope on the covariate.
        variance: Its prior variance.
    """
    log_likelihood, product, curvature = known
    left = product - mean * curvature
    inflation = 1 + variance * curvature
    explained = mean * (product + left) + variance * left**2 / inflation
    return normalised(log_prior + log_likelihood + 0.5 * (explained - np.log(inflation)))


def normalised(log_weights: np.ndarray) -> np.ndarray:
    """Weights that sum to 1, from their logarithms."""
    weights = np.exp(log_weights - log_weights.max())
    return weights / weights.sum()


def solve(
    noise: np.ndarray,
    correlation: np.ndarray,
    signal: np.ndarray,
    leaf: np.ndarray,
    fixed: np.ndarray | float = 0.0,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For p pairs of variances, in the terms of [`average`]: P (p, m, m), u/q (p, m) and 1/q (p,).

    `fixed` (m, m) is added to the covariance of every pair.
    """
    m = len(noise)
    column = signal[:, None] * correlation.mean(axis=0) + (leaf[:, None] + noise) / m
    column += np.mean(np.broadcast_to(fixed, (m, m)), axis=0)
    total = column.mean(axis=1)
    precision = np.empty((len(signal), m, m))
    for k, (matrix, size) in enumerate(_centred(noise, correlation, signal, leaf, fixed)):
        lower = dpotri(_factor(matrix), lower=1)[0]
        np.add(lower, lower.T, out=precision[k])
        precision[k][np.diag_indices(m)] /= 2
        precision[k] -= 1 / size / m
    pull = np.einsum("pij,pj->pi", precision, column)
    return precision, 1 / m - pull, total - np.einsum("pi,pi->p", column, pull)


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
            # log|V| + log q, which is the log determinant of what is left after centring.
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
