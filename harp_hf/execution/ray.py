"""Measures leaves on a Ray cluster: actors keep the model, this process hands them leaves and records the scores."""

from __future__ import annotations

import logging
import math
import os
import signal
import socket
import tempfile
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import fields
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from datasets import Dataset, DatasetInfo
from datasets.table import InMemoryTable

from ..errors import ConfigError, HarpError, MissingExtraError, reason
from .local import measure_batch, read_base, score_base
from .record import left_to_measure, progress_of, record, record_base
from .tools import open_tools

try:
    import ray
    from ray.exceptions import OutOfMemoryError, RayActorError, RayTaskError
except ImportError as error:
    raise MissingExtraError(
        "`executor` is 'ray', which is not installed: run `pip install \"harp-hf[ray]\"`."
    ) from error

if TYPE_CHECKING:
    from ..config import HarpConfig
    from ..evaluation.evaluator import Evaluator
    from ..finetune import LeafFinetuner
    from ..inputs import Inputs
    from ..rundir import RunDir

logger = logging.getLogger(__name__)

# So many workers may die of one leaf, and so many in one place while they load the model.
_TRIES = 3
_SECONDS_WITHOUT_WORKERS = 300

Pair = tuple[int, int]
_BASE: Pair = (-1, -1)


def measure_on_ray(
    run: RunDir, todo: Sequence[Pair], rows: Callable[[int], np.ndarray], given: Inputs, args: HarpConfig
) -> dict[str, np.ndarray]:
    """Measure the base model and leaves, whatever the run directory does not hold yet, on the workers of a cluster.

    Arguments and what is returned are those of [`measure_here`]. Only this process writes into the run directory.

    Raises:
        ConfigError: The cluster cannot be reached or has no room for a worker, or what is given cannot be sent there.
        HarpError: The workers die while they load the model or score it.
    """
    if args.world_size > 1:
        raise ConfigError("Ray starts the processes itself: with `executor='ray'`, run without a launcher.")
    left = left_to_measure(run, todo, rows)
    work = [_BASE] * (given.null_scores is None and not run.holds("base.npz")) + left
    with progress_of(todo, left) as progress:
        if work:
            with _connected(args.ray_address), _workers(given, args, len(work)) as (start, count):
                for pair, measurement in _measured(start, count, work, rows):
                    if pair == _BASE:
                        record_base(run, measurement)
                    else:
                        record(run, *pair, measurement, progress)
    return read_base(run, given.null_scores)


def _measured(
    start: Callable[[], Any], count: int, work: Sequence[Pair], rows: Callable[[int], np.ndarray]
) -> Iterator[tuple[Pair, dict[str, Any]]]:
    """Measurements in the order in which they are finished.

    What a dead worker had goes to the next that is free, and Ray is asked for another worker in its place. Ray's own
    retries would wait for the same actor: for ever, where its node is gone and no other has room.

    Args:
        start: Asks Ray for a worker.
        count: How many to ask for.
        work: What to measure.
        rows: Pool rows of a leaf.
    """
    waiting, deaths, free, at_once = deque(work), Counter[Pair](), list[Any](), 1
    # Of every task that is not done: its worker, how many died before it while they loaded, and what it measures.
    running: dict[ray.ObjectRef, tuple[Any, int, list[Pair]]] = {}

    def load(losses: int) -> None:
        worker = start()
        running[worker.ready.remote()] = worker, losses, []

    for _ in range(count):
        load(0)
    while waiting or any(batch for _, _, batch in running.values()):
        while waiting and free:
            worker, batch = free.pop(), _take(waiting, deaths, min(at_once, math.ceil(len(work) / count)))
            running[_submit(worker, batch, rows)] = worker, 0, batch
        busy = any(batch for _, _, batch in running.values())
        done, _ = ray.wait(list(running), timeout=None if busy else _SECONDS_WITHOUT_WORKERS)
        if not done:
            logger.warning("Still waiting for a worker: Ray has no room for one, or it is loading the model.")
            continue
        worker, losses, batch = running.pop(done[0])
        try:
            answer = ray.get(done[0])
        except RayTaskError as error:
            raise error.cause from error
        except (RayActorError, OutOfMemoryError) as error:
            ray.kill(worker)
            said = reason(Exception(str(error).strip().splitlines()[-1]))
            logger.warning("A worker died (%s); another takes over what it had.", said)
            # Those that are idle may be dead too, which must not be put down to a leaf.
            running |= {idle.ready.remote(): (idle, 0, []) for idle in free}
            free.clear()
            losses = 0 if batch else losses + 1
            if losses < _TRIES:
                load(losses)
            elif not running:
                raise HarpError(f"All workers died while they loaded the model, the last one so: {said}.") from error
            deaths.update(batch)
            for pair in batch:
                if deaths[pair] < _TRIES:
                    waiting.appendleft(pair)
                else:
                    yield pair, _lost(pair, said)
        else:
            free.append(worker)
            if batch:
                yield from zip(batch, answer, strict=True)
            else:
                at_once = answer


def _take(waiting: deque[Pair], deaths: Counter[Pair], most: int) -> list[Pair]:
    """What one worker measures next; the base model, and a leaf of which a worker may have died, alone."""
    batch = [waiting.popleft()]
    while waiting and len(batch) < most and not any(p == _BASE or deaths[p] for p in (batch[0], waiting[0])):
        batch.append(waiting.popleft())
    return batch


def _submit(worker: Any, batch: list[Pair], rows: Callable[[int], np.ndarray]) -> ray.ObjectRef:
    if batch == [_BASE]:
        return worker.score_base.remote()
    return worker.measure.remote(batch, {leaf: rows(leaf) for leaf, _ in batch})


def _lost(pair: Pair, said: str) -> dict[str, Any]:
    """What is recorded of a leaf whose workers all died."""
    if pair == _BASE:
        raise HarpError(f"The base model could not be scored: {_TRIES} workers died of it, the last one so: {said}.")
    return {"reason": f"{_TRIES} workers died of it, the last one so: {said}"}


class Worker:
    """Keeps the model, finetunes it on leaves and scores the adapters; an actor on some node of the cluster.

    Args:
        cores: Threads that it computes with.
        sent: References to what [`_send`] put into Ray's object store.
    """

    def __init__(self, cores: int, sent: dict[str, Any]) -> None:
        self._cores = cores
        self._sent = sent

    def ready(self) -> int:
        """Load the model and tokenise the pool, the first time; how many leaves are best measured at once."""
        finetuner, evaluator = self._tools
        at_once = evaluator().adapters_at_once
        finetuner()
        return at_once

    def score_base(self) -> list[dict[str, Any]]:
        """What `base.npz` holds, in a list."""
        _, evaluator = self._tools
        return [score_base(evaluator, self._limit)]

    def measure(self, batch: list[Pair], rows: dict[int, np.ndarray]) -> list[dict[str, Any]]:
        """What the files of a batch hold; see [`measure_batch`]."""
        finetuner, evaluator = self._tools
        return measure_batch(batch, rows.__getitem__, finetuner(), evaluator, self._limit)

    @cached_property
    def _tools(self) -> tuple[Callable[[], LeafFinetuner], Callable[[], Evaluator]]:
        torch.set_num_threads(self._cores)
        given = {}
        for name, reference in self._sent.items():
            try:
                given[name] = ray.get(reference)
            except Exception as error:  # unpickling raises whatever it runs into
                raise ConfigError(f"The workers of Ray cannot read the {name}: {reason(error)}.") from error
        kind, settings = given.pop("settings")
        args = kind(**settings)
        self._limit = args.measurement_timeout
        if "tensorboard" not in args.report_to:
            self._folder = tempfile.TemporaryDirectory(prefix="harp-")
            args.output_dir = str(Path(self._folder.name) / Path(args.output_dir).name)
        return open_tools(**given, args=args)


@contextmanager
def _connected(address: str) -> Iterator[None]:
    """Within a cluster: the one the process is connected to already, else that at `address`."""
    if ray.is_initialized():
        yield
        return
    _check_reachable(address)
    dashboard = None if address != "local" else False
    in_main_thread = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGTERM)
    # Ray prints pages to stdout when a process of its dies; they are in its log files too.
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
        try:
            ray.init(address, include_dashboard=dashboard, log_to_driver=False, logging_level=logging.ERROR)
            if in_main_thread:
                signal.signal(signal.SIGTERM, before)  # Ray has put its own in its place
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise ConfigError(f"Ray cannot be reached at {address!r}: {reason(error)}.") from error
        try:
            yield
        finally:
            ray.shutdown()


def _check_reachable(address: str) -> None:
    """Raise [`ConfigError`] where nothing listens at `host:port`, as Ray takes minutes to give up."""
    host, _, port = address.rpartition(":")
    if not port.isdigit():
        return
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except OSError as error:
        raise ConfigError(f"Ray cannot be reached at {address!r}: {reason(error)}.") from error


@contextmanager
def _workers(given: Inputs, args: HarpConfig, most: int) -> Iterator[tuple[Callable[[], Any], int]]:
    """A function that asks Ray for a worker, and how many workers there should be, at most `most`."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    cores, gpus = args.ray_cores_per_worker, args.ray_gpus_per_worker
    if gpus is None:
        gpus = float(not args.use_cpu and any(node.get("GPU") for node in nodes))
    count = min(args.ray_num_workers or sum(_fitting(node, cores, gpus) for node in nodes), most)
    if count == 0:
        raise ConfigError(f"No node of the Ray cluster has the {cores} cores and {gpus:g} GPUs of one worker.")
    sent = _send(given, args)
    actor = ray.remote(Worker).options(num_cpus=cores, num_gpus=gpus)
    started: list[Any] = []

    def start() -> Any:
        started.append(actor.remote(cores, sent))
        return started[-1]

    logger.info("Measuring on %d workers of Ray, each with %d cores and %g GPUs.", count, cores, gpus)
    try:
        yield start, count
    finally:
        for worker in started:
            ray.kill(worker)


def _fitting(node: dict[str, float], cores: int, gpus: float) -> int:
    """How many workers a node with these resources has room for."""
    room = node.get("CPU", 0) / cores
    return int(min(room, node.get("GPU", 0) / gpus + 1e-9) if gpus else room)


def _send(given: Inputs, args: HarpConfig) -> dict[str, Any]:
    """Put what workers need into Ray's object store, once; they need nothing of this machine's disk.

    Raises:
        ConfigError: Something cannot be pickled.
    """
    model = given.model
    if isinstance(model, str) and Path(model).exists():
        model = str(Path(model).resolve())
    settings = {field.name: getattr(args, field.name) for field in fields(args) if field.init}
    # The tokenizer has the template already.
    settings |= {"output_dir": str(Path(args.output_dir or "harp_output").resolve()), "chat_template_path": None}
    pool = Dataset(InMemoryTable(given.pool.with_format("arrow")[:]), info=DatasetInfo(features=given.pool.features))
    parts = {
        "model": model,
        "pool": pool,
        "proxy": given.proxy,
        "metrics": given.metrics,
        "peft_config": given.peft_config,
        "tokenizer": given.tokenizer,
        "settings": (type(args), settings),
    }
    sent = {}
    for name, part in parts.items():
        try:
            sent[name] = ray.put(part)
        except Exception as error:  # pickling raises whatever it runs into
            said = reason(error.__cause__ or error)
            raise ConfigError(f"`executor` is 'ray', but the {name} cannot be sent to its workers: {said}.") from error
    return sent
