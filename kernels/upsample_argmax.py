"""upsample_argmax in Triton. The maths stands in `pspnet_fast/ops/upsample_argmax.py`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl

from . import CompileCase, compile_case, on_device, refuses
from .geometry import refuses_size, tiles, upsample_taps, upsampled_classes


@triton.jit(do_not_specialize=["H", "W", "ROWS", "COLUMNS"])
def _upsample_argmax_forward_kernel(
    logits_ptr, labels_ptr, confidence_ptr, K, ROWS, COLUMNS, H, W, K_STRIDE, ROW_STRIDE, COLUMN_STRIDE,
    ALIGN: tl.constexpr, CONFIDENCE: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Labels and, with CONFIDENCE, their probabilities.

    Grid: one program owns BLOCK_H x BLOCK_W pixels of one image.
    Tile: BLOCK_K classes x these pixels; it walks the classes with, for each pixel, the best value and its class, and the
    sum of exponentials relative to the best so far.
    Traffic: reads four nodes a pixel and class (cached: the logits once, and their tiles' edges again); writes N * H * W.
    """
    w_tiles = tiles(W, BLOCK_W)
    pixel_tiles = w_tiles * tiles(H, BLOCK_H)
    n = (tl.program_id(0) // pixel_tiles).to(tl.int64)
    tile = tl.program_id(0) % pixel_tiles
    pixel = tl.arange(0, BLOCK_H * BLOCK_W)
    h = tile // w_tiles * BLOCK_H + pixel // BLOCK_W
    w = tile % w_tiles * BLOCK_W + pixel % BLOCK_W
    inside = (h < H) & (w < W)
    h_lower, h_upper, h_weight = upsample_taps(tl.minimum(h, H - 1), H, ROWS, ALIGN)
    w_lower, w_upper, w_weight = upsample_taps(tl.minimum(w, W - 1), W, COLUMNS, ALIGN)
    image = logits_ptr + n * K * ROWS * COLUMNS
    top = image + h_lower.to(tl.int64) * ROW_STRIDE
    bottom = image + h_upper.to(tl.int64) * ROW_STRIDE
    left = w_lower * COLUMN_STRIDE
    right = w_upper * COLUMN_STRIDE
    best = tl.full([BLOCK_H * BLOCK_W], float("-inf"), tl.float32)
    label = tl.full([BLOCK_H * BLOCK_W], 0, tl.int32)
    total = tl.full([BLOCK_H * BLOCK_W], 0, tl.float32)
    for k_start in range(0, K, BLOCK_K):
        k = k_start + tl.arange(0, BLOCK_K)
        mask = (k < K)[:, None]
        value = upsampled_classes(top, bottom, left, right, k.to(tl.int64) * K_STRIDE, mask, h_weight, w_weight)
        # A maximum drops NaN: the first NaN is looked for by itself.
        first_nan = tl.min(tl.where(value != value, k[:, None], K), 0)
        largest = tl.max(tl.where(value != value, float("-inf"), value), 0)
        first_largest = tl.min(tl.where(value == largest[None, :], k[:, None], K), 0)
        has_nan = first_nan < K
        largest = tl.where(has_nan, float("nan"), largest)
        taken = (best == best) & (has_nan | (largest > best))
        label = tl.where(taken, tl.where(has_nan, first_nan, first_largest), label)
        if CONFIDENCE:
            new_best = tl.where(taken, largest, best)
            # While every class is -Inf the sum stays zero: -Inf - -Inf would be NaN.
            base = tl.where(new_best == float("-inf"), 0.0, new_best)
            part = tl.where(mask, tl.exp(value - base[None, :]), 0.0)
            total = total * tl.exp(best - base) + tl.sum(part, 0)
        best = tl.where(taken, largest, best)
    out = (n * H + h) * W + w
    tl.store(labels_ptr + out, label.to(labels_ptr.dtype.element_ty), mask=inside)
    if CONFIDENCE:
        confidence = tl.div_rn(tl.full([BLOCK_H * BLOCK_W], 1, tl.float32), tl.where(total == 0, float("nan"), total))
        tl.store(confidence_ptr + out, confidence, mask=inside)


def upsample_argmax_refuses(*args: Any) -> str | None:
    """Arguments of upsample_argmax_forward or _confidence; of a tensor alone, what holds for any size."""
    if sentence := refuses(args[0]):
        return sentence
    if len(args) > 1:
        return refuses_size(args[0].shape[2:], (1,)) or refuses_size(args[1], (1,))
    return None


WARPS = 4
TILE = {"BLOCK_H": 8, "BLOCK_W": 8, "BLOCK_K": 16}


def _write(
    logits: torch.Tensor,
    size: Sequence[int],
    align_corners: bool,
    labels: torch.Tensor,
    confidence: torch.Tensor | None,
) -> None:
    if labels.numel() == 0:
        return
    (n, classes, rows, columns), (height, width) = logits.shape, size
    strides = (rows * columns, columns, 1) if logits.is_contiguous() else (1, columns * classes, classes)
    grid = (n * triton.cdiv(height, TILE["BLOCK_H"]) * triton.cdiv(width, TILE["BLOCK_W"]),)
    with on_device(logits):
        _upsample_argmax_forward_kernel[grid](
            logits, labels, labels if confidence is None else confidence, classes, rows, columns, height, width, *strides,
            ALIGN=align_corners, CONFIDENCE=confidence is not None, **TILE, num_warps=WARPS,
        )  # fmt: skip


def _new_map(logits: torch.Tensor, size: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    return torch.empty((logits.shape[0], *size), dtype=dtype, device=logits.device)


def upsample_argmax_forward(
    logits: torch.Tensor, size: Sequence[int], align_corners: bool, dtype: torch.dtype
) -> torch.Tensor:
    labels = _new_map(logits, size, dtype)
    _write(logits, size, align_corners, labels, None)
    return labels


def upsample_argmax_confidence(
    logits: torch.Tensor, size: Sequence[int], align_corners: bool, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    labels, confidence = _new_map(logits, size, dtype), _new_map(logits, size, torch.float32)
    _write(logits, size, align_corners, labels, confidence)
    return labels, confidence


def _compile_cases() -> Iterator[CompileCase]:
    for dtype, align_corners in ((torch.bfloat16, True), (torch.bfloat16, False), (torch.float32, True)):
        case = partial(compile_case, dtype=dtype, divisible=(), labels_ptr="*u8", num_warps=WARPS)
        for confidence in (False, True):
            yield case(
                _upsample_argmax_forward_kernel,
                confidence_ptr="*fp32" if confidence else "*u8",
                constexprs={"ALIGN": align_corners, "CONFIDENCE": confidence, **TILE},
            )


COMPILE_CASES = [*_compile_cases()]
