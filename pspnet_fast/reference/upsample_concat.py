"""upsample_concat in plain PyTorch. The maths stands in `pspnet_fast/ops/upsample_concat.py`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from ..geometry import accumulation_dtype, channel_blocks, is_channels_last, levels, memory_format


def _level_maps(
    pyramid: torch.Tensor, bins: Sequence[int], size: Sequence[int], align_corners: bool
) -> list[torch.Tensor]:
    n, reduced = pyramid.shape[0], pyramid.shape[2]
    wide = pyramid.to(accumulation_dtype(pyramid.dtype))
    grids = [level.transpose(1, 2).reshape(n, reduced, b, b) for b, level in zip(bins, levels(wide, bins), strict=True)]
    return [F.interpolate(grid, tuple(size), mode="bilinear", align_corners=align_corners) for grid in grids]


def upsample_concat_forward(
    x: torch.Tensor, pyramid: torch.Tensor, bins: Sequence[int], order: Sequence[int], align_corners: bool
) -> torch.Tensor:
    maps = [level_map.to(x.dtype) for level_map in _level_maps(pyramid, bins, x.shape[2:], align_corners)]
    out = torch.cat([x if block == -1 else maps[block] for block in order], 1)
    return out.contiguous(memory_format=memory_format(is_channels_last(x)))


def upsample_concat_fill(
    out: torch.Tensor, pyramid: torch.Tensor, bins: Sequence[int], order: Sequence[int], align_corners: bool
) -> None:
    reduced = pyramid.shape[2]
    starts = channel_blocks(order, out.shape[1] - len(bins) * reduced, reduced)
    for k, level_map in enumerate(_level_maps(pyramid, bins, out.shape[2:], align_corners)):
        out.narrow(1, starts[k], reduced).copy_(level_map)


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
