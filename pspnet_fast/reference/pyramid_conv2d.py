"""pyramid_conv2d in plain PyTorch. The maths stands in `pspnet_fast/ops/pyramid_conv2d.py`."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..geometry import accumulation_dtype, bilinear_tap, cell_count, level_starts


def _axis(
    length: int, cells: int, shift: int, pixels: int, align_corners: bool, like: torch.Tensor
) -> tuple[torch.Tensor, list[tuple[torch.Tensor, torch.Tensor]]]:
    """Of `pixels` outputs, those whose input at `shift` lies in the map, and their two cells with their weights."""
    inside = [i for i in range(pixels) if 0 <= i + shift < length]
    taps = [bilinear_tap(i + shift, length, cells, align_corners) for i in inside]
    weight = torch.tensor([tap[2] / tap[3] for tap in taps], dtype=torch.float64).to(like)
    at, lower, upper = (
        torch.tensor(indices, dtype=torch.long, device=like.device)
        for indices in (inside, [tap[0] for tap in taps], [tap[1] for tap in taps])
    )
    return at, [(lower, 1 - weight), (upper, weight)]


def pyramid_conv2d_forward(
    out: torch.Tensor,
    taps: torch.Tensor,
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
    add: bool,
    relu: bool,
    size: Sequence[int],
    bins: Sequence[int],
    kernel_size: int,
    padding: int,
    align_corners: bool,
) -> None:
    """Writes into `out`, or onto it with `add`."""
    n, channels, rows, columns = out.shape
    k = kernel_size
    total = taps.new_zeros(n, rows, columns, channels)
    for start, b in zip(level_starts(bins), bins, strict=True):
        z = taps[:, start : start + b * b].reshape(n, b, b, k, k, channels)
        for dy in range(k):
            along_w = taps.new_zeros(n, b, columns, channels)
            for dx in range(k):
                inside, ends = _axis(size[1], b, dx - padding, columns, align_corners, taps)
                for cells, weights in ends:
                    along_w.index_add_(2, inside, weights[:, None] * z[:, :, :, dy, dx].index_select(2, cells))
            inside, ends = _axis(size[0], b, dy - padding, rows, align_corners, taps)
            for cells, weights in ends:
                total.index_add_(1, inside, weights[:, None, None] * along_w.index_select(1, cells))
    y = total.permute(0, 3, 1, 2)
    if add:
        y = y + out
    if scale is not None:
        y = y * scale[:, None, None]
    if shift is not None:
        y = y + shift[:, None, None]
    out.copy_(y.relu() if relu else y)


def pyramid_conv2d_backward(
    grad: torch.Tensor, size: Sequence[int], bins: Sequence[int], kernel_size: int, padding: int, align_corners: bool
) -> torch.Tensor:
    (n, channels, rows, columns), k = grad.shape, kernel_size
    g = grad.to(accumulation_dtype(grad.dtype)).permute(0, 2, 3, 1)
    d_taps = g.new_zeros(n, cell_count(bins), k, k, channels)
    for start, b in zip(level_starts(bins), bins, strict=True):
        level = d_taps[:, start : start + b * b].view(n, b, b, k, k, channels)
        for dy in range(k):
            along_h = g.new_zeros(n, b, columns, channels)
            inside, ends = _axis(size[0], b, dy - padding, rows, align_corners, g)
            for cells, weights in ends:
                along_h.index_add_(1, cells, weights[:, None, None] * g.index_select(1, inside))
            for dx in range(k):
                inside, ends = _axis(size[1], b, dx - padding, columns, align_corners, g)
                for cells, weights in ends:
                    level[:, :, :, dy, dx].index_add_(2, cells, weights[:, None] * along_h.index_select(2, inside))
    return d_taps.flatten(2, 3)
