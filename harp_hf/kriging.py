"""Universal kriging of the effects of one task, averaged over a grid of covariances.

Effects y of m measured leaves have an unknown constant mean and the covariance V = signal R + leaf I + noise.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from scipy.linalg.blas import dtrmm, strmm
from scipy.linalg.lapack import dpotrf, dpotri, dpotrs

# Points of the grid that weigh less are left out of the average.
NEGLIGIBLE = 1e-9
# Leaves whose variances are computed at once.
_BLOCK = 1024
# How well conditioned a quadratic form must be for single precision: its mean eigenvalue over the signal's variance.
# Variances then err by some 1e-6 of the prior variance (1.3e-6 at most for 180 measured leaves, noisy or exact).
_SINGLE = 10


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
    m, u, z, other = len(effects), across.shape[1], trend.measured, trend.other
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
        # For the other leaves c is linear in the correlation and z, so means are linear and variances quadratic in
        # them: the average over pairs of variances is taken inside those forms, once for all leaves.
        gain, lost = (_lifted(vectors, signals, z, trend.variance) for vectors in (residual, pull))
        gain = np.column_stack([gain, pull @ y])
        share, middle, lost = w.sum(), w @ gain / w.sum(), w @ lost
        apart = np.sqrt(w)[:, None] * (gain - middle)
        along = precision @ z
        rest = np.stack([*apart[:, :m], lost[:m], trend.variance * (w * signals) @ along])
        explained = np.tensordot(w * signals**2, precision, axes=1)
        means, others, square = _forms(middle[:m], rest, explained, w @ signals, correlation)
        *spread, level_part, trend_part = others
        means += middle[m] * other + middle[m + 1]
        mean_o += share * means
        square_o += share * means**2 - square + w @ (signals + leaves + level)
        for found, (slope, constant) in zip(spread, apart[:, m:], strict=True):
            square_o += (found + slope * other + constant) ** 2
        square_o += other**2 * trend.variance * (share - trend.variance * w @ (along @ z))
        square_o -= 2 * (level_part + other * (lost[m] + trend_part))
    return Averaged(
        mean_m + centre + trend.mean * z,
        np.maximum(square_m - mean_m**2, 0),
        mean_o + centre + trend.mean * other,
        np.maximum(square_o - mean_o**2, 0),
    )


def _lifted(vectors: np.ndarray, signal: np.ndarray, z: np.ndarray, variance: float) -> np.ndarray:
    """(p, m + 1): what (p, m) vectors weigh a leaf's correlations and its covariate by."""
    return np.concatenate([signal[:, None] * vectors, variance * (vectors @ z)[:, None]], axis=1)


def _forms(
    linear: np.ndarray, rest: np.ndarray, explained: np.ndarray, signal: float, near: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(u,) l'x, (r, u) Ax and (u,) x'Ex for the correlations x of every other leaf.

    Where there are many leaves all but l'x are in single precision: x'Ex is then wrong by some 1e-6 of the signal.

    Args:
        linear: (m,) l.
        rest: (r, m) A.
        explained: (m, m) E, positive semidefinite with E1 = 0.
        signal: variance of the signal, which x'Ex does not exceed by much.
        near: (u, m) correlations.
    """
    m = near.shape[1]
    # E = LL', and 1'L = 0. |L'x|^2 has no large terms that cancel, as x'Ex has, and a triangle takes half the time.
    factor = np.zeros((m, m))
    if signal > 0:
        factor[:-1, :-1] = np.linalg.cholesky(explained[:-1, :-1])
    factor[-1] = -factor.sum(axis=0)
    single = len(near) > _BLOCK and np.trace(explained) <= _SINGLE * m * signal
    kind, multiply = (np.float32, strmm) if single else (np.float64, dtrmm)
    factor, rest = factor.astype(kind), rest.astype(kind)
    first, others, square = np.empty(len(near)), np.empty((len(rest), len(near)), kind), np.empty(len(near))
    for start in range(0, len(near), _BLOCK):
        rows = slice(start, start + _BLOCK)
        first[rows] = near[rows] @ linear
        x = near[rows].astype(kind)
        others[:, rows] = rest @ x.T
        product = multiply(1.0, factor, x.T, trans_a=1, lower=1, overwrite_b=1)
        square[rows] = np.einsum("ij,ij->j", product, product)
    return first, others, square


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
    above = ~np.tri(m, dtype=bool)
    for k, (matrix, size) in enumerate(_centred(noise, correlation, signal, leaf, fixed)):
        inverse = dpotri(_factor(matrix), lower=1, overwrite_c=1)[0]
        np.copyto(inverse, inverse.T, where=above)
        np.subtract(inverse, 1 / size / m, out=precision[k])
    pull = (precision @ column[:, :, None])[:, :, 0]
    return precision, 1 / m - pull, total - (column * pull).sum(axis=1)


def likelihoods(
    effects: np.ndarray, z: np.ndarray, noise: np.ndarray, among: np.ndarray, signal: np.ndarray, leaf: np.ndarray
) -> np.ndarray:
    """(3, K, p): the restricted log-likelihood of effects y, z'Py and z'Pz, without inverting anything.

    Arguments as in [`average`], with z (m,) the covariate.
    """
    vectors = np.stack([effects - effects.mean(), z - z.mean()], axis=1)
    found = np.empty((3, len(among), len(signal)))
    for k, correlation in enumerate(among):
        # Without a shared part the correlation does not matter.
        points = np.flatnonzero(signal) if k else np.arange(len(signal))
        found[:, k] = found[:, 0]
        for j, (matrix, size) in zip(points, _centred(noise, correlation, signal[points], leaf[points]), strict=True):
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
    # The size is the trace over m - 1 degrees of freedom. g I centred has g as its size, and with that level is g I.
    sizes = [float(np.trace(part)) / (m - 1) if m > 1 else 1.0 for part in (shared, own)]
    shared, own = shared + sizes[0] / m, own + sizes[1] / m
    for s, g in zip(signal.tolist(), leaf.tolist(), strict=True):
        matrix = s * shared
        matrix += own
        matrix.reshape(-1)[:: m + 1] += g
        yield matrix, s * sizes[0] + sizes[1] + g


def _around_means(matrix: np.ndarray) -> np.ndarray:
    """A symmetric matrix, its rows and columns around their means."""
    column = matrix.mean(axis=0)
    return matrix - column - column[:, None] + column.mean()


def _factor(matrix: np.ndarray) -> np.ndarray:
    """Lower Cholesky factor of a positive definite matrix, which is overwritten; above the diagonal is anything."""
    factor, failed = dpotrf(matrix.T, lower=1, clean=0, overwrite_a=1)
    if failed:
        raise np.linalg.LinAlgError("A covariance is not positive definite.")
    return factor
