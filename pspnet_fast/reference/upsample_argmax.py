"""upsample_argmax in plain PyTorch. The maths stands in `pspnet_fast/ops/upsample_argmax.py`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from ..geometry import accumulation_dtype


def _upsampled(logits: torch.Tensor, size: Sequence[int], align_corners: bool) -> torch.Tensor:
    wide = logits.to(accumulation_dtype(logits.dtype))
    return F.interpolate(wide, tuple(size), mode="bilinear", align_corners=align_corners)


def upsample_argmax_forward(
    logits: torch.Tensor, size: Sequence[int], align_corners: bool, dtype: torch.dtype
) -> torch.Tensor:
    return _upsampled(logits, size, align_corners).argmax(1).to(dtype)


def upsample_argmax_confidence(
    logits: torch.Tensor, size: Sequence[int], align_corners: bool, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    maps = _upsampled(logits, size, align_corners)
    labels = maps.argmax(1, keepdim=True)
    return labels[:, 0].to(dtype), maps.softmax(1).gather(1, labels)[:, 0].float()
