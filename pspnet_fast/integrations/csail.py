"""CSAILVision/semantic-segmentation-pytorch, mit_semseg/models/models.py: `PPM`, `PPMDeepsup`, and what `UPerNet` has."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from torch import nn

from .family import Family, FamilyError, Head, Pyramid, features, leaves, pyramid_of


class Decoder(Head):
    """`PPM` and `PPMDeepsup` are decoders: levels in `ppm`, a list without a forward, and `conv_last` after them."""

    name = "CSAIL"
    ppm = "ppm"
    layers = "conv_last"

    def pyramid(self, head: nn.Module, ppm: nn.Module, of_ppm: Family | None) -> Pyramid | None:
        if not isinstance(ppm, nn.ModuleList) or not len(ppm):
            return None
        return pyramid_of([leaves(level) for level in cast("list[nn.Module]", ppm._modules.values())])

    def inputs(self, head: nn.Module, channels: int, size: tuple[int, int], batch: int) -> Sequence[Any]:
        maps = [features(channels, size, batch)]
        deep = getattr(head, "cbr_deepsup", None)
        if deep is not None:
            first = next(module for module in deep.modules() if isinstance(module, nn.Conv2d))
            maps.insert(0, features(first.in_channels, size, batch))
        return (maps,)


class UPerNet(Family):
    """FamilyError: its 1x1 convolutions follow the upsampling, where their ReLU is another function."""

    name = "CSAIL UPerNet"

    def pyramid(self, module: nn.Module) -> Pyramid | None:
        if {"ppm_pooling", "ppm_conv"} <= module._modules.keys():
            raise FamilyError("it upsamples the pooled features before their 1x1 convolution, norm and ReLU")
        return None
