"""From the flags and YAML keys of `trl sft` to what `measure` takes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml
from peft import PeftConfig
from trl import ModelConfig, get_peft_config, get_quantization_config

from .config import MODEL_DEFAULTS, HarpConfig
from .errors import ConfigError, reason
from .manifest import describe_call, describe_settings
from .models import default_peft_config


def read_settings(config: Mapping[str, Any]) -> tuple[HarpConfig, ModelConfig]:
    """Settings of a run from the YAML config that it wrote, or that the command line takes.

    Returns:
        The settings, those of the model among their `model_init_kwargs`, and TRL's own of the model and the adapter.
    """
    known = [{field.name for field in fields(kind) if field.init} for kind in (HarpConfig, ModelConfig)]
    args = HarpConfig(**{name: value for name, value in config.items() if name in known[0]})
    given = {name: value for name, value in config.items() if name in known[1]}
    model = ModelConfig(**(MODEL_DEFAULTS | given))
    args.model_init_kwargs = model_kwargs(model) | (args.model_init_kwargs or {}) or None
    return args, model


def load_settings(path: str | Path | None, **changes: Any) -> tuple[HarpConfig, PeftConfig]:
    """Settings and adapter of a run from a YAML config, with some settings changed; without a file, from the defaults.

    Raises:
        ConfigError: The file is not there or is not a YAML mapping.
    """
    config: Any = {}
    if path is not None:
        try:
            config = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except (OSError, yaml.YAMLError) as error:
            raise ConfigError(f"The config file {path} cannot be read: {reason(error)}.") from error
        if not isinstance(config, dict):
            raise ConfigError(f"The config file {path} is not a YAML mapping of settings.")
    args, model = read_settings(config | changes)
    return args, adapter(model)


def changed_settings(args: HarpConfig) -> dict[str, Any]:
    """What describes the finetunes of a run: every setting that changes them and is not a default."""
    changed = describe_call(args)
    return {name: value for name, value in describe_settings(args, [args.metric], None).items() if name in changed}


def model_kwargs(model: ModelConfig) -> dict[str, Any]:
    """How the model is loaded, as far as it is not the usual way."""
    given = {
        "revision": model.model_revision if model.model_revision != ModelConfig.model_revision else None,
        "attn_implementation": model.attn_implementation,
        "dtype": model.dtype,
        "quantization_config": get_quantization_config(model),
    }
    return {name: value for name, value in given.items() if value is not None}


def adapter(model: ModelConfig) -> PeftConfig:
    """The adapter of the leaf finetunes: on all linear layers unless the settings name some."""
    peft_config = get_peft_config(model)
    if model.lora_target_modules is None and model.lora_target_parameters is None:
        peft_config.target_modules = default_peft_config().target_modules
    return peft_config
