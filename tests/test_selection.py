"""From pool to selection with the tiny model."""

import numpy as np
import pytest

import harp_hf
from harp_hf import errors


def test_select_returns_the_rows_that_help(pool, proxy, features, config, tiny_model):
    chosen = harp_hf.select(pool, proxy, tiny_model, config(), features=features)
    assert set(chosen["completion"]) == {" crimson", " emerald"}
    assert chosen.column_names[:2] == pool.column_names
    assert chosen["prompt"][:] == [pool[i]["prompt"] for i in chosen["harp_row"]]
    assert np.isfinite(chosen["phi"]).all()


def test_all_processes_must_see_the_run_directory(pool, proxy, features, tiny_model, config, monkeypatch):
    monkeypatch.setattr("harp_hf.selection.from_main", lambda work: {"pool": "written elsewhere"})
    with pytest.raises(errors.RunDirError, match="must be on a file system that all processes share"):
        harp_hf.measure(pool, proxy, tiny_model, config(), features=features)
