"""PPM: the pyramid pooling module of PSPNet (Zhao et al., CVPR 2017, section 3.2 and figure 3)."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import nn

from ..checks import check_bins, check_features
from ..functional import pyramid_pool, upsample_concat
from ..geometry import is_channels_last
from ..tracing import is_transformed
from .calls import remember, tell
from .levels import autocasts, kinds_of, of_one_width, reduce_levels
from .plain_ppm import plain_ppm, upsampled
from .reading import Level, leaves_of, read_level

_LOG = logging.getLogger(__name__)


class PPM(nn.Module):
    """Pool to every bin, 1x1 convolution, batch norm, ReLU, upsample, concatenate with the input.

    The parameters, their names and the state_dict are those of semseg's PPM (hszhao/semseg, model/pspnet.py):
    `features.{k}.1.weight` (reduction_dim, in_dim, 1, 1) and `features.{k}.2.*` for bin k. The levels are what the modules
    are when they are called: who replaces, removes or hooks a submodule gets what plain PyTorch computes with it. A
    submodule is called itself where calling it does anything but what the kernels compute. For a level's convolution, norm
    or activation (another norm than batch norm, hooks, a forward of its own), pooling and upsampling still run on the
    kernels. Where a level is no average pooling, 1x1 convolution, norm and activation, or its pooling or the level itself
    must be called, the whole pyramid runs in plain PyTorch.

    Args:
        in_dim: channels C of the input.
        reduction_dim: channels R each level is reduced to.
        bins: cells per axis of each level, as the module is made.
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
        read = self.read()
        if isinstance(read, str):
            tell(_LOG, "PPM: its modules are called, and upsampled by PyTorch: %s", read)
            return plain_ppm(x, self.features, self.align_corners)
        return ppm(x, *read, self.align_corners)

    def check(self, x: torch.Tensor) -> None:
        """Raise where x is not features of `in_dim` channels."""
        check_features("PPM", x)
        if x.shape[1] != self.in_dim:
            raise ValueError(f"PPM: x must have in_dim = {self.in_dim} channels, got {tuple(x.shape)}")

    def read(self) -> tuple[list[int], list[Level]] | str:
        """Bins and layers of every level, as its modules are now; or why they are not read, but must be called."""
        bins, levels = [], []
        for k, module in enumerate(self.features):
            layers = leaves_of(module, (nn.Sequential,))
            level = layers if isinstance(layers, str) else read_level(layers)
            if isinstance(level, str):
                return f"level {k} {level}"
            bins.append(level[0])
            levels.append(level[1])
        return (bins, levels) if levels else "there are no levels"


remember(PPM)


def ppm(
    x: torch.Tensor, bins: Sequence[int], levels: Sequence[Level], align_corners: bool, x_last: bool = False
) -> torch.Tensor:
    """The pyramid pooling module of given layers: x and the upsampled levels concatenated, x first or last."""
    order = order_of(len(bins), x_last)
    kinds = kinds_of(levels)
    width = of_one_width(kinds)
    if width is not None and _writes_in_place(x):
        # The pooling pass copies x to where the result will be: x is read once.
        reduced = len(levels) * width
        pyramid, out = pyramid_pool(x, bins, reserve=(reduced, 0) if x_last else (0, reduced))
        packed = cast(torch.Tensor, reduce_levels(pyramid, bins, levels, kinds))
        return upsample_concat(out, packed, bins, align_corners, order, in_place=True)
    pyramid, x = pyramid_pool(x, bins, return_input=True)
    return concatenation(x, reduce_levels(pyramid, bins, levels, kinds), bins, align_corners, order)


def order_of(levels: int, x_last: bool) -> tuple[int, ...]:
    """The blocks of the concatenation, as `upsample_concat` takes them."""
    return (*range(levels), -1) if x_last else (-1, *range(levels))


def concatenation(
    x: torch.Tensor,
    reduced: torch.Tensor | Sequence[torch.Tensor],
    bins: Sequence[int],
    align_corners: bool,
    order: Sequence[int],
) -> torch.Tensor:
    """`upsample_concat` of what `reduce_levels` returns: a packed pyramid, or maps of any sizes, by PyTorch."""
    if isinstance(reduced, torch.Tensor):
        return upsample_concat(x, reduced, bins, align_corners, order)
    maps = [*upsampled(x, reduced, align_corners), x]
    return torch.cat([maps[k] for k in order], 1)


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
    if not autocasts(device):
        return True
    return torch.promote_types(x.dtype, torch.get_autocast_dtype(device)) == x.dtype
