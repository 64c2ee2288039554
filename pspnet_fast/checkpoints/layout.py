"""Layout: which network a checkpoint's weights mean."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import nn

from ..models.checkpoint import CheckpointError
from ..models.pspnet import PSPNet, Stages
from ..models.resnet import LAYERS, STEMS, BasicBlock, Dilation, Stem
from ..nn.plain_ppm import Pooling
from .settings import check_settings


@dataclass(frozen=True)
class Layout:
    """Which network a checkpoint's weights mean, and how that is known.

    Attributes:
        family: of the names, as the command line has it.
        library: the same, as sentences have it.
        layers, width, stem, in_channels, stages, output_stride, dilation, dilate_second: of the backbone, see `ResNet` and
            `PSPNet`.
        bins, align_corners, kernel_sizes, bin1_norm, pooling, reduction, reduction_channels, bottleneck_channels,
            aux_channels: of the rest, see `PSPNet`.
        x_last: whether the checkpoint's bottleneck reads the levels and then x; ours reads x first, and its weight is turned.
        classes: number of classes; None where the checkpoint is a backbone alone.
        aux: whether there is an auxiliary head.
        assumed: names of attributes that are not in the weights, but the family's own or default.
        dropped: names in the checkpoint that mean nothing to the network.
        unwrapped: where in its file the weights were found, in sentences.
    """

    family: str
    library: str
    layers: int
    width: int
    stem: Stem
    in_channels: int = 3
    stages: Stages = 4
    output_stride: int = 8
    dilation: Dilation = "full"
    dilate_second: bool = True
    bins: tuple[int, ...] = ()
    align_corners: bool = True
    kernel_sizes: tuple[int, int] = (3, 1)
    bin1_norm: bool = True
    pooling: Pooling = "average"
    reduction: bool = True
    reduction_channels: int | None = None
    bottleneck_channels: int | None = None
    aux_channels: int | None = None
    x_last: bool = False
    classes: int | None = None
    aux: bool = False
    assumed: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()
    unwrapped: tuple[str, ...] = ()

    @property
    def network(self) -> bool:
        """Whether there is more than a backbone."""
        return self.classes is not None

    @property
    def basic_blocks(self) -> bool:
        return LAYERS[self.layers][0] is BasicBlock

    @property
    def dilated(self) -> bool:
        """Whether a stage is dilated."""
        return self.network and 2 ** (self.stages + 1) > self.output_stride

    @property
    def channels(self) -> tuple[int, int]:
        """Of the last two feature maps."""
        last = self.width * LAYERS[self.layers][0].expansion << (self.stages - 1)
        return last // 2, last

    @property
    def reduced(self) -> int:
        """Channels of each level."""
        return self.reduction_channels or self.channels[1] // len(self.bins)

    @property
    def inner(self) -> int:
        """Channels between the bottleneck and the classes."""
        return self.bottleneck_channels or max(self.channels[1] // 4, 1)

    def normal(self) -> Layout:
        """The same network, its settings as short as they can be, so that equal networks are equal layouts."""
        if not self.network:
            return replace(self, bins=(), assumed=())
        third, fourth = self.channels
        changes: dict[str, Any] = {}
        for name, default in (
            ("reduction_channels", fourth // len(self.bins)),
            ("bottleneck_channels", max(fourth // 4, 1)),
            ("aux_channels", max(third // 4, 1)),
        ):
            if getattr(self, name) == default or (name == "aux_channels" and not self.aux):
                changes[name] = None
        if not self.dilated:
            changes["dilation"] = "full"
        if not self.dilated or not self.basic_blocks:
            changes["dilate_second"] = True
        if 1 not in self.bins:
            changes["bin1_norm"] = True
        idle = [name for name in ("dilation", "dilate_second") if name in changes]
        return replace(self, **changes, assumed=tuple(name for name in self.assumed if name not in idle))

    def settings(self) -> dict[str, Any]:
        """PSPNet's arguments."""
        return {name: getattr(self, name) for name in SETTINGS}

    def recipe(self) -> dict[str, Any]:
        """What a recipe (`config.Recipe`) says of the network, in values that JSON knows.

        The images' channels are no setting of recipes, whose data has 3: they are read from the weights.
        """
        values = {"dataset": "list", "classes": self.classes, **self.settings()}
        del values["in_channels"]
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    def build(self, device: str = "cpu", classes: int | None = None) -> PSPNet:
        """The network, with random weights; for other classes than its own where they are given.

        Raises:
            CheckpointError: a backbone alone.
        """
        if self.classes is None:
            raise CheckpointError(
                f"{self.library}: a backbone alone has no classes: give the PSPNet that it is loaded into"
            )
        with torch.device(device):
            return PSPNet(**self.settings(), classes=classes or self.classes, aux=self.aux)

    def shapes(self) -> dict[str, torch.Size]:
        """Names and shapes of the network's tensors, or of the backbone's by PSPNet's names."""
        if self.network:
            return {name: tensor.shape for name, tensor in self.build("meta").state_dict().items()}
        with torch.device("meta"):
            net = PSPNet(layers=self.layers, width=self.width, stem=self.stem, in_channels=self.in_channels, aux=False)
        return {name: tensor.shape for name, tensor in net.state_dict().items() if name.startswith("layer")}

    def refuse_others(self, target: str, **only: object) -> None:
        """Raise where a setting is not the only one that `target` has.

        Raises:
            CheckpointError: with all of them.
        """
        others = [
            f"{name} {wanted!r}, got {getattr(self, name)!r}"
            for name, wanted in only.items()
            if getattr(self, name) != wanted
        ]
        if others:
            raise CheckpointError(f"{target}: the network must have {'; '.join(others)}: nothing there says otherwise")

    def report(self) -> list[str]:
        """Every setting that matters, and where it is from, a line each."""
        what = f"a PSPNet of {self.classes} classes" if self.network else "a backbone alone"
        if self.network:
            what += ", with an auxiliary head" if self.aux else ", without an auxiliary head"
        lines = [f"{self.library}: {what}"]
        for name in (*SETTINGS, "x_last") if self.network else _OF_BACKBONE:
            value = getattr(self, name)
            if value is None or (name in ("dilation", "dilate_second") and not self.dilated):
                continue
            shown = (
                f"{value} ({', '.join(map(str, STEMS[self.stem]))} channels of 64)" if name == "stem" else str(value)
            )
            lines.append(f"  {name:<20}{shown}{'   assumed: not in the weights' if name in self.assumed else ''}")
        lines += [f"  {sentence}" for sentence in self.unwrapped]
        if self.x_last:
            lines.append("  the bottleneck's weight is turned so that x comes first")
        if self.dropped:
            first = ", ".join(self.dropped[:3])
            more = f" and {len(self.dropped) - 3} more" if len(self.dropped) > 3 else ""
            lines.append(f"  dropped, as the network has no use for them: {first}{more}")
        return lines


SETTINGS = (
    *(
        "layers",
        "width",
        "stem",
        "in_channels",
        "stages",
        "output_stride",
        "dilation",
        "dilate_second",
        "bins",
        "align_corners",
    ),
    *("kernel_sizes", "bin1_norm", "pooling", "reduction"),
    *("reduction_channels", "bottleneck_channels", "aux_channels"),
)
"""The attributes that are PSPNet's arguments of the same names."""

_OF_BACKBONE = ("layers", "width", "stem", "in_channels")

_NOWHERE = {"stride_in": "conv2", "conv_bias": False, "share_stage3": False, "use_ppm": True}
"""Arguments that no checkpoint's layout says, and what they have to be."""


def layout_of(net: PSPNet) -> Layout:
    """The layout of a network that there is.

    Raises:
        CheckpointError: it has a backbone of its own, or settings that no layout says.
    """
    if net.settings is None:
        raise CheckpointError("PSPNet: a network with a backbone of its own has no layout that a checkpoint could have")
    for name, wanted in _NOWHERE.items():
        if net.settings[name] != wanted:
            raise CheckpointError(f"PSPNet: {name} must be {wanted!r} for checkpoints, got {net.settings[name]!r}")
    settings = {name: net.settings[name] for name in SETTINGS}
    classes = cast(nn.Conv2d, net.cls[4]).out_channels
    return Layout("pspnet_fast", "pspnet_fast", **settings, classes=classes, aux=net.aux is not None).normal()


def known_settings(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe's settings of the network."""
    values = {name: recipe[name] for name in SETTINGS if name in recipe}
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    check_settings("the recipe in the file", values)
    return values


def differences(layout: Layout, other: Layout) -> list[str]:
    """The settings in which two networks are not the same, and both values."""
    names = SETTINGS if layout.network and other.network else _OF_BACKBONE
    return [
        f"{name} is {getattr(layout, name)!r}{' (assumed)' if name in layout.assumed else ''}, the model's {theirs!r}"
        for name in names
        if getattr(layout, name) != (theirs := getattr(other, name))
        and (name != "aux_channels" or (layout.aux and other.aux))
    ]
