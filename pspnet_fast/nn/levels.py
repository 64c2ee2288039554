"""What lies between pooling and upsampling: every level's 1x1 convolution, norm and activation, all levels in one call."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Literal, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..functional import pyramid_norm, pyramid_project
from ..geometry import accumulation_dtype, cell_count, level_starts
from .calls import held, tell, weight_of, why_call
from .reading import Level
from .sync_batch_norm import SyncBatchNorm

_LOG = logging.getLogger(__name__)

NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm, SyncBatchNorm)
_CONVOLUTIONS, _NORMS_OR_NONE, _RELU_OR_NONE = (nn.Conv2d,), (*NORMS, type(None)), (nn.ReLU, type(None))


def is_whole(norm: nn.Module) -> bool:
    """Whether a norm has a weight and a bias, or neither, as its `affine` says; either can be taken away."""
    return bool(norm.affine) == (held(norm, "weight") is not None) == (held(norm, "bias") is not None)


def autocasts(device: str) -> bool:
    """Whether autocast is on for a type of device."""
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def beyond_the_kernels(level: Level) -> str | None:
    """Why the kernels do not compute a level, so that its modules do, or None."""
    for module, kinds in zip(level, (_CONVOLUTIONS, _NORMS_OR_NONE, _RELU_OR_NONE), strict=True):
        if type(module) not in kinds:
            return f"{type(module).__name__} is not what they compute"
        if module is not None and (reason := why_call(module)):
            return f"{type(module).__name__} {reason}"
    conv, norm = cast(nn.Conv2d, level.convolution), level.norm
    if weight_of(conv).shape[2:] != (1, 1) or conv.stride != (1, 1) or conv.padding != (0, 0) or conv.groups != 1:
        return "the convolution is not 1x1, or has a stride, padding or groups"
    if norm is None:
        return None
    if not is_whole(norm):
        return "the norm has a weight or a bias, and not both"
    if held(conv, "bias") is not None and _by_batch(norm):
        return "the convolution has a bias, and the norm takes the batch's statistics"
    return None


class Kind(NamedTuple):
    """How a level is computed; neighbours of one kind are one call."""

    by: Literal["modules", "norm", "project"]
    channels: int | None  # R; None where only running the modules tells
    rest: object = None


def kinds_of(levels: Sequence[Level]) -> list[Kind]:
    """How every level is computed, as its modules are now."""
    return [_kind(level, k) for k, level in enumerate(levels)]


def of_one_width(kinds: Sequence[Kind]) -> int | None:
    """R where the kernels compute every level, and all to R channels; else None."""
    first = kinds[0].channels
    return first if all(kind.channels == first for kind in kinds) else None


def _kind(level: Level, k: int) -> Kind:
    if reason := beyond_the_kernels(level):
        tell(_LOG, "level %d: convolution, norm and activation run on the modules: %s", k, reason)
        return Kind("modules", None, k)
    channels = weight_of(level.convolution).shape[0]
    if level.norm is not None and _by_batch(level.norm):
        norm = cast(_BatchNorm, level.norm)
        synchronised = isinstance(norm, nn.SyncBatchNorm)
        tracked = norm.track_running_stats, held(norm, "running_mean") is not None
        mode = norm.training, tracked, norm.eps, norm.affine, synchronised
        return Kind("norm", channels, (level.activation is None, mode))
    return Kind("project", channels, level.activation is None)


def reduce_levels(
    pyramid: torch.Tensor, bins: Sequence[int], levels: Sequence[Level], kinds: Sequence[Kind] | None = None
) -> torch.Tensor | list[torch.Tensor]:
    """The pooled pyramid (N, S, C) to (N, S, R): every level through its layers.

    Neighbouring levels of one kind are one call of `pyramid_project` and, with batch statistics, one of `pyramid_norm`.
    What the kernels do not compute (`beyond_the_kernels`) runs on the level's own modules.

    Args:
        pyramid: packed cells, as from `pyramid_pool`.
        bins: cells per axis of each level.
        levels: their layers.
        kinds: `kinds_of(levels)`, where it is known already.

    Returns:
        The packed pyramid; or, where levels have unlike channels or modules make another number of cells, which no packed
        pyramid holds, every level's map (N, R, h, w).
    """
    starts = [*level_starts(bins), cell_count(bins)]
    kinds = kinds_of(levels) if kinds is None else kinds
    parts, first = [], 0
    for last in range(1, len(levels) + 1):
        if last < len(levels) and kinds[last] == kinds[first]:
            continue
        cells = pyramid if last - first == len(levels) else pyramid[:, starts[first] : starts[last]]
        parts.append((bins[first:last], _of_one_kind(kinds[first].by, cells, bins[first:last], levels[first:last])))
        first = last
    if len(parts) == 1 and kinds[0].by != "modules":
        return parts[0][1]
    if all(_is_pooled(part, of_bins, pyramid.dtype) for of_bins, part in parts):
        packed = [part if part.dim() == 3 else part.flatten(2).transpose(1, 2) for _, part in parts]
        if all(part.shape[2] == packed[0].shape[2] for part in packed):
            return torch.cat(packed, 1)
    return [each for of_bins, part in parts for each in _maps(part, of_bins)]


def _is_pooled(part: torch.Tensor, bins: Sequence[int], dtype: torch.dtype) -> bool:
    """Whether a part is packed cells, or a map of as many cells as were pooled, and of a dtype that the others may have."""
    if part.dim() == 3:
        return True
    return part.shape[2:] == (bins[0], bins[0]) and (part.dtype == dtype or autocasts(part.device.type))


def _maps(part: torch.Tensor, bins: Sequence[int]) -> list[torch.Tensor]:
    """The map (N, R, h, w) of each level of a part."""
    if part.dim() == 4:
        return [part]
    cells = part.split([b * b for b in bins], 1)
    return [each.transpose(1, 2).unflatten(2, (b, b)) for b, each in zip(bins, cells, strict=True)]


def _of_one_kind(by: str, pyramid: torch.Tensor, bins: Sequence[int], levels: Sequence[Level]) -> torch.Tensor:
    """Packed cells, or the map of the one level that modules computed."""
    if by == "modules":
        return _by_modules(pyramid, bins[0], levels[0])
    return (_by_batch_statistics if by == "norm" else _by_projection)(pyramid, bins, levels)


def _by_batch(norm: nn.Module) -> bool:
    """Whether the norm takes the batch's statistics."""
    return norm.training or held(norm, "running_mean") is None


def _weights(levels: Sequence[Level]) -> list[torch.Tensor]:
    return [weight_of(level.convolution).flatten(1) for level in levels]


def _by_modules(pyramid: torch.Tensor, cells: int, level: Level) -> torch.Tensor:
    """One level of `cells` cells an axis, through its own modules: a map (N, R, h, w)."""
    # NCHW: of other strides, torch's batch norm sums its gradients less exactly.
    y: torch.Tensor = pyramid.transpose(1, 2).unflatten(2, (cells, cells)).contiguous()
    for module in level:
        y = y if module is None else module(y)
    return y


def _by_projection(pyramid: torch.Tensor, bins: Sequence[int], levels: Sequence[Level]) -> torch.Tensor:
    """Levels whose norm, if there is one, is a factor and a summand of the convolution's output."""
    wide = accumulation_dtype(pyramid.dtype)
    scale, shift = _folded(levels, wide)
    return pyramid_project(pyramid, _weights(levels), bins, scale, shift, levels[0].activation is not None)


def _folded(levels: Sequence[Level], dtype: torch.dtype) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Factors and summands (B, R); None where no level has any."""
    norms = [cast("_BatchNorm | None", level.norm) for level in levels]
    biases = [held(level.convolution, "bias") for level in levels]
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
    mean, var = (_stacked(norms, name).to(dtype) for name in ("running_mean", "running_var"))
    same = len({norm.eps for norm in norms}) == 1
    scale = torch.rsqrt(var + (norms[0].eps if same else var.new_tensor([[norm.eps] for norm in norms])))
    if not any(norm.affine for norm in norms):
        return scale, -mean * scale
    scale = scale * _stacked(norms, "weight", torch.ones_like(mean[0]))
    return scale, _stacked(norms, "bias", torch.zeros_like(mean[0])) - mean * scale


def _stacked(norms: Sequence[_BatchNorm], name: str, instead: torch.Tensor | None = None) -> torch.Tensor:
    """A tensor of every norm; what stands `instead` for a norm that has none."""
    found = [held(norm, name) for norm in norms]
    return torch.stack([cast(torch.Tensor, instead if each is None else each) for each in found])


def _by_batch_statistics(pyramid: torch.Tensor, bins: Sequence[int], levels: Sequence[Level]) -> torch.Tensor:
    """Levels whose norms are of one mode and take the batch's statistics."""
    norms = [cast(_BatchNorm, level.norm) for level in levels]
    first = norms[0]
    counted = first.training and first.track_running_stats
    tracked = counted and held(first, "running_mean") is not None
    return pyramid_norm(
        pyramid_project(pyramid, _weights(levels), bins, relu=False),
        bins,
        running_mean=[cast(torch.Tensor, norm.running_mean) for norm in norms] if tracked else None,
        running_var=[cast(torch.Tensor, norm.running_var) for norm in norms] if tracked else None,
        weight=[norm.weight for norm in norms] if first.affine else None,
        bias=[norm.bias for norm in norms] if first.affine else None,
        training=True,
        momentum=[_count_batch(norm) for norm in norms] if counted else 0.0,
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
