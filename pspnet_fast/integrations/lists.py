"""Families that keep their levels in a list: TorchSeg, yassouali, bubbliiiing, speedinghzl, Lextal, kazuto1011, tutorials."""

from __future__ import annotations

from typing import cast

from torch import nn

from .family import X_FIRST, X_LAST, Family, FamilyError, ListedLevels, Pyramid, holds_levels, leaves, pyramid_of

_FEW = 8  # layers after the concatenation: a bottleneck and a classifier


class TorchSeg(ListedLevels):
    """ycszen/TorchSeg, model/pspnet: `PyramidPooling`, with the classifier inside."""

    name = "TorchSeg"
    levels = "ppm"
    after = ("conv6",)
    layouts = X_FIRST


class Yassouali(ListedLevels):
    """yassouali/pytorch-segmentation and bubbliiiing/pspnet-pytorch: `_PSPModule`, with the bottleneck inside."""

    name = "yassouali"
    levels = "stages"
    after = ("bottleneck",)
    layouts = X_FIRST


class Speedinghzl(ListedLevels):
    """speedinghzl/pytorch-segmentation-toolbox: `PSPModule`, x last, with the bottleneck inside."""

    name = "speedinghzl"
    levels = "stages"
    after = ("bottleneck",)
    layouts = X_LAST


class Lextal(ListedLevels):
    """Lextal/pspnet-pytorch: `PSPModule`, levels of all channels without norm and activation, x last."""

    name = "Lextal"
    levels = "stages"
    after = ("bottleneck", "relu")
    layouts = X_LAST


class Kazuto1011(ListedLevels):
    """kazuto1011/pspnet-pytorch: `_PyramidPoolModule`, bins 6, 3, 2, 1."""

    name = "kazuto1011"
    levels = "stages"
    layouts = X_FIRST


class Tutorial(Family):
    """One list of levels under any name, and at most a few layers after the concatenation."""

    name = "tutorial"

    def pyramid(self, module: nn.Module) -> Pyramid | None:
        children = module._modules.values()
        lists = [child for child in children if type(child) is nn.ModuleList and holds_levels(child)]
        if len(lists) != 1:
            return None
        after = {name: child for name, child in module._modules.items() if child is not None and child is not lists[0]}
        if sum(len(leaves(child)) for child in after.values()) > _FEW:
            raise FamilyError(f"its forward does more than pooling: it holds {', '.join(after)}")
        levels = [leaves(level) for level in cast("list[nn.Module]", lists[0]._modules.values())]
        return pyramid_of(levels, after.values())
