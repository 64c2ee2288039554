"""All index arithmetic of the pyramid, in integers: windows, packed levels, bilinear taps, memory formats.

The same names stand again in `kernels/geometry.py` and `csrc/geometry.h`; `tests/test_geometry.py` compares the three.

Packed pyramid: a tensor (N, S, C), channel-contiguous, S = sum of b*b over the bins. Level k's cells are the rows
`level_starts(bins)[k] ...`, row-major inside the level.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch


def bin_start(i: int, size: int, bins: int) -> int:
    """First row (or column) of window `i` when an axis of `size` is pooled to `bins` cells: floor(i * size / bins)."""
    return i * size // bins


def bin_end(i: int, size: int, bins: int) -> int:
    """One past the last row (or column) of window `i`: ceil((i + 1) * size / bins). Windows may overlap by one."""
    return -(-(i + 1) * size // bins)


def cell_count(bins: Sequence[int]) -> int:
    """S: the number of cells of all levels together."""
    return sum(b * b for b in bins)


def level_starts(bins: Sequence[int]) -> list[int]:
    """The packed pyramid's first row of each level."""
    return [0, *accumulate(b * b for b in bins)][:-1]


def levels(pyramid: torch.Tensor, bins: Sequence[int]) -> list[torch.Tensor]:
    """The levels of a packed pyramid as views (N, b*b, C)."""
    return [pyramid[:, start : start + b * b] for start, b in zip(level_starts(bins), bins, strict=True)]


def next_cell(lower: int, size: int, cells: int) -> int:
    """The upper cell of the pixels with this lower one: the next; itself at the end, and on an axis that keeps its size.

    The latter has one cell a pixel, as in torch: a neighbour's NaN or Inf, times a weight of 0, would be NaN.
    """
    return lower if size == cells else min(lower + 1, cells - 1)


def bilinear_tap(i: int, size: int, cells: int, align_corners: bool) -> tuple[int, int, int, int]:
    """Where pixel `i` of an axis of `size` pixels samples an axis of `cells` cells: (lower, upper, numerator, denominator).

    The pixel's value is (1 - f) * cell[lower] + f * cell[upper] with f = numerator / denominator, an exact fraction.
    With align_corners the source coordinate is i * (cells - 1) / (size - 1); without, max(0, (i + 1/2) * cells / size - 1/2).
    """
    if align_corners:
        position, denominator = i * (cells - 1), max(size - 1, 1)
    else:
        position, denominator = max((2 * i + 1) * cells - size, 0), 2 * size
    lower = min(position // denominator, cells - 1)
    return lower, next_cell(lower, size, cells), position - lower * denominator, denominator


def channel_blocks(order: Sequence[int], channels: int, reduced: int) -> dict[int, int]:
    """First channel of every block of the concatenation. Key -1 is x (`channels` wide), key k is level k (`reduced` wide)."""
    widths = [channels if block == -1 else reduced for block in order]
    return dict(zip(order, accumulate(widths, initial=0), strict=False))


def is_channels_last(x: torch.Tensor) -> bool:
    """Whether a 4-D tensor is dense in channels_last order and not also in NCHW order (as with one channel, or one pixel).

    Under torch.func it is said to be in neither: vmap does not tell.
    """
    if x.is_contiguous() or torch._C._are_functorch_transforms_active():
        return False
    return x.is_contiguous(memory_format=torch.channels_last)


def dense(x: torch.Tensor) -> torch.Tensor:
    """`x` itself where it is dense in NCHW or channels_last order, else an NCHW copy."""
    return x if x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last) else x.contiguous()


def memory_format(channels_last: bool) -> torch.memory_format:
    return torch.channels_last if channels_last else torch.contiguous_format


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """What sums are held in: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32
