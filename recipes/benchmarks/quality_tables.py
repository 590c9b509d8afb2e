"""The results file of `quality.py`, and its tables and figures."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from results_file import read_results

from harp_hf.intervals import mean_intervals
from harp_hf.proxy import ProxySet
from harp_hf.rundir import RunDir

# "auto" is the likeliest choice where a task has choices, and exact match elsewhere.
METRICS = {"exact_match": "exact match", "auto": "choice"}
# Okabe and Ito's colours, which colour-blind readers tell apart; marks say the same again.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#56B4E9", "#CC79A7", "#000000")
MARKS = "osD^vP*X<>hpd"


@dataclass
class Results:
    """Every finished result, on disk as soon as it is there.

    Scores are kept as test accuracies by task and as one bit a test row, rows in the order of their tasks: all that
    paired intervals need.

    Attributes:
        path (`Path`): The JSON file.
        tasks (`dict[str, int]`): Test rows of each task.
        known (`dict`): What the file holds.
        order (`np.ndarray`, *optional*): (n_test,) test rows in the order of their tasks; only needed to add results.
    """

    path: Path
    tasks: dict[str, int]
    known: dict[str, Any]
    order: np.ndarray | None = None

    @classmethod
    def read(cls, path: str | Path) -> Results:
        """The results of a benchmark, to look at.

        Raises:
            DataError: The file cannot be read.
        """
        known = read_results(Path(path))
        return cls(Path(path), dict(known["tasks"]), known)

    @classmethod
    def open(cls, path: str | Path, settings: dict[str, Any], test: ProxySet) -> Results:
        """Read the results of this benchmark, or begin them.

        Raises:
            DataError: The file is damaged or its results were made with other settings.
        """
        path = Path(path)
        tasks = dict(zip(test.tasks, np.bincount(test.task).tolist(), strict=True))
        known = {"tasks": list(tasks.items()), "results": []} | read_results(path, settings)
        return cls(path, tasks, known, np.argsort(test.task, kind="stable"))

    @property
    def task(self) -> np.ndarray:
        """(n_test,) task of each bit."""
        return np.repeat(np.arange(len(self.tasks)), list(self.tasks.values()))

    def find(self, comparison: str, selector: str, rows: int, seed: int) -> dict[str, Any] | None:
        """One result, or `None` where it is missing."""
        wanted = (comparison, selector, rows, seed)
        found = (r for r in self.known["results"]
                 if (r["comparison"], r["selector"], r["rows"], r["seed"]) == wanted)  # fmt: skip
        return next(found, None)

    def add(self, result: dict[str, Any]) -> None:
        """Keep a result whose `scores` are (n_test,) of 0 and 1 by metric; none where nothing was finetuned on."""
        scores = {}
        for metric, values in result["scores"].items():
            right = np.asarray(values)[self.order] > 0.5
            means = [float(right[self.task == d].mean()) for d in range(len(self.tasks))]
            scores[metric] = {
                "mean": float(np.mean(means)), "tasks": dict(zip(self.tasks, means, strict=True)),
                "right": np.packbits(right).tobytes().hex(),
            }  # fmt: skip
        self.known["results"].append(result | {"scores": scores})
        RunDir(self.path.parent).write_json(self.path.name, self.known)

    def right(self, result: dict[str, Any], metric: str) -> np.ndarray:
        """(n_test,) of 0 and 1: which test rows a finetune got right."""
        packed = np.frombuffer(bytes.fromhex(result["scores"][metric]["right"]), np.uint8)
        return np.unpackbits(packed, count=len(self.task)).astype(float)


def markdown(
    results: Results, selectors: list[str], rows: list[int], seeds: list[int], equal_compute: list[str]
) -> str:
    """Tables of what is there, with what is missing marked."""
    parts = ["## Results"]
    base = results.find("rows", "base model", 0, seeds[0])
    # Without choices both metrics are one.
    metrics = [
        m for m in METRICS if m == "exact_match" or not base or base["scores"][m] != base["scores"]["exact_match"]
    ]
    for metric in metrics:
        if base:
            parts.append(f"Base model, {METRICS[metric]}: {100 * base['scores'][metric]['mean']:.1f} % mean of tasks.")
        for count in rows:
            parts.append(f"### {METRICS[metric]}, at most {count} rows")
            parts.append(_table(results, "rows", selectors, count, seeds, metric))
            if equal_compute:
                parts.append(f"### {METRICS[metric]}, at the compute of HARP with {count} rows")
                parts.append(_table(results, "compute", equal_compute, count, seeds, metric))
    return "\n\n".join([*parts, _NOTE]) + "\n"


_NOTE = """\
Test accuracy in %, mean of tasks and by task, mean of seeds. ± is half of a 95 % interval for other test rows and
other seeds (two-way random effects, Student's t); the difference from random rows is paired by test row and seed. Rows
are what the selector used: it may stop before it has the rows it was allowed. Selection cost is the mean of seeds,
without the features of the pool. At equal compute a selector gets so many rows, best first, for the same number of
epochs, that selecting and finetuning together take as many tokens as HARP's, tokens that are only scored counted a
third; if the whole pool is not enough, more epochs over it."""


def _table(results: Results, comparison: str, selectors: list[str], rows: int, seeds: list[int], metric: str) -> str:
    columns = ["selector", "seeds", "rows", "mean", "against random", *results.tasks, "finetunes", "tokens trained",
               "tokens evaluated", "tokens in gradients", "selection s", "final tokens"]  # fmt: skip
    lines = [f"| {' | '.join(columns)} |", f"|---|{'---:|' * (len(columns) - 1)}"]
    random = {seed: r for seed, r in _found(results, comparison, "random", rows, seeds).items() if r["scores"]}
    for name in selectors:
        found = _found(results, comparison, name, rows, seeds)
        options = next((result.get("options") for result in found.values()), None) or {}
        told = ", ".join(f"{option} {value}" for option, value in options.items())
        cells = [f"{name} ({told})" if told else name, f"{len(found)} of {len(seeds)}"]
        if not all(result["scores"] for result in found.values()):
            found = {}
            cells.append("selection alone costs more")
        elif not found:
            cells.append("missing")
        if not found:
            lines.append(f"| {' | '.join([*cells, *[''] * (len(columns) - len(cells))])} |")
            continue
        scores = np.stack([results.right(result, metric) for result in found.values()])
        mean, low, high = 100 * mean_intervals(scores, results.task)[-1]
        cells += [f"{np.mean([r['used'] for r in found.values()]):.0f}", f"{mean:.1f} ± {(high - low) / 2:.1f}"]
        paired = [seed for seed in found if seed in random]
        if paired and name != "random":
            gaps = [results.right(found[s], metric) - results.right(random[s], metric) for s in paired]
            mean, low, high = 100 * mean_intervals(np.stack(gaps), results.task)[-1]
            cells.append(f"{mean:+.1f} ± {(high - low) / 2:.1f}")
        else:
            cells.append("")
        tasks = [np.mean([r["scores"][metric]["tasks"][task] for r in found.values()]) for task in results.tasks]
        cells += [f"{100 * score:.0f}" for score in tasks]
        costs = ("finetunes", "tokens_training", "tokens_evaluation", "tokens_gradient", "seconds")
        cells += [f"{np.mean([r['selection'][cost] for r in found.values()]):,.0f}" for cost in costs]
        cells.append(f"{np.mean([r['final']['tokens_training'] for r in found.values()]):,.0f}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _found(results: Results, comparison: str, name: str, rows: int, seeds: list[int]) -> dict[int, dict[str, Any]]:
    found = {seed: results.find(comparison, name, rows, seed) for seed in seeds}
    return {seed: result for seed, result in found.items() if result is not None}


def draw(results: Results, selectors: list[str]) -> list[Path]:
    """For each metric a figure beside the results file: accuracy against rows, and against all compute."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import LogLocator, NullLocator

    counts = sorted({
        r["rows"] for r in results.known["results"]
        if r["comparison"] == "rows" and r["selector"] in selectors and r["scores"]
    })  # fmt: skip
    if not counts:
        return []
    paths = []
    for metric, title in METRICS.items():
        figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.2), sharey=True, layout="constrained")
        for place, name in enumerate(selectors):
            look = {"color": COLOURS[place % len(COLOURS)], "marker": MARKS[place % len(MARKS)], "markersize": 6}
            points = _points(results, "rows", name, metric)
            if not points:
                continue
            used, compute, mean, half = map(np.array, zip(*points, strict=True))
            beside = (place - (len(selectors) - 1) / 2) * counts[-1] / 80  # else they hide each other
            left.errorbar(used + beside, mean, half, label=name, capsize=2, linewidth=1, **look)
            right.errorbar(compute / 1e6, mean, half, capsize=2, linewidth=1, **look)
            points = _points(results, "compute", name, metric)
            if points:
                _, compute, mean, half = map(np.array, zip(*points, strict=True))
                right.errorbar(compute / 1e6, mean, half, capsize=2, linewidth=1, linestyle="--",
                               markerfacecolor="white", **look)  # fmt: skip
        left.set(xlabel="rows", xlim=(0, 1.2 * counts[-1]), xticks=counts, ylabel=f"test {title}, mean of tasks, %")
        low, high = right.dataLim.intervalx
        right.set(xlabel="million tokens: selection and final finetune", xscale="log", xlim=(low / 1.6, high * 1.6))
        right.xaxis.set(major_locator=LogLocator(subs=(1, 2, 5)), major_formatter="{x:g}", minor_locator=NullLocator())
        right.set_title("hollow, dashed: as many tokens as HARP", fontsize=9)
        for axis in (left, right):
            axis.spines[["top", "right"]].set_visible(False)
            axis.grid(axis="y", color="#dddddd", linewidth=0.6)
        figure.legend(loc="outside right upper", frameon=False, fontsize=8)
        path = results.path.with_name(f"{results.path.stem}-{metric}.png")
        figure.savefig(path, dpi=150, facecolor="white", metadata={"Software": None})
        paths.append(path)
        plt.close(figure)
    return paths


def _points(results: Results, comparison: str, name: str, metric: str) -> list[tuple[float, float, float, float]]:
    """Rows used, compute, mean accuracy in % and half its 95 % interval, for each number of rows."""
    found = [r for r in results.known["results"] if (r["comparison"], r["selector"]) == (comparison, name)]
    found = [r for r in found if r["scores"]]
    points = []
    for rows in sorted({r["rows"] for r in found}):
        some = [r for r in found if r["rows"] == rows]
        mean, low, high = 100 * mean_intervals(np.stack([results.right(r, metric) for r in some]), results.task)[-1]
        used, compute = (float(np.mean([r[what] for r in some])) for what in ("used", "compute"))
        points.append((used, compute, float(mean), float(high - low) / 2))
    return points
