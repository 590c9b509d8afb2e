"""Similarity of leaves to the examples of tasks: counted by hand, and in blocks as at once."""

import numpy as np
import pytest

from harp_hf import similarity
from harp_hf.hierarchy import build_hierarchy
from harp_hf.similarity import leaf_similarity, nearest_rows


def directions(angles):
    return np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)


def test_a_leaf_that_holds_all_neighbours_has_the_inverse_of_its_share(monkeypatch):
    monkeypatch.setattr(similarity, "NEIGHBOURS", 10)
    pool = directions(np.concatenate([np.linspace(0, 0.1, 30), np.linspace(1.5, 1.6, 30), np.linspace(3, 3.1, 60)]))
    hierarchy = build_hierarchy(pool, leaf_size=30, seed=0)
    nearest = nearest_rows(pool, directions(np.array([0.05, 1.55, 0.05])))
    found = leaf_similarity(nearest, hierarchy, np.array([0, 1, 1]), 2)
    first, second = hierarchy.leaf[0], hierarchy.leaf[30]
    assert found[first, 0] == pytest.approx(120 / hierarchy.sizes[first])
    assert found[first, 1] == pytest.approx(0.5 * 120 / hierarchy.sizes[first])
    assert found[second, 1] == pytest.approx(0.5 * 120 / hierarchy.sizes[second])
    assert (found * (hierarchy.sizes / 120)[:, None]).sum(axis=0) == pytest.approx(1)


def test_blocks_change_nothing(monkeypatch):
    rng = np.random.default_rng(0)
    pool = rng.integers(-2, 3, size=(400, 3)).astype(np.float32)  # many rows are equally near
    pool /= np.maximum(np.linalg.norm(pool, axis=1, keepdims=True), 1)
    whole = nearest_rows(pool, pool[:7])
    for query, rows in zip(pool[:7], whole, strict=True):
        assert rows.tolist() == np.argsort(-(pool @ query), kind="stable")[:50].tolist()
    monkeypatch.setattr(similarity, "_BLOCK", 33)
    assert np.array_equal(nearest_rows(pool, pool[:7]), whole)


def test_a_pool_smaller_than_the_neighbours_is_alike_everywhere():
    pool = directions(np.linspace(0, 3, 20))
    hierarchy = build_hierarchy(pool, leaf_size=5, seed=0)
    assert leaf_similarity(nearest_rows(pool, pool[:3]), hierarchy, np.zeros(3, int), 1) == pytest.approx(1)
