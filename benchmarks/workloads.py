"""The shapes that are measured, each with the reason for it, and the seeds of their numbers."""

from __future__ import annotations

import zlib
from typing import NamedTuple

import torch

BINS = (1, 2, 3, 6)
FORMATS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}


class Workload(NamedTuple):
    """Features (batch, channels, height, width), each level reduced to `reduced` channels."""

    batch: int
    channels: int
    height: int
    width: int
    reduced: int
    reason: str

    @property
    def size(self) -> tuple[int, int, int, int]:
        return self.batch, self.channels, self.height, self.width


WORKLOADS = {
    "ade20k_473": Workload(
        1, 2048, 60, 60, 512, "a 473 crop at output stride 8: ADE20K, PASCAL VOC; every bin divides"
    ),
    "ade20k_473_pair": Workload(2, 2048, 60, 60, 512, "the smallest batch that bin 1's batch norm can train on"),
    "ade20k_473_batch": Workload(16, 2048, 60, 60, 512, "the paper's batch, on a GPU"),
    "cityscapes_713": Workload(1, 2048, 90, 90, 512, "a 713 crop: Cityscapes; every bin divides"),
    "cityscapes_512x1024": Workload(1, 2048, 64, 128, 512, "half a Cityscapes image: bins 3 and 6 overlap"),
    "resnet18_473": Workload(1, 512, 60, 60, 128, "the small backbones"),
}


def seed_of(*words: object) -> int:
    """A seed made of what is measured: the same at every run, whatever was measured before."""
    return zlib.crc32(" ".join(map(str, words)).encode())
