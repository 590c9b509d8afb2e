"""Hostile and odd input: what rows and names hold stays text, runs nothing, and is used or refused in a sentence."""

import io
import json
import logging
import os
import pickle
import re
import shutil
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import yaml
from conftest import make_rows
from datasets import Dataset, Image, Value, load_dataset
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from tokenizers import normalizers
from transformers import AutoConfig, AutoTokenizer
from trl import DatasetMixtureConfig

import harp_hf
from harp_hf import HarpConfig, HarpError, card
from harp_hf.cli import main
from harp_hf.errors import ConfigError, DataError, RunDirError
from harp_hf.evaluation.rows import ProxyRows
from harp_hf.evaluation.scoring import METRICS, last_number, score_text
from harp_hf.features import load_features, load_proxy_features
from harp_hf.finetune import LeafFinetuner
from harp_hf.hierarchy import build_hierarchy
from harp_hf.manifest import describe_call
from harp_hf.models import default_peft_config, load_model, load_tokenizer
from harp_hf.null_scores import read_null_scores
from harp_hf.pool import check_pool, content_digest, load_rows, read_contents, training_columns
from harp_hf.proxy import load_proxy
from harp_hf.rundir import RunDir
from harp_hf.similarity import leaf_similarity, nearest_rows
from harp_hf.texts import printable, sentence, without_tokens

TOKEN = "hf_" + "Secret" * 6
NASTY = [
    "<script>alert(1)</script>", "</td></table><h1>", "---\nlicense: mine\n---", "```\n# heading\n~~~", "| a | b |",
    "{{ 7 * 7 }} {% raw %} {# x #}", "\x1b[31mred\x1b[0m\x1b]0;title\x07", "\x9b31m", "\u202egnp.exe\u202c\u2066",
    "a/b", "../../x", "C:\\x", "~nobody", "😀 👩‍🚀", "العربية", "line\nline", "a\r\nb", "a\u2028b\x85c",
    "e\u0301\u0301", "\ufeffbom", "\U0010ffff", "$x^2$ \\frac", "", " ", "-", "_", "sd", "null",
    "<eos> <|assistant|>", card.END,
]  # fmt: skip
TEXT = st.one_of(st.text(st.characters(codec="utf-8"), max_size=12), st.sampled_from(NASTY))
FEW = settings(
    max_examples=50, phases=[Phase.explicit, Phase.generate],
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)  # fmt: skip
MESSAGE = st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", None]), "content": TEXT | st.none()})
TURNS = st.lists(MESSAGE, max_size=3) | st.none()


def decode(ids):
    return " ".join(map(str, ids))


def said(error):
    """The message of an error of ours, after a check that it is one printable sentence of sane length."""
    message = str(error)
    assert isinstance(error, HarpError)
    assert printable(message) == message
    assert message.endswith(".")
    assert 10 < len(message) < 1100
    return message


def refused(kind, match, call):
    with pytest.raises(kind, match=match) as caught:
        call()
    return said(caught.value)


def stored(rows):
    """Rows as a dataset; what Arrow itself refuses never comes to us."""
    try:
        return Dataset.from_list(rows)
    except pa.ArrowException:
        assume(False)


# Pools

ROWS = st.one_of(
    st.lists(st.fixed_dictionaries({"prompt": TEXT | st.none(), "completion": TEXT | st.none()}), min_size=1,
             max_size=6),
    st.lists(st.fixed_dictionaries({"prompt": TURNS, "completion": TURNS}), min_size=1, max_size=4),
    st.lists(st.fixed_dictionaries({"messages": TURNS, "meta": st.dictionaries(TEXT, TEXT, max_size=2)}), min_size=1,
             max_size=4),
    st.lists(st.fixed_dictionaries({"text": TEXT | st.none() | st.integers(0, 9)}), min_size=1, max_size=6),
    st.lists(st.fixed_dictionaries({"input_ids": st.lists(st.integers(0, 9), max_size=3) | st.none()}), min_size=1,
             max_size=4),
)  # fmt: skip


@FEW
@given(rows=ROWS, copies=st.sampled_from([1, 1, 7]))
def test_every_pool_is_read_with_its_features_or_refused(rows, copies, tmp_path):
    pool = stored(rows * copies)
    try:
        check_pool(pool)
        read = read_contents(pool, "text", decode, frozenset())
        assert read.digest == content_digest(pool)
        run = RunDir(tempfile.mkdtemp(dir=tmp_path))
        matrix = load_features(run, pool, "tfidf", text_field="text", decode=decode, seed=0)
    except DataError as error:
        said(error)
        return
    norms = np.linalg.norm(matrix, axis=1)
    assert np.isfinite(matrix).all()
    assert ((np.abs(norms - 1) < 1e-5) | (norms == 0)).all()
    leaves = build_hierarchy(matrix, leaf_size=2, branching=2).leaf
    assert len(leaves) == len(pool)


LENGTHS = st.sampled_from([0.0, 1.0, -1.0, 1e-38, 1e-30, 1e30, -1e38])


@FEW
@given(rows=st.lists(st.lists(LENGTHS, min_size=3, max_size=3), min_size=1, max_size=9))
@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_vectors_of_any_length_keep_their_direction(rows, tmp_path):
    pool = Dataset.from_dict({"text": ["a"] * len(rows)})
    vectors, run = np.array(rows, np.float32), RunDir(tempfile.mkdtemp(dir=tmp_path))
    matrix = load_features(run, pool, vectors, text_field="text", decode=decode, seed=0)
    wanted = vectors.astype(np.float64)
    norms = np.linalg.norm(wanted, axis=1, keepdims=True)
    assert matrix == pytest.approx(wanted / np.where(norms > 0, norms, 1), abs=1e-5)
    hierarchy = build_hierarchy(matrix, leaf_size=2, branching=2)
    assert np.isfinite(hierarchy.centroids).all()
    assert np.isfinite(hierarchy.distance).all()


def test_text_that_is_not_utf8_is_refused_with_its_place():
    offsets = pa.array([0, 1, 3], pa.int32()).buffers()[1]
    texts = pa.StringArray.from_buffers(2, offsets, pa.py_buffer(b"a\xff\xfe"))
    pool = Dataset(pa.table({"text": texts}))
    refused(DataError, "^One of the rows 0 to 1 of the pool holds text that is not UTF-8",
            lambda: read_contents(pool, "text", decode, frozenset()))  # fmt: skip
    proxy = Dataset(pa.table({"prompt": ["a", "b"], "answer": texts}))
    refused(DataError, "^The proxy set holds text that is not UTF-8", lambda: load_proxy(proxy))


ODD_POOLS = {
    "no prompt": ([{"prompt": "a", "completion": "b"}, {"prompt": None, "completion": "b"}], "Row 1 .* has no prompt"),
    "no role": ([{"messages": [{"content": "a"}, {"content": "b"}]}], "Row 0 .* has a message without a role"),
    "no role in a prompt": (
        [{"prompt": [{"role": None, "content": "a"}], "completion": [{"role": "assistant", "content": "b"}]}],
        "Row 0 .* has a message without a role",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", ODD_POOLS)
def test_pools_that_trl_would_choke_on_are_refused_when_they_are_read(case):
    rows, match = ODD_POOLS[case]
    refused(DataError, match, lambda: read_contents(Dataset.from_list(rows), "text", decode, frozenset()))


def test_a_transform_is_refused():
    pool = Dataset.from_dict({"text": ["a"]}).with_transform(lambda batch: batch)
    refused(DataError, "has a transform.*`map`", lambda: check_pool(pool))


def test_finetunes_read_the_columns_of_the_format_and_no_others():
    names = ["labels", "text", "prompt", "completion", "completion_mask", "image_id", "tools"]
    pool = Dataset.from_dict({name: ["a"] for name in names})
    assert training_columns(pool, "text") == ["prompt", "completion", "tools"]
    assert training_columns(pool.remove_columns("prompt"), "text") == ["text", "tools"]
    tokenised = pool.add_column("input_ids", [[1]])
    assert training_columns(tokenised, "text") == tokenised.column_names, "they may say what to learn"


@pytest.fixture
def tokenised(tiny_model, config):
    def call(pool):
        args = config()
        tokenizer = AutoTokenizer.from_pretrained(tiny_model)
        return LeafFinetuner(load_model(tiny_model, args), pool, args, default_peft_config(), tokenizer).tokenised

    return call


def test_columns_beside_the_format_change_no_finetune(tokenised):
    plain = Dataset.from_list(make_rows("red", 3, 0))
    odd = (
        plain.add_column("labels", [0, 1, 2]).add_column("text", ["x", "y", "z"]).add_column("messages", [None] * 3)
        .add_column("assistant_masks", [[1], [1], [0]])
        .add_column("picture", [{"bytes": b"broken", "path": None}] * 3).cast_column("picture", Image())
    )  # fmt: skip
    assert tokenised(odd).to_list() == tokenised(plain).to_list()
    for kind in ("arrow", "pandas", "numpy"):
        assert tokenised(plain.with_format(kind)).to_list() == tokenised(plain).to_list(), kind


def test_whatever_a_template_raises_is_one_sentence(tokenised, tiny_model, config):
    pool = Dataset.from_list([{"messages": [{"role": "zebra", "content": "a"}, {"role": "user", "content": "b"}]}])
    strict = "{% if messages[0].role == 'zebra' %}{{ raise_exception('no\n\x1b[31mzebras') }}{% endif %}"
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.chat_template = strict
    args = config()
    model = load_model(tiny_model, args)
    refused(DataError, "^TRL cannot tokenise the pool: no .*zebras",
            lambda: LeafFinetuner(model, pool, args, default_peft_config(), tokenizer))  # fmt: skip
    proxy = load_proxy(Dataset.from_list([{"prompt": [{"role": "zebra", "content": "a"}], "answer": "b"}]))
    refused(DataError, r"^Row 0 of the proxy set \(task 'task'\) does not fit the chat template: no .*zebras",
            lambda: ProxyRows(proxy, ["exact_match"], tokenizer, None))  # fmt: skip


def test_rows_of_a_megabyte_are_read_compared_tokenised_and_shown_short(tokenised, tmp_path):
    rows = [{"prompt": f"say {i}", "completion": "word " * 200_000 + str(i)} for i in range(2)]
    rows.append({"prompt": "x" * 1_000_000, "completion": "y"})
    pool, started = Dataset.from_list(rows), time.monotonic()
    read_contents(pool, "text", decode, frozenset())
    load_features(RunDir(tmp_path), pool, "tfidf", text_field="text", decode=decode, seed=0)
    assert max(map(len, tokenised(pool)["input_ids"])) <= 1024
    assert all(len(value) < 700 for value in card._sample(pool).values())
    assert time.monotonic() - started < 20


@pytest.mark.parametrize("source", ["", "a\0b", "x" * 10_000, "\x1b[31mx", "~nobody/x", "/dev/null", "a/b/\udcff"])
def test_names_that_are_no_pool(source):
    message = refused(DataError, "^The pool", lambda: load_rows(source))
    assert "\x1b" not in message


def test_files_of_different_columns_are_refused(tmp_path):
    (tmp_path / "1.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "2.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    refused(DataError, "cannot be read: .*column names don't match", lambda: load_rows(tmp_path))


# Proxy sets

SCALAR = st.none() | st.booleans() | st.integers(-9, 9) | TEXT
ANY = st.recursive(SCALAR, lambda values: st.lists(values, max_size=2), max_leaves=4)


@FEW
@given(st.lists(st.fixed_dictionaries(
    {"prompt": TEXT | TURNS | ANY, "answer": TEXT | st.lists(TEXT | st.none(), max_size=2) | ANY},
    optional={"task": ANY, "choices": st.lists(TEXT, max_size=3) | ANY, "completions": TEXT},
), min_size=1, max_size=4))  # fmt: skip
def test_every_proxy_set_is_read_or_refused(rows):
    asked = stored(rows)
    try:
        proxy = load_proxy(asked)
    except DataError as error:
        said(error)
        return
    assert len(proxy) == len(proxy.answers) == len(proxy.choices) == len(rows)
    assert all(isinstance(a, str) and a.strip() for answers in proxy.answers for a in answers)
    assert proxy.digest == load_proxy(asked).digest
    assert all(proxy.row_keys())


USER = [{"role": "user", "content": "a"}]
ODD_PROXIES = {
    "content of a number": ({"prompt": [{"role": "user", "content": 5}], "answer": "a"}, "content is not text"),
    "content of words": ({"prompt": [{"role": "user", "content": ["a"]}], "answer": "a"}, "content is not text"),
    "completion of numbers": ({"prompt": "a", "completion": [{"role": "assistant", "content": 5}]}, "is not a string"),
    "no role": ({"prompt": [{"role": None, "content": "a"}], "answer": "a"}, "has a message without a role"),
    "from and value": (
        {"prompt": [{"from": "human", "value": "a"}], "answer": "a"},
        "written with `role` and `content`",
    ),
    "no task": ({"prompt": "a", "answer": "a", "task": None}, "Row 0 of the proxy set has no task"),
    "NUL in a task": ({"prompt": "a", "answer": "a", "task": "a\0b"}, r"The task 'a\\x00b' has a NUL character"),
    "a long answer": ({"prompt": "a", "answer": "b" * 10**6, "choices": ["c"]}, "which is not among its choices"),
    "empty choice": ({"prompt": "a", "answer": "a", "choices": ["a", ""]}, "not a list of strings"),
    "no answer in a list": ({"prompt": "a", "answer": ["a", None]}, "has an empty answer"),
}


@pytest.mark.parametrize("case", ODD_PROXIES)
def test_odd_proxy_rows_are_refused_with_their_place(case):
    row, match = ODD_PROXIES[case]
    refused(DataError, match, lambda: load_proxy(Dataset.from_list([row])))


def test_names_of_tasks_that_cannot_be_written():
    rows = Dataset.from_dict({"prompt": ["a"], "answer": ["b"]})
    refused(DataError, r"The task '\\ud800' is not text", lambda: load_proxy({"\ud800": rows, "b": rows}))
    refused(DataError, "has a NUL character", lambda: load_proxy({"\0": rows, "b": rows}))


def test_tasks_of_different_columns_are_joined():
    one = Dataset.from_dict({"prompt": ["a"], "answer": ["b"], "choices": [["b", "c"]], "level": [3]})
    two = Dataset.from_dict({"prompt": ["a"], "answer": ["b"], "note": ["x"]})
    proxy = load_proxy({"a/b": one, "😀": two})
    assert proxy.tasks == ["a/b", "😀"]
    assert proxy.choices == [[" b", " c"], []]


@FEW
@given(text=TEXT, answers=st.lists(TEXT, min_size=1, max_size=2))
def test_any_text_has_a_score(text, answers):
    assert score_text("contains", text, answers) in (0, 1)
    last_number(text)
    if all(last_number(a) is not None for a in answers):
        assert score_text("numeric", text, answers) in (0, 1)


def test_columns_of_the_proxy_set_that_are_named_like_arguments_of_a_metric(tiny_model, proxy, pool, config):
    def judge(prompts, completions, **columns):
        assert set(columns) == {"answer", "task"}
        return [0.5] * len(completions)

    clash = proxy.add_column("completions", ["x"] * 16).add_column("prompts", ["y"] * 16)
    args = config(max_steps=1, max_measurements=1, max_new_tokens=1)
    result = harp_hf.measure(pool, clash, tiny_model, args, features=np.ones((96, 2)), metric=judge)
    assert result.null.tolist() == [0.5, 0.5]


def test_words_without_tokens_and_rows_longer_than_the_model_are_refused(tiny_model):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("\x01", "")
    for row in ({"prompt": "\x01", "answer": "a"}, {"prompt": "a", "answer": "\x01"},
                {"prompt": "a", "answer": "b", "choices": ["b", "\x01"]}):  # fmt: skip
        proxy = load_proxy(Dataset.from_list([row]))
        metric = "choice" if "choices" in row else "exact_match"
        refused(DataError, r"^Row 0 .* of which the tokenizer makes no tokens",
                lambda proxy=proxy, metric=metric: ProxyRows(proxy, [metric], tokenizer, None))  # fmt: skip
    model = AutoConfig.from_pretrained(tiny_model)
    for prompt, answer in (("word " * 200, "a"), ("a", "word " * 200)):
        rows = ProxyRows(load_proxy(Dataset.from_dict({"prompt": [prompt], "answer": [answer]})), ["likelihood"],
                         tokenizer, None)  # fmt: skip
        refused(DataError, r"Row 0 .* has 20\d tokens with its answer, but the model takes 128",
                lambda rows=rows: rows.check_lengths(model, 64))  # fmt: skip
    asked = load_proxy(Dataset.from_dict({"prompt": ["word " * 100], "answer": ["a"]}))
    ProxyRows(asked, ["contains"], tokenizer, None).check_lengths(model, 28)
    refused(DataError, "Row 0 .* has 129 tokens with its answer, but the model takes 128",
            lambda: ProxyRows(asked, ["contains"], tokenizer, None).check_lengths(model, 29))  # fmt: skip


def test_null_scores_by_odd_names(tmp_path):
    names = [name for name in NASTY if name.strip()]
    proxy = load_proxy(Dataset.from_list([{"prompt": "a", "answer": "a", "task": name} for name in names]))
    lines = [json.dumps({"task": name, "score": 0.25}, ensure_ascii=False) for name in names]
    (tmp_path / "null.jsonl").write_text("\r\n".join(lines), encoding="utf-8", newline="")
    assert read_null_scores(tmp_path / "null.jsonl", proxy).tolist() == [0.25] * len(names)
    (tmp_path / "deep.jsonl").write_text("[" * 100_000)
    refused(DataError, "Line 1 of .* is not a JSON object", lambda: read_null_scores(tmp_path / "deep.jsonl", proxy))
    refused(DataError, "cannot be read: embedded null byte", lambda: read_null_scores("a\0b", proxy))


def test_a_proxy_row_without_features_is_near_no_leaf():
    matrix = np.eye(4, dtype=np.float32).repeat(30, axis=0)
    hierarchy = build_hierarchy(matrix, leaf_size=30, branching=2)
    examples = np.array([[0, 0, 0, 0], [0, 0, 0, 1], [0, 0, 0, 0]], np.float32)
    similarity = leaf_similarity(nearest_rows(matrix, examples), hierarchy, np.array([0, 1, 1]), 2)
    assert similarity[:, 0] == pytest.approx(1), "nothing is known of the task"
    assert similarity[hierarchy.leaf[-1], 1] == similarity[:, 1].max() > 1
    pool = Dataset.from_dict({"text": ["red", "green"]})
    proxy = load_proxy(Dataset.from_dict({"prompt": ["x y"], "answer": ["z"]}))
    found = load_proxy_features(pool, proxy, "tfidf", text_field="text", decode=decode, seed=0)
    assert not found.any()


# What is shown

CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


@FEW
@given(st.text(max_size=3000))
def test_every_error_is_one_printable_line(text):
    message = str(HarpError(f"The task {text} is not there."))
    assert not CONTROL.search(message)
    assert len(message) < 1100
    assert message.startswith("The task ")
    assert message.endswith(" is not there.")
    assert printable("😀 👩‍🚀 é العربية 中文") == "😀 👩‍🚀 é العربية 中文"


@pytest.mark.parametrize(
    "text",
    ["{}", "--token={}", "https://me:{}@host/x", "https://{}@huggingface.co/x", "a {} b", "'{}'", "?token={}&x=1"],
)
def test_no_error_shows_a_token(text, monkeypatch):
    assert TOKEN not in str(HarpError(text.format(TOKEN)))
    monkeypatch.setenv("HF_TOKEN", "api_org_Other")
    assert "api_org_Other" not in str(HarpError(text.format("api_org_Other")))


@pytest.mark.parametrize(
    ("address", "shown"),
    [
        ("https://me:pass/word@host/a.jsonl", "https://me:pass/word@host/a.jsonl"),
        ("https://me:pw@host/a.jsonl", "https://(a token)@host/a.jsonl"),
        ("s3://bucket/a?X-Amz-Signature=abc&x=1", "s3://bucket/a?X-Amz-Signature=(a token)&x=1"),
        ("https://host/a?access_token=abc#b", "https://host/a?access_token=(a token)#b"),
        ("https://host:80/a@b?tokenizer=c", "https://host:80/a@b?tokenizer=c"),
        ("https://ghp_abcdefghijkl1234@host/x/pool.jsonl", "https://(a token)@host/x/pool.jsonl"),
        ("http://user:pa@ss@host/x", "http://(a token)@host/x"),
        ("ftp://user:pa@ss@host/x", "ftp://(a token)@host/x"),
        ("https://h/x?access_key=zzz", "https://h/x?access_key=(a token)"),
        ("https://h/x?key=a&auth=b&x=1", "https://h/x?key=(a token)&auth=(a token)&x=1"),
        ("s3://b/x?AWSAccessKeyId=a&Signature=b", "s3://b/x?AWSAccessKeyId=(a token)&Signature=(a token)"),
        ("https://h/x?a=1&amp;sig=abc&amp;x=1", "https://h/x?a=1&amp;sig=(a token)&amp;x=1"),
        ("https://h/x?sort_key=a&author=b&keys=c", "https://h/x?sort_key=a&author=b&keys=c"),
        ("abfs://container@account:443/x", "abfs://container@account:443/x"),
        ("ssh://git@host/a:b@c", "ssh://git@host/a:b@c"),
        ("see https://host or mail me@host", "see https://host or mail me@host"),
        ("C:\\a\\b.jsonl", "C:\\a\\b.jsonl"),
    ],
)
def test_what_opens_an_address_is_not_shown(address, shown):
    assert without_tokens(address) == shown
    assert sentence(shown) == shown


@cache
def of_tasks(count):
    from test_report import make

    return make(6, count, 5, per_leaf=2, n_proxy=3)


def by_hand(names, pool=None):
    """A result with one task a name, made without finetuning."""
    result = of_tasks(len(names))
    return replace(result, tasks=names, pool=pool if pool is not None else result.pool)


def hopeful(result):
    """The same result, but every leaf is expected to help."""
    return replace(result, posterior=replace(result.posterior, mean=result.posterior.mean + 1))


@pytest.fixture
def undrawn(monkeypatch):
    """Pages without figures, which take most of the time."""
    sections = ("hierarchy", "sources", "effects", "greedy", "scores", "smoothness")
    monkeypatch.setattr("harp_hf.report.draw_figures", lambda result: {name: [] for name in sections})


NAMES = st.lists(TEXT.filter(lambda name: "\0" not in name), min_size=1, max_size=4, unique=True).filter(
    lambda names: not any(f"sd_{name}" in names for name in names)
)


@settings(FEW, max_examples=15)
@given(names=NAMES, text=TEXT)
def test_names_and_rows_stay_text_in_summary_page_and_card(names, text, undrawn, tmp_path):
    pytest.importorskip("matplotlib")
    from test_report import Page

    from harp_hf.report import write_report

    column = text.replace("\0", "") or "x"
    pool = Dataset.from_list([{"prompt": f"{text} {i}", "completion": text, column: i} for i in range(12)])
    result = replace(by_hand(names, pool), metrics=[text] * len(names))
    summary = result.summary()
    assert not CONTROL.search(summary.replace("\n", ""))
    assert max(map(len, summary.split("\n"))) <= 100

    page = Page(write_report(result, tmp_path).read_text(encoding="utf-8"))
    plain = Page(write_report(by_hand(["task"] * len(names)), tmp_path).read_text(encoding="utf-8"))
    assert {tag for tag, _ in page.tags} == {tag for tag, _ in plain.tags}
    assert sum(tag in ("script", "iframe") for tag, _ in page.tags) == 0
    assert not re.search("[\u202a-\u202e\u2066-\u2069]", page.text)
    for name in names:
        kept = " ".join("".join(c for c in name if c.isprintable() or c in "\n\t" or ord(c) >= 0xA0).split())
        assert re.sub("[\u202a-\u202e\u2066-\u2069]", "", kept) in page.text

    rows = hopeful(result).select("harp-e")
    assert [f"phi_{name}" in rows.column_names for name in names] == [True] * len(names)
    told = card.describe(result, rows, "me/x")
    assert told.count(card.END) == 1
    shown = MarkdownIt("commonmark").enable("table").render(told)
    assert re.findall("<h1>(.*?)</h1>", shown) == ["x"]
    assert "<script" not in shown
    tables = re.findall("<table>(.*?)</table>", shown, re.DOTALL)
    assert len(tables) == 4
    for table in tables:
        assert len({line.count("</td>") for line in table.split("</tr>")[1:-1]}) == 1


def test_names_are_drawn_and_many_tasks_make_no_endless_figure():
    pytest.importorskip("matplotlib")
    from matplotlib.image import imread

    from harp_hf.figures import effects_matrix, predicted_scores

    tasks = [*NASTY, *(f"task {i}" for i in range(500 - len(NASTY)))]
    mean = np.random.default_rng(0).standard_normal((6, 500)) * np.linspace(0.2, 0.1, 500)
    effects = effects_matrix(tasks, mean, np.full((6, 500), 0.05), np.ones(6, bool), mean.mean(axis=1))
    null = np.full(500, 0.3)
    scores = predicted_scores(tasks, null, {"harp-c": null + mean[0], "harp-e": null + mean[1]})
    for figure in (effects, scores):
        assert imread(io.BytesIO(figure.png)).shape[0] < 4000
        assert "<script" not in figure.svg
        assert "60 of 500 tasks with the largest" in figure.caption
    assert tasks[np.abs(mean).max(axis=0).argmax()] in effects.alt


def test_rows_shown_in_the_report_are_read_as_they_are_stored(undrawn, tmp_path):
    from harp_hf.report import write_report

    broken = {"bytes": b"broken", "path": None}
    rows = [{"prompt": f"say {i}", "completion": TOKEN, "picture": broken} for i in range(12)]
    pool = Dataset.from_list(rows).cast_column("picture", Image())
    page = write_report(by_hand(["a"], pool), tmp_path).read_text(encoding="utf-8")
    assert "say 1" in page
    assert TOKEN not in page


def test_settings_on_a_card_that_look_like_paths_or_code():
    assert card.public("~ no such user/x") == "~ no such user/x"
    weights = {"task_weights": {"token": 2.0}}
    assert card.public({"token": "abc", "api_key": "abc", **weights}) == weights
    result = by_hand(["a"])
    rows = hopeful(result).select("harp-e")
    text = card.describe(result, rows, "me/x", source="a\n# b", licence="<b>", revision="r\n```\n# c")
    assert "\n# b" not in text
    assert "\n# c" not in text
    assert "<b>" not in text


# A whole run

DEEP = {"a": [{"b": [[1, 2], [3]], "c": None}], "d": {"e": b"\x00\xff"}}


@pytest.fixture(scope="module")
def hostile_pool():
    rows = [{"prompt": f"say {text} {i % 7} word", "completion": f" {text}x"} for i, text in enumerate(NASTY)]
    rows += [rows[0]] * 6
    plain = Dataset.from_list(rows)
    return (
        plain.add_column("meta", [DEEP] * len(rows)).add_column("raw", [b"\xff\x00"] * len(rows))
        .add_column("labels", list(range(len(rows)))).add_column("<b>|\n", [None] * len(rows))
        .add_column("from", [f"source {i % 3} \x1b[31m" for i in range(len(rows))])
        .add_column("picture", [{"bytes": b"broken", "path": None}] * len(rows)).cast_column("picture", Image())
    )  # fmt: skip


@pytest.fixture(scope="module")
def hostile_proxy():
    rows = [{"prompt": f"say {name} :", "answer": ["crimson", f"{name}x"], "task": name} for name in NASTY]
    return Dataset.from_list(rows * 2)


@pytest.fixture(scope="module")
def run(hostile_pool, hostile_proxy, tiny_model, tmp_path_factory):
    """A finished run on nothing but odd rows, and all that was logged meanwhile."""
    folder, log = tmp_path_factory.mktemp("hostile") / "run", io.StringIO()
    handler = logging.StreamHandler(log)
    logging.getLogger().addHandler(handler)
    before = os.environ.get("HF_TOKEN")
    os.environ["HF_TOKEN"] = "api_org_FromTheEnvironment"
    args = HarpConfig(
        output_dir=str(folder), leaf_size=4, branching=2, max_measurements=3, max_steps=2, learning_rate=3e-2,
        use_cpu=True, bf16=False, features="tfidf", metric="likelihood", active_tasks="all", source_column="from",
        hub_token=TOKEN, run_name=f"run {TOKEN}", model_init_kwargs={"token": "unprefixed"},
        per_device_eval_batch_size=32,
    )  # fmt: skip
    try:
        result = harp_hf.measure(hostile_pool, hostile_proxy, tiny_model, args)
    finally:
        logging.getLogger().removeHandler(handler)
        os.environ.pop("HF_TOKEN") if before is None else os.environ.update(HF_TOKEN=before)
    return result, log.getvalue()


def test_a_run_on_odd_rows_gives_them_back_untouched(run, hostile_pool, tmp_path):
    result, _ = run
    assert result.tasks == NASTY
    assert np.isfinite(result.posterior.mean).all()
    assert np.isfinite(result.posterior.sd).all()
    chosen = hopeful(result).select("harp-e")
    original = hostile_pool.select(chosen["harp_row"][:])
    stored = chosen.with_format("arrow")[:]
    assert stored.select(hostile_pool.column_names).to_pylist() == original.with_format("arrow")[:].to_pylist()
    assert {name: chosen.features[name] for name in hostile_pool.column_names} == hostile_pool.features
    for name in NASTY:
        assert chosen.features[f"phi_{name}"] == Value("float64")
    chosen.to_parquet(tmp_path / "train.parquet")
    again = load_dataset("parquet", data_files=str(tmp_path / "train.parquet"), split="train", cache_dir=str(tmp_path))
    assert again.column_names == chosen.column_names
    assert again.with_format("arrow")[:].to_pylist() == stored.to_pylist()


def test_a_run_on_odd_rows_is_loaded_summed_up_and_shown(run, hostile_pool, undrawn):
    from test_report import Page

    from harp_hf.report import write_report

    result, log = run
    assert not CONTROL.search(log.replace("\n", ""))
    again = harp_hf.load_result(result.path, hostile_pool)
    assert again.tasks == NASTY
    assert again.summary() == result.summary()
    assert not CONTROL.search(result.summary().replace("\n", ""))
    Page(write_report(result, result.path).read_text(encoding="utf-8"))
    card.describe(result, hopeful(result).select("harp-e"), "me/x")


def test_no_token_is_in_the_run_directory_the_log_or_the_card(run, undrawn):
    from harp_hf.report import write_report

    result, log = run
    write_report(result, result.path)
    told = card.describe(result, hopeful(result).select("harp-e"), "me/x")
    written = {str(p): p.read_bytes() for p in result.path.rglob("*") if p.is_file()}
    config = yaml.safe_load((result.path / "config.yaml").read_text(encoding="utf-8"))
    assert config["run_name"] == "run (a token)"
    assert config["model_init_kwargs"] == {}
    for name, data in {**written, "log": log.encode(), "card": told.encode()}.items():
        for secret in (TOKEN, "unprefixed", "api_org_FromTheEnvironment"):
            assert secret.encode() not in data, name


def test_the_command_line_shows_odd_names_on_a_terminal_of_few_letters(run, hostile_pool, tmp_path, monkeypatch):
    result, _ = run
    copy = shutil.copytree(result.path, tmp_path / "run")
    hostile_pool.save_to_disk(tmp_path / "pool")
    with (copy / "config.yaml").open("a", encoding="utf-8") as config:
        config.write(f"dataset_name: {tmp_path / 'pool'}\n")
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    with suppress(SystemExit):  # where no leaf helps
        main(["cut", "--output_dir", str(copy)])
    sys.stdout.flush()
    shown = sys.stdout.buffer.getvalue()
    assert b"HARP-C" in shown
    assert b"\x1b" not in shown


def test_addresses_in_a_config_are_written_without_what_opens_them():
    mixture = DatasetMixtureConfig([{"path": "json", "data_files": f"https://host/a.jsonl?token={TOKEN}"}])
    told = describe_call(HarpConfig(use_cpu=True, null_scores="https://me:word@host/x"), mixture)
    assert told["datasets"][0]["data_files"] == "https://host/a.jsonl?token=(a token)"
    assert told["null_scores"] == "https://(a token)@host/x"
    assert describe_call(HarpConfig(use_cpu=True, task_weights={"token": 2}))["task_weights"] == {"token": 2}


def test_a_mistyped_flag_does_not_show_the_token(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["push", "--output_dir", "x", "--tokn", TOKEN])
    assert TOKEN not in str(stopped.value) + "".join(capsys.readouterr())


def test_constant_scores_leave_nothing_to_choose_and_say_so(pool, proxy, features, tiny_model, config):
    def judge(prompts, completions, **_):
        return [1.0] * len(completions)

    args = config(max_steps=1, max_measurements=3, max_new_tokens=1)
    result = harp_hf.measure(pool, proxy, tiny_model, args, features=features, metric=judge)
    assert not result.active().any()
    assert np.isfinite(result.posterior.mean).all()
    assert np.isfinite(result.posterior.sd).all()
    assert result.posterior.mean == pytest.approx(0, abs=1e-9)
    assert re.search(r"HARP-C.*0 of \d+ .* 0 ", result.summary())
    refused(HarpError, "No task has measured effects that are distinguishable from none", result.select)
    refused(HarpError, "No leaf of the pool is expected", lambda: result.select(active_tasks="all"))


@pytest.mark.filterwarnings("error:divide by zero")
@pytest.mark.parametrize("rows", [1, 3, 96])
def test_one_row_and_equal_rows(rows, proxy, tiny_model, config):
    pool = Dataset.from_list(make_rows("red", 1, 0) * rows)
    args = config(max_steps=1, max_measurements=2, features="tfidf", metric="likelihood", active_tasks="all")
    result = harp_hf.measure(pool, proxy, tiny_model, args)
    assert np.isfinite(result.posterior.mean).all()
    assert f"{rows} " in result.summary()
    assert result.explain(0)["leaf"] == result.hierarchy.leaf[0]


def test_five_hundred_tasks_of_one_row(pool, features, tiny_model, config, monkeypatch):
    for grid in ("SHARED_GRID", "OWN_GRID"):
        monkeypatch.setattr(f"harp_hf.posterior.{grid}", (0.25, 0.55))  # for want of time
    names = [f"topic/{i} 😀" for i in range(500)]
    proxy = Dataset.from_list([{"prompt": "say the red :", "answer": "crimson", "task": name} for name in names])
    args = config(max_steps=1, max_measurements=2, metric="likelihood", active_tasks="all",
                  per_device_eval_batch_size=128)  # fmt: skip
    result = harp_hf.measure(pool.add_column("kind", ["a", "b"] * 48), proxy, tiny_model, args, features=features)
    assert np.isfinite(result.posterior.mean).all()
    chosen = hopeful(result).select("harp-e")
    assert len(chosen.column_names) == 3 + 1 + 1000 + 5


# What is never run


class Payload:
    """Unpickled, it leaves a mark."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return open, (str(self.mark), "w")


@pytest.mark.parametrize("name", ["hierarchy.npz", "features.npy", "measurements/0-42.npz", "result/arrays.npz"])
def test_nothing_in_a_run_directory_is_unpickled(name, tmp_path):
    directory, mark = RunDir(tmp_path / "run"), tmp_path / "mark"
    array = np.array([Payload(mark)], dtype=object)
    save = np.save if name.endswith(".npy") else (lambda handle, value: np.savez(handle, scores=value))
    path = directory.write(name, lambda handle: save(handle, array))
    read = directory.read_matrix if name.endswith(".npy") else directory.read_arrays
    refused(RunDirError, f"{Path(name).name} is damaged", lambda: read(name))
    path.write_bytes(pickle.dumps(Payload(mark)))
    refused(RunDirError, f"{Path(name).name} is damaged", lambda: read(name))
    assert not mark.exists()
    np.load(directory.write(name, lambda handle: np.save(handle, array)), allow_pickle=True)
    assert mark.exists(), "it would have left a mark"


def test_a_run_directory_with_objects_in_it_is_never_unpickled(run, hostile_pool, tmp_path):
    result, _ = run
    copy, mark = shutil.copytree(result.path, tmp_path / "run"), tmp_path / "mark"
    with (copy / "result" / "arrays.npz").open("wb") as handle:
        np.savez(handle, leaves=np.array([Payload(mark)], dtype=object))
    refused(RunDirError, "arrays.npz is damaged", lambda: harp_hf.load_result(copy, hostile_pool))
    shutil.copy(result.path / "result" / "arrays.npz", copy / "result" / "arrays.npz")
    (copy / "config.yaml").write_text(f"dataset_name: !!python/object/apply:os.system ['touch {mark}']\n")
    refused(RunDirError, "config.yaml is damaged", lambda: harp_hf.load_result(copy))
    assert not mark.exists()


@pytest.mark.parametrize("name", ["x.pkl", "x.pickle", "x.pt"])
def test_pickled_pools_are_refused(name, tmp_path):
    mark = tmp_path / "mark"
    (tmp_path / name).write_bytes(pickle.dumps(Payload(mark)))
    refused(DataError, "The pool", lambda: load_rows(tmp_path / name))
    refused(DataError, "The pool", lambda: load_rows(tmp_path))
    assert not mark.exists()


@pytest.fixture
def own_code(tiny_model, tmp_path):
    """Folder of a model and a tokenizer that bring code of their own, which leaves a mark where it is run."""
    folder = Path(shutil.copytree(tiny_model, tmp_path / "own"))
    for file, name, base in (("modeling", "OwnModel", "LlamaForCausalLM"), ("configuring", "OwnConfig", "LlamaConfig"),
                             ("tokenizing", "OwnTokenizer", "PreTrainedTokenizerFast")):  # fmt: skip
        (folder / f"{file}_own.py").write_text(
            f"from transformers import {base}\nopen({str(tmp_path / file)!r}, 'w').close()\n"
            f"class {name}({base}):\n    model_type = 'own'\n"
        )
    known = json.loads((folder / "config.json").read_text())
    own = {"AutoConfig": "configuring_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnModel"}
    (folder / "config.json").write_text(json.dumps(known | {"model_type": "own", "auto_map": own}))
    known = json.loads((folder / "tokenizer_config.json").read_text())
    own = {"AutoTokenizer": [None, "tokenizing_own.OwnTokenizer"]}
    (folder / "tokenizer_config.json").write_text(
        json.dumps(known | {"auto_map": own, "tokenizer_class": "OwnTokenizer"})
    )
    return folder


def marks(folder):
    return {name for name in ("modeling", "configuring", "tokenizing", "embedding") if (folder / name).exists()}


def test_code_of_a_model_is_run_only_where_the_user_says_so(own_code, tmp_path, monkeypatch, config):
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    # Nobody is asked, and nobody's keyboard answers yes.
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 9))
    assert HarpConfig(use_cpu=True).trust_remote_code is False
    for load in (load_tokenizer, load_model):
        refused(ConfigError, "cannot be loaded: .*custom code", lambda load=load: load(str(own_code), config()))
    assert marks(tmp_path) == set()
    args = config(trust_remote_code=True)
    assert type(load_tokenizer(str(own_code), args)).__name__ == "OwnTokenizer"
    assert marks(tmp_path) >= {"tokenizing"}


def test_code_of_an_embedding_model_is_never_run(tmp_path):
    folder = tmp_path / "embedder"
    folder.mkdir()
    (folder / "own.py").write_text(f"open({str(tmp_path / 'embedding')!r}, 'w').close()\nclass Own: pass\n")
    (folder / "modules.json").write_text(json.dumps([{"idx": 0, "name": "0", "path": "", "type": "own.Own"}]))
    pool = Dataset.from_dict({"text": ["a"]})
    refused(DataError, "nor a sentence-transformers model that loads: .*third-party code",
            lambda: load_features(RunDir(tmp_path / "run"), pool, str(folder), text_field="text", decode=decode,
                                  seed=0))  # fmt: skip
    assert marks(tmp_path) == set()


def test_no_module_unpickles_evaluates_or_trusts():
    """What would run the text of a file, in the source of the whole package."""
    allowed = {"trust_remote_code=args.trust_remote_code", "weights_only=True", "allow_pickle=False"}
    assert METRICS
    for path in sorted(Path(harp_hf.__file__).parent.rglob("*.py")):
        source = path.read_text(encoding="utf-8")
        for call in re.findall(r"(?:torch|np|numpy)\.load\([^\n]*|trust_remote_code=[\w.]*", source):
            assert any(part in call for part in allowed), f"{path.name}: {call}"
        assert not re.search(r"\bpickle\b|yaml\.(?:unsafe_)?load\(|(?<![\w.])(?:eval|exec)\(", source), path.name
