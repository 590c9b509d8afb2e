"""What was measured, read back from the run directory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from .effects import measured_effects
from .errors import HarpError
from .names import CONTROL, measurement_file
from .rundir import RunDir


@dataclass(frozen=True, eq=False)
class Measurements:
    """Scores of the base model and of every leaf that could be finetuned.

    Attributes:
        leaves (`np.ndarray`): (m,) leaf ids in measuring order.
        scores (`np.ndarray`): (m, R, n_proxy) score of every proxy row in each of R repeats, in [0, 1]; NaN in a
            repeat that failed where another did not.
        null (`np.ndarray`): (n_proxy,) scores of the base model.
        control (`np.ndarray`, *optional*): (R, n_proxy) the same as `scores` after finetunes on random rows.
        failed (`dict[int, str]`): Leaves without any finished finetune, and why; maybe `CONTROL` among them.
        rows (`dict[int, np.ndarray]`): Pool rows that each leaf of `leaves` was really trained on.
        cost (`dict[str, float]`): `finetunes`, `tokens_training`, `tokens_evaluation`, `seconds_training`,
            `seconds_evaluation`.
    """

    leaves: np.ndarray
    scores: np.ndarray
    null: np.ndarray
    failed: dict[int, str] = field(default_factory=dict)
    rows: dict[int, np.ndarray] = field(default_factory=dict)
    cost: dict[str, float] = field(default_factory=dict)
    control: np.ndarray | None = None

    @classmethod
    def read(cls, run: RunDir, leaves: np.ndarray, seeds: Sequence[int], null: dict[str, np.ndarray]) -> Measurements:
        """Collect the measurements of `leaves`, maybe `CONTROL` among them, with `seeds`.

        Raises:
            HarpError: Not one leaf could be measured.
        """
        n_proxy = len(null["scores"])
        kept, scores, failed, control = [], [], {}, None
        rows: dict[int, np.ndarray] = {}
        cost = {"finetunes": 0.0, "tokens_training": 0.0, "tokens_evaluation": float(null["tokens"])}
        cost |= {"seconds_training": 0.0, "seconds_evaluation": float(null["seconds"])}
        for leaf in map(int, leaves):
            repeats, reason = np.full((len(seeds), n_proxy), np.nan), ""
            for r, seed in enumerate(seeds):
                found = run.read_arrays(measurement_file(leaf, seed))
                cost["finetunes"] += 1
                for name in cost.keys() & found.keys():
                    cost[name] += float(found[name])
                reason = str(found["reason"]) or reason
                if not str(found["reason"]):
                    repeats[r] = found["scores"]
                    rows[leaf] = np.union1d(rows.get(leaf, found["rows"]), found["rows"])
            if np.isnan(repeats).all():
                failed[leaf] = reason
            elif leaf == CONTROL:
                control = repeats
                del rows[CONTROL]
            else:
                kept.append(leaf)
                scores.append(repeats)
        if not kept:
            n_leaves, why = len(failed.keys() - {CONTROL}), next(iter(failed.values()))
            raise HarpError(
                f"Not one of {n_leaves} leaves could be measured: {why}; delete their files in `measurements/` to try "
                "them again."
            )
        return cls(np.array(kept), np.stack(scores), null["scores"], failed, rows, cost, control)

    def effects(self, task: np.ndarray, n_tasks: int) -> tuple[np.ndarray, np.ndarray]:
        """(m, n_tasks) effects of the measured leaves and their variances; see [`measured_effects`]."""
        return self._effects(self.scores, task, n_tasks)

    def control_effects(self, task: np.ndarray, n_tasks: int) -> tuple[np.ndarray, np.ndarray] | None:
        """(n_tasks,) effects of random rows and their variances, as of a leaf; None where they were not measured."""
        if self.control is None:
            return None
        effects, variances = self._effects(np.concatenate([self.scores, self.control[None]]), task, n_tasks)
        return effects[-1], variances[-1]

    def _effects(self, scores: np.ndarray, task: np.ndarray, n_tasks: int) -> tuple[np.ndarray, np.ndarray]:
        return measured_effects(np.nanmean(scores, axis=1), self.null, task, n_tasks, replicates=scores)
