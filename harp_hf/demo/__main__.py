"""`python -m harp_hf.demo`: a whole selection with a real model, and a check of it, without a network."""

from __future__ import annotations

import argparse
import logging
from collections import Counter
from copy import copy

import numpy as np
from peft import LoraConfig
from rich.console import Console
from rich.table import Table

from harp_hf import HarpConfig, measure
from harp_hf.demo import demo_data, demo_embedder, demo_model
from harp_hf.proxy import load_proxy
from harp_hf.quiet import quiet
from harp_hf.verify import verify

ROWS = 240


def main() -> None:
    """Measure the demo's pool, print the table, save the selection and finetune on it."""
    parser = argparse.ArgumentParser(prog="python -m harp_hf.demo", description=main.__doc__)
    parser.add_argument("--output_dir", default="runs/demo", help="the run directory")
    asked = parser.parse_args()
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("harp_hf").setLevel(logging.INFO)

    data = demo_data()
    model = str(demo_model())
    args = HarpConfig(
        output_dir=asked.output_dir,
        features=str(demo_embedder()),
        metric="likelihood",
        leaf_size=80,
        max_measurements=20,
        max_steps=10,
        per_device_train_batch_size=16,
        per_device_eval_batch_size=48,
        learning_rate=1e-3,
        budget=ROWS,
    )
    peft_config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    result = measure(data.pool, data.proxy, model, args, peft_config)
    print(result.summary())

    selected = result.select()
    with quiet():
        selected.to_parquet(f"{asked.output_dir}/result/{args.variant}/train.parquet")
    skills = Counter(selected["skill"])
    print("HARP chose", ", ".join(f"{count} {skill}" for skill, count in skills.most_common()))
    selections = {
        "base model": np.array([], np.int64),
        "HARP": np.array(selected["harp_row"]),
        "random": np.random.default_rng(args.seed).choice(len(data.pool), len(selected), replace=False),
    }

    test = load_proxy(data.test)
    final = copy(args)
    final.per_device_train_batch_size = 8
    scores = verify(data.pool, selections, test, model, final, peft_config, metric="auto")
    table = Table(title="Test scores after finetuning")
    for column in ("finetuned on", "rows", *test.tasks, "mean"):
        table.add_column(column, justify="left" if column == "finetuned on" else "right")
    means = {}
    for name, values in scores.items():
        by_task = [values[test.task == d].mean() for d in range(len(test.tasks))]
        means[name] = np.mean(by_task)
        table.add_row(name, str(len(selections[name])), *(f"{v:.2f}" for v in [*by_task, means[name]]))
    Console(width=120).print(table)
    print(f"Selection saved in {asked.output_dir}/result/{args.variant}.")
    print(f"HARP against random rows: {100 * (means['HARP'] - means['random']):+.1f} points.")


if __name__ == "__main__":
    main()
