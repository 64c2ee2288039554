"""upsample_concat in Triton. The maths stands in `pspnet_fast/ops/upsample_concat.py`.

Pixels with the same lower tap stand beside each other, from `tap_start(cell)` to `tap_start(cell + 1)`: over such a run an
axis is interpolated between the same two cells. So a program blends cells along one axis, keeps two blends and walks the
pixels between them; the backward pass walks the same runs and keeps two sums, for the lower and for the upper cell.

Two memory formats, each with a walk of its own in both directions, make the file as long as it is.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import accumulate
from math import gcd
from typing import Any

import torch
import triton
import triton.language as tl

from . import CompileCase, compile_case, on_device, refuses
from .geometry import (
    bilinear_tap,
    cell_count,
    device_function,
    fraction,
    level_of,
    level_starts,
    next_cell,
    refuses_size,
    round_to,
    tap_start,
    tiles,
    upper_weight,
)


@triton.constexpr_function
def _column_starts(bins):
    """First of every level's columns where the columns of all levels stand in one row; last, how many there are."""
    return tuple(accumulate(bins, initial=0))


@device_function
def _first_channel(block, C, R, ORDER: tl.constexpr):
    """Where a block (-1 for x, else a level) starts in the concatenation."""
    first, start = 0, 0
    for k in tl.static_range(len(ORDER)):
        first = tl.where(block == ORDER[k], start, first)
        if ORDER[k] == -1:
            start += C
        else:
            start += R
    return first


@device_function
def _level(level, BINS: tl.constexpr):
    """Bins and first cell of a level."""
    bins, start = 0, 0
    for k in tl.static_range(len(BINS)):
        bins = tl.where(level == k, BINS[k], bins)
        start = tl.where(level == k, level_starts(BINS)[k], start)
    return bins, start


@device_function
def _first_column(level, BINS: tl.constexpr):
    column = 0
    for k in tl.static_range(1, len(BINS)):
        column = tl.where(level == k, _column_starts(BINS)[k], column)
    return column


@device_function
def _load_cells(pyramid_ptr, cells, mask):
    return tl.load(pyramid_ptr + cells, mask=mask, other=0).to(tl.float32)


@triton.jit(do_not_specialize=["H", "W"])
def _upsample_concat_forward_channels_last_kernel(
    x_ptr, pyramid_ptr, out_ptr, C, R, CHANNELS, H, W,
    BINS: tl.constexpr, ORDER: tl.constexpr, ALIGN: tl.constexpr, COPY: tl.constexpr,
    BLOCK_W: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The concatenation, channels_last; without COPY the levels alone.

    Grid: one program owns one output row of one image, BLOCK_C channels of x or of a level.
    Tile: BLOCK_W pixels x BLOCK_C channels. Of a level: blends its two cell rows column by column, and walks the pixels
    between two columns.
    Traffic: reads x and, once a row, two cell rows a level (cached); writes N * CHANNELS * H * W.
    """
    x_tiles = 0
    if COPY:
        x_tiles = tiles(C, BLOCK_C)
    r_tiles = tiles(R, BLOCK_C)
    all_tiles = x_tiles + r_tiles * len(BINS)
    n = (tl.program_id(0) // all_tiles).to(tl.int64)
    tile = tl.program_id(0) % all_tiles
    h = tl.program_id(1)
    row = (n * H + h) * W
    if tile < x_tiles:
        c = tile * BLOCK_C + tl.arange(0, BLOCK_C)
        out = out_ptr + _first_channel(-1, C, R, ORDER) + c
        for w_start in range(0, W, BLOCK_W):
            w = w_start + tl.arange(0, BLOCK_W)
            mask = (w < W)[:, None] & (c < C)[None, :]
            value = tl.load(x_ptr + ((row + w) * C)[:, None] + c[None, :], mask=mask)
            tl.store(out[None, :] + ((row + w) * CHANNELS)[:, None], value, mask=mask)
    else:
        level = (tile - x_tiles) // r_tiles
        bins, start = _level(level, BINS)
        c = (tile - x_tiles) % r_tiles * BLOCK_C + tl.arange(0, BLOCK_C)
        out = out_ptr + _first_channel(level, C, R, ORDER) + c
        h_lower, h_upper, numerator, denominator = bilinear_tap(h, H, bins, ALIGN)
        h_weight = fraction(numerator, denominator)
        image = n * cell_count(BINS) + start
        lower_row = (image + h_lower * bins) * R + c
        upper_row = (image + h_upper * bins) * R + c
        left = (1 - h_weight) * _load_cells(pyramid_ptr, lower_row, c < R)
        left += h_weight * _load_cells(pyramid_ptr, upper_row, c < R)
        for cell in range(0, bins):
            step = next_cell(cell, W, bins) * R
            right = (1 - h_weight) * _load_cells(pyramid_ptr, lower_row + step, c < R)
            right += h_weight * _load_cells(pyramid_ptr, upper_row + step, c < R)
            left = tl.where(bins == W, right, left)
            w_end = tap_start(cell + 1, W, bins, ALIGN)
            for w_start in range(tap_start(cell, W, bins, ALIGN), w_end, BLOCK_W):
                w = w_start + tl.arange(0, BLOCK_W)
                w_weight = upper_weight(w, cell, W, bins, ALIGN)
                value = (1 - w_weight)[:, None] * left[None, :] + w_weight[:, None] * right[None, :]
                mask = (w < w_end)[:, None] & (c < R)[None, :]
                pointer = out[None, :] + ((row + w) * CHANNELS)[:, None]
                tl.store(pointer, round_to(value, out_ptr.dtype.element_ty), mask=mask)
            left = right


@triton.jit(do_not_specialize=["H", "W_VECTORS"])
def _upsample_concat_forward_nchw_kernel(
    x_ptr, pyramid_ptr, out_ptr, C, R, CHANNELS, H, W_VECTORS,
    BINS: tl.constexpr, ORDER: tl.constexpr, ALIGN: tl.constexpr, COPY: tl.constexpr,
    VECTOR: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """The concatenation, NCHW; without COPY the levels alone.

    Grid: one program owns BLOCK_H rows and BLOCK_W columns of BLOCK_C planes of x or of a level.
    Tile: BLOCK_C planes x BLOCK_W columns. Of a level: blends two cell rows along W, and walks the rows between them.
    Traffic: reads x and, once a program, the cell rows it needs (cached); writes N * CHANNELS * H * W.
    """
    W = W_VECTORS * VECTOR
    x_tiles = 0
    if COPY:
        x_tiles = tiles(C, BLOCK_C)
    r_tiles = tiles(R, BLOCK_C)
    all_tiles = x_tiles + r_tiles * len(BINS)
    n = (tl.program_id(0) // all_tiles).to(tl.int64)
    tile = tl.program_id(0) % all_tiles
    h_start = tl.program_id(1) * BLOCK_H
    h_end = tl.minimum(h_start + BLOCK_H, H)
    w = tl.program_id(2) * BLOCK_W + tl.arange(0, BLOCK_W)
    if tile < x_tiles:
        c = tile * BLOCK_C + tl.arange(0, BLOCK_C)
        first = _first_channel(-1, C, R, ORDER)
        mask = (c < C)[:, None] & (w < W)[None, :]
        for h in range(h_start, h_end):
            value = tl.load(x_ptr + (((n * C + c) * H + h) * W)[:, None] + w[None, :], mask=mask)
            tl.store(out_ptr + (((n * CHANNELS + first + c) * H + h) * W)[:, None] + w[None, :], value, mask=mask)
    else:
        level = (tile - x_tiles) // r_tiles
        bins, start = _level(level, BINS)
        c = (tile - x_tiles) % r_tiles * BLOCK_C + tl.arange(0, BLOCK_C)
        first = _first_channel(level, C, R, ORDER)
        mask = (c < R)[:, None] & (w < W)[None, :]
        w_lower, w_upper, numerator, denominator = bilinear_tap(w, W, bins, ALIGN)
        w_weight = fraction(numerator, denominator)
        image = n * cell_count(BINS) + start
        left = ((image + w_lower) * R)[None, :] + c[:, None]
        right = ((image + w_upper) * R)[None, :] + c[:, None]
        cell = bilinear_tap(h_start, H, bins, ALIGN)[0]
        row = (cell * bins).to(tl.int64) * R
        bottom = (1 - w_weight)[None, :] * _load_cells(pyramid_ptr, left + row, mask)
        bottom += w_weight[None, :] * _load_cells(pyramid_ptr, right + row, mask)
        for h_lower in range(cell, bilinear_tap(h_end - 1, H, bins, ALIGN)[0] + 1):
            top = bottom
            row = (next_cell(h_lower, H, bins) * bins).to(tl.int64) * R
            bottom = (1 - w_weight)[None, :] * _load_cells(pyramid_ptr, left + row, mask)
            bottom += w_weight[None, :] * _load_cells(pyramid_ptr, right + row, mask)
            top = tl.where(bins == H, bottom, top)
            run_start = tl.maximum(tap_start(h_lower, H, bins, ALIGN), h_start)
            for h in range(run_start, tl.minimum(tap_start(h_lower + 1, H, bins, ALIGN), h_end)):
                weight = upper_weight(h, h_lower, H, bins, ALIGN)
                value = (1 - weight) * top + weight * bottom
                pointer = out_ptr + (((n * CHANNELS + first + c) * H + h) * W)[:, None] + w[None, :]
                tl.store(pointer, round_to(value, out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["H", "W"])
def _upsample_concat_backward_rows_kernel(
    grad_ptr, rows_ptr, C, R, CHANNELS, H, W,
    BINS: tl.constexpr, ORDER: tl.constexpr, ALIGN: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The gradient collected along W, channels_last: for every row, what each column of cells receives.

    Grid: one program owns BLOCK_C channels of one level in one row of one image.
    Tile: BLOCK_C channels x BLOCK_W pixels; it walks the pixels between two columns, keeping a sum for each.
    Traffic: reads N * levels * R * H * W; writes N * H * columns * R float32 (12 columns for bins 1, 2, 3, 6).
    """
    r_tiles = tiles(R, BLOCK_C)
    all_tiles = r_tiles * len(BINS)
    n = (tl.program_id(0) // all_tiles).to(tl.int64)
    level = tl.program_id(0) % all_tiles // r_tiles
    row = n * H + tl.program_id(1)
    bins = _level(level, BINS)[0]
    column = _first_column(level, BINS)
    c = tl.program_id(0) % r_tiles * BLOCK_C + tl.arange(0, BLOCK_C)
    grad = grad_ptr + _first_channel(level, C, R, ORDER) + c
    columns: tl.constexpr = _column_starts(BINS)[len(BINS)]
    received = tl.full([BLOCK_C], 0, tl.float32)
    for cell in range(0, bins):
        to_lower = tl.full([BLOCK_C, BLOCK_W], 0, tl.float32)
        to_upper = tl.full([BLOCK_C, BLOCK_W], 0, tl.float32)
        w_end = tap_start(cell + 1, W, bins, ALIGN)
        for w_start in range(tap_start(cell, W, bins, ALIGN), w_end, BLOCK_W):
            w = w_start + tl.arange(0, BLOCK_W)
            weight = upper_weight(w, cell, W, bins, ALIGN)
            mask = (c < R)[:, None] & (w < w_end)[None, :]
            value = tl.load(grad[:, None] + ((row * W + w) * CHANNELS)[None, :], mask=mask, other=0).to(tl.float32)
            to_lower += (1 - weight)[None, :] * value
            to_upper += weight[None, :] * value
        received += tl.sum(to_lower, 1)
        for_next = tl.sum(to_upper, 1)
        received += tl.where(cell == bins - 1, for_next, 0.0)
        tl.store(rows_ptr + (row * columns + column + cell) * R + c, received, mask=c < R)
        received = tl.where(bins == W, 0.0, for_next)


@triton.jit(do_not_specialize=["H"])
def _upsample_concat_backward_cells_kernel(
    rows_ptr, out_ptr, R, H,
    BINS: tl.constexpr, ALIGN: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The gradient of the cells from what `rows` has collected along W.

    Grid: one program owns BLOCK_C channels of one cell of one image.
    Tile: BLOCK_C channels x BLOCK_H rows; it walks the rows that have the cell for a tap.
    Traffic: reads the rows at most twice (N * H * columns * R float32, cached); writes N * S * R.
    """
    r_tiles = tiles(R, BLOCK_C)
    n = (tl.program_id(0) // r_tiles).to(tl.int64)
    c = tl.program_id(0) % r_tiles * BLOCK_C + tl.arange(0, BLOCK_C)
    cell = tl.program_id(1)
    level, bins, start = level_of(cell, BINS)
    columns: tl.constexpr = _column_starts(BINS)[len(BINS)]
    i = (cell - start) // bins
    column = _first_column(level, BINS) + (cell - start) % bins
    h_end = tap_start(i + 1, H, bins, ALIGN)
    total = tl.full([BLOCK_C, BLOCK_H], 0, tl.float32)
    for h_start in range(tap_start(i - 1, H, bins, ALIGN), h_end, BLOCK_H):
        h = h_start + tl.arange(0, BLOCK_H)
        lower, upper, numerator, denominator = bilinear_tap(h, H, bins, ALIGN)
        weight = fraction(numerator, denominator)
        mask = (c < R)[:, None] & (h < h_end)[None, :]
        offset = ((n * H + h) * columns + column) * R
        value = tl.load(rows_ptr + c[:, None] + offset[None, :], mask=mask, other=0)
        total += tl.where((lower == i)[None, :], (1 - weight)[None, :] * value, 0.0)
        total += tl.where((upper == i)[None, :], weight[None, :] * value, 0.0)
    offset = (n * cell_count(BINS) + cell) * R
    tl.store(out_ptr + offset + c, round_to(tl.sum(total, 1), out_ptr.dtype.element_ty), mask=c < R)


@triton.jit(do_not_specialize=["N", "H", "W_VECTORS"])
def _upsample_concat_backward_nchw_kernel(
    grad_ptr, out_ptr, N, C, R, CHANNELS, H, W_VECTORS,
    BINS: tl.constexpr, ORDER: tl.constexpr, ALIGN: tl.constexpr,
    VECTOR: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """The gradient of the cells, NCHW; where the map is wider than BLOCK_W, one part of it for each BLOCK_W columns.

    Grid: one program owns BLOCK_W columns of BLOCK_C planes of one level.
    Tile: BLOCK_C planes x BLOCK_W columns; it walks the rows between two cell rows, BLOCK_H at a time, keeping a sum for
    each cell row, and then collects a sum along W.
    Traffic: reads N * levels * R * H * W; writes N * S * R (float32 for each part if there are several).
    """
    W = W_VECTORS * VECTOR
    r_tiles = tiles(R, BLOCK_C)
    all_tiles = r_tiles * len(BINS)
    n = (tl.program_id(0) // all_tiles).to(tl.int64)
    level = tl.program_id(0) % all_tiles // r_tiles
    bins, start = _level(level, BINS)
    c = tl.program_id(0) % r_tiles * BLOCK_C + tl.arange(0, BLOCK_C)
    w = tl.program_id(1) * BLOCK_W + tl.arange(0, BLOCK_W)
    mask = (c < R)[:, None] & (w < W)[None, :]
    w_lower, w_upper, numerator, denominator = bilinear_tap(w, W, bins, ALIGN)
    w_weight = fraction(numerator, denominator)
    plane = n * CHANNELS + _first_channel(level, C, R, ORDER) + c
    image = (tl.program_id(1) * N + n) * cell_count(BINS) + start
    received = tl.full([BLOCK_C, BLOCK_W], 0, tl.float32)
    for i in range(0, bins):
        for_next = tl.full([BLOCK_C, BLOCK_W], 0, tl.float32)
        h_end = tap_start(i + 1, H, bins, ALIGN)
        for h_start in range(tap_start(i, H, bins, ALIGN), h_end, BLOCK_H):
            for row in tl.static_range(BLOCK_H):
                h = h_start + row
                weight = upper_weight(h, i, H, bins, ALIGN)
                offset = ((plane * H + h) * W)[:, None] + w[None, :]
                value = tl.load(grad_ptr + offset, mask=mask & (h < h_end), other=0).to(tl.float32)
                received += (1 - weight) * value
                for_next += weight * value
        if i == bins - 1:
            received += for_next
        for j in range(0, bins):
            share = tl.where((w_lower == j)[None, :], (1 - w_weight)[None, :] * received, 0.0)
            share += tl.where((w_upper == j)[None, :], w_weight[None, :] * received, 0.0)
            cell_sum = round_to(tl.sum(share, 1), out_ptr.dtype.element_ty)
            tl.store(out_ptr + (image + i * bins + j) * R + c, cell_sum, mask=c < R)
        received = tl.where(bins == H, 0.0, for_next)


def upsample_concat_refuses(*args: Any) -> str | None:
    """Arguments of upsample_concat_forward, _fill or _backward; of a tensor alone, what holds for any bins."""
    return refuses(args[0]) or (refuses_size(args[0].shape[2:], args[2]) if len(args) > 1 else None)


CHANNELS_LAST_WARPS, ROWS_WARPS, FORWARD_NCHW_WARPS, BACKWARD_NCHW_WARPS, CELLS_WARPS = 2, 1, 4, 1, 2


def _channels_last_tile(itemsize: int) -> dict[str, int]:
    """16-byte accesses by 16 threads along C; with two warps each thread has four in flight."""
    return {"BLOCK_W": 16, "BLOCK_C": 256 // itemsize}


def _rows_tile(itemsize: int) -> dict[str, int]:
    """The same with one warp, which adds up along W by itself."""
    return {"BLOCK_W": 8, "BLOCK_C": 256 // itemsize}


def _nchw_tile(width: int, itemsize: int, warps: int) -> dict[str, int]:
    """A whole row where it fits into 256 columns; accesses as wide as every row's alignment allows; 8 elements a thread."""
    block_w = min(max(triton.next_power_of_2(width), 16), 256)
    return {"VECTOR": gcd(width, 16 // itemsize), "BLOCK_C": 256 * warps // block_w, "BLOCK_W": block_w}


def _forward_nchw_tile(width: int, itemsize: int) -> dict[str, int]:
    return {**_nchw_tile(width, itemsize, FORWARD_NCHW_WARPS), "BLOCK_H": 16}


def _backward_nchw_tile(width: int, itemsize: int) -> dict[str, int]:
    """One warp, which adds up along W by itself."""
    return {**_nchw_tile(width, itemsize, BACKWARD_NCHW_WARPS), "BLOCK_H": 4}


CELLS_TILE = {"BLOCK_H": 16, "BLOCK_C": 64}


def _write(
    x: torch.Tensor | None,
    pyramid: torch.Tensor,
    out: torch.Tensor,
    bins: Sequence[int],
    order: Sequence[int],
    align_corners: bool,
) -> None:
    """The levels' blocks of the concatenation, and x's where it is given."""
    if out.numel() == 0:
        return
    (n, channels, height, width), reduced, nchw = out.shape, pyramid.shape[2], out.is_contiguous()
    c = channels - len(bins) * reduced
    tile = _forward_nchw_tile(width, out.itemsize) if nchw else _channels_last_tile(out.itemsize)
    blocks = len(bins) * triton.cdiv(reduced, tile["BLOCK_C"])
    if x is not None:
        blocks += triton.cdiv(c, tile["BLOCK_C"])
    if blocks == 0:
        return
    options = {"BINS": tuple(bins), "ORDER": tuple(order), "ALIGN": align_corners, "COPY": x is not None, **tile}
    sizes = c, reduced, channels, height
    with on_device(out):
        if nchw:
            grid = (n * blocks, triton.cdiv(height, tile["BLOCK_H"]), triton.cdiv(width, tile["BLOCK_W"]))
            _upsample_concat_forward_nchw_kernel[grid](
                out if x is None else x, pyramid, out, *sizes, width // tile["VECTOR"],
                **options, num_warps=FORWARD_NCHW_WARPS,
            )  # fmt: skip
        else:
            _upsample_concat_forward_channels_last_kernel[n * blocks, height](
                out if x is None else x, pyramid, out, *sizes, width, **options, num_warps=CHANNELS_LAST_WARPS
            )


def upsample_concat_forward(
    x: torch.Tensor, pyramid: torch.Tensor, bins: Sequence[int], order: Sequence[int], align_corners: bool
) -> torch.Tensor:
    (n, c, height, width), with_x = x.shape, -1 in order
    channels = len(bins) * pyramid.shape[2] + (c if with_x else 0)
    memory_format = torch.contiguous_format if x.is_contiguous() else torch.channels_last
    out = torch.empty((n, channels, height, width), dtype=x.dtype, device=x.device, memory_format=memory_format)
    _write(x if with_x else None, pyramid, out, bins, order, align_corners)
    return out


def upsample_concat_fill(
    out: torch.Tensor, pyramid: torch.Tensor, bins: Sequence[int], order: Sequence[int], align_corners: bool
) -> None:
    _write(None, pyramid, out, bins, order, align_corners)


def upsample_concat_backward(
    grad: torch.Tensor, channels: int, bins: Sequence[int], order: Sequence[int], align_corners: bool
) -> torch.Tensor:
    bins, order, (n, total, height, width) = tuple(bins), tuple(order), grad.shape
    reduced = (total - (channels if -1 in order else 0)) // len(bins)
    out = torch.empty((n, cell_count(bins), reduced), dtype=grad.dtype, device=grad.device)
    if out.numel() == 0:
        return out
    sizes = channels, reduced, total, height
    options = {"BINS": bins, "ALIGN": align_corners}
    with on_device(grad):
        if grad.is_contiguous():
            tile = _backward_nchw_tile(width, grad.itemsize)
            parts = triton.cdiv(width, tile["BLOCK_W"])
            sums = out if parts == 1 else torch.empty((parts, *out.shape), dtype=torch.float32, device=grad.device)
            _upsample_concat_backward_nchw_kernel[n * len(bins) * triton.cdiv(reduced, tile["BLOCK_C"]), parts](
                grad, sums, n, *sizes, width // tile["VECTOR"],
                ORDER=order, **options, **tile, num_warps=BACKWARD_NCHW_WARPS,
            )  # fmt: skip
            return out if parts == 1 else sums.sum(0).to(grad.dtype)
        tile = _rows_tile(grad.itemsize)
        rows = torch.empty((n, height, sum(bins), reduced), dtype=torch.float32, device=grad.device)
        _upsample_concat_backward_rows_kernel[n * len(bins) * triton.cdiv(reduced, tile["BLOCK_C"]), height](
            grad, rows, *sizes, width, ORDER=order, **options, **tile, num_warps=ROWS_WARPS
        )
        _upsample_concat_backward_cells_kernel[n * triton.cdiv(reduced, CELLS_TILE["BLOCK_C"]), out.shape[1]](
            rows, out, reduced, height, **options, **CELLS_TILE, num_warps=CELLS_WARPS
        )
    return out


def _compile_cases() -> Iterator[CompileCase]:
    for dtype, align_corners in ((torch.bfloat16, True), (torch.bfloat16, False), (torch.float32, True)):
        divisible = ("C", "R", "CHANNELS")
        case = partial(compile_case, dtype=dtype, divisible=divisible, rows_ptr="*fp32")
        cells = {"BINS": (1, 2, 3, 6), "ALIGN": align_corners}
        blocks = {**cells, "ORDER": (-1, 0, 1, 2, 3)}
        for copy in (True, False):
            yield case(
                _upsample_concat_forward_channels_last_kernel,
                constexprs={**blocks, "COPY": copy, **_channels_last_tile(dtype.itemsize)},
                num_warps=CHANNELS_LAST_WARPS,
            )
        yield case(
            _upsample_concat_backward_rows_kernel,
            constexprs={**blocks, **_rows_tile(dtype.itemsize)},
            num_warps=ROWS_WARPS,
        )
        yield case(_upsample_concat_backward_cells_kernel, constexprs={**cells, **CELLS_TILE}, num_warps=CELLS_WARPS)
        for width in (60, 61, 256) if align_corners else (60,):
            for copy in (True, False):
                nchw = case(
                    _upsample_concat_forward_nchw_kernel,
                    constexprs={**blocks, "COPY": copy, **_forward_nchw_tile(width, dtype.itemsize)},
                    num_warps=FORWARD_NCHW_WARPS,
                )
                wide = (width, dtype, copy) == (256, torch.float32, False)
                yield nchw._replace(spills=SPILLS if wide else "")
            yield case(
                _upsample_concat_backward_nchw_kernel,
                constexprs={**blocks, **_backward_nchw_tile(width, dtype.itemsize)},
                num_warps=BACKWARD_NCHW_WARPS,
            )


SPILLS = (
    "ptxas stops at 72 registers for sm_90, and keeps ten more words than fit in memory, whatever the tile's height"
)
COMPILE_CASES = [*_compile_cases()]
