"""The processes of one `accelerate launch`: all run one script and share each finetune; the main one does the rest.

What the main process makes reaches the others through the run directory, or as a broadcast value.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from datetime import timedelta
from functools import cache
from typing import Any, TypeVar

import torch.distributed
from accelerate import PartialState

from .errors import ConfigError, HarpError, reason

T = TypeVar("T")
# The others may wait for an evaluation, or for the features of a large pool.
_PATIENCE = timedelta(days=30)


def is_main() -> bool:
    """Whether this is the process that evaluates, writes and prints; true of the only one."""
    return not _several() or torch.distributed.get_rank() == 0


def join() -> None:
    """Check that a trainer shares its work among as many processes as were launched, and silence all but the main one.

    Raises:
        ConfigError: It does not.
    """
    sharing = PartialState().num_processes
    if _several() and torch.distributed.get_world_size() != sharing:
        raise ConfigError(
            f"{torch.distributed.get_world_size()} processes were launched, but a trainer shares its work among "
            f"{sharing}: on CPUs, set `use_cpu`."
        )
    if not is_main():
        logging.getLogger("harp_hf").setLevel(logging.ERROR)


def from_main(work: Callable[[], T]) -> T:
    """What `work` returns on the main process, on all of them; the others wait, however long it takes.

    Raises:
        HarpError: `work` failed on the main process; there, what it raised.
    """
    if not _several():
        return work()
    answer: list[Any] = [None, None]
    if not is_main():
        torch.distributed.broadcast_object_list(answer, src=0, group=_waiting())
        if answer[1]:
            raise HarpError(answer[1])
        return answer[0]
    try:
        answer[0] = work()
    except BaseException as error:
        answer[1] = str(error) if isinstance(error, HarpError) else f"The main process failed: {reason(error)}."
        raise
    finally:
        torch.distributed.broadcast_object_list(answer, src=0, group=_waiting())
    return answer[0]


def main_first(work: Callable[[], T]) -> T:
    """Do `work` on the main process, which keeps what it makes in files, and then on the others, which find them."""
    done: list[T] = []
    from_main(lambda: done.append(work()))
    return done[0] if done else work()


def mean(value: float) -> float:
    """Mean of a number over all processes; not finite where it is not finite on one of them."""
    if not _several():
        return value
    total = torch.tensor([value], dtype=torch.float64)
    torch.distributed.all_reduce(total, group=_waiting())
    return float(total) / torch.distributed.get_world_size()


def leave() -> None:
    """End the work in common; without it PyTorch warns at exit."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _several() -> bool:
    distributed = torch.distributed
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


@cache
def _waiting() -> torch.distributed.ProcessGroup:
    """A group of its own, as waiting in the trainer's would run into `ddp_timeout` and keep a GPU busy."""
    return torch.distributed.new_group(backend="gloo", timeout=_PATIENCE)
