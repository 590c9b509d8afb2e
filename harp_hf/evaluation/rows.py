"""The proxy set as a model sees it, and what its answers score: the same for every backend."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy.special import softmax
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedTokenizerBase

from ..errors import DataError, reason
from ..proxy import ProxySet
from .scoring import CHOICE, GENERATED, Metric, score_text, score_with


class ProxyRows:
    """Token ids of a proxy set.

    Args:
        proxy: The rows to score.
        metrics: Metric of each task, from [`resolve_metrics`].
        tokenizer: The model's tokenizer.
        generation_config: The model's; its end tokens end an answer as the tokenizer's does.

    Attributes:
        proxy (`ProxySet`): The rows.
        metrics (`list`): Metric of each row.
        generating (`np.ndarray`): (n_proxy,) bool, whether a row is scored by the text that the model generates.
        ends (`list[int]`): Tokens that end an answer.
        prompts (`list[list[int]]`): Prompt of each row.
        candidates (`list[list[list[int]]]`): Answers of each row, or its choices where they are compared; answers have
            the end of the turn with them, choices have not.

    Raises:
        DataError: The proxy set has messages but the tokenizer no chat template, or one that a row does not fit; or
            the tokenizer makes no tokens of a prompt or an answer.
    """

    def __init__(
        self,
        proxy: ProxySet,
        metrics: Sequence[Metric],
        tokenizer: PreTrainedTokenizerBase,
        generation_config: GenerationConfig | None,
    ) -> None:
        self.proxy, self._tokenizer = proxy, tokenizer
        self.metrics: list[Metric] = [metrics[d] for d in proxy.task]
        self.generating = np.array([callable(m) or m in GENERATED for m in self.metrics], bool)
        ends = generation_config.eos_token_id if generation_config else None
        ends = [tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])]
        self.ends: list[int] = list(dict.fromkeys(token for token in ends if token is not None))
        added = tokenizer.added_tokens_decoder.items()
        self._special = {*tokenizer.all_special_ids, *(token for token, of in added if of.special)}
        self.prompts: list[list[int]] = []
        self.candidates: list[list[list[int]]] = []
        for row, metric in enumerate(self.metrics):
            prompt, candidates = self._encode(row, metric)
            judged = [] if self.generating[row] else candidates
            if not prompt or any(set(candidate) <= set(self.ends) for candidate in judged):
                raise DataError(
                    f"{self._where(row)} has a prompt, an answer or a choice of which the tokenizer makes no tokens."
                )
            self.prompts.append(prompt)
            self.candidates.append(candidates)

    def check_lengths(self, config: PreTrainedConfig, max_new_tokens: int) -> None:
        """Raise [`DataError`] where a row has more tokens than a model of this configuration has positions for.

        Args:
            config: The model's configuration.
            max_new_tokens: Longest answer generated.
        """
        longest = getattr(config.get_text_config(), "max_position_embeddings", None)
        for row, prompt in enumerate(self.prompts):
            length = len(prompt) + (max_new_tokens if self.generating[row] else max(map(len, self.candidates[row])))
            if longest is not None and length > longest:
                raise DataError(
                    f"{self._where(row)} has {length:,} tokens with its answer, but the model takes {longest:,}: "
                    "shorten it, or leave it out."
                )

    def judge(self, row: int, means: Sequence[float] | np.ndarray, greedy: bool) -> float:
        """Score of a row that is scored by its candidates.

        Args:
            row: The row.
            means: Mean log-probability a token of each candidate.
            greedy: Whether greedy decoding gives just one of them.

        Returns:
            `float`: In [0, 1]; NaN where a mean is.
        """
        if np.isnan(means).any():
            return float("nan")
        if self.metrics[row] == "exact_match":
            return float(greedy)
        if self.metrics[row] == "likelihood":
            return float(np.exp(np.max(means)))
        right = np.array([choice in self.proxy.answers[row] for choice in self.proxy.choices[row]])
        if self.metrics[row] == "choice_likelihood":
            return float(softmax(means)[right].sum())
        return float(right[int(np.argmax(means))])

    def score_texts(self, texts: Mapping[int, str]) -> dict[int, float]:
        """Scores of rows by the texts that were generated for them."""
        scores: dict[int, float] = {}
        for metric in dict.fromkeys(self.metrics[i] for i in texts):
            rows = sorted(i for i in texts if self.metrics[i] == metric)
            if callable(metric):
                found = score_with(metric, [texts[i] for i in rows], rows, self.proxy)
            else:
                found = [score_text(metric, texts[i], self.proxy.answers[i]) for i in rows]
            scores.update(zip(rows, found, strict=True))
        return scores

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of generated tokens."""
        return self._tokenizer.decode(tokens, skip_special_tokens=True)

    def _encode(self, row: int, metric: Metric) -> tuple[list[int], list[list[int]]]:
        """Token ids of the prompt and of each candidate answer, the latter with the end of the turn unless choices."""
        prompt = self.proxy.prompts[row]
        texts = self.proxy.choices[row] if metric in CHOICE else self.proxy.answers[row]
        ends = metric not in CHOICE
        if isinstance(prompt, str):
            ids = self._open(prompt)
            return ids, [self._continue(prompt, ids, text, ends) for text in texts]
        if not self._tokenizer.chat_template:
            raise DataError(
                "The proxy set has messages, but the tokenizer has no chat template: pass a `processing_class` that "
                "has one."
            )
        rendered = self._render(row, prompt, add_generation_prompt=True)
        turns = [self._render(row, [*prompt, {"role": "assistant", "content": text}]) for text in texts]
        opening = "" if ends else self._opening(rendered, turns, texts)
        # Together with their prompt, as they are trained on: alone, many a tokenizer puts a space before a text.
        whole = [self._plain(turn) for turn in turns]
        for begun in (rendered + opening, rendered + opening.rstrip(), rendered):
            ids = self._plain(begun)
            if all(turn.startswith(begun) and tokens[: len(ids)] == ids
                   for turn, tokens in zip(turns, whole, strict=True)):  # fmt: skip
                return ids, [
                    self._answer(turn[len(begun) :], tokens[len(ids) :], text, ends)
                    for turn, tokens, text in zip(turns, whole, texts, strict=True)
                ]
        return ids, [self._apart(rendered, turn, text, ends) for turn, text in zip(turns, texts, strict=True)]

    def _opening(self, rendered: str, turns: Sequence[str], texts: Sequence[str]) -> str:
        """What the chat template writes before every choice, such as empty thoughts: nothing to compare them by."""
        written = [turn.removeprefix(rendered) for turn in turns]
        openings = {one.partition(text.strip())[0] for one, text in zip(written, texts, strict=True)}
        fits = [
            opening for opening in openings
            if all(one.startswith(opening + text.strip()) for one, text in zip(written, texts, strict=True))
        ]  # fmt: skip
        return max(fits, key=len, default="")

    def _continue(self, prompt: str, ids: list[int], text: str, ends: bool) -> list[int]:
        whole = self._open(prompt + text)
        tokens = whole[len(ids) :] if whole[: len(ids)] == ids else []
        tokens = tokens or self._plain(text)
        return tokens + self._end(ends)

    def _open(self, text: str) -> list[int]:
        """Tokens of a text that goes on: without the end that some tokenizers give every text."""
        ids, eos = self._tokenizer(text)["input_ids"], self._tokenizer.eos_token
        return ids[:-1] if ids[-1:] == [self._tokenizer.eos_token_id] and not text.endswith(eos) else ids

    def _render(self, row: int, messages: list[dict[str, Any]], **settings: Any) -> str:
        columns = self.proxy.columns
        tools, given = (columns[name][row] if name in columns else None for name in ("tools", "chat_template_kwargs"))
        try:
            settings |= {name: value for name, value in (given or {}).items() if value is not None}
            tools = json.loads(tools) if isinstance(tools, str) else tools
            return self._tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, **settings)
        except Exception as error:  # a template may refuse a row in words of its own, or fail in any way
            raise DataError(f"{self._where(row)} does not fit the chat template: {reason(error)}.") from error

    def _where(self, row: int) -> str:
        return f"Row {row} of the proxy set (task {self.proxy.tasks[self.proxy.task[row]]!r})"

    def _answer(self, written: str, turn: list[int], text: str, ends: bool) -> list[int]:
        """The assistant's turn as the chat template writes it, up to and with the token that ends it."""
        end = next((place for place, token in enumerate(turn) if token in self.ends), None)
        if end is None:
            end = self._end_of_turn(written, turn, text)
        return turn[: end + 1 if ends else end] if end else self._plain(text) + self._end(ends)

    def _apart(self, rendered: str, turn: str, text: str, ends: bool) -> list[int]:
        """An answer whose tokens do not go on from those of the prompt."""
        if not turn.startswith(rendered):
            return self._plain(text) + self._end(ends)
        written = turn.removeprefix(rendered)
        return self._answer(written, self._plain(written), text, ends)

    def _end_of_turn(self, written: str, turn: list[int], text: str) -> int | None:
        """Place of the special token that a chat template writes after the answer, where no end is known of.

        Base models have templates whose turns end with another token than their texts. It ends answers from then on.
        """
        answered, text, _ = written.partition(text.strip())
        before = sum(token in self._special for token in self._plain(answered + text))
        after = [place for place, token in enumerate(turn) if token in self._special][before:]
        if not text or not after:
            return None
        self.ends.append(turn[after[0]])
        return after[0]

    def _plain(self, text: str) -> list[int]:
        return self._tokenizer(text, add_special_tokens=False)["input_ids"]

    def _end(self, ends: bool) -> list[int]:
        return [self._tokenizer.eos_token_id] if ends and self._tokenizer.eos_token_id is not None else []
