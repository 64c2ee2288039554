"""What makes a training repeat: torch's deterministic algorithms, and one seed for every step."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch


@contextlib.contextmanager
def determinism(wanted: bool) -> Iterator[None]:
    """Refuse every operation that does not repeat to the bit, for as long as this lasts, where that is wanted."""
    if not wanted:
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    memory: Any = torch.utils.deterministic
    before = torch.are_deterministic_algorithms_enabled(), memory.fill_uninitialized_memory
    tuned = torch.backends.cudnn.benchmark
    torch.use_deterministic_algorithms(True)
    # Nothing here reads what nobody wrote (the tests fill memory with NaN), so it need not be filled.
    memory.fill_uninitialized_memory, torch.backends.cudnn.benchmark = False, False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        memory.fill_uninitialized_memory, torch.backends.cudnn.benchmark = before[1], tuned


def seed_step(seed: int, iteration: int, rank: int) -> None:
    """All of torch's chance in one step of one process, dropout above all: as good as saving every generator's state."""
    mixed = np.random.SeedSequence((seed, iteration, rank)).generate_state(1, np.uint64)
    torch.manual_seed(int(mixed[0] >> np.uint64(1)))
