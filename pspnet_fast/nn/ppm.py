"""PPM: the pyramid pooling module of PSPNet (Zhao et al., CVPR 2017, section 3.2 and figure 3)."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import cast

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..checks import check_bins, check_features
from ..functional import pyramid_norm, pyramid_pool, pyramid_project, upsample_concat
from ..geometry import accumulation_dtype, is_channels_last, levels
from .sync_batch_norm import SyncBatchNorm

_LOG = logging.getLogger(__name__)


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
                nn.Conv2d(in_dim, reduction_dim, kernel_size=1, bias=False),
                norm_layer(reduction_dim),
                nn.ReLU(inplace=True),
            )
            for b in self.bins
        )

    def extra_repr(self) -> str:
        return f"bins={self.bins}, align_corners={self.align_corners}"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.check(x)
        if self._beyond_the_kernels() is None and _writes_in_place(x):
            weight = cast(nn.Conv2d, cast(nn.Sequential, self.features[0])[1]).weight
            # The pooling pass copies x to where the result will be: x is read once.
            pyramid, out = pyramid_pool(x, self.bins, reserve=(0, len(self.bins) * weight.shape[0]))
            return upsample_concat(out, self._by_kernels(pyramid), self.bins, self.align_corners, in_place=True)
        pyramid, x = pyramid_pool(x, self.bins, return_input=True)
        return upsample_concat(x, self.reduce(pyramid), self.bins, self.align_corners)

    def check(self, x: torch.Tensor) -> None:
        """Raise where x is not features of `in_dim` channels."""
        check_features("PPM", x)
        if x.shape[1] != self.in_dim:
            raise ValueError(f"PPM: x must have in_dim = {self.in_dim} channels, got {tuple(x.shape)}")

    def reduce(self, pyramid: torch.Tensor) -> torch.Tensor:
        """The pooled pyramid (N, S, C) to (N, S, R): every level's 1x1 convolution, norm and activation."""
        reason = self._beyond_the_kernels()
        if reason is None:
            return self._by_kernels(pyramid)
        _LOG.debug("PPM: convolution, norm and activation run on the submodules: %s", reason)
        return self._by_submodules(pyramid)

    def _beyond_the_kernels(self) -> str | None:
        """Why the submodules are not a convolution, a batch norm and a ReLU that all levels share a mode of, or None."""
        norms = (nn.BatchNorm2d, nn.SyncBatchNorm, SyncBatchNorm)
        kinds = ((nn.AdaptiveAvgPool2d,), (nn.Conv2d,), norms, (nn.ReLU,))
        first = cast(_BatchNorm, cast(nn.Sequential, self.features[0])[2])
        for k, level in enumerate(cast("list[nn.Sequential]", self.features)):
            if len(level) != len(kinds):
                return f"features.{k} holds {len(level)} modules"
            for i, (module, kind) in enumerate(zip(level, kinds, strict=True)):
                if type(module) not in kind:
                    return f"features.{k}.{i} is {type(module).__name__}"
                if has_hooks(module):
                    return f"features.{k}.{i} has hooks"
            if cast(nn.Conv2d, level[1]).bias is not None:
                return f"features.{k}.1 has a bias"
            norm = cast(_BatchNorm, level[2])
            if _mode(norm) != _mode(first):
                return f"features.{k}.2 is in another mode than features.0.2"
        return None

    def _by_submodules(self, pyramid: torch.Tensor) -> torch.Tensor:
        """(N, S, C) to (N, S, R): every level through its own convolution, norm and activation."""
        reduced = []
        for b, level, modules in zip(self.bins, levels(pyramid, self.bins), self.features, strict=True):
            y = level.transpose(1, 2).unflatten(2, (b, b))
            for module in list(cast(nn.Sequential, modules))[1:]:
                y = module(y)
            reduced.append(y.flatten(2).transpose(1, 2))
        return torch.cat(reduced, 1)

    def _by_kernels(self, pyramid: torch.Tensor) -> torch.Tensor:
        """(N, S, C) to (N, S, R) by pyramid_project and, in training, pyramid_norm."""
        weights = [cast(nn.Conv2d, cast(nn.Sequential, level)[1]).weight.flatten(1) for level in self.features]
        norms = [cast(_BatchNorm, cast(nn.Sequential, level)[2]) for level in self.features]
        first = norms[0]
        scales: list[torch.Tensor] | None = [norm.weight for norm in norms] if first.affine else None
        shifts: list[torch.Tensor] | None = [norm.bias for norm in norms] if first.affine else None
        if first.training or first.running_mean is None:
            projected = pyramid_project(pyramid, weights, self.bins, relu=False)
            tracked = first.training and first.track_running_stats
            return pyramid_norm(
                projected,
                self.bins,
                running_mean=[cast(torch.Tensor, norm.running_mean) for norm in norms] if tracked else None,
                running_var=[cast(torch.Tensor, norm.running_var) for norm in norms] if tracked else None,
                weight=scales,
                bias=shifts,
                training=True,
                momentum=[_count_batch(norm) for norm in norms] if tracked else 0.0,
                eps=first.eps,
                process_group=_process_group(first),
            )
        # Evaluation: the norm is a scale and a shift of the convolution's output, applied as it is computed.
        wide = accumulation_dtype(pyramid.dtype)
        mean = torch.stack([cast(torch.Tensor, norm.running_mean) for norm in norms]).to(wide)
        var = torch.stack([cast(torch.Tensor, norm.running_var) for norm in norms]).to(wide)
        scale = torch.rsqrt(var + first.eps)
        if scales is None or shifts is None:
            return pyramid_project(pyramid, weights, self.bins, scale, -mean * scale)
        scale = scale * torch.stack(scales)
        return pyramid_project(pyramid, weights, self.bins, scale, torch.stack(shifts) - mean * scale)


def _writes_in_place(x: torch.Tensor) -> bool:
    """Whether the result may be begun by the pooling pass: it has x's dtype, nothing traces a training step, and it pays.

    torch.compile before 2.13 takes no autograd node that writes in place, so a compiled training step reads x twice. On the
    CPU in channels_last each page of the result would be written by two passes, which costs more than a read of x.
    """
    if torch.compiler.is_compiling() and torch.is_grad_enabled():
        return False
    if x.device.type == "cpu" and is_channels_last(x):
        return False
    device = x.device.type
    if not (torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)):
        return True
    return torch.promote_types(x.dtype, torch.get_autocast_dtype(device)) == x.dtype


def has_hooks(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def _mode(norm: _BatchNorm) -> tuple[bool, bool, float, bool, bool]:
    synchronised = isinstance(norm, nn.SyncBatchNorm)
    return norm.training, norm.track_running_stats, norm.eps, norm.affine, synchronised


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
