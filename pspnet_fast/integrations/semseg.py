"""hszhao/semseg, model/pspnet.py: `PPM`, inside `PSPNet`, whose `cls` takes the concatenation."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, cast

import torch
from torch import nn

from .family import X_FIRST, Family, Head, ListedLevels, Pyramid


class PPM(ListedLevels):
    """`features`; also zijundeng/pytorch-semantic-segmentation's, with align_corners false."""

    name = "semseg"
    levels = "features"
    layouts = X_FIRST


class PSPNet(Head):
    """The network: it takes images, of 8 n + 1 rows and columns, and in training labels."""

    name = "semseg"
    ppm = "ppm"
    layers = "cls"

    def pyramid(self, head: nn.Module, ppm: nn.Module, of_ppm: Family | None) -> Pyramid | None:
        return of_ppm.pyramid(ppm) if isinstance(of_ppm, PPM) else None

    def inputs(self, head: nn.Module, channels: int, size: tuple[int, int], batch: int) -> Sequence[Any]:
        first = next(module for module in head.modules() if isinstance(module, nn.Conv2d))
        images = torch.randn(batch, first.in_channels, 65, 73, dtype=torch.float64)
        return (images, torch.zeros(batch, 65, 73, dtype=torch.int64)) if head.training else (images,)

    def random(self, head: nn.Module) -> Iterable[nn.Module]:
        return cast(nn.Module, head.ppm), cast(nn.Module, head.cls)
