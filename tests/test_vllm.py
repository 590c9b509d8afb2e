"""vLLM as evaluator: what it is asked, against a stand-in made of transformers; and, marked, the real engine."""

import subprocess
import sys
import textwrap
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ANSWERS, make_rows
from datasets import Dataset
from peft import LoraConfig, PeftModel, PrefixTuningConfig, TaskType
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from harp_hf import HarpConfig, measure
from harp_hf.errors import ConfigError, FinetuneError, MissingExtraError, RunDirError
from harp_hf.evaluation.backends import choose_backend, open_evaluator
from harp_hf.evaluation.scoring import resolve_metrics
from harp_hf.evaluation.vllm import max_rank
from harp_hf.execution.local import measure_leaves
from harp_hf.execution.record import measurement_file
from harp_hf.finetune import Finetune, LeafFinetuner
from harp_hf.manifest import describe_settings
from harp_hf.models import default_peft_config, load_model, load_tokenizer
from harp_hf.proxy import load_proxy
from harp_hf.rundir import RunDir

LONG = {"red": "crimson red", "green": "emerald", "blue": "azure of the blue"}
METRICS = {name: name for name in ("exact_match", "likelihood", "choice", "contains")}


@pytest.fixture(scope="module")
def wide_model(tiny_model, tmp_path_factory):
    """Folder of a Llama with random weights and heads as wide as vLLM needs them, and the tiny model's tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=64, intermediate_size=64, num_hidden_layers=2, head_dim=32,
            num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=128, tie_word_embeddings=False,
            pad_token_id=0, eos_token_id=1, bos_token_id=1, initializer_range=0.2,
        )
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("models") / "wide"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def adapters(wide_model, tmp_path_factory):
    """The base model, an adapter half trained on string prompts, and one half trained on chats."""
    folder = tmp_path_factory.mktemp("adapters")
    args = HarpConfig(output_dir=str(folder), max_steps=14, learning_rate=2e-2, use_cpu=True, bf16=False)
    model, tokenizer = load_model(wide_model, args), load_tokenizer(wide_model, args)
    rows = [
        {"prompt": row["prompt"], "completion": " " + answer}
        for seed, (colour, answer) in enumerate(LONG.items())
        for row in make_rows(colour, 16, seed)
    ]
    chats = [
        {"prompt": [{"role": "user", "content": row["prompt"]}],
         "completion": [{"role": "assistant", "content": row["completion"].strip()}]} for row in rows
    ]  # fmt: skip
    for name, pool in (("text", rows), ("chat", chats)):
        finetuner = LeafFinetuner(model, Dataset.from_list(pool), args, default_peft_config(), tokenizer)
        finetuner.finetune(np.arange(len(pool)), 0, folder / name)
    return [None, folder / "text", folder / "chat"]


def mixed_rows(count, chat=False):
    """Rows of one task a metric, with answers and choices of several lengths, some of which begin others."""
    random = np.random.default_rng(7)
    rows = []
    for i, (colour, answer) in enumerate(list(LONG.items()) * count):
        extra = " ".join(random.choice(["the", "of", "say", "?"], random.integers(0, 6)))
        prompt = f"{extra} {make_rows(colour, 1, i)[0]['prompt']}".strip()
        rows.append({
            "prompt": [{"role": "user", "content": prompt}] if chat else prompt,
            "answer": answer if i // 4 % 2 else ANSWERS[colour], "task": list(METRICS)[i % 4],
            "choices": [*LONG.values(), *ANSWERS.values()],
        })  # fmt: skip
    return rows


def evaluator(folder, rows, metric, backend, **changes):
    args = HarpConfig(use_cpu=True, bf16=False, backend=backend, max_new_tokens=6, **changes)
    proxy = load_proxy(Dataset.from_list(rows))
    model, tokenizer = load_model(folder, args), load_tokenizer(folder, args)
    metrics = resolve_metrics(metric, proxy)
    return open_evaluator(model, folder, tokenizer, proxy, metrics, default_peft_config(), args)


def assert_alike(found, expected, rows, tolerance):
    """The same scores, but for likelihoods that may differ a little."""
    likelihood = np.array([row["task"] == "likelihood" for row in rows])
    assert np.array_equal(found[:, ~likelihood], expected[:, ~likelihood])
    assert found[:, likelihood] == pytest.approx(expected[:, likelihood], abs=tolerance)


class StandIn:
    """Answers what vLLM's `LLM` is asked in `VllmEvaluator`, request by request and with transformers."""

    most = 128

    def __init__(self, model, max_model_len, max_lora_rank, max_loras, **settings):
        self.base, self.settings = AutoModelForCausalLM.from_pretrained(model).eval(), settings
        self.longest, self.rank, self.loras = max_model_len, max_lora_rank, {}
        self.calls, self.sizes = ["start"], []
        StandIn.last = self

    def sleep(self, level):
        self.calls.append(f"sleep {level}")

    def wake_up(self):
        self.calls.append("wake up")

    @torch.inference_mode()
    def generate(self, prompts, params, lora_request, use_tqdm):
        self.calls.append("generate")
        self.sizes.append(len({None if lora is None else lora.name for lora in lora_request}))
        assert len(prompts) == len(params) == len(lora_request)
        return [self._answer(*request) for request in zip(prompts, params, lora_request, strict=True)]

    def _answer(self, prompt, params, lora):
        ids = list(prompt["prompt_token_ids"])
        assert len(ids) + params.max_tokens <= self.longest
        assert params.temperature == 0
        model = self.base if lora is None else self._adapted(lora)
        answer, logprobs = [], []
        while len(answer) < params.max_tokens and not (answer and answer[-1] in params.stop_token_ids):
            following = model(torch.tensor([ids + answer])).logits[0, -1].log_softmax(-1)
            answer.append(int(following.argmax()))
            logprobs.append({t: SimpleNamespace(logprob=float(following[t])) for t in params.logprob_token_ids or ()})
        output = SimpleNamespace(token_ids=tuple(answer), logprobs=logprobs)
        return SimpleNamespace(outputs=[output], num_cached_tokens=0)

    def _adapted(self, lora):
        if lora.name not in self.loras:
            copied = type(self.base)(self.base.config)
            copied.load_state_dict(self.base.state_dict())
            self.loras[lora.name] = lora.id, lora.path, PeftModel.from_pretrained(copied, lora.path).eval()
        number, path, model = self.loras[lora.name]
        assert (number, path) == (lora.id, lora.path), "a name and an id are of one adapter"
        return model


def sampling(max_tokens, stop_token_ids=(), logprob_token_ids=None, **plain):
    assert len(logprob_token_ids or ()) <= StandIn.most
    return SimpleNamespace(
        max_tokens=max_tokens, stop_token_ids=stop_token_ids, logprob_token_ids=logprob_token_ids, **plain
    )


@pytest.fixture
def stand_in(monkeypatch):
    """The stand-in in vLLM's place."""
    vllm, lora, request = (ModuleType(name) for name in ("vllm", "vllm.lora", "vllm.lora.request"))
    vllm.__spec__ = ModuleSpec("vllm", None)
    vllm.LLM, vllm.SamplingParams, vllm.TokensPrompt = StandIn, sampling, dict
    request.LoRARequest = lambda name, number, path: SimpleNamespace(name=name, id=number, path=path)
    for module in (vllm, lora, request):
        monkeypatch.setitem(sys.modules, module.__name__, module)


@pytest.mark.parametrize("chat", [False, True], ids=["text", "chat"])
def test_every_metric_means_what_it_means_with_transformers(stand_in, wide_model, adapters, chat):
    rows = mixed_rows(8, chat)
    found = evaluator(wide_model, rows, METRICS, "vllm")
    expected = evaluator(wide_model, rows, METRICS, "transformers").evaluate(adapters)
    scores = found.evaluate(adapters)
    assert_alike(scores, expected, rows, 1e-5)
    for task in METRICS:
        here = [i for i, row in enumerate(rows) if row["task"] == task]
        assert len(np.unique(scores[:, here])) > 1, f"the rows of {task} really differ"
    assert StandIn.last.sizes == [3], "one call for all adapters"
    assert found.tokens > 0


def test_an_adapter_is_never_served_under_the_name_of_another(stand_in, wide_model, adapters):
    judge = evaluator(wide_model, mixed_rows(2), METRICS, "vllm")
    _, text, chat = adapters
    first = judge.evaluate([text, chat])
    assert np.array_equal(judge.evaluate([chat, text]), first[::-1])
    assert len(StandIn.last.loras) == 4


def test_more_choices_than_one_request_takes(stand_in, wide_model, adapters, monkeypatch):
    monkeypatch.setattr("harp_hf.evaluation.vllm._TOKENS_A_REQUEST", 5)
    monkeypatch.setattr(StandIn, "most", 5)
    choices = [f"w{i}" for i in range(12)] + [f"w3 w{i}" for i in range(12)] + list(LONG.values())
    rows = [{"prompt": row["prompt"], "answer": "crimson red", "choices": choices} for row in make_rows("red", 4, 9)]
    found = evaluator(wide_model, rows, "choice", "vllm").evaluate(adapters)
    assert np.array_equal(found, evaluator(wide_model, rows, "choice", "transformers").evaluate(adapters))


def test_the_engine_sleeps_but_while_it_evaluates(stand_in, wide_model, adapters, monkeypatch):
    proxy = load_proxy(Dataset.from_list(mixed_rows(2)))
    args = HarpConfig(use_cpu=True, backend="vllm", vllm_gpu_memory_utilization=0.4)
    model, tokenizer = load_model(wide_model, args), load_tokenizer(wide_model, args)
    monkeypatch.setattr(HarpConfig, "device", torch.device("cuda"))
    judge = open_evaluator(
        model, wide_model, tokenizer, proxy, resolve_metrics(METRICS, proxy), default_peft_config(), args
    )
    engine = StandIn.last
    assert engine.calls == ["start", "sleep 1"]
    judge.evaluate(adapters[:1])
    assert engine.calls[2:] == ["wake up", "generate", "sleep 1"]
    monkeypatch.setattr(StandIn, "generate", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        judge.evaluate(adapters[:1])
    assert engine.calls[-2:] == ["wake up", "sleep 1"]
    assert engine.settings["enable_sleep_mode"]
    assert engine.settings["gpu_memory_utilization"] == 0.4


def test_an_engine_that_does_not_start_is_one_sentence(stand_in, wide_model, monkeypatch):
    def broken(self, **settings):
        raise RuntimeError("Engine core initialization failed.")

    main = sys.modules["__main__"]
    monkeypatch.setattr(StandIn, "__init__", broken)
    with pytest.raises(ConfigError, match=r"vLLM does not start with the model .*: Engine core init") as raised:
        evaluator(wide_model, mixed_rows(2), METRICS, "vllm")
    assert "set `backend` to 'transformers'" in str(raised.value)
    assert sys.modules["__main__"] is main


@pytest.mark.parametrize("as_object", [False, True], ids=["path", "object"])
def test_a_run_measures_the_same_with_either_backend(
    stand_in, wide_model, pool, proxy, features, config, tmp_path, as_object
):
    def run(backend):
        args = config(backend=backend, vllm_max_loras=3, output_dir=str(tmp_path / backend))
        model = load_model(wide_model, args) if as_object else wide_model
        return measure(pool, proxy, model, args, features=features).measurements

    vllm, plain = run("vllm"), run("transformers")
    assert np.array_equal(vllm.scores, plain.scores)
    assert np.array_equal(vllm.null, plain.null)
    assert vllm.scores.any()
    assert StandIn.last.sizes == [1, 3, 1], "the base model, then four leaves, at most three at once"


def test_scores_of_two_backends_are_not_mixed(stand_in, config, tmp_path):
    metrics = ["exact_match"]
    other = dict.fromkeys(("pool", "proxy", "model", "features"), "")
    plain, served = (
        other | {"settings": describe_settings(config(backend=backend), metrics, None)}
        for backend in ("transformers", "vllm")
    )
    run = RunDir(tmp_path / "run")
    run.claim(served)
    run.write_arrays("base.npz", scores=np.zeros(1))
    run.claim(other | {"settings": describe_settings(config(backend="vllm", vllm_max_loras=2), metrics, None)})
    with pytest.raises(RunDirError, match="backend='vllm'"):
        run.claim(plain)
    assert plain["settings"] == describe_settings(config(backend="auto"), metrics, None)


class Judge:
    """Scores an adapter by the number that was written into its folder."""

    tokens, adapters_at_once = 0, 3

    def __init__(self):
        self.batches = []

    def evaluate(self, adapters):
        self.batches.append(len(adapters))
        self.tokens += 6 * len(adapters)
        return np.array([[float((adapter / "leaf").read_text()) / 10] for adapter in adapters])


class Finetuner:
    """Writes the number of the leaf into the adapter's folder; leaf 4 fails, at leaf 6 the power goes."""

    broken = (6,)

    def finetune(self, rows, seed, adapter):
        leaf = int(rows[0])
        if leaf in self.broken:
            raise KeyboardInterrupt
        if leaf == 4:
            raise FinetuneError("too short")
        adapter.mkdir()
        (adapter / "leaf").write_text(str(leaf))
        return Finetune(rows, 1, 1, 0.5)


def test_leaves_are_finetuned_then_scored_together_and_kept(tmp_path):
    run, judge, finetuner = RunDir(tmp_path), Judge(), Finetuner()
    todo = [(leaf, 0) for leaf in (1, 2, 3, 4, 5, 7, 6, 8)]

    def go():
        measure_leaves(run, todo, lambda leaf: np.array([leaf]), lambda: finetuner, lambda: judge)

    with pytest.raises(KeyboardInterrupt):
        go()
    assert judge.batches == [3, 2], "a failed leaf is not scored"
    kept = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "measurements").iterdir()}
    assert len(kept) == 6, "what was scored before is kept"
    finetuner.broken = ()
    go()
    assert judge.batches == [3, 2, 2], "and not measured again"
    assert all((tmp_path / "measurements" / name).stat().st_mtime_ns == made for name, made in kept.items())
    found = {leaf: run.read_arrays(measurement_file(leaf, 0)) for leaf, _ in todo}
    assert str(found.pop(4)["reason"]) == "too short"
    assert {leaf: float(one["scores"][0]) for leaf, one in found.items()} == {leaf: leaf / 10 for leaf in found}
    assert sum(float(one["tokens_evaluation"]) for one in found.values()) == pytest.approx(judge.tokens)


@pytest.mark.parametrize(
    ("settings", "rank"),
    [({"r": 1}, 8), ({"r": 16}, 16), ({"r": 17}, 32), ({"r": 8, "rank_pattern": {"q_proj": 65}}, 128),
     ({"r": 300}, 320)],
)  # fmt: skip
def test_the_rank_cap_holds_every_module(settings, rank):
    assert max_rank(LoraConfig(**settings)) == rank


@pytest.mark.parametrize(
    ("settings", "named"),
    [({"use_dora": True}, "use_dora=True"), ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
     ({"bias": "all"}, "bias='all'"), ({"r": 513}, "up to rank 512, not 513")],
)  # fmt: skip
def test_adapters_that_vllm_does_not_serve_are_named(settings, named):
    with pytest.raises(ConfigError, match=named):
        max_rank(LoraConfig(**settings))


def test_only_lora_is_served():
    with pytest.raises(ConfigError, match="not PrefixTuningConfig: set `backend` to 'transformers'"):
        max_rank(PrefixTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=2))


def test_auto_is_vllm_where_it_is_installed_with_a_gpu(stand_in, monkeypatch):
    plain, asked = HarpConfig(use_cpu=True), HarpConfig(use_cpu=True, backend="transformers")
    assert choose_backend(plain) == "transformers"
    monkeypatch.setattr(HarpConfig, "device", torch.device("cuda"))
    assert choose_backend(plain) == "vllm"
    assert choose_backend(asked) == "transformers"
    plain.model_init_kwargs = {"quantization_config": object()}
    assert choose_backend(plain) == "transformers"
    plain.model_init_kwargs = None
    monkeypatch.setattr(HarpConfig, "world_size", 2)
    assert choose_backend(plain) == "transformers"


def test_a_backend_that_cannot_be_used_is_named(stand_in, monkeypatch):
    args = HarpConfig(use_cpu=True, backend="vllm", model_init_kwargs={"quantization_config": {"load_in_4bit": True}})
    with pytest.raises(ConfigError, match="would not quantise"):
        choose_backend(args)
    args.model_init_kwargs = None
    monkeypatch.setattr(HarpConfig, "world_size", 2)
    with pytest.raises(ConfigError, match="one process"):
        choose_backend(args)
    for name in [name for name in sys.modules if name.split(".")[0] == "vllm"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr("harp_hf.evaluation.backends.find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r'pip install "harp-hf\[vllm\]"'):
        choose_backend(args)


@pytest.mark.parametrize(
    ("settings", "named"),
    [({"backend": "tgi"}, "`backend` must be one of auto, transformers, vllm"),
     ({"vllm_max_loras": 0}, "`vllm_max_loras`"), ({"vllm_gpu_memory_utilization": 0.0}, r"must be in \(0, 1\]")],
)  # fmt: skip
def test_settings_are_checked(settings, named):
    with pytest.raises(ConfigError, match=named):
        HarpConfig(use_cpu=True, **settings)


needs_vllm = pytest.mark.skipif(find_spec("vllm") is None, reason="needs vLLM")


@pytest.mark.vllm
@needs_vllm
def test_the_engine_agrees_with_transformers_and_with_itself(wide_model, adapters):
    rows = mixed_rows(8, chat=True)
    judge = evaluator(wide_model, rows, METRICS, "vllm")
    first, again = judge.evaluate(adapters), judge.evaluate(adapters)
    expected = evaluator(wide_model, rows, METRICS, "transformers").evaluate(adapters)
    assert_alike(first, expected, rows, 1e-3)
    assert_alike(again, first, rows, 1e-5)
    assert len({scores.tobytes() for scores in first}) == 3, "base and adapters really differ"


SCRIPT = """
    import numpy as np
    from datasets import load_dataset
    from harp_hf import HarpConfig, measure

    pool, proxy = (load_dataset("json", data_files=f"{{name}}.jsonl", split="train") for name in ("pool", "proxy"))
    args = HarpConfig(
        output_dir="vllm", leaf_size=12, branching=2, max_measurements=3, max_steps=12, learning_rate=3e-2,
        use_cpu=True, bf16=False, backend="vllm", vllm_max_loras=2,
    )
    measured = measure(pool, proxy, {model!r}, args, features=np.load("features.npy")).measurements
    np.savez("measured.npz", scores=measured.scores, null=measured.null)
"""


@pytest.mark.vllm
@needs_vllm
def test_a_script_without_a_main_guard_measures(wide_model, pool, proxy, features, config, tmp_path):
    for name, rows in (("pool", pool), ("proxy", proxy)):
        rows.to_json(tmp_path / f"{name}.jsonl")
    np.save(tmp_path / "features.npy", features)
    (tmp_path / "script.py").write_text(textwrap.dedent(SCRIPT.format(model=wide_model)))
    done = subprocess.run([sys.executable, "script.py"], cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    plain = measure(pool, proxy, wide_model, config(max_measurements=3, bf16=False), features=features).measurements
    with np.load(Path(tmp_path) / "measured.npz") as found:
        assert np.mean(found["scores"] == plain.scores) > 0.9
        assert np.array_equal(found["null"], plain.null)
