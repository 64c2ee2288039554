"""pyramid_conv2d: the convolution of the upsampled pyramid, without upsampling it.

Upsampling is linear, so the 1x1 or 3x3 convolution of the upsampled levels is one of the cells' products with every tap:

    z[n, cell (i, j) of level k, t, o] = sum over r of  weight[o, k R + r, t] p[n, cell (i, j) of level k, r]
    y[n, o, h, w] = sum over levels, taps t = (dy, dx), i, j of
                    U_h[h + dy - padding, i] U_w[w + dx - padding, j] z[n, cell (i, j), t, o]
    dz[n, cell (i, j), t, o] = sum over h, w of  U_h[h + dy - padding, i] U_w[w + dx - padding, j] dy[n, o, h, w]

U are the interpolation matrices: at most two non-zero weights a row (`geometry.bilinear_tap`), and none in rows outside the
map, which are the padding. z is the library's matrix product (`_pyramid_conv2d_taps.py`); the kernels are the second line and
the third, each separable: along W for every row of cells and dy, then at most two rows a level and dy along H.
Saved for backward: sizes by the kernels, pyramid and weight by the product.    Must move: the weight, and y written; onto
an existing y, that one read, too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F

from ..backends import run
from ..checks import (
    MAX_LENGTH,
    check_bins,
    check_pyramid,
    check_same_device,
    check_same_dtype,
    check_shape,
    check_tensor,
)
from ..geometry import accumulation_dtype, cell_count, dense, is_channels_last, memory_format
from ..tracing import is_transformed
from ._define import LIBRARY, autocast, autocast_dtype, check_writable, define, plain
from ._pyramid_conv2d_taps import conv2d_taps

_plain_maps = plain("upsample_concat", "forward")


def pyramid_conv2d(
    pyramid: torch.Tensor,
    weight: torch.Tensor,
    size: Sequence[int],
    bins: Sequence[int] = (1, 2, 3, 6),
    padding: int = 1,
    align_corners: bool = True,
    *,
    out: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
    shift: torch.Tensor | None = None,
    relu: bool = False,
    memory_format: torch.memory_format = torch.contiguous_format,
) -> torch.Tensor:
    """Convolve the upsampled levels of a pyramid with their part of the bottleneck's weight.

    Equals `conv2d(cat([interpolate(level_0, size, mode="bilinear", align_corners), ...], 1), weight, padding=padding)`. The
    convolution of a concatenation is the sum of the convolutions of its parts, so with the features' own as `out` this
    is the whole bottleneck.

    Args:
        pyramid: packed cells (N, S, R).
        weight: (O, B*R, k, k), k = 1 or 3, of any strides: a slice of a wider weight is taken as it is.
        size: (H, W) that the levels are upsampled to.
        bins: cells per axis of each level.
        padding: zeros around the upsampled levels.
        align_corners: as in `torch.nn.functional.interpolate`.
        out: a dense tensor (N, O, H', W') in NCHW or channels_last order, to which the result is added in place, and which
            is returned. (A training step under torch.compile adds out of place.)
        scale: float32 (O,), a folded batch norm's factor of the sum; this, shift and relu without gradients alone.
        shift: float32 (O,), what it adds then.
        relu: whether a ReLU follows.
        memory_format: of the result, where `out` is not given.

    Returns:
        (N, O, H', W') with H' = H + 2 * padding - k + 1, W' alike.

    Raises:
        ValueError: a size that does not fit, tensors on two devices, an `out` that is not dense; scale, shift or relu where
            gradients are wanted.
        RuntimeError: an `out` that PyTorch would not write to: a leaf that requires grad, or an inference tensor.
        TypeError: not floating point, or two dtypes (under autocast pyramid and weight are cast, unless they are float64).
    """
    op = "pyramid_conv2d"
    bins = check_bins(op, bins)
    check_pyramid(op, "pyramid", pyramid, bins)
    check_tensor(op, "weight", weight, "OCHW")
    channels, kernel_size = weight.shape[0], weight.shape[3]
    if kernel_size not in (1, 3) or channels == 0:
        raise ValueError(
            f"{op}: weight must be (O, B*R, k, k) with k = 1 or 3 and at least one O, got {tuple(weight.shape)}"
        )
    reduced = len(bins) * pyramid.shape[2]
    check_shape(op, "weight", weight, (channels, reduced, kernel_size, kernel_size), "(O, B*R, k, k)")
    height, width = _check_size(op, size, padding, kernel_size)
    check_same_device(op, "pyramid", pyramid, "weight", weight)
    pyramid, weight = autocast(pyramid), autocast(weight)
    check_same_dtype(op, "pyramid", pyramid, "weight", weight)
    result = (pyramid.shape[0], channels, height + 2 * padding - kernel_size + 1, width + 2 * padding - kernel_size + 1)
    if out is not None:
        check_tensor(op, "out", out, "NOHW")
        check_shape(op, "out", out, result, "(N, O, H', W')")
        check_same_device(op, "pyramid", pyramid, "out", out)
        if autocast_dtype(pyramid) is None or torch.float64 in (pyramid.dtype, out.dtype):
            check_same_dtype(op, "pyramid", pyramid, "out", out)
        if not is_transformed() and dense(out) is not out:
            raise ValueError(f"{op}: out must be dense in NCHW or channels_last order, got strides {out.stride()}")
        check_writable(op, "out", out)
    for name, factor in (("scale", scale), ("shift", shift)):
        if factor is not None:
            check_tensor(op, name, factor, "O")
            check_shape(op, name, factor, (channels,), "(O,)")
            check_same_device(op, "pyramid", pyramid, name, factor)
    tensors = [tensor for tensor in (pyramid, weight, out, scale, shift) if tensor is not None]
    gradients = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    epilogue = scale is not None or shift is not None or relu
    if gradients and epilogue:
        raise ValueError(
            f"{op}: scale, shift and relu must be left out where gradients are wanted: use the norm itself"
        )

    if is_transformed():
        maps = _plain_maps(
            pyramid.new_empty(pyramid.shape[0], 1, height, width), pyramid, bins, range(len(bins)), align_corners
        )
        added = F.conv2d(maps, weight, padding=padding)
        added = added.contiguous(memory_format=memory_format) if out is None else out.add_(added)
        return _finished(added, scale, shift, relu)
    taps = conv2d_taps(pyramid, weight, bins)
    geometry = [height, width], bins, kernel_size, padding, align_corners
    channels_last = memory_format == torch.channels_last
    if out is None and not epilogue:
        y: torch.Tensor = _op(taps, *geometry, pyramid.dtype, channels_last)
        return y
    if gradients and out is not None:
        if torch.compiler.is_compiling():
            return out + cast(torch.Tensor, _op(taps, *geometry, out.dtype, channels_last))
        return cast(torch.Tensor, cast(Any, _Add).apply(out, taps, *geometry))
    add = out is not None
    if out is None:
        out = _empty(taps, size, kernel_size, padding, pyramid.dtype, channels_last)
    factors = [None if factor is None else factor.to(taps.dtype).contiguous() for factor in (scale, shift)]
    _update_op(out, taps, *factors, add, relu, *geometry)
    return out


def _finished(y: torch.Tensor, scale: torch.Tensor | None, shift: torch.Tensor | None, relu: bool) -> torch.Tensor:
    """In place."""
    y = y if scale is None else y.mul_(scale[:, None, None])
    y = y if shift is None else y.add_(shift[:, None, None])
    return y.relu_() if relu else y


def _check_size(op: str, size: Sequence[int], padding: int, kernel_size: int) -> tuple[int, int]:
    if isinstance(size, (int, str)) or len(size) != 2:
        raise ValueError(f"{op}: size must be (H, W), got {size!r}")
    if not 0 <= padding <= MAX_LENGTH:
        raise ValueError(f"{op}: padding must not be negative and at most {MAX_LENGTH}, got {padding}")
    height, width = size
    if min(height, width) < 1 or min(height, width) + 2 * padding < kernel_size:
        raise ValueError(f"{op}: size must be at least 1 x 1 and, padded, hold the kernel, got {tuple(size)}")
    if max(height, width) > MAX_LENGTH:
        raise ValueError(f"{op}: size must be at most {MAX_LENGTH} x {MAX_LENGTH}, got {tuple(size)}")
    return height, width


def _empty(
    taps: torch.Tensor,
    size: Sequence[int],
    kernel_size: int,
    padding: int,
    dtype: torch.dtype,
    channels_last: bool,
) -> torch.Tensor:
    height, width = (length + 2 * padding - kernel_size + 1 for length in size)
    return torch.empty(
        (taps.shape[0], taps.shape[3], height, width),
        dtype=dtype,
        device=taps.device,
        memory_format=memory_format(channels_last),
    )


def _forward(
    taps: torch.Tensor,
    size: Sequence[int],
    bins: Sequence[int],
    kernel_size: int,
    padding: int,
    align_corners: bool,
    dtype: torch.dtype,
    channels_last: bool,
) -> torch.Tensor:
    y = _empty(taps, size, kernel_size, padding, dtype, channels_last)
    _update(y, taps, None, None, False, False, size, bins, kernel_size, padding, align_corners)
    return y


def _forward_fake(
    taps: torch.Tensor,
    size: Sequence[int],
    bins: Sequence[int],
    kernel_size: int,
    padding: int,
    align_corners: bool,
    dtype: torch.dtype,
    channels_last: bool,
) -> torch.Tensor:
    return _empty(taps, size, kernel_size, padding, dtype, channels_last)


def _update(
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
    sizes = size, bins, kernel_size, padding, align_corners
    run("pyramid_conv2d", "forward", out, taps.contiguous(), scale, shift, add, relu, *sizes)


def _update_fake(
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
    return None


def _backward(
    grad: torch.Tensor, size: Sequence[int], bins: Sequence[int], kernel_size: int, padding: int, align_corners: bool
) -> torch.Tensor:
    d_taps: torch.Tensor = run(
        "pyramid_conv2d", "backward", dense(grad), size, bins, kernel_size, padding, align_corners
    )
    return d_taps


def _backward_fake(
    grad: torch.Tensor, size: Sequence[int], bins: Sequence[int], kernel_size: int, padding: int, align_corners: bool
) -> torch.Tensor:
    shape = grad.shape[0], cell_count(bins), kernel_size * kernel_size, grad.shape[1]
    return grad.new_empty(shape, dtype=accumulation_dtype(grad.dtype))


_GEOMETRY = "SymInt[] size, int[] bins, int kernel_size, int padding, bool align_corners"
_op = define(
    f"pyramid_conv2d(Tensor taps, {_GEOMETRY}, ScalarType dtype, bool channels_last) -> Tensor", _forward, _forward_fake
)
_update_op = define(
    "pyramid_conv2d_update(Tensor(a!) out, Tensor taps, Tensor? scale, Tensor? shift, bool add, bool relu, "
    f"{_GEOMETRY}) -> ()",
    _update,
    _update_fake,
)
_backward_op = define(f"pyramid_conv2d_backward(Tensor grad, {_GEOMETRY}) -> Tensor", _backward, _backward_fake)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    ctx.geometry = inputs[1:6]


def _gradient(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
    return _backward_op(grad, *ctx.geometry), None, None, None, None, None, None, None


def _setup_backward_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    grad, *ctx.geometry = inputs
    ctx.dtype, ctx.channels_last = grad.dtype, is_channels_last(grad)


def _backward_gradient(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
    """The backward's transpose is the forward."""
    return _op(grad, *ctx.geometry, ctx.dtype, ctx.channels_last), None, None, None, None, None


torch.library.register_autograd("pspnet_fast::pyramid_conv2d", _gradient, setup_context=_setup_context, lib=LIBRARY)
torch.library.register_autograd(
    "pspnet_fast::pyramid_conv2d_backward", _backward_gradient, setup_context=_setup_backward_context, lib=LIBRARY
)


class _Add(torch.autograd.Function):
    """Adds the convolution to a tensor that is there already: its gradient is that of the sum, and so is the taps' source."""

    @staticmethod
    def forward(ctx: Any, out: torch.Tensor, taps: torch.Tensor, *geometry: Any) -> torch.Tensor:
        ctx.geometry = geometry
        ctx.mark_dirty(out)
        _update_op(out, taps, None, None, True, False, *geometry)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:
        (grad,) = grads
        d_taps = _backward_op(grad, *ctx.geometry) if ctx.needs_input_grad[1] else None
        return grad if ctx.needs_input_grad[0] else None, d_taps, None, None, None, None, None
