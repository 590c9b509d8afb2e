"""The dataset card of a selection: what the run knows, as text that stays text, merged into a card that is there."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
from dataclasses import asdict, replace
from pathlib import Path, PureWindowsPath
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import jinja2
import numpy as np
import yaml
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from .envelopes import predict_interval
from .rundir import RunDir
from .sources import Z90
from .texts import is_secret, printable, without_tokens

if TYPE_CHECKING:
    from datasets import Dataset

    from .result import HarpResult

BEGIN, END = "<!-- harp-hf: begin -->", "<!-- harp-hf: end -->"
# Names the figures that the last report drew, and what they show.
FIGURES = "result/figures.json"
TAGS = ("harp-hf", "data-selection", "arxiv:2606.07690")
_NEEDED = ("eval_dataset_name", "model_name_or_path")
_LONGEST = 600
_SOURCES = 50
# All but words, with a dash inside, and numbers, with a point inside, so that the source can be read too.
_MARKUP = re.compile(r"\n|[^\w\s,?'\".-]|_|(?<!\w)-|-(?!\w)|\.(?=[^\s\d])|(?<!\d)\.(?=\d)")


def escape(value: Any) -> str:
    """`value` as one line of Markdown that shows just its text, whatever that looks like; but no access tokens."""

    def entity(found: re.Match[str]) -> str:
        return "<br>" if found[0] == "\n" else f"&#{ord(found[0])};"

    text = re.sub(r"\r\n?", "\n", without_tokens(str(value)))
    return _MARKUP.sub(entity, "\n".join(map(printable, text.split("\n"))))


def read_run(path: Path | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """Settings and manifest of a run directory; empty where there are none.

    Raises:
        RunDirError: One of them is damaged.
    """
    if path is None:
        return {}, {}
    run = RunDir(path)
    manifest = run.read_json("manifest.json") if run.file("manifest.json").exists() else {}
    return run.read_yaml("config.yaml"), manifest


def figures(result: HarpResult) -> list[Path]:
    """The figures of the run directory, in both variants; none where they show another choice or other effects."""
    if result.path is None or not (run := RunDir(result.path)).holds(FIGURES):
        return []
    known = run.read_json(FIGURES)
    drawn = known["names"] if known["shown"] == shown(result) else []
    return [path for path in sorted(run.file("result").glob("*.png")) if path.name in drawn]


def shown(result: HarpResult) -> str:
    """A digest of what figures show: the choice but for its variant, and all that is known of effects."""
    measured, digest = result.measurements, hashlib.sha256()
    digest.update(json.dumps(asdict(replace(result.choice, variant="harp-c")), sort_keys=True).encode())
    for array in (result.posterior.mean, result.posterior.sd, measured.leaves, measured.scores, measured.null):
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def hub_name(name: str | None) -> str | None:
    """`name` if it can be that of a repository on the Hub and is not a file or folder here."""
    if not name or not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name):
        return None
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return None if Path(name).exists() else name


def model_name(config: dict[str, Any], manifest: dict[str, Any]) -> str:
    """Name or path of the base model; empty where it is not known."""
    known = manifest.get("model") or [""]
    # The manifest has the name, a space and a digest.
    return str(config.get("model_name_or_path") or known[0].rpartition(" ")[0])


def recipe(result: HarpResult, config: dict[str, Any]) -> dict[str, Any]:
    """The settings that reproduce a selection, without tokens and without this machine's folders."""
    choice = result.choice
    asked = config | asdict(choice) | {"active_tasks": list(choice.active_tasks)}
    return public({k: v for k, v in asked.items() if v is not None})


def public(value: Any) -> Any:
    """Settings or texts without tokens and without this machine's folders."""
    if isinstance(value, dict):
        return {k: public(v) for k, v in value.items() if not (isinstance(v, str) and is_secret(str(k)))}
    if isinstance(value, list):
        return [public(v) for v in value]
    if not isinstance(value, str):
        return value
    alone = "\n" not in value
    if alone and (os.path.isabs(os.path.expanduser(value)) or PureWindowsPath(value).is_absolute()):
        value = PureWindowsPath(value).name or value
    return without_tokens(value)


def dump(settings: dict[str, Any]) -> str:
    """Settings as YAML."""
    return yaml.safe_dump(settings, sort_keys=False, allow_unicode=True).strip()


def describe(
    result: HarpResult,
    rows: Dataset,
    repo_id: str,
    *,
    source: str | None = None,
    licence: str | None = None,
    revision: str | None = None,
) -> str:
    """Our section of the card, in Markdown.

    Args:
        result: What the run knows, choosing as `rows` were chosen.
        rows: The selection.
        repo_id: Namespace and name of the dataset on the Hub.
        source: Name of the pool on the Hub, where it is there.
        licence: The pool's licence, where it is known.
        revision: The branch that the rows are on, where it is not the main one.
    """
    config, manifest = read_run(result.path)
    model, settings = model_name(config, manifest), recipe(result, config)
    mixed, written = config.get("datasets") or [], dump(settings)
    pool = source or config.get("dataset_name")
    needed = ("datasets" if mixed else "dataset_name", *_NEEDED)
    named = f"a mixture of {len(mixed)} dataset{'s' if len(mixed) > 1 else ''}" if mixed else "a pool"
    leaves, cost = np.unique(rows["harp_leaf"][:]), result.measurements.cost
    load = [json.dumps(repo_id)] + ([f"revision={json.dumps(revision)}"] if revision else [])
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("harp_hf"), undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["text"] = escape
    text = environment.get_template("dataset_card.md").render(
        name=repo_id.rpartition("/")[2], repo_id=repo_id, revision=revision, load=", ".join(load),
        rows=len(rows), pool_rows=len(result.pool), leaves=len(leaves), pool_leaves=result.hierarchy.n_leaves,
        measured=len(result.measurements.leaves), failed=len(result.measurements.failed),
        control=result.measurements.control is not None,
        measured_here=int(np.isin(leaves, result.measurements.leaves).sum()),
        source=_named(pool, "datasets/") if pool else named, licence=licence,
        model=_named(model, "") if model else "a language model",
        model_argument=shlex.quote(hub_name(model) or printable(public(model)) or "MODEL"),
        variant=result.choice.variant.upper(), budget=result.choice.budget, weights=result.choice.task_weights,
        tasks=_scores(result, leaves), sample=_sample(rows), notes=result.posterior.notes,
        sources=_by_source(result), most_sources=_SOURCES,
        figures=[{"title": f.stem, "path": f"figures/{quote(f.name)}"} for f in figures(result)],
        finetunes=f"{cost['finetunes']:.0f}", seconds={k: f"{v:,.0f}" for k, v in result.seconds.items()},
        tokens_training=f"{cost['tokens_training']:,.0f}", tokens_evaluation=f"{cost['tokens_evaluation']:,.0f}",
        config=written, missing=[name for name in needed if name not in settings], digest=result.digest[:16],
        fence="`" * max(3, *(len(run) + 1 for run in re.findall("`+", written)), 3),
        versions=manifest.get("versions"),
    )  # fmt: skip
    return f"{BEGIN}\n{text.strip()}\n{END}\n"


def _named(name: str, kind: str) -> str:
    on_hub = hub_name(name)
    return f"[`{on_hub}`](https://huggingface.co/{kind}{on_hub})" if on_hub else escape(public(name))


def _scores(result: HarpResult, leaves: np.ndarray) -> list[dict[str, Any]]:
    null, predicted, active = result.null, result.predicted(), result.active()
    counts = np.bincount(result.task)
    wilson = _wilson(null, counts)
    drawn = predict_interval(result.posterior.mean, result.posterior.sd, null, leaves, result.choice.variant)
    return [
        {
            "name": name, "metric": result.metrics[d], "rows": int(counts[d]), "active": bool(active[d]),
            "null": f"{null[d]:.3f}", "null_interval": f"{wilson[d, 0]:.3f} to {wilson[d, 1]:.3f}",
            "predicted": f"{predicted[d]:.3f}", "interval": f"{drawn[d, 0]:.3f} to {drawn[d, 1]:.3f}",
        }
        for d, name in enumerate(result.tasks)
    ]  # fmt: skip


def _by_source(result: HarpResult) -> list[dict[str, Any]]:
    if result.sources is None:
        return []
    return [
        line | {"phi": [
            f"{mean:+.3f} ({mean - Z90 * sd:+.3f} to {mean + Z90 * sd:+.3f})".replace("-", "−")
            for mean, sd in ((line[f"phi_{task}"], line[f"phi_sd_{task}"]) for task in result.tasks)
        ]}
        for line in result.by_source()
    ]  # fmt: skip


def _wilson(mean: np.ndarray, count: np.ndarray) -> np.ndarray:
    """(D, 2) 90 % score interval (Wilson, 1927) of means of scores in [0, 1]; wide where scores are fractions."""
    z = 1.6449
    centre, total = mean + z**2 / (2 * count), 1 + z**2 / count
    half = z * np.sqrt(mean * (1 - mean) / count + z**2 / (4 * count**2))
    return np.clip(np.stack([centre - half, centre + half], axis=1) / total[:, None], 0, 1)


def _sample(rows: Dataset) -> dict[str, str]:
    (row,) = rows.with_format("arrow")[:1].to_pylist()
    return {name: _shown(value) for name, value in row.items()}


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=_unshown)
    return text if len(text) <= _LONGEST else text[:_LONGEST] + " ..."


def _unshown(value: Any) -> str:
    return f"{len(value)} bytes" if isinstance(value, bytes) else str(value)


def merge_text(before: str, ours: str) -> str:
    """The text of a card with our section in the place of an earlier one, or after everything that is there."""
    begin, end = before.find(BEGIN), before.rfind(END)
    if begin < 0 or end < begin:
        return f"{before.strip()}\n\n{ours}".lstrip()
    return before[:begin] + ours.rstrip("\n") + before[end + len(END) :]
