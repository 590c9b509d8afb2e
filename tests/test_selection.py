"""From pool to selection with the tiny model."""

from dataclasses import replace

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
    assert np.array_equal(harp_hf.load_result(tmp_path / "told", pool).nearest, told.nearest)
    args = config(output_dir=str(tmp_path / "array"), max_measurements=2, max_steps=2)
    assert harp_hf.measure(pool, proxy, tiny_model, args, features=features).similarity is None


def test_a_small_budget_takes_the_rows_that_are_most_similar(pool, proxy, tiny_model, config, features):
    result = harp_hf.measure(pool, proxy, tiny_model, config(metric="likelihood"), features=features)
    choice = replace(result.choice, budget=6, active_tasks=("red",))
    plain = result.chosen(choice)[0]
    # The rows that red would not take from its leaves, each the most similar one to a proxy row of red.
    wanted = np.flatnonzero(np.isin(result.hierarchy.leaf, result.hierarchy.leaf[plain]))
    wanted = np.setdiff1d(wanted, plain)[:8]
    for task, expected in ((0, wanted), (1, plain)):
        nearest = np.full((len(result.task), 1), -1)
        nearest[result.task == task, 0] = wanted
        rows = replace(result, nearest=nearest).chosen(choice)[0]
        assert np.array_equal(result.hierarchy.leaf[rows], result.hierarchy.leaf[plain])
        assert set(rows) <= set(expected)


def test_all_processes_must_see_the_run_directory(pool, proxy, features, tiny_model, config, monkeypatch):
    monkeypatch.setattr("harp_hf.selection.from_main", lambda work: ({"pool": "written elsewhere"}, {}))
    with pytest.raises(errors.RunDirError, match="must be on a file system that all processes share"):
        harp_hf.measure(pool, proxy, tiny_model, config(), features=features)
