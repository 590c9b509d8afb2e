"""Leaf finetunes: one base model, a fresh adapter each time."""

import hashlib
import math

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, PromptTuningConfig
from tokenizers import normalizers, processors
from transformers import set_seed
from trl import SFTTrainer

import harp_hf
from harp_hf import HarpConfig
from harp_hf.errors import ConfigError, DataError, FinetuneError
from harp_hf.finetune import LeafFinetuner, LeafTrainer
from harp_hf.manifest import describe_call, describe_settings
from harp_hf.models import check_adapter, default_peft_config, describe_tokenizer, load_model, load_tokenizer


def digest(model):
    state = sorted(model.state_dict().items())
    return hashlib.sha256(b"".join(k.encode() + v.numpy().tobytes() for k, v in state)).hexdigest()


@pytest.fixture
def finetuner(tiny_model, pool, config):
    args = config()
    model = load_model(tiny_model, args)
    return LeafFinetuner(model, pool, args, default_peft_config(), load_tokenizer(tiny_model, args))


@pytest.mark.parametrize("capability", ["avx512_bf16", "amx_bf16", "avx2"])
def test_a_machine_without_accelerator_computes_on_its_cpu_in_bfloat16_where_that_is_fast(monkeypatch, capability):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {capability: True}, raising=False)
    args = HarpConfig()
    assert args.use_cpu
    assert args.bf16 == capability.endswith("bf16")
    assert "use_cpu" not in describe_call(args), "the run may go on, or be repeated, where there is an accelerator"
    assert "use_cpu" not in describe_settings(args, [args.metric], None)
    assert not HarpConfig(executor="ray", ray_gpus_per_worker=1).use_cpu, "a cluster may have what this machine lacks"


def test_base_weights_and_outputs_are_unchanged_by_finetunes(finetuner, tmp_path):
    ids = torch.arange(12)[None]
    before, logits = digest(finetuner.model), finetuner.model(ids).logits
    for seed in (0, 1):
        finetuner.finetune(np.arange(24), seed, tmp_path / f"a{seed}")
    assert digest(finetuner.model) == before
    assert torch.equal(finetuner.model(ids).logits, logits)
    assert "forward" not in vars(finetuner.model)
    assert not any(p.requires_grad for p in finetuner.model.parameters())


def test_gradient_checkpointing_is_switched_off_again(tiny_model, pool, config, tmp_path, monkeypatch):
    args, seen, step = config(gradient_checkpointing=True, max_steps=2), [], LeafTrainer.training_step
    model = load_model(tiny_model, args)
    modules = list(model.modules())
    hooks = [len(module._forward_hooks) for module in modules]

    def on():
        return [module for module in modules if getattr(module, "gradient_checkpointing", False)]

    monkeypatch.setattr(LeafTrainer, "training_step", lambda *given: (seen.append(len(on())), step(*given))[1])
    finetuner = LeafFinetuner(model, pool, args, default_peft_config(), load_tokenizer(tiny_model, args))
    finetuner.finetune(np.arange(24), 0, tmp_path / "a")
    assert min(seen) > 0
    assert on() == []
    assert [len(module._forward_hooks) for module in modules] == hooks


def test_a_model_is_given_back_as_it_was_lent(tiny_model, pool, proxy, features, config):
    model = load_model(tiny_model, config()).train()
    model.lm_head.requires_grad_(False)
    before, seen, real = digest(model), [], LeafFinetuner.finetune

    def finetune(self, rows, seed, adapter):
        done = real(self, rows, seed, adapter)
        seen.append(any(p.requires_grad for p in self.model.parameters()))
        return done

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LeafFinetuner, "finetune", finetune)
        harp_hf.measure(pool, eval_dataset=proxy, model=model, args=config(max_steps=2), features=features)
    assert seen
    assert not any(seen)
    assert digest(model) == before
    assert model.training
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["lm_head.weight"]


def test_a_model_in_memory_comes_to_the_device_of_the_run(tiny_model, config, monkeypatch):
    args, model = config(), load_model(tiny_model, config())
    monkeypatch.setattr(HarpConfig, "device", torch.device("meta"))
    model.hf_device_map = {"": "cpu"}
    assert load_model(model, args).device.type == "cpu", "accelerate has placed it"
    del model.hf_device_map
    assert load_model(model, args).device.type == "meta"


BAD_ADAPTERS = {
    "prompt tuning": (PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4), "is a PromptTuningConfig"),
    "biases": (LoraConfig(bias="all"), "bias='all' trains biases of the base model"),
    "biases of its layers": (LoraConfig(bias="lora_only"), "bias='lora_only' trains biases"),
    "PiSSA": (LoraConfig(init_lora_weights="pissa"), "init_lora_weights='pissa' changes weights of the base model"),
    "OLoRA": (LoraConfig(init_lora_weights="olora"), "init_lora_weights='olora' changes weights"),
}


@pytest.mark.parametrize("case", BAD_ADAPTERS)
def test_an_adapter_that_would_change_the_base_model_is_refused(case, tiny_model, pool, proxy, features, config):
    peft_config, match = BAD_ADAPTERS[case]
    with pytest.raises(ConfigError, match=match):
        harp_hf.measure(pool, eval_dataset=proxy, model=tiny_model, args=config(), features=features,
                        peft_config=peft_config)  # fmt: skip


@pytest.mark.parametrize("start", [True, False, "gaussian", "orthogonal"])
def test_an_adapter_that_starts_beside_the_base_model_leaves_it_as_it_was(tiny_model, pool, config, tmp_path, start):
    args, peft_config = config(max_steps=2), LoraConfig(r=4, target_modules="all-linear", init_lora_weights=start)
    check_adapter(peft_config)
    finetuner = LeafFinetuner(load_model(tiny_model, args), pool, args, peft_config, load_tokenizer(tiny_model, args))
    before = digest(finetuner.model)
    finetuner.finetune(np.arange(24), 0, tmp_path / "a")
    assert digest(finetuner.model) == before


def test_every_leaf_gets_a_fresh_adapter_whatever_was_trained_before(finetuner, tmp_path):
    finetuner.finetune(np.arange(24), 0, tmp_path / "first")
    finetuner.finetune(np.arange(24, 48), 0, tmp_path / "other")
    finetuner.finetune(np.arange(24), 0, tmp_path / "again")
    first, again, other = (
        (tmp_path / n / "adapter_model.safetensors").read_bytes() for n in ("first", "again", "other")
    )
    assert first == again
    assert first != other


def test_adapter_and_settings_of_the_user_are_respected(tiny_model, pool, config, tmp_path):
    args = config(max_steps=3, per_device_train_batch_size=5, learning_rate=0.0)
    peft_config = LoraConfig(r=3, target_modules=["q_proj"], task_type="CAUSAL_LM")
    finetuner = LeafFinetuner(load_model(tiny_model, args), pool, args, peft_config, load_tokenizer(tiny_model, args))
    done = finetuner.finetune(np.arange(24), 0, tmp_path / "a")
    assert done.steps == 3
    adapted = PeftModel.from_pretrained(load_model(tiny_model, args), tmp_path / "a")
    shapes = {k: v.shape for k, v in adapted.named_parameters() if "lora_A" in k}
    assert shapes
    assert all("q_proj" in k and v.shape[0] == 3 for k, v in adapted.named_parameters() if "lora_A" in k)
    assert all((v == 0).all() for k, v in adapted.named_parameters() if "lora_B" in k), (
        "learning rate 0 learns nothing"
    )


def test_rows_really_trained_on_are_recorded(tiny_model, pool, config, tmp_path):
    args = config(max_steps=2, per_device_train_batch_size=4)
    finetuner = LeafFinetuner(
        load_model(tiny_model, args), pool, args, default_peft_config(), load_tokenizer(tiny_model, args)
    )
    few = finetuner.finetune(np.array([7, 3]), 0, tmp_path / "few")
    assert few.rows.tolist() == [3, 7], "a leaf smaller than its effort is repeated"
    assert few.steps == 2
    many = finetuner.finetune(np.arange(48), 0, tmp_path / "many")
    assert len(many.rows) == 8, "a larger one is cut to its effort"
    assert set(many.rows) <= set(range(48))
    assert many.tokens == sum(len(finetuner.tokenised[int(i)]["input_ids"]) for i in many.rows)


def test_rows_lost_to_truncation_are_not_counted(tiny_model, config, tmp_path):
    args = config(max_length=6)
    short, long = (
        {"prompt": "say :", "completion": " red"},
        {"prompt": "say the red of w1 w2 w3 :", "completion": " x"},
    )
    finetuner = LeafFinetuner(
        load_model(tiny_model, args), Dataset.from_list([short, long, short, long]), args, default_peft_config(),
        load_tokenizer(tiny_model, args),
    )  # fmt: skip
    assert finetuner.finetune(np.arange(4), 0, tmp_path / "a").rows.tolist() == [0, 2]
    with pytest.raises(FinetuneError, match="all 2 rows were lost to truncation to max_length=6"):
        finetuner.finetune(np.array([1, 3]), 0, tmp_path / "b")


def test_without_padding_the_same_is_learnt_from_the_same_tokens(tiny_model, config, tmp_path, monkeypatch):
    batches, compute_loss = [], LeafTrainer.compute_loss

    def seen(self, model, inputs, *args, **kwargs):
        batches.append(inputs["input_ids"].shape)
        return compute_loss(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(LeafTrainer, "compute_loss", seen)
    rows = [{"prompt": "red blue " * (1 + n % 5), "completion": "green" if n % 2 else "red green"} for n in range(24)]
    done = []
    for free in (False, True):
        args = config(padding_free=free, max_length=8)
        finetuner = LeafFinetuner(
            load_model(tiny_model, args), Dataset.from_list(rows), args, default_peft_config(),
            load_tokenizer(tiny_model, args),
        )  # fmt: skip
        done.append(finetuner.finetune(np.arange(24), 0, tmp_path / str(free)))
    lengths = {len(ids) for ids in finetuner.tokenised["input_ids"]}
    assert len(lengths) > 1
    assert max(lengths) == 8
    padded, free = done
    assert (free.tokens, free.steps, free.rows.tolist()) == (padded.tokens, padded.steps, padded.rows.tolist())
    assert free.loss == pytest.approx(padded.loss, rel=1e-5)
    wide, flat = batches[: padded.steps], batches[padded.steps :]
    assert {height for height, _ in flat} == {1}
    assert sum(width for _, width in flat) == free.tokens < sum(height * width for height, width in wide)


def test_a_pool_that_is_all_lost_to_truncation_is_refused(tiny_model, pool, config):
    args = config(max_length=3)
    with pytest.raises(DataError, match="after truncation to max_length=3"):
        LeafFinetuner(
            load_model(tiny_model, args), pool, args, default_peft_config(), load_tokenizer(tiny_model, args)
        )


def test_a_loss_that_turns_nan_fails_the_leaf_and_spares_the_base(tiny_model, pool, config, tmp_path):
    args = config(learning_rate=math.inf)
    model = load_model(tiny_model, args)
    before = digest(model)
    finetuner = LeafFinetuner(model, pool, args, default_peft_config(), load_tokenizer(tiny_model, args))
    with pytest.raises(FinetuneError, match="not a finite number"):
        finetuner.finetune(np.arange(24), 0, tmp_path / "a")
    assert not (tmp_path / "a").exists()
    assert digest(model) == before


def test_a_model_that_trainers_load_themselves_learns_the_same(finetuner, tiny_model, pool, config, tmp_path):
    args = config()
    loading = LeafFinetuner(tiny_model, pool, args, default_peft_config(), load_tokenizer(tiny_model, args))
    done, again = (f.finetune(np.arange(24), 0, tmp_path / f"{n}") for n, f in enumerate((finetuner, loading)))
    assert again.loss == pytest.approx(done.loss, rel=1e-5)
    weights = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("0", "1")]
    assert weights[0] == weights[1]


def test_a_model_that_is_divided_among_processes_must_be_named(finetuner, pool, config, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ConfigError, match="pass its path or Hub id as `model`"):
        LeafFinetuner(finetuner.model, pool, config(), default_peft_config(), finetuner.processing_class)


@pytest.mark.parametrize("completion_only", [True, False])
def test_loss_on_a_cpu_is_that_of_sft_trainer(tiny_model, pool, config, completion_only):
    losses = []
    for trainer_class in (SFTTrainer, LeafTrainer):
        args = config(max_steps=3, completion_only_loss=completion_only)
        set_seed(args.seed)
        trainer = trainer_class(
            model=load_model(tiny_model, args), args=args, train_dataset=pool, peft_config=default_peft_config(),
            processing_class=load_tokenizer(tiny_model, args),
        )  # fmt: skip
        losses.append(trainer.train().training_loss)
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert losses[0] > 0.5


def test_batches_with_nothing_to_learn_are_no_failure(tiny_model, config, tmp_path):
    rows = [{"input_ids": [6, 7, 11, 8, 30 + i, 10, 14, 1], "labels": [-100] * 7 + [1 if i % 3 == 0 else -100]}
            for i in range(9)]  # fmt: skip
    args = config(max_steps=9, per_device_train_batch_size=1, max_length=None)
    finetuner = LeafFinetuner(
        load_model(tiny_model, args), Dataset.from_list(rows), args, default_peft_config(),
        load_tokenizer(tiny_model, args),
    )  # fmt: skip
    assert 0 < finetuner.finetune(np.arange(9), 0, tmp_path / "a").loss < 10


@pytest.mark.parametrize("effort", [{"max_steps": 4}, {"max_steps": -1, "num_train_epochs": 1}])
def test_a_leaf_smaller_than_a_batch_that_is_dropped_is_a_failure(tiny_model, pool, config, tmp_path, effort):
    args = config(per_device_train_batch_size=16, dataloader_drop_last=True, **effort)
    finetuner = LeafFinetuner(
        load_model(tiny_model, args), pool, args, default_peft_config(), load_tokenizer(tiny_model, args)
    )
    with pytest.raises(FinetuneError, match=r"^12 rows are too few for a batch, and `dataloader_drop_last` is set$"):
        finetuner.finetune(np.arange(12), 0, tmp_path / "a")
    assert finetuner.finetune(np.arange(16), 0, tmp_path / "b").steps == max(args.max_steps, 1)


GENERATION = (
    "{% for message in messages %}<|{{ message['role'] }}|> {% if message['role'] == 'assistant' %}{% generation %}"
    "{{ message['content'] }} <eos>{% endgeneration %}{% else %}{{ message['content'] }} {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|> {% endif %}"
)


def test_settings_of_trl_that_look_at_the_raw_rows_serve_leaves_too(tiny_model, pool, config, tmp_path):
    chats = Dataset.from_list([
        {"messages": [{"role": "user", "content": row["prompt"]},
                      {"role": "assistant", "content": row["completion"].strip()}]} for row in pool
    ])  # fmt: skip
    args = config(max_steps=2, assistant_only_loss=True, eval_on_start=True)
    tokenizer = load_tokenizer(tiny_model, args)
    tokenizer.chat_template = GENERATION
    finetuner = LeafFinetuner(load_model(tiny_model, args), chats, args, default_peft_config(), tokenizer)
    labels = finetuner.tokenised[0]["labels"]
    assert tokenizer.decode([token for token in labels if token != -100]) == "crimson <eos>"
    assert finetuner.finetune(np.arange(24), 0, tmp_path / "a").steps == 2


@pytest.mark.parametrize("free", [False, True])
@pytest.mark.parametrize("strategy", ["bfd", "bfd_split", "wrapped"])
def test_packed_leaves_have_their_effort_in_tokens(tiny_model, config, tmp_path, strategy, free):
    rows = Dataset.from_list(
        [{"prompt": "say the red of w1 " * (1 + n % 3), "completion": " crimson"} for n in range(60)]
    )
    args = config(max_steps=2, per_device_train_batch_size=2, max_length=16, packing=True, packing_strategy=strategy,
                  padding_free=free)  # fmt: skip
    finetuner = LeafFinetuner(
        load_model(tiny_model, args), rows, args, default_peft_config(), load_tokenizer(tiny_model, args)
    )
    longest = max(map(len, finetuner.tokenised["input_ids"]))
    assert longest == (16 if strategy == "bfd" else 17), "strategies that cut a long row in parts lose nothing of it"
    done = finetuner.finetune(np.arange(60), 0, tmp_path / "a")
    assert done.steps == 2
    assert sum(len(finetuner.tokenised[int(i)]["input_ids"]) for i in done.rows) <= 2 * 2 * 16
    assert 0 < done.tokens <= 2 * 2 * 16


def test_a_tokenizer_is_known_by_how_it_makes_tokens(tiny_model, config):
    def changed(change):
        tokenizer = load_tokenizer(tiny_model, config())
        change(tokenizer)
        return describe_tokenizer(tokenizer)

    def pad(tokenizer):
        tokenizer(["say", "say the red"], padding=True, truncation=True, max_length=2)

    def end(tokenizer):
        tokenizer.eos_token = "<|user|>"

    def ends(tokenizer):
        tokenizer._tokenizer.post_processor = processors.TemplateProcessing(
            single="$A <eos>", special_tokens=[("<eos>", 1)]
        )

    def lower(tokenizer):
        tokenizer._tokenizer.normalizer = normalizers.Lowercase()

    known = changed(lambda tokenizer: None)
    assert changed(pad) == known, "what a call asked for is no part of it"
    others = [changed(change) for change in (end, ends, lower, lambda tokenizer: tokenizer.add_tokens(["new"]))]
    assert len({known, *others}) == 5
