"""Proof by finetuning: what a selection really brings on held-out test rows."""

from __future__ import annotations

import io
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from datasets import Dataset
from peft import PeftConfig
from rich.console import Console
from rich.table import Table

from .config import HarpConfig, check_whole
from .errors import ConfigError, DataError, HarpError
from .evaluation.scoring import Metric
from .intervals import mean_intervals
from .models import describe_model, describe_tokenizer, load_tokenizer, prepare_tokenizer
from .pool import read_contents
from .proxy import ProxySet, load_proxy
from .result import HarpResult
from .rundir import RunDir
from .saved import load_result
from .settings import read_settings
from .texts import printable
from .trials import Trials

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

BASE, RANDOM, WHOLE = "base model", "random rows", "whole pool"
_WIDTH = 100


def verify(
    pool: Dataset,
    selections: Mapping[str, np.ndarray],
    test: ProxySet,
    model: str | PreTrainedModel,
    args: HarpConfig,
    peft_config: PeftConfig | None = None,
    processing_class: PreTrainedTokenizerBase | None = None,
    *,
    epochs: float = 2.0,
    metric: Metric | dict[str, Metric] | None = None,
) -> dict[str, np.ndarray]:
    """Finetune on each selection once and score it on test rows.

    What is finished is kept in `args.output_dir`/verify and not repeated.

    Args:
        pool: The pool.
        selections: Name and pool rows of each selection; a selection without rows is the base model.
        test: Rows that neither the pool nor the proxy set holds.
        model: Path or Hub id of the base model, or the model itself.
        args: Settings of the finetunes, whose `max_steps` gives way to `epochs` over each selection.
        peft_config: The adapter. Default: LoRA of rank 16 on all linear layers.
        processing_class: The tokenizer. Default: the model's own.
        epochs: Passes over each selection.
        metric: As in [`measure`].

    Returns:
        `dict[str, np.ndarray]`: (n_test,) score in [0, 1] of each test row, for each selection.

    Raises:
        HarpError: As in [`measure`].
    """
    run = RunDir(args.output_dir or "harp_output")
    metrics = [metric if metric is not None else args.metric]
    trials = Trials(run, pool, test, model, args, peft_config, processing_class, metrics=metrics)
    scores = {}
    for name, rows in selections.items():
        logger.info("Verifying %s: %d rows.", name, len(rows))
        scores[name] = trials.run(rows, args.seed, epochs, name).scores[0]
    return scores


@dataclass(frozen=True, eq=False)
class Proof:
    """Test scores after finetuning on a selection and on what it is compared with.

    Attributes:
        test (`ProxySet`): The test rows.
        selection (`str`): Name of the selection, a key of `scores`.
        rows (`dict[str, int]`): Rows finetuned on, by name.
        scores (`dict[str, np.ndarray]`): (R, n_test) score in [0, 1] after the finetune with each of R seeds, by name.
        epochs (`float`): Passes over the rows of each.
        metrics (`list[str]`): Metric of each task.
    """

    test: ProxySet
    selection: str
    rows: dict[str, int]
    scores: dict[str, np.ndarray]
    epochs: float
    metrics: list[str]

    def difference(self, other: str, level: float = 0.95) -> np.ndarray:
        """(D + 1, 3) score of the selection minus that of `other`: see [`mean_intervals`]."""
        return mean_intervals(self.scores[self.selection] - self.scores[other], self.test.task, level)

    def summary(self) -> str:
        """A table of scores and differences by task, for people."""
        console = Console(file=io.StringIO(), width=_WIDTH, color_system=None, markup=False, emoji=False)
        tasks = [*map(printable, self.test.tasks), "mean of tasks"]
        table = Table(title="Test scores after finetuning")
        table.add_column("task", overflow="fold")
        table.add_column("metric", overflow="fold")
        for name, count in self.rows.items():
            table.add_column(f"{name}\n{count:,} rows" if count else name, justify="right")
        means = [mean_intervals(scores, self.test.task)[:, 0] for scores in self.scores.values()]
        for d, task in enumerate(tasks):
            metric = [*map(printable, self.metrics), ""][d]
            table.add_row(task, metric, *(f"{mean[d]:.3f}" for mean in means), end_section=d == len(tasks) - 2)
        console.print(table)
        for other in (RANDOM, WHOLE):
            if other not in self.scores:
                continue
            table = Table(title=f"{self.selection} − {other}")
            table.add_column("task", overflow="fold")
            table.add_column("difference", justify="right")
            table.add_column("95 % interval", justify="right")
            for d, (mean, low, high) in enumerate(self.difference(other)):
                interval = f"{low:+.3f} to {high:+.3f}" if np.isfinite(low) else "not known"
                table.add_row(tasks[d], f"{mean:+.3f}", interval, end_section=d == len(tasks) - 2)
            console.print(table)
        seeds = len(self.scores[self.selection])
        passes = f"{self.epochs:g} {'epoch' if self.epochs == 1 else 'epochs'}"
        console.print(
            f"{passes}, {seeds} {'seed' if seeds == 1 else 'seeds'}, {len(self.test)} test rows. "
            "Intervals are of paired differences (same test rows, same seeds): two-way random effects of rows and "
            "seeds, Student's t. "
            + ("With one seed they do not hold the spread between finetunes." if seeds == 1 else
               "Each seed draws its own random rows.")
        )  # fmt: skip
        return console.file.getvalue()


def verify_run(
    path: str | Path,
    eval_dataset: Any,
    *,
    variant: str | None = None,
    budget: int | None = None,
    task_weights: dict[str, float] | None = None,
    active_tasks: list[str] | str | None = None,
    budget_by: str | None = None,
    whole_pool: bool = False,
    epochs: float = 2.0,
    seeds: int = 3,
    metric: Metric | dict[str, Metric] = "auto",
    model: str | PreTrainedModel | None = None,
    dataset: Any = None,
    processing_class: PreTrainedTokenizerBase | None = None,
) -> Proof:
    """Finetune on a finished run's selection and on as many random rows, and score both on test rows.

    Every finetune has the settings, adapter and tokenizer of the run's leaf finetunes, but `epochs` passes over its
    rows. What is finished is kept in `path`/verify and not repeated; a finetune that was killed goes on there.

    Args:
        path: The run directory.
        eval_dataset: Test rows, in the form of a proxy set; neither the pool nor the proxy set should hold them.
        variant, budget, task_weights, active_tasks, budget_by: As in [`HarpResult.select`].
        whole_pool: Whether to finetune on the whole pool too.
        epochs: Passes over each set of rows.
        seeds: Finetunes on each; every one draws other random rows.
        metric: As in [`measure`].
        model: The base model, where the run had it as an object.
        dataset: The pool, where the run had it as an object.
        processing_class: The tokenizer, where the run had one that is not the model's own.

    Raises:
        HarpError: The run is not finished, something passed cannot be used, or another process is in the directory.
    """
    check_whole("seeds", seeds, 1)
    if not epochs > 0:
        raise ConfigError(f"`epochs` must be above 0, but it is {epochs!r}.")
    result = load_result(path, dataset).choosing(variant, budget, task_weights, active_tasks, budget_by)
    rows = result.chosen()[0]
    if len(rows) == 0:
        raise HarpError("No leaf of the pool is expected to raise the score of the active tasks.")
    test = eval_dataset if isinstance(eval_dataset, ProxySet) else load_proxy(eval_dataset)
    model, args, peft_config, tokenizer = _reopen(RunDir(path), model, processing_class)
    _warn_of_leaks(result, test, RunDir(path).read_json("manifest.json")["proxy"], args, tokenizer)
    trials = Trials(RunDir(path), result.pool, test, model, args, peft_config, tokenizer, metrics=[metric])

    numbers = range(args.seed, args.seed + seeds)
    name = result.choice.variant
    drawn = [np.random.default_rng(seed).choice(len(result.pool), len(rows), replace=False) for seed in numbers]
    compared: dict[str, Sequence[np.ndarray]] = {BASE: [rows[:0]], RANDOM: drawn}
    if whole_pool:
        compared[WHOLE] = [np.arange(len(result.pool))] * seeds
    compared[name] = [rows] * seeds
    scores = {}
    with RunDir(path).locked():
        for other, sets in compared.items():
            found = []
            for seed, some in zip(numbers, sets, strict=False):
                logger.info("Verifying %s: %d rows, seed %d.", other, len(some), seed)
                found.append(trials.run(some, seed, epochs, other.replace(" ", "-")).scores[0])
            scores[other] = np.stack(found)
    return Proof(
        test, name, {other: len(sets[0]) for other, sets in compared.items()}, scores, epochs, trials.metrics[0]
    )


def _reopen(
    run: RunDir, model: str | PreTrainedModel | None, processing_class: PreTrainedTokenizerBase | None
) -> tuple[str | PreTrainedModel, HarpConfig, PeftConfig, PreTrainedTokenizerBase]:
    """Model, settings, adapter and tokenizer of a run.

    Raises:
        ConfigError: The model or the tokenizer is not known or not the run's.
    """
    written, manifest = run.file("config.yaml"), run.read_json("manifest.json")
    if not written.exists():
        raise DataError(f"The settings of {run.path} are not known: it has no config.yaml.")
    config = run.read_yaml("config.yaml")
    # By default that of the machine, which may be another.
    precision = {name: manifest["settings"][name] for name in ("bf16", "fp16")}
    args, _ = read_settings(config | precision)
    known, adapter, chat_template, tokens = manifest["model"]
    given = model if model is not None else config.get("model_name_or_path")
    if given is None:
        raise ConfigError(f"The model of {run.path} was an object in memory: pass it as `model`.")
    if isinstance(given, str) and not _same_model(given, known):
        raise ConfigError(f"The model {given!r} is not the one that {run.path} was measured with.")
    args.output_dir = str(run.path)  # the run may have been moved
    args.chat_template_path = None  # its file may be another by now, or gone
    tokenizer = prepare_tokenizer(processing_class or load_tokenizer(given, args), args)
    if describe_tokenizer(tokenizer) != tokens:
        raise ConfigError(f"{run.path} was measured with another tokenizer: pass it as `processing_class`.")
    tokenizer.chat_template = chat_template
    return given, args, PeftConfig.from_peft_type(**adapter), tokenizer


def _same_model(name: str, known: str) -> bool:
    """Whether a model is the described one: by its files where it is a folder, else by its name."""
    described_name, digest = known.rsplit(" ", 1)
    return describe_model(name).endswith(f" {digest}") if Path(name).is_dir() else name == described_name


def _warn_of_leaks(
    result: HarpResult, test: ProxySet, proxy_digest: str, args: HarpConfig, tokenizer: PreTrainedTokenizerBase
) -> None:
    if test.digest == proxy_digest:
        logger.warning("The test rows are the proxy set that the selection was made for, so they flatter it.")
    keys = test.row_keys()
    decode = partial(tokenizer.decode, skip_special_tokens=True)
    found = read_contents(result.pool, args.dataset_text_field, decode, frozenset().union(*keys)).keys
    leaks = [i for i, some in enumerate(keys) if some & found]
    if leaks:
        logger.warning(
            "%d of %d test rows stand word for word in the pool (the first is row %d): they flatter whatever "
            "holds them.", len(leaks), len(test), leaks[0],
        )  # fmt: skip
