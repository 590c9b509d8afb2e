"""Which backend evaluates."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING

from ..config import HarpConfig
from ..errors import ConfigError, MissingExtraError
from ..proxy import ProxySet
from .evaluator import Evaluator
from .scoring import Metric
from .transformers import TransformersEvaluator

if TYPE_CHECKING:
    from peft import PeftConfig
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def choose_backend(args: HarpConfig) -> str:
    """`"transformers"` or `"vllm"`, as `args.backend` says or, where it is `"auto"`, as the machine allows.

    Raises:
        MissingExtraError: vLLM is asked for and not installed.
        ConfigError: vLLM is asked for in a run that it cannot evaluate.
    """
    installed = find_spec("vllm") is not None
    quantised = (args.model_init_kwargs or {}).get("quantization_config") is not None
    if args.backend == "auto":
        fits = args.device.type == "cuda" and args.world_size == 1 and not quantised
        return "vllm" if fits and installed else "transformers"
    if args.backend == "vllm":
        if not installed:
            raise MissingExtraError(
                "`backend` is 'vllm', which is not installed: run `pip install \"harp-hf[vllm]\"`."
            )
        if args.world_size > 1:
            raise ConfigError(
                "vLLM evaluates in runs of one process: set `backend` to 'transformers' under a launcher."
            )
        if quantised:
            raise ConfigError(
                "vLLM would not quantise the model as its trainer does: set `backend` to 'transformers'."
            )
    return args.backend


def open_evaluator(
    model: PreTrainedModel,
    source: str | PreTrainedModel,
    processing_class: PreTrainedTokenizerBase,
    proxy: ProxySet,
    metrics: Sequence[Metric],
    peft_config: PeftConfig,
    args: HarpConfig,
) -> Evaluator:
    """The evaluator that [`choose_backend`] names.

    Args:
        model: The base model, loaded.
        source: Its path or Hub id, or the model itself.
        processing_class: Its tokenizer.
        proxy: The rows to score.
        metrics: Metric of each task, from [`resolve_metrics`].
        peft_config: What the adapters are like.
        args: Settings of the run.

    Raises:
        HarpError: The backend cannot be used; the message says what to do.
    """
    if choose_backend(args) == "vllm":
        from .vllm import VllmEvaluator

        return VllmEvaluator(model, source, processing_class, proxy, metrics, peft_config, args)
    return TransformersEvaluator(
        model, processing_class, proxy, metrics, args.per_device_eval_batch_size, args.max_new_tokens
    )
