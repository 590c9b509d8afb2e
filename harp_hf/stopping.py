"""Ctrl-C and SIGTERM end the work after the measurement at the latest, whatever swallows the exception they raise."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

_asked: list[KeyboardInterrupt] = []


class Terminated(KeyboardInterrupt):
    """Somebody asked the process to end (SIGTERM)."""


@contextmanager
def stoppable() -> Iterator[None]:
    """Let SIGTERM end the work as Ctrl-C does, so that nothing half-done is left behind, and remember both."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> NoReturn:
        _asked.append(Terminated() if number == signal.SIGTERM else KeyboardInterrupt())
        raise _asked[-1]

    # A command in the background ignores Ctrl-C.
    numbers = [n for n in (signal.SIGTERM, signal.SIGINT) if signal.getsignal(n) is not signal.SIG_IGN]
    before = {number: signal.signal(number, stop) for number in numbers}
    try:
        yield
    finally:
        _asked.clear()
        for number, handler in before.items():
            signal.signal(number, handler)


def honour() -> None:
    """Raise again what a signal raised, if it was swallowed: datasets does so wherever it hashes arguments."""
    if _asked:
        raise _asked[-1]
