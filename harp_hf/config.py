"""`HarpConfig`: every setting of a run in one dataclass, on top of TRL's `SFTConfig`."""

import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any, ClassVar, get_args

import torch
from transformers.utils import is_torch_xla_available
from trl import SFTConfig

from .budget import BUDGET_BY, BudgetBy
from .envelopes import VARIANTS, Variant
from .errors import ConfigError
from .evaluation.scoring import AUTO, METRICS
from .priors import Prior

PRIORS = get_args(Prior)
BACKENDS = ("auto", "transformers", "vllm")
EXECUTORS = ("local", "ray")
# Of TRL's `ModelConfig` where nothing is said: a leaf finetune is a LoRA, and its dtype follows bf16.
MODEL_DEFAULTS = {"use_peft": True, "dtype": None}


def lacks_accelerator() -> bool:
    """Whether this machine has nothing to train on but its CPU."""
    return not torch.accelerator.is_available() and not is_torch_xla_available()


def bf16_is_fast(use_cpu: bool) -> bool:
    """Whether the device multiplies bfloat16 matrices in hardware (a CPU without it is ~100 times slower)."""
    if not use_cpu:
        return torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


@dataclass
class HarpConfig(SFTConfig):
    r"""
    Configuration of [`select`] and [`measure`].

    Includes every field of [`~trl.SFTConfig`]: they configure the leaf finetunes exactly as they configure
    [`~trl.SFTTrainer`] (`learning_rate`, `per_device_train_batch_size`, `max_length`, ...). `seed` is the one seed
    from which everything random flows, `output_dir` is the run directory, `per_device_eval_batch_size` the number of
    proxy rows scored at once.

    Parameters:
        > Parameters that control the hierarchy

        features (`str`, *optional*, defaults to `"sentence-transformers/all-MiniLM-L6-v2"`):
            What the rows are compared by: id or path of a sentence-transformers model, name of a pool column that
            holds vectors, or `"tfidf"` (TF-IDF and truncated SVD; needs no model). A model that brings code of its own
            is loaded by you and passed as `features` of [`measure`]: `trust_remote_code` is not for it.
        leaf_size (`int`, *optional*, defaults to `128`):
            Rows a leaf aims at; every leaf holds between `leaf_size / 2` and `2 * leaf_size` rows.
        branching (`int`, *optional*, defaults to `5`):
            Leaves a parent aims at, and parents a large region aims at.

        > Parameters that control the measurements

        max_measurements (`int`, *optional*):
            At most that many leaves are finetuned. By default one and a half a parent.
        control (`bool`, *optional*, defaults to `True`):
            Also finetunes on `leaf_size` random rows of the pool: where they may do as well for a task as its best
            leaf, its part of a shared budget goes to rows from all over. The paper has no such control.
        num_repeats (`int`, *optional*, defaults to `1`):
            Finetunes of every measured leaf, with different seeds. More than one lets run-to-run variance be
            estimated.
        metric (`str`, *optional*, defaults to `"auto"`):
            How an answer is scored: `"exact_match"`, `"choice"`, `"numeric"`, `"contains"`, `"likelihood"`,
            `"choice_likelihood"` (the share of the right answer in the likelihoods of the choices), or `"auto"`:
            `"choice"` for tasks whose rows have choices, `"exact_match"` for the others. `"auto_likelihood"` is its
            smooth counterpart: `"choice_likelihood"` and `"likelihood"`.
        max_new_tokens (`int`, *optional*, defaults to `64`):
            Longest answer generated for the metrics that generate (`"numeric"`, `"contains"`, callables).
        backend (`str`, *optional*, defaults to `"auto"`):
            What evaluates: `"transformers"`, `"vllm"`, or `"auto"`: vLLM where it is installed with a GPU and the run
            is of one process, else transformers. On a CPU vLLM is slow with adapters: use transformers there.
        vllm_gpu_memory_utilization (`float`, *optional*, defaults to `0.3`):
            Share of the GPU's memory (on a CPU, of main memory) that vLLM takes while it evaluates.
        vllm_max_loras (`int`, *optional*, defaults to `8`):
            Adapters that vLLM evaluates at once: that many leaves are finetuned, then scored together. An
            interruption loses at most that many finetunes.
        measurement_timeout (`float`, *optional*):
            Seconds after which the finetune of one leaf, or one evaluation, is given up and the leaf recorded as
            failed. By default there is no limit. A single call of C code, such as one kernel or one wait for a
            driver, runs to its end first. For finetunes that several processes share, set `ddp_timeout` instead.
        executor (`str`, *optional*, defaults to `"local"`):
            Where leaves are measured: `"local"` (in this process, or in those of an `accelerate launch`) or `"ray"`
            (on a Ray cluster, many leaves at a time, each by one worker that keeps the model). The dtype and the
            backend follow the machine that this runs on, so let it be one like the workers'. Baselines and `verify`
            always finetune locally.
        ray_address (`str`, *optional*, defaults to `"local"`):
            The Ray cluster: `"local"` (one that is started on this machine, and ended afterwards), `"auto"` (the one
            this machine belongs to) or `"host:port"`. A process that is connected to one already uses that.
        ray_num_workers (`int`, *optional*):
            Workers on the cluster. By default as many as it has room for at the start.
        ray_cores_per_worker (`int`, *optional*, defaults to `1`):
            CPU cores of each worker, and the threads that it computes with.
        ray_gpus_per_worker (`float`, *optional*):
            GPUs of each worker, or the share of one. By default one where the cluster has GPUs and `use_cpu` is off.
        null_scores (`str`, *optional*):
            JSON-lines file with `task` and `score` in every line: the base model's scores, which are then not
            measured. One line a task, or one line a proxy row in the order of the proxy set.

        > Parameters that control the inference

        prior (`str`, *optional*, defaults to `"smooth"`):
            `"smooth"` (effects vary smoothly over feature space) or `"nested"` (effects of large, parent and leaf).
        similarity (`bool`, *optional*, defaults to `True`):
            Whether the prior expects more of leaves that are similar to a task's proxy rows, as far as the measured
            leaves bear it out, and whether a shared budget takes the rows of a leaf that are most similar to these.
            `False` is the prior of the paper. It needs features that the proxy set has too.
        active_tasks (`list[str]`, *optional*, defaults to `["auto"]`):
            Tasks that decide the selection: `auto` (those whose measured effects are distinguishable from none),
            `all`, or names of tasks.

        > Parameters that control the selection and what is told of it

        variant (`str`, *optional*, defaults to `"harp-c"`):
            `"harp-c"` (conservative: the best leaf counts, harms add up) or `"harp-e"` (expansive: effects add up).
        budget (`int`, *optional*):
            At most that many rows are selected. By default the best prefix of the greedy order is taken whole.
        budget_by (`str`, *optional*, defaults to `"task"`):
            How a budget below the best prefix is spent: `"task"` (the tasks share it, most for those that rows may
            still bring most, each taking rows from all leaves that help, most from those that help it most) or
            `"leaf"` (whole leaves in greedy order, as in the paper).
        task_weights (`dict[str, float]` or `str`, *optional*):
            Weight of each task in the objective, as a dict or a JSON object; tasks not named weigh 1.
        source_column (`str`, *optional*):
            Pool column that names the source of each row, for the table by source; it never informs the selection.
            By default the pool has sources where it is a mixture: its datasets.

    > [!NOTE]
    > These parameters have default values different from [`~trl.SFTConfig`]:
    > - `max_steps`: Defaults to `32`, so that every leaf gets the same effort, instead of `-1`.
    > - `learning_rate`: Defaults to `2e-4`, for LoRA, instead of `2e-5`.
    > - `use_cpu`: Becomes `True` where the machine has no accelerator, unless `ray_gpus_per_worker` asks for those of
    >   a Ray cluster.
    > - `bf16`: Defaults to `True` only where the hardware multiplies bfloat16.
    > - `gradient_checkpointing`: Defaults to off instead of `True`.
    > - `log_level`: On the command line it is that of `harp_hf`; trainers get it only where it is `"debug"`.
    > - `save_strategy` defaults to `"no"` and `disable_tqdm` to `True`: a leaf finetune leaves nothing behind but its
    >   scores.
    > - `logging_strategy` defaults to `"no"`, but to `"steps"` where `report_to` names trackers: each then sees every
    >   leaf finetune as a run of its own.
    """

    _VALID_DICT_FIELDS: ClassVar[list[str]] = [*SFTConfig._VALID_DICT_FIELDS, "task_weights"]

    output_dir: str | None = field(default="harp_output", metadata={"help": "The run directory."})
    max_steps: int = field(default=32, metadata={"help": "Optimiser steps of every leaf finetune."})
    learning_rate: float = field(default=2e-4, metadata={"help": "The initial learning rate of a leaf finetune."})
    gradient_checkpointing: bool | None = field(
        default=None, metadata={"help": "Whether to trade compute for memory in leaf finetunes."}
    )
    bf16: bool | None = field(
        default=None, metadata={"help": "Whether to use bfloat16; by default where the hardware multiplies it."}
    )
    logging_strategy: str | None = field(
        default=None,
        metadata={"help": "When a leaf finetune logs; by default in steps where `report_to` names a tracker.",
                  "choices": ["no", "steps", "epoch"]},
    )  # fmt: skip
    save_strategy: str = field(
        default="no", metadata={"help": "When a leaf finetune saves.", "choices": ["no", "steps", "epoch"]}
    )
    report_to: list[str] | str | None = field(default="none", metadata={"help": "Trackers of the leaf finetunes."})
    disable_tqdm: bool | None = field(default=True, metadata={"help": "Hide the progress bar of each finetune."})

    features: str = field(
        default="sentence-transformers/all-MiniLM-L6-v2",
        metadata={"help": "Sentence-transformers model (id or path), a pool column with vectors, or 'tfidf'."},
    )
    leaf_size: int = field(
        default=128, metadata={"help": "Rows a leaf aims at; leaves hold between half and twice as many."}
    )
    branching: int = field(default=5, metadata={"help": "Leaves a parent and parents a large region aim at."})

    max_measurements: int | None = field(
        default=None, metadata={"help": "At most that many leaves are finetuned (default: one and a half a parent)."}
    )
    control: bool = field(default=True, metadata={"help": "Also finetune on random rows, as a control."})
    num_repeats: int = field(default=1, metadata={"help": "Finetunes of every measured leaf."})
    metric: str = field(
        default="auto",
        metadata={"help": "How answers are scored; 'auto' is choice where a task has choices, else exact_match.",
                  "choices": [*AUTO, *METRICS]},
    )  # fmt: skip
    max_new_tokens: int = field(
        default=64, metadata={"help": "Longest answer generated for the metrics that generate."}
    )
    backend: str = field(
        default="auto",
        metadata={"help": "What evaluates; 'auto' is vllm where it is installed with a GPU, else transformers.",
                  "choices": list(BACKENDS)},
    )  # fmt: skip
    vllm_gpu_memory_utilization: float = field(
        default=0.3, metadata={"help": "Share of the memory that vLLM takes while it evaluates."}
    )
    vllm_max_loras: int = field(default=8, metadata={"help": "Adapters that vLLM evaluates at once."})
    measurement_timeout: float | None = field(
        default=None, metadata={"help": "Seconds after which a leaf's finetune, or an evaluation, is given up."}
    )
    executor: str = field(default="local", metadata={"help": "Where leaves are measured.", "choices": list(EXECUTORS)})
    ray_address: str = field(
        default="local", metadata={"help": "The Ray cluster: 'local' starts one, 'auto', or host:port."}
    )
    ray_num_workers: int | None = field(
        default=None, metadata={"help": "Workers on the Ray cluster (default: as many as it has room for)."}
    )
    ray_cores_per_worker: int = field(default=1, metadata={"help": "CPU cores and threads of each Ray worker."})
    ray_gpus_per_worker: float | None = field(
        default=None, metadata={"help": "GPUs of each Ray worker, or a share of one (default: one, if there are any)."}
    )
    null_scores: str | None = field(
        default=None, metadata={"help": "JSON-lines file with the base model's scores (task and score in each line)."}
    )

    prior: Prior = field(default="smooth", metadata={"help": "Prior of the effects of unmeasured leaves."})
    similarity: bool = field(
        default=True,
        metadata={"help": "Whether similarity to the proxy rows guides the prior, as far as believed, and the rows."},
    )
    active_tasks: list[str] = field(
        default_factory=lambda: ["auto"], metadata={"help": "'auto', 'all', or names of tasks."}
    )

    variant: Variant = field(default="harp-c", metadata={"help": "Envelope."})
    budget: int | None = field(default=None, metadata={"help": "At most that many rows are selected."})
    budget_by: BudgetBy = field(
        default="task",
        metadata={"help": "Who shares a budget below the best prefix: tasks, or whole leaves in greedy order."},
    )
    task_weights: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Weight of each task as a JSON object; tasks not named weigh 1."}
    )
    source_column: str | None = field(
        default=None, metadata={"help": "Pool column with the source of each row, for the table by source."}
    )

    def __post_init__(self) -> None:
        # Transformers refuses bfloat16 on a CPU unless a CPU is asked for.
        if lacks_accelerator() and not (self.executor == "ray" and self.ray_gpus_per_worker):
            self.use_cpu = True
        if self.bf16 is None:
            self.bf16 = not self.fp16 and bf16_is_fast(self.use_cpu)
        if self.logging_strategy is None:
            self.logging_strategy = "no" if self.report_to in (None, "none", ["none"], []) else "steps"
        active = self.active_tasks or []
        self.active_tasks = [active] if isinstance(active, str) else list(active)
        if isinstance(self.task_weights, str):
            with suppress(ValueError):
                self.task_weights = json.loads(self.task_weights)
        self._check()
        # Numbers of numpy cannot be written to the run directory.
        for name in (*_AT_LEAST, "budget", "task_weights"):
            setattr(self, name, plain(getattr(self, name)))
        super().__post_init__()
        # A trainer would make a batch for each of them; launchers and Ray give every process one.
        if self.n_gpu > 1:
            self._n_gpu = 1

    def _check(self) -> None:
        for name, least in _AT_LEAST.items():
            check_whole(name, getattr(self, name), least, optional=name in ("max_measurements", "ray_num_workers"))
        check_one_of("prior", self.prior, PRIORS)
        check_one_of("metric", self.metric, (*AUTO, *METRICS))
        check_one_of("backend", self.backend, BACKENDS)
        check_one_of("executor", self.executor, EXECUTORS)
        gpus = self.ray_gpus_per_worker
        if gpus is not None and not (0 <= gpus <= 1 or (gpus > 1 and float(gpus).is_integer())):
            raise ConfigError(f"`ray_gpus_per_worker` must be a share of 1 or a whole number, but it is {gpus!r}.")
        if not 0 < self.vllm_gpu_memory_utilization <= 1:
            raise ConfigError(
                f"`vllm_gpu_memory_utilization` must be in (0, 1], but it is {self.vllm_gpu_memory_utilization!r}."
            )
        if self.measurement_timeout is not None and not 0 < self.measurement_timeout < float("inf"):
            raise ConfigError(
                f"`measurement_timeout` must be a number of seconds above 0, but it is {self.measurement_timeout!r}."
            )
        check_choice(self.variant, self.budget, self.task_weights, self.budget_by)
        if not self.active_tasks:
            raise ConfigError("`active_tasks` is empty: use 'auto', 'all' or the names of tasks.")
        if self.max_steps < 1 and self.num_train_epochs <= 0:
            raise ConfigError("A leaf finetune has no steps: set `max_steps` (or `num_train_epochs`) above 0.")
        if self.packing and self.max_length is None:
            raise ConfigError("`packing` needs a `max_length`.")
        if (self.dataset_kwargs or {}).get("skip_prepare_dataset"):
            raise ConfigError("`skip_prepare_dataset` cannot be used: TRL tokenises the pool once for all finetunes.")


_AT_LEAST = {"leaf_size": 2, "branching": 2, "max_measurements": 1, "num_repeats": 1, "max_new_tokens": 1,
             "vllm_max_loras": 1, "ray_num_workers": 1, "ray_cores_per_worker": 1}  # fmt: skip


def check_choice(
    variant: str | None, budget: int | None, task_weights: dict[str, Any] | str | None, budget_by: str | None = None
) -> None:
    """Raise [`ConfigError`] unless each is `None` or can be used in a selection."""
    if variant is not None:
        check_one_of("variant", variant, VARIANTS)
    check_whole("budget", budget, 1, optional=True)
    if budget_by is not None:
        check_one_of("budget_by", budget_by, BUDGET_BY)
    if task_weights is None:
        return
    if not isinstance(task_weights, dict):
        raise ConfigError(f"`task_weights` must be a dict or a JSON object, but it is {task_weights!r}.")
    for task, weight in task_weights.items():
        number = isinstance(weight, Real) and not isinstance(weight, bool)
        if not number or not 0 <= weight < float("inf"):
            raise ConfigError(f"The weight of task {task!r} must be a number of at least 0, but it is {weight!r}.")


def check_whole(name: str, value: Any, least: int, optional: bool = False) -> None:
    """Raise [`ConfigError`] unless `value` is a whole number of at least `least`, or `None` where it is optional."""
    if value is None and optional:
        return
    if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
        raise ConfigError(f"`{name}` must be a whole number of at least {least}, but it is {value!r}.")


def plain(value: Any) -> Any:
    """The same with whole and other numbers of whatever type, also those in a dict, as `int` and `float`."""
    if isinstance(value, dict):
        return {name: plain(one) for name, one in value.items()}
    if isinstance(value, Integral):
        return int(value)
    return float(value) if isinstance(value, Real) else value


def check_one_of(name: str, value: Any, choices: Sequence[str]) -> None:
    """Raise [`ConfigError`] unless `value` is one of `choices`."""
    if value not in choices:
        raise ConfigError(f"`{name}` must be one of {', '.join(choices)}, but it is {value!r}.")
