"""PPM: the pyramid pooling module of PSPNet (Zhao et al., CVPR 2017, section 3.2 and figure 3)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import nn

from ..checks import check_bins, check_features
from ..functional import pyramid_pool, upsample_concat
from ..geometry import is_channels_last
from ..tracing import is_transformed
from .levels import Level, beyond_the_kernels, reduce_levels


class PPM(nn.Module):
    """Pool to every bin, 1x1 convolution, batch norm, ReLU, upsample, concatenate with the input.

    The parameters, their names and the state_dict are those of semseg's PPM (hszhao/semseg, model/pspnet.py):
    `features.{k}.1.weight` (reduction_dim, in_dim, 1, 1) and `features.{k}.2.*` for bin k. The submodules hold the
    parameters; their own forward is not called, unless they are not what the kernels compute (another norm than batch
    norm, hooks on them, norms in different modes): then pooling and upsampling still run on the kernels, and what lies
    between on the submodules.

    Args:
        in_dim: channels C of the input.
        reduction_dim: channels R each level is reduced to.
        bins: cells per axis of each level.
        norm_layer: makes a norm from its channel count. `nn.SyncBatchNorm.convert_sync_batchnorm` works as ever, with
            one collective for all levels.
        align_corners: how the levels are upsampled.
        bin1_norm: without it, a level of bin 1 has a bias, `features.{k}.1.bias`, in place of a norm, as in
            segmentation_models_pytorch: it then trains on a batch of 1, too.

    Shapes:
        x (N, C, H, W) to (N, C + len(bins) * R, H, W), in x's memory format.

    Raises:
        ValueError: in_dim or reduction_dim below 1, bins empty or not positive, an x of other channels than in_dim; in
            training a batch of 1 with bin 1, whose batch norm sees one value per channel.
    """

    def __init__(
        self,
        in_dim: int,
        reduction_dim: int,
        bins: Sequence[int] = (1, 2, 3, 6),
        norm_layer: Callable[[int], nn.Module] = nn.BatchNorm2d,
        align_corners: bool = True,
        bin1_norm: bool = True,
    ) -> None:
        super().__init__()
        for name, value in (("in_dim", in_dim), ("reduction_dim", reduction_dim)):
            if value < 1:
                raise ValueError(f"PPM: {name} must be at least 1, got {value}")
        self.in_dim = in_dim
        self.bins = check_bins("PPM", bins)
        self.align_corners = align_corners
        self.features = nn.ModuleList(
            nn.Sequential(
                nn.AdaptiveAvgPool2d(b),
                nn.Conv2d(in_dim, reduction_dim, kernel_size=1, bias=b == 1 and not bin1_norm),
                norm_layer(reduction_dim) if b > 1 or bin1_norm else nn.Identity(),
                nn.ReLU(inplace=True),
            )
            for b in self.bins
        )

    def extra_repr(self) -> str:
        return f"bins={self.bins}, align_corners={self.align_corners}"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.check(x)
        return ppm(x, self.bins, self.levels(), self.align_corners)

    def check(self, x: torch.Tensor) -> None:
        """Raise where x is not features of `in_dim` channels."""
        check_features("PPM", x)
        if x.shape[1] != self.in_dim:
            raise ValueError(f"PPM: x must have in_dim = {self.in_dim} channels, got {tuple(x.shape)}")

    def levels(self) -> list[Level]:
        """The layers of every level, as they are now."""
        found = []
        for level in cast("list[nn.Sequential]", self.features):
            if len(level) == 4:
                conv, norm, activation = list(level)[1:]
                found.append(Level(conv, None if type(norm) is nn.Identity else norm, activation))
            else:
                found.append(Level(level[1:], None, None))
        return found


def ppm(
    x: torch.Tensor, bins: Sequence[int], levels: Sequence[Level], align_corners: bool, x_last: bool = False
) -> torch.Tensor:
    """The pyramid pooling module of given layers: x and the upsampled levels concatenated, x first or last."""
    order = (*range(len(bins)), -1) if x_last else (-1, *range(len(bins)))
    if all(beyond_the_kernels(level) is None for level in levels) and _writes_in_place(x):
        # The pooling pass copies x to where the result will be: x is read once.
        reduced = sum(level.channels for level in levels)
        pyramid, out = pyramid_pool(x, bins, reserve=(reduced, 0) if x_last else (0, reduced))
        return upsample_concat(out, reduce_levels(pyramid, bins, levels), bins, align_corners, order, in_place=True)
    pyramid, x = pyramid_pool(x, bins, return_input=True)
    return upsample_concat(x, reduce_levels(pyramid, bins, levels), bins, align_corners, order)


def _writes_in_place(x: torch.Tensor) -> bool:
    """Whether the result may be begun by the pooling pass: it has x's dtype, nothing traces a training step, and it pays.

    torch.compile before 2.13 takes no autograd node that writes in place, so a compiled training step reads x twice. On the
    CPU in channels_last each page of the result would be written by two passes, which costs more than a read of x.
    """
    if is_transformed() or (torch.compiler.is_compiling() and torch.is_grad_enabled()):
        return False
    if x.device.type == "cpu" and is_channels_last(x):
        return False
    device = x.device.type
    if not (torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)):
        return True
    return torch.promote_types(x.dtype, torch.get_autocast_dtype(device)) == x.dtype
