"""Leaf finetunes: one base model, a fresh adapter each time."""

import hashlib
import math

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel
from trl import SFTTrainer

from harp_hf import HarpConfig
from harp_hf.errors import ConfigError, DataError, FinetuneError
from harp_hf.finetune import LeafFinetuner, LeafTrainer, default_peft_config, load_model, load_tokenizer
from harp_hf.manifest import describe_call, describe_settings


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
        trainer = trainer_class(
            model=load_model(tiny_model, args), args=args, train_dataset=pool, peft_config=default_peft_config(),
            processing_class=load_tokenizer(tiny_model, args),
        )  # fmt: skip
        losses.append(trainer.train().training_loss)
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert losses[0] > 0.5
