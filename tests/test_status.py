"""What a run tells while it goes on and afterwards: the event log, and `harp-hf status`."""

import json
import os
import re
import shutil
import threading
from datetime import datetime, timezone

import pytest
from peft import LoraConfig

import harp_hf
from harp_hf import cli, events
from harp_hf.errors import RunDirError
from harp_hf.finetune import LeafFinetuner
from harp_hf.rundir import RunDir
from harp_hf.status import read_status

SECRET = "hf_" + "x" * 30
SETTINGS = {"max_steps": 2, "max_measurements": 3, "metric": "likelihood"}
ADAPTER = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
_whole = {}


@pytest.fixture
def measure(pool, proxy, features, config, tiny_model):
    def call(**changes):
        args = config(**(SETTINGS | changes))
        return harp_hf.measure(pool, proxy, tiny_model, args, ADAPTER, features=features)

    return call


@pytest.fixture
def whole(measure, tmp_path, tmp_path_factory):
    """A finished run in `tmp_path`, really measured once, and its result."""
    if not _whole:
        _whole["result"] = measure()
        _whole["run"] = shutil.copytree(tmp_path / "run", tmp_path_factory.mktemp("whole") / "run")
    shutil.copytree(_whole["run"], tmp_path / "run", dirs_exist_ok=True)
    return _whole["result"]


def status(folder, capsys):
    """What `harp-hf status` prints, by topic."""
    cli.main(["status", str(folder)])
    lines = capsys.readouterr().out.splitlines()
    return dict(line.split(": ", 1) for line in lines)


def test_the_events_of_a_run(whole, tmp_path):
    measured = whole.measurements
    log = events.read(tmp_path / "run")
    told = [event["event"] for event in log]
    assert told == ["started", *["stage", "stage done"] * 2, "stage", "base", "planned", *["leaf"] * 3, "stage done",
                    "stage", "stage done", "finished"]  # fmt: skip
    assert log[0]["pid"] == os.getpid()
    assert [event["stage"] for event in log if event["event"] == "stage"] == [
        "features", "hierarchy", "measurements", "inference"
    ]  # fmt: skip
    leaves = [event for event in log if event["event"] == "leaf"]
    assert [event["leaf"] for event in leaves] == measured.leaves.tolist()
    assert {event["seed"] for event in leaves} == {42}
    for kind in ("training", "evaluation"):
        null = log[told.index("base")].get(f"tokens_{kind}", 0)
        assert sum(event[f"tokens_{kind}"] for event in leaves) + null == measured.cost[f"tokens_{kind}"] > 0
        null = log[told.index("base")].get(f"seconds_{kind}", 0)
        total = sum(event[f"seconds_{kind}"] for event in leaves) + null
        assert total == pytest.approx(measured.cost[f"seconds_{kind}"], abs=0.01)
    assert all(event["memory_mb"] > 100 for event in log)
    assert sorted(event["elapsed"] for event in log) == [event["elapsed"] for event in log]
    times = [datetime.fromisoformat(event["time"]) for event in log]
    assert all(time.utcoffset().total_seconds() == 0 for time in times)
    assert 0 <= (datetime.now(timezone.utc) - times[-1]).total_seconds() < 600


def test_a_second_start_adds_to_the_log_and_measures_nothing(measure, whole, tmp_path):
    first = (tmp_path / "run" / events.FILE).read_bytes()
    measure()
    both = (tmp_path / "run" / events.FILE).read_bytes()
    assert both.startswith(first)
    log = events.read(tmp_path / "run")[first.count(b"\n") :]
    [plan] = [event for event in log if event["event"] == "planned"]
    assert (plan["leaves"], plan["measured"]) == (3, 3)
    assert not [event for event in log if event["event"] in ("leaf", "base")]


def test_a_run_that_is_refused_tells_nothing(measure, whole, tmp_path):
    before = (tmp_path / "run" / events.FILE).read_bytes()
    with pytest.raises(RunDirError, match="was made with learning_rate"):
        measure(learning_rate=0.5)
    assert (tmp_path / "run" / events.FILE).read_bytes() == before


def test_no_token_is_in_what_a_run_writes(measure, tmp_path, monkeypatch):
    def leak(self, rows, seed, adapter):
        raise OSError(f"https://user:{SECRET}@host refused")

    monkeypatch.setenv("HF_TOKEN", SECRET)
    with monkeypatch.context() as patch:
        patch.setattr(LeafFinetuner, "finetune", leak)
        with pytest.raises(OSError, match="refused"):
            measure(hub_token=SECRET)
    measure(hub_token=SECRET)
    assert [e["reason"] for e in events.read(tmp_path / "run") if e["event"] == "stopped"] == ["OSError"]
    for path in (tmp_path / "run").rglob("*"):
        assert path.is_dir() or SECRET.encode() not in path.read_bytes(), path


def test_half_written_lines_are_left_out_and_harm_no_other(tmp_path):
    events.append(tmp_path, {"event": "one"})
    with (tmp_path / events.FILE).open("ab") as log:
        log.write(b'{"event": "tw')
    assert [event["event"] for event in events.read(tmp_path)] == ["one"]
    events.append(tmp_path, {"event": "three"})
    with (tmp_path / events.FILE).open("ab") as log:
        log.write(b'\xff\xfe\n[]\n{"no": "event"}\n')
    events.append(tmp_path, {"event": "four"})
    assert [event["event"] for event in events.read(tmp_path)] == ["one", "three", "four"]


def test_a_line_is_one_write_at_the_end(tmp_path, monkeypatch):
    events.append(tmp_path, {"event": "first"})
    written, write = [], os.write

    def other_first(handle, line):
        with (tmp_path / events.FILE).open("ab") as log:  # another process is quicker
            log.write(b'{"event": "other"}\n')
        written.append(line)
        return write(handle, line)

    monkeypatch.setattr(os, "write", other_first)
    events.append(tmp_path, {"event": "second"})
    assert len(written) == 1
    assert [event["event"] for event in events.read(tmp_path)] == ["first", "other", "second"]


# status


def test_the_status_of_a_finished_run(whole, tmp_path, capsys):
    told = status(tmp_path / "run", capsys)
    cost = whole.measurements.cost
    assert told[str(tmp_path / "run")] == "finished"
    assert told["progress"] == "3 of 3 measurements made"
    assert re.fullmatch(r"\d+\.\d s a measurement", told["time"])
    assert told["tokens"] == f"{cost['tokens_training']:,.0f} trained on, {cost['tokens_evaluation']:,.0f} evaluated"
    assert re.fullmatch(r"[\d,]+ MB at most", told["memory"])
    assert re.fullmatch(r"finished at \d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}\+00:00", told["last event"])


def test_the_status_of_a_running_run(measure, tmp_path, monkeypatch, capsys):
    finetune, told = LeafFinetuner.finetune, []

    def look(self, rows, seed, adapter):
        told.append(status(tmp_path / "run", capsys))
        return finetune(self, rows, seed, adapter)

    monkeypatch.setattr(LeafFinetuner, "finetune", look)
    measure()
    assert [look["progress"] for look in told] == [f"{n} of 3 measurements made" for n in range(3)]
    assert all(look[str(tmp_path / "run")].startswith(f"running (process {os.getpid()} on ") for look in told)
    assert {look["stage"] for look in told} == {"measurements"}
    assert "time" not in told[0]
    assert re.fullmatch(r"\d+\.\d s a measurement, about 0:00:\d\d left for 2", told[1]["time"])
    assert told[2]["last event"].startswith("leaf at ")


def test_the_status_of_a_finished_run_that_another_process_is_in(whole, tmp_path):
    with RunDir(tmp_path / "run").locked():
        (tmp_path / "run" / ".owner").write_text("process 7 on host")
        told = read_status(tmp_path / "run").summary()
    assert told.startswith(f"{tmp_path / 'run'}: finished, and in use by process 7 on host\n")


def test_a_lock_of_another_user_is_one_sentence(whole, tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("harp_hf.rundir.FileLock.__enter__", refuse)
    with pytest.raises(RunDirError, match=r"\.lock cannot be opened: Permission denied\.$"):
        read_status(tmp_path / "run")


def test_looking_keeps_no_run_out(tmp_path):
    run, looking = RunDir(tmp_path), threading.Event()

    def look():
        while not looking.is_set():
            run.is_locked()

    with run.locked():
        pass
    threads = [threading.Thread(target=look) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(20):
            with run.locked():
                assert run.is_locked()
    finally:
        looking.set()
        for thread in threads:
            thread.join()


def test_the_status_of_a_stopped_run_with_a_failed_leaf(measure, tmp_path, monkeypatch, capsys):
    from harp_hf.errors import FinetuneError

    finetune, calls = LeafFinetuner.finetune, []

    def fail(self, rows, seed, adapter):
        calls.append(rows)
        if len(calls) == 2:
            raise FinetuneError("too short")
        if len(calls) == 3:
            raise KeyboardInterrupt
        return finetune(self, rows, seed, adapter)

    with monkeypatch.context() as patch:
        patch.setattr(LeafFinetuner, "finetune", fail)
        with pytest.raises(KeyboardInterrupt):
            measure()
    told = status(tmp_path / "run", capsys)
    assert told[str(tmp_path / "run")] == "stopped (KeyboardInterrupt); the same command continues it"
    assert told["progress"] == "2 of 3 measurements made"
    [failed] = [event for event in events.read(tmp_path / "run") if "reason" in event and event["event"] == "leaf"]
    assert told[f"  leaf {failed['leaf']}, seed 42, failed"] == "too short"
    measure()
    told = status(tmp_path / "run", capsys)
    assert told[str(tmp_path / "run")] == "finished"
    assert told[f"  leaf {failed['leaf']}, seed 42, failed"] == "too short", "also when it failed in an earlier start"


def test_a_run_that_could_not_say_goodbye_was_killed(whole, tmp_path, capsys):
    log = tmp_path / "run" / events.FILE
    lines = log.read_text().splitlines(keepends=True)
    log.write_text("".join(lines[:-5]) + lines[-5][:20])
    told = status(tmp_path / "run", capsys)
    assert told[str(tmp_path / "run")] == "stopped (killed); the same command continues it"
    assert told["progress"] == "2 of 3 measurements made"


def test_a_clock_that_jumps_does_not_confuse_the_remaining_time(tmp_path, capsys):
    run = RunDir(tmp_path)
    times = {"seconds_training": 8, "seconds_evaluation": 2, "tokens_training": 5, "tokens_evaluation": 5}
    lines = [
        {"event": "started", "pid": 1, "host": "h", "elapsed": 0},
        {"event": "planned", "leaves": 12, "measured": 4, "elapsed": 100},
        {"event": "leaf", "leaf": 1, "seed": 1, "elapsed": 105, **times},  # two at once
        {"event": "leaf", "leaf": 2, "seed": 1, "elapsed": 110, **times},
    ]
    days = ["2020-01-01", "1999-01-01", "2050-01-01", "1971-01-01"]
    text = [json.dumps({"time": f"{day}T00:00:00+00:00"} | line) + "\n" for day, line in zip(days, lines, strict=True)]
    run.file(events.FILE).write_text("".join(text))
    told = status(tmp_path, capsys)
    assert told["progress"] == "6 of 12 measurements made"
    assert told["time"] == "10.0 s a measurement, about 0:00:30 left for 6"


def test_a_directory_without_a_run(tmp_path):
    with pytest.raises(RunDirError, match=r"No run was started in .*: there is no event log \(events\.jsonl\)\.$"):
        read_status(tmp_path)
    with pytest.raises(RunDirError, match=r"The run directory .*nowhere is not there\.$"):
        read_status(tmp_path / "nowhere")
    assert not list(tmp_path.iterdir()), "looking leaves nothing behind"


@pytest.mark.parametrize(("flags", "message"), [([], "required: RUN."), (["a", "b"], "Unrecognized arguments: b."),
                                                (["nowhere"], "The run directory nowhere is not there.")])  # fmt: skip
def test_a_status_that_cannot_be_told_is_one_line(flags, message):
    with pytest.raises(SystemExit) as caught:
        cli.main(["status", *flags])
    assert str(caught.value).startswith("harp-hf status: ")
    assert str(caught.value).endswith(message)
    assert "\n" not in str(caught.value)


def test_status_loads_no_model_library(tmp_path):
    import subprocess
    import sys

    events.append(tmp_path, {"event": "started", "pid": 1, "host": "h"})
    code = ("import sys; from harp_hf import cli; cli.main(['status', sys.argv[1]]); "
            "assert not {'torch', 'transformers', 'datasets'} & sys.modules.keys()")  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "stopped (killed)" in done.stdout
