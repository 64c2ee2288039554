"""pyramid_norm in plain PyTorch. The maths stands in `pspnet_fast/ops/pyramid_norm.py`."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..geometry import accumulation_dtype, levels


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(accumulation_dtype(tensor.dtype))


def _through_relu(grad: torch.Tensor, out: torch.Tensor, relu: bool) -> torch.Tensor:
    return torch.where(out > 0, _wide(grad), 0) if relu else _wide(grad)


def pyramid_norm_statistics(y: torch.Tensor, bins: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    statistics = [torch.var_mean(level, (0, 1), correction=0) for level in levels(_wide(y), bins)]
    variances, means = zip(*statistics, strict=True)
    return torch.stack(means), torch.stack(variances)


def pyramid_norm_forward(
    y: torch.Tensor,
    bins: Sequence[int],
    mean: torch.Tensor,
    invstd: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    relu: bool,
) -> torch.Tensor:
    out = torch.cat(
        [(level - mean[k]) * (invstd[k] * weight[k]) + bias[k] for k, level in enumerate(levels(_wide(y), bins))],
        1,
    )
    return (torch.relu(out) if relu else out).to(y.dtype)


def pyramid_norm_sums(
    grad: torch.Tensor,
    y: torch.Tensor,
    out: torch.Tensor,
    bins: Sequence[int],
    mean: torch.Tensor,
    invstd: torch.Tensor,
    relu: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    grads = levels(_through_relu(grad, out, relu), bins)
    inputs = levels(_wide(y), bins)
    sum_grad = torch.stack([g.sum((0, 1)) for g in grads])
    sum_grad_normal = torch.stack(
        [
            (g * (level - mean[k])).sum((0, 1)) * invstd[k]
            for k, (g, level) in enumerate(zip(grads, inputs, strict=True))
        ]
    )
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
    dy = []
    for k, (g, level) in enumerate(
        zip(levels(_through_relu(grad, out, relu), bins), levels(_wide(y), bins), strict=True)
    ):
        if mean_grad is not None and mean_grad_normal is not None:
            g = g - mean_grad[k] - (level - mean[k]) * (invstd[k] * mean_grad_normal[k])
        dy.append(g * (invstd[k] * weight[k]))
    return torch.cat(dy, 1).to(y.dtype)


def _stacked(tensors: Sequence[torch.Tensor], like: torch.Tensor, otherwise: float) -> torch.Tensor:
    return torch.stack([*tensors]).to(like.dtype) if tensors else torch.full_like(like, otherwise)


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
    mean, var = pyramid_norm_statistics(y, bins)
    for k, (old_mean, old_var) in enumerate(zip(running_mean, running_var, strict=True)):
        count = y.shape[0] * bins[k] ** 2
        old_mean.mul_(1 - momentum[k]).add_(mean[k], alpha=momentum[k])
        old_var.mul_(1 - momentum[k]).add_(var[k] * (count / (count - 1)), alpha=momentum[k])
    invstd = torch.rsqrt(var + eps)
    out = pyramid_norm_forward(y, bins, mean, invstd, _stacked(weight, mean, 1), _stacked(bias, mean, 0), relu)
    return out, mean, invstd


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
    d_bias, d_weight = pyramid_norm_sums(grad, y, out, bins, mean, invstd, relu)
    count = torch.tensor([y.shape[0] * b * b for b in bins], dtype=mean.dtype, device=y.device)[:, None]
    scale = _stacked(weight, mean, 1)
    dy = pyramid_norm_backward(grad, y, out, bins, mean, invstd, scale, relu, d_bias / count, d_weight / count)
    return dy, d_weight, d_bias
