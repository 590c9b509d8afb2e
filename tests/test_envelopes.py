"""Both envelopes, the greedy order under them and the budget, against a plain reference."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy.stats import norm

from harp_hf.envelopes import VARIANTS, Order, cut, greedy, predict, random_as_good, share
from harp_hf.errors import HarpError
from harp_hf.hierarchy import Hierarchy

EPS = 1e-9


def clip(x: float) -> float:
    return min(max(x, 0.0), 1.0)


def reference_scores(phi: list[list[float]], null: list[float], leaves: list[int], variant: str) -> list[float]:
    scores = []
    for d, b in enumerate(null):
        effects = [phi[g][d] for g in leaves]
        if variant == "harp-e":
            scores.append(clip(b + sum(effects)))
        else:
            gain = max([max(e, 0) for e in effects], default=0)
            scores.append(clip(b + gain - sum(max(-e, 0) for e in effects)))
    return scores


def reference_greedy(
    phi: list[list[float]], null: list[float], weights: list[float], variant: str
) -> tuple[list[int], list[float], int]:
    def objective(leaves: list[int]) -> float:
        return sum(w * y for w, y in zip(weights, reference_scores(phi, null, leaves, variant), strict=True))

    means = [sum(w * e for w, e in zip(weights, row, strict=True)) for row in phi]
    order: list[int] = []
    values = [objective([])]
    while len(order) < len(phi):
        reached = {g: objective([*order, g]) for g in range(len(phi)) if g not in order}
        best = [g for g, value in reached.items() if value > max(reached.values()) - EPS]
        best = [g for g in best if means[g] > max(means[h] for h in best) - EPS]
        order.append(min(best))
        values.append(reached[order[-1]])
    gains = [after - before for before, after in pairwise(values)]
    return order, gains, next(k for k, value in enumerate(values) if value > max(values) - EPS)


@st.composite
def problems(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Numbers on a coarse grid, so that ties and clipping are common and well apart from rounding."""
    n_leaves, n_tasks = draw(st.integers(1, 7)), draw(st.integers(1, 4))
    step = draw(st.sampled_from([8, 10]))
    effect = st.integers(-step, step).map(lambda k: k / step)
    phi = draw(st.lists(st.lists(effect, min_size=n_tasks, max_size=n_tasks), min_size=n_leaves, max_size=n_leaves))
    null = draw(st.lists(st.integers(0, step).map(lambda k: k / step), min_size=n_tasks, max_size=n_tasks))
    weights = draw(st.lists(st.sampled_from([0.0, 0.3, 0.5, 1.0]), min_size=n_tasks, max_size=n_tasks))
    return np.array(phi), np.array(null), np.array(weights)


def hierarchy_of(sizes: list[int], seed: int = 0) -> Hierarchy:
    rng = np.random.default_rng(seed)
    leaf = rng.permutation(np.repeat(np.arange(len(sizes)), sizes)).astype(np.int32)
    return Hierarchy(
        leaf=leaf,
        parent=np.zeros(len(sizes), np.int32),
        large=np.zeros(1, np.int32),
        centroids=np.ones((len(sizes), 1), np.float32),
        parent_centroids=np.ones((1, 1), np.float32),
        distance=rng.integers(0, 4, len(leaf)).astype(np.float32) / 4,
    )


def test_both_envelopes_on_an_example_by_hand() -> None:
    phi = np.array([[0.3, -0.1, 0.4], [0.2, -0.2, 0.4], [-0.1, 0.1, 0.0]])
    null = np.array([0.5, 0.2, 0.4])
    assert predict(phi, null, [0, 1, 2], "harp-c") == pytest.approx([0.5 + 0.3 - 0.1, 0.0, 0.8])
    assert predict(phi, null, [0, 1, 2], "harp-e") == pytest.approx([0.9, 0.0, 1.0])
    assert predict(phi, null, [2], "harp-c") == pytest.approx([0.4, 0.3, 0.4])
    for variant in VARIANTS:
        assert predict(phi, null, [], variant) == pytest.approx(null)


def test_greedy_on_an_example_by_hand() -> None:
    phi = np.array([[0.2, 0.0], [0.0, 0.2], [0.1, 0.1], [-0.3, 0.1]])
    null = np.array([0.5, 0.5])
    order = greedy(phi, null, np.ones(2), variant="harp-c")
    assert order.leaves.tolist() == [0, 1, 2, 3]
    assert order.gains == pytest.approx([0.2, 0.2, 0, -0.3])
    assert order.best_prefix == 2
    assert greedy(phi, null, np.ones(2), variant="harp-e").best_prefix == 3


@pytest.mark.parametrize("variant", VARIANTS)
@settings(deadline=None, max_examples=200)
@given(problem=problems())
def test_greedy_equals_the_reference(variant: str, problem: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
    phi, null, weights = problem
    order = greedy(phi, null, weights, variant=variant)
    leaves, gains, best_prefix = reference_greedy(phi.tolist(), null.tolist(), weights.tolist(), variant)
    assert order.leaves.tolist() == leaves
    assert order.gains == pytest.approx(gains, abs=1e-9)
    assert order.best_prefix == best_prefix
    for size in range(len(leaves) + 1):
        expected = reference_scores(phi.tolist(), null.tolist(), leaves[:size], variant)
        assert predict(phi, null, order.leaves[:size], variant) == pytest.approx(expected)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("shift", "scale"), [(0.0, 0.05), (0.02, 0.1), (-0.03, 0.3)])
def test_greedy_equals_the_reference_while_tasks_fill_up_and_run_empty(
    variant: str, shift: float, scale: float
) -> None:
    rng = np.random.default_rng(0)
    phi, null, weights = rng.normal(shift, scale, (40, 5)), rng.random(5), rng.uniform(0.2, 2, 5)
    order = greedy(phi, null, weights, variant=variant)
    leaves, gains, best_prefix = reference_greedy(phi.tolist(), null.tolist(), weights.tolist(), variant)
    assert order.leaves.tolist() == leaves
    assert order.gains == pytest.approx(gains, abs=1e-9)
    assert order.best_prefix == best_prefix


@pytest.mark.parametrize("variant", VARIANTS)
def test_ties_go_to_the_larger_mean_then_to_the_smaller_id(variant: str) -> None:
    # All of the last three fill the task up to 1.
    phi = np.array([[0.0], [0.6], [0.7], [0.7]])
    order = greedy(phi, np.array([0.5]), np.ones(1), variant=variant)
    assert order.leaves.tolist() == [2, 3, 1, 0]
    assert order.best_prefix == 1


@pytest.mark.parametrize("variant", VARIANTS)
def test_where_no_leaf_helps_nothing_is_selected(variant: str) -> None:
    order = greedy(np.array([[-0.1], [0.0]]), np.array([0.5]), np.ones(1), variant=variant)
    assert order.best_prefix == 0
    rows, ranks = cut(order, hierarchy_of([3, 2]))
    assert len(rows) == len(ranks) == 0


@settings(deadline=None)
@given(st.lists(st.integers(1, 6), min_size=1, max_size=6), st.integers(1, 40), st.data())
def test_a_budget_cuts_the_greedy_order_and_is_never_exceeded(
    sizes: list[int], budget: int, data: st.DataObject
) -> None:
    hierarchy = hierarchy_of(sizes)
    leaves = data.draw(st.permutations(range(len(sizes))))
    order = Order(np.array(leaves), np.ones(len(sizes)), data.draw(st.integers(0, len(sizes))))
    everything = [
        (row, rank) for rank, leaf in enumerate(leaves[: order.best_prefix]) for row in hierarchy.rows(leaf).tolist()
    ]
    rows, ranks = cut(order, hierarchy)
    assert list(zip(rows.tolist(), ranks.tolist(), strict=True)) == everything
    rows, ranks = cut(order, hierarchy, budget)
    assert list(zip(rows.tolist(), ranks.tolist(), strict=True)) == everything[:budget]


def test_the_leaf_that_crosses_the_budget_gives_its_nearest_rows() -> None:
    hierarchy = hierarchy_of([5, 9])
    rows, ranks = cut(Order(np.array([1, 0]), np.ones(2), 2), hierarchy, 12)
    kept, left = rows[ranks == 1], np.setdiff1d(np.flatnonzero(hierarchy.leaf == 0), rows)
    assert np.array_equal(np.sort(rows[ranks == 0]), np.flatnonzero(hierarchy.leaf == 1))
    assert len(kept) == 3
    assert hierarchy.distance[kept].max() <= hierarchy.distance[left].min()


def given_rows(order, hierarchy: Hierarchy, *arguments, **named) -> np.ndarray:
    """How many rows each leaf gives a shared budget."""
    return np.bincount(hierarchy.leaf[share(order, hierarchy, *arguments, **named)[0]], minlength=hierarchy.n_leaves)


def test_tasks_share_a_small_budget_by_their_weights() -> None:
    phi = np.array([[0.5, 0.0, 0.0], [0.0, 0.3, 0.0], [0.0, 0.0, 0.1]])
    order = greedy(phi, np.zeros(3), np.ones(3), variant="harp-e")
    hierarchy = hierarchy_of([20, 20, 4])
    rows, ranks = share(order, hierarchy, phi, np.ones(3), 30)
    given = np.bincount(hierarchy.leaf[rows], minlength=3)
    assert given.tolist() == [13, 13, 4], "the third task's leaf has four rows, and the others share what it leaves"
    assert (order.leaves[ranks] == hierarchy.leaf[rows]).all()
    assert (np.diff(ranks) >= 0).all()
    assert given_rows(order, hierarchy, phi, np.array([3.0, 1.0, 0.0]), 16).tolist() == [12, 4, 0]
    more = given_rows(order, hierarchy, phi, np.array([1.0, 0.0, 0.0]), 30)
    assert more.tolist() == [20, 10, 0], "what no task asks for, in order"


def test_a_task_takes_from_leaves_by_the_square_of_their_effect_beyond_the_mean() -> None:
    phi = np.array([[0.6], [0.4], [0.2], [0.1], [0.1]])
    hierarchy = hierarchy_of([40, 40, 100, 160, 160])
    assert hierarchy.sizes @ phi / 500 == pytest.approx(0.184)
    order = greedy(phi, np.zeros(1), np.ones(1), variant="harp-e")
    given = given_rows(order, hierarchy, phi, np.ones(1), 22)
    first, second, third = (0.6 - 0.184) ** 2, (0.4 - 0.184) ** 2, (0.2 - 0.184) ** 2
    quota = 22 * np.array([first, second, third, 0, 0]) / (first + second + third)
    assert given.sum() == 22
    assert np.abs(given - quota).max() < 1
    assert given[3:].sum() == 0


@pytest.mark.parametrize("variant", VARIANTS)
def test_leaves_beyond_the_prefix_share_a_budget_but_not_those_that_harm(variant) -> None:
    # One leaf brings the first task to 1, so that the prefix needs no other leaf of it.
    phi = np.array([[1.0, 0.0], [0.98, 0.0], [0.95, 0.0], [0.0, 0.8], [0.9, -0.95], [-0.5, -0.5]])
    hierarchy = hierarchy_of([40] * 6)
    order = greedy(phi, np.zeros(2), np.ones(2), variant=variant)
    assert order.leaves[: order.best_prefix].tolist() == [0, 3]
    given = given_rows(order, hierarchy, phi, np.ones(2), 60)
    assert given.sum() == 60
    assert given[3] == 30
    assert given[:3] == pytest.approx([10, 10, 10], abs=1)
    assert given[4:].tolist() == [0, 0], "leaf 4 harms the second task more than it helps the first"
    at_large = given_rows(order, hierarchy, phi, np.ones(2), 60, np.ones(2))
    assert at_large.tolist() == [15, 15, 15, 15, 0, 0], "the pool at large takes none from harmful leaves either"


def test_the_pool_at_large_has_what_tasks_leave_to_it() -> None:
    phi = np.array([[0.8, 0.0, 0.0], [0.0, 0.4, 0.0], [0.0, 0.0, 0.2], [0.01, 0.01, 0.01]])
    hierarchy = hierarchy_of([200, 200, 200, 1800])
    order = greedy(phi, np.zeros(3), np.ones(3), variant="harp-e")
    given = given_rows(order, hierarchy, phi, np.ones(3), 300, np.array([0.0, 0.4, 1.0]))
    expected = np.array([100, 60, 0, 0]) + 140 * hierarchy.sizes / 2400
    assert np.abs(given - expected).max() < 3
    weighted = given_rows(order, hierarchy, phi, np.array([0.0, 3.0, 1.0]), 200, np.array([0.0, 0.4, 1.0]))
    expected = np.array([0, 90, 0, 0]) + 110 * hierarchy.sizes / 2400
    assert np.abs(weighted - expected).max() < 3


@given(st.floats(-1, 1), st.floats(0.01, 1), st.floats(-1, 1), st.floats(0.01, 1))
def test_random_rows_are_as_good_as_the_best_leaf_with_a_normal_probability(leaf, sd, control, error) -> None:
    mean, spread = np.array([[leaf - 0.5, leaf], [leaf, leaf - 0.1]]), np.array([[9.0, sd], [sd, 9.0]])
    found = random_as_good(mean, spread, np.full(2, control), np.full(2, error**2))
    assert found == pytest.approx([norm.cdf(control, leaf, np.hypot(sd, error))] * 2)


def test_a_leaf_gives_rows_from_its_centroid_outwards_evenly() -> None:
    phi = np.array([[0.5], [-0.5]])
    order = greedy(phi, np.zeros(1), np.ones(1), variant="harp-c")
    hierarchy = hierarchy_of([12, 5])
    assert np.array_equal(share(order, hierarchy, phi, np.ones(1), 3)[0], hierarchy.rows(0)[[2, 6, 10]])


@given(problems(), st.integers(1, 60), st.sampled_from(VARIANTS), st.sampled_from([0.0, 0.3, 1.0]))
@example((np.array([[0.0, 0.1], [-0.3, 0.3]]), np.array([0.2, 0.0]), np.array([0.3, 0.3])), 2, "harp-c", 0.0)
@settings(deadline=None, max_examples=150)
def test_a_shared_budget_is_used_and_never_exceeded(problem, budget: int, variant: str, part) -> None:
    phi, null, weights = problem
    hierarchy = hierarchy_of([3 + 2 * g for g in range(len(phi))])
    order = greedy(phi, null, weights, variant=variant)
    rows, ranks = share(order, hierarchy, phi, weights, budget, np.full(phi.shape[1], part))
    prefix = cut(order, hierarchy)[0]
    assert len(np.unique(rows)) == len(rows) <= budget
    assert (order.leaves[ranks] == hierarchy.leaf[rows]).all()
    assert (np.diff(ranks) >= 0).all()
    if len(prefix) <= budget:
        assert np.array_equal(rows, cut(order, hierarchy, budget)[0])
    else:
        assert len(rows) == budget
        beyond = np.setdiff1d(hierarchy.leaf[rows], order.leaves[: order.best_prefix])
        assert (phi[beyond] @ weights > 0).all()


def test_bad_input_is_refused() -> None:
    phi, null = np.zeros((3, 2)), np.zeros(2)
    with pytest.raises(HarpError, match="variant"):
        predict(phi, null, [0], "harp-x")
    with pytest.raises(HarpError, match="do not fit"):
        predict(phi, np.zeros(3), [0], "harp-c")
    with pytest.raises(HarpError, match="finite"):
        predict(np.full((3, 2), np.nan), null, [0], "harp-c")
    with pytest.raises(HarpError, match="weights"):
        greedy(phi, null, np.array([1.0, -1.0]), variant="harp-c")
    for budget in (0, -1):
        with pytest.raises(HarpError, match="budget"):
            cut(Order(np.arange(1), np.ones(1), 1), hierarchy_of([3]), budget)
