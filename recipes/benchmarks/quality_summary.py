"""Results of `quality.py` on several pools beside each other: the tables of the READMEs.

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
Key = tuple[str, int, str]
# What is said of a selector by how it was compared.
_AT = {"rows": "", "compute": ", at HARP's compute"}


def main(argv: list[str] | None = None) -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="+", help="JSON files of results, one a pool")
    print(summary([Results.read(path) for path in parser.parse_args(argv).results]))


def summary(pools: list[Results]) -> str:
    """Scores of every selector on every pool, and how far HARP is ahead of each, as Markdown."""
    keys = {_key(result) for pool in pools for result in pool.known["results"] if result["scores"]}
    # By rows, at equal compute below, HARP last.
    ordered = sorted(keys, key=lambda key: (key[1], key[0] == "compute", key[2] == HARP, key[2]))
    others = [key for key in ordered if key[1] and key != ("rows", key[1], HARP)]
    return "\n\n".join(
        [_table(pools, "selector", ordered, _scores), _table(pools, f"{HARP} against", others, _ahead), _NOTE]
    )


_NOTE = """\
Mean test score of tasks in %, by choice where a task has choices, in brackets by exact match alone; behind the comma
over how many seeds, where more than one, and on how many rows, where a selector stopped before it had all. Below:
points that HARP is ahead where both may take as many, with half a 95 % interval, over the seeds that both have."""


def _table(pools: list[Results], first: str, keys: list[Key], cell: Callable[[Results, Key], str]) -> str:
    names = [pool.path.stem.removeprefix("quality_").replace("_", " ") for pool in pools]
    lines = [f"| rows | {first} | {' | '.join(names)} |", f"|---:|---|{'---:|' * len(pools)}"]
    for key in keys:
        cells = [cell(pool, key) for pool in pools]
        if any(cells):
            lines.append(f"| {key[1]} | {key[2]}{_AT[key[0]]} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _scores(pool: Results, key: Key) -> str:
    """Mean score by both metrics, over how many seeds, and the rows used where they are fewer than allowed."""
    found = _by_seed(pool, key)
    if not found:
        return ""
    choice, exact = (np.mean([r["scores"][m]["mean"] for r in found.values()]) for m in ("auto", "exact_match"))
    seeds = f", {len(found)}" if key[1] and len(found) > 1 else ""
    used = np.mean([r["used"] for r in found.values()])
    stopped = f", {used:.0f} rows" if key[0] == "rows" and used < key[1] else ""
    return f"{100 * choice:.1f} ({100 * exact:.1f}){seeds}{stopped}"


def _ahead(pool: Results, key: Key) -> str:
    """What HARP scores more, over the seeds that both have, with half a 95 % interval."""
    found, harp = _by_seed(pool, key), _by_seed(pool, ("rows", key[1], HARP))
    seeds = [seed for seed in found if seed in harp]
    if not seeds:
        return ""
    parts = []
    for metric in reversed(METRICS):
        gaps = np.stack([pool.right(harp[s], metric) - pool.right(found[s], metric) for s in seeds])
        mean, low, high = 100 * mean_intervals(gaps, pool.task)[-1]
        parts.append(f"{mean:+.1f} ± {(high - low) / 2:.1f}")
    return f"{parts[0]} ({parts[1]})"


def _by_seed(pool: Results, key: Key) -> dict[int, dict[str, Any]]:
    return {r["seed"]: r for r in pool.known["results"] if _key(r) == key and r["scores"]}


def _key(result: dict[str, Any]) -> Key:
    return result["comparison"], result["rows"], result["selector"]


if __name__ == "__main__":
    try:
        main()
    except HarpError as error:
        sys.exit(f"quality_summary: {error}")
