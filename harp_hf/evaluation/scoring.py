"""Metrics: from answers of a model to scores in [0, 1]."""

from __future__ import annotations

import hashlib
import inspect
import math
import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from decimal import Decimal, DecimalException
from functools import partial
from typing import Any

import numpy as np

from ..errors import ConfigError, DataError
from ..proxy import ProxySet

METRICS = ("exact_match", "choice", "numeric", "contains", "likelihood", "choice_likelihood")
# Metrics of tasks whose rows have choices, and of the others.
AUTO = {"auto": ("choice", "exact_match"), "auto_likelihood": ("choice_likelihood", "likelihood")}
CHOICE = ("choice", "choice_likelihood")
GENERATED = ("numeric", "contains")

# Kinds of values that cannot change.
_FIXED = (str, bytes, int, float, complex, tuple, type(None))

Metric = str | Callable[..., Sequence[float]]
# Whole numbers may have commas between thousands. A sign right after a digit or a letter is a hyphen, and what is
# parted by two strokes a date: 10-12, 2024-05-17, 17/5/2024.
_WHOLE = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)"
_NUMBER = re.compile(
    r"((?<!\w)[-+\u2212])?[$\u20ac\u00a3]?"
    rf"(?:(?:\\[dt]?frac{{|(?<!\d/))({_WHOLE})(?:}}{{|/)({_WHOLE})(?![\d/]|\.\d)"
    rf"|((?:{_WHOLE}(?:\.\d*)?|\.\d+)(?:[eE][-+]?\d+)?))"
)
# Scripts without spaces between words, or with particles after them: Thai, Lao, Myanmar, Khmer, kana, Han, Hangul.
_UNSPACED = r"\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af\uf900-\ufaff"


def resolve_metrics(metric: Metric | Mapping[str, Metric], proxy: ProxySet) -> list[Metric]:
    """The metric of each task.

    Args:
        metric: One of `METRICS`, `"auto"` (choice where every row of the task has choices, else exact_match),
            `"auto_likelihood"` (in the same way choice_likelihood or likelihood), a
            callable, or a mapping from tasks to these; tasks it does not name are `"auto"`. A callable has the form of
            a TRL reward function: called with `prompts`, `completions` (generated strings, or for prompts of messages
            lists of one message) and the columns of the proxy set as keyword arguments, but no `completion_ids`, it
            returns one score in [0, 1] a row.
        proxy: The proxy set.

    Raises:
        ConfigError: A metric or a task is not known, or a `"choice"` task has rows without choices.
        DataError: A `"numeric"` task has an answer without a number.
    """
    if isinstance(metric, Mapping):
        unknown = sorted(set(metric) - set(proxy.tasks))
        if unknown:
            raise ConfigError(f"`metric` names the task {unknown[0]!r}, which is not in the proxy set.")
    resolved = []
    for d, task in enumerate(proxy.tasks):
        name = metric.get(task, "auto") if isinstance(metric, Mapping) else metric
        has_choices = all(proxy.choices[i] for i in np.flatnonzero(proxy.task == d))
        if not callable(name) and name in AUTO:
            name = AUTO[name][0 if has_choices else 1]
        if name in CHOICE and not has_choices:
            raise ConfigError(f"Task {task!r} cannot be scored by {name!r}: some of its rows have no choices.")
        if not callable(name) and name not in METRICS:
            raise ConfigError(f"The metric {name!r} is not known; use one of {', '.join(METRICS)} or a callable.")
        if name == "numeric":
            _check_numbers(proxy, d)
        resolved.append(name)
    return resolved


def _check_numbers(proxy: ProxySet, d: int) -> None:
    for i in np.flatnonzero(proxy.task == d):
        for answer in proxy.answers[i]:
            if last_number(answer) is None:
                raise DataError(
                    f"Row {i} of the proxy set (task {proxy.tasks[d]!r}) has the answer {answer!r}, which holds no "
                    "number, so 'numeric' cannot score it."
                )


def describe_metrics(metrics: Sequence[Metric]) -> list[str]:
    """Names of the metrics; a callable goes by its qualified name."""
    return [m if isinstance(m, str) else getattr(m, "__qualname__", type(m).__name__) for m in metrics]


def identify_metrics(metrics: Sequence[Metric]) -> list[str]:
    """Names of the metrics; with that of a callable a digest of its source, where there is one, and its parameters.

    Parameters are those that a `functools.partial` holds, and such attributes of an object and variables around a
    function as cannot change: numbers, strings and tuples.
    """
    return [
        name if isinstance(metric, str) else f"{name} {_digest(_told(metric))}".strip()
        for name, metric in zip(describe_metrics(metrics), metrics, strict=True)
    ]


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8] if text else ""


def _told(metric: Callable[..., Any]) -> str:
    """Source and parameters of a callable."""
    if isinstance(metric, partial):
        return _told(metric.func) + _written([metric.args, metric.keywords])
    function = getattr(metric, "__func__", metric)  # of a method
    held = dict(getattr(getattr(metric, "__self__", metric), "__dict__", {}))
    names = getattr(getattr(function, "__code__", None), "co_freevars", ())
    for name, cell in zip(names, getattr(function, "__closure__", None) or (), strict=True):
        with suppress(ValueError):  # nothing is in it yet
            held[name] = cell.cell_contents
    fixed = {name: value for name, value in held.items() if isinstance(value, _FIXED)}
    try:
        source = inspect.getsource(function if inspect.isroutine(function) else type(function))
    except (OSError, TypeError):
        source = ""
    return source + (_written(fixed) if fixed else "")


def _written(value: Any) -> str:
    """A value as text, the same in every process; of objects their type."""
    if isinstance(value, Mapping):
        return f"{{{', '.join(sorted(f'{key!r}: {_written(one)}' for key, one in value.items()))}}}"
    if isinstance(value, set | frozenset):
        return f"{{{', '.join(sorted(map(_written, value)))}}}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_written, value))}]"
    if isinstance(value, np.ndarray):
        return _written(value.tolist())
    return repr(value) if isinstance(value, _FIXED) else type(value).__qualname__


def score_text(metric: str, text: str, answers: Sequence[str]) -> float:
    """Score a text by `"numeric"` (its last number equals an answer) or `"contains"` (in any case; whole words
    in scripts that part them).

    Raises:
        DataError: The metric is `"numeric"` and an answer holds no number.
    """
    if metric == "contains":
        folded = _folded(text)
        return float(any(_in_words(_folded(answer)).search(folded) for answer in answers))
    wanted = [last_number(a) for a in answers]
    if None in wanted:
        raise DataError(f"The answer {answers[wanted.index(None)]!r} holds no number, so 'numeric' cannot score it.")
    found = last_number(text)
    return float(found is not None and found in wanted)


def _in_words(answer: str) -> re.Pattern[str]:
    """Finds an answer that is not a part of a longer word, as far as its script parts words."""
    letter, unspaced = rf"[^\W{_UNSPACED}]", re.compile(f"[{_UNSPACED}]")
    before = "" if unspaced.match(answer[:1]) else f"(?<!{letter})"
    after = "" if unspaced.match(answer[-1:]) else f"(?!{letter})"
    return re.compile(before + re.escape(answer) + after)


def _folded(text: str) -> str:
    return unicodedata.normalize("NFC", text.strip().casefold())


def last_number(text: str) -> Decimal | None:
    """The last number in a text, without thousands separators, or `None`; a fraction such as 3/4 is one number."""
    for sign, above, below, alone in reversed(_NUMBER.findall(text)):
        try:
            number = Decimal((above or alone).replace(",", ""))
            if below:
                number /= Decimal(below.replace(",", ""))
        except DecimalException:
            continue
        return number.copy_negate() if sign in ("-", "\u2212") else number
    return None


def score_with(function: Callable[..., Sequence[float]], texts: Sequence[str], rows: Sequence[int],
               proxy: ProxySet) -> list[float]:  # fmt: skip
    """Scores of generated texts by a callable in the form of a TRL reward function.

    Raises:
        DataError: It does not return one number in [0, 1] a text.
    """
    ours = ("prompt", "prompts", "completions")
    columns = {name: [values[i] for i in rows] for name, values in proxy.columns.items() if name not in ours}
    completions = [
        text if isinstance(proxy.prompts[i], str) else [{"role": "assistant", "content": text}]
        for i, text in zip(rows, texts, strict=True)
    ]
    scores = function(prompts=[proxy.prompts[i] for i in rows], completions=completions, **columns)
    name = describe_metrics([function])[0]
    if not isinstance(scores, Sequence | np.ndarray):
        raise DataError(f"The metric {name} returned {type(scores).__name__}, but a list of scores is needed.")
    if len(scores) != len(texts):
        raise DataError(f"The metric {name} returned {len(scores)} scores for {len(texts)} texts.")
    for row, score in zip(rows, scores, strict=True):
        if not isinstance(score, int | float | np.number) or not 0 <= score <= 1 or math.isnan(score):
            raise DataError(f"The metric {name} scored row {row} {score!r}, which is not a number in [0, 1].")
    return [float(score) for score in scores]
