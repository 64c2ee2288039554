"""pyramid_pool in plain PyTorch. The maths stands in `pspnet_fast/ops/pyramid_pool.py`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from ..geometry import accumulation_dtype, bin_end, bin_start, is_channels_last, level_starts, memory_format


def pyramid_pool_forward(x: torch.Tensor, bins: Sequence[int]) -> torch.Tensor:
    wide = x.to(accumulation_dtype(x.dtype))
    pooled = [F.adaptive_avg_pool2d(wide, b).flatten(2) for b in bins]
    return torch.cat(pooled, 2).transpose(1, 2).to(x.dtype).clone(memory_format=torch.contiguous_format)


def pyramid_pool_concat(
    x: torch.Tensor, bins: Sequence[int], channels: int, first_channel: int
) -> tuple[torch.Tensor, torch.Tensor]:
    n, c, height, width = x.shape
    format_of_x = memory_format(is_channels_last(x))
    out = torch.empty((n, channels, height, width), dtype=x.dtype, device=x.device, memory_format=format_of_x)
    out.narrow(1, first_channel, c).copy_(x)
    return pyramid_pool_forward(x, bins), out


def pyramid_pool_backward(
    grad: torch.Tensor, grad_input: torch.Tensor | None, size: Sequence[int], bins: Sequence[int], channels_last: bool
) -> torch.Tensor:
    (n, _, c), (height, width) = grad.shape, size
    wide = grad.to(accumulation_dtype(grad.dtype))
    dx = torch.zeros(n, c, height, width, dtype=wide.dtype, device=grad.device)
    if grad_input is not None:
        dx += grad_input
    for start, b in zip(level_starts(bins), bins, strict=True):
        for i in range(b):
            rows = slice(bin_start(i, height, b), bin_end(i, height, b))
            for j in range(b):
                columns = slice(bin_start(j, width, b), bin_end(j, width, b))
                window = dx[:, :, rows, columns]
                window += (wide[:, start + i * b + j] / (window.shape[2] * window.shape[3]))[:, :, None, None]
    return dx.to(grad.dtype).contiguous(memory_format=memory_format(channels_last))
