"""Leaves measured among random rows: what each finetune holds, what effects are then, and what is selected."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import minimize

import harp_hf
from harp_hf import HarpConfig, HarpError
from harp_hf.background import Background, controls, rows_to_finetune_on
from harp_hf.baselines.ablations import Exhaustive
from harp_hf.baselines.problem import open_problem
from harp_hf.card import describe
from harp_hf.errors import FinetuneError
from harp_hf.finetune import LeafFinetuner
from harp_hf.hierarchy import build_hierarchy
from harp_hf.inputs import read_inputs
from harp_hf.result import load_result
from harp_hf.rundir import RunDir

SETTINGS = {"leaf_size": 12, "branching": 2, "max_measurements": 5, "max_steps": 12, "learning_rate": 3e-2,
            "use_cpu": True, "random_share": 0.5, "active_tasks": "all",
            "metric": "likelihood"}  # fmt: skip


@pytest.fixture(scope="module")
def hierarchy():
    points = np.random.default_rng(0).normal(size=(600, 6)).astype(np.float32)
    return build_hierarchy(points / np.linalg.norm(points, axis=1, keepdims=True), leaf_size=30, branching=3)


@pytest.fixture(scope="module")
def result(pool, proxy, features, tiny_model, tmp_path_factory):
    args = HarpConfig(output_dir=str(tmp_path_factory.mktemp("background") / "run"), **SETTINGS)
    return harp_hf.measure(pool, proxy, tiny_model, args, features=features)


@given(share=st.sampled_from([0.25, 0.5, 0.75]), steps=st.sampled_from([-1, 2, 4, 100]), leaf=st.integers(0, 9))
def test_every_finetune_has_its_share_of_the_same_random_rows(hierarchy, share, steps, leaf):
    rows = rows_to_finetune_on(hierarchy, HarpConfig(max_steps=steps, random_share=share, use_cpu=True))
    found, own = rows(leaf), set(hierarchy.rows(leaf).tolist())
    assert len(set(found.tolist())) == len(found)
    count = len(own)
    if 0 < steps * 8 * (1 - share) < count:
        count = round(steps * 8 * (1 - share))
    assert own.issuperset(found[:count].tolist())
    assert len(found) - count == round(count * share / (1 - share))
    random = rows(-1)
    assert len(random) == (min(steps * 8, 600) if steps > 0 else round(128 / (1 - share)))
    if len(found) - count < len(random) - count:
        assert set(found[count:].tolist()) <= set(random.tolist()), "all leaves stand among the same rows"
    assert len(rows(-2)) == len(random)
    assert len(random) == 600 or set(rows(-2).tolist()) != set(random.tolist()), "every control draws its own"


def test_without_a_share_leaves_are_measured_alone(hierarchy):
    rows = rows_to_finetune_on(hierarchy, HarpConfig(use_cpu=True))
    assert all(np.array_equal(rows(leaf), hierarchy.rows(leaf)) for leaf in range(hierarchy.n_leaves))


@given(
    effects=st.lists(st.floats(-0.5, 0.5), min_size=1, max_size=4),
    gain=st.floats(0.01, 0.5),
    share=st.sampled_from([0.25, 0.5, 0.75]),
)
def test_random_rows_have_the_part_that_maximises_the_sum_of_square_roots(effects, gain, share):
    background = Background(share, 0, np.zeros(1))
    part = background.part(np.array(effects)[:, None], np.array([gain]))[0]
    slopes = np.array([gain, *np.maximum(effects, 0) / np.sqrt(1 - share)])

    def loss(logits):
        shares = np.exp(logits - logits.max())
        return -(slopes @ np.sqrt(shares / shares.sum()))

    best = minimize(loss, np.zeros(len(slopes)), method="BFGS").fun
    assert best == pytest.approx(-np.linalg.norm(slopes), abs=1e-4)
    assert part == pytest.approx(slopes[0] ** 2 / (slopes @ slopes))


@pytest.mark.parametrize(("measured", "count"), [(1, 2), (4, 2), (9, 3), (16, 4), (180, 13)])
def test_there_are_as_many_controls_as_the_root_of_the_leaves(measured, count):
    assert controls(measured) == list(range(-1, -1 - count, -1))


def test_a_task_that_nothing_raises_leaves_its_rows_to_random_ones():
    background = Background(0.5, 0, np.zeros(1))
    assert background.part(np.array([[-0.1, 0.2]]), np.array([-0.2, -0.1])).tolist() == [1.0, 0.0]
    assert background.part(np.empty((0, 2)), np.array([0.1, -0.1])).tolist() == [1.0, 1.0]


def test_effects_are_what_leaves_add_to_random_rows(result, pool):
    measured = result.measurements
    run = RunDir(result.path)
    random = [run.read_arrays(f"measurements/random-{draw}-42.npz")["scores"] for draw in (1, 2)]
    assert controls(len(measured.leaves)) == [-1, -2]
    assert np.array_equal(measured.background.scores, random)
    assert result.reference == pytest.approx([np.mean(random, axis=0)[result.task == d].mean() for d in range(2)])
    assert np.array_equal(measured.null, run.read_arrays("base.npz")["scores"]), "null scores are the base model's"
    assert np.abs(measured.background.scores - measured.null).max() > 0.01, "random rows teach something"
    effects, variances = measured.effects(result.task, 2)
    paired = replace(measured, background=replace(measured.background, scores=np.mean(random, axis=0)[None]))
    draws = [[scores[result.task == d].mean() for d in range(2)] for scores in random]
    assert variances - paired.effects(result.task, 2)[1] == pytest.approx(
        np.tile(np.var(draws, 0, ddof=1) * 1.5, (5, 1))
    )
    means = np.stack([measured.scores[:, 0, result.task == d].mean(axis=1) for d in range(2)], axis=1)
    assert effects == pytest.approx(means - result.reference)
    assert min(measured.leaves) >= 0
    assert min(measured.rows) >= 0
    for leaf in measured.leaves.tolist():
        own = np.isin(measured.rows[leaf], result.hierarchy.rows(leaf))
        assert 0 < own.mean() < 1


@pytest.mark.parametrize("variant", ["harp-c", "harp-e"])
@pytest.mark.parametrize("budget_by", ["task", "leaf"])
def test_a_selection_ends_with_random_rows(result, pool, variant, budget_by):
    for budget in (None, 1, 10, 30, 96):
        chosen = result.select(variant, budget, budget_by=budget_by)
        rows, random = np.array(chosen["harp_row"]), np.array(chosen["harp_random"])
        assert len(set(rows.tolist())) == len(rows)
        assert budget is None or len(rows) == budget
        assert (np.diff(random.astype(int)) >= 0).all()
        order = result.order(result.choosing(variant).choice)
        assert np.array_equal(order.leaves[chosen["harp_rank"]], np.array(chosen["harp_leaf"]))
        assert np.array(chosen["harp_rank"])[~random].max(initial=0) <= max(order.best_prefix - 1, 0)
    small = result.select(variant, 30, budget_by=budget_by)
    again = load_result(result.path, pool).select(variant, 30, budget_by=budget_by)
    assert small.to_list() == again.to_list()


def test_the_prediction_starts_from_random_rows_and_counts_only_chosen_leaves(result):
    nothing = replace(result, posterior=replace(result.posterior, mean=np.full_like(result.posterior.mean, -0.1)))
    assert nothing.predicted() == pytest.approx(result.reference)
    chosen = nothing.select(budget=20)
    assert len(chosen) == 20
    assert all(chosen["harp_random"])
    with pytest.raises(HarpError, match="No leaf"):
        nothing.select()


def test_the_summary_and_the_card_say_what_effects_are_added_to(result):
    assert "random rows alone" in " ".join(result.summary().split())
    text = describe(result, result.select(budget=20), "me/rows")
    assert "random rows" in text
    assert "`harp_random`" in text


def test_exhaustive_measures_the_other_leaves_among_the_same_rows(result, pool, proxy, features, tiny_model):
    args = HarpConfig(output_dir=str(result.path), **SETTINGS)
    problem = open_problem(read_inputs(pool, proxy, tiny_model, args, features=features), args, result=result)
    every = Exhaustive().measure(problem).measurements
    assert sorted(every.leaves) == list(range(result.hierarchy.n_leaves))
    assert len(every.background.scores) == len(controls(result.hierarchy.n_leaves)) == 3
    assert np.array_equal(every.background.scores[:2], result.measurements.background.scores)
    assert np.array_equal(every.scores[: len(result.measurements.leaves)], result.measurements.scores)
    ranking = Exhaustive().rank(problem, 20)
    assert ranking.stop == 20
    assert len(set(ranking.rows[:20].tolist())) == 20


def test_random_rows_that_cannot_be_finetuned_on_stop_the_run(
    pool, proxy, features, tiny_model, tmp_path, monkeypatch
):
    finetune = LeafFinetuner.finetune

    def fail(self, rows, seed, adapter):
        if adapter.name.startswith(failing):
            raise FinetuneError("no room")
        return finetune(self, rows, seed, adapter)

    monkeypatch.setattr(LeafFinetuner, "finetune", fail)
    args = HarpConfig(output_dir=str(tmp_path / "run"), **SETTINGS | {"max_measurements": 1})
    failing = ("leaf--1", "leaf--2")
    with pytest.raises(HarpError, match="random rows failed, and leaves compare to them: no room"):
        harp_hf.measure(pool, proxy, tiny_model, args, features=features)
    (tmp_path / "run/measurements/random-2-42.npz").unlink()
    failing = ("leaf--1",)
    result = harp_hf.measure(pool, proxy, tiny_model, args, features=features)
    assert len(result.measurements.background.scores) == 1
    assert result.measurements.failed == {}


@pytest.mark.parametrize("share", [-0.1, 1, 1.5, float("nan")])
def test_a_share_must_leave_room_for_the_leaf(share):
    with pytest.raises(HarpError, match="random_share"):
        HarpConfig(random_share=share, use_cpu=True)
