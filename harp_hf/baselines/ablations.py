"""HARP with one of its parts taken away: what inference, envelope, posterior and similarity are each worth."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from ..effects import active_tasks
from ..envelopes import Order, greedy
from ..execution.local import measure_leaves
from ..measurements import Measurements
from ..names import CONTROL
from ..posterior import Posterior, infer
from ..result import HarpResult
from ..stages import stage, started
from .selector import Cost, Problem, Ranking, descending, leaves_to_rows


@dataclass(frozen=True)
class Exhaustive:
    """Every leaf measured, then HARP as usual: what measuring only a few leaves gives up."""

    def rank(self, problem: Problem, budget: int | None = None) -> Ranking:
        """See [`Selector.rank`]; needs `result`, `run`, `finetuner` and `evaluator`. Stops at the best prefix."""
        problem.wanted(budget)
        result = self.measure(problem)
        return _ranking(result, result.order(), result.posterior, budget)

    def measure(self, problem: Problem) -> HarpResult:
        """The problem's result with all leaves measured, those in its run directory not again."""
        result: HarpResult = problem.need("result", "exhaustive")
        run = problem.need("run", "exhaustive")
        seeds = range(problem.seed, problem.seed + result.measurements.scores.shape[1])
        leaves = np.concatenate([
            result.measurements.leaves, np.setdiff1d(np.arange(result.hierarchy.n_leaves), result.measurements.leaves)
        ])  # fmt: skip
        wanted = leaves if result.measurements.control is None else np.append(leaves, CONTROL)
        with started(run), stage(run, "measurements"):
            measure_leaves(
                run, [(g, s) for s in seeds for g in leaves.tolist()], result.hierarchy.rows,
                problem.need("finetuner", "exhaustive"), problem.need("evaluator", "exhaustive"),
            )  # fmt: skip
        null = {"scores": result.measurements.null, "tokens": np.array(0), "seconds": np.array(0.0)}
        if run.holds("base.npz"):
            null = run.read_arrays("base.npz") | {"scores": result.measurements.null}
        measured = Measurements.read(run, wanted, seeds, null)
        n_tasks = len(result.tasks)
        effects, variances = measured.effects(result.task, n_tasks)
        inferred = infer(
            effects, variances, measured.leaves, result.hierarchy, prior=problem.prior, similarity=result.similarity
        )
        active = active_tasks(effects, variances)
        return replace(result, measurements=measured, posterior=inferred, distinguishable=active)


@dataclass(frozen=True)
class TopPhi:
    """Whole leaves by their mean effect over the active tasks, weighted as in the result: HARP without an envelope.

    Leaves that do the same thing are not told apart, harm to one task is made up for by good to another, and tasks do
    not share a budget.
    """

    def rank(self, problem: Problem, budget: int | None = None) -> Ranking:
        """See [`Selector.rank`]; needs `result`. Stops where the mean effect is no longer above zero."""
        problem.wanted(budget)
        result: HarpResult = problem.need("result", "top-phi")
        active, weights = _active(result)
        phi = result.posterior.mean[:, active] @ weights / weights.sum()
        leaves = descending(phi)
        stop = int(result.hierarchy.sizes[phi > 0].sum())
        return Ranking(leaves_to_rows(result.hierarchy, leaves), spent(result.measurements), stop)


@dataclass(frozen=True)
class MeasuredOnly:
    """The envelope on the measured effects of the measured leaves alone: HARP without a posterior.

    Of the other leaves nothing is known, so their rows follow in random order, and the mean row of the pool is that of
    the measured leaves.
    """

    def rank(self, problem: Problem, budget: int | None = None) -> Ranking:
        """See [`Selector.rank`]; needs `result`. Stops at the best prefix."""
        problem.wanted(budget)
        result: HarpResult = problem.need("result", "measured-only")
        measured = result.measurements
        effects, variances = measured.effects(result.task, len(result.tasks))
        active, weights = _active(result)
        order = greedy(effects[:, active], result.null[active], weights, variant=result.choice.variant)
        sizes, every = result.hierarchy.sizes[measured.leaves], np.ones((result.hierarchy.n_leaves, 1))
        part = sizes / sizes.sum()
        known = Posterior(every * (part @ effects), every * np.sqrt(part**2 @ variances))
        known.mean[measured.leaves], known.sd[measured.leaves] = effects, np.sqrt(variances)
        ranking = _ranking(result, replace(order, leaves=measured.leaves[order.leaves]), known, budget)
        others = np.setdiff1d(np.arange(len(problem)), ranking.rows)
        shuffled = np.random.default_rng(problem.seed).permutation(others)
        return replace(ranking, rows=np.concatenate([ranking.rows, shuffled]).astype(np.int64))


@dataclass(frozen=True)
class EvenRows:
    """HARP's leaves, each giving rows spread evenly: HARP without similarity inside a leaf."""

    def rank(self, problem: Problem, budget: int | None = None) -> Ranking:
        """See [`Selector.rank`]; needs `result`. Stops at the best prefix."""
        problem.wanted(budget)
        result: HarpResult = problem.need("result", "even-rows")
        return _ranking(replace(result, nearest=None), result.order(), result.posterior, budget)


def spent(measured: Measurements) -> Cost:
    """What measurements cost."""
    cost = measured.cost
    return Cost(
        int(cost.get("finetunes", 0)), int(cost.get("tokens_training", 0)), int(cost.get("tokens_evaluation", 0)),
        seconds=cost.get("seconds_training", 0.0) + cost.get("seconds_evaluation", 0.0),
    )  # fmt: skip


def _active(result: HarpResult) -> tuple[np.ndarray, np.ndarray]:
    """(D,) which tasks decide, and the weight of each of those; the result's own errors where none does."""
    result.order()
    active = result.active()
    weights = np.array([(result.choice.task_weights or {}).get(task, 1.0) for task in result.tasks])
    return active, weights[active]


def _ranking(result: HarpResult, order: Order, known: Posterior, budget: int | None) -> Ranking:
    """Rows of the leaves in their order, beginning with those that share the budget as in [`HarpResult.select`]."""
    rows = leaves_to_rows(result.hierarchy, order.leaves)
    first, _ = result.rows_of(order, known, replace(result.choice, budget=budget))
    rows = np.concatenate([first, rows[~np.isin(rows, first)]])
    stop = int(result.hierarchy.sizes[order.leaves[: order.best_prefix]].sum())
    return Ranking(rows, spent(result.measurements), stop)
