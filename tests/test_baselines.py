"""What HARP is compared with: each selector against brute force, a hand computation or an axiom."""

import math
import subprocess
import sys
from dataclasses import replace
from itertools import combinations, pairwise

import numpy as np
import pytest
import torch
from datasets import Dataset
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

import harp_hf
from harp_hf import HarpConfig, HarpResult
from harp_hf.baselines import SELECTORS, Cost, Problem, selector
from harp_hf.baselines.datamodels import draw_unions, fit
from harp_hf.baselines.dsir import bucket, log_weights
from harp_hf.baselines.facility_location import lazy_greedy
from harp_hf.baselines.gradients import Projection, RowGradients
from harp_hf.baselines.less import LESS, proxy_rows
from harp_hf.baselines.problem import open_problem
from harp_hf.baselines.shapley import shapley_values
from harp_hf.errors import ConfigError, DataError
from harp_hf.features import load_features, load_proxy_features
from harp_hf.finetune import LeafFinetuner
from harp_hf.hierarchy import Hierarchy
from harp_hf.inputs import read_inputs
from harp_hf.measurements import Measurements
from harp_hf.posterior import Posterior, infer
from harp_hf.proxy import load_proxy
from harp_hf.result import Choice
from harp_hf.rundir import RunDir

WHOLE = arrays(np.float32, st.tuples(st.integers(1, 14), st.just(3)), elements=st.integers(-3, 3).map(float))


def unit(matrix):
    norms = np.linalg.norm(matrix, axis=1, keepdims=True)
    return (matrix / np.where(norms > 0, norms, 1)).astype(np.float32)


def problem_of(n=60, n_proxy=9, n_tasks=3, seed=0, **more):
    random = np.random.default_rng(5)
    texts = [" ".join(random.choice(["red", "green", "blue", "say", "the"], 6)) for _ in range(n)]
    return Problem(
        unit(random.standard_normal((n, 8))), unit(random.standard_normal((n_proxy, 8))),
        np.arange(n_proxy) % n_tasks, seed, lambda: texts, texts[:n_proxy], **more,
    )  # fmt: skip


@pytest.mark.parametrize("name", ["random", "rds", "k-center", "facility-location", "dsir"])
@pytest.mark.parametrize("budget", [None, 1, 17, 60, 500])
def test_rankings_name_rows_once_and_repeat_with_the_seed(name, budget):
    ranking = selector(name).rank(problem_of(), budget)
    assert len(np.unique(ranking.rows)) == len(ranking.rows) >= min(budget or 60, 60)
    assert ranking.rows.min() >= 0
    assert ranking.rows.max() < 60
    assert ranking.rows.dtype == np.int64
    assert ranking.cost.seconds > 0
    assert ranking.cost.finetunes == 0
    again = selector(name).rank(problem_of(), budget)
    assert again.rows.tolist() == ranking.rows.tolist()
    whole = selector(name).rank(problem_of()).rows
    assert whole[: len(ranking.rows)].tolist() == ranking.rows.tolist(), "a smaller budget is a prefix"
    with pytest.raises(ConfigError, match="at least 1 row"):
        selector(name).rank(problem_of(), 0)


@pytest.mark.parametrize("name", ["random", "dsir"])
def test_another_seed_is_another_order(name):
    orders = [selector(name).rank(problem_of(seed=s)).rows.tolist() for s in (0, 1)]
    assert orders[0] != orders[1]


def test_a_selector_that_lacks_something_says_what():
    bare = Problem(np.eye(3, dtype=np.float32), np.eye(3, dtype=np.float32), np.zeros(3, int))
    for name, what in (("dsir", "texts"), ("less", "run"), ("datamodels", "hierarchy"), ("top-phi", "result")):
        with pytest.raises(ConfigError, match=f"{name!r} needs the problem's `{what}`"):
            selector(name).rank(bare)
    with pytest.raises(ConfigError, match="no selector 'best'"):
        selector("best")
    with pytest.raises(ConfigError, match="has no option 'depth'"):
        selector("rds", depth=3)
    with pytest.raises(DataError, match="shape"):
        Problem(np.eye(3), np.eye(4), np.zeros(4, int))
    assert Cost(1, 2, 3, 4, 5.0) + Cost(finetunes=1) == Cost(2, 2, 3, 4, 5.0)


def test_names_are_offered_without_importing_torch():
    code = (
        "import sys; from harp_hf.baselines import SELECTORS, selector\n"
        "for name in ('random', 'rds', 'k-center', 'facility-location', 'dsir'): selector(name)\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert all(selector(name) for name in SELECTORS)


# --- RDS+


@pytest.mark.parametrize("n_proxy", [1, 3, 9, 25])
def test_rds_takes_turns_like_brute_force(n_proxy):
    problem = problem_of(n_proxy=n_proxy, n_tasks=min(3, n_proxy))
    similarity = problem.features @ problem.proxy_features.T
    turns = [np.flatnonzero(problem.task == d).tolist() for d in range(problem.n_tasks)]
    rows = []
    for step in range(60):
        turn = turns[step % len(turns)]
        query = turn[(step // len(turns)) % len(turn)]
        rows.append(max((i for i in range(60) if i not in rows), key=lambda i, q=query: similarity[i, q]))
    for budget in (7, 60):
        assert selector("rds").rank(problem, budget).rows[:budget].tolist() == rows[:budget]


def test_rds_looks_further_where_others_took_its_neighbours():
    features = unit(np.column_stack([np.ones(400), np.linspace(0, 1, 400)]))
    problem = Problem(features, np.repeat(features[:1], 40, axis=0), np.arange(40) % 4)
    assert selector("rds").rank(problem).rows.tolist() == list(range(400))


# --- k-center


@given(WHOLE)
@settings(max_examples=40)
@example(np.ones((5, 3), np.float32))
@example(np.repeat(np.eye(3, dtype=np.float32), 3, axis=0))
def test_k_center_always_takes_the_farthest_row(points):
    rows = selector("k-center").rank(Problem(points, points[:1], np.zeros(1, int))).rows.tolist()
    assert sorted(rows) == list(range(len(points))), "copies of a centre come last, each once"
    distance = ((points[:, None] - points[None]) ** 2).sum(2)
    from_mean = ((points - points.mean(axis=0)) ** 2).sum(1)
    assert from_mean[rows[0]] == pytest.approx(from_mean.min(), abs=1e-4)
    for step in range(1, len(points)):
        gap = distance[:, rows[:step]].min(axis=1)
        gap[rows[:step]] = -1
        assert rows[step] == gap.argmax()


@given(WHOLE, st.integers(1, 3))
@settings(max_examples=40)
def test_k_center_is_within_a_factor_of_two_of_the_best_radius(points, count):
    count = min(count, len(points))
    rows = selector("k-center").rank(Problem(points, points[:1], np.zeros(1, int)), count).rows
    assert len(set(rows.tolist())) == count
    distance = np.linalg.norm(points[:, None] - points[None], axis=2)
    best = min(distance[:, list(some)].min(axis=1).max() for some in combinations(range(len(points)), count))
    assert distance[:, rows].min(axis=1).max() <= 2 * best + 1e-3


# --- facility location


@given(WHOLE, WHOLE)
@settings(max_examples=60)
def test_lazy_greedy_is_naive_greedy(features, covered):
    similarity = np.maximum(covered.astype(float) @ features.T, 0)
    rows, best = [], np.zeros(len(covered))
    for _ in range(len(features)):
        gains = np.maximum(similarity - best[:, None], 0).sum(axis=0)
        gains[rows] = -1
        rows.append(int(gains.argmax()))
        best = np.maximum(best, similarity[:, rows[-1]])
    assert lazy_greedy(features, covered, len(features)).tolist() == rows


def test_facility_location_in_blocks_is_the_same(monkeypatch):
    points = np.random.default_rng(0).integers(-3, 4, (300, 4)).astype(np.float32)
    whole = lazy_greedy(points, points, 50)
    for name, size in (("_ROWS", 7), ("_CANDIDATES", 11), ("_LAZY", 2)):
        monkeypatch.setattr(f"harp_hf.baselines.facility_location.{name}", size)
    assert lazy_greedy(points, points, 50).tolist() == whole.tolist()


def test_facility_location_covers_a_sample_of_a_large_pool():
    rows = selector("facility-location", covered=20).rank(problem_of(), 10).rows
    assert len(set(rows.tolist())) == 10


# --- DSIR


def test_dsir_weights_are_those_of_a_hand_computation():
    pool, target = ["a b", "a a", "c"], ["A b!"]
    # Buckets of the pool: a 3, b 1, c 1, "a b" 1, "a a" 1 (7 in all); of the target: a, b, !, "a b", "b !" (5).
    p = {"a": 1 / 5, "b": 1 / 5, "c": 0, "a b": 1 / 5, "a a": 0}
    q = {"a": 3 / 7, "b": 1 / 7, "c": 1 / 7, "a b": 1 / 7, "a a": 1 / 7}
    assert len({bucket(gram, 10**6) for gram in [*p, "!", "b !"]}) == 7
    logs = {gram: math.log(p[gram] + 1e-8) - math.log(q[gram] + 1e-8) for gram in p}
    expected = [logs["a"] + logs["b"] + logs["a b"], 2 * logs["a"] + logs["a a"], logs["c"]]
    assert log_weights(pool, target, 10**6) == pytest.approx(expected)


def test_dsir_samples_in_proportion_to_its_weights():
    texts = ["x", "x", "y", "z z"]
    probability = np.exp(log_weights(texts, ["x y"]))
    probability /= probability.sum()
    firsts = np.zeros(4)
    for seed in range(2000):
        problem = Problem(np.eye(4, dtype=np.float32), np.eye(1, 4, dtype=np.float32), np.zeros(1, int), seed,
                          lambda: texts, ["x y"])  # fmt: skip
        firsts[selector("dsir").rank(problem).rows[0]] += 1 / 2000
    assert firsts == pytest.approx(probability, abs=0.04)
    weights = log_weights(texts, ["x y"])[selector("dsir", noise=False).rank(problem).rows]
    assert all(a >= b for a, b in pairwise(weights))


# --- LESS

FEW = {"warmup_rows": 24, "epochs": 2}


@pytest.fixture(scope="module")
def opened(tiny_model, pool, proxy, features, tmp_path_factory):
    """The tiny model's problem, as `measure` would see it."""
    args = HarpConfig(output_dir=str(tmp_path_factory.mktemp("baselines") / "run"), leaf_size=12, branching=2,
                      max_steps=12, learning_rate=3e-2, use_cpu=True, bf16=False, seed=3)  # fmt: skip
    given = read_inputs(pool, proxy, tiny_model, args, features=features)
    return open_problem(given, args, proxy_features=np.repeat(np.eye(2, 6), 8, axis=0))


@pytest.fixture(scope="module")
def checkpoints(opened, tmp_path_factory):
    """The checkpoints of a warm-up."""
    return list(LESS(**FEW)._warm_up(opened, opened.finetuner(), tmp_path_factory.mktemp("warm"), Cost()))


def test_adam_direction_is_that_of_the_optimizer_itself(opened, checkpoints):
    saved = torch.load(checkpoints[0] / "optimizer.pt", weights_only=True)
    assert saved["state"][0]["step"] == 3, "24 rows in batches of 8"
    with RowGradients(opened.finetuner().model, checkpoints[0]) as rows:
        gradient = rows.gradient(opened.finetuner().tokenised[5])
        weights = [w.detach().clone().requires_grad_() for w in rows.weights]
        optimizer = torch.optim.Adam(weights, lr=1e-2)
        optimizer.load_state_dict({"state": saved["state"], "param_groups": optimizer.state_dict()["param_groups"]})
        for weight, part in zip(weights, gradient.split([w.numel() for w in weights]), strict=True):
            weight.grad = part.view_as(weight)
        optimizer.step()
        moved = torch.cat([(w - b).flatten() for w, b in zip(weights, rows.weights, strict=True)]).detach() / -1e-2
        direction = rows.adam(gradient)
    assert moved.abs().max() > 0.1
    assert torch.allclose(moved, direction, atol=1e-4)


def test_a_row_agrees_most_with_itself_and_gradients_are_those_of_the_training_loss(opened, checkpoints):
    model, tokenised = opened.finetuner().model, opened.finetuner().tokenised
    before = torch.cat([w.flatten() for w in model.parameters()]).clone()
    with RowGradients(model, checkpoints[0]) as rows:
        gradients = torch.stack([rows.gradient(tokenised[i]) for i in range(0, 96, 6)])
        row = {k: torch.tensor([tokenised[6][k]]) for k in ("input_ids", "labels")}
        exact = torch.autograd.grad(rows.model(**row).loss, rows.weights)
        assert rows.tokens == sum(len(tokenised[i]["input_ids"]) for i in range(0, 96, 6))
        assert torch.allclose(gradients[1], torch.cat([g.flatten() for g in exact]), atol=1e-6)
        for dimensions in (None, 2048):
            project = Projection(gradients.shape[1], dimensions, seed=1)
            sketches = torch.stack([project(g) for g in gradients])
            cosines = sketches @ sketches.T
            assert (cosines.argmax(1) == torch.arange(16)).all()
            assert torch.allclose(cosines.diagonal(), torch.ones(16))
    assert not any(w.requires_grad for w in model.parameters())
    assert torch.equal(before, torch.cat([w.flatten() for w in model.parameters()])), "the base model is as it was"
    assert not hasattr(model, "peft_config")


def test_a_sketch_keeps_inner_products():
    # All entries are positive, so collisions without signs would all err to the same side.
    a, b = torch.nn.functional.normalize(torch.rand(2, 5000, generator=torch.Generator().manual_seed(0)), dim=1)
    a, b = a * (torch.arange(5000) < 3000), b * (torch.arange(5000) >= 2000)
    a = torch.nn.functional.normalize(a, dim=0)
    b = torch.nn.functional.normalize(a + b, dim=0)
    errors = []
    for seed in range(40):
        project = Projection(5000, 1024, seed)
        errors.append(float(project(a) @ project(b) - a @ b))
    assert abs(np.mean(errors)) < 0.02
    assert np.std(errors) < 2 / math.sqrt(1024)
    assert torch.equal(Projection(50, 8, 1)(a[:50]), Projection(50, 8, 1)(a[:50]))


def test_influence_is_that_of_unprojected_gradients(opened, checkpoints):
    exact, cost = LESS(projection=None, **FEW).influences(opened)
    finetuner, expected, before = opened.finetuner(), np.zeros((96, 2)), 3e-2
    targets = proxy_rows(finetuner, opened.proxy)
    assert [sum(label != -100 for label in row["labels"]) for row in targets] == [2] * 16, "the answer and its end"
    for checkpoint in checkpoints:
        with RowGradients(finetuner.model, checkpoint) as rows:
            steps = torch.stack([rows.adam(rows.gradient(row)) for row in finetuner.tokenised])
            wanted = torch.stack([rows.gradient(row) for row in targets])
        cosines = torch.nn.functional.cosine_similarity(steps[:, None], wanted[None], dim=2).numpy()
        rate, before = (before + rows.rate) / 2, rows.rate
        expected += rate * np.column_stack([cosines[:, :8].mean(1), cosines[:, 8:].mean(1)])
    assert len(checkpoints) == 2
    assert before == 0, "the rate has decayed"
    assert exact == pytest.approx(expected, abs=1e-5)
    projected, _ = LESS(projection=4096, **FEW).influences(opened)
    assert np.corrcoef(projected.ravel(), exact.ravel())[0, 1] > 0.98
    ids = [len(row["input_ids"]) for row in finetuner.tokenised]
    assert cost.tokens_gradient == 2 * (sum(ids) + sum(len(row["input_ids"]) for row in targets))
    assert cost.finetunes == 1
    assert cost.tokens_training > 0


def test_less_prefers_right_rows_and_is_not_measured_twice(opened, monkeypatch):
    selected = LESS(**FEW).rank(opened)
    assert sorted(selected.rows.tolist()) == list(range(96))
    assert np.mean(selected.rows[:40] < 48) > 0.9, "rows 48 and up have wrong answers"
    monkeypatch.setattr("harp_hf.finetune.LeafFinetuner.finetune", None)
    again = LESS(**FEW).rank(opened, budget=40)
    assert again.rows[:40].tolist() == selected.rows[:40].tolist()
    assert again.cost == selected.cost


def test_tasks_of_less_take_turns_however_large_their_influences(opened, monkeypatch):
    influence, cost = LESS(**FEW).influences(opened)
    monkeypatch.setattr("harp_hf.finetune.LeafFinetuner.finetune", None)
    best = LESS(**FEW, turns=False).rank(opened)
    assert influence.max(axis=1)[best.rows].tolist() == sorted(influence.max(axis=1), reverse=True)
    assert best.cost == cost, "the order is no part of what is measured"
    scaled = np.column_stack([influence[:, 0], 1e-3 * influence[:, 1] - 1])
    scaled[::3] = -np.inf
    monkeypatch.setattr(LESS, "influences", lambda self, problem: (scaled, cost))
    rows = []
    for step in range(64):
        rows.append(max((i for i in range(96) if i not in rows), key=lambda i, d=step % 2: scaled[i, d]))
    assert LESS().rank(opened, 3).rows.tolist() == rows[:3]
    taken = LESS().rank(opened).rows.tolist()
    assert taken[:64] == rows
    assert taken[64:] == list(range(0, 96, 3)), "lost rows come last, each once"
    first = LESS(turns=False).rank(opened).rows
    assert scaled[first[:20], 0].tolist() == sorted(scaled[:, 0], reverse=True)[:20], "one task takes all"


def test_a_killed_less_continues_where_it_was(opened, tmp_path, monkeypatch):
    whole, cost = LESS(**FEW, projection=256).influences(opened)
    monkeypatch.setattr("harp_hf.baselines.less._BLOCK", 32)
    fresh, taken = replace(opened, run=RunDir(tmp_path)), []
    gradient = RowGradients.gradient

    def killed(self, row):
        taken.append(row)
        if len(taken) == 70:
            raise KeyboardInterrupt
        return gradient(self, row)

    monkeypatch.setattr(RowGradients, "gradient", killed)
    with pytest.raises(KeyboardInterrupt):
        LESS(**FEW, projection=256).influences(fresh)
    again, cost_again = LESS(**FEW, projection=256).influences(fresh)
    assert len(taken) == 70 + 2 * (96 + 16) - 32
    assert again == pytest.approx(whole, abs=1e-6)
    assert cost_again.tokens_gradient == cost.tokens_gradient


def test_messages_are_read_as_the_pool_reads_them(tiny_model, config):
    def chat(word):
        return [{"role": "user", "content": f"say the red of {word}"}]

    pool = Dataset.from_list([
        {"prompt": chat(f"w{i}"), "completion": [{"role": "assistant", "content": "crimson"}]} for i in range(12)
    ])  # fmt: skip
    proxy = Dataset.from_list([{"prompt": chat("w3"), "answer": "crimson"}, {"prompt": chat("w5"), "answer": "azure"}])
    args = config()
    problem = open_problem(read_inputs(pool, proxy, tiny_model, args, features="tfidf"), args)
    rows = proxy_rows(problem.finetuner(), problem.proxy)
    assert [rows[0][k] for k in ("input_ids", "labels")] == [
        problem.finetuner().tokenised[3][k] for k in ("input_ids", "labels")
    ]
    mixed = replace(problem, proxy=replace(problem.proxy, prompts=["say", problem.proxy.prompts[1]]))
    with pytest.raises(DataError, match="all strings or all messages"):
        LESS().rank(mixed)


def test_rows_lost_to_truncation_come_last(tiny_model, proxy, config):
    rows = [{"prompt": "say the red of w1 :", "completion": " crimson"}] * 8
    rows[2] = rows[5] = {"prompt": "say the red of " + "w1 " * 40 + ":", "completion": " crimson"}
    args = config(max_length=24)
    given = read_inputs(Dataset.from_list(rows), proxy, tiny_model, args, features="tfidf")
    ranking = LESS(epochs=1).rank(open_problem(given, args))
    assert sorted(ranking.rows[-2:].tolist()) == [2, 5]


# --- ablations of HARP


def harp_result(phi, measured, sizes=(3, 4, 5, 4), variant="harp-c", **choice):
    """A result with four leaves, two tasks of four proxy rows, and these posterior means (4, 2).

    On every measured leaf each row's score is the base model's, 0.25, plus the leaf's effect.
    """
    leaf = np.repeat(np.arange(4), sizes).astype(np.int32)
    hierarchy = Hierarchy(leaf, np.zeros(4, np.int32), np.zeros(1, np.int32), np.eye(4, dtype=np.float32),
                          np.ones((1, 4), np.float32) / 2, np.arange(len(leaf))[::-1].astype(np.float32))  # fmt: skip
    task, phi = np.repeat([0, 1], 4), np.array(phi, float)
    scores = np.stack([[0.25 + effects[task]] for effects in np.array(measured[1], float)])
    cost = {"finetunes": 2.0, "tokens_training": 70.0, "tokens_evaluation": 9.0, "seconds_training": 1.5,
            "seconds_evaluation": 0.25}  # fmt: skip
    return HarpResult(
        Dataset.from_dict({"text": ["x"] * len(leaf)}), ["a", "b"], ["likelihood"] * 2, task, hierarchy,
        Measurements(np.array(measured[0]), scores, np.full(8, 0.25), cost=cost), Posterior(phi, phi * 0 + 0.1),
        np.ones(2, bool), Choice(variant=variant, **choice), {}, "",
    )  # fmt: skip


def problem_with(result):
    n = len(result.pool)
    features = np.eye(n, dtype=np.float32)
    return Problem(features, features[:8], result.task, 7, hierarchy=result.hierarchy, result=result)


PHI = [[0.3, -0.1], [0.0, 0.1], [0.25, 0.0], [-0.2, -0.1]]


def test_top_phi_goes_by_the_mean_effect_alone():
    result = harp_result(PHI, ([0, 1], PHI[:2]))
    ranking = selector("top-phi").rank(problem_with(result))
    order = [2, 0, 1, 3]  # means 0.125, 0.1, 0.05 and -0.15
    assert ranking.rows.tolist() == np.concatenate([result.hierarchy.rows(g) for g in order]).tolist()
    assert ranking.rows[:5].tolist() == [11, 10, 9, 8, 7], "rows nearest their centroid first"
    assert ranking.stop == 5 + 3 + 4
    few = selector("top-phi").rank(problem_with(result), 6)
    assert few.rows.tolist() == ranking.rows.tolist(), "tasks do not share a budget"
    assert ranking.cost == Cost(2, 70, 9, 0, 1.75)
    harp = result.order().leaves.tolist()
    assert harp != order, "HARP-C sees that leaf 0 adds little to task a after leaf 2"
    weighted = harp_result(PHI, ([0, 1], PHI[:2]), task_weights={"a": 0.0})
    assert weighted.hierarchy.leaf[selector("top-phi").rank(problem_with(weighted)).rows[0]] == 1
    only_b = harp_result(PHI, ([0, 1], PHI[:2]), active_tasks=("b",))
    assert only_b.hierarchy.leaf[selector("top-phi").rank(problem_with(only_b)).rows[0]] == 1


@pytest.mark.parametrize(("variant", "stop"), [("harp-c", 3), ("harp-e", 7)])
def test_measured_only_leaves_the_posterior_aside(variant, stop):
    # By the posterior leaf 1 is best and the measured ones are bad.
    result = harp_result([[-0.2, 0], [0.4, 0.4], [0, 0], [-0.2, 0]], ([3, 0], [[0.3, 0.0], [0.4, -0.05]]),
                         variant=variant)  # fmt: skip
    ranking = selector("measured-only").rank(problem_with(result))
    assert ranking.rows[:7].tolist() == np.concatenate([result.hierarchy.rows(g) for g in (0, 3)]).tolist()
    assert ranking.stop == stop, "beside leaf 0, leaf 3 adds nothing under HARP-C"
    assert sorted(ranking.rows.tolist()) == list(range(16)), "unmeasured leaves follow"
    more = selector("measured-only").rank(problem_with(result), stop)
    assert more.rows.tolist() == ranking.rows.tolist()


@pytest.mark.parametrize("budget_by", ["task", "leaf"])
def test_measured_only_shares_a_budget_as_harp_does(budget_by):
    # The posterior says just what was measured of every leaf, so that without it HARP is what it was.
    phi = [[0.3, -0.1], [0.0, 0.1], [0.25, 0.0], [0.2, 0.1]]
    result = harp_result(phi, (range(4), phi), variant="harp-e")
    effects, variances = result.measurements.effects(result.task, 2)
    result = replace(result, posterior=Posterior(effects, np.sqrt(variances)),
                     choice=replace(result.choice, budget_by=budget_by))  # fmt: skip
    harp = result.chosen(replace(result.choice, budget=6))[0]
    ranking = selector("measured-only").rank(problem_with(result), 6)
    assert ranking.rows[:6].tolist() == harp.tolist()
    assert sorted(ranking.rows.tolist()) == list(range(16))
    whole = selector("measured-only").rank(problem_with(result)).rows
    assert (whole[:6].tolist() == harp.tolist()) == (budget_by == "leaf")


def test_leaves_that_were_not_measured_change_nothing_for_measured_only():
    phi = [[0.3, -0.1], [0.0, 0.1], [0.25, 0.05]]
    rankings = [
        selector("measured-only").rank(problem_with(
            harp_result([*phi, [0, 0]], (range(3), phi), sizes=(8, 9, 7, size), variant="harp-e")
        ), 12)
        for size in (1, 10, 400)
    ]  # fmt: skip
    shared = [ranking.rows[:12].tolist() for ranking in rankings]
    assert shared[0] == shared[1] == shared[2]
    assert max(shared[0]) < 24
    assert len(rankings[2].rows) == 424


def test_even_rows_are_those_of_harp_without_similarity_inside_leaves():
    result = harp_result(PHI, ([0, 1], PHI[:2]))
    nearest = np.arange(16)[None, ::-1].repeat(8, axis=0)
    told = replace(result, nearest=nearest)
    budget = replace(result.choice, budget=4)
    ranking = selector("even-rows").rank(problem_with(told), 4)
    assert ranking.rows[:4].tolist() == result.chosen(budget)[0].tolist() != told.chosen(budget)[0].tolist()
    assert sorted(ranking.rows.tolist()) == list(range(16))
    assert ranking.cost.finetunes == 2


def test_exhaustive_is_harp_with_every_leaf_measured(tiny_model, pool, proxy, features, config, tmp_path, monkeypatch):
    args = config(metric="likelihood", active_tasks="all")
    result = harp_hf.measure(pool, proxy, tiny_model, args, features=features)
    given = read_inputs(pool, proxy, tiny_model, args, features=features)
    problem = open_problem(given, args, proxy_features=np.ones((16, 6)), result=result)
    made, finetune = [], LeafFinetuner.finetune
    monkeypatch.setattr(
        LeafFinetuner, "finetune", lambda self, rows, *rest: made.append(rows) or finetune(self, rows, *rest)
    )
    ranking = selector("exhaustive").rank(problem)
    n_leaves = result.hierarchy.n_leaves
    assert len(made) == n_leaves - 4, "what HARP has measured is not measured again"
    assert ranking.cost.finetunes == n_leaves
    assert sorted(ranking.rows.tolist()) == list(range(96))
    whole = harp_hf.measure(
        pool, proxy, tiny_model, config(output_dir=str(tmp_path / "all"), metric="likelihood", active_tasks="all",
                                        max_measurements=n_leaves), features=features,
    )  # fmt: skip
    assert ranking.rows[: ranking.stop].tolist() == whole.chosen()[0].tolist()
    assert np.mean(ranking.rows[: ranking.stop] < 48) > 0.9
    nested = config(metric="likelihood", active_tasks="all", prior="nested")
    again = selector("exhaustive").measure(replace(open_problem(given, nested), result=result))
    expected = infer(*again.measurements.effects(result.task, 2), again.measurements.leaves, result.hierarchy,
                     prior="nested", similarity=result.similarity)  # fmt: skip
    assert again.posterior.mean.tolist() == expected.mean.tolist() != whole.posterior.mean.tolist()


# --- datamodels


@given(st.integers(0, 1000))
@settings(max_examples=10)
def test_datamodels_recover_an_additive_truth(seed):
    truth = np.random.default_rng(seed).normal(0, 0.1, (10, 2))
    members = draw_unions(10, 40, 0.5, seed)
    assert (members.sum(axis=1) == 5).all()
    assert fit(members, 0.3 + members @ truth) - truth == pytest.approx(
        np.broadcast_to(-truth.mean(axis=0), (10, 2)), abs=1e-3
    ), "all unions are of one size, so coefficients are known but for a constant"
    sizes = np.random.default_rng(seed).random((40, 10)) < 0.5
    assert fit(sizes, 0.3 + sizes @ truth) == pytest.approx(truth, abs=1e-3)
    noisy = 0.3 + members @ truth + np.random.default_rng(seed).normal(0, 0.05, (40, 2))
    assert np.corrcoef(fit(members, noisy).ravel(), truth.ravel())[0, 1] > 0.7


# --- Shapley values


def game(seed):
    """A random game on five players in which players 1 and 3 are interchangeable."""
    table = {}

    def value(sets):
        for some in sets:
            assert list(some) == sorted(some)
        keys = [tuple(sorted({0: "a", 1: "s", 2: "b", 3: "s", 4: "c"}[i] for i in some)) for some in sets]
        for key in keys:
            table.setdefault(key, np.random.default_rng([seed, *map(ord, key)]).random())
        return np.array([table[key] for key in keys])

    return value


@given(st.integers(0, 1000), st.integers(1, 5), st.integers(1, 200))
@settings(max_examples=30)
def test_shapley_values_share_out_the_whole_gain(seed, group, permutations):
    value = game(seed)
    values = shapley_values(value, 5, permutations=permutations, group=group, seed=seed)
    empty, everyone = value([(), (0, 1, 2, 3, 4)])
    assert values.sum() == pytest.approx(everyone - empty)
    cut = shapley_values(value, 5, permutations=permutations, group=group, tolerance=0.2, seed=seed)
    assert abs(cut.sum() - (everyone - empty)) <= 0.2 + 1e-9


def test_shapley_values_are_exact_with_all_permutations():
    value = game(1)
    values = shapley_values(value, 5, permutations=120)
    assert values[1] == pytest.approx(values[3]), "symmetric players are worth the same"
    for player in range(5):
        others = [i for i in range(5) if i != player]
        expected = sum(
            math.factorial(size) * math.factorial(4 - size) / math.factorial(5)
            * float(np.diff(value([some, tuple(sorted((*some, player)))]))[0])
            for size in range(5) for some in combinations(others, size)
        )  # fmt: skip
        assert values[player] == pytest.approx(expected)
    additive = np.array([0.1, 0.2, 0.0, -0.3])
    once = shapley_values(lambda sets: np.array([additive[list(s)].sum() for s in sets]), 4, permutations=1)
    assert once == pytest.approx(additive), "in an additive game any order tells all, and a null player gets nothing"


def test_a_cut_order_measures_nothing_more():
    asked = []

    def value(sets):
        asked.extend(sets)
        return np.array([0.5 if some else 0.0 for some in sets])

    values = shapley_values(value, 6, permutations=3, tolerance=0.01)
    assert len(asked) == 2 + 3
    assert values.sum() == pytest.approx(0.5)


# --- both, on a real model


def test_unions_are_finetuned_on_once_and_find_the_right_leaves(opened, monkeypatch):
    options = {"rows_per_leaf": 8, "epochs": 2.0}
    made, finetune = [], LeafFinetuner.finetune

    def counting(self, rows, *rest):
        made.append(rows)
        return finetune(self, rows, *rest)

    monkeypatch.setattr(LeafFinetuner, "finetune", counting)
    modelled = selector("datamodels", finetunes=10, share=0.3, **options).rank(opened)
    n_leaves = opened.hierarchy.n_leaves
    assert all(len(rows) == 8 * round(0.3 * n_leaves) for rows in made)
    assert modelled.cost.finetunes == len(made) <= 10
    assert modelled.cost.tokens_training > 0
    assert modelled.cost.tokens_evaluation > 0
    valued = selector("shapley", permutations=2, steps=3, tolerance=0.0, **options).rank(opened)
    total = len(made)
    assert valued.cost.finetunes <= 2 * 3
    for ranking in (modelled, valued):
        assert sorted(ranking.rows.tolist()) == list(range(96))
    assert selector("shapley", permutations=2, steps=3, tolerance=0.0, **options).rank(opened).cost == valued.cost
    assert len(made) == total, "nothing is measured twice"
    assert opened.finetuner().args.max_steps == 12, "leaf finetunes keep their effort"
    first = opened.hierarchy.leaf[modelled.rows[0]]
    assert opened.hierarchy.rows(first).max() < 48, "the best leaf has right answers"


# --- features of the proxy set


def test_proxy_features_compare_with_those_of_the_pool(pool, proxy, tmp_path):
    rows = load_proxy(proxy)
    settings_ = {"text_field": "text", "decode": str, "seed": 0}
    own = load_features(RunDir(tmp_path / "a"), pool, "tfidf", **settings_)
    same = load_proxy(pool.rename_column("completion", "answer"))
    again = load_proxy_features(pool, same, "tfidf", **settings_)
    assert again == pytest.approx(np.asarray(own), abs=1e-5), "the pool's rows as proxy rows have the pool's features"
    near = (own @ load_proxy_features(pool, rows, "tfidf", **settings_).T)[:48]
    assert near[:24, :8].mean() > near[24:, :8].mean() + 0.1

    class Letters:
        def encode(self, texts, batch_size, show_progress_bar):
            return np.array([[text.count(letter) for letter in "regn"] for text in texts], np.float64)

    own = load_features(RunDir(tmp_path / "b"), pool, Letters(), **settings_)
    assert load_proxy_features(pool, same, Letters(), **settings_) == pytest.approx(np.asarray(own))
    vectors = [[float(i), 1.0] for i in range(96)]
    with_column = pool.add_column("v", vectors)
    with pytest.raises(DataError, match="give the proxy set's vectors too"):
        load_proxy_features(with_column, rows, "v", **settings_)
    with pytest.raises(DataError, match="give the proxy set's vectors too"):
        load_proxy_features(pool, rows, np.ones((96, 2)), **settings_)
    found = load_proxy_features(with_column, load_proxy(proxy.add_column("v", vectors[:16])), "v", **settings_)
    assert found[1] == pytest.approx(np.array([1, 1]) / np.sqrt(2))
