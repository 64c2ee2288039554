"""The index arithmetic of `pspnet_fast/geometry.py` for kernels: the same names, the same integers; and how values round.

Integers are 32-bit: `refuses_size` keeps every product inside, and what makes up a fraction exact in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


def device_function(function: Callable[..., Any]) -> Any:
    """`triton.jit` for what kernels call. The interpreter would set up triton.language anew at each call, for 2 ms: there
    a plain function does the same.
    """
    return function if INTERPRETED.value else triton.jit(function)


def refuses_size(size: Sequence[int], bins: Sequence[int]) -> str | None:
    """Why 32-bit integers and the grid's second and third axes would not do for this map and these bins, or None."""
    if max(size) > 32767:
        return f"the triton kernels take maps of at most 32767 x 32767, got {size[0]} x {size[1]}"
    if cell_count(bins) > 65535:
        return f"the triton kernels take at most 65535 cells, got {cell_count(bins)}"
    return None


@device_function
def bin_start(i, size, bins):
    return i * size // bins


@device_function
def bin_end(i, size, bins):
    return ((i + 1) * size + (bins - 1)) // bins


@triton.constexpr_function
def cell_count(bins):
    return sum(b * b for b in bins)


@triton.constexpr_function
def level_starts(bins):
    return tuple(accumulate((b * b for b in bins[:-1]), initial=0))


@device_function
def level_of(row, BINS: tl.constexpr):
    """Level of a row of the packed pyramid, its bins, and the row that level starts at."""
    level, bins, start = 0, BINS[0], 0
    for k in tl.static_range(1, len(BINS)):
        level = tl.where(row >= level_starts(BINS)[k], k, level)
        bins = tl.where(row >= level_starts(BINS)[k], BINS[k], bins)
        start = tl.where(row >= level_starts(BINS)[k], level_starts(BINS)[k], start)
    return level, bins, start


@device_function
def _position(i, size, cells, align_corners: tl.constexpr):
    if align_corners:
        position = i * (cells - 1)
        denominator = tl.maximum(size - 1, 1)
    else:
        position = tl.maximum((2 * i + 1) * cells - size, 0)
        denominator = 2 * size
    return position, denominator


@device_function
def next_cell(lower, size, cells):
    """The upper cell of the pixels whose lower one is `lower`: at the end, and on an axis that keeps its size, itself."""
    return tl.where(size == cells, lower, tl.minimum(lower + 1, cells - 1))


@device_function
def bilinear_tap(i, size, cells, align_corners: tl.constexpr):
    position, denominator = _position(i, size, cells, align_corners)
    lower = tl.minimum(position // denominator, cells - 1)
    return lower, next_cell(lower, size, cells), position - lower * denominator, denominator


@device_function
def upper_weight(i, lower, size, cells, align_corners: tl.constexpr):
    """A tap's f where its lower cell is known: without the division that finds it."""
    position, denominator = _position(i, size, cells, align_corners)
    return fraction(position - lower * denominator, denominator)


@device_function
def tap_start(cell, size, cells, align_corners: tl.constexpr):
    """First pixel whose lower tap is `cell` or a later one; `size` from `cell` = `cells` on. The taps' inverse."""
    if align_corners:
        intervals = tl.maximum(cells - 1, 1)
        first = (cell * tl.maximum(size - 1, 1) + intervals - 1) // intervals
    else:
        first = (2 * size * cell + size + cells - 1) // (2 * cells)
    return tl.where(cell <= 0, 0, tl.where(cell < cells, tl.minimum(first, size), size))


@device_function
def support_start(cell, size, cells, align_corners: tl.constexpr):
    """First pixel that `cell` is part of: as an upper cell, which on an axis that keeps its size it is to none but its own."""
    return tap_start(tl.where(size == cells, cell, cell - 1), size, cells, align_corners)


@device_function
def tiles(size, block):
    return (size + block - 1) // block


@device_function
def fraction(numerator, denominator):
    """A tap's f, or another ratio of integers, as float32, rounded once."""
    one = tl.full((), 1.0, tl.float32)
    return tl.div_rn(numerator * one, denominator * one)


@device_function
def round_to(value, dtype: tl.constexpr):
    """`value` (float32) rounded to the nearest `dtype`, ties to even: the interpreter's own bfloat16 conversion truncates."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = value.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        quiet = (bits >> 16) | 0x40
        return tl.where(value == value, rounded, quiet).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return value.to(dtype)


@device_function
def level_bins(level, BINS: tl.constexpr):
    """A level's bins and its first cell."""
    bins = 0
    start = 0
    for k in tl.static_range(len(BINS)):
        bins = tl.where(level == k, BINS[k], bins)
        start = tl.where(level == k, level_starts(BINS)[k], start)
    return bins, start


@device_function
def select(values, level):
    """The level's value, or pointer, from a tuple with one for each level."""
    value = values[0]
    for k in tl.static_range(1, len(values)):
        value = tl.where(level == k, values[k], value)
    return value


@device_function
def level_of_tile(tile, N, BINS: tl.constexpr, BLOCK_M: tl.constexpr):
    """Tiles of BLOCK_M rows are counted level by level: the level of one, and which of the level's it is."""
    level = 0
    first = 0
    counted = 0
    for k in tl.static_range(len(BINS)):
        level = tl.where(tile >= counted, k, level)
        first = tl.where(tile >= counted, counted, first)
        counted += tiles(N * BINS[k] * BINS[k], BLOCK_M)
    return level, tile - first


@device_function
def level_rows(level, tile, N, BINS: tl.constexpr, BLOCK_M: tl.constexpr):
    """The rows of the (N * S, C) packed pyramid that are a level's tile, and which of them exist."""
    bins, start = level_bins(level, BINS)
    m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    n = m // (bins * bins)
    return n.to(tl.int64) * cell_count(BINS) + start + (m - n * bins * bins), m < N * bins * bins


@device_function
def level_factors(row, r, R, BINS: tl.constexpr):
    """Where the factors (B, R) of each row's level lie."""
    level, _, _ = level_of(row % cell_count(BINS), BINS)
    return (row * 0 + level)[:, None] * R + r[None, :]


@device_function
def upsample_taps(i, size, cells, ALIGN: tl.constexpr):
    lower, upper, numerator, denominator = bilinear_tap(i, size, cells, ALIGN)
    return lower, upper, fraction(numerator, denominator)


@device_function
def _load_nodes(pixels, k_offset, mask):
    return tl.load(pixels[None, :] + k_offset[:, None], mask=mask, other=0).to(tl.float32)


@device_function
def upsampled_classes(top, bottom, left, right, k_offset, mask, h_weight, w_weight):
    """Classes x pixels, interpolated: each product by itself, so that Inf and NaN go where torch's go."""
    above = (1 - w_weight)[None, :] * _load_nodes(top + left, k_offset, mask) + w_weight[None, :] * _load_nodes(
        top + right, k_offset, mask
    )
    below = (1 - w_weight)[None, :] * _load_nodes(bottom + left, k_offset, mask) + w_weight[None, :] * _load_nodes(
        bottom + right, k_offset, mask
    )
    return tl.where(mask, (1 - h_weight)[None, :] * above + h_weight[None, :] * below, float("-inf"))
