"""The Python examples of the README run as they stand, and the tables of quality are those of the results."""

import importlib
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from conftest import make_rows
from datasets import Dataset, load_dataset

from harp_hf import cli
from harp_hf.finetune import LeafFinetuner

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
# The tiny model has random weights and learns nothing at the learning rate of a real one.
EXAMPLES = README.replace("1e-3", "3e-2")


class WordEmbedder:
    """Stands in for a sentence-transformers model: counts of hashed words."""

    def encode(self, texts, **_):
        vectors = np.zeros((len(texts), 32), np.float32)
        for vector, text in zip(vectors, texts, strict=True):
            for word in text.split():
                vector[sum(word.encode()) % 32] += 1
        return vectors


@pytest.fixture
def folder(tmp_path, monkeypatch, tiny_model):
    """A folder with the files that the README names, and the tiny model under the name it uses."""
    pool = make_rows("red", 300, 1) + make_rows("green", 300, 2) + make_rows("blue", 300, 3, wrong=True)
    proxy = [
        {"prompt": row["prompt"], "answer": row["completion"].strip(), "task": colour}
        for colour, seed in (("red", 11), ("green", 12))
        for row in make_rows(colour, 8, seed)
    ]
    Dataset.from_list(pool).to_json(tmp_path / "pool.jsonl")
    Dataset.from_list(proxy).to_json(tmp_path / "proxy.jsonl")
    (tmp_path / "HuggingFaceTB").mkdir()
    (tmp_path / "HuggingFaceTB" / "SmolLM2-135M-Instruct").symlink_to(tiny_model)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("harp_hf.features._load_embedder", lambda features: WordEmbedder())
    return tmp_path


@pytest.fixture
def made(monkeypatch):
    """Finetunes made."""
    finetunes, real = [], LeafFinetuner.finetune
    monkeypatch.setattr(LeafFinetuner, "finetune", lambda *given: (finetunes.append(given), real(*given))[1])
    return finetunes


def test_examples(folder, made, capsys):
    namespace = {}
    for block in re.findall(r"```python\n(.*?)```", EXAMPLES, flags=re.DOTALL):
        exec(compile(block, "README.md", "exec"), namespace)
    small, pool = namespace["small"], namespace["pool"]
    assert 0 < len(small) <= 1000
    assert small["prompt"][:] == pool.select(small["harp_row"])["prompt"][:]
    assert len(namespace["careful"]) <= 200
    assert namespace["again"].select()["harp_row"][:] == small["harp_row"][:]
    assert (folder / "small.jsonl").is_file()
    table = README[README.index("| column |") : README.index("The costly part")]
    columns = re.findall(r"`((?:phi|harp)_?[^`]*)`", table)
    for column in columns:
        expected = [column.replace("<task>", task) for task in ("red", "green")]
        assert set(expected) <= set(small.column_names)

    # The command line goes on with the run that Python made.
    measured = len(made)
    assert measured == len(namespace["result"].measurements.leaves) + 1
    block = next(b for b in re.findall(r"```bash\n(.*?)```", EXAMPLES, flags=re.DOTALL) if "harp-hf cut" in b)
    lines = [line.split("  #")[0] for line in block.replace("\\\n", " ").splitlines()]
    commands = [shlex.split(line)[1:] for line in lines if line.startswith("harp-hf")]
    assert [command[0] for command in commands] == ["select", "cut", "report", "push"]
    for command in commands[:3]:
        cli.main(command)
    assert len(made) == measured
    assert (folder / "runs" / "first" / "result" / "report.html").is_file()
    assert "predicts" in capsys.readouterr().out
    for variant in ("harp-c", "harp-e"):
        assert len(load_dataset(str(folder / "runs" / "first" / "result" / variant), split="train")) > 0


def test_the_tables_of_quality_are_those_of_the_results(monkeypatch):
    folder = Path(__file__).parent.parent / "recipes" / "benchmarks"
    monkeypatch.syspath_prepend(str(folder))
    tables, summary = importlib.import_module("quality_tables"), importlib.import_module("quality_summary")
    pools = [tables.Results.read(path) for path in sorted(folder.glob("results/quality_pool_*.json"))]
    scores, ahead, _ = summary.summary(pools).split("\n\n")
    told = (folder / "README.md").read_text(encoding="utf-8")
    assert f"\n\n{scores}\n\n" in told
    assert f"\n\n{ahead}\n\n" in told
    head, _, *lines = scores.splitlines()
    shown = README[README.index(head) :].split("\n\n")[0].splitlines()[2:]
    assert shown == [line for line in lines if line in shown], "README has some of the lines, in their order"
    assert all(any(f" {name} |" in line for line in shown) for name in ("random", "rds", "harp-c"))
