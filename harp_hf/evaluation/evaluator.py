"""What every evaluation backend offers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np


class Evaluator(Protocol):
    """Scores the base model and adapters of it on every row of one proxy set, all in the same way.

    Attributes:
        tokens (`int`): Tokens read or generated so far.
        adapters_at_once (`int`): How many adapters are best scored in one call.
        bar (`str`, *optional*): What the progress bar of an evaluation is called. Default: there is none.
    """

    tokens: int
    adapters_at_once: int
    bar: str | None

    def evaluate(self, adapters: Sequence[Path | None]) -> np.ndarray:
        """Score adapters.

        Args:
            adapters: Folders with saved adapters; `None` is the base model itself.

        Returns:
            `np.ndarray`: (len(adapters), n_proxy) float64, each score in [0, 1].
        """
        ...
