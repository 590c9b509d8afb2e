"""Final finetunes on selections, scored on test rows, each made once a folder."""

from __future__ import annotations

import copy
import hashlib
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from datasets import Dataset

from .checkpoints import Checkpoints
from .config import HarpConfig
from .errors import FinetuneError, HarpError
from .evaluation.backends import open_evaluator
from .evaluation.scoring import Metric, describe_metrics, identify_metrics, resolve_metrics
from .finetune import LeafFinetuner
from .models import (
    default_peft_config,
    describe_model,
    describe_peft,
    describe_tokenizer,
    lent,
    load_model,
    load_tokenizer,
    prepare_tokenizer,
)
from .proxy import ProxySet
from .rundir import RunDir
from .settings import changed_settings
from .stopping import honour, temporary_folder

if TYPE_CHECKING:
    from peft import PeftConfig
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True, eq=False)
class Trial:
    """One finetune and what it scored.

    Attributes:
        scores (`np.ndarray`): (M, n_test) score in [0, 1] of each test row by each of M metrics.
        tokens_training (`int`): Tokens trained on, repeated rows counted again, padding not counted.
        tokens_evaluation (`int`): Tokens read or generated for all metrics.
        seconds_training (`float`): Wall-clock seconds of the finetune.
        seconds_evaluation (`float`): Wall-clock seconds of scoring.
    """

    scores: np.ndarray
    tokens_training: int = 0
    tokens_evaluation: int = 0
    seconds_training: float = 0.0
    seconds_evaluation: float = 0.0


class Trials:
    """Finetunes on selections of one pool and scores each finetune by several metrics, with transformers.

    Args:
        run: Where finished trials are kept, in the folder `verify`; a directory is of one pool.
        pool: The pool.
        test: The rows to score.
        model: Path or Hub id of the base model, or the model itself; loaded only where something is left to do.
        args: Settings of the finetunes, whose `max_steps` gives way to epochs.
        peft_config: The adapter. Default: LoRA of rank 16 on all linear layers.
        processing_class: The tokenizer. Default: the model's own.
        metrics: Each as in [`measure`].

    Attributes:
        metrics (`list[list[str]]`): For each metric, its name on each task of `test`.

    Raises:
        HarpError: As in [`measure`].
    """

    def __init__(
        self,
        run: RunDir,
        pool: Dataset,
        test: ProxySet,
        model: str | PreTrainedModel,
        args: HarpConfig,
        peft_config: PeftConfig | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        *,
        metrics: Sequence[Metric | Mapping[str, Metric]] = ("auto",),
    ) -> None:
        self._run, self._model, self._n_rows, self._n_test = run, model, len(pool), len(test)
        self._metrics = [resolve_metrics(metric, test) for metric in metrics]
        self.metrics = [describe_metrics(metric) for metric in self._metrics]
        # For every metric, the first one that scores the task of each test row alike; only its scores are made.
        first = [[self._alike(d, metric[d]) for d in range(len(test.tasks))] for metric in self._metrics]
        self._first = np.array(first)[:, test.task]
        tokenizer = prepare_tokenizer(processing_class or load_tokenizer(model, args), args)
        adapter = peft_config or default_peft_config()
        base = cache(lambda: load_model(model, args))
        self._finetuner = cache(lambda: LeafFinetuner(base(), pool, args, adapter, tokenizer))
        self._evaluators = cache(lambda: {
            place: open_evaluator(
                base(), model, tokenizer, test.take(self._own(place)), self._metrics[place], adapter, args
            )
            for place in range(len(metrics)) if len(self._own(place))
        })  # fmt: skip
        settings = {k: v for k, v in changed_settings(args).items() if k not in _NOT_OF_A_TRIAL}
        scoring = [identify_metrics(metric) for metric in self._metrics]
        described = [
            describe_model(model), describe_peft(adapter), tokenizer.chat_template, describe_tokenizer(tokenizer),
            scoring, settings, args.bf16, args.fp16,
        ]  # fmt: skip
        self._settings = f"{test.digest} {described!r}"

    def run(self, rows: np.ndarray, seed: int, epochs: float, name: str) -> Trial:
        """Finetune on pool rows and score the test rows, unless that was done before.

        A finetune that was killed goes on from its last checkpoint, which is at most five minutes old.

        Args:
            rows: Pool rows; none at all is the base model as it is.
            seed: Seed of the finetune.
            epochs: Passes over the rows.
            name: What the selection is called in the name of the file and in errors.

        Raises:
            HarpError: All rows were lost to truncation, or the loss is not a finite number.
        """
        rows = np.sort(np.asarray(rows, np.int64))
        told = f"{self._settings} {(seed, float(epochs)) if len(rows) else ()}".encode()
        digest = hashlib.sha256(told + rows.tobytes()).hexdigest()[:12]
        # Two selections may be of the same rows.
        same = sorted(self._run.file("verify").glob(f"*-{digest}.npz"))
        same = [path for path in same if self._run.holds(f"verify/{path.name}")]
        file = f"verify/{same[0].name}" if same else f"verify/{_stem(name)}-{digest}.npz"
        if not same:
            checkpoints = Checkpoints(self._run, file.removesuffix(".npz"))
            with temporary_folder() as folder, lent(self._model):
                trial = self._make(rows, seed, epochs, name, checkpoints, Path(folder))
            self._run.write_arrays(file, rows=rows, **asdict(trial))
            checkpoints.remove()
            honour()
        known = self._run.read_arrays(file)
        return Trial(
            known["scores"], int(known["tokens_training"]), int(known["tokens_evaluation"]),
            float(known["seconds_training"]), float(known["seconds_evaluation"]),
        )  # fmt: skip

    def _make(
        self, rows: np.ndarray, seed: int, epochs: float, name: str, checkpoints: Checkpoints, folder: Path
    ) -> Trial:
        adapter, tokens, started = None, 0, time.monotonic()
        if len(rows):
            adapter, finetuner = folder / f"{_stem(name)}-seed-{seed}", copy.copy(self._finetuner())
            finetuner.bar, finetuner.checkpoints = f"Finetune on {name}, seed {seed}", checkpoints
            finetuner.args = copy.copy(finetuner.args)
            finetuner.args.max_steps, finetuner.args.num_train_epochs = -1, epochs
            try:
                tokens = finetuner.finetune(rows, seed, adapter).tokens
            except FinetuneError as error:
                raise HarpError(f"The finetune on {name} failed: {error}.") from error
        trained = time.monotonic()
        judges = self._evaluators()
        before = sum(judge.tokens for judge in judges.values())
        scores = np.zeros((len(self._metrics), self._n_test))
        for place, judge in judges.items():
            judge.bar = f"Score of {name}, seed {seed}" if len(rows) else "Score of the base model"
            scores[place, self._own(place)] = judge.evaluate([adapter])[0]
        scores = np.take_along_axis(scores, self._first, axis=0)
        evaluated = sum(judge.tokens for judge in judges.values()) - before
        if not np.isfinite(scores).all():
            raise HarpError(f"The finetune on {name} failed: its scores are not finite numbers.")
        return Trial(
            scores, tokens, evaluated, checkpoints.seconds + trained - started, time.monotonic() - trained
        )  # fmt: skip

    def _alike(self, task: int, metric: Metric) -> int:
        return next(place for place, metrics in enumerate(self._metrics) if metrics[task] == metric)

    def _own(self, place: int) -> np.ndarray:
        """Test rows that no earlier metric scores alike."""
        return np.flatnonzero(self._first[place] == place)

    def tokens_by_row(self) -> np.ndarray:
        """(n,) tokens of each pool row as it is trained on; 0 for rows lost to truncation."""
        finetuner = self._finetuner()
        tokens = np.zeros(self._n_rows, np.int64)
        for row, ids in zip(finetuner.tokenised["harp_row"][:], finetuner.tokenised["input_ids"][:], strict=True):
            tokens[row] = len(ids)
        return tokens


def _stem(name: str) -> str:
    """Beginning of the name of a file."""
    return re.sub(r"[^\w.-]+", "-", name)[:80]


# Settings that have no part in a final finetune.
_NOT_OF_A_TRIAL = {"seed", "max_steps", "num_train_epochs", "leaf_size", "branching", "metric"}
