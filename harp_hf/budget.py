"""How a budget of rows is spent on the best prefix of a greedy order, and on random rows that have their part."""

from __future__ import annotations

import heapq
from typing import Literal

import numpy as np

from .background import Background
from .envelopes import Order
from .errors import HarpError
from .hierarchy import Hierarchy

BudgetBy = Literal["task", "leaf"]
BUDGET_BY: tuple[BudgetBy, ...] = ("task", "leaf")


def spend(
    order: Order,
    hierarchy: Hierarchy,
    phi: np.ndarray,
    weights: np.ndarray,
    budget: int | None,
    by: BudgetBy,
    background: Background | None,
    gain: np.ndarray,
) -> tuple[np.ndarray, np.ndarray, int]:
    """Rows of the best prefix, and after them random rows where leaves were measured among such.

    Random rows have of each task's rows the part that [`Background.part`] gives them, and what leaves leave of the
    budget. Without a budget all rows of the prefix are taken, and as many random ones as make up their part.

    Args:
        order, hierarchy, phi, weights, budget: as in `share`.
        by: "task" is `share`, "leaf" is `cut`.
        background: the random rows; None for leaves that were measured alone.
        gain: (D,) what random rows alone add to the base model's scores.

    Returns:
        rows: (r,) int64 indices into the pool; r <= budget.
        ranks: (r,) int64 place of each row's leaf in the greedy order, from 0.
        count: how many of the rows are not random.
    """
    if background is None:
        rows, ranks = cut(order, hierarchy, budget) if by == "leaf" else share(order, hierarchy, phi, weights, budget)
        return rows, ranks, len(rows)
    parts = background.part(phi[order.leaves[: order.best_prefix]], gain)
    random = float(weights @ parts / weights.sum())
    left = None if budget is None else round(budget * (1 - random))
    rows, ranks = np.empty(0, np.int64), np.empty(0, np.int64)
    if left != 0 and by == "leaf":
        rows, ranks = cut(order, hierarchy, left)
    elif left != 0:
        rows, ranks = share(order, hierarchy, phi, weights * (1 - parts), left, np.zeros(len(parts)))
    part = round(len(rows) * random / (1 - random)) if len(rows) else 0
    more = background.rows(len(hierarchy.leaf), part if budget is None else budget - len(rows), rows)
    place = np.full(hierarchy.n_leaves, len(order.leaves))
    place[order.leaves] = np.arange(len(order.leaves))
    return np.concatenate([rows, more]), np.concatenate([ranks, place[hierarchy.leaf[more]]]), len(rows)


def cut(order: Order, hierarchy: Hierarchy, budget: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Rows of the best prefix in greedy order, at most `budget` of them.

    Within a leaf rows come nearest to its centroid first, so the leaf that crosses the budget gives its nearest rows.

    Args:
        order: from `greedy`.
        hierarchy: the rows of every leaf.
        budget: largest number of rows, at least 1; None for no limit.

    Returns:
        rows: (r,) int64 indices into the pool; r <= budget.
        ranks: (r,) int64 place of each row's leaf in the greedy order, from 0.

    Raises:
        HarpError: budget is below 1.
    """
    if budget is not None and budget < 1:
        raise HarpError(f"budget must be at least 1 row, but is {budget}.")
    leaves = order.leaves[: order.best_prefix]
    rows = np.concatenate([np.empty(0, np.int64), *(hierarchy.rows(leaf) for leaf in leaves)])
    ranks = np.repeat(np.arange(len(leaves)), hierarchy.sizes[leaves])
    return rows[:budget], ranks[:budget]


def share(
    order: Order,
    hierarchy: Hierarchy,
    phi: np.ndarray,
    weights: np.ndarray,
    budget: int | None = None,
    level: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Rows of the best prefix, where the tasks share a budget that is smaller than it.

    Rows are handed out one by one to the task that has fewest for its weight. A task takes them from the leaves of the
    prefix in proportion to the square of what they do to it beyond a level (by the divisor method of D'Hondt), so that
    several leaves that each hold a part of it all have their part. Rows that no task asks for go to the leaves in
    greedy order. What a leaf gives is spread evenly over its rows from the centroid outwards, as its effect was
    measured on all of them.

    Args:
        order: from `greedy`.
        hierarchy: the rows of every leaf.
        phi: (G, D) effects of all leaves on the active tasks.
        weights: (D,) weight of each task, not negative.
        budget: largest number of rows, at least 1; None for no limit.
        level: (D,) the effect from which on a leaf helps a task; None for that of the mean row of the pool.

    Returns:
        As of `cut`, which gives the same where the budget holds the whole prefix.

    Raises:
        HarpError: budget is below 1.
    """
    leaves = order.leaves[: order.best_prefix]
    sizes = hierarchy.sizes[leaves]
    if budget is None or budget < 1 or sizes.sum() <= budget:
        return cut(order, hierarchy, budget)
    level = hierarchy.sizes @ phi / hierarchy.sizes.sum() if level is None else level
    excess = np.maximum(phi[leaves] - level, 0) ** 2
    # For each task a heap of leaves by excess over the rows taken so far and one.
    claims = [[(-excess[k, d], 0, k) for k in np.flatnonzero(excess[:, d])] for d in range(len(weights))]
    for heap in claims:
        heapq.heapify(heap)
    turns = [(0.0, d) for d in range(len(weights)) if weights[d] > 0 and claims[d]]
    left = sizes.copy()
    free = int(budget)
    while turns and free:
        taken, d = heapq.heappop(turns)
        while claims[d] and not left[claims[d][0][2]]:
            heapq.heappop(claims[d])
        if claims[d]:
            _, count, k = claims[d][0]
            heapq.heapreplace(claims[d], (-excess[k, d] / (count + 2), count + 1, k))
            heapq.heappush(turns, (taken + 1 / weights[d], d))
            left[k] -= 1
            free -= 1
    unasked = np.minimum(left, np.maximum(free - np.cumsum(left) + left, 0))
    given = sizes - left + unasked
    rows = [
        hierarchy.rows(leaf)[((np.arange(count) + 0.5) * size / max(count, 1)).astype(np.int64)]
        for leaf, size, count in zip(leaves, sizes, given, strict=True)
    ]
    return np.concatenate(rows), np.repeat(np.arange(len(leaves)), given)
