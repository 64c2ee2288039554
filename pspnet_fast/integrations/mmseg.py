"""open-mmlab/mmsegmentation, decode_heads/psp_head.py and uper_head.py: `PPM`, a list of levels that returns a list."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from torch import nn

from .family import LIST, Family, Head, Pyramid, features, leaves, pyramid_of


class PPM(Family):
    """A `ModuleList` that is called; its levels are a pooling and a ConvModule."""

    name = "mmseg"
    layouts = LIST

    def pyramid(self, module: nn.Module) -> Pyramid | None:
        if not isinstance(module, nn.ModuleList) or not hasattr(module, "pool_scales") or not len(module):
            return None
        return pyramid_of([leaves(level) for level in cast("list[nn.Module]", module._modules.values())])


class DecodeHead(Head):
    """`PSPHead` and `UPerHead`: they take feature maps, pool one of them, and convolve `[x, *levels]`."""

    name = "mmseg"
    ppm = "psp_modules"
    layers = "bottleneck"
    families: type[Family] = PPM

    def pyramid(self, head: nn.Module, ppm: nn.Module, of_ppm: Family | None) -> Pyramid | None:
        return of_ppm.pyramid(ppm) if isinstance(of_ppm, self.families) else None

    def inputs(self, head: nn.Module, channels: int, size: tuple[int, int], batch: int) -> Sequence[Any]:
        counts = cast("int | Sequence[int]", head.in_channels)
        if isinstance(counts, int):
            index = cast(int, getattr(head, "in_index", -1))
            maps = [features(counts, size, batch)] * (index + 1 if index >= 0 else -index)
            return (maps,)
        last = len(counts) - 1
        return ([features(c, (size[0] + last - i, size[1] + last - i), batch) for i, c in enumerate(counts)],)
