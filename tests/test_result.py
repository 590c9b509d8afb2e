"""What a finished measurement knows: selections, explanations, the summary, and what becomes of failures."""

import json
from dataclasses import replace

import numpy as np
import pytest
from conftest import make_rows
from datasets import ClassLabel, Dataset
from hypothesis import given
from hypothesis import strategies as st
from trl import DatasetMixtureConfig
from trl.scripts.utils import DatasetConfig

import harp_hf
from harp_hf import HarpConfig, HarpError
from harp_hf.effects import measured_effects
from harp_hf.errors import DataError, FinetuneError
from harp_hf.evaluation.transformers import TransformersEvaluator
from harp_hf.finetune import LeafFinetuner
from harp_hf.mixture import load_pool
from harp_hf.pool import content_digest
from harp_hf.posterior import Posterior, infer
from harp_hf.saved import load_result
from harp_hf.sources import Sources

SETTINGS = {"leaf_size": 12, "branching": 2, "max_measurements": 6, "max_steps": 12, "learning_rate": 3e-2,
            "use_cpu": True, "bf16": False}  # fmt: skip
OURS = ["phi", "phi_red", "phi_sd_red", "phi_green", "phi_sd_green", "harp_leaf", "harp_parent", "harp_rank",
        "harp_measured", "harp_row"]  # fmt: skip


@pytest.fixture(scope="module")
def labelled(pool):
    """The pool with columns of other types beside the texts."""
    kinds = ["red", "green", "wrong red", "wrong green"]
    return (
        pool.add_column("kind", np.repeat(np.arange(4), 24))
        .cast_column("kind", ClassLabel(names=kinds))
        .add_column("tags", [[{"n": i, "s": None if i % 3 else "é"}] * (i % 2) for i in range(96)])
        .add_column("note", [None if i % 2 else f"row {i}" for i in range(96)])
    )


@pytest.fixture(scope="module")
def result(labelled, proxy, features, tiny_model, tmp_path_factory):
    args = HarpConfig(output_dir=str(tmp_path_factory.mktemp("result") / "run"), **SETTINGS)
    return harp_hf.measure(labelled, proxy, tiny_model, args, features=features)


@pytest.fixture
def frozen(monkeypatch):
    """Whatever would load, train or score a model raises."""

    def never(*args, **kwargs):
        raise AssertionError("a model was used")

    monkeypatch.setattr("harp_hf.execution.tools.load_model", never)
    monkeypatch.setattr("harp_hf.models.AutoModelForCausalLM.from_pretrained", never)
    monkeypatch.setattr(LeafFinetuner, "finetune", never)
    monkeypatch.setattr(TransformersEvaluator, "evaluate", never)


def columns(dataset):
    return {name: np.array(dataset[name][:]) for name in OURS}


def same(left, right):
    """Whether two datasets have the same columns, types and values."""
    return left.features == right.features and left.to_list() == right.to_list()


def test_columns_stand_beside_the_untouched_original_ones(result, labelled):
    for variant in ("harp-c", "harp-e"):
        chosen = result.select(variant)
        assert chosen.column_names == [*labelled.column_names, *OURS]
        original = labelled.select(chosen["harp_row"][:])
        assert same(chosen.select_columns(labelled.column_names), original)
        types = {name: chosen.features[name].dtype for name in OURS}
        assert {types[n] for n in OURS if n.startswith("phi")} == {"float64"}
        assert types["harp_measured"] == "bool"
        assert all(types[n].startswith("int") for n in ("harp_leaf", "harp_parent", "harp_rank", "harp_row"))
    assert labelled.column_names == ["prompt", "completion", "kind", "tags", "note"], "the pool is as it was"


def test_columns_say_what_is_known_of_the_leaf(result):
    chosen = columns(result.select("harp-e"))
    leaf = chosen["harp_leaf"]
    assert np.array_equal(leaf, result.hierarchy.leaf[chosen["harp_row"]])
    assert np.array_equal(chosen["harp_parent"], result.hierarchy.parent[leaf])
    assert np.array_equal(chosen["harp_measured"], np.isin(leaf, result.measurements.leaves))
    for d, task in enumerate(["red", "green"]):
        assert np.array_equal(chosen[f"phi_{task}"], result.posterior.mean[leaf, d])
        assert np.array_equal(chosen[f"phi_sd_{task}"], result.posterior.sd[leaf, d])


def test_phi_is_the_mean_over_active_tasks(result):
    for active, names in ((["green"], ["green"]), ("all", ["red", "green"]), (["green", "red"], ["red", "green"])):
        chosen = columns(result.select("harp-e", active_tasks=active))
        mean = np.mean([chosen[f"phi_{task}"] for task in names], axis=0)
        assert chosen["phi"] == pytest.approx(mean, abs=1e-12)


def test_rows_come_in_greedy_order_nearest_their_centroid_first(result):
    for variant in ("harp-c", "harp-e"):
        chosen = columns(result.select(variant))
        order = result.order(replace(result.choice, variant=variant))
        rank, rows = chosen["harp_rank"], chosen["harp_row"]
        assert np.array_equal(np.unique(rank), np.arange(order.best_prefix))
        assert (np.diff(rank) >= 0).all()
        assert np.array_equal(chosen["harp_leaf"], order.leaves[rank])
        for place, leaf in enumerate(order.leaves[: order.best_prefix]):
            mine = rows[rank == place]
            assert np.array_equal(mine, result.hierarchy.rows(leaf)), "a chosen leaf gives all its rows"
            assert (np.diff(result.hierarchy.distance[mine]) >= 0).all()


@given(budget=st.integers(1, 120), variant=st.sampled_from(["harp-c", "harp-e"]))
def test_a_budget_cuts_the_greedy_order_where_leaves_take_it(result, budget, variant):
    whole = result.chosen(replace(result.choice, variant=variant))[0]
    chosen = result.select(variant, budget=budget, budget_by="leaf")
    assert chosen["harp_row"][:] == whole[:budget].tolist()
    assert len(set(chosen["harp_row"])) == len(chosen) == min(budget, len(whole))


@given(budget=st.integers(2, 60), variant=st.sampled_from(["harp-c", "harp-e"]))
def test_tasks_share_a_budget(result, budget, variant):
    whole = result.chosen(replace(result.choice, variant=variant))[0]
    chosen = result.select(variant, budget=budget)
    others = ~np.isin(chosen["harp_row"], whole)
    assert (np.array(chosen["phi"])[others] > 0).all(), "beyond the prefix only leaves that help"
    assert len(set(chosen["harp_row"])) == len(chosen) == min(budget, len(whole))
    if len(whole) >= 12:
        few = result.select(variant, budget=12)["completion"][:]
        assert {" crimson", " emerald"} <= set(few), "both tasks have their part"


def test_choosing_otherwise_never_uses_a_model_again(result, frozen, tmp_path):
    result.select("harp-e", budget=20)
    result.select(task_weights={"red": 5}, active_tasks="all")
    result.choosing("harp-e").summary()
    for row in range(0, len(result.pool), 7):
        result.explain(row)
    result.save(tmp_path)
    load_result(tmp_path, result.pool).select()


def test_task_weights_and_active_tasks_move_the_selection(result):
    red = result.select("harp-e", task_weights={"red": 1, "green": 0}, active_tasks="all", budget=6)
    green = result.select("harp-e", task_weights={"red": 0}, active_tasks="all", budget=6)
    assert set(red["completion"]) == {" crimson"}
    assert set(green["completion"]) == {" emerald"}
    assert red["harp_row"][:] == result.select("harp-e", active_tasks=["red"], budget=6)["harp_row"][:]


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"variant": "harp"}, "`variant` must be one of harp-c, harp-e, but it is 'harp'."),
        ({"budget": 0}, "`budget` must be a whole number of at least 1, but it is 0."),
        ({"task_weights": {"blue": 1}}, "There is no task 'blue'; the tasks are red, green."),
        ({"task_weights": {"red": -1}}, "The weight of task 'red' must be a number of at least 0, but it is -1."),
        ({"task_weights": {"red": 0, "green": 0}}, "All active tasks have the weight 0."),
        ({"active_tasks": ["blue"]}, "There is no task 'blue'; the tasks are red, green."),
        ({"active_tasks": "blue"}, "There is no task 'blue'; the tasks are red, green."),
    ],
)
def test_what_cannot_be_selected_is_said(result, asked, message):
    with pytest.raises(HarpError) as caught:
        result.select(**asked)
    assert str(caught.value) == message


def test_nothing_to_select_is_said(result):
    harmful = replace(result, posterior=Posterior(-abs(result.posterior.mean), result.posterior.sd))
    with pytest.raises(HarpError, match="No leaf of the pool is expected to raise the score"):
        harmful.select()
    assert "0 of 9" in harmful.summary()
    idle = replace(result, distinguishable=np.zeros(2, bool))
    with pytest.raises(HarpError, match="set active_tasks to 'all'"):
        idle.select()
    assert len(idle.select(active_tasks="all"))
    assert "0 of 9" in idle.summary()
    assert idle.explain(3) == result.explain(3) | {"selected": {}}
    weightless = replace(result, distinguishable=np.array([True, False])).choosing(task_weights={"red": 0})
    with pytest.raises(HarpError, match="All active tasks have the weight 0"):
        weightless.select()
    assert "0 of 9" in weightless.summary()
    assert weightless.explain(3)["selected"] == {}
    named = replace(weightless, sources=Sources(["one"], np.zeros(96, int), np.zeros((1, 2)), np.ones((1, 2))))
    assert named.by_source()[0]["chosen"] == 0


def test_a_row_is_explained(result):
    measured = int(result.measurements.leaves[0])
    row = int(result.hierarchy.rows(measured)[0])
    why = result.explain(row)
    assert (why["row"], why["leaf"], why["measured"], why["failed"]) == (row, measured, True, None)
    assert why["nearest_measured"] == measured
    assert why["distance"] == pytest.approx(0, abs=1e-6)
    assert why["leaf_size"] == len(result.hierarchy.rows(measured))
    assert why["parent"] == result.hierarchy.parent[measured]
    assert why["phi"] == dict(zip(("red", "green"), result.posterior.mean[measured], strict=True))
    assert why["phi_sd"] == dict(zip(("red", "green"), result.posterior.sd[measured], strict=True))
    json.dumps(why)
    cut = result.choosing(budget=20)
    for variant in ("harp-c", "harp-e"):
        chosen = cut.select(variant)
        for row in range(len(result.pool)):
            said = cut.explain(row)["selected"][variant]
            assert said["chosen"] == (row in chosen["harp_row"][:])
            if said["chosen"]:
                assert said["rank"] == chosen["harp_rank"][chosen["harp_row"][:].index(row)]
                order = cut.order(replace(cut.choice, variant=variant))
                helps = result.posterior.mean[order.leaves[said["rank"]]].sum() > 0
                assert helps or said["rank"] < order.best_prefix
    for row in (-1, 96):
        with pytest.raises(DataError, match=f"Row {row} is not in the pool of 96 rows"):
            result.explain(row)


def test_a_saved_result_selects_the_same(result, labelled, tmp_path):
    changed = result.choosing("harp-e", 17, {"red": 0.25}, ["green", "red"])
    changed.save(tmp_path)
    loaded = load_result(tmp_path, labelled)
    assert loaded.choice == changed.choice
    assert same(loaded.select(), changed.select())
    for variant in ("harp-c", "harp-e"):
        assert same(loaded.select(variant, budget=40), result.choosing(task_weights={"red": 0.25}).select(
            variant, budget=40, active_tasks="all"))  # fmt: skip
    assert loaded.summary() == changed.summary()
    assert loaded.explain(3) == changed.explain(3)
    assert all(np.array_equal(loaded.measurements.rows[g], rows) for g, rows in result.measurements.rows.items())


def test_numbers_of_numpy_are_numbers(result, labelled, tmp_path):
    changed = result.choosing(budget=np.int64(17), task_weights={"red": np.float32(0.25), "green": np.int64(2)})
    changed.save(tmp_path)
    loaded = load_result(tmp_path, labelled)
    assert loaded.choice == changed.choice == result.choosing(budget=17, task_weights={"red": 0.25, "green": 2}).choice


def test_a_measured_mixture_is_split_by_the_seed_of_its_run(result, labelled, tmp_path):
    labelled.to_parquet(tmp_path / "pool.parquet")
    mixture = DatasetMixtureConfig(
        datasets=[DatasetConfig(path="parquet", data_files=str(tmp_path / "pool.parquet"))], test_split_size=0.25
    )
    pool, _ = load_pool(mixture, 7)
    replace(result, digest=content_digest(pool)).save(tmp_path)
    with pytest.raises(DataError, match="The pool is not the one"):
        load_result(tmp_path, mixture)
    (tmp_path / "config.yaml").write_text("seed: 7")
    assert same(load_result(tmp_path, mixture).pool, pool)


def test_a_result_is_loaded_with_its_own_pool_only(result, labelled, tmp_path):
    result.save(tmp_path)
    with pytest.raises(DataError, match="was an object in memory: pass it as `dataset`"):
        load_result(tmp_path)
    with pytest.raises(DataError, match="The pool is not the one"):
        load_result(tmp_path, labelled.select(range(95)))
    with pytest.raises(DataError, match="is not there"):
        load_result(tmp_path / "elsewhere", labelled)
    (tmp_path / "empty").mkdir()
    with pytest.raises(HarpError, match="holds no finished run"):
        load_result(tmp_path / "empty", labelled)


def test_the_summary_says_what_was_found_and_what_it_cost(result, labelled):
    text = result.summary()
    assert max(map(len, text.splitlines())) <= 100
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in text.splitlines() if line.startswith("│")]
    predicted = {v: result.predicted(replace(result.choice, variant=v)) for v in ("harp-c", "harp-e")}
    for d, task in enumerate(["red", "green"]):
        scores = (result.null, result.control, *predicted.values())
        active = "yes" if result.active()[d] else "no"
        assert [task, "exact_match", active, *(f"{every[d]:.3f}" for every in scores)] in cells
    for variant, name in (("harp-c", "HARP-C (chosen)"), ("harp-e", "HARP-E")):
        chosen = result.select(variant)
        assert [
            name,
            f"{len(set(chosen['harp_leaf']))} of {result.hierarchy.n_leaves}",
            str(len(chosen)),
            "96",
        ] in cells
    cost = result.measurements.cost
    assert f"Finetunes: 7, on 6 of {result.hierarchy.n_leaves} leaves and random rows." in text
    assert f"{cost['tokens_training']:,.0f} trained, {cost['tokens_evaluation']:,.0f} evaluated" in text
    assert min(cost.values()) > 0
    for stage in ("features", "hierarchy", "training", "evaluation"):
        assert f"{stage} {result.seconds[stage]:.0f}" in text
    assert "Note: Only 6 of 9 leaves were measured" in text


def test_the_summary_is_plain_text_whatever_tasks_are_called(result, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    names = ["[bold]a :smile: [/b]", "long " * 30]
    text = replace(result, tasks=names).summary()
    assert names[0] in text
    assert "\x1b" not in text
    assert max(map(len, text.splitlines())) <= 100


def test_repr_is_short(result):
    assert repr(result) == (
        "HarpResult(96 rows in 9 leaves, 6 measured, on 2 tasks, 2 active; Choice(variant='harp-c', budget=None, "
        "task_weights=None, active_tasks=('auto',), budget_by='task'))"
    )


def test_repeats_make_variances_honest(pool, proxy, features, tiny_model, config):
    args = config(num_repeats=2, max_measurements=3, max_steps=6, metric="likelihood")
    result = harp_hf.measure(pool, proxy, tiny_model, args, features=features)
    measured, task = result.measurements, result.task
    assert measured.scores.shape == (3, 2, 16)
    assert measured.cost["finetunes"] == 6
    assert not np.array_equal(measured.scores[:, 0], measured.scores[:, 1]), "another seed is another finetune"
    scores = measured.scores.mean(axis=1)
    effects, plain = measured_effects(scores, measured.null, task, 2)
    _, honest = measured_effects(scores, measured.null, task, 2, replicates=measured.scores)
    assert measured.effects(task, 2)[1] == pytest.approx(honest)
    assert (honest >= plain).all()
    assert (honest > plain).any()
    inferred = infer(effects, honest, measured.leaves, result.hierarchy)
    assert result.posterior.mean == pytest.approx(inferred.mean)
    assert result.posterior.sd == pytest.approx(inferred.sd)
    again = harp_hf.measure(pool, proxy, tiny_model, replace(args, num_repeats=1), features=features)
    assert np.array_equal(again.measurements.scores, measured.scores[:, :1]), "the first repeat is the plain run"


def test_a_leaf_whose_rows_are_all_truncated_is_recorded_and_the_run_goes_on(
    proxy, features, tiny_model, config, pool, caplog
):
    long = [row | {"prompt": row["prompt"] + " w1" * 40} for row in make_rows("green", 24, 4, wrong=True)]
    pool = Dataset.from_list(pool.to_list()[:72] + long)
    args = config(max_length=24, max_measurements=9)
    result = harp_hf.measure(pool, proxy, tiny_model, args, features=features)
    failed = result.measurements.failed
    lost = {g for g in range(result.hierarchy.n_leaves) if (result.hierarchy.rows(g) >= 72).all()}
    assert set(failed) == lost
    assert not lost & set(result.measurements.leaves.tolist())
    assert len(result.measurements.leaves) == 9 - len(lost)
    for leaf in lost:
        reason = f"all {result.hierarchy.sizes[leaf]} rows were lost to truncation to max_length=24"
        assert failed[leaf] == reason
        assert f"Leaf {leaf} was not measured: {reason}." in result.summary()
        assert f"Leaf {leaf} could not be measured: {reason}." in caplog.text
        row = int(result.hierarchy.rows(leaf)[0])
        assert (result.explain(row)["measured"], result.explain(row)["failed"]) == (False, reason)
    assert f"({len(lost)} failed)" in result.summary()
    assert np.isfinite(result.posterior.mean).all()
    assert set(result.select()["completion"]) <= {" crimson", " emerald"}
    assert load_result(args.output_dir, pool).measurements.failed == failed


def test_a_repeat_that_fails_leaves_the_other_one(pool, proxy, features, tiny_model, config, monkeypatch):
    finetune = LeafFinetuner.finetune

    def second_fails(self, rows, seed, adapter):
        if seed == args.seed + 1:
            raise FinetuneError("the training loss is not a finite number")
        return finetune(self, rows, seed, adapter)

    monkeypatch.setattr(LeafFinetuner, "finetune", second_fails)
    args = config(num_repeats=2, max_measurements=2, max_steps=2)
    result = harp_hf.measure(pool, proxy, tiny_model, args, features=features)
    assert result.measurements.failed == {}
    assert np.isnan(result.measurements.scores[:, 1]).all()
    assert np.isfinite(result.posterior.sd).all()
    assert load_result(args.output_dir, pool).summary() == result.summary()


def test_a_run_in_which_every_leaf_fails_says_why(pool, proxy, features, tiny_model, config, monkeypatch):
    def fails(self, rows, seed, adapter):
        raise FinetuneError("the training loss is not a finite number")

    monkeypatch.setattr(LeafFinetuner, "finetune", fails)
    with pytest.raises(HarpError, match=r"Not one of 4 leaves could be measured: the training loss .*; delete"):
        harp_hf.measure(pool, proxy, tiny_model, config(), features=features)


@pytest.mark.parametrize("form", ["array", "dict", "file"])
def test_null_scores_handed_in_are_not_measured(
    pool, proxy, features, tiny_model, config, monkeypatch, tmp_path, form
):
    asked = []
    evaluate = TransformersEvaluator.evaluate

    def spied(self, adapters):
        asked.extend(adapters)
        return evaluate(self, adapters)

    monkeypatch.setattr(TransformersEvaluator, "evaluate", spied)
    known = {"red": 0.25, "green": 0.5}
    lines = tmp_path / "null.jsonl"
    lines.write_text("\n".join(json.dumps({"task": t, "score": s}) for t, s in known.items()))
    handed = {"array": np.repeat([0.25, 0.5], 8), "dict": known, "file": None}[form]
    args = config(max_measurements=2, max_steps=2, null_scores=str(lines) if form == "file" else None)
    result = harp_hf.measure(pool, proxy, tiny_model, args, features=features, null_scores=handed)
    assert result.null.tolist() == [0.25, 0.5]
    assert not (tmp_path / "run" / "base.npz").exists()
    assert len(asked) == 2
    assert None not in asked
    effects = result.measurements.scores[:, 0].reshape(2, 2, 8).mean(axis=2) - [0.25, 0.5]
    assert np.array_equal(result.measurements.effects(result.task, 2)[0], effects)
    assert load_result(args.output_dir, pool).null.tolist() == [0.25, 0.5]


def test_clashing_columns_are_refused_before_anything_is_measured(pool, proxy, tiny_model, config, frozen):
    for name in ("phi", "phi_red", "phi_sd_red", "harp_leaf", "harp_row"):
        with pytest.raises(DataError, match=f"The pool already has the column '{name}'"):
            harp_hf.measure(pool.add_column(name, [0] * 96), proxy, tiny_model, config())
    tasks = proxy.map(lambda row: {"task": "sd_red" if row["task"] == "green" else "red"})
    with pytest.raises(HarpError, match="'red' and 'sd_red' would share the result column 'phi_sd_red'"):
        harp_hf.measure(pool, tasks, tiny_model, config())


def test_a_selection_shows_no_progress_bars(result, capfd):
    result.select()
    assert capfd.readouterr() == ("", "")
