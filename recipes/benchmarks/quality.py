"""Which selector finds the better rows: HARP and its baselines on one pool, at equal rows and at equal total compute.

    python recipes/benchmarks/quality.py --pool pool.parquet --proxy proxy.parquet --test test.parquet \\
        --model HuggingFaceTB/SmolLM2-135M-Instruct --config recipes/benchmarks/smollm2.yaml \\
        --output_dir runs/quality --rows 300 600 --results quality.json

Every finished (selector, rows, seed) is at once in the results file and is never made again: stop it whenever you like
and call it again. A finetune goes on where it was, at most five minutes before. It ends with the tables and figures of
what is there; so it begins. Selectors that cost far more than HARP can be held to its effort:
`--options '{"datamodels": {"finetunes": 16, "epochs": null}}'`.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from functools import cache
from typing import Any

import numpy as np
from quality_tables import Results, draw, markdown

from harp_hf import HarpResult, measure
from harp_hf.baselines import MEASURED, SELECTORS, Problem, Ranking, selector
from harp_hf.baselines.ablations import spent
from harp_hf.baselines.problem import open_problem
from harp_hf.envelopes import VARIANTS
from harp_hf.errors import HarpError
from harp_hf.inputs import read_inputs
from harp_hf.manifest import describe_call
from harp_hf.models import describe_model, describe_peft
from harp_hf.pool import load_rows
from harp_hf.proxy import load_proxy
from harp_hf.rundir import RunDir
from harp_hf.settings import changed_settings, load_settings
from harp_hf.trials import Trial, Trials

METRICS = ("exact_match", "auto")
logger = logging.getLogger("harp_hf.quality")


def main(argv: list[str] | None = None) -> None:
    """Run what is missing of the benchmark and print its tables."""
    asked = _parse(argv)
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("harp_hf").setLevel(logging.INFO)
    benchmark = Benchmark(asked)
    results = Results.open(asked.results, benchmark.describe(), benchmark.test)
    print(markdown(results, asked.selectors, asked.rows, asked.seeds, asked.equal_compute))
    try:
        benchmark.run(results)
    finally:
        print(markdown(results, asked.selectors, asked.rows, asked.seeds, asked.equal_compute))
        for path in draw(results, asked.selectors):
            print(f"Figure written to {path}.")


class Benchmark:
    """All selectors on one pool; what they compute is kept in one directory a seed, which they share."""

    def __init__(self, asked: argparse.Namespace) -> None:
        self.asked = asked
        self.pool, self.proxy, self.test = load_rows(asked.pool), load_proxy(asked.proxy), load_proxy(asked.test)
        args, adapter = self._settings(asked.seeds[0])
        run = RunDir(asked.output_dir)
        self.trials = Trials(run, self.pool, self.test, asked.model, args, adapter, metrics=METRICS)
        self.given = read_inputs(self.pool, self.proxy, asked.model, args, adapter)
        self.tokens = cache(self.trials.tokens_by_row)
        self.result, self.problem, self.ranking = cache(self._result), cache(self._problem), cache(self._ranking)

    def describe(self) -> dict[str, Any]:
        """What results must share to stand in one table; no paths of this machine."""
        args, adapter = self._settings(self.asked.seeds[0])
        settings = {k: v for k, v in changed_settings(args).items() if k not in ("seed", "model_init_kwargs")}
        choosing = ("num_repeats", "active_tasks", "task_weights")
        settings |= {k: v for k, v in describe_call(args).items() if k in choosing}
        return {
            "pool": self.given.digest, "proxy": self.proxy.digest, "test": self.test.digest,
            "model": describe_model(self.asked.model).rsplit(" ", 1)[1], "adapter": describe_peft(adapter),
            "epochs": self.asked.epochs, "max_measurements": args.max_measurements, "prior": args.prior,
            "control": args.control,
            "similarity": args.similarity, "budget_by": args.budget_by, "metric": args.metric,
            "features": self.asked.features.rsplit("/", 1)[-1], "settings": settings,
        }  # fmt: skip

    def run(self, results: Results) -> None:
        """Make every result that is missing.

        Raises:
            HarpError: A selector has a result that was made with other options.
        """
        for name in {*self.asked.selectors, *self.asked.equal_compute}:
            options = self.asked.options.get(name, {})
            if any(r["selector"] == name and r.get("options", {}) != options for r in results.known["results"]):
                raise HarpError(f"The results in {results.path} were made with other options of {name}.")
        for comparison, name, rows, seed in self._wanted():
            if results.find(comparison, name, rows, seed):
                continue
            logger.info("%s, %s rows, seed %s, equal %s.", name, rows, seed, comparison)
            try:
                found = self._equal_rows(name, rows, seed) if comparison == "rows" else self._equal_compute(
                    results, name, rows, seed
                )  # fmt: skip
            except HarpError as error:
                logger.warning("%s has no result: %s", name, error)
                continue
            key = {"comparison": comparison, "selector": name, "rows": rows, "seed": seed}
            results.add(key | {"options": self.asked.options.get(name, {})} | found)

    def _wanted(self) -> Iterator[tuple[str, str, int, int]]:
        """Comparison, selector, rows and seed of every result, the most telling first."""
        yield "rows", "base model", 0, self.asked.seeds[0]
        for seed in self.asked.seeds:
            for comparison, names in (("rows", self.asked.selectors), ("compute", self.asked.equal_compute)):
                for name in names:
                    for rows in self.asked.rows:
                        yield comparison, name, rows, seed

    def _equal_rows(self, name: str, rows: int, seed: int) -> dict[str, Any]:
        """At most `rows` rows: fewer where a selector, asked for that many, would rather stop."""
        if name == "base model":
            nothing = Ranking(np.empty(0, np.int64))
            return self._told(nothing, 0, 0.0, self.trials.run(nothing.rows, seed, 0.0, "base-model"))
        ranking = self.ranking(name, seed, rows if name in (*VARIANTS, *MEASURED) else None)
        count = rows if ranking.stop is None else min(rows, ranking.stop)
        if count == 0:
            raise HarpError("it expects no row to help.")
        return self._finetuned(ranking, count, self.asked.epochs, seed, name)

    def _equal_compute(self, results: Results, name: str, rows: int, seed: int) -> dict[str, Any]:
        """As many rows, best first, as spend what HARP spent on selecting and on its finetune on `rows` rows.

        Where the whole pool is not enough, more epochs over it.
        """
        harp = results.find("rows", self.asked.harp, rows, seed)
        if harp is None:
            raise HarpError(f"{self.asked.harp} has none at {rows} rows and seed {seed}, so its compute is not known.")
        ranking, epochs = self.ranking(name, seed, None), self.asked.epochs
        left = harp["compute"] - ranking.cost.compute
        spent_by = np.cumsum(self.tokens()[ranking.rows]) * epochs
        count = int(np.searchsorted(spent_by, left, side="right"))
        if count == 0:  # its selection alone costs more
            return {"used": 0, "selection": asdict(ranking.cost), "compute": ranking.cost.compute, "scores": {}}
        if count == len(ranking.rows):
            epochs = round(float(epochs * left / spent_by[-1]), 2)
        return self._finetuned(ranking, count, epochs, seed, name)

    def _finetuned(self, ranking: Ranking, count: int, epochs: float, seed: int, name: str) -> dict[str, Any]:
        return self._told(ranking, count, epochs, self.trials.run(ranking.rows[:count], seed, epochs, name))

    def _told(self, ranking: Ranking, used: int, epochs: float, trial: Trial) -> dict[str, Any]:
        """What the results file keeps of a finetune."""
        final = {k: v for k, v in asdict(trial).items() if k != "scores"}
        return {
            "used": used, "epochs": epochs, "stop": ranking.stop, "selection": asdict(ranking.cost), "final": final,
            "compute": ranking.cost.compute + trial.tokens_training,
            "scores": dict(zip(METRICS, trial.scores, strict=True)),
        }  # fmt: skip

    def _settings(self, seed: int) -> Any:
        folder = f"{self.asked.output_dir}/seed-{seed}"
        return load_settings(self.asked.config, features=self.asked.features, output_dir=folder, seed=seed)

    def _result(self, seed: int) -> HarpResult:
        args, adapter = self._settings(seed)
        return measure(self.pool, self.proxy, self.asked.model, args, adapter)

    def _problem(self, seed: int) -> Problem:
        return open_problem(self.given, self._settings(seed)[0])

    def _ranking(self, name: str, seed: int, rows: int | None) -> Ranking:
        """All rows, best first; how HARP's begin may hang on how many are wanted."""
        if name in VARIANTS:
            result = self.result(seed)
            chosen = result.chosen(replace(result.choice, variant=name, budget=rows))[0]
            return Ranking(chosen, spent(result.measurements), len(chosen))
        problem = self.problem(seed)
        if name in MEASURED:
            problem = replace(problem, result=self.result(seed))
        return selector(name, **self.asked.options.get(name, {})).rank(problem, rows)


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = [*VARIANTS, *SELECTORS]
    parser.add_argument("--pool", required=True, help="the rows to choose from")
    parser.add_argument("--proxy", required=True, help="the rows to choose by")
    parser.add_argument("--test", required=True, help="the rows that final finetunes are scored on")
    parser.add_argument("--model", required=True, help="path or Hub id of the base model")
    parser.add_argument("--features", default="sentence-transformers/all-MiniLM-L6-v2", help="as in HarpConfig")
    parser.add_argument("--config", help="YAML file of more settings, as of `harp-hf select`")
    parser.add_argument("--output_dir", required=True, help="where all that is computed is kept")
    parser.add_argument("--results", required=True, help="JSON file of the results")
    parser.add_argument("--rows", type=int, nargs="+", default=[300, 600], help="rows to choose")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=float, default=2.0, help="passes of the final finetune")
    parser.add_argument("--selectors", nargs="+", default=known, choices=known, metavar="NAME", help=", ".join(known))
    parser.add_argument(
        "--equal_compute", nargs="*", choices=list(SELECTORS), metavar="NAME",
        help="selectors to run at HARP's compute too, if any (default: those that do not start from its measurements)",
    )  # fmt: skip
    parser.add_argument(
        "--options", type=json.loads, default={}, metavar="JSON",
        help="options of selectors, as the fields of their classes, by name",
    )  # fmt: skip
    asked = parser.parse_args(argv)
    if not isinstance(asked.options, dict) or not all(isinstance(o, dict) for o in asked.options.values()):
        parser.error('--options takes an object for each selector, such as {"less": {"epochs": 1}}')
    for name, options in asked.options.items():
        selector(name, **options)
    asked.harp = next((name for name in asked.selectors if name in VARIANTS), None)
    if asked.equal_compute is None:
        asked.equal_compute = [n for n in asked.selectors if n not in (*VARIANTS, *MEASURED)] if asked.harp else []
    if asked.equal_compute and asked.harp is None:
        parser.error("--equal_compute needs harp-c or harp-e among --selectors")
    return asked


if __name__ == "__main__":
    try:
        main()
    except HarpError as error:
        sys.exit(f"quality: {error}")
