"""The six ops that pyramid_norm is made of: their implementations, their fakes, and how they enter torch.

The maths stands in `pyramid_norm.py`, and so do their derivatives.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..backends import run
from ..geometry import accumulation_dtype
from ._define import define


def _statistics_run(y: torch.Tensor, bins: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    pair: tuple[torch.Tensor, torch.Tensor] = run("pyramid_norm", "statistics", y.contiguous(), bins)
    return pair


def _statistics_fake(y: torch.Tensor, bins: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    shape, dtype = (len(bins), y.shape[2]), accumulation_dtype(y.dtype)
    return y.new_empty(shape, dtype=dtype), y.new_empty(shape, dtype=dtype)


def _forward(
    y: torch.Tensor,
    mean: torch.Tensor,
    invstd: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    bins: Sequence[int],
    relu: bool,
) -> torch.Tensor:
    mean, invstd, weight, bias = (tensor.contiguous() for tensor in (mean, invstd, weight, bias))
    out: torch.Tensor = run("pyramid_norm", "forward", y.contiguous(), bins, mean, invstd, weight, bias, relu)
    return out


def _forward_fake(
    y: torch.Tensor,
    mean: torch.Tensor,
    invstd: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    bins: Sequence[int],
    relu: bool,
) -> torch.Tensor:
    return y.new_empty(y.shape)


def _sums(
    grad: torch.Tensor,
    y: torch.Tensor,
    out: torch.Tensor,
    mean: torch.Tensor,
    invstd: torch.Tensor,
    bins: Sequence[int],
    relu: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    grad, y, out = grad.contiguous(), y.contiguous(), out.contiguous()
    pair: tuple[torch.Tensor, torch.Tensor] = run(
        "pyramid_norm", "sums", grad, y, out, bins, mean.contiguous(), invstd.contiguous(), relu
    )
    return pair


def _sums_fake(
    grad: torch.Tensor,
    y: torch.Tensor,
    out: torch.Tensor,
    mean: torch.Tensor,
    invstd: torch.Tensor,
    bins: Sequence[int],
    relu: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    return mean.new_empty(mean.shape), mean.new_empty(mean.shape)


def _backward(
    grad: torch.Tensor,
    y: torch.Tensor,
    out: torch.Tensor,
    mean: torch.Tensor,
    invstd: torch.Tensor,
    weight: torch.Tensor,
    mean_grad: torch.Tensor | None,
    mean_grad_normal: torch.Tensor | None,
    bins: Sequence[int],
    relu: bool,
) -> torch.Tensor:
    grad, y, out = grad.contiguous(), y.contiguous(), out.contiguous()
    mean, invstd, weight = mean.contiguous(), invstd.contiguous(), weight.contiguous()
    means = (None if t is None else t.contiguous() for t in (mean_grad, mean_grad_normal))
    dy: torch.Tensor = run("pyramid_norm", "backward", grad, y, out, bins, mean, invstd, weight, relu, *means)
    return dy


def _backward_fake(
    grad: torch.Tensor,
    y: torch.Tensor,
    out: torch.Tensor,
    mean: torch.Tensor,
    invstd: torch.Tensor,
    weight: torch.Tensor,
    mean_grad: torch.Tensor | None,
    mean_grad_normal: torch.Tensor | None,
    bins: Sequence[int],
    relu: bool,
) -> torch.Tensor:
    return y.new_empty(y.shape)


def _as(dtype: torch.dtype, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    return [tensor.to(dtype).contiguous() for tensor in tensors]


def _training(
    y: torch.Tensor,
    weight: Sequence[torch.Tensor],
    bias: Sequence[torch.Tensor],
    running_mean: Sequence[torch.Tensor],
    running_var: Sequence[torch.Tensor],
    bins: Sequence[int],
    momentum: Sequence[float],
    eps: float,
    relu: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    wide = accumulation_dtype(y.dtype)
    if y.shape[0] == 0:
        mean, invstd = y.new_zeros(2, len(bins), y.shape[2], dtype=wide)
        return y.new_empty(y.shape), mean, invstd.clone()
    lists = [_as(wide, tensors) for tensors in (weight, bias, running_mean, running_var)]
    results: tuple[torch.Tensor, torch.Tensor, torch.Tensor] = run(
        "pyramid_norm", "training", y.contiguous(), bins, *lists, momentum, eps, relu
    )
    for kept, updated in zip([*running_mean, *running_var], [*lists[2], *lists[3]], strict=True):
        if updated is not kept:  # of another dtype, or strided
            kept.copy_(updated)
    return results


def _training_fake(
    y: torch.Tensor,
    weight: Sequence[torch.Tensor],
    bias: Sequence[torch.Tensor],
    running_mean: Sequence[torch.Tensor],
    running_var: Sequence[torch.Tensor],
    bins: Sequence[int],
    momentum: Sequence[float],
    eps: float,
    relu: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return y.new_empty(y.shape), *_statistics_fake(y, bins)


def _training_backward(
    grad: torch.Tensor,
    y: torch.Tensor,
    out: torch.Tensor,
    mean: torch.Tensor,
    invstd: torch.Tensor,
    weight: Sequence[torch.Tensor],
    bins: Sequence[int],
    relu: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    if y.shape[0] == 0:
        return y.new_empty(y.shape), torch.zeros_like(mean), torch.zeros_like(mean)
    grad, y, out, mean, invstd = (t.contiguous() for t in (grad, y, out, mean, invstd))
    gradients: tuple[torch.Tensor, torch.Tensor, torch.Tensor] = run(
        "pyramid_norm", "training_backward", grad, y, out, bins, mean, invstd, _as(mean.dtype, weight), relu
    )
    return gradients


def _training_backward_fake(
    grad: torch.Tensor,
    y: torch.Tensor,
    out: torch.Tensor,
    mean: torch.Tensor,
    invstd: torch.Tensor,
    weight: Sequence[torch.Tensor],
    bins: Sequence[int],
    relu: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return y.new_empty(y.shape), mean.new_empty(mean.shape), mean.new_empty(mean.shape)


statistics_op = define(
    "pyramid_norm_statistics(Tensor y, int[] bins) -> (Tensor, Tensor)", _statistics_run, _statistics_fake
)
norm_op = define(
    "pyramid_norm(Tensor y, Tensor mean, Tensor invstd, Tensor weight, Tensor bias, int[] bins, bool relu) -> Tensor",
    _forward,
    _forward_fake,
)
sums_op = define(
    "pyramid_norm_sums(Tensor grad, Tensor y, Tensor out, Tensor mean, Tensor invstd, int[] bins, bool relu)"
    " -> (Tensor, Tensor)",
    _sums,
    _sums_fake,
)
backward_op = define(
    "pyramid_norm_backward(Tensor grad, Tensor y, Tensor out, Tensor mean, Tensor invstd, Tensor weight,"
    " Tensor? mean_grad, Tensor? mean_grad_normal, int[] bins, bool relu) -> Tensor",
    _backward,
    _backward_fake,
)
training_op = define(
    "pyramid_norm_training(Tensor y, Tensor[] weight, Tensor[] bias, Tensor(a!)[] running_mean,"
    " Tensor(b!)[] running_var, int[] bins, float[] momentum, float eps, bool relu) -> (Tensor, Tensor, Tensor)",
    _training,
    _training_fake,
)
training_backward_op = define(
    "pyramid_norm_training_backward(Tensor grad, Tensor y, Tensor out, Tensor mean, Tensor invstd, Tensor[] weight,"
    " int[] bins, bool relu) -> (Tensor, Tensor, Tensor)",
    _training_backward,
    _training_backward_fake,
)
