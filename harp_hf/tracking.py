"""Lets the user's trackers see every leaf finetune as a run of its own."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainingArguments
from transformers.integrations import TensorBoardCallback, get_reporting_integration_callbacks

from .errors import ConfigError, reason


def check_trackers(report_to: Any) -> None:
    """Raise [`ConfigError`] unless each tracker is one that transformers knows and is installed."""
    try:
        for callback in get_reporting_integration_callbacks(report_to):
            callback()
    except (ImportError, RuntimeError, ValueError) as error:
        raise ConfigError(f"`report_to` cannot be used: {reason(error)}.") from error


def run_name(args: TrainingArguments, finetune: str) -> str:
    """Name of a finetune in the trackers: after `args.run_name`, or the run directory, as others share a project."""
    return f"{args.run_name or Path(args.output_dir or '').name}-{finetune}"


@contextmanager
def own_run(trainer: Trainer) -> Iterator[None]:
    """Give a training a TensorBoard folder named like its run, and end its W&B run, which the Trainer leaves open.

    A W&B run that was open before gets what is logged and stays open.
    """
    board = trainer.pop_callback(TensorBoardCallback)
    if board is not None:
        folder = Path(board.logging_dir or Path(trainer.args.output_dir) / "runs")
        board.logging_dir = str(folder / trainer.args.run_name)
        trainer.add_callback(board)
    open_before = _open_wandb_run()
    try:
        yield
    finally:
        if open_before is None and _open_wandb_run() is not None:
            sys.modules["wandb"].finish()


def _open_wandb_run() -> Any:
    return getattr(sys.modules.get("wandb"), "run", None)
