"""Which images a step trains on, and how they are varied: a function of seed and iteration, of nothing else.

Sample p of a run (p counts all samples of all processes from the start) is image `order(seed, p // n)[p % n]` of the n
training images, varied by a generator seeded with (seed, p). So a run that goes on at any iteration, with another number of
workers or processes, sees the same batches: there is no state to save. An epoch's last samples and the next one's first may
share a batch.
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import signal
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Sampler
from torch.utils.data import Dataset as TorchDataset

from .augmentation import Augmentation
from .datasets import Dataset, DatasetError, Sample, read_sample
from .transforms import augment, init_worker

_LOG = logging.getLogger(__name__)

Batch = tuple[torch.Tensor, torch.Tensor]


@lru_cache(maxsize=2)
def order(seed: int, epoch: int, length: int) -> np.ndarray:
    """The permutation of an epoch's images."""
    return np.random.default_rng((seed, epoch)).permutation(length)


class Samples(TorchDataset[Batch]):
    """Sample p of a run, by its number.

    Args:
        dataset: training images and labels.
        crop: side of the crops.
        augmentation: how images are varied.
        seed: of order and variation.
        skip_corrupt: where an image cannot be read, log a warning and take the next one, instead of raising.

    Raises:
        DatasetError: an image or its labels cannot be read, do not fit, or hold a label that the dataset does not have.
    """

    def __init__(
        self, dataset: Dataset, crop: int, augmentation: Augmentation, seed: int, skip_corrupt: bool = False
    ) -> None:
        self.dataset, self.crop, self.augmentation = dataset, crop, augmentation
        self.seed, self.skip_corrupt = seed, skip_corrupt

    def __len__(self) -> int:
        return len(self.dataset.samples)

    def files(self, p: int) -> Sample:
        """The files of sample p."""
        return self.dataset.samples[int(order(self.seed, p // len(self), len(self))[p % len(self)])]

    def __getitem__(self, p: int) -> Batch:
        for each in range(p, p + len(self)):
            sample = self.files(each)
            try:
                image, labels = read_sample(sample, self.dataset)
            except DatasetError as error:
                if not self.skip_corrupt:
                    raise
                _LOG.warning("skipped: %s", error)
                continue
            # Two words, so that it is no epoch's generator.
            random = np.random.default_rng((self.seed, p, 1))
            return augment(image, labels, (self.crop, self.crop), self.augmentation, random)
        raise DatasetError(f"{self.dataset.name}: none of the {len(self)} images can be read")


class Steps(Sampler[list[int]]):
    """The samples of this process, for one micro-batch after another, from an iteration on.

    Args:
        first: iteration to start at.
        last: iteration to stop before.
        batch_size: of a step, all processes together.
        parts: micro-batches of a step in one process.
        rank: of this process.
        processes: how many there are.
    """

    def __init__(
        self, first: int, last: int, batch_size: int, parts: int = 1, rank: int = 0, processes: int = 1
    ) -> None:
        self.first, self.last, self.batch_size = first, last, batch_size
        self.parts, self.rank, self.processes = parts, rank, processes

    def __len__(self) -> int:
        return (self.last - self.first) * self.parts

    def __iter__(self) -> Iterator[list[int]]:
        for iteration in range(self.first, self.last):
            yield from self.of(iteration)

    def of(self, iteration: int) -> list[list[int]]:
        """The micro-batches of one step in this process."""
        own = self.batch_size // self.processes
        start = iteration * self.batch_size + self.rank * own
        size = own // self.parts
        return [[*range(start + i * size, start + (i + 1) * size)] for i in range(self.parts)]


def loader(samples: Samples, steps: Steps, workers: int, device: torch.device) -> DataLoader[Batch]:
    """Batches (N, 3, crop, crop), float32, and (N, crop, crop), uint8, in the order of `steps`."""
    return DataLoader(
        samples,
        batch_sampler=steps,
        num_workers=workers,
        worker_init_fn=_init_worker,
        pin_memory=device.type == "cuda",
        # The same in every worker, so that nothing depends on their number; all chance comes from `Samples`.
        generator=torch.Generator(),
    )


@contextlib.contextmanager
def batches(of: DataLoader[Batch]) -> Iterator[Iterator[Batch]]:
    """The batches of a loader, whose workers have ended when this is left, in whatever way.

    The workers do not end by SIGTERM (`_init_worker`), which is how multiprocessing would end them when the interpreter
    exits: an iterator that an exception's traceback still holds then would have it wait for ever.

    Raises:
        DatasetError: as in `Samples`, in one line, without the worker's traceback.
    """
    before = {*multiprocessing.active_children()}
    iterator: Any = iter(of)
    workers = {*multiprocessing.active_children()} - before
    try:
        yield _in_one_line(iterator)
    finally:
        try:
            if workers:
                iterator._shutdown_workers()
        finally:
            for worker in workers:
                worker.kill()
                worker.join()


def _in_one_line(iterator: Iterator[Batch]) -> Iterator[Batch]:
    try:
        yield from iterator
    except DatasetError as error:
        raise DatasetError(str(error).rsplit(f"{DatasetError.__name__}: ", 1)[-1].strip()) from error


def _init_worker(worker_id: int) -> None:
    """A terminal's Ctrl-C and a scheduler's SIGTERM reach every process: the training process decides when workers end."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    init_worker(worker_id)
