"""Measured leaves: a representative of every parent, then whatever is farthest from all measured ones."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from harp_hf.design import choose_leaves
from harp_hf.errors import HarpError
from harp_hf.hierarchy import Hierarchy


def hierarchy_of(centroids: np.ndarray, parent: np.ndarray) -> Hierarchy:
    """One row a leaf, every parent its own large region."""
    n_parents = int(parent.max()) + 1
    middles = np.stack([centroids[parent == p].mean(axis=0) for p in range(n_parents)])
    middles /= np.linalg.norm(middles, axis=1, keepdims=True)
    return Hierarchy(
        leaf=np.arange(len(parent), dtype=np.int32),
        parent=parent.astype(np.int32),
        large=np.arange(n_parents, dtype=np.int32),
        centroids=centroids.astype(np.float32),
        parent_centroids=middles.astype(np.float32),
        distance=np.zeros(len(parent), np.float32),
    )


def on_circle(degrees: list[float]) -> np.ndarray:
    angles = np.deg2rad(degrees)
    return np.stack([np.cos(angles), np.sin(angles)], axis=1)


@st.composite
def hierarchies(draw: st.DrawFn) -> Hierarchy:
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    n_parents = draw(st.integers(1, 6))
    parent = np.sort(np.concatenate([np.arange(n_parents), rng.integers(0, n_parents, draw(st.integers(0, 15)))]))
    points = rng.normal(size=(len(parent), 3))
    if draw(st.booleans()):
        points[:] = points[0]
    return hierarchy_of(points / np.linalg.norm(points, axis=1, keepdims=True), parent)


@given(hierarchies())
def test_the_default_begins_with_a_representative_of_every_parent(hierarchy: Hierarchy) -> None:
    n_parents = len(hierarchy.large)
    chosen = choose_leaves(hierarchy)
    assert len(chosen) == min(math.ceil(1.5 * n_parents), hierarchy.n_leaves)
    representatives = chosen[:n_parents]
    assert np.array_equal(np.sort(hierarchy.parent[representatives]), np.arange(n_parents))
    gaps = np.linalg.norm(hierarchy.centroids - hierarchy.parent_centroids[hierarchy.parent], axis=1)
    for leaf in representatives:
        assert gaps[leaf] == pytest.approx(gaps[hierarchy.parent == hierarchy.parent[leaf]].min(), abs=2e-3)


def test_of_two_leaves_as_near_to_their_parent_the_smaller_id_is_measured() -> None:
    for shift in range(20):
        hierarchy = hierarchy_of(on_circle([7.3 * shift, 7.3 * shift + 31.7]), np.zeros(2, int))
        assert choose_leaves(hierarchy, 1).tolist() == [0]


@given(hierarchies(), st.integers(1, 30))
def test_designs_hold_no_leaf_twice_and_are_nested(hierarchy: Hierarchy, wanted: int) -> None:
    chosen = choose_leaves(hierarchy, wanted)
    assert len(chosen) == len(set(chosen.tolist())) == min(wanted, hierarchy.n_leaves)
    if wanted >= len(hierarchy.large):
        assert choose_leaves(hierarchy, wanted + 1)[: len(chosen)].tolist() == chosen.tolist()


@given(hierarchies(), st.integers(1, 30))
def test_beyond_the_representatives_the_farthest_leaf_comes_next(hierarchy: Hierarchy, wanted: int) -> None:
    chosen = choose_leaves(hierarchy, wanted).tolist()
    points = hierarchy.centroids.astype(np.float64)
    first = len(hierarchy.large) if wanted >= len(hierarchy.large) else 1
    for i in range(first, len(chosen)):
        gaps = np.linalg.norm(points[:, None] - points[chosen[:i]], axis=2).min(axis=1)
        assert gaps[chosen[i]] == pytest.approx(gaps.max(), abs=1e-5)


def test_the_widest_parent_gets_its_second_leaf_first() -> None:
    hierarchy = hierarchy_of(on_circle([0, 1, 2, 90, 130, 170]), np.array([0, 0, 0, 1, 1, 1]))
    assert choose_leaves(hierarchy, 4).tolist()[:2] in ([1, 4], [4, 1])
    assert choose_leaves(hierarchy, 4).tolist()[2:] == [3, 5]


def test_with_fewer_measurements_than_parents_k_center_starts_in_the_middle() -> None:
    hierarchy = hierarchy_of(on_circle([0, 40, 50, 90]), np.arange(4))
    assert choose_leaves(hierarchy, 1).tolist() == [1]
    assert choose_leaves(hierarchy, 3).tolist() == [1, 3, 0]


def test_equal_leaves_are_taken_by_id() -> None:
    hierarchy = hierarchy_of(np.tile([1.0, 0], (5, 1)), np.array([0, 0, 0, 1, 1]))
    assert choose_leaves(hierarchy, 5).tolist() == [0, 3, 1, 2, 4]


@pytest.mark.parametrize("wanted", [0, -3])
def test_at_least_one_leaf_is_measured(wanted: int) -> None:
    with pytest.raises(HarpError, match="max_measurements"):
        choose_leaves(hierarchy_of(np.eye(2), np.arange(2)), wanted)


@given(hierarchies(), st.integers(1, 30), st.integers(1, 5), st.integers(0, 2**32 - 1))
def test_the_leaf_most_similar_to_each_task_is_every_other_measurement(
    hierarchy: Hierarchy, wanted: int, n_tasks: int, seed: int
) -> None:
    similarity = np.random.default_rng(seed).random((hierarchy.n_leaves, n_tasks))
    likely = set(similarity.argmax(axis=0).tolist())
    chosen = choose_leaves(hierarchy, wanted, similarity).tolist()
    assert len(chosen) == len(set(chosen)) == min(wanted, hierarchy.n_leaves)
    for step, leaf in enumerate(chosen):
        if step % 2 == 0 and likely - set(chosen[:step]):
            assert leaf in likely
    assert likely <= set(chosen) or len(chosen) < 2 * len(likely)
    if wanted >= len(hierarchy.large):
        assert choose_leaves(hierarchy, wanted + 1, similarity)[: len(chosen)].tolist() == chosen
    if wanted >= 2 * len(hierarchy.large):
        assert set(hierarchy.parent[chosen].tolist()) == set(range(len(hierarchy.large))), "no parent is left out"


def test_a_task_to_which_all_leaves_are_alike_has_no_likeliest() -> None:
    hierarchy = hierarchy_of(on_circle([0, 40, 50, 90]), np.arange(4))
    flat = np.ones((4, 2))
    assert choose_leaves(hierarchy, 3, flat).tolist() == choose_leaves(hierarchy, 3).tolist()
    one = np.stack([flat[:, 0], np.eye(4)[3]], axis=1)
    assert choose_leaves(hierarchy, 3, one).tolist() == choose_leaves(hierarchy, 3, one[:, 1:]).tolist()
