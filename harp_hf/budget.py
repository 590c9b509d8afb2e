"""How a budget of rows is spent on a greedy order of leaves: whole leaves, or shared by the tasks."""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Sequence
from typing import Literal

import numpy as np
from scipy.special import ndtr

from .envelopes import TIE, Order
from .errors import HarpError
from .hierarchy import Hierarchy

BudgetBy = Literal["task", "leaf"]
BUDGET_BY: tuple[BudgetBy, ...] = ("task", "leaf")


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
    claims: np.ndarray,
    budget: int | None = None,
    nearest: Sequence[np.ndarray] = (),
) -> tuple[np.ndarray, np.ndarray]:
    """Rows that the tasks choose by turns, where the budget is smaller than the best prefix.

    So few rows need not come from the few leaves whose effects already exhaust the envelope: every leaf of the prefix
    has a part, and every other one whose own effects, weighted and summed, are above zero. Rows are handed out one by
    one to the task that has fewest for its claim (all this by the divisor method of D'Hondt). A task takes them from
    these leaves in proportion to the square of what they do to it beyond the mean row of the pool, so that several
    leaves that each hold a part of it all have their part. The pool at large takes them from all these leaves by their
    size. Rows that nobody asks for go to the leaves in greedy order.

    Which rows: the proxy rows of the tasks take turns, and each takes the row most similar to it that is left in the
    leaves from which its task still takes rows. Rows that no proxy row is near, those of the pool at large and those
    that nobody asks for are spread evenly over what is left of the leaf, from the centroid outwards, as its effect was
    measured on all of its rows.

    Args:
        order: from `greedy`.
        hierarchy: the rows of every leaf.
        phi: (G, D) effects of all leaves on the active tasks.
        weights: (D,) weight of each task, not negative.
        claims: (D + 1,) to how many rows each task, and last the pool at large, is entitled, in proportion; not
            negative. See `claims_of`.
        budget: largest number of rows, at least 1; None for no limit.
        nearest: for each task, (q, k) rows of the pool most similar to each of its q proxy rows, the most similar
            first, or -1; see [`~harp_hf.similarity.nearest_rows`]. Empty where that is not known.

    Returns:
        As of `cut`, which gives the same where the budget holds the whole prefix.

    Raises:
        HarpError: budget is below 1.
    """
    if budget is None or budget < 1 or hierarchy.sizes[order.leaves[: order.best_prefix]].sum() <= budget:
        return cut(order, hierarchy, budget)
    helps = (np.arange(len(order.leaves)) < order.best_prefix) | (phi[order.leaves] @ weights > TIE * weights.sum())
    leaves, ranks = order.leaves[helps], np.flatnonzero(helps)
    sizes = hierarchy.sizes[leaves]
    asked = np.maximum(phi[leaves] - mean_row(phi, hierarchy), 0) ** 2
    quota = _quotas(np.column_stack([asked, sizes]), sizes, claims, budget)
    left = sizes - quota.sum(axis=0)
    free = budget - quota.sum()
    given = sizes - left + np.minimum(left, np.maximum(free - np.cumsum(left) + left, 0))
    # The place of each pool row's leaf among these, and one more place for all other leaves.
    place = np.full(hierarchy.n_leaves, len(leaves))
    place[leaves] = np.arange(len(leaves))
    similar = _most_similar(quota, nearest, place[hierarchy.leaf])
    rows = [_given(hierarchy.rows(leaf), count, similar) for leaf, count in zip(leaves, given, strict=True)]
    return np.concatenate(rows), np.repeat(ranks, given)


def _quotas(asked: np.ndarray, sizes: np.ndarray, claims: np.ndarray, budget: int) -> np.ndarray:
    """(D + 1, L) rows that each claimant takes of each leaf, in proportion to what it asks of them, (L, D + 1)."""
    # For each claimant a heap of leaves by what it asks of them over the rows it has taken so far and one.
    heaps = [[(-asked[k, d], 0, k) for k in np.flatnonzero(asked[:, d])] for d in range(len(claims))]
    for heap in heaps:
        heapq.heapify(heap)
    # And a heap of claimants by the rows that they would have with one more, over their claim.
    turns = [(1 / claims[d], d) for d in range(len(claims)) if claims[d] > 0 and heaps[d]]
    heapq.heapify(turns)
    left, free = sizes.copy(), int(budget)
    quota = np.zeros(asked.T.shape, np.int64)
    while turns and free:
        turn, d = heapq.heappop(turns)
        while heaps[d] and not left[heaps[d][0][2]]:
            heapq.heappop(heaps[d])
        if heaps[d]:
            _, count, k = heaps[d][0]
            heapq.heapreplace(heaps[d], (-asked[k, d] / (count + 2), count + 1, k))
            heapq.heappush(turns, (turn + 1 / claims[d], d))
            quota[d, k] += 1
            left[k] -= 1
            free -= 1
    return quota


def _most_similar(quota: np.ndarray, nearest: Sequence[np.ndarray], place: np.ndarray) -> np.ndarray:
    """(n,) bool, rows that proxy rows take, of (D + 1, L) quotas and each row's `place` in them, L for none."""
    quota, taken = np.pad(quota, ((0, 0), (0, 1))), np.zeros(len(place), bool)
    turns = deque((d, iter(rows[rows >= 0].tolist())) for d, lists in enumerate(nearest) for rows in lists)
    while turns:
        d, rows = turns.popleft()
        row = next((row for row in rows if quota[d, place[row]] and not taken[row]), None)
        if row is not None:
            taken[row] = True
            quota[d, place[row]] -= 1
            turns.append((d, rows))
    return taken


def _given(rows: np.ndarray, count: int, similar: np.ndarray) -> np.ndarray:
    """So many rows of a leaf, in its order: the similar ones, and others spread evenly."""
    chosen = similar[rows]
    others, count = np.flatnonzero(~chosen), count - chosen.sum()
    chosen[others[((np.arange(count) + 0.5) * len(others) / max(count, 1)).astype(np.int64)]] = True
    return rows[chosen]


def claims_of(
    weights: np.ndarray, null: np.ndarray, best: np.ndarray, floor: np.ndarray, as_good: np.ndarray
) -> np.ndarray:
    """To how many rows of a small budget each task, and last the pool at large, is entitled, in proportion.

    A task is to have rows by what they still bring it. Its score is taken to grow with the logarithm of its rows along
    a logistic curve, from a floor that rows of any kind bring it to, up to 1. A sum of such scores is largest where
    rows are in proportion to the slopes, weight * (y - floor) (1 - y) / (1 - floor) at score y; here to their mean
    from the floor to the score y that the best leaf brought it to, gain / 2 - gain^2 / 3 (1 - floor) with
    gain = y - floor. With the probability that random rows do as well as any leaf, the claim is that of the pool at
    large instead: the mean slope from the null score to the floor.

    Args:
        weights: (D,) weight of each task, not negative.
        null: (D,) scores of the base model, in [0, 1].
        best: (D,) effects of the best leaf measured for each task.
        floor: (D,) effects of random rows.
        as_good: (D,) probability that random rows do as well as the task's best leaf; see `random_as_good`.

    Returns:
        (D + 1,) claims, at least 0.
    """
    own, at_large = _mean_slope(null + floor, null + best), _mean_slope(null, null + floor)
    return np.append(weights * (1 - as_good) * own, np.sum(weights * as_good * at_large))


def _mean_slope(floor: np.ndarray, score: np.ndarray) -> np.ndarray:
    floor, score = np.clip(floor, 0, 1), np.clip(score, 0, 1)
    gain, room = np.maximum(score - floor, 0), 1 - floor
    return gain / 2 - np.divide(gain**2, 3 * room, out=np.zeros_like(gain), where=room > 0)


def mean_row(phi: np.ndarray, hierarchy: Hierarchy) -> np.ndarray:
    """(D,) effects of the leaf of the pool's mean row, from those (G, D) of all leaves."""
    return hierarchy.sizes @ phi / hierarchy.sizes.sum()


def random_as_good(mean: np.ndarray, sd: np.ndarray, control: np.ndarray, variance: np.ndarray) -> np.ndarray:
    """Probability that random rows bring a task at least what its best leaf brings it.

    Both are taken as normal and independent; the best leaf is that of the largest mean.

    Args:
        mean: (G, D) posterior means of the effects of all leaves.
        sd: (G, D) posterior standard deviations.
        control: (D,) measured effects of random rows.
        variance: (D,) their variances, above zero.

    Returns:
        (D,) probabilities.
    """
    best = mean.argmax(axis=0), np.arange(mean.shape[1])
    return ndtr((control - mean[best]) / np.sqrt(variance + sd[best] ** 2))
