"""What identifies a run, so that its directory is only continued where it would repeat itself."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from importlib.metadata import version
from typing import Any

import numpy as np
from trl import ModelConfig

from . import __version__
from .config import MODEL_DEFAULTS, HarpConfig, lacks_accelerator
from .evaluation.backends import choose_backend
from .texts import is_secret, without_tokens

# Settings that change neither a finetune nor a score; all other fields of HarpConfig do.
_INDIFFERENT = {
    "output_dir", "max_measurements", "control", "num_repeats", "variant", "budget", "budget_by", "task_weights",
    "active_tasks", "prior", "similarity", "source_column", "backend", "vllm_gpu_memory_utilization", "vllm_max_loras",
    "measurement_timeout", "executor", "ray_address", "ray_num_workers", "ray_cores_per_worker", "ray_gpus_per_worker",
    "features", "metric", "null_scores", "report_to", "run_name", "project", "trackio_space_id", "disable_tqdm",
    "logging_dir", "logging_strategy", "logging_steps", "logging_first_step", "logging_nan_inf_filter", "log_level",
    "log_level_replica", "log_on_each_node", "save_strategy", "save_steps", "save_total_limit", "save_only_model",
    "hub_model_id", "hub_strategy", "hub_token", "hub_private_repo", "hub_always_push", "hub_revision", "push_to_hub",
    "dataset_num_proc", "dataloader_num_workers", "local_rank", "eval_strategy", "eval_steps", "do_train", "do_eval",
    "do_predict", "use_cpu",
}  # fmt: skip
_LIBRARIES = ("trl", "transformers", "peft", "datasets", "torch", "numpy")


def describe_settings(args: HarpConfig, metrics: Sequence[str], null_scores: np.ndarray | None) -> dict[str, Any]:
    """Every setting that changes what a finetune or a score is, as plain JSON values."""
    settings = {k: v for k, v in args.to_dict().items() if k not in _INDIFFERENT}
    if args.world_size > 1:  # processes that share a finetune enlarge its batch
        settings["world_size"] = args.world_size
    given = None if null_scores is None else null_scores.tolist()
    return _plain(settings | {"backend": choose_backend(args), "metric": list(metrics), "null_scores": given})


def describe_versions() -> dict[str, str]:
    """Versions of Python and of the libraries that measure."""
    return {"python": platform.python_version(), "harp-hf": __version__} | {name: version(name) for name in _LIBRARIES}


def describe_call(args: HarpConfig, *others: Any) -> dict[str, Any]:
    """Every setting that is not a default, without tokens: a YAML config that the command line takes.

    Args:
        args: The settings of the run.
        others: More dataclasses of settings, such as TRL's `ScriptArguments`, `ModelConfig` and
            `DatasetMixtureConfig`.
    """
    # Another `use_cpu` would change the device of every trainer to come.
    defaults = HarpConfig(output_dir=args.output_dir, use_cpu=args.use_cpu).to_dict()
    defaults["use_cpu"] = args.use_cpu and lacks_accelerator()
    changed = {k: v for k, v in args.to_dict().items() if k != "hub_token" and v != defaults[k]}
    for other in others:
        plain = vars(type(other)()) | (MODEL_DEFAULTS if isinstance(other, ModelConfig) else {})
        changed |= {k: v for k, v in vars(other).items() if v != plain[k]}
    return {"output_dir": args.output_dir} | _plain(changed)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items() if not (isinstance(v, str) and is_secret(str(k)))}
    if isinstance(value, list | tuple | set):
        return [_plain(v) for v in value]
    if is_dataclass(value):
        return {f.name: _plain(getattr(value, f.name)) for f in fields(value) if getattr(value, f.name) != f.default}
    return value if isinstance(value, int | float | bool | type(None)) else without_tokens(str(value))
