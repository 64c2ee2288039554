"""segmentation_models_pytorch: `PSPModule` and `PSPDecoder` (decoders/pspnet), `PSPModule` of UPerNet (decoders/upernet)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from .family import X_FIRST, X_LAST, Family, Head, ListedLevels, Pyramid, features


class PSPModule(ListedLevels):
    """x comes last, and the level of bin 1 has a bias in place of a norm."""

    name = "smp"
    levels = "blocks"
    layouts = X_LAST


class UPerNetPSPModule(ListedLevels):
    """x comes first, and a 3x3 convolution follows inside."""

    name = "smp UPerNet"
    levels = "blocks"
    after = ("out_conv",)
    layouts = X_FIRST


class PSPDecoder(Head):
    """It takes the encoder's feature maps, and pools the last."""

    name = "smp"
    ppm = "psp"
    layers = "conv"

    def pyramid(self, head: nn.Module, ppm: nn.Module, of_ppm: Family | None) -> Pyramid | None:
        return of_ppm.pyramid(ppm) if isinstance(of_ppm, PSPModule) else None

    def inputs(self, head: nn.Module, channels: int, size: tuple[int, int], batch: int) -> Sequence[Any]:
        return ([features(channels, size, batch)],)
