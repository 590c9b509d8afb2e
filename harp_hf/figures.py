"""The figures of a run but for the map of its hierarchy: effects, greedy curve, scores, smoothness."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure as Canvas

from .drawing import HARMS, HELPS, INK, PLAIN, Figure, count_leaves, draw, short, signed
from .envelopes import Variant
from .smoothness import Smoothness
from .sources import Z90

# With more leaves than ALL_LEAVES, the first and last ENDS of them are shown.
ALL_LEAVES, ENDS = 28, 12
# Of more tasks than this, those where most happens are shown.
ALL_TASKS = 60


def leaf_effects(number: int, task: str, mean: np.ndarray, sd: np.ndarray, measured: np.ndarray) -> Figure:
    """φ of leaves on one task with 90 % intervals, (G,) each; the highest and lowest where there are many."""
    order = np.argsort(-mean, kind="stable")
    shown, left_out = _ends(order)
    places = np.arange(len(shown)) + np.where(np.arange(len(shown)) < ENDS, 0, 1 if left_out else 0)

    def paint(canvas: Canvas) -> None:
        axes = canvas.subplots()
        axes.axvline(0, color=INK, linewidth=0.8)
        for known, marker, label in ((True, "o", "measured"), (False, "D", "inferred")):
            some = measured[shown] == known
            if some.any():
                colour = PLAIN if known else INK
                axes.errorbar(
                    mean[shown][some], places[some], xerr=Z90 * sd[shown][some], fmt=marker, color=colour,
                    markersize=4, markerfacecolor=colour if known else "none", elinewidth=0.9, label=label,
                    linestyle="none",
                )  # fmt: skip
        if left_out:
            axes.text(0.5, ENDS, f"{left_out} leaves between", ha="center", va="center", fontsize=7.5,
                      transform=axes.get_yaxis_transform())  # fmt: skip
        axes.set_yticks(places, [f"leaf {leaf}" for leaf in shown], fontsize=7)
        axes.set(ylim=(places[-1] + 0.7, -0.7), xlabel="φ, change of the score")
        axes.tick_params(axis="y", length=0)
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2)
        axes.grid(axis="x", color=INK, alpha=0.15, linewidth=0.5)

    low, high = mean - Z90 * sd, mean + Z90 * sd
    told = [
        f"leaf {g} {signed(mean[g])} ({signed(low[g])} to {signed(high[g])}, "
        f"{'measured' if measured[g] else 'inferred'})"
        for g in (*order[:3], *order[3:][-3:])
    ]
    which = f"the {ENDS} highest and {ENDS} lowest of {len(mean)} leaves" if left_out else f"all {len(mean)} leaves"
    return draw(
        f"effects-{number}", f"φ of {which}, posterior mean and 90 % interval.",
        f"φ on {task}. Of {len(mean)} leaves {int((low > 0).sum())} have a 90 % interval above 0 and "
        f"{int((high < 0).sum())} one below 0. Highest and lowest: {', '.join(told)}.",
        0.9 + 0.165 * (places[-1] + 1), paint, task,
    )  # fmt: skip


def source_effects(number: int, task: str, sources: Sequence[Mapping[str, Any]], d: int) -> Figure:
    """Mean φ of sources on task `d`, each with its `phi`: mean and 90 % interval of every task."""
    names, shown = [line["source"] for line in sources], np.array([line["phi"][d] for line in sources])
    names, shown = names[:ALL_LEAVES], shown[:ALL_LEAVES]
    mean, low, high = shown.T
    places = np.arange(len(names))

    def paint(canvas: Canvas) -> None:
        axes = canvas.subplots()
        axes.axvline(0, color=INK, linewidth=0.8)
        axes.errorbar(mean, places, xerr=high - mean, fmt="s", color=PLAIN, markersize=4, elinewidth=0.9)
        axes.set_yticks(places, [short(name) for name in names], fontsize=7.5)
        axes.set(ylim=(len(names) - 0.4, -0.6), xlabel="mean φ, change of the score")
        axes.tick_params(axis="y", length=0)
        axes.grid(axis="x", color=INK, alpha=0.15, linewidth=0.5)

    told = [
        f"{name} {signed(m)} ({signed(a)} to {signed(b)})"
        for name, m, a, b in zip(names, mean, low, high, strict=True)
    ]
    which = f"the {len(names)} sources with most rows" if len(sources) > len(names) else "every source"
    return draw(
        f"sources-{number}", f"Mean φ of the rows of {which}, posterior mean and 90 % interval.",
        f"Mean φ on {task} by source: {'; '.join(told)}.", 0.7 + 0.2 * len(names), paint, task,
    )  # fmt: skip


def effects_matrix(
    tasks: list[str], mean: np.ndarray, sd: np.ndarray, measured: np.ndarray, rank_by: np.ndarray
) -> Figure:
    """φ of many tasks, (G, D) each, on the leaves that are highest and lowest in `rank_by` (G,)."""
    shown, left_out = _ends(np.argsort(-rank_by, kind="stable"))
    kept = _most(np.abs(mean).max(axis=0))
    values = mean[np.ix_(shown, kept)]
    sure = np.abs(values) > Z90 * sd[np.ix_(shown, kept)]
    limit = max(float(np.abs(values).max()), 1e-3)

    def paint(canvas: Canvas) -> None:
        axes = canvas.subplots()
        for helps, marker, colour in ((True, "^", HELPS), (False, "v", HARMS)):
            for certain in (True, False):
                x, y = np.nonzero(((values > 0) == helps) & (sure == certain))
                axes.scatter(x, y, s=4 + 40 * np.abs(values[x, y]) / limit, marker=marker, linewidths=0.7,
                             edgecolors=colour, facecolors=colour if certain else "none")  # fmt: skip
        if left_out:
            axes.axvline(ENDS - 0.5, color=INK, linewidth=0.8, linestyle=":")
        axes.set_yticks(range(len(kept)), [short(tasks[d]) for d in kept], fontsize=7)
        labels = [f"{leaf}{'●' if measured[leaf] else ''}" for leaf in shown]
        axes.set_xticks(range(len(shown)), labels, fontsize=6, rotation=90)
        axes.set(ylim=(len(kept) - 0.4, -0.6), xlim=(-0.7, len(shown) - 0.3), xlabel="leaf (● measured)")
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)

    cells = np.abs(mean).argmax(axis=0)
    top = np.argsort(-np.abs(mean).max(axis=0), kind="stable")[:5]
    told = [f"{tasks[d]}: leaf {cells[d]} {signed(mean[cells[d], d])}" for d in top]
    which = f"The {ENDS} leaves of highest and of lowest mean φ (dotted line between)" if left_out else "All leaves"
    outside = np.abs(mean) > Z90 * sd
    return draw(
        "effects",
        f"{which}, by {_which(kept, tasks, 'largest φ')}. Triangles up help and triangles down harm; the larger, the "
        f"larger φ (the largest is {limit:.3f}); filled where the 90 % interval leaves out 0.",
        f"φ of {len(shown)} of {len(mean)} leaves on {len(tasks)} tasks. Of all {mean.size} effects "
        f"{int((outside & (mean > 0)).sum())} have a 90 % interval above 0 and {int((outside & (mean < 0)).sum())} "
        f"one below 0. The largest effects: {'; '.join(told)}.",
        1.0 + 0.17 * len(kept), paint,
    )  # fmt: skip


def greedy_curve(variant: str, gains: np.ndarray, sizes: np.ndarray, best_prefix: int, chosen: int,
                 budget: int | None) -> Figure:  # fmt: skip
    """Cumulative gain against rows; `gains` and `sizes` (G,) in greedy order."""
    rows = np.concatenate(([0], np.cumsum(sizes)))
    total = np.concatenate(([0.0], np.cumsum(gains)))
    cap = rows[best_prefix]

    def paint(canvas: Canvas) -> None:
        axes = canvas.subplots()
        axes.axhline(0, color=INK, linewidth=0.6)
        axes.plot(rows, total, color=PLAIN, linewidth=1.4, marker="." if len(gains) <= 80 else "", markersize=4)
        axes.plot(cap, total[best_prefix], marker="*", markersize=11, color=HELPS, linestyle="none",
                  label=f"best prefix: {count_leaves(best_prefix)}, {cap:,} rows")  # fmt: skip
        if budget is not None:
            axes.axvline(budget, color=INK, linewidth=1.2, linestyle="--", label=f"budget: {budget:,} rows")
        axes.set(xlabel="rows, leaves in greedy order", ylabel="expected gain")
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=1)
        axes.grid(color=INK, alpha=0.15, linewidth=0.5)
        axes.locator_params(axis="x", nbins=5)

    limit = (
        f"The budget of {budget:,} rows is marked by a dashed line." if budget is not None else "There is no budget."
    )
    return draw(
        f"greedy-{variant}",
        f"Gain of the objective, the weighted sum over active tasks, as leaves are added. {limit}",
        f"Greedy curve of {variant.upper()}. The first leaf brings {signed(gains[0])}; the best prefix of "
        f"{count_leaves(best_prefix)} and {cap:,} rows brings {signed(total[best_prefix])}; all "
        f"{count_leaves(len(gains))} and {rows[-1]:,} rows would bring {signed(total[-1])}. {limit} "
        f"{chosen:,} rows are chosen.",
        2.7, paint, variant.upper(),
    )  # fmt: skip


def predicted_scores(tasks: list[str], null: np.ndarray, predicted: Mapping[Variant, np.ndarray]) -> Figure:
    """Null scores (D,) and what each envelope predicts."""
    every = np.stack([null, *predicted.values()])
    kept = _most(np.ptp(every, axis=0))
    places = np.arange(len(kept))
    marks: dict[Variant, tuple[str, str]] = {"harp-c": ("s", PLAIN), "harp-e": ("^", HELPS)}

    def paint(canvas: Canvas) -> None:
        axes = canvas.subplots()
        axes.hlines(places, every.min(axis=0)[kept], every.max(axis=0)[kept], color=INK, alpha=0.4, linewidth=0.8)
        axes.plot(
            null[kept], places, marker="o", markerfacecolor="none", color=INK, linestyle="none", label="null score"
        )
        for variant, scores in predicted.items():
            marker, colour = marks[variant]
            axes.plot(
                scores[kept], places, marker=marker, color=colour, linestyle="none", label=variant.upper(), alpha=0.9
            )
        axes.set_yticks(places, [short(tasks[d]) for d in kept], fontsize=7.5)
        axes.set(ylim=(len(kept) - 0.4, -0.6), xlim=(-0.03, 1.03), xlabel="score")
        axes.tick_params(axis="y", length=0)
        axes.legend(loc="lower center", bbox_to_anchor=(0.4, 1), ncols=3, handletextpad=0.2, columnspacing=1)
        axes.grid(axis="x", color=INK, alpha=0.15, linewidth=0.5)

    told = [
        f"{tasks[d]} {null[d]:.3f}, " + ", ".join(f"{v.upper()} {scores[d]:.3f}" for v, scores in predicted.items())
        for d in kept
    ]
    return draw(
        "scores",
        "Score of the base model and what each envelope predicts after finetuning on its selection, by "
        f"{_which(kept, tasks, 'largest change')}.",
        f"Null and predicted scores by task: {'; '.join(told)}.", 0.95 + 0.2 * len(kept), paint,
    )  # fmt: skip


def smoothness_curve(found: Smoothness) -> Figure:
    """Difference of measured effects by distance of leaves."""

    def paint(canvas: Canvas) -> None:
        axes = canvas.subplots()
        axes.plot(found.distance, found.difference, marker="o", color=PLAIN, label="measured")
        axes.plot(found.distance, found.noise, marker="x", color=INK, linestyle="--", label="noise alone")
        axes.set(xlabel="cosine distance of two measured leaves", ylabel="difference of effects")
        axes.set_ylim(bottom=0)
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2)
        axes.grid(color=INK, alpha=0.15, linewidth=0.5)

    told = [
        f"at distance {x:.2f} {y:.3f} (noise {n:.3f}, {k} pairs)"
        for x, y, n, k in zip(found.distance, found.difference, found.noise, found.pairs, strict=True)
    ]
    return draw(
        "smoothness",
        "Mean absolute difference of the measured effects of two leaves, mean over the deciding tasks, by the "
        "distance of the leaves; the dashed line is what noise of measuring alone would make.",
        f"Difference of measured effects: {'; '.join(told)}.", 2.7, paint,
    )  # fmt: skip


def _most(change: np.ndarray) -> np.ndarray:
    """The tasks that are shown, in their order: where there are many, those with the largest change (D,)."""
    return np.sort(np.argsort(-change, kind="stable")[:ALL_TASKS])


def _which(kept: np.ndarray, tasks: Sequence[str], reason: str) -> str:
    return "task" if len(kept) == len(tasks) else f"task, for the {len(kept)} of {len(tasks)} tasks with the {reason}"


def _ends(order: np.ndarray) -> tuple[np.ndarray, int]:
    """The leaves of an order that are shown, and how many are left out between."""
    if len(order) <= ALL_LEAVES:
        return order, 0
    return np.concatenate([order[:ENDS], order[-ENDS:]]), len(order) - 2 * ENDS
