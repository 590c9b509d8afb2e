"""`HarpResult`: everything known after measuring; selects, explains and re-weighs without finetuning again."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, concatenate_datasets

from .budget import BudgetBy, claims_of, cut, mean_row, random_as_good, share
from .config import HarpConfig, check_choice, plain
from .effects import active_tasks
from .envelopes import Order, Variant, greedy, predict
from .errors import ConfigError, DataError, HarpError
from .hierarchy import Hierarchy
from .measurements import Measurements
from .posterior import Posterior, infer
from .proxy import ProxySet
from .quiet import quiet
from .similarity import leaf_similarity
from .sources import Labels, Sources, infer_sources, tabulate


@dataclass(frozen=True)
class Choice:
    """How rows are chosen from what is known; each field as in [`HarpConfig`]."""

    variant: Variant = "harp-c"
    budget: int | None = None
    task_weights: dict[str, float] | None = None
    active_tasks: tuple[str, ...] = ("auto",)
    budget_by: BudgetBy = "task"


@dataclass(frozen=True, eq=False, repr=False)
class HarpResult:
    """What a run knows about its pool.

    Attributes:
        pool (`Dataset`): The n rows that were chosen from.
        tasks (`list[str]`): Names of the D tasks.
        metrics (`list[str]`): Metric of each task.
        task (`np.ndarray`): (n_proxy,) task of each proxy row.
        hierarchy (`Hierarchy`): Leaves, parents and large regions.
        measurements (`Measurements`): Scores of the base model and of the measured leaves, row by row.
        posterior (`Posterior`): Mean and sd of the effect φ of each leaf on each task, (n_leaves, D) each.
        distinguishable (`np.ndarray`): (D,) bool, tasks whose measured effects are distinguishable from none.
        choice (`Choice`): What [`~HarpResult.select`] does unless told otherwise.
        seconds (`dict[str, float]`): Seconds by stage.
        digest (`str`): Digest of the pool's contents.
        path (`Path`, *optional*): The run directory.
        sources (`Sources`, *optional*): Source of each row of the pool, and the posterior of the mean φ of each
            source; see [`~HarpResult.by_source`].
        nearest (`np.ndarray`, *optional*): (n_proxy, k) rows of the pool most similar to each proxy row, where
            similarity is taken into account; see [`~harp_hf.similarity.nearest_rows`].
    """

    pool: Dataset
    tasks: list[str]
    metrics: list[str]
    task: np.ndarray
    hierarchy: Hierarchy
    measurements: Measurements
    posterior: Posterior
    distinguishable: np.ndarray
    choice: Choice
    seconds: dict[str, float]
    digest: str
    path: Path | None = None
    sources: Sources | None = None
    nearest: np.ndarray | None = None

    def __repr__(self) -> str:
        return (
            f"HarpResult({len(self.pool)} rows in {self.hierarchy.n_leaves} leaves, {len(self.measurements.leaves)} "
            f"measured, on {len(self.tasks)} tasks, {self.active().sum()} active; {self.choice})"
        )

    def select(
        self,
        variant: str | None = None,
        budget: int | None = None,
        task_weights: dict[str, float] | None = None,
        active_tasks: list[str] | str | None = None,
        budget_by: str | None = None,
    ) -> Dataset:
        """The chosen rows of the pool in greedy order, rows nearest their leaf's centroid first.

        Args:
            variant: `"harp-c"` or `"harp-e"`; default as in the run's configuration, like all others.
            budget: At most that many rows.
            task_weights: Weight of each task in the objective; tasks not named weigh 1.
            active_tasks: `"auto"`, `"all"` or names of tasks.
            budget_by: `"task"` or `"leaf"`: who shares a budget below the best prefix.

        Returns:
            `Dataset`: The original columns untouched, and beside them `phi` (mean effect of the row's leaf over the
            active tasks), `phi_<task>`, `phi_sd_<task>`, `harp_leaf`, `harp_parent`, `harp_rank` (place of the leaf in
            the greedy order, from 0), `harp_measured` and `harp_row` (index in the pool).

        Raises:
            HarpError: An argument cannot be used, no task is active, or no leaf is expected to help.
        """
        choice = self.choosing(variant, budget, task_weights, active_tasks, budget_by).choice
        rows, ranks = self.chosen(choice)
        if len(rows) == 0:
            raise HarpError("No leaf of the pool is expected to raise the score of the active tasks.")
        leaves = self.hierarchy.leaf[rows]
        mean, sd = self.posterior.mean[leaves], self.posterior.sd[leaves]
        columns: dict[str, Any] = {"phi": mean[:, self.active(choice)].mean(axis=1)}
        for d, task in enumerate(self.tasks):
            columns[f"phi_{task}"] = mean[:, d]
            columns[f"phi_sd_{task}"] = sd[:, d]
        columns["harp_leaf"] = leaves
        columns["harp_parent"] = self.hierarchy.parent[leaves]
        columns["harp_rank"] = ranks
        columns["harp_measured"] = np.isin(leaves, self.measurements.leaves)
        columns["harp_row"] = rows
        with quiet():
            return concatenate_datasets([self.pool.select(rows), Dataset.from_dict(columns)], axis=1)

    def active(self, choice: Choice | None = None) -> np.ndarray:
        """(D,) bool: the tasks that decide the selection."""
        names = (choice or self.choice).active_tasks
        if names == ("all",):
            return np.ones(len(self.tasks), bool)
        return self.distinguishable if names == ("auto",) else np.isin(self.tasks, names)

    def decides(self, choice: Choice | None = None) -> bool:
        """Whether any active task has a weight; without one nothing is chosen."""
        choice = choice or self.choice
        return bool(self._weights(choice)[self.active(choice)].any())

    def order(self, choice: Choice | None = None) -> Order:
        """All leaves in the greedy order of one envelope, with their gains and the best prefix.

        Raises:
            HarpError: No task is active.
        """
        choice = choice or self.choice
        active = self.active(choice)
        if not active.any():
            raise HarpError(
                "No task has measured effects that are distinguishable from none: measure more leaves, use a larger "
                "proxy set, or set active_tasks to 'all'."
            )
        weights = self._weights(choice)[active]
        if not weights.any():
            raise ConfigError("All active tasks have the weight 0.")
        return greedy(self.posterior.mean[:, active], self.null[active], weights, variant=choice.variant)

    def chosen(self, choice: Choice | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Chosen pool rows in greedy order, and the place of each row's leaf in that order."""
        choice = choice or self.choice
        return self.rows_of(self.order(choice), self.posterior, choice)

    def rows_of(self, order: Order, known: Posterior, choice: Choice) -> tuple[np.ndarray, np.ndarray]:
        """As [`~HarpResult.chosen`], of any order of leaves and whatever is known of their effects."""
        if choice.budget_by == "leaf":
            return cut(order, self.hierarchy, choice.budget)
        active, weights = self.active(choice), self._weights(choice)
        claims = self._claims(known, weights * active)
        nearest = [] if self.nearest is None else [self.nearest[self.task == d] for d in np.flatnonzero(active)]
        return share(order, self.hierarchy, known.mean[:, active], weights[active], claims[np.append(active, True)],
                     choice.budget, nearest)  # fmt: skip

    def _claims(self, known: Posterior, weights: np.ndarray) -> np.ndarray:
        """(D + 1,) what tasks and the pool at large may ask of a budget; see [`~harp_hf.budget.claims_of`]."""
        measured = self.measurements.control_effects(self.task, len(self.tasks))
        floor, as_good = mean_row(known.mean, self.hierarchy), np.zeros(len(self.tasks))
        if measured is not None:
            floor, as_good = measured[0], random_as_good(known.mean, known.sd, *measured)
        return claims_of(weights, self.null, known.mean[self.measurements.leaves].max(axis=0), floor, as_good)

    def _weights(self, choice: Choice) -> np.ndarray:
        return np.array([(choice.task_weights or {}).get(task, 1.0) for task in self.tasks])

    def predicted(self, choice: Choice | None = None) -> np.ndarray:
        """(D,) score that the envelope expects of each task after finetuning on the leaves that give chosen rows.

        A leaf counts as a whole, however few of its rows are chosen: effects are known of whole leaves only.
        """
        choice = choice or self.choice
        leaves = np.unique(self.hierarchy.leaf[self.chosen(choice)[0]])
        return predict(self.posterior.mean, self.null, leaves, choice.variant)

    @property
    def similarity(self) -> np.ndarray | None:
        """(n_leaves, D) of each leaf to the proxy rows of each task, where the posterior takes it into account."""
        if self.nearest is None:
            return None
        return leaf_similarity(self.nearest, self.hierarchy, self.task, len(self.tasks))

    @property
    def null(self) -> np.ndarray:
        """(D,) null scores: the base model's mean score on each task."""
        return np.bincount(self.task, self.measurements.null) / np.bincount(self.task)

    @property
    def control(self) -> np.ndarray | None:
        """(D,) mean score on each task after finetuning on random rows; None where that was not measured."""
        measured = self.measurements.control_effects(self.task, len(self.tasks))
        return None if measured is None else self.null + measured[0]

    def explain(self, row: int) -> dict[str, Any]:
        """Why a row of the pool was chosen or not.

        Returns:
            `dict`: `row`, `leaf`, `parent`, `leaf_size`, `measured`, `failed` (the reason, or `None`), `phi` and
            `phi_sd` by task, `nearest_measured` (leaf) and its cosine `distance`, and for each envelope under
            `selected`: the leaf's `rank`, its `gain` and whether the row is `chosen`. `selected` is empty where no
            active task has a weight.

        Raises:
            DataError: The pool has no such row.
        """
        if not 0 <= row < len(self.pool):
            raise DataError(f"Row {row} is not in the pool of {len(self.pool)} rows.")
        leaf = int(self.hierarchy.leaf[row])
        centroids = self.hierarchy.centroids
        distances = 1 - centroids[self.measurements.leaves] @ centroids[leaf]
        selected = {}
        for variant in ("harp-c", "harp-e") if self.decides() else ():
            choice = replace(self.choice, variant=variant)
            order = self.order(choice)
            rank = int(np.flatnonzero(order.leaves == leaf)[0])
            chosen = bool(np.isin(row, self.chosen(choice)[0]))
            selected[variant] = {"rank": rank, "gain": float(order.gains[rank]), "chosen": chosen}
        return {
            "row": row,
            "leaf": leaf,
            "parent": int(self.hierarchy.parent[leaf]),
            "leaf_size": int(self.hierarchy.sizes[leaf]),
            "measured": leaf in self.measurements.leaves,
            "failed": self.measurements.failed.get(leaf),
            "phi": dict(zip(self.tasks, self.posterior.mean[leaf].tolist(), strict=True)),
            "phi_sd": dict(zip(self.tasks, self.posterior.sd[leaf].tolist(), strict=True)),
            "nearest_measured": int(self.measurements.leaves[distances.argmin()]),
            "distance": float(max(distances.min(), 0)),
            "selected": selected,
        }

    def by_source(self) -> list[dict[str, Any]]:
        """What each source of the pool gives the selection and does to the tasks; see [`~harp_hf.sources.tabulate`].

        Raises:
            HarpError: The sources of the rows are not known.
        """
        if self.sources is None:
            raise HarpError("The sources of rows are not known: set `source_column`, or pass a mixture as the pool.")
        chosen = self.chosen()[0] if self.decides() else np.array([], int)
        return tabulate(self.sources, self.tasks, self.hierarchy.leaf, self.measurements.leaves, chosen)

    def summary(self) -> str:
        """A table of the tasks and the cost of the run, for people."""
        from .summary import summarise

        return summarise(self)

    def save(self, path: str | Path) -> None:
        """Write everything but the pool's rows to the folder `path`/result; see [`load_result`]."""
        from .saved import save_result

        save_result(self, path)

    def push_to_hub(self, repo_id: str, variant: str | None = None, budget: int | None = None, *, private: bool = True,
                    token: str | None = None, revision: str | None = None, commit_message: str | None = None,
                    dataset_name: str | None = None) -> str:  # fmt: skip
        """Push the selection to the Hub, with a card that the run fills; see [`~harp_hf.hub.push`]."""
        from .hub import push

        return push(self, repo_id, variant, budget, private=private, token=token, revision=revision,
                    commit_message=commit_message, dataset_name=dataset_name)  # fmt: skip

    def choosing(
        self,
        variant: str | None = None,
        budget: int | None = None,
        task_weights: dict[str, float] | None = None,
        active_tasks: list[str] | str | None = None,
        budget_by: str | None = None,
    ) -> HarpResult:
        """The same result that chooses otherwise by default; arguments as in [`~HarpResult.select`].

        Raises:
            ConfigError: An argument cannot be used.
        """
        names = (active_tasks,) if isinstance(active_tasks, str) else tuple(active_tasks or ())
        check_choice(variant, budget, task_weights, budget_by)
        for task in {*(task_weights or {}), *(names if names not in (("auto",), ("all",)) else ())}:
            if task not in self.tasks:
                raise ConfigError(f"There is no task {task!r}; the tasks are {', '.join(self.tasks)}.")
        given = {"variant": variant, "budget": plain(budget), "task_weights": plain(task_weights),
                 "active_tasks": names or None, "budget_by": budget_by}  # fmt: skip
        changes: dict[str, Any] = {k: v for k, v in given.items() if v is not None}
        return replace(self, choice=replace(self.choice, **changes))


def conclude(pool: Dataset, proxy: ProxySet, hierarchy: Hierarchy, measured: Measurements, args: HarpConfig,
             metrics: list[str], digest: str, seconds: dict[str, float],
             labels: Labels | None = None, nearest: np.ndarray | None = None) -> HarpResult:  # fmt: skip
    """Infer the effects of every leaf, and of every source where these are known, from the measured ones."""
    effects, variances = measured.effects(proxy.task, len(proxy.tasks))
    similarity = None if nearest is None else leaf_similarity(nearest, hierarchy, proxy.task, len(proxy.tasks))
    inferred = infer(effects, variances, measured.leaves, hierarchy, prior=args.prior, similarity=similarity)
    sources = None
    if labels is not None:
        sources = infer_sources(
            labels, effects, variances, measured.leaves, hierarchy, prior=args.prior, similarity=similarity
        )
    weights = args.task_weights if isinstance(args.task_weights, dict) else None
    choice = Choice(args.variant, args.budget, weights, tuple(args.active_tasks), args.budget_by)
    return HarpResult(
        pool, proxy.tasks, metrics, proxy.task, hierarchy, measured, inferred,
        active_tasks(effects, variances), choice, seconds, digest, sources=sources,
        nearest=nearest,
    )  # fmt: skip
