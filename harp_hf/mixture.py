"""Pools that are mixtures of datasets, described and loaded as `trl sft` does it, and the source of every row."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from datasets import ClassLabel, Dataset, Value
from datasets.exceptions import DatasetGenerationError
from trl import DatasetMixtureConfig, get_dataset

from .errors import ConfigError, DataError, reason
from .pool import load_rows
from .sources import Labels
from .texts import without_tokens

# More sources than this are names of rows, not of datasets.
MOST = 2_000


def load_pool(
    source: Any, seed: int, *, name: str | None = None, split: str = "train"
) -> tuple[Dataset, Labels | None]:
    """The pool, and for a mixture which dataset each row came from.

    Args:
        source: A [`~trl.DatasetMixtureConfig`], or what [`load_rows`] takes, like `name` and `split`.
        seed: Used where a mixture has a `test_split_size`; see [`load_mixture`].
    """
    if isinstance(source, DatasetMixtureConfig):
        return load_mixture(source, seed)
    return load_rows(source, name=name, split=split), None


def read_mixture(config: Mapping[str, Any]) -> DatasetMixtureConfig | None:
    """The mixture of a YAML config, or `None` where it has none.

    Raises:
        ConfigError: It is not one that TRL takes.
    """
    if not config.get("datasets"):
        return None
    names = [field.name for field in fields(DatasetMixtureConfig)]
    try:
        return DatasetMixtureConfig(**{name: config[name] for name in names if name in config})
    except TypeError as error:
        raise ConfigError(f"The mixture cannot be used: {reason(error)}.") from error


def load_mixture(mixture: DatasetMixtureConfig, seed: int) -> tuple[Dataset, Labels]:
    """Load the training rows of a mixture with TRL's [`~trl.get_dataset`], and say which dataset each came from.

    Args:
        mixture: The mixture; of the rows that `test_split_size` splits off none is in the pool.
        seed: Decides that split, for which `trl sft` has none: a run could not be continued on another pool.

    Raises:
        ConfigError: The mixture is streamed, or names no dataset.
        DataError: A dataset cannot be read, or the datasets cannot be mixed.
    """
    if mixture.streaming:
        raise ConfigError("A pool is read several times: a mixture with `streaming` cannot be used.")
    if not mixture.datasets:
        raise ConfigError("The mixture names no datasets.")
    pool = _read(lambda: get_dataset(replace(mixture, test_split_size=None))["train"])
    names = source_names(mixture)
    known = sorted(set(names))
    row = np.repeat([known.index(name) for name in names], _lengths(mixture)).astype(np.int32)
    if len(row) != len(pool):
        raise DataError(f"The mixture has {len(pool)} rows, but its datasets give {len(row)}.")
    if mixture.test_split_size is not None:
        numbers = Dataset.from_dict({"row": range(len(pool))})
        split = _read(lambda: numbers.train_test_split(mixture.test_split_size, seed=seed)["train"])
        kept = np.array(split["row"][:])
        pool, row = pool.select(kept), row[kept]
    used, kept_row = np.unique(row, return_inverse=True)
    return load_rows(pool), Labels([known[s] for s in used], kept_row.astype(np.int32))


def _lengths(mixture: DatasetMixtureConfig) -> list[int]:
    """Rows of each dataset in the mixture; with fractions, by the rule of [`~trl.get_dataset`]."""
    alone = [DatasetMixtureConfig(datasets=[replace(part, fraction=None)]) for part in mixture.datasets]
    lengths = [len(_read(partial(get_dataset, one))["train"]) for one in alone]
    fractions = [part.fraction for part in mixture.datasets]
    if None in fractions:
        return lengths
    shares = [fraction / sum(fractions) for fraction in fractions]
    total = min(length / share for length, share in zip(lengths, shares, strict=True) if share > 0)
    return [round(share * total) for share in shares]


def _read(load: Callable[[], Any]) -> Any:
    try:
        return load()
    except Exception as error:  # datasets raises a different class for each file type and network trouble
        cause = error.__cause__ if isinstance(error, DatasetGenerationError) and error.__cause__ else error
        raise DataError(f"The mixture cannot be read: {reason(cause)}.") from error


def source_names(mixture: DatasetMixtureConfig) -> list[str]:
    """A short name for every dataset of a mixture: of a path its last part, with a number where others have it too."""
    short = [_describe(part, lambda path: Path(without_tokens(path)).name) for part in mixture.datasets]
    full = [_describe(part, str) for part in mixture.datasets]
    distinct = {name: sorted({f for s, f in zip(short, full, strict=True) if s == name}) for name in short}
    return [
        name if len(distinct[name]) == 1 else f"{name} ({distinct[name].index(whole) + 1})"
        for name, whole in zip(short, full, strict=True)
    ]


def _describe(part: Any, shorten: Callable[[str], str]) -> str:
    given = part.data_files
    kinds = given.values() if isinstance(given, dict) else [given]
    files = [file for kind in kinds for file in ([kind] if isinstance(kind, str) else kind or [])]
    words = [shorten(file) for file in files]
    if not files or "/" in part.path:  # else it is a type of file, such as json
        local = Path(part.path).is_absolute() or Path(part.path).exists()
        words.insert(0, shorten(part.path) if local else part.path)
    words += [part.name] if part.name else []
    words += [shorten(part.data_dir)] if part.data_dir else []
    return " ".join(words + ([part.split] if part.split != "train" else []))


def read_labels(pool: Dataset, column: str) -> Labels:
    """The sources that a column of the pool names, with strings, whole numbers or a `ClassLabel`.

    Raises:
        ConfigError: The pool has no such column, or it holds something else, or too many names for a table.
        DataError: A row has no source.
    """
    if column not in pool.column_names:
        raise ConfigError(
            f"`source_column` is {column!r}, but the columns of the pool are {', '.join(pool.column_names)}."
        )
    values = pool.select_columns([column]).with_format("arrow")[:][column].combine_chunks()
    if values.null_count:
        raise DataError(f"Row {values.is_null().index(True).as_py()} of the pool has no source in {column!r}.")
    kind = pool.features[column]
    if not isinstance(kind, Value | ClassLabel) or not isinstance(values[0].as_py(), str | int):
        raise ConfigError(f"`source_column` is {column!r}, which holds neither strings nor whole numbers.")
    encoded = values.dictionary_encode()
    names = encoded.dictionary.to_pylist()
    if len(names) > MOST:
        raise ConfigError(
            f"`source_column` is {column!r}, which has {len(names):,} different values: more than {MOST:,} sources "
            "make no table."
        )
    named = [kind.int2str(name) if isinstance(kind, ClassLabel) else str(name) for name in names]
    return Labels(named, encoded.indices.to_numpy().astype(np.int32))
