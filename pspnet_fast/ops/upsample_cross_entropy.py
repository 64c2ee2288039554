"""upsample_cross_entropy: the cross entropy of bilinearly upsampled logits, which are never built.

    v[c]  = sum over i, j of  U_h[h, i] U_w[w, j] logits[n, c, i, j]                    at pixel (n, h, w), target t
    loss  = a log(sum_c exp(v[c])) - (1 - e) w[t] v[t] - (e / K) sum_c w[c] v[c]        a = (1 - e) w[t] + (e / K) sum_c w[c]
    dv[c] = g (a exp(v[c]) / sum_c exp(v[c]) - (1 - e) w[t] [c = t] - (e / K) w[c])
    dlogits[n, c, i, j] = sum over h, w of  U_h[h, i] U_w[w, j] dv[c]

with class weights w, label smoothing e, and g what a pixel counts: its `pixel_weight`, or the gradient of its loss. U are the
interpolation matrices: at most two non-zero weights a row (`geometry.bilinear_tap`). Two directions:

    losses   every pixel's loss
    sums     sum of g loss, sum of g w[t], number of pixels that count; and the gradient of the first, all in one pass

so a mean divides two of the sums, and its gradient is that of the sum, scaled. The gradient of `losses` is `sums` with the
incoming gradient for g. Saved for backward: the inputs, and the gradient N*K*h*w of a mean or a sum. Must move: the
logits and the target; N*K*H*W exponentials are the work. A second derivative is plain PyTorch's, with its memory.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from ..backends import run
from ..checks import check_same_device, check_shape, check_tensor, equals, is_class
from ..geometry import accumulation_dtype, dense, is_channels_last, memory_format
from ..tracing import is_batched, is_traced, is_transformed
from ._define import LIBRARY, define, plain, plain_gradient

OP = "upsample_cross_entropy"
REDUCTIONS = ("mean", "sum", "none")
_plain_losses = plain("upsample_cross_entropy", "losses")
_plain_sums = plain("upsample_cross_entropy", "sums")


def upsample_cross_entropy(
    logits: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor | None = None,
    ignore_index: int = 255,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    align_corners: bool = True,
    *,
    pixel_weight: torch.Tensor | None = None,
    check_targets: bool | None = None,
) -> torch.Tensor:
    """Cross entropy at the target's size, of logits upsampled on the way.

    Equals `cross_entropy(interpolate(logits, target.shape[-2:], mode="bilinear", align_corners), target, ...)`, without a
    tensor of size N*K*H*W, forward or backward. Ignored pixels count for nothing, whatever their logits hold.

    Args:
        logits: (N, K, h, w); NCHW and channels_last are read as they are.
        target: classes (N, H, W), int64 or uint8; any size.
        weight: of each class (K,), or None for ones. It gets no gradient.
        ignore_index: the target of pixels that do not count.
        reduction: "mean" (over the target's weights, as torch's), "sum" or "none".
        label_smoothing: in [0, 1], as in `torch.nn.functional.cross_entropy`.
        align_corners: as in `torch.nn.functional.interpolate`.
        pixel_weight: (N, H, W), by which losses are multiplied; a mean divides by the sum of `weight[target] *
            pixel_weight`. Where it is 0 a pixel does not count. It gets no gradient.
        check_targets: whether a target that is neither a class nor `ignore_index` is an error. None: on the CPU it is; on
            a GPU, where looking stops the host, such pixels are ignored, as they are of a target under vmap.

    Returns:
        A scalar, or (N, H, W) for "none", in float32 (float64 for float64). A mean over no pixel is NaN.

    Raises:
        ValueError: a rank, size or batch that does not fit, an option out of range, targets that are no class.
        TypeError: logits or weights that are not floating point, a target that is neither int64 nor uint8, an
            ignore_index that is no integer.
    """
    check_tensor(OP, "logits", logits, "NKhw")
    if 0 in logits.shape[1:]:
        raise ValueError(f"{OP}: logits must have at least one class, row and column, got {tuple(logits.shape)}")
    _check_target(logits, target)
    wide = accumulation_dtype(logits.dtype)
    if weight is not None:
        check_tensor(OP, "weight", weight, "K")
        check_shape(OP, "weight", weight, (logits.shape[1],), "(K,)")
        check_same_device(OP, "logits", logits, "weight", weight)
        weight = weight.detach().to(wide)
    if pixel_weight is not None:
        check_tensor(OP, "pixel_weight", pixel_weight, "NHW")
        check_shape(OP, "pixel_weight", pixel_weight, tuple(target.shape), "(N, H, W)")
        check_same_device(OP, "logits", logits, "pixel_weight", pixel_weight)
        pixel_weight = pixel_weight.detach().to(wide)
    if reduction not in REDUCTIONS:
        raise ValueError(f"{OP}: reduction must be one of {', '.join(REDUCTIONS)}, got {reduction!r}")
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"{OP}: label_smoothing must be in [0, 1], got {label_smoothing}")
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, int):
        raise TypeError(f"{OP}: ignore_index must be an integer, got {ignore_index!r}")
    if not -(2**63) <= ignore_index < 2**63:
        raise ValueError(f"{OP}: ignore_index must fit into int64, got {ignore_index}")
    options = ignore_index, float(label_smoothing), align_corners
    check = logits.device.type == "cpu" if check_targets is None else check_targets
    transformed = is_transformed()
    if transformed and check and _has_values(target):
        _check_classes(target, logits.shape[1], ignore_index)
    if reduction == "none":
        losses: torch.Tensor = (
            _plain_losses(logits, target, weight, *options)
            if transformed
            else _losses_op(logits, target, weight, *options, check)
        )
        return losses if pixel_weight is None else torch.where(pixel_weight == 0, 0, losses * pixel_weight)
    gradient = torch.is_grad_enabled() and logits.requires_grad
    sums: torch.Tensor = (
        _plain_sums(logits, target, weight, pixel_weight, *options, False)
        if transformed
        else _sums_op(logits, target, weight, pixel_weight, *options, check, gradient)
    )[0]
    return sums[0] / sums[1] if reduction == "mean" else sums[0].clone()


def _check_target(logits: torch.Tensor, target: torch.Tensor) -> None:
    if not isinstance(target, torch.Tensor):
        raise TypeError(f"{OP}: target must be a tensor, got {type(target).__name__}")
    if target.dtype not in (torch.int64, torch.uint8):
        raise TypeError(f"{OP}: target must be int64 or uint8, got {str(target.dtype).removeprefix('torch.')}")
    if target.dim() != 3:
        raise ValueError(f"{OP}: target must be 3-D (N, H, W), got {tuple(target.shape)}")
    if target.shape[0] != logits.shape[0]:
        raise ValueError(
            f"{OP}: logits and target must have one batch size, got {logits.shape[0]} and {target.shape[0]}"
        )
    if 0 in target.shape[1:]:
        raise ValueError(f"{OP}: target must have at least one row and column, got {tuple(target.shape)}")
    check_same_device(OP, "logits", logits, "target", target)


def _has_values(target: torch.Tensor) -> bool:
    return not (torch.compiler.is_compiling() or is_traced() or is_batched(target))


def _check_classes(target: torch.Tensor, classes: int, ignore_index: int) -> None:
    """Looks at the values: on a GPU this waits for them."""
    outside = ~(is_class(target, classes) | equals(target, ignore_index))
    if outside.any():
        wrong = target[outside]
        raise ValueError(
            f"{OP}: target must be a class in [0, {classes}) or ignore_index = {ignore_index}, "
            f"got {int(wrong[0])}; {wrong.numel()} such pixels"
        )


def _losses(
    logits: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    align_corners: bool,
    check_targets: bool,
) -> torch.Tensor:
    if check_targets:
        _check_classes(target, logits.shape[1], ignore_index)
    losses: torch.Tensor = run(
        OP, "losses", dense(logits), target.contiguous(), _contiguous(weight), ignore_index, label_smoothing, align_corners
    )  # fmt: skip
    return losses


def _losses_fake(logits: torch.Tensor, target: torch.Tensor, *options: Any) -> torch.Tensor:
    return logits.new_empty(target.shape, dtype=accumulation_dtype(logits.dtype))


def _sums(
    logits: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor | None,
    pixel_weight: torch.Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    align_corners: bool,
    check_targets: bool,
    gradient: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    if check_targets:
        _check_classes(target, logits.shape[1], ignore_index)
    sums, unscaled = run(
        OP, "sums", dense(logits), target.contiguous(), _contiguous(weight), _contiguous(pixel_weight), ignore_index,
        label_smoothing, align_corners, gradient,
    )  # fmt: skip
    return sums, unscaled


def _sums_fake(
    logits: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor | None,
    pixel_weight: torch.Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    align_corners: bool,
    check_targets: bool,
    gradient: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    wide, device = accumulation_dtype(logits.dtype), logits.device
    sums = torch.empty(3, dtype=wide, device=device)
    if not gradient:
        return sums, torch.empty(0, dtype=wide, device=device)
    in_format = memory_format(is_channels_last(logits))
    return sums, torch.empty(logits.shape, dtype=wide, device=device, memory_format=in_format)


def _contiguous(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return None if tensor is None else tensor.contiguous()


_losses_op = define(
    "upsample_cross_entropy_losses(Tensor logits, Tensor target, Tensor? weight, int ignore_index, float label_smoothing,"
    " bool align_corners, bool check_targets) -> Tensor",
    _losses,
    _losses_fake,
)
_sums_op = define(
    "upsample_cross_entropy_sums(Tensor logits, Tensor target, Tensor? weight, Tensor? pixel_weight, int ignore_index,"
    " float label_smoothing, bool align_corners, bool check_targets, bool gradient) -> (Tensor, Tensor)",
    _sums,
    _sums_fake,
)


def _losses_of(
    target: torch.Tensor, weight: torch.Tensor | None, options: tuple[Any, ...], logits: torch.Tensor
) -> torch.Tensor:
    losses: torch.Tensor = _plain_losses(logits, target, weight, *options[:3])
    return losses


def _total_of(
    target: torch.Tensor,
    weight: torch.Tensor | None,
    pixel_weight: torch.Tensor | None,
    options: tuple[Any, ...],
    logits: torch.Tensor,
) -> torch.Tensor:
    sums: torch.Tensor = _plain_sums(logits, target, weight, pixel_weight, *options, False)[0]
    return sums[0]


def _losses_setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    logits, target, weight, *ctx.options = inputs
    ctx.save_for_backward(logits, target, weight)


def _losses_gradient(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
    logits, target, weight = ctx.saved_tensors
    ignore_index, label_smoothing, align_corners, _ = ctx.options
    if torch.is_grad_enabled():
        losses = functools.partial(_losses_of, target, weight, ctx.options)
        return plain_gradient(losses, logits, grad), None, None, None, None, None, None
    _, d_logits = _sums_op(logits, target, weight, grad, ignore_index, label_smoothing, align_corners, False, True)
    return d_logits.to(logits.dtype), None, None, None, None, None, None


def _sums_setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    ctx.options = inputs[4:7]
    ctx.save_for_backward(*output, *inputs[:4])


def _sums_gradient(ctx: Any, grad: torch.Tensor, _: torch.Tensor) -> tuple[Any, ...]:
    sums, unscaled, logits, target, weight, pixel_weight = ctx.saved_tensors
    # Where no pixel counts a mean divides by 0, and no logit is to blame.
    scale = torch.where(sums[2] == 0, 0, grad[0])
    if torch.is_grad_enabled():
        total = functools.partial(_total_of, target, weight, pixel_weight, ctx.options)
        return plain_gradient(total, logits, scale), None, None, None, None, None, None, None, None
    return (unscaled * scale).to(logits.dtype), None, None, None, None, None, None, None, None


torch.library.register_autograd(
    "pspnet_fast::upsample_cross_entropy_losses", _losses_gradient, setup_context=_losses_setup_context, lib=LIBRARY
)
torch.library.register_autograd(
    "pspnet_fast::upsample_cross_entropy_sums", _sums_gradient, setup_context=_sums_setup_context, lib=LIBRARY
)
