"""The proxy set: the forms it comes in, and what each row then asks and accepts."""

import json
from dataclasses import replace

import numpy as np
import pytest
from datasets import Dataset, DatasetDict

from harp_hf.errors import DataError
from harp_hf.proxy import load_proxy

USER = [{"role": "user", "content": "capital of France ?"}]


def load(*rows, **columns):
    return load_proxy(Dataset.from_list(list(rows)) if rows else Dataset.from_dict(columns))


def test_one_answer_or_several():
    assert load({"prompt": "a", "answer": "x"}).answers == [[" x"]]
    assert load({"prompt": "a", "answer": ["x", "y"]}).answers == [[" x", " y"]]


@pytest.mark.parametrize(
    ("prompt", "answer", "continuation"),
    [
        ("1 + 1 =", "2", " 2"),
        ("1 + 1 = ", "2", "2"),
        ("1 + 1 =\n", "2", "2"),
        ("1 + 1 =", " 2", " 2"),
        ("=", "\n2", "\n2"),
    ],
)
def test_one_space_parts_a_string_prompt_from_its_answer_unless_there_is_one(prompt, answer, continuation):
    proxy = load({"prompt": prompt, "answer": answer, "choices": ["3 ", answer]})
    assert proxy.answers == [[continuation]]
    assert proxy.choices == [["3 " if prompt[-1].isspace() else " 3 ", continuation]]


def test_a_completion_is_taken_as_it_is():
    assert load({"prompt": "1 + 1 =", "completion": "2"}).answers == [["2"]]
    assert load({"prompt": "1 + 1 =", "completion": " 2"}).answers == [[" 2"]]


def test_an_answer_goes_before_a_completion():
    assert load({"prompt": "1 + 1 =", "completion": "two", "answer": "2"}).answers == [[" 2"]]


def test_some_rows_have_an_answer_and_others_a_completion():
    proxy = load({"prompt": "1 + 1 =", "answer": "2", "completion": None}, {"prompt": "2 + 2 =", "completion": "4"})
    assert proxy.answers == [[" 2"], ["4"]]
    tasks = {"one": Dataset.from_list([{"prompt": "a", "answer": "x"}]),
             "two": Dataset.from_list([{"prompt": "b", "completion": "y"}])}  # fmt: skip
    assert load_proxy(tasks).answers == [[" x"], ["y"]]


def test_messages_are_answered_without_a_space():
    proxy = load({"prompt": USER, "answer": ["Paris", "Lutetia"], "choices": ["Paris", "Rome"]})
    assert proxy.prompts == [USER]
    assert proxy.answers == [["Paris", "Lutetia"]]
    assert proxy.choices == [["Paris", "Rome"]]


def test_a_completion_in_messages():
    assert load({"prompt": USER, "completion": [{"role": "assistant", "content": "Paris"}]}).answers == [["Paris"]]


def test_choices_of_some_rows_only():
    proxy = load(
        {"prompt": "a", "answer": "x", "choices": ["x", "y"]}, {"prompt": "b", "answer": "z", "choices": None}
    )
    assert proxy.choices == [[" x", " y"], []]


def test_one_accepted_answer_among_the_choices_is_enough():
    assert load({"prompt": "a", "answer": ["no", "x"], "choices": ["x", "y"]}).choices == [[" x", " y"]]


def test_without_a_task_column_all_rows_are_one_task():
    proxy = load(prompt=["a", "b"], answer=["x", "y"])
    assert proxy.tasks == ["task"]
    assert proxy.task.tolist() == [0, 0]
    assert len(proxy) == 2


def test_tasks_come_in_order_of_appearance():
    proxy = load(prompt=list("abcd"), answer=list("wxyz"), task=["z", "a", "z", "m"])
    assert proxy.tasks == ["z", "a", "m"]
    assert proxy.task.tolist() == [0, 1, 0, 2]


def test_tasks_may_be_numbers():
    assert load(prompt=["a", "b"], answer=["x", "y"], task=[7, 3]).tasks == ["7", "3"]


@pytest.mark.parametrize("kind", [dict, DatasetDict])
def test_one_task_a_key(kind):
    one, two = (
        Dataset.from_dict({"prompt": ["a"], "answer": ["x"]}),
        Dataset.from_dict({"prompt": ["b"], "answer": ["y"]}),
    )
    proxy = load_proxy(kind(zebra=one, ant=two))
    assert proxy.tasks == ["zebra", "ant"]
    assert proxy.prompts == ["a", "b"]
    assert load_proxy(kind(zebra=one)).tasks == ["zebra"]


@pytest.mark.parametrize("kind", [dict, DatasetDict])
def test_a_split_with_a_task_column_is_a_split(kind):
    train = Dataset.from_dict({"prompt": ["a"], "answer": ["x"], "task": ["t"]})
    test = Dataset.from_dict({"prompt": ["b", "c"], "answer": ["y", "z"], "task": ["u", "v"]})
    proxy = load_proxy(kind(train=train, test=test))
    assert proxy.tasks == ["u", "v"]
    assert load_proxy(kind(test=test)).tasks == ["u", "v"]
    assert load_proxy(kind(train=train, test=test), split="train").tasks == ["t"]


def test_tasks_of_a_dict_may_be_files(tmp_path):
    Dataset.from_dict({"prompt": ["a"], "answer": ["x"]}).to_json(tmp_path / "one.jsonl")
    Dataset.from_dict({"prompt": ["b"], "answer": ["y"]}).to_parquet(tmp_path / "two.parquet")
    assert load_proxy({"one": str(tmp_path / "one.jsonl"), "two": tmp_path / "two.parquet"}).tasks == ["one", "two"]
    assert load_proxy({"test": str(tmp_path / "one.jsonl")}).prompts == ["a"]


def test_a_path(proxy, tmp_path):
    proxy.to_json(tmp_path / "proxy.jsonl")
    assert load_proxy(str(tmp_path / "proxy.jsonl")).digest == load_proxy(proxy).digest


def test_the_format_of_the_dataset_does_not_matter(proxy):
    assert load_proxy(proxy.with_format("numpy")).digest == load_proxy(proxy).digest


def test_all_columns_are_kept_for_callable_metrics():
    proxy = load({"prompt": "a", "answer": "x", "level": 3})
    assert proxy.columns == {"prompt": ["a"], "answer": ["x"], "level": [3]}


def test_the_digest_tells_proxy_sets_apart(proxy):
    base = load_proxy(proxy).digest
    assert load_proxy(Dataset.from_list(proxy.to_list())).digest == base
    rows = proxy.to_list()
    others = [
        [rows[1], rows[0], *rows[2:]],
        rows[:-1],
        [rows[0] | {"answer": "azure"}, *rows[1:]],
        [rows[0] | {"prompt": "say"}, *rows[1:]],
        [rows[0] | {"task": "blue"}, *rows[1:]],
        [row | {"task": row["task"].upper()} for row in rows],
        [row | {"choices": [row["answer"], "azure"]} for row in rows],
        [row | {"level": 0} for row in rows],
        [row | {"level": int(i == 3)} for i, row in enumerate(rows)],
        [row | {"table": [[0.0] * 2000]} for row in rows],
        [row | {"table": [[0.0] * 999 + [i / 9.0] + [0.0] * 1000]} for i, row in enumerate(rows)],
    ]
    digests = {load_proxy(Dataset.from_list(other)).digest for other in others}
    assert len(digests | {base}) == len(others) + 1


def test_the_digest_knows_all_numbers_of_an_array_and_no_address(proxy):
    class Thing:
        pass

    def digest(value):
        base = load_proxy(proxy)
        return replace(base, columns=base.columns | {"extra": [value] * len(base)}).digest

    zeros = np.zeros(4000)
    assert digest(zeros) == digest(zeros.copy()) != digest(np.eye(1, 4000, 2001)[0])
    assert digest(Thing()) == digest(Thing()) != digest(1)


def test_row_keys_hold_one_digest_for_each_accepted_answer():
    keys = load({"prompt": "a", "answer": ["x", "y"]}, {"prompt": "a", "answer": ["y"]}).row_keys()
    assert [len(k) for k in keys] == [2, 1]
    assert keys[1] < keys[0]


def test_a_bad_row_is_named_with_its_number_and_task():
    with pytest.raises(DataError, match=r"Row 1 of the proxy set \(task 't'\) has an empty answer\.$"):
        load({"prompt": "a", "answer": "x", "task": "s"}, {"prompt": "b", "answer": " ", "task": "t"})


def test_prompts_are_handed_on_unchanged(tmp_path):
    turns = [{"role": "system", "content": "be brief"}, *USER]
    (tmp_path / "p.jsonl").write_text(json.dumps({"prompt": turns, "answer": "Paris"}))
    assert load_proxy(str(tmp_path / "p.jsonl")).prompts == [turns]
