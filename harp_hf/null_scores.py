"""Scores of the base model that were measured elsewhere."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .errors import DataError, reason
from .proxy import ProxySet


def read_null_scores(source: Any, proxy: ProxySet) -> np.ndarray:
    """Null scores for every proxy row.

    Args:
        source: (n_proxy,) array of scores; dict from tasks to one score each; or path of a JSON-lines file with `task`
            and `score` in every line, either one line a task or one line a proxy row in the order of the proxy set.
        proxy: The proxy set.

    Returns:
        `np.ndarray`: (n_proxy,) float64 in [0, 1]. A task known by its mean alone has that mean in all its rows, so
        that differences to it are not paired and its effects count as less certain.

    Raises:
        DataError: A task is missing or unknown, the number of scores does not fit, or a score is not in [0, 1].
    """
    if isinstance(source, str | Path):
        by_task = _read_lines(Path(source))
    elif isinstance(source, dict):
        by_task = {str(task): [score] for task, score in source.items()}
    else:
        scores = np.asarray(source, dtype=None if isinstance(source, np.ndarray) else object)
        if scores.shape != (len(proxy),):
            raise DataError(f"The null scores have shape {scores.shape}, but the proxy set has {len(proxy)} rows.")
        return _checked(scores.tolist(), "The null scores hold")
    unknown = sorted(set(by_task) - set(proxy.tasks))
    if unknown:
        raise DataError(f"The null scores name the task {unknown[0]!r}, which is not in the proxy set.")
    scores = np.empty(len(proxy))
    for d, task in enumerate(proxy.tasks):
        rows = np.flatnonzero(proxy.task == d)
        if len(by_task.get(task, [])) not in (1, len(rows)):
            raise DataError(
                f"Task {task!r} has {len(by_task.get(task, []))} null scores; it needs one, or one for each of its "
                f"{len(rows)} rows."
            )
        scores[rows] = _checked(by_task[task], f"The null scores of task {task!r} hold")
    return scores


def _read_lines(path: Path) -> dict[str, list[Any]]:
    by_task: dict[str, list[Any]] = defaultdict(list)
    try:
        # Not `splitlines`, for which a task may hold the end of a line.
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, ValueError) as error:
        raise DataError(f"The null scores {path} cannot be read: {reason(error)}.") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            by_task[str(row["task"])].append(row["score"])
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise DataError(f"Line {number} of {path} is not a JSON object with `task` and `score`.") from error
    return by_task


def _checked(scores: Sequence[Any], where: str) -> np.ndarray:
    for score in scores:
        number = isinstance(score, int | float | np.integer | np.floating) and not isinstance(score, bool)
        if not number or not 0 <= score <= 1:
            raise DataError(f"{where} {score!r}, which is not a number in [0, 1].")
    return np.array(scores, np.float64)
