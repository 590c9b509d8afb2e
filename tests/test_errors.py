"""What bad input is answered with: one sentence that says what is wrong and where; and nothing is lost by it."""

import errno
import os
import shutil
from datetime import datetime
from pathlib import Path

import numpy as np
import pytest
import yaml
from datasets import Dataset, DatasetDict
from peft import LoraConfig
from transformers import AutoTokenizer, TrainingArguments

import harp_hf
from harp_hf.config import HarpConfig
from harp_hf.errors import ConfigError, DataError, HarpError, RunDirError
from harp_hf.inputs import read_inputs
from harp_hf.models import describe_model

MESSAGES = [{"role": "user", "content": "say the red :"}]


def refusal(kind, match, call):
    """Check that `call` raises just one readable sentence."""
    with pytest.raises(kind, match=match) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    assert message.endswith(".")
    assert message[0].isupper() or message[0] in "`/'"
    assert 20 < len(message) < 400


def files(folder):
    """Names and bytes of all files of a folder, but for its event log."""
    found = sorted(p for p in Path(folder).rglob("*") if p.is_file() and p.name != "events.jsonl")
    return {str(p.relative_to(folder)): p.read_bytes() for p in found}


@pytest.fixture
def measure(pool, proxy, features, config, tiny_model):
    """A call that works, of which each test spoils one thing."""

    def call(settings=None, **changes):
        given = {"dataset": pool, "eval_dataset": proxy, "model": tiny_model, "features": features, **changes}
        given.setdefault("args", config(max_steps=2, max_measurements=3, max_new_tokens=2, **(settings or {})))
        return harp_hf.measure(**given)

    return call


@pytest.fixture
def refused(measure, tmp_path):
    """Check that a call is refused before anything is computed or written."""

    def check(kind, match, **changes):
        refusal(kind, match, lambda: measure(**changes))
        assert not (tmp_path / "run").exists()

    return check


def with_row(rows, number, **values):
    """The same rows, one of them changed."""
    return Dataset.from_list([row | (values if i == number else {}) for i, row in enumerate(rows.to_list())])


# The pool

BAD_POOLS = {
    "no pool": (lambda pool: None, "The pool must be .* not NoneType"),
    "a list of dicts": (lambda pool: pool.to_list(), "The pool must be .* not list"),
    "a stream": (lambda pool: pool.to_iterable_dataset(), "The pool must be .* not IterableDataset"),
    "no rows": (lambda pool: pool.select([]), "The pool has no rows"),
    "no completion": (
        lambda pool: pool.remove_columns("completion"),
        "The pool has the columns prompt, but it needs `messages`, `prompt` and `completion`, `text` or `input_ids`",
    ),
    "unknown split": (lambda pool: DatasetDict(a=pool, b=pool), "no split 'train'; its splits are 'a', 'b'"),
    "column phi": (lambda pool: pool.add_column("phi", [0.5] * 96), "already has the column 'phi'.*earlier selection"),
    "column phi_x": (lambda pool: pool.add_column("phi_x", [0.5] * 96), "already has the column 'phi_x'"),
    "column harp_leaf": (lambda pool: pool.add_column("harp_leaf", [1] * 96), "already has the column 'harp_leaf'"),
    "empty completion": (lambda pool: with_row(pool, 7, completion=" \n"), "Row 7 of the pool has no text"),
    "missing completion": (lambda pool: with_row(pool, 95, completion=None), "Row 95 of the pool has no text"),
    "no messages": (
        lambda pool: Dataset.from_list([{"messages": MESSAGES}] * 3 + [{"messages": []}]),
        "Row 3 of the pool has no text",
    ),
    "message without content": (
        lambda pool: Dataset.from_list([{"messages": [{"role": "assistant", "content": None, "tool_calls": None}]}]),
        "Row 0 of the pool has no text",
    ),
    "text of numbers": (
        lambda pool: Dataset.from_dict({"text": [1, 2]}), "The pool's column 'text' holds int64, not text"
    ),
    "prompts of dates": (
        lambda pool: Dataset.from_list([{"prompt": datetime(2024, 5, 10), "completion": "a"}]),
        r"The pool's column 'prompt' holds timestamp\[us\], not text",
    ),
    "no tokens": (lambda pool: Dataset.from_dict({"input_ids": [[6, 7], []]}), "Row 1 of the pool has no text"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_POOLS)
def test_a_pool_that_cannot_be_used(case, refused, pool):
    spoil, match = BAD_POOLS[case]
    refused(DataError, match, dataset=spoil(pool))


BAD_FILES = {
    "pool.parquet": (b"PAR1 cut short", "cannot be read: Parquet magic bytes not found"),
    "pool.jsonl": (b'{"text": "a"}\n{"text":\n', "cannot be read: JSON parse error: Invalid value. in row 1"),
    "pool.csv": (b"\xff\xfe,\n1,2\n", "cannot be read: 'utf-8' codec can't decode byte 0xff"),
    "pool.json": (b"", "The pool file .*pool.json is empty"),
    "pool.txt": (b"a", "has no known ending; use one of .jsonl, .json, .parquet, .csv"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_pool_file_that_cannot_be_read(name, refused, tmp_path):
    written, match = BAD_FILES[name]
    (tmp_path / name).write_bytes(written)
    refused(DataError, match, dataset=str(tmp_path / name))


@pytest.mark.parametrize("name", ["pool.jsonl", "folder", "folder/pool.parquet"])
def test_a_pool_path_that_is_not_there(name, refused, tmp_path):
    refused(DataError, f"The pool .*{name} is not there", dataset=str(tmp_path / name))


def test_a_pool_that_is_not_on_the_hub(refused):
    refused(DataError, "The pool nobody/nothing cannot be read: Couldn't reach", dataset="nobody/nothing")


def test_a_folder_without_data(refused, tmp_path):
    refused(DataError, "doesn't contain any data files", dataset=str(tmp_path))


# The proxy set

BAD_PROXIES = {
    "no proxy set": (lambda proxy: None, "A proxy set is needed: .* as `eval_dataset`"),
    "no rows": (lambda proxy: proxy.select([]), "The proxy set has no rows"),
    "no tasks": (lambda proxy: {}, "The proxy set has no tasks"),
    "task without rows": (
        lambda proxy: {"a": proxy.remove_columns("task"), "b": proxy.select([])}, "proxy set of task 'b' has no rows",
    ),
    "task that is no dataset": (lambda proxy: {"a": 3, "b": proxy}, "proxy set of task 'a' must be .* not int"),
    "no prompt": (lambda proxy: proxy.remove_columns("prompt"), "columns answer, task, but it needs `prompt`"),
    "no answer": (lambda proxy: proxy.remove_columns("answer"), "needs `prompt` and `answer` or `completion`"),
    "empty prompt": (lambda proxy: with_row(proxy, 3, prompt=" "), r"Row 3 .* \(task 'red'\) has an empty prompt"),
    "missing prompt": (lambda proxy: with_row(proxy, 9, prompt=None), "Row 9 .* has an empty prompt"),
    "prompt of numbers": (
        lambda proxy: Dataset.from_dict({"prompt": [5], "answer": ["a"]}), "Row 0 .* has the prompt 5, which is",
    ),
    "empty answer": (lambda proxy: with_row(proxy, 0, answer=""), "Row 0 .* has an empty answer"),
    "missing answer": (lambda proxy: with_row(proxy, 1, answer=None), "Row 1 .* has an empty answer"),
    "empty list of answers": (
        lambda proxy: Dataset.from_dict({"prompt": ["a", "b"], "answer": [["x"], []]}), "Row 1 .* has an empty answer",
    ),
    "answer of numbers": (
        lambda proxy: Dataset.from_dict({"prompt": ["1 + 1 ="], "answer": [2]}),
        "Row 0 .* has the answer 2, which is not a string",
    ),
    "choices without the answer": (
        lambda proxy: proxy.add_column("choices", [["emerald", "azure"]] * 16),
        "Row 0 .* has the answer 'crimson', which is not among its choices",
    ),
    "choices that are no list": (
        lambda proxy: proxy.add_column("choices", ["crimson"] * 16), "Row 0 .* has the choices 'crimson'",
    ),
    "tasks with other columns": (
        lambda proxy: {"a": Dataset.from_dict({"prompt": ["a"], "answer": ["x"]}),
                       "b": Dataset.from_dict({"prompt": ["a"], "answer": [["x"]]})},
        "columns of the proxy set's tasks do not fit together: .*answer",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_PROXIES)
def test_a_proxy_set_that_cannot_be_used(case, refused, proxy):
    spoil, match = BAD_PROXIES[case]
    refused(DataError, match, eval_dataset=spoil(proxy))


# Settings

BAD_SETTINGS = {
    "budget of 0": ({"budget": 0}, "`budget` must be a whole number of at least 1, but it is 0"),
    "negative budget": ({"budget": -1}, "`budget` must be a whole number of at least 1, but it is -1"),
    "budget of a row and a half": ({"budget": 1.5}, "`budget` .* but it is 1.5"),
    "budget of True": ({"budget": True}, "`budget` .* but it is True"),
    "unknown variant": ({"variant": "harp-d"}, "`variant` must be one of harp-c, harp-e, but it is 'harp-d'"),
    "unknown prior": ({"prior": "flat"}, "`prior` must be one of smooth, nested, but it is 'flat'"),
    "unknown metric": ({"metric": "bleu"}, "`metric` must be one of auto, .*exact_match, .* but it is 'bleu'"),
    "leaves of 1": ({"leaf_size": 1}, "`leaf_size` must be a whole number of at least 2, but it is 1"),
    "leaves of None": ({"leaf_size": None}, "`leaf_size` must be a whole number of at least 2, but it is None"),
    "branching of 1": ({"branching": 1}, "`branching` must be a whole number of at least 2"),
    "no measurements": ({"max_measurements": 0}, "`max_measurements` must be a whole number of at least 1"),
    "no repeats": ({"num_repeats": 0}, "`num_repeats` must be a whole number of at least 1"),
    "no steps": ({"max_steps": 0, "num_train_epochs": 0}, "no steps: set `max_steps`"),
    "no active tasks": ({"active_tasks": []}, "`active_tasks` is empty"),
    "packing into nothing": ({"packing": True, "max_length": None}, "`packing` needs a `max_length`"),
    "no preparation": (
        {"dataset_kwargs": {"skip_prepare_dataset": True}},
        "`skip_prepare_dataset` cannot be used: TRL tokenises",
    ),
    "negative weight": ({"task_weights": {"red": -1}}, "The weight of task 'red' .* but it is -1"),
    "weight in words": ({"task_weights": {"red": "much"}}, "The weight of task 'red' .* but it is 'much'"),
    "weight of NaN": ({"task_weights": {"red": float("nan")}}, "The weight of task 'red' .* but it is nan"),
    "weights in a list": ({"task_weights": [1, 2]}, r"`task_weights` must be a dict or a JSON object.* \[1, 2\]"),
    "weights in broken JSON": ({"task_weights": '{"red": 1'}, "`task_weights` must be a dict or a JSON object"),
}


@pytest.mark.parametrize("case", BAD_SETTINGS)
def test_a_setting_that_cannot_be_used(case):
    settings, match = BAD_SETTINGS[case]
    refusal(ConfigError, match, lambda: HarpConfig(use_cpu=True, **settings))


@pytest.mark.parametrize("weights", ['{"red": 2, "green": 0}', {"red": 2, "green": 0}, None])
@pytest.mark.parametrize("active", ["all", ["all"], ("all",)])
def test_settings_in_every_form_that_can_be_used(weights, active):
    args = HarpConfig(use_cpu=True, task_weights=weights, active_tasks=active, budget=None)
    assert args.task_weights == (weights and {"red": 2, "green": 0})
    assert args.active_tasks == ["all"]


def test_settings_in_numbers_of_numpy():
    args = HarpConfig(use_cpu=True, budget=np.int64(5), leaf_size=np.int32(8), task_weights={"a": np.float32(0.5)})
    assert [type(v) for v in (args.budget, args.leaf_size, args.task_weights["a"])] == [int, int, float]
    assert (args.budget, args.leaf_size, args.task_weights) == (5, 8, {"a": 0.5})
    with pytest.raises(ConfigError, match="`budget` must be a whole number"):
        HarpConfig(use_cpu=True, budget=np.float32(5))


BAD_CHOICES = {
    "weight of an unknown task": ({"task_weights": {"rad": 1}}, "`task_weights` names the task 'rad'.* red, green"),
    "unknown active task": ({"active_tasks": ["rad"]}, "`active_tasks` names the task 'rad'.* are red, green"),
    "all weights 0": ({"task_weights": {"red": 0, "green": 0}}, "All tasks have the weight 0"),
    "all active weights 0": ({"task_weights": {"red": 0}, "active_tasks": ["red"]}, "All tasks have the weight 0"),
    "unknown end token": ({"eos_token": "<end>"}, "`eos_token` is '<end>', which is not in the vocabulary"),
    "no chat template there": ({"chat_template_path": "a.jinja"}, "`chat_template_path` must be .*'a.jinja'"),
    "chat template of a model": ({"chat_template_path": "some/model"}, "`chat_template_path` must be .*'some/model'"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_CHOICES)
def test_a_setting_that_does_not_fit_the_data_or_the_tokenizer(case, refused):
    settings, match = BAD_CHOICES[case]
    refused(ConfigError, match, settings=settings)


BAD_OBJECTS = {
    "args in a dict": ({"args": {"budget": 3}}, "`args` must be a HarpConfig, not dict"),
    "no model": ({"model": None}, "A model is needed"),
    "a number as model": ({"model": 3}, "`model` must be a str or a PreTrainedModel, not int"),
    "adapter in a dict": ({"peft_config": {"r": 4}}, "`peft_config` must be a PeftConfig, not dict"),
    "name as tokenizer": ({"processing_class": "gpt2"}, "must be a PreTrainedTokenizerBase, not str"),
    "model path that is not there": ({"model": "/no/model"}, "'/no/model' cannot be loaded: there is no such folder"),
    "model that is not on the Hub": ({"model": "nobody/nothing"}, "'nobody/nothing' cannot be loaded: We couldn't"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_OBJECTS)
def test_an_argument_of_the_wrong_kind(case, refused):
    changes, match = BAD_OBJECTS[case]
    refused(ConfigError, match, **changes)


@pytest.mark.parametrize("name", ["tokenizer.json", "model.safetensors"])
def test_a_model_folder_with_a_damaged_file(name, measure, tiny_model, tmp_path):
    shutil.copytree(tiny_model, tmp_path / "model")
    (tmp_path / "model" / name).write_bytes(b"damaged")
    refusal(ConfigError, "model' cannot be loaded", lambda: measure(model=str(tmp_path / "model")))


@pytest.mark.parametrize("what", ["pool", "proxy set"])
def test_messages_with_a_tokenizer_without_chat_template(what, refused, tiny_model):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.chat_template = None
    given = {
        "pool": {"dataset": Dataset.from_list([{"messages": [*MESSAGES, {"role": "assistant", "content": "a"}]}])},
        "proxy set": {"eval_dataset": Dataset.from_list([{"prompt": MESSAGES, "answer": "a"}])},
    }
    refused(DataError, f"The {what} has messages, but .* no chat template", processing_class=tokenizer, **given[what])


def test_columns_that_no_finetune_reads_need_no_chat_template(pool, proxy, tiny_model, config):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.chat_template = None
    pool = pool.add_column("messages", [MESSAGES] * len(pool))
    read_inputs(pool, proxy, tiny_model, config(), processing_class=tokenizer)
    pool = pool.add_column("input_ids", [[5, 6, 7]] * len(pool)).remove_columns("completion")
    read_inputs(pool, proxy, tiny_model, config(), processing_class=tokenizer)


# Features


def with_value(features, row, value):
    features = features.copy()
    features[row, 2] = value
    return features


class Embedder:
    """Stands for a sentence-transformers model that returns what it should not."""

    def __init__(self, vectors):
        self.vectors = vectors

    def encode(self, texts, **_):
        return self.vectors[: len(texts)]


BAD_FEATURES = {
    "NaN": (lambda f: with_value(f, 5, np.nan), "Row 5 of the features holds a value that is not finite"),
    "infinity": (lambda f: with_value(f, 95, np.inf), "Row 95 of the features holds a value that is not finite"),
    "too large for float32": (lambda f: with_value(f, 2, 1e300), "Row 2 of the features"),
    "too few rows": (lambda f: f[:-1], r"shape \(95, 6\), but \(96, d\) is needed for a pool of 96 rows"),
    "one number a row": (lambda f: f[:, 0], r"shape \(96,\), but \(96, d\) is needed"),
    "no dimensions": (lambda f: f[:, :0], r"shape \(96, 0\), but \(96, d\) is needed"),
    "words": (lambda f: f.astype(str), "The features must be numbers, but they are <U"),
    "a list": (lambda f: f.tolist(), "`features` must be .* not list"),
    "column of words": (lambda f: "prompt", "The column 'prompt' does not hold one vector of the same length"),
    "model that is not there": (lambda f: "/no/embedder", "'/no/embedder' is neither a column .* nor .* that loads: "),
    "model that encodes too few": (lambda f: Embedder(f[:90]), r"Embedder.encode\(\) made .* \(90, 6\) of 96 texts"),
    "model that encodes numbers": (lambda f: Embedder(f[:, 0]), r"shape \(96,\) of 96 texts"),
    "model that encodes NaN": (lambda f: Embedder(with_value(f, 5, np.nan)), "Row 5 of the features"),
}


@pytest.mark.filterwarnings("ignore:overflow")
@pytest.mark.parametrize("case", BAD_FEATURES)
def test_features_that_cannot_be_used(case, measure, features, tmp_path):
    spoil, match = BAD_FEATURES[case]
    refusal(DataError, match, lambda: measure(features=spoil(features)))
    assert not list((tmp_path / "run").rglob("*.np[yz]"))
    assert not list((tmp_path / "run").rglob("*.part"))


@pytest.mark.parametrize(
    "vectors", [[[1.0, 2.0]] * 95 + [[1.0]], [[1.0, 2.0]] * 95 + [None], [1.0] * 96], ids=["ragged", "missing", "flat"]
)
def test_a_column_without_one_vector_a_row(vectors, measure, pool):
    pool = pool.add_column("vector", vectors)
    refusal(DataError, "(column 'vector'|features have shape)", lambda: measure(dataset=pool, features="vector"))


BAD_VECTORS = {
    "NaN": (lambda v: with_value(v, 5, np.nan).tolist(), "Row 5 of the proxy set's features holds a value that is"),
    "narrower": (lambda v: v[:, :5].tolist(), "Row 0 of the proxy set has no vector of 6 numbers in 'vector'"),
    "ragged": (lambda v: [*v.tolist()[:15], [1.0]], "Row 15 of the proxy set has no vector of 6 numbers"),
    "missing": (lambda v: [*v.tolist()[:7], None, *v.tolist()[8:]], "Row 7 of the proxy set has no vector"),
    "missing number": (lambda v: [*v.tolist()[:15], [1.0] * 5 + [None]], "Row 15 .* holds a value that is not finite"),
    "words": (lambda v: ["red"] * 16, "Row 0 of the proxy set has no vector"),
    "lists of words": (lambda v: [["red"] * 6] * 16, "Row 0 of the proxy set has no vector"),
    "one number a row": (lambda v: [1.0] * 16, "Row 0 of the proxy set has no vector"),
}


@pytest.mark.parametrize("case", BAD_VECTORS)
def test_a_proxy_set_without_one_vector_a_row_like_the_pools(case, measure, pool, proxy, features):
    spoil, match = BAD_VECTORS[case]
    given = {"dataset": pool.add_column("vector", features.tolist()), "features": "vector"}
    refusal(DataError, match, lambda: measure(eval_dataset=proxy.add_column("vector", spoil(features[:16])), **given))


def test_a_refused_call_has_no_claim_on_its_directory(measure, features):
    refusal(DataError, "Row 5", lambda: measure(features=with_value(features, 5, np.nan)))
    assert len(measure(features=features).pool) == 96


# Metrics and null scores


def named(name, function):
    function.__qualname__ = name
    return function


BAD_METRICS = {
    "unknown name": ("rouge", ConfigError, "The metric 'rouge' is not known; use one of exact_match, "),
    "unknown task": ({"rad": "contains"}, ConfigError, "`metric` names the task 'rad'"),
    "unknown name for a task": ({"red": "rouge"}, ConfigError, "The metric 'rouge' is not known"),
    "choice without choices": ("choice", ConfigError, "Task 'red' cannot be scored by 'choice'.*no choices"),
    "answer without number": (
        "numeric", DataError, r"Row 0 .* \(task 'red'\) has the answer ' crimson', which holds no number",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_METRICS)
def test_a_metric_that_does_not_fit(case, refused):
    metric, kind, match = BAD_METRICS[case]
    refused(kind, match, metric=metric)


BAD_CALLABLES = {
    "too few": (lambda completions, **_: [1.0], "The metric judge returned 1 scores for 16 texts"),
    "none": (lambda completions, **_: None, "The metric judge returned NoneType, but a list of scores is needed"),
    "above 1": (
        lambda completions, **_: [2.0] * 16,
        r"The metric judge scored row 0 2.0, .* not a number in \[0, 1\]",
    ),
    "below 0": (lambda completions, **_: [0.5] * 15 + [-0.1], "The metric judge scored row 1?[0-9] -0.1"),
    "NaN": (lambda completions, **_: [float("nan")] * 16, "The metric judge scored row 0 nan"),
    "words": (lambda completions, **_: ["good"] * 16, "The metric judge scored row 0 'good'"),
}


@pytest.mark.parametrize("case", BAD_CALLABLES)
def test_a_callable_metric_that_returns_no_scores(case, measure, tmp_path):
    metric, match = BAD_CALLABLES[case]
    refusal(DataError, match, lambda: measure(metric=named("judge", metric)))
    assert not (tmp_path / "run" / "base.npz").exists()


BAD_NULL_SCORES = {
    "too few": (np.zeros(15), r"null scores have shape \(15,\), but the proxy set has 16 rows"),
    "above 1": ([0.5] * 15 + [1.5], r"The null scores hold 1.5, which is not a number in \[0, 1\]"),
    "NaN": (np.full(16, np.nan), "The null scores hold nan"),
    "unknown task": ({"red": 0, "green": 0, "rad": 0}, "The null scores name the task 'rad'"),
    "missing task": ({"red": 0}, "Task 'green' has 0 null scores; it needs one, or one for each of its 8 rows"),
    "words for a task": ({"red": 0, "green": "low"}, "The null scores of task 'green' hold 'low'"),
    "list for a task": ({"red": 0, "green": [0.5] * 8}, "The null scores of task 'green' hold"),
    "path that is not there": ("null.jsonl", "The null scores null.jsonl cannot be read: .*No such file"),
}


@pytest.mark.parametrize("case", BAD_NULL_SCORES)
def test_null_scores_that_cannot_be_used(case, refused):
    null_scores, match = BAD_NULL_SCORES[case]
    refused(DataError, match, null_scores=null_scores)


@pytest.mark.parametrize(
    ("written", "match"),
    [
        (
            b'{"task": "red", "score": 0}\n\n{"task": "green"',
            "Line 3 of .*null.jsonl is not a JSON object with `task`",
        ),
        (b'{"task": "red"}\n', "Line 1 of .*null.jsonl is not a JSON object with `task` and `score`"),
        (b"0.5\n", "Line 1 of .*null.jsonl is not a JSON object"),
        (b'{"task": "red", "score": NaN}\n{"task": "green", "score": 0}\n', "The null scores of task 'red' hold nan"),
        (b"\xff\xfe", "null.jsonl cannot be read: 'utf-8' codec"),
        (b"", "Task 'red' has 0 null scores"),
    ],
)
def test_a_file_of_null_scores_that_cannot_be_used(written, match, refused, tmp_path):
    (tmp_path / "null.jsonl").write_bytes(written)
    refused(DataError, match, null_scores=str(tmp_path / "null.jsonl"))


# The run directory

_finished = {}


@pytest.fixture
def finished(measure, tmp_path, tmp_path_factory):
    """A run directory of `measure()`, really measured once."""
    if not _finished:
        measure()
        _finished["run"] = shutil.copytree(tmp_path / "run", tmp_path_factory.mktemp("finished") / "run")
    run = shutil.copytree(_finished["run"], tmp_path / "run", dirs_exist_ok=True)
    config = yaml.safe_load((run / "config.yaml").read_text()) | {"output_dir": str(run)}
    (run / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    return run


def test_a_finished_run_is_continued_without_computing_anything(measure, finished):
    before = {p.name: p.stat().st_mtime_ns for p in finished.rglob("*.np[yz]") if p.parent.name != "result"}
    measure()
    assert {p.name: p.stat().st_mtime_ns for p in finished.rglob("*.np[yz]") if p.parent.name != "result"} == before


def with_other_weights(model, folder):
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(model)
    loaded.lm_head.weight.data += 1
    loaded.save_pretrained(shutil.copytree(model, folder / "other"))
    return str(folder / "other")


OTHER_RUNS = {
    "pool": (lambda given: {"dataset": with_row(given["pool"], 50, completion=" other")}, "with another pool"),
    "order of the pool": (lambda given: {"dataset": given["pool"].select(range(95, -1, -1))}, "with another pool"),
    "proxy set": (lambda given: {"eval_dataset": with_row(given["proxy"], 3, answer="azure")}, "another proxy set"),
    "model": (lambda given: {"model": with_other_weights(given["model"], given["folder"])}, "another model, adapter"),
    "adapter": (lambda given: {"peft_config": LoraConfig(r=4, task_type="CAUSAL_LM")}, "another model, adapter"),
    "features": (lambda given: {"features": given["features"] + 1}, "with another choice of features"),
    "learning rate": (lambda given: {"settings": {"learning_rate": 0.5}}, "with learning_rate=0.03, not 0.5"),
    "size of the leaves": (lambda given: {"settings": {"leaf_size": 20}}, "with leaf_size=12, not 20"),
    "seed": (lambda given: {"settings": {"seed": 1}}, "with seed=42, not 1"),
    "metric": (
        lambda given: {"metric": "contains"},
        r"with metric=\['exact_match', 'exact_match'\], not \['contains'",
    ),
    "null scores": (lambda given: {"null_scores": {"red": 0, "green": 1}}, "with null_scores=None, not"),
}


@pytest.mark.parametrize("case", OTHER_RUNS)
def test_the_directory_of_another_run(case, measure, finished, pool, proxy, features, tiny_model, tmp_path):
    change, match = OTHER_RUNS[case]
    given = {"pool": pool, "proxy": proxy, "features": features, "model": tiny_model, "folder": tmp_path}
    before = files(finished)
    refusal(RunDirError, f"run .*{match}.*; use another `output_dir`, or delete", lambda: measure(**change(given)))
    assert files(finished) == before


DAMAGES = {
    "manifest cut short": ("manifest.json", lambda old: old[:50]),
    "manifest of another kind": ("manifest.json", lambda old: b"[]"),
    "binary manifest": ("manifest.json", lambda old: b"\xff\xfe"),
    "one changed digit": ("manifest.json", lambda old: old.replace(b'"leaf_size": 12', b'"leaf_size": 13')),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_a_damaged_manifest(case, measure, finished):
    name, damage = DAMAGES[case]
    (finished / name).write_bytes(damage((finished / name).read_bytes()))
    before = files(finished)
    refusal(RunDirError, f"{name} is damaged; use another `output_dir`, or delete", measure)
    assert files(finished) == before


def test_a_full_disk_leaves_everything_as_it_was(measure, finished, monkeypatch):
    def fsync(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    before = files(finished)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        refusal(RunDirError, "cannot be written: No space left on device", measure)
    assert files(finished) == before, "no half-written file is left, nor an old one lost"


def test_a_disk_that_fills_up_while_a_measurement_is_written(measure, finished, monkeypatch):
    lost = min((finished / "measurements").iterdir())
    was = lost.read_bytes()
    lost.unlink()

    def savez(handle, **_):
        handle.write(was[:100])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    before = files(finished)
    with monkeypatch.context() as patch:
        patch.setattr(np, "savez", savez)
        refusal(RunDirError, f"{lost.name} cannot be written: No space left on device", measure)
    assert files(finished) == before
    measure()
    with np.load(lost) as again, np.load(_finished["run"] / "measurements" / lost.name) as first:
        assert np.array_equal(again["scores"], first["scores"])


def test_a_run_directory_under_a_file(measure, tmp_path):
    (tmp_path / "file").write_text("no folder")
    inside = str(tmp_path / "file" / "run")
    refusal(RunDirError, "file/run cannot be created: Not a directory", lambda: measure({"output_dir": inside}))
    assert (tmp_path / "file").read_text() == "no folder"


def test_a_run_directory_that_cannot_be_written(measure, finished, monkeypatch):
    before = files(finished)
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    refusal(RunDirError, "The run directory .*run cannot be written", measure)
    assert files(finished) == before


# Results


def test_a_result_that_is_not_there(tmp_path):
    refusal(HarpError, "nowhere is not there", lambda: harp_hf.load_result(tmp_path / "nowhere"))


def test_the_result_of_an_unfinished_run(finished, pool):
    shutil.rmtree(finished / "result")
    refusal(RunDirError, "run holds no finished run: result/result.json", lambda: harp_hf.load_result(finished, pool))


def test_a_folder_that_is_no_run_stays_as_it_is(tmp_path, pool):
    refusal(RunDirError, "holds no finished run", lambda: harp_hf.load_result(tmp_path, pool))
    assert not list(tmp_path.iterdir())


def test_a_result_with_another_pool(finished, pool):
    other = with_row(pool, 50, completion=" other")
    refusal(
        DataError, "The pool is not the one that .*run was measured on", lambda: harp_hf.load_result(finished, other)
    )


def test_a_result_whose_pool_was_in_memory(finished):
    refusal(DataError, "was an object in memory: pass it as `dataset`", lambda: harp_hf.load_result(finished))


@pytest.mark.parametrize("name", ["result.json", "arrays.npz", "seconds.json"])
def test_a_damaged_result(name, finished, pool):
    path = finished / "result" / name
    path.write_bytes(path.read_bytes()[:-40])
    refusal(RunDirError, f"result/{name} is damaged", lambda: harp_hf.load_result(finished, pool))


@pytest.mark.parametrize("row", [-1, 96])
def test_explaining_a_row_that_is_not_there(row, finished, pool):
    result = harp_hf.load_result(finished, pool)
    refusal(DataError, f"Row {row} is not in the pool of 96 rows", lambda: result.explain(row))


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"variant": "harp-d"}, "`variant` must be one of harp-c, harp-e"),
        ({"budget": 0}, "`budget` must be a whole number of at least 1"),
        ({"task_weights": {"rad": 1}}, "There is no task 'rad'; the tasks are red, green"),
        ({"active_tasks": ["rad"]}, "There is no task 'rad'; the tasks are red, green"),
        ({"task_weights": {"red": 0, "green": 0}, "active_tasks": "all"}, "All active tasks have the weight 0"),
    ],
)
def test_a_choice_that_cannot_be_made(changes, match, finished, pool):
    result = harp_hf.load_result(finished, pool)
    refusal(ConfigError, match, lambda: result.select(**changes))


def test_a_model_folder_is_known_by_its_files_alone(tiny_model, tmp_path, monkeypatch):
    shutil.copytree(tiny_model, tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    known = describe_model("model")
    (tmp_path / "model" / ".cache" / "huggingface").mkdir(parents=True)  # as `hf download --local-dir` leaves it
    (tmp_path / "model" / "dangling.txt").symlink_to("nowhere")
    assert describe_model("model") == describe_model("model/") == describe_model("./model") == known
    (tmp_path / "model" / "config.json").write_text("{}")
    assert describe_model("model") != known


def test_a_process_that_sees_several_gpus_trains_on_one(config, monkeypatch):
    real = TrainingArguments._setup_devices.func

    def several(args):
        device = real(args)
        args._n_gpu = 4
        return device

    monkeypatch.setattr(TrainingArguments, "_setup_devices", property(several))
    args = config(per_device_train_batch_size=8)
    monkeypatch.undo()
    assert (args.n_gpu, args.train_batch_size) == (1, 8)
