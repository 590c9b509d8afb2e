"""The pool: rows to choose from, in any format that TRL's `SFTTrainer` takes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, Value, load_dataset, load_from_disk
from datasets.exceptions import DatasetGenerationError

from .errors import DataError, reason

RESULT_COLUMNS = ("phi", "harp_leaf", "harp_parent", "harp_rank", "harp_measured", "harp_row")
_FILE_TYPES = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}
_MESSAGES = ("prompt", "completion", "messages", "conversations")
_BATCH = 1000


@dataclass(frozen=True)
class Contents:
    """What one pass over the pool found.

    Attributes:
        digest (`str`): Same as [`content_digest`].
        keys (`frozenset[bytes]`): Digests of the rows that stand word for word among `wanted`.
    """

    digest: str
    keys: frozenset[bytes]


def load_rows(source: Any, *, what: str = "pool", name: str | None = None, split: str = "train") -> Dataset:
    """Read rows from wherever users keep them.

    Args:
        source: A `Dataset`; a `DatasetDict` (its `split`, or its only one); the path of a jsonl, json, parquet or csv
            file, of a folder of such files or of a dataset saved with `save_to_disk`; or the id of a dataset on the
            Hub.
        what: The word for these rows in error messages.
        name: Configuration of the dataset on the Hub.
        split: Split to take where there are several.

    Raises:
        DataError: `source` is nothing of the above, is not there, or has no rows.
    """
    rows = _read(source, what, name) if isinstance(source, str | Path) else source
    if isinstance(rows, DatasetDict):
        if split not in rows and len(rows) > 1:
            raise DataError(f"The {what} has no split {split!r}; its splits are {', '.join(map(repr, rows))}.")
        rows = rows[split] if split in rows else next(iter(rows.values()))
    if not isinstance(rows, Dataset):
        raise DataError(
            f"The {what} must be a datasets.Dataset, a DatasetDict, a path or a Hub id, not {type(rows).__name__}."
        )
    if len(rows) == 0:
        raise DataError(f"The {what} has no rows.")
    return rows


def _read(source: str | Path, what: str, name: str | None) -> Dataset | DatasetDict:
    path = Path(source)
    try:
        if path.is_file():
            if path.suffix not in _FILE_TYPES:
                raise DataError(
                    f"The {what} file {path} has no known ending; use one of {', '.join(_FILE_TYPES)} or a folder."
                )
            if path.stat().st_size == 0:
                raise DataError(f"The {what} file {path} is empty.")
            return load_dataset(_FILE_TYPES[path.suffix], data_files=str(path), split="train")
        if (path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file():
            return load_from_disk(str(path))
        if not path.is_dir() and (path.suffix in _FILE_TYPES or path.is_absolute() or str(source).count("/") > 1):
            raise DataError(f"The {what} {source} is not there.")
        return load_dataset(str(source), name)
    except DataError:
        raise
    except Exception as error:  # datasets raises a different class for each file type and network trouble
        cause = error.__cause__ if isinstance(error, DatasetGenerationError) and error.__cause__ else error
        raise DataError(f"The {what} {source} cannot be read: {reason(cause)}.") from error


def check_pool(pool: Dataset, text_field: str = "text") -> None:
    """Raise [`DataError`] unless `pool` has the columns of one of TRL's formats and none of the result columns.

    Also where it has a transform, which neither features nor finetunes would see.
    """
    columns = set(pool.column_names)
    if not ({"prompt", "completion"} <= columns or columns & {"messages", "conversations", text_field, "input_ids"}):
        raise DataError(
            f"The pool has the columns {', '.join(pool.column_names)}, but it needs `messages`, `prompt` and "
            f"`completion`, `{text_field}` or `input_ids`."
        )
    for name in {"prompt", "completion", text_field} & set(training_columns(pool, text_field)):
        kind = pool.features[name]
        if isinstance(kind, Value) and kind.dtype not in ("null", "string", "large_string"):
            raise DataError(f"The pool's column {name!r} holds {kind.dtype}, not text.")
    clash = sorted(c for c in columns if c in RESULT_COLUMNS or c.startswith(("phi_", "phi_sd_")))
    if clash:
        raise DataError(
            f"The pool already has the column {clash[0]!r}, which the selection would overwrite; "
            "rename or remove it (it may come from an earlier selection)."
        )
    if nul := [name for name in pool.column_names if "\0" in name]:
        raise DataError(f"The pool's column {nul[0]!r} has a NUL character, and cannot be copied: rename it.")
    if pool.format["type"] == "custom":
        raise DataError("The pool has a transform, which changes rows only when they are looked at: use `map`.")


def training_columns(pool: Dataset, text_field: str) -> list[str]:
    """The columns that a finetune reads: those of the format of [`row_parts`], unless rows come tokenised.

    To TRL a column such as `labels` or `text` beside them would say how to train, whatever it holds.
    """
    names = pool.column_names
    if "input_ids" in names:
        return names
    formats = [("prompt", "completion"), ("messages",), ("conversations",), (text_field,)]
    read = next(wanted for wanted in formats if set(wanted) <= set(names))
    return [name for name in names if name in (*read, "tools", "chat_template_kwargs", "image", "images")]


def row_parts(row: dict[str, Any], text_field: str, decode: Callable[[list[int]], str]) -> tuple[str, str]:
    """Text of what a row asks and of what it answers; the first is empty where the format does not part them."""
    if "prompt" in row and "completion" in row:
        return content(row["prompt"]), content(row["completion"])
    for column in ("messages", "conversations"):
        if column in row:
            return content(row[column][:-1]), content(row[column][-1:])
    if text_field in row:
        return "", row[text_field] or ""
    return "", decode(row["input_ids"])


def content(value: Any) -> str:
    """Text of a string or of a list of messages, one line a message, without the roles."""
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    return "\n".join(_message_text(message) for message in value)


def lacks_role(value: Any) -> bool:
    """Whether a value is a list of messages of which one does not say whose it is."""
    messages = value if isinstance(value, list) else []
    return any(isinstance(message, dict) and not (message.get("role") or message.get("from")) for message in messages)


def _message_text(message: dict[str, Any]) -> str:
    text = message.get("content", message.get("value"))
    if isinstance(text, list):  # multimodal style: a list of typed blocks
        return " ".join(block.get("text") or "" for block in text)
    if text is None and message.get("tool_calls"):
        return json.dumps(message["tool_calls"])
    return text or ""


def batches(pool: Dataset) -> Iterator[list[dict[str, Any]]]:
    """Rows of the pool as plain dicts, some at a time, so that a large pool never becomes a Python list."""
    arrow = pool.with_format("arrow")
    for start in range(0, len(pool), _BATCH):
        try:
            rows = arrow[start : start + _BATCH].to_pylist()
        except UnicodeDecodeError as error:
            last = min(start + _BATCH, len(pool)) - 1
            raise DataError(f"One of the rows {start} to {last} of the pool holds text that is not UTF-8.") from error
        yield rows


def row_key(prompt: str, answer: str) -> bytes:
    """Digest of the words of a row, whatever the white space between them and the format they stand in."""
    words = " ".join(f"{prompt} {answer}".split())
    return hashlib.blake2b(words.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def content_digest(pool: Dataset) -> str:
    """SHA-256 of all rows in order, independent of how and where the dataset is stored."""
    digest = hashlib.sha256(json.dumps(pool.column_names).encode())
    for batch in batches(pool):
        for row in batch:
            digest.update(_encoded(row))
    return digest.hexdigest()


def _encoded(row: dict[str, Any]) -> bytes:
    return json.dumps(row, default=str, ensure_ascii=False).encode("utf-8", "surrogatepass")


def read_contents(
    pool: Dataset, text_field: str, decode: Callable[[list[int]], str], wanted: frozenset[bytes]
) -> Contents:
    """One pass over the pool: hash every row, refuse rows without text, and find the `wanted` row keys.

    Raises:
        DataError: A row has nothing to learn from (an empty or missing text), no prompt, or a message without a role,
            with its number; or text that is not UTF-8.
    """
    digest = hashlib.sha256(json.dumps(pool.column_names).encode())
    found: set[bytes] = set()
    for number, batch in enumerate(batches(pool)):
        for offset, row in enumerate(batch):
            digest.update(_encoded(row))
            try:
                prompt, answer = row_parts(row, text_field, decode)
                empty = not answer.strip()
            except (TypeError, AttributeError, IndexError, KeyError):
                empty = True
            if empty:
                raise DataError(f"Row {number * _BATCH + offset} of the pool has no text to learn from.")
            if "completion" in row and row.get("prompt", "") is None:
                raise DataError(f"Row {number * _BATCH + offset} of the pool has no prompt: an empty one is a string.")
            if any(lacks_role(row.get(column)) for column in _MESSAGES):
                raise DataError(f"Row {number * _BATCH + offset} of the pool has a message without a role.")
            key = row_key(prompt, answer)
            if key in wanted:
                found.add(key)
    return Contents(digest.hexdigest(), frozenset(found))
