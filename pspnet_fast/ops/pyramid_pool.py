"""pyramid_pool: every adaptive average pooling of a pyramid, in one read of the input.

    y[n, s, c] = mean of x[n, c, bin_start(i):bin_end(i), bin_start(j):bin_end(j)]     s = cell (i, j) of its level
    dx[n, c, h, w] = sum over the cells s that contain (h, w) of  dy[n, s, c] / area(s)    a gather: no atomics

Saved for backward: only the size of x and its memory format.    Must move: N*C*H*W read, N*S*C written.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, cast, overload

import torch

from ..backends import run
from ..checks import MAX_OFFSET, check_bins, check_features
from ..geometry import bin_end, bin_start, cell_count, dense, is_channels_last, memory_format
from ..tracing import is_transformed
from ._define import LIBRARY, define, plain

_plain_forward = plain("pyramid_pool", "forward")


@overload
def pyramid_pool(x: torch.Tensor, bins: Sequence[int] = ...) -> torch.Tensor: ...
@overload
def pyramid_pool(
    x: torch.Tensor, bins: Sequence[int] = ..., *, return_input: Literal[True]
) -> tuple[torch.Tensor, torch.Tensor]: ...
@overload
def pyramid_pool(
    x: torch.Tensor, bins: Sequence[int] = ..., *, reserve: tuple[int, int]
) -> tuple[torch.Tensor, torch.Tensor]: ...
def pyramid_pool(
    x: torch.Tensor,
    bins: Sequence[int] = (1, 2, 3, 6),
    *,
    return_input: bool = False,
    reserve: tuple[int, int] | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Pool a feature map to every level of a pyramid (Zhao et al., CVPR 2017, section 3.2).

    Equals `adaptive_avg_pool2d(x, b)` for every b in `bins`, packed. Sums are held in float32 (float64 for float64).

    Args:
        x: features (N, C, H, W), float64, float32, bfloat16 or float16; NCHW and channels_last are read as they are.
        bins: cells per axis of each level.
        return_input: also return x itself. Use that x further on instead of the argument: its gradient is then added
            in the same pass that spreads the pyramid's, instead of in one of its own.
        reserve: (before, after): also return x with so many channels before and after it that hold nothing yet, for
            `upsample_concat(..., in_place=True)` to fill: x is copied by the pass that pools it. Its gradient joins
            the pyramid's as with `return_input`.

    Returns:
        The packed pyramid (N, S, C), S = sum of b*b, levels in the order of `bins`, each row-major; with
        `return_input`, the pair (pyramid, x); with `reserve`, the pair of the pyramid and a new tensor
        (N, before + C + after, H, W) in x's memory format.

    Raises:
        ValueError: x is not 4-D or has an empty axis other than N, bins is empty or has a number below 1, reserve is
            negative or beyond 2^30, or both reserve and return_input are asked for.
        TypeError: x is not a floating-point tensor, or bins are not integers.
    """
    bins = check_bins("pyramid_pool", bins)
    check_features("pyramid_pool", x)
    if reserve is not None:
        before, after = reserve
        if return_input or min(before, after) < 0 or max(before, after) > MAX_OFFSET:
            raise ValueError(
                "pyramid_pool: reserve must be two numbers of channels, without return_input, "
                f"each from 0 to {MAX_OFFSET}, got {reserve} and return_input={return_input}"
            )
        if is_transformed():
            widths = before, after
            unfilled = [x.new_zeros(x.shape[0], width, *x.shape[2:]) for width in widths]
            return _plainly(x, bins), torch.cat([unfilled[0], x, unfilled[1]], 1)
        reserved: tuple[torch.Tensor, torch.Tensor] = _concat_op(x, bins, before + x.shape[1] + after, before)
        return reserved
    if is_transformed() or not (return_input and x.requires_grad and torch.is_grad_enabled()):
        pyramid: torch.Tensor = _plainly(x, bins) if is_transformed() else _op(x, bins)
        return (pyramid, x) if return_input else pyramid
    pair: tuple[torch.Tensor, torch.Tensor] = cast(Any, _PoolAndPass).apply(x, bins)
    return pair


def _plainly(x: torch.Tensor, bins: Sequence[int]) -> torch.Tensor:
    if not (torch._C._get_tracing_state() is not None and torch.onnx.is_in_onnx_export()):
        pyramid: torch.Tensor = _plain_forward(x, bins)
        return pyramid
    # ONNX has no adaptive pooling, and torch's tracing exporter none whose windows differ in size: the windows one by one.
    height, width, pooled = int(x.shape[2]), int(x.shape[3]), []
    for b in bins:
        rows = [x[:, :, bin_start(i, height, b) : bin_end(i, height, b)].mean(2) for i in range(b)]
        cells = [row[..., bin_start(j, width, b) : bin_end(j, width, b)].mean(2) for row in rows for j in range(b)]
        pooled += cells
    return torch.stack(pooled, 1)


def _forward(x: torch.Tensor, bins: Sequence[int]) -> torch.Tensor:
    y: torch.Tensor = run("pyramid_pool", "forward", dense(x), bins)
    return y


def _forward_fake(x: torch.Tensor, bins: Sequence[int]) -> torch.Tensor:
    return x.new_empty(x.shape[0], cell_count(bins), x.shape[1])


def _concat(
    x: torch.Tensor, bins: Sequence[int], channels: int, first_channel: int
) -> tuple[torch.Tensor, torch.Tensor]:
    pair: tuple[torch.Tensor, torch.Tensor] = run("pyramid_pool", "concat", dense(x), bins, channels, first_channel)
    return pair


def _concat_fake(
    x: torch.Tensor, bins: Sequence[int], channels: int, first_channel: int
) -> tuple[torch.Tensor, torch.Tensor]:
    n, _, height, width = x.shape
    format_of_x = memory_format(is_channels_last(x))
    out = torch.empty((n, channels, height, width), dtype=x.dtype, device=x.device, memory_format=format_of_x)
    return _forward_fake(x, bins), out


def _backward(
    grad: torch.Tensor, grad_input: torch.Tensor | None, size: Sequence[int], bins: Sequence[int], channels_last: bool
) -> torch.Tensor:
    if grad_input is not None and not _is_slice(grad_input, channels_last):
        grad_input = grad_input.contiguous(memory_format=memory_format(channels_last))
    dx: torch.Tensor = run("pyramid_pool", "backward", grad.contiguous(), grad_input, size, bins, channels_last)
    return dx


def _backward_fake(
    grad: torch.Tensor, grad_input: torch.Tensor | None, size: Sequence[int], bins: Sequence[int], channels_last: bool
) -> torch.Tensor:
    shape = (grad.shape[0], grad.shape[2], size[0], size[1])
    return torch.empty(shape, dtype=grad.dtype, device=grad.device, memory_format=memory_format(channels_last))


def _is_slice(tensor: torch.Tensor, channels_last: bool) -> bool:
    """Whether a tensor is some channels of a dense one in this memory format: what the kernels read as it is."""
    _, _, height, width = tensor.shape
    stride = tensor.stride()
    if channels_last:
        pixel = stride[3]
        return stride[1] == 1 and stride[2] == width * pixel and stride[0] == height * width * pixel
    return stride[1:] == (height * width, width, 1)


_op = define("pyramid_pool(Tensor x, int[] bins) -> Tensor", _forward, _forward_fake)
_concat_op = define(
    "pyramid_pool_concat(Tensor x, int[] bins, SymInt channels, SymInt first_channel) -> (Tensor, Tensor)",
    _concat,
    _concat_fake,
)
_backward_op = define(
    "pyramid_pool_backward(Tensor grad, Tensor? grad_input, SymInt[] size, int[] bins, bool channels_last) -> Tensor",
    _backward,
    _backward_fake,
)


def _setup_context(ctx: Any, inputs: tuple[torch.Tensor, Sequence[int]], output: Any) -> None:
    x, ctx.bins = inputs
    ctx.size, ctx.channels_last = x.shape[2:], is_channels_last(x)


def _gradient(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
    return _backward_op(grad, None, ctx.size, ctx.bins, ctx.channels_last), None


def _setup_concat_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    x, bins, _, ctx.first_channel = inputs
    _setup_context(ctx, (x, bins), None)
    ctx.set_materialize_grads(False)
    ctx.channels = x.shape[1]
    ctx.reserves = True  # so that `upsample_concat` knows its target, see `_Fill`


def _concat_gradient(ctx: Any, grad: torch.Tensor | None, grad_out: torch.Tensor | None) -> tuple[Any, ...]:
    grad_input = None if grad_out is None else grad_out.narrow(1, ctx.first_channel, ctx.channels)
    return _joint_gradient(ctx, grad, grad_input), None, None, None


def _joint_gradient(ctx: Any, grad: torch.Tensor | None, grad_input: torch.Tensor | None) -> torch.Tensor | None:
    """Of x, which went on beside its pyramid: both gradients meet in one kernel."""
    if grad is None:
        return grad_input
    dx: torch.Tensor = _backward_op(grad, grad_input, ctx.size, ctx.bins, ctx.channels_last)
    return dx


def _setup_backward_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    ctx.bins, ctx.has_input = inputs[3], inputs[1] is not None


def _backward_gradient(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
    """Spreading is pooling's transpose, so its gradient pools."""
    return _op(grad, ctx.bins), grad if ctx.has_input else None, None, None, None


torch.library.register_autograd("pspnet_fast::pyramid_pool", _gradient, setup_context=_setup_context, lib=LIBRARY)
torch.library.register_autograd(
    "pspnet_fast::pyramid_pool_concat", _concat_gradient, setup_context=_setup_concat_context, lib=LIBRARY
)
torch.library.register_autograd(
    "pspnet_fast::pyramid_pool_backward", _backward_gradient, setup_context=_setup_backward_context, lib=LIBRARY
)


class _PoolAndPass(torch.autograd.Function):
    """x -> (pyramid, x): one node, so that both gradients of x meet in one kernel."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, bins: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
        _setup_context(ctx, (x, bins), None)
        ctx.set_materialize_grads(False)
        return _op(x, bins), x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[torch.Tensor | None, None]:
        return _joint_gradient(ctx, *grads), None
