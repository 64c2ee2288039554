"""UpsampleCrossEntropyLoss: the loss of segmentation networks, from logits at the features' size."""

from __future__ import annotations

import math

import torch
from torch import nn

from ..checks import equals, is_class
from ..functional import upsample_cross_entropy


class UpsampleCrossEntropyLoss(nn.Module):
    """Cross entropy at the target's size of logits (N, K, h, w), which are upsampled on the way and never built.

    The arguments are those of `torch.nn.CrossEntropyLoss`, and `align_corners` of `torch.nn.functional.interpolate`.

    With `ohem_threshold` the hardest pixels alone count: online hard example mining (Shrivastava et al., "Training
    Region-based Object Detectors with Online Hard Example Mining", CVPR 2016) as segmentation uses it. With p the softmax
    probability of a pixel's target, of the pixels that are not ignored those count

        whose p is below `ohem_threshold`, or not above that of the `ohem_min_kept` pixels with the lowest p

    in the whole batch: ties with the last of these count, and where fewer pixels are valid all of them do. The mean is over
    the pixels that count. Which they are has no gradient.

    Args:
        weight: of each class (K,), a buffer, as in `torch.nn.CrossEntropyLoss`.
        ignore_index: the target of pixels that do not count.
        reduction: "mean", "sum" or "none".
        label_smoothing: in [0, 1].
        align_corners: how the logits are upsampled.
        ohem_threshold: a probability in (0, 1], or None to count every pixel.
        ohem_min_kept: how many pixels count at least, in one batch.

    Raises:
        ValueError: an OHEM option out of range; the rest is checked where the loss is computed.
    """

    weight: torch.Tensor | None

    def __init__(
        self,
        weight: torch.Tensor | None = None,
        ignore_index: int = 255,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        align_corners: bool = True,
        ohem_threshold: float | None = None,
        ohem_min_kept: int = 100_000,
    ) -> None:
        super().__init__()
        op = type(self).__name__
        if ohem_threshold is not None and not 0 < ohem_threshold <= 1:
            raise ValueError(f"{op}: ohem_threshold must be in (0, 1], got {ohem_threshold}")
        if ohem_min_kept < 0:
            raise ValueError(f"{op}: ohem_min_kept must not be negative, got {ohem_min_kept}")
        self.register_buffer("weight", weight)
        self.ignore_index, self.reduction, self.label_smoothing = ignore_index, reduction, label_smoothing
        self.align_corners, self.ohem_threshold, self.ohem_min_kept = align_corners, ohem_threshold, ohem_min_kept

    def forward(self, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        kept = None if self.ohem_threshold is None else self._hard_pixels(logits.detach(), target, self.ohem_threshold)
        return upsample_cross_entropy(
            logits,
            target,
            self.weight,
            self.ignore_index,
            self.reduction,
            self.label_smoothing,
            self.align_corners,
            pixel_weight=kept,
        )

    def _hard_pixels(self, logits: torch.Tensor, target: torch.Tensor, threshold: float) -> torch.Tensor:
        """1 where a pixel counts, else 0. The loss is -log p: nothing here needs the probabilities themselves."""
        losses = upsample_cross_entropy(
            logits, target, None, self.ignore_index, "none", 0.0, align_corners=self.align_corners
        )
        valid = is_class(target, logits.shape[1]) & ~equals(target, self.ignore_index)
        easy = losses <= -math.log(threshold)  # a loss that is NaN is not easy
        if least := min(self.ohem_min_kept, target.numel()):
            hardest = torch.where(valid, losses, -math.inf).flatten().topk(least, sorted=False).values
            easy &= losses < hardest.min()
        return (valid & ~easy).to(losses.dtype)

    def extra_repr(self) -> str:
        ohem = "" if self.ohem_threshold is None else f", ohem {self.ohem_threshold}, {self.ohem_min_kept}"
        return f"ignore_index={self.ignore_index}, reduction={self.reduction!r}{ohem}"
