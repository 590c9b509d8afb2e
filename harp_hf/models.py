"""The base model, its tokenizer and its adapter: loaded, checked, and known again by a run."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from .config import HarpConfig
from .errors import ConfigError, reason
from .quiet import quiet
from .rundir import digest_of_files


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
    kwargs = load_kwargs(args)
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


def load_kwargs(args: HarpConfig) -> dict[str, Any]:
    """What `from_pretrained` is given for the base model."""
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
    if isinstance(model, str):
        folder = Path(model)
        return f"{folder if folder.is_dir() else model} {digest_of_files(folder, '*.*')}"
    digest = hashlib.sha256()
    for name, weight in model.named_parameters():
        sample = weight.detach().flatten()[:: max(weight.numel() // 256, 1)].float().cpu().numpy()
        digest.update(name.encode() + sample.tobytes())
    return f"{model.config.name_or_path} {digest.hexdigest()[:16]}"


def describe_peft(peft_config: PeftConfig) -> dict[str, Any]:
    """The settings of an adapter as plain JSON values."""
    settings = {k: v for k, v in peft_config.to_dict().items() if v is not None}
    return {k: sorted(v) if isinstance(v, set) else v for k, v in sorted(settings.items())}
