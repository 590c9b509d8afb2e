"""What a set of leaves is expected to score, and the greedy order of leaves under it.

Everything here is deterministic: objectives within `TIE` (times the sum of the weights) of each other count as equal.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from .errors import HarpError

Variant = Literal["harp-c", "harp-e"]
VARIANTS: tuple[Variant, ...] = ("harp-c", "harp-e")

# Far below any gain that matters and far above the rounding of sums of numbers in [0, 1].
TIE = 1e-10


@dataclass(frozen=True, eq=False)
class Order:
    """All leaves in greedy order.

    Attributes:
        leaves: (G,) int64 leaf ids, best first.
        gains: (G,) float64, what each leaf added to the objective at its step; may be negative.
        best_prefix: number of leaves at the first maximum of the cumulative gain; 0 if no leaf helps.
    """

    leaves: np.ndarray
    gains: np.ndarray
    best_prefix: int


def predict(phi: np.ndarray, null: np.ndarray, leaves: np.ndarray, variant: Variant) -> np.ndarray:
    """Expected score of every task after finetuning on a set of leaves.

    "harp-c": clip(b + max of positive effects - sum of negative effects), as if gains on one task do not add up.
    "harp-e": clip(b + sum of effects). Both clip to [0, 1] (HARP, arXiv:2606.07690).

    Args:
        phi: (G, D) effects of all leaves.
        null: (D,) scores of the base model, in [0, 1].
        leaves: ids of the set, in any order; may be empty.
        variant: "harp-c" or "harp-e".

    Raises:
        HarpError: the variant is unknown or shapes do not match.
    """
    _check(phi, null, variant)
    some = phi[np.asarray(leaves, dtype=np.int64)]
    if variant == "harp-e":
        return np.clip(null + some.sum(axis=0), 0, 1)
    return np.clip(null + some.max(axis=0, initial=0) + np.minimum(some, 0).sum(axis=0), 0, 1)


def predict_interval(
    mean: np.ndarray,
    sd: np.ndarray,
    null: np.ndarray,
    leaves: np.ndarray,
    variant: Variant,
    *,
    level: float = 0.9,
    draws: int = 1000,
    seed: int = 0,
) -> np.ndarray:
    """Interval of every task's predicted score, from what is not known of the effects of the set's leaves.

    Monte Carlo: every draw takes the effect of each leaf on each task from its own normal posterior and puts all of
    them through the envelope. Leaves and tasks are taken as independent, though effects of nearby leaves err together
    (so sums of many leaves are less certain than this), and null scores as known. As an envelope of means is not the
    mean of envelopes, `predict` of the posterior means may lie outside where clipping or the maximum of HARP-C bite.

    Args:
        mean: (G, D) posterior means of all leaves.
        sd: (G, D) posterior standard deviations.
        null: (D,) scores of the base model, in [0, 1].
        leaves: ids of the set, in any order; may be empty.
        variant: "harp-c" or "harp-e", see `predict`.
        level: share of the draws inside the interval, in (0, 1).
        draws: number of draws.
        seed: seed of the draws.

    Returns:
        (D, 2) lower and upper ends.

    Raises:
        HarpError: the variant is unknown or shapes do not match.
    """
    _check(mean, null, variant)
    leaves = np.asarray(leaves, dtype=np.int64)
    some, spread, all_of_them = mean[leaves], sd[leaves], np.arange(len(leaves))
    random = np.random.default_rng(seed)
    scores = [
        predict(some + spread * random.standard_normal(some.shape), null, all_of_them, variant) for _ in range(draws)
    ]
    return np.quantile(scores, [(1 - level) / 2, (1 + level) / 2], axis=0).T


def greedy(phi: np.ndarray, null: np.ndarray, weights: np.ndarray, *, variant: Variant) -> Order:
    """Order all leaves by adding, each time, the one that raises the objective sum_d w_d yhat_d(S) most.

    Ties go to the larger posterior mean (weighted over tasks), then to the smaller id. One step costs O(G) for each
    task that some leaf would take to 0 or 1 and another would not; all other tasks are summed beforehand.

    Args:
        phi: (G, D) effects of all leaves on the active tasks.
        null: (D,) scores of the base model on them, in [0, 1].
        weights: (D,) weight of each task, not negative.
        variant: "harp-c" or "harp-e", see `predict`.

    Raises:
        HarpError: the variant is unknown, shapes do not match, or weights are negative or not finite.
    """
    _check(phi, null, variant)
    weights = np.asarray(weights, dtype=np.float64)
    if weights.shape != null.shape or not np.all(np.isfinite(weights) & (weights >= 0)):
        raise HarpError(f"Task weights must be {len(null)} finite numbers of at least 0, but are {weights.tolist()}.")
    tie = TIE * weights.sum()
    # By descending mean, then id: the first of several equal leaves is then the one that wins the tie.
    ids = _by_descending_mean(phi @ weights, tie)
    effects = np.asarray(phi, dtype=np.float64)[ids].T.copy()
    # The score of a task would be its level and what the leaf adds, clipped.
    level, best = np.asarray(null, dtype=np.float64), np.zeros((len(null), 1))
    additions = _additions(effects, best, variant)
    objective = float(np.clip(null, 0, 1) @ weights)
    leaves, gains = np.empty(len(phi), np.int64), np.empty(len(phi))
    taken = np.zeros(len(phi), bool)
    linear: np.ndarray | None = None
    scored: np.ndarray | None = None
    for step in range(len(phi)):
        if linear is None:
            lowest, highest = additions.min(axis=1, initial=np.inf), additions.max(axis=1, initial=-np.inf)
        # Tasks that no leaf takes beyond 0 or 1, those that every leaf takes to 1, and those where leaves differ.
        inside = (level + lowest >= 0) & (level + highest <= 1)
        full = ~inside & (level + lowest >= 1)
        mixed = ~inside & ~full & (level + highest > 0)
        if linear is None or (inside != linear).any():
            linear, scored = inside, None
            summed = np.where(taken, -np.inf, weights[linear] @ additions[linear])
        if scored is None or (mixed != scored).any():
            scored, some = mixed, additions[mixed]
            clipped = np.empty_like(some)
        some.clip(-level[mixed, None], 1 - level[mixed, None], out=clipped)
        objectives = weights[mixed] @ clipped
        objectives += summed
        place = int((objectives >= objectives.max() - tie).argmax())
        # What is the same for all leaves: the levels they add to, and the tasks that are full.
        moving = linear | mixed
        before, objective = objective, float(objectives[place] + weights[moving] @ level[moving] + weights[full].sum())
        leaves[step], gains[step] = ids[place], objective - before
        taken[place], summed[place] = True, -np.inf
        added = effects[:, [place]]
        level = level + (added if variant == "harp-e" else np.minimum(added, 0))[:, 0]
        raised = (added > best)[:, 0]
        if variant == "harp-c" and raised.any():
            best = np.maximum(best, added)
            additions[raised] = _additions(effects[raised], best[raised], variant)
            linear = None
        # Taken leaves are dropped in bulk, as every dropping copies all that is left.
        if np.count_nonzero(taken) > len(taken) // 8:
            # compress, unlike indexing, leaves the leaves of a task side by side, which products are fastest with.
            ids, effects, additions = (every.compress(~taken, axis=-1) for every in (ids, effects, additions))
            taken, linear = np.zeros(len(ids), bool), None
    cumulative = np.concatenate(([0.0], np.cumsum(gains)))
    return Order(leaves, gains, int((cumulative >= cumulative.max() - tie).argmax()))


def _check(phi: np.ndarray, null: np.ndarray, variant: str) -> None:
    if variant not in VARIANTS:
        raise HarpError(f"variant must be 'harp-c' or 'harp-e', but is {variant!r}.")
    if phi.ndim != 2 or null.shape != phi.shape[1:]:
        raise HarpError(f"Effects (leaves, tasks) of shape {phi.shape} do not fit null scores of shape {null.shape}.")
    if not np.isfinite(phi).all() or not np.isfinite(null).all():
        raise HarpError("Effects and null scores must be finite, but hold NaN or infinity.")


def _additions(effects: np.ndarray, best: np.ndarray, variant: Variant) -> np.ndarray:
    """What leaves would add to b plus all that is summed; under "harp-c" with the set's `best` positive effects."""
    return effects if variant == "harp-e" else np.maximum(effects, best) + np.minimum(effects, 0)


def _by_descending_mean(means: np.ndarray, tie: float) -> np.ndarray:
    """Ids by descending mean, equal ones (a chain of gaps within the tolerance) by ascending id."""
    order = np.argsort(-means, kind="stable")
    group = np.concatenate(([0], np.cumsum(-np.diff(means[order]) > tie))) if len(means) else order
    return order[np.lexsort((order, group))]
