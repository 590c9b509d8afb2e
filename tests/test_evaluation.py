"""Scores against independent arithmetic: plain forwards without padding or cache, and real greedy generation."""

import hashlib
from decimal import Decimal
from functools import partial

import numpy as np
import pytest
import torch
from conftest import ANSWERS, make_rows
from datasets import Dataset
from peft import PeftModel
from tokenizers import Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from tqdm.auto import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from harp_hf import HarpConfig
from harp_hf.errors import DataError
from harp_hf.evaluation.rows import ProxyRows
from harp_hf.evaluation.scoring import identify_metrics, last_number, resolve_metrics, score_text
from harp_hf.evaluation.transformers import TransformersEvaluator
from harp_hf.finetune import LeafFinetuner
from harp_hf.models import default_peft_config, load_model, load_tokenizer
from harp_hf.proxy import load_proxy

LONG = {"red": "crimson red", "green": "emerald", "blue": "azure of the blue"}


def asked(prompt, **columns):
    """One proxy row; a chat prompt where `prompt` is a list."""
    return {"prompt": prompt} | columns


def as_chat(prompt):
    return [{"role": "user", "content": prompt}]


@pytest.fixture(scope="module")
def model(tiny_model):
    return load_model(tiny_model, HarpConfig(use_cpu=True, bf16=False))


@pytest.fixture(scope="module")
def tokenizer(tiny_model):
    return load_tokenizer(tiny_model, HarpConfig(use_cpu=True))


@pytest.fixture(scope="module")
def adapters(model, tokenizer, tmp_path_factory):
    """An adapter half trained on string prompts, one half trained on chats, and one that learned nothing."""
    folder = tmp_path_factory.mktemp("adapters")
    rows = [
        {"prompt": row["prompt"], "completion": " " + answer}
        for seed, (colour, answer) in enumerate(LONG.items())
        for row in make_rows(colour, 16, seed)
    ]
    chats = [
        {"prompt": as_chat(row["prompt"]),
         "completion": [{"role": "assistant", "content": row["completion"].strip()}]} for row in rows
    ]  # fmt: skip
    made = {}
    for name, pool, steps, rate in (("text", rows, 14, 2e-2), ("chat", chats, 14, 2e-2), ("idle", rows, 1, 0.0)):
        args = HarpConfig(output_dir=str(folder), max_steps=steps, learning_rate=rate, use_cpu=True, bf16=False)
        finetuner = LeafFinetuner(model, Dataset.from_list(pool), args, default_peft_config(), tokenizer)
        finetuner.finetune(np.arange(len(pool)), 0, folder / name)
        made[name] = folder / name
    return made


def questions(chat, count=12):
    """Prompts of different lengths about every colour."""
    random = np.random.default_rng(5)
    prompts = []
    for colour in LONG:
        for row in make_rows(colour, count, 99):
            extra = " ".join(random.choice(["the", "of", "say", "?"], random.integers(0, 6)))
            prompts.append((colour, f"{extra} {row['prompt']}".strip()))
    return [(colour, as_chat(prompt) if chat else prompt) for colour, prompt in prompts]


def evaluator(model, tokenizer, rows, metric="auto", batch_size=8, max_new_tokens=16):
    proxy = load_proxy(Dataset.from_list(rows))
    return TransformersEvaluator(model, tokenizer, proxy, resolve_metrics(metric, proxy), batch_size, max_new_tokens)


def under(model, adapter):
    """A fresh copy of the base model, by itself or with an adapter."""
    copied = type(model)(model.config)
    copied.load_state_dict(model.state_dict())
    return (copied if adapter is None else PeftModel.from_pretrained(copied, str(adapter))).eval()


def prompt_ids(tokenizer, prompt):
    if isinstance(prompt, str):
        return tokenizer(prompt)["input_ids"]
    return tokenizer(tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True))["input_ids"]


@torch.inference_mode()
def generated(model, tokenizer, prompt, max_new_tokens=16):
    """Text of one greedy generation and whether it came to its end."""
    ids = prompt_ids(tokenizer, prompt)
    out = model.generate(input_ids=torch.tensor([ids]), do_sample=False, max_new_tokens=max_new_tokens)[0, len(ids) :]
    text, end, _ = tokenizer.decode(out).partition(tokenizer.eos_token)
    return text.strip(), bool(end)


@torch.inference_mode()
def mean_log_probability(model, tokenizer, prompt, answer, end):
    """Mean log-probability a token of the answer, by one plain forward of prompt and answer."""
    ids = prompt_ids(tokenizer, prompt)
    target = tokenizer(answer)["input_ids"] + ([tokenizer.eos_token_id] if end else [])
    logits = model(torch.tensor([ids + target]), use_cache=False).logits[0].double()
    picked = logits.log_softmax(-1)[torch.arange(len(ids) - 1, len(ids) + len(target) - 1), torch.tensor(target)]
    return float(picked.mean())


@pytest.mark.parametrize("chat", [False, True], ids=["text", "chat"])
@pytest.mark.parametrize("trained", [False, True], ids=["base", "adapter"])
def test_exact_match_is_what_greedy_generation_says(model, tokenizer, adapters, chat, trained):
    adapter = adapters["chat" if chat else "text"] if trained else None
    plain = under(model, adapter)
    rows, expected = [], []
    for i, (colour, prompt) in enumerate(questions(chat)):
        text, ended = generated(plain, tokenizer, prompt)
        # Right and wrong ones, prefixes and continuations of what is generated, alone and among several accepted.
        said = text or "wrong"
        accepted = [LONG[colour], said, f"{said} red", " ".join(said.split()[:-1]) or "w1"]
        answers = [accepted[i % 4]] if i % 3 else ["wrong the", accepted[i % 4], "w2"]
        rows.append(asked(prompt, answer=answers))
        expected.append(float(ended and any(text == answer for answer in answers)))
    scores = evaluator(model, tokenizer, rows, "exact_match").evaluate([adapter])[0]
    assert scores.tolist() == expected
    assert 0 in scores
    if trained:
        right = {len(row["answer"][0].split()) for row, score in zip(rows, scores, strict=True) if score}
        assert len(right) > 1, "answers of one token and of several are found right"


@pytest.mark.parametrize("chat", [False, True], ids=["text", "chat"])
def test_likelihood_is_the_mean_probability_of_answer_and_end(model, tokenizer, adapters, chat):
    found = [
        (p, [LONG[c]]) if i % 2 else (p, [ANSWERS[c], "wrong the w3"]) for i, (c, p) in enumerate(questions(chat))
    ]
    rows = [asked(prompt, answer=answers) for prompt, answers in found]
    each = [None, adapters["text"]]
    scores = evaluator(model, tokenizer, rows, "likelihood").evaluate(each)
    for adapter, row_scores in zip(each, scores, strict=True):
        plain = under(model, adapter)
        expected = [max(np.exp(mean_log_probability(plain, tokenizer, p, a, end=True)) for a in answers)
                    for p, answers in found]  # fmt: skip
        assert row_scores == pytest.approx(np.array(expected), abs=1e-5)
    assert scores[0] != pytest.approx(scores[1], abs=1e-3)


@pytest.mark.parametrize("chat", [False, True], ids=["text", "chat"])
def test_choice_is_the_best_log_probability_a_token(model, tokenizer, adapters, chat):
    random = np.random.default_rng(3)
    words = ["red", "crimson red", "emerald", "azure of the blue", "wrong", "w1 w2", "the", "say say say w9 ?"]
    found = []
    for _, prompt in questions(chat):
        choices = random.choice(words, random.integers(2, 6), replace=False).tolist()
        found.append((prompt, choices, str(random.choice(choices))))
    rows = [asked(p, answer=answer, choices=choices) for p, choices, answer in found]
    each = [None, adapters["chat" if chat else "text"]]
    scores = evaluator(model, tokenizer, rows).evaluate(each)
    summed = 0
    for adapter, row_scores in zip(each, scores, strict=True):
        plain = under(model, adapter)
        for (prompt, choices, answer), score in zip(found, row_scores, strict=True):
            means = [mean_log_probability(plain, tokenizer, prompt, c, end=False) for c in choices]
            assert score == (choices[int(np.argmax(means))] == answer)
            totals = [m * len(c.split()) for m, c in zip(means, choices, strict=True)]
            summed += np.argmax(totals) != np.argmax(means)
        probabilities = evaluator(model, tokenizer, rows, "choice_likelihood").evaluate([adapter])[0]
        for (prompt, choices, answer), probability in zip(found, probabilities, strict=True):
            weights = np.exp([mean_log_probability(plain, tokenizer, prompt, c, end=False) for c in choices])
            assert probability == pytest.approx(weights[choices.index(answer)] / weights.sum(), abs=1e-5)
    assert 0 < scores[0].sum() < len(rows)
    assert summed, "the data tells length-normalised from summed log-probabilities"


THINKING = "<think>\n\n</think>\n\n"
TEMPLATES = {
    "lines": "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<eos>\n{% endfor %}"
             "{% if add_generation_prompt %}<|assistant|>\n{% endif %}",
    "spaces": "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
              "{% else %} {{ m.content }} <eos>{% endif %}{% endfor %}",
    "thoughts": "{{ tools | tojson if tools }}{% for m in messages %}<|{{ m.role }}|>\n"
                f"{{% if m.role == 'assistant' %}}{THINKING}{{% endif %}}{{{{ m.content }}}}<eos>\n{{% endfor %}}"
                "{% if add_generation_prompt %}<|assistant|>\n{% if enable_thinking is false %}"
                f"{THINKING}{{% endif %}}{{% endif %}}",
}  # fmt: skip
ASKED = [{"role": "user", "content": "capital of France ?"}]


def metaspace(template):
    """A tokenizer that puts a space before every text, as SentencePiece does, but not inside a conversation."""
    made = Tokenizer(BPE())
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    made.decoder = decoders.Metaspace(prepend_scheme="first")
    special = ["<pad>", "<eos>", "<|user|>", "<|assistant|>"]
    words = [
        "capital of France ? Paris Lima think [INST] [/INST] <think> </think> \n {}[]\"':, type function name"
    ] * 9
    made.train_from_iterator(words, BpeTrainer(vocab_size=200, special_tokens=special))
    made = PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="<eos>")
    made.chat_template = TEMPLATES[template]
    return made


@pytest.mark.parametrize(
    ("template", "columns"),
    [*((template, {}) for template in TEMPLATES), ("thoughts", {"chat_template_kwargs": {"enable_thinking": False}}),
     ("thoughts", {"tools": '[{"type": "function", "function": {"name": "capital"}}]'})],
    ids=[*TEMPLATES, "no thoughts", "tools"],
)  # fmt: skip
def test_conversations_are_scored_as_they_are_trained_on(template, columns, tmp_path):
    tokenizer = metaspace(template)
    row = {"prompt": ASKED, "completion": [{"role": "assistant", "content": "Paris"}], **columns}
    rows = Dataset.from_list([row, row])
    made = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", vocab_size=len(tokenizer), **BASE))
    args = HarpConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False)
    trained = LeafFinetuner(made, rows, args, default_peft_config(), tokenizer).tokenised[0]
    judged = ProxyRows(load_proxy(rows), ["likelihood"], tokenizer, None)
    asked, answered = judged.prompts[0], judged.candidates[0][0]
    assert trained["input_ids"][: len(asked + answered)] == asked + answered
    assert [label == -100 for label in trained["labels"]].index(False) == len(asked)
    assert answered[-1] == tokenizer.eos_token_id
    assert ("function" in tokenizer.decode(asked)) == ("tools" in columns)


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("choices", [["Paris", "Lima"], ["think", "Pa", "Paris"]], ids=" ".join)
def test_choices_are_compared_without_what_stands_before_all_of_them(template, choices):
    tokenizer = metaspace(template)
    row = asked(ASKED, answer="Paris", choices=choices)
    judged = ProxyRows(load_proxy(Dataset.from_list([row])), ["choice"], tokenizer, None)
    for choice, tokens in zip(choices, judged.candidates[0], strict=True):
        assert tokenizer.decode(tokens).strip() == choice
        turn = tokenizer.apply_chat_template(
            [*ASKED, {"role": "assistant", "content": choice}], tokenize=True, return_dict=False
        )
        whole = judged.prompts[0] + tokens
        assert turn[: len(whole)] == whole, "the tokens are those of the whole conversation"
    assert tokenizer.decode(judged.prompts[0]).count("</think>") == (template == "thoughts")


@pytest.mark.parametrize("metric", ["exact_match", "likelihood", "choice", "choice_likelihood"])
def test_what_is_no_number_is_no_score(tokenizer, metric):
    proxy = load_proxy(Dataset.from_list([{"prompt": "red", "answer": "a", "choices": ["a", "b"]}]))
    rows = ProxyRows(proxy, [metric], tokenizer, None)
    assert np.isnan(rows.judge(0, [np.nan, -1.0], True))
    assert 0 < rows.judge(0, [-1.0, -2.0], True) <= 1


def test_automatic_metrics_look_at_the_choices():
    told = {"answer": LONG["red"], "choices": list(LONG.values())}
    rows = [asked("say :", task="with", **told), asked("say :", task="without", **told | {"choices": []})]
    proxy = load_proxy(Dataset.from_list(rows))
    assert resolve_metrics("auto", proxy) == ["choice", "exact_match"]
    assert resolve_metrics("auto_likelihood", proxy) == ["choice_likelihood", "likelihood"]


def mixed_rows():
    """Rows of four tasks, one a metric, in string and chat form."""
    rows = []
    for chat in (False, True):
        for i, (colour, prompt) in enumerate(questions(chat, 4)):
            task = ["exact_match", "likelihood", "choice", "contains"][i % 4]
            rows.append(asked([*as_chat(prompt)] if isinstance(prompt, str) else prompt, answer=LONG[colour],
                              task=task, choices=list(LONG.values())))  # fmt: skip
    return rows


METRIC_BY_TASK = {name: name for name in ("exact_match", "likelihood", "choice", "contains")}


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_scores_do_not_depend_on_batches_or_row_order(model, tokenizer, adapters, batch_size):
    rows = mixed_rows()
    each = [None, adapters["chat"]]
    whole = evaluator(model, tokenizer, rows, METRIC_BY_TASK)
    reference = whole.evaluate(each)
    order = np.random.default_rng(batch_size).permutation(len(rows))
    shuffled = evaluator(model, tokenizer, [rows[i] for i in order], METRIC_BY_TASK, batch_size)
    scores = shuffled.evaluate(each)
    likelihood = np.array([row["task"] == "likelihood" for row in rows])
    assert np.array_equal(scores[:, ~likelihood[order]], reference[:, order][:, ~likelihood[order]])
    assert scores == pytest.approx(reference[:, order], abs=1e-5)
    assert shuffled.tokens == whole.tokens > 0
    assert len(np.unique(reference)) > 4, "the rows really differ"


def test_a_named_bar_counts_scored_and_generated_rows(model, tokenizer, monkeypatch):
    shown = []

    class Bar(tqdm):
        def __exit__(self, *raised):
            shown.extend([] if self.disable else [(self.desc, self.n, self.total)])
            super().__exit__(*raised)

    monkeypatch.setattr("harp_hf.evaluation.transformers.tqdm", Bar)
    rows = [asked(p, answer=LONG[c], task=c) for c, p in questions(chat=False, count=3)]
    judge = evaluator(model, tokenizer, rows, {"red": "exact_match", "green": "contains", "blue": "likelihood"}, 2, 2)
    judge.evaluate([None])
    assert shown == [], "no bar unless it has a name"
    judge.bar = "Test rows"
    judge.evaluate([None])
    assert shown == [("Test rows", 9, 9)]


def test_the_vocabulary_is_projected_in_one_product(model, tokenizer, adapters):
    """After a slice of the hidden states torch may copy the vocabulary's weights for each prompt of a batch."""
    seen = []
    hook = model.get_output_embeddings().register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    try:
        evaluator(model, tokenizer, mixed_rows(), "likelihood", 4).evaluate([None, adapters["text"]])
    finally:
        hook.remove()
    assert len({hidden.shape[0] for hidden in seen}) > 1, "batches of several prompts"
    assert all(hidden.is_contiguous() for hidden in seen)


def digest(model):
    state = sorted(model.state_dict().items())
    return hashlib.sha256(b"".join(k.encode() + v.numpy().tobytes() for k, v in state)).hexdigest()


def test_the_base_model_is_as_before_after_an_adapter(model, tokenizer, adapters):
    before, modules = digest(model), [type(m) for m in model.modules()]
    judge = evaluator(model, tokenizer, mixed_rows(), METRIC_BY_TASK)
    first = judge.evaluate([None])
    adapted = judge.evaluate([adapters["text"], adapters["chat"]])
    assert judge.evaluate([None]).tobytes() == first.tobytes()
    assert judge.evaluate([adapters["text"], adapters["chat"]]).tobytes() == adapted.tobytes()
    assert digest(model) == before
    assert [type(m) for m in model.modules()] == modules
    assert not {"peft_config", "_hf_peft_config_loaded", "active_adapter"} & model.__dict__.keys()


def test_the_base_model_is_as_before_when_an_evaluation_fails(model, tokenizer, adapters):
    def broken(prompts, completions, **columns):
        raise RuntimeError("out of order")

    before = digest(model)
    with pytest.raises(RuntimeError, match="out of order"):
        evaluator(model, tokenizer, mixed_rows(), broken).evaluate([adapters["text"]])
    assert digest(model) == before
    assert "peft_config" not in model.__dict__


def test_base_and_adapters_are_scored_alike(model, tokenizer, adapters):
    scores = evaluator(model, tokenizer, mixed_rows(), METRIC_BY_TASK).evaluate([None, adapters["idle"]])
    assert np.array_equal(scores[0], scores[1]), "an adapter that learned nothing scores what the base model does"


@pytest.mark.parametrize("metric", ["numeric", "contains"])
def test_generated_answers_are_scored_as_text(model, tokenizer, adapters, metric):
    rows, expected = [], []
    plain = under(model, adapters["text"])
    for i, (_, prompt) in enumerate(questions(chat=False)):
        text, _ = generated(plain, tokenizer, prompt)
        answer = str(i) if metric == "numeric" else (text.split() or ["w1"])[-1] if i % 2 else "w39"
        rows.append(asked(prompt, answer=["17", answer]))
        expected.append(score_text(metric, text, ["17", answer]))
    scores = evaluator(model, tokenizer, rows, metric).evaluate([adapters["text"]])[0]
    assert scores.tolist() == expected
    if metric == "contains":
        assert 0 < sum(expected) < len(expected)


def test_generation_stops_at_the_end_of_the_turn(model, tokenizer, adapters):
    seen = []

    def keep(prompts, completions, **columns):
        seen.extend(completions)
        return [0.0] * len(completions)

    rows = [asked(prompt, answer="w1") for _, prompt in questions(chat=False)]
    judge = evaluator(model, tokenizer, rows, keep)
    stops = model.generation_config.eos_token_id
    model.generation_config.eos_token_id = None
    try:
        judge.evaluate([adapters["text"]])
    finally:
        model.generation_config.eos_token_id = stops
    plain = under(model, adapters["text"])
    assert seen == [generated(plain, tokenizer, row["prompt"])[0] for row in rows], (
        "also where the model does not say what ends a turn but its tokenizer does"
    )


@pytest.mark.parametrize("known", [True, False], ids=["known", "unknown"])
def test_an_answer_ends_where_the_chat_template_ends_a_turn(model, tiny_model, adapters, known, monkeypatch):
    """A turn ends with a token that is not the tokenizer's eos: one of the model's, as Gemma's, or not even that, as
    in many a base model."""
    tokenizer = load_tokenizer(tiny_model, HarpConfig(use_cpu=True))
    tokenizer.eos_token = "<unk>"
    if not known:
        monkeypatch.setattr(model.generation_config, "eos_token_id", tokenizer.eos_token_id)
    rows = [asked(prompt, answer=LONG[colour]) for colour, prompt in questions(chat=True)]
    scores = evaluator(model, tokenizer, rows, "exact_match").evaluate([adapters["chat"]])[0]
    texts = []

    def keep(prompts, completions, **columns):
        texts.extend(message["content"] for (message,) in completions)
        return [0.0] * len(completions)

    evaluator(model, tokenizer, rows, keep).evaluate([adapters["chat"]])
    plain = under(model, adapters["chat"])
    original = load_tokenizer(tiny_model, HarpConfig(use_cpu=True))
    monkeypatch.undo()
    expected = [generated(plain, original, row["prompt"]) for row in rows]
    assert scores.tolist() == [found == (row["answer"], True) for found, row in zip(expected, rows, strict=True)]
    assert any(scores)
    assert texts == [text.partition("<unk>")[0].strip() for text, _ in expected], "generation ends there too"


def test_the_end_that_a_tokenizer_gives_every_text_is_no_part_of_a_prompt(model, tiny_model, adapters):
    tokenizer, ending = (load_tokenizer(tiny_model, HarpConfig(use_cpu=True)) for _ in range(2))
    ending._tokenizer.post_processor = processors.TemplateProcessing(single="$A <eos>", special_tokens=[("<eos>", 1)])
    assert ending("say")["input_ids"][-1] == ending.eos_token_id
    rows = [asked(prompt, answer=LONG[colour], choices=[*LONG.values()]) for colour, prompt in questions(chat=False)]
    for metric in ("likelihood", "exact_match", "choice", "contains"):
        scores = [evaluator(model, t, rows, metric).evaluate([adapters["text"]]).tolist() for t in (tokenizer, ending)]
        assert scores[0] == scores[1]
        assert sum(scores[0][0]) > 0


def test_generation_is_greedy_whatever_the_model_would_do_by_itself(model, tokenizer, adapters, monkeypatch):
    rows = [asked(prompt, answer=LONG[colour]) for colour, prompt in questions(chat=False)]
    expected = evaluator(model, tokenizer, rows, "contains").evaluate([adapters["text"]])
    for name, value in {"num_beams": 3, "repetition_penalty": 9.0, "do_sample": True, "temperature": 9.0}.items():
        monkeypatch.setattr(model.generation_config, name, value)
    assert evaluator(model, tokenizer, rows, "contains").evaluate([adapters["text"]]).tolist() == expected.tolist()
    assert 0 < expected.sum() < len(rows)


BASE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 128, "pad_token_id": 0, "eos_token_id": 1,
        "bos_token_id": 1, "initializer_range": 0.3}  # fmt: skip
MODELS = {
    "all attend to all": ("qwen3", BASE | {"head_dim": 8}, True),
    "a window wider than the texts": ("mistral", BASE | {"sliding_window": 64}, True),
    "a narrow window": ("mistral", BASE | {"sliding_window": 6}, False),
    "convolutions": ("lfm2", BASE | {"layer_types": ["conv", "full_attention"], "block_ff_dim": 64,
                                     "block_auto_adjust_ff_dim": False}, False),
    "recurrence": ("mamba2", {"hidden_size": 32, "num_hidden_layers": 2, "num_heads": 8, "head_dim": 8,
                              "state_size": 8, "n_groups": 1, "chunk_size": 8}, False),
    "positions that cannot be told": ("bloom", {"hidden_size": 32, "n_layer": 2, "n_head": 4}, False),
}  # fmt: skip


@pytest.mark.parametrize("case", MODELS)
def test_architectures_are_scored_as_by_plain_forwards(tokenizer, case):
    kind, settings, shares = MODELS[case]
    torch.manual_seed(0)
    made = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, vocab_size=len(tokenizer), **settings)).eval()
    found = [("the " * (i % 3) + prompt, LONG[colour]) for i, (colour, prompt) in enumerate(questions(False, 3))]
    rows = [asked(prompt, answer=answer) for prompt, answer in found]
    judge = evaluator(made, tokenizer, rows, "likelihood", batch_size=4)
    assert judge._shares == shares
    expected = [np.exp(mean_log_probability(made, tokenizer, prompt, answer, end=True)) for prompt, answer in found]
    assert judge.evaluate([None])[0] == pytest.approx(np.array(expected), rel=1e-3)
    assert np.ptp(expected) > 0.05 * max(expected), "they tell a right context from a wrong one"


def test_a_callable_is_called_like_a_reward_function_of_trl(model, tokenizer, adapters):
    calls = []

    def length_reward(prompts, completions, answer, level, **columns):
        calls.append((prompts, completions, answer, level, columns))
        return [min(len(text.split()) / 16, 1) for text in completions]

    found = questions(chat=False, count=4)
    rows = [asked(p, answer=LONG[c], level=i, task="b" if i % 2 else "a") for i, (c, p) in enumerate(found)]
    metric = {"a": length_reward, "b": "exact_match"}
    scores = evaluator(model, tokenizer, rows, metric, batch_size=3).evaluate([adapters["text"]])[0]
    ((prompts, completions, answer, level, columns),) = calls
    wanted = rows[::2]
    assert prompts == [row["prompt"] for row in wanted]
    assert answer == [row["answer"] for row in wanted]
    assert level == [row["level"] for row in wanted]
    assert columns == {"task": ["a"] * len(wanted)}
    plain = under(model, adapters["text"])
    assert completions == [generated(plain, tokenizer, row["prompt"])[0] for row in wanted]
    assert scores[::2].tolist() == [min(len(text.split()) / 16, 1) for text in completions]


@pytest.mark.parametrize(
    ("returned", "message"),
    [([0.5], "returned 1 scores for 2 texts"), ([0.5, 1.5], "scored row 1 1.5"), ([float("nan"), 0], "scored row 0"),
     ([0.5, None], "scored row 1 None")],
)  # fmt: skip
def test_a_callable_that_returns_no_scores_is_named(model, tokenizer, returned, message):
    def odd_metric(prompts, completions, **columns):
        return returned

    rows = [asked("say :", answer="w1"), asked("say :", answer="w2")]
    with pytest.raises(DataError, match=f"odd_metric {message}"):
        evaluator(model, tokenizer, rows, odd_metric).evaluate([None])


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("", None), ("no number", None), ("-", None), ("7", 7), ("first 3 then 4", 4), ("it is -2.", -2), ("+5", 5),
        ("3.14", "3.14"), (".5", "0.5"), ("-.5", "-0.5"), ("5.", 5), ("1,234", 1234), ("$1,234,567.80!", "1234567.8"),
        ("12, 13, ", 13), ("1e3", 1000), ("2.5E-2", "0.025"), ("50%", 50), ("(42)", 42), ("x=-3", -3),
        ("from 10-12", 12), ("2024-05-17", 17), ("#### 72", 72), ("3/4", "0.75"), (r"it is -\frac{3}{4}.", "-0.75"),
        ("17/5/2024", 2024), ("2024/05/17", 17), ("1/0", None), ("-1/2 or 3/4.5", "4.5"), ("\u22123", -3), ("-$5", -5),
        ("1,2,3", 3), ("(1,2)", 2), ("1,2345", 2345), ("12,345/1,000", "12.345"), ("-" + "1" * 40, "-" + "1" * 40),
    ],
)  # fmt: skip
def test_last_number(text, number):
    assert last_number(text) == (None if number is None else Decimal(number))


@pytest.mark.parametrize(
    ("metric", "text", "answers", "score"),
    [
        ("numeric", "so 3 + 4 = 7.0", ["7"], 1), ("numeric", "7 or 8", ["7"], 0), ("numeric", "1e3", ["1,000"], 1),
        ("numeric", "1/4", ["3/4"], 0), ("numeric", "2/6", ["1/3"], 1), ("numeric", "0.75", ["3/4"], 1),
        ("numeric", "none", ["0"], 0), ("numeric", "it is 2", ["1", "2"], 1), ("numeric", "0.1", ["0.10"], 1),
        ("contains", "It is Paris.", ["paris"], 1), ("contains", "Parisian", ["Paris"], 0),
        ("contains", "so-called art", ["art"], 1), ("contains", "part", ["art"], 0), ("contains", "", ["a"], 0),
        ("contains", "the Straße there", ["STRASSE"], 1), ("contains", "un café noir", ["Café"], 1),
        ("contains", "un café noir", ["cafe"], 0), ("contains", "un cafe\u0301 noir", ["caf\u00e9"], 1),
        ("contains", "un cafe\u0301 noir", ["cafe"], 0), ("contains", "the U.S. of A", ["U.S."], 1),
        ("contains", "C++ and C", ["c++"], 1), ("contains", "it costs $5 (five)", ["$5"], 1),
        ("contains", "it costs $50", ["$5"], 0), ("contains", "New York", ["Boston", "new york"], 1),
        ("contains", "答えは東京です", ["東京"], 1), ("contains", "东京2020", ["东京"], 1),
        ("contains", "第3章", ["3"], 1),
        ("contains", "คำตอบคือกรุงเทพ", ["กรุงเทพ"], 1), ("contains", "서울입니다", ["서울"], 1),
        ("contains", "これはiPhonesです", ["iPhone"], 0), ("contains", "これはiPhoneです", ["iPhone"], 1),
        ("contains", "a.b", ["a*b"], 0), ("contains", "yes", [" yes "], 1),
    ],
)  # fmt: skip
def test_score_text(metric, text, answers, score):
    assert score_text(metric, text, answers) == score


def test_a_numeric_answer_without_a_number_is_named():
    with pytest.raises(DataError, match="'seven' holds no number"):
        score_text("numeric", "7", ["7", "seven"])


def test_a_function_is_known_by_its_source():
    def made(source):
        folder = {}
        exec(source, folder)
        return folder["score"]

    def score(completions, **columns):
        return [1.0] * len(completions)

    first = score

    def score(completions, **columns):
        return [0.0] * len(completions)

    names = identify_metrics(["choice", first, score, first, made("def score(**columns): return [0.0]")])
    assert names[0] == "choice"
    assert names[1] == names[3] != names[2]
    assert names[4] == "score", "one without a source is known by its name"


class AtLeast:
    """A metric with a parameter, and something that changes."""

    def __init__(self, words):
        self.words, self.seen = words, []

    def __call__(self, completions, **columns):
        self.seen.extend(completions)
        return [float(len(text.split()) >= self.words) for text in completions]

    def judge(self, completions, **columns):
        return self(completions)


def test_a_callable_is_known_by_its_parameters():
    def at_least(words, seen):
        def score(completions, **columns):
            seen.extend(completions)
            return [float(len(text.split()) >= words) for text in completions]

        return score

    for make in (lambda k: at_least(k, []), AtLeast, lambda k: AtLeast(k).judge,
                 lambda k: partial(score_text, "contains", answers={"a": [k, "b"], "c": {k, "d", "e"}})):  # fmt: skip
        one, same, other = make(1), make(1), make(2)
        before = identify_metrics([one, same, other])
        assert before[0] == before[1] != before[2]
        if not isinstance(one, partial):
            one(["said"])
        assert identify_metrics([one]) == before[:1], "what a call leaves behind is no parameter"
    assert identify_metrics([partial(AtLeast(1), 3)]) != identify_metrics([partial(AtLeast(2), 3)])
    assert identify_metrics([len])[0].startswith("len")
