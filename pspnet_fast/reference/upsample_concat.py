"""upsample_concat in plain PyTorch. The maths stands in `pspnet_fast/ops/upsample_concat.py`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from ..geometry import accumulation_dtype, channel_blocks, is_channels_last, levels, memory_format


def upsample_concat_forward(
    x: torch.Tensor, pyramid: torch.Tensor, bins: Sequence[int], order: Sequence[int], align_corners: bool
) -> torch.Tensor:
    n, reduced = pyramid.shape[0], pyramid.shape[2]
    wide = pyramid.to(accumulation_dtype(pyramid.dtype))
    maps = {-1: x}
    for k, (b, level) in enumerate(zip(bins, levels(wide, bins), strict=True)):
        grid = level.transpose(1, 2).reshape(n, reduced, b, b)
        maps[k] = F.interpolate(grid, x.shape[2:], mode="bilinear", align_corners=align_corners).to(x.dtype)
    out = torch.cat([maps[block] for block in order], 1)
    return out.contiguous(memory_format=memory_format(is_channels_last(x)))


def upsample_concat_backward(
    grad: torch.Tensor, channels: int, bins: Sequence[int], order: Sequence[int], align_corners: bool
) -> torch.Tensor:
    n, total, height, width = grad.shape
    reduced = (total - (channels if -1 in order else 0)) // len(bins)
    starts = channel_blocks(order, channels, reduced)
    wide = grad.to(accumulation_dtype(grad.dtype))
    cells = []
    for k, b in enumerate(bins):
        g = wide[:, starts[k] : starts[k] + reduced]
        level = torch.ops.aten.upsample_bilinear2d_backward(g, (height, width), (n, reduced, b, b), align_corners)
        cells.append(level.flatten(2).transpose(1, 2))
    return torch.cat(cells, 1).to(grad.dtype)
