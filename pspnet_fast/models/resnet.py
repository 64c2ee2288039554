"""ResNet (He et al., CVPR 2016) as a dilated backbone, in the variants that PSPNets are trained and published with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, TypedDict, cast

import torch
from torch import nn

from ..checks import check_features
from .checkpoint import Loadable

Stem = Literal["deep", "v1c", "plain"]
Dilation = Literal["full", "halved"]
StrideIn = Literal["conv2", "conv1"]
NormLayer = Callable[[int], nn.Module]


class Choices(TypedDict):
    """The choices of `ResNet` by name, for those who pass them on."""

    stem: Stem
    output_stride: int
    dilation: Dilation
    dilate_second: bool
    stride_in: StrideIn
    conv_bias: bool
    share_stage3: bool
    width: int
    in_channels: int


@dataclass(frozen=True)
class _Style:
    """What all blocks of one network share, and the two things every block is made of."""

    stride_in: StrideIn
    conv_bias: bool
    norm_layer: NormLayer

    def conv(self, in_channels: int, out_channels: int, kernel: int, stride: int = 1, dilation: int = 1) -> nn.Conv2d:
        """A convolution padded so that stride 1 keeps the size."""
        padding = dilation * (kernel // 2)
        return nn.Conv2d(in_channels, out_channels, kernel, stride, padding, dilation, bias=self.conv_bias)

    def shortcut(self, in_channels: int, out_channels: int, stride: int) -> nn.Sequential | None:
        if stride == 1 and in_channels == out_channels:
            return None
        return nn.Sequential(self.conv(in_channels, out_channels, 1, stride), self.norm_layer(out_channels))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions, the first with the stride. `dilations` are theirs, in order."""

    expansion = 1

    def __init__(self, in_channels: int, width: int, stride: int, dilations: tuple[int, int], style: _Style) -> None:
        super().__init__()
        self.conv1 = style.conv(in_channels, width, 3, stride, dilations[0])
        self.bn1 = style.norm_layer(width)
        self.conv2 = style.conv(width, width, 3, 1, dilations[1])
        self.bn2 = style.norm_layer(width)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = style.shortcut(in_channels, width, stride)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += x if self.downsample is None else self.downsample(x)
        activated: torch.Tensor = self.relu(out)
        return activated


class Bottleneck(nn.Module):
    """A 1x1, a 3x3 with the first of `dilations`, and a 1x1 convolution to four times the width."""

    expansion = 4

    def __init__(self, in_channels: int, width: int, stride: int, dilations: tuple[int, int], style: _Style) -> None:
        super().__init__()
        first, second = (stride, 1) if style.stride_in == "conv1" else (1, stride)
        self.conv1 = style.conv(in_channels, width, 1, first)
        self.bn1 = style.norm_layer(width)
        self.conv2 = style.conv(width, width, 3, second, dilations[0])
        self.bn2 = style.norm_layer(width)
        self.conv3 = style.conv(width, width * self.expansion, 1)
        self.bn3 = style.norm_layer(width * self.expansion)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = style.shortcut(in_channels, width * self.expansion, stride)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        out += x if self.downsample is None else self.downsample(x)
        activated: torch.Tensor = self.relu(out)
        return activated


class RepeatedStage(nn.Sequential):
    """A first block, then one block applied `times` times: one set of weights, and one set of running statistics."""

    def __init__(self, blocks: Sequence[nn.Module], times: int) -> None:
        super().__init__(*blocks)
        self.times = times

    def extra_repr(self) -> str:
        return f"times={self.times}"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first, repeated = self
        out: torch.Tensor = first(x)
        for _ in range(self.times):
            out = repeated(out)
        return out


STEMS: dict[str, tuple[int, ...]] = {"deep": (64, 64, 128), "v1c": (32, 32, 64), "plain": (64,)}
LAYERS: dict[int, tuple[type[BasicBlock] | type[Bottleneck], tuple[int, int, int, int]]] = {
    18: (BasicBlock, (2, 2, 2, 2)),
    34: (BasicBlock, (3, 4, 6, 3)),
    50: (Bottleneck, (3, 4, 6, 3)),
    101: (Bottleneck, (3, 4, 23, 3)),
    152: (Bottleneck, (3, 8, 36, 3)),
    269: (Bottleneck, (3, 30, 48, 8)),
}


class ResNet(Loadable):
    """A ResNet whose last stages may be dilated instead of strided.

    Parameter names are torchvision's: `conv1`, `bn1`, `layer1.0.conv1`, ..., `fc`; the stems of three convolutions add
    `conv2`, `bn2`, `conv3`, `bn3`, as semseg's ImageNet weights do. With `classes=1000` both families' state_dicts load
    strictly; without a classifier their `fc.*` is left out.

    The first stage works at a quarter of the input. Each of the next three halves the map until `output_stride` is
    reached; from there on a stage doubles the dilation of its 3x3 convolutions instead.

    Convolutions start as kaiming-normal, fan out, for ReLU (He et al., ICCV 2015; semseg and torchvision do), their
    biases at zero; norms and classifier as PyTorch makes them.

    Args:
        layers: 18 or 34 (basic blocks), 50, 101, 152 or 269 (bottlenecks; 269 has 3, 30, 48 and 8 of them).
        stem: "deep", three 3x3 convolutions of 64, 64 and 128 channels (semseg); "v1c", of 32, 32 and 64 (mmseg);
            "plain", one 7x7 of 64 (torchvision).
        output_stride: 8, 16 or 32.
        dilation: of the first block of a dilated stage. "full", the stage's own (semseg, Caffe); "halved", that of the
            stage before (mmseg's contract_dilation, torchvision's replace_stride_with_dilation). Weights of one load
            into the other and compute something else. In a basic block it is that of the first convolution.
        dilate_second: whether the second convolution of a basic block has the stage's dilation, in every block; mmseg never
            dilates it (mmseg/models/backbones/resnet.py, BasicBlock). Bottlenecks have one dilated convolution.
        stride_in: the convolution of a bottleneck that has the stride, "conv2", the 3x3 (semseg, torchvision), or
            "conv1", the first 1x1 (He et al., Caffe). A basic block has it in its first convolution.
        conv_bias: whether the convolutions have biases.
        norm_layer: makes a norm from its channel count.
        share_stage3: make the identity blocks of the third stage (`layer3`) one block, `layer3.1`, applied as often as
            there would be blocks: 22 times in ResNet-101.
        width: channels inside the first stage's blocks; every other count of channels goes with it. 64 is the ResNet of the
            paper, less is a smaller network for smaller tasks.
        in_channels: channels of the images: 3, or 1 of grey ones, 4 with a depth or an infrared one, 13 of Sentinel-2.
        classes: build the classifier `fc` on top, for so many classes.

    Shapes:
        x (N, in_channels, H, W) to the last two feature maps (N, C3, H3, W3) and (N, C4, H4, W4), where H4 is
        (H - 1) // output_stride + 1 and `channels` holds C3 and C4: 4 and 8 widths, four times that with bottlenecks.
        With `classes`, to logits (N, classes).

    Raises:
        ValueError: an argument outside the choices above, `classes` or `in_channels` below 1, an x not of this shape.
        TypeError: an x that is not a floating-point tensor.
    """

    optional_prefixes = ("fc.",)
    first_convolution = "conv1.weight"

    def __init__(
        self,
        layers: int = 50,
        *,
        stem: Stem = "deep",
        output_stride: int = 8,
        dilation: Dilation = "full",
        dilate_second: bool = True,
        stride_in: StrideIn = "conv2",
        conv_bias: bool = False,
        norm_layer: NormLayer = nn.BatchNorm2d,
        share_stage3: bool = False,
        width: int = 64,
        in_channels: int = 3,
        classes: int | None = None,
    ) -> None:
        super().__init__()
        _check_choice("layers", layers, list(LAYERS))
        _check_choice("stem", stem, list(STEMS))
        _check_choice("output_stride", output_stride, (8, 16, 32))
        _check_choice("dilation", dilation, ("full", "halved"))
        _check_choice("stride_in", stride_in, ("conv2", "conv1"))
        if classes is not None and classes < 1:
            raise ValueError(f"ResNet: classes must be at least 1, got {classes}")
        if in_channels < 1:
            raise ValueError(f"ResNet: in_channels must be at least 1, got {in_channels}")
        if width < 2 or width % 2:
            raise ValueError(f"ResNet: width must be even and at least 2, got {width}")
        block, depths = LAYERS[layers]
        style = _Style(stride_in, conv_bias, norm_layer)

        kernel = 7 if stem == "plain" else 3
        widths = (in_channels, *(channels * width // 64 for channels in STEMS[stem]))
        for i in range(1, len(widths)):
            self.add_module(f"conv{i}", style.conv(widths[i - 1], widths[i], kernel, 2 if i == 1 else 1))
            self.add_module(f"bn{i}", norm_layer(widths[i]))
        self.stem_convolutions = len(widths) - 1
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)

        in_channels, reached, rate = widths[-1], 4, 1
        stages = []
        for k, depth in enumerate(depths):
            stride, entry_rate = (1 if k == 0 else 2), rate
            if reached * stride > output_stride:
                stride, rate = 1, 2 * rate
                entry_rate = rate if dilation == "full" else entry_rate
            reached *= stride
            inner, second_rate = width * 2**k, rate if dilate_second else 1
            blocks: list[nn.Module] = [block(in_channels, inner, stride, (entry_rate, second_rate), style)]
            in_channels = inner * block.expansion
            shared = share_stage3 and k == 2
            for _ in range(1, 2 if shared else depth):
                blocks.append(block(in_channels, inner, 1, (rate, second_rate), style))
            stages.append(RepeatedStage(blocks, depth - 1) if shared else nn.Sequential(*blocks))
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        self.channels = (in_channels // 2, in_channels)

        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        self.fc = None if classes is None else nn.Linear(in_channels, classes)

    def stem(self) -> list[nn.Module]:
        """The modules before `layer1`, in the order they are applied: PSPNet's `layer0`."""
        modules: list[nn.Module] = []
        for i in range(1, self.stem_convolutions + 1):
            modules += [self.get_submodule(f"conv{i}"), self.get_submodule(f"bn{i}"), self.relu]
        return [*modules, self.maxpool]

    def features(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The last two feature maps."""
        check_image("ResNet", x, self.get_submodule("conv1"))
        for module in self.stem():
            x = module(x)
        third: torch.Tensor = self.layer3(self.layer2(self.layer1(x)))
        return third, self.layer4(third)

    def forward(self, x: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        third, fourth = self.features(x)
        if self.fc is None:
            return third, fourth
        logits: torch.Tensor = self.fc(fourth.mean((2, 3)))
        return logits


def check_image(caller: str, x: torch.Tensor, first: nn.Module) -> None:
    """A batch of floating-point images with the channels that the first convolution takes."""
    check_features(caller, x)
    channels = cast(nn.Conv2d, first).in_channels
    if x.shape[1] != channels:
        raise ValueError(f"{caller}: x must have {channels} channels (N, {channels}, H, W), got {tuple(x.shape)}")


def _check_choice(name: str, value: object, choices: Sequence[object]) -> None:
    if value not in choices:
        listed = ", ".join(repr(choice) for choice in choices)
        raise ValueError(f"ResNet: {name} must be one of {listed}, got {value!r}")
