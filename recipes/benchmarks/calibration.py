"""Whether HARP's uncertainty can be trusted: every leaf of a pool is measured, then most of them are hidden again.

    python recipes/benchmarks/calibration.py --pool pool.parquet --proxy proxy.parquet \\
        --model HuggingFaceTB/SmolLM2-135M-Instruct --config recipes/benchmarks/smollm2.yaml \\
        --output_dir runs/calibration --measure
    python recipes/benchmarks/calibration.py ... --analyse --results calibration.json

`--measure` may be stopped and called again; `--analyse` takes as truth the leaves that are measured by then.
`--additivity N` also finetunes on unions of leaves, N random ones and prefixes of both greedy orders, and compares
what they score on the proxy set with what both envelopes predict.
"""

from __future__ import annotations

import argparse
import logging
import re
import sys
from copy import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import norm, spearmanr

from harp_hf import HarpConfig, HarpResult, measure
from harp_hf.baselines.problem import open_problem
from harp_hf.baselines.unions import Unions
from harp_hf.budget import cut
from harp_hf.design import choose_leaves
from harp_hf.envelopes import VARIANTS, Order, greedy, predict
from harp_hf.errors import DataError, HarpError
from harp_hf.evaluation.scoring import describe_metrics
from harp_hf.hierarchy import Hierarchy
from harp_hf.inputs import Inputs, read_inputs
from harp_hf.measurements import Measurements
from harp_hf.result import conclude
from harp_hf.rundir import RunDir
from harp_hf.settings import load_settings

LEVELS = (0.5, 0.8, 0.9, 0.95)
# Prior, and whether it uses the similarity of leaves to the proxy rows.
PRIORS = {"smooth with similarity": ("smooth", True), "smooth": ("smooth", False), "nested": ("nested", False)}
NO_POOLING = "no pooling"
TAIL = "beyond 4 sd"


def main(argv: list[str] | None = None) -> None:
    """Measure, analyse, or both."""
    asked = _parse(argv)
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("harp_hf").setLevel(logging.INFO)
    args, adapter = load_settings(
        asked.config, features=asked.features, output_dir=asked.output_dir, seed=asked.seed, num_repeats=1,
        max_measurements=10**9, control=False,
    )  # fmt: skip
    if asked.measure:
        measure(asked.pool, asked.proxy, asked.model, args, adapter)
    if not asked.analyse and not asked.additivity:
        return
    given = read_inputs(asked.pool, asked.proxy, asked.model, args, adapter)
    truth = Truth.read(RunDir(asked.output_dir), given, args)
    found: dict[str, Any] = {
        "leaves": truth.hierarchy.n_leaves, "measured": len(truth.leaves), "tasks": given.proxy.tasks,
        "active": truth.whole.active().tolist(), "designs": asked.designs, "budget": asked.budget,
        "truth": truth.rows(),
    }  # fmt: skip
    if asked.analyse:
        found["calibration"] = analyse(truth, asked.sizes, asked.designs, asked.budget, asked.seed)
        print(calibration_table(found))
    if asked.additivity:
        found["additivity"] = additivity(truth, asked.additivity, asked.epochs, asked.seed)
        print(additivity_table(found["additivity"]))
    if asked.results:
        path = Path(asked.results)
        RunDir(path.parent).write_json(path.name, found)
        print(f"Results written to {path}.")


@dataclass(frozen=True, eq=False)
class Truth:
    """All leaves that were really measured.

    Attributes:
        whole (`HarpResult`): What HARP makes of all of them.
        leaves (`np.ndarray`): (m,) their ids.
        effects (`np.ndarray`): (m, D) their measured effects.
        variances (`np.ndarray`): (m, D) the variances of these: the truth is not known exactly.
    """

    given: Inputs
    args: HarpConfig
    whole: HarpResult
    leaves: np.ndarray
    effects: np.ndarray
    variances: np.ndarray

    @classmethod
    def read(cls, run: RunDir, given: Inputs, args: HarpConfig) -> Truth:
        """Read what is measured in a run directory.

        Raises:
            HarpError: Too little is measured there, or with other inputs.
        """
        run.claim(given.manifest(args))
        if not run.file("hierarchy.npz").exists():
            raise DataError(f"Nothing is measured in {run.path}: use --measure first.")
        hierarchy = Hierarchy(**run.read_arrays("hierarchy.npz"))
        names = (re.fullmatch(rf"(\d+)-{args.seed}\.npz", path.name) for path in run.path.glob("measurements/*.npz"))
        leaves = np.array(sorted(int(name[1]) for name in names if name), np.int64)
        if len(leaves) < 4:
            raise DataError(f"Only {len(leaves)} leaves are measured in {run.path}: use --measure first.")
        measured = Measurements.read(run, leaves, [args.seed], run.read_arrays("base.npz"))
        nearest = run.read_arrays("nearest.npz")["nearest"] if run.file("nearest.npz").exists() else None
        whole = _conclude(given, args, hierarchy, measured, nearest)
        effects, variances = measured.effects(given.proxy.task, len(given.proxy.tasks))
        return cls(given, args, whole, measured.leaves, effects, variances)

    @property
    def hierarchy(self) -> Hierarchy:
        """The pool's leaves."""
        return self.whole.hierarchy

    def rows(self) -> list[dict[str, Any]]:
        """What was measured, a leaf an entry."""
        names = ("leaf", "rows", "effects", "sd")
        columns = (self.leaves, self.hierarchy.sizes[self.leaves], self.effects, np.sqrt(self.variances))
        leaves = zip(*(column.round(5).tolist() for column in columns), strict=True)
        return [dict(zip(names, leaf, strict=True)) for leaf in leaves]

    def shown(self, places: np.ndarray, prior: str) -> HarpResult:
        """What HARP makes of only some of the measured leaves."""
        measured = self.whole.measurements
        some = replace(measured, leaves=measured.leaves[places], scores=measured.scores[places])
        args = copy(self.args)
        args.prior, similar = PRIORS[prior]
        return _conclude(self.given, args, self.hierarchy, some, self.whole.nearest if similar else None)

    def design(self, size: int, prior: str) -> np.ndarray | None:
        """(size,) places, among the measured leaves, of those that HARP would measure; None where one is missing."""
        similar = PRIORS.get(prior, (prior, True))[1]
        leaves = choose_leaves(self.hierarchy, size, self.whole.similarity if similar else None)
        return np.searchsorted(self.leaves, leaves) if np.isin(leaves, self.leaves).all() else None

    def priors(self) -> list[str]:
        """The priors to compare; without the first where the run has no similarities."""
        return [prior for prior, (_, similar) in PRIORS.items() if not similar or self.whole.similarity is not None]


def _conclude(
    given: Inputs, args: HarpConfig, hierarchy: Hierarchy, measured: Measurements, nearest: np.ndarray | None
) -> HarpResult:
    return conclude(given.pool, given.proxy, hierarchy, measured, args, describe_metrics(given.metrics),
                    given.digest, {}, nearest=nearest)  # fmt: skip


def analyse(truth: Truth, sizes: list[int], designs: int, budget: int | None, seed: int) -> list[dict[str, Any]]:
    """For each size and prior, means over random designs of that many measurements, and HARP's own design.

    Every design shows some measured leaves to the posterior; the others are predicted. As these are known with noise
    too, an interval is that of a new measurement: the posterior variance plus the measurement's own.
    """
    rows: list[dict[str, Any]] = []
    for size in sizes:
        if not 2 <= size < len(truth.leaves):
            logging.warning("%d of %d leaves cannot be shown: skipped.", size, len(truth.leaves))
            continue
        draws = [np.random.default_rng([seed, size, draw]) for draw in range(designs)]
        drawn = [random.choice(len(truth.leaves), size, replace=False) for random in draws]
        for prior in [*truth.priors(), NO_POOLING]:
            own = truth.design(size, prior)
            for design, shown in (("random", drawn), ("HARP's", [] if own is None else [own])):
                judged = [_judge(truth, places, prior, budget, draw) for draw, places in enumerate(shown)]
                if judged:
                    means = {name: float(np.nanmean([one[name] for one in judged])) for name in judged[0]}
                    rows.append({"measurements": size, "design": design, "prior": prior} | means)
    return rows


def _judge(truth: Truth, shown: np.ndarray, prior: str, budget: int | None, design: int) -> dict[str, float]:
    hidden = np.setdiff1d(np.arange(len(truth.leaves)), shown)
    if prior == NO_POOLING:
        mean, variance = _independent(truth.effects[shown], truth.variances[shown], len(truth.leaves), shown)
    else:
        posterior = truth.shown(shown, prior).posterior
        mean, variance = posterior.mean[truth.leaves], posterior.sd[truth.leaves] ** 2
    sd = np.sqrt(variance[hidden] + truth.variances[hidden])
    z = (truth.effects[hidden] - mean[hidden]) / sd
    judged = {f"coverage {level:g}": float((np.abs(z) <= norm.ppf((1 + level) / 2)).mean()) for level in LEVELS}
    judged[TAIL] = float((np.abs(z) > 4).mean())
    judged["log density"] = float((norm.logpdf(z) - np.log(sd)).mean())
    active = np.flatnonzero(truth.whole.active())
    judged["rank correlation"] = _rank_correlation(mean[hidden][:, active], truth.effects[hidden][:, active])
    for variant in VARIANTS:
        best = _value(truth, truth.effects, variant, budget)
        judged[f"regret {variant}"] = best - _value(truth, mean, variant, budget)
        order = np.random.default_rng(design).permutation(len(truth.leaves))
        judged[f"regret {variant}, random leaves"] = best - _value_of(truth, order, len(order), variant, budget)
    return judged


def _independent(
    effects: np.ndarray, variances: np.ndarray, n_leaves: int, shown: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Leaves tell nothing of each other but how effects are spread: a hidden one has the mean of those shown."""
    noise = variances.mean(axis=0)
    spread = np.maximum(effects.var(axis=0, ddof=1) - noise, 0)
    mean = np.tile(effects.mean(axis=0), (n_leaves, 1))
    variance = np.tile(spread + (spread + noise) / len(effects), (n_leaves, 1))
    mean[shown], variance[shown] = effects, variances
    return mean, variance


def _rank_correlation(predicted: np.ndarray, true: np.ndarray) -> float:
    """Mean over tasks; a constant prediction ranks nothing and counts 0."""
    ranks = [
        spearmanr(predicted[:, d], true[:, d]).statistic if np.ptp(predicted[:, d]) and np.ptp(true[:, d]) else 0.0
        for d in range(true.shape[1])
    ]
    return float(np.mean(ranks)) if ranks else float("nan")


def _value(truth: Truth, effects: np.ndarray, variant: str, budget: int | None) -> float:
    """What the envelope of the true effects gives the selection that is made with other effects."""
    active, weights = _active(truth)
    order = greedy(effects[:, active], truth.whole.null[active], weights, variant=variant)
    return _value_of(truth, order.leaves, order.best_prefix, variant, budget)


def _value_of(truth: Truth, places: np.ndarray, prefix: int, variant: str, budget: int | None) -> float:
    active, weights = _active(truth)
    order = Order(truth.leaves[places], np.zeros(len(places)), prefix)
    rows = cut(order, truth.hierarchy, budget)[0]
    chosen = np.flatnonzero(np.isin(truth.leaves, truth.hierarchy.leaf[rows]))
    scores = predict(truth.effects[:, active], truth.whole.null[active], chosen, variant)
    return float(scores @ weights / weights.sum())


def _active(truth: Truth) -> tuple[np.ndarray, np.ndarray]:
    active = truth.whole.active()
    if not active.any():
        raise HarpError("No task is active, so there is nothing to select for.")
    named = truth.whole.choice.task_weights or {}
    return active, np.array([named.get(task, 1.0) for task in truth.whole.tasks])[active]


def calibration_table(found: dict[str, Any]) -> str:
    """The calibration as Markdown."""
    percent = ("coverage", "regret", TAIL)
    names = [*(f"coverage {level:g}" for level in LEVELS), TAIL, "log density", "rank correlation",
             *(f"regret {variant}{more}" for variant in VARIANTS for more in ("", ", random leaves"))]  # fmt: skip
    lines = [f"| measured | design | prior | {' | '.join(names)} |", f"|---:|---|---|{'---:|' * len(names)}"]
    for row in found["calibration"]:
        cells = [f"{100 * row[n]:.1f}" if n.startswith(percent) else f"{row[n]:.2f}" for n in names]
        lines.append(f"| {row['measurements']} | {row['design']} | {row['prior']} | {' | '.join(cells)} |")
    return "\n".join([
        f"## Calibration: {found['measured']} of {found['leaves']} leaves measured, {found['designs']} random designs",
        "", *lines, "",
        "Designs: the mean of the random ones, and the one that HARP would measure with that prior (no pooling: with "
        "the first). Of leaves that were not shown: coverage (%) of intervals of a new measurement (posterior "
        "variance plus the measurement's own), % of effects more than 4 standard deviations off (0.006 if all were "
        "Gaussian) and mean log density, over all tasks; Spearman's correlation, over active tasks. Regret (points "
        "of the mean score of active tasks): what the envelope of the measured effects gives the best prefix chosen "
        "with them, whole leaves up to the budget, less what it gives the one chosen with the posterior; as the "
        "measured effects hold noise that the former knows, it is too high, by the same for all priors. No pooling: "
        "a leaf that was not shown has the mean and the spread of those shown.",
    ])  # fmt: skip


def additivity(truth: Truth, count: int, epochs: float, seed: int) -> list[dict[str, Any]]:
    """Finetunes on unions of leaves, and what both envelopes predict of them.

    Half of the random unions are of 2 to 4 leaves, the others of 5 to 12; the prefixes of both greedy orders have 1,
    2, 4, ... leaves up to the best prefix.
    """
    whole, random = truth.whole, np.random.default_rng(seed)
    sets = []
    for number in range(count):
        low, high = ((2, 5), (5, 13))[number % 2]
        size = int(random.integers(min(low, len(truth.leaves)), min(high, len(truth.leaves) + 1)))
        sets.append(("random", random.choice(truth.leaves, size, replace=False)))
    for variant in VARIANTS:
        order = whole.order(replace(whole.choice, variant=variant))
        sizes = sorted({*(2**k for k in range(10) if 2**k < order.best_prefix), order.best_prefix} - {0})
        sets += [(f"{variant} prefix", order.leaves[:size]) for size in sizes]
    unions = Unions(open_problem(truth.given, truth.args), "additivity", None, epochs)
    scores = unions.scores([tuple(leaves.tolist()) for _, leaves in sets])
    return [
        {
            "kind": kind, "leaves": leaves.tolist(), "measured": measured.tolist(),
            **{v: predict(whole.posterior.mean, whole.null, leaves, v).tolist() for v in VARIANTS},
        }
        for (kind, leaves), measured in zip(sets, scores, strict=True)
    ]  # fmt: skip


def additivity_table(found: list[dict[str, Any]]) -> str:
    """How far the envelopes are from finetuning on unions, as Markdown."""
    lines = ["| unions | leaves | number | envelope | predicted | measured | bias | mean error | correlation |",
             "|---|---:|---:|---|---:|---:|---:|---:|---:|"]  # fmt: skip
    groups = {
        (one["kind"], "1" if size == 1 else "2-4" if size < 5 else "5-")
        for one in found if (size := len(one["leaves"]))
    }  # fmt: skip
    for kind, sizes in sorted(groups):
        low, high = {"1": (1, 1), "2-4": (2, 4), "5-": (5, 10**9)}[sizes]
        some = [one for one in found if one["kind"] == kind and low <= len(one["leaves"]) <= high]
        true = np.array([one["measured"] for one in some])
        for variant in VARIANTS:
            predicted = np.array([one[variant] for one in some])
            gap = 100 * (predicted - true)
            fits = np.corrcoef(predicted.ravel(), true.ravel())[0, 1] if np.ptp(predicted) and np.ptp(true) else np.nan
            cells = [kind, sizes, str(len(some)), variant, f"{100 * predicted.mean():.1f}", f"{100 * true.mean():.1f}",
                     f"{gap.mean():+.1f}", f"{np.abs(gap).mean():.1f}", f"{fits:.2f}"]  # fmt: skip
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([
        "## Additivity", "", *lines, "",
        "Scores on the proxy set in points, over all tasks and unions; the correlation is over both.",
    ])  # fmt: skip


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pool", required=True, help="the rows to choose from")
    parser.add_argument("--proxy", required=True, help="the rows to choose by")
    parser.add_argument("--model", required=True, help="path or Hub id of the base model")
    parser.add_argument("--features", default="sentence-transformers/all-MiniLM-L6-v2", help="as in HarpConfig")
    parser.add_argument("--config", help="YAML file of more settings, as of `harp-hf select`")
    parser.add_argument("--output_dir", required=True, help="the run directory")
    parser.add_argument("--seed", type=int, default=0, help="of the measurements and the designs")
    parser.add_argument("--measure", action="store_true", help="measure every leaf that is not yet")
    parser.add_argument("--analyse", action="store_true", help="compare posterior and truth")
    parser.add_argument("--additivity", type=int, default=0, metavar="N", help="also finetune on N random unions")
    parser.add_argument("--epochs", type=float, default=2.0, help="passes over each union")
    parser.add_argument("--sizes", type=int, nargs="+", default=[6, 12, 18, 24, 36], help="measurements shown")
    parser.add_argument("--designs", type=int, default=40, help="random designs of each size")
    parser.add_argument("--budget", type=int, help="rows of selections, also at random, for the regret (default: all)")
    parser.add_argument("--results", help="JSON file to write")
    asked = parser.parse_args(argv)
    if not (asked.measure or asked.analyse or asked.additivity):
        parser.error("nothing to do: use --measure, --analyse or --additivity N")
    return asked


if __name__ == "__main__":
    try:
        main()
    except HarpError as error:
        sys.exit(f"calibration: {error}")
