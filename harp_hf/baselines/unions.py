"""Scores after finetuning on unions of leaves: what data valuation by retraining is made of."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

from ..execution.local import base_scores, measure_leaves
from ..measurements import measurement_file
from ..rundir import RunDir
from .selector import Cost, Problem

if TYPE_CHECKING:
    from ..finetune import LeafFinetuner
    from ..hierarchy import Hierarchy

Union = tuple[int, ...]


class Unions:
    """Finetunes on unions of leaves and scores them, each union once a run directory, whoever asks for it.

    Args:
        problem: Needs `run`, `hierarchy`, `finetuner` and `evaluator`.
        selector: Name of the selector that asks, for errors.
        rows_per_leaf: A leaf is represented by that many rows, those nearest its centroid; `None` for all.
        epochs: Passes over each union; `None` for the equal effort of `max_steps` steps that leaf finetunes have.
    """

    def __init__(self, problem: Problem, selector: str, rows_per_leaf: int | None, epochs: float | None) -> None:
        self._problem = problem
        self.hierarchy: Hierarchy = problem.need("hierarchy", selector)
        self._main: RunDir = problem.need("run", selector)
        self._evaluator = problem.need("evaluator", selector)
        finetuner = problem.need("finetuner", selector)
        self._finetuner = cache(lambda: _with_epochs(finetuner(), epochs))
        self._rows_per_leaf = rows_per_leaf
        settings = hashlib.sha256(repr((rows_per_leaf, epochs)).encode()).hexdigest()[:12]
        self._run = RunDir(self._main.file(f"baselines/unions-{settings}"))
        self._found: dict[Union, dict[str, Any]] = {}

    def scores(self, unions: Sequence[Union]) -> np.ndarray:
        """(len(unions), D) task means after finetuning on each union; the empty one is the base model.

        A union that cannot be finetuned on (all its rows are lost to truncation) leaves the base model as it was.
        """
        unions = [tuple(sorted(union)) for union in unions]
        null = base_scores(self._main, self._evaluator)
        self._found[()] = {"tokens_evaluation": null["tokens"], "seconds_evaluation": null["seconds"]} | null
        numbers = {number(union): union for union in unions if union not in self._found}
        seed = self._problem.seed
        if numbers:
            todo = [(name, seed) for name in numbers]
            measure_leaves(self._run, todo, lambda n: self.rows(numbers[n]), self._finetuner, self._evaluator)
        for name, union in numbers.items():
            self._found[union] = self._run.read_arrays(measurement_file(name, seed))
        means = [self._found[union].get("scores", null["scores"]) for union in unions]
        return self._problem.task_means(np.stack(means))

    def rows(self, union: Union) -> np.ndarray:
        """Pool rows that stand for a union, in ascending order."""
        return np.sort(np.concatenate([self.hierarchy.rows(leaf)[: self._rows_per_leaf] for leaf in union]))

    @property
    def cost(self) -> Cost:
        """What all scores asked for so far cost when they were made."""
        total = Cost()
        for union, found in self._found.items():
            training, evaluation = (int(found.get(f"tokens_{k}", 0)) for k in ("training", "evaluation"))
            seconds = sum(float(found.get(f"seconds_{k}", 0)) for k in ("training", "evaluation"))
            total += Cost(int(bool(union)), training, evaluation, seconds=seconds)
        return total


def number(union: Union) -> int:
    """A number for a set of leaves, by which its measurement is filed: 60 bits of a digest."""
    return int(hashlib.sha256(repr(sorted(union)).encode()).hexdigest()[:15], 16)


def _with_epochs(finetuner: LeafFinetuner, epochs: float | None) -> LeafFinetuner:
    """The same finetuner, tokenised pool and all, for another effort."""
    if epochs is None:
        return finetuner
    other = copy.copy(finetuner)
    other.args = copy.copy(finetuner.args)
    other.args.max_steps, other.args.num_train_epochs = -1, epochs
    return other
