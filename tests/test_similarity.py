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
    # Many rows are equally near, and no sum is rounded, so that they are on every processor.
    pool = rng.integers(-2, 3, size=(400, 3)).astype(np.float32) / 4
    whole = nearest_rows(pool, pool[:7])
    for query, rows in zip(pool[:7], whole, strict=True):
        tie = np.random.default_rng(0).permutation(400)
        assert rows.tolist() == np.lexsort((tie, -(pool @ query)))[:50].tolist()
    monkeypatch.setattr(similarity, "_BLOCK", 33)
    assert np.array_equal(nearest_rows(pool, pool[:7]), whole)


def test_leaves_that_hold_copies_of_a_row_share_its_votes(monkeypatch):
    monkeypatch.setattr(similarity, "_BLOCK", 100)
    pool = directions(np.repeat([0.0, 1.5], 1000))
    votes = np.concatenate([nearest_rows(pool[:length], pool[:1])[0] for length in range(1000, 2001, 100)])
    assert len(votes) == 11 * similarity.NEIGHBOURS
    assert 0.4 < (votes < 500).mean() < 0.6


def test_a_task_without_neighbours_is_exactly_alike_everywhere():
    pool = directions(np.linspace(0, 3, 97))
    hierarchy = build_hierarchy(pool, leaf_size=7, seed=0)
    nearest = nearest_rows(pool, np.concatenate([pool[:1], np.zeros((1, 2), np.float32)]))
    found = leaf_similarity(nearest, hierarchy, np.array([0, 1]), 2)
    assert np.ptp(found[:, 0]) > 0
    assert (found[:, 1] == 1).all()


def test_a_pool_smaller_than_the_neighbours_is_alike_everywhere():
    pool = directions(np.linspace(0, 3, 20))
    hierarchy = build_hierarchy(pool, leaf_size=5, seed=0)
    assert leaf_similarity(nearest_rows(pool, pool[:3]), hierarchy, np.zeros(3, int), 1) == pytest.approx(1)
