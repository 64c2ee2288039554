"""SyncBatchNorm on CPU tensors, too, which `torch.nn.SyncBatchNorm` refuses: training over gloo is then as over NCCL."""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.distributed as dist
from torch import nn
from torch.autograd.function import once_differentiable

from .calls import remember


class SyncBatchNorm(nn.SyncBatchNorm):
    """`torch.nn.SyncBatchNorm`; on the CPU, in training and in a process group, in plain PyTorch.

    Parameters, buffers and keys are those of `torch.nn.BatchNorm2d`. In evaluation, in one process and on a
    GPU it is torch's.

    Shapes:
        (N, C, ...) to the same, N at least 1 in every process.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not (self.training and x.device.type == "cpu" and _processes(self.process_group) > 1):
            return super().forward(x)
        self._check_input_dim(x)
        y, mean, var, count = cast(Any, _Normalise).apply(
            x, self.weight, self.bias, self.eps, self.process_group or dist.group.WORLD
        )
        if self.track_running_stats:
            self._count(mean, var, count)
        return cast(torch.Tensor, y)

    def _count(self, mean: torch.Tensor, var: torch.Tensor, count: torch.Tensor) -> None:
        """The running statistics, the variance with Bessel's correction, as `torch.nn.BatchNorm2d` keeps them."""
        batches = cast(torch.Tensor, self.num_batches_tracked).add_(1)
        share = 1 / float(batches) if self.momentum is None else self.momentum
        cast(torch.Tensor, self.running_mean).lerp_(mean, share)
        cast(torch.Tensor, self.running_var).lerp_(var * (count / (count - 1)), share)


def convert_sync_batch_norm(module: nn.Module) -> nn.Module:
    """Every batch norm inside a `SyncBatchNorm`, in place; parameters and buffers stay the same tensors.

    After `DistributedDataParallel` has taken the module, where that is on the CPU: it refuses a synchronised norm there.
    """
    module = nn.SyncBatchNorm.convert_sync_batchnorm(module)
    for norm in module.modules():
        if type(norm) is nn.SyncBatchNorm:
            norm.__class__ = SyncBatchNorm
    return module


def _processes(group: dist.ProcessGroup | None) -> int:
    return dist.get_world_size(group) if dist.is_available() and dist.is_initialized() else 1


remember(SyncBatchNorm)


class _Normalise(torch.autograd.Function):
    """(x - mean) * invstd * weight + bias with the statistics of all processes; also mean, variance and values per channel.

    With n values a channel over all processes and xhat = (x - mean) * invstd:

        dx = weight * invstd * (dy - sum(dy) / n - xhat * sum(dy * xhat) / n)       both sums over all processes

    The gradients of weight and bias are this process's sums: who averages gradients averages them.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor | None,
        bias: torch.Tensor | None,
        eps: float,
        group: dist.ProcessGroup,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        dims = [0, *range(2, x.dim())]
        var, mean = torch.var_mean(x, dims, correction=0)
        own = torch.cat([mean, var, mean.new_tensor([x.numel() // x.shape[1]])])
        gathered = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
        dist.all_gather(gathered, own, group)
        channels = x.shape[1]
        means, variances, counts = torch.stack(gathered).split([channels, channels, 1], 1)
        count = counts.sum()
        mean = (counts * means).sum(0) / count
        var = (counts * (variances + (means - mean).square())).sum(0) / count
        invstd = torch.rsqrt(var + eps)
        y = _scaled(x, mean, invstd if weight is None else invstd * weight)
        y = y if bias is None else y.add_(_along_channels(bias, x))
        ctx.save_for_backward(x, weight, mean, invstd, count)
        ctx.group, ctx.has_bias = group, bias is not None
        ctx.mark_non_differentiable(mean, var, count)
        return y, mean, var, count

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor, *_: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, mean, invstd, count = ctx.saved_tensors
        dims = [0, *range(2, x.dim())]
        normal = _scaled(x, mean, invstd)
        sums = torch.stack([dy.sum(dims), (dy * normal).sum(dims)])
        dbias, dweight = sums.clone()
        dist.all_reduce(sums, group=ctx.group)
        of_dy, of_product = sums / count
        dx = dy - _along_channels(of_dy, x) - normal * _along_channels(of_product, x)
        dx *= _along_channels(invstd if weight is None else invstd * weight, x)
        return dx, None if weight is None else dweight, dbias if ctx.has_bias else None, None, None


def _along_channels(values: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return values.view(-1, *[1] * (x.dim() - 2))


def _scaled(x: torch.Tensor, mean: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    return (x - _along_channels(mean, x)) * _along_channels(factor, x)
