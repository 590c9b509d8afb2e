"""Evaluation with transformers: likelihoods by one pass over the prompt and one over its answers, or generation.

Where not all layers of a model attend to all tokens, likelihoods take one pass over the prompt with each answer.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from peft import PeftModel
from tqdm.auto import tqdm
from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from ..faults import unchanged
from ..proxy import ProxySet
from ..quiet import quiet
from .rows import ProxyRows
from .scoring import Metric


class TransformersEvaluator:
    """Scores adapters one after another on the base model they were trained on.

    Args:
        model: The base model, already where it is to run.
        processing_class: Its tokenizer.
        proxy: The rows to score.
        metrics: Metric of each task, from [`resolve_metrics`].
        batch_size: Prompts at once; batches hold prompts of about the same length.
        max_new_tokens: Longest answer generated.

    Raises:
        DataError: The proxy set does not fit the tokenizer or the model; see [`ProxyRows`].
    """

    def __init__(
        self,
        model: PreTrainedModel,
        processing_class: PreTrainedTokenizerBase,
        proxy: ProxySet,
        metrics: Sequence[Metric],
        batch_size: int = 8,
        max_new_tokens: int = 64,
    ) -> None:
        self.model, self.batch_size, self.max_new_tokens = model, batch_size, max_new_tokens
        self.tokens, self.adapters_at_once = 0, 1
        self.bar: str | None = None
        pads = (processing_class.pad_token_id, processing_class.eos_token_id, 0)
        self._pad = next(i for i in pads if i is not None)
        self._rows = ProxyRows(proxy, metrics, processing_class, model.generation_config)
        self._rows.check_lengths(model.config, max_new_tokens)
        self._prompts, self._candidates = self._rows.prompts, self._rows.candidates
        # A tensor, as after a slice (`logits_to_keep=1`) torch may copy the vocabulary's weights for every prompt.
        self._last = torch.tensor([-1], device=model.device)
        longest = max(map(len, self._prompts)) + max(len(c) for candidates in self._candidates for c in candidates)
        self._shares = _shares_caches(model, longest)
        # What all prompts begin with, such as a system prompt, is read once an adapter. The last token stays with its
        # prompt, so that no prompt is empty.
        self._shared = common_prefix([p[:-1] for p in self._prompts]) if self._shares else []

    def evaluate(self, adapters: Sequence[Path | None]) -> np.ndarray:
        """Scores of each adapter (`None` is the base model): (len(adapters), n_proxy), each in [0, 1]."""
        return np.stack([self._evaluate(adapter) for adapter in adapters])

    def _evaluate(self, adapter: Path | None) -> np.ndarray:
        scores = np.zeros(len(self._prompts))
        generating = self._rows.generating
        texts: dict[int, str] = {}
        bar = tqdm(total=len(scores), desc=self.bar, unit="row", leave=False, disable=self.bar is None)
        with quiet(), bar, _adapted(self.model, adapter) as model, torch.inference_mode():
            shared = None if generating.all() else self._read_shared(model)
            for rows in self._batches(np.flatnonzero(~generating)):
                if self._shares:
                    scores[rows] = self._score(model, rows, copy.deepcopy(shared))
                else:
                    scores[rows] = self._score_whole(model, rows)
                bar.update(len(rows))
            for rows in self._batches(np.flatnonzero(generating)):
                texts.update(zip(rows, self._generate(model, rows), strict=True))
                bar.update(len(rows))
        for row, score in self._rows.score_texts(texts).items():
            scores[row] = score
        return scores

    def _batches(self, rows: np.ndarray) -> Iterator[list[int]]:
        ordered = sorted(rows.tolist(), key=lambda i: (-len(self._prompts[i]), i))
        for start in range(0, len(ordered), self.batch_size):
            yield ordered[start : start + self.batch_size]

    def _read_shared(self, model: PreTrainedModel) -> Cache | None:
        """The cache of what all prompts begin with."""
        if not self._shared:
            return None
        self.tokens += len(self._shared)
        ids = torch.tensor([self._shared], device=self.model.device)
        return model(ids, use_cache=True, logits_to_keep=self._last).past_key_values

    def _score(self, model: PreTrainedModel, rows: list[int], shared: Cache | None) -> list[float]:
        """One pass over the prompts, whose cache then serves all their candidate answers in a second pass."""
        ids, own = self._pad_left([self._prompts[i][len(self._shared) :] for i in rows])
        mask = torch.cat([own.new_ones(len(rows), len(self._shared)), own], 1)
        if shared is not None:
            shared.batch_repeat_interleave(len(rows))
        first = model(
            ids,
            attention_mask=mask,
            position_ids=_positions(mask)[:, len(self._shared) :],
            past_key_values=shared,
            use_cache=True,
            logits_to_keep=self._last,
        )
        owner = torch.tensor([k for k, i in enumerate(rows) for _ in self._candidates[i]], device=ids.device)
        flat = [candidate for i in rows for candidate in self._candidates[i]]
        targets = torch.nn.utils.rnn.pad_sequence(
            [torch.tensor(c) for c in flat], batch_first=True, padding_value=self._pad
        ).to(ids.device)
        lengths = torch.tensor([len(c) for c in flat], device=ids.device)
        logits = first.logits[owner, -1:].float()
        if targets.shape[1] > 1:
            cache = first.past_key_values
            cache.batch_select_indices(owner)
            steps = torch.arange(targets.shape[1] - 1, device=ids.device)
            valid = (steps[None] < lengths[:, None] - 1).long()
            rest = model(
                targets[:, :-1],
                attention_mask=torch.cat([mask[owner], valid], 1),
                position_ids=mask.sum(1)[owner][:, None] + steps[None],
                past_key_values=cache,
                use_cache=True,
            )
            logits = torch.cat([logits, rest.logits.float()], 1)
            self.tokens += int(valid.sum())
        self.tokens += int(own.sum())
        inside = torch.arange(targets.shape[1], device=ids.device)[None] < lengths[:, None]
        picked = logits.gather(2, targets[..., None])[..., 0] - logits.logsumexp(2)
        mean = (picked * inside).sum(1) / lengths
        greedy = ((logits.argmax(2) == targets) | ~inside).all(1)
        return self._judge(rows, mean.cpu().numpy(), greedy.cpu().numpy())

    def _score_whole(self, model: PreTrainedModel, rows: list[int]) -> list[float]:
        """One pass over each prompt with each of its answers, padded at the end, which no causal layer sees."""
        flat = [(self._prompts[i], candidate) for i in rows for candidate in self._candidates[i]]
        mean, greedy = [], []
        for start in range(0, len(flat), self.batch_size):
            some = flat[start : start + self.batch_size]
            texts = [torch.tensor(prompt + candidate) for prompt, candidate in some]
            ids = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True, padding_value=self._pad)
            lengths = torch.tensor([len(text) for text in texts])
            first = min(len(prompt) for prompt, _ in some) - 1
            logits = model(
                ids.to(self.model.device),
                attention_mask=(torch.arange(ids.shape[1]) < lengths[:, None]).long().to(self.model.device),
                use_cache=False,
                logits_to_keep=torch.arange(first, ids.shape[1] - 1, device=self.model.device),
            ).logits.float()
            for (prompt, candidate), found in zip(some, logits, strict=True):
                own = found[len(prompt) - 1 - first :][: len(candidate)]
                target = torch.tensor(candidate, device=own.device)
                mean.append(float((own.gather(1, target[:, None])[:, 0] - own.logsumexp(1)).mean()))
                greedy.append(bool((own.argmax(1) == target).all()))
            self.tokens += int(lengths.sum()) - len(some)
        return self._judge(rows, np.array(mean), np.array(greedy))

    def _judge(self, rows: list[int], mean: np.ndarray, greedy: np.ndarray) -> list[float]:
        scores, start = [], 0
        for i in rows:
            here = slice(start, start + len(self._candidates[i]))
            start = here.stop
            scores.append(self._rows.judge(i, mean[here], bool(greedy[here].any())))
        return scores

    def _generate(self, model: PreTrainedModel, rows: list[int]) -> list[str]:
        ids, mask = self._pad_left([self._prompts[i] for i in rows])
        out = model.generate(
            input_ids=ids,
            attention_mask=mask,
            do_sample=False,
            num_beams=1,
            repetition_penalty=1.0,
            max_new_tokens=self.max_new_tokens,
            pad_token_id=self._pad,
            eos_token_id=self._rows.ends or None,
        )[:, ids.shape[1] :]
        self.tokens += int(mask.sum()) + int((out != self._pad).sum())
        return [self._rows.decode(tokens) for tokens in out.tolist()]

    def _pad_left(self, prompts: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        width = max(map(len, prompts))
        ids = torch.tensor([[self._pad] * (width - len(p)) + p for p in prompts])
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
        return ids.to(self.model.device), mask.to(self.model.device)


def common_prefix(sequences: Sequence[list[int]]) -> list[int]:
    """What all sequences begin with."""
    first, last = min(sequences), max(sequences)
    length = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))
    return first[:length]


def _shares_caches(model: PreTrainedModel, longest: int) -> bool:
    """Whether the cache of a prompt, wherever it lies in a padded batch, serves all its answers.

    So it does where all layers attend to all of at most `longest` tokens and take their positions as told: not with
    recurrent layers or convolutions, and not with a window shorter than the texts.
    """
    if "position_ids" not in inspect.signature(model.forward).parameters:
        return False
    with quiet(), torch.inference_mode():
        cache = model(torch.zeros((1, 1), dtype=torch.long, device=model.device), use_cache=True).past_key_values
    layers = getattr(cache, "layers", [])
    return bool(layers) and all(
        type(layer) is DynamicLayer or (type(layer) is DynamicSlidingWindowLayer and layer.sliding_window >= longest)
        for layer in layers
    )


def _positions(mask: torch.Tensor) -> torch.Tensor:
    return (mask.cumsum(1) - 1).clamp(min=0)


@contextmanager
def _adapted(model: PreTrainedModel, adapter: Path | None) -> Iterator[PreTrainedModel]:
    """The base model, or the base model with an adapter that is taken off again."""
    model.eval()
    if adapter is None:
        yield model
        return
    try:
        with unchanged(model):
            adapted = PeftModel.from_pretrained(model, str(adapter))
            try:
                yield adapted.eval()
            finally:
                adapted.unload()
    finally:
        for mark in ("peft_config", "_hf_peft_config_loaded"):
            model.__dict__.pop(mark, None)
