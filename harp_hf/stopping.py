"""Ctrl-C and SIGTERM end the work after a finetune and its scores at the latest, whatever swallows what they raise."""

from __future__ import annotations

import signal
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TypeVar

T = TypeVar("T")

_asked: list[KeyboardInterrupt] = []
# True while nothing may be raised.
_held = False


class Terminated(KeyboardInterrupt):
    """Somebody asked the process to end (SIGTERM)."""


@contextmanager
def stoppable() -> Iterator[None]:
    """Let SIGTERM end the work as Ctrl-C does, so that nothing half-done is left behind, and remember both."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        _asked.append(Terminated() if number == signal.SIGTERM else KeyboardInterrupt())
        if not _held:
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


@contextmanager
def temporary_folder() -> Iterator[str]:
    """Path of a folder that is removed at the end, also where a signal comes just as it is made or removed."""
    folder = _unstopped(tempfile.TemporaryDirectory)
    try:
        yield folder.name
    finally:
        _unstopped(folder.cleanup)


def _unstopped(work: Callable[[], T]) -> T:
    """Do it to the end; what a signal meanwhile would have raised is raised then."""
    global _held
    before, _held = len(_asked), True
    try:
        done = work()
    finally:
        _held = False
    if len(_asked) > before:
        raise _asked[-1]
    return done
