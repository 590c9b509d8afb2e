"""The pool by source: right numbers, honest intervals, no influence on the selection; mixtures as TRL mixes them."""

import html
from dataclasses import replace

import numpy as np
import pytest
import yaml
from datasets import ClassLabel, Dataset, Features, Value, load_dataset
from test_posterior import family, smooth_effects
from test_report import HOSTILE, make, written
from trl import DatasetMixtureConfig, get_dataset
from trl.scripts.utils import DatasetConfig

import harp_hf
from harp_hf import HarpConfig, HarpError, card, cli, posterior
from harp_hf.errors import ConfigError, DataError
from harp_hf.finetune import LeafFinetuner
from harp_hf.mixture import MOST, load_mixture, read_labels, source_names
from harp_hf.posterior import infer
from harp_hf.saved import load_result
from harp_hf.sources import Labels, infer_sources, tabulate, weighted_means

SETTINGS = {"leaf_size": 12, "branching": 2, "max_measurements": 4, "max_steps": 8, "learning_rate": 3e-2,
            "use_cpu": True, "bf16": False, "active_tasks": ["all"], "source_column": "kind"}  # fmt: skip
KINDS = ["red", "<script>alert(1)</script>", "a | b", "{{ 7 * 7 }} `x`"]


def observed(hierarchy, m, seed=0):
    """Effects that vary smoothly, and noisy measurements of some leaves."""
    rng = np.random.default_rng(seed)
    effects = smooth_effects(hierarchy, 2, rng)
    leaves = rng.permutation(hierarchy.n_leaves)[:m]
    variances = rng.uniform(0.01, 0.03, (m, 2)) ** 2
    return effects[leaves] + np.sqrt(variances) * rng.normal(size=(m, 2)), variances, leaves


# The posterior of a source


@pytest.mark.parametrize("prior", ["smooth", "nested"])
@pytest.mark.parametrize("m", [1, 2, 12])
@pytest.mark.parametrize("told", [False, True], ids=["alone", "with similarity"])
def test_all_weight_on_one_leaf_gives_that_leafs_posterior(prior, m, told):
    hierarchy = family(n_parents=9, leaves=3, n_large=3)
    given = (*observed(hierarchy, m), hierarchy)
    similarity = np.random.default_rng(2).normal(size=(27, 2)) if told else None
    mean, sd = weighted_means(*given, np.eye(27), prior=prior, similarity=similarity)
    known = infer(*given, prior=prior, similarity=similarity)
    assert mean == pytest.approx(known.mean, abs=1e-12)
    assert sd == pytest.approx(known.sd, abs=1e-9)


@pytest.mark.parametrize("prior", ["smooth", "nested"])
def test_weighted_means_have_the_joint_gaussian_posterior(prior, monkeypatch):
    """At one point of the grid, against conditioning the joint covariance of all leaves under a nearly flat level."""
    monkeypatch.setattr(posterior, "SHARED_GRID", (0.7,))
    monkeypatch.setattr(posterior, "OWN_GRID", (0.7,))
    monkeypatch.setattr("harp_hf.priors.LENGTH_SCALES", (0.8,))
    monkeypatch.setattr("harp_hf.priors.LARGE_SHARES", (0.3,))
    monkeypatch.setattr("harp_hf.sources._CHUNK", 5)
    hierarchy = family(n_parents=9, leaves=3, n_large=3)
    effects, variances, leaves = observed(hierarchy, 10)
    weights = np.random.default_rng(1).dirichlet(np.ones(27), size=4)
    mean, sd = weighted_means(effects, variances, leaves, hierarchy, weights, prior=prior)
    centroids = hierarchy.centroids.astype(float)
    squared = ((centroids[:, None] - centroids) ** 2).sum(axis=2)
    parent, large = hierarchy.parent, hierarchy.large[hierarchy.parent]
    correlation = np.exp(-0.5 * squared / np.median(squared[np.ix_(leaves, leaves)][np.triu_indices(10, 1)]) / 0.64)
    if prior == "nested":
        correlation = 0.3 * (large[:, None] == large) + 0.7 * (parent[:, None] == parent)
    for d, scale in enumerate(posterior._scales(effects, variances)):
        covariance = scale**2 * 0.49 * (correlation + np.eye(27)) + 10
        gain = covariance[:, leaves] @ np.linalg.inv(covariance[np.ix_(leaves, leaves)] + np.diag(variances[:, d]))
        after = covariance - gain @ covariance[leaves]
        assert mean[:, d] == pytest.approx(weights @ gain @ effects[:, d], abs=1e-5)
        assert sd[:, d] == pytest.approx(np.sqrt(np.einsum("sg,gh,sh->s", weights, after, weights)), rel=1e-3)


def test_leaves_err_together():
    """An interval from independent leaves would be far too narrow."""
    hierarchy = family()
    weights = (hierarchy.large[hierarchy.parent] == np.arange(6)[:, None]) / 48
    inside, alone = [], []
    for seed in range(12):
        effects = smooth_effects(hierarchy, 2, np.random.default_rng(seed))
        given = (*observed(hierarchy, 40, seed), hierarchy)
        mean, sd = weighted_means(*given, weights)
        error = np.abs(mean - weights @ effects)
        inside.append(error < 1.645 * sd)
        alone.append(error < 1.645 * np.sqrt(weights**2 @ infer(*given).sd ** 2))
    assert 0.8 < np.mean(inside) < 0.99
    assert np.mean(alone) < 0.7


def with_sources(result, names, row):
    """A result made by hand, with sources."""
    measured = result.measurements
    effects, variances = measured.effects(result.task, len(result.tasks))
    labels = Labels(names, np.asarray(row, np.int32))
    return replace(result, sources=infer_sources(labels, effects, variances, measured.leaves, result.hierarchy))


def test_the_table_is_what_counting_and_averaging_give():
    result = make()
    row = np.random.default_rng(5).integers(0, 3, 80)
    row[:30] = 2
    result = with_sources(result, ["a", "b", "c"], row)
    table = result.by_source()
    assert [line["source"] for line in table] == sorted("abc", key=lambda s: -np.sum(row == "abc".index(s)))
    chosen = set(result.chosen()[0].tolist())
    for line in table:
        rows = np.flatnonzero(row == "abc".index(line["source"]))
        leaves = result.hierarchy.leaf[rows]
        assert line["rows"] == len(rows)
        assert line["chosen"] == len(chosen & set(rows.tolist()))
        assert line["leaves"] == len(set(leaves.tolist()))
        assert line["measured_leaves"] == len(set(leaves.tolist()) & set(result.measurements.leaves.tolist()))
        for d, task in enumerate(result.tasks):
            assert line[f"phi_{task}"] == pytest.approx(result.posterior.mean[leaves, d].mean())
            assert 0 < line[f"phi_sd_{task}"] <= result.posterior.sd[leaves, d].mean() + 1e-12
    assert sum(line["chosen"] for line in table) == len(chosen)
    other = tabulate(result.sources, result.tasks, result.hierarchy.leaf, result.measurements.leaves, np.arange(80))
    assert all(line["chosen"] == line["rows"] for line in other)


def test_nothing_chosen_and_no_sources():
    result = make()
    with pytest.raises(HarpError, match="set `source_column`, or pass a mixture"):
        result.by_source()
    quiet = replace(result, choice=harp_hf.result.Choice("harp-e"), distinguishable=np.zeros(3, bool))
    assert [line["chosen"] for line in with_sources(quiet, ["all"], np.zeros(80)).by_source()] == [0]


# The source column


def test_strings_whole_numbers_and_class_labels_name_sources():
    kinds = Features({"text": Value("string"), "kind": ClassLabel(names=["x", "y"])})
    pool = Dataset.from_dict({"text": ["a"] * 4, "kind": [1, 0, 1, 1]}, features=kinds)
    for column, values in (("kind", ["y", "x", "y", "y"]), ("n", [7, 3, 7, 7]), ("s", ["é", "", "é", "é"])):
        labels = read_labels(pool if column == "kind" else pool.add_column(column, values), column)
        assert [labels.names[s] for s in labels.row] == [str(value) for value in values]
    shuffled = pool.select([1, 0])
    assert [read_labels(shuffled, "kind").names[s] for s in read_labels(shuffled, "kind").row] == ["x", "y"]


@pytest.mark.parametrize(
    ("column", "values", "error", "message"),
    [
        (
            "other",
            ["a", "b"],
            ConfigError,
            "`source_column` is 'source', but the columns of the pool are text, other.",
        ),
        ("source", ["a", None], DataError, "Row 1 of the pool has no source in 'source'."),
        ("source", [["a"], ["b"]], ConfigError, "which holds neither strings nor whole numbers."),
        ("source", [0.5, 1.0], ConfigError, "which holds neither strings nor whole numbers."),
        ("source", [f"{i}" for i in range(MOST + 1)], ConfigError, "has 2,001 different values"),
    ],
    ids=["missing", "none", "lists", "floats", "too many"],
)
def test_a_column_that_names_no_sources_is_one_sentence(column, values, error, message):
    pool = Dataset.from_dict({"text": ["a"] * len(values), column: values})
    with pytest.raises(error) as caught:
        read_labels(pool, "source")
    assert message in str(caught.value)


@pytest.mark.parametrize("column", ["harp_leaf", "phi_red"])
def test_a_source_column_that_clashes_with_a_result_column_is_one_sentence(column, pool, proxy, tiny_model, config):
    clashing = pool.add_column(column, ["a"] * 96)
    with pytest.raises(DataError, match=f"already has the column '{column}'"):
        harp_hf.measure(clashing, proxy, tiny_model, config(source_column=column, features="tfidf"))


@pytest.fixture(scope="module")
def kinds(pool):
    return pool.add_column("kind", np.repeat(KINDS, 24).tolist())


@pytest.fixture(scope="module")
def measured(kinds, proxy, features, tiny_model, tmp_path_factory):
    args = HarpConfig(output_dir=str(tmp_path_factory.mktemp("sources") / "run"), **SETTINGS)
    return harp_hf.measure(kinds, proxy, tiny_model, args, features=features)


def test_sources_do_not_inform_the_selection(measured, kinds, proxy, features, tiny_model, tmp_path):
    """The same bytes, whatever the sources of the rows are said to be."""
    permuted = kinds.remove_columns("kind").add_column("kind", kinds.shuffle(seed=3)["kind"][:])
    args = HarpConfig(output_dir=str(tmp_path / "run"), **SETTINGS)
    other = harp_hf.measure(permuted, proxy, tiny_model, args, features=features)
    assert other.by_source() != measured.by_source()
    for variant in ("harp-c", "harp-e"):
        written = [tmp_path / f"{i}-{variant}.parquet" for i in range(2)]
        for result, file in zip((measured, other), written, strict=True):
            result.select(variant).remove_columns("kind").to_parquet(file)
        assert written[0].read_bytes() == written[1].read_bytes()


def test_a_finished_run_gets_its_table_and_keeps_it(kinds, measured, proxy, features, tiny_model, monkeypatch):
    table = measured.by_source()
    assert sorted(line["source"] for line in table) == sorted(KINDS)
    for line in table:
        leaves = measured.hierarchy.leaf[np.array(kinds["kind"]) == line["source"]]
        assert line["phi_red"] == pytest.approx(measured.posterior.mean[leaves, 0].mean()), "the posterior of the run"
    assert load_result(measured.path, kinds).by_source() == table
    monkeypatch.setattr(LeafFinetuner, "finetune", None)
    args = HarpConfig(output_dir=str(measured.path), **(SETTINGS | {"source_column": None}))
    assert harp_hf.measure(kinds, proxy, tiny_model, args, features=features).sources is None
    assert load_result(measured.path, kinds).sources is None
    args = HarpConfig(output_dir=str(measured.path), **SETTINGS)
    assert harp_hf.measure(kinds, proxy, tiny_model, args, features=features).by_source() == table


def test_summary_report_and_card_show_the_table_and_take_names_for_text(measured, tmp_path):
    summary = measured.summary()
    page = written(measured, tmp_path)
    text = card.describe(measured, measured.select("harp-e"), "me/x")
    assert not any(tag == "script" for tag, _ in page.tags)
    section = text[text.index("## Sources") : text.index("## Cost")]
    assert "<script" not in section
    for line in measured.by_source():
        counts = [str(line[name]) for name in ("rows", "chosen", "leaves", "measured_leaves")]
        mean, sd = line["phi_red"], line["phi_sd_red"]
        assert "│ ".join(["", line["source"]]) in summary
        assert f"{mean:+.3f} ± {1.645 * sd:.3f}" in summary
        told = [f"{v:+.3f}".replace("-", "−") for v in (mean, mean - 1.645 * sd, mean + 1.645 * sd)]
        assert " ".join([line["source"], *counts]) in page.text
        assert f"{line['source']} {told[0]} {told[1]} to {told[2]}" in page.text
        assert any(f"{line['source']} {told[0]} ({told[1]} to {told[2]})" in alt for alt in page.alternatives)
        (row,) = (row for row in section.splitlines() if html.unescape(row).startswith(f"| {line['source']} |"))
        assert row.count("|") == 8, "a name does not open another cell"
        assert f"| {told[0]} ({told[1]} to {told[2]}) |" in row


def test_many_sources_are_cut_short_in_print_and_in_the_card(tmp_path):
    many = with_sources(make(n_leaves=60, n_measured=12), [f"s{i:03}" for i in range(240)], np.arange(240))
    assert len(many.by_source()) == 240
    assert "20 with most rows are shown, 220 more are not" in many.summary()
    assert "140 more are not shown" in written(many, tmp_path).text
    assert "The 50 sources with most rows are shown, 190 more are not." in card.describe(many, many.select(), "me/x")


def test_the_report_and_the_card_name_the_model(measured, tiny_model, tmp_path):
    page = written(measured, measured.path)
    assert "For the model tiny , a pool of 96 rows" in page.text
    assert str(tiny_model).rpartition("/")[0] not in page.text, "but not the folders of this machine"
    assert "for finetuning tiny" in card.describe(measured, measured.select(), "me/x").splitlines()[3]


# Mixtures


@pytest.fixture(scope="module")
def disk(kinds, proxy, features, tiny_model, tmp_path_factory):
    """A folder with two datasets, a proxy set and a YAML config as of `trl sft`."""
    folder = tmp_path_factory.mktemp("mixture")
    pool = kinds.remove_columns("kind").add_column("vector", features.tolist())
    pool.select(range(24)).to_json(folder / "red.jsonl")
    pool.select(range(24, 96)).to_json(folder / "<others>.jsonl")
    proxy.to_json(folder / "proxy.jsonl")
    settings = {k: v for k, v in SETTINGS.items() if k != "source_column"}
    names = {"eval_dataset_name": str(folder / "proxy.jsonl"), "model_name_or_path": tiny_model, "features": "vector"}
    mixture = [{"path": "json", "data_files": str(folder / name)} for name in ("red.jsonl", "<others>.jsonl")]
    (folder / "harp.yaml").write_text(yaml.safe_dump(settings | names | {"datasets": mixture}))
    return folder


def parts(disk, **changes):
    return [
        DatasetConfig(path="json", data_files=str(disk / name), **{k: v[i] for k, v in changes.items()})
        for i, name in enumerate(("red.jsonl", "<others>.jsonl"))
    ]


def test_a_mixture_in_the_yaml_is_the_pool(disk, tmp_path, capsys):
    command = ["select", "--config", str(disk / "harp.yaml"), "--output_dir", str(tmp_path / "run")]
    cli.main(command)
    printed = capsys.readouterr().out
    result = load_result(tmp_path / "run")
    assert result.pool.to_list() == get_dataset(DatasetMixtureConfig(parts(disk)))["train"].to_list()
    table = {line["source"]: line["rows"] for line in result.by_source()}
    assert table == {"<others>.jsonl": 72, "red.jsonl": 24}
    assert "│ <others>.jsonl │   72 │" in printed
    loaded = load_dataset(str(tmp_path / "run" / "result" / "harp-c"), split="train")
    assert sum(line["chosen"] for line in result.by_source()) == len(loaded)
    config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert config["datasets"] == yaml.safe_load((disk / "harp.yaml").read_text())["datasets"]
    text = card.describe(result, result.select(), "me/x")
    assert "rows of a mixture of 2 datasets" in text
    assert str(disk) not in text
    assert "lacks" not in text, "nothing is missing that would reproduce the run"
    cli.main(["cut", "--output_dir", str(tmp_path / "run"), "--budget", "20"])
    assert "│ <others>.jsonl │   72 │" in capsys.readouterr().out


def test_mixtures_are_mixed_as_trl_mixes_them(disk):
    for changes in ({}, {"fraction": [0.5, 0.5]}, {"fraction": [3, 1]}, {"columns": [["prompt", "completion"]] * 2}):
        mixture = DatasetMixtureConfig(parts(disk, **changes))
        pool, labels = load_mixture(mixture, 0)
        assert pool.to_list() == get_dataset(mixture)["train"].to_list()
        red = set(load_dataset("json", data_files=str(disk / "red.jsonl"), split="train")["prompt"][:])
        assert [labels.names[s] == "red.jsonl" for s in labels.row] == [prompt in red for prompt in pool["prompt"][:]]


def test_rows_split_off_for_a_test_are_not_in_the_pool_and_always_the_same(disk):
    mixture = DatasetMixtureConfig(parts(disk), test_split_size=0.25)
    pool, labels = load_mixture(mixture, 0)
    assert len(pool) == len(labels.row) == len(get_dataset(mixture)["train"]) == 72
    red = set(load_dataset("json", data_files=str(disk / "red.jsonl"), split="train")["prompt"][:])
    assert [labels.names[s] == "red.jsonl" for s in labels.row] == [prompt in red for prompt in pool["prompt"][:]]
    assert load_mixture(mixture, 0)[0].to_list() == pool.to_list()
    assert load_mixture(mixture, 1)[0].to_list() != pool.to_list()


def test_datasets_of_a_mixture_have_short_and_different_names():
    mixture = [
        DatasetConfig("me/one"), DatasetConfig("me/one", name="de"), DatasetConfig("me/one", split="train[:10%]"),
        DatasetConfig("json", data_files="/x/a.jsonl"), DatasetConfig("json", data_files="/y/a.jsonl"),
        DatasetConfig("json", data_files={"train": ["/x/b.jsonl", "/x/c.jsonl"]}), DatasetConfig("/x/folder"),
        DatasetConfig("me/one"), DatasetConfig("json", data_files="https://me:pass@host/d.jsonl?sv=1&sig=a/secret"),
    ]  # fmt: skip
    assert source_names(DatasetMixtureConfig(mixture)) == [
        "me/one", "me/one de", "me/one train[:10%]", "a.jsonl (1)", "a.jsonl (2)", "b.jsonl c.jsonl", "folder",
        "me/one", "d.jsonl?sv=1&sig=(a token)",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"streaming": True}, "a mixture with `streaming` cannot be used"),
        ({"datasets": [{"path": "json", "data_files": "nowhere.jsonl"}]}, "The mixture cannot be read: "),
        ({"datasets": [{"path": "json", "fraction": 0.5}, {"path": "json"}]}, "The mixture cannot be read: "),
        ({"datasets": [{"pth": "json"}]}, "pth"),
        ({"datasets": []}, "--dataset_name is needed"),
    ],
    ids=["streaming", "no file", "some fractions", "unknown key", "empty"],
)
def test_a_mixture_that_cannot_be_used_is_one_line(disk, tmp_path, monkeypatch, changes, message):
    monkeypatch.chdir(tmp_path)  # "json" without files is looked for in all of the working directory
    config = yaml.safe_load((disk / "harp.yaml").read_text()) | changes
    (tmp_path / "harp.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(SystemExit) as caught:
        cli.main(["select", "--config", str(tmp_path / "harp.yaml"), "--output_dir", str(tmp_path / "run")])
    assert "\n" not in caught.value.code
    assert message in caught.value.code


def test_hostile_names_of_sources_in_every_figure_and_table(tmp_path):
    page = written(with_sources(make(), [HOSTILE, "🦜"], np.arange(80) % 2), tmp_path)
    assert not any(tag == "script" for tag, _ in page.tags)
    assert any("🦜" in alternative for alternative in page.alternatives)
