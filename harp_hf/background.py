"""Leaves measured among random rows, because what a leaf does alone is not always what it adds to a mixture.

A share of every finetune's rows is then random, the same for all leaves, and effects are what a leaf's rows add to
random rows alone: to the controls, finetunes of the same effort that have only such. A selection mixes random rows in,
too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from .hierarchy import Hierarchy

if TYPE_CHECKING:
    from .config import HarpConfig


def controls(measured: int) -> list[int]:
    """Finetunes on random rows alone, as negative numbers where others are leaves.

    Every effect is against their mean, so they are as many as the root of the number of measured leaves (Dunnett,
    1955), and at least two, which tells how far two draws and finetunes of the same kind differ.
    """
    return [-1 - draw for draw in range(max(round(measured**0.5), 2))]


def rows_to_finetune_on(hierarchy: Hierarchy, args: HarpConfig) -> Callable[[int], np.ndarray]:
    """The pool rows of each leaf's finetune, and of each control's.

    A leaf gives as many of its rows as its part of `max_steps` batches takes, or all where it has fewer or where
    `max_steps` is off; random ones are added for the share to be `random_share`. A control has as many random rows as
    `max_steps` batches take, or as a leaf of the size aimed at with its random rows; each draws its own.
    """
    share = args.random_share
    if not share:
        return hierarchy.rows
    shuffled = shuffled_rows(len(hierarchy.leaf), args.seed)
    room = args.max_steps * args.train_batch_size * args.gradient_accumulation_steps * args.world_size

    def rows(leaf: int) -> np.ndarray:
        if leaf < 0:
            drawn = shuffled_rows(len(shuffled), args.seed, -1 - leaf)
            return drawn[: room if room > 0 else round(args.leaf_size / (1 - share))]
        own = hierarchy.rows(leaf)
        if 0 < room * (1 - share) < len(own):
            random = np.random.default_rng([args.seed, leaf])
            own = random.choice(own, max(round(room * (1 - share)), 1), replace=False)
        others = shuffled[~np.isin(shuffled, own)]
        return np.concatenate([own, others[: round(len(own) * share / (1 - share))]])

    return rows


def shuffled_rows(n: int, seed: int, draw: int = 0) -> np.ndarray:
    """(n,) all pool rows in random order; leaves stand among the first of draw 0."""
    return np.random.default_rng([seed, n, draw]).permutation(n)


@dataclass(frozen=True, eq=False)
class Background:
    """The random rows that leaves were measured among.

    Attributes:
        share: their share in every leaf finetune, in (0, 1).
        seed: they are the first of `shuffled_rows` with this seed.
        scores: (k, n_proxy) scores after each of k finetunes on random rows alone.
    """

    share: float
    seed: int
    scores: np.ndarray

    def run_variance(self, task: np.ndarray, n_tasks: int) -> np.ndarray:
        """(D,) variance of a finetune's task means from run to run; 0 where there is only one.

        Args:
            task: (n_proxy,) task of each proxy row, 0..n_tasks-1.
            n_tasks: number of tasks D.
        """
        if len(self.scores) == 1:
            return np.zeros(n_tasks)
        member = np.eye(n_tasks)[task]
        return (self.scores @ (member / member.sum(axis=0))).var(axis=0, ddof=1)

    def part(self, phi: np.ndarray, gain: np.ndarray) -> np.ndarray:
        """(D,) part of each task's rows that random rows should have, in [0, 1].

        Where a score grows with the square root of the rows of each kind, c sqrt(n), rows are best divided in
        proportion to c^2. Random rows have c = `gain`; a leaf, whose rows were the part 1 - share of its finetune, has
        c = phi / sqrt(1 - share). A task that neither raises leaves its rows to random ones.

        Args:
            phi: (k, D) effects of the leaves to choose from, beyond random rows.
            gain: (D,) what random rows alone add to the base model's score.
        """
        leaves = (np.maximum(phi, 0) ** 2).sum(axis=0) / (1 - self.share)
        random = np.maximum(gain, 0) ** 2
        total = leaves + random
        return np.where(total > 0, random / np.where(total > 0, total, 1), 1.0)

    def rows(self, n: int, count: int, taken: np.ndarray) -> np.ndarray:
        """At most `count` of n pool rows, in random order, none of those `taken`."""
        shuffled = shuffled_rows(n, self.seed)
        return shuffled[~np.isin(shuffled, taken)][:count]
