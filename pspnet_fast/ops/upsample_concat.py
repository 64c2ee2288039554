"""upsample_concat: upsample every level bilinearly and write it beside x, each output once.

    out[n, block of x] = x[n]
    out[n, block of level k + r, h, w] = sum over i, j of  U_h[h, i] U_w[w, j] p[n, cell (i, j) of level k, r]
    dp[n, cell (i, j) of level k, r]   = sum over h, w of  U_h[h, i] U_w[w, j] dout[n, block of level k + r, h, w]

U are the interpolation matrices: at most two non-zero weights a row (`geometry.bilinear_tap`). dx is dout's block of x, a
view. Saved for backward: nothing but sizes.    Must move: |x| read, |out| written, and the pyramid.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch

from ..backends import run
from ..checks import (
    check_bins,
    check_features,
    check_order,
    check_pyramid,
    check_same_device,
    check_same_dtype,
)
from ..geometry import cell_count, channel_blocks, dense, is_channels_last, memory_format
from ..tracing import is_transformed
from ._define import LIBRARY, autocast_dtype, check_writable, define, plain

_plain_forward = plain("upsample_concat", "forward")
_plain_fill = plain("upsample_concat", "fill")


def upsample_concat(
    x: torch.Tensor,
    pyramid: torch.Tensor,
    bins: Sequence[int] = (1, 2, 3, 6),
    align_corners: bool = True,
    order: Sequence[int] | None = None,
    *,
    in_place: bool = False,
) -> torch.Tensor:
    """Upsample every level to the size of x and concatenate with x (Zhao et al., CVPR 2017, section 3.2).

    Equals `cat([x, interpolate(level_0, (H, W), mode="bilinear", align_corners), ...], 1)`. The gradient of the pyramid is
    summed in float32 whatever the dtype, in a fixed order.

    Args:
        x: features (N, C, H, W); NCHW and channels_last are read as they are, and the result is in x's memory format.
        pyramid: packed cells (N, S, R).
        bins: cells per axis of each level.
        align_corners: as in `torch.nn.functional.interpolate`.
        order: the channel blocks of the result: -1 is x, k is level k. Default (-1, 0, 1, ...). x may stand anywhere or be
            left out; every level stands once.
        in_place: x is the result already, (N, C + B*R, H, W), as `pyramid_pool(..., reserve=...)` made it: the levels
            are written into the channels reserved for them, and x is returned.

    Returns:
        (N, C + B*R, H, W), or (N, B*R, H, W) where `order` leaves x out.

    Raises:
        ValueError: a rank, size or batch that does not fit, an order that is none, tensors on two devices, or with
            `in_place` an x that is not dense, has too few channels or shares memory with the pyramid.
        RuntimeError: `in_place`, an x that PyTorch would not write to: a leaf that requires grad.
        TypeError: not floating point, or two dtypes (under autocast the wider one is taken; `in_place` it must be x's).
    """
    op = "upsample_concat"
    bins = check_bins(op, bins)
    blocks = check_order(op, order, len(bins))
    check_features(op, x)
    check_pyramid(op, "pyramid", pyramid, bins)
    if pyramid.shape[0] != x.shape[0]:
        raise ValueError(f"{op}: x and pyramid must have one batch size, got {x.shape[0]} and {pyramid.shape[0]}")
    check_same_device(op, "x", x, "pyramid", pyramid)
    if in_place:
        return _fill_in_place(x, pyramid, bins, blocks, align_corners)
    if autocast_dtype(x):
        dtype = torch.promote_types(x.dtype, pyramid.dtype)
        x, pyramid = x.to(dtype), pyramid.to(dtype)
    check_same_dtype(op, "x", x, "pyramid", pyramid)
    compute = _plain_forward if is_transformed() else _op
    out: torch.Tensor = compute(x, pyramid, bins, blocks, align_corners)
    return out


def _fill_in_place(
    x: torch.Tensor, pyramid: torch.Tensor, bins: tuple[int, ...], order: tuple[int, ...], align_corners: bool
) -> torch.Tensor:
    op, reduced = "upsample_concat", len(bins) * pyramid.shape[2]
    rest = x.shape[1] - reduced
    if rest < 1 if -1 in order else rest != 0:
        raise ValueError(f"{op}: in_place, x must have channels of its own and B*R = {reduced} more, got {x.shape[1]}")
    if not is_transformed() and dense(x) is not x:
        raise ValueError(f"{op}: in_place, x must be dense in NCHW or channels_last order, got strides {x.stride()}")
    if autocast_dtype(x) and torch.promote_types(x.dtype, pyramid.dtype) == x.dtype:
        pyramid = pyramid.to(x.dtype)
    check_same_dtype(op, "x", x, "pyramid", pyramid)
    check_writable(op, "x", x, read=[("pyramid", pyramid)])
    if is_transformed():
        _plain_fill(x, pyramid, bins, order, align_corners)
        return x
    if torch.is_grad_enabled() and (x.requires_grad or pyramid.requires_grad):
        out: torch.Tensor = cast(Any, _Fill).apply(x, pyramid, bins, order, align_corners)
        return out
    _fill_op(x, pyramid, bins, order, align_corners)
    return x


def _fill(
    out: torch.Tensor, pyramid: torch.Tensor, bins: Sequence[int], order: Sequence[int], align_corners: bool
) -> None:
    run("upsample_concat", "fill", out, pyramid.contiguous(), bins, order, align_corners)


def _fill_fake(
    out: torch.Tensor, pyramid: torch.Tensor, bins: Sequence[int], order: Sequence[int], align_corners: bool
) -> None:
    return None


def _forward(
    x: torch.Tensor, pyramid: torch.Tensor, bins: Sequence[int], order: Sequence[int], align_corners: bool
) -> torch.Tensor:
    out: torch.Tensor = run("upsample_concat", "forward", dense(x), pyramid.contiguous(), bins, order, align_corners)
    return out


def _forward_fake(
    x: torch.Tensor, pyramid: torch.Tensor, bins: Sequence[int], order: Sequence[int], align_corners: bool
) -> torch.Tensor:
    n, channels, height, width = x.shape
    total = len(bins) * pyramid.shape[2] + (channels if -1 in order else 0)
    return torch.empty(
        (n, total, height, width),
        dtype=x.dtype,
        device=x.device,
        memory_format=memory_format(is_channels_last(x)),
    )


def _backward(
    grad: torch.Tensor, channels: int, bins: Sequence[int], order: Sequence[int], align_corners: bool
) -> torch.Tensor:
    d_pyramid: torch.Tensor = run("upsample_concat", "backward", dense(grad), channels, bins, order, align_corners)
    return d_pyramid


def _backward_fake(
    grad: torch.Tensor, channels: int, bins: Sequence[int], order: Sequence[int], align_corners: bool
) -> torch.Tensor:
    reduced = (grad.shape[1] - (channels if -1 in order else 0)) // len(bins)
    return grad.new_empty(grad.shape[0], cell_count(bins), reduced)


_op = define(
    "upsample_concat(Tensor x, Tensor pyramid, int[] bins, int[] order, bool align_corners) -> Tensor",
    _forward,
    _forward_fake,
)
_fill_op = define(
    "upsample_concat_fill(Tensor(a!) out, Tensor pyramid, int[] bins, int[] order, bool align_corners) -> ()",
    _fill,
    _fill_fake,
)
_backward_op = define(
    "upsample_concat_backward(Tensor grad, SymInt channels, int[] bins, int[] order, bool align_corners) -> Tensor",
    _backward,
    _backward_fake,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    x, pyramid, ctx.bins, ctx.order, ctx.align_corners = inputs
    ctx.channels = x.shape[1]
    ctx.x_start = channel_blocks(ctx.order, ctx.channels, pyramid.shape[2]).get(-1)


def _gradient(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
    dx = None if ctx.x_start is None else grad.narrow(1, ctx.x_start, ctx.channels)
    d_pyramid = _backward_op(grad, ctx.channels, ctx.bins, ctx.order, ctx.align_corners)
    return dx, d_pyramid, None, None, None


def _setup_backward_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    grad, ctx.channels, ctx.bins, ctx.order, ctx.align_corners = inputs
    ctx.like, ctx.channels_last = (grad.shape[0], *grad.shape[2:]), is_channels_last(grad)


def _backward_gradient(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
    """The backward's transpose is the forward; x's channels were not read."""
    n, *size = ctx.like
    no_x = grad.new_zeros(n, ctx.channels, *size).contiguous(memory_format=memory_format(ctx.channels_last))
    return _op(no_x, grad, ctx.bins, ctx.order, ctx.align_corners), None, None, None, None


torch.library.register_autograd("pspnet_fast::upsample_concat", _gradient, setup_context=_setup_context, lib=LIBRARY)
torch.library.register_autograd(
    "pspnet_fast::upsample_concat_backward", _backward_gradient, setup_context=_setup_backward_context, lib=LIBRARY
)


class _Fill(torch.autograd.Function):
    """Writes the levels into a tensor that has x already: the gradient of both is read from that of the result."""

    @staticmethod
    def forward(
        ctx: Any,
        out: torch.Tensor,
        pyramid: torch.Tensor,
        bins: tuple[int, ...],
        order: tuple[int, ...],
        align_corners: bool,
    ) -> torch.Tensor:
        ctx.bins, ctx.order, ctx.align_corners = bins, order, align_corners
        ctx.channels = out.shape[1] - len(bins) * pyramid.shape[2]
        # Of a tensor that `pyramid_pool` reserved, nobody reads the gradient of the levels' channels.
        ctx.written = [] if getattr(out.grad_fn, "reserves", False) else _level_blocks(ctx, pyramid.shape[2])
        ctx.mark_dirty(out)
        _fill_op(out, pyramid, bins, order, align_corners)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:
        (grad,) = grads
        d_pyramid = None
        if ctx.needs_input_grad[1]:
            d_pyramid = _backward_op(grad, ctx.channels, ctx.bins, ctx.order, ctx.align_corners)
        d_out = None
        if ctx.needs_input_grad[0]:
            d_out = grad.clone() if ctx.written else grad
            for first, count in ctx.written:  # what stood there is gone
                d_out.narrow(1, first, count).zero_()
        return d_out, d_pyramid, None, None, None


def _level_blocks(ctx: Any, reduced: int) -> list[tuple[int, int]]:
    starts = channel_blocks(ctx.order, ctx.channels, reduced)
    return [(start, reduced) for block, start in starts.items() if block != -1]
