"""pyramid_project: the 1x1 convolution of every level, with its own weights, in one call.

    y[n, s, r] = act(scale[k, r] * (W_k p[n, s])[r] + shift[k, r])      k = level of cell s, act = ReLU or identity
    g = dy * act' * scale;   dp[n, s] = W_k^T g[n, s];   dW_k = sum over n and the cells s of level k of  g[n, s] p[n, s]^T

At evaluation a batch norm that follows is the scale and the shift, so weights are never copied to be folded.
Saved for backward: p, W and (with ReLU) y; the gradient of scale computes the product again.
Must move: the weights, N*S*C read, N*S*R written.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..backends import run
from ..checks import (
    check_bins,
    check_pyramid,
    check_same_device,
    check_same_dtype,
    check_shape,
    check_tensor,
)
from ..geometry import accumulation_dtype, levels
from ..tracing import is_transformed
from ._define import LIBRARY, autocast, define, plain

_plain_forward = plain("pyramid_project", "forward")


def pyramid_project(
    pyramid: torch.Tensor,
    weight: torch.Tensor | Sequence[torch.Tensor],
    bins: Sequence[int] = (1, 2, 3, 6),
    scale: torch.Tensor | None = None,
    shift: torch.Tensor | None = None,
    relu: bool = True,
) -> torch.Tensor:
    """Reduce the channels of every level by its own 1x1 convolution (Zhao et al., CVPR 2017, section 3.2).

    Equals, for level k, `relu(scale[k] * conv2d(level_k, weight[k]) + shift[k])`. Under autocast the pyramid and the
    weights are cast like a convolution's (float64 is not). Sums are held in float32 (float64 for float64), rounded once.

    Args:
        pyramid: packed cells (N, S, C), as from `pyramid_pool`.
        weight: one matrix (R, C) per level, as a sequence or stacked (B, R, C).
        bins: cells per axis of each level.
        scale: factors (B, R), or None for 1.
        shift: summands (B, R), or None for 0.
        relu: whether to end in a ReLU.

    Returns:
        The reduced pyramid (N, S, R), in the pyramid's dtype.

    Raises:
        ValueError: a shape that does not fit `bins`, C, R or B, or tensors on two devices.
        TypeError: not floating point, or weights of another dtype than the pyramid (outside autocast).
    """
    op = "pyramid_project"
    bins = check_bins(op, bins)
    check_pyramid(op, "pyramid", pyramid, bins)
    weights = list(weight)
    if len(weights) != len(bins):
        raise ValueError(f"{op}: weight must hold one matrix for each of the {len(bins)} bins, got {len(weights)}")
    check_tensor(op, "weight[0]", weights[0], "RC")
    shape = (weights[0].shape[0], pyramid.shape[2])
    pyramid, weights = autocast(pyramid), [autocast(matrix) for matrix in weights]
    for k, matrix in enumerate(weights):
        check_shape(op, f"weight[{k}]", matrix, shape, "(R, C)")
        check_same_device(op, "pyramid", pyramid, f"weight[{k}]", matrix)
        check_same_dtype(op, "pyramid", pyramid, f"weight[{k}]", matrix)
    wide = accumulation_dtype(pyramid.dtype)
    for name, tensor in (("scale", scale), ("shift", shift)):
        if tensor is not None:
            check_shape(op, name, tensor, (len(bins), shape[0]), "(B, R)")
            check_same_device(op, "pyramid", pyramid, name, tensor)
    scale, shift = (None if t is None else t.to(wide) for t in (scale, shift))
    compute = _plain_forward if is_transformed() else _op
    y: torch.Tensor = compute(pyramid, weights, bins, scale, shift, relu)
    return y


def _contiguous(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    return [tensor.contiguous() for tensor in tensors]


def _forward(
    pyramid: torch.Tensor,
    weight: Sequence[torch.Tensor],
    bins: Sequence[int],
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
    relu: bool,
) -> torch.Tensor:
    scale, shift = (None if t is None else t.contiguous() for t in (scale, shift))
    y: torch.Tensor = run(
        "pyramid_project", "forward", pyramid.contiguous(), _contiguous(weight), bins, scale, shift, relu
    )
    return y


def _forward_fake(
    pyramid: torch.Tensor,
    weight: Sequence[torch.Tensor],
    bins: Sequence[int],
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
    relu: bool,
) -> torch.Tensor:
    return pyramid.new_empty(pyramid.shape[0], pyramid.shape[1], weight[0].shape[0])


def _backward(
    grad: torch.Tensor, pyramid: torch.Tensor, weight: Sequence[torch.Tensor], bins: Sequence[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    gradients: tuple[torch.Tensor, torch.Tensor] = run(
        "pyramid_project", "backward", grad.contiguous(), pyramid.contiguous(), _contiguous(weight), bins
    )
    return gradients


def _backward_fake(
    grad: torch.Tensor, pyramid: torch.Tensor, weight: Sequence[torch.Tensor], bins: Sequence[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    return pyramid.new_empty(pyramid.shape), weight[0].new_empty(len(weight), *weight[0].shape)


_op = define(
    "pyramid_project(Tensor pyramid, Tensor[] weight, int[] bins, Tensor? scale, Tensor? shift, bool relu) -> Tensor",
    _forward,
    _forward_fake,
)
_backward_op = define(
    "pyramid_project_backward(Tensor grad, Tensor pyramid, Tensor[] weight, int[] bins) -> (Tensor, Tensor)",
    _backward,
    _backward_fake,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    pyramid, weight, ctx.bins, scale, shift, ctx.relu = inputs
    ctx.has_shift = shift is not None
    ctx.save_for_backward(pyramid, output if ctx.relu else None, scale, *weight)


def _level_sums(cells: torch.Tensor, bins: Sequence[int]) -> torch.Tensor:
    return torch.stack([level.sum((0, 1)) for level in levels(cells, bins)])


def _gradient(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
    pyramid, out, scale, *weight = ctx.saved_tensors
    g = grad.to(accumulation_dtype(grad.dtype))
    if ctx.relu:
        g = torch.where(out > 0, g, 0)
    d_shift = _level_sums(g, ctx.bins) if ctx.has_shift else None
    d_scale = None
    if scale is not None:
        if ctx.needs_input_grad[3]:
            product = _op(pyramid, weight, ctx.bins, None, None, False)
            d_scale = _level_sums(g * product, ctx.bins)
        g = torch.cat([level * scale[k] for k, level in enumerate(levels(g, ctx.bins))], 1)
    d_pyramid, d_weight = _backward_op(g.to(grad.dtype), pyramid, weight, ctx.bins)
    return d_pyramid, list(d_weight.unbind(0)), None, d_scale, d_shift, None


def _setup_backward_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    grad, pyramid, weight, ctx.bins = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(grad, pyramid, *weight)


def _backward_gradient(ctx: Any, dd_pyramid: torch.Tensor | None, dd_weight: torch.Tensor | None) -> tuple[Any, ...]:
    """Of W^T g and g p^T, both bilinear: products like them, with the incoming gradients for p and for W."""
    grad, pyramid, *weight = ctx.saved_tensors
    bins, d_grad, d_pyramid, d_weight = ctx.bins, None, None, [None] * len(weight)
    if dd_pyramid is not None:
        d_grad = _op(dd_pyramid, weight, bins, None, None, False)
        d_weight = list(_backward_op(grad, dd_pyramid, weight, bins)[1].unbind(0))
    if dd_weight is not None:
        matrices = list(dd_weight.unbind(0))
        product = _op(pyramid, matrices, bins, None, None, False)
        d_grad = product if d_grad is None else d_grad + product
        d_pyramid = _backward_op(grad, pyramid, matrices, bins)[0]
    return d_grad, d_pyramid, d_weight, None


torch.library.register_autograd("pspnet_fast::pyramid_project", _gradient, setup_context=_setup_context, lib=LIBRARY)
torch.library.register_autograd(
    "pspnet_fast::pyramid_project_backward", _backward_gradient, setup_context=_setup_backward_context, lib=LIBRARY
)
