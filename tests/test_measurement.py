"""The benchmark of one measurement on the tiny model: resumable, and all ways do the same work."""

import importlib
import json
from pathlib import Path

import pytest
import yaml

from harp_hf.errors import ConfigError, DataError


@pytest.fixture
def measurement(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "recipes" / "benchmarks"))
    return importlib.import_module("measurement")


@pytest.fixture
def flags(pool, proxy, tiny_model, tmp_path):
    """Flags of a benchmark on the right rows of the pool."""
    pool.select(range(48)).to_parquet(tmp_path / "pool.parquet")
    proxy.to_parquet(tmp_path / "proxy.parquet")
    settings = {"max_steps": 12, "learning_rate": 3e-2, "max_length": 64, "use_cpu": True, "bf16": False,
                "padding_free": True, "max_new_tokens": 8, "lora_dropout": 0.0}  # fmt: skip
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
    return {"--pool": tmp_path / "pool.parquet", "--proxy": tmp_path / "proxy.parquet", "--model": tiny_model,
            "--config": tmp_path / "config.yaml", "--rows": 32, "--results": tmp_path / "m.json"}  # fmt: skip


def run(measurement, flags, **changes):
    both = flags | {f"--{name}": value for name, value in changes.items()}
    measurement.main([str(part) for pair in both.items() for part in pair])


def test_ways_do_the_same_work_and_no_measurement_is_made_twice(measurement, flags, tmp_path, capsys, monkeypatch):
    run(measurement, flags, repeats=1)
    first = json.loads((tmp_path / "m.json").read_text())["measurements"]
    run(measurement, flags, repeats=2)
    text = (tmp_path / "m.json").read_text()
    known = json.loads(text)
    assert str(tmp_path) not in text, "results tell nothing of the machine"
    assert [one["way"] for one in known["measurements"]] == ["plain", "harp_hf", "bare"] * 2
    assert known["measurements"][:3] == first
    plain, harp, bare = first
    assert bare["loss"] == pytest.approx(harp["loss"], rel=1e-3)
    assert plain["loss"] == pytest.approx(harp["loss"], rel=0.2)
    assert harp["exact_match"] > 0.5
    assert bare["exact_match"] == harp["exact_match"]
    assert plain["exact_match"] == pytest.approx(harp["exact_match"], abs=0.25)
    assert bare["tokens"]["training"] == harp["tokens"]["training"] == plain["tokens"]["training"]
    assert plain["seconds"]["preparing"] > 0 == harp["seconds"]["preparing"]
    monkeypatch.setattr(measurement, "Benchmark", None)
    run(measurement, flags, repeats=2)
    assert (tmp_path / "m.json").read_text() == text
    assert capsys.readouterr().out.count("| bare | 2 |") == 2
    with pytest.raises(DataError, match="made with another rows: use another --results"):
        run(measurement, flags, rows=31)
    with pytest.raises(DataError, match="has 48 rows, fewer than --rows 49"):
        run(measurement, flags, rows=49)


def test_the_bare_loop_takes_padded_batches_too(measurement, flags, tmp_path):
    settings = yaml.safe_load(flags["--config"].read_text()) | {"padding_free": False, "max_steps": 6}
    flags["--config"].write_text(yaml.safe_dump(settings))
    run(measurement, flags, repeats=1)
    _, harp, bare = json.loads((tmp_path / "m.json").read_text())["measurements"]
    assert bare["loss"] == pytest.approx(harp["loss"], rel=1e-3)
    assert bare["tokens"]["training"] == harp["tokens"]["training"]
    flags["--config"].write_text(yaml.safe_dump(settings | {"gradient_accumulation_steps": 2}))
    with pytest.raises(ConfigError, match="one batch a step"):
        run(measurement, flags)


def test_goals_are_judged_by_ratios_of_medians(measurement):
    def one(way, repeat, seconds):
        phases = {"preparing": 0.0, "finetuning": seconds / 2, "evaluating": seconds / 2}
        return {"way": way, "repeat": repeat, "seconds": phases, "processor": phases, "loss": 1.0, "exact_match": 0.5,
                "tokens": {"training": 1000, "evaluation": 10}}  # fmt: skip

    took = {"plain": (9, 50, 10), "harp_hf": (2, 2, 4), "bare": (1, 1.7, 9)}
    found = [one(way, k, seconds) for way, all_ in took.items() for k, seconds in enumerate(all_)]
    table = measurement.markdown({"once": {}, "measurements": found})
    assert "| plain | 3 | 0.00 | 5.00 | 5.00 | 10.00 (9.00 to 50.00) |" in table
    assert "4x the speed of `plain`: met, 5.00x (2.50 to 25.00) by the clock" in table
    assert "0.9x the speed of `bare`: not met, 0.85x (0.50 to 2.25) by the clock" in table
    table = measurement.markdown({"once": {}, "measurements": found[:6]})
    assert "0.9x the speed of `bare`: not measured." in table
