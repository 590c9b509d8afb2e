"""A result on disk: the folder `result` of a run directory, in which everything but the pool's rows stands."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from .config import HarpConfig
from .errors import DataError
from .hierarchy import Hierarchy
from .measurements import Measurements
from .mixture import load_pool, read_mixture
from .pool import content_digest
from .posterior import Posterior
from .result import Choice, HarpResult
from .rundir import RunDir
from .sources import Sources


def save_result(result: HarpResult, path: str | Path) -> None:
    """Write everything but the pool's rows to the folder `path`/result; see [`load_result`]."""
    run, measured, sources = RunDir(path), result.measurements, result.sources
    told = {"row": sources.row, "mean": sources.mean, "sd": sources.sd} if sources is not None else {}
    run.write_arrays(
        "result/arrays.npz",
        task=result.task, mean=result.posterior.mean, sd=result.posterior.sd, distinguishable=result.distinguishable,
        leaves=measured.leaves, scores=measured.scores, null=measured.null,
        trained_rows=np.concatenate([measured.rows[g] for g in measured.leaves.tolist()]),
        trained_ends=np.cumsum([len(measured.rows[g]) for g in measured.leaves.tolist()]),
        **{f"hierarchy_{k}": v for k, v in result.hierarchy.arrays().items()},
        **{f"source_{k}": v for k, v in told.items()},
        **({"nearest": result.nearest} if result.nearest is not None else {}),
        **({"control": measured.control} if measured.control is not None else {}),
    )  # fmt: skip
    run.write_json("result/seconds.json", {"seconds": result.seconds, "cost": measured.cost})
    run.write_json("result/result.json", {
        "tasks": result.tasks, "metrics": result.metrics, "choice": asdict(result.choice), "pool": result.digest,
        "notes": list(result.posterior.notes), "failed": {str(k): v for k, v in measured.failed.items()},
        "sources": sources.names if sources is not None else None,
    })  # fmt: skip


def save_choice(choice: dict[str, Any], path: str | Path) -> None:
    """Make `choice`, as it is written in `path`/result, that of the result which is there now."""
    run = RunDir(path)
    run.write_json("result/result.json", run.read_json("result/result.json") | {"choice": choice})


def load_result(path: str | Path, dataset: Any = None) -> HarpResult:
    """Load what [`measure`] or [`HarpResult.save`] wrote.

    Args:
        path: The run directory.
        dataset: The pool, where it did not come from a path or the Hub.

    Raises:
        RunDirError: `path` holds no finished run.
        DataError: The pool is not there or is not the one that was measured.
    """
    if not Path(path).is_dir():
        raise DataError(f"The run directory {path} is not there.")
    run = RunDir(path)
    known, arrays = run.read_json("result/result.json"), run.read_arrays("result/arrays.npz")
    costs = run.read_json("result/seconds.json")
    config = {"seed": HarpConfig.seed} | run.read_yaml("config.yaml")
    if dataset is None:
        if not config.keys() & {"dataset_name", "datasets"}:
            raise DataError(f"The pool of {path} was an object in memory: pass it as `dataset`.")
        pool, _ = load_pool(
            read_mixture(config) or config["dataset_name"], config["seed"],
            name=config.get("dataset_config"), split=config.get("dataset_train_split", "train"),
        )  # fmt: skip
    else:
        pool, _ = load_pool(dataset, config["seed"])
    if content_digest(pool) != known["pool"]:
        raise DataError(f"The pool is not the one that {path} was measured on.")
    leaves = arrays["leaves"].tolist()
    rows = dict(zip(leaves, np.split(arrays["trained_rows"], arrays["trained_ends"][:-1]), strict=True))
    failed = {int(k): v for k, v in known["failed"].items()}
    measured = Measurements(
        arrays["leaves"], arrays["scores"], arrays["null"], failed, rows, costs["cost"], arrays.get("control")
    )  # fmt: skip
    sources = None
    if known.get("sources"):
        sources = Sources(known["sources"], *(arrays[f"source_{name}"] for name in ("row", "mean", "sd")))
    chosen = known["choice"] | {"active_tasks": tuple(known["choice"]["active_tasks"])}
    return HarpResult(
        pool, known["tasks"], known["metrics"], arrays["task"],
        Hierarchy(**{k.removeprefix("hierarchy_"): v for k, v in arrays.items() if k.startswith("hierarchy_")}),
        measured, Posterior(arrays["mean"], arrays["sd"], tuple(known["notes"])),
        arrays["distinguishable"], Choice(**chosen), costs["seconds"], known["pool"], Path(path), sources,
        arrays.get("nearest"),
    )  # fmt: skip
