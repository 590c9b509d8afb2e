"""`harp-hf status`: what a run is doing, or how it ended, read from its event log while it may still be written."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from . import events
from .errors import RunDirError
from .names import leaf_name
from .rundir import RunDir


@dataclass(frozen=True)
class Status:
    """What the event log of a run tells.

    Attributes:
        path (`Path`): The run directory.
        running (`bool`): Whether a process is in the directory now.
        ended (`str`): How the last start ended: `"finished"`, why it stopped, or nothing where it could not say.
        owner (`str`): The process that is in the directory, or was last.
        stage (`str`): What it does, or did last.
        planned (`int`): Finetunes that it needs in all.
        measured (`int`): Those that are done.
        failed (`dict[tuple[int, int], str]`): Leaf and seed of finetunes that failed, and why.
        tokens (`dict[str, float]`): Tokens of `training` and `evaluation`, all starts together.
        seconds (`list[float]`): What each finetune took with its evaluation, all starts together.
        pace (`float`, *optional*): Seconds of the last start from one finished finetune to the next, on average.
        memory (`dict[str, int]`): Most memory of the last start in MB.
        last (`dict`): The last event.
    """

    path: Path
    running: bool
    ended: str
    owner: str
    stage: str
    planned: int
    measured: int
    failed: dict[tuple[int, int], str]
    tokens: dict[str, float]
    seconds: list[float]
    pace: float | None
    memory: dict[str, int]
    last: dict[str, Any]

    @property
    def progress(self) -> str:
        """How far it is, for the middle of a sentence."""
        return f"{self.measured} of {self.planned} measurements made" if self.planned else "no measurement made yet"

    def summary(self) -> str:
        """All of it, for people, a line a topic."""
        if self.running and self.ended == "finished":
            state = f"finished, and in use by {self.owner}"
        elif self.running:
            state = f"running ({self.owner})"
        elif self.ended == "finished":
            state = "finished"
        else:
            state = f"stopped ({self.ended or 'killed'})"
            if not self.ended or self.measured < self.planned or not self.planned:
                state += "; the same command continues it"
        lines = [f"{self.path}: {state}", f"stage: {self.stage or 'start'}", f"progress: {self.progress}"]
        failed = sorted(self.failed.items())
        lines += [f"  {leaf_name(leaf)}, seed {seed}, failed: {why}" for (leaf, seed), why in failed]
        if self.seconds:
            lines.append(f"time: {sum(self.seconds) / len(self.seconds):.1f} s a measurement{self._remaining()}")
        lines += [
            f"tokens: {self.tokens['training']:,.0f} trained on, {self.tokens['evaluation']:,.0f} evaluated",
            f"memory: {', '.join(f'{mb:,} MB{_OF[name]}' for name, mb in self.memory.items()) or 'unknown'}",
            f"last event: {self.last['event']} at {self.last['time']}",
        ]  # fmt: skip
        return "\n".join(lines)

    def _remaining(self) -> str:
        left = self.planned - self.measured
        if not left or self.pace is None:
            return ""
        return f", about {timedelta(seconds=round(self.pace * left))} left for {left}"


_OF = {"memory_mb": " at most", "gpu_memory_mb": " of the GPU at most"}


def read_status(path: str | Path) -> Status:
    """Read how a run stands; nothing is written, and a run that goes on is not disturbed.

    Args:
        path: The run directory.

    Raises:
        RunDirError: There is no such directory, or no run was ever started in it.
    """
    if not Path(path).is_dir():
        raise RunDirError(f"The run directory {path} is not there.")
    run = RunDir(path)
    running = run.is_locked()
    log = events.read(run.path)
    starts = [n for n, event in enumerate(log) if event["event"] == "started"]
    if not starts:
        raise RunDirError(f"No run was started in {path}: there is no event log ({events.FILE}).")
    start, last = log[starts[-1] :], log[-1]
    ended = {"finished": "finished", "stopped": last.get("reason", "")}.get(last["event"], "")
    leaves = [event for event in log if event["event"] == "leaf"]
    stages = [event["stage"] for event in start if event["event"] == "stage"]
    planned, measured, pace = _plan(start)
    return Status(
        run.path, running, ended, run.owner(),
        stages[-1] if stages else "", planned, measured,
        {(event["leaf"], event["seed"]): event["reason"] for event in leaves if "reason" in event},
        {
            kind: sum(event.get(f"tokens_{kind}", 0) for event in log if event["event"] in ("leaf", "base"))
            for kind in ("training", "evaluation")
        },
        [event["seconds_training"] + event["seconds_evaluation"] for event in leaves],
        pace,
        {name: max(event.get(name, 0) for event in start) for name in _OF if any(name in event for event in start)},
        last,
    )  # fmt: skip


def _plan(start: list[dict[str, Any]]) -> tuple[int, int, float | None]:
    """Finetunes planned and measured, and seconds from one to the next, by the events of one start."""
    plans = [n for n, event in enumerate(start) if event["event"] == "planned"]
    if not plans:
        return 0, 0, None
    plan = start[plans[-1]]
    since = [event for event in start[plans[-1] :] if event["event"] == "leaf"]
    pace = (since[-1]["elapsed"] - plan["elapsed"]) / len(since) if since else None
    return plan["leaves"], plan["measured"] + len(since), pace
