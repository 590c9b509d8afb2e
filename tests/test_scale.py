"""The benchmark of large pools, on a small one: resumable, and right about what it compares."""

import importlib
import json
from pathlib import Path

import numpy as np
import pytest


@pytest.fixture
def scale(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "recipes" / "benchmarks"))
    return importlib.import_module("scale")


def test_methods_are_measured_once_and_with_as_many_leaves_as_harp(scale, tmp_path, capsys, monkeypatch):
    pytest.importorskip("faiss")
    np.save(tmp_path / "own.npy", np.random.default_rng(0).normal(size=(50, 6)))
    flags = ["--folder", str(tmp_path / "folder"), "--results", str(tmp_path / "scale.json"), "--leaf_size", "20",
             "--rows", "600", "--tasks", "3", "--measured", "6", "--features", str(tmp_path / "own.npy")]  # fmt: skip
    with pytest.raises(SystemExit, match="harp"):
        scale.main([*flags, "--methods", "faiss"])
    scale.main([*flags, "--methods", "faiss", "harp"])
    text = (tmp_path / "scale.json").read_text()
    harp, flat = json.loads(text)
    assert (harp["method"], flat["method"]) == ("harp", "faiss")
    assert harp["leaves"] == flat["leaves"] > 20
    assert harp["stages"].keys() == set(scale.STAGES)
    assert str(tmp_path) not in text, "results tell nothing of the machine"
    printed = capsys.readouterr().out
    assert f"| replicated | 600 | {harp['leaves']} | faiss |" in printed
    monkeypatch.setattr(scale, "_in_a_process", None)
    scale.main([*flags, "--methods", "faiss", "harp"])
    assert (tmp_path / "scale.json").read_text() == text


def test_features_are_unit_rows_and_copies_lie_near_their_own(scale, tmp_path):
    own = np.random.default_rng(1).normal(size=(20, 40)).astype(np.float32)
    np.save(tmp_path / "own.npy", own)
    scale.write_features(tmp_path / "made.npy", 500, tmp_path / "own.npy", 0)
    made = np.load(tmp_path / "made.npy")
    assert made.shape == (500, 40)
    assert np.linalg.norm(made, axis=1) == pytest.approx(1, abs=1e-5)
    near = (made @ (own / np.linalg.norm(own, axis=1, keepdims=True)).T).max(axis=1)
    assert np.median(near) > 0.85
    assert (near < 0.999).mean() > 0.8
    scale.write_features(tmp_path / "synthetic.npy", 300, None, 0)
    assert np.load(tmp_path / "synthetic.npy").shape == (300, scale.DIMENSIONS)


def test_distances_are_those_to_the_mean_of_each_leaf(scale, monkeypatch):
    monkeypatch.setattr(scale, "BLOCK", 7)
    rows = np.random.default_rng(2).normal(size=(30, 4))
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    labels = np.arange(30) % 3
    means = np.stack([rows[labels == k].mean(axis=0) for k in range(3)])
    cosine = 1 - (rows * means[labels]).sum(axis=1) / np.linalg.norm(means, axis=1)[labels]
    euclidean = np.linalg.norm(rows - means[labels], axis=1)
    assert scale.within(rows, labels) == pytest.approx((cosine.mean(), euclidean.mean()))


def test_the_table_compares_with_flat_k_means(scale):
    line = {"source": "synthetic", "leaf_size": 128, "rows": 1000, "leaves": 8, "peak": 4e9, "memory": 2.5}
    stages = dict.fromkeys(scale.STAGES, 1.0) | {"hierarchy": 20.0, "posterior": 0.5}
    line |= {"euclidean": 0.6}
    harp = line | {"method": "harp", "seconds": 20.0, "cosine": 0.206, "measured": 4, "stages": stages}
    flat = line | {"method": "faiss", "seconds": 500.0, "cosine": 0.2}
    later = harp | {"rows": 10_000, "seconds": 250.0}
    table = scale.tables([later, flat, harp])
    assert "| synthetic | 1,000 | 8 | harp | 20.0 | 1.0 | 0.2060 | +3.0% | 0.6000 | 4.00 | 2.50 |" in table
    assert "| faiss | 500.0 | 25.0 |" in table
    assert "| 12.5% |" in table
    assert "rows^1.10" in table
