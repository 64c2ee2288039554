"""PlainPPM: the pyramid pooling module in plain PyTorch, and the variants of it that the paper compares."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import nn

from ..checks import check_bins

Pooling = Literal["average", "max"]


class PlainPPM(nn.Module):
    """The pyramid pooling module as it is usually written, with the parameters and keys of `pspnet_fast.PPM`.

    With average pooling and reduction it is what `PPM` computes. Table 1 of the paper (Zhao et al., CVPR 2017) compares it
    with maximum pooling, and with levels that keep all channels of the input (no dimension reduction, "DR" there): for these
    there are no kernels.

    Args:
        in_dim: channels C of the input.
        reduction_dim: channels R each level is reduced to; not read without reduction.
        bins: cells per axis of each level.
        norm_layer: makes a norm from its channel count.
        align_corners: how the levels are upsampled.
        pooling: "average" or "max", adaptive both.
        reduction: whether a 1x1 convolution, a norm and a ReLU follow the pooling.

    Shapes:
        x (N, C, H, W) to (N, C + len(bins) * R, H, W), R = C without reduction.

    Raises:
        ValueError: empty or not positive bins, another pooling.
    """

    def __init__(
        self,
        in_dim: int,
        reduction_dim: int,
        bins: Sequence[int] = (1, 2, 3, 6),
        norm_layer: Callable[[int], nn.Module] = nn.BatchNorm2d,
        align_corners: bool = True,
        pooling: Pooling = "average",
        reduction: bool = True,
    ) -> None:
        super().__init__()
        if pooling not in get_args(Pooling):
            raise ValueError(f"PlainPPM: pooling must be 'average' or 'max', got {pooling!r}")
        self.bins = check_bins("PlainPPM", bins)
        self.align_corners = align_corners
        pool = nn.AdaptiveAvgPool2d if pooling == "average" else nn.AdaptiveMaxPool2d
        self.features = nn.ModuleList()
        for b in self.bins:
            level: list[nn.Module] = [pool(b)]
            if reduction:
                conv = nn.Conv2d(in_dim, reduction_dim, kernel_size=1, bias=False)
                level += [conv, norm_layer(reduction_dim), nn.ReLU(inplace=True)]
            self.features.append(nn.Sequential(*level))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return plain_ppm(x, self.features, self.align_corners)


def plain_ppm(x: torch.Tensor, levels: Iterable[nn.Module], align_corners: bool) -> torch.Tensor:
    """The concatenation of x and every level of it, upsampled: in plain PyTorch, by calling the modules."""
    return torch.cat([x, *upsampled(x, (level(x) for level in levels), align_corners)], 1)


def upsampled(x: torch.Tensor, maps: Iterable[torch.Tensor], align_corners: bool) -> list[torch.Tensor]:
    """Maps (N, R, h, w) of any h and w, brought to the size of x in plain PyTorch."""
    return [F.interpolate(y, x.shape[2:], mode="bilinear", align_corners=align_corners) for y in maps]
