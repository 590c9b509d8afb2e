"""The recipes and the README's way from a pool to a finetuned model, run as they stand against a Hub on loopback.

The models that they name are tiny ones here, in folders of those names.
"""

import ast
import io
import math
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from conftest import make_rows
from datasets import Dataset
from hub_server import File, Hub
from safetensors.numpy import load_file

ROOT = Path(__file__).parent.parent
RECIPES = ROOT / "recipes"
README = (ROOT / "README.md").read_text(encoding="utf-8")
TULU = (RECIPES / "tulu_mmlu" / "README.md").read_text(encoding="utf-8")
TOKEN = "hf_writerwriterwriterwriter"
# The tiny model has random weights and learns nothing at the learning rate of a real one.
FASTER = {"--learning_rate 1e-3": "--learning_rate 3e-2"}


def bash_blocks(text):
    return re.findall(r"```bash\n(.*?)```", text, flags=re.DOTALL)


def parquet(rows):
    buffer = io.BytesIO()
    Dataset.from_list(rows).to_parquet(buffer)
    return File(buffer.getvalue(), True)


@pytest.fixture(scope="module")
def hub():
    """A Hub with a small Tulu and a small MMLU, whose columns are those of the real ones."""
    with Hub() as hub:
        hub.tokens[TOKEN] = ("me", "write")
        talks = [
            {"id": f"{letter}-{i}", "source": "made",
             "messages": [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": letter}]}
            for letter, colour, seed in (("A", "red", 1), ("B", "green", 2))
            for i, row in enumerate(make_rows(colour, 48, seed))
        ]  # fmt: skip
        tulu = hub.create("allenai/tulu-3-sft-mixture", card="---\nlicense: odc-by\n---\n# Tulu\n")
        tulu.commit("main", tulu.files() | {"data/train-00000-of-00001.parquet": parquet(talks)}, "data")
        questions = [
            {"question": f"say the {subject} w{i} ?", "subject": subject, "choices": [f"w{i + k}" for k in range(4)],
             "answer": answer}
            for subject, answer in (("red_things", 0), ("green_things", 1)) for i in range(8)
        ]  # fmt: skip
        splits = {"dev": questions[::2], "validation": questions[1::2], "test": questions}
        card = {"configs": [{"config_name": "all", "data_files": [
            {"split": split, "path": f"all/{split}-*"} for split in splits
        ]}]}  # fmt: skip
        mmlu = hub.create("cais/mmlu", card=f"---\n{yaml.safe_dump(card)}---\n# MMLU\n")
        files = {f"all/{split}-00000-of-00001.parquet": parquet(rows) for split, rows in splits.items()}
        mmlu.commit("main", mmlu.files() | files, "data")
        yield hub


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_model):
    """A folder with a pool, a proxy set, the recipes, and the tiny model under the names that they use."""
    folder = tmp_path_factory.mktemp("recipes")
    pool = make_rows("red", 60, 1) + make_rows("green", 60, 2) + make_rows("blue", 60, 3, wrong=True)
    proxy = [
        {"prompt": row["prompt"], "answer": row["completion"].strip(), "task": colour}
        for colour, seed in (("red", 11), ("green", 12))
        for row in make_rows(colour, 8, seed)
    ]
    Dataset.from_list(pool).to_json(folder / "pool.jsonl")
    Dataset.from_list(proxy).to_json(folder / "proxy.jsonl")
    (folder / "recipes").symlink_to(RECIPES)
    for name in ("HuggingFaceTB/SmolLM2-135M-Instruct", "Qwen/Qwen3-8B-Base",
                 "sentence-transformers/all-MiniLM-L6-v2"):  # fmt: skip
        (folder / name).mkdir(parents=True)
        for file in Path(tiny_model).iterdir():
            # Four of its words become the letters of the choices.
            content = file.read_bytes()
            for word, letter in zip((b"w36", b"w37", b"w38", b"w39"), (b"A", b"B", b"C", b"D"), strict=True):
                content = content.replace(b'"%s"' % word, b'"%s"' % letter) if file.suffix == ".json" else content
            (folder / name / file.name).write_bytes(content)
    return folder


@pytest.fixture(scope="module")
def shell(hub, folder):
    """Runs commands as a logged-in user would; gives what they wrote on stdout, and their stderr after it."""
    settings = {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", "HF_ENDPOINT": hub.url,
        "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(folder / "home"), "HF_TOKEN": TOKEN,
        "HF_HUB_DISABLE_TELEMETRY": "1", "OMP_NUM_THREADS": "1", "COLUMNS": "200",
    }  # fmt: skip

    def run(commands):
        done = subprocess.run(
            ["bash", "-euc", commands],
            cwd=folder,
            env=os.environ | settings,
            capture_output=True,
            text=True,
            timeout=900,
        )
        assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-5000:]}"
        return done.stdout + done.stderr

    return run


@pytest.fixture(scope="module")
def walked(shell):
    """What the README's way from a pool to a finetuned model wrote, every line of it but installing and logging in."""
    block = next(block for block in bash_blocks(README) if "trl sft --config" in block)
    lines = block.splitlines()
    assert len(lines) < 20
    assert [line.split()[0] for line in lines[:2]] == ["pip", "hf"]
    way = "\n".join(lines[2:])
    for slow, quick in FASTER.items():
        assert slow in way
        way = way.replace(slow, quick)
    return shell(way)


def adapter_learned(folder):
    weights = load_file(folder / "adapter_model.safetensors")
    assert all(np.isfinite(weight).all() for weight in weights.values())
    return any(np.abs(weight).max() > 0 for name, weight in weights.items() if "lora_B" in name)


def train_loss(output):
    """The mean loss that `trl sft` reports at the end."""
    return float(re.findall(r"'train_loss': '?([-\w.]+)", output)[-1])


@pytest.mark.launch
def test_readme_leads_from_a_pool_to_a_finetuned_model(walked, folder, hub):
    assert hub.repos["me/my-selection"].private
    assert f"Selection pushed to {hub.url}/datasets/me/my-selection." in walked
    assert any(request.startswith("GET /datasets/me/my-selection/resolve") for request in hub.requests)
    assert math.isfinite(train_loss(walked))
    assert adapter_learned(folder / "runs" / "finetuned")


@pytest.mark.launch
def test_trl_sft_takes_a_selection_from_disk(walked, folder, shell):
    output = shell("trl sft --config recipes/sft_on_selection.yaml --dataset_name runs/path/result/harp-c "
                   "--output_dir runs/from_disk --num_train_epochs 1")  # fmt: skip
    assert math.isfinite(train_loss(output))
    assert adapter_learned(folder / "runs" / "from_disk")


@pytest.mark.launch
@pytest.mark.parametrize("source", ["me/my-selection", "runs/path/result/harp-c"])
def test_sft_on_selection_script_trains_on_the_selection(walked, folder, shell, source):
    out, rows = f"runs/script/{source}", len(pq.read_table(folder / "runs/path/result/harp-c/train.parquet"))
    command = "python recipes/sft_on_selection.py --config recipes/sft_on_selection.yaml --num_train_epochs 1"
    output = shell(f"{command} --dataset_name {source} --output_dir {out}")
    assert f"Finetuning HuggingFaceTB/SmolLM2-135M-Instruct on {rows} rows of {source}." in output
    assert re.search(rf"Adapter written to {out}; mean loss \d+\.\d+\.", output)
    assert adapter_learned(folder / out)


@pytest.mark.launch
def test_quickstart_on_own_files(folder, shell):
    output = shell("python recipes/quickstart.py --pool pool.jsonl --proxy proxy.jsonl --features tfidf "
                   "--model HuggingFaceTB/SmolLM2-135M-Instruct --leaf_size 20 --budget 30")  # fmt: skip
    written = Dataset.from_json(str(folder / "runs" / "quickstart" / "chosen.jsonl"))
    assert 0 < len(written) <= 30
    assert f"{len(written)} rows written to runs/quickstart/chosen.jsonl; the first:" in output
    assert "predicts" in output


@pytest.mark.smollm
def test_quickstart_as_it_stands(tmp_path):
    done = subprocess.run(
        [sys.executable, RECIPES / "quickstart.py"], cwd=tmp_path, capture_output=True, text=True, timeout=1800
    )
    assert done.returncode == 0, done.stderr[-3000:]
    skills = ast.literal_eval(done.stdout.split("By skill: ")[1])
    wanted = skills.get("plural", 0) + skills.get("date", 0)
    assert wanted > 0.8 * sum(skills.values()), "not the wrong answers, nor what nobody asked for"


@pytest.mark.launch
def test_real_sized_recipe_with_a_tiny_model(folder, shell, hub):
    block, _ = bash_blocks(TULU)
    small = ("--leaf_size 12 --branching 2 --max_measurements 6 --max_steps 8 --gradient_accumulation_steps 1 "
             "--learning_rate 3e-2 --active_tasks all --use_cpu")  # fmt: skip
    select = "harp-hf select --config recipes/tulu_mmlu/harp.yaml"
    assert select in block
    output = shell(block.replace(select, f"{select} {small}").replace("--bf16 true", ""))
    assert "16 rows of 2 tasks written to runs/mmlu/proxy.jsonl." in output
    assert (folder / "runs" / "tulu_mmlu" / "result" / "report.html").is_file()
    assert "me/tulu-3-for-mmlu" in hub.repos
    assert math.isfinite(train_loss(output))
    assert adapter_learned(folder / "runs" / "tulu_mmlu_sft")
    proxy = Dataset.from_json(str(folder / "runs" / "mmlu" / "proxy.jsonl"))
    assert proxy[0] == {
        "prompt": "The following is a multiple choice question about red things.\n\n"
        "say the red_things w0 ?\nA. w0\nB. w1\nC. w2\nD. w3\nAnswer:",
        "answer": "A", "choices": ["A", "B", "C", "D"], "task": "red_things",
    }  # fmt: skip


@pytest.mark.launch
def test_real_sized_recipe_says_how_many_finetunes_it_makes():
    from harp_hf.design import choose_leaves
    from harp_hf.hierarchy import build_hierarchy

    settings = yaml.safe_load((RECIPES / "tulu_mmlu" / "harp.yaml").read_text())
    random, rows = np.random.default_rng(0), 939_343
    centres = random.standard_normal((300, 16)).astype(np.float32)
    features = centres[random.integers(0, 300, rows)] + 0.6 * random.standard_normal((rows, 16)).astype(np.float32)
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    made = build_hierarchy(features, leaf_size=settings["leaf_size"], branching=settings["branching"], seed=0)
    parents, finetunes = len(made.large), len(choose_leaves(made))
    # k-means may differ a little between machines and versions.
    said = re.search(r"(\d+) leaves, (\d+) parents and \*\*(\d+) finetunes", TULU).groups()
    np.testing.assert_allclose([made.n_leaves, parents, finetunes], [int(number) for number in said], rtol=0.05)


@pytest.mark.parametrize(
    ("name", "kind", "processes"),
    [("single_gpu", "NO", 1), ("multi_gpu", "MULTI_GPU", 8), ("fsdp2", "FSDP", 8), ("zero3", "DEEPSPEED", 8),
     ("cpu_2", "MULTI_GPU", 2)],
)  # fmt: skip
def test_accelerate_configs_are_such(name, kind, processes):
    config = load_config_from_file(str(RECIPES / "accelerate" / f"{name}.yaml"))
    assert (config.distributed_type.value, config.num_processes) == (kind, processes)
    assert config.use_cpu == (name == "cpu_2")


def test_no_recipe_is_left_out():
    for path in RECIPES.iterdir():
        assert f"`{path.name}" in README or path.name == "benchmarks"


def test_sharded_adapters_can_be_gathered():
    fsdp, zero = (yaml.safe_load((RECIPES / "accelerate" / f"{name}.yaml").read_text()) for name in ("fsdp2", "zero3"))
    assert fsdp["fsdp_config"]["fsdp_state_dict_type"] == "FULL_STATE_DICT"
    assert zero["deepspeed_config"]["zero3_save_16bit_model"]


def test_the_script_loads_rows_and_model_as_it_is_told(monkeypatch, capsys):
    told = {}

    class Trainer:
        def __init__(self, model, args, train_dataset, peft_config):
            told.update(args.model_init_kwargs)
            sys.exit(0)

    monkeypatch.setattr("trl.SFTTrainer", Trainer)
    monkeypatch.setattr("datasets.load_dataset", lambda _, **more: told.update(more))
    flags = ("--config recipes/sft_on_selection.yaml --dataset_name me/rows --dataset_config small --dtype bfloat16 "
             "--attn_implementation eager --model_revision v1 --load_in_8bit true")  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["sft_on_selection.py", *flags.split()])
    monkeypatch.chdir(RECIPES.parent)
    with pytest.raises(SystemExit):
        runpy.run_path(str(RECIPES / "sft_on_selection.py"), run_name="__main__")
    assert (told["name"], told["revision"], told["attn_implementation"]) == ("small", "v1", "eager")
    assert told["dtype"] == "bfloat16"
    assert told["quantization_config"].load_in_8bit
