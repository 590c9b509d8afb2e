"""The pool: every format and every place it may come from, what identifies it, and what leaks into it."""

import json
import logging
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset, DatasetDict
from transformers import AutoTokenizer

import harp_hf
from harp_hf.errors import DataError
from harp_hf.finetune import LeafFinetuner
from harp_hf.models import default_peft_config, load_model
from harp_hf.pool import check_pool, content_digest, load_rows, read_contents, row_key, row_parts

PAIRS = [
    ("say the red of w1 :", "crimson"),
    ("say the green of w2 w3 :", "emerald"),
    ("say the blue of w4 :", "azure"),
]


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def decode(ids):
    return " ".join(f"w{i}" for i in ids)


FORMATS = {
    "prompt and completion": [{"prompt": p, "completion": f" {c}"} for p, c in PAIRS],
    "prompt and completion in messages": [{"prompt": [user(p)], "completion": [assistant(c)]} for p, c in PAIRS],
    "messages": [{"messages": [user(p), assistant(c)]} for p, c in PAIRS],
    "conversations": [
        {"conversations": [{"from": "human", "value": p}, {"from": "gpt", "value": c}]} for p, c in PAIRS
    ],
    "text": [{"text": f"{p} {c}"} for p, c in PAIRS],
}
TOOLS = [
    {
        "messages": [
            user(p),
            assistant(c) | ({"tool_calls": [{"function": {"name": c, "arguments": {c: i}}}]} if i else {}),
        ]
    }
    for i, (p, c) in enumerate(PAIRS)
]


@pytest.mark.parametrize("form", FORMATS)
def test_every_format_is_read_as_what_is_asked_and_what_is_answered(form):
    pool = Dataset.from_list(FORMATS[form])
    check_pool(pool)
    parts = [row_parts(row, "text", decode) for row in pool]
    if form == "text":
        assert parts == [("", f"{p} {c}") for p, c in PAIRS]
    else:
        assert [(p, c.strip()) for p, c in parts] == PAIRS
    assert read_contents(pool, "text", decode, frozenset()).digest == content_digest(pool)


def test_a_pool_that_comes_tokenised_is_read_by_its_tokenizer():
    pool = Dataset.from_dict({"input_ids": [[1, 2], [3]]})
    check_pool(pool)
    assert [row_parts(row, "text", decode) for row in pool] == [("", "w1 w2"), ("", "w3")]


def test_plain_text_may_stand_in_a_column_of_another_name():
    pool = Dataset.from_dict({"story": ["once", "twice"]})
    check_pool(pool, "story")
    assert row_parts(pool[1], "story", decode) == ("", "twice")
    with pytest.raises(DataError, match="`text` or `input_ids`"):
        check_pool(pool)


def test_a_long_conversation_is_answered_by_its_last_message():
    turns = [{"role": "system", "content": "be kind"}, user("hi"), assistant("hello"), user("bye"), assistant("ciao")]
    assert row_parts({"messages": turns}, "text", decode) == ("be kind\nhi\nhello\nbye", "ciao")


def test_blocks_and_tool_calls_are_text_too():
    blocks = [{"role": "user", "content": [{"type": "text", "text": "what"}, {"type": "image"}, {"text": "now"}]}]
    calls = [{"function": {"name": "add", "arguments": "{}"}}]
    prompt, answer = row_parts({"messages": [*blocks, {"role": "assistant", "tool_calls": calls}]}, "text", decode)
    assert prompt == "what  now"
    assert json.loads(answer) == calls


@pytest.mark.parametrize("form", [*FORMATS, "input_ids"])
def test_every_format_is_tokenised_once_with_its_rows_in_order(form, tiny_model, config):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    rows = FORMATS.get(form) or [{"input_ids": tokenizer(f"{p} {c}")["input_ids"]} for p, c in PAIRS]
    args = config()
    finetuner = LeafFinetuner(
        load_model(tiny_model, args), Dataset.from_list(rows), args, default_peft_config(), tokenizer
    )
    assert finetuner.tokenised["harp_row"][:] == [0, 1, 2]
    for row, (prompt, completion) in zip(finetuner.tokenised, PAIRS, strict=True):
        words = tokenizer.decode(row["input_ids"], skip_special_tokens=True).split()
        assert words == [*prompt.split(), completion]
        learned = [i for i in row["labels"] if i != -100]
        assert tokenizer.decode(learned, skip_special_tokens=True).split()[-1] == completion
        if form.startswith("prompt"):
            assert tokenizer.decode(learned, skip_special_tokens=True).split() == [completion], "prompts are no target"


# Where the pool comes from


@pytest.fixture(params=[*FORMATS, "tools"])
def rows(request):
    return Dataset.from_list(FORMATS.get(request.param, TOOLS))


def stored(rows: Dataset, folder: Path) -> dict:
    """The same rows in every place the pool may come from."""
    rows.to_parquet(folder / "a.parquet")
    rows.to_json(folder / "a.jsonl")
    rows.to_json(folder / "a.json", lines=False)
    (folder / "parts").mkdir()
    rows.select([0]).to_parquet(folder / "parts" / "train-0.parquet")
    rows.select([1, 2]).to_parquet(folder / "parts" / "train-1.parquet")
    rows.save_to_disk(folder / "disk")
    DatasetDict(train=rows, test=rows.select([0])).save_to_disk(folder / "splits")
    return {
        "Dataset": rows,
        "DatasetDict": DatasetDict(train=rows, test=rows.select([0])),
        "DatasetDict with one split": DatasetDict(whatever=rows),
        "parquet": str(folder / "a.parquet"),
        "Path": folder / "a.parquet",
        "jsonl": str(folder / "a.jsonl"),
        "json": str(folder / "a.json"),
        "folder of parquet files": str(folder / "parts"),
        "save_to_disk": str(folder / "disk"),
        "save_to_disk of a DatasetDict": str(folder / "splits"),
    }


def test_the_same_rows_come_from_everywhere_and_are_the_same_pool(rows, tmp_path):
    digest = content_digest(rows)
    for place, source in stored(rows, tmp_path).items():
        read = load_rows(source)
        assert read.to_list() == rows.to_list(), place
        assert content_digest(read) == digest, place


def test_a_csv_file(tmp_path):
    rows = Dataset.from_list(FORMATS["text"])
    rows.to_csv(tmp_path / "a.csv")
    assert load_rows(str(tmp_path / "a.csv")).to_list() == rows.to_list()
    assert content_digest(load_rows(str(tmp_path / "a.csv"))) == content_digest(rows)


def test_a_split_by_name(tmp_path):
    rows = Dataset.from_list(FORMATS["text"])
    source = DatasetDict(train=rows, test=rows.select([2]))
    assert load_rows(source, split="test").to_list() == [FORMATS["text"][2]]
    with pytest.raises(DataError, match="no split 'dev'; its splits are 'train', 'test'"):
        load_rows(source, split="dev")


# What identifies a pool


def test_the_digest_does_not_depend_on_how_rows_lie_in_memory(rows):
    digest = content_digest(rows)
    assert content_digest(rows.select([2, 1, 0]).select([2, 1, 0])) == digest
    assert content_digest(rows.select([2, 1, 0]).flatten_indices().select([2, 1, 0])) == digest
    assert content_digest(rows.with_format("numpy")) == digest
    assert content_digest(Dataset.from_generator(lambda: iter(rows.to_list()))) == digest


def test_the_digest_changes_with_every_content_and_order(rows):
    column = rows.column_names[-1]
    changed = rows.to_list()
    changed[1] = json.loads(json.dumps(changed[1]).replace("emerald", "Emerald"))
    others = [
        Dataset.from_list(changed),
        rows.select([1, 0, 2]),
        rows.select([0, 1]),
        rows.select([0, 1, 2, 2]),
        rows.rename_column(column, f"{column}_"),
        rows.add_column("id", [0, 1, 2]),
        rows.add_column("id", [0, 1, 3]),
    ]
    digests = {content_digest(other) for other in [rows, *others]}
    assert len(digests) == len(others) + 1


def test_the_digest_reaches_the_last_row_of_a_pool_of_several_batches():
    rows = [{"text": f"row {i}"} for i in range(2500)]
    digest = content_digest(Dataset.from_list(rows))
    assert content_digest(Dataset.from_list([*rows[:-1], {"text": "row"}])) != digest
    assert content_digest(Dataset.from_list([*rows[:1000], rows[1001], rows[1000], *rows[1002:]])) != digest
    with pytest.raises(DataError, match="Row 2499 of the pool has no text"):
        read_contents(Dataset.from_list([*rows[:-1], {"text": ""}]), "text", decode, frozenset())


# Leaks


def test_a_row_goes_by_its_words_whatever_the_space_between_them():
    assert row_key("say a :", " b") == row_key("say  a\n:", "b") == row_key("", "say a : b")
    assert row_key("say a :", "b") != row_key("say a :", "B")


PROXIES = {
    "strings": [{"prompt": PAIRS[1][0], "answer": "emerald"}],
    "messages": [{"prompt": [user(PAIRS[1][0])], "answer": "emerald"}],
    "several answers": [{"prompt": PAIRS[1][0], "answer": ["jade", "emerald"]}],
    "completion": [{"prompt": PAIRS[1][0], "completion": " emerald"}],
}


@pytest.fixture
def warnings_of(tiny_model, config, caplog):
    """Warnings of leaks of a call that is refused right after the pool has been read."""

    def call(pool, proxy):
        with caplog.at_level(logging.WARNING, "harp_hf"), pytest.raises(DataError, match="The features have shape"):
            harp_hf.measure(pool, proxy, tiny_model, config(), features=np.zeros(1))
        return [r.getMessage() for r in caplog.records if "word for word" in r.getMessage()]

    return call


@pytest.mark.parametrize("asked", PROXIES)
@pytest.mark.parametrize("form", [*FORMATS, "input_ids"])
def test_proxy_rows_that_stand_in_the_pool_are_told_once(form, asked, warnings_of, tiny_model):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    rows = FORMATS.get(form) or [{"input_ids": tokenizer(f"{p} {c} <eos>")["input_ids"]} for p, c in PAIRS]
    clean = {"prompt": PAIRS[0][0], "answer": "azure"}
    proxy = PROXIES[asked]
    if asked == "strings":
        proxy = [clean, *proxy, *proxy]
    (warning,) = warnings_of(Dataset.from_list(rows + rows), Dataset.from_list(proxy))
    count, first = ("2 of 3", 1) if asked == "strings" else ("1 of 1", 0)
    assert warning.startswith(
        f"{count} rows of the proxy set stand word for word in the pool (the first is row {first})"
    )


@pytest.mark.parametrize("form", FORMATS)
def test_a_prompt_alone_is_no_leak(form, warnings_of):
    proxy = Dataset.from_list([{"prompt": PAIRS[1][0], "answer": "azure"}, {"prompt": "another", "answer": "emerald"}])
    assert warnings_of(Dataset.from_list(FORMATS[form]), proxy) == []
