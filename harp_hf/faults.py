"""Keeps one measurement that runs out of memory or out of time from ending the run; a full disk ends it."""

from __future__ import annotations

import errno
import gc
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import torch
from safetensors import SafetensorError

from .errors import ConfigError, FinetuneError, HarpError, reason

# What allocators say, where they raise a plain RuntimeError.
_OUT_OF_MEMORY = ("out of memory", "not enough memory", "can't allocate memory")
# What says that the disk is full, or that a file may not grow.
_OUT_OF_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# Where torch writes files: it raises a plain RuntimeError.
_TORCH_WRITER = "inline_container.cc"


class _TimeIsUp(BaseException):
    """Passes every `except Exception` of the libraries underneath."""


@contextmanager
def contained(limit: float | None = None, *, alone: bool = True) -> Iterator[None]:
    """Make [`FinetuneError`] of running out of memory, or of time.

    Args:
        limit: Seconds, by a clock that does not jump; `None` for any time. A signal (SIGALRM) ends the work, so that
            it needs the main thread, and a single call of C code runs to its end first.
        alone: Whether this process shares the work with no other. Others would wait for this one, so without it
            there is no limit, and running out of memory ends the run.

    Raises:
        FinetuneError: There was not enough memory or time.
        ConfigError: There is a limit, and this is not the main thread.
        HarpError: The disk is full.
    """
    try:
        with _alarm(limit if alone else None):
            yield
        return
    except _TimeIsUp:
        said = f"it took longer than measurement_timeout={limit:g} seconds"
    except Exception as error:
        if out_of_room(error):
            raise HarpError(
                f"An adapter or a checkpoint cannot be written (is the disk full?): {reason(error)}."
            ) from error
        if not out_of_memory(error):
            raise
        said = f"out of memory ({reason(error)})"
    # Outside `except`, so that the error does not keep the frames alive that hold the memory.
    raise FinetuneError(said) if alone else HarpError(f"A measurement failed: {said}.")


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory, of the machine or of a GPU, ran out."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _OUT_OF_MEMORY)


def out_of_room(error: BaseException) -> bool:
    """Whether an error says that a file could not be written to its end."""
    if isinstance(error, OSError):
        return error.errno in _OUT_OF_ROOM
    return isinstance(error, SafetensorError) or (isinstance(error, RuntimeError) and _TORCH_WRITER in str(error))


def free_memory() -> None:
    """Give back what a failed measurement held."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@contextmanager
def unchanged(model: torch.nn.Module) -> Iterator[None]:
    """Put every module of a model back in its place afterwards, as an adapter that is half on cannot be unloaded."""
    before = dict(model.named_modules(remove_duplicate=False))
    try:
        yield
    finally:
        for name, module in before.items():
            if name and model.get_submodule(name) is not module:
                model.set_submodule(name, module)


@contextmanager
def _alarm(seconds: float | None) -> Iterator[None]:
    if seconds is None:
        yield
        return
    if threading.current_thread() is not threading.main_thread():
        raise ConfigError("`measurement_timeout` needs the main thread: measure there, or set it to None.")

    def ring(number: int, frame: FrameType | None) -> None:
        raise _TimeIsUp

    before = signal.signal(signal.SIGALRM, ring)
    try:
        # Again after the same time, should some library have swallowed the first.
        signal.setitimer(signal.ITIMER_REAL, seconds, seconds)
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
