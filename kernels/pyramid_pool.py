"""pyramid_pool in Triton. The maths stands in `pspnet_fast/ops/pyramid_pool.py`.

Bins that all divide one number, `units`, have windows that are unions of the same few segments of an axis: the pixels
that only one of the `units` finest windows holds and, where `units` does not divide the axis, those that two neighbours
share. All pixels of a block, a segment of rows by a segment of columns, lie in the same windows at every level. So the
forward pass sums each block once and each cell adds up blocks; the backward pass gathers the windows once per block.

Two memory formats, each with a walk of its own in both directions, make the file as long as it is.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache, partial
from math import gcd, lcm
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from . import CompileCase, compile_case, on_device, refuses
from .geometry import (
    bin_end,
    bin_start,
    cell_count,
    device_function,
    fraction,
    level_of,
    level_starts,
    refuses_size,
    round_to,
    tiles,
)

# Where no number up to MOST_UNITS is a multiple of all bins, the forward pass is one for each group of bins that have
# such a number (or share a larger bin), and the backward pass takes every pixel for a block.
MOST_UNITS = 12
# Pixels along a segment; a longer one is cut, by a multiple of its units, for enough programs.
LONGEST = 16


class _Axis(NamedTuple):
    """An axis cut into segments: `units` windows, and with `split` also the ends that neighbouring windows share."""

    size: int
    units: int
    split: int

    @property
    def segments(self) -> int:
        return (self.units << self.split) - self.split


def _axis(size: int, units: int, longest: int) -> _Axis:
    units *= triton.cdiv(size, units * longest)
    if size < 2 * units - 1:
        return _Axis(size, size, 0)  # each pixel is a segment
    return _Axis(size, units, int(size % units != 0))


@cache
def _groups(bins: tuple[int, ...]) -> list[tuple[int, tuple[int, ...]]]:
    """Levels grouped by the number their bins divide: (units, levels)."""
    groups: list[tuple[int, tuple[int, ...]]] = []
    for level in sorted(range(len(bins)), key=lambda k: -bins[k]):
        for index, (units, members) in enumerate(groups):
            if lcm(units, bins[level]) <= max(units, MOST_UNITS):
                groups[index] = (lcm(units, bins[level]), (*members, level))
                break
        else:
            groups.append((bins[level], (level,)))
    return groups


@device_function
def _segments(units, split):
    return (units << split) - split


@device_function
def _edge(segment, size, units, split):
    """First pixel of a segment. With `split` odd segments are shared ends: they start where the next window does."""
    window = (segment + split) >> split
    round_up = split & ((segment & 1) ^ 1)
    return (window * size + round_up * (units - 1)) // units


@device_function
def _segment(pixel, size, units, split):
    """The segment of a pixel, from the first and the last window that hold it."""
    return bin_start(pixel, units, size) + split * (bin_end(pixel, units, size) - 1)


@device_function
def _channels(C, BLOCK_C: tl.constexpr):
    """Image and channels of this program, from the first axis of the grid."""
    c_tiles = tiles(C, BLOCK_C)
    n = (tl.program_id(0) // c_tiles).to(tl.int64)
    return n, tl.program_id(0) % c_tiles * BLOCK_C + tl.arange(0, BLOCK_C)


_AXES = ["H", "H_UNITS", "H_SPLIT", "W", "W_UNITS", "W_SPLIT"]  # not specialised: no compilation per size


@triton.jit(do_not_specialize=_AXES)
def _pyramid_pool_forward_channels_last_kernel(
    x_ptr, sums_ptr, copy_ptr, C, copy_channels, H, H_UNITS, H_SPLIT, W, W_UNITS, W_SPLIT,
    COPY: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Sums of blocks, channels_last; with COPY also x itself to C of `copy_channels` channels.

    Grid: one program owns BLOCK_C channels of one block of one image.
    Tile: BLOCK_C channels x BLOCK_P pixels; it walks the block's pixels row by row.
    Traffic: reads x, and writes it with COPY; writes N * blocks * C float32 (36 or 121 blocks for bins 1, 2, 3, 6 and
        60 or 61 pixels).
    """
    n, c = _channels(C, BLOCK_C)
    h_id = tl.program_id(1)
    w_id = tl.program_id(2)
    h_start = _edge(h_id, H, H_UNITS, H_SPLIT)
    w_start = _edge(w_id, W, W_UNITS, W_SPLIT)
    width = _edge(w_id + 1, W, W_UNITS, W_SPLIT) - w_start
    pixels = (_edge(h_id + 1, H, H_UNITS, H_SPLIT) - h_start) * width
    total = tl.full([BLOCK_C, BLOCK_P], 0, tl.float32)
    for p_start in range(0, pixels, BLOCK_P):
        p = p_start + tl.arange(0, BLOCK_P)
        pixel = n * H * W + ((h_start + p // width) * W + w_start + p % width)
        mask = (c < C)[:, None] & (p < pixels)[None, :]
        value = tl.load(x_ptr + c[:, None] + (pixel * C)[None, :], mask=mask, other=0)
        if COPY:
            tl.store(copy_ptr + c[:, None] + (pixel * copy_channels)[None, :], value, mask=mask)
        total += value.to(tl.float32)
    block = (n * tl.num_programs(1) + h_id) * tl.num_programs(2) + w_id
    tl.store(sums_ptr + block * C + c, tl.sum(total, 1), mask=c < C)


@triton.jit(do_not_specialize=[*_AXES, "PLANES", "W_VECTORS", "columns"])
def _pyramid_pool_forward_nchw_kernel(
    x_ptr, sums_ptr, copy_ptr, PLANES, C, copy_channels, H, H_UNITS, H_SPLIT, W_VECTORS, W_UNITS, W_SPLIT, columns,
    COPY: tl.constexpr, VECTOR: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """Sums of blocks, NCHW; with COPY also x itself to C of `copy_channels` channels.

    Grid: one program owns BLOCK_C planes, one segment of rows and `columns` segments of columns.
    Tile: BLOCK_C planes x BLOCK_W columns, summed over the rows, BLOCK_H at a time; then over each segment of columns.
    Traffic: reads x, and writes it with COPY; writes N * blocks * C float32 (36 or 121 blocks for bins 1, 2, 3, 6 and
        60 or 61 pixels).
    """
    W = W_VECTORS * VECTOR
    plane = tl.program_id(0).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    h_id = tl.program_id(1)
    w_id = tl.program_id(2) * columns
    w_end = tl.minimum(w_id + columns, _segments(W_UNITS, W_SPLIT))
    w = _edge(w_id, W, W_UNITS, W_SPLIT) // VECTOR * VECTOR + tl.arange(0, BLOCK_W)
    mask = (plane < PLANES)[:, None] & (w < W)[None, :]
    h_end = _edge(h_id + 1, H, H_UNITS, H_SPLIT)
    total = tl.full([BLOCK_C, BLOCK_W], 0, tl.float32)
    for h_start in range(_edge(h_id, H, H_UNITS, H_SPLIT), h_end, BLOCK_H):
        for row in tl.static_range(BLOCK_H):
            offset = ((plane * H + (h_start + row)) * W)[:, None] + w[None, :]
            row_mask = mask & (h_start + row < h_end)
            value = tl.load(x_ptr + offset, mask=row_mask, other=0)
            if COPY:  # columns that two tiles share are written by both, alike
                copy_plane = plane // C * copy_channels + plane % C
                offset = ((copy_plane * H + (h_start + row)) * W)[:, None] + w[None, :]
                tl.store(copy_ptr + offset, value, mask=row_mask)
            total += value.to(tl.float32)
    segment = _segment(w, W, W_UNITS, W_SPLIT)
    row_of_blocks = (plane // C * tl.num_programs(1) + h_id) * _segments(W_UNITS, W_SPLIT)
    for s in range(w_id, w_end):
        block_sum = tl.sum(tl.where((segment == s)[None, :], total, 0.0), 1)
        tl.store(sums_ptr + (row_of_blocks + s) * C + plane % C, block_sum, mask=plane < PLANES)


@device_function
def _first_segment(i, bins, units, split):
    return tl.maximum((bin_start(i, units, bins) << split) - split, 0)


@device_function
def _end_segment(i, bins, units, split):
    return tl.minimum(bin_end(i, units, bins) << split, _segments(units, split))


@triton.jit(do_not_specialize=[*_AXES, "S"])
def _pyramid_pool_forward_cells_kernel(
    sums_ptr, out_ptr, S, C, H, H_UNITS, H_SPLIT, W, W_UNITS, W_SPLIT,
    BINS: tl.constexpr, SHIFTS: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Means of cells from sums of blocks. Cells are counted through BINS; those of BINS[k] stand SHIFTS[k] rows later.

    Grid: one program owns BLOCK_C channels of one cell of one image.
    Tile: BLOCK_C channels x BLOCK_B blocks; it walks the cell's blocks row by row.
    Traffic: reads the sums once a level (levels * N * blocks * C float32, cached); writes N * S * C.
    """
    n, c = _channels(C, BLOCK_C)
    cell = tl.program_id(1)
    level, bins, start = level_of(cell, BINS)
    i = (cell - start) // bins
    j = (cell - start) % bins
    h_first = _first_segment(i, bins, H_UNITS, H_SPLIT)
    w_first = _first_segment(j, bins, W_UNITS, W_SPLIT)
    width = _end_segment(j, bins, W_UNITS, W_SPLIT) - w_first
    blocks = (_end_segment(i, bins, H_UNITS, H_SPLIT) - h_first) * width
    first = n * _segments(H_UNITS, H_SPLIT) + h_first
    total = tl.full([BLOCK_C, BLOCK_B], 0, tl.float32)
    for b_start in range(0, blocks, BLOCK_B):
        b = b_start + tl.arange(0, BLOCK_B)
        block = (first + b // width) * _segments(W_UNITS, W_SPLIT) + (w_first + b % width)
        mask = (c < C)[:, None] & (b < blocks)[None, :]
        total += tl.load(sums_ptr + c[:, None] + (block * C)[None, :], mask=mask, other=0)
    area = (bin_end(i, H, bins) - bin_start(i, H, bins)) * (bin_end(j, W, bins) - bin_start(j, W, bins))
    mean = tl.div_rn(tl.sum(total, 1), area.to(tl.float32))
    for k in tl.static_range(len(BINS)):
        if SHIFTS[k] != 0:
            cell += tl.where(level == k, SHIFTS[k], 0)
    tl.store(out_ptr + (n * S + cell) * C + c, round_to(mean, out_ptr.dtype.element_ty), mask=c < C)


@triton.jit(do_not_specialize=[*_AXES, "reach_h", "reach_w"])
def _pyramid_pool_backward_blocks_kernel(
    grad_ptr, blocks_ptr, C, reach_h, reach_w, H, H_UNITS, H_SPLIT, W, W_UNITS, W_SPLIT,
    BINS: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """What each pixel of a block receives from the pyramid: of every window that holds it, the gradient over the area.

    Grid: one program owns BLOCK_C channels of BLOCK_B blocks beside each other.
    Tile: BLOCK_B blocks x BLOCK_C channels; it walks the levels, at each at most `reach_h` x `reach_w` windows.
    Traffic: reads grad once a block and level (cached); writes N * blocks * C float32.
    """
    n, c = _channels(C, BLOCK_C)
    h_id = tl.program_id(1)
    w_segments = _segments(W_UNITS, W_SPLIT)
    w_id = tl.program_id(2) * BLOCK_B + tl.arange(0, BLOCK_B)
    mask = (w_id < w_segments)[:, None] & (c < C)[None, :]
    h = _edge(h_id, H, H_UNITS, H_SPLIT)
    w = _edge(w_id, W, W_UNITS, W_SPLIT)
    total = tl.full([BLOCK_B, BLOCK_C], 0, tl.float32)
    for reach in range(reach_h * reach_w):
        for k in tl.static_range(len(BINS)):
            # The windows that hold a pixel are the pixels that a window holds, with the sizes exchanged.
            i = bin_start(h, BINS[k], H) + reach // reach_w
            j = bin_start(w, BINS[k], W) + reach % reach_w
            inside = (i < bin_end(h, BINS[k], H)) & (j < bin_end(w, BINS[k], W))
            height = bin_end(i, H, BINS[k]) - bin_start(i, H, BINS[k])
            width = bin_end(j, W, BINS[k]) - bin_start(j, W, BINS[k])
            cell = n * cell_count(BINS) + (level_starts(BINS)[k] + i * BINS[k] + j)
            value = tl.load(grad_ptr + cell[:, None] * C + c[None, :], mask=inside[:, None] & mask, other=0)
            total += value.to(tl.float32) * fraction(1, height * width)[:, None]
    block = (n * tl.num_programs(1) + h_id) * w_segments + w_id
    tl.store(blocks_ptr + block[:, None] * C + c[None, :], total, mask=mask)


@triton.jit(do_not_specialize=_AXES)
def _pyramid_pool_backward_channels_last_kernel(
    blocks_ptr, grad_input_ptr, out_ptr, C, image_stride, pixel_stride, H, H_UNITS, H_SPLIT, W, W_UNITS, W_SPLIT,
    HAS_INPUT: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Gradient of x, channels_last: to every pixel what its block receives, and grad_input.

    Grid: one program owns BLOCK_C channels of one block of one image.
    Tile: BLOCK_P pixels x BLOCK_C channels; it walks the block's pixels row by row.
    Traffic: reads grad_input and N * blocks * C float32; writes N * C * H * W.
    """
    n, c = _channels(C, BLOCK_C)
    h_id = tl.program_id(1)
    w_id = tl.program_id(2)
    block = (n * tl.num_programs(1) + h_id) * tl.num_programs(2) + w_id
    received = tl.load(blocks_ptr + block * C + c, mask=c < C, other=0)
    h_start = _edge(h_id, H, H_UNITS, H_SPLIT)
    w_start = _edge(w_id, W, W_UNITS, W_SPLIT)
    width = _edge(w_id + 1, W, W_UNITS, W_SPLIT) - w_start
    pixels = (_edge(h_id + 1, H, H_UNITS, H_SPLIT) - h_start) * width
    for p_start in range(0, pixels, BLOCK_P):
        p = p_start + tl.arange(0, BLOCK_P)
        pixel = (h_start + p // width) * W + w_start + p % width
        mask = (p < pixels)[:, None] & (c < C)[None, :]
        value = tl.broadcast_to(received[None, :], [BLOCK_P, BLOCK_C])
        if HAS_INPUT:
            offset = n * image_stride + pixel.to(tl.int64) * pixel_stride
            value += tl.load(grad_input_ptr + offset[:, None] + c[None, :], mask=mask, other=0).to(tl.float32)
        offset = (n * H * W + pixel) * C
        tl.store(out_ptr + offset[:, None] + c[None, :], round_to(value, out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=[*_AXES, "PLANES", "W_VECTORS"])
def _pyramid_pool_backward_nchw_kernel(
    blocks_ptr, grad_input_ptr, out_ptr, PLANES, C, image_stride, H, H_UNITS, H_SPLIT, W_VECTORS, W_UNITS, W_SPLIT,
    HAS_INPUT: tl.constexpr,
    VECTOR: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """Gradient of x, NCHW: to every pixel what its block receives, and grad_input.

    Grid: one program owns BLOCK_C planes, one segment of rows and BLOCK_W columns.
    Tile: BLOCK_C planes x BLOCK_W columns; it walks the rows, BLOCK_H at a time.
    Traffic: reads grad_input and N * blocks * C float32; writes N * C * H * W.
    """
    W = W_VECTORS * VECTOR
    plane = tl.program_id(0).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    h_id = tl.program_id(1)
    w = tl.program_id(2) * BLOCK_W + tl.arange(0, BLOCK_W)
    mask = (plane < PLANES)[:, None] & (w < W)[None, :]
    n = plane // C
    c = plane % C
    row_of_blocks = (n * tl.num_programs(1) + h_id) * _segments(W_UNITS, W_SPLIT)
    block = row_of_blocks[:, None] + _segment(w, W, W_UNITS, W_SPLIT)[None, :]
    received = tl.load(blocks_ptr + block * C + c[:, None], mask=mask, other=0)
    h_end = _edge(h_id + 1, H, H_UNITS, H_SPLIT)
    for h_start in range(_edge(h_id, H, H_UNITS, H_SPLIT), h_end, BLOCK_H):
        for row in tl.static_range(BLOCK_H):
            h = h_start + row
            row_mask = mask & (h < h_end)
            value = received
            if HAS_INPUT:
                offset = (n * image_stride + (c * H + h) * W)[:, None] + w[None, :]
                value += tl.load(grad_input_ptr + offset, mask=row_mask, other=0).to(tl.float32)
            offset = ((plane * H + h) * W)[:, None] + w[None, :]
            tl.store(out_ptr + offset, round_to(value, out_ptr.dtype.element_ty), mask=row_mask)


def pyramid_pool_refuses(*args: Any) -> str | None:
    """Arguments of pyramid_pool_forward, _concat or _backward; of a tensor alone, what holds for any bins."""
    if len(args) == 1:
        return refuses(args[0])
    size, bins = (args[2], args[3]) if len(args) == 5 else (args[0].shape[2:], args[1])
    return refuses(args[0]) or refuses_size(size, bins)


def _channels_last_tile(itemsize: int) -> dict[str, int]:
    """16-byte accesses by 16 threads along C; with two warps each thread has four in flight."""
    return {"BLOCK_P": 16, "BLOCK_C": 256 // itemsize}


def _nchw_tile(width: int, itemsize: int) -> dict[str, int]:
    """A whole row where it fits into 256 columns; accesses as wide as every row's alignment allows."""
    block_w = min(max(triton.next_power_of_2(width), 16), 256)
    return {"VECTOR": gcd(width, 16 // itemsize), "BLOCK_C": 1024 // block_w, "BLOCK_H": 4, "BLOCK_W": block_w}


CELLS_TILE = {"BLOCK_B": 32, "BLOCK_C": 64}
BLOCKS_TILE = {"BLOCK_B": 8, "BLOCK_C": 64}
CHANNELS_LAST_WARPS, NCHW_WARPS, CELLS_WARPS, BLOCKS_WARPS = 2, 4, 4, 4


def _block_sums(x: torch.Tensor, units: int, copy: torch.Tensor | None) -> tuple[torch.Tensor, _Axis, _Axis]:
    """`copy`, if given, has x's size, in wider images, and becomes equal to x."""
    n, c, height, width = x.shape
    copied = x if copy is None else copy
    nchw = x.is_contiguous()
    tile = _nchw_tile(width, x.itemsize) if nchw else _channels_last_tile(x.itemsize)
    # What of a row surely fits into a tile that starts at a multiple of VECTOR and ends at an edge.
    fits = tile["BLOCK_W"] - tile["VECTOR"] - 1 if nchw else LONGEST
    rows, columns = _axis(height, units, LONGEST), _axis(width, units, fits)
    sums = torch.empty((n, rows.segments, columns.segments, c), dtype=torch.float32, device=x.device)
    if nchw:
        windows = columns.units if width <= tile["BLOCK_W"] else fits * columns.units // width
        segments = windows << columns.split
        grid = (triton.cdiv(n * c, tile["BLOCK_C"]), rows.segments, triton.cdiv(columns.segments, segments))
        _pyramid_pool_forward_nchw_kernel[grid](
            x, sums, copied, n * c, c, copied.stride(0) // (height * width),
            *rows, width // tile["VECTOR"], *columns[1:], segments,
            COPY=copy is not None, **tile, num_warps=NCHW_WARPS,
        )  # fmt: skip
    else:
        grid = (n * triton.cdiv(c, tile["BLOCK_C"]), rows.segments, columns.segments)
        _pyramid_pool_forward_channels_last_kernel[grid](
            x, sums, copied, c, copied.stride(0) // (height * width), *rows, *columns,
            COPY=copy is not None, **tile, num_warps=CHANNELS_LAST_WARPS,
        )  # fmt: skip
    return sums, rows, columns


def _pool(x: torch.Tensor, bins: tuple[int, ...], copy: torch.Tensor | None) -> torch.Tensor:
    n, c = x.shape[:2]
    starts = level_starts(bins)
    out = torch.empty((n, cell_count(bins), c), dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    with on_device(x):
        for units, levels in _groups(bins):
            sums, rows, columns = _block_sums(x, units, copy)
            copy = None  # the first group's pass has made it
            group = tuple(bins[k] for k in levels)
            shifts = tuple(starts[k] - start for k, start in zip(levels, level_starts(group), strict=True))
            grid = (n * triton.cdiv(c, CELLS_TILE["BLOCK_C"]), cell_count(group))
            _pyramid_pool_forward_cells_kernel[grid](
                sums, out, out.shape[1], c, *rows, *columns,
                BINS=group, SHIFTS=shifts, **CELLS_TILE, num_warps=CELLS_WARPS,
            )  # fmt: skip
    return out


def pyramid_pool_forward(x: torch.Tensor, bins: Sequence[int]) -> torch.Tensor:
    return _pool(x, tuple(bins), None)


def pyramid_pool_concat(
    x: torch.Tensor, bins: Sequence[int], channels: int, first_channel: int
) -> tuple[torch.Tensor, torch.Tensor]:
    n, c, height, width = x.shape
    memory_format = torch.contiguous_format if x.is_contiguous() else torch.channels_last
    out = torch.empty((n, channels, height, width), dtype=x.dtype, device=x.device, memory_format=memory_format)
    return _pool(x, tuple(bins), out.narrow(1, first_channel, c)), out


def _reach(size: int, bins: Sequence[int]) -> int:
    """The largest number of windows of one level that hold the same pixel of an axis, or one more."""
    return max(triton.cdiv(b, size) + int(size % b != 0 and b % size != 0) for b in bins)


def pyramid_pool_backward(
    grad: torch.Tensor, grad_input: torch.Tensor | None, size: Sequence[int], bins: Sequence[int], channels_last: bool
) -> torch.Tensor:
    bins, (n, _, c), (height, width) = tuple(bins), grad.shape, size
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    out = torch.empty((n, c, height, width), dtype=grad.dtype, device=grad.device, memory_format=memory_format)
    if out.numel() == 0:
        return out
    groups = _groups(bins)
    units = groups[0][0] if len(groups) == 1 else max(height, width)
    rows, columns = _axis(height, units, LONGEST), _axis(width, units, LONGEST)
    blocks = torch.empty((n, rows.segments, columns.segments, c), dtype=torch.float32, device=grad.device)
    top = out if grad_input is None else grad_input
    with on_device(grad):
        tiles_w = triton.cdiv(columns.segments, BLOCKS_TILE["BLOCK_B"])
        grid = (n * triton.cdiv(c, BLOCKS_TILE["BLOCK_C"]), rows.segments, tiles_w)
        _pyramid_pool_backward_blocks_kernel[grid](
            grad, blocks, c, _reach(height, bins), _reach(width, bins), *rows, *columns,
            BINS=bins, **BLOCKS_TILE, num_warps=BLOCKS_WARPS,
        )  # fmt: skip
        if channels_last:
            tile = _channels_last_tile(grad.itemsize)
            grid = (n * triton.cdiv(c, tile["BLOCK_C"]), rows.segments, columns.segments)
            _pyramid_pool_backward_channels_last_kernel[grid](
                blocks, top, out, c, top.stride(0), top.stride(-1 if width > 1 else -2), *rows, *columns,
                HAS_INPUT=grad_input is not None, **tile, num_warps=CHANNELS_LAST_WARPS,
            )  # fmt: skip
        else:
            tile = _nchw_tile(width, grad.itemsize)
            grid = (triton.cdiv(n * c, tile["BLOCK_C"]), rows.segments, triton.cdiv(width, tile["BLOCK_W"]))
            _pyramid_pool_backward_nchw_kernel[grid](
                blocks, top, out, n * c, c, top.stride(0), *rows, width // tile["VECTOR"], *columns[1:],
                HAS_INPUT=grad_input is not None, **tile, num_warps=NCHW_WARPS,
            )  # fmt: skip
    return out


def _compile_cases() -> Iterator[CompileCase]:
    bins = (1, 2, 3, 6)
    for dtype in (torch.bfloat16, torch.float32):
        case = partial(compile_case, dtype=dtype, sums_ptr="*fp32", blocks_ptr="*fp32")
        tile = _channels_last_tile(dtype.itemsize)
        for copy in (False, True):
            yield case(
                _pyramid_pool_forward_channels_last_kernel,
                constexprs={"COPY": copy, **tile},
                num_warps=CHANNELS_LAST_WARPS,
                divisible=("C", "copy_channels"),
            )
        for has_input in (False, True):
            yield case(
                _pyramid_pool_backward_channels_last_kernel,
                constexprs={"HAS_INPUT": has_input, **tile},
                num_warps=CHANNELS_LAST_WARPS,
                divisible=("C", "image_stride", "pixel_stride"),
            )
        for width in (60, 61, 256):
            tile = _nchw_tile(width, dtype.itemsize)
            for copy in (False, True):
                yield case(
                    _pyramid_pool_forward_nchw_kernel,
                    constexprs={"COPY": copy, **tile},
                    num_warps=NCHW_WARPS,
                    divisible=("C", "copy_channels"),
                )
            yield case(
                _pyramid_pool_backward_nchw_kernel,
                constexprs={"HAS_INPUT": True, **tile},
                num_warps=NCHW_WARPS,
                divisible=("C", "image_stride"),
            )
        yield case(
            _pyramid_pool_forward_cells_kernel,
            constexprs={"BINS": bins, "SHIFTS": (0,) * len(bins), **CELLS_TILE},
            num_warps=CELLS_WARPS,
        )
        yield case(
            _pyramid_pool_backward_blocks_kernel, constexprs={"BINS": bins, **BLOCKS_TILE}, num_warps=BLOCKS_WARPS
        )


COMPILE_CASES = [*_compile_cases()]
