"""What measures: the finetuner and the evaluator around one loaded model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import TYPE_CHECKING

from ..evaluation.backends import open_evaluator
from ..finetune import LeafFinetuner
from ..models import load_model, shards

if TYPE_CHECKING:
    from datasets import Dataset
    from peft import PeftConfig
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ..config import HarpConfig
    from ..evaluation.evaluator import Evaluator
    from ..evaluation.scoring import Metric
    from ..proxy import ProxySet


def open_tools(
    model: str | PreTrainedModel,
    pool: Dataset,
    proxy: ProxySet,
    metrics: Sequence[Metric],
    peft_config: PeftConfig,
    tokenizer: PreTrainedTokenizerBase,
    args: HarpConfig,
) -> tuple[Callable[[], LeafFinetuner], Callable[[], Evaluator]]:
    """Functions that give the finetuner and the evaluator; arguments as in [`Inputs`].

    The model is loaded and the pool tokenised once, by the first call that needs them, and not at all without one.
    """
    # Frozen as it is after a finetune, as PyTorch computes slightly otherwise with weights that could be trained.
    base = cache(lambda: load_model(model, args).requires_grad_(False))
    finetuner = cache(lambda: LeafFinetuner(model if shards(args) else base(), pool, args, peft_config, tokenizer))
    evaluator = cache(lambda: open_evaluator(base(), model, tokenizer, proxy, metrics, peft_config, args))
    return finetuner, evaluator
