"""From pool to selection with the tiny model."""

import numpy as np
import pytest

import harp_hf
from harp_hf import errors
from harp_hf.posterior import infer


def test_select_returns_the_rows_that_help(pool, proxy, features, config, tiny_model):
    chosen = harp_hf.select(pool, proxy, tiny_model, config(), features=features)
    assert set(chosen["completion"]) == {" crimson", " emerald"}
    assert chosen.column_names[:2] == pool.column_names
    assert chosen["prompt"][:] == [pool[i]["prompt"] for i in chosen["harp_row"]]
    assert np.isfinite(chosen["phi"]).all()


def test_similarity_to_the_proxy_rows_guides_design_and_posterior(pool, proxy, config, tiny_model, features, tmp_path):
    def measure(folder, **changes):
        args = config(output_dir=str(tmp_path / folder), max_measurements=2, max_steps=2, **changes)
        return harp_hf.measure(pool, proxy, tiny_model, args)

    told, plain = measure("told", features="tfidf"), measure("plain", features="tfidf", similarity=False)
    assert set(told.measurements.leaves[:1]) <= set(told.similarity.argmax(axis=0))
    assert plain.similarity is None
    for result, similarity in ((told, told.similarity), (plain, None)):
        found = infer(
            *result.measurements.effects(result.task, 2), result.measurements.leaves, result.hierarchy,
            similarity=similarity,
        )  # fmt: skip
        assert np.array_equal(result.posterior.mean, found.mean)
    assert np.array_equal(harp_hf.load_result(tmp_path / "told", pool).similarity, told.similarity)
    args = config(output_dir=str(tmp_path / "array"), max_measurements=2, max_steps=2)
    assert harp_hf.measure(pool, proxy, tiny_model, args, features=features).similarity is None


def test_all_processes_must_see_the_run_directory(pool, proxy, features, tiny_model, config, monkeypatch):
    monkeypatch.setattr("harp_hf.selection.from_main", lambda work: {"pool": "written elsewhere"})
    with pytest.raises(errors.RunDirError, match="must be on a file system that all processes share"):
        harp_hf.measure(pool, proxy, tiny_model, config(), features=features)
