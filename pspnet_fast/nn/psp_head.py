"""PSPHead: PSPNet's head (Zhao et al., CVPR 2017, figure 3), without the concatenation it is drawn with."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from typing import Literal, cast, get_args

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..functional import pyramid_conv2d, pyramid_pool
from ..geometry import accumulation_dtype
from ..tracing import is_transformed
from .calls import held, tell, weight_of, why_call
from .conv2d import conv2d
from .levels import NORMS, reduce_levels
from .ppm import PPM, concatenation, order_of
from .reading import Level

_LOG = logging.getLogger(__name__)

Head = Literal["factorised", "concat"]


def check_head(what: str, head: str) -> None:
    if head not in get_args(Head):
        raise ValueError(f"{what}: head must be 'factorised' or 'concat', got {head!r}")


def classifier(
    in_channels: int,
    channels: int,
    classes: int,
    dropout: float,
    norm_layer: Callable[[int], nn.Module],
    kernel_sizes: tuple[int, int] = (3, 1),
) -> nn.Sequential:
    """The bottleneck with its norm and activation, and the convolution to the classes."""
    first, last = kernel_sizes
    return nn.Sequential(
        nn.Conv2d(in_channels, channels, first, padding=first // 2, bias=False),
        norm_layer(channels),
        nn.ReLU(inplace=True),
        nn.Dropout2d(p=dropout),
        nn.Conv2d(channels, classes, last, padding=last // 2),
    )


class PSPHead(nn.Module):
    """The pyramid pooling module, the bottleneck and the classifier.

    Parameters, names and state_dict are those of semseg's PSPNet: `ppm.features.{k}.1.weight`, `ppm.features.{k}.2.*`,
    `cls.0.weight` (channels, in_dim + len(bins) * R, k, k), `cls.1.*`, `cls.4.*`.

    The convolution of a concatenation is the sum of its parts' convolutions. The features' part is a convolution of half
    the work, the levels' part is computed from their cells (`pyramid_conv2d`), and neither the upsampled levels nor the
    concatenation exist. Where the modules are not what this computes (another convolution, hooks on the convolution or
    on `ppm`, a level that must be called), the head is `cls(ppm(x))`.

    Args:
        in_dim: channels C of the features.
        reduction_dim: channels R each level is reduced to.
        channels: channels between the bottleneck and the classifier.
        classes: number of classes K.
        bins: cells per axis of each level.
        dropout: probability that a channel is dropped before the classifier.
        kernel_size: of the bottleneck, 1 or 3.
        norm_layer: makes a norm from its channel count.
        align_corners: how the levels are upsampled.
        head: "factorised", or "concat" for `cls(ppm(x))`.

    Shapes:
        x (N, C, H, W) to logits (N, K, H, W).

    Raises:
        ValueError: a count below 1, another kernel size or head, and what `PPM` raises.
    """

    def __init__(
        self,
        in_dim: int,
        reduction_dim: int,
        channels: int,
        classes: int,
        bins: Sequence[int] = (1, 2, 3, 6),
        dropout: float = 0.1,
        kernel_size: int = 3,
        norm_layer: Callable[[int], nn.Module] = nn.BatchNorm2d,
        align_corners: bool = True,
        head: Head = "factorised",
    ) -> None:
        super().__init__()
        for name, value in (("channels", channels), ("classes", classes)):
            if value < 1:
                raise ValueError(f"PSPHead: {name} must be at least 1, got {value}")
        if kernel_size not in (1, 3):
            raise ValueError(f"PSPHead: kernel_size must be 1 or 3, got {kernel_size!r}")
        check_head("PSPHead", head)
        self.head: Head = head
        self.ppm = PPM(in_dim, reduction_dim, bins, norm_layer, align_corners)
        total = in_dim + len(self.ppm.bins) * reduction_dim
        self.cls = classifier(total, channels, classes, dropout, norm_layer, (kernel_size, 1))

    def extra_repr(self) -> str:
        return f"head={self.head!r}"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return psp_head(self.ppm, self.cls, x, self.head)


def psp_head(ppm: nn.Module, cls: nn.Sequential, x: torch.Tensor, head: Head = "factorised") -> torch.Tensor:
    """`cls(ppm(x))`, factorised where it can be."""
    if head == "concat":
        return cast(torch.Tensor, cls(ppm(x)))
    read = _read(ppm, cls)
    if isinstance(read, str):
        tell(_LOG, "psp_head: the levels are upsampled and concatenated: %s", read)
        return cast(torch.Tensor, cls(ppm(x)))
    ppm = cast(PPM, ppm)
    ppm.check(x)
    return bottleneck(x, *read, ppm.align_corners, list(cls))


def bottleneck(
    x: torch.Tensor,
    bins: Sequence[int],
    levels: Sequence[Level],
    align_corners: bool,
    layers: Sequence[nn.Module],
    x_last: bool = False,
) -> torch.Tensor:
    """`layers` over the concatenation of x and its upsampled levels, without that concatenation.

    Args:
        x: features (N, C, H, W).
        bins: cells per axis of each level.
        levels: their layers.
        align_corners: how the levels are upsampled.
        layers: a convolution of which `beyond_the_factorised_form` says None, and what follows it.
        x_last: whether x stands after the levels in the concatenation, not before them.
    """
    conv, rest = cast(nn.Conv2d, layers[0]), layers[1:]
    pyramid, x = pyramid_pool(x, bins, return_input=True)
    reduced = reduce_levels(pyramid, bins, levels)
    padding = cast("tuple[int, int]", conv.padding)[0]
    weight = weight_of(conv)
    if not isinstance(reduced, torch.Tensor):
        x = concatenation(x, reduced, bins, align_corners, order_of(len(bins), x_last))
        return _through(rest, conv2d(x, weight, padding))
    channels = x.shape[1]
    if x_last:
        of_levels, of_x = weight.split((weight.shape[1] - channels, channels), 1)
    else:
        of_x, of_levels = weight.split((channels, weight.shape[1] - channels), 1)
    y = conv2d(x, of_x, padding)
    size = (x.shape[2], x.shape[3])
    if is_transformed():  # vmap may have one of the two for every sample, and the other, which cannot take it in, once
        return _through(rest, y + pyramid_conv2d(reduced, of_levels, size, bins, padding, align_corners))
    if len(rest) > 1 and _folds(rest[0], rest[1], y, reduced, weight):
        scale, shift = _folded(cast(_BatchNorm, rest[0]), y)
        y = pyramid_conv2d(
            reduced, of_levels, size, bins, padding, align_corners, out=y, scale=scale, shift=shift, relu=True
        )
        return _through(rest[2:], y)
    y = pyramid_conv2d(reduced, of_levels, size, bins, padding, align_corners, out=y)
    return _through(rest, y)


def _through(modules: Iterable[nn.Module], y: torch.Tensor) -> torch.Tensor:
    for module in modules:
        y = module(y)
    return y


def beyond_the_factorised_form(conv: nn.Module) -> str | None:
    """Why a module is not the plain convolution that is the sum of its parts, or None."""
    if type(conv) is not nn.Conv2d:
        return f"it is {type(conv).__name__}"
    if reason := why_call(conv):
        return f"it {reason}"
    plain = conv.stride == conv.dilation == (1, 1) and conv.groups == 1 and held(conv, "bias") is None
    square = weight_of(conv).shape[2:] in ((1, 1), (3, 3)) and conv.padding in ((0, 0), (1, 1), (2, 2))
    if not plain or not square or conv.padding_mode != "zeros":
        return "it has a bias, a stride, a dilation, groups or another window"
    return None


def _read(ppm: nn.Module, cls: nn.Sequential) -> tuple[list[int], list[Level]] | str:
    """Bins and layers of a pyramid with a plain convolution over its concatenation; or why the modules are not both."""
    if type(ppm) is not PPM:
        return f"ppm is {type(ppm).__name__}"
    if type(cls) is not nn.Sequential or len(cls) < 3:
        return "cls is not a sequence of convolution, norm and activation"
    for name, module in (("ppm", ppm), ("cls", cls)):
        if reason := why_call(module):
            return f"{name} {reason}"
    if reason := beyond_the_factorised_form(cls[0]):
        return f"cls.0: {reason}"
    return ppm.read()


def _folds(norm: nn.Module, activation: nn.Module, *tensors: torch.Tensor) -> bool:
    """Whether norm and activation are a factor, a summand and a ReLU, and nobody asks for gradients."""
    if type(norm) not in NORMS or type(activation) is not nn.ReLU:
        return False
    if norm.training or held(norm, "running_mean") is None or why_call(norm) or why_call(activation):
        return False
    return not (torch.is_grad_enabled() and any(t.requires_grad for t in (*tensors, *norm.parameters())))


def _folded(norm: _BatchNorm, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    wide = accumulation_dtype(y.dtype)
    mean, var, weight, bias = (held(norm, name) for name in ("running_mean", "running_var", "weight", "bias"))
    scale = torch.rsqrt(cast(torch.Tensor, var).to(wide) + norm.eps)
    if weight is not None:
        scale = scale * weight
    shift = -cast(torch.Tensor, mean).to(wide) * scale
    return scale, shift if bias is None else shift + bias
