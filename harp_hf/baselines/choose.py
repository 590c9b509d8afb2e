"""`harp-hf select --selector NAME`: a baseline in HARP's place."""

from __future__ import annotations

from typing import Any

import numpy as np
from datasets import Dataset

from ..config import HarpConfig
from ..errors import ConfigError, HarpError
from ..inputs import read_inputs
from ..quiet import quiet
from ..result import HarpResult
from ..rundir import RunDir
from ..selection import measure
from . import MEASURED, Cost, Selector, selector
from .problem import open_problem


def check_selector(name: str, args: HarpConfig) -> Selector:
    """The selector of that name, if it can be used with these settings.

    Raises:
        ConfigError: There is none, it needs a budget, or several processes were launched.
    """
    found = selector(name)
    if args.world_size > 1:
        raise ConfigError("A baseline is made by one process: start it without a launcher.")
    if args.budget is None and name not in MEASURED:
        raise ConfigError(f"`budget` is needed: the selector {name!r} ranks all rows and has no limit of its own.")
    return found


def choose(
    name: str, dataset: Any, eval_dataset: Any, model: Any, args: HarpConfig, peft_config: Any = None, *,
    result: HarpResult | None = None,
) -> tuple[Dataset, Cost]:  # fmt: skip
    """Choose rows with the selector of that name.

    What HARP or another selector has computed in `args.output_dir` is used and not repeated.

    Args:
        name: One of `SELECTORS`.
        dataset, eval_dataset, model, args, peft_config: As for [`measure`].
        result: What [`measure`] returned for them; made here where the selector starts from it.

    Returns:
        The chosen rows, best first, with `harp_row` (index in the pool) beside their own columns; and what choosing
        them took.

    Raises:
        HarpError: As in [`measure`]; also where there is no budget and the selector has no limit of its own.
    """
    chooser = check_selector(name, args)
    if name in MEASURED and result is None:
        result = measure(dataset, eval_dataset, model, args, peft_config)
    given = read_inputs(dataset, eval_dataset, model, args, peft_config)
    with RunDir(args.output_dir or "harp_output").locked():
        problem = open_problem(given, args, result=result)
        ranking = chooser.rank(problem, args.budget)
    limits = [limit for limit in (args.budget, ranking.stop) if limit is not None]
    rows = ranking.rows[: min(limits)]
    if len(rows) == 0:
        raise HarpError(f"The selector {name!r} expects no leaf of the pool to raise the score of the active tasks.")
    with quiet():
        return given.pool.select(rows).add_column("harp_row", np.asarray(rows)), ranking.cost
