"""Checkpoints of a long finetune, so that one that was killed goes on instead of beginning anew."""

from __future__ import annotations

import logging
import shutil
import time
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, SaveStrategy

from .rundir import RunDir, sha256_of_file

logger = logging.getLogger(__name__)

# Seconds between two checkpoints: no more than these are lost.
EVERY = 300.0
# Written last, so that no checkpoint is taken for whole that is not.
_MARK = "whole.json"


class Checkpoints(TrainerCallback):
    """Has a trainer save its state every five minutes, and finds the last one that is whole.

    Args:
        run: The run directory.
        name: Folder in it, of this finetune alone.

    Attributes:
        seconds (`float`): Wall-clock seconds of training that went into the checkpoint that was found.
    """

    def __init__(self, run: RunDir, name: str) -> None:
        self._run, self._name, self.seconds = run, name, 0.0
        self._began = self._saved = time.monotonic()

    def settings(self) -> dict[str, Any]:
        """What the settings of the trainer must be."""
        # Two, as an older one goes before a new one is known to be whole.
        return {
            "output_dir": str(self._run.file(self._name)), "save_strategy": SaveStrategy.NO, "save_only_model": False,
            "save_total_limit": 2,
        }  # fmt: skip

    def find(self) -> str | None:
        """Path of the last whole checkpoint, for `train(resume_from_checkpoint=...)`."""
        found = self._run.file(self._name).glob(f"{PREFIX_CHECKPOINT_DIR}-*")
        for path in sorted(found, key=lambda path: int(path.name.rpartition("-")[2]), reverse=True):
            mark = f"{self._name}/{path.name}/{_MARK}"
            if not self._run.holds(mark):
                continue
            known = self._run.read_json(mark)
            if known["files"] == _digests(path):
                self.seconds = known["seconds"]
                return str(path)
            logger.warning("%s is damaged, and not used.", path)
        return None

    def remove(self) -> None:
        """Remove them all."""
        shutil.rmtree(self._run.file(self._name), ignore_errors=True)

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """Begin to wait."""
        self._began = self._saved = time.monotonic()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Have the trainer save when it is time, but not at the end: what goes on must still tell a finite loss."""
        if time.monotonic() - self._saved >= EVERY and state.global_step < state.max_steps:
            control.should_save = True

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Note that a checkpoint is whole."""
        name = f"{self._name}/{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        seconds = self.seconds + time.monotonic() - self._began
        self._run.write_json(f"{name}/{_MARK}", {"files": _digests(self._run.file(name)), "seconds": seconds})
        self._saved = time.monotonic()


def _digests(path: Path) -> dict[str, str]:
    """SHA-256 of the files of a checkpoint, by name."""
    return {file.name: sha256_of_file(file) for file in path.iterdir() if file.name != _MARK}
