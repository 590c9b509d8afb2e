"""Evaluation with vLLM: one engine scores the base model and any number of adapters, all their rows in one batch."""

from __future__ import annotations

import gc
import logging
import os
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, PeftConfig
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..config import HarpConfig
from ..errors import ConfigError, reason
from ..proxy import ProxySet
from ..stopping import temporary_folder
from .rows import ProxyRows
from .scoring import Metric

logger = logging.getLogger(__name__)

# The ranks that vLLM has room for, and how many tokens it gives the log-probabilities of in one request.
_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
_TOKENS_A_REQUEST = 128
_INSTEAD = "set `backend` to 'transformers'"


class VllmEvaluator:
    """Scores the base model and adapters in one engine, which runs in a process of its own.

    A row that is scored by generation, or by exact match, is one greedy request. One that is scored by the likelihood
    of its answers or choices is a request for the next token after every beginning of one of them, which the prefix
    cache makes cheap. Between two evaluations the engine sleeps: the memory of the GPU is free for training.

    Greedy answers depend a little on what else is in a batch: two evaluations of one adapter may differ in a few rows.

    Args:
        model: The base model; its dtype and end tokens are the engine's.
        source: Its path or Hub id, or the model itself, a copy of which the engine then reads from disk.
        processing_class: Its tokenizer.
        proxy: The rows to score.
        metrics: Metric of each task, from [`resolve_metrics`].
        peft_config: What the adapters are like.
        args: Settings; those used are `max_new_tokens`, `vllm_*` and how the model is loaded.

    Raises:
        ConfigError: vLLM cannot serve such adapters, or does not start with the model.
        DataError: The proxy set has messages but the tokenizer no chat template.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        source: str | PreTrainedModel,
        processing_class: PreTrainedTokenizerBase,
        proxy: ProxySet,
        metrics: Sequence[Metric],
        peft_config: PeftConfig,
        args: HarpConfig,
    ) -> None:
        # vLLM reads these when it is first imported.
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
        self.tokens = 0
        self.adapters_at_once = args.vllm_max_loras
        self.bar: str | None = None
        self._rows = ProxyRows(proxy, metrics, processing_class, model.generation_config)
        self._rows.check_lengths(model.config, args.max_new_tokens)
        self._max_new_tokens = args.max_new_tokens
        self._requests = [request for row in range(len(proxy)) for request in self._ask(row)]
        self._ids = count(1)
        # Only a GPU has memory to give back.
        self._sleeps = args.device.type == "cuda"
        if not self._sleeps:
            logger.warning("On a CPU vLLM is slow with adapters: `backend='transformers'` is the faster one there.")
        self._engine = self._start(model, source, max_rank(peft_config), args)
        if self._sleeps:
            self._engine.sleep(level=1)

    def evaluate(self, adapters: Sequence[Path | None]) -> np.ndarray:
        """Scores of each adapter (`None` is the base model): (len(adapters), n_proxy), each in [0, 1]."""
        from vllm import TokensPrompt
        from vllm.lora.request import LoRARequest

        # A name and id that no adapter had before: the engine must not find another one's cache under it.
        loras = []
        for adapter in adapters:
            number = next(self._ids)
            loras.append(None if adapter is None else LoRARequest(f"adapter-{number}", number, str(adapter)))
        with self._awake():
            outputs = self._engine.generate(
                [TokensPrompt(prompt_token_ids=ids) for _ in adapters for _, ids, _ in self._requests],
                [params for _ in adapters for _, _, params in self._requests],
                lora_request=[lora for lora in loras for _ in self._requests],
                use_tqdm=self.bar is not None,
            )
        size = len(self._requests)
        return np.stack([self._score(outputs[k * size : (k + 1) * size]) for k in range(len(adapters))])

    def _start(self, model: PreTrainedModel, source: str | PreTrainedModel, rank: int, args: HarpConfig) -> Any:
        from vllm import LLM

        kwargs = args.model_init_kwargs or {}
        name = source if isinstance(source, str) else source.config.name_or_path
        longest = max(len(ids) + params.max_tokens for _, ids, params in self._requests)
        try:
            with temporary_folder() as folder, _no_main():
                if not isinstance(source, str):
                    source.save_pretrained(folder)
                _empty_cache()
                return LLM(
                    model=source if isinstance(source, str) else folder,
                    revision=kwargs.get("revision"),
                    trust_remote_code=args.trust_remote_code,
                    dtype=str(model.dtype).removeprefix("torch."),
                    seed=args.seed,
                    skip_tokenizer_init=True,
                    max_model_len=longest,
                    enable_prefix_caching=True,
                    gpu_memory_utilization=args.vllm_gpu_memory_utilization,
                    enable_sleep_mode=self._sleeps,
                    enforce_eager=not self._sleeps,
                    enable_lora=True,
                    max_loras=args.vllm_max_loras,
                    max_lora_rank=rank,
                )
        except Exception as error:  # vLLM raises whatever its own process raised
            raise ConfigError(
                f"vLLM does not start with the model {name!r}: {reason(error)}; raise "
                f"`vllm_gpu_memory_utilization` where memory is short, or {_INSTEAD}."
            ) from error

    @contextmanager
    def _awake(self) -> Iterator[None]:
        if not self._sleeps:
            yield
            return
        _empty_cache()
        self._engine.wake_up()
        try:
            yield
        finally:
            self._engine.sleep(level=1)

    def _ask(self, row: int) -> list[tuple[int, list[int], Any]]:
        """Row, token ids and sampling parameters of each request that a row needs."""
        from vllm import SamplingParams

        prompt, candidates = self._rows.prompts[row], self._rows.candidates[row]
        plain = {"temperature": 0.0, "detokenize": False, "ignore_eos": True}
        if self._rows.generating[row] or self._rows.metrics[row] == "exact_match":
            length = self._max_new_tokens if self._rows.generating[row] else max(map(len, candidates))
            return [(row, prompt, SamplingParams(max_tokens=length, stop_token_ids=self._rows.ends, **plain))]
        following: dict[tuple[int, ...], set[int]] = defaultdict(set)
        for candidate in candidates:
            for place, token in enumerate(candidate):
                following[tuple(candidate[:place])].add(token)
        requests = []
        for beginning, tokens in following.items():
            wanted = sorted(tokens)
            for start in range(0, len(wanted), _TOKENS_A_REQUEST):
                here = wanted[start : start + _TOKENS_A_REQUEST]
                params = SamplingParams(max_tokens=1, logprob_token_ids=here, **plain)
                requests.append((row, prompt + list(beginning), params))
        return requests

    def _score(self, outputs: Sequence[Any]) -> np.ndarray:
        """Scores of all rows from one adapter's outputs."""
        scores = np.zeros(len(self._rows.prompts))
        texts: dict[int, str] = {}
        found: dict[int, dict[tuple[int, ...], float]] = defaultdict(dict)
        for (row, ids, params), output in zip(self._requests, outputs, strict=True):
            answer = list(output.outputs[0].token_ids)
            self.tokens += len(ids) - (output.num_cached_tokens or 0) + len(answer)
            if params.logprob_token_ids is not None:
                beginning = ids[len(self._rows.prompts[row]) :]
                for token in params.logprob_token_ids:
                    path = (*beginning, token)
                    found[row][path] = output.outputs[0].logprobs[0][token].logprob
            elif self._rows.generating[row]:
                texts[row] = self._rows.decode(answer)
            else:
                greedy = any(answer[: len(c)] == c for c in self._rows.candidates[row])
                scores[row] = self._rows.judge(row, [], greedy)
        for row, known in found.items():
            means = [
                sum(known[tuple(candidate[: place + 1])] for place in range(len(candidate))) / len(candidate)
                for candidate in self._rows.candidates[row]
            ]
            scores[row] = self._rows.judge(row, means, False)
        for row, score in self._rows.score_texts(texts).items():
            scores[row] = score
        return scores


def max_rank(peft_config: PeftConfig) -> int:
    """The least rank that vLLM has room for and that holds every adapter made with `peft_config`.

    Raises:
        ConfigError: vLLM cannot serve such adapters.
    """
    if not isinstance(peft_config, LoraConfig):
        raise ConfigError(f"vLLM serves LoRA adapters, not {type(peft_config).__name__}: {_INSTEAD}.")
    for name, plain in (("use_dora", False), ("lora_bias", False), ("bias", "none"), ("modules_to_save", None)):
        value = getattr(peft_config, name)
        if value and value != plain:
            raise ConfigError(f"vLLM does not serve LoRA adapters with {name}={value!r}: {_INSTEAD}.")
    rank = max([peft_config.r, *(peft_config.rank_pattern or {}).values()])
    if rank > _RANKS[-1]:
        raise ConfigError(f"vLLM serves LoRA adapters up to rank {_RANKS[-1]}, not {rank}: {_INSTEAD}.")
    return next(cap for cap in _RANKS if cap >= rank)


@contextmanager
def _no_main() -> Iterator[None]:
    """Let the engine's process start without running the user's script again, guarded by `__name__` or not."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


def _empty_cache() -> None:
    """Give the memory that a training has left unused back to the GPU."""
    if torch.cuda.is_available():
        gc.collect()
        torch.cuda.empty_cache()
