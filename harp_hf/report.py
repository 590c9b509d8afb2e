"""One HTML page that says what a run found, how sure it is and what it cost; no other file or network is needed."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .card import FIGURES, model_name, public, read_run, shown
from .envelopes import VARIANTS, Variant
from .errors import MissingExtraError
from .names import leaf_name
from .pool import row_parts
from .rundir import RunDir
from .smoothness import smoothness
from .sources import Z90
from .texts import without_tokens

if TYPE_CHECKING:
    from .drawing import Figure
    from .result import HarpResult

# More tasks than this share one figure.
TASK_FIGURES = 6
ROWS_SHOWN = 3
LETTERS_SHOWN = 420
# Longer tables show as many lines as this.
LEAVES_LISTED, SOURCES_LISTED = 200, 100
_TURNING = "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
_STAGES = ("features", "hierarchy", "training", "evaluation")


def write_report(result: HarpResult, path: str | Path) -> Path:
    """Write the report of a run, and its figures for the dataset card.

    Args:
        result: What is reported; sections that depend on a choice follow `result.choice`.
        path: The run directory. `result/report.html` and `result/*.png` are written there.

    Returns:
        `Path`: The page.

    Raises:
        MissingExtraError: A package of the extra `report` is not installed.
        RunDirError: A file cannot be written.
    """
    try:
        import jinja2

        from .drawing import Figure  # noqa: F401
    except ImportError as error:
        raise MissingExtraError(
            f'The report needs the package {error.name}: run `pip install "harp-hf[report]"`.'
        ) from error
    run = RunDir(path)
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("harp_hf"), autoescape=True, trim_blocks=True, lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )  # fmt: skip
    environment.filters["compact"] = _compact
    environment.filters["leaf_name"] = leaf_name
    drawn = draw_figures(result)
    page = environment.get_template("report.html").render(figures=drawn, model=_model(run), **_facts(result))
    names = []
    run.file(FIGURES).unlink(missing_ok=True)  # it would speak of those that follow
    for section, group in drawn.items():
        # A card has no room for a figure of every task.
        for figure in group if section not in ("effects", "sources") or len(group) == 1 else []:
            names.append(_write(run, f"result/{figure.name}.png", figure.png).name)
    run.write_json(FIGURES, {"names": sorted(names), "shown": shown(result)})
    return _write(run, "result/report.html", _clean(without_tokens(page)).encode("utf-8", "replace"))


def draw_figures(result: HarpResult) -> dict[str, list[Figure]]:
    """The figures of each section: hierarchy, sources, effects, greedy, scores and smoothness; some may be empty.

    Each has a `name`, a `caption`, a text alternative `alt`, an `svg` and a `png`.
    """
    from . import figures, treemap

    hierarchy, mean, sd = result.hierarchy, result.posterior.mean, result.posterior.sd
    deciding = _deciding(result)
    measured = np.isin(np.arange(hierarchy.n_leaves), result.measurements.leaves)
    overall = mean[:, deciding].mean(axis=1)
    drawn: dict[str, list[Figure]] = {
        "hierarchy": [treemap.hierarchy_map(hierarchy, overall, measured, _over(result))],
        "sources": [],
        "greedy": [],
    }
    if result.sources is not None and len(result.tasks) <= TASK_FIGURES:
        drawn["sources"] = [
            figures.source_effects(d + 1, task, _sources(result), d) for d, task in enumerate(result.tasks)
        ]
    if len(result.tasks) <= TASK_FIGURES:
        drawn["effects"] = [
            figures.leaf_effects(d + 1, task, mean[:, d], sd[:, d], measured) for d, task in enumerate(result.tasks)
        ]
    else:
        drawn["effects"] = [figures.effects_matrix(result.tasks, mean, sd, measured, overall)]
    if result.decides():
        for variant in VARIANTS:
            choice = replace(result.choice, variant=variant)
            order, chosen = result.order(choice), len(result.chosen(choice)[0])
            sizes = hierarchy.sizes[order.leaves]
            drawn["greedy"].append(
                figures.greedy_curve(variant, order.gains, sizes, order.best_prefix, chosen, choice.budget)
            )
    drawn["scores"] = [figures.predicted_scores(result.tasks, result.null, _predicted(result))]
    found = _smoothness(result)
    drawn["smoothness"] = [figures.smoothness_curve(found)] if found else []
    return drawn


def _facts(result: HarpResult) -> dict[str, Any]:
    """Everything the page says in words and numbers."""
    active, measured, predicted = result.active(), result.measurements, list(_predicted(result).values())
    scores = predicted if result.control is None else [result.control, *predicted]
    found = _smoothness(result)
    return {
        "choice": result.choice,
        "rows": len(result.pool),
        "n_leaves": result.hierarchy.n_leaves,
        "n_parents": len(result.hierarchy.large),
        "n_large": len(np.unique(result.hierarchy.large)),
        "measured": measured,
        "active": active,
        "decides": result.decides(),
        "tasks": [
            {"name": task, "metric": result.metrics[d], "null": result.null[d], "active": active[d],
             "scores": [every[d] for every in scores],
             "weight": (result.choice.task_weights or {}).get(task, 1.0)}
            for d, task in enumerate(result.tasks)
        ],
        "means": [every[active].mean() for every in (result.null, *scores)] if active.any() else [],
        "selections": {variant: _selection(result, variant) for variant in VARIANTS},
        "seconds": {stage: result.seconds[stage] for stage in _STAGES if stage in result.seconds},
        "costs": _costs(result),
        "assumption": found.words() if found else (
            f"Only {len(measured.leaves)} leaves were measured: too few to see whether near leaves have like effects."
        ),
        "sources": _sources(result),
        "more_sources": len(result.sources.names) - SOURCES_LISTED if result.sources is not None else 0,
        "leaves": _leaves(result),
        "examples": _examples(result),
        "over": _over(result),
        "notes": result.posterior.notes,
    }  # fmt: skip


def _model(run: RunDir) -> str:
    return public(model_name(*read_run(run.path)))


def _sources(result: HarpResult) -> list[dict[str, Any]]:
    """The table by source, the intervals of each task under `phi`."""
    if result.sources is None:
        return []
    return [
        line | {"phi": [_interval(line[f"phi_{task}"], line[f"phi_sd_{task}"]) for task in result.tasks]}
        for line in result.by_source()[:SOURCES_LISTED]
    ]


def _leaves(result: HarpResult) -> list[dict[str, Any]]:
    """φ of leaves on every task, by their mean over the deciding ones; the first and last where there are many."""
    mean, sd = result.posterior.mean, result.posterior.sd
    order = np.argsort(-mean[:, _deciding(result)].mean(axis=1), kind="stable")
    if len(order) > LEAVES_LISTED:
        order = np.concatenate([order[: LEAVES_LISTED // 2], order[-LEAVES_LISTED // 2 :]])
    measured, sizes = np.isin(order, result.measurements.leaves), result.hierarchy.sizes[order]
    return [
        {"leaf": int(g), "rows": int(sizes[i]), "measured": bool(measured[i]),
         "phi": [_interval(m, s) for m, s in zip(mean[g], sd[g], strict=True)]}
        for i, g in enumerate(order)
    ]  # fmt: skip


def _interval(mean: float, sd: float) -> tuple[float, float, float]:
    """Mean and ends of a 90 % interval."""
    return mean, mean - Z90 * sd, mean + Z90 * sd


def _deciding(result: HarpResult) -> np.ndarray:
    """(D,) bool: the active tasks, or all where none is active."""
    active = result.active()
    return active if active.any() else np.ones(len(active), bool)


def _over(result: HarpResult) -> str:
    count = int(_deciding(result).sum())
    kind = "active " if result.active().any() else ""
    if count == 1:
        return f"on the {'only ' if len(result.tasks) == 1 else kind}task"
    return f"mean over {'the' if kind else 'all'} {count} {kind}tasks"


def _predicted(result: HarpResult) -> dict[Variant, np.ndarray]:
    if not result.decides():
        return dict.fromkeys(VARIANTS, result.null)
    return {variant: result.predicted(replace(result.choice, variant=variant)) for variant in VARIANTS}


def _selection(result: HarpResult, variant: Variant) -> dict[str, int]:
    rows = result.chosen(replace(result.choice, variant=variant))[0] if result.decides() else np.array([], int)
    return {"rows": len(rows), "leaves": len(np.unique(result.hierarchy.leaf[rows]))}


def _smoothness(result: HarpResult) -> Any:
    measured, tasks = result.measurements, len(result.tasks)
    effects, variances = measured.effects(result.task, tasks)
    deciding = _deciding(result)
    centroids = result.hierarchy.centroids[measured.leaves]
    return smoothness(effects[:, deciding], variances[:, deciding], centroids)


@dataclass(frozen=True)
class _Cost:
    what: str
    spent: float
    projected: float

    @property
    def share(self) -> float:
        return self.spent / self.projected if self.projected else 1.0


def _costs(result: HarpResult) -> list[_Cost]:
    """What was spent, and what the same for every leaf would have cost; failed finetunes are taken to cost nothing."""
    measured, cost = result.measurements, result.measurements.cost
    control = 0 if measured.control is None else len(measured.control)
    done = max(int((~np.isnan(measured.scores).all(axis=2)).sum()) + control, 1)
    wanted = result.hierarchy.n_leaves * measured.scores.shape[1] + control
    costs = [_Cost("finetunes", cost["finetunes"], wanted)]
    for what, name, base in (("tokens trained", "tokens_training", 0), ("tokens evaluated", "tokens_evaluation", 1)):
        # The base model is evaluated once, however many leaves are measured.
        costs.append(_Cost(what, cost[name], cost[name] / (done + base) * (wanted + base)))
    seconds = cost.get("seconds_training", 0.0) + cost.get("seconds_evaluation", 0.0)
    return [*costs, _Cost("seconds", seconds, seconds / done * wanted)]


def _examples(result: HarpResult) -> list[dict[str, Any]]:
    """A few rows of the best, the worst and the most uncertain leaf."""
    deciding = _deciding(result)
    mean, sd = result.posterior.mean[:, deciding].mean(axis=1), result.posterior.sd[:, deciding].mean(axis=1)
    names: dict[int, list[str]] = {}
    for name, leaf in (("best", mean.argmax()), ("worst", mean.argmin()), ("most uncertain", sd.argmax())):
        names.setdefault(int(leaf), []).append(name)
    hierarchy = result.hierarchy
    return [
        {"name": " and ".join(called), "leaf": leaf, "size": int(hierarchy.sizes[leaf]),
         "measured": bool(np.isin(leaf, result.measurements.leaves)), "phi": mean[leaf], "sd": sd[leaf],
         "rows": [{"row": int(row), **_readable(_row(result, row))} for row in hierarchy.rows(leaf)[:ROWS_SHOWN]]}
        for leaf, called in names.items()
    ]  # fmt: skip


def _row(result: HarpResult, row: int) -> dict[str, Any]:
    """A row as it is stored: images and sounds may be broken, or have no decoder here."""
    return result.pool.with_format("arrow")[int(row) : int(row) + 1].to_pylist()[0]


def _readable(row: dict[str, Any]) -> dict[str, str]:
    """What a row asks and answers, whatever its format; a row of another text column has that text."""
    texts = [name for name, value in row.items() if isinstance(value, str)]
    column = "text" if "text" in row or not texts else texts[0]
    asks, answers = row_parts(row, column, lambda ids: "token ids " + " ".join(map(str, ids)))
    return {"asks": _shorten(asks), "answers": _shorten(answers)}


def _shorten(text: str) -> str:
    text = text.strip()
    if len(text) <= LETTERS_SHOWN:
        return text
    return f"{text[:LETTERS_SHOWN].rstrip()} … ({len(text) - LETTERS_SHOWN:,} letters more)"


def _compact(count: float) -> str:
    for unit, name in ((1e9, " G"), (1e6, " M")):
        if count >= unit:
            return f"{count / unit:,.1f}{name}"
    return f"{count:,.0f}"


def _write(run: RunDir, name: str, data: bytes) -> Path:
    return run.write(name, lambda handle: handle.write(data))


def _clean(page: str) -> str:
    """Without control characters, and without those that would turn around what stands after a row or a name."""
    return "".join(c for c in page if c.isprintable() or c in "\n\t" or (ord(c) >= 0xA0 and c not in _TURNING))
