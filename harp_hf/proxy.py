"""The proxy set: held-out rows of the target tasks, with answers, by which finetunes are judged."""

from __future__ import annotations

import hashlib
import json
import re
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
from datasets import Dataset, DatasetDict, concatenate_datasets

from .errors import DataError, reason
from .pool import content, load_rows, row_key

Prompt = str | list[dict[str, Any]]


@dataclass(frozen=True)
class ProxySet:
    """Proxy rows in order.

    Attributes:
        prompts (`list[str | list[dict]]`): What the model is asked, as a string or as messages.
        answers (`list[list[str]]`): Accepted answers of each row, at least one; for a string prompt each is the exact
            continuation.
        choices (`list[list[str]]`): Choices of each row; empty where it has none.
        tasks (`list[str]`): Names of the tasks in order of appearance.
        task (`np.ndarray`): (n_proxy,) index into `tasks`.
        columns (`dict[str, list]`): All columns as they came, for callable metrics and as vectors.
    """

    prompts: list[Prompt]
    answers: list[list[str]]
    choices: list[list[str]]
    tasks: list[str]
    task: np.ndarray
    columns: dict[str, list[Any]]

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def digest(self) -> str:
        """SHA-256 of prompts, answers, choices, tasks and all columns, whatever their order."""
        rows = [self.prompts, self.answers, self.choices, self.tasks, self.task.tolist(), sorted(self.columns.items())]
        return hashlib.sha256(json.dumps(rows, default=_plain).encode("utf-8", "surrogatepass")).hexdigest()

    def take(self, rows: np.ndarray) -> ProxySet:
        """Only some of the rows, with all tasks."""
        some = rows.tolist()
        columns = {name: [values[i] for i in some] for name, values in self.columns.items()}
        prompts, answers, choices = ([of[i] for i in some] for of in (self.prompts, self.answers, self.choices))
        return ProxySet(prompts, answers, choices, self.tasks, self.task[rows], columns)

    def row_keys(self) -> list[set[bytes]]:
        """For each row, the digests under which it would stand word for word in the pool."""
        return [
            {row_key(content(prompt), answer) for answer in answers}
            for prompt, answers in zip(self.prompts, self.answers, strict=True)
        ]


def _plain(value: Any) -> Any:
    """What JSON does not know, the same in every process: all numbers of an array, and no address of an object."""
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    return value.tobytes().hex() if hasattr(value, "tobytes") else re.sub(" at 0x[0-9a-f]+", "", str(value))


def load_proxy(source: Any, *, name: str | None = None, split: str = "test") -> ProxySet:
    """Read and check a proxy set.

    Args:
        source: Rows with `prompt` (string or messages) and `answer` (string or list of accepted strings) or, where
            there is none, `completion` (the exact continuation), and optionally `task`, `choices`, `tools` and
            `chat_template_kwargs` (both as TRL takes them): a `Dataset`, a path or a Hub id as in [`load_rows`]; or a
            `DatasetDict` (or a dict of datasets) without `task` columns, each key of which is one task.

    Raises:
        DataError: A column is missing, or a row has no prompt, no answer, no task, or an answer that is not among its
            choices; or a text or the name of a task cannot be written.
    """
    if source is None:
        raise DataError("A proxy set is needed: pass held-out rows of the target tasks as `eval_dataset`.")
    if isinstance(source, dict) and (len(source) > 1 or split not in source):
        if not source:
            raise DataError("The proxy set has no tasks.")
        for task in source:
            _check_name(str(task))
        named = {task: load_rows(rows, what=f"proxy set of task {task!r}") for task, rows in source.items()}
        if all("task" not in rows.column_names for rows in named.values()):
            return _parse(_join(named))
    if isinstance(source, dict):
        source = source[split] if split in source else DatasetDict(source)
    return _parse(load_rows(source, what="proxy set", name=name, split=split))


def _join(named: dict[str, Dataset]) -> Dataset:
    parts = [rows.add_column("task", [task] * len(rows)) for task, rows in named.items()]
    try:
        return concatenate_datasets(parts)
    except ValueError as error:
        raise DataError(f"The columns of the proxy set's tasks do not fit together: {reason(error)}.") from error


def _parse(rows: Dataset) -> ProxySet:
    try:
        columns = rows.with_format(None)[:]
    except UnicodeDecodeError as error:
        raise DataError("The proxy set holds text that is not UTF-8.") from error
    if "prompt" not in columns or not columns.keys() & {"answer", "completion"}:
        raise DataError(
            f"The proxy set has the columns {', '.join(columns)}, but it needs `prompt` and `answer` or `completion`."
        )
    none = [None] * len(rows)
    given, completions = columns.get("answer", none), columns.get("completion", none)
    exact = [answer is None and completion is not None for answer, completion in zip(given, completions, strict=True)]
    answers = [_answers(completions[i] if exact[i] else given[i]) for i in range(len(rows))]
    choices = [value or [] for value in columns.get("choices", none)]
    named = columns.get("task", ["task"] * len(rows))
    if None in named:
        raise DataError(f"Row {named.index(None)} of the proxy set has no task.")
    names = [str(value) for value in named]
    for i, prompt in enumerate(columns["prompt"]):
        _check(f"Row {i} of the proxy set (task {names[i]!r})", prompt, answers[i], choices[i])
    for i, prompt in enumerate(columns["prompt"]):
        if isinstance(prompt, str) and not exact[i]:
            answers[i] = [_continuation(prompt, a) for a in answers[i]]
            choices[i] = [_continuation(prompt, c) for c in choices[i]]
    tasks = list(dict.fromkeys(names))
    for task in tasks:
        _check_name(task)
    index = {task: d for d, task in enumerate(tasks)}
    return ProxySet(columns["prompt"], answers, choices, tasks, np.array([index[n] for n in names]), columns)


def _check_name(task: str) -> None:
    """Raise [`DataError`] where the result could not have columns with the task's name."""
    try:
        written = task.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"The task {task!r} is not text that can be written as UTF-8.") from error
    if b"\0" in written:
        raise DataError(f"The task {task!r} has a NUL character, which no name of a column can hold.")


def _check(where: str, prompt: Any, answers: list[Any], choices: Any) -> None:
    messages = isinstance(prompt, list) and all(isinstance(message, dict) for message in prompt)
    if not isinstance(prompt, str | None) and not messages:
        raise DataError(f"{where} has the prompt {prompt!r}, which is neither a string nor a list of messages.")
    try:
        empty = not content(prompt).strip()
    except (TypeError, AttributeError) as error:
        raise DataError(f"{where} has a message whose content is not text.") from error
    if empty:
        raise DataError(f"{where} has an empty prompt.")
    if messages and not all(message.get("role") for message in prompt):
        raise DataError(f"{where} has a message without a role: each is written with `role` and `content`.")
    for answer in answers:
        if not isinstance(answer, str | None):
            raise DataError(f"{where} has the answer {answer!r}, which is not a string.")
    if not answers or not all(answer and answer.strip() for answer in answers):
        raise DataError(f"{where} has an empty answer.")
    if not isinstance(choices, list) or not all(isinstance(c, str) and c.strip() for c in choices):
        raise DataError(f"{where} has the choices {choices!r}, which are not a list of strings.")
    if choices and not set(answers) & set(choices):
        raise DataError(f"{where} has the answer {answers[0]!r}, which is not among its choices.")


def _answers(value: Any) -> list[Any]:
    """Accepted answers from a string, a list of strings, or the assistant's messages."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, list) and value and isinstance(value[0], dict):
        with suppress(TypeError, AttributeError):  # else it is no text, and refused as such
            return [content(value)]
    return list(value) if isinstance(value, list) else [value]


def _continuation(prompt: str, answer: str) -> str:
    """The answer as a continuation of a string prompt: one space between them unless either brings white space."""
    return answer if prompt[-1].isspace() or answer[0].isspace() else f" {answer}"
