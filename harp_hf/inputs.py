"""What a run is given, read and checked before anything costly is done."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from peft import PeftConfig
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .config import HarpConfig
from .errors import ConfigError, DataError
from .evaluation.scoring import Metric, identify_metrics, resolve_metrics
from .features import describe_features
from .manifest import describe_settings, describe_versions
from .mixture import load_pool, read_labels
from .models import (
    check_adapter,
    default_peft_config,
    describe_model,
    describe_peft,
    describe_tokenizer,
    load_tokenizer,
    prepare_tokenizer,
)
from .null_scores import read_null_scores
from .pool import check_pool, read_contents, training_columns
from .proxy import ProxySet, load_proxy
from .sources import Labels
from .tracking import check_trackers

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Inputs:
    """Everything a run is given, checked.

    Attributes:
        pool (`Dataset`): The rows to choose from.
        labels (`Labels`, *optional*): The source of each of them, where it is known.
        digest (`str`): Digest of the pool's contents.
        proxy (`ProxySet`): The rows to judge by.
        metrics (`list`): Metric of each task.
        features: What rows are compared by: a name, a model or an array.
        null_scores (`np.ndarray`, *optional*): (n_proxy,) scores of the base model where they were handed in.
        model: The base model or its name.
        peft_config (`PeftConfig`): The adapter of the leaf finetunes.
        tokenizer (`PreTrainedTokenizerBase`): The tokenizer, with its end token and chat template as asked for.
        decode: Token ids to text.
    """

    pool: Dataset
    labels: Labels | None
    digest: str
    proxy: ProxySet
    metrics: list[Metric]
    features: Any
    null_scores: np.ndarray | None
    model: str | PreTrainedModel
    peft_config: PeftConfig
    tokenizer: PreTrainedTokenizerBase
    decode: Callable[[list[int]], str]

    def manifest(self, args: HarpConfig) -> dict[str, Any]:
        """What identifies the run; see [`RunDir.claim`]."""
        return {
            "pool": self.digest,
            "proxy": self.proxy.digest,
            "model": [
                describe_model(self.model),
                describe_peft(self.peft_config),
                self.tokenizer.chat_template,
                describe_tokenizer(self.tokenizer),
            ],
            "features": describe_features(self.features, self.pool.column_names),
            "settings": describe_settings(args, identify_metrics(self.metrics), self.null_scores),
            "versions": describe_versions(),
        }


def read_inputs(
    dataset: Any,
    eval_dataset: Any,
    model: Any,
    args: HarpConfig,
    peft_config: Any = None,
    processing_class: Any = None,
    features: Any = None,
    metric: Any = None,
    null_scores: Any = None,
) -> Inputs:
    """Read and check what [`measure`] is given; arguments and errors as there."""
    if not isinstance(args, HarpConfig):
        raise ConfigError(f"`args` must be a HarpConfig, not {type(args).__name__}.")
    model = str(model) if isinstance(model, Path) else model
    _check_objects(model, peft_config, processing_class)
    pool, labels = load_pool(dataset, args.seed)
    check_pool(pool, args.dataset_text_field)
    labels = read_labels(pool, args.source_column) if args.source_column is not None else labels
    proxy = eval_dataset if isinstance(eval_dataset, ProxySet) else load_proxy(eval_dataset)
    metrics = resolve_metrics(metric if metric is not None else args.metric, proxy)
    null_scores = null_scores if null_scores is not None else args.null_scores
    given = None if null_scores is None else read_null_scores(null_scores, proxy)
    check_tasks(args, proxy)
    check_trackers(args.report_to)
    tokenizer = prepare_tokenizer(processing_class or load_tokenizer(model, args), args)
    _check_chat_template(pool, proxy, tokenizer, args.dataset_text_field)
    decode = partial(tokenizer.decode, skip_special_tokens=True)
    contents = read_contents(pool, args.dataset_text_field, decode, frozenset().union(*proxy.row_keys()))
    _warn_of_leaks(proxy, contents.keys)
    return Inputs(
        pool, labels, contents.digest, proxy, metrics, features if features is not None else args.features, given,
        model, peft_config if peft_config is not None else default_peft_config(), tokenizer, decode,
    )  # fmt: skip


def check_tasks(args: HarpConfig, proxy: ProxySet) -> None:
    """Raise [`ConfigError`] where `task_weights` or `active_tasks` name a task that the proxy set does not have.

    Also where two tasks would share a result column.
    """
    for task in proxy.tasks:
        if f"sd_{task}" in proxy.tasks:
            raise ConfigError(
                f"The tasks {task!r} and {'sd_' + task!r} would share the result column 'phi_sd_{task}': rename one."
            )
    weights = args.task_weights if isinstance(args.task_weights, dict) else {}
    named = [("task_weights", t) for t in weights] + [
        ("active_tasks", t) for t in args.active_tasks if args.active_tasks not in (["auto"], ["all"])
    ]
    for where, task in named:
        if task not in proxy.tasks:
            raise ConfigError(
                f"`{where}` names the task {task!r}, which is not in the proxy set; its tasks are "
                f"{', '.join(proxy.tasks)}."
            )
    deciding = [t for t in proxy.tasks if t in args.active_tasks] or proxy.tasks
    if not any(weights.get(task, 1) for task in deciding):
        raise ConfigError("All tasks have the weight 0 in `task_weights`, so none can decide the selection.")


def _check_objects(model: Any, peft_config: Any, processing_class: Any) -> None:
    if model is None:
        raise ConfigError("A model is needed: pass its path, its Hub id or the model itself as `model`.")
    for name, value, kinds in (
        ("model", model, (str, PreTrainedModel)),
        ("peft_config", peft_config, (PeftConfig,)),
        ("processing_class", processing_class, (PreTrainedTokenizerBase,)),
    ):
        if value is not None and not isinstance(value, kinds):
            wanted = " or a ".join(kind.__name__ for kind in kinds)
            raise ConfigError(f"`{name}` must be a {wanted}, not {type(value).__name__}.")
    if peft_config is not None:
        check_adapter(peft_config)


def _check_chat_template(pool: Dataset, proxy: ProxySet, tokenizer: PreTrainedTokenizerBase, text_field: str) -> None:
    """Raise [`DataError`] where messages meet a tokenizer without chat template, before anything costly is done."""
    if tokenizer.chat_template:
        return
    read = pool.select_columns(training_columns(pool, text_field))[0]
    conversational = read.keys() & {"messages", "conversations"} or isinstance(read.get("prompt"), list)
    for what, messages in (
        ("pool", conversational and "input_ids" not in read),
        ("proxy set", any(isinstance(prompt, list) for prompt in proxy.prompts)),
    ):
        if messages:
            raise DataError(
                f"The {what} has messages, but the tokenizer has no chat template: set `chat_template_path`, or "
                "pass a `processing_class` that has one."
            )


def _warn_of_leaks(proxy: ProxySet, found: frozenset[bytes]) -> None:
    leaks = [i for i, keys in enumerate(proxy.row_keys()) if keys & found]
    if leaks:
        logger.warning(
            "%d of %d rows of the proxy set stand word for word in the pool (the first is row %d): "
            "scores on them will flatter the leaves that hold them.", len(leaks), len(proxy), leaks[0],
        )  # fmt: skip
