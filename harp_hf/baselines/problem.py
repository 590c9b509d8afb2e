"""Makes a baseline's problem out of what a HARP run is given, so that both see the same rows, features and models."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

import numpy as np

from ..execution.tools import open_tools
from ..features import load_features, load_proxy_features, pool_texts, proxy_texts
from ..rundir import RunDir
from ..selection import load_hierarchy
from .selector import Problem

if TYPE_CHECKING:
    from ..config import HarpConfig
    from ..inputs import Inputs
    from ..result import HarpResult


def open_problem(
    given: Inputs, args: HarpConfig, *, proxy_features: np.ndarray | None = None, result: HarpResult | None = None
) -> Problem:
    """The problem that `measure` solves in `args.output_dir`, for a selector.

    What HARP or another selector has computed there (features, hierarchy, measurements) is used and not repeated.

    Args:
        given: Pool, proxy set, model and the rest, from [`read_inputs`].
        args: Settings, as for `measure`.
        proxy_features: (n_proxy, d) vectors of the proxy rows, needed where the pool's features are an array.
        result: What `measure` returned, for selectors that start from it.

    Raises:
        HarpError: As in `measure`.
    """
    run = RunDir(args.output_dir or "harp_output")
    run.claim(given.manifest(args))
    matrix = load_features(
        run, given.pool, given.features, text_field=args.dataset_text_field, decode=given.decode, seed=args.seed
    )

    @cache
    def compared() -> np.ndarray:
        if proxy_features is None:
            return load_proxy_features(
                given.pool, given.proxy, given.features,
                text_field=args.dataset_text_field, decode=given.decode, seed=args.seed,
            )  # fmt: skip
        norms = np.linalg.norm(proxy_features, axis=1, keepdims=True)
        return (proxy_features / np.where(norms > 0, norms, 1)).astype(np.float32)

    finetuner, evaluator = open_tools(
        given.model, given.pool, given.proxy, given.metrics, given.peft_config, given.tokenizer, args
    )
    return Problem(
        matrix, compared, given.proxy.task, args.seed,
        texts=lambda: pool_texts(given.pool, args.dataset_text_field, given.decode),
        proxy_texts=proxy_texts(given.proxy),
        proxy=given.proxy,
        hierarchy=load_hierarchy(run, matrix, args),
        run=run,
        finetuner=finetuner,
        evaluator=evaluator,
        result=result,
        prior=args.prior,
    )  # fmt: skip
