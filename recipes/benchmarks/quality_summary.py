"""Results of `quality.py` on several pools beside each other: the tables of the README.

python recipes/benchmarks/quality_summary.py recipes/benchmarks/results/quality_pool_*.json
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
from quality_tables import METRICS, Results

from harp_hf.errors import HarpError
from harp_hf.intervals import mean_intervals

HARP = "harp-c"
# Selector by comparison, by the score of the table; what no pool has is left out.
_AT = {"rows": "", "compute": ", at HARP's compute"}


def main(argv: list[str] | None = None) -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="+", help="JSON files of results, one a pool")
    print(summary([Results.read(path) for path in parser.parse_args(argv).results]))


def summary(pools: list[Results]) -> str:
    """Scores of every selector on every pool, and how far HARP is ahead of each, as Markdown."""
    keys = [(r["comparison"], r["selector"]) for pool in pools for r in pool.known["results"] if r["scores"]]
    keys = sorted(dict.fromkeys(keys), key=lambda key: (key[0] == "compute", key[1] == HARP, key[1]))
    names = [pool.path.stem.removeprefix("quality_").replace("_", " ") for pool in pools]
    others = [key for key in keys if key != ("rows", HARP)]
    return "\n\n".join([
        _table(pools, ["selector", *names], keys, _scores), _table(pools, [f"{HARP} against", *names], others, _ahead),
        _NOTE,
    ])  # fmt: skip


_NOTE = """\
Mean test score of tasks in %, by choice where a task has choices, in brackets by exact match alone; behind the comma
over how many seeds. Below: points that HARP is ahead, with half a 95 % interval, over the seeds that both have."""


def _table(
    pools: list[Results], head: list[str], keys: list[tuple[str, str]], cell: Callable[[Results, str, str], str]
) -> str:
    lines = [f"| {' | '.join(head)} |", f"|---|{'---:|' * len(pools)}"]
    lines += [f"| {name}{_AT[at]} | {' | '.join(cell(pool, at, name) for pool in pools)} |" for at, name in keys]
    return "\n".join(lines)


def _scores(pool: Results, comparison: str, name: str) -> str:
    """Mean score by both metrics, and over how many seeds."""
    found = _by_seed(pool, comparison, name)
    if not found:
        return ""
    choice, exact = (np.mean([r["scores"][m]["mean"] for r in found.values()]) for m in ("auto", "exact_match"))
    seeds = f", {len(found)}" if comparison == "rows" and name != "base model" else ""
    return f"{100 * choice:.1f} ({100 * exact:.1f}){seeds}"


def _ahead(pool: Results, comparison: str, name: str) -> str:
    """What HARP scores more, over the seeds that both have, with half a 95 % interval."""
    found, harp = _by_seed(pool, comparison, name), _by_seed(pool, "rows", HARP)
    seeds = [seed for seed in found if seed in harp]
    if not seeds:
        return ""
    parts = []
    for metric in reversed(METRICS):
        gaps = np.stack([pool.right(harp[s], metric) - pool.right(found[s], metric) for s in seeds])
        mean, low, high = 100 * mean_intervals(gaps, pool.task)[-1]
        parts.append(f"{mean:+.1f} ± {(high - low) / 2:.1f}")
    return f"{parts[0]} ({parts[1]})"


def _by_seed(pool: Results, comparison: str, name: str) -> dict[int, dict[str, Any]]:
    return {
        r["seed"]: r for r in pool.known["results"]
        if (r["comparison"], r["selector"]) == (comparison, name) and r["scores"]
    }  # fmt: skip


if __name__ == "__main__":
    try:
        main()
    except HarpError as error:
        sys.exit(f"quality_summary: {error}")
