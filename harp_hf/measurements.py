"""What was measured, read back from the run directory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from .background import Background, controls
from .effects import measured_effects
from .errors import HarpError
from .rundir import RunDir


def measurement_file(leaf: int, seed: int) -> str:
    """Name of the file of one measurement in the run directory."""
    return f"measurements/{leaf if leaf >= 0 else f'random-{-leaf}'}-{seed}.npz"


@dataclass(frozen=True, eq=False)
class Measurements:
    """Scores of the base model and of every leaf that could be finetuned.

    Attributes:
        leaves (`np.ndarray`): (m,) leaf ids in measuring order.
        scores (`np.ndarray`): (m, R, n_proxy) score of every proxy row in each of R repeats, in [0, 1]; NaN in a
            repeat that failed where another did not.
        null (`np.ndarray`): (n_proxy,) scores of the base model.
        failed (`dict[int, str]`): Leaves without any finished finetune, and why.
        rows (`dict[int, np.ndarray]`): Pool rows that each leaf of `leaves` was really trained on.
        cost (`dict[str, float]`): `finetunes`, `tokens_training`, `tokens_evaluation`, `seconds_training`,
            `seconds_evaluation`.
        background (`Background`, *optional*): The random rows that leaves were measured among; effects are then
            beyond the scores of these alone.
    """

    leaves: np.ndarray
    scores: np.ndarray
    null: np.ndarray
    failed: dict[int, str] = field(default_factory=dict)
    rows: dict[int, np.ndarray] = field(default_factory=dict)
    cost: dict[str, float] = field(default_factory=dict)
    background: Background | None = None

    @property
    def reference(self) -> np.ndarray:
        """(n_proxy,) scores that effects are added to: the base model's, or the mean after random rows alone."""
        return self.null if self.background is None else self.background.scores.mean(axis=0)

    @classmethod
    def read(
        cls, run: RunDir, leaves: np.ndarray, seeds: Sequence[int], null: dict[str, np.ndarray], random_share: float
    ) -> Measurements:
        """Collect the measurements of `leaves` with `seeds`, and that of random rows where leaves were among these.

        Raises:
            HarpError: Not one leaf could be measured, or random rows could not.
        """
        n_proxy = len(null["scores"])
        kept, scores, failed = [], [], {}
        among = controls(len(leaves)) if random_share else []
        rows: dict[int, np.ndarray] = {}
        cost = {"finetunes": 0.0, "tokens_training": 0.0, "tokens_evaluation": float(null["tokens"])}
        cost |= {"seconds_training": 0.0, "seconds_evaluation": float(null["seconds"])}
        for leaf in map(int, [*among, *leaves]):
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
            else:
                kept.append(leaf)
                scores.append(repeats)
        background = None
        if random_share:
            count = sum(leaf < 0 for leaf in kept)
            if not count:
                raise HarpError(f"The finetunes on random rows failed, and leaves compare to them: {failed[-1]}.")
            background = Background(random_share, seeds[0], np.nanmean(scores[:count], axis=1))
            for control in kept[:count]:
                rows.pop(control)
            kept, scores = kept[count:], scores[count:]
            failed = {leaf: why for leaf, why in failed.items() if leaf >= 0}
        if not kept:
            raise HarpError(f"Not one of {len(failed)} leaves could be measured: {next(iter(failed.values()))}.")
        return cls(np.array(kept), np.stack(scores), null["scores"], failed, rows, cost, background)

    def effects(self, task: np.ndarray, n_tasks: int) -> tuple[np.ndarray, np.ndarray]:
        """(m, n_tasks) effects of the measured leaves and their variances; see [`measured_effects`]."""
        replicates = None
        if self.scores.shape[1] > 1:
            member = np.eye(n_tasks)[task]
            replicates = self.scores @ (member / member.sum(axis=0))
        effects, variances = measured_effects(
            np.nanmean(self.scores, axis=1), self.reference, task, n_tasks, replicates=replicates
        )
        if self.background is not None:
            # Repeats of leaves, where there are any, already tell how far a leaf's own runs differ.
            own = 1 if replicates is None else 0
            run_variance = self.background.run_variance(task, n_tasks)
            variances = variances + run_variance * (own + 1 / len(self.background.scores))
        return effects, variances
