"""Verification: final finetunes compared on test rows, and the intervals of their differences."""

import logging
import os
import re
import shutil
import signal
from collections import Counter
from contextlib import suppress

import numpy as np
import pytest
import yaml
from conftest import CHAT_TEMPLATE, make_rows
from datasets import Dataset, load_dataset
from peft import LoraConfig
from transformers import AutoTokenizer

import harp_hf
from harp_hf import HarpConfig, checkpoints, cli
from harp_hf.baselines import SELECTORS
from harp_hf.baselines.less import LESS
from harp_hf.errors import ConfigError, DataError, HarpError
from harp_hf.finetune import LeafFinetuner, LeafTrainer
from harp_hf.intervals import mean_intervals
from harp_hf.proxy import load_proxy
from harp_hf.rundir import RunDir
from harp_hf.saved import load_result
from harp_hf.status import read_status
from harp_hf.stopping import Terminated, stoppable
from harp_hf.trials import Trials
from harp_hf.verify import Proof, _reopen, verify, verify_run

SETTINGS = {"features": "vector", "leaf_size": 12, "branching": 2, "max_measurements": 4, "max_steps": 12,
            "learning_rate": 3e-2, "use_cpu": True, "bf16": False}  # fmt: skip


@pytest.fixture(scope="module")
def disk(pool, proxy, features, tiny_model, tmp_path_factory):
    """A folder with pool, proxy set, test rows and the YAML config of a run on disk."""
    folder = tmp_path_factory.mktemp("disk")
    pool.add_column("vector", features.tolist()).to_json(folder / "pool.jsonl")
    proxy.add_column("vector", np.repeat(np.eye(2, 6), 8, axis=0).tolist()).to_json(folder / "proxy.jsonl")
    test = [
        {"prompt": row["prompt"], "answer": row["completion"].strip(), "task": colour}
        for colour, seed in (("red", 21), ("green", 22))
        for row in make_rows(colour, 20, seed)
    ]
    Dataset.from_list(test).to_json(folder / "test.jsonl")
    config = {"dataset_name": str(folder / "pool.jsonl"), "eval_dataset_name": str(folder / "proxy.jsonl"),
              "model_name_or_path": tiny_model, "output_dir": str(folder / "run"), "budget": 24, "lora_r": 4,
              "variant": "harp-e", "active_tasks": ["all"], **SETTINGS}  # fmt: skip
    (folder / "harp.yaml").write_text(yaml.safe_dump(config))
    return folder


@pytest.fixture(scope="module")
def run(disk):
    """The directory of a finished `harp-hf select`."""
    cli.main(["select", "--config", str(disk / "harp.yaml")])
    return disk / "run"


@pytest.fixture
def made(monkeypatch):
    """Finetunes made in this process: rows, seed, adapter's rank, epochs."""
    finetunes, real = [], LeafFinetuner.finetune

    def finetune(self, rows, seed, adapter):
        finetunes.append((len(rows), seed, self.peft_config.r, self.args.num_train_epochs, self.args.max_steps))
        return real(self, rows, seed, adapter)

    monkeypatch.setattr(LeafFinetuner, "finetune", finetune)
    return finetunes


def test_a_run_directory_is_verified_and_resumed(run, disk, made, capsys):
    flags = ["verify", "--output_dir", str(run), "--eval_dataset_name", str(disk / "test.jsonl"), "--seeds", "2",
             "--epochs", "3", "--whole_pool", "true"]  # fmt: skip
    cli.main(flags)
    printed, shown = capsys.readouterr()
    for name in ("random-rows", "whole-pool", "harp-e"):
        assert re.search(f"Finetune on {name}, seed 43: 100%", shown), "long finetunes show their steps"
        assert f"Score of {name}, seed 43: " in shown
    assert "train_runtime" not in printed + shown
    assert made == [(24, s, 4, 3.0, -1) for s in (42, 43)] + [(96, s, 4, 3.0, -1) for s in (42, 43)] + [
        (24, s, 4, 3.0, -1) for s in (42, 43)
    ], "the run's adapter and seeds; random rows of the selection's number"
    for text in ("random rows ┃ whole pool ┃ harp-e ┃", "┃ 24 rows ┃ 96 rows ┃ 24 rows ┃", "│ red │", "│ green │"):
        assert text in " ".join(printed.split())
    cli.main(flags)
    assert capsys.readouterr().out == printed
    assert len(made) == 6, "nothing is finetuned on twice"

    proof = verify_run(run, str(disk / "test.jsonl"), seeds=2, epochs=3)
    assert len(made) == 6
    assert list(proof.scores) == ["base model", "random rows", "harp-e"]
    assert {name: scores.shape for name, scores in proof.scores.items()} == {
        "base model": (1, 40), "random rows": (2, 40), "harp-e": (2, 40)
    }  # fmt: skip
    mean, low, high = proof.difference("random rows")[-1]
    assert mean == pytest.approx(proof.scores["harp-e"].mean() - proof.scores["random rows"].mean())
    assert low < mean < high
    assert proof.scores["harp-e"].mean() > proof.scores["base model"].mean()
    row = f"mean of tasks | {mean:+.3f} | {low:+.3f} to {high:+.3f}"
    assert row in " ".join(printed.replace("│", "|").split())


def test_random_rows_differ_by_seed_and_another_budget_is_another_selection(run, disk, made):
    first = verify_run(run, str(disk / "test.jsonl"), seeds=2, epochs=1, budget=6)
    assert first.rows == {"base model": 0, "random rows": 6, "harp-e": 6}
    drawn = [
        np.load(file)["rows"].tolist() for file in sorted((run / "verify").glob("random-rows-*.npz"))
        if len(np.load(file)["rows"]) == 6
    ]  # fmt: skip
    assert len(drawn) == 2
    assert drawn[0] != drawn[1]
    kept = next(f for f in (run / "verify").glob("harp-e-*.npz") if len(np.load(f)["rows"]) == 6)
    chosen = load_result(run).choosing(budget=6).chosen()[0]
    assert np.load(kept)["rows"].tolist() == sorted(chosen.tolist())


def test_a_run_from_python_keeps_its_adapter_and_wants_its_objects(
    pool, proxy, features, tiny_model, tmp_path, disk, made
):
    args = HarpConfig(output_dir=str(tmp_path / "run"), active_tasks="all", metric="likelihood", **SETTINGS)
    adapter = LoraConfig(r=3, lora_alpha=9, target_modules=["q_proj"], task_type="CAUSAL_LM")
    harp_hf.measure(pool, proxy, tiny_model, args, adapter, features=features)
    made.clear()
    with pytest.raises(DataError, match="was an object in memory: pass it as `dataset`"):
        verify_run(tmp_path / "run", str(disk / "test.jsonl"), seeds=1)
    proof = verify_run(tmp_path / "run", str(disk / "test.jsonl"), seeds=1, dataset=pool, epochs=1)
    assert [finetune[2] for finetune in made] == [3, 3]
    assert "With one seed" in proof.summary()


def test_a_run_with_its_own_tokenizer_and_template_is_verified_with_them(
    pool, proxy, features, tiny_model, tmp_path, disk, made, monkeypatch
):
    template, test, seen = tmp_path / "chat.jinja", str(disk / "test.jsonl"), []
    template.write_text(CHAT_TEMPLATE.replace("<|user|>", "say"))
    args = HarpConfig(output_dir=str(tmp_path / "run"), active_tasks="all", metric="likelihood",
                      chat_template_path=str(template), **SETTINGS)  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.eos_token = "<|user|>"
    harp_hf.measure(pool, proxy, tiny_model, args, processing_class=tokenizer, features=features)
    template.unlink()
    monkeypatch.setattr(LeafFinetuner, "__init__", lambda self, *given, _real=LeafFinetuner.__init__: (
        seen.append(given[4]), _real(self, *given))[1])  # fmt: skip
    with pytest.raises(ConfigError, match="measured with another tokenizer: pass it as `processing_class`"):
        verify_run(tmp_path / "run", test, seeds=1, dataset=pool, epochs=1)
    assert not seen
    proof = verify_run(
        tmp_path / "run", test, seeds=1, dataset=pool, epochs=1, processing_class=AutoTokenizer.from_pretrained(
            tiny_model, eos_token="<|user|>"
        ),
    )  # fmt: skip
    assert len(proof.scores) == 3
    assert [(t.eos_token, t.chat_template[:100]) for t in seen] == [
        ("<|user|>", CHAT_TEMPLATE.replace("<|user|>", "say")[:100])
    ]


def test_what_cannot_be_verified_is_said(run, disk, tmp_path, caplog, monkeypatch):
    test = str(disk / "test.jsonl")
    with pytest.raises(DataError, match="is not there"):
        verify_run(tmp_path / "none", test)
    with pytest.raises(ConfigError, match="`seeds` must be a whole number of at least 1"):
        verify_run(run, test, seeds=0)
    with pytest.raises(ConfigError, match="`epochs` must be above 0"):
        verify_run(run, test, epochs=0)
    with pytest.raises(ConfigError, match="is not the one that"):
        verify_run(run, test, model="another/model")
    with pytest.raises(SystemExit, match="--eval_dataset_name is needed"):
        cli.main(["verify", "--output_dir", str(run)])
    # Only the warnings count here, so that nothing is finetuned on.
    monkeypatch.setattr(Trials, "run", lambda self, rows, *rest: (_ for _ in ()).throw(HarpError("stop")))
    caplog.set_level(logging.WARNING)
    with pytest.raises(HarpError, match="stop"):
        verify_run(run, Dataset.from_json(str(disk / "proxy.jsonl")))
    assert "are the proxy set" in caplog.text
    caplog.clear()
    leaky = Dataset.from_list([{"prompt": r["prompt"], "answer": r["completion"]} for r in make_rows("red", 3, 1)])
    with pytest.raises(HarpError, match="stop"):
        verify_run(run, leaky)
    assert "3 of 3 test rows stand word for word in the pool" in caplog.text


def test_trials_score_by_every_metric_and_finetune_once(pool, proxy, tiny_model, tmp_path, made, config):
    rows = load_proxy(proxy.add_column("choices", [["crimson", "emerald", "azure"]] * 16))
    trials = Trials(RunDir(tmp_path / "run"), pool, rows, tiny_model, config(),
                    metrics=["exact_match", "auto", "exact_match"])  # fmt: skip
    trial = trials.run(np.arange(24), 0, 2.0, "red")
    assert len(made) == 1
    assert trials.metrics == [["exact_match"] * 2, ["choice"] * 2, ["exact_match"] * 2]
    assert trial.scores.shape == (3, 16)
    assert trial.scores[0].tolist() == trial.scores[2].tolist()
    assert trial.scores[1, :8].mean() == 1
    assert trials.run(np.arange(24)[::-1], 0, 2.0, "red").tokens_training == trial.tokens_training
    assert len(made) == 1, "the order of the rows is nothing to a finetune"
    assert trial.tokens_training == 2 * trials.tokens_by_row()[:24].sum()
    for other in ((np.arange(23), 0, 2.0), (np.arange(24), 1, 2.0), (np.arange(24), 0, 1.0)):
        trials.run(*other, "red")
    assert len(made) == 4, "other rows, another seed or other epochs are another trial"


def test_a_function_with_another_source_is_another_trial(pool, proxy, tiny_model, tmp_path, made, config):
    def scored(score):
        trials = Trials(RunDir(tmp_path / "run"), pool, load_proxy(proxy), tiny_model, config(), metrics=[score])
        return trials.run(np.arange(24), 0, 1.0, "red").scores.mean()

    def score(completions, **columns):
        return [0.5] * len(completions)

    assert [scored(score), scored(score), len(made)] == [0.5, 0.5, 1]

    def score(completions, **columns):
        return [0.25] * len(completions)

    assert [scored(score), len(made)] == [0.25, 2]


def test_a_swallowed_signal_ends_the_work_after_the_trial(pool, proxy, tiny_model, tmp_path, monkeypatch, config):
    trials = Trials(RunDir(tmp_path / "run"), pool, load_proxy(proxy), tiny_model, config(), metrics=["exact_match"])
    make = Trials._make

    def swallow(*arguments):
        with suppress(Terminated):
            os.kill(os.getpid(), signal.SIGTERM)
        return make(*arguments)

    monkeypatch.setattr(Trials, "_make", swallow)
    with stoppable(), pytest.raises(Terminated):
        trials.run(np.arange(0), 0, 2.0, "base")
    assert len(list((tmp_path / "run" / "verify").glob("base-*.npz"))) == 1, "what was done is kept"


@pytest.mark.parametrize("damaged", [False, True], ids=["whole", "damaged"])
def test_a_killed_finetune_goes_on_from_its_last_whole_checkpoint(
    damaged, pool, proxy, tiny_model, tmp_path, monkeypatch, config, caplog
):
    monkeypatch.setattr(checkpoints, "EVERY", 0.0)
    lora, trained, folder = LoraConfig(r=4, lora_dropout=0.2), [], tmp_path / "run" / "verify"

    def go(path, stop=None):
        def step(self, model, *given):
            if self.state.global_step == stop:
                raise KeyboardInterrupt
            trained.append(self.state.global_step)
            return training_step(self, model, *given)

        monkeypatch.setattr(LeafTrainer, "training_step", step)
        args = config(per_device_train_batch_size=4)
        return Trials(RunDir(path), pool, load_proxy(proxy), tiny_model, args, lora, metrics=["likelihood"]).run(
            np.arange(24), 0, 2.0, "red"
        )

    def save_model(self, path=None, _internal_call=False, _real=LeafTrainer.save_model):
        if not _internal_call:
            raise KeyboardInterrupt
        _real(self, path, _internal_call)

    training_step = LeafTrainer.training_step
    never = go(tmp_path / "undisturbed")
    assert trained == list(range(12))
    with monkeypatch.context() as patch:
        patch.setattr(LeafTrainer, "save_model", save_model)
        with pytest.raises(KeyboardInterrupt):
            go(tmp_path / "late")
    late = (tmp_path / "late" / "verify").glob("red-*/checkpoint-*")
    assert {path.name for path in late} == {"checkpoint-10", "checkpoint-11"}, "none of the end"
    with pytest.raises(KeyboardInterrupt):
        go(tmp_path / "run", stop=8)
    kept = sorted(folder.glob("red-*/checkpoint-*"))
    assert [path.name for path in kept] == ["checkpoint-7", "checkpoint-8"]
    for path in kept:
        RunDir(path).write_json("whole.json", RunDir(path).read_json("whole.json") | {"seconds": 1000.0})
    if damaged:
        with (kept[1] / "optimizer.pt").open("ab") as handle:
            handle.write(b"x")
    trained.clear()
    trial = go(tmp_path / "run")
    assert trained == list(range(7 if damaged else 8, 12))
    assert (f"{kept[1]} is damaged, and not used." in caplog.text) == damaged
    assert trial.scores.tolist() == never.scores.tolist(), "to the bit"
    assert trial.tokens_training == never.tokens_training
    assert 1000 < trial.seconds_training < 1100, "the time before the kill is counted"
    assert [path.suffix for path in folder.iterdir()] == [".npz"], "what is done needs no checkpoints"


def test_short_finetunes_leave_no_checkpoints(pool, proxy, tiny_model, tmp_path, monkeypatch, config):
    monkeypatch.setattr(LeafTrainer, "_save_checkpoint", lambda *_: pytest.fail("there was no time for one"))
    Trials(RunDir(tmp_path / "run"), pool, load_proxy(proxy), tiny_model, config()).run(np.arange(24), 0, 2.0, "red")


def test_a_task_that_two_metrics_score_alike_is_scored_once(pool, proxy, tiny_model, tmp_path, config):
    rows = load_proxy(proxy.add_column("choices", [["crimson", "emerald", "azure"]] * 16))
    mixed = {rows.tasks[0]: "exact_match", rows.tasks[1]: "choice"}
    both, plain, other = (
        Trials(RunDir(tmp_path / f"{n}"), pool, rows, tiny_model, config(), metrics=metrics).run(
            np.arange(24), 0, 1.0, "x"
        )
        for n, metrics in enumerate((["exact_match", mixed], ["exact_match"], [mixed]))
    )
    assert both.scores == pytest.approx(np.concatenate([plain.scores, other.scores]), abs=1e-6)
    assert both.tokens_evaluation < plain.tokens_evaluation + other.tokens_evaluation


# --- intervals


def test_intervals_hold_the_truth_as_often_as_they_say():
    random, inside, n_rows = np.random.default_rng(0), Counter(), 30
    task = np.repeat(np.arange(2), n_rows)
    for _ in range(600):
        scores = 0.3 + 0.2 * random.standard_normal((3, 1)) + 0.5 * random.standard_normal(60)
        scores = scores + 0.3 * random.standard_normal((3, 60))
        found = mean_intervals(scores, task)
        inside["task"] += int(found[0, 1] <= 0.3 <= found[0, 2])
        inside["mean"] += int(found[-1, 1] <= 0.3 <= found[-1, 2])
    assert 0.92 < inside["task"] / 600 < 0.985
    assert 0.92 < inside["mean"] / 600 < 0.985


def test_intervals_match_students_where_there_is_one_effect():
    from scipy.stats import ttest_1samp

    random, task = np.random.default_rng(1), np.zeros(12, int)
    rows = random.standard_normal((1, 12))
    wanted = ttest_1samp(rows[0], 0).confidence_interval(0.9)
    for scores in (rows, np.repeat(rows, 4, axis=0)):
        found = mean_intervals(scores, task, 0.9)
        assert found[0] == pytest.approx([rows.mean(), *wanted])
        assert found[1] == pytest.approx(found[0])
    seeds = np.repeat(random.standard_normal((5, 1)), 12, axis=1)
    assert mean_intervals(seeds, task)[0, 1:] == pytest.approx(ttest_1samp(seeds[:, 0], 0).confidence_interval(0.95))
    assert mean_intervals(np.full((2, 12), 0.5), task).tolist() == [[0.5] * 3] * 2


def test_one_row_does_not_tell_its_variance():
    scores, task = np.random.default_rng(2).random((3, 7)), np.repeat(np.arange(2), [6, 1])
    found = mean_intervals(scores, task)
    assert found[:, 0] == pytest.approx([scores[:, :6].mean(), scores[:, 6].mean(), found[:2, 0].mean()])
    assert np.isfinite(found[0]).all()
    assert np.isnan(found[1:, 1:]).all()
    assert np.isnan(mean_intervals(scores[:1], task)[1:, 1:]).all()
    rows = load_proxy({n: Dataset.from_list([{"prompt": "a", "answer": "x"}] * k) for n, k in (("u", 6), ("v", 1))})
    compared = {"ours": scores, "random rows": scores[::-1]}
    text = Proof(rows, "ours", dict.fromkeys(compared, 5), compared, 1, ["numeric", "choice"]).summary()
    assert text.count("not known") == 2
    assert "nan" not in text


# --- --selector


def lines(capsys, *argv):
    cli.main([str(a) for a in argv])
    return capsys.readouterr().out.splitlines()


@pytest.mark.parametrize("name", ["random", "rds", "k-center", "facility-location", "dsir"])
def test_a_baseline_in_harps_place_needs_no_finetune(name, disk, tmp_path, made, capsys):
    # Only RDS compares the proxy rows with the pool's, so only it needs their vectors.
    proxy = disk / ("proxy.jsonl" if name == "rds" else "test.jsonl")
    printed = lines(capsys, "select", "--config", disk / "harp.yaml", "--output_dir", tmp_path / "run",
                    "--eval_dataset_name", proxy, "--selector", name, "--budget", "20")  # fmt: skip
    assert printed[0].startswith("Finetunes: 0. Tokens: 0 trained, 0 evaluated")
    assert printed[1] == f"Selection written to {tmp_path / 'run' / 'result' / name} (20 rows)."
    loaded = load_dataset(str(tmp_path / "run" / "result" / name), split="train")
    pool = Dataset.from_json(str(disk / "pool.jsonl"))
    assert loaded.column_names == [*pool.column_names, "harp_row"]
    assert loaded.remove_columns("harp_row").to_list() == pool.select(loaded["harp_row"][:]).to_list()
    assert len(set(loaded["harp_row"][:])) == 20
    assert made == []
    if name == "rds":
        assert max(loaded["harp_row"][:]) < 48, "the rows whose vectors are the proxy rows'"


def test_selectors_share_what_the_run_has_measured(run, disk, made, capsys):
    before = (run / "config.yaml").read_bytes()
    for name in ("top-phi", "measured-only"):
        printed = lines(capsys, "select", "--config", disk / "harp.yaml", "--selector", name)
        assert printed[0].startswith("Finetunes: 5. Tokens: "), "the cost of what was measured before"
        assert (run / "result" / name / "train.parquet").is_file()
    assert made == []
    n_leaves = load_result(run).hierarchy.n_leaves
    printed = lines(capsys, "select", "--config", disk / "harp.yaml", "--selector", "exhaustive")
    assert len(made) == n_leaves - 4
    assert printed[0].startswith(f"Finetunes: {n_leaves + 1}.")
    assert (run / "config.yaml").read_bytes() == before
    assert read_status(run).summary().startswith(f"{run}: finished")


def test_a_baseline_leaves_the_runs_own_choice(run, disk, tmp_path, capsys):
    shutil.copytree(run, tmp_path / "run")
    files = [tmp_path / "run" / name for name in ("config.yaml", "result/result.json")]
    before = [path.read_bytes() for path in files]
    lines(capsys, "select", "--config", tmp_path / "run" / "config.yaml", "--output_dir", tmp_path / "run",
          "--selector", "top-phi", "--budget", "4", "--variant", "harp-c")  # fmt: skip
    moved = [before[0].replace(str(run).encode(), str(tmp_path / "run").encode()), before[1]]
    assert [path.read_bytes() for path in files] == moved
    lines(capsys, "select", "--config", tmp_path / "run" / "config.yaml", "--budget", "4")
    assert load_result(tmp_path / "run").choice.budget == 4, "only a selection of its own is another choice"


def test_what_a_selector_cannot_do_is_one_sentence(disk, tmp_path, monkeypatch):
    flags = ["--config", str(disk / "harp.yaml"), "--output_dir", str(tmp_path / "run")]
    with pytest.raises(SystemExit) as caught:
        cli.main(["select", *flags, "--selector", "best"])
    assert caught.value.code == (
        f"harp-hf select: There is no selector 'best'; the selectors are {', '.join(SELECTORS)}."
    )
    assert not (tmp_path / "run").exists()
    with pytest.raises(SystemExit, match="is not there"):
        cli.main(["select", *flags, "--selector", "top-phi", "--dataset_name", "none.jsonl"])
    assert not (tmp_path / "run").exists()
    with pytest.raises(SystemExit, match="--selector is only for"):
        cli.main(["measure", *flags, "--selector", "rds"])
    config = yaml.safe_load((disk / "harp.yaml").read_text())
    del config["budget"]
    (tmp_path / "harp.yaml").write_text(yaml.safe_dump(config | {"output_dir": str(tmp_path / "run")}))
    monkeypatch.setattr(LESS, "rank", lambda *_: pytest.fail("it is said before anything costly is done"))
    with pytest.raises(SystemExit, match="`budget` is needed: the selector 'less' ranks all rows"):
        cli.main(["select", "--config", str(tmp_path / "harp.yaml"), "--selector", "less"])


def test_a_moved_run_is_verified_where_it_is_and_by_one_process(run, disk, tmp_path, made):
    shutil.copytree(run, tmp_path / "moved", ignore=shutil.ignore_patterns("verify"))
    before = sorted(run.rglob("*"))
    with RunDir(tmp_path / "moved").locked(), pytest.raises(HarpError, match="is in use by process"):
        verify_run(tmp_path / "moved", str(disk / "test.jsonl"), seeds=1)
    assert made == []
    verify_run(tmp_path / "moved", str(disk / "test.jsonl"), seeds=1)
    assert len(made) == 2
    assert sorted(run.rglob("*")) == before


def test_a_run_is_verified_in_its_own_precision_on_any_machine(run, tmp_path, monkeypatch):
    shutil.copytree(run, tmp_path / "run")
    written = yaml.safe_load((run / "config.yaml").read_text())
    written.pop("bf16", None)  # as where it is the machine's default
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(written))
    monkeypatch.setattr("harp_hf.config.bf16_is_fast", lambda *_: True)
    assert HarpConfig(output_dir=str(tmp_path), use_cpu=True).bf16
    assert not _reopen(RunDir(tmp_path / "run"), None, None)[1].bf16


def test_trials_are_known_by_tokenizer_and_have_any_name(pool, proxy, tiny_model, tmp_path, made, config):
    args, test = config(max_steps=1, num_train_epochs=1), load_proxy(proxy)
    other = AutoTokenizer.from_pretrained(tiny_model)
    other.eos_token = "<|user|>"
    for tokenizer in (None, other, None):
        verify(pool, {"harp-c/10 " + "x" * 300: np.arange(9)}, test, tiny_model, args, processing_class=tokenizer)
    assert len(made) == 2
