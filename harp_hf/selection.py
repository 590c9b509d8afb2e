"""`select` and `measure`: the method from top to bottom."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, DatasetDict
from peft import PeftConfig
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import DatasetMixtureConfig

from .config import HarpConfig
from .design import choose_leaves
from .errors import RunDirError
from .evaluation.scoring import Metric, describe_metrics
from .execution.local import measure_here
from .features import comparable, load_features, load_proxy_features
from .hierarchy import Hierarchy, build_hierarchy
from .inputs import Inputs, read_inputs
from .manifest import describe_call
from .measurements import Measurements
from .names import CONTROL
from .processes import from_main, join, main_first
from .proxy import ProxySet
from .result import HarpResult, conclude
from .rundir import RunDir
from .similarity import leaf_similarity, nearest_rows
from .stages import stage, started
from .texts import without_tokens

logger = logging.getLogger(__name__)


def select(
    dataset: Dataset | DatasetDict | DatasetMixtureConfig | str,
    eval_dataset: Dataset | DatasetDict | ProxySet | str | None = None,
    model: str | PreTrainedModel | None = None,
    args: HarpConfig | None = None,
    peft_config: PeftConfig | None = None,
    processing_class: PreTrainedTokenizerBase | None = None,
    **objects: Any,
) -> Dataset:
    """Choose the rows of `dataset` that help `model` on the tasks of `eval_dataset`.

    Takes the arguments of [`measure`] and returns `measure(...).select()`: the chosen rows in greedy order, their
    columns untouched, with the result columns described in [`HarpResult.select`].
    """
    return measure(dataset, eval_dataset, model, args, peft_config, processing_class, **objects).select()


def measure(
    dataset: Dataset | DatasetDict | DatasetMixtureConfig | str,
    eval_dataset: Dataset | DatasetDict | ProxySet | str | None = None,
    model: str | PreTrainedModel | None = None,
    args: HarpConfig | None = None,
    peft_config: PeftConfig | None = None,
    processing_class: PreTrainedTokenizerBase | None = None,
    *,
    features: Any = None,
    metric: Metric | dict[str, Metric] | None = None,
    null_scores: Any = None,
) -> HarpResult:
    """The costly part: finetune on a few leaves of the pool, score each on the target tasks, infer all other leaves.

    Everything measured is kept in `args.output_dir`; the same call continues there after a crash. Under
    `accelerate launch` all processes share each finetune, the main one does the rest, and all return the result.

    Args:
        dataset: The pool, in any format that [`~trl.SFTTrainer`] takes; also a path, a Hub id or a mixture.
        eval_dataset: The proxy set: held-out rows of the target tasks with `prompt` and `answer` (or `completion`),
            and optionally `task` and `choices`; also a `DatasetDict` with one task a key, a path or a Hub id.
        model: Path or Hub id of the base model, or the model itself.
        args: Settings; see [`HarpConfig`].
        peft_config: The adapter of the leaf finetunes. Default: LoRA of rank 16 on all linear layers.
        processing_class: The tokenizer. Default: the model's own.
        features: A sentence-transformers model or an (n, d) array, in place of `args.features`.
        metric: A metric by name, a callable in the form of a TRL reward function, or a dict with one of these for
            each task, in place of `args.metric`.
        null_scores: The base model's scores where they are known: (n_proxy,) array, dict with one score a task, or
            path of a JSON-lines file, in place of `args.null_scores`.

    Returns:
        [`HarpResult`]: selects, explains and re-weighs without finetuning again.

    Raises:
        HarpError: Something passed cannot be used; one sentence says what and where.
    """
    args = args if args is not None else HarpConfig()
    join()
    given = main_first(lambda: read_inputs(
        dataset, eval_dataset, model, args, peft_config, processing_class, features, metric, null_scores
    ))  # fmt: skip
    run = RunDir(args.output_dir or "harp_output")
    names = {"dataset_name": dataset, "eval_dataset_name": eval_dataset, "model_name_or_path": model}
    named = {name: without_tokens(str(value)) for name, value in names.items() if isinstance(value, str | Path)}
    mixtures = [dataset] if isinstance(dataset, DatasetMixtureConfig) else []
    with ExitStack() as held:
        from_main(lambda: held.enter_context(run.locked()))
        config = _claim(run, given.manifest(args), named | describe_call(args, *mixtures))
        from_main(lambda: held.enter_context(started(run)))
        return _measure(run, given, args, config)


def _measure(run: RunDir, given: Inputs, args: HarpConfig, config: dict[str, Any]) -> HarpResult:
    matrix = _timed(run, "features", lambda: load_features(
        run, given.pool, given.features, text_field=args.dataset_text_field, decode=given.decode, seed=args.seed,
    ))  # fmt: skip
    hierarchy = _timed(run, "hierarchy", lambda: load_hierarchy(run, matrix, args))
    nearest = similarity = None
    if args.similarity and not comparable(given.pool, given.proxy, given.features):
        logger.info("The proxy set has no features of its own, so similarity to it is not used.")
    elif args.similarity:
        nearest = _timed(run, "similarity", lambda: _load_nearest(run, matrix, given, args))
        similarity = leaf_similarity(nearest, hierarchy, given.proxy.task, len(given.proxy.tasks))
    leaves = choose_leaves(hierarchy, args.max_measurements, similarity)
    logger.info("Measuring %d of %d leaves on %d tasks.", len(leaves), hierarchy.n_leaves, len(given.proxy.tasks))

    seeds = range(args.seed, args.seed + args.num_repeats)
    wanted = np.append(leaves, CONTROL) if args.control else leaves
    todo = [(g, s) for s in seeds for g in wanted.tolist()]
    with stage(run, "measurements"):
        null = _executor(args)(run, todo, partial(_rows, hierarchy, args), given, args)

    measured = Measurements.read(run, wanted, seeds, null)
    seconds = run.read_json("seconds.json") | {
        "training": measured.cost["seconds_training"], "evaluation": measured.cost["seconds_evaluation"]
    }  # fmt: skip
    with stage(run, "inference"):
        result = conclude(
            given.pool, given.proxy, hierarchy, measured, args, describe_metrics(given.metrics), given.digest, seconds,
            given.labels, nearest,
        )  # fmt: skip
        from_main(lambda: result.save(run.path))
        from_main(lambda: run.write_yaml("config.yaml", config))
    return replace(result, path=run.path)


def _rows(hierarchy: Hierarchy, args: HarpConfig, leaf: int) -> np.ndarray:
    """Pool rows of a leaf, or those of the control."""
    if leaf != CONTROL:
        return hierarchy.rows(leaf)
    n_rows = len(hierarchy.leaf)
    drawn = np.random.default_rng(args.seed).choice(n_rows, min(args.leaf_size, n_rows), replace=False)
    return np.sort(drawn)


def _executor(args: HarpConfig) -> Callable[..., dict[str, np.ndarray]]:
    if args.executor == "local":
        return measure_here
    from .execution.ray import measure_on_ray

    return measure_on_ray


def _claim(run: RunDir, manifest: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    """Make this the directory of the run, and return what its `config.yaml` is to hold when there is a result.

    Names of the pool, the proxy set, the model and the adapter that an earlier start has written are kept, as they are
    known to be of the same: on the command line this one may have them as objects only.
    """

    def claim() -> tuple[Any, dict[str, Any]]:
        continued = run.claim(manifest)
        ours, known = {field.name for field in fields(HarpConfig)}, {}
        with suppress(RunDirError):  # a damaged one is made anew
            known = run.read_yaml("config.yaml") if continued else {}
        asked = {name: value for name, value in known.items() if name not in ours} | config
        if not run.file("result/result.json").exists():
            run.write_yaml("config.yaml", asked)
        return run.read_json("manifest.json"), asked

    claimed, asked = from_main(claim)
    if not run.file("manifest.json").exists() or run.read_json("manifest.json") != claimed:
        raise RunDirError(f"The run directory {run.path} must be on a file system that all processes share.")
    return asked


def load_hierarchy(run: RunDir, matrix: np.ndarray, args: HarpConfig) -> Hierarchy:
    """The hierarchy of the pool, built once a run directory."""
    if not run.holds("hierarchy.npz"):
        built = build_hierarchy(matrix, leaf_size=args.leaf_size, branching=args.branching, seed=args.seed)
        run.write_arrays("hierarchy.npz", **built.arrays())
    return Hierarchy(**run.read_arrays("hierarchy.npz"))


def _load_nearest(run: RunDir, matrix: np.ndarray, given: Inputs, args: HarpConfig) -> np.ndarray:
    if not run.holds("nearest.npz"):
        examples = load_proxy_features(
            given.pool, given.proxy, given.features,
            text_field=args.dataset_text_field, decode=given.decode, seed=args.seed,
        )  # fmt: skip
        run.write_arrays("nearest.npz", nearest=nearest_rows(matrix, examples))
    return run.read_arrays("nearest.npz")["nearest"]


def _timed(run: RunDir, name: str, work: Callable[[], Any]) -> Any:
    """Do one stage; the seconds it took when it was really done are kept in the run directory."""

    def timed() -> Any:
        known = run.read_json("seconds.json") if run.holds("seconds.json") else {}
        began = time.monotonic()
        with stage(run, name):
            done = work()
        if name not in known:
            run.write_json("seconds.json", known | {name: time.monotonic() - began})
        return done

    return main_first(timed)
