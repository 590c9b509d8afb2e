"""Rows of the pool as a float32 matrix of unit-norm rows, on disk and memory-mapped."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import IO, Any

import numpy as np
from datasets import Dataset
from numpy.lib import format as npy
from tqdm.auto import tqdm

from .errors import DataError, reason
from .pool import batches, content, row_parts
from .proxy import ProxySet
from .rundir import RunDir, digest_of_files

Decode = Callable[[list[int]], str]
_TFIDF_DIMENSIONS = 128
# Rows of an array or a column that are read at once.
_BLOCK = 1 << 15
# Two encoders are taken for the same one where they agree on this text.
_PROBE = "The quick brown fox jumps over the lazy dog."


def describe_features(features: Any, columns: Sequence[str] = ()) -> str:
    """What identifies the choice of features in a manifest, where the pool has these columns."""
    if isinstance(features, str):
        local = features not in ("tfidf", *columns) and Path(features).is_dir()
        return f"{features} {digest_of_files(Path(features), '**/*.*')}" if local else features
    if isinstance(features, np.ndarray):
        digest, features = hashlib.sha256(), np.atleast_1d(features)
        for start in range(0, len(features), _BLOCK):
            digest.update(features[start : start + _BLOCK].tobytes())
        return digest.hexdigest()
    probe = np.round(
        np.asarray(_load_embedder(features).encode([_PROBE], batch_size=1, show_progress_bar=False), np.float64), 3
    )
    return f"{type(features).__name__} {hashlib.sha256(probe.tobytes()).hexdigest()[:16]}"


def load_features(
    run: RunDir, pool: Dataset, features: Any, *, text_field: str, decode: Decode, seed: int, batch_size: int = 64
) -> np.ndarray:
    """Features of every pool row, computed once a run directory.

    Args:
        run: Where `features.npy` is kept.
        pool: The n rows.
        features: `"tfidf"`; the name of a pool column with a vector in each row; id or path of a sentence-transformers
            model or such a model; or an (n, d) array.
        text_field: Column of plain text pools.
        decode: Token ids to text, for pools that come tokenised.
        seed: Seed of the truncated SVD of `"tfidf"`.
        batch_size: Rows embedded at once.

    Returns:
        `np.ndarray`: (n, d) float32, memory-mapped, rows of norm 1 (or 0 where a row has no features at all).

    Raises:
        DataError: The array or column has the wrong shape or a value that is not finite, or the model cannot be
            loaded.
    """
    path = run.file("features.npy")
    if not run.holds("features.npy"):
        texts = question_texts(pool, text_field, decode)
        if isinstance(features, np.ndarray):
            blocks = _array_blocks(features, len(pool))
        elif isinstance(features, str) and features in pool.column_names:
            blocks = _column_blocks(pool, features)
        elif features == "tfidf":
            blocks = iter([_tfidf(texts, seed)])
        else:
            blocks = _embed(_load_embedder(features), texts, len(pool), batch_size)
        first = next(blocks)
        shape = (len(pool), first.shape[1])
        run.write_matrix("features.npy", lambda handle: _write_blocks(handle, shape, chain([first], blocks)))
    matrix = run.read_matrix("features.npy")
    if len(matrix) != len(pool):
        raise DataError(f"{path} has {len(matrix)} rows, but the pool has {len(pool)}.")
    return matrix


def comparable(pool: Dataset, proxy: ProxySet, features: Any) -> bool:
    """Whether the proxy set has features too: not where the pool's are an array, or a column that it lacks."""
    column = isinstance(features, str) and features in pool.column_names
    return not isinstance(features, np.ndarray) and (not column or features in proxy.columns)


def load_proxy_features(
    pool: Dataset, proxy: ProxySet, features: Any, *, text_field: str, decode: Decode, seed: int, batch_size: int = 64
) -> np.ndarray:
    """Features of every proxy row, comparable with those that [`load_features`] gives the pool.

    Args:
        pool: The rows that `"tfidf"` learns its words from.
        proxy: The rows, each read as the pool's are (without its answer where they are); where `features` is a
            column, the proxy set needs it too.
        features, text_field, decode, seed, batch_size: As in [`load_features`].

    Returns:
        `np.ndarray`: (n_proxy, d) float32, rows of norm 1 (or 0).

    Raises:
        DataError: The pool's features are an array or a column, and the proxy set has no such column or other vectors
            in it; or a value is not finite.
    """
    if not comparable(pool, proxy, features):
        raise DataError(
            "The pool's features are vectors that the proxy set does not have, so the two cannot be compared: give "
            "the proxy set's vectors too."
        )
    parted = bool({"prompt", "messages", "conversations"} & set(pool.column_names))
    texts = [content(prompt) for prompt in proxy.prompts] if parted else proxy_texts(proxy)
    if isinstance(features, str) and features in pool.column_names:
        width = next(_column_blocks(pool.select([0]), features)).shape[1]
        vectors = _stack(proxy.columns[features], features, width)
    elif features == "tfidf":
        vectors = _tfidf(question_texts(pool, text_field, decode), seed, texts)
    else:
        vectors = np.concatenate(list(_embed(_load_embedder(features), iter(texts), len(texts), batch_size)))
    _check_finite(vectors, "proxy set's features")
    return _unit(vectors).astype(np.float32)


def question_texts(pool: Dataset, text_field: str, decode: Decode) -> Iterator[str]:
    """What rows are compared by: what each pool row asks, or all of it where its format does not part the two.

    Answers are left out because rows of one task with the same answer would gather in one leaf, and finetuning on a
    leaf that knows a single answer teaches the model to always give it.
    """
    for batch in batches(pool):
        for row in batch:
            asks, answers = row_parts(row, text_field, decode)
            yield asks or answers


def proxy_texts(proxy: ProxySet) -> list[str]:
    """Text of every proxy row with its first answer, written as rows of the pool are."""
    return ["\n".join((content(p), a[0])) for p, a in zip(proxy.prompts, proxy.answers, strict=True)]


def _write_blocks(handle: IO[bytes], shape: tuple[int, int], blocks: Iterator[np.ndarray]) -> None:
    npy.write_array_header_1_0(handle, {"descr": "<f4", "fortran_order": False, "shape": shape})
    done = 0
    for block in blocks:
        _check_finite(block, "features", done)
        done += len(block)
        handle.write(_unit(block).astype("<f4").tobytes())


def _check_finite(vectors: np.ndarray, of: str, first: int = 0) -> None:
    bad = np.flatnonzero(~np.isfinite(vectors).all(axis=1))
    if len(bad):
        raise DataError(f"Row {first + bad[0]} of the {of} holds a value that is not finite.")


def _unit(vectors: np.ndarray) -> np.ndarray:
    """Rows of norm 1, or 0; first scaled by a power of two, as the squares of very large or small numbers are lost."""
    vectors = np.ldexp(vectors, -np.frexp(np.abs(vectors).max(axis=1, keepdims=True))[1])
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors / np.where(norms > 0, norms, 1)


def pool_texts(pool: Dataset, text_field: str, decode: Decode) -> Iterator[str]:
    """Text of every pool row in order: what it asks and what it answers."""
    for batch in batches(pool):
        for row in batch:
            yield "\n".join(part for part in row_parts(row, text_field, decode) if part)


def _array_blocks(array: np.ndarray, n: int) -> Iterator[np.ndarray]:
    if array.ndim != 2 or len(array) != n or array.shape[1] < 1:
        raise DataError(f"The features have shape {array.shape}, but ({n}, d) is needed for a pool of {n} rows.")
    if not np.issubdtype(array.dtype, np.number):
        raise DataError(f"The features must be numbers, but they are {array.dtype}.")
    for start in range(0, n, _BLOCK):
        yield np.asarray(array[start : start + _BLOCK], np.float32)


def _column_blocks(pool: Dataset, name: str) -> Iterator[np.ndarray]:
    column = pool.with_format("numpy", columns=[name])
    widths = set()
    for start in range(0, len(pool), _BLOCK):
        try:
            block = np.asarray(column[start : start + _BLOCK][name], np.float32)
        except (ValueError, TypeError) as error:
            raise DataError(f"The column {name!r} does not hold one vector of the same length in each row.") from error
        widths.add(block.shape[1:])
        if len(widths) > 1:
            raise DataError(f"The column {name!r} does not hold one vector of the same length in each row.")
        yield from _array_blocks(block, len(block))


def _stack(column: list[Any], name: str, width: int) -> np.ndarray:
    """The vectors of a column of the proxy set, as wide as the pool's."""
    vectors = np.empty((len(column), width), np.float32)
    for row, value in enumerate(column):
        try:
            vector = np.asarray(value, np.float32)
        except (ValueError, TypeError):
            vector = np.empty(0, np.float32)
        if vector.shape != (width,):
            raise DataError(f"Row {row} of the proxy set has no vector of {width} numbers in {name!r}, as the pool.")
        vectors[row] = vector
    return vectors


def _tfidf(texts: Iterator[str], seed: int, others: list[str] | None = None) -> np.ndarray:
    """TF-IDF of words and word pairs, reduced by truncated SVD (latent semantic analysis).

    Of the texts, or of `others` where there are any, as the texts would have them.
    """
    from sklearn.decomposition import TruncatedSVD
    from sklearn.feature_extraction.text import TfidfVectorizer

    try:
        words = TfidfVectorizer(sublinear_tf=True, ngram_range=(1, 2), max_features=2**18)
        matrix = words.fit_transform(texts)
    except ValueError as error:
        raise DataError('The pool has no words, so features="tfidf" cannot tell its rows apart.') from error
    dimensions = min(_TFIDF_DIMENSIONS, *matrix.shape)
    wanted = matrix if others is None else words.transform(others)
    if dimensions < 2:
        return wanted.toarray()
    # The variances that it computes beside are divided by 0 where all rows are equal.
    with np.errstate(invalid="ignore", divide="ignore"):
        reduced = TruncatedSVD(dimensions, random_state=seed)
        vectors = reduced.fit_transform(matrix)
    return vectors if others is None else reduced.transform(wanted)


def _load_embedder(features: Any) -> Any:
    if not isinstance(features, str):
        if not hasattr(features, "encode"):
            raise DataError(
                f"`features` must be a sentence-transformers model, a column, an array or 'tfidf', "
                f"not {type(features).__name__}."
            )
        return features
    from sentence_transformers import SentenceTransformer

    try:
        return SentenceTransformer(features)
    except Exception as error:  # the Hub, the file system and torch each raise their own
        raise DataError(
            f"{features!r} is neither a column of the pool nor a sentence-transformers model that loads: "
            f"{reason(error)}."
        ) from error


def _embed(model: Any, texts: Iterator[str], n: int, batch_size: int) -> Iterator[np.ndarray]:
    """Embed 64 batches at a time: rows are sorted by length inside such a block, memory stays bounded."""
    with tqdm(total=n, desc="Features", unit="row", leave=False) as progress:
        done = 0
        while done < n:
            block = list(islice(texts, 64 * batch_size))
            vectors = np.asarray(model.encode(block, batch_size=batch_size, show_progress_bar=False), np.float32)
            if vectors.ndim != 2 or len(vectors) != len(block):
                raise DataError(
                    f"{type(model).__name__}.encode() made an array of shape {vectors.shape} of {len(block)} texts, "
                    "but one vector a text is needed."
                )
            yield vectors
            done += len(block)
            progress.update(len(block))
