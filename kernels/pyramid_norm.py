"""pyramid_norm in Triton. The maths stands in `pspnet_fast/ops/pyramid_norm.py`.

Sums over a level are one program's for each block of channels, in float32 and in a fixed order; the elementwise passes
take the packed pyramid's rows as they come.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from . import CompileCase, compile_case, on_device, refuses
from .geometry import device_function, level_bins, level_factors, level_rows, round_to, tiles


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


@triton.jit(do_not_specialize=["N"])
def _pyramid_norm_statistics_kernel(
    y_ptr, mean_ptr, var_ptr, N, R, BINS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr
):
    """Grid: (blocks of R, levels); one program owns some reduced channels of a level.
    Tile: BLOCK_M rows x BLOCK_R, walked twice: the mean, then what differs from it, which corrects the mean, squared.
    Traffic: N*S*R read, twice (the second time mostly from cache); 2*B*R float32 written.
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
    tl.store(mean_ptr + level * R + r, mean, mask=r_mask)
    tl.store(var_ptr + level * R + r, tl.div_rn(_sum_rows(squares, BLOCK_M, BLOCK_R), count * 1.0), mask=r_mask)


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
    grad_ptr, y_ptr, out_ptr, mean_ptr, invstd_ptr, sum_grad_ptr, sum_grad_normal_ptr, N, R,
    BINS: tl.constexpr, RELU: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Grid: (blocks of R, levels); one program owns some reduced channels of a level.
    Tile: BLOCK_M rows x BLOCK_R.
    Traffic: 3*N*S*R read (2 without a ReLU), 2*B*R float32 written.
    """
    r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    r_mask = r < R
    level = tl.program_id(1)
    bins, _ = level_bins(level, BINS)
    mean = tl.load(mean_ptr + level * R + r, mask=r_mask, other=0.0)
    total = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
    total_normal = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
    for tile in range(0, tiles(N * bins * bins, BLOCK_M)):
        row, row_mask = level_rows(level, tile, N, BINS, BLOCK_M)
        at = row[:, None] * R + r[None, :]
        mask = row_mask[:, None] & r_mask[None, :]
        grad = _through_relu(tl.load(grad_ptr + at, mask=mask, other=0.0), out_ptr, at, mask, RELU)
        difference = tl.load(y_ptr + at, mask=mask, other=0.0).to(tl.float32) - mean[None, :]
        total += grad
        total_normal += tl.where(mask, grad * difference, 0.0)
    invstd = tl.load(invstd_ptr + level * R + r, mask=r_mask, other=0.0)
    tl.store(sum_grad_ptr + level * R + r, _sum_rows(total, BLOCK_M, BLOCK_R), mask=r_mask)
    sum_grad_normal = _sum_rows(total_normal, BLOCK_M, BLOCK_R) * invstd
    tl.store(sum_grad_normal_ptr + level * R + r, sum_grad_normal, mask=r_mask)


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


def pyramid_norm_statistics(y: torch.Tensor, bins: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    n, _, reduced = y.shape
    mean, var = _per_level(y, bins)
    if n == 0:
        return mean.fill_(torch.nan), var.fill_(torch.nan)
    tile = SUM_TILES[y.element_size()]
    with on_device(y):
        _pyramid_norm_statistics_kernel[(triton.cdiv(reduced, tile.r), len(bins))](
            y, mean, var, n, reduced,
            BINS=tuple(bins), **tile.blocks, num_warps=tile.num_warps,
        )  # fmt: skip
    return mean, var


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


def pyramid_norm_sums(
    grad: torch.Tensor,
    y: torch.Tensor,
    out: torch.Tensor,
    bins: Sequence[int],
    mean: torch.Tensor,
    invstd: torch.Tensor,
    relu: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    n, _, reduced = y.shape
    sum_grad, sum_grad_normal = _per_level(y, bins)
    if n == 0:
        return sum_grad.zero_(), sum_grad_normal.zero_()
    tile = SUM_TILES[y.element_size()]
    with on_device(y):
        _pyramid_norm_sums_kernel[(triton.cdiv(reduced, tile.r), len(bins))](
            grad, y, out, mean, invstd, sum_grad, sum_grad_normal, n, reduced,
            BINS=tuple(bins), RELU=relu, **tile.blocks, num_warps=tile.num_warps,
        )  # fmt: skip
    return sum_grad, sum_grad_normal


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
    names = ("mean", "var", "invstd", "weight", "bias", "sum_grad", "sum_grad_normal", "mean_grad", "mean_grad_normal")
    types = dict.fromkeys((f"{name}_ptr" for name in names), "*fp32")
    for dtype in (torch.bfloat16, torch.float32):
        case = partial(compile_case, dtype=dtype, divisible=("R",), **types)
        bins = {"BINS": (1, 2, 3, 6)}
        relu, tile = bins | {"RELU": True}, SUM_TILES[dtype.itemsize]
        yield case(_pyramid_norm_statistics_kernel, constexprs=bins | tile.blocks, num_warps=tile.num_warps)
        yield case(_pyramid_norm_sums_kernel, constexprs=relu | tile.blocks, num_warps=tile.num_warps)
        tile = ELEMENT_TILES[dtype.itemsize]
        evaluation = relu | {"mean_grad_ptr": None, "mean_grad_normal_ptr": None}
        yield case(_pyramid_norm_forward_kernel, constexprs=relu | tile.blocks, num_warps=tile.num_warps)
        for options in (relu, evaluation):
            yield case(_pyramid_norm_backward_kernel, constexprs=options | tile.blocks, num_warps=tile.num_warps)


COMPILE_CASES = [*_compile_cases()]
