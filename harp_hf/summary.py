"""The table at the end of a run."""

from __future__ import annotations

import io
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
from rich.console import Console
from rich.table import Table

from .names import CONTROL, leaf_name
from .sources import Z90
from .texts import printable

if TYPE_CHECKING:
    from .result import HarpResult

_WIDTH = 100
# Columns of the table by source that fit beside its name, and tasks and sources that it shows.
_TASKS_ACROSS, _TASKS, _SOURCES = 4, 12, 20
_STAGES = ("features", "hierarchy", "training", "evaluation")


def summarise(result: HarpResult) -> str:
    """Tasks with null and predicted scores, what each envelope chooses, the sources, and what the run cost."""
    # Plain text whatever the terminal is: names of tasks may look like markup.
    console = Console(file=io.StringIO(), width=_WIDTH, color_system=None, markup=False, emoji=False)
    active, decides = result.active(), result.decides()
    choices = {v: replace(result.choice, variant=v) for v in ("harp-c", "harp-e")}
    predicted = {v: result.predicted(c) if decides else result.null for v, c in choices.items()}

    scores = {"null score": result.null}
    if result.control is not None:
        scores["random rows"] = result.control
    scores |= {f"{v.upper()}\npredicts": predicted[v] for v in choices}
    table = Table(title="Tasks")
    table.add_column("task", overflow="fold")
    table.add_column("metric", overflow="fold")
    table.add_column("active", justify="center")
    for name in scores:
        table.add_column(name, justify="right", overflow="fold")
    for d, task in enumerate(result.tasks):
        told = (f"{every[d]:.3f}" for every in scores.values())
        table.add_row(printable(task), printable(result.metrics[d]), "yes" if active[d] else "no", *told)
    if active.any():
        table.add_section()
        means = (f"{every[active].mean():.3f}" for every in scores.values())
        table.add_row("mean of active tasks", "", str(active.sum()), *means)
    console.print(table)

    measured, cost = result.measurements, result.measurements.cost
    table = Table(title="Selections", show_header=True)
    for name in ("variant", "leaves", "rows", "of rows"):
        table.add_column(name, justify="left" if name == "variant" else "right")
    for variant, choice in choices.items():
        rows = result.chosen(choice)[0] if decides else np.array([], int)
        leaves = len(np.unique(result.hierarchy.leaf[rows]))
        mark = " (chosen)" if variant == result.choice.variant else ""
        table.add_row(variant.upper() + mark, f"{leaves} of {result.hierarchy.n_leaves}", str(len(rows)),
                      f"{len(result.pool)}")  # fmt: skip
    console.print(table)

    if result.sources is not None:
        for table in _by_source(result):
            console.print(table)
        if (left := len(result.sources.names) - _SOURCES) > 0:
            console.print(f"Of the sources the {_SOURCES} with most rows are shown, {left} more are not.")
        if len(result.tasks) > _TASKS:
            console.print(f"The first {_TASKS} tasks are shown by source; `by_source()` has all {len(result.tasks)}.")

    console.print(
        f"Finetunes: {cost['finetunes']:.0f}, on {len(measured.leaves)} of {result.hierarchy.n_leaves} leaves"
        + (" and random rows" if measured.control is not None else "")
        + (f" ({len(measured.failed)} failed)" if measured.failed else "") + ". "
        f"Tokens: {cost['tokens_training']:,.0f} trained, {cost['tokens_evaluation']:,.0f} evaluated."
    )  # fmt: skip
    spent = [f"{stage} {result.seconds[stage]:.0f}" for stage in _STAGES if stage in result.seconds]
    console.print(f"Seconds: {', '.join(spent)}.")
    for leaf, reason in measured.failed.items():
        verb = "were" if leaf == CONTROL else "was"
        console.print(f"{leaf_name(leaf).capitalize()} {verb} not measured: {printable(reason)}.")
    for note in result.posterior.notes:
        console.print(f"Note: {note}")
    return console.file.getvalue()


def _by_source(result: HarpResult) -> list[Table]:
    """Rows of every source and, a few tasks at a time, its mean φ with the half width of a 90 % interval."""
    lines = result.by_source()[:_SOURCES]
    rows = Table(title=f"Sources, rows chosen by {result.choice.variant.upper()}")
    for name in ("source", "rows", "chosen", "leaves", "of them measured"):
        rows.add_column(name, justify="left" if name == "source" else "right", overflow="fold")
    for line in lines:
        counts = (str(line[name]) for name in ("rows", "chosen", "leaves", "measured_leaves"))
        rows.add_row(printable(line["source"]), *counts)
    tables = [rows]
    for start in range(0, min(len(result.tasks), _TASKS), _TASKS_ACROSS):
        tasks = result.tasks[start : start + _TASKS_ACROSS]
        table = Table("source", title="Mean φ by source, ± half the width of its 90 % interval")
        for task in tasks:
            table.add_column(printable(task), justify="right", overflow="fold")
        for line in lines:
            told = (f"{line[f'phi_{task}']:+.3f} ± {Z90 * line[f'phi_sd_{task}']:.3f}" for task in tasks)
            table.add_row(printable(line["source"]), *told)
        tables.append(table)
    return tables
