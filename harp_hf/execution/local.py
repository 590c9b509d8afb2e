"""Measures leaves; all processes of an `accelerate launch` finetune, the main one does the rest."""

from __future__ import annotations

import logging
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from ..errors import FinetuneError
from ..evaluation.evaluator import Evaluator
from ..finetune import LeafFinetuner
from ..processes import from_main, is_main
from ..rundir import RunDir

logger = logging.getLogger(__name__)


def base_scores(
    run: RunDir, evaluator: Callable[[], Evaluator], given: np.ndarray | None = None
) -> dict[str, np.ndarray]:
    """Scores of the base model, measured once a run directory unless they are given.

    Returns:
        `dict`: `scores` (n_proxy,), `tokens` and `seconds` of the evaluation.
    """
    if given is not None:
        return {"scores": given, "tokens": np.array(0), "seconds": np.array(0.0)}
    if not run.file("base.npz").exists():
        started = time.monotonic()
        judge = evaluator()
        before = judge.tokens
        scores = judge.evaluate([None])[0]
        run.write_arrays("base.npz", scores=scores, tokens=judge.tokens - before, seconds=time.monotonic() - started)
    return run.read_arrays("base.npz")


def measure_leaves(
    run: RunDir,
    todo: Iterable[tuple[int, int]],
    rows: Callable[[int], np.ndarray],
    finetuner: Callable[[], LeafFinetuner],
    evaluator: Callable[[], Evaluator],
) -> None:
    """Finetune and evaluate every leaf that the run directory does not hold yet.

    Args:
        run: Where `measurements/<leaf>-<seed>.npz` are kept.
        todo: Pairs of leaf and seed, in measuring order.
        rows: Pool rows of a leaf.
        finetuner: Gives the finetuner; called only where something is left to measure.
        evaluator: Gives the evaluator; called only where something is left to measure, and only on the main process.
            As many leaves are finetuned before one evaluation as it likes to score at once.
    """
    todo = list(todo)
    left = from_main(lambda: [pair for pair in todo if not run.file(measurement_file(*pair)).exists()])
    done = len(todo) - len(left)
    with tqdm(
        total=len(todo), initial=done, desc="Measuring leaves", unit="leaf", disable=not is_main()
    ) as progress:  # fmt: skip
        at_once = from_main(lambda: evaluator().adapters_at_once) if left else 1
        for start in range(0, len(left), at_once):
            batch = left[start : start + at_once]
            for (leaf, seed), measurement in zip(batch, _measure(batch, rows, finetuner(), evaluator), strict=True):
                if measurement["reason"]:
                    logger.warning("Leaf %d could not be measured: %s.", leaf, measurement["reason"])
                from_main(partial(run.write_arrays, measurement_file(leaf, seed), **measurement))
                progress.update()


def measurement_file(leaf: int, seed: int) -> str:
    """Name of the file of one measurement in the run directory."""
    return f"measurements/{leaf}-{seed}.npz"


def _measure(
    batch: Sequence[tuple[int, int]],
    rows: Callable[[int], np.ndarray],
    finetuner: LeafFinetuner,
    evaluator: Callable[[], Evaluator],
) -> list[dict[str, Any]]:
    """Finetune on leaves one after another, then score all their adapters in one call, whose cost they share."""
    with tempfile.TemporaryDirectory() as folder:
        adapters = [Path(folder) / f"leaf-{leaf}-seed-{seed}" for leaf, seed in batch]
        measurements = [
            _finetune(rows(leaf), seed, finetuner, adapter)
            for (leaf, seed), adapter in zip(batch, adapters, strict=True)
        ]
        trained = [n for n, measurement in enumerate(measurements) if not measurement["reason"]]
        if not trained:
            return measurements

        def score() -> tuple[np.ndarray, int]:
            judge = evaluator()
            before = judge.tokens
            return judge.evaluate([adapters[n] for n in trained]), judge.tokens - before

        started = time.monotonic()
        scores, tokens = from_main(score)
        seconds = time.monotonic() - started
    for n, adapter_scores in zip(trained, scores, strict=True):
        measurements[n] |= {
            "scores": adapter_scores,
            "tokens_evaluation": tokens / len(trained),
            "seconds_evaluation": seconds / len(trained),
        }
    return measurements


def _finetune(rows: np.ndarray, seed: int, finetuner: LeafFinetuner, adapter: Path) -> dict[str, Any]:
    started = time.monotonic()
    try:
        finetune = finetuner.finetune(rows, seed, adapter)
    except FinetuneError as error:
        return {"reason": str(error), "seconds_training": time.monotonic() - started}
    return {
        "reason": "",
        "rows": finetune.rows,
        "steps": finetune.steps,
        "loss": finetune.loss,
        "tokens_training": finetune.tokens,
        "seconds_training": time.monotonic() - started,
    }
