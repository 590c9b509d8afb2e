"""A tiny model, made here and really trained, with a pool and a proxy set that it can learn from in seconds."""

from __future__ import annotations

import gc
import multiprocessing
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np
import pytest
import torch
from datasets import Dataset
from hypothesis import settings

torch.set_num_threads(1)
settings.register_profile("seeded", derandomize=True, deadline=None)
settings.load_profile("seeded")


def pytest_collection_finish():
    """Spare the garbage collector, which every finetune calls, all that the libraries have loaded."""
    gc.freeze()


WORDS = [f"w{i}" for i in range(40)]
ANSWERS = {"red": "crimson", "green": "emerald", "blue": "azure"}
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|> {{ message['content'] }} "
    "{% if message['role'] == 'assistant' %}<eos>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|> {% endif %}"
)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """Folder of a two-layer Llama with random weights and a word-level tokenizer with a chat template."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    vocabulary = ["<pad>", "<eos>", "<unk>", "<|user|>", "<|assistant|>", "<|system|>", "say", "the", "of", "?", ":"]
    vocabulary += [*ANSWERS, *ANSWERS.values(), "wrong", *WORDS, *map(str, range(20))]
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>",
        additional_special_tokens=["<|user|>", "<|assistant|>", "<|system|>"],
    )  # fmt: skip
    tokenizer.chat_template = CHAT_TEMPLATE
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(vocabulary), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128, tie_word_embeddings=False,
            pad_token_id=0, eos_token_id=1, bos_token_id=1, initializer_range=0.3,
        )
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("models") / "tiny"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def make_rows(colour: str, count: int, seed: int, wrong: bool = False) -> list[dict[str, str]]:
    """Rows that ask for the name of a colour among random words; `wrong` ones answer with another word."""
    random = np.random.default_rng(seed)
    answer = " wrong" if wrong else f" {ANSWERS[colour]}"
    return [
        {"prompt": f"say the {colour} of " + " ".join(random.choice(WORDS, 3)) + " :", "completion": answer}
        for _ in range(count)
    ]


@pytest.fixture(scope="session")
def pool() -> Dataset:
    """96 rows: red, green, wrong red and wrong green ones, 24 of each."""
    rows = make_rows("red", 24, 1) + make_rows("green", 24, 2)
    return Dataset.from_list(rows + make_rows("red", 24, 3, wrong=True) + make_rows("green", 24, 4, wrong=True))


@pytest.fixture(scope="session")
def features() -> np.ndarray:
    """One direction for each quarter of the pool, with a little noise."""
    random = np.random.default_rng(0)
    return np.repeat(np.eye(4, 6), 24, axis=0) + 0.05 * random.standard_normal((96, 6))


@pytest.fixture(scope="session")
def proxy() -> Dataset:
    """8 held-out rows of each of two tasks."""
    rows = [
        {"prompt": row["prompt"], "answer": row["completion"].strip(), "task": colour}
        for colour, seed in (("red", 11), ("green", 12))
        for row in make_rows(colour, 8, seed)
    ]
    return Dataset.from_list(rows)


@pytest.fixture
def config(tmp_path):
    """Settings under which the tiny model learns a colour from one leaf."""
    from harp_hf import HarpConfig

    def make(**changes):
        settings = {"output_dir": str(tmp_path / "run"), "leaf_size": 12, "branching": 2, "max_measurements": 4,
                    "control": False, "max_steps": 12, "learning_rate": 3e-2, "use_cpu": True,
                    "bf16": False}  # fmt: skip
        return HarpConfig(**(settings | changes))

    return make


@pytest.fixture(scope="session")
def processes():
    """Real processes that come with everything imported."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["harp_hf.selection", "faiss"])
    return context
