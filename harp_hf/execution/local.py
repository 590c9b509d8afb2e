"""Measures leaves; all processes of an `accelerate launch` finetune, the main one does the rest."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import FinetuneError, HarpError
from ..evaluation.evaluator import Evaluator
from ..faults import contained, free_memory
from ..finetune import LeafFinetuner
from ..models import lent
from ..names import leaf_name
from ..processes import from_main
from ..rundir import RunDir
from ..stopping import temporary_folder
from .record import left_to_measure, progress_of, record, record_base
from .tools import open_tools

logger = logging.getLogger(__name__)

if TYPE_CHECKING:
    from ..config import HarpConfig
    from ..inputs import Inputs


def measure_here(
    run: RunDir, todo: Sequence[tuple[int, int]], rows: Callable[[int], np.ndarray], given: Inputs, args: HarpConfig
) -> dict[str, np.ndarray]:
    """Measure the base model and leaves, whatever the run directory does not hold yet, in this process.

    Args:
        run: The run directory.
        todo: Pairs of leaf and seed, in measuring order.
        rows: Pool rows of a leaf, or of the control.
        given: Pool, proxy set, model and the rest.
        args: Settings.

    Returns:
        `dict`: Scores of the base model, as from [`base_scores`].
    """
    finetuner, evaluator = open_tools(
        given.model, given.pool, given.proxy, given.metrics, given.peft_config, given.tokenizer, args
    )
    limit = args.measurement_timeout
    with lent(given.model):
        null = from_main(lambda: base_scores(run, evaluator, given.null_scores, limit))
        measure_leaves(run, todo, rows, finetuner, evaluator, limit)
    return null


def base_scores(
    run: RunDir, evaluator: Callable[[], Evaluator], given: np.ndarray | None = None, limit: float | None = None
) -> dict[str, np.ndarray]:
    """Scores of the base model, measured once a run directory unless they are given; `limit` is in seconds.

    Returns:
        `dict`: `scores` (n_proxy,), `tokens` and `seconds` of the evaluation.

    Raises:
        HarpError: The evaluation runs out of memory or time, or a score is not a finite number.
    """
    if given is None and not run.holds("base.npz"):
        record_base(run, score_base(evaluator, limit))
    return read_base(run, given)


def read_base(run: RunDir, given: np.ndarray | None) -> dict[str, np.ndarray]:
    """What [`base_scores`] returns, once it is measured or given."""
    if given is not None:
        return {"scores": given, "tokens": np.array(0), "seconds": np.array(0.0)}
    return run.read_arrays("base.npz")


def score_base(evaluator: Callable[[], Evaluator], limit: float | None = None) -> dict[str, Any]:
    """What `base.npz` holds; see [`base_scores`]."""
    started = time.monotonic()
    judge = evaluator()
    before = judge.tokens
    try:
        with contained(limit):
            scores = judge.evaluate([None])[0]
    except FinetuneError as error:
        raise HarpError(
            f"The base model cannot be evaluated: {error}; with a smaller `per_device_eval_batch_size`, in another "
            "`output_dir`, it needs less memory."
        ) from error
    if not np.isfinite(scores).all():
        raise HarpError("The base model cannot be evaluated: its scores are not finite numbers.")
    return {"scores": scores, "tokens": judge.tokens - before, "seconds": time.monotonic() - started}


def measure_leaves(
    run: RunDir,
    todo: Iterable[tuple[int, int]],
    rows: Callable[[int], np.ndarray],
    finetuner: Callable[[], LeafFinetuner],
    evaluator: Callable[[], Evaluator],
    limit: float | None = None,
) -> None:
    """Finetune and evaluate every leaf that the run directory does not hold yet.

    Args:
        run: Where the files of measurements are kept.
        todo: Pairs of leaf and seed, in measuring order.
        rows: Pool rows of a leaf.
        finetuner: Gives the finetuner; called only where something is left to measure.
        evaluator: Gives the evaluator; called only where something is left to measure, and only on the main process.
            As many leaves are finetuned before one evaluation as it likes to score at once.
        limit: Seconds that an evaluation may take; those of finetunes have that of the finetuner's settings.
    """
    todo = list(todo)
    left = left_to_measure(run, todo, rows)
    if left:  # tokenising a large pool takes its time, which is not that of the first leaf
        logger.info("Tokenising the pool.")
        finetuner()
    with progress_of(todo, left) as progress:
        at_once = from_main(lambda: evaluator().adapters_at_once) if left else 1
        for start in range(0, len(left), at_once):
            batch = left[start : start + at_once]
            measurements = measure_batch(batch, rows, finetuner(), evaluator, limit)
            for (leaf, seed), measurement in zip(batch, measurements, strict=True):
                record(run, leaf, seed, measurement, progress)


def measure_batch(
    batch: Sequence[tuple[int, int]],
    rows: Callable[[int], np.ndarray],
    finetuner: LeafFinetuner,
    evaluator: Callable[[], Evaluator],
    limit: float | None = None,
) -> list[dict[str, Any]]:
    """Finetune on leaves one after another, then score all their adapters in one call, whose cost they share.

    Arguments as of [`measure_leaves`]; a leaf that runs out of memory or time, or has a score that is not a finite
    number, has failed, those beside it have not.
    """
    with temporary_folder() as folder:
        adapters = [Path(folder) / f"{leaf_name(leaf).replace(' ', '-')}-seed-{seed}" for leaf, seed in batch]
        measurements = [
            _finetune(rows(leaf), seed, finetuner, adapter)
            for (leaf, seed), adapter in zip(batch, adapters, strict=True)
        ]
        trained = [n for n, measurement in enumerate(measurements) if not measurement["reason"]]
        if not trained:
            return measurements

        def score() -> tuple[np.ndarray | None, int, str]:
            judge = evaluator()
            before = judge.tokens
            try:
                with contained(limit):
                    return judge.evaluate([adapters[n] for n in trained]), judge.tokens - before, ""
            except FinetuneError as error:
                said = f"its evaluation failed: {error}"
            free_memory()
            return None, judge.tokens - before, said

        started = time.monotonic()
        scores, tokens, said = from_main(score)
        seconds = time.monotonic() - started
    for place, n in enumerate(trained):
        measurements[n] |= {
            "reason": said,
            "tokens_evaluation": tokens / len(trained),
            "seconds_evaluation": seconds / len(trained),
        }
        if scores is not None and np.isfinite(scores[place]).all():
            measurements[n]["scores"] = scores[place]
        elif scores is not None:
            measurements[n]["reason"] = "its scores are not finite numbers"
    return measurements


def _finetune(rows: np.ndarray, seed: int, finetuner: LeafFinetuner, adapter: Path) -> dict[str, Any]:
    started = time.monotonic()
    try:
        finetune = finetuner.finetune(rows, seed, adapter)
    except FinetuneError as error:
        said = str(error)
    else:
        return {
            "reason": "",
            "rows": finetune.rows,
            "steps": finetune.steps,
            "loss": finetune.loss,
            "tokens_training": finetune.tokens,
            "seconds_training": time.monotonic() - started,
        }
    free_memory()
    return {"reason": said, "seconds_training": time.monotonic() - started}
