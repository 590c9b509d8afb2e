"""From the scores of finetunes to the effect of every measured leaf on every task, and which tasks were affected."""

from __future__ import annotations

import numpy as np
from scipy.stats import chi2, false_discovery_control

from .errors import HarpError

# The task's pooled variance counts as much as this many rows of the leaf's own. A leaf with an effect has answers that
# vary, so its own variance is large just because of the effect: taken at its word, a clear effect passes for noise.
PRIOR_ROWS = 100


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
        replicates: (m, R, n_proxy) scores of every run, NaN where a leaf had fewer than R runs. The variance that runs
            alone give a task's mean, pooled over leaves and divided by the leaf's number of runs, is added; nothing
            where no leaf was repeated.

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
        variances = variances + _run_variance(replicates, member)
    return effects, variances


def _run_variance(replicates: np.ndarray, member: np.ndarray) -> np.ndarray:
    """(m, D) variance that a leaf's runs give its mean beyond that of the paired differences.

    Runs and rows are crossed: the variance of the runs' means also holds the mean square of row by run over n, which
    the rows' differences hold already, so that is taken off.
    """
    ran = np.isfinite(replicates).all(axis=2, keepdims=True)
    runs, rows = ran.sum(axis=1), member.sum(axis=0)
    if not runs.all():
        raise HarpError("Every measured leaf needs the scores of at least one run.")
    around = np.where(ran, replicates - np.nanmean(replicates, axis=1, keepdims=True), 0)
    means = around @ member / rows
    rest = around - means @ member.T
    freedom = max(int((runs - 1).sum()), 1)
    between = (means**2).sum(axis=(0, 1)) / freedom
    within = (rest**2).sum(axis=(0, 1)) @ member / freedom / np.maximum(rows - 1, 1)
    return np.maximum(between - within / rows, 0) / runs


def active_tasks(effects: np.ndarray, variances: np.ndarray, *, fdr: float = 0.1) -> np.ndarray:
    """Tasks whose measured effects are distinguishable from none.

    The sum of squared effects over their variances is compared with a chi-square of m degrees of freedom, and tasks
    are chosen by Benjamini and Hochberg (1995). Effects share the base model's scores and the proxy rows, so their
    noise is correlated, which the chi-square ignores: where no task has an effect, 15 to 25 % of them are declared
    active at `fdr` 0.1.

    Args:
        effects: (m, D) measured effects.
        variances: (m, D) their variances, above 0.
        fdr: nominal share of false discoveries, in (0, 1).

    Returns:
        (D,) bool, True for active tasks.
    """
    p_values = chi2.sf((effects**2 / variances).sum(axis=0), df=len(effects))
    return false_discovery_control(p_values) <= fdr
