"""upsample_cross_entropy in plain PyTorch. The maths stands in `pspnet_fast/ops/upsample_cross_entropy.py`."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ..geometry import accumulation_dtype, is_channels_last, memory_format


def _upsampled(
    logits: torch.Tensor, target: torch.Tensor, ignore_index: int, align_corners: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The wide logits at the target's size, the target with a class everywhere, and where it counts."""
    wide = logits.to(accumulation_dtype(logits.dtype))
    upsampled = F.interpolate(wide, target.shape[1:], mode="bilinear", align_corners=align_corners)
    target = target.long()
    counts = (target != ignore_index) & (target >= 0) & (target < logits.shape[1])
    # What an ignored pixel holds, perhaps Inf, has no part in any derivative.
    return torch.where(counts[:, None], upsampled, 0), torch.where(counts, target, 0), counts


def upsample_cross_entropy_losses(
    logits: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    align_corners: bool,
) -> torch.Tensor:
    upsampled, classes, counts = _upsampled(logits, target, ignore_index, align_corners)
    losses = F.cross_entropy(upsampled, classes, weight, reduction="none", label_smoothing=label_smoothing)
    return torch.where(counts, losses, 0)


def upsample_cross_entropy_sums(
    logits: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor | None,
    pixel_weight: torch.Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    align_corners: bool,
    gradient: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    upsampled, classes, counts = _upsampled(logits, target, ignore_index, align_corners)
    count = logits.shape[1]
    weights = upsampled.new_ones(count) if weight is None else weight
    g = torch.ones_like(upsampled[:, 0]) if pixel_weight is None else pixel_weight
    counts = counts & (g != 0)
    losses = F.cross_entropy(upsampled, classes, weight, reduction="none", label_smoothing=label_smoothing)
    sums = [torch.where(counts, term, 0).sum() for term in (g * losses, g * weights[classes], torch.ones_like(g))]
    if not gradient:
        return torch.stack(sums), upsampled.new_empty(0)
    of_target, of_each = (1 - label_smoothing) * weights[classes], label_smoothing / count * weights
    d_upsampled = upsampled.softmax(1).mul_((of_target + of_each.sum())[:, None]).sub_(of_each[:, None, None])
    d_upsampled.scatter_add_(1, classes[:, None], -of_target[:, None])
    d_upsampled = torch.where(counts[:, None], d_upsampled.mul_(g[:, None]), 0)
    d_logits = torch.ops.aten.upsample_bilinear2d_backward(d_upsampled, target.shape[1:], logits.shape, align_corners)
    return torch.stack(sums), d_logits.contiguous(memory_format=memory_format(is_channels_last(logits)))
