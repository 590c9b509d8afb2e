"""A run that is killed loses nothing: what is measured stays measured, and the result is that of a run left alone."""

import os
import re
import signal
import time
from dataclasses import replace
from itertools import count

import numpy as np
import pytest
import torch
from datasets import Dataset

import harp_hf
from harp_hf import HarpConfig, HarpError
from harp_hf.errors import RunDirError
from harp_hf.finetune import LeafFinetuner
from harp_hf.proxy import load_proxy
from harp_hf.rundir import RunDir

LEAVES = 5
MEASUREMENTS = LEAVES + 1  # random rows too
SETTINGS = {"leaf_size": 12, "branching": 2, "max_measurements": LEAVES, "max_steps": 4, "learning_rate": 3e-2,
            "metric": "likelihood", "use_cpu": True, "bf16": False}  # fmt: skip
# Where the process kills itself, one start after the other in one directory: the file it is writing, which of those
# that this start writes, whether half of it is written or all, and how many measurements are finished then.
POINTS = {
    "before anything": ("manifest.json", 1, "half", 0),
    "after features": ("features.npy", 1, "all", 0),
    "in the hierarchy": ("hierarchy.npz", 1, "half", 0),
    "after the base scores": ("base.npz", 1, "all", 0),
    "after the first measurement": ("measurements/", 1, "all", 1),
    "in the third measurement": ("measurements/", 2, "half", 2),
    "after the third measurement": ("measurements/", 1, "all", 3),
    "after the last measurement": ("measurements/", MEASUREMENTS - 3, "all", MEASUREMENTS),
    "in the result": ("result/arrays.npz", 1, "half", MEASUREMENTS),
    "before the result is whole": ("result/arrays.npz", 1, "all", MEASUREMENTS),
}


def work(folder, data, model, point=None):
    """What a user runs: select in `folder`/run and write a parquet file; finetunes are counted in a file."""
    torch.set_num_threads(1)
    finetune = LeafFinetuner.finetune

    def counted(self, rows, seed, adapter):
        with (folder / "finetunes").open("a") as handle:
            handle.write(f"{rows.min()}\n")
        return finetune(self, rows, seed, adapter)

    LeafFinetuner.finetune = counted
    if point is not None:
        kill_at(*point)
    args = HarpConfig(output_dir=str(folder / "run"), **SETTINGS)
    selected = harp_hf.select(data["pool"], data["proxy"], model, args, features=data["features"])
    selected.to_parquet(folder / "selected.parquet")


def kill_at(name, number, part):
    """Kill this process when it writes the file for the `number`-th time."""
    write, numbers = RunDir.write, count(1)

    def deadly(self, file, contents):
        if not file.startswith(name) or next(numbers) < number:
            return write(self, file, contents)
        if part == "half":
            write(self, file, lambda handle: (handle.write(b"half a file"), handle.flush(), die()))
        write(self, file, contents)
        die()

    RunDir.write = deadly


def die():
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.fixture(scope="module")
def data(pool, proxy, features):
    return {"pool": pool, "proxy": proxy, "features": features}


@pytest.fixture(scope="module")
def run(processes, data, tiny_model):
    """Run `work` in a process of its own; its exit code, which is -9 where it was killed."""

    def start(folder, point=None, wait=True):
        process = processes.Process(target=work, args=(folder, data, tiny_model, point))
        process.start()
        if not wait:
            return process
        process.join(120)
        return process.exitcode

    return start


@pytest.fixture(scope="module")
def undisturbed(run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    assert run(folder) == 0
    return folder


def finished(folder):
    """Every finished measurement with its bytes, time and place on disk."""
    files = sorted((folder / "run" / "measurements").glob("*.npz"))
    return {f.name: (f.read_bytes(), f.stat().st_mtime_ns, f.stat().st_ino) for f in files}


def finetunes(folder):
    return (folder / "finetunes").read_text().split() if (folder / "finetunes").exists() else []


def assert_continued(run, folder, undisturbed):
    """The same command again: measures what is missing and nothing else, and ends where an undisturbed run ends."""
    before, trained = finished(folder), len(finetunes(folder))
    assert run(folder) == 0
    after = finished(folder)
    assert {name: after[name] for name in before} == before, "a finished measurement is left alone"
    assert len(finetunes(folder)) - trained == MEASUREMENTS - len(before)
    assert after.keys() == finished(undisturbed).keys()
    for name in ("selected.parquet", "run/result/arrays.npz", "run/result/result.json", "run/base.npz/scores"):
        assert content(folder, name) == content(undisturbed, name), name


def content(folder, name):
    if name.endswith("/scores"):  # base.npz also holds the seconds it took
        return np.load(folder / name.removesuffix("/scores"))["scores"].tobytes()
    return (folder / name).read_bytes()


def test_a_run_killed_anywhere_continues_where_it_was(run, undisturbed, tmp_path):
    for name in ("run/.features.npy.part", "run/measurements/.0-42.npz.part", "run/measurements/notes.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"rubbish")
    known = {}
    for where, (name, number, part, done) in POINTS.items():
        assert run(tmp_path, (name, number, part)) == -signal.SIGKILL, where
        left = len(list((tmp_path / "run").rglob(".*.part")))
        assert left == (part == "half"), f"{where}: killed in the middle of writing, and older rubbish is swept up"
        after = finished(tmp_path)
        assert len(after) == done, where
        assert known.items() <= after.items(), f"{where}: a finished measurement is left alone"
        assert not (tmp_path / "run" / "result" / "result.json").exists()
        known = after
    assert len(finetunes(tmp_path)) == MEASUREMENTS + 1, "only the one that was lost is made again"
    assert_continued(run, tmp_path, undisturbed)


def test_a_run_killed_from_outside_continues_where_it_was(run, undisturbed, tmp_path):
    process = run(tmp_path, wait=False)
    deadline = time.monotonic() + 120
    while len(finished(tmp_path)) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert 2 <= len(finished(tmp_path)) < MEASUREMENTS
    assert_continued(run, tmp_path, undisturbed)


def test_a_finished_run_is_not_repeated(run, undisturbed):
    before, trained = finished(undisturbed), finetunes(undisturbed)
    parquet = (undisturbed / "selected.parquet").read_bytes()
    assert run(undisturbed) == 0
    assert finished(undisturbed) == before
    assert finetunes(undisturbed) == trained
    assert (undisturbed / "selected.parquet").read_bytes() == parquet


@pytest.fixture
def trained(monkeypatch):
    """Seeds and first rows of the finetunes made in this process."""
    finetune, made = LeafFinetuner.finetune, []

    def noted(self, rows, seed, adapter):
        made.append((seed, int(rows.min())))
        return finetune(self, rows, seed, adapter)

    monkeypatch.setattr(LeafFinetuner, "finetune", noted)
    return made


@pytest.fixture(scope="module")
def again(undisturbed, data, tiny_model):
    """Measure in the undisturbed run's directory with some settings, rows or objects changed."""

    def measure(pool=None, proxy=None, model=None, features=None, peft_config=None, processing_class=None, **changes):
        args = replace(HarpConfig(output_dir=str(undisturbed / "run"), **SETTINGS), **changes)
        return harp_hf.measure(
            data["pool"] if pool is None else pool,
            data["proxy"] if proxy is None else proxy,
            model or tiny_model, args, peft_config, processing_class,
            features=data["features"] if features is None else features,
        )  # fmt: skip

    return measure


def test_what_only_chooses_may_change(again, trained):
    first = again()
    changed = again(variant="harp-e", budget=10, task_weights={"red": 0.1}, active_tasks=["red", "green"])
    assert trained == []
    assert changed.choice.variant == "harp-e"
    assert len(changed.select()) == 10
    assert np.array_equal(changed.posterior.mean, first.posterior.mean)
    nested = again(prior="nested")
    assert trained == []
    assert not np.array_equal(nested.posterior.mean, first.posterior.mean)


def test_more_measurements_and_repeats_reuse_those_made(again, trained, undisturbed):
    before, few = finished(undisturbed), again()
    more = again(max_measurements=LEAVES + 1)
    assert len(trained) == 1
    assert more.measurements.leaves[:LEAVES].tolist() == few.measurements.leaves.tolist()
    assert np.array_equal(more.measurements.scores[:LEAVES], few.measurements.scores)
    trained.clear()
    fewer = again(max_measurements=LEAVES - 1)
    assert fewer.measurements.leaves.tolist() == few.measurements.leaves.tolist()[:-1]
    assert trained == []
    twice = again(num_repeats=2)
    assert [seed for seed, _ in trained] == [43] * MEASUREMENTS
    assert np.array_equal(twice.measurements.scores[:, :1], few.measurements.scores)
    after = finished(undisturbed)
    assert {name: after[name] for name in before} == before
    assert np.array_equal(again().posterior.mean, few.posterior.mean), "and going back changes nothing"


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"learning_rate": 1e-3}, "learning_rate=0.03, not 0.001"),
        ({"seed": 7}, "seed=42, not 7"),
        ({"leaf_size": 16}, "leaf_size=12, not 16"),
        ({"branching": 3}, "branching=2, not 3"),
        ({"max_steps": 5}, "max_steps=4, not 5"),
        ({"metric": "exact_match"}, "metric=['likelihood', 'likelihood'], not ['exact_match', 'exact_match']"),
        ({"null_scores": {"red": 0.5, "green": 0.5}}, "null_scores=None"),
    ],
)
def test_a_setting_that_matters_may_not_change(again, trained, changes, named, tmp_path):
    if "null_scores" in changes:
        lines = tmp_path / "null.jsonl"
        lines.write_text('{"task": "red", "score": 0.5}\n{"task": "green", "score": 0.5}\n')
        changes = {"null_scores": str(lines)}
    with pytest.raises(RunDirError, match=f"was made with {re.escape(named)}") as caught:
        again(**changes)
    assert one_sentence(caught.value)
    assert trained == []


def test_data_and_model_may_not_change(again, trained, data, tiny_model, tmp_path):
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer

    other = AutoModelForCausalLM.from_pretrained(tiny_model)
    with torch.no_grad():
        other.lm_head.weight[0, 0] += 1
    other.save_pretrained(tmp_path / "other")
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(tmp_path / "other")
    rows = data["pool"].to_list()
    rows[50]["completion"] = " azure"
    question = data["proxy"].to_list()
    question[3]["answer"] = "azure"
    lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.eos_token = "<|user|>"
    for changes, word in (
        ({"pool": Dataset.from_list(rows)}, "pool"),
        ({"pool": data["pool"].select(range(95))}, "pool"),
        ({"proxy": Dataset.from_list(question)}, "proxy set"),
        ({"proxy": load_proxy(data["proxy"].select(range(15)))}, "proxy set"),
        ({"proxy": data["proxy"].add_column("level", [1] * 16)}, "proxy set"),
        ({"model": str(tmp_path / "other")}, "model, adapter or tokenizer"),
        ({"peft_config": lora}, "model, adapter or tokenizer"),
        ({"processing_class": tokenizer}, "model, adapter or tokenizer"),
        ({"features": data["features"] + 1}, "choice of features"),
    ):
        with pytest.raises(RunDirError, match=f"belongs to a run with another {word};") as caught:
            again(**changes)
        assert one_sentence(caught.value)
    assert trained == []


def test_a_function_that_scores_may_not_change(config, pool, proxy, features, tiny_model, trained):
    args = config(max_measurements=2, max_steps=2, max_new_tokens=2)

    def measure(score):
        return harp_hf.measure(pool, proxy, tiny_model, args, features=features, metric=score)

    def score(completions, **columns):
        return [0.5] * len(completions)

    before, made = measure(score), len(trained)
    assert np.array_equal(measure(score).measurements.scores, before.measurements.scores)

    def score(completions, **columns):
        return [0.25] * len(completions)

    with pytest.raises(RunDirError, match=r"was made with metric=\[.*score [0-9a-f]{8}'.*\], not \[.*start afresh\.$"):
        measure(score)
    assert len(trained) == made


def one_sentence(error):
    return isinstance(error, HarpError) and str(error).endswith("start afresh.") and "\n" not in str(error)
