"""RDS+: the rows most similar to the proxy rows, taken in turn (Ivison et al., 2025, arXiv:2503.01807).

The paper compares position-weighted means of a language model's last hidden states; here similarity is that of the
problem's features, whatever they are, so that every selector sees the pool through the same eyes. Pass such means as
features to get the paper's.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import numpy as np

from .selector import Cost, Problem, Ranking


@dataclass(frozen=True)
class RDS:
    """Tasks take turns, within a task its proxy rows take turns; each takes its most similar row still there.

    Ties go to the smaller row.
    """

    def rank(self, problem: Problem, budget: int | None = None) -> Ranking:
        """See [`Selector.rank`]; memory grows like n + n_proxy * budget."""
        cost = Cost()
        with cost.timed():
            rows = _round_robin(problem, problem.wanted(budget))
        return Ranking(rows, cost)


def _round_robin(problem: Problem, wanted: int) -> np.ndarray:
    turns = [deque(np.flatnonzero(problem.task == d).tolist()) for d in range(problem.n_tasks)]
    # A proxy row rarely looks further than this; where it must, what is left of the pool is ranked for it again.
    depth = 4 * wanted // len(problem.task) + 16
    nearest: dict[int, deque[int]] = {}
    taken, queries = np.zeros(len(problem), bool), problem.compared()
    rows: list[int] = []
    while len(rows) < wanted:
        turn = turns[len(rows) % len(turns)]
        query = turn[0]
        turn.rotate(-1)
        queue = nearest.setdefault(query, deque())
        while queue and taken[queue[0]]:
            queue.popleft()
        if not queue:
            queue.extend(_nearest(problem.features, queries[query], taken, depth))
        rows.append(queue.popleft())
        taken[rows[-1]] = True
    return np.array(rows, np.int64)


def _nearest(features: np.ndarray, query: np.ndarray, taken: np.ndarray, count: int) -> list[int]:
    """The `count` rows most similar to the query that are not taken, best first, ties by row."""
    similarity = features @ query
    similarity[taken] = -np.inf
    left = len(taken) - int(taken.sum())
    if count < left:
        least = np.partition(similarity, len(similarity) - count)[len(similarity) - count]
        near = np.flatnonzero(similarity >= least)
    else:
        near = np.flatnonzero(~taken)
    return near[np.argsort(-similarity[near], kind="stable")][:count].tolist()
