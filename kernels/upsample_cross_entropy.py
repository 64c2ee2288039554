"""upsample_cross_entropy in Triton. The maths stands in `pspnet_fast/ops/upsample_cross_entropy.py`.

Two kernels. The first walks the pixels: each one's loss, and what its gradient needs, its largest class and a factor. The
second walks the cells: each gathers its gradient from the pixels around it, whose exponentials are computed again, so that
nothing is added by two programs and nothing of the size of the upsampled logits is kept.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl

from . import CompileCase, compile_case, on_device, refuses
from .geometry import bilinear_tap, device_function, fraction, tap_start, upper_weight


@device_function
def _load_classes(cell_ptr, k, class_stride, mask):
    return tl.load(cell_ptr + k * class_stride, mask=mask, other=0).to(tl.float32)


@triton.jit(do_not_specialize=["H", "W", "ignore_index"])
def _upsample_cross_entropy_pixels_kernel(
    logits_ptr, target_ptr, weight_ptr, pixel_weight_ptr, loss_ptr, state_ptr, sums_ptr,
    N, K, h, w, H, W, class_stride, cell_stride, ignore_index, smoothing,
    ALIGN: tl.constexpr, WEIGHT: tl.constexpr, PIXEL_WEIGHT: tl.constexpr, SMOOTH: tl.constexpr,
    LOSSES: tl.constexpr, STATE: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Losses or their sums, and each pixel's state: largest class, factor of the exponentials, of the target, of w[c].

    Grid: one program owns BLOCK_W pixels of one output row.
    Tile: BLOCK_W pixels x BLOCK_K classes, block after block, the largest class and the sum kept up to date.
    Traffic: reads the target and, for every pixel, four cells (cached); writes 4 * N*H*W for a gradient, 3 sums a program.
    """
    n = tl.program_id(2).to(tl.int64)
    y = tl.program_id(1)
    x = tl.program_id(0) * BLOCK_W + tl.arange(0, BLOCK_W)
    inside = x < W
    at = (n * H + y) * W + x
    target = tl.load(target_ptr + at, mask=inside, other=0).to(tl.int64)
    counts = inside & (target != ignore_index) & (target >= 0) & (target < K)
    pixel_weight = tl.full((BLOCK_W,), 1.0, tl.float32)
    if PIXEL_WEIGHT:
        pixel_weight = tl.load(pixel_weight_ptr + at, mask=inside, other=0)
        counts = counts & (pixel_weight != 0)
    y_lower, y_upper, numerator, denominator = bilinear_tap(y, H, h, ALIGN)
    y_weight = fraction(numerator, denominator)
    x_lower, x_upper, numerators, denominator = bilinear_tap(tl.minimum(x, W - 1), W, w, ALIGN)
    x_weight = fraction(numerators, denominator)[:, None]
    image = logits_ptr + n * K * h * w
    upper_left = image + ((y_lower * w + x_lower).to(tl.int64) * cell_stride)[:, None]
    upper_right = image + ((y_lower * w + x_upper).to(tl.int64) * cell_stride)[:, None]
    lower_left = image + ((y_upper * w + x_lower).to(tl.int64) * cell_stride)[:, None]
    lower_right = image + ((y_upper * w + x_upper).to(tl.int64) * cell_stride)[:, None]
    most = tl.full((BLOCK_W,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_W,), tl.float32)
    of_target = tl.zeros((BLOCK_W,), tl.float32)
    below = tl.zeros((BLOCK_W,), tl.float32)
    base = tl.zeros((BLOCK_W,), tl.float32)
    weight_sum = 0.0
    for k_start in range(0, K, BLOCK_K):
        k = k_start + tl.arange(0, BLOCK_K)
        k_mask = k < K
        mask = counts[:, None] & k_mask[None, :]
        offset = k.to(tl.int64)[None, :]
        left = (1 - y_weight) * _load_classes(upper_left, offset, class_stride, mask)
        left += y_weight * _load_classes(lower_left, offset, class_stride, mask)
        right = (1 - y_weight) * _load_classes(upper_right, offset, class_stride, mask)
        right += y_weight * _load_classes(lower_right, offset, class_stride, mask)
        value = (1 - x_weight) * left + x_weight * right
        of_target += tl.sum(tl.where(k[None, :] == target[:, None], value, 0.0), 1)
        larger = tl.maximum(most, tl.max(tl.where(mask & (value == value), value, float("-inf")), 1))
        next_base = tl.where(larger == float("-inf"), 0.0, larger)
        distance = next_base[:, None] - value
        if SMOOTH:
            # How far all classes stand below the largest, weighted: what was summed moves with it.
            if WEIGHT:
                class_weight = tl.load(weight_ptr + k, mask=k_mask, other=0)
            else:
                class_weight = tl.where(k_mask, 1.0, 0.0)
            below += weight_sum * (next_base - base)
            below += tl.sum(tl.where(k_mask[None, :], class_weight[None, :] * distance, 0.0), 1)
            weight_sum += tl.sum(class_weight, 0)
        # At first the base is 0, and may stand above the largest.
        total = total * tl.exp(tl.minimum(base - next_base, 0.0)) + tl.sum(tl.where(mask, tl.exp(-distance), 0.0), 1)
        base = next_base
        most = larger
    # Where every class is -inf the sum is 0, and the loss NaN.
    total = tl.where(counts, tl.where(total == 0, float("nan"), total), 1.0)
    most = tl.where(counts, most, 0.0)
    if WEIGHT:
        target_weight = tl.load(weight_ptr + target, mask=counts, other=0)
    else:
        target_weight = tl.full((BLOCK_W,), 1.0, tl.float32)
    each = smoothing / K
    aim = (1 - smoothing) * target_weight
    factor = aim
    if SMOOTH:
        factor = aim + each * weight_sum
    loss = factor * tl.log(total) + aim * (most - of_target)
    if SMOOTH:
        loss += each * below
    if LOSSES:
        tl.store(loss_ptr + at, tl.where(counts, loss, 0.0), mask=inside)
    else:
        program = (tl.program_id(2) * tl.num_programs(1) + y) * tl.num_programs(0) + tl.program_id(0)
        sums = sums_ptr + program.to(tl.int64) * 3
        tl.store(sums, tl.sum(tl.where(counts, pixel_weight * loss, 0.0), 0))
        tl.store(sums + 1, tl.sum(tl.where(counts, pixel_weight * target_weight, 0.0), 0))
        tl.store(sums + 2, tl.sum(tl.where(counts, 1.0, 0.0), 0))
    if STATE:
        plane = N.to(tl.int64) * H * W
        tl.store(state_ptr + at, most, mask=inside)
        tl.store(state_ptr + plane + at, tl.where(counts, pixel_weight * factor / total, 0.0), mask=inside)
        tl.store(state_ptr + 2 * plane + at, tl.where(counts, pixel_weight * aim, 0.0), mask=inside)
        tl.store(state_ptr + 3 * plane + at, tl.where(counts, pixel_weight * each, 0.0), mask=inside)


@triton.jit(do_not_specialize=["H", "W"])
def _upsample_cross_entropy_gradient_kernel(
    logits_ptr, target_ptr, weight_ptr, state_ptr, out_ptr,
    N, K, h, w, H, W, class_stride, cell_stride,
    ALIGN: tl.constexpr, WEIGHT: tl.constexpr, SMOOTH: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The gradient of the logits, gathered.

    Grid: one program owns BLOCK_K classes of one cell.
    Tile: the pixels of the four squares around the cell, BLOCK_W of a row x BLOCK_K classes; a square has four corners.
    Traffic: reads 9 cells and the state of the pixels around (cached: each pixel is read by four cells); writes N*K*h*w.
    """
    n = tl.program_id(2).to(tl.int64)
    y = tl.program_id(1)
    x = tl.program_id(0) % w
    k = tl.program_id(0) // w * BLOCK_K + tl.arange(0, BLOCK_K)
    k_mask = k < K
    offset = k.to(tl.int64)
    image = logits_ptr + n * K * h * w
    plane = N.to(tl.int64) * H * W
    if SMOOTH:
        if WEIGHT:
            class_weight = tl.load(weight_ptr + k, mask=k_mask, other=0)
        else:
            class_weight = tl.full((BLOCK_K,), 1.0, tl.float32)
    total = tl.zeros((BLOCK_W, BLOCK_K), tl.float32)
    # On an axis that keeps its size a cell is its own pixel's alone, and no square has a second one.
    y_step = (h != H).to(tl.int32)
    x_step = (w != W).to(tl.int32)
    for y_lower in range(y - y_step, y + 1):
        upper_row = tl.maximum(y_lower, 0) * w
        lower_row = tl.minimum(y_lower + y_step, h - 1) * w
        for x_lower in range(x - x_step, x + 1):
            x_left = tl.maximum(x_lower, 0)
            x_right = tl.minimum(x_lower + x_step, w - 1)
            upper_left = _load_classes(image + (upper_row + x_left) * cell_stride, offset, class_stride, k_mask)
            upper_right = _load_classes(image + (upper_row + x_right) * cell_stride, offset, class_stride, k_mask)
            lower_left = _load_classes(image + (lower_row + x_left) * cell_stride, offset, class_stride, k_mask)
            lower_right = _load_classes(image + (lower_row + x_right) * cell_stride, offset, class_stride, k_mask)
            i_end = tap_start(x_lower + 1, W, w, ALIGN)
            for j in range(tap_start(y_lower, H, h, ALIGN), tap_start(y_lower + 1, H, h, ALIGN)):
                y_weight = upper_weight(j, y_lower, H, h, ALIGN)
                left = (1 - y_weight) * upper_left + y_weight * lower_left
                right = (1 - y_weight) * upper_right + y_weight * lower_right
                # What the cell is to this row: its upper or its lower neighbour, on the last row of cells both.
                y_share = tl.where(y_lower == y, 1 - y_weight, y_weight)
                y_share = tl.where((y_lower == y) & (y == h - 1), 1.0, y_share)
                for i_start in range(tap_start(x_lower, W, w, ALIGN), i_end, BLOCK_W):
                    i = i_start + tl.arange(0, BLOCK_W)
                    mask = i < i_end
                    x_weight = upper_weight(i, x_lower, W, w, ALIGN)
                    x_share = tl.where(x_lower == x, 1 - x_weight, x_weight)
                    x_share = tl.where((x_lower == x) & (x == w - 1), 1.0, x_share)
                    share = tl.where(mask, y_share * x_share, 0.0)
                    at = (n * H + j) * W + i
                    most = tl.load(state_ptr + at, mask=mask, other=0)
                    factor = tl.load(state_ptr + plane + at, mask=mask, other=0)
                    aim = tl.load(state_ptr + 2 * plane + at, mask=mask, other=0)
                    target = tl.load(target_ptr + at, mask=mask, other=0).to(tl.int64)
                    value = (1 - x_weight)[:, None] * left[None, :] + x_weight[:, None] * right[None, :]
                    gradient = factor[:, None] * tl.exp(value - most[:, None])
                    gradient -= tl.where(k[None, :] == target[:, None], aim[:, None], 0.0)
                    if SMOOTH:
                        each = tl.load(state_ptr + 3 * plane + at, mask=mask, other=0)
                        gradient -= each[:, None] * class_weight[None, :]
                    total += tl.where((factor != 0)[:, None], share[:, None] * gradient, 0.0)
    out = out_ptr + n * K * h * w + (y * w + x).to(tl.int64) * cell_stride
    tl.store(out + offset * class_stride, tl.sum(total, 0), mask=k_mask)


def upsample_cross_entropy_refuses(*args: Any) -> str | None:
    """Arguments of upsample_cross_entropy_losses or _sums; of the logits alone, what holds for any target."""
    sizes = [size for tensor in args[:2] for size in tensor.shape[-2:]]
    if sizes and max(sizes) > 32767:
        return f"the triton kernels take maps of at most 32767 x 32767, got {tuple(sizes)}"
    if args[0].shape[:1] and args[0].shape[0] > 65535:
        return f"the triton kernels take at most 65535 images, got {args[0].shape[0]}"
    return refuses(args[0])


PIXEL_TILE = {"BLOCK_W": 32, "BLOCK_K": 16}
PIXEL_WARPS = 4
GRADIENT_TILE = {"BLOCK_W": 4, "BLOCK_K": 16}
GRADIENT_WARPS = 1


def _run(
    logits: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor | None,
    pixel_weight: torch.Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    align_corners: bool,
    losses: torch.Tensor | None,
    gradient: torch.Tensor | None,
) -> torch.Tensor:
    """The sums, or of no use where losses are asked for."""
    (n, classes, h, w), (height, width) = logits.shape, target.shape[1:]
    strides = (h * w, 1) if logits.is_contiguous() else (1, classes)
    sizes = n, classes, h, w, height, width, *strides
    options = {"ALIGN": align_corners, "WEIGHT": weight is not None, "SMOOTH": label_smoothing > 0}
    grid = triton.cdiv(width, PIXEL_TILE["BLOCK_W"]), height, n
    programs = grid[0] * grid[1] * grid[2]
    sums = torch.empty((0 if losses is not None else programs, 3), dtype=torch.float32, device=logits.device)
    if n == 0:
        return sums.sum(0)
    state = torch.empty((4, *target.shape), dtype=torch.float32, device=logits.device) if gradient is not None else sums
    # A pointer that the kernel does not use is another's.
    with on_device(logits):
        _upsample_cross_entropy_pixels_kernel[grid](
            logits, target, sums if weight is None else weight, sums if pixel_weight is None else pixel_weight,
            sums if losses is None else losses, state, sums, *sizes, ignore_index, label_smoothing,
            PIXEL_WEIGHT=pixel_weight is not None, LOSSES=losses is not None, STATE=gradient is not None,
            **options, **PIXEL_TILE, num_warps=PIXEL_WARPS,
        )  # fmt: skip
        if gradient is not None:
            _upsample_cross_entropy_gradient_kernel[w * triton.cdiv(classes, GRADIENT_TILE["BLOCK_K"]), h, n](
                logits, target, sums if weight is None else weight, state, gradient, *sizes,
                **options, **GRADIENT_TILE, num_warps=GRADIENT_WARPS,
            )  # fmt: skip
    return sums.sum(0)


def upsample_cross_entropy_losses(
    logits: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    align_corners: bool,
) -> torch.Tensor:
    losses = torch.empty(target.shape, dtype=torch.float32, device=logits.device)
    _run(logits, target, weight, None, ignore_index, label_smoothing, align_corners, losses, None)
    return losses


def upsample_cross_entropy_sums(
    logits: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor | None,
    pixel_weight: torch.Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    align_corners: bool,
    gradient: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    if gradient:
        memory_format = torch.contiguous_format if logits.is_contiguous() else torch.channels_last
        unscaled = torch.empty(logits.shape, dtype=torch.float32, device=logits.device, memory_format=memory_format)
    else:
        unscaled = torch.empty(0, dtype=torch.float32, device=logits.device)
    sums = _run(
        logits, target, weight, pixel_weight, ignore_index, label_smoothing, align_corners, None,
        unscaled if gradient else None,
    )  # fmt: skip
    return sums, unscaled


def _compile_cases() -> Iterator[CompileCase]:
    types = dict.fromkeys(("weight_ptr", "pixel_weight_ptr", "loss_ptr", "state_ptr", "sums_ptr", "out_ptr"), "*fp32")
    types.update(target_ptr="*i64", smoothing="fp32")
    for dtype, align_corners, smooth in ((torch.bfloat16, True, False), (torch.float32, False, True)):
        options = {"ALIGN": align_corners, "WEIGHT": smooth, "SMOOTH": smooth}
        for losses in (False, True):
            yield compile_case(
                _upsample_cross_entropy_pixels_kernel,
                dtype,
                {**options, "PIXEL_WEIGHT": smooth, "LOSSES": losses, "STATE": not losses, **PIXEL_TILE},
                PIXEL_WARPS,
                (),
                **types,
            )
        yield compile_case(
            _upsample_cross_entropy_gradient_kernel, dtype, {**options, **GRADIENT_TILE}, GRADIENT_WARPS, (), **types
        )


COMPILE_CASES = [*_compile_cases()]
