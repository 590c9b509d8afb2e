"""LESS: rows whose Adam steps point where the proxy rows' gradients do (Xia et al., 2024, arXiv:2402.04333)."""

from __future__ import annotations

import copy
import hashlib
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from datasets import Dataset
from tqdm.auto import tqdm

from ..errors import DataError
from ..finetune import LeafFinetuner
from ..rundir import RunDir
from ..stopping import temporary_folder
from .gradients import Projection, RowGradients
from .selector import Cost, Problem, Ranking, by_turns, descending

if TYPE_CHECKING:
    from ..proxy import ProxySet

# Rows whose influences are kept in one file: what a killed run repeats at most.
_BLOCK = 256


@dataclass(frozen=True)
class LESS:
    """Influence of a row on a task: sum over checkpoints of rate * mean over proxy rows of cosine similarity.

    The cosine is between the Adam direction of the row's gradient and the plain gradient of a proxy row with its first
    answer, both projected. Checkpoints are those at the end of each warm-up epoch; a checkpoint's rate is the mean of
    the learning rates at both ends of its epoch (section 4 of the paper). Rows lost to truncation come last.

    The paper ranks rows by their maximum over the subtasks of one benchmark. Influences on unrelated tasks differ in
    size, and one or two tasks would take all rows: here tasks take turns, as they do for LESS in Ivison et al. (2025).

    Attributes:
        projection (`int`, *optional*): Dimensions of the projection (8192 in the paper); `None` for exact gradients.
        warmup (`float`): Share of the pool that the warm-up trains on.
        warmup_rows (`int`): Rows it trains on at least, where the pool has so many.
        epochs (`int`): Passes of the warm-up, each with a checkpoint.
        turns (`bool`): Whether tasks take turns, each taking its most influential row still there, as in [`RDS`]; else
            rows go by their maximum over tasks.
    """

    projection: int | None = 4096
    warmup: float = 0.05
    warmup_rows: int = 64
    epochs: int = 4
    # Not a part of what is measured, so that it has no part in its name.
    turns: bool = field(default=True, repr=False)

    def rank(self, problem: Problem, budget: int | None = None) -> Ranking:
        """See [`Selector.rank`]; needs `run`, `finetuner` and `proxy`, and continues in `run` after a crash."""
        wanted = problem.wanted(budget)
        influence, cost = self.influences(problem)
        if self.turns:
            return Ranking(by_turns(np.arange(problem.n_tasks), lambda d: influence[:, d], wanted), cost)
        return Ranking(descending(influence.max(axis=1)), cost)

    def influences(self, problem: Problem) -> tuple[np.ndarray, Cost]:
        """(n, D) influence of every pool row on every task, -inf for rows lost to truncation; and what it took."""
        run: RunDir = problem.need("run", "less")
        finetuner, proxy = problem.need("finetuner", "less"), problem.need("proxy", "less")
        name = hashlib.sha256(repr((self, problem.seed, proxy.digest)).encode()).hexdigest()[:12]
        folder = f"baselines/less-{name}"
        if not run.holds(f"{folder}/influence.npz"):
            here = RunDir(run.file(folder))
            work = Cost()
            with work.timed():
                influence = self._measure(problem, here, finetuner(), proxy, work)
            here.write_arrays("influence.npz", influence=influence, cost=np.array(list(vars(work).values())))
        known = run.read_arrays(f"{folder}/influence.npz")
        finetunes, training, evaluation, gradient, seconds = known["cost"].tolist()
        return known["influence"], Cost(int(finetunes), int(training), int(evaluation), int(gradient), seconds)

    def _measure(
        self, problem: Problem, run: RunDir, finetuner: LeafFinetuner, proxy: ProxySet, cost: Cost
    ) -> np.ndarray:
        targets = proxy_rows(finetuner, proxy)
        task = problem.task[np.array(targets["harp_row"][:])]
        if len(np.unique(task)) < problem.n_tasks:
            raise DataError("All proxy rows of a task are lost to truncation: raise `max_length`.")
        member = np.eye(problem.n_tasks)[task]
        means = torch.tensor(member / member.sum(axis=0), dtype=torch.float32)
        kept = np.array(finetuner.tokenised["harp_row"][:])
        influence = np.full((len(problem), problem.n_tasks), -np.inf)
        influence[kept] = 0
        with temporary_folder() as aside:
            before = float(finetuner.args.learning_rate)
            for epoch, checkpoint in enumerate(self._warm_up(problem, finetuner, Path(aside), cost)):
                with RowGradients(finetuner.model, checkpoint) as rows:
                    project = Projection(sum(w.numel() for w in rows.weights), self.projection, problem.seed)
                    # The mean of cosines is the product with the mean of unit vectors.
                    wanted = torch.stack([project(rows.gradient(row)) for row in targets]).T @ means
                    cost.tokens_gradient += rows.tokens
                    similarities = _similarities(run, epoch, rows, project, finetuner.tokenised, wanted, cost)
                influence[kept] += (before + rows.rate) / 2 * similarities
                before = rows.rate
        return influence

    def _warm_up(self, problem: Problem, finetuner: LeafFinetuner, folder: Path, cost: Cost) -> Iterator[Path]:
        """Finetune on a random share of the pool; the folders of the checkpoints, one an epoch."""
        count = min(max(round(self.warmup * len(problem)), self.warmup_rows), len(problem))
        drawn = np.random.default_rng(problem.seed).choice(len(problem), count, replace=False)
        warm = copy.copy(finetuner)
        warm.bar = "Warm-up"
        warm.args = copy.copy(finetuner.args)
        warm.args.output_dir = str(folder / "run")
        warm.args.max_steps, warm.args.num_train_epochs = -1, self.epochs
        warm.args.save_strategy = type(warm.args.save_strategy)("epoch")
        warm.args.save_total_limit, warm.args.save_only_model = None, False
        done = warm.finetune(np.sort(drawn), problem.seed, folder / "adapter")
        cost.finetunes += 1
        cost.tokens_training += done.tokens
        yield from sorted((folder / "run").glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))


def _similarities(
    run: RunDir, epoch: int, rows: RowGradients, project: Projection, tokenised: Dataset, wanted: torch.Tensor,
    cost: Cost,
) -> np.ndarray:  # fmt: skip
    """(rows, D) similarity of each row's Adam direction with `wanted` (k, D), block by block, none made twice."""
    found = []
    for start in tqdm(range(0, len(tokenised), _BLOCK), desc=f"Gradients, epoch {epoch + 1}", unit="block"):
        file = f"{epoch}-{start}.npz"
        if run.holds(file):
            cost.seconds += float(run.read_arrays(file)["seconds"])
        else:
            tokens, started = rows.tokens, time.monotonic()
            block = [tokenised[i] for i in range(start, min(start + _BLOCK, len(tokenised)))]
            similarity = torch.stack([project(rows.adam(rows.gradient(row))) for row in block]) @ wanted
            run.write_arrays(
                file, similarity=similarity.numpy(), tokens=rows.tokens - tokens, seconds=time.monotonic() - started
            )
        arrays = run.read_arrays(file)
        cost.tokens_gradient += int(arrays["tokens"])
        found.append(arrays["similarity"])
    return np.concatenate(found)


def proxy_rows(finetuner: LeafFinetuner, proxy: ProxySet) -> Dataset:
    """The proxy rows with their first answers, tokenised as rows of the pool are.

    Raises:
        DataError: Some prompts are strings and some messages, or no row survives truncation.
    """
    messages = {isinstance(prompt, list) for prompt in proxy.prompts}
    if len(messages) > 1:
        raise DataError("LESS needs proxy prompts that are all strings or all messages.")
    rows: list[Mapping[str, Any]] = [
        {"prompt": p, "completion": [{"role": "assistant", "content": a[0]}] if messages == {True} else a[0]}
        for p, a in zip(proxy.prompts, proxy.answers, strict=True)
    ]
    made = LeafFinetuner(
        finetuner.model, Dataset.from_list(rows), finetuner.args, finetuner.peft_config, finetuner.processing_class
    )
    return made.tokenised
