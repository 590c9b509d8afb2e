"""RDS+: the rows most similar to the proxy rows, taken in turn (Ivison et al., 2025, arXiv:2503.01807).

The paper compares position-weighted means of a language model's last hidden states; here similarity is that of the
problem's features, whatever they are, so that every selector sees the pool through the same eyes. Pass such means as
features to get the paper's.
"""

from __future__ import annotations

from dataclasses import dataclass

from .selector import Cost, Problem, Ranking, by_turns


@dataclass(frozen=True)
class RDS:
    """Tasks take turns, within a task its proxy rows take turns; each takes its most similar row still there.

    Ties go to the smaller row.
    """

    def rank(self, problem: Problem, budget: int | None = None) -> Ranking:
        """See [`Selector.rank`]; memory grows like n + n_proxy * budget."""
        cost = Cost()
        with cost.timed():
            queries = problem.compared()
            rows = by_turns(problem.task, lambda q: problem.features @ queries[q], problem.wanted(budget))
        return Ranking(rows, cost)
