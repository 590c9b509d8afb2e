"""Flags of the commands that start from a finished run directory."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any


@dataclass
class CutArguments:
    """Arguments of `harp-hf cut`; what is not given is as in the run."""

    output_dir: str = field(metadata={"help": "The finished run directory."})
    variant: str | None = field(default=None, metadata={"help": "Envelope.", "choices": ["harp-c", "harp-e"]})
    budget: int | None = field(default=None, metadata={"help": "At most that many rows are selected."})
    task_weights: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Weight of each task as a JSON object; tasks not named weigh 1."}
    )
    active_tasks: list[str] | None = field(default=None, metadata={"help": "'auto', 'all', or names of tasks."})
    budget_by: str | None = field(
        default=None, metadata={"help": "Who shares a budget below the best prefix.", "choices": ["task", "leaf"]}
    )

    def __post_init__(self) -> None:
        if isinstance(self.task_weights, str):
            with suppress(ValueError):
                self.task_weights = json.loads(self.task_weights)


@dataclass
class ReportArguments:
    """Arguments of `harp-hf report`."""

    output_dir: str = field(metadata={"help": "The finished run directory."})


@dataclass
class PushArguments(CutArguments):
    """Arguments of `harp-hf push`; the selection is chosen as in `harp-hf cut`."""

    repo_id: str | None = field(default=None, metadata={"help": "Name of the dataset on the Hub, as in me/my-pool."})
    private: bool = field(default=True, metadata={"help": "Whether a new dataset is private."})
    token: str | None = field(default=None, metadata={"help": "Access token; by default the one you logged in with."})
    revision: str | None = field(default=None, metadata={"help": "Branch to push to."})


@dataclass
class VerifyArguments(CutArguments):
    """Arguments of `harp-hf verify`; the selection is chosen as in `harp-hf cut`."""

    eval_dataset_name: str | None = field(
        default=None, metadata={"help": "Path or name of the test rows: held out, with prompt and answer."}
    )
    eval_dataset_config: str | None = field(
        default=None, metadata={"help": "Configuration name of the test rows on the Hub."}
    )
    dataset_test_split: str = field(default="test", metadata={"help": "Split of the test rows."})
    whole_pool: bool = field(default=False, metadata={"help": "Whether to finetune on the whole pool too."})
    epochs: float = field(default=2.0, metadata={"help": "Passes over each set of rows."})
    seeds: int = field(default=3, metadata={"help": "Finetunes on each; every one draws other random rows."})
    metric: str = field(
        default="auto", metadata={"help": "How test rows are scored; 'auto' is choice where a task has choices."}
    )
    model_name_or_path: str | None = field(
        default=None, metadata={"help": "The base model, where the run was given it as an object."}
    )
