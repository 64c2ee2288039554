"""What lies between pooling and upsampling: every level's 1x1 convolution, norm and activation, all levels in one call."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..functional import pyramid_norm, pyramid_project
from ..geometry import accumulation_dtype, cell_count, level_starts
from .sync_batch_norm import SyncBatchNorm

_LOG = logging.getLogger(__name__)

NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm, SyncBatchNorm)


class Level(NamedTuple):
    """The layers of one level; None where it has no such layer."""

    convolution: nn.Module
    norm: nn.Module | None
    activation: nn.Module | None

    @property
    def channels(self) -> int:
        """R, what the convolution reduces to."""
        return cast(nn.Conv2d, self.convolution).out_channels


def has_hooks(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def beyond_the_kernels(level: Level) -> str | None:
    """Why the kernels do not compute a level, so that its modules do, or None."""
    for module, kinds in zip(level, ((nn.Conv2d,), NORMS, (nn.ReLU,)), strict=True):
        if module is None:
            continue
        if type(module) not in kinds:
            return f"{type(module).__name__} is not what they compute"
        if has_hooks(module):
            return f"{type(module).__name__} has hooks"
    conv = cast(nn.Conv2d, level.convolution)
    if conv.kernel_size != (1, 1) or conv.stride != (1, 1) or conv.padding != (0, 0) or conv.groups != 1:
        return "the convolution is not 1x1, or has a stride, padding or groups"
    if conv.bias is not None and level.norm is not None and _by_batch(level.norm):
        return "the convolution has a bias, and the norm takes the batch's statistics"
    return None


def reduce_levels(pyramid: torch.Tensor, bins: Sequence[int], levels: Sequence[Level]) -> torch.Tensor:
    """The pooled pyramid (N, S, C) to (N, S, R): every level through its layers.

    Neighbouring levels of one kind are one call of `pyramid_project` and, with batch statistics, one of `pyramid_norm`.
    What the kernels do not compute (`beyond_the_kernels`) runs on the level's own modules.

    Args:
        pyramid: packed cells, as from `pyramid_pool`.
        bins: cells per axis of each level.
        levels: their layers, of one R.
    """
    starts = [*level_starts(bins), cell_count(bins)]
    kinds = [_kind(level, k) for k, level in enumerate(levels)]
    parts, first = [], 0
    for last in range(1, len(levels) + 1):
        if last < len(levels) and kinds[last] == kinds[first]:
            continue
        cells = pyramid if last - first == len(levels) else pyramid[:, starts[first] : starts[last]]
        parts.append(_of_one_kind(kinds[first][0], cells, bins[first:last], levels[first:last]))
        first = last
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def _of_one_kind(kind: str, pyramid: torch.Tensor, bins: Sequence[int], levels: Sequence[Level]) -> torch.Tensor:
    if kind == "modules":
        return _by_modules(pyramid, bins[0], levels[0])
    return (_by_batch_statistics if kind == "norm" else _by_projection)(pyramid, bins, levels)


def _kind(level: Level, k: int) -> tuple[str, object]:
    if reason := beyond_the_kernels(level):
        _LOG.debug("level %d: convolution, norm and activation run on the modules: %s", k, reason)
        return "modules", k
    if level.norm is not None and _by_batch(level.norm):
        norm = cast(_BatchNorm, level.norm)
        synchronised = isinstance(norm, nn.SyncBatchNorm)
        mode = norm.training, norm.track_running_stats, norm.eps, norm.affine, synchronised
        return "norm", (level.activation is None, mode)
    return "project", level.activation is None


def _by_batch(norm: nn.Module) -> bool:
    """Whether the norm takes the batch's statistics."""
    return norm.training or getattr(norm, "running_mean", None) is None


def _weights(levels: Sequence[Level]) -> list[torch.Tensor]:
    return [cast(torch.Tensor, level.convolution.weight).flatten(1) for level in levels]


def _by_modules(pyramid: torch.Tensor, cells: int, level: Level) -> torch.Tensor:
    """One level of `cells` cells an axis, through its own modules."""
    # NCHW: of other strides, torch's batch norm sums its gradients less exactly.
    y: torch.Tensor = pyramid.transpose(1, 2).unflatten(2, (cells, cells)).contiguous()
    for module in level:
        y = y if module is None else module(y)
    return y.flatten(2).transpose(1, 2)


def _by_projection(pyramid: torch.Tensor, bins: Sequence[int], levels: Sequence[Level]) -> torch.Tensor:
    """Levels whose norm, if there is one, is a factor and a summand of the convolution's output."""
    wide = accumulation_dtype(pyramid.dtype)
    scale, shift = _folded(levels, wide)
    return pyramid_project(pyramid, _weights(levels), bins, scale, shift, levels[0].activation is not None)


def _folded(levels: Sequence[Level], dtype: torch.dtype) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Factors and summands (B, R); None where no level has any."""
    norms = [cast("_BatchNorm | None", level.norm) for level in levels]
    biases = [cast("torch.Tensor | None", level.convolution.bias) for level in levels]
    scale = shift = None
    if present := [norm for norm in norms if norm is not None]:
        scale, shift = _of_norms(present, dtype)
        if len(present) < len(norms):
            rows, plain = iter(zip(scale, shift, strict=True)), (torch.ones_like(scale[0]), torch.zeros_like(shift[0]))
            pairs = [plain if norm is None else next(rows) for norm in norms]
            scale, shift = torch.stack([each for each, _ in pairs]), torch.stack([each for _, each in pairs])
    if any(bias is not None for bias in biases):
        weights = _weights(levels)
        added = torch.stack([w.new_zeros(len(w)) if b is None else b for w, b in zip(weights, biases, strict=True)])
        added = added.to(dtype) if scale is None else added * scale
        shift = added if shift is None else shift + added
    return scale, shift


def _of_norms(norms: Sequence[_BatchNorm], dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    mean = torch.stack([cast(torch.Tensor, norm.running_mean) for norm in norms]).to(dtype)
    var = torch.stack([cast(torch.Tensor, norm.running_var) for norm in norms]).to(dtype)
    same = len({norm.eps for norm in norms}) == 1
    scale = torch.rsqrt(var + (norms[0].eps if same else var.new_tensor([[norm.eps] for norm in norms])))
    if not any(norm.affine for norm in norms):
        return scale, -mean * scale
    ones, zeros = torch.ones_like(mean[0]), torch.zeros_like(mean[0])
    scale = scale * torch.stack([norm.weight if norm.affine else ones for norm in norms])
    return scale, torch.stack([norm.bias if norm.affine else zeros for norm in norms]) - mean * scale


def _by_batch_statistics(pyramid: torch.Tensor, bins: Sequence[int], levels: Sequence[Level]) -> torch.Tensor:
    """Levels whose norms are of one mode and take the batch's statistics."""
    norms = [cast(_BatchNorm, level.norm) for level in levels]
    first = norms[0]
    tracked = first.training and first.track_running_stats
    return pyramid_norm(
        pyramid_project(pyramid, _weights(levels), bins, relu=False),
        bins,
        running_mean=[cast(torch.Tensor, norm.running_mean) for norm in norms] if tracked else None,
        running_var=[cast(torch.Tensor, norm.running_var) for norm in norms] if tracked else None,
        weight=[norm.weight for norm in norms] if first.affine else None,
        bias=[norm.bias for norm in norms] if first.affine else None,
        training=True,
        momentum=[_count_batch(norm) for norm in norms] if tracked else 0.0,
        eps=first.eps,
        relu=levels[0].activation is not None,
        process_group=_process_group(first),
    )


def _count_batch(norm: _BatchNorm) -> float:
    """Count one more batch, and return its share in the running statistics: 1 / batches where momentum is None."""
    count = norm.num_batches_tracked
    if count is not None:
        count.add_(1)
    if norm.momentum is not None:
        return norm.momentum
    return 0.0 if count is None else 1.0 / float(count)


def _process_group(norm: _BatchNorm) -> dist.ProcessGroup | None:
    if isinstance(norm, nn.SyncBatchNorm) and norm.training and dist.is_available() and dist.is_initialized():
        return cast("dist.ProcessGroup | None", norm.process_group or dist.group.WORLD)
    return None
