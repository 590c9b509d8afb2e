"""Shapley values of leaves by finetuning on unions, after SHED (He et al., 2024, arXiv:2405.00705).

SHED clusters the pool, lets a few rows stand for each cluster, and estimates the Shapley value of these by truncated
Monte Carlo over permutations (Ghorbani and Zou, 2019, arXiv:1904.02868), several of them added at a time. Here the
clusters are the hierarchy's leaves.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import permutations as all_permutations

import numpy as np

from .selector import Problem, Ranking, descending, leaves_to_rows
from .unions import Union, Unions


@dataclass(frozen=True)
class Shapley:
    """Leaves by the Shapley value of the mean score over tasks; rows within a leaf nearest to its centroid first.

    At most permutations * steps finetunes.

    Attributes:
        permutations (`int`): Random orders of the leaves; with all that there are, a step for each leaf and no
            `tolerance`, the values are exact.
        steps (`int`): Unions measured in each order; leaves added in one step share the gain equally.
        tolerance (`float`): An order is cut where its score is that near the score of all leaves.
        rows_per_leaf (`int`, *optional*): Rows that stand for a leaf; `None` for all.
        epochs (`float`, *optional*): Passes over each union; `None` for `max_steps` steps.
    """

    permutations: int = 8
    steps: int = 8
    tolerance: float = 0.01
    rows_per_leaf: int | None = 16
    epochs: float | None = 1.0

    def rank(self, problem: Problem, budget: int | None = None) -> Ranking:
        """See [`Selector.rank`]; needs `hierarchy`, `run`, `finetuner` and `evaluator`."""
        problem.wanted(budget)
        unions = Unions(problem, "shapley", self.rows_per_leaf, self.epochs)
        n_leaves = unions.hierarchy.n_leaves
        values = shapley_values(
            lambda some: unions.scores(some).mean(axis=1), n_leaves, permutations=self.permutations,
            group=math.ceil(n_leaves / self.steps), tolerance=self.tolerance, seed=problem.seed,
        )  # fmt: skip
        return Ranking(leaves_to_rows(unions.hierarchy, descending(values)), unions.cost)


def shapley_values(
    value: Callable[[Sequence[Union]], np.ndarray],
    players: int,
    *,
    permutations: int,
    group: int = 1,
    tolerance: float = 0.0,
    seed: int = 0,
) -> np.ndarray:
    """Mean gain of each player when it joins those before it in an order, over random orders.

    The values sum to v(all) - v(none), exactly with no tolerance and within it otherwise.

    Args:
        value: Values of several sets of players at once, each set in ascending order; may be asked twice for one.
        players: Their number n.
        permutations: Orders; n! or more means each order once.
        group: Players that join together and share the gain equally.
        tolerance: Players that join a set whose value is nearer than this to that of all gain nothing.
        seed: Draws the orders.

    Returns:
        (n,) values.
    """
    random = np.random.default_rng(seed)
    if players <= 20 and permutations >= math.factorial(players):
        orders = np.array(list(all_permutations(range(players))))
    else:
        orders = np.array([random.permutation(players) for _ in range(permutations)])
    empty, everyone = value([(), tuple(range(players))])
    gained, reached = np.zeros(players), np.full(len(orders), empty)
    going = np.flatnonzero(np.abs(everyone - reached) >= tolerance)
    for start in range(0, players, group):
        if not len(going):
            break
        joined = orders[going, start : start + group]
        now = value([tuple(sorted(order)) for order in orders[going, : start + group].tolist()])
        gains = np.repeat(((now - reached[going]) / joined.shape[1])[:, None], joined.shape[1], axis=1)
        np.add.at(gained, joined, gains)
        reached[going] = now
        going = going[np.abs(everyone - now) >= tolerance]
    return gained / len(orders)
