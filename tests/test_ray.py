"""Leaves measured on a real Ray cluster of several nodes, whose workers and nodes die in the middle."""

import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from transformers import AutoModelForCausalLM

import harp_hf
from harp_hf import HarpConfig, HarpError
from harp_hf.errors import ConfigError, MissingExtraError

LEAVES = 5
MEASUREMENTS = LEAVES + 1  # random rows too
SETTINGS = {"leaf_size": 12, "branching": 2, "max_measurements": LEAVES, "max_steps": 4, "learning_rate": 3e-2,
            "use_cpu": True, "bf16": False}  # fmt: skip
DEADLINE = 240


@pytest.fixture(scope="module")
def cluster():
    """A head without cores and two nodes with one core each; a node that is gone is noticed within seconds."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    from ray.cluster_utils import Cluster

    noticed = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 1000, "health_check_failure_threshold": 5}
    head = {"num_cpus": 0, "include_dashboard": False, "object_store_memory": 10**8, "_system_config": noticed}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    complete(cluster)
    yield cluster
    cluster.shutdown()


def complete(cluster):
    while len(cluster.worker_nodes) < 2:
        cluster.add_node(num_cpus=1, object_store_memory=10**8)


@pytest.fixture
def nodes(cluster):
    """The cluster, and afterwards the nodes that were taken from it are there again."""
    yield cluster
    complete(cluster)


@pytest.fixture
def measure(pool, proxy, features, tiny_model, tmp_path):
    """Measure in `tmp_path/name`; what is there already is not measured again."""

    def run(name, model=tiny_model, metric="likelihood", **changes):
        args = HarpConfig(output_dir=str(tmp_path / name), **(SETTINGS | changes))
        harp_hf.measure(pool, proxy, model, args, features=features, metric=metric)
        return tmp_path / name

    return run


def assert_same(folder, other):
    """Everything computed is the same to the bit, but for the seconds that it took."""
    names = sorted(path.name for path in (folder / "measurements").iterdir())
    assert names == sorted(path.name for path in (other / "measurements").iterdir())
    assert len(names) == MEASUREMENTS
    for name in ["base.npz", *(f"measurements/{name}" for name in names)]:
        ours, theirs = np.load(folder / name), np.load(other / name)
        assert ours.files == theirs.files
        for key in ours.files:
            timed = key.startswith("seconds") or key == "sha256"  # which is also that of the seconds
            assert timed or ours[key].tobytes() == theirs[key].tobytes(), f"{name}: {key}"
    for name in ("result/arrays.npz", "result/result.json"):
        assert (folder / name).read_bytes() == (other / name).read_bytes()


@pytest.mark.ray
def test_workers_measure_what_is_left_as_one_process_would(cluster, measure, tiny_model, tmp_path):
    def first_letter(prompts, completions, answer, **columns):
        return [float(text[:1] == right[:1]) for text, right in zip(completions, answer, strict=True)]

    given = {
        "model": AutoModelForCausalLM.from_pretrained(tiny_model),
        "metric": first_letter,
        "measurement_timeout": 600.0,
    }
    alone = measure("alone", **given)
    shutil.copytree(alone, tmp_path / "ray")
    for path in (tmp_path / "ray/base.npz", *sorted((tmp_path / "ray/measurements").iterdir())[2:]):
        path.unlink()
    shutil.rmtree(tmp_path / "ray/result")
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "ray/measurements").iterdir()}
    assert len(kept) == 2
    assert_same(measure("ray", **given, executor="ray", ray_address=cluster.address), alone)
    assert {path: path.stat().st_mtime_ns for path in kept} == kept, "a finished measurement is left alone"
    scores = [np.load(path).get("scores") for path in (alone / "measurements").iterdir()]
    assert len({score.tobytes() for score in scores}) > 1, "the leaves differ"


@pytest.mark.ray
def test_a_dead_worker_and_a_dead_node_are_replaced(nodes, measure, tmp_path, caplog, capfd):
    killed = []

    def finished():
        return len(list((tmp_path / "ray/measurements").glob("*.npz")))

    def kill():
        """Kill the one worker after the first leaf, and the node that its successor is on after the third."""
        for least in (1, 3):
            while finished() < least:
                time.sleep(0.02)
            node, worker = next((n, w) for n in nodes.worker_nodes for w in workers_of(n))
            killed.append((finished(), worker.pid))
            if least == 1:
                worker.send_signal(signal.SIGKILL)
            else:
                nodes.remove_node(node, allow_graceful=False)

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    run = measure("ray", executor="ray", ray_address=nodes.address, ray_num_workers=1)
    killer.join(DEADLINE)
    printed = capfd.readouterr().out
    assert_same(run, measure("alone"))
    assert len({pid for _, pid in killed}) == 2
    assert all(done < MEASUREMENTS for done, _ in killed), "both died in the middle"
    died = [message for message in caplog.messages if message.startswith("A worker died")]
    assert len(died) == 2
    assert printed == "", "Ray's own messages are kept off the terminal"


def workers_of(node):
    raylet = psutil.Process(node.all_processes["raylet"][0].process.pid)
    return [child for child in raylet.children() if child.name().startswith("ray::Worker")]


@pytest.mark.ray
def test_a_local_ray_is_started_and_ended(pool, proxy, features, tiny_model, tmp_path):
    """In a process of its own, as Ray loses actors in one that has been connected to two clusters."""
    pool.add_column("vector", features.tolist()).to_json(tmp_path / "pool.jsonl")
    proxy.to_json(tmp_path / "proxy.jsonl")
    given = {"dataset_name": tmp_path / "pool.jsonl", "eval_dataset_name": tmp_path / "proxy.jsonl",
             "model_name_or_path": tiny_model, "output_dir": tmp_path / "run", "features": "vector"}  # fmt: skip
    flags = given | SETTINGS | {"max_measurements": 1, "executor": "ray", "ray_num_workers": 1}
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [sys.executable, "-m", "harp_hf.cli", "measure", *(f"--{k}={v}" for k, v in flags.items())],
            capture_output=True, text=True, timeout=DEADLINE, env=os.environ | {"RAY_TMPDIR": folder},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert list(Path(folder).iterdir()), "Ray was there"
        left = [process for process in psutil.process_iter() if folder in " ".join(process_line(process))]
        assert left == [], "and is no more"
    assert done.stdout == f"{harp_hf.load_result(tmp_path / 'run').summary()}\n"
    assert "raylet" not in done.stderr, "Ray's own messages are kept off the terminal"


def process_line(process):
    try:
        return process.cmdline()
    except psutil.Error:
        return []


@pytest.fixture
def hand_out(nodes):
    """Hand leaves to real actors that only pretend to measure them, by functions that are given."""
    import ray

    from harp_hf.execution.ray import _measured

    def hand(work, count=2, cores=1.0, ready=lambda: 1, measured=lambda leaf: None):
        class Pretender:
            def ready(self):
                return ready()

            def score_base(self):
                return [measured(-1)]

            def measure(self, batch, rows):
                return [measured(leaf) or {"reason": ""} for leaf, _ in batch]

        actor = ray.remote(Pretender).options(num_cpus=cores)
        yield from _measured(actor.remote, count, work, lambda leaf: None)

    ray.init(nodes.address, log_to_driver=False, logging_level=logging.ERROR)
    yield hand
    ray.shutdown()


def leaves(count):
    return [(leaf, 0) for leaf in range(count)]


@pytest.mark.ray
def test_a_leaf_that_kills_its_workers_is_given_up_and_its_neighbours_are_not(hand_out, tmp_path):
    def measured(leaf):
        with (tmp_path / str(leaf)).open("a") as handle:
            handle.write(".")
        if leaf == 1:
            os._exit(1)

    found = dict(hand_out(leaves(8), ready=lambda: 4, measured=measured))
    assert len(found) == 8
    assert found.pop((1, 0))["reason"].startswith("3 workers died of it, the last one so: The actor ")
    assert {measurement["reason"] for measurement in found.values()} == {""}
    assert [len((tmp_path / str(leaf)).read_text()) for leaf in range(4)] == [2, 3, 1, 1]


@pytest.mark.ray
def test_workers_that_died_idle_are_not_put_down_to_a_leaf(hand_out, tmp_path):
    def measured(leaf):
        (tmp_path / f"{leaf}-{os.getpid()}").touch()
        if (tmp_path / "died").exists():
            return
        while len(list(tmp_path.iterdir())) < 3:
            time.sleep(0.02)
        if leaf == 2:
            time.sleep(1)
            (tmp_path / "died").touch()
            for path in tmp_path.glob("[01]-*"):
                os.kill(int(path.name[2:]), signal.SIGKILL)
            os._exit(1)

    found = dict(hand_out(leaves(3), count=3, cores=0.5, measured=measured))
    assert len({path.name[2:] for path in tmp_path.glob("[012]-*")}) == 4, "three died, one more took the leaf"
    assert {measurement["reason"] for measurement in found.values()} == {""}


@pytest.mark.ray
def test_a_leaf_of_a_dead_node_goes_to_another_where_no_other_worker_has_room(hand_out, nodes, tmp_path):
    def measured(leaf):
        (tmp_path / f"{leaf}-{os.getpid()}").touch()
        time.sleep(1)

    measurements = hand_out(leaves(6), measured=measured)
    found = dict([next(measurements)])
    nodes.remove_node(next(iter(nodes.worker_nodes)), allow_graceful=False)
    found |= dict(measurements)
    assert sorted(found) == leaves(6)
    assert {measurement["reason"] for measurement in found.values()} == {""}
    assert len(list(tmp_path.iterdir())) == 7, "one was begun twice"


@pytest.mark.ray
def test_a_place_where_the_model_cannot_be_loaded_is_left_to_the_others(hand_out, tmp_path):
    def ready():
        try:
            (tmp_path / "first").mkdir()
        except FileExistsError:
            (tmp_path / f"died-{os.getpid()}").touch()
            os._exit(1)
        return 1

    def measured(leaf):
        while len(list(tmp_path.glob("died-*"))) < 3:
            time.sleep(0.02)

    assert len(dict(hand_out(leaves(3), ready=ready, measured=measured))) == 3
    assert len(list(tmp_path.glob("died-*"))) == 3


@pytest.mark.ray
def test_what_keeps_every_worker_from_measuring_ends_the_run(hand_out):
    def die(*_):
        os._exit(1)

    def fail():
        raise ConfigError("The model cannot be loaded.")

    with pytest.raises(HarpError, match=r"^All workers died while they loaded the model, the last one so: The actor"):
        dict(hand_out(leaves(3), count=1, ready=die))
    with pytest.raises(HarpError, match=r"^The base model could not be scored: 3 workers died of it"):
        dict(hand_out([(-1, -1)], count=1, measured=die))
    with pytest.raises(ConfigError, match=r"^The model cannot be loaded\.$"):
        dict(hand_out(leaves(3), count=1, ready=fail))


@pytest.mark.ray
def test_what_ray_cannot_do_is_said_in_one_sentence(cluster, measure):
    lock = threading.Lock()

    def locked(prompts, completions, **columns):
        with lock:
            return [0.0] * len(completions)

    handler = signal.getsignal(signal.SIGTERM)
    for number, (message, changes) in enumerate((
        ("Ray cannot be reached at '127.0.0.1:1': [Errno 111] Connection refused.", {"ray_address": "127.0.0.1:1"}),
        ("No node of the Ray cluster has the 1 cores and 1 GPUs of one worker.", {"ray_gpus_per_worker": 1}),
        ("No node of the Ray cluster has the 2 cores and 0 GPUs of one worker.", {"ray_cores_per_worker": 2}),
        (
            "`executor` is 'ray', but the metrics cannot be sent to its workers: cannot pickle '_thread.lock' object.",
            {"metric": locked},
        ),
    )):  # fmt: skip
        with pytest.raises(ConfigError) as caught:
            measure(str(number), **({"executor": "ray", "ray_address": cluster.address} | changes))
        assert str(caught.value) == message
    assert signal.getsignal(signal.SIGTERM) is handler, "Ray has put none in its place"


@pytest.mark.ray
def test_ray_is_not_for_the_processes_of_a_launcher(measure, monkeypatch):
    monkeypatch.setattr(HarpConfig, "world_size", 2)
    with pytest.raises(
        ConfigError, match=r"^Ray starts the processes itself: with `executor='ray'`, run without a la"
    ):
        measure("run", executor="ray")


def test_without_ray_the_extra_is_named(measure, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.delitem(sys.modules, "harp_hf.execution.ray", raising=False)
    with pytest.raises(
        MissingExtraError, match=r"^`executor` is 'ray', which is not installed: run `pip install \"harp"
    ):
        measure("run", executor="ray")


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("executor", "slurm", "`executor` must be one of local, ray, but it is 'slurm'."),
        ("ray_num_workers", 0, "`ray_num_workers` must be a whole number of at least 1, but it is 0."),
        ("ray_cores_per_worker", 0.5, "`ray_cores_per_worker` must be a whole number of at least 1, but it is 0.5."),
        ("ray_gpus_per_worker", 1.5, "`ray_gpus_per_worker` must be a share of 1 or a whole number, but it is 1.5."),
        ("ray_gpus_per_worker", -1, "`ray_gpus_per_worker` must be a share of 1 or a whole number, but it is -1."),
    ],
)
def test_settings_are_checked(setting, value, message):
    with pytest.raises(ConfigError) as caught:
        HarpConfig(use_cpu=True, **{setting: value})
    assert str(caught.value) == message
