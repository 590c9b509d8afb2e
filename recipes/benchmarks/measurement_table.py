"""The table of `measurement.py`, and whether its goals are met."""

from __future__ import annotations

from typing import Any

import numpy as np

WAYS = ("plain", "harp_hf", "bare")
PHASES = ("preparing", "finetuning", "evaluating")
# How many times faster than another way `harp_hf` is to be.
GOALS = {"plain": 4.0, "bare": 0.9}


def markdown(known: dict[str, Any]) -> str:
    """What is measured as a table in Markdown, and whether the goals are met."""
    by_way = {way: sorted((one for one in known["measurements"] if one["way"] == way), key=lambda one: one["repeat"])
              for way in WAYS}  # fmt: skip
    lines = [
        "| way | measurements | preparing, s | finetuning, s | evaluating, s | together, s | processor, s | "
        "tokens trained | tokens evaluated | training loss | exact match |",
        "|---" * 11 + "|",
    ]
    for way, found in by_way.items():
        if found:
            phases = [f"{np.median([one['seconds'][phase] for one in found]):.2f}" for phase in PHASES]
            means = [np.mean([one[name] for one in found]) for name in ("loss", "exact_match")]
            tokens = found[0]["tokens"]
            lines.append(
                f"| {way} | {len(found)} | {' | '.join(phases)} | {_spread(_total(found, 'seconds'), '.2f')} | "
                f"{_spread(_total(found, 'processor'), '.2f')} | {tokens['training']:,} | {tokens['evaluation']:,} | "
                f"{means[0]:.4f} | {means[1]:.3f} |"
            )
    lines += ["", "Seconds are medians; in brackets stand the least and the most."]
    if known["once"]:
        loading, tokenising = known["once"]["loading"], known["once"]["tokenising"]
        lines.append(
            f"`harp_hf` loads once in {loading:.2f} s, and tokenises pool and proxy set in {tokenising:.2f} s."
        )
    lines.append("")
    harp = by_way["harp_hf"]
    for way, goal in GOALS.items():
        other = by_way[way]
        if not harp or not other:
            lines.append(f"Goal, at least {goal:g}x the speed of `{way}`: not measured.")
            continue
        told = [_ratios(other, harp, kind) for kind in ("seconds", "processor")]
        met = np.median(_total(other, "seconds")) / np.median(_total(harp, "seconds")) >= goal
        lines.append(
            f"Goal, at least {goal:g}x the speed of `{way}`: {'met' if met else 'not met'}, {told[0]} by the clock, "
            f"{told[1]} by the processor; finetuning {_ratios(other, harp, 'seconds', 'preparing', 'finetuning')}, "
            f"evaluating {_ratios(other, harp, 'seconds', 'evaluating')}."
        )
    return "\n".join(lines)


def _total(found: list[dict[str, Any]], kind: str, *phases: str) -> list[float]:
    return [sum(one[kind][phase] for phase in phases or PHASES) for one in found]


def _ratios(other: list[dict[str, Any]], harp: list[dict[str, Any]], kind: str, *phases: str) -> str:
    """Ratio of the medians, and the least and the largest ratio of a turn."""
    theirs, ours = _total(other, kind, *phases), _total(harp, kind, *phases)
    turns = [a / b for a, b in zip(theirs, ours, strict=False)]
    return f"{np.median(theirs) / np.median(ours):.2f}x ({min(turns):.2f} to {max(turns):.2f})"


def _spread(values: list[float], form: str) -> str:
    return f"{np.median(values):{form}} ({min(values):{form}} to {max(values):{form}})"
