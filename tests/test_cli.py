"""The command line: flags and YAML in, a table on stdout and a folder that datasets loads out."""

import json
import shutil
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
import yaml
from datasets import Dataset, load_dataset

from harp_hf import cli, measure
from harp_hf.config import bf16_is_fast, lacks_accelerator
from harp_hf.evaluation.transformers import TransformersEvaluator
from harp_hf.finetune import LeafFinetuner
from harp_hf.models import load_kwargs
from harp_hf.saved import load_result
from harp_hf.settings import load_settings, read_settings

OURS = ["phi", "phi_red", "phi_sd_red", "phi_green", "phi_sd_green", "harp_leaf", "harp_parent", "harp_rank",
        "harp_measured", "harp_row"]  # fmt: skip
SETTINGS = {"features": "vector", "leaf_size": 12, "branching": 2, "max_measurements": 4, "max_steps": 8,
            "learning_rate": 3e-2, "use_cpu": True, "bf16": False}  # fmt: skip


@pytest.fixture(scope="module")
def disk(pool, proxy, features, tiny_model, tmp_path_factory):
    """A folder with a pool, a proxy set and a YAML config on disk."""
    folder = tmp_path_factory.mktemp("disk")
    pool.add_column("vector", features.tolist()).to_json(folder / "pool.jsonl")
    proxy.to_json(folder / "proxy.jsonl")
    names = {"dataset_name": str(folder / "pool.jsonl"), "eval_dataset_name": str(folder / "proxy.jsonl"),
             "model_name_or_path": tiny_model}  # fmt: skip
    (folder / "harp.yaml").write_text(yaml.safe_dump(names | SETTINGS))
    return folder


@pytest.fixture(scope="module")
def run(disk):
    """A finished `harp-hf select` in a process of its own."""
    out = disk / "run"
    command = [sys.executable, "-m", "harp_hf.cli", "select", "--config", disk / "harp.yaml", "--output_dir", out,
               "--variant", "harp-e", "--budget", "30"]  # fmt: skip
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return out, done


@pytest.fixture
def counted(monkeypatch):
    """Finetunes and evaluations made in this process."""
    made = Counter()

    def count(owner, name):
        real = getattr(owner, name)

        def counting(*args):
            made[name] += 1
            return real(*args)

        monkeypatch.setattr(owner, name, counting)

    count(LeafFinetuner, "finetune")
    count(TransformersEvaluator, "evaluate")
    return made


def fails(*argv):
    """Exit code and stderr of a command that ends in an error."""
    with pytest.raises(SystemExit) as caught:
        cli.main([str(a) for a in argv])
    return caught.value.code


def test_select_prints_the_table_and_writes_what_datasets_loads(run, disk):
    out, done = run
    result = load_result(out)
    loaded = load_dataset(str(out / "result" / "harp-e"), split="train")
    assert loaded.column_names == ["prompt", "completion", "vector", *OURS]
    assert loaded.to_list() == result.select().to_list()
    assert (result.choice.variant, result.choice.budget, len(loaded)) == ("harp-e", 30, 30)
    original = Dataset.from_json(str(disk / "pool.jsonl"))
    assert loaded.select_columns(original.column_names).to_list() == original.select(loaded["harp_row"][:]).to_list()
    assert done.stdout == f"{result.summary()}\nSelection written to {out / 'result' / 'harp-e'} (30 rows).\n", (
        "nothing else stands on stdout"
    )


def test_select_reports_progress_and_nothing_of_the_libraries_on_stderr(run):
    lines = [line for line in run[1].stderr.replace("\r", "\n").splitlines() if line.strip()]
    assert any("Measuring: 100%" in line and "5/5" in line for line in lines)
    bars = ("Measuring:", "Generating train split:")  # the latter by datasets, where it reads a file at first
    assert [line for line in lines if not line.startswith(bars)] == [
        "The proxy set has no features of its own, so similarity to it is not used.",
        "Measuring 4 of 9 leaves on 2 tasks.",
        "Tokenising the pool.",
    ]


def test_flags_win_over_yaml_and_reach_the_finetunes(disk, tmp_path, counted, capsys):
    cli.main(["measure", "--config", str(disk / "harp.yaml"), "--output_dir", str(tmp_path / "run"),
              "--learning_rate", "0.5e-2", "--lora_r", "3", "--lora_alpha", "5", "--max_measurements", "1",
              "--lora_target_modules", "q_proj", "v_proj", "--per_device_train_batch_size", "2",
              "--metric", "likelihood"])  # fmt: skip
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    settings, adapter = manifest["settings"], manifest["model"][1]
    assert (settings["learning_rate"], settings["per_device_train_batch_size"]) == (0.005, 2)
    assert (settings["max_steps"], settings["leaf_size"]) == (8, 12), "what no flag names is as in the YAML file"
    assert (adapter["r"], adapter["lora_alpha"], adapter["target_modules"]) == (3, 5, ["q_proj", "v_proj"])
    assert settings["metric"] == ["likelihood"] * 2
    assert counted == {"finetune": 2, "evaluate": 3}, "one leaf, random rows and the base model"
    assert "Selection written" not in capsys.readouterr().out
    assert not list((tmp_path / "run").rglob("*.parquet")), "measure leaves selecting to cut"


def test_the_adapter_is_ours_unless_flags_say_otherwise(run):
    adapter = json.loads((run[0] / "manifest.json").read_text())["model"][1]
    assert (adapter["r"], adapter["target_modules"]) == (16, "all-linear")


def test_tfidf_needs_no_vectors(disk, tmp_path, capsys):
    cli.main(["select", "--config", str(disk / "harp.yaml"), "--output_dir", str(tmp_path / "run"),
              "--features", "tfidf", "--max_measurements", "2", "--max_steps", "4", "--metric", "likelihood",
              "--active_tasks", "all"])  # fmt: skip
    assert f"Selection written to {tmp_path / 'run' / 'result' / 'harp-c'}" in capsys.readouterr().out
    assert np.load(tmp_path / "run" / "features.npy").shape[0] == 96


@pytest.mark.parametrize(
    ("flags", "asked"),
    [
        ([], {}),
        (["--variant", "harp-c"], {"variant": "harp-c"}),
        (["--budget", "7"], {"budget": 7}),
        (["--task_weights", '{"red": 0, "green": 2.5}'], {"task_weights": {"red": 0, "green": 2.5}}),
        (["--active_tasks", "green", "red", "--budget", "11"], {"active_tasks": ["green", "red"], "budget": 11}),
        (["--active_tasks", "all", "--variant", "harp-c"], {"active_tasks": "all", "variant": "harp-c"}),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_cut_selects_again_without_a_model(run, flags, asked, counted, monkeypatch, capsys):
    def never(*args, **kwargs):
        raise AssertionError("a model or tokenizer was loaded")

    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", never)
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", never)
    before = (run[0] / "result" / "result.json").read_bytes()
    cli.main(["cut", "--output_dir", str(run[0]), *flags])
    result = load_result(run[0])
    expected = result.choosing(**asked)
    folder = run[0] / "result" / expected.choice.variant
    selected = expected.select()
    loaded = load_dataset("parquet", data_files=str(folder / "train.parquet"), split="train")
    assert loaded.to_list() == selected.to_list()
    assert capsys.readouterr().out == (
        f"{expected.summary()}\nSelection written to {folder} ({len(selected)} rows).\n"
    )
    assert counted == {}
    assert (run[0] / "result" / "result.json").read_bytes() == before, "the run's own choice stays"


def test_the_config_that_a_run_writes_repeats_it(run, disk, tmp_path, counted, capsys):
    written = yaml.safe_load((run[0] / "config.yaml").read_text())
    expected = {
        "output_dir": str(run[0]), "dataset_name": str(disk / "pool.jsonl"), "variant": "harp-e", "budget": 30,
        "eval_dataset_name": str(disk / "proxy.jsonl"), **SETTINGS,
        "model_name_or_path": yaml.safe_load((disk / "harp.yaml").read_text())["model_name_or_path"],
    }  # fmt: skip
    if lacks_accelerator():  # then it is the default
        del expected["use_cpu"]
    if not bf16_is_fast(use_cpu=True):
        del expected["bf16"]
    assert written == expected
    before = load_result(run[0]).select().to_list()
    cli.main(["select", "--config", str(run[0] / "config.yaml")])
    assert counted == {}, "in the same directory everything is there already"
    assert yaml.safe_load((run[0] / "config.yaml").read_text()) == written
    cli.main(["select", "--config", str(run[0] / "config.yaml"), "--output_dir", str(tmp_path / "other")])
    assert counted["finetune"] == 5
    assert load_result(tmp_path / "other").select().to_list() == before
    manifests = [json.loads((folder / "manifest.json").read_text()) for folder in (run[0], tmp_path / "other")]
    assert manifests[0] == manifests[1]


def test_a_second_start_that_is_stopped_leaves_the_result_and_its_names(run, disk, tmp_path, monkeypatch, capsys):
    shutil.copytree(run[0], tmp_path / "run")
    before = (tmp_path / "run" / "config.yaml").read_bytes()
    again = ["select", "--config", str(tmp_path / "run" / "config.yaml"), "--output_dir", str(tmp_path / "run"),
             "--max_measurements", "5", "--prior", "nested"]  # fmt: skip

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(LeafFinetuner, "finetune", stop)
        with pytest.raises(SystemExit):
            cli.main(again)
    assert (tmp_path / "run" / "config.yaml").read_bytes() == before
    cli.main(["cut", "--output_dir", str(tmp_path / "run")])
    cli.main(again)
    written = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert (written["max_measurements"], written["prior"]) == (5, "nested")


def test_names_of_an_earlier_start_are_kept_for_objects(run, disk, tmp_path, capsys):
    shutil.copytree(run[0], tmp_path / "run")
    written = yaml.safe_load((run[0] / "config.yaml").read_text())
    args, peft_config = load_settings(run[0] / "config.yaml", output_dir=str(tmp_path / "run"))
    names = (written[name] for name in ("dataset_name", "eval_dataset_name"))
    measure(*map(Dataset.from_json, names), written["model_name_or_path"], args, peft_config)
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text()) == (
        written | {"output_dir": str(tmp_path / "run")}
    )
    assert load_result(tmp_path / "run").digest == load_result(run[0]).digest


def test_a_dtype_that_is_asked_for_is_written_down(disk, tmp_path, counted, capsys):
    flags = ["--max_measurements", "1", "--output_dir", str(tmp_path / "run"), "--bf16", "true", "--dtype", "float32"]
    cli.main(["measure", "--config", str(disk / "harp.yaml"), *flags])
    before = dict(counted)
    written = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert load_kwargs(read_settings(written)[0])["dtype"] == "float32", "it would follow bf16"
    cli.main(["measure", "--config", str(tmp_path / "run" / "config.yaml")])
    assert counted == before


@pytest.mark.parametrize("command", ["select", "measure"])
def test_help_lists_our_flags_and_those_of_trl(command, capsys):
    assert fails(command, "--help") == 0
    text = capsys.readouterr().out
    for flag in ("--leaf_size", "--budget", "--variant", "--null_scores", "--learning_rate", "--max_length",
                 "--completion_only_loss", "--lora_r", "--model_name_or_path", "--dataset_name",
                 "--eval_dataset_name", "--load_in_4bit"):  # fmt: skip
        assert flag in text
    assert "Rows a leaf aims at" in text
    assert text.startswith(f"usage: harp-hf {command}")


def test_help_of_cut_and_of_the_whole_command(capsys):
    assert fails("cut", "--help") == 0
    text = capsys.readouterr().out
    assert all(flag in text for flag in ("--output_dir", "--variant", "--budget", "--task_weights", "--active_tasks"))
    assert "--learning_rate" not in text
    assert fails("--help") == 0
    text = capsys.readouterr().out
    assert all(f"  {command} " in text for command in ("select", "measure", "cut"))


def test_a_command_that_is_not_one_is_named():
    assert fails("chose").startswith("'chose' is not a command.\nusage: harp-hf COMMAND")
    assert fails().startswith("usage: harp-hf COMMAND")


def line(*argv):
    """The one line with which a command fails."""
    message = fails(*argv)
    assert isinstance(message, str), "a message ends the process with exit code 1"
    assert "\n" not in message
    return message


@pytest.mark.parametrize("name", ["dataset_name", "eval_dataset_name", "model_name_or_path"])
def test_a_flag_that_is_needed_is_named(disk, tmp_path, name):
    config = yaml.safe_load((disk / "harp.yaml").read_text())
    del config[name]
    (tmp_path / "harp.yaml").write_text(yaml.safe_dump(config))
    assert line("select", "--config", tmp_path / "harp.yaml") == f"harp-hf select: --{name} is needed."


def test_cut_needs_a_finished_run(tmp_path, capsys):
    assert "is not there" in line("cut", "--output_dir", tmp_path / "nowhere")
    assert "holds no finished run" in line("cut", "--output_dir", tmp_path)
    assert list(tmp_path.iterdir()) == [], "and leaves nothing behind"
    assert "required: --output_dir" in line("cut")


@pytest.mark.parametrize(
    ("text", "message"),
    [("leaf_sise: 12\n", "leaf_sise"), ("leaf_size: [\n", "harp.yaml"), ("- a\n- b\n", "harp.yaml"),
     ("leaf_size: twelve\n", "leaf_size")],
    ids=["unknown key", "not YAML", "a list", "not a number"],
)  # fmt: skip
@pytest.mark.parametrize("command", ["select", "cut"])
def test_a_wrong_config_file_is_one_line(tmp_path, text, message, command):
    (tmp_path / "harp.yaml").write_text(text)
    assert message in line(command, "--config", tmp_path / "harp.yaml", "--output_dir", tmp_path / "run")


def test_a_config_file_that_is_not_there_is_one_line(tmp_path):
    assert "none.yaml" in line("select", "--config", tmp_path / "none.yaml")
    assert "--config needs the path" in line("select", "--config")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--leaf_size", "1"], "`leaf_size` must be a whole number of at least 2, but it is 1."),
        (["--task_weights", '{"blue": 1}'], "names the task 'blue', which is not in the proxy set"),
        (["--task_weights", "red=1"], "`task_weights` must be a dict or a JSON object, but it is 'red=1'."),
        (["--active_tasks", "blue"], "names the task 'blue', which is not in the proxy set"),
        (["--dataset_name", "nowhere/pool.jsonl"], "The pool nowhere/pool.jsonl"),
        (["--use_peft", "false"], "--use_peft cannot be switched off"),
        (["--leaf_sise", "12"], "leaf_sise"),
        (["--variant", "harp"], "harp-c"),
        (["--dataset_streaming", "true"], "--dataset_streaming cannot be used"),
        (["--learning_rate", "1"], "was made with learning_rate=0.03, not 1.0"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)  # fmt: skip
def test_what_cannot_be_used_is_one_line(run, disk, flags, message):
    said = line("select", "--config", disk / "harp.yaml", "--output_dir", run[0], *flags)
    assert said.startswith("harp-hf select: ")
    assert message in said


@pytest.mark.launch
def test_an_error_is_exit_code_one_and_one_line_on_stderr(run):
    command = [sys.executable, "-m", "harp_hf.cli", "cut", "--output_dir", str(run[0]), "--budget", "0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1
    assert done.stderr == "harp-hf cut: `budget` must be a whole number of at least 1, but it is 0.\n"
    assert done.stdout == ""
