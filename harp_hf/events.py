"""The event log of a run directory, `events.jsonl`: one JSON object a line, appended while the run goes on."""

from __future__ import annotations

import json
import logging
import os
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

FILE = "events.jsonl"


def append(folder: Path, event: dict[str, Any]) -> None:
    """Append an event to the log in `folder`, in one write, with the time in UTC.

    Raises:
        OSError: The log cannot be written.
    """
    line = json.dumps({"time": datetime.now(timezone.utc).isoformat(timespec="milliseconds")} | event)
    logger.debug("%s", line)
    handle = os.open(folder / FILE, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
    try:
        # A line that a full disk or a power cut has cut short must not swallow this one.
        torn = os.lseek(handle, 0, os.SEEK_END) > 0 and _last(handle) != b"\n"
        os.write(handle, ("\n" * torn + line + "\n").encode())
    finally:
        os.close(handle)


def _last(handle: int) -> bytes:
    os.lseek(handle, -1, os.SEEK_END)
    return os.read(handle, 1)


def read(folder: Path) -> list[dict[str, Any]]:
    """The events of the log in `folder`, oldest first, none where there is no log; half-written lines are left out."""
    try:
        lines = (folder / FILE).read_bytes().splitlines()
    except FileNotFoundError:
        return []
    return [event for event in map(_parse, lines) if event is not None]


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        event = json.loads(line)
    except ValueError:
        return None
    return event if isinstance(event, dict) and "event" in event else None


def memory() -> dict[str, int]:
    """Most memory that this process has held so far, in MB: of the machine, and of the GPU where it uses one."""
    used = {}
    if sys.platform != "win32":
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # in bytes on a Mac, in kB elsewhere
        used["memory_mb"] = peak // (2**20 if sys.platform == "darwin" else 2**10)
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        used["gpu_memory_mb"] = torch.cuda.max_memory_allocated() // 2**20
    return used
