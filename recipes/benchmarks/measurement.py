"""The cost of one measurement: the plain way, this library and a bare PyTorch loop, side by side.

    python recipes/benchmarks/measurement.py --pool pool.parquet --proxy proxy.parquet \\
        --model HuggingFaceTB/SmolLM2-135M-Instruct --config recipes/benchmarks/smollm2.yaml --results measurement.json

A measurement finetunes an adapter on the same pool rows, for the same steps with the same batch size, and scores the
whole proxy set by exact match. The ways take turns:

- `plain` loads the model, finetunes it by `SFTTrainer` with TRL's defaults, tokenising included, and generates;
- `harp_hf` has loaded the model and tokenised the pool once, which is reported apart;
- `bare` is a loop over the batches of `harp_hf` with nothing around it, and one pass over prompts with their answers.

All compute in the same precision, that of `harp_hf`: TRL's default is bfloat16 also where the hardware has none. Every
finished measurement is at once in the results file: stop it whenever you like and call it again.
"""

from __future__ import annotations

import argparse
import copy
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from datasets import Dataset
from measurement_table import PHASES, WAYS, markdown
from peft import PeftConfig, PeftModel, get_peft_model
from results_file import read_results
from transformers import PreTrainedTokenizerBase, PrinterCallback
from trl import SFTConfig, SFTTrainer

from harp_hf import HarpConfig
from harp_hf.errors import ConfigError, DataError, HarpError
from harp_hf.evaluation.rows import ProxyRows
from harp_hf.evaluation.scoring import resolve_metrics
from harp_hf.evaluation.transformers import TransformersEvaluator
from harp_hf.faults import free_memory
from harp_hf.finetune import LeafFinetuner, LeafTrainer
from harp_hf.models import describe_model, describe_peft, load_model, load_tokenizer, prepare_tokenizer
from harp_hf.pool import content_digest, load_rows, training_columns
from harp_hf.proxy import ProxySet, load_proxy
from harp_hf.quiet import quiet
from harp_hf.rundir import RunDir
from harp_hf.settings import changed_settings, load_settings


def main(argv: list[str] | None = None) -> None:
    """Make the measurements that are missing and print the table."""
    asked = _parse(argv)
    args, adapter = load_settings(asked.config)
    if args.gradient_accumulation_steps > 1:
        raise ConfigError("The bare loop takes one batch a step: set `gradient_accumulation_steps` to 1.")
    pool, proxy = load_rows(asked.pool), load_proxy(asked.proxy)
    if asked.rows > len(pool):
        raise DataError(f"The pool has {len(pool):,} rows, fewer than --rows {asked.rows}.")
    model = describe_model(asked.model).rsplit(" ", 1)[1] if Path(asked.model).is_dir() else asked.model
    settings = {
        "pool": content_digest(pool), "proxy": proxy.digest, "model": model, "adapter": describe_peft(adapter),
        "settings": changed_settings(args), "rows": asked.rows, "threads": torch.get_num_threads(),
        "device": args.device.type,
    }  # fmt: skip
    known = {"once": {}, "measurements": []} | read_results(asked.results, settings)
    turns = [(repeat, way) for repeat in range(asked.repeats) for way in WAYS]
    done = {(one["repeat"], one["way"]) for one in known["measurements"]}
    if set(turns) - done:
        with tempfile.TemporaryDirectory() as folder:
            args.output_dir = folder
            rows = np.sort(np.random.default_rng(args.seed).choice(len(pool), asked.rows, replace=False))
            benchmark = Benchmark(asked.model, pool, rows, proxy, args, adapter)
            known["once"] = known["once"] or benchmark.once
            for repeat, way in turns:
                if (repeat, way) not in done:
                    known["measurements"].append({"repeat": repeat, "way": way} | benchmark.measure(way))
                    RunDir(asked.results.parent).write_json(asked.results.name, known)
                    print(known["measurements"][-1], flush=True)
    print(markdown(known))


@dataclass
class Clock:
    """Seconds of each phase by the clock on the wall, and by the processor in all threads."""

    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PHASES, 0.0))
    processor: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PHASES, 0.0))

    def time(self, phase: str, work: Callable[[], Any]) -> Any:
        """Do some work of a phase."""
        wall, cpu = time.perf_counter(), time.process_time()
        made = work()
        self.seconds[phase] += time.perf_counter() - wall
        self.processor[phase] += time.process_time() - cpu
        return made


@dataclass(frozen=True)
class Batch:
    """One batch as a trainer of `harp_hf` hands it to the model, and the number of its labels."""

    inputs: dict[str, Any]
    labels: int


class Benchmark:
    """All ways on the same rows.

    Args:
        model: Path or Hub id of the base model.
        pool: The pool.
        rows: Pool rows to finetune on.
        proxy: The rows to score.
        args: Settings of the finetunes.
        adapter: The adapter.

    Attributes:
        once (`dict[str, float]`): Seconds of what `harp_hf` does once, before its first measurement.
    """

    def __init__(
        self, model: str, pool: Dataset, rows: np.ndarray, proxy: ProxySet, args: HarpConfig, adapter: PeftConfig
    ) -> None:
        self.name, self.rows, self.proxy, self.args, self.adapter = model, rows, proxy, args, adapter
        self.folder = Path(str(args.output_dir))
        leaf = pool.select(rows).select_columns(training_columns(pool, args.dataset_text_field))
        # In memory: what was tokenised once is not found again on disk.
        self.leaf = Dataset.from_list(leaf.to_list(), features=leaf.features)
        started = time.perf_counter()
        self.model, tokenizer = load_model(model, args), self._tokenizer()
        loaded = time.perf_counter()
        self.finetuner = LeafFinetuner(self.model, pool, args, adapter, tokenizer)
        metrics = resolve_metrics("exact_match", proxy)
        self.evaluator = TransformersEvaluator(
            self.model, tokenizer, proxy, metrics, args.per_device_eval_batch_size, args.max_new_tokens
        )
        self.once = {"loading": loaded - started, "tokenising": time.perf_counter() - loaded}
        # What the bare loop reads. The finetune that tells the batches also warms up what the first would have to.
        self.proxy_rows = ProxyRows(proxy, metrics, tokenizer, self.model.generation_config)
        self.batches = self._batches()

    def measure(self, way: str) -> dict[str, Any]:
        """One measurement: seconds of its phases, tokens, training loss and exact match."""
        free_memory()
        clock = Clock()
        found = {"plain": self._plain, "harp_hf": self._harp, "bare": self._bare}[way](clock)
        return {"seconds": clock.seconds, "processor": clock.processor} | found

    def _tokenizer(self) -> PreTrainedTokenizerBase:
        return prepare_tokenizer(load_tokenizer(self.name, self.args), self.args)

    def _plain(self, clock: Clock) -> dict[str, Any]:
        args = self.args
        config = SFTConfig(
            output_dir=str(self.folder / "plain"), learning_rate=args.learning_rate, max_steps=args.max_steps,
            num_train_epochs=args.num_train_epochs, per_device_train_batch_size=args.per_device_train_batch_size,
            max_length=args.max_length, seed=args.seed, report_to="none", save_strategy="no", bf16=args.bf16,
            use_cpu=args.use_cpu, include_num_input_tokens_seen="non_padding", disable_tqdm=True,
        )  # fmt: skip
        with quiet():
            model, tokenizer = clock.time("preparing", lambda: (load_model(self.name, args), self._tokenizer()))
            trainer = clock.time("preparing", lambda: SFTTrainer(
                model=model, args=config, train_dataset=self.leaf, processing_class=tokenizer,
                peft_config=copy.deepcopy(self.adapter),
            ))  # fmt: skip
            trainer.remove_callback(PrinterCallback)
            loss = clock.time("finetuning", lambda: trainer.train().training_loss)
            right, tokens = clock.time("evaluating", lambda: self._generate(trainer.model, tokenizer))
        seen = int(trainer.state.num_input_tokens_seen)
        return {"tokens": {"training": seen, "evaluation": tokens}, "loss": loss, "exact_match": right}

    @torch.inference_mode()
    def _generate(self, model: PeftModel, tokenizer: PreTrainedTokenizerBase) -> tuple[float, int]:
        """Exact match of the generated texts, row after row, and the tokens read and generated."""
        model.eval()
        tokenizer.padding_side = "left"
        right, count, size = 0, 0, self.args.per_device_eval_batch_size
        for start in range(0, len(self.proxy), size):
            prompts = [
                prompt if isinstance(prompt, str)
                else tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
                for prompt in self.proxy.prompts[start : start + size]
            ]  # fmt: skip
            plain = isinstance(self.proxy.prompts[start], str)
            inputs = tokenizer(prompts, padding=True, add_special_tokens=plain, return_tensors="pt").to(model.device)
            ids, mask = inputs["input_ids"], inputs["attention_mask"]
            out = model.generate(
                input_ids=ids, attention_mask=mask, do_sample=False, max_new_tokens=self.args.max_new_tokens
            )
            answers = out[:, ids.shape[1] :]
            count += int(mask.sum()) + int((answers != tokenizer.pad_token_id).sum())
            texts = tokenizer.batch_decode(answers, skip_special_tokens=True)
            for text, accepted in zip(texts, self.proxy.answers[start : start + size], strict=True):
                right += text.strip() in {answer.strip() for answer in accepted}
        return right / len(self.proxy), count

    def _harp(self, clock: Clock) -> dict[str, Any]:
        folder, before = self.folder / "adapter", self.evaluator.tokens
        done = clock.time("finetuning", lambda: self.finetuner.finetune(self.rows, self.args.seed, folder))
        scores = clock.time("evaluating", lambda: self.evaluator.evaluate([folder])[0])
        tokens = {"training": done.tokens, "evaluation": self.evaluator.tokens - before}
        return {"tokens": tokens, "loss": done.loss, "exact_match": float(scores.mean())}

    def _batches(self) -> list[Batch]:
        batches, real = [], LeafTrainer.compute_loss

        def record(trainer: LeafTrainer, model: Any, inputs: dict[str, Any], *rest: Any, **named: Any) -> Any:
            batches.append(Batch(dict(inputs), int((inputs["labels"][:, 1:] != -100).sum())))
            return real(trainer, model, inputs, *rest, **named)

        with patch.object(LeafTrainer, "compute_loss", record):
            self._harp(Clock())
        return batches

    def _bare(self, clock: Clock) -> dict[str, Any]:
        base = copy.deepcopy(self.model)
        model, loss = clock.time("finetuning", lambda: self._train(base))
        right, tokens = clock.time("evaluating", lambda: self._read_answers(model))
        trained = [batch.inputs for batch in self.batches]
        # Batches without padding have no mask.
        seen = sum(int(inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).sum()) for inputs in trained)
        return {"tokens": {"training": seen, "evaluation": tokens}, "loss": loss, "exact_match": right}

    def _train(self, base: torch.nn.Module) -> tuple[PeftModel, float]:
        args = self.args
        torch.manual_seed(args.seed)
        model = get_peft_model(base, copy.deepcopy(self.adapter)).train()
        weights = [weight for weight in model.parameters() if weight.requires_grad]
        optimizer = torch.optim.AdamW(weights, args.learning_rate, weight_decay=args.weight_decay, fused=True)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, len(self.batches))
        losses = []
        for batch in self.batches:
            labels = batch.inputs["labels"][:, 1:]
            columns = (labels != -100).any(0).nonzero()[:, 0]
            inputs = {name: value for name, value in batch.inputs.items() if name != "labels"}
            with torch.autocast(args.device.type, torch.bfloat16, enabled=bool(args.bf16)):
                logits = model(**inputs, use_cache=False, logits_to_keep=columns).logits.float()
            targets = labels[:, columns].flatten()
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets, reduction="sum") / batch.labels
            loss.backward()
            torch.nn.utils.clip_grad_norm_(weights, args.max_grad_norm)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            losses.append(loss.detach())
        return model, float(torch.stack(losses).mean())

    @torch.inference_mode()
    def _read_answers(self, model: PeftModel) -> tuple[float, int]:
        """Share of proxy rows of which an answer is what greedy decoding gives, and the tokens read."""
        model.eval()
        rows, device = self.proxy_rows, self.args.device
        flat = [(i, rows.prompts[i], answer) for i in range(len(self.proxy)) for answer in rows.candidates[i]]
        flat.sort(key=lambda one: len(one[1]) + len(one[2]))
        right, count, size = np.zeros(len(self.proxy), bool), 0, self.args.per_device_eval_batch_size
        for start in range(0, len(flat), size):
            some = flat[start : start + size]
            width = max(len(prompt) + len(answer) for _, prompt, answer in some)
            longest = max(len(answer) for _, _, answer in some)
            padding = [width - len(prompt) - len(answer) for _, prompt, answer in some]
            ids = torch.tensor(
                [[0] * pad + p + a for pad, (_, p, a) in zip(padding, some, strict=True)], device=device
            )
            mask = torch.arange(width, device=device)[None] >= torch.tensor(padding, device=device)[:, None]
            logits = model(
                ids, attention_mask=mask.long(), position_ids=(mask.cumsum(1) - 1).clamp(min=0), use_cache=False,
                logits_to_keep=longest + 1,
            ).logits  # fmt: skip
            hit = (logits[:, :-1].argmax(2) == ids[:, -longest:]).tolist()
            for (i, _, answer), hits in zip(some, hit, strict=True):
                right[i] |= all(hits[longest - len(answer) :])
            count += int(mask.sum())
        return float(right.mean()), count


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pool", required=True, help="the rows to finetune on some of")
    parser.add_argument("--proxy", required=True, help="the rows to score")
    parser.add_argument("--model", required=True, help="path or Hub id of the base model")
    parser.add_argument("--config", help="YAML file of settings, as of `harp-hf select`")
    parser.add_argument("--rows", type=int, default=128, help="rows of the leaf")
    parser.add_argument("--repeats", type=int, default=3, help="measurements of each way")
    parser.add_argument("--results", type=Path, required=True, help="JSON file of the results")
    return parser.parse_args(argv)


if __name__ == "__main__":
    try:
        main()
    except HarpError as error:
        sys.exit(f"measurement: {error}")
