"""The processes that torchrun starts: who this one is among them, and their process group."""

from __future__ import annotations

import contextlib
import os
import traceback
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist


class ProcessError(RuntimeError):
    """Another process of the group failed; the message is its own."""


class Processes(NamedTuple):
    """The place of this process among those of torchrun."""

    rank: int
    local_rank: int
    world_size: int

    @property
    def first(self) -> bool:
        return self.rank == 0

    def device(self, device: torch.device) -> torch.device:
        """The GPU of this process where `device` names none."""
        return torch.device("cuda", self.local_rank) if device.type == "cuda" and device.index is None else device


@contextlib.contextmanager
def processes(device: torch.device) -> Iterator[Processes]:
    """Join torchrun's process group, NCCL on GPUs and gloo on CPUs, where it started this process; leave it at the end."""
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1 and "RANK" not in os.environ:
        yield Processes(0, 0, 1)
        return
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if device.type == "cuda":
        torch.cuda.set_device(Processes(0, local_rank, count).device(device))
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield Processes(dist.get_rank(), local_rank, dist.get_world_size())
    except BaseException as error:
        _let_go(error)
        raise
    finally:
        dist.destroy_process_group()


@contextlib.contextmanager
def together(world_size: int) -> Iterator[None]:
    """Work that every process of the group leaves in the same way: where it fails in one, it fails in all.

    Without, those that did not fail wait in the next collective for one that never comes. The work itself may hold
    collectives only where none can be missed.

    Args:
        world_size: how many there are; with 1 nothing is done.

    Raises:
        ProcessError: where the work of another process raised, with what that was. A process's own exception stays.
    """
    if world_size == 1:
        yield
        return
    failure: Exception | None = None
    try:
        yield
    except Exception as error:
        failure = error
    reports: list[Any] = [None] * world_size
    dist.all_gather_object(reports, None if failure is None else f"{type(failure).__name__}: {failure}")
    if failure is not None:
        raise failure
    for rank, report in enumerate(reports):
        if report is not None:
            raise ProcessError(f"process {rank}: {report}")


def _let_go(error: BaseException | None) -> None:
    """Clear the frames that an exception keeps alive: they may hold a DistributedDataParallel.

    The group joins its threads when its last owner lets it go. torch releases the GIL for that where the owner is Python's
    handle of the group, and not where it is DistributedDataParallel, so one that outlives `destroy_process_group` can wait
    forever for a thread that waits for the GIL.
    """
    seen: set[int] = set()
    while error is not None and id(error) not in seen:  # exceptions may name each other as their causes
        seen.add(id(error))
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__
