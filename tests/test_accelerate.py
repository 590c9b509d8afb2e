"""`accelerate launch` with two processes on a CPU: they share each finetune, and the main one does the rest."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from datasets import load_dataset

from harp_hf import cli, load_result, processes
from harp_hf.errors import ConfigError

pytestmark = pytest.mark.launch

RECIPES = Path(__file__).parent.parent / "recipes"
LAUNCHED = Path(__file__).parent / "launched.py"
# Rows have 10 tokens with <eos>, leaves at least 8 rows. One step takes 8 of them, in whichever order.
BATCH, ROW_TOKENS = 4, 10


@pytest.fixture(scope="module")
def disk(pool, proxy, features, tiny_model, tmp_path_factory):
    """A folder with a pool, a proxy set and a YAML config on disk."""
    folder = tmp_path_factory.mktemp("launch")
    pool.add_column("vector", features.tolist()).to_json(folder / "pool.jsonl")
    proxy.to_json(folder / "proxy.jsonl")
    settings = {
        "dataset_name": str(folder / "pool.jsonl"), "eval_dataset_name": str(folder / "proxy.jsonl"),
        "model_name_or_path": tiny_model, "features": "vector", "leaf_size": 16, "branching": 2,
        "max_measurements": 2, "max_steps": 1, "per_device_train_batch_size": BATCH, "learning_rate": 3e-2,
        "use_cpu": True, "bf16": False, "active_tasks": ["all"], "metric": "likelihood",
        "ddp_find_unused_parameters": False, "lora_dropout": 0.0,
    }  # fmt: skip
    (folder / "harp.yaml").write_text(yaml.safe_dump(settings))
    return folder


def launch(*arguments):
    """Run a script or module in two processes, as the recipe has it."""
    command = [sys.executable, "-m", "accelerate.commands.launch",
               "--config_file", RECIPES / "accelerate" / "cpu_2.yaml", *arguments]  # fmt: skip
    threads = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=900, env=threads)


def test_processes_share_each_finetune_and_one_does_the_rest(disk, tmp_path):
    out = tmp_path / "run"
    done = launch("-m", "harp_hf.cli", "select", "--config", disk / "harp.yaml", "--output_dir", out)
    assert done.returncode == 0, done.stderr
    result = load_result(out)
    selected = load_dataset(str(out / "result" / "harp-c"), split="train")
    assert done.stdout == (
        f"{result.summary()}\nSelection written to {out / 'result' / 'harp-c'} ({len(selected)} rows).\n"
    ), "one process prints, and nothing else stands on stdout"
    assert done.stderr.count("Measuring 2 of") == 1
    assert "Warning" not in done.stderr
    assert "destroy_process_group" not in done.stderr

    # One process with a batch twice as large makes the same step.
    cli.main(["measure", "--config", str(disk / "harp.yaml"), "--output_dir", str(tmp_path / "alone"),
              "--per_device_train_batch_size", str(2 * BATCH)])  # fmt: skip
    alone = load_result(tmp_path / "alone")
    assert result.measurements.leaves.tolist() == alone.measurements.leaves.tolist()
    np.testing.assert_allclose(result.measurements.scores, alone.measurements.scores, atol=1e-4)
    assert np.abs(result.measurements.scores - result.measurements.null).max() > 0.01, "they learned something"
    for leaf in result.measurements.leaves:
        shared, own = (np.load(run / "measurements" / f"{leaf}-42.npz") for run in (out, tmp_path / "alone"))
        assert shared["steps"] == 1
        assert shared["tokens_training"] == own["tokens_training"] == 2 * BATCH * ROW_TOKENS
        assert shared["rows"].tolist() == own["rows"].tolist()
        assert len(shared["rows"]) == 2 * BATCH
        np.testing.assert_allclose(shared["loss"], own["loss"], rtol=1e-3)
    manifests = [json.loads((run / "manifest.json").read_text())["settings"] for run in (out, tmp_path / "alone")]
    assert [manifest.get("world_size") for manifest in manifests] == [2, None], "another batch is another run"


def test_processes_decide_alike(disk, tmp_path, tiny_model):
    for name in ("pool.jsonl", "proxy.jsonl"):
        (tmp_path / name).write_bytes((disk / name).read_bytes())
    done = launch(LAUNCHED, tmp_path, tiny_model)
    assert done.returncode == 0, done.stderr
    main, other = (json.loads((tmp_path / f"seen-{rank}.json").read_text()) for rank in (0, 1))
    assert main.pop("failed") == "ZeroDivisionError: of one\nprocess"
    assert other.pop("failed") == "HarpError: The main process failed: of one process."
    assert main == other
    assert main["world_size"] == 2
    assert main["from_main"] == "said by the main one"
    assert main["mean"] == [2.0, "nan"]
    assert len(main["failed_leaves"]) == 1, "what is not a number on one process has failed on all"
    assert main["finetunes"] == 4, "three leaves and random rows"
    assert main["finetunes_again"] == 1
    assert main["same"]
    assert main["rows"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--leaf_size", "1"], "`leaf_size` must be a whole number of at least 2, but it is 1."),
        (["--dataset_name", "none.jsonl"], "The pool none.jsonl is not there."),
        (["--selector", "exhaustive"], "A baseline is made by one process: start it without a launcher."),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_what_cannot_be_used_ends_all_processes_with_one_sentence(disk, tmp_path, flags, message):
    done = launch("-m", "harp_hf.cli", "select", "--config", disk / "harp.yaml", "--output_dir", tmp_path, *flags)
    assert done.returncode == 1
    assert done.stdout == ""
    assert [line for line in done.stderr.splitlines() if "harp-hf" in line] == [f"harp-hf select: {message}"]


def test_processes_that_a_trainer_does_not_share_its_work_among_are_refused(monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    with pytest.raises(ConfigError, match="2 processes were launched, but a trainer shares its work among 1: on CPUs"):
        processes.join()
