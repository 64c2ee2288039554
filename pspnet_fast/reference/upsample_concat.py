"""upsample_concat in plain PyTorch. The maths stands in `pspnet_fast/ops/upsample_concat.py`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from ..geometry import accumulation_dtype, channel_blocks, is_channels_last, levels, memory_format


def upsample_concat_forward(
    x: torch.Tensor, pyramid: torch.Tensor, bins: Sequence[int], order: Sequence[int], align_corners: bool
) -> torch.Tensor:
    (n, c, height, width), reduced = x.shape, pyramid.shape[2]
    channels = len(bins) * reduced + (c if -1 in order else 0)
    format_of_x = memory_format(is_channels_last(x))
    out = torch.empty((n, channels, height, width), dtype=x.dtype, device=x.device, memory_format=format_of_x)
    if -1 in order:
        out.narrow(1, channel_blocks(order, c, reduced)[-1], c).copy_(x)
    upsample_concat_fill(out, pyramid, bins, order, align_corners)
    return out


def upsample_concat_fill(
    out: torch.Tensor, pyramid: torch.Tensor, bins: Sequence[int], order: Sequence[int], align_corners: bool
) -> None:
    n, reduced = pyramid.shape[0], pyramid.shape[2]
    starts = channel_blocks(order, out.shape[1] - len(bins) * reduced, reduced)
    wide = pyramid.to(accumulation_dtype(pyramid.dtype))
    for k, (b, level) in enumerate(zip(bins, levels(wide, bins), strict=True)):
        grid = level.transpose(1, 2).reshape(n, reduced, b, b)
        level_map = F.interpolate(grid, out.shape[2:], mode="bilinear", align_corners=align_corners)
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
