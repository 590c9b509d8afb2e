"""What is done with a finished measurement, wherever it was made: it is recorded here, on the main process."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from ..names import leaf_name, measurement_file
from ..processes import from_main, is_main
from ..rundir import RunDir
from ..stopping import honour

logger = logging.getLogger(__name__)

# What the event log tells of a measurement.
_TOLD = ("seconds_training", "seconds_evaluation", "tokens_training", "tokens_evaluation")


def left_to_measure(
    run: RunDir, todo: Sequence[tuple[int, int]], rows: Callable[[int], np.ndarray]
) -> list[tuple[int, int]]:
    """Those pairs of leaf and seed that the run directory does not hold yet.

    A hierarchy that was damaged and made again by other versions may have other leaves: measurements of other rows
    are not of these.
    """

    def made(leaf: int, seed: int) -> bool:
        name = measurement_file(leaf, seed)
        if not run.holds(name):
            return False
        if np.isin(run.read_arrays(name).get("rows", []), rows(leaf)).all():
            return True
        logger.warning("%s is of rows that its leaf does not hold, and made again.", run.file(name))
        return False

    def look() -> list[tuple[int, int]]:
        left = [pair for pair in todo if not made(*pair)]
        run.log("planned", leaves=len(todo), measured=len(todo) - len(left))
        return left

    return from_main(look)


def progress_of(todo: Sequence[tuple[int, int]], left: Sequence[tuple[int, int]]) -> tqdm:
    """The progress bar of a run that has `left` of `todo` to measure."""
    return tqdm(
        total=len(todo), initial=len(todo) - len(left), desc="Measuring", unit="finetune", disable=not is_main()
    )  # fmt: skip


def record(run: RunDir, leaf: int, seed: int, measurement: dict[str, Any], progress: tqdm) -> None:
    """Write one finished measurement into the run directory, and say so.

    Args:
        run: The run directory.
        leaf: The leaf, or `CONTROL`.
        seed: Seed of the finetune.
        measurement: What the file holds; its `reason` is empty, or says why there are no scores.
        progress: Moves on by one.
    """
    if measurement["reason"]:
        logger.warning("%s could not be measured: %s.", leaf_name(leaf).capitalize(), measurement["reason"])
    from_main(partial(_keep, run, leaf, seed, measurement))
    progress.update()
    honour()


def record_base(run: RunDir, measurement: dict[str, Any]) -> None:
    """Write the scores of the base model into the run directory, and say so."""
    run.write_arrays("base.npz", **measurement)
    seconds = round(float(measurement["seconds"]), 3)
    run.log("base", seconds_evaluation=seconds, tokens_evaluation=int(measurement["tokens"]))


def _keep(run: RunDir, leaf: int, seed: int, measurement: dict[str, Any]) -> None:
    run.write_arrays(measurement_file(leaf, seed), **measurement)
    told = {name: round(float(measurement.get(name, 0)), 3) for name in _TOLD}
    failed = {"reason": measurement["reason"]} if measurement["reason"] else {}
    run.log("leaf", leaf=leaf, seed=seed, **told, **failed)
