"""How a budget of rows is spent: whole leaves, or shared by what rows may still bring each task."""

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy.integrate import quad
from scipy.stats import norm
from test_envelopes import problems

from harp_hf.budget import claims_of, cut, random_as_good, share
from harp_hf.envelopes import VARIANTS, Order, greedy
from harp_hf.errors import HarpError
from harp_hf.hierarchy import Hierarchy


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


def test_where_no_leaf_helps_nothing_is_cut() -> None:
    rows, ranks = cut(Order(np.array([1, 0]), np.zeros(2), 0), hierarchy_of([3, 2]))
    assert len(rows) == len(ranks) == 0


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


def test_tasks_share_a_small_budget_by_their_claims() -> None:
    phi = np.array([[0.5, 0.0, 0.0], [0.0, 0.3, 0.0], [0.0, 0.0, 0.1]])
    order = greedy(phi, np.zeros(3), np.ones(3), variant="harp-e")
    hierarchy = hierarchy_of([20, 20, 4])
    rows, ranks = share(order, hierarchy, phi, np.ones(3), np.array([1, 1, 1, 0]), 30)
    given = np.bincount(hierarchy.leaf[rows], minlength=3)
    assert given.tolist() == [13, 13, 4], "the third task's leaf has four rows, and the others share what it leaves"
    assert (order.leaves[ranks] == hierarchy.leaf[rows]).all()
    assert (np.diff(ranks) >= 0).all()
    assert given_rows(order, hierarchy, phi, np.ones(3), np.array([3.0, 1.0, 0.0, 0.0]), 16).tolist() == [12, 4, 0]
    more = given_rows(order, hierarchy, phi, np.ones(3), np.array([1.0, 0.0, 0.0, 0.0]), 30)
    assert more.tolist() == [20, 10, 0], "what no task asks for, in order"


def test_a_task_takes_from_leaves_by_the_square_of_their_effect_beyond_the_mean() -> None:
    phi = np.array([[0.6], [0.4], [0.2], [0.1], [0.1]])
    hierarchy = hierarchy_of([40, 40, 100, 160, 160])
    assert hierarchy.sizes @ phi / 500 == pytest.approx(0.184)
    order = greedy(phi, np.zeros(1), np.ones(1), variant="harp-e")
    given = given_rows(order, hierarchy, phi, np.ones(1), np.array([1.0, 0.0]), 22)
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
    given = given_rows(order, hierarchy, phi, np.ones(2), np.array([1.0, 1.0, 0.0]), 60)
    assert given.sum() == 60
    assert given[3] == 30
    assert given[:3] == pytest.approx([10, 10, 10], abs=1)
    assert given[4:].tolist() == [0, 0], "leaf 4 harms the second task more than it helps the first"
    at_large = given_rows(order, hierarchy, phi, np.ones(2), np.array([0.0, 0.0, 1.0]), 60)
    assert at_large.tolist() == [15, 15, 15, 15, 0, 0], "the pool at large takes none from harmful leaves either"


def test_the_pool_at_large_has_what_it_claims() -> None:
    phi = np.array([[0.8, 0.0, 0.0], [0.0, 0.4, 0.0], [0.0, 0.0, 0.2], [0.01, 0.01, 0.01]])
    hierarchy = hierarchy_of([200, 200, 200, 1800])
    order = greedy(phi, np.zeros(3), np.ones(3), variant="harp-e")
    given = given_rows(order, hierarchy, phi, np.ones(3), np.array([1.0, 0.6, 0.0, 1.4]), 300)
    expected = np.array([100, 60, 0, 0]) + 140 * hierarchy.sizes / 2400
    assert np.abs(given - expected).max() < 3


@given(st.floats(-1, 1), st.floats(0.01, 1), st.floats(-1, 1), st.floats(0.01, 1))
def test_random_rows_are_as_good_as_the_best_leaf_with_a_normal_probability(leaf, sd, control, error) -> None:
    mean, spread = np.array([[leaf - 0.5, leaf], [leaf, leaf - 0.1]]), np.array([[9.0, sd], [sd, 9.0]])
    found = random_as_good(mean, spread, np.full(2, control), np.full(2, error**2))
    assert found == pytest.approx([norm.cdf(control, leaf, np.hypot(sd, error))] * 2)


def test_a_leaf_gives_rows_from_its_centroid_outwards_evenly() -> None:
    phi = np.array([[0.5], [-0.5]])
    order = greedy(phi, np.zeros(1), np.ones(1), variant="harp-c")
    hierarchy = hierarchy_of([12, 5])
    assert np.array_equal(
        share(order, hierarchy, phi, np.ones(1), np.array([1.0, 0.0]), 3)[0], hierarchy.rows(0)[[2, 6, 10]]
    )


def test_proxy_rows_take_turns_and_each_takes_its_most_similar_row_left() -> None:
    phi = np.array([[0.5, 0.0], [0.3, 0.0], [0.0, 0.4], [-0.2, -0.2]])
    hierarchy = hierarchy_of([10] * 4)
    first, second, other, bad = (hierarchy.rows(g)[::-1] for g in range(4))
    order = greedy(phi, np.zeros(2), np.ones(2), variant="harp-e")
    # All of the first task's rows come from leaves 0 and 1, in the proportion 0.35^2 to 0.15^2.
    nearest = [
        np.array([[first[0], second[0], second[3]], [first[0], bad[0], first[1]], [other[0], first[1], first[2]]]),
        np.full((2, 3), -1),
    ]
    only = np.array([1.0, 0.0, 0.0])
    for budget in (1, 2, 3):
        rows = share(order, hierarchy, phi, np.ones(2), only, budget, nearest)[0]
        assert sorted(rows) == sorted(first[:budget])
    # Nobody is near to further rows of the leaves: they are spread evenly over what is left.
    rows = share(order, hierarchy, phi, np.ones(2), only, 8, nearest)[0]
    assert np.bincount(hierarchy.leaf[rows]).tolist() == [7, 1]
    assert second[0] in rows
    rest = hierarchy.rows(0)[:7]
    assert sorted(rows[hierarchy.leaf[rows] == 0]) == sorted([*first[:3], *rest[[0, 2, 4, 6]]])
    # A task of which no row is known to be similar takes the rows it always takes.
    alone = np.array([0.0, 1.0, 0.0])
    plain = share(order, hierarchy, phi, np.ones(2), alone, 8)[0]
    assert np.array_equal(share(order, hierarchy, phi, np.ones(2), alone, 8, nearest)[0], plain)


@given(st.integers(1, 30), st.integers(0, 2**32 - 1))
def test_in_one_leaf_all_of_whose_rows_are_listed_rows_are_those_of_round_robin(budget: int, seed: int) -> None:
    hierarchy = hierarchy_of([31, 40], seed)
    phi = np.array([[0.5], [-0.1]])
    order = greedy(phi, np.zeros(1), np.ones(1), variant="harp-e")
    nearest = np.random.default_rng(seed).permuted(np.tile(np.arange(71), (3, 1)), axis=1)
    expected: list[int] = []
    while len(expected) < budget:
        own = nearest[len(expected) % 3]
        expected.append(next(row for row in own if hierarchy.leaf[row] == 0 and row not in expected))
    rows = share(order, hierarchy, phi, np.ones(1), np.array([1.0, 0.0]), budget, [nearest])[0]
    assert sorted(rows) == sorted(expected)
    at_large = share(order, hierarchy, phi, np.ones(1), np.array([0.0, 1.0]), budget, [nearest])[0]
    assert np.array_equal(at_large, share(order, hierarchy, phi, np.ones(1), np.array([0.0, 1.0]), budget)[0])


@given(problems(), st.integers(1, 60), st.sampled_from(VARIANTS), st.sampled_from([0.0, 0.4, 2.0]), st.integers(0, 9))
@example((np.array([[0.0, 0.1], [-0.3, 0.3]]), np.array([0.2, 0.0]), np.array([0.3, 0.3])), 2, "harp-c", 0.0, 0)
@settings(max_examples=150)
def test_a_shared_budget_is_used_and_never_exceeded(problem, budget: int, variant: str, part, listed: int) -> None:
    phi, null, weights = problem
    hierarchy = hierarchy_of([3 + 2 * g for g in range(len(phi))])
    order = greedy(phi, null, weights, variant=variant)
    random, n_rows = np.random.default_rng(listed), len(hierarchy.leaf)
    nearest = [random.permuted(np.tile(np.arange(n_rows), (listed % 4, 1)), axis=1)[:, : listed + 1] for _ in weights]
    rows, ranks = share(order, hierarchy, phi, weights, np.append(weights, part), budget, nearest)
    plain = share(order, hierarchy, phi, weights, np.append(weights, part), budget)
    assert np.array_equal(ranks, plain[1]), "similarity tells rows apart, not leaves"
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


@given(*[st.floats(0, 1)] * 5)
def test_claims_are_mean_slopes_of_logistic_curves(null, random, best, as_good, weight) -> None:
    scores = np.array([null]), np.array([best - null]), np.array([random - null])
    found = claims_of(np.array([weight]), *scores, np.array([as_good]))

    def mean_slope(low, high):
        # Over log rows a logistic curve between `low` and 1 climbs by (y - low) (1 - y) / (1 - low).
        if high - low < 1e-6:
            return 0.0
        return quad(lambda y: (y - low) * (1 - y) / (1 - low), low, high)[0] / (high - low)

    own, at_large = mean_slope(random, best), mean_slope(null, random)
    expected = [weight * (1 - as_good) * own, weight * as_good * at_large]
    assert found == pytest.approx(expected, abs=1e-6)


def test_a_solved_task_has_rows_and_one_that_random_rows_solve_has_none() -> None:
    weights, null = np.ones(3), np.zeros(3)
    best, floor = np.array([1.0, 1.0, 0.1]), np.array([0.0, 1.0, 0.2])
    claims = claims_of(weights, null, best, floor, np.zeros(3))
    assert claims == pytest.approx([1 / 6, 0, 0, 0])
    assert claims_of(weights, null, best, floor, np.ones(3))[:3].tolist() == [0, 0, 0]


def test_a_budget_is_at_least_one_row() -> None:
    order, hierarchy = Order(np.arange(1), np.ones(1), 1), hierarchy_of([3])
    for budget in (0, -1):
        with pytest.raises(HarpError, match="budget"):
            cut(order, hierarchy, budget)
        with pytest.raises(HarpError, match="budget"):
            share(order, hierarchy, np.ones((1, 1)), np.ones(1), np.ones(2), budget)
