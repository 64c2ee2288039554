"""Small models with the structure, attribute names, state_dict keys and forward of other people's pyramids.

Past 300 lines, because every family stands here once and nowhere else. Written from their documented structure, not from
their code: `PEERS` is the table of them, each with what `accelerate` must find in it.
"""

from __future__ import annotations

import contextlib
import functools
import os
import sys
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

BINS = (1, 2, 3, 6)
CLASSES = 5
SIZE = (11, 13)  # neither divides by 2, 3 or 6


def upsampled(y: torch.Tensor, like: torch.Tensor, align_corners: bool) -> torch.Tensor:
    return F.interpolate(y, size=like.shape[2:], mode="bilinear", align_corners=align_corners)


def conv_norm_relu(
    in_channels: int, channels: int, kernel_size: int = 1, bias: bool = False, norm: Callable = nn.BatchNorm2d
) -> list[nn.Module]:
    conv = nn.Conv2d(in_channels, channels, kernel_size, padding=kernel_size // 2, bias=bias)
    return [conv, norm(channels), nn.ReLU(inplace=True)]


def level(in_channels: int, channels: int, b: Any, **options: Any) -> nn.Sequential:
    return nn.Sequential(nn.AdaptiveAvgPool2d(b), *conv_norm_relu(in_channels, channels, **options))


def classifier(in_channels: int, channels: int, dropout: Callable = nn.Dropout2d) -> nn.Sequential:
    return nn.Sequential(*conv_norm_relu(in_channels, channels, 3), dropout(0.0), nn.Conv2d(channels, CLASSES, 1))


# semseg (hszhao/semseg, model/pspnet.py), and what has its keys


class SemsegPPM(nn.Module):
    align_corners = True

    def __init__(self, in_dim, reduction_dim, bins=BINS, **options):
        super().__init__()
        widths = reduction_dim if isinstance(reduction_dim, Sequence) else [reduction_dim] * len(bins)
        self.features = nn.ModuleList(level(in_dim, r, b, **options) for b, r in zip(bins, widths, strict=True))

    def forward(self, x):
        return torch.cat([x, *(upsampled(f(x), x, self.align_corners) for f in self.features)], 1)


class SemsegPSPNet(nn.Module):
    """An eighth of the image after five stages; losses in training, logits at the image's size in evaluation."""

    def __init__(self, channels, reduced, zoom_factor=8):
        super().__init__()
        self.zoom_factor = zoom_factor
        self.criterion = nn.CrossEntropyLoss(ignore_index=255)
        widths = [3, channels // 4, channels // 4, channels // 2, channels // 2, channels]
        for i, stride in enumerate((4, 1, 2, 1, 1)):
            conv = nn.Conv2d(widths[i], widths[i + 1], 3, stride, padding=1)
            setattr(self, f"layer{i}", nn.Sequential(conv, nn.ReLU(inplace=True)))
        self.ppm = SemsegPPM(channels, reduced)
        self.cls = classifier(channels + len(BINS) * reduced, channels // 4)
        self.aux = classifier(channels // 2, channels // 8)

    def forward(self, x, y=None):
        size = [(n - 1) // 8 * self.zoom_factor + 1 for n in x.shape[2:]]
        before_last = self.layer3(self.layer2(self.layer1(self.layer0(x))))
        main = self.cls(self.ppm(self.layer4(before_last)))
        if self.zoom_factor != 1:
            main = F.interpolate(main, size=size, mode="bilinear", align_corners=True)
        if not self.training:
            return main
        aux = self.aux(before_last)
        if self.zoom_factor != 1:
            aux = F.interpolate(aux, size=size, mode="bilinear", align_corners=True)
        return main.max(1)[1], self.criterion(main, y), self.criterion(aux, y)


class ZijundengPyramidPoolingModule(SemsegPPM):
    align_corners = False

    def __init__(self, in_dim, reduction_dim, setting=BINS):
        super().__init__(in_dim, reduction_dim, setting, norm=lambda c: nn.BatchNorm2d(c, momentum=0.95))


# segmentation_models_pytorch: decoders/pspnet, decoders/upernet


class Conv2dReLU(nn.Sequential):
    def __init__(self, in_channels, channels, kernel_size, norm=True):
        conv = nn.Conv2d(in_channels, channels, kernel_size, padding=kernel_size // 2, bias=not norm)
        super().__init__(conv, nn.BatchNorm2d(channels) if norm else nn.Identity(), nn.ReLU(inplace=True))


class SmpPSPBlock(nn.Module):
    def __init__(self, in_channels, channels, pool_size):
        super().__init__()
        self.pool_size = pool_size
        pool = nn.AdaptiveAvgPool2d(output_size=(pool_size, pool_size))
        self.pool = nn.Sequential(pool, Conv2dReLU(in_channels, channels, 1, norm=pool_size != 1))

    def forward(self, x):
        return upsampled(self.pool(x), x, True)


class SmpPSPModule(nn.Module):
    def __init__(self, in_channels, sizes=BINS):
        super().__init__()
        self.blocks = nn.ModuleList(SmpPSPBlock(in_channels, in_channels // len(sizes), size) for size in sizes)

    def forward(self, x):
        return torch.cat([*(block(x) for block in self.blocks), x], dim=1)


class SmpPSPDecoder(nn.Module):
    def __init__(self, in_channels, channels):
        super().__init__()
        self.psp = SmpPSPModule(in_channels)
        self.conv = Conv2dReLU(2 * in_channels, channels, 1)
        self.dropout = nn.Dropout2d(p=0.0)

    def forward(self, features):
        return self.dropout(self.conv(self.psp(features[-1])))


class SmpPSPNet(nn.Module):
    def __init__(self, channels, reduced):
        super().__init__()
        self.decoder = SmpPSPDecoder(channels, channels)
        upsample = nn.Upsample(scale_factor=8, mode="bilinear", align_corners=True)
        self.segmentation_head = nn.Sequential(nn.Conv2d(channels, CLASSES, 3, padding=1), upsample, nn.Identity())

    def forward(self, *features):
        return self.segmentation_head(self.decoder(list(features)))


class SmpUPerNetPSPModule(nn.Module):
    def __init__(self, in_channels, channels, sizes=BINS):
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(size), Conv2dReLU(in_channels, channels, 1)) for size in sizes
        )
        self.out_conv = Conv2dReLU(in_channels + len(sizes) * channels, channels, 3)

    def forward(self, feature):
        return self.out_conv(torch.cat([feature, *(upsampled(b(feature), feature, False) for b in self.blocks)], 1))


class SmpUPerNetDecoder(nn.Module):
    """Without the norms of the features and the lateral paths, which are no part of the pyramid."""

    def __init__(self, channels, reduced):
        super().__init__()
        self.psp = SmpUPerNetPSPModule(channels, reduced)
        self.fusion_block = Conv2dReLU(reduced + channels // 2, reduced, 3)

    def forward(self, *features):
        fine = features[0]
        return self.fusion_block(torch.cat([upsampled(self.psp(features[-1]), fine, False), fine], 1))


# mmsegmentation: decode_heads/psp_head.py, uper_head.py, decode_head.py; ConvModule is mmcv's


class ConvModule(nn.Module):
    def __init__(self, in_channels, channels, kernel_size, norm=True, inplace=True):
        super().__init__()
        self.with_norm, self.with_activation = norm, True
        self.conv = nn.Conv2d(in_channels, channels, kernel_size, padding=kernel_size // 2, bias=not norm)
        if norm:
            self.bn = nn.BatchNorm2d(channels)
        self.activate = nn.ReLU(inplace=inplace)

    def forward(self, x, activate=True, norm=True):
        x = self.conv(x)
        if norm and self.with_norm:
            x = self.bn(x)
        return self.activate(x) if activate else x


class MmsegPPM(nn.ModuleList):
    """Returns the upsampled levels as a list, without x."""

    def __init__(self, pool_scales, in_channels, channels, align_corners, norm):
        super().__init__()
        self.pool_scales, self.align_corners = pool_scales, align_corners
        self.in_channels, self.channels = in_channels, channels
        for scale in pool_scales:
            self.append(nn.Sequential(nn.AdaptiveAvgPool2d(scale), ConvModule(in_channels, channels, 1, norm)))

    def forward(self, x):
        return [upsampled(ppm(x), x, self.align_corners) for ppm in self]


class MmsegDecodeHead(nn.Module):
    def __init__(self, in_channels, channels, in_index, input_transform, align_corners):
        super().__init__()
        self.in_channels, self.channels, self.in_index = in_channels, channels, in_index
        self.input_transform, self.align_corners = input_transform, align_corners
        self.dropout = nn.Dropout2d(0.0)
        self.conv_seg = nn.Conv2d(channels, CLASSES, kernel_size=1)

    def _transform_inputs(self, inputs):
        if self.input_transform == "multiple_select":
            return [inputs[i] for i in self.in_index]
        return inputs[self.in_index]

    def cls_seg(self, feat):
        return self.conv_seg(self.dropout(feat))

    def forward(self, inputs):
        return self.cls_seg(self._forward_feature(inputs))

    def _pyramid(self, x):
        return self.bottleneck(torch.cat([x, *self.psp_modules(x)], dim=1))


class MmsegPSPHead(MmsegDecodeHead):
    def __init__(self, channels, reduced, align_corners=False, norm=True, in_index=-1):
        super().__init__(channels, reduced, in_index, None, align_corners)
        self.pool_scales = BINS
        self.psp_modules = MmsegPPM(BINS, channels, reduced, align_corners, norm)
        self.bottleneck = ConvModule(channels + len(BINS) * reduced, reduced, 3, norm)

    def _forward_feature(self, inputs):
        return self._pyramid(self._transform_inputs(inputs))


class MmsegUPerHead(MmsegDecodeHead):
    def __init__(self, channels, reduced):
        super().__init__([channels // 4, channels // 2, channels], reduced, [0, 1, 2], "multiple_select", False)
        self.psp_modules = MmsegPPM(BINS, channels, reduced, False, True)
        self.bottleneck = ConvModule(channels + len(BINS) * reduced, reduced, 3)
        below = self.in_channels[:-1]
        self.lateral_convs = nn.ModuleList(ConvModule(c, reduced, 1, inplace=False) for c in below)
        self.fpn_convs = nn.ModuleList(ConvModule(reduced, reduced, 3, inplace=False) for _ in below)
        self.fpn_bottleneck = ConvModule(len(self.in_channels) * reduced, reduced, 3)

    def psp_forward(self, inputs):
        return self._pyramid(inputs[-1])

    def _forward_feature(self, inputs):
        inputs = self._transform_inputs(inputs)
        maps = [conv(each) for conv, each in zip(self.lateral_convs, inputs, strict=False)]
        return feature_pyramid(self, [*maps, self.psp_forward(inputs)])


def feature_pyramid(head, maps):
    """From the top down, then every map at the size of the first."""
    for i in range(len(maps) - 1, 0, -1):
        maps[i - 1] = maps[i - 1] + upsampled(maps[i], maps[i - 1], head.align_corners)
    outs = [*(conv(each) for conv, each in zip(head.fpn_convs, maps, strict=False)), maps[-1]]
    outs = [outs[0], *(upsampled(each, outs[0], head.align_corners) for each in outs[1:])]
    return head.fpn_bottleneck(torch.cat(outs, dim=1))


# transformers: models/upernet/modeling_upernet.py. Children stand beside plain lists, which forward goes through


class UperNetConvModule(nn.Module):
    def __init__(self, in_channels, channels, kernel_size):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, channels, kernel_size, padding=kernel_size // 2, bias=False)
        self.batch_norm = nn.BatchNorm2d(channels)
        self.activation = nn.ReLU()

    def forward(self, x):
        return self.activation(self.batch_norm(self.conv(x)))


class UperNetPyramidPoolingBlock(nn.Module):
    def __init__(self, scale, in_channels, channels):
        super().__init__()
        self.layers = [nn.AdaptiveAvgPool2d(scale), UperNetConvModule(in_channels, channels, 1)]
        for i, each in enumerate(self.layers):
            self.add_module(str(i), each)

    def forward(self, x):
        for each in self.layers:
            x = each(x)
        return x


class UperNetPyramidPoolingModule(nn.Module):
    def __init__(self, pool_scales, in_channels, channels, align_corners):
        super().__init__()
        self.pool_scales, self.align_corners = pool_scales, align_corners
        self.in_channels, self.channels = in_channels, channels
        self.blocks = [UperNetPyramidPoolingBlock(scale, in_channels, channels) for scale in pool_scales]
        for i, block in enumerate(self.blocks):
            self.add_module(str(i), block)

    def forward(self, x):
        return [upsampled(block(x), x, self.align_corners) for block in self.blocks]


class UperNetHead(nn.Module):
    align_corners = False

    def __init__(self, channels, reduced):
        super().__init__()
        self.pool_scales, self.in_channels, self.channels = BINS, [channels // 4, channels // 2, channels], reduced
        self.classifier = nn.Conv2d(reduced, CLASSES, kernel_size=1)
        self.psp_modules = UperNetPyramidPoolingModule(BINS, channels, reduced, align_corners=False)
        self.bottleneck = UperNetConvModule(channels + len(BINS) * reduced, reduced, 3)
        below = self.in_channels[:-1]
        self.lateral_convs = nn.ModuleList(UperNetConvModule(c, reduced, 1) for c in below)
        self.fpn_convs = nn.ModuleList(UperNetConvModule(reduced, reduced, 3) for _ in below)
        self.fpn_bottleneck = UperNetConvModule(len(self.in_channels) * reduced, reduced, 3)

    def psp_forward(self, inputs):
        x = inputs[-1]
        maps = [x]
        maps.extend(self.psp_modules(x))
        return self.bottleneck(torch.cat(maps, dim=1))

    def forward(self, encoder_hidden_states):
        below = zip(self.lateral_convs, encoder_hidden_states, strict=False)
        maps = [*(conv(each) for conv, each in below), self.psp_forward(encoder_hidden_states)]
        return self.classifier(feature_pyramid(self, maps))


# CSAILVision/semantic-segmentation-pytorch: mit_semseg/models/models.py. The decoder computes the pyramid itself


class CsailPPM(nn.Module):
    def __init__(self, channels, reduced):
        super().__init__()
        self.ppm = nn.ModuleList(level(channels, reduced, scale) for scale in BINS)
        self.conv_last = classifier(channels + len(BINS) * reduced, reduced)

    def forward(self, conv_out, segSize=None):
        conv5 = conv_out[-1]
        x = self.conv_last(torch.cat([conv5, *(upsampled(pool(conv5), conv5, False) for pool in self.ppm)], 1))
        return {"logits": at_size(x, segSize)}


class CsailPPMDeepsup(CsailPPM):
    def __init__(self, channels, reduced):
        super().__init__(channels, reduced)
        self.cbr_deepsup = nn.Sequential(*conv_norm_relu(channels // 2, channels // 4, 3))
        self.conv_last_deepsup = nn.Conv2d(channels // 4, CLASSES, 1)
        self.dropout_deepsup = nn.Dropout2d(0.0)

    def forward(self, conv_out, segSize=None):
        deepsup = self.conv_last_deepsup(self.dropout_deepsup(self.cbr_deepsup(conv_out[-2])))
        return {**super().forward(conv_out, segSize), "deepsup_logits": at_size(deepsup, segSize)}


class CsailUPerNet(nn.Module):
    """The pooled features are upsampled before the 1x1 convolution and its norm, whose statistics are the map's then."""

    def __init__(self, channels, reduced):
        super().__init__()
        self.ppm_pooling = nn.ModuleList(nn.AdaptiveAvgPool2d(scale) for scale in BINS)
        self.ppm_conv = nn.ModuleList(nn.Sequential(*conv_norm_relu(channels, reduced)) for _ in BINS)
        self.ppm_last_conv = nn.Sequential(*conv_norm_relu(channels + len(BINS) * reduced, reduced, 3))
        self.conv_last = nn.Sequential(nn.Conv2d(reduced, CLASSES, kernel_size=1))

    def forward(self, conv_out, segSize=None):
        x, branches = conv_out[-1], zip(self.ppm_pooling, self.ppm_conv, strict=True)
        maps = [x, *(conv(upsampled(pool(x), x, False)) for pool, conv in branches)]
        return {"logits": at_size(self.conv_last(self.ppm_last_conv(torch.cat(maps, 1))), segSize)}


def at_size(logits, size):
    return logits if size is None else F.interpolate(logits, size=size, mode="bilinear", align_corners=False)


# Tramac (gluoncv is the same) and PyTorch-Encoding: a pool and a convolution of their own names for each level


class TramacPyramidPooling(nn.Module):
    def __init__(self, in_channels, bins=BINS):
        super().__init__()
        for i, b in enumerate(bins, 1):
            setattr(self, f"avgpool{i}", nn.AdaptiveAvgPool2d(b))
        for i in range(1, len(bins) + 1):
            setattr(self, f"conv{i}", nn.Sequential(*conv_norm_relu(in_channels, in_channels // 4)))

    def forward(self, x):
        feat1 = upsampled(self.conv1(self.avgpool1(x)), x, True)
        feat2 = upsampled(self.conv2(self.avgpool2(x)), x, True)
        feat3 = upsampled(self.conv3(self.avgpool3(x)), x, True)
        feat4 = upsampled(self.conv4(self.avgpool4(x)), x, True)
        return torch.cat([x, feat1, feat2, feat3, feat4], dim=1)


class TramacPSPHead(nn.Module):
    def __init__(self, channels, reduced):
        super().__init__()
        self.psp = TramacPyramidPooling(channels)
        self.block = classifier(2 * channels, channels // 4, nn.Dropout)

    def forward(self, x):
        return self.block(self.psp(x))


class EncodingPyramidPooling(nn.Module):
    def __init__(self, in_channels, bins=BINS):
        super().__init__()
        for i, b in enumerate(bins, 1):
            setattr(self, f"pool{i}", nn.AdaptiveAvgPool2d(b))
        for i in range(1, len(bins) + 1):
            setattr(self, f"conv{i}", nn.Sequential(*conv_norm_relu(in_channels, in_channels // 4)))
        self._up_kwargs = {"mode": "bilinear", "align_corners": True}

    def forward(self, x):
        maps = [x]
        for pool, conv in (
            (self.pool1, self.conv1),
            (self.pool2, self.conv2),
            (self.pool3, self.conv3),
            (self.pool4, self.conv4),
        ):
            maps.append(F.interpolate(conv(pool(x)), x.shape[2:], **self._up_kwargs))
        return torch.cat(maps, 1)


class EncodingPSPHead(nn.Module):
    def __init__(self, channels, reduced):
        super().__init__()
        self.conv5 = nn.Sequential(
            EncodingPyramidPooling(channels), *classifier(2 * channels, channels // 4, nn.Dropout)
        )

    def forward(self, x):
        return self.conv5(x)


# TorchSeg: model/pspnet/*/network.py


class ConvBnRelu(nn.Module):
    def __init__(self, in_planes, out_planes, ksize):
        super().__init__()
        self.conv = nn.Conv2d(in_planes, out_planes, ksize, padding=ksize // 2, bias=False)
        self.has_bn, self.has_relu = True, True
        self.bn, self.relu = nn.BatchNorm2d(out_planes), nn.ReLU(inplace=True)

    def forward(self, x):
        return self.relu(self.bn(self.conv(x)))


class TorchSegPyramidPooling(nn.Module):
    """The names of a level's layers have a slash."""

    def __init__(self, channels, reduced, name="psp"):
        super().__init__()
        self.ppm = nn.ModuleList(
            nn.Sequential(
                OrderedDict(
                    {f"{name}/pool": nn.AdaptiveAvgPool2d(scale), f"{name}/cbr": ConvBnRelu(channels, reduced, 1)}
                )
            )
            for scale in BINS
        )
        self.conv6 = nn.Sequential(
            ConvBnRelu(channels + len(BINS) * reduced, reduced, 3), nn.Dropout2d(0.0), nn.Conv2d(reduced, CLASSES, 1)
        )

    def forward(self, x):
        return self.conv6(torch.cat([x, *(upsampled(pooling(x), x, True) for pooling in self.ppm)], 1))


# The bottleneck inside the module: yassouali and bubbliiiing, speedinghzl, Lextal, PaddleSeg's order of levels


class StagesPSPModule(nn.Module):
    """yassouali's and bubbliiiing's `_PSPModule`."""

    def __init__(self, channels, reduced, **options):
        super().__init__()
        self.stages = nn.ModuleList(level(channels, reduced, b, **options) for b in BINS)
        self.bottleneck = nn.Sequential(*conv_norm_relu(channels + len(BINS) * reduced, reduced, 3), nn.Dropout2d(0.0))

    def forward(self, features):
        return self.bottleneck(torch.cat([features, *(upsampled(s(features), features, True) for s in self.stages)], 1))


class SpeedinghzlPSPModule(StagesPSPModule):
    def forward(self, feats):
        return self.bottleneck(torch.cat([*(upsampled(s(feats), feats, True) for s in self.stages), feats], 1))


class LeakyNorm(nn.BatchNorm2d):
    """A norm with a leaky ReLU in it, as InPlaceABN is."""

    def forward(self, x):
        return F.leaky_relu(super().forward(x), 0.01)


class SpeedinghzlABNPSPModule(SpeedinghzlPSPModule):
    def __init__(self, channels, reduced):
        super().__init__(channels, reduced)
        self.stages = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d((b, b)), nn.Conv2d(channels, reduced, 1, bias=False), LeakyNorm(reduced))
            for b in BINS
        )


class LextalPSPModule(nn.Module):
    """No norm, no activation, and as many channels as the features have."""

    def __init__(self, channels, reduced):
        super().__init__()
        self.stages = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d((b, b)), nn.Conv2d(channels, channels, 1, bias=False)) for b in BINS
        )
        self.bottleneck = nn.Conv2d(channels * (len(BINS) + 1), reduced, kernel_size=1)
        self.relu = nn.ReLU()

    def forward(self, feats):
        maps = [*(upsampled(stage(feats), feats, False) for stage in self.stages), feats]
        return self.relu(self.bottleneck(torch.cat(maps, 1)))


class PaddlePPModule(nn.Module):
    """PaddleSeg's `PPModule` in PyTorch: convolutions with bias and norm, and the levels backwards."""

    def __init__(self, channels, reduced):
        super().__init__()
        self.stages = nn.ModuleList(level(channels, reduced, b, bias=True) for b in BINS)
        self.conv_bn_relu2 = nn.Sequential(*conv_norm_relu(channels + len(BINS) * reduced, reduced, 3))

    def forward(self, x):
        maps = [upsampled(stage(x), x, False) for stage in self.stages]
        return self.conv_bn_relu2(torch.cat([x, *maps[::-1]], 1))


# kazuto1011: libs/models/pspnet.py. The module is a Sequential with a forward of its own


class KazutoPyramidPoolModule(nn.Sequential):
    def __init__(self, channels, reduced, pyramids=(6, 3, 2, 1)):
        super().__init__()
        self.stages = nn.ModuleList(
            nn.Sequential(
                OrderedDict(
                    pool=nn.AdaptiveAvgPool2d(output_size=p),
                    conv=nn.Sequential(
                        OrderedDict(
                            conv=nn.Conv2d(channels, reduced, 1, bias=False),
                            bn=nn.BatchNorm2d(reduced, momentum=0.95),
                            relu=nn.ReLU(),
                        )
                    ),
                )
            )
            for p in pyramids
        )

    def forward(self, x):
        return torch.cat([x, *(upsampled(stage(x), x, True) for stage in self.stages)], dim=1)


# The form of tutorials, and what resembles it


class TutorialPyramid(nn.Module):
    def __init__(self, channels, reduced, bins=BINS, **options):
        super().__init__()
        self.pyramid_branches = nn.ModuleList(level(channels, reduced, b, **options) for b in bins)

    def forward(self, x):
        return torch.cat([x] + [self.up(branch(x), x) for branch in self.pyramid_branches], dim=1)

    @staticmethod
    def up(y, x):
        return upsampled(y, x, False)


class TutorialNet(nn.Module):
    def __init__(self, channels, reduced):
        super().__init__()
        self.context = TutorialPyramid(channels, reduced)
        self.output = nn.Conv2d(channels + len(BINS) * reduced, CLASSES, 1)

    def forward(self, x):
        return self.output(self.context(x))


class NearestPyramid(TutorialPyramid):
    """Upsampled to the nearest cell."""

    @staticmethod
    def up(y, x):
        return F.interpolate(y, size=x.shape[2:], mode="nearest")


class SumPyramid(TutorialPyramid):
    """ICNet's: the levels are added to x."""

    def __init__(self, channels, reduced):
        super().__init__(channels, channels)

    def forward(self, x):
        return x + sum(upsampled(branch(x), x, True) for branch in self.pyramid_branches)


class MaxPyramid(SemsegPPM):
    """The largest value of a window, not its mean."""

    def __init__(self, channels, reduced):
        super().__init__(channels, reduced)
        for each, b in zip(self.features, BINS, strict=True):
            each[0] = nn.AdaptiveMaxPool2d(b)


class DifferentInTrainingPyramid(SemsegPPM):
    """What evaluation cannot show: in training the levels are scaled."""

    def forward(self, x):
        factor = 2.0 if self.training else 1.0
        return torch.cat([x, *(factor * upsampled(f(x), x, True) for f in self.features)], 1)


class SharedLevelsPyramid(SemsegPPM):
    """One convolution and one norm for all levels."""

    def __init__(self, channels, reduced):
        super().__init__(channels, reduced)
        for each in self.features:
            each[1], each[2] = self.features[0][1], self.features[0][2]


class ConcatenatedTwice(SemsegPPM):
    """The structure, with another input to the concatenation than to the levels."""

    def forward(self, x):
        return torch.cat([x.relu(), *(upsampled(f(x), x, True) for f in self.features)], 1)


class MeetpsPyramidPooling(nn.Module):
    """Average pooling with a window of int(size / bins), which may give a cell more than asked for."""

    def __init__(self, channels, reduced, pool_sizes=BINS):
        super().__init__()
        self.pool_sizes = pool_sizes
        self.path_module_list = nn.ModuleList(MeetpsConvBatchNormRelu(channels, reduced) for _ in pool_sizes)

    def forward(self, x):
        maps = [x]
        for module, cells in zip(self.path_module_list, self.pool_sizes, strict=True):
            window = int(x.shape[2] / cells), int(x.shape[3] / cells)
            maps.append(upsampled(module(F.avg_pool2d(x, window, stride=window)), x, True))
        return torch.cat(maps, dim=1)


class MeetpsConvBatchNormRelu(nn.Module):
    def __init__(self, in_channels, channels):
        super().__init__()
        self.cbr_unit = nn.Sequential(*conv_norm_relu(in_channels, channels))

    def forward(self, x):
        return self.cbr_unit(x)


class AsppPooling(nn.Sequential):
    def forward(self, x):
        return upsampled(super().forward(x), x, False)


class Aspp(nn.Module):
    """DeepLab's: one pooling among dilated convolutions. No pyramid, but it holds an AdaptiveAvgPool2d."""

    def __init__(self, channels, reduced):
        super().__init__()
        dilated = []
        for rate in (2, 4):
            conv = nn.Conv2d(channels, reduced, 3, padding=rate, dilation=rate, bias=False)
            dilated.append(nn.Sequential(conv, nn.BatchNorm2d(reduced), nn.ReLU()))
        self.convs = nn.ModuleList([*dilated, AsppPooling(*level(channels, reduced, 1))])
        self.project = nn.Sequential(*conv_norm_relu(3 * reduced, reduced))

    def forward(self, x):
        return self.project(torch.cat([conv(x) for conv in self.convs], dim=1))


# The table


class Peer(NamedTuple):
    """A model, its arguments, and what `accelerate` finds in it.

    Args:
        build: makes it from the channels of the features and of a level.
        inputs: its arguments from batch, channels and the size of the map.
        family: the family that is reported.
        ppm: dotted name of the accelerated pyramid; None where there is none.
        head: dotted name of the accelerated head; None where there is none.
        reason: a part of the sentence that refuses it, "" where nothing looks like a pyramid.
    """

    build: Callable[..., nn.Module]
    inputs: Callable[..., tuple[Any, ...]]
    family: str = ""
    ppm: str | None = None
    head: str | None = None
    reason: str = ""


def noise(batch, channels, size):
    """With a mean of its own in every image and channel: else pooled cells are alike, and norms of them ill-conditioned."""
    return torch.randn(batch, channels, *size) + torch.randn(batch, channels, 1, 1)


def features(batch, channels, size=SIZE):
    return (noise(batch, channels, size),)


def maps(batch, channels, size=SIZE):
    """As a backbone gives them: the last two of one size."""
    sizes = [[2 * n for n in size], size, size]
    return [noise(batch, c, s) for c, s in zip((channels // 4, channels // 2, channels), sizes, strict=True)]


def as_arguments(batch, channels, size=SIZE):
    return tuple(maps(batch, channels, size)[1:])


def as_list(batch, channels, size=SIZE):
    return (maps(batch, channels, size),)


def images(batch, channels, size=SIZE):
    """And the labels, an eighth of them to be ignored."""
    size = [8 * (n - 1) + 1 for n in size]
    labels = torch.randint(0, CLASSES, (batch, *size))
    labels[:, : size[0] // 8] = 255
    return noise(batch, 3, size), labels


SOMETHING_ELSE = "its forward computes something else"

PEERS = {
    "semseg": Peer(SemsegPSPNet, images, "semseg", "ppm", ""),
    "semseg_ppm": Peer(SemsegPPM, features, "semseg", ""),
    "semseg_bins_1248": Peer(lambda c, r: SemsegPPM(c, r, (1, 2, 4, 8)), features, "semseg", ""),
    "semseg_group_norm": Peer(lambda c, r: SemsegPPM(c, r, norm=lambda n: nn.GroupNorm(2, n)), features, "semseg", ""),
    "semseg_cumulative_norm": Peer(
        lambda c, r: SemsegPPM(c, r, norm=lambda n: nn.BatchNorm2d(n, momentum=None, eps=1e-3)), features, "semseg", ""
    ),
    "semseg_no_affine": Peer(
        lambda c, r: SemsegPPM(c, r, norm=lambda n: nn.BatchNorm2d(n, affine=False)), features, "semseg", ""
    ),
    "semseg_no_running": Peer(
        lambda c, r: SemsegPPM(c, r, norm=lambda n: nn.BatchNorm2d(n, track_running_stats=False)),
        features,
        "semseg",
        "",
    ),
    "zijundeng": Peer(ZijundengPyramidPoolingModule, features, "semseg", ""),
    "smp": Peer(SmpPSPNet, as_arguments, "smp", "decoder.psp", "decoder"),
    "smp_uper": Peer(SmpUPerNetDecoder, as_arguments, "smp UPerNet", "psp", "psp"),
    "mmseg_psp": Peer(MmsegPSPHead, as_list, "mmseg", "psp_modules", ""),
    "mmseg_psp_corners": Peer(
        lambda c, r: MmsegPSPHead(c, r, align_corners=True, in_index=2), as_list, "mmseg", "psp_modules", ""
    ),
    "mmseg_psp_no_norm": Peer(lambda c, r: MmsegPSPHead(c, r, norm=False), as_list, "mmseg", "psp_modules"),
    "mmseg_uper": Peer(MmsegUPerHead, as_list, "mmseg", "psp_modules", ""),
    "transformers": Peer(UperNetHead, as_list, "transformers", "psp_modules", ""),
    "csail": Peer(CsailPPM, as_list, "CSAIL", ""),
    "csail_deepsup": Peer(CsailPPMDeepsup, as_list, "CSAIL", ""),
    "tramac": Peer(TramacPSPHead, features, "Tramac", "psp"),
    "encoding": Peer(EncodingPSPHead, features, "PyTorch-Encoding", "conv5.0"),
    "torchseg": Peer(TorchSegPyramidPooling, features, "TorchSeg", ""),
    "yassouali": Peer(StagesPSPModule, features, "yassouali", ""),
    "speedinghzl": Peer(SpeedinghzlPSPModule, features, "speedinghzl", ""),
    "kazuto1011": Peer(KazutoPyramidPoolModule, features, "kazuto1011", ""),
    "lextal": Peer(LextalPSPModule, features, "Lextal", ""),
    "tutorial": Peer(TutorialNet, features, "tutorial", "context"),
    "tutorial_bias": Peer(lambda c, r: TutorialPyramid(c, r, bias=True), features, "tutorial", ""),
    "tutorial_no_norm": Peer(
        lambda c, r: TutorialPyramid(c, r, bias=True, norm=lambda _: nn.Identity()), features, "tutorial", ""
    ),
    # Norms that are something else run on their own modules.
    "speedinghzl_abn": Peer(SpeedinghzlABNPSPModule, features, "speedinghzl", ""),
    "shared": Peer(SharedLevelsPyramid, features, "semseg", ""),
    # What must be left as it is.
    "semseg_unequal": Peer(
        lambda c, r: SemsegPPM(c, (r, r, 2 * r, r)), features, reason="differ in out_channels: 8, 8, 16, 8"
    ),
    "csail_upernet": Peer(CsailUPerNet, as_list, reason="upsamples the pooled features before"),
    "meetps": Peer(MeetpsPyramidPooling, features),
    "paddle": Peer(PaddlePPModule, features, reason=SOMETHING_ELSE),
    "nearest": Peer(NearestPyramid, features, reason=SOMETHING_ELSE),
    "sum": Peer(SumPyramid, features, reason=SOMETHING_ELSE),
    "different_in_training": Peer(
        DifferentInTrainingPyramid, features, reason="in training it computes something else"
    ),
    "another_input": Peer(ConcatenatedTwice, features, reason=SOMETHING_ELSE),
    "max": Peer(MaxPyramid, features),
    "aspp": Peer(Aspp, features),
}
ACCELERATED = [name for name, peer in PEERS.items() if peer.ppm is not None]
REFUSED = [name for name, peer in PEERS.items() if peer.ppm is None]
WITH_HEAD = [name for name, peer in PEERS.items() if peer.head is not None]


def make(name: str, channels: int = 32, reduced: int = 8) -> nn.Module:
    """A model of the table with random parameters and running statistics, in training, as constructors leave it."""
    return randomise(PEERS[name].build(channels, reduced))


def inputs(name: str, batch: int = 2, device: str = "cpu", channels: int = 32, size: Sequence[int] = SIZE) -> Any:
    """The arguments of that model's forward."""
    return to(PEERS[name].inputs(batch, channels, size), device=device)


def randomise(module: nn.Module) -> nn.Module:
    """Norms far from the identity; other parameters as PyTorch initialises them, biases included."""
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm2d | nn.GroupNorm) and norm.weight is not None:
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.normal_(norm.bias)
        if isinstance(norm, nn.BatchNorm2d) and norm.running_mean is not None:
            nn.init.normal_(norm.running_mean, 0, 0.1)
            nn.init.uniform_(norm.running_var, 0.05, 0.2)
    return module


def to(values: Any, **where: Any) -> Any:
    """Tensors in nested tuples, lists and dicts, moved or cast; integers keep their dtype."""
    if isinstance(values, torch.Tensor):
        options = where if values.is_floating_point() else {k: v for k, v in where.items() if k == "device"}
        return values.to(**options)
    if isinstance(values, dict):
        return {key: to(value, **where) for key, value in values.items()}
    return type(values)(to(value, **where) for value in values)


def tensors(values: Any) -> list[torch.Tensor]:
    """All tensors of a nested structure, in order."""
    if isinstance(values, torch.Tensor):
        return [values]
    if values is None:
        return []
    values = values.values() if isinstance(values, dict) else values
    return [tensor for value in values for tensor in tensors(value)]


# The libraries themselves (requirements/compare.txt)


@functools.cache
def _operators_of_torchvision() -> torch.library.Library | None:
    """Torchvision's own library needs CUDA's; without it, importing torchvision asks for two operators that are not there."""
    if torch.version.cuda is not None or find_spec("torchvision") is None:
        return None
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return library


@contextlib.contextmanager
def libraries() -> Iterator[None]:
    """Inside, segmentation_models_pytorch and transformers are imported: offline, and beside a torch without CUDA.

    transformers looks for a package `kernels` and would find this repository's folder, so that is out of its sight.
    """
    root = Path(__file__).resolve().parents[2]
    os.environ["HF_HUB_OFFLINE"] = "1"
    _operators_of_torchvision()
    before = [*sys.path]
    sys.path[:] = [entry for entry in before if Path(entry or os.curdir).resolve() != root]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        sys.path[:] = before
