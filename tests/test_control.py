"""The control: one finetune on random rows, beside which leaves must stand."""

from dataclasses import replace

import numpy as np
import pytest

import harp_hf
from harp_hf import load_result
from harp_hf.budget import claims_of, random_as_good, share
from harp_hf.errors import FinetuneError
from harp_hf.finetune import LeafFinetuner
from harp_hf.names import CONTROL, measurement_file
from harp_hf.report import write_report
from harp_hf.result import Choice
from harp_hf.rundir import RunDir
from harp_hf.status import read_status


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("control") / "run"


@pytest.fixture
def measured(tiny_model, pool, proxy, features, config, folder):
    """The same finished run in every test."""
    args = config(output_dir=str(folder), control=True, metric="likelihood", num_repeats=2)
    return harp_hf.measure(pool, proxy, tiny_model, args, features=features)


def test_random_rows_are_measured_as_a_leaf_is(measured, folder):
    run, result = RunDir(folder), measured
    assert measurement_file(CONTROL, 42) == "measurements/random-42.npz"
    found = [run.read_arrays(measurement_file(CONTROL, seed)) for seed in (42, 43)]
    rows = found[0]["rows"]
    assert len(rows) == len(np.unique(rows)) == 12, "as many as a leaf aims at"
    assert len(np.unique(result.hierarchy.leaf[rows])) > 3, "from all over the pool"
    leaf = run.read_arrays(measurement_file(int(result.measurements.leaves[0]), 42))
    assert found[0]["steps"] == leaf["steps"]
    gain = np.mean([one["scores"] for one in found], axis=0) - result.measurements.null
    expected = [gain[result.task == d].mean() for d in range(2)]
    assert result.control - result.null == pytest.approx(expected)
    assert CONTROL not in result.measurements.leaves
    assert result.measurements.cost["finetunes"] == 2 * (4 + 1)
    assert "random rows" in result.summary()


def test_a_budget_is_shared_with_random_rows(measured):
    def given(control):
        one = replace(measured, measurements=replace(measured.measurements, control=control))
        rows = one.chosen(replace(one.choice, budget=10, active_tasks=("red",)))[0]
        return np.bincount(one.hierarchy.leaf[rows], minlength=one.hierarchy.n_leaves)

    scores, null = measured.measurements.scores, measured.measurements.null
    red = measured.posterior.mean[:, 0]
    alone = given(None)
    assert alone[red > red.mean()].sum() == 10
    assert np.array_equal(given(np.tile(null, (2, 1))), alone), "random rows do nothing"
    large = given(np.ones_like(scores[0]))
    assert red.max() < 1 - measured.null[0], "random rows that bring it to 1 are better than any leaf"
    assert np.count_nonzero(large) > np.count_nonzero(alone)
    helps = red > 0
    expected = 10 * measured.hierarchy.sizes * helps / measured.hierarchy.sizes[helps].sum()
    assert np.abs(large - expected).max() <= 1


def test_tasks_claim_rows_by_what_their_best_measured_leaf_brings_beyond_random_rows(measured):
    known, leaves = measured.posterior, measured.measurements.leaves
    weights = np.array([1.0, 3.0])
    choice = Choice(budget=10, task_weights={measured.tasks[1]: 3.0}, active_tasks=("all",))
    # Random rows that do to the first task what its best leaf does, and nothing to the other.
    scores, null = measured.measurements.scores, measured.measurements.null
    like_leaf = np.where(
        measured.task == 0, scores[measured.measurements.effects(measured.task, 2)[0][:, 0].argmax()], null
    )
    for control in (measured.measurements.control, like_leaf, None):
        one = replace(measured, measurements=replace(measured.measurements, control=control))
        if control is None:
            floor, as_good = one.hierarchy.sizes @ known.mean / len(one.pool), np.zeros(2)
        else:
            floor, variance = one.measurements.control_effects(one.task, 2)
            as_good = random_as_good(known.mean, known.sd, floor, variance)
        claims = claims_of(weights, one.null, known.mean[leaves].max(axis=0), floor, as_good)
        expected = share(one.order(choice), one.hierarchy, known.mean, weights, claims, 10)[0]
        assert np.array_equal(one.chosen(choice)[0], expected)
        if control is like_leaf:
            assert claims[0] < 0.1 * claims[1]
            equal = share(one.order(choice), one.hierarchy, known.mean, weights, np.append(weights, 0), 10)[0]
            assert not np.array_equal(np.sort(equal), np.sort(expected))


def test_the_error_of_the_control_is_that_of_a_leaf_with_its_scores(measured):
    measurements = measured.measurements
    twin = replace(measurements, control=measurements.scores[1])
    effects, variances = replace(
        measurements, scores=np.concatenate([measurements.scores, measurements.scores[1:2]])
    ).effects(measured.task, 2)
    found = twin.control_effects(measured.task, 2)
    assert found[0] == pytest.approx(effects[1])
    assert found[1] == pytest.approx(variances[-1])


def test_the_report_tells_of_it(measured, tmp_path):
    for one, told in (
        (measured, True),
        (replace(measured, measurements=replace(measured.measurements, control=None)), False),
    ):
        page = write_report(one, tmp_path).read_text()
        assert ("Random rows</th>" in page) == ("leaves and random rows" in page) == told
        row = next(line for line in page.splitlines() if line.startswith('<tr><th scope="row">red'))
        assert (f"<td>{measured.control[0]:.3f}</td>" in row) == told


def test_a_saved_result_keeps_its_control(measured, folder, pool):
    loaded = load_result(folder, pool)
    assert np.array_equal(loaded.measurements.control, measured.measurements.control)
    assert loaded.summary() == measured.summary()


def test_a_run_without_a_control_is_given_one_later(tiny_model, pool, proxy, features, config, monkeypatch):
    made, finetune = [], LeafFinetuner.finetune
    monkeypatch.setattr(
        LeafFinetuner, "finetune", lambda self, rows, *rest: made.append(rows) or finetune(self, rows, *rest)
    )
    before = harp_hf.measure(pool, proxy, tiny_model, config(), features=features)
    assert len(made) == 4
    after = harp_hf.measure(pool, proxy, tiny_model, config(control=True), features=features)
    assert len(made) == 5
    assert np.array_equal(before.posterior.mean, after.posterior.mean), "it does not inform the posterior"


def test_a_control_that_fails_is_told_and_done_without(tiny_model, pool, proxy, features, config, monkeypatch, caplog):
    finetune = LeafFinetuner.finetune

    def fail(self, rows, seed, adapter):
        if "random" in adapter.name:
            raise FinetuneError("its memory ran out")
        return finetune(self, rows, seed, adapter)

    monkeypatch.setattr(LeafFinetuner, "finetune", fail)
    args = config(control=True)
    result = harp_hf.measure(pool, proxy, tiny_model, args, features=features)
    assert result.control is None
    assert result.measurements.failed.keys() == {CONTROL}
    assert "Random rows could not be measured" in caplog.text
    assert "Random rows were not measured" in result.summary()
    assert "random rows, seed 42, failed" in read_status(args.output_dir).summary()
    assert len(result.select(budget=5)) == 5
