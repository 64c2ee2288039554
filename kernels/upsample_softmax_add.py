"""upsample_softmax_add in Triton. The maths stands in `pspnet_fast/ops/upsample_softmax_add.py`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl

from . import CompileCase, compile_case, on_device, refuses
from .geometry import refuses_size, tiles, upsample_taps, upsampled_classes


@triton.jit(do_not_specialize=["m", "H", "W", "ROWS", "COLUMNS", "TOP", "LEFT"])
def _upsample_softmax_add_forward_kernel(
    logits_ptr, total_ptr, m, K, ROWS, COLUMNS, H, W, TOP, LEFT, TOTAL_H, TOTAL_W, K_STRIDE, ROW_STRIDE, COLUMN_STRIDE,
    weight,
    ALIGN: tl.constexpr, FLIP: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One window's probabilities, added to the total.

    Grid: one program owns BLOCK_H x BLOCK_W pixels of the window.
    Tile: BLOCK_K classes x these pixels; it walks the classes with the largest value and the sum of exponentials relative
    to it, and walks them again to add.
    Traffic: four nodes a pixel and class, twice (cached); the total's part read and written once.
    """
    w_tiles = tiles(W, BLOCK_W)
    pixel = tl.arange(0, BLOCK_H * BLOCK_W)
    h = tl.program_id(0) // w_tiles * BLOCK_H + pixel // BLOCK_W
    w = tl.program_id(0) % w_tiles * BLOCK_W + pixel % BLOCK_W
    y = TOP + h
    if FLIP:
        x = LEFT + W - 1 - w
    else:
        x = LEFT + w
    inside = (h < H) & (w < W) & (y >= 0) & (y < TOTAL_H) & (x >= 0) & (x < TOTAL_W)
    h_lower, h_upper, h_weight = upsample_taps(tl.minimum(h, H - 1), H, ROWS, ALIGN)
    w_lower, w_upper, w_weight = upsample_taps(tl.minimum(w, W - 1), W, COLUMNS, ALIGN)
    window = logits_ptr + m.to(tl.int64) * K * ROWS * COLUMNS
    top = window + h_lower.to(tl.int64) * ROW_STRIDE
    bottom = window + h_upper.to(tl.int64) * ROW_STRIDE
    left = w_lower * COLUMN_STRIDE
    right = w_upper * COLUMN_STRIDE
    best = tl.full([BLOCK_H * BLOCK_W], float("-inf"), tl.float32)
    total = tl.full([BLOCK_H * BLOCK_W], 0, tl.float32)
    for k_start in range(0, K, BLOCK_K):
        k = k_start + tl.arange(0, BLOCK_K)
        mask = (k < K)[:, None]
        value = upsampled_classes(top, bottom, left, right, k.to(tl.int64) * K_STRIDE, mask, h_weight, w_weight)
        new_best = tl.maximum(best, tl.max(tl.where(value != value, float("-inf"), value), 0))
        # While every class is -Inf the sum stays zero: -Inf - -Inf would be NaN. NaN gets into the sum by itself.
        base = tl.where(new_best == float("-inf"), 0.0, new_best)
        total = total * tl.exp(best - base) + tl.sum(tl.exp(value - base[None, :]), 0)
        best = new_best
    scale = tl.div_rn(tl.full([BLOCK_H * BLOCK_W], 1, tl.float32) * weight, tl.where(total == 0, float("nan"), total))
    for k_start in range(0, K, BLOCK_K):
        k = k_start + tl.arange(0, BLOCK_K)
        mask = (k < K)[:, None]
        value = upsampled_classes(top, bottom, left, right, k.to(tl.int64) * K_STRIDE, mask, h_weight, w_weight)
        pointer = total_ptr + (k.to(tl.int64) * TOTAL_H * TOTAL_W)[:, None] + (y.to(tl.int64) * TOTAL_W + x)[None, :]
        before = tl.load(pointer, mask=mask & inside[None, :], other=0)
        tl.store(pointer, before + tl.exp(value - best[None, :]) * scale[None, :], mask=mask & inside[None, :])


def upsample_softmax_add_refuses(*args: Any) -> str | None:
    """Arguments of upsample_softmax_add_forward; of a tensor alone, what holds for any size."""
    if sentence := refuses(args[0]):
        return sentence
    if len(args) > 1:
        return next(filter(None, (refuses_size(size, (1,)) for size in (args[0].shape[2:], args[3]))), None)
    return None


WARPS = 4
TILE = {"BLOCK_H": 8, "BLOCK_W": 8, "BLOCK_K": 16}


def upsample_softmax_add_forward(
    logits: torch.Tensor,
    total: torch.Tensor,
    corners: Sequence[int],
    size: Sequence[int],
    align_corners: bool,
    flip: bool,
    weight: float,
) -> None:
    """Window after window, in stream order: corners are arguments of the launch, so nothing is copied to the device."""
    if total.numel() == 0:
        return
    (windows, classes, rows, columns), (height, width) = logits.shape, size
    strides = (rows * columns, columns, 1) if logits.is_contiguous() else (1, columns * classes, classes)
    grid = (triton.cdiv(height, TILE["BLOCK_H"]) * triton.cdiv(width, TILE["BLOCK_W"]),)
    with on_device(logits):
        for m in range(windows):
            _upsample_softmax_add_forward_kernel[grid](
                logits, total, m, classes, rows, columns, height, width, corners[2 * m], corners[2 * m + 1],
                *total.shape[1:], *strides, weight, ALIGN=align_corners, FLIP=flip, **TILE, num_warps=WARPS,
            )  # fmt: skip


def _compile_cases() -> Iterator[CompileCase]:
    for dtype, align_corners, flip in ((torch.bfloat16, True, False), (torch.float32, False, True)):
        case = partial(compile_case, dtype=dtype, divisible=(), total_ptr="*fp32", weight="fp32", num_warps=WARPS)
        yield case(_upsample_softmax_add_forward_kernel, constexprs={"ALIGN": align_corners, "FLIP": flip, **TILE})


COMPILE_CASES = [*_compile_cases()]
