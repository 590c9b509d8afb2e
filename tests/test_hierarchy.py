"""The hierarchy is a partition into leaves of bounded size, whatever the rows are."""

import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harp_hf.clustering import mean_directions
from harp_hf.errors import HarpError
from harp_hf.hierarchy import CROWD, Hierarchy, build_hierarchy
from harp_hf.refinement import rebalance, search

FIELDS = ("leaf", "parent", "large", "centroids", "parent_centroids", "distance")


def unit(vectors: np.ndarray) -> np.ndarray:
    norms = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return (vectors / np.where(norms > 0, norms, 1)).astype(np.float32)


@pytest.fixture(params=["faiss", "scikit-learn"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "scikit-learn":
        monkeypatch.setitem(sys.modules, "faiss", None)
    else:
        pytest.importorskip("faiss")
    return request.param


@st.composite
def pools(draw: st.DrawFn) -> np.ndarray:
    """Unit-norm rows: few or many, spread out, all the same, in tight clusters of any size, some of them zero."""
    n, d = draw(st.integers(1, 150)), draw(st.integers(1, 4))
    distinct = draw(st.integers(1, n))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    values = unit(rng.normal(size=(distinct, d)))
    values[rng.random(distinct) < draw(st.sampled_from([0.0, 0.3, 1.0]))] = 0
    popularity = rng.dirichlet(np.full(distinct, draw(st.sampled_from([0.05, 1.0, 50.0]))))
    return values[rng.choice(distinct, n, p=popularity)]


def assert_sound(hierarchy: Hierarchy, features: np.ndarray, leaf_size: int) -> None:
    n = len(features)
    assert hierarchy.leaf.shape == (n,)
    for child, count in ((hierarchy.leaf, hierarchy.n_leaves), (hierarchy.parent, len(hierarchy.large))):
        assert np.array_equal(np.unique(child), np.arange(count))
    assert np.array_equal(np.unique(hierarchy.large), np.arange(hierarchy.large.max() + 1))
    assert {getattr(hierarchy, name).dtype for name in ("leaf", "parent", "large")} == {np.dtype(np.int32)}

    if 2 * n < leaf_size:
        assert hierarchy.sizes.tolist() == [n]
    else:
        assert hierarchy.sizes.sum() == n
        assert np.all(2 * hierarchy.sizes >= leaf_size)
        assert np.all(hierarchy.sizes <= 2 * leaf_size)

    for labels, centroids in (
        (hierarchy.leaf, hierarchy.centroids),
        (hierarchy.parent[hierarchy.leaf], hierarchy.parent_centroids),
    ):
        for label, centroid in enumerate(centroids):
            rows = features[labels == label].astype(np.float64)
            assert np.linalg.norm(centroid) == pytest.approx(1 if rows.any() else 0, abs=1e-5)
            norm = np.linalg.norm(rows.sum(axis=0))
            if norm > 1e-3:
                assert centroid == pytest.approx(rows.sum(axis=0) / norm, abs=1e-4)
    assert np.all(hierarchy.distance >= 0)
    expected = 1 - (features * hierarchy.centroids[hierarchy.leaf]).sum(axis=1)
    assert hierarchy.distance == pytest.approx(expected, abs=1e-5)
    for leaf in range(hierarchy.n_leaves):
        rows = hierarchy.rows(leaf)
        members = np.flatnonzero(hierarchy.leaf == leaf)
        assert rows.tolist() == sorted(members, key=lambda row: (hierarchy.distance[row], row))


@settings(max_examples=60)
@given(features=pools(), leaf_size=st.integers(1, 20), branching=st.integers(1, 4), seed=st.integers(0, 3))
def test_every_pool_becomes_a_sound_hierarchy(features: np.ndarray, leaf_size: int, branching: int, seed: int) -> None:
    hierarchy = build_hierarchy(features, leaf_size=leaf_size, branching=branching, seed=seed)
    assert_sound(hierarchy, features, leaf_size)
    again = build_hierarchy(features, leaf_size=leaf_size, branching=branching, seed=seed)
    for name in FIELDS:
        assert np.array_equal(getattr(hierarchy, name), getattr(again, name))


@pytest.mark.parametrize(
    "features",
    [
        np.ones((1, 1)),
        np.ones((100, 1)),
        np.zeros((100, 3)),
        np.repeat([[1.0, 0], [-1, 0]], 50, axis=0),
        np.concatenate([np.tile([1.0, 0], (99, 1)), [[0, 1]]]),
        unit(np.random.default_rng(0).normal(size=(300, 8))),
    ],
    ids=["one row", "one dimension", "zero vectors", "opposites", "an outlier", "a cloud"],
)
def test_odd_pools_are_sound_with_and_without_faiss(features: np.ndarray, backend: str) -> None:
    features = features.astype(np.float32)
    assert_sound(build_hierarchy(features, leaf_size=8, branching=2), features, 8)


def test_separated_clusters_are_recovered(backend: str) -> None:
    rng = np.random.default_rng(1)
    cluster = rng.permutation(np.repeat(np.arange(12), 40))
    features = unit(np.eye(16)[cluster] + 0.02 * rng.normal(size=(480, 16)))
    hierarchy = build_hierarchy(features, leaf_size=40, branching=3)
    assert hierarchy.n_leaves == 12
    assert len(set(zip(cluster, hierarchy.leaf, strict=True))) == 12


def test_levels_aim_at_the_branching() -> None:
    features = unit(np.random.default_rng(2).normal(size=(6000, 8)))
    hierarchy = build_hierarchy(features, leaf_size=20, branching=4)
    assert 15 < hierarchy.sizes.mean() < 27
    assert 3 < np.bincount(hierarchy.parent).mean() < 5.5
    assert 3 < np.bincount(hierarchy.large).mean() < 5.5


def test_leaves_are_nearly_as_tight_as_flat_k_means() -> None:
    faiss = pytest.importorskip("faiss")
    rng = np.random.default_rng(3)
    middles = rng.normal(size=(40, 24))[rng.integers(0, 40, 400)] + 0.8 * rng.normal(size=(400, 24))
    features = unit(middles[rng.integers(0, 400, 12_000)] + 0.6 * rng.normal(size=(12_000, 24)))
    hierarchy = build_hierarchy(features, leaf_size=60)
    flat = faiss.Kmeans(24, hierarchy.n_leaves, niter=20, spherical=True, seed=0, max_points_per_centroid=12_000)
    flat.train(features)
    assert hierarchy.distance.mean() < 1.05 * (1 - (features @ flat.centroids.T).max(axis=1)).mean()


def test_memory_mapped_features_give_the_same_hierarchy(tmp_path) -> None:
    features = unit(np.random.default_rng(4).normal(size=(500, 6)))
    np.save(tmp_path / "features.npy", features)
    mapped = build_hierarchy(np.load(tmp_path / "features.npy", mmap_mode="r"), leaf_size=16)
    plain = build_hierarchy(features, leaf_size=16)
    assert all(np.array_equal(getattr(mapped, name), getattr(plain, name)) for name in FIELDS)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_the_first_row_that_is_not_finite_is_named(bad: float) -> None:
    features = np.ones((9, 2), np.float32)
    features[[4, 7], 1] = bad
    with pytest.raises(HarpError, match="row 4 "):
        build_hierarchy(features)


@pytest.mark.parametrize("shape", [(5,), (0, 3), (3, 0), (2, 2, 2)])
def test_features_that_are_no_matrix_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(HarpError, match="matrix"):
        build_hierarchy(np.ones(shape, np.float32))


def test_sizes_below_one_and_unknown_leaves_are_refused() -> None:
    features = np.ones((3, 2), np.float32)
    for sizes in ({"leaf_size": 0}, {"branching": 0}):
        with pytest.raises(HarpError, match="at least 1"):
            build_hierarchy(features, **sizes)
    with pytest.raises(HarpError, match="no leaf 1"):
        build_hierarchy(features).rows(1)


@pytest.mark.parametrize(
    "features",
    [
        unit(np.ones((3000, 2))),
        np.zeros((3000, 2)),
        np.repeat(unit(np.random.default_rng(0).normal(size=(5, 6))), 600, axis=0),
        np.concatenate([np.tile([1.0, 0, 0], (2000, 1)), unit(np.random.default_rng(1).normal(size=(1000, 3)))]),
        unit(np.random.default_rng(2).normal(size=(3000, 3)) + np.array([0, 0, 2])),
    ],
    ids=["one direction", "zero vectors", "five rows", "half the same", "a cap"],
)
def test_pools_of_many_leaves_are_sound_with_and_without_faiss(features: np.ndarray, backend: str) -> None:
    features = features.astype(np.float32)
    hierarchy = build_hierarchy(features, leaf_size=10)
    assert hierarchy.n_leaves > CROWD
    assert_sound(hierarchy, features, 10)


def test_many_leaves_of_crowded_and_empty_places_are_as_tight_as_those_of_flat_k_means() -> None:
    faiss = pytest.importorskip("faiss")
    rng = np.random.default_rng(5)
    regions = rng.normal(size=(20, 24))
    topics = regions[rng.choice(20, 500, p=rng.dirichlet(np.ones(20)))] + 0.8 * rng.normal(size=(500, 24))
    topic = rng.choice(500, 15_000, p=rng.dirichlet(np.ones(500)))
    features = unit(topics[topic] + 0.5 * rng.normal(size=(15_000, 24)))
    hierarchy = build_hierarchy(features, leaf_size=40)
    assert hierarchy.n_leaves == 375
    flat = faiss.Kmeans(24, 375, niter=25, spherical=True, seed=0, max_points_per_centroid=15_000)
    flat.train(features)
    assert hierarchy.distance.mean() < (1 - (features @ flat.centroids.T).max(axis=1)).mean()


def test_leaves_that_many_rows_leave_are_dissolved_and_wide_ones_divided() -> None:
    # Two directions: one has too many leaves for its rows, the other one leaf for all of its.
    rng = np.random.default_rng(6)
    features = unit(np.repeat(np.eye(8)[:2], [30, 90], axis=0) + 0.1 * rng.normal(size=(120, 8)))
    leaf = np.concatenate([np.arange(30) // 5, np.full(90, 6)]).astype(np.int32)
    parent = np.array([0, 0, 0, 1, 1, 1, 2])
    after, came = rebalance(features, leaf, parent, mean_directions(features, leaf, 7), 20, rng)
    sizes = np.bincount(after)
    assert 5 <= len(sizes) <= 8
    assert sizes.min() >= 10
    assert sizes.max() <= 40
    assert set(came[after[30:]]) == {6}, "rows of the second direction stay in what was its leaf"
    assert set(came[after[:30]]) < set(range(6))


def test_rows_find_their_leaf_in_any_parent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("harp_hf.refinement.PROBES", 2)
    monkeypatch.setattr("harp_hf.refinement.SEARCHED", 7)
    right = np.repeat(np.arange(8), 10).astype(np.int32)
    features = unit(np.eye(8)[right] + 0.1 * np.random.default_rng(7).normal(size=(80, 8)))
    leaf = right.copy()
    leaf[[0, 35, 79]] = [7, 0, 1]
    search(features, leaf, np.arange(8) // 2, mean_directions(features, right, 8))
    assert np.array_equal(leaf, right)
