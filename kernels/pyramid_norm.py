"""pyramid_norm in Triton. The maths stands in `pspnet_fast/ops/pyramid_norm.py`.

Sums over a level are one program's for each block of channels, in float32 and in a fixed order; the elementwise passes
take the packed pyramid's rows as they come.

Past 300 lines: six launchers, for training in one and for a process group in parts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from . import CompileCase, compile_case, on_device, refuses
from .geometry import device_function, fraction, level_bins, level_factors, level_rows, round_to, select, tiles


class Tile(NamedTuple):
    """Rows and reduced channels of one program's block."""

    m: int
    r: int
    num_warps: int

    @property
    def blocks(self) -> dict[str, int]:
        return {"BLOCK_M": self.m, "BLOCK_R": self.r}


# By the size of an element, in bytes: 16 bytes a thread, and rows of 64 bytes in the sums, 512 bytes elsewhere.
SUM_TILES = {2: Tile(128, 32, 8), 4: Tile(128, 16, 8)}
ELEMENT_TILES = {2: Tile(4, 256, 4), 4: Tile(4, 128, 4)}


@device_function
def _through_relu(grad, out_ptr, at, mask, RELU: tl.constexpr):
    grad = grad.to(tl.float32)
    if RELU:
        grad = tl.where(tl.load(out_ptr + at, mask=mask, other=0.0).to(tl.float32) > 0, grad, 0.0)
    return grad


@device_function
def _sum_rows(block, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr):
    """In two steps, since the interpreter adds one after the other: short sums err less."""
    return tl.sum(tl.sum(tl.reshape(block, [8, BLOCK_M // 8, BLOCK_R]), 0), 0)


@device_function
def _of_level(ptrs, level, r, mask, otherwise):
    """The level's values from a tuple of tensors (R,), or `otherwise` where there are none."""
    if ptrs is None:
        return r * 0.0 + otherwise
    return tl.load(select(ptrs, level) + r, mask=mask, other=0.0)


@device_function
def _update_running(ptrs, momenta, level, r, mask, value):
    momentum = select(momenta, level)
    pointer = select(ptrs, level) + r
    tl.store(pointer, (1 - momentum) * tl.load(pointer, mask=mask, other=0.0) + momentum * value, mask=mask)


@triton.jit(do_not_specialize=["N", "eps", "momenta"])
def _pyramid_norm_statistics_kernel(
    y_ptr, mean_ptr, var_ptr, out_ptr, weight_ptrs, bias_ptrs, running_mean_ptrs, running_var_ptrs, momenta, eps, N, R,
    BINS: tl.constexpr, RELU: tl.constexpr, TRAIN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """With TRAIN the norm itself, too: var becomes invstd, out is written and the running statistics are updated.

    Grid: (blocks of R, levels); one program owns some reduced channels of a level.
    Tile: BLOCK_M rows x BLOCK_R, walked twice: the mean, then what differs from it, which corrects the mean, squared.
    Traffic: N*S*R read, twice (the second time mostly from cache); 2*B*R float32 written. TRAIN: once more, and written.
    """
    r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    r_mask = r < R
    level = tl.program_id(1)
    bins, _ = level_bins(level, BINS)
    count = N * bins * bins
    total = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
    for tile in range(0, tiles(count, BLOCK_M)):
        row, row_mask = level_rows(level, tile, N, BINS, BLOCK_M)
        mask = row_mask[:, None] & r_mask[None, :]
        total += tl.load(y_ptr + row[:, None] * R + r[None, :], mask=mask, other=0.0).to(tl.float32)
    mean = _sum_rows(total, BLOCK_M, BLOCK_R) / count
    total = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
    squares = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
    for tile in range(0, tiles(count, BLOCK_M)):
        row, row_mask = level_rows(level, tile, N, BINS, BLOCK_M)
        mask = row_mask[:, None] & r_mask[None, :]
        y = tl.load(y_ptr + row[:, None] * R + r[None, :], mask=mask, other=0.0).to(tl.float32)
        difference = tl.where(mask, y - mean[None, :], 0.0)
        total += difference
        squares += difference * difference
    mean += _sum_rows(total, BLOCK_M, BLOCK_R) / count
    var = tl.div_rn(_sum_rows(squares, BLOCK_M, BLOCK_R), count * 1.0)
    tl.store(mean_ptr + level * R + r, mean, mask=r_mask)
    if TRAIN:
        if running_mean_ptrs is not None:
            _update_running(running_mean_ptrs, momenta, level, r, r_mask, mean)
            unbiased = var * fraction(count, count - 1)
            _update_running(running_var_ptrs, momenta, level, r, r_mask, unbiased)
        var = tl.div_rn(1.0 + 0.0 * r, tl.sqrt_rn(var + eps))  # invstd from here on
        factor = var * _of_level(weight_ptrs, level, r, r_mask, 1.0)
        bias = _of_level(bias_ptrs, level, r, r_mask, 0.0)
        for tile in range(0, tiles(count, BLOCK_M)):
            row, row_mask = level_rows(level, tile, N, BINS, BLOCK_M)
            mask = row_mask[:, None] & r_mask[None, :]
            at = row[:, None] * R + r[None, :]
            y = tl.load(y_ptr + at, mask=mask, other=0.0).to(tl.float32)
            out = (y - mean[None, :]) * factor[None, :] + bias[None, :]
            if RELU:
                out = tl.where(out < 0, 0.0, out)
            tl.store(out_ptr + at, round_to(out, out_ptr.dtype.element_ty), mask=mask)
    tl.store(var_ptr + level * R + r, var, mask=r_mask)


@triton.jit(do_not_specialize=["rows"])
def _pyramid_norm_forward_kernel(
    y_ptr, mean_ptr, invstd_ptr, weight_ptr, bias_ptr, out_ptr, rows, R,
    BINS: tl.constexpr, RELU: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Grid: (blocks of the N * S rows, blocks of R).
    Tile: BLOCK_M rows x BLOCK_R.
    Traffic: N*S*R read and written.
    """
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    mask = (row < rows)[:, None] & (r < R)[None, :]
    at = row.to(tl.int64)[:, None] * R + r[None, :]
    of_level = level_factors(row, r, R, BINS)
    mean = tl.load(mean_ptr + of_level, mask=mask, other=0.0)
    factor = tl.load(invstd_ptr + of_level, mask=mask, other=0.0)
    factor *= tl.load(weight_ptr + of_level, mask=mask, other=0.0)
    bias = tl.load(bias_ptr + of_level, mask=mask, other=0.0)
    y = tl.load(y_ptr + at, mask=mask, other=0.0).to(tl.float32)
    out = (y - mean) * factor + bias
    if RELU:
        out = tl.where(out < 0, 0.0, out)
    tl.store(out_ptr + at, round_to(out, out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["N"])
def _pyramid_norm_sums_kernel(
    grad_ptr, y_ptr, out_ptr, mean_ptr, invstd_ptr, sum_grad_ptr, sum_grad_normal_ptr, weight_ptrs, dy_ptr, N, R,
    BINS: tl.constexpr, RELU: tl.constexpr, TRAIN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """With TRAIN the gradient of y, too.

    Grid: (blocks of R, levels); one program owns some reduced channels of a level.
    Tile: BLOCK_M rows x BLOCK_R.
    Traffic: 3*N*S*R read (2 without a ReLU), 2*B*R float32 written. TRAIN: read once more, and N*S*R written.
    """
    r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    r_mask = r < R
    level = tl.program_id(1)
    bins, _ = level_bins(level, BINS)
    count = N * bins * bins
    mean = tl.load(mean_ptr + level * R + r, mask=r_mask, other=0.0)
    total = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
    total_normal = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
    for tile in range(0, tiles(count, BLOCK_M)):
        row, row_mask = level_rows(level, tile, N, BINS, BLOCK_M)
        at = row[:, None] * R + r[None, :]
        mask = row_mask[:, None] & r_mask[None, :]
        grad = _through_relu(tl.load(grad_ptr + at, mask=mask, other=0.0), out_ptr, at, mask, RELU)
        difference = tl.load(y_ptr + at, mask=mask, other=0.0).to(tl.float32) - mean[None, :]
        total += grad
        total_normal += tl.where(mask, grad * difference, 0.0)
    invstd = tl.load(invstd_ptr + level * R + r, mask=r_mask, other=0.0)
    sum_grad = _sum_rows(total, BLOCK_M, BLOCK_R)
    sum_grad_normal = _sum_rows(total_normal, BLOCK_M, BLOCK_R) * invstd
    tl.store(sum_grad_ptr + level * R + r, sum_grad, mask=r_mask)
    tl.store(sum_grad_normal_ptr + level * R + r, sum_grad_normal, mask=r_mask)
    if TRAIN:
        mean_grad = tl.div_rn(sum_grad, count * 1.0)
        slope = invstd * tl.div_rn(sum_grad_normal, count * 1.0)
        factor = invstd * _of_level(weight_ptrs, level, r, r_mask, 1.0)
        for tile in range(0, tiles(count, BLOCK_M)):
            row, row_mask = level_rows(level, tile, N, BINS, BLOCK_M)
            at = row[:, None] * R + r[None, :]
            mask = row_mask[:, None] & r_mask[None, :]
            grad = _through_relu(tl.load(grad_ptr + at, mask=mask, other=0.0), out_ptr, at, mask, RELU)
            difference = tl.load(y_ptr + at, mask=mask, other=0.0).to(tl.float32) - mean[None, :]
            dy = (grad - mean_grad[None, :] - difference * slope[None, :]) * factor[None, :]
            tl.store(dy_ptr + at, round_to(dy, dy_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows"])
def _pyramid_norm_backward_kernel(
    grad_ptr, y_ptr, out_ptr, mean_ptr, invstd_ptr, weight_ptr, mean_grad_ptr, mean_grad_normal_ptr, dy_ptr, rows, R,
    BINS: tl.constexpr, RELU: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Grid: (blocks of the N * S rows, blocks of R).
    Tile: BLOCK_M rows x BLOCK_R.
    Traffic: 3*N*S*R read (less one without a ReLU, less one at evaluation), N*S*R written.
    """
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    mask = (row < rows)[:, None] & (r < R)[None, :]
    at = row.to(tl.int64)[:, None] * R + r[None, :]
    of_level = level_factors(row, r, R, BINS)
    invstd = tl.load(invstd_ptr + of_level, mask=mask, other=0.0)
    weight = tl.load(weight_ptr + of_level, mask=mask, other=0.0)
    grad = _through_relu(tl.load(grad_ptr + at, mask=mask, other=0.0), out_ptr, at, mask, RELU)
    if mean_grad_ptr is not None:
        mean = tl.load(mean_ptr + of_level, mask=mask, other=0.0)
        mean_grad = tl.load(mean_grad_ptr + of_level, mask=mask, other=0.0)
        slope = invstd * tl.load(mean_grad_normal_ptr + of_level, mask=mask, other=0.0)
        difference = tl.load(y_ptr + at, mask=mask, other=0.0).to(tl.float32) - mean
        grad = grad - mean_grad - difference * slope
    dy = grad * (invstd * weight)
    tl.store(dy_ptr + at, round_to(dy, dy_ptr.dtype.element_ty), mask=mask)


def pyramid_norm_refuses(tensor: torch.Tensor, *_: Any) -> str | None:
    return refuses(tensor)


def _per_level(y: torch.Tensor, bins: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    shape = (len(bins), y.shape[2])
    return y.new_empty(shape, dtype=torch.float32), y.new_empty(shape, dtype=torch.float32)


def _element_grid(y: torch.Tensor, tile: Tile) -> tuple[int, int]:
    n, s, reduced = y.shape
    return triton.cdiv(n * s, tile.m), triton.cdiv(reduced, tile.r)


def _launch_statistics(y: torch.Tensor, bins: Sequence[int], relu: bool, train: bool, *args: Any) -> None:
    n, _, reduced = y.shape
    tile = SUM_TILES[y.element_size()]
    with on_device(y):
        _pyramid_norm_statistics_kernel[(triton.cdiv(reduced, tile.r), len(bins))](
            y, *args, n, reduced, BINS=tuple(bins), RELU=relu, TRAIN=train, **tile.blocks, num_warps=tile.num_warps
        )


def pyramid_norm_statistics(y: torch.Tensor, bins: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    mean, var = _per_level(y, bins)
    if y.shape[0] == 0:
        return mean.fill_(torch.nan), var.fill_(torch.nan)
    _launch_statistics(y, bins, False, False, mean, var, None, None, None, None, None, None, 0.0)
    return mean, var


def pyramid_norm_training(
    y: torch.Tensor,
    bins: Sequence[int],
    weight: Sequence[torch.Tensor],
    bias: Sequence[torch.Tensor],
    running_mean: Sequence[torch.Tensor],
    running_var: Sequence[torch.Tensor],
    momentum: Sequence[float],
    eps: float,
    relu: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    out, (mean, invstd) = torch.empty_like(y), _per_level(y, bins)
    lists = (tuple(tensors) or None for tensors in (weight, bias, running_mean, running_var))
    momenta = tuple(map(float, momentum)) if running_mean else None
    _launch_statistics(y, bins, relu, True, mean, invstd, out, *lists, momenta, eps)
    return out, mean, invstd


def pyramid_norm_forward(
    y: torch.Tensor,
    bins: Sequence[int],
    mean: torch.Tensor,
    invstd: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    relu: bool,
) -> torch.Tensor:
    out = torch.empty_like(y)
    if out.numel() == 0:
        return out
    tile = ELEMENT_TILES[y.element_size()]
    with on_device(y):
        _pyramid_norm_forward_kernel[_element_grid(y, tile)](
            y, mean, invstd, weight, bias, out, y.shape[0] * y.shape[1], y.shape[2],
            BINS=tuple(bins), RELU=relu, **tile.blocks, num_warps=tile.num_warps,
        )  # fmt: skip
    return out


def _launch_sums(
    grad: torch.Tensor, y: torch.Tensor, out: torch.Tensor, bins: Sequence[int], relu: bool, train: bool, *args: Any
) -> None:
    n, _, reduced = y.shape
    tile = SUM_TILES[y.element_size()]
    with on_device(y):
        _pyramid_norm_sums_kernel[(triton.cdiv(reduced, tile.r), len(bins))](
            grad, y, out, *args, n, reduced,
            BINS=tuple(bins), RELU=relu, TRAIN=train, **tile.blocks, num_warps=tile.num_warps,
        )  # fmt: skip


def pyramid_norm_sums(
    grad: torch.Tensor,
    y: torch.Tensor,
    out: torch.Tensor,
    bins: Sequence[int],
    mean: torch.Tensor,
    invstd: torch.Tensor,
    relu: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    sum_grad, sum_grad_normal = _per_level(y, bins)
    if y.shape[0] == 0:
        return sum_grad.zero_(), sum_grad_normal.zero_()
    _launch_sums(grad, y, out, bins, relu, False, mean, invstd, sum_grad, sum_grad_normal, None, None)
    return sum_grad, sum_grad_normal


def pyramid_norm_training_backward(
    grad: torch.Tensor,
    y: torch.Tensor,
    out: torch.Tensor,
    bins: Sequence[int],
    mean: torch.Tensor,
    invstd: torch.Tensor,
    weight: Sequence[torch.Tensor],
    relu: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    dy, (d_bias, d_weight) = torch.empty_like(y), _per_level(y, bins)
    _launch_sums(grad, y, out, bins, relu, True, mean, invstd, d_bias, d_weight, tuple(weight) or None, dy)
    return dy, d_weight, d_bias


def pyramid_norm_backward(
    grad: torch.Tensor,
    y: torch.Tensor,
    out: torch.Tensor,
    bins: Sequence[int],
    mean: torch.Tensor,
    invstd: torch.Tensor,
    weight: torch.Tensor,
    relu: bool,
    mean_grad: torch.Tensor | None,
    mean_grad_normal: torch.Tensor | None,
) -> torch.Tensor:
    dy = torch.empty_like(y)
    if dy.numel() == 0:
        return dy
    tile = ELEMENT_TILES[y.element_size()]
    with on_device(y):
        _pyramid_norm_backward_kernel[_element_grid(y, tile)](
            grad, y, out, mean, invstd, weight, mean_grad, mean_grad_normal, dy, y.shape[0] * y.shape[1], y.shape[2],
            BINS=tuple(bins), RELU=relu, **tile.blocks, num_warps=tile.num_warps,
        )  # fmt: skip
    return dy


def _compile_cases() -> Iterator[CompileCase]:
    bins = (1, 2, 3, 6)
    names = ("mean", "var", "invstd", "weight", "bias", "sum_grad", "sum_grad_normal", "mean_grad", "mean_grad_normal")
    types: dict[str, Any] = dict.fromkeys((f"{name}_ptr" for name in names), "*fp32")
    lists = ("weight_ptrs", "bias_ptrs", "running_mean_ptrs", "running_var_ptrs")
    types |= dict.fromkeys(lists, ("*fp32",) * len(bins))
    types |= {"momenta": ("fp32",) * len(bins), "eps": "fp32"}
    for dtype in (torch.bfloat16, torch.float32):
        case = partial(compile_case, dtype=dtype, divisible=("R",), **types)
        relu, tile = {"BINS": bins, "RELU": True}, SUM_TILES[dtype.itemsize]
        for train in (True, False):
            absent = {} if train else dict.fromkeys((*lists, "momenta", "out_ptr"), None)
            constexprs = relu | {"TRAIN": train} | tile.blocks
            yield case(_pyramid_norm_statistics_kernel, constexprs=constexprs | absent, num_warps=tile.num_warps)
            absent = {} if train else dict.fromkeys(("weight_ptrs", "dy_ptr"), None)
            yield case(_pyramid_norm_sums_kernel, constexprs=constexprs | absent, num_warps=tile.num_warps)
        tile = ELEMENT_TILES[dtype.itemsize]
        evaluation = relu | {"mean_grad_ptr": None, "mean_grad_normal_ptr": None}
        yield case(_pyramid_norm_forward_kernel, constexprs=relu | tile.blocks, num_warps=tile.num_warps)
        for options in (relu, evaluation):
            yield case(_pyramid_norm_backward_kernel, constexprs=options | tile.blocks, num_warps=tile.num_warps)


COMPILE_CASES = [*_compile_cases()]
