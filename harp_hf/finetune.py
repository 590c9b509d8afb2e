"""Rows of one leaf in, a LoRA adapter on disk out: each leaf is one run of TRL's `SFTTrainer`."""

from __future__ import annotations

import copy
import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from peft import LoraConfig, PeftConfig
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
)
from trl import SFTTrainer

from .config import HarpConfig
from .errors import ConfigError, DataError, FinetuneError, reason
from .faults import contained, unchanged
from .pool import training_columns
from .processes import mean
from .quiet import quiet
from .tracking import own_run, run_name


@dataclass(frozen=True)
class Finetune:
    """One finished leaf finetune.

    Attributes:
        rows (`np.ndarray`): Pool rows that were really trained on.
        steps (`int`): Optimiser steps.
        tokens (`int`): Tokens trained on, repeated rows counted again, padding not counted.
        loss (`float`): Mean training loss.
    """

    rows: np.ndarray
    steps: int
    tokens: int
    loss: float


def default_peft_config() -> LoraConfig:
    """LoRA of rank 16 on all linear layers."""
    return LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")


# Initialisations that leave the weights of the base model as they are.
_HARMLESS = (True, False, "gaussian", "orthogonal")


def check_adapter(peft_config: PeftConfig) -> None:
    """Raise [`ConfigError`] unless such an adapter leaves the base model, which all leaves share, as it was."""
    if peft_config.is_prompt_learning:
        raise ConfigError(f"`peft_config` is a {type(peft_config).__name__}, but leaves need an adapter such as LoRA.")
    if getattr(peft_config, "bias", "none") != "none":
        raise ConfigError(
            f"An adapter with bias={peft_config.bias!r} trains biases of the base model, which all leaves share: use "
            "'none', or `lora_bias`."
        )
    start = getattr(peft_config, "init_lora_weights", True)
    if start not in _HARMLESS:
        raise ConfigError(
            f"An adapter with init_lora_weights={start!r} changes weights of the base model, which all leaves share: "
            "use True, 'gaussian' or 'orthogonal'."
        )


def load_tokenizer(model: str | PreTrainedModel, args: HarpConfig) -> PreTrainedTokenizerBase:
    """The tokenizer that belongs to `model`.

    Raises:
        ConfigError: It cannot be loaded.
    """
    name = model if isinstance(model, str) else model.config.name_or_path
    revision = (args.model_init_kwargs or {}).get("revision")
    return _loaded("tokenizer of", name, lambda: AutoTokenizer.from_pretrained(
        name, revision=revision, trust_remote_code=args.trust_remote_code
    ))  # fmt: skip


def prepare_tokenizer(tokenizer: PreTrainedTokenizerBase, args: HarpConfig) -> PreTrainedTokenizerBase:
    """Apply `args.eos_token` and `args.chat_template_path` as `SFTTrainer` would, so that all score with them too.

    Raises:
        ConfigError: The token is not in the vocabulary, or the path is not that of a Jinja file.
    """
    if args.eos_token is not None:
        if args.eos_token not in tokenizer.get_vocab():
            raise ConfigError(f"`eos_token` is {args.eos_token!r}, which is not in the vocabulary of the tokenizer.")
        tokenizer.eos_token = args.eos_token
    if args.chat_template_path is not None:
        path = Path(args.chat_template_path)
        if path.suffix not in (".jinja", ".j2") or not path.is_file():
            raise ConfigError(
                f"`chat_template_path` must be a .jinja or .j2 file, but it is {args.chat_template_path!r}; to use "
                "another model's template, pass a tokenizer that has it as `processing_class`."
            )
        tokenizer.chat_template = path.read_text(encoding="utf-8")
    return tokenizer


def load_model(model: str | PreTrainedModel, args: HarpConfig) -> PreTrainedModel:
    """The base model, in bfloat16 where `args.bf16` and in float32 otherwise unless `model_init_kwargs` has a dtype.

    Raises:
        ConfigError: It cannot be loaded.
    """
    if not isinstance(model, str):
        placed = getattr(model, "is_quantized", False) or getattr(model, "hf_device_map", None)
        return model if placed else model.to(args.device)
    kwargs = _model_kwargs(args)
    # Also where the trainers shard the model, this one is whole.
    zero = args.deepspeed_plugin
    with zero.zero3_init_context_manager(enable=False) if zero is not None else nullcontext():
        loaded = _loaded("model", model, lambda: AutoModelForCausalLM.from_pretrained(
            model, trust_remote_code=args.trust_remote_code, **kwargs
        ))  # fmt: skip
    return loaded if kwargs.get("quantization_config") or kwargs.get("device_map") else loaded.to(args.device)


@contextmanager
def lent(model: str | PreTrainedModel) -> Iterator[None]:
    """Freeze a model that was passed as an object; give it back in its mode, with the weights trainable that were."""
    if isinstance(model, str):
        yield
        return
    trainable, training = [weight for weight in model.parameters() if weight.requires_grad], model.training
    model.requires_grad_(False)
    try:
        yield
    finally:
        for weight in trainable:
            weight.requires_grad_(True)
        model.train(training)


def _model_kwargs(args: HarpConfig) -> dict[str, Any]:
    given = {k: v for k, v in (args.model_init_kwargs or {}).items() if v is not None}
    return {"dtype": torch.bfloat16 if args.bf16 else torch.float32} | given


def shards(args: HarpConfig) -> bool:
    """Whether a trainer would divide the weights of the model among the processes (FSDP or ZeRO-3)."""
    zero = args.deepspeed_plugin
    fsdp = bool(args.fsdp) or os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    return fsdp or (zero is not None and zero.zero_stage == 3)


def _loaded(what: str, name: str, load: Callable[[], Any]) -> Any:
    if Path(name).is_absolute() and not Path(name).exists():
        raise ConfigError(f"The {what} {name!r} cannot be loaded: there is no such folder.")
    try:
        with quiet():
            return load()
    except Exception as error:  # transformers, tokenizers, safetensors and the Hub each raise their own
        raise ConfigError(f"The {what} {name!r} cannot be loaded: {reason(error)}.") from error


def describe_tokenizer(tokenizer: PreTrainedTokenizerBase) -> str:
    """What identifies a tokenizer in a manifest: a digest of how it makes tokens, and of its ends."""
    made: Any = sorted(tokenizer.get_vocab().items())
    if tokenizer.is_fast:
        made = json.loads(tokenizer.backend_tokenizer.to_str())
        made |= {"padding": None, "truncation": None}  # which any call may set
    described = json.dumps([made, tokenizer.bos_token_id, tokenizer.eos_token_id], sort_keys=True)
    return hashlib.sha256(described.encode()).hexdigest()[:16]


def describe_model(model: str | PreTrainedModel) -> str:
    """What identifies a model in a manifest: name and a digest of the files, or of samples of every weight."""
    digest = hashlib.sha256()
    if isinstance(model, str):
        for path in sorted(Path(model).glob("*.*")) if Path(model).is_dir() else []:
            with path.open("rb") as handle:
                digest.update(f"{path.name} {path.stat().st_size}".encode())
                for start in range(0, path.stat().st_size, max(path.stat().st_size // 256, 1)):
                    handle.seek(start)
                    digest.update(handle.read(4096))
        return f"{model} {digest.hexdigest()[:16]}"
    for name, weight in model.named_parameters():
        sample = weight.detach().flatten()[:: max(weight.numel() // 256, 1)].float().cpu().numpy()
        digest.update(name.encode() + sample.tobytes())
    return f"{model.config.name_or_path} {digest.hexdigest()[:16]}"


class LeafTrainer(SFTTrainer):
    """`SFTTrainer` that on a CPU projects to the vocabulary only where a label is, as it does itself on a GPU."""

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The same loss as `SFTTrainer`'s; whatever is not plain likelihood on a CPU is left to it."""
        args = self.args
        plain = args.loss_type == "nll" and not args.label_smoothing_factor and not self.aux_loss_enabled
        if return_outputs or not plain or args.world_size > 1 or inputs["labels"].device.type != "cpu":
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        labels = inputs["labels"][:, 1:]
        columns = (labels != -100).any(0).nonzero()[:, 0]
        rest = {k: v for k, v in inputs.items() if k != "labels"}
        logits = model(**rest, use_cache=False, logits_to_keep=columns).logits.float()
        targets = labels[:, columns]
        total = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
        count = num_items_in_batch if num_items_in_batch is not None else (targets != -100).sum()
        return total / max(count, 1)


class LeafFinetuner:
    """Finetunes leaves one after another on one base model that stays as it was.

    Args:
        model: The base model; its weights are never changed. Where trainers divide it among processes, its path or
            Hub id: every trainer then loads it itself.
        pool: The whole pool; it is tokenised here, once, by `SFTTrainer` itself.
        args: Settings of every finetune.
        peft_config: The adapter; every leaf gets a fresh one.
        processing_class: The tokenizer.

    Raises:
        ConfigError: The model would be divided among processes, but is an object.
        DataError: `SFTTrainer` does not take the pool, or no row of it survives truncation to `max_length`.
    """

    def __init__(
        self,
        model: PreTrainedModel | str,
        pool: Dataset,
        args: HarpConfig,
        peft_config: PeftConfig,
        processing_class: PreTrainedTokenizerBase,
    ) -> None:
        if shards(args) and not isinstance(model, str):
            raise ConfigError("FSDP and ZeRO-3 load the model for every finetune: pass its path or Hub id as `model`.")
        self.model = model
        self.args = args
        self.peft_config = peft_config
        self.processing_class = processing_class
        self.tokenised = self._tokenise(pool)
        self._row = np.asarray(self.tokenised.with_format("numpy")["harp_row"][:], np.int64)

    def _tokenise(self, pool: Dataset) -> Dataset:
        read = pool.with_format(None).select_columns(training_columns(pool, self.args.dataset_text_field))
        numbered = read.add_column("harp_row", np.arange(len(pool)))
        args = self._leaf_args(self.args.seed)
        if args.packing and args.packing_strategy != "bfd":  # these cut a long row into several, and lose nothing
            args.max_length = None
        args.packing, args.padding_free, args.report_to = False, False, []
        try:
            with quiet(), self._trainer(args, numbered) as trainer:
                tokenised = trainer.train_dataset
        except Exception as error:  # TRL, datasets, tokenizers and chat templates each raise their own
            raise DataError(f"TRL cannot tokenise the pool: {reason(error)}.") from error
        if len(tokenised) == 0:
            raise DataError(
                f"No row of the pool has anything left to learn from after truncation to max_length={args.max_length}."
            )
        return tokenised.select_columns(["input_ids", "labels", "harp_row"])

    def finetune(self, rows: np.ndarray, seed: int, adapter: Path) -> Finetune:
        """Finetune a fresh adapter on some pool rows and save it in the folder `adapter`.

        With `max_steps` set, every leaf gets that many optimiser steps: the rows are repeated, or as many of them
        drawn as fit. The processes of an `accelerate launch` share each step; only the main one saves.
        Trackers see a run that is named like the folder.

        Raises:
            FinetuneError: On all processes alike: all rows were lost to truncation, or the loss is not a finite
                number. In a run of one process also: the memory or `args.measurement_timeout` ran out.
        """
        with contained(self.args.measurement_timeout, alone=self.args.world_size == 1):
            return self._finetune(rows, seed, adapter)

    def _finetune(self, rows: np.ndarray, seed: int, adapter: Path) -> Finetune:
        args = self._leaf_args(seed)
        args.run_name = run_name(args, adapter.name)
        args.assistant_only_loss = False  # the labels have it already
        if args.padding_free:  # the pool is truncated already, and no token of a batch is padding
            args.max_length, args.include_num_input_tokens_seen = None, "all"
        kept = np.flatnonzero(np.isin(self._row, rows))
        if len(kept) == 0:
            raise FinetuneError(f"all {len(rows)} rows were lost to truncation to max_length={args.max_length}")
        room = args.max_steps * args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        random = np.random.default_rng([seed, int(rows.min())])
        if args.packing and room > 0:
            drawn = random.permutation(kept)
            lengths = np.array([len(ids) for ids in self.tokenised.select(drawn)["input_ids"][:]])
            kept = np.sort(drawn[np.cumsum(lengths) <= max(room * args.max_length, lengths[0])])
        elif 0 < room < len(kept):
            kept = np.sort(random.choice(kept, room, replace=False))
        with quiet(), self._trainer(args, self.tokenised.select(kept).remove_columns("harp_row")) as trainer:
            if args.dataloader_drop_last and len(trainer.train_dataset) < args.train_batch_size * args.world_size:
                raise FinetuneError(f"{len(kept)} rows are too few for a batch, and `dataloader_drop_last` is set")
            trainer.remove_callback(PrinterCallback)
            with own_run(trainer):
                loss = mean(trainer.train().training_loss)
            if math.isfinite(loss):
                trainer.save_model(str(adapter))
        if not math.isfinite(loss):
            raise FinetuneError("the training loss is not a finite number")
        state = trainer.state
        return Finetune(self._row[kept], state.global_step, int(state.num_input_tokens_seen), float(loss))

    def _leaf_args(self, seed: int) -> HarpConfig:
        args = copy.copy(self.args)
        args.seed = seed
        args.eval_strategy, args.eval_on_start = type(args.eval_strategy)("no"), False
        args.push_to_hub = False
        args.model_init_kwargs = _model_kwargs(self.args) if isinstance(self.model, str) else None
        args.logging_nan_inf_filter = False
        # Ours says how much harp_hf tells; a trainer would tell as much of every leaf.
        args.log_level = "debug" if args.log_level == "debug" else "passive"
        args.include_num_input_tokens_seen = "non_padding"
        return args

    @contextmanager
    def _trainer(self, args: HarpConfig, rows: Dataset) -> Iterator[LeafTrainer]:
        """A trainer with a fresh adapter, which is taken off the base model again."""
        with self._restored():
            trainer = LeafTrainer(
                model=self.model, args=args, train_dataset=rows, processing_class=self.processing_class,
                peft_config=copy.deepcopy(self.peft_config),
            )  # fmt: skip
            try:
                yield trainer
            finally:
                if isinstance(self.model, str):
                    trainer.accelerator.free_memory()
                else:
                    trainer.model.unload()

    @contextmanager
    def _restored(self) -> Iterator[None]:
        """Undo what a trainer leaves on the base model: its own `forward`, modes, hooks and the PEFT marks."""
        if isinstance(self.model, str):
            yield
            return
        before = self.model.__dict__.get("forward")
        modules = list(self.model.modules())
        checkpointing = {m: m.gradient_checkpointing for m in modules if hasattr(m, "gradient_checkpointing")}
        hooks = {module: set(module._forward_hooks) for module in modules}
        try:
            with unchanged(self.model):
                yield
        finally:
            self.model.__dict__.pop("forward", None)
            if before is not None:
                self.model.forward = before
            for mark in ("peft_config", "_hf_peft_config_loaded"):
                self.model.__dict__.pop(mark, None)
            for module, on in checkpointing.items():
                module.gradient_checkpointing = on
            for module, known in hooks.items():
                for hook in module._forward_hooks.keys() - known:
                    del module._forward_hooks[hook]
            self.model.requires_grad_(False)
            self.model.eval()


def describe_peft(peft_config: PeftConfig) -> dict[str, Any]:
    """The settings of an adapter as plain JSON values."""
    settings = {k: v for k, v in peft_config.to_dict().items() if v is not None}
    return {k: sorted(v) if isinstance(v, set) else v for k, v in sorted(settings.items())}
