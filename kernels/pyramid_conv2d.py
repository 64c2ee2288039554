"""pyramid_conv2d in Triton. The maths stands in `pspnet_fast/ops/pyramid_conv2d.py`.

A band (level, row of cells i, dy) is what one row of cells and one dy contribute along W: k * sum(bins) rows of W' pixels
and CHANNELS channels, in float32. Both directions are two kernels with the bands between them, each a sum of few terms.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import accumulate
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
    refuses_size,
    round_to,
    support_start,
    tap_start,
    tiles,
)


@triton.constexpr_function
def _band_starts(bins, kernel_size):
    """The first band of every level; last, how many there are."""
    return tuple(accumulate((b * kernel_size for b in bins), initial=0))


@device_function
def _band(band, BINS: tl.constexpr, K: tl.constexpr):
    """A band's bins, the first cell of its row of cells, that row, and dy."""
    bins, start, first = BINS[0], 0, 0
    for k in tl.static_range(1, len(BINS)):
        later = band >= _band_starts(BINS, K)[k]
        bins = tl.where(later, BINS[k], bins)
        start = tl.where(later, level_starts(BINS)[k], start)
        first = tl.where(later, _band_starts(BINS, K)[k], first)
    i = (band - first) // K
    return bins, start + i * bins, i, (band - first) % K


@device_function
def _at(row, o, w, CHANNELS, W, CHANNELS_LAST: tl.constexpr):
    """Where tile (o, w) of row `row` (one image's CHANNELS * W) lies; rows of channels_last hold channels innermost."""
    if CHANNELS_LAST:
        offset = row * W * CHANNELS + w[None, :] * CHANNELS + o[:, None]
    else:
        offset = row * CHANNELS * W + o[:, None] * W + w[None, :]
    return offset


@triton.jit(do_not_specialize=["W_IN", "W"])
def _pyramid_conv2d_forward_bands_kernel(
    taps_ptr, bands_ptr, CHANNELS, W_IN, W,
    BINS: tl.constexpr, K: tl.constexpr, PADDING: tl.constexpr, ALIGN: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    BLOCK_O: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """What each row of cells contributes along W.

    Grid: one program owns BLOCK_O channels and BLOCK_W pixels of one band of one image.
    Tile: BLOCK_O x BLOCK_W; it walks the K taps of a row, two cells each.
    Traffic: reads N * S * K * K * CHANNELS (cached); writes N * bands * CHANNELS * W', float32.
    """
    o_tiles = tiles(CHANNELS, BLOCK_O)
    count: tl.constexpr = _band_starts(BINS, K)[len(BINS)]
    n = (tl.program_id(0) // (o_tiles * count)).to(tl.int64)
    band = tl.program_id(0) // o_tiles % count
    o = tl.program_id(0) % o_tiles * BLOCK_O + tl.arange(0, BLOCK_O)
    w = tl.program_id(1) * BLOCK_W + tl.arange(0, BLOCK_W)
    bins, cell, _, dy = _band(band, BINS, K)
    total = tl.full([BLOCK_O, BLOCK_W], 0, tl.float32)
    for dx in tl.static_range(K):
        source = w + (dx - PADDING)
        inside = (source >= 0) & (source < W_IN) & (w < W)
        lower, upper, numerator, denominator = bilinear_tap(tl.maximum(source, 0), W_IN, bins, ALIGN)
        weight = fraction(numerator, denominator)[None, :]
        tap = n * cell_count(BINS) * (K * K) + dy * K + dx
        mask = (o < CHANNELS)[:, None] & inside[None, :]
        left = tl.load(taps_ptr + (tap + (cell + lower) * (K * K))[None, :] * CHANNELS + o[:, None], mask=mask, other=0)
        right = tl.load(
            taps_ptr + (tap + (cell + upper) * (K * K))[None, :] * CHANNELS + o[:, None], mask=mask, other=0
        )
        total += (1 - weight) * left + weight * right
    mask = (o < CHANNELS)[:, None] & (w < W)[None, :]
    tl.store(bands_ptr + _at(n * count + band, o, w, CHANNELS, W, CHANNELS_LAST), total, mask=mask)


@triton.jit(do_not_specialize=["H_IN", "H", "W"])
def _pyramid_conv2d_forward_kernel(
    out_ptr, bands_ptr, scale_ptr, shift_ptr, CHANNELS, H_IN, H, W,
    BINS: tl.constexpr, K: tl.constexpr, PADDING: tl.constexpr, ALIGN: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    ADD: tl.constexpr, SCALE: tl.constexpr, SHIFT: tl.constexpr, RELU: tl.constexpr,
    BLOCK_O: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """The convolution, onto `out` with ADD, and the folded norm.

    Grid: one program owns BLOCK_O channels and BLOCK_W pixels of one row of one image.
    Tile: BLOCK_O x BLOCK_W; it walks levels and dy, two bands each.
    Traffic: reads the bands (cached) and, with ADD, N * CHANNELS * H' * W'; writes N * CHANNELS * H' * W'.
    """
    o_tiles = tiles(CHANNELS, BLOCK_O)
    count: tl.constexpr = _band_starts(BINS, K)[len(BINS)]
    n = (tl.program_id(0) // o_tiles).to(tl.int64)
    h = tl.program_id(1)
    o = tl.program_id(0) % o_tiles * BLOCK_O + tl.arange(0, BLOCK_O)
    w = tl.program_id(2) * BLOCK_W + tl.arange(0, BLOCK_W)
    mask = (o < CHANNELS)[:, None] & (w < W)[None, :]
    total = tl.full([BLOCK_O, BLOCK_W], 0, tl.float32)
    for k in tl.static_range(len(BINS)):
        for dy in tl.static_range(K):
            source = h + (dy - PADDING)
            here = mask & (source >= 0) & (source < H_IN)
            lower, upper, numerator, denominator = bilinear_tap(tl.maximum(source, 0), H_IN, BINS[k], ALIGN)
            weight = fraction(numerator, denominator)
            first = n * count + _band_starts(BINS, K)[k] + dy
            top = tl.load(bands_ptr + _at(first + lower * K, o, w, CHANNELS, W, CHANNELS_LAST), mask=here, other=0)
            bottom = tl.load(bands_ptr + _at(first + upper * K, o, w, CHANNELS, W, CHANNELS_LAST), mask=here, other=0)
            total += (1 - weight) * top + weight * bottom
    if CHANNELS_LAST:
        offset = (n * H + h) * W * CHANNELS + w[None, :] * CHANNELS + o[:, None]
    else:
        offset = ((n * CHANNELS + o) * H + h)[:, None] * W + w[None, :]
    if ADD:
        total += tl.load(out_ptr + offset, mask=mask, other=0).to(tl.float32)
    if SCALE:
        total *= tl.load(scale_ptr + o, mask=o < CHANNELS, other=0)[:, None]
    if SHIFT:
        total += tl.load(shift_ptr + o, mask=o < CHANNELS, other=0)[:, None]
    if RELU:
        total = tl.where(total < 0, 0.0, total)
    tl.store(out_ptr + offset, round_to(total, out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["H_IN", "H", "W"])
def _pyramid_conv2d_backward_bands_kernel(
    grad_ptr, bands_ptr, CHANNELS, H_IN, H, W,
    BINS: tl.constexpr, K: tl.constexpr, PADDING: tl.constexpr, ALIGN: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    BLOCK_O: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """The gradient collected along H: what each row of cells receives for each dy.

    Grid: one program owns BLOCK_O channels and BLOCK_W pixels of one band of one image.
    Tile: BLOCK_O x BLOCK_W; it walks the rows that sample the band's row of cells.
    Traffic: reads the gradient for each level and dy up to twice (cached); writes N * bands * CHANNELS * W', float32.
    """
    o_tiles = tiles(CHANNELS, BLOCK_O)
    count: tl.constexpr = _band_starts(BINS, K)[len(BINS)]
    n = (tl.program_id(0) // (o_tiles * count)).to(tl.int64)
    band = tl.program_id(0) // o_tiles % count
    o = tl.program_id(0) % o_tiles * BLOCK_O + tl.arange(0, BLOCK_O)
    w = tl.program_id(1) * BLOCK_W + tl.arange(0, BLOCK_W)
    mask = (o < CHANNELS)[:, None] & (w < W)[None, :]
    bins, _, i, dy = _band(band, BINS, K)
    total = tl.full([BLOCK_O, BLOCK_W], 0, tl.float32)
    start = tl.maximum(support_start(i, H_IN, bins, ALIGN), dy - PADDING)
    for source in range(start, tl.minimum(tap_start(i + 1, H_IN, bins, ALIGN), H + dy - PADDING)):
        h = source - dy + PADDING
        lower, upper, numerator, denominator = bilinear_tap(source, H_IN, bins, ALIGN)
        weight = fraction(numerator, denominator)
        share = tl.where(lower == i, 1 - weight, 0.0) + tl.where(upper == i, weight, 0.0)
        if CHANNELS_LAST:
            offset = (n * H + h) * W * CHANNELS + w[None, :] * CHANNELS + o[:, None]
        else:
            offset = ((n * CHANNELS + o) * H + h)[:, None] * W + w[None, :]
        total += share * tl.load(grad_ptr + offset, mask=mask, other=0).to(tl.float32)
    tl.store(bands_ptr + _at(n * count + band, o, w, CHANNELS, W, CHANNELS_LAST), total, mask=mask)


@triton.jit(do_not_specialize=["W_IN", "W"])
def _pyramid_conv2d_backward_taps_kernel(
    bands_ptr, taps_ptr, CHANNELS, W_IN, W,
    BINS: tl.constexpr, K: tl.constexpr, PADDING: tl.constexpr, ALIGN: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    BLOCK_O: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """The taps' gradient from the bands'.

    Grid: one program owns BLOCK_O channels of one tap of one cell of one image.
    Tile: BLOCK_O channels x BLOCK_W pixels; it walks the pixels that sample the cell.
    Traffic: reads the bands for every dx up to twice (cached); writes N * S * K * K * CHANNELS, float32.
    """
    o_tiles = tiles(CHANNELS, BLOCK_O)
    count: tl.constexpr = _band_starts(BINS, K)[len(BINS)]
    n = (tl.program_id(0) // o_tiles).to(tl.int64)
    o = tl.program_id(0) % o_tiles * BLOCK_O + tl.arange(0, BLOCK_O)
    cell, dy, dx = tl.program_id(1), tl.program_id(2) // K, tl.program_id(2) % K
    level, bins, start = level_of(cell, BINS)
    i, j = (cell - start) // bins, (cell - start) % bins
    band = 0
    for k in tl.static_range(1, len(BINS)):
        band = tl.where(level == k, _band_starts(BINS, K)[k], band)
    band += i * K + dy
    end = tl.minimum(tap_start(j + 1, W_IN, bins, ALIGN), W + dx - PADDING)
    total = tl.full([BLOCK_O, BLOCK_W], 0, tl.float32)
    for first in range(tl.maximum(support_start(j, W_IN, bins, ALIGN), dx - PADDING), end, BLOCK_W):
        source = first + tl.arange(0, BLOCK_W)
        lower, upper, numerator, denominator = bilinear_tap(source, W_IN, bins, ALIGN)
        weight = fraction(numerator, denominator)
        share = tl.where(lower == j, 1 - weight, 0.0) + tl.where(upper == j, weight, 0.0)
        mask = (o < CHANNELS)[:, None] & (source < end)[None, :]
        offset = _at(n * count + band, o, source - dx + PADDING, CHANNELS, W, CHANNELS_LAST)
        total += share[None, :] * tl.load(bands_ptr + offset, mask=mask, other=0)
    row = (n * cell_count(BINS) + cell) * (K * K) + tl.program_id(2)
    tl.store(taps_ptr + row * CHANNELS + o, tl.sum(total, 1), mask=o < CHANNELS)


def pyramid_conv2d_refuses(*args: Any) -> str | None:
    """Arguments of pyramid_conv2d_forward or _backward; of a tensor alone, what holds for any size."""
    size, bins = {11: args[6:8], 6: args[1:3]}.get(len(args), (None, None))
    return refuses(args[0]) or (None if size is None else refuses_size((*size, *args[0].shape[2:]), bins))


WARPS = 4


def _tile(channels_last: bool) -> dict[str, int]:
    """Eight elements a thread along what is contiguous: 16-byte accesses of 16 bits, two of float32."""
    return {"BLOCK_O": 128, "BLOCK_W": 8} if channels_last else {"BLOCK_O": 16, "BLOCK_W": 64}


def _bands(map_: torch.Tensor, bins: Sequence[int], kernel_size: int) -> torch.Tensor:
    n, channels, _, width = map_.shape
    return torch.empty((n, sum(bins) * kernel_size, channels, width), dtype=torch.float32, device=map_.device)


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
    if out.numel() == 0:
        return
    n, channels, height, width = out.shape
    bands, channels_last = _bands(out, bins, kernel_size), not out.is_contiguous()
    tile = _tile(channels_last)
    options = {"BINS": tuple(bins), "K": kernel_size, "PADDING": padding, "ALIGN": align_corners}
    options |= {"CHANNELS_LAST": channels_last, **tile, "num_warps": WARPS}
    blocks = n * triton.cdiv(channels, tile["BLOCK_O"])
    w_tiles = triton.cdiv(width, tile["BLOCK_W"])
    with on_device(out):
        _pyramid_conv2d_forward_bands_kernel[blocks * bands.shape[1], w_tiles](
            taps, bands, channels, size[1], width, **options
        )
        _pyramid_conv2d_forward_kernel[blocks, height, w_tiles](
            out, bands, bands if scale is None else scale, bands if shift is None else shift, channels, size[0], height,
            width, ADD=add, SCALE=scale is not None, SHIFT=shift is not None, RELU=relu, **options,
        )  # fmt: skip


def pyramid_conv2d_backward(
    grad: torch.Tensor, size: Sequence[int], bins: Sequence[int], kernel_size: int, padding: int, align_corners: bool
) -> torch.Tensor:
    n, channels, height, width = grad.shape
    area, channels_last = kernel_size * kernel_size, not grad.is_contiguous()
    taps = torch.empty((n, sum(b * b for b in bins), area, channels), dtype=torch.float32, device=grad.device)
    if taps.numel() == 0:
        return taps
    bands, tile = _bands(grad, bins, kernel_size), _tile(channels_last)
    options = {"BINS": tuple(bins), "K": kernel_size, "PADDING": padding, "ALIGN": align_corners}
    options |= {"CHANNELS_LAST": channels_last, **tile, "num_warps": WARPS}
    blocks = n * triton.cdiv(channels, tile["BLOCK_O"])
    with on_device(grad):
        _pyramid_conv2d_backward_bands_kernel[blocks * bands.shape[1], triton.cdiv(width, tile["BLOCK_W"])](
            grad, bands, channels, size[0], height, width, **options
        )
        _pyramid_conv2d_backward_taps_kernel[blocks, taps.shape[1], area](
            bands, taps, channels, size[1], width, **options
        )
    return taps


def _compile_cases() -> Iterator[CompileCase]:
    for dtype, align_corners, channels_last in (
        (torch.bfloat16, True, True),
        (torch.bfloat16, False, True),
        (torch.bfloat16, True, False),
        (torch.float32, True, True),
    ):
        floats = {"bands_ptr": "*fp32", "taps_ptr": "*fp32", "scale_ptr": "*fp32", "shift_ptr": "*fp32"}
        case = partial(compile_case, dtype=dtype, divisible=("CHANNELS",), num_warps=WARPS, **floats)
        shape = {"BINS": (1, 2, 3, 6), "K": 3, "PADDING": 1, "ALIGN": align_corners, "CHANNELS_LAST": channels_last}
        shape |= _tile(channels_last)
        for epilogue in (False, True):
            flags = {"ADD": True, "SCALE": epilogue, "SHIFT": epilogue, "RELU": epilogue}
            yield case(_pyramid_conv2d_forward_kernel, constexprs={**shape, **flags})
        yield case(_pyramid_conv2d_backward_bands_kernel, constexprs=shape)
        if dtype == torch.bfloat16:  # these know float32 alone
            yield case(_pyramid_conv2d_forward_bands_kernel, constexprs=shape)
            yield case(_pyramid_conv2d_backward_taps_kernel, constexprs=shape)


COMPILE_CASES = [*_compile_cases()]
