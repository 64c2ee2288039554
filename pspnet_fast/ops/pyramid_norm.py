"""pyramid_norm: the batch norm and ReLU of every level, in one call and with one collective.

    out[n, s, r] = act((y[n, s, r] - mean[k, r]) * invstd[k, r] * weight[k, r] + bias[k, r])     k = level of cell s
    g = dy * act';  dbias = sum g;  dweight = sum g yhat        sums over n and the cells of level k, yhat = (y - mean) invstd
    dy = weight invstd (g - dbias / count - yhat dweight / count)     training;  without the two means at evaluation

mean and invstd = 1 / sqrt(var + eps) are those of the level's count = N*b*b values in training (var without Bessel's
correction), the running ones at evaluation (Ioffe & Szegedy, ICML 2015, algorithms 1 and 2). With a process group the
statistics of all levels are gathered in one collective forward and their two sums reduced in one backward.
Saved for backward: y, out, the statistics.    Must move: N*S*R read and written; backward, three read and one written.

In training without a process group each direction is one op of its own: the statistics, their use and the running ones'
update in one, both sums and the gradient in the other. With one the collective stands between two halves.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.distributed as dist

from ..checks import check_bins, check_pyramid, check_same_device, check_shape
from ..geometry import accumulation_dtype
from ..tracing import is_transformed
from ._define import LIBRARY, check_writable, once, plain
from ._pyramid_norm_ops import backward_op, norm_op, statistics_op, sums_op, training_backward_op, training_op

OP = "pyramid_norm"
_plain_forward = plain("pyramid_norm", "forward")
_plain_statistics = plain("pyramid_norm", "statistics")
_plain_sums = plain("pyramid_norm", "sums")
_plain_backward = plain("pyramid_norm", "backward")
_plain_training_backward = plain("pyramid_norm", "training_backward")


def pyramid_norm(
    y: torch.Tensor,
    bins: Sequence[int],
    running_mean: Sequence[torch.Tensor] | None = None,
    running_var: Sequence[torch.Tensor] | None = None,
    weight: Sequence[torch.Tensor] | None = None,
    bias: Sequence[torch.Tensor] | None = None,
    training: bool = False,
    momentum: float | Sequence[float] = 0.1,
    eps: float = 1e-5,
    relu: bool = True,
    process_group: dist.ProcessGroup | None = None,
) -> torch.Tensor:
    """Normalise every level by its own batch norm, then ReLU.

    Equals, for level k, `relu(batch_norm(level_k, running_mean[k], running_var[k], weight[k], bias[k], ...))` of
    `torch.nn.functional`, and with a process group what `torch.nn.SyncBatchNorm` computes.

    Args:
        y: packed cells (N, S, R), as from `pyramid_project(..., relu=False)`.
        bins: cells per axis of each level, B of them.
        running_mean: B tensors (R,), updated in place in training; None where nothing is tracked.
        running_var: B tensors (R,), likewise, of the variance with Bessel's correction.
        weight: B tensors (R,), or None for 1.
        bias: B tensors (R,), or None for 0.
        training: normalise by the batch's statistics (True) or the running ones (False).
        momentum: the new value's share in the running statistics, one for all levels or one each; any number, as in torch.
        eps: added to the variance: positive, at evaluation possibly 0, as in `torch.nn.functional.batch_norm`.
        relu: whether to end in a ReLU.
        process_group: in training, the processes whose batches count as one.

    Returns:
        (N, S, R), in y's dtype.

    Raises:
        ValueError: a shape that does not fit, running statistics missing at evaluation, or a level with one value per
            channel in training, an eps out of range.
        TypeError: y is not a floating-point tensor.
    """
    op = OP
    bins = check_bins(op, bins)
    check_pyramid(op, "y", y, bins)
    reduced = (y.shape[2],)
    for name, tensors in (
        ("running_mean", running_mean),
        ("running_var", running_var),
        ("weight", weight),
        ("bias", bias),
    ):
        if tensors is None:
            continue
        if len(tensors) != len(bins):
            raise ValueError(f"{op}: {name} must hold one tensor for each of the {len(bins)} bins, got {len(tensors)}")
        for k, tensor in enumerate(tensors):
            check_shape(op, f"{name}[{k}]", tensor, reduced, "(R,)")
            check_same_device(op, "y", y, f"{name}[{k}]", tensor)
    momenta = [momentum] * len(bins) if isinstance(momentum, (int, float)) else list(momentum)
    if len(momenta) != len(bins):
        raise ValueError(f"{op}: momentum must be one number or one for each of the {len(bins)} bins, got {momenta}")
    if not (eps > 0 or (eps == 0 and not training)):
        raise ValueError(f"{op}: eps must be positive, or 0 at evaluation, got {eps}")

    if training and process_group is not None and dist.get_world_size(process_group) == 1:
        process_group = None
    if training:
        for name, statistics in (("running_mean", running_mean), ("running_var", running_var)):
            for k, tensor in enumerate(() if statistics is None else statistics):
                check_writable(op, f"{name}[{k}]", tensor)
    if training and process_group is None:
        if y.shape[0] * min(bins) ** 2 == 1:
            raise ValueError(
                f"{op}: training needs more than one value per channel, but a batch of 1 gives bin 1 just one: "
                "use a batch of 2 or more, put the norms in evaluation mode, or leave the bin out"
            )
        if is_transformed():
            return _train_plainly(y, bins, running_mean, running_var, weight, bias, momenta, eps, relu)
        return _train(y, bins, running_mean, running_var, weight, bias, momenta, eps, relu)

    dtype = accumulation_dtype(y.dtype)
    scale, shift = _affine(y, bins, weight, bias)
    if not training:
        if running_mean is None or running_var is None:
            raise ValueError(f"{op}: evaluation needs running_mean and running_var, got None")
        mean, var = torch.stack(list(running_mean)).to(dtype), torch.stack(list(running_var)).to(dtype)
        invstd = torch.rsqrt(var + eps)
        normalised: torch.Tensor = (
            _plain_forward(y, bins, mean, invstd, scale, shift, relu)
            if is_transformed()
            else norm_op(y, mean, invstd, scale, shift, bins, relu)
        )
        return normalised

    if is_transformed():
        raise NotImplementedError(
            f"{op}: with a process group the statistics are those of all processes, which torch.func, forward mode and "
            "tracers cannot look into: leave process_group out, or put the norms in evaluation mode"
        )
    group = cast(dist.ProcessGroup, process_group)
    mean, var, batch = _joint_statistics(y, bins, group)
    trained: torch.Tensor = cast(Any, _SynchronisedNorm).apply(
        y, mean, torch.rsqrt(var + eps), scale, shift, bins, relu, batch, group
    )
    if running_mean is not None and running_var is not None:
        _update_running(running_mean, running_var, mean, var, [batch * b * b for b in bins], momenta)
    return trained


def _affine(
    y: torch.Tensor,
    bins: Sequence[int],
    weight: Sequence[torch.Tensor] | None,
    bias: Sequence[torch.Tensor] | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Factors and summands (B, R), in the dtype that sums are held in."""
    dtype, shape = accumulation_dtype(y.dtype), (len(bins), y.shape[2])
    scale = y.new_ones(shape, dtype=dtype) if weight is None else torch.stack(list(weight)).to(dtype)
    shift = y.new_zeros(shape, dtype=dtype) if bias is None else torch.stack(list(bias)).to(dtype)
    return scale, shift


def _train_plainly(
    y: torch.Tensor,
    bins: tuple[int, ...],
    running_mean: Sequence[torch.Tensor] | None,
    running_var: Sequence[torch.Tensor] | None,
    weight: Sequence[torch.Tensor] | None,
    bias: Sequence[torch.Tensor] | None,
    momentum: list[float],
    eps: float,
    relu: bool,
) -> torch.Tensor:
    """As `_train`, for what has to look into it."""
    mean, var = _plain_statistics(y, bins)
    invstd = torch.rsqrt(var + eps)
    trained: torch.Tensor = _plain_forward(y, bins, mean, invstd, *_affine(y, bins, weight, bias), relu)
    if running_mean is not None and running_var is not None:
        counts = [y.shape[0] * b * b for b in bins]
        _update_running(running_mean, running_var, mean.detach(), var.detach(), counts, momentum)
    return trained


def _train(
    y: torch.Tensor,
    bins: tuple[int, ...],
    running_mean: Sequence[torch.Tensor] | None,
    running_var: Sequence[torch.Tensor] | None,
    weight: Sequence[torch.Tensor] | None,
    bias: Sequence[torch.Tensor] | None,
    momentum: list[float],
    eps: float,
    relu: bool,
) -> torch.Tensor:
    if running_mean is None or running_var is None:
        running_mean = running_var = None
    means, variances, weights, biases = (
        [] if tensors is None else list(tensors) for tensors in (running_mean, running_var, weight, bias)
    )
    with torch.no_grad():
        out, mean, invstd = training_op(y, weights, biases, means, variances, bins, momentum, eps, relu)
    trained: torch.Tensor = cast(Any, _TrainingNorm).apply(
        y, out, mean, invstd, bins, eps, relu, len(weights), *weights, *biases
    )
    return trained


@torch.no_grad()
def _joint_statistics(
    y: torch.Tensor, bins: Sequence[int], process_group: dist.ProcessGroup
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Mean and variance (B, R) of each level, and the batch size they were taken over, all processes together."""
    if y.shape[0] == 0:
        mean, var = y.new_zeros(2, len(bins), y.shape[2], dtype=accumulation_dtype(y.dtype))
    else:
        mean, var = statistics_op(y, bins)
    mine = torch.cat([mean.flatten(), var.flatten(), mean.new_tensor([y.shape[0]])])
    gathered = [torch.empty_like(mine) for _ in range(dist.get_world_size(process_group))]
    dist.all_gather(gathered, mine, process_group)
    everyone = torch.stack(gathered)
    batches = everyone[:, -1]
    batch = batches.sum()
    share = (batches / batch)[:, None, None]
    means, variances = everyone[:, :-1].unflatten(1, (2, len(bins), y.shape[2])).unbind(1)
    mean = (share * means).sum(0)
    # The variance of the union: the mean of the variances, plus the variance of the means.
    return mean, (share * (variances + (means - mean) ** 2)).sum(0), batch


@torch.no_grad()
def _update_running(
    running_mean: Sequence[torch.Tensor],
    running_var: Sequence[torch.Tensor],
    mean: torch.Tensor,
    var: torch.Tensor,
    counts: Sequence[torch.Tensor | int],
    momenta: Sequence[float],
) -> None:
    for k, (count, momentum) in enumerate(zip(counts, momenta, strict=True)):
        unbiased = var[k] * (count / (count - 1))
        running_mean[k].mul_(1 - momentum).add_(mean[k].to(running_mean[k].dtype), alpha=momentum)
        running_var[k].mul_(1 - momentum).add_(unbiased.to(running_var[k].dtype), alpha=momentum)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    y, mean, invstd, weight, _, ctx.bins, ctx.relu = inputs
    ctx.save_for_backward(y, output, mean, invstd, weight)


def _gradient(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
    """With the statistics given: they are constants, and their gradients are not offered."""
    y, out, mean, invstd, weight = ctx.saved_tensors
    bins, relu = ctx.bins, ctx.relu
    if torch.is_grad_enabled():
        d_bias, d_weight = _plain_sums(grad, y, out, bins, mean, invstd, relu)
        dy = _plain_backward(grad, y, out, bins, mean, invstd, weight, relu, None, None)
    else:
        d_bias, d_weight = sums_op(grad, y, out, mean, invstd, bins, relu)
        dy = backward_op(grad, y, out, mean, invstd, weight, None, None, bins, relu)
    return dy, None, None, d_weight, d_bias, None, None


torch.library.register_autograd("pspnet_fast::pyramid_norm", _gradient, setup_context=_setup_context, lib=LIBRARY)


class _TrainingNorm(torch.autograd.Function):
    """The node behind `out`, which is computed already: the running statistics are not its business."""

    @staticmethod
    def forward(
        ctx: Any,
        y: torch.Tensor,
        out: torch.Tensor,
        mean: torch.Tensor,
        invstd: torch.Tensor,
        bins: tuple[int, ...],
        eps: float,
        relu: bool,
        weights: int,
        *affine: torch.Tensor,
    ) -> torch.Tensor:
        ctx.bins, ctx.eps, ctx.relu, ctx.weights = bins, eps, relu, weights
        ctx.dtypes = [tensor.dtype for tensor in affine]
        ctx.save_for_backward(y, out, mean, invstd, *affine[:weights])
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:
        (grad,) = grads
        y, out, mean, invstd, *weight = ctx.saved_tensors
        if torch.is_grad_enabled() and y.shape[0] > 0:
            # The statistics are y's, and change with it.
            mean, var = _plain_statistics(y, ctx.bins)
            invstd = torch.rsqrt(var + ctx.eps)
            gradients = _plain_training_backward(grad, y, out, ctx.bins, mean, invstd, weight, ctx.relu)
        else:
            with torch.no_grad():
                gradients = training_backward_op(grad, y, out, mean, invstd, weight, ctx.bins, ctx.relu)
        dy, d_weight, d_bias = gradients
        d_weights = d_weight.unbind(0) if ctx.weights else ()
        d_biases = d_bias.unbind(0) if len(ctx.dtypes) > ctx.weights else ()
        affine = (d.to(dtype) for d, dtype in zip((*d_weights, *d_biases), ctx.dtypes, strict=True))
        return dy, None, None, None, None, None, None, None, *affine


class _SynchronisedNorm(torch.autograd.Function):
    """With the statistics of all processes' y: their part of y's gradient is in the backward's two means."""

    @staticmethod
    def forward(
        ctx: Any,
        y: torch.Tensor,
        mean: torch.Tensor,
        invstd: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor,
        bins: tuple[int, ...],
        relu: bool,
        batch: torch.Tensor,
        process_group: dist.ProcessGroup,
    ) -> torch.Tensor:
        out: torch.Tensor = norm_op(y, mean, invstd, weight, bias, bins, relu)
        _setup_context(ctx, (y, mean, invstd, weight, bias, bins, relu), out)
        ctx.batch, ctx.process_group = batch, process_group
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:
        with torch.no_grad():
            gradients = _SynchronisedNorm._gradients(ctx, *grads)
        if torch.is_grad_enabled():
            y, *_, weight = ctx.saved_tensors
            sentence = f"{OP}: with a process group it must be differentiated once, got a second derivative"
            gradients = once(sentence, gradients, (*grads, y, weight))
        dy, d_weight, d_bias = gradients
        return dy, None, None, d_weight, d_bias, None, None, None, None

    @staticmethod
    def _gradients(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, ...]:
        y, out, mean, invstd, weight = ctx.saved_tensors
        d_bias, d_weight = sums_op(grad, y, out, mean, invstd, ctx.bins, ctx.relu)
        sums = torch.stack([d_bias, d_weight])
        dist.all_reduce(sums, group=ctx.process_group)
        counts = [ctx.batch * b * b for b in ctx.bins]
        mean_grad, mean_grad_normal = torch.stack([sums[:, k] / count for k, count in enumerate(counts)], 1)
        dy = backward_op(grad, y, out, mean, invstd, weight, mean_grad, mean_grad_normal, ctx.bins, ctx.relu)
        return dy, d_weight, d_bias
