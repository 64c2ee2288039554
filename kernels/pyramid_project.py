"""pyramid_project in Triton. The maths stands in `pspnet_fast/ops/pyramid_project.py`.

Every launch is one matrix product grouped over the levels: `level_of_tile` finds a program's level, `level_rows` gathers
the level's rows, which lie apart in the batch, and `select` takes its weights, which arrive as a tuple of pointers. At
N = 1 there is little to read but the weights, too few programs to read them fast, and so the channels are split over
programs, too, whose parts `_pyramid_project_sum_kernel` adds in a fixed order.

float32 keeps its full precision: its products (`input_precision="ieee"`) are the vector units', which read shared memory
without conflicts only where the second operand runs along the result's second axis. So the forward's result is
(R, rows), weights first, and a float32 pyramid is transposed before it.

Past 300 lines: forward, its sum and the two gradients are one product in four arrangements, of the same helpers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import inf
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from . import TRITON_NAMES, CompileCase, compile_case, on_device, refuses
from .geometry import (
    INTERPRETED,
    cell_count,
    device_function,
    level_bins,
    level_factors,
    level_of_tile,
    level_rows,
    round_to,
    select,
    tiles,
)


class Tile(NamedTuple):
    """Rows, reduced channels and channels of one program's block, for levels of at most `largest_level` rows."""

    largest_level: float
    m: int
    r: int
    c: int
    num_warps: int
    num_stages: int

    @property
    def blocks(self) -> dict[str, int]:
        return {"BLOCK_M": self.m, "BLOCK_R": self.r, "BLOCK_C": self.c}


# By the size of an element in bytes: the first tile whose `largest_level` reaches N * max(bins)**2 is taken.
FORWARD_TILES = {
    2: (Tile(64, 16, 64, 64, 4, 4), Tile(256, 32, 64, 64, 4, 4), Tile(inf, 64, 64, 64, 8, 3)),
    4: (Tile(64, 16, 64, 32, 4, 4), Tile(256, 32, 64, 32, 4, 3), Tile(inf, 64, 64, 32, 4, 3)),
}
PYRAMID_GRADIENT_TILES = {
    2: (Tile(64, 16, 64, 64, 4, 4), Tile(256, 32, 64, 64, 4, 4), Tile(inf, 64, 64, 64, 8, 3)),
    4: (Tile(64, 16, 32, 64, 4, 4), Tile(256, 32, 16, 64, 4, 4), Tile(inf, 64, 32, 64, 4, 3)),
}
WEIGHT_GRADIENT_TILES = {2: (Tile(inf, 32, 64, 64, 4, 3),), 4: (Tile(inf, 32, 64, 64, 8, 3),)}
SUM_TILE, SUM_WARPS = {"BLOCK_M": 4, "BLOCK_R": 128}, 4
# Channels are split until there are this many programs: about two for each multiprocessor of the largest GPUs.
PROGRAMS, MOST_SPLITS = 256, 8


@device_function
def dot(a, b, acc):
    """`acc` + a @ b. The interpreter multiplies bfloat16 as integers, so it is given float32: the products are the same."""
    if INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@device_function
def scale_shift_relu(y, scale_ptr, shift_ptr, at, mask, RELU: tl.constexpr):
    if scale_ptr is not None:
        y *= tl.load(scale_ptr + at, mask=mask, other=0.0)
    if shift_ptr is not None:
        y += tl.load(shift_ptr + at, mask=mask, other=0.0)
    if RELU:
        y = tl.where(y < 0, 0.0, y)
    return y


@triton.jit(do_not_specialize=["N"])
def _pyramid_project_forward_kernel(
    pyramid_ptr, weight_ptrs, scale_ptr, shift_ptr, out_ptr, N, C, R,
    BINS: tl.constexpr, TRANSPOSED: tl.constexpr, RELU: tl.constexpr, SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Grid: (tiles of rows, blocks of R, SPLITS); one level's rows, some reduced channels, a SPLITS-th of the channels.
    Tile: (BLOCK_R, BLOCK_M) sums, channels walked by BLOCK_C; SPLITS > 1 writes sums (SPLITS, N * S, R) in float32.
    Traffic: the weights once for every tile of their level's rows, N*S*C read, SPLITS*N*S*R written.
    """
    level, tile = level_of_tile(tl.program_id(0), N, BINS, BLOCK_M)
    row, row_mask = level_rows(level, tile, N, BINS, BLOCK_M)
    r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    r_mask = r < R
    weight_rows = select(weight_ptrs, level) + r.to(tl.int64)[:, None] * C
    per_split = tiles(C, BLOCK_C * SPLITS) * BLOCK_C
    first = tl.program_id(2) * per_split
    acc = tl.zeros([BLOCK_R, BLOCK_M], tl.float32)
    for c_start in range(first, tl.minimum(first + per_split, C), BLOCK_C):
        c = c_start + tl.arange(0, BLOCK_C)
        c_mask = c < C
        w = tl.load(weight_rows + c[None, :], mask=r_mask[:, None] & c_mask[None, :], other=0.0)
        if TRANSPOSED:
            at = c.to(tl.int64)[:, None] * N * cell_count(BINS) + row[None, :]
        else:
            at = row[None, :] * C + c[:, None]
        p = tl.load(pyramid_ptr + at, mask=c_mask[:, None] & row_mask[None, :], other=0.0)
        acc = dot(w, p, acc)
    mask = r_mask[:, None] & row_mask[None, :]
    out = row[None, :] * R + r[:, None]
    if SPLITS == 1:
        y = scale_shift_relu(acc, scale_ptr, shift_ptr, (level * R + r)[:, None], r_mask[:, None], RELU)
        tl.store(out_ptr + out, round_to(y, out_ptr.dtype.element_ty), mask=mask)
    else:
        tl.store(out_ptr + tl.program_id(2).to(tl.int64) * N * cell_count(BINS) * R + out, acc, mask=mask)


@triton.jit(do_not_specialize=["rows"])
def _pyramid_project_sum_kernel(
    parts_ptr, scale_ptr, shift_ptr, out_ptr, rows, R,
    BINS: tl.constexpr, RELU: tl.constexpr, SPLITS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Grid: (blocks of the N * S rows, blocks of R).
    Tile: BLOCK_M rows x BLOCK_R; the SPLITS parts are added first to last.
    Traffic: SPLITS*N*S*R read in float32, N*S*R written.
    """
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    mask = (row < rows)[:, None] & (r < R)[None, :]
    at = row.to(tl.int64)[:, None] * R + r[None, :]
    y = tl.load(parts_ptr + at, mask=mask, other=0.0)
    for split in tl.static_range(1, SPLITS):
        y += tl.load(parts_ptr + split * rows.to(tl.int64) * R + at, mask=mask, other=0.0)
    y = scale_shift_relu(y, scale_ptr, shift_ptr, level_factors(row, r, R, BINS), mask, RELU)
    tl.store(out_ptr + at, round_to(y, out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["N"])
def _pyramid_project_pyramid_gradient_kernel(
    grad_ptr, weight_ptrs, out_ptr, N, C, R,
    BINS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Grid: (tiles of rows, blocks of C); one level's rows, some channels.
    Tile: (BLOCK_M, BLOCK_C) sums, reduced channels walked by BLOCK_R.
    Traffic: the weights once for every tile of their level's rows, N*S*R read, N*S*C written.
    """
    level, tile = level_of_tile(tl.program_id(0), N, BINS, BLOCK_M)
    row, row_mask = level_rows(level, tile, N, BINS, BLOCK_M)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    c_mask = c < C
    grad_rows = grad_ptr + row[:, None] * R
    weight_columns = select(weight_ptrs, level) + c[None, :]
    acc = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    for r_start in range(0, R, BLOCK_R):
        r = r_start + tl.arange(0, BLOCK_R)
        r_mask = r < R
        g = tl.load(grad_rows + r[None, :], mask=row_mask[:, None] & r_mask[None, :], other=0.0)
        w = tl.load(weight_columns + r.to(tl.int64)[:, None] * C, mask=r_mask[:, None] & c_mask[None, :], other=0.0)
        acc = dot(g, w, acc)
    mask = row_mask[:, None] & c_mask[None, :]
    tl.store(out_ptr + row[:, None] * C + c[None, :], round_to(acc, out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["N"])
def _pyramid_project_weight_gradient_kernel(
    grad_ptr, pyramid_ptr, out_ptr, N, C, R,
    BINS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Grid: (blocks of C, blocks of R, levels).
    Tile: (BLOCK_R, BLOCK_C) sums, the level's rows walked by BLOCK_M.
    Traffic: N*S*R read for every block of C, N*S*C for every block of R, B*R*C written.
    """
    level = tl.program_id(2)
    r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    r_mask = r < R
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    c_mask = c < C
    bins, _ = level_bins(level, BINS)
    acc = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    for tile in range(0, tiles(N * bins * bins, BLOCK_M)):
        row, row_mask = level_rows(level, tile, N, BINS, BLOCK_M)
        g = tl.load(grad_ptr + row[None, :] * R + r[:, None], mask=r_mask[:, None] & row_mask[None, :], other=0.0)
        p = tl.load(pyramid_ptr + row[:, None] * C + c[None, :], mask=row_mask[:, None] & c_mask[None, :], other=0.0)
        acc = dot(g, p, acc)
    out = (level.to(tl.int64) * R + r)[:, None] * C + c[None, :]
    tl.store(out_ptr + out, round_to(acc, out_ptr.dtype.element_ty), mask=r_mask[:, None] & c_mask[None, :])


def pyramid_project_refuses(tensor: torch.Tensor, *_: Any) -> str | None:
    return refuses(tensor)


def _tile(table: dict[int, tuple[Tile, ...]], pyramid: torch.Tensor, bins: Sequence[int]) -> Tile:
    rows = pyramid.shape[0] * max(bins) ** 2
    return next(tile for tile in table[pyramid.element_size()] if rows <= tile.largest_level)


def _row_tiles(n: int, bins: Sequence[int], block: int) -> int:
    return sum(triton.cdiv(n * b * b, block) for b in bins)


def pyramid_project_forward(
    pyramid: torch.Tensor,
    weight: Sequence[torch.Tensor],
    bins: Sequence[int],
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
    relu: bool,
) -> torch.Tensor:
    (n, s, c), reduced = pyramid.shape, weight[0].shape[0]
    out = pyramid.new_empty(n, s, reduced)
    if out.numel() == 0:
        return out
    tile = _tile(FORWARD_TILES, pyramid, bins)
    row_tiles, r_blocks = _row_tiles(n, bins, tile.m), triton.cdiv(reduced, tile.r)
    splits = 1
    while splits < MOST_SPLITS and splits * tile.c < c and splits * row_tiles * r_blocks < PROGRAMS:
        splits *= 2
    transposed = pyramid.dtype == torch.float32
    if transposed:
        pyramid = pyramid.flatten(0, 1).T.contiguous()
    sums = out if splits == 1 else out.new_empty(splits, n * s, reduced, dtype=torch.float32)
    options = {"BINS": tuple(bins), "RELU": relu, "SPLITS": splits}
    with on_device(pyramid):
        _pyramid_project_forward_kernel[(row_tiles, r_blocks, splits)](
            pyramid, tuple(weight), scale, shift, sums, n, c, reduced,
            TRANSPOSED=transposed, **options, **tile.blocks, num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip
        if splits > 1:
            grid = triton.cdiv(n * s, SUM_TILE["BLOCK_M"]), triton.cdiv(reduced, SUM_TILE["BLOCK_R"])
            _pyramid_project_sum_kernel[grid](
                sums, scale, shift, out, n * s, reduced, **options, **SUM_TILE, num_warps=SUM_WARPS
            )
    return out


def pyramid_project_backward(
    grad: torch.Tensor, pyramid: torch.Tensor, weight: Sequence[torch.Tensor], bins: Sequence[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    (n, _, c), reduced = pyramid.shape, weight[0].shape[0]
    d_pyramid = torch.empty_like(pyramid)
    d_weight = weight[0].new_empty(len(bins), reduced, c)
    if n == 0:
        return d_pyramid, d_weight.zero_()
    with on_device(pyramid):
        tile = _tile(PYRAMID_GRADIENT_TILES, pyramid, bins)
        _pyramid_project_pyramid_gradient_kernel[(_row_tiles(n, bins, tile.m), triton.cdiv(c, tile.c))](
            grad, tuple(weight), d_pyramid, n, c, reduced,
            BINS=tuple(bins), **tile.blocks, num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip
        tile = _tile(WEIGHT_GRADIENT_TILES, pyramid, bins)
        _pyramid_project_weight_gradient_kernel[(triton.cdiv(c, tile.c), triton.cdiv(reduced, tile.r), len(bins))](
            grad, pyramid, d_weight, n, c, reduced,
            BINS=tuple(bins), **tile.blocks, num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip
    return d_pyramid, d_weight


def _compile_cases() -> Iterator[CompileCase]:
    bins = (1, 2, 3, 6)

    def cases(kernel: Any, tile: Tile, ragged: bool = True, **constexprs: Any) -> Iterator[CompileCase]:
        options = {"BINS": bins, **constexprs, **tile.blocks}
        case = compile_case(kernel, dtype, options, tile.num_warps, ("C", "R"), **types)
        case = case._replace(num_stages=tile.num_stages)
        yield case
        if ragged:
            yield case._replace(divisible=(), variant=f"{case.variant} ragged")

    for dtype in (torch.bfloat16, torch.float32):
        name = TRITON_NAMES[dtype]
        types: dict[str, Any] = {"weight_ptrs": (f"*{name}",) * len(bins), "parts_ptr": "*fp32"}
        types |= {"scale_ptr": "*fp32", "shift_ptr": "*fp32"}
        epilogue = {"RELU": True, "SPLITS": 1}
        training = {"RELU": False, "SPLITS": 1, "scale_ptr": None, "shift_ptr": None}
        for tile in FORWARD_TILES[dtype.itemsize]:
            kernel, transposed = _pyramid_project_forward_kernel, dtype == torch.float32
            yield from cases(kernel, tile, TRANSPOSED=transposed, **epilogue)
            yield from cases(kernel, tile, False, TRANSPOSED=transposed, **training)
            parts = cases(kernel, tile, False, TRANSPOSED=transposed, **epilogue | {"SPLITS": MOST_SPLITS})
            yield from (case._replace(signature={**case.signature, "out_ptr": "*fp32"}) for case in parts)
        for tile in PYRAMID_GRADIENT_TILES[dtype.itemsize]:
            yield from cases(_pyramid_project_pyramid_gradient_kernel, tile)
        for tile in WEIGHT_GRADIENT_TILES[dtype.itemsize]:
            yield from cases(_pyramid_project_weight_gradient_kernel, tile)
        options = {"BINS": bins, **epilogue, "SPLITS": MOST_SPLITS, **SUM_TILE}
        yield compile_case(_pyramid_project_sum_kernel, dtype, options, SUM_WARPS, ("R",), **types)


COMPILE_CASES = [*_compile_cases()]
