"""upsample_softmax_add in plain PyTorch. The maths stands in `pspnet_fast/ops/upsample_softmax_add.py`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from ..geometry import accumulation_dtype


def upsample_softmax_add_forward(
    logits: torch.Tensor,
    total: torch.Tensor,
    corners: Sequence[int],
    size: Sequence[int],
    align_corners: bool,
    flip: bool,
    weight: float,
) -> None:
    for m in range(logits.shape[0]):
        wide = logits[m : m + 1].to(accumulation_dtype(logits.dtype))
        window = F.interpolate(wide, tuple(size), mode="bilinear", align_corners=align_corners).softmax(1)[0]
        if flip:
            window = window.flip(2)
        top, left = corners[2 * m : 2 * m + 2]
        inside = total[:, max(top, 0) : max(top + size[0], 0), max(left, 0) : max(left + size[1], 0)]
        first_row, first_column = max(-top, 0), max(-left, 0)
        inside += (
            weight * window[:, first_row : first_row + inside.shape[1], first_column : first_column + inside.shape[2]]
        )
