"""z of pyramid_conv2d: the cells' products with every tap of the weight, by the library's matrix product.

    z[n, s, t, o] = sum over r of  weight[o, k R + r, t] p[n, s, r]        cell s of level k, tap t = (dy, dx)
    dp[n, s, r] = sum over o, t of  weight[o, k R + r, t] dz[n, s, t, o]
    dweight[o, k R + r, t] = sum over n and the cells s of level k of  dz[n, s, t, o] p[n, s, r]

The weight is the large operand, and is read once. In channels_last, r is innermost, and it is an operand as it stands. In
NCHW, where the taps are innermost, a few output channels at a time pass through a buffer that stays in a CPU's cache; so
do 16-bit weights, which are widened there: 16 bits for z or dz would cost more than plain PyTorch loses.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from ..geometry import accumulation_dtype, cell_count, levels, memory_format
from ._define import LIBRARY, define

# Output channels in the buffer: 9 taps of 2048 channels in float32 are 2.4 MB.
BLOCK = 32
# Output channels whose taps one chain of the pyramid's gradient sums: 72 products for 3x3.
TOGETHER = 8


def conv2d_taps(pyramid: torch.Tensor, weight: torch.Tensor, bins: Sequence[int]) -> torch.Tensor:
    """Z (N, S, k*k, O), contiguous, in the dtype that sums are held in."""
    z: torch.Tensor = _op(pyramid, weight, bins)
    return z


def _blocks(*weights: torch.Tensor) -> Iterator[tuple[slice, list[tuple[torch.Tensor, torch.Tensor]]]]:
    """Some output channels at a time, and of each weight their part: as (o, k*k, B*R), and where products can work on it."""
    wide = accumulation_dtype(weights[0].dtype)
    by_taps = [weight.permute(0, 2, 3, 1).flatten(1, 2) for weight in weights]
    channels, *rest = by_taps[0].shape
    as_they_are = [view.stride(2) == 1 and view.dtype == wide for view in by_taps]
    blocked = weights[0].device.type == "cpu" and not all(as_they_are)
    block = min(BLOCK, channels) if blocked else channels
    buffers = [
        None if ready else view.new_empty((block, *rest), dtype=wide)
        for view, ready in zip(by_taps, as_they_are, strict=True)
    ]
    for start in range(0, channels, block):
        parts = [view[start : start + block] for view in by_taps]
        count = len(parts[0])
        rows = [part if buffer is None else buffer[:count] for part, buffer in zip(parts, buffers, strict=True)]
        yield slice(start, start + count), list(zip(parts, rows, strict=True))


def _of_level(rows: torch.Tensor, k: int, reduced: int) -> torch.Tensor:
    """Level k's (o * k*k, R) of rows (o, k*k, B*R), a view."""
    return rows[:, :, k * reduced : (k + 1) * reduced].flatten(0, 1)


def _sum_of_products(d_taps: torch.Tensor, weight: torch.Tensor, channels: int) -> torch.Tensor:
    """d_taps^T weight, summed over (channels * k*k) in parts: for a handful of cells the library sums in one long chain."""
    together = math.gcd(channels, TOGETHER)
    parts = [factor.unflatten(0, (channels // together, -1)) for factor in (d_taps, weight)]
    return torch.bmm(parts[0].transpose(1, 2), parts[1]).sum(0)


def _forward(pyramid: torch.Tensor, weight: torch.Tensor, bins: Sequence[int]) -> torch.Tensor:
    z = _forward_fake(pyramid, weight, bins)
    n, reduced, area = pyramid.shape[0], pyramid.shape[2], z.shape[2]
    wide = [level.flatten(0, 1).to(z.dtype) for level in levels(pyramid, bins)]
    with torch.autocast(pyramid.device.type, enabled=False):
        for channels, [(part, rows)] in _blocks(weight):
            if rows is not part:
                rows.copy_(part)
            for k, (p, result) in enumerate(zip(wide, levels(z, bins), strict=True)):
                product = p @ _of_level(rows, k, reduced).t()
                result[..., channels] = product.view(n, result.shape[1], len(rows), area).transpose(2, 3)
    return z


def _forward_fake(pyramid: torch.Tensor, weight: torch.Tensor, bins: Sequence[int]) -> torch.Tensor:
    shape = pyramid.shape[0], cell_count(bins), weight.shape[2] * weight.shape[3], weight.shape[0]
    return pyramid.new_empty(shape, dtype=accumulation_dtype(pyramid.dtype))


def _backward(
    dz: torch.Tensor, pyramid: torch.Tensor, weight: torch.Tensor, bins: Sequence[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    n, reduced = pyramid.shape[0], pyramid.shape[2]
    wide = [level.flatten(0, 1).to(dz.dtype) for level in levels(pyramid, bins)]
    sums = [torch.zeros_like(p) for p in wide]
    by_channel = [level.permute(3, 2, 0, 1).flatten(2).contiguous() for level in levels(dz, bins)]
    d_weight = _backward_fake(dz, pyramid, weight, bins)[1]
    with torch.autocast(pyramid.device.type, enabled=False):
        for channels, [(part, rows), (d_part, d_rows)] in _blocks(weight, d_weight):
            if rows is not part:
                rows.copy_(part)
            for k, (p, d_p, d) in enumerate(zip(wide, sums, by_channel, strict=True)):
                d_taps = d[channels].flatten(0, 1)
                d_p.add_(_sum_of_products(d_taps, _of_level(rows, k, reduced), len(rows)))
                torch.mm(d_taps, p, out=_of_level(d_rows, k, reduced))
            if d_rows is not d_part:
                d_part.copy_(d_rows)
    d_pyramid = torch.cat([level.view(n, b * b, reduced) for b, level in zip(bins, sums, strict=True)], 1)
    return d_pyramid.to(pyramid.dtype), d_weight


def _backward_fake(
    dz: torch.Tensor, pyramid: torch.Tensor, weight: torch.Tensor, bins: Sequence[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    # In the weight's order, the taps innermost or the channels, without the gaps of a slice.
    d_weight = torch.empty_like(weight, memory_format=memory_format(weight.stride(1) == 1))
    return pyramid.new_empty(pyramid.shape), d_weight


_op = define("pyramid_conv2d_taps(Tensor pyramid, Tensor weight, int[] bins) -> Tensor", _forward, _forward_fake)
_backward_op = define(
    "pyramid_conv2d_taps_backward(Tensor dz, Tensor pyramid, Tensor weight, int[] bins) -> (Tensor, Tensor)",
    _backward,
    _backward_fake,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    pyramid, weight, ctx.bins = inputs
    ctx.save_for_backward(pyramid, weight)


def _gradient(ctx: Any, dz: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
    return *_backward_op(dz, *ctx.saved_tensors, ctx.bins), None


def _setup_backward_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *tensors, ctx.bins = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors)


def _backward_gradient(ctx: Any, dd_pyramid: torch.Tensor | None, dd_weight: torch.Tensor | None) -> tuple[Any, ...]:
    """Of W^T dz and dz p^T, both bilinear: products like them, with the incoming gradients for p and for W."""
    dz, pyramid, weight = ctx.saved_tensors
    d_dz = d_pyramid = d_weight = None
    if dd_pyramid is not None:
        d_dz = _op(dd_pyramid, weight, ctx.bins)
        d_weight = _backward_op(dz, dd_pyramid, weight, ctx.bins)[1]
    if dd_weight is not None:
        product = _op(pyramid, dd_weight, ctx.bins)
        d_dz = product if d_dz is None else d_dz + product
        d_pyramid = _backward_op(dz, pyramid, dd_weight, ctx.bins)[0]
    return d_dz, d_pyramid, d_weight, None


torch.library.register_autograd(
    "pspnet_fast::pyramid_conv2d_taps", _gradient, setup_context=_setup_context, lib=LIBRARY
)
torch.library.register_autograd(
    "pspnet_fast::pyramid_conv2d_taps_backward", _backward_gradient, setup_context=_setup_backward_context, lib=LIBRARY
)
