"""The benchmarks of `recipes/`, run whole on the tiny model: resumable, and right about what they compare."""

import importlib
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from conftest import make_rows
from datasets import Dataset

from harp_hf.design import choose_leaves
from harp_hf.errors import ConfigError, DataError, HarpError
from harp_hf.finetune import LeafFinetuner
from harp_hf.proxy import load_proxy

FOLDER = Path(__file__).parent.parent / "recipes" / "benchmarks"
CHOICES = ["crimson", "emerald", "azure"]


@pytest.fixture(scope="module", autouse=True)
def on_path():
    """The scripts import what lies beside them, as they do when they are run."""
    sys.path.insert(0, str(FOLDER))
    yield
    sys.path.remove(str(FOLDER))


@pytest.fixture(scope="module")
def disk(pool, proxy, features, tiny_model, tmp_path_factory):
    """Flags of both benchmarks: a pool, a proxy set, test rows and settings on disk."""
    folder = tmp_path_factory.mktemp("disk")
    pool.add_column("vector", features.tolist()).to_parquet(folder / "pool.parquet")
    proxy.add_column("vector", np.repeat(np.eye(2, 6), 8, axis=0).tolist()).to_parquet(folder / "proxy.parquet")
    test = [
        {"prompt": row["prompt"], "answer": row["completion"].strip(), "task": colour, "choices": CHOICES}
        for colour, seed in (("red", 21), ("green", 22))
        for row in make_rows(colour, 10, seed)
    ]
    Dataset.from_list(test).to_parquet(folder / "test.parquet")
    settings = {"leaf_size": 12, "branching": 2, "max_measurements": 4, "max_steps": 8, "learning_rate": 3e-2,
                "use_cpu": True, "bf16": False, "metric": "likelihood", "active_tasks": ["all"]}  # fmt: skip
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    return folder, ["--pool", str(folder / "pool.parquet"), "--proxy", str(folder / "proxy.parquet"), "--model",
                    tiny_model, "--features", "vector", "--config", str(folder / "config.yaml")]  # fmt: skip


@pytest.fixture
def made(monkeypatch):
    """Rows of every finetune made in this process."""
    finetunes, real = [], LeafFinetuner.finetune

    def finetune(self, rows, *rest):
        finetunes.append(rows)
        return real(self, rows, *rest)

    monkeypatch.setattr(LeafFinetuner, "finetune", finetune)
    return finetunes


def run(name, *flags):
    importlib.import_module(name).main([str(flag) for flag in flags])


@pytest.fixture(scope="module")
def quality(disk):
    """Flags of a quality benchmark that was run for one of its two selectors first."""
    folder, flags = disk
    flags = [*flags, "--test", folder / "test.parquet", "--output_dir", folder / "quality", "--results",
             folder / "quality.json", "--rows", 20, "--seeds", 0, 1, "--epochs", 1]  # fmt: skip
    run("quality", *flags, "--selectors", "harp-e", "random", "top-phi")
    return folder, flags


def test_quality_is_complete_and_makes_nothing_twice(quality, made, capsys):
    folder, flags = quality
    known = json.loads((folder / "quality.json").read_text())
    keys = [(r["comparison"], r["selector"], r["rows"], r["seed"]) for r in known["results"]]
    assert sorted(keys) == sorted([
        ("rows", "base model", 0, 0),
        *((c, s, 20, seed) for seed in (0, 1) for c, s in (("rows", "harp-e"), ("rows", "random"), ("rows", "top-phi"),
                                                            ("compute", "random"))),
    ])  # fmt: skip
    run("quality", *flags, "--selectors", "harp-e", "random", "rds", "--equal_compute")
    assert len(made) == 2, "the rows of rds with two seeds"
    assert len(json.loads((folder / "quality.json").read_text())["results"]) == len(keys) + 2
    printed = capsys.readouterr().out
    before, after = printed.split("## Results")[1:]
    assert "| rds | 0 of 2 | missing |" in before
    assert "| rds | 2 of 2 | 20 |" in after
    assert "### exact match, at most 20 rows" in after
    assert "### choice, at most 20 rows" in after
    assert (folder / "quality-exact_match.png").stat().st_size > 10_000
    assert str(folder) not in (folder / "quality.json").read_text(), "results tell nothing of the machine"


@pytest.mark.parametrize(
    ("name", "flags", "told"),
    [("quality", ["--equal_compute", "rds", "--selectors", "rds"], "--equal_compute needs harp-c or harp-e"),
     ("scale", ["--folder", "x"], "--results is needed")],
)  # fmt: skip
def test_flags_that_lack_something_say_what(disk, tmp_path, monkeypatch, capsys, name, flags, told):
    monkeypatch.chdir(tmp_path)
    rest = [*disk[1], "--test", "t", "--output_dir", "o", "--results", "r"] if name == "quality" else []
    with pytest.raises(SystemExit) as stopped:
        run(name, *rest, *flags)
    assert stopped.value.code == 2
    assert f": error: {told}" in capsys.readouterr().err.replace("argument ", "")
    assert list(tmp_path.iterdir()) == []


def test_quality_compares_what_it_says(quality):
    known = json.loads((quality[0] / "quality.json").read_text())
    found = {(r["comparison"], r["selector"], r["seed"]): r for r in known["results"]}
    for seed in (0, 1):
        harp, random = found["rows", "harp-e", seed], found["rows", "random", seed]
        more = found["compute", "random", seed]
        assert harp["used"] <= 20 == random["used"]
        assert harp["selection"]["finetunes"] == 5, "four leaves and random rows"
        assert harp["selection"] == found["rows", "top-phi", seed]["selection"], "both start from one measurement"
        cost = harp["selection"]
        spent = cost["tokens_training"] + cost["tokens_evaluation"] / 3
        assert harp["compute"] == pytest.approx(spent + harp["final"]["tokens_training"])
        assert random["compute"] == random["final"]["tokens_training"]
        # The 96 rows are few: what is left of the compute goes into more epochs over all of them.
        assert more["used"] == 96
        assert more["epochs"] > 1
        assert more["compute"] == pytest.approx(harp["compute"], rel=0.05)
        assert harp["scores"]["auto"]["mean"] >= harp["scores"]["exact_match"]["mean"]


@pytest.mark.parametrize("change", [{"num_repeats": 2}, {"active_tasks": ["red"]}, {"task_weights": {"red": 2.0}}],
                         ids=lambda change: next(iter(change)))  # fmt: skip
def test_results_of_other_choices_stand_in_no_table_together(quality, made, tmp_path, change):
    folder, flags = quality
    settings = yaml.safe_load((folder / "config.yaml").read_text())
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings | change))
    with pytest.raises(DataError, match="made with another settings"):
        run("quality", *flags, "--config", tmp_path / "config.yaml", "--selectors", "random")
    assert made == []


def test_options_of_selectors_hold_them_to_an_effort(quality, made, capsys):
    folder, flags = quality
    flags = [*flags, "--results", folder / "options.json", "--seeds", 0, "--selectors", "datamodels"]
    options = {"finetunes": 2, "epochs": None, "rows_per_leaf": 3}
    run("quality", *flags, "--options", json.dumps({"datamodels": options}))
    found = json.loads((folder / "options.json").read_text())["results"][1]
    assert len(made) == 3, "two unions and the selection"
    assert (found["options"], found["selection"]["finetunes"]) == (options, 2)
    assert "| datamodels (finetunes 2, epochs None, rows_per_leaf 3) | 1 of 1 | 20 |" in capsys.readouterr().out
    with pytest.raises(HarpError, match="were made with other options of datamodels"):
        run("quality", *flags)
    with pytest.raises(ConfigError, match="'datamodels' has no option 'epoch'"):
        run("quality", *flags, "--options", '{"datamodels": {"epoch": 1}}')
    for wrong in ('["datamodels"]', '{"datamodels": 2}', "{"):
        with pytest.raises(SystemExit):
            run("quality", *flags, "--options", wrong)
    assert len(made) == 3


def test_results_keep_what_the_tables_need(tmp_path, proxy):
    tables = importlib.import_module("quality_tables")
    shuffled = load_proxy(proxy.shuffle(seed=0))
    right = np.array([task == "red" for task in proxy.shuffle(seed=0)["task"]], float)
    right[0] = 1 - right[0]
    results = tables.Results.open(tmp_path / "r.json", {"pool": "a"}, shuffled)
    cost = dict.fromkeys(("finetunes", "tokens_training", "tokens_evaluation", "tokens_gradient", "seconds"), 1)
    one = {"comparison": "rows", "selector": "rds", "rows": 5, "seed": 0, "used": 5, "compute": 10.0, "epochs": 1,
           "selection": cost, "final": {"tokens_training": 9}}  # fmt: skip
    results.add(one | {"scores": {"exact_match": right, "auto": np.ones(16)}})
    again = tables.Results.open(tmp_path / "r.json", {"pool": "a"}, shuffled)
    kept = again.find("rows", "rds", 5, 0)
    first = shuffled.tasks[int(shuffled.task[0])]
    expected = {"red": 1.0, "green": 0.0} | {first: 7 / 8 if first == "red" else 1 / 8}
    assert kept["scores"]["exact_match"]["tasks"] == expected
    assert again.right(kept, "exact_match").tolist() == right[again.order].tolist()
    assert again.find("rows", "rds", 5, 1) is None
    some = load_proxy(proxy.filter(lambda row, i: row["task"] == "red" or i % 4 == 0, with_indices=True))
    assert some.tasks == ["red", "green"]
    tables.Results.open(tmp_path / "some.json", {}, some).add(one | {"scores": {}})
    assert list(tables.Results.read(tmp_path / "some.json").tasks.items()) == [("red", 8), ("green", 2)]
    text = tables.markdown(again, ["rds", "less"], [5], [0, 1], [])
    mean = 100 * np.mean(list(expected.values()))
    assert f"| rds | 1 of 2 | 5 | {mean:.1f} ± " in text
    assert "| less | 0 of 2 | missing |" in text
    again.add(one | {"comparison": "compute", "selector": "less", "used": 0, "scores": {}})
    text = tables.markdown(again, ["rds", "less"], [5], [0, 1], ["less", "shapley"])
    assert "| less | 1 of 2 | selection alone costs more |" in text
    assert "| shapley | 0 of 2 | missing |" in text
    assert len(tables.draw(again, ["rds", "less"])) == 2
    assert tables.draw(again, ["less"]) == []
    with pytest.raises(DataError, match="made with another pool: use another --results"):
        tables.Results.open(tmp_path / "r.json", {"pool": "b"}, shuffled)
    (tmp_path / "r.json").write_text("{")
    with pytest.raises(DataError, match="cannot be read"):
        tables.Results.open(tmp_path / "r.json", {"pool": "a"}, shuffled)


def test_summary_compares_over_the_seeds_that_both_have(tmp_path, proxy):
    tables, summary = importlib.import_module("quality_tables"), importlib.import_module("quality_summary")
    test = load_proxy(proxy)
    pools = [tables.Results.open(tmp_path / f"quality_{name}.json", {}, test) for name in ("x", "y")]
    half = (np.arange(len(test)) % 2).astype(float)
    for comparison, selector, rows, seed, right in (
        ("rows", "harp-c", 5, 0, np.ones(16)), ("rows", "harp-c", 5, 1, half), ("rows", "rds", 5, 1, np.ones(16)),
        ("compute", "rds", 5, 0, half), ("rows", "rds", 5, 2, np.zeros(16)), ("rows", "rds", 9, 0, half),
    ):  # fmt: skip
        pools[0].add({"comparison": comparison, "selector": selector, "rows": rows, "seed": seed, "used": min(rows, 7),
                      "scores": {"exact_match": right, "auto": np.ones(16)}})  # fmt: skip
    pools[1].add({"comparison": "compute", "selector": "rds", "rows": 5, "seed": 0, "scores": {}})
    pools[1].add({"comparison": "rows", "selector": "harp-c", "rows": 5, "seed": 0, "used": 5, "scores": {
        "exact_match": half, "auto": half}})  # fmt: skip
    read = [tables.Results.read(pool.path) for pool in pools]
    lines = summary.summary(read).splitlines()
    assert [line for line in lines if line.startswith(("| 5 |", "| 9 |"))][:4] == [
        "| 5 | rds | 100.0 (50.0), 2 |  |", "| 5 | harp-c | 100.0 (75.0), 2 | 50.0 (50.0) |",
        "| 5 | rds, at HARP's compute | 100.0 (50.0) |  |", "| 9 | rds | 100.0 (50.0), 7 rows |  |",
    ]  # fmt: skip
    ahead = [line for line in lines[lines.index("| rows | harp-c against | x | y |") + 2 :] if line.startswith("|")]
    assert len(ahead) == 2, "HARP has no result with 9 rows"
    assert ahead[0].startswith("| 5 | rds | +0.0 ± 0.0 (-50.0 ± "), "seed 1 alone"
    assert ahead[1].startswith("| 5 | rds, at HARP's compute | +0.0 ± 0.0 (+50.0 ± "), "seed 0 alone"
    with pytest.raises(DataError, match="cannot be read: "):
        tables.Results.read(tmp_path / "none.json")


@pytest.fixture(scope="module")
def measured(disk):
    """Flags of a calibration with every leaf measured."""
    folder, flags = disk
    flags = [*flags, "--output_dir", folder / "calibration"]
    run("calibration", *flags, "--measure")
    return folder, flags


def test_calibration_measures_every_leaf_and_analyses_without_a_finetune(measured, made, capsys):
    folder, flags = measured
    leaves = np.load(folder / "calibration" / "hierarchy.npz")["parent"]
    assert len(list((folder / "calibration" / "measurements").glob("*.npz"))) == len(leaves)
    run("calibration", *flags, "--measure", "--analyse", "--sizes", 4, "--designs", 3, "--results", folder / "c.json")
    assert made == []
    printed = capsys.readouterr().out
    found = json.loads((folder / "c.json").read_text())
    assert (found["leaves"], found["measured"]) == (len(leaves), len(leaves))
    assert [one["leaf"] for one in found["truth"]] == list(range(len(leaves)))
    assert [(row["prior"], row["design"]) for row in found["calibration"]] == [
        (prior, design) for prior in ("smooth with similarity", "smooth", "nested", "no pooling")
        for design in ("random", "HARP's")
    ]  # fmt: skip
    for row in found["calibration"]:
        coverage = [row[f"coverage {level:g}"] for level in (0.5, 0.8, 0.9, 0.95)]
        assert coverage == sorted(coverage)
        assert row["beyond 4 sd"] <= 1 - row["coverage 0.95"] + 1e-9
    assert "| 4 | HARP's | smooth |" in printed
    # Right and wrong answers stand apart in feature space, which only related leaves can tell.
    smooth, alone = (found["calibration"][place] for place in (2, 6))
    assert smooth["rank correlation"] > alone["rank correlation"]


def test_calibration_judges_right(measured):
    calibration = importlib.import_module("calibration")
    flags = measured[1]
    asked = calibration._parse([str(f) for f in [*flags, "--analyse"]])
    args, adapter = calibration.load_settings(asked.config, features="vector", output_dir=asked.output_dir, seed=0)
    given = calibration.read_inputs(asked.pool, asked.proxy, asked.model, args, adapter)
    truth = calibration.Truth.read(calibration.RunDir(asked.output_dir), given, args)
    random, m = np.random.default_rng(0), len(truth.leaves)
    for prior, similarity in (("smooth", None), ("smooth with similarity", truth.whole.similarity)):
        chosen = choose_leaves(truth.hierarchy, 4, similarity)
        assert np.array_equal(truth.leaves[truth.design(4, prior)], chosen)
        assert replace(truth, leaves=np.setdiff1d(truth.leaves, chosen[:1])).design(4, prior) is None
    # A truth of which each leaf is drawn on its own, and measured with as much noise: "no pooling" is then right.
    inside = []
    for draw in range(200):
        effects = 0.1 + 0.2 * random.standard_normal((m, 2)) + 0.2 * random.standard_normal((m, 2))
        drawn = replace(truth, effects=effects, variances=np.full((m, 2), 0.2**2))
        judged = calibration._judge(drawn, random.choice(m, m - 2, replace=False), "no pooling", None, draw)
        inside.append(judged["coverage 0.8"])
        assert judged["rank correlation"] == 0
    assert 0.68 < np.mean(inside) < 0.87, "few leaves tell their spread, which a normal interval takes for known"
    # With all but one leaf shown and no noise, the selection is the oracle's.
    exact = replace(truth, variances=np.zeros_like(truth.variances))
    assert calibration._value(exact, exact.effects, "harp-e", None) >= exact.whole.null.mean()
    assert calibration._judge(exact, np.arange(m - 1), "no pooling", None, 0)["regret harp-c"] < 0.2


def test_additivity_finetunes_on_unions_once(measured, made, capsys):
    folder, flags = measured
    flags = [*flags, "--additivity", 2, "--epochs", 1, "--results", folder / "a.json"]
    run("calibration", *flags)
    found = json.loads((folder / "a.json").read_text())["additivity"]
    kinds = {one["kind"] for one in found}
    assert kinds == {"random", "harp-c prefix", "harp-e prefix"}
    assert 0 < len(made) <= len(found)
    sizes = {tuple(sorted(one["leaves"])): None for one in found}
    assert len(made) == len(sizes), "each union once"
    for one in found:
        assert len(one["harp-c"]) == len(one["measured"]) == 2
        assert np.all(np.array(one["harp-c"]) <= np.array(one["harp-e"]) + 1e-9), "C never expects more than E"
    assert "## Additivity" in capsys.readouterr().out
    count = len(made)
    run("calibration", *flags)
    assert len(made) == count


def test_calibration_says_what_is_missing(disk, tmp_path):
    _, flags = disk
    with pytest.raises(SystemExit):
        run("calibration", *flags, "--output_dir", tmp_path)
    with pytest.raises(DataError, match="Nothing is measured"):
        run("calibration", *flags, "--output_dir", tmp_path, "--analyse")
