"""Rows of one leaf in, a LoRA adapter on disk out: each leaf is one run of TRL's `SFTTrainer`."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from peft import PeftConfig
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback, ProgressCallback, set_seed
from trl import SFTTrainer

from .checkpoints import Checkpoints
from .config import HarpConfig
from .errors import ConfigError, DataError, FinetuneError, reason
from .faults import contained, unchanged
from .models import load_kwargs, shards
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


class LeafTrainer(SFTTrainer):
    """`SFTTrainer` that on a CPU projects to the vocabulary only where a label is, as it does itself on a GPU."""

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The same loss as `SFTTrainer`'s; whatever is not plain likelihood on a CPU is left to it."""
        args = self.args
        if num_items_in_batch is not None:
            num_items_in_batch = max(num_items_in_batch, 1)  # a batch may have nothing to learn
        plain = (
            args.loss_type in ("nll", "chunked_nll") and not args.label_smoothing_factor and not self.aux_loss_enabled
        )
        if return_outputs or not plain or args.world_size > 1 or inputs["labels"].device.type != "cpu":
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        labels = inputs["labels"][:, 1:]
        columns = (labels != -100).any(0).nonzero()[:, 0]
        rest = {k: v for k, v in inputs.items() if k != "labels"}
        logits = model(**rest, use_cache=False, logits_to_keep=columns).logits.float()
        targets = labels[:, columns]
        total = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
        count = num_items_in_batch if num_items_in_batch is not None else (targets != -100).sum().clamp(min=1)
        return total / count


class StepsBar(ProgressCallback):
    """The progress bar of one long finetune, without the lines that a trainer logs."""

    def __init__(self, description: str) -> None:
        super().__init__()
        self._description = description

    def on_train_begin(self, *given: Any, **more: Any) -> None:
        """Show it, in the main process."""
        super().on_train_begin(*given, **more)
        if self.training_bar is not None:
            self.training_bar.set_description(self._description)

    def on_log(self, *_: Any, **__: Any) -> None:
        """Nothing: trackers are there for that."""


class LeafFinetuner:
    """Finetunes leaves one after another on one base model that stays as it was.

    Args:
        model: The base model; its weights are never changed. Where trainers divide it among processes, its path or
            Hub id: every trainer then loads it itself.
        pool: The whole pool; it is tokenised here, once, by `SFTTrainer` itself.
        args: Settings of every finetune.
        peft_config: The adapter; every leaf gets a fresh one.
        processing_class: The tokenizer.

    Attributes:
        bar (`str`, *optional*): What the progress bar of each finetune is called. Default: leaves have none.
        checkpoints (`Checkpoints`, *optional*): From which the next finetune goes on. Default: leaves begin anew.

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
        self.bar: str | None = None
        self.checkpoints: Checkpoints | None = None
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
        if args.padding_free and not args.packing:  # the pool is truncated already, and no token of a batch is padding
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
            if self.bar and args.disable_tqdm:
                trainer.add_callback(StepsBar(self.bar))
            resumed = None
            if self.checkpoints is not None:
                trainer.add_callback(self.checkpoints)
                resumed = self.checkpoints.find()
            with own_run(trainer):
                loss = mean(trainer.train(resume_from_checkpoint=resumed).training_loss)
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
        args.model_init_kwargs = load_kwargs(self.args) if isinstance(self.model, str) else None
        args.logging_nan_inf_filter = False
        # Ours says how much harp_hf tells; a trainer would tell as much of every leaf.
        args.log_level = "debug" if args.log_level == "debug" else "passive"
        args.include_num_input_tokens_seen = "non_padding"
        for name, value in (self.checkpoints.settings() if self.checkpoints is not None else {}).items():
            setattr(args, name, value)
        return args

    @contextmanager
    def _trainer(self, args: HarpConfig, rows: Dataset) -> Iterator[LeafTrainer]:
        """A trainer with a fresh adapter, which is taken off the base model again."""
        with self._restored():
            set_seed(args.seed)  # TRL 1.14 makes the adapter before it does so itself
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
