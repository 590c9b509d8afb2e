"""Signals that come at the worst of times."""

import os
import shutil
import signal
import tempfile
from pathlib import Path

import pytest

from harp_hf.stopping import Terminated, stoppable, temporary_folder


@pytest.mark.parametrize("moment", ["making", "removing"])
@pytest.mark.parametrize(("number", "raised"), [(signal.SIGTERM, Terminated), (signal.SIGINT, KeyboardInterrupt)])
def test_no_folder_is_left_behind(number, raised, moment, monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(signal, "getsignal", lambda _: signal.SIG_DFL)  # tests in the background ignore Ctrl-C
    module, name = (tempfile, "mkdtemp") if moment == "making" else (shutil, "rmtree")
    work = getattr(module, name)

    def interrupted(*given, **named):
        if moment == "removing":
            os.kill(os.getpid(), number)
        done = work(*given, **named)
        if moment == "making":
            os.kill(os.getpid(), number)
        return done

    monkeypatch.setattr(module, name, interrupted)
    entered = []

    def use():
        with stoppable(), temporary_folder() as folder:
            entered.append(folder)
            Path(folder, "file").touch()

    with pytest.raises(raised):
        use()
    assert len(entered) == (moment == "removing")
    assert not list(tmp_path.iterdir())
