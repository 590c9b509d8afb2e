"""What a run tells its event log: that it starts and how it ends, and each stage with the seconds it takes."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from . import __version__
from .errors import HarpError, RunDirError
from .processes import is_main
from .rundir import RunDir


@contextmanager
def started(run: RunDir) -> Iterator[None]:
    """A run from its start to its end, by whatever it ends."""
    run.log("started", pid=os.getpid(), host=socket.gethostname(), version=__version__)
    try:
        yield
    except BaseException as error:
        # The text of an error that is not ours may hold anything, a token too.
        said = str(error) if isinstance(error, HarpError) else type(error).__name__
        with suppress(RunDirError):
            run.log("stopped", reason=said)
        raise
    run.log("finished")


@contextmanager
def stage(run: RunDir, name: str) -> Iterator[None]:
    """One stage of a run; only the main process tells of it."""
    began = time.monotonic()
    if is_main():
        run.log("stage", stage=name)
    yield
    if is_main():
        run.log("stage done", stage=name, seconds=round(time.monotonic() - began, 3))
