"""The user's trackers: off unless asked for, and then a run of its own for every leaf."""

import importlib.machinery
import sys
import types

import pytest

import harp_hf
from harp_hf import HarpConfig
from harp_hf.errors import ConfigError

STEPS = {"max_steps": 4, "logging_steps": 2, "max_measurements": 2, "num_repeats": 2, "active_tasks": ["all"]}


@pytest.fixture
def measure(pool, proxy, features, tiny_model, config):
    """Measures two leaves with two seeds each, and gives the names that their runs should have."""

    def run(**changes):
        args = config(**(STEPS | changes))
        result = harp_hf.measure(pool, proxy, tiny_model, args, features=features)
        name = changes.get("run_name") or "run"
        return sorted(f"{name}-leaf-{leaf}-seed-{seed}" for leaf in result.measurements.leaves for seed in (42, 43))

    return run


class Wandb(types.ModuleType):
    """What transformers' `WandbCallback` asks of wandb; keeps every run and what was logged to it."""

    def __init__(self):
        super().__init__("wandb")
        self.__spec__ = importlib.machinery.ModuleSpec("wandb", None)
        self.run, self.runs, self.config = None, [], type("Config", (dict,), {"update": lambda *_, **__: None})()

    def init(self, project, name=None):
        assert self.run is None, "the run before was finished"
        self.run = types.SimpleNamespace(name=name, logged=[], summary={}, _label=lambda code: None)
        self.runs.append(self.run)

    def log(self, values):
        self.run.logged.append(values)

    def finish(self):
        self.run = None


@pytest.fixture
def wandb(monkeypatch):
    module = Wandb()
    errors = types.ModuleType("wandb.sdk.lib.config_util")
    errors.ConfigError = KeyError
    for name in ("wandb.sdk", "wandb.sdk.lib"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, "wandb.sdk.lib.config_util", errors)
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def test_nothing_is_reported_unless_asked_for(measure, wandb, tmp_path):
    args = HarpConfig()
    assert (args.report_to, args.logging_strategy) == ([], "no")
    measure()
    assert wandb.runs == []
    assert not (tmp_path / "run" / "runs").exists()


@pytest.mark.parametrize(
    ("changes", "strategy"),
    [({"report_to": "tensorboard"}, "steps"), ({"report_to": ["wandb", "trackio"]}, "steps"),
     ({"report_to": "none"}, "no"), ({"report_to": ["none"]}, "no"), ({"report_to": None}, "no"),
     ({"report_to": "tensorboard", "logging_strategy": "epoch"}, "epoch"),
     ({"report_to": "tensorboard", "logging_strategy": "no"}, "no"), ({"logging_strategy": "steps"}, "steps")],
)  # fmt: skip
def test_whoever_names_a_tracker_has_something_logged(changes, strategy):
    assert HarpConfig(**changes).logging_strategy == strategy


def test_every_leaf_and_seed_is_a_wandb_run_of_its_own(measure, wandb):
    names = measure(report_to="wandb")
    assert sorted(run.name for run in wandb.runs) == names
    assert len(set(names)) == 4
    for run in wandb.runs:
        losses = {values["train/global_step"]: values["train/loss"] for values in run.logged if "train/loss" in values}
        assert sorted(losses) == [2, 4]
        assert run.summary["train_loss"] > 0
    assert wandb.run is None


def test_runs_are_named_after_the_users_run_name(measure, wandb):
    names = measure(report_to=["wandb"], run_name="mine")
    assert all(name.startswith("mine-leaf-") for name in names)
    assert sorted(run.name for run in wandb.runs) == names


def test_a_wandb_run_of_the_user_stays_open(measure, wandb):
    wandb.init("theirs", name="theirs")
    theirs = wandb.run
    measure(report_to="wandb")
    assert wandb.run is theirs
    assert wandb.runs == [theirs]
    assert len(theirs.logged) >= 8


def test_a_failed_finetune_ends_its_run(measure, wandb, monkeypatch):
    log, failed = Wandb.log, []

    def breaking(self, values):
        log(self, values)
        if not failed:
            failed.append(self.run.name)
            raise RuntimeError("no")

    monkeypatch.setattr(Wandb, "log", breaking)
    with pytest.raises(RuntimeError, match="no"):
        measure(report_to="wandb")
    assert wandb.run is None


def test_every_leaf_and_seed_has_a_tensorboard_folder(measure, tmp_path, monkeypatch):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for base in (tmp_path / "run" / "runs", tmp_path / "elsewhere"):
        if base.name == "elsewhere":
            monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(base))
        names = measure(report_to="tensorboard", output_dir=str(tmp_path / ("run" if base.name == "runs" else "else")))
        names = [name if base.name == "runs" else f"else{name[3:]}" for name in names]
        assert sorted(folder.name for folder in base.iterdir()) == names
        for name in names:
            events = accumulator.EventAccumulator(str(base / name)).Reload()
            assert [event.step for event in events.Scalars("train/loss")] == [2, 4]


def test_every_leaf_and_seed_is_a_trackio_run_of_its_own(measure, tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    pytest.importorskip("trackio")
    from trackio.sqlite_storage import SQLiteStorage

    names = measure(report_to="trackio", project="harp-test")
    assert sorted(SQLiteStorage.get_runs("harp-test")) == names
    for name in names:
        logged = SQLiteStorage.get_logs("harp-test", name)
        assert [line["train/global_step"] for line in logged if "train/loss" in line] == [2, 4]


@pytest.mark.parametrize("tracker", ["wandbb", "comet_ml"])
def test_a_tracker_that_is_not_there_is_one_sentence_before_anything_is_done(tracker, measure, tmp_path):
    with pytest.raises(ConfigError, match=f"`report_to` cannot be used: .*{tracker.split('_')[0]}") as caught:
        measure(report_to=tracker)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_trackers_may_change_when_a_run_continues(measure, wandb):
    measure()
    measure(report_to="wandb")
    assert wandb.runs == [], "nothing was left to finetune"
