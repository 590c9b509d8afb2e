"""What every baseline is given, what it hands back, and the one Protocol between."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from ..errors import ConfigError, DataError

if TYPE_CHECKING:
    from ..evaluation.evaluator import Evaluator
    from ..finetune import LeafFinetuner
    from ..hierarchy import Hierarchy
    from ..priors import Prior
    from ..proxy import ProxySet
    from ..result import HarpResult
    from ..rundir import RunDir


@dataclass
class Cost:
    """What a ranking cost, including what an earlier, interrupted call had already paid.

    Attributes:
        finetunes (`int`): Finetunes made.
        tokens_training (`int`): Tokens trained on.
        tokens_evaluation (`int`): Tokens read or generated to score proxy rows.
        tokens_gradient (`int`): Tokens of rows whose gradient was taken on its own.
        seconds (`float`): Wall-clock seconds, features of the pool not counted.
    """

    finetunes: int = 0
    tokens_training: int = 0
    tokens_evaluation: int = 0
    tokens_gradient: int = 0
    seconds: float = 0.0

    def __str__(self) -> str:
        return (
            f"Finetunes: {self.finetunes}. Tokens: {self.tokens_training:,} trained, {self.tokens_evaluation:,} "
            f"evaluated, {self.tokens_gradient:,} in gradients of single rows. Seconds: {self.seconds:.0f}."
        )

    @property
    def compute(self) -> float:
        """Tokens, those evaluated counted a third: they are read forwards only (Kaplan et al., 2020)."""
        return self.tokens_training + self.tokens_gradient + self.tokens_evaluation / 3

    def __add__(self, other: Cost) -> Cost:
        return Cost(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    @contextmanager
    def timed(self) -> Iterator[None]:
        """Add the seconds that the body takes."""
        started = time.monotonic()
        try:
            yield
        finally:
            self.seconds += time.monotonic() - started


@dataclass(frozen=True, eq=False)
class Ranking:
    """Pool rows, best first.

    Attributes:
        rows (`np.ndarray`): (k,) int64, no row twice; k is at least min(budget, n).
        cost (`Cost`): What it took.
        stop (`int`, *optional*): How many of the rows the selector would choose itself, where it says so: a budget
            only cuts further.
    """

    rows: np.ndarray
    cost: Cost = field(default_factory=Cost)
    stop: int | None = None


@dataclass(frozen=True, eq=False)
class Problem:
    """What there is to choose from and to judge by; `open_problem` makes it from a run's inputs.

    Only the first three are needed by every selector; one that needs more says so where it is missing.

    Attributes:
        features (`np.ndarray`): (n, d) float32 rows of norm 1 (or 0), maybe memory-mapped.
        proxy_features: (n_proxy, d) the same of the proxy rows, or what gives them; read by `compared()`.
        task (`np.ndarray`): (n_proxy,) int, task of each proxy row, 0..D-1, none left out.
        seed (`int`): Everything random flows from it.
        texts: Gives the n texts of the pool.
        proxy_texts: (n_proxy,) text of each proxy row, answer included.
        proxy (`ProxySet`): The rows to judge by.
        hierarchy (`Hierarchy`): Leaves of the pool.
        run (`RunDir`): Where what is measured is kept.
        finetuner: Gives the finetuner; called only where something is left to do.
        evaluator: Gives the evaluator of the proxy set; called only where something is left to do.
        result (`HarpResult`): What HARP measured on the same pool.
        prior (`str`): How HARP infers from it, as in [`HarpConfig`].
    """

    features: np.ndarray
    proxy_features: np.ndarray | Callable[[], np.ndarray]
    task: np.ndarray
    seed: int = 0
    texts: Callable[[], Iterable[str]] | None = None
    proxy_texts: Sequence[str] | None = None
    proxy: ProxySet | None = None
    hierarchy: Hierarchy | None = None
    run: RunDir | None = None
    finetuner: Callable[[], LeafFinetuner] | None = None
    evaluator: Callable[[], Evaluator] | None = None
    result: HarpResult | None = None
    prior: Prior = "smooth"

    def __post_init__(self) -> None:
        if self.features.ndim != 2 or len(self.features) == 0:
            raise DataError(f"The features have shape {self.features.shape}, but (n, d) with n > 0 is needed.")
        if not callable(self.proxy_features):
            self.compared()
        if len(self.task) == 0 or not np.bincount(self.task).all():
            raise DataError("Every task needs proxy rows.")

    def __len__(self) -> int:
        return len(self.features)

    @property
    def n_tasks(self) -> int:
        return int(self.task.max()) + 1

    def compared(self) -> np.ndarray:
        """(n_proxy, d) features of the proxy rows.

        Raises:
            DataError: They have another shape, or the proxy set has none that compare with the pool's.
        """
        found = self.proxy_features() if callable(self.proxy_features) else self.proxy_features
        if found.shape != (len(self.task), self.features.shape[1]):
            raise DataError(
                f"The features of the proxy set have shape {found.shape}, but "
                f"({len(self.task)}, {self.features.shape[1]}) is needed."
            )
        return found

    def task_means(self, scores: np.ndarray) -> np.ndarray:
        """(..., D) mean over each task's rows of scores (..., n_proxy)."""
        member = np.eye(self.n_tasks)[self.task]
        return scores @ (member / member.sum(axis=0))

    def wanted(self, budget: int | None) -> int:
        """Rows a ranking must have at least: min(budget, n).

        Raises:
            ConfigError: The budget is below 1.
        """
        if budget is not None and budget < 1:
            raise ConfigError(f"`budget` must be at least 1 row, but it is {budget}.")
        return len(self) if budget is None else min(budget, len(self))

    def need(self, name: str, selector: str) -> Any:
        """The attribute of that name, or [`ConfigError`] where the selector was not given it."""
        value = getattr(self, name)
        if value is None:
            raise ConfigError(f"The selector {selector!r} needs the problem's `{name}`, which is not given.")
        return value


class Selector(Protocol):
    """Ranks pool rows; its options are its dataclass fields."""

    def rank(self, problem: Problem, budget: int | None = None) -> Ranking:
        """Rank pool rows, best first.

        Args:
            problem: What to choose from and judge by.
            budget: Rows wanted; the ranking may be longer, and begin otherwise for another budget. Default: all n.

        Raises:
            HarpError: The problem lacks what this selector needs, or the budget is below 1.
        """
        ...


def leaves_to_rows(hierarchy: Hierarchy, leaves: Iterable[int]) -> np.ndarray:
    """Rows of leaves in the leaves' order, within each nearest to its centroid first."""
    return np.concatenate([np.empty(0, np.int64), *(hierarchy.rows(int(leaf)) for leaf in leaves)]).astype(np.int64)


def descending(values: np.ndarray) -> np.ndarray:
    """Indices by descending value, ties by ascending index."""
    return np.argsort(-np.asarray(values, np.float64), kind="stable").astype(np.int64)


def by_turns(task: np.ndarray, scores: Callable[[int], np.ndarray], wanted: int) -> np.ndarray:
    """Rows that tasks take by turns, and within a task its queries; each takes its best row still there.

    Args:
        task: (q,) task of each query, 0..D-1, none left out.
        scores: Gives the scores of all n rows for a query; ties go to the smaller row.
        wanted: How many rows, at most n.
    """
    turns = [deque(np.flatnonzero(task == d).tolist()) for d in range(int(task.max()) + 1)]
    # A query rarely looks further than this; where it must, the rows that are left are ranked for it again.
    depth = 4 * wanted // len(task) + 16
    best: dict[int, deque[int]] = {}
    taken: set[int] = set()
    rows: list[int] = []
    while len(rows) < wanted:
        turn = turns[len(rows) % len(turns)]
        query = turn[0]
        turn.rotate(-1)
        queue = best.setdefault(query, deque())
        while queue and queue[0] in taken:
            queue.popleft()
        if not queue:
            queue.extend(_best(scores(query), rows, depth))
        rows.append(queue.popleft())
        taken.add(rows[-1])
    return np.array(rows, np.int64)


def _best(scores: np.ndarray, taken: list[int], count: int) -> list[int]:
    """The `count` best rows that are not taken, best first, ties by row."""
    left = np.delete(np.arange(len(scores)), taken)
    scores = scores[left]
    if count < len(left):
        near = scores >= np.partition(scores, len(scores) - count)[len(scores) - count]
        left, scores = left[near], scores[near]
    return left[descending(scores)][:count].tolist()
