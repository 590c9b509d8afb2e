"""Confidence intervals of test scores, where both the test rows and the finetunes are samples."""

from __future__ import annotations

import numpy as np
from scipy.stats import t


def mean_intervals(scores: np.ndarray, task: np.ndarray, level: float = 0.95) -> np.ndarray:
    """Mean of each task and mean over tasks, with intervals for other test rows and other finetunes.

    Seeds and rows are crossed random effects (Searle, Casella and McCulloch, 1992): with R seeds and n rows of one
    task, the variance of the mean is that of the seeds' means over R, plus that of the rows' means over n, minus the
    mean square of the rest over R n, which both of them hold. The interval is Student's, with Satterthwaite's degrees
    of freedom. Rows are drawn within tasks. With one seed, only the rows count. One row says nothing of how rows vary:
    a task that has no more has no interval, nor has then the mean over tasks.

    For a difference of two selections pass the difference of their scores: the same rows and seeds make it paired.

    Args:
        scores: (R, n) score of each test row after the finetune with each seed, or differences of such scores.
        task: (n,) int, task of each row, 0..D-1, none left out.
        level: Share of intervals that hold the truth, in (0, 1).

    Returns:
        `np.ndarray`: (D + 1, 3) mean, lower and upper end for each task and, last, for the mean over tasks; ends are
        NaN where they are not known.
    """
    n_seeds, n_tasks = len(scores), int(task.max()) + 1
    means = np.stack([scores[:, task == d].mean(axis=1) for d in range(n_tasks)])
    parts = [_row_variances(scores[:, task == d]) for d in range(n_tasks)]
    found = [_interval(means[d], [parts[d]], n_seeds, level) for d in range(n_tasks)]
    shared = [(rows / n_tasks**2, rest / n_tasks**2, df) for rows, rest, df in parts]
    return np.array([*found, _interval(means.mean(axis=0), shared, n_seeds, level)])


def _row_variances(scores: np.ndarray) -> tuple[float, float, int]:
    """Variance that the rows give the mean, the share of it that is not theirs alone, and degrees of freedom."""
    n_seeds, n_rows = scores.shape
    by_row = scores.mean(axis=0)
    rows = by_row.var(ddof=1) / n_rows if n_rows > 1 else np.nan
    rest = 0.0
    if n_seeds > 1 and n_rows > 1:
        around = scores - by_row - scores.mean(axis=1, keepdims=True) + scores.mean()
        rest = (around**2).sum() / (n_seeds - 1) / (n_rows - 1) / n_seeds / n_rows
    return float(rows), float(rest), max(n_rows - 1, 1)


def _interval(
    by_seed: np.ndarray, parts: list[tuple[float, float, int]], n_seeds: int, level: float
) -> tuple[float, float, float]:
    mean = float(by_seed.mean())
    seeds = float(by_seed.var(ddof=1)) / n_seeds if n_seeds > 1 else 0.0
    rows = sum(part[0] for part in parts)
    if np.isnan(rows):
        return mean, np.nan, np.nan
    variance = max(seeds + rows - sum(part[1] for part in parts), seeds, rows)
    if variance == 0:
        return mean, mean, mean
    freedom = variance**2 / (seeds**2 / max(n_seeds - 1, 1) + sum(part[0] ** 2 / part[2] for part in parts))
    reach = t.ppf((1 + level) / 2, freedom) * variance**0.5
    return mean, float(mean - reach), float(mean + reach)
