"""Whatever goes wrong: nothing measured is lost or repeated, nothing damaged is used, and the result is the same."""

import gc
import io
import json
import logging
import os
import re
import resource
import shutil
import signal
import tempfile
import time
import weakref
from contextlib import nullcontext, suppress
from functools import partial

import numpy as np
import pytest
import torch
import yaml
from peft import LoraConfig
from safetensors.torch import save_file

import harp_hf
from harp_hf import HarpConfig, HarpError, cli, events
from harp_hf.errors import ConfigError, FinetuneError, RunDirError
from harp_hf.evaluation.transformers import TransformersEvaluator
from harp_hf.faults import contained
from harp_hf.finetune import LeafFinetuner, LeafTrainer
from harp_hf.proxy import load_proxy
from harp_hf.rundir import RunDir
from harp_hf.verify import verify

LEAVES = 3
MEASUREMENTS = LEAVES + 1  # random rows too
KILLS = 25
SETTINGS = {"features": "tfidf", "leaf_size": 12, "branching": 2, "max_measurements": LEAVES, "max_steps": 2,
            "learning_rate": 3e-2, "metric": "likelihood", "use_cpu": True, "bf16": False}  # fmt: skip
ADAPTER = {"r": 2, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}


@pytest.fixture(scope="module")
def data(pool, proxy, tiny_model):
    return {"dataset": pool, "eval_dataset": proxy, "model": tiny_model}


def measure(folder, data, **changes):
    args = HarpConfig(output_dir=str(folder / "run"), **(SETTINGS | changes))
    return harp_hf.measure(**data, args=args, peft_config=LoraConfig(**ADAPTER))


def select(folder, data, **changes):
    """What a user runs: the files that must come out the same are `selected.parquet` and what lies in `run`."""
    measure(folder, data, **changes).select(active_tasks="all", budget=20).to_parquet(folder / "selected.parquet")


def outcome(folder):
    """Bytes of all that a run computes, but for the seconds it took."""
    files = [folder / "selected.parquet", *(folder / "run").glob("features.npy*")]
    files += [folder / "run" / name for name in ("hierarchy.npz", "nearest.npz", "manifest.json")]
    files += [folder / "run" / "result" / name for name in ("arrays.npz", "result.json")]
    found = {file.name: file.read_bytes() for file in files}
    for file in [folder / "run" / "base.npz", *(folder / "run" / "measurements").glob("*.npz")]:
        with np.load(file) as arrays:
            computed = [name for name in arrays if not name.startswith(("seconds", "sha256"))]
            found[file.name] = {name: arrays[name].tobytes() for name in computed}
    return found


def finished(folder):
    """Every finished measurement with its bytes, time and place on disk."""
    files = (folder / "run" / "measurements").glob("*.npz")
    return {f.stem: (f.read_bytes(), f.stat().st_mtime_ns, f.stat().st_ino) for f in files}


# Killed


def notice(moment):
    """Call `moment(name)` before, in the middle of and after whatever a run does to its directory or to a leaf.

    The middle of a file is the file half-written; that of a line of the event log is half of the line.
    """
    where = ["start"]

    def around(owner, name, told, middle=None):
        real = getattr(owner, name)

        def told_of(*args, **kwargs):
            what = told(*args, **kwargs)
            moment(f"{where[0]}: before {what}")
            if middle:
                args = middle(f"{where[0]}: amid {what}", *args)
            done = real(*args, **kwargs)
            moment(f"{where[0]}: after {what}")
            return done

        setattr(owner, name, told_of)

    def half_a_file(name, run, file, write):
        def both(handle):
            write(handle)
            handle.flush()
            moment(name, lambda: handle.truncate(handle.tell() // 2))

        return run, file, both

    def half_a_line(name, folder, event):
        if event["event"] == "stage":
            where[0] = event["stage"]
        line = json.dumps(event)
        moment(name, lambda: (folder / events.FILE).open("a").write(line[: len(line) // 2]))
        return folder, event

    around(RunDir, "write", lambda run, file, write: file, half_a_file)
    around(events, "append", lambda folder, event: f"line {event['event']} {event.get('leaf', '')}", half_a_line)
    around(LeafFinetuner, "finetune", lambda self, rows, seed, adapter: f"finetune {adapter.name}")
    around(LeafTrainer, "train", lambda self, **_: f"training {self.args.run_name}")
    around(
        TransformersEvaluator, "evaluate", lambda self, adapters: f"scores of {getattr(adapters[0], 'name', 'base')}"
    )


def work(folder, data, order=None, point=0):
    """Select in `folder`; write down every moment, or kill this process at the first one that is so far in `order`."""
    torch.set_num_threads(1)
    gc.freeze()
    moments, finetune = folder / "moments", LeafFinetuner.finetune

    def moment(name, spoil=lambda: None):
        if order is None:
            with moments.open("a") as handle:
                handle.write(f"{name}\n")
        elif name in order and order.index(name) >= point:
            spoil()
            os.kill(os.getpid(), signal.SIGKILL)

    def counted(self, rows, seed, adapter):
        with (folder / "finetunes").open("a") as handle:
            handle.write(f"{adapter.name}\n")
        return finetune(self, rows, seed, adapter)

    LeafFinetuner.finetune = counted
    notice(moment)
    select(folder, data)


@pytest.fixture(scope="module")
def start(processes):
    """Start a function in a process of its own."""
    started = []

    def start(target, *args):
        process = processes.Process(target=target, args=args)
        process.start()
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.join()


@pytest.fixture(scope="module")
def undisturbed(start, data, tmp_path_factory):
    """A run that nothing happens to, with all its moments in order."""
    folder = tmp_path_factory.mktemp("undisturbed")
    process = start(work, folder, data)
    process.join(120)
    assert process.exitcode == 0
    return folder


def finetunes(folder):
    return (folder / "finetunes").read_text().split() if (folder / "finetunes").exists() else []


def test_a_run_killed_at_25_random_moments(start, undisturbed, data, tmp_path):
    order = list(dict.fromkeys((undisturbed / "moments").read_text().splitlines()))
    random = np.random.default_rng(3)
    points = set()
    for some in ("start: ", "features: ", "hierarchy: ", "similarity: ", "measurements: amid measurements/",
                 "measurements: amid line leaf", "measurements: before training", "inference: "):  # fmt: skip
        points.add(random.choice([n for n, name in enumerate(order) if name.startswith(some)]))
    points |= set(random.permutation([n for n in range(len(order)) if n not in points])[: KILLS - len(points)])
    known = {}
    for point in sorted(points):
        made = len(finetunes(tmp_path))
        process = start(work, tmp_path, data, order, point)
        process.join(120)
        assert process.exitcode == -signal.SIGKILL, order[point]
        after = finished(tmp_path)
        assert known.items() <= after.items(), f"{order[point]}: a finished measurement is left alone"
        again = {name.removeprefix("leaf-").replace("-seed", "") for name in finetunes(tmp_path)[made:]}
        assert not again & known.keys(), f"{order[point]}: a finished measurement is repeated"
        known = after
    work_again = start(work, tmp_path, data, order, len(order))
    work_again.join(120)
    assert work_again.exitcode == 0
    assert known.items() <= finished(tmp_path).items()
    assert outcome(tmp_path) == outcome(undisturbed)
    assert not list((tmp_path / "run").rglob(".*.part")), "what killed runs were writing is swept up"
    lines = (tmp_path / "run" / events.FILE).read_bytes().splitlines()
    log = events.read(tmp_path / "run")
    assert len(lines) > len(log), "half-written lines are left out"
    assert [event["event"] for event in log].count("finished") == 1


@pytest.mark.launch
def test_a_run_killed_at_any_time(start, undisturbed, data, tmp_path):
    order, random = [], np.random.default_rng(5)
    known, kills = {}, 0
    while kills < KILLS:
        process = start(work, tmp_path, data, order)
        process.join(random.uniform(0, 4))
        if process.exitcode is not None:
            assert process.exitcode == 0
            assert outcome(tmp_path) == outcome(undisturbed)
            shutil.rmtree(tmp_path / "run")
            known = {}
            continue
        process.kill()
        process.join()
        kills += 1
        assert known.items() <= finished(tmp_path).items()
        known = finished(tmp_path)
    process = start(work, tmp_path, data, order)
    process.join(120)
    assert process.exitcode == 0
    assert outcome(tmp_path) == outcome(undisturbed)


# Damaged files


@pytest.fixture
def done(undisturbed, tmp_path):
    """A finished run of one's own."""
    for name in ("run", "selected.parquet"):
        whole = undisturbed / name
        (shutil.copytree if whole.is_dir() else shutil.copy)(whole, tmp_path / name)
    return tmp_path


@pytest.fixture
def made(monkeypatch):
    """Finetunes and evaluations made in this process."""
    calls = []
    for owner, name in ((LeafFinetuner, "finetune"), (TransformersEvaluator, "evaluate")):
        real = getattr(owner, name)
        monkeypatch.setattr(
            owner, name, lambda *args, _real=real, _name=name, **kw: (calls.append(_name), _real(*args, **kw))[1]
        )
    return calls


def flip(old):
    """Flip one bit of what a file holds; in an npz file, of the largest array."""
    place = len(old) // 2
    if old.startswith(b"PK"):
        with np.load(io.BytesIO(old)) as arrays:
            largest = max((arrays[name].tobytes() for name in arrays), key=len)
        place = old.index(largest) + len(largest) // 2
    return old[:place] + bytes([old[place] ^ 1]) + old[place + 1 :]


DAMAGES = {
    "cut short": lambda old: old[: len(old) * 2 // 3],
    "half-written": lambda old: old[: len(old) // 2] + bytes(len(old) - len(old) // 2),
    "one bit flipped": flip,
    "empty": lambda old: b"",
}


@pytest.mark.parametrize("case", DAMAGES)
def test_damaged_files_are_named_and_made_again(case, done, undisturbed, data, made, caplog):
    files = ["features.npy", "hierarchy.npz", "nearest.npz", "base.npz", "seconds.json", "result/arrays.npz",
             "result/result.json", *(f"measurements/{leaf}.npz" for leaf in sorted(finished(done))[:2])]  # fmt: skip
    for name in files:
        path = done / "run" / name
        path.write_bytes(DAMAGES[case](path.read_bytes()))
    left = {leaf: known for leaf, known in finished(done).items() if f"measurements/{leaf}.npz" not in files}
    select(done, data)
    told = [record.getMessage() for record in caplog.records if "is damaged" in record.getMessage()]
    named = [name for name in files if not name.startswith("result/")]
    assert sorted(told) == sorted(
        f"{done / 'run' / name} is damaged or half-written, and made again." for name in named
    )
    assert made.count("finetune") == 2
    assert made.count("evaluate") == 3
    assert left.items() <= finished(done).items(), "what is whole is left alone"
    assert outcome(done) == outcome(undisturbed)


@pytest.mark.parametrize("name", ["result.json", "arrays.npz", "seconds.json"])
def test_a_damaged_result_is_not_loaded(name, done, pool):
    path = done / "run" / "result" / name
    path.write_bytes(flip(path.read_bytes()))
    with pytest.raises(RunDirError, match=f"{name} is damaged; run the same command again, which makes it anew"):
        harp_hf.load_result(done / "run", pool)


def test_features_without_their_checksum_are_made_again(done, undisturbed, data, made, caplog):
    (done / "run" / "features.npy.sha256").unlink()
    select(done, data)
    assert "features.npy is damaged or half-written, and made again" in caplog.text
    assert made == []
    assert outcome(done) == outcome(undisturbed)


# A full disk


def full_disk(folder, data, said, room):
    """Select where no file may grow beyond `room` bytes: the system itself refuses to write on."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        select(folder, data)
    except HarpError as error:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        said.send(str(error))


def test_a_disk_without_room_for_a_file(start, processes, undisturbed, data, tmp_path):
    here, there = processes.Pipe()
    process = start(full_disk, tmp_path, data, there, 8 * 2**10)
    assert here.poll(120)
    assert here.recv() == f"{tmp_path}/run/features.npy cannot be written: File too large."
    process.join(60)
    assert not list((tmp_path / "run").rglob("*.part")) + list((tmp_path / "run").glob("features*"))
    select(tmp_path, data)
    assert outcome(tmp_path) == outcome(undisturbed)


@pytest.mark.parametrize("name", ["a.safetensors", "a.pt", "a.json"])
def test_a_disk_without_room_for_an_adapter(name, tmp_path):
    tensor, before = torch.zeros(10_000), resource.getrlimit(resource.RLIMIT_FSIZE)
    ways = {
        "a.safetensors": lambda path: save_file({"a": tensor}, path),
        "a.pt": lambda path: torch.save(tensor, path),
        "a.json": lambda path: path.write_text("0" * 40_000),
    }
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (9_000, before[1]))
    try:
        with (
            pytest.raises(HarpError, match=r"^An adapter or a checkpoint cannot be written \(is the disk full\?\): "),
            contained(),
        ):
            ways[name](tmp_path / name)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    with pytest.raises(ConnectionError), contained():
        raise ConnectionError("no tracker")


def test_a_disk_without_room_for_the_event_log(done, data, undisturbed):
    log = done / "run" / events.FILE
    log.unlink()
    log.symlink_to("/dev/full")
    with pytest.raises(RunDirError, match=r"events\.jsonl cannot be written: No space left on device\.$"):
        measure(done, data)
    log.unlink()
    select(done, data)
    assert outcome(done) == outcome(undisturbed)


# Out of memory, out of time


def too_much():
    torch.empty(2**60, dtype=torch.uint8)


def lack_memory():
    error = MemoryError()  # in a circle with its own traceback, which holds all that was computed
    raise error


def lack_gpu_memory():
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def hang():
    time.sleep(20)


LACKS = {
    "memory of PyTorch": (too_much, r"out of memory \(.*can't allocate memory.*\)"),
    "memory of Python": (lack_memory, r"out of memory \(MemoryError\)"),
    "memory of the GPU": (lack_gpu_memory, r"out of memory \(CUDA out of memory"),
    "time": (hang, "it took longer than measurement_timeout=3 seconds"),
}


def spoil(monkeypatch, owner, name, lack, number):
    """Let the `number`-th call of a method lack something, at its end."""
    real, calls = getattr(owner, name), []

    def lacking(*args, **kwargs):
        calls.append(1)
        done = real(*args, **kwargs)
        if len(calls) == number:
            lack()
        return done

    monkeypatch.setattr(owner, name, lacking)


def leaf_of(log, number):
    return [f"{event['leaf']}-{event['seed']}" for event in log if event["event"] == "leaf"][number]


# The first trainer only tokenises the pool.
WHERE = {"building the adapter": (LeafTrainer, "__init__", 2), "training": (LeafTrainer, "training_step", 1),
         "evaluation": (TransformersEvaluator, "_score", 1)}  # fmt: skip


@pytest.mark.parametrize(
    ("where", "case"),
    [*(("training", case) for case in LACKS), ("building the adapter", "memory of PyTorch"),
     ("building the adapter", "time"), ("evaluation", "memory of PyTorch"), ("evaluation", "time")],
)  # fmt: skip
def test_one_leaf_that_lacks_memory_or_time(where, case, undisturbed, data, done, monkeypatch, caplog):
    lack, match = LACKS[case]
    log = events.read(undisturbed / "run")
    first, second = leaf_of(log, 1), leaf_of(log, 2)
    for leaf in (first, second):
        (done / "run" / "measurements" / f"{leaf}.npz").unlink()
    owner, name, number = WHERE[where]
    spoil(monkeypatch, owner, name, lack, number)
    result = measure(done, data, measurement_timeout=3)
    [(failed, why)] = result.measurements.failed.items()
    assert f"{failed}-42" == first
    assert re.search(match, why)
    assert f"Leaf {failed} could not be measured: {why}." in caplog.text
    [event] = [event for event in events.read(done / "run")[len(log) :] if "reason" in event]
    assert (event["leaf"], event["reason"]) == (failed, why)
    assert outcome(done)[f"{second}.npz"] == outcome(undisturbed)[f"{second}.npz"], "the next leaf is as ever"


def break_scores(monkeypatch):
    """Let the next evaluation give a score that is not a number, as weights that are none do."""
    real, calls = TransformersEvaluator.evaluate, []

    def evaluate(self, adapters):
        scores = real(self, adapters)
        if not calls:
            scores[0, 1] = np.nan
        calls.append(1)
        return scores

    monkeypatch.setattr(TransformersEvaluator, "evaluate", evaluate)


def test_one_leaf_whose_scores_are_not_finite(undisturbed, data, done, monkeypatch):
    log = events.read(undisturbed / "run")
    first, second = leaf_of(log, 1), leaf_of(log, 2)
    for leaf in (first, second):
        (done / "run" / "measurements" / f"{leaf}.npz").unlink()
    break_scores(monkeypatch)
    result = measure(done, data)
    assert result.measurements.failed == {int(first.removesuffix("-42")): "its scores are not finite numbers"}
    assert outcome(done)[f"{second}.npz"] == outcome(undisturbed)[f"{second}.npz"], "the next leaf is as ever"


def test_other_scores_that_are_not_finite_are_one_sentence(data, done, monkeypatch):
    (done / "run" / "base.npz").unlink()
    with monkeypatch.context() as patch:
        break_scores(patch)
        with pytest.raises(HarpError, match=r"^The base model cannot be evaluated: its scores are not finite numbers"):
            measure(done, data)
    assert not (done / "run" / "base.npz").exists()
    measure(done, data)
    break_scores(monkeypatch)
    args = HarpConfig(output_dir=str(done / "run"), **SETTINGS)
    test = load_proxy(data["eval_dataset"])
    with pytest.raises(HarpError, match=r"^The finetune on all failed: its scores are not finite numbers\.$"):
        verify(data["dataset"], {"all": np.arange(20)}, test, data["model"], args, LoraConfig(**ADAPTER))
    assert not list((done / "run").glob("verify/*.npz"))


def test_measurements_of_other_rows_than_the_leaves_hold_are_made_again(done, data, made, caplog):
    known = RunDir(done / "run").read_arrays("hierarchy.npz")
    known["leaf"] = (known["leaf"] + 1) % len(known["parent"])
    RunDir(done / "run").write_arrays("hierarchy.npz", **known)
    n_leaves = len(known["parent"])
    result = measure(done, data, max_measurements=n_leaves)
    assert made == ["finetune", "evaluate"] * n_leaves, "the random rows are as before"
    assert caplog.text.count("is of rows that its leaf does not hold, and made again") == LEAVES
    for leaf, rows in result.measurements.rows.items():
        assert set(rows) <= set(result.hierarchy.rows(leaf))


def test_a_failed_leaf_whose_file_is_deleted_is_measured_again(undisturbed, data, done, monkeypatch, made):
    leaf = leaf_of(events.read(undisturbed / "run"), 1)
    (done / "run" / "measurements" / f"{leaf}.npz").unlink()
    with monkeypatch.context() as patch:
        spoil(patch, LeafTrainer, "training_step", too_much, 1)
        measure(done, data)
    measure(done, data)
    assert made == ["finetune"], "it is not tried again on its own"
    (done / "run" / "measurements" / f"{leaf}.npz").unlink()
    select(done, data)
    assert outcome(done) == outcome(undisturbed)


@pytest.mark.parametrize("case", ["memory of PyTorch", "time"])
def test_a_base_model_that_lacks_memory_or_time(case, data, done, monkeypatch):
    lack, match = LACKS[case]
    (done / "run" / "base.npz").unlink()
    spoil(monkeypatch, TransformersEvaluator, "_score", lack, 1)
    with pytest.raises(
        HarpError, match=f"The base model cannot be evaluated: {match}; with a smaller `per_device"
    ) as caught:
        measure(done, data, measurement_timeout=3)
    assert "\n" not in str(caught.value)


def test_another_error_is_not_taken_for_a_lack_of_memory(data, done, undisturbed, monkeypatch):
    def err():
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    (done / "run" / "measurements" / f"{leaf_of(events.read(undisturbed / 'run'), 0)}.npz").unlink()
    spoil(monkeypatch, LeafTrainer, "training_step", err, 1)
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        measure(done, data)


def test_a_failed_leaf_gives_its_memory_back(data, done, monkeypatch):
    trainers, alive = [], []
    for path in (done / "run" / "measurements").glob("*.npz"):
        path.unlink()
    spoil(monkeypatch, LeafTrainer, "training_step", lack_memory, 1)
    init = LeafTrainer.__init__

    def noted(self, *args, **kwargs):
        alive.append(sum(trainer() is not None for trainer in trainers))
        trainers.append(weakref.ref(self))
        init(self, *args, **kwargs)

    monkeypatch.setattr(LeafTrainer, "__init__", noted)
    gc.disable()
    try:
        measure(done, data, max_measurements=2)
    finally:
        gc.enable()
    assert alive == [0] * 4, "one tokenises, three finetune"


def test_a_limit_ends_with_what_it_limits():
    before = signal.getsignal(signal.SIGALRM)
    with contained(0.2):
        pass
    time.sleep(0.3)
    assert signal.getsignal(signal.SIGALRM) is before


def test_a_limit_that_a_library_swallows_comes_again():
    def swallow():
        with suppress(BaseException):
            time.sleep(5)
        time.sleep(5)

    start = time.monotonic()
    with pytest.raises(FinetuneError, match=r"longer than measurement_timeout=0\.2 seconds"), contained(0.2):
        swallow()
    assert time.monotonic() - start < 5


def test_a_limit_needs_the_main_thread():
    from concurrent.futures import ThreadPoolExecutor

    def limited():
        with contained(1.0):
            pass

    with ThreadPoolExecutor() as pool, pytest.raises(ConfigError, match="`measurement_timeout` needs the main thread"):
        pool.submit(limited).result()


@pytest.mark.parametrize("seconds", [0, -1.0, float("inf"), float("nan")])
def test_a_limit_that_cannot_be_used(seconds):
    with pytest.raises(ConfigError, match="`measurement_timeout` must be a number of seconds above 0"):
        HarpConfig(use_cpu=True, measurement_timeout=seconds)


def test_a_limit_may_change_from_start_to_start(done, data, made):
    measure(done, data, measurement_timeout=100.0)
    assert made == []


# Two runs in one directory


def hold(folder, told):
    with RunDir(folder).locked():
        told.send(os.getpid())
        time.sleep(300)


def test_a_second_run_in_one_directory_is_refused(start, processes, undisturbed, data, done, made):
    here, there = processes.Pipe()
    process = start(hold, done / "run", there)
    assert here.poll(60)
    number = here.recv()
    assert number == process.pid
    (done / "run" / "hierarchy.npz").unlink()
    before = {path: path.read_bytes() for path in (done / "run").rglob("*") if path.is_file()}
    with pytest.raises(RunDirError, match=f"is in use by process {number} on .*: wait for its end, or use another"):
        measure(done, data)
    assert {path: path.read_bytes() for path in (done / "run").rglob("*") if path.is_file()} == before
    assert RunDir(done / "run").is_locked()
    process.kill()
    process.join()
    assert not RunDir(done / "run").is_locked(), "the lock of a killed process is gone with it"
    select(done, data)
    assert made == []
    assert outcome(done) == outcome(undisturbed)


def test_one_process_is_no_exception(tmp_path):
    run = RunDir(tmp_path)
    with run.locked(), pytest.raises(RunDirError, match=f"is in use by process {os.getpid()} on"), run.locked():
        pass
    with run.locked():
        pass


def test_a_baseline_keeps_to_the_lock_too(done, data):
    from harp_hf.baselines.choose import choose

    args = HarpConfig(output_dir=str(done / "run"), budget=5, **SETTINGS)
    with RunDir(done / "run").locked(), pytest.raises(RunDirError, match="is in use by process"):
        choose("random", *data.values(), args, LoraConfig(**ADAPTER))


# A clock that jumps


def test_a_clock_that_jumps_changes_nothing(undisturbed, data, done, monkeypatch):
    random = np.random.default_rng(0)
    for name in ("base.npz", "seconds.json", f"measurements/{sorted(finished(done))[0]}.npz"):
        (done / "run" / name).unlink()
    (done / "run" / events.FILE).unlink()
    monkeypatch.setattr(time, "time", lambda: float(random.uniform(0, 4e9)))
    select(done, data, measurement_timeout=60.0)
    monkeypatch.undo()
    assert outcome(done) == outcome(undisturbed)
    log = events.read(done / "run")
    told = [value for event in log for name, value in event.items() if name.startswith(("seconds", "elapsed"))]
    assert len(told) > 20
    assert all(0 <= seconds < 60 for seconds in told)
    kept = json.loads((done / "run" / "result" / "seconds.json").read_text())
    assert all(0 <= seconds < 60 for seconds in kept["seconds"].values())
    assert 0 < kept["cost"]["seconds_training"] < 60
    assert 0 < kept["cost"]["seconds_evaluation"] < 60


# Ctrl-C and SIGTERM


@pytest.fixture(scope="module")
def disk(pool, proxy, tiny_model, tmp_path_factory):
    """A YAML config of the same run for the command line."""
    folder = tmp_path_factory.mktemp("disk")
    pool.to_json(folder / "pool.jsonl")
    proxy.to_json(folder / "proxy.jsonl")
    names = {"dataset_name": str(folder / "pool.jsonl"), "eval_dataset_name": str(folder / "proxy.jsonl"),
             "model_name_or_path": tiny_model, "lora_r": 2, "lora_target_modules": ["q_proj", "v_proj"],
             "active_tasks": ["all"]}  # fmt: skip
    (folder / "harp.yaml").write_text(yaml.safe_dump(names | SETTINGS))
    return folder / "harp.yaml"


def command(folder, config, slow, *flags, swallows=False):
    """`harp-hf select`, with temporary files and stderr in `folder`; `slow` finetunes give time to interrupt.

    What a signal raises in them, datasets may swallow; with `swallows` it always does.
    """
    torch.set_num_threads(1)
    tempfile.tempdir = str(folder / "aside")
    (folder / "aside").mkdir(exist_ok=True)
    os.dup2(os.open(folder / "stderr", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
    train = LeafTrainer.train

    def slowly(self, **given):
        with suppress(KeyboardInterrupt) if swallows else nullcontext():
            time.sleep(slow)
        return train(self, **given)

    LeafTrainer.train = slowly
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in the background
    cli.main(["select", "--config", str(config), "--output_dir", str(folder / "run"), *flags])


@pytest.mark.launch
@pytest.mark.parametrize("swallows", [False, True])
@pytest.mark.parametrize(
    ("number", "name", "code"), [(signal.SIGINT, "SIGINT", 130), (signal.SIGTERM, "SIGTERM", 143)]
)
def test_stopping_a_command(number, name, code, swallows, start, disk, tmp_path):
    process = start(partial(command, swallows=swallows), tmp_path, disk, 3.0 if swallows else 1.0)
    deadline = time.monotonic() + 120
    while len(finished(tmp_path)) < 2 and process.is_alive() and time.monotonic() < deadline:
        time.sleep(0.01)
    if swallows:
        time.sleep(1.5)  # well into the next finetune
    os.kill(process.pid, number)
    process.join(60)
    assert process.exitcode == code
    before = finished(tmp_path)
    assert len(before) == 3 if swallows else len(before) < MEASUREMENTS, "no more than the leaf it came in is measured"
    told = (tmp_path / "stderr").read_text().replace("\r", "\n").splitlines()
    assert told[-1] == (
        f"harp-hf select: stopped by {name}, {len(before)} of {MEASUREMENTS} measurements made; "
        "the same command continues where this one stopped."
    )
    assert not [line for line in told if "Traceback" in line]
    assert not list((tmp_path / "run").rglob("*.part")) + list((tmp_path / "aside").iterdir())
    assert events.read(tmp_path / "run")[-1]["reason"] in ("KeyboardInterrupt", "Terminated")
    again = start(command, tmp_path, disk, 0.0)
    again.join(120)
    assert again.exitcode == 0
    assert before.items() <= finished(tmp_path).items()
    assert len(finished(tmp_path)) == MEASUREMENTS


# How much is told


@pytest.fixture
def restored():
    yield
    logging.getLogger("harp_hf").setLevel(logging.NOTSET)


@pytest.mark.parametrize(("flag", "wanted"), [([], logging.INFO), (["--log_level", "error"], logging.ERROR),
                                              (["--log-level", "debug"], logging.DEBUG),
                                              (["--log_level", "detail"], logging.DEBUG)])  # fmt: skip
def test_the_level_of_our_logging(flag, wanted, disk, tmp_path, restored):
    with pytest.raises(SystemExit):
        cli.main(
            ["select", "--config", str(disk), "--output_dir", str(tmp_path / "run"), "--dataset_name", "no", *flag]
        )
    assert logging.getLogger("harp_hf").level == wanted


@pytest.mark.parametrize(("level", "of_trainers"), [("info", "passive"), ("debug", "debug")])
def test_a_level_changes_neither_the_run_nor_what_trainers_tell(
    level, of_trainers, done, data, undisturbed, monkeypatch
):
    levels = []
    (done / "run" / "measurements" / f"{sorted(finished(done))[0]}.npz").unlink()
    monkeypatch.setattr(LeafTrainer, "train", lambda self, _real=LeafTrainer.train, **_: (
        levels.append(self.args.log_level), _real(self))[1])  # fmt: skip
    select(done, data, log_level=level)
    assert levels == [of_trainers]
    assert outcome(done) == outcome(undisturbed)
