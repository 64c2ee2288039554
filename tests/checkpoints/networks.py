"""PSPNets of other libraries in plain PyTorch, narrow: their names and what they compute, as documented; no code of ours.

The libraries, and the files that say so, are named in pspnet_fast/checkpoints. Every network has `width` for the 64 of the
real ones; `wrapped(name, state)` is what the library's file holds.
Past 300 lines, because they share blocks, and are read beside each other.
"""

from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import nn

BINS = (1, 2, 3, 6)
DEPTHS = {18: (2, 2, 2, 2), 50: (3, 4, 6, 3)}


class Block(nn.Module):
    def __init__(self, basic, inputs, width, stride, first, second):
        super().__init__()
        outputs = width if basic else 4 * width
        if basic:
            self.conv1 = nn.Conv2d(inputs, width, 3, stride, first, first, bias=False)
            self.conv2 = nn.Conv2d(width, width, 3, 1, second, second, bias=False)
        else:
            self.conv1 = nn.Conv2d(inputs, width, 1, bias=False)
            self.conv2 = nn.Conv2d(width, width, 3, stride, first, first, bias=False)
            self.conv3 = nn.Conv2d(width, outputs, 1, bias=False)
            self.bn3 = nn.BatchNorm2d(outputs)
        self.bn1, self.bn2 = nn.BatchNorm2d(width), nn.BatchNorm2d(width)
        self.downsample = None
        if stride > 1 or inputs != outputs:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x):
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if hasattr(self, "conv3"):
            y = self.bn3(self.conv3(F.relu(y)))
        return F.relu(y + (x if self.downsample is None else self.downsample(x)))


def conv_bn(inputs, outputs, kernel=3, stride=1):
    return nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False), nn.BatchNorm2d(outputs)


def conv_bn_relu(inputs, outputs, kernel=3):
    return (*conv_bn(inputs, outputs, kernel), nn.ReLU())


def stem_channels(stem, width):
    return {"plain": (width,), "deep": (width, width, 2 * width), "v1c": (width // 2, width // 2, width)}[stem]


class Stages(nn.Module):
    """layer1 to layer4. `plan` has for each stage its stride, its dilation, and its first block's."""

    def __init__(self, layers, width, inputs, plan, second=True):
        super().__init__()
        basic = layers == 18
        for k, (depth, (stride, dilation, entry)) in enumerate(zip(DEPTHS[layers], plan, strict=True)):
            blocks = []
            for i in range(depth):
                first = dilation if i else entry
                blocks.append(Block(basic, inputs, width << k, 1 if i else stride, first, dilation if second else 1))
                inputs = (width << k) * (1 if basic else 4)
            self.add_module(f"layer{k + 1}", nn.Sequential(*blocks))
        self.channels = inputs

    def stages(self, x):
        maps = []
        for k in range(1, 5):
            x = self.get_submodule(f"layer{k}")(x)
            maps.append(x)
        return maps


FULL = ((1, 1, 1), (2, 1, 1), (1, 2, 2), (1, 4, 4))
HALVED = ((1, 1, 1), (2, 1, 1), (1, 2, 1), (1, 4, 2))
UNDILATED = ((1, 1, 1), (2, 1, 1), (2, 1, 1), (2, 1, 1))


class Numbered(Stages):
    """A ResNet whose stem has conv1, bn1, and where it is deep conv2, bn2, conv3, bn3."""

    def __init__(self, layers, width, stem, plan, second=True, classes=None):
        channels = (3, *stem_channels(stem, width))
        super().__init__(layers, width, channels[-1], plan, second)
        self.convolutions = len(channels) - 1
        for i in range(1, len(channels)):
            conv, norm = conv_bn(channels[i - 1], channels[i], 7 if stem == "plain" else 3, 2 if i == 1 else 1)
            self.add_module(f"conv{i}", conv)
            self.add_module(f"bn{i}", norm)
        if classes:
            self.fc = nn.Linear(self.channels, classes)

    def forward(self, x):
        for i in range(1, self.convolutions + 1):
            x = F.relu(self.get_submodule(f"bn{i}")(self.get_submodule(f"conv{i}")(x)))
        return self.stages(F.max_pool2d(x, 3, 2, 1))


def deep_stem(stem, width):
    a, b, c = stem_channels(stem, width)
    first = (nn.Conv2d(3, a, 3, 2, 1, bias=False), nn.BatchNorm2d(a), nn.ReLU())
    return nn.Sequential(*first, *conv_bn_relu(a, b), *conv_bn_relu(b, c))


def upsampled(maps, size, align_corners):
    return [F.interpolate(each, size, mode="bilinear", align_corners=align_corners) for each in maps]


def pooled(x, modules):
    return [module(F.adaptive_avg_pool2d(x, size)) for size, module in zip(BINS, modules, strict=True)]


class Net(nn.Module):
    """What all share: logits at the input's size."""

    align_corners = True

    def forward(self, x):
        return upsampled([self.head_of(self.maps(x)[-1])], x.shape[2:], self.align_corners)[0]

    def concatenated(self, x, modules):
        return torch.cat([x, *upsampled(pooled(x, modules), x.shape[2:], self.align_corners)], 1)


class Semseg(Net):
    def __init__(self, layers, width, stem="deep", classes=5):
        super().__init__()
        self.layer0 = nn.Sequential(*deep_stem(stem, width), nn.MaxPool2d(3, 2, 1))
        body = Stages(layers, width, stem_channels(stem, width)[-1], FULL)
        self.layer1, self.layer2, self.layer3, self.layer4 = body.layer1, body.layer2, body.layer3, body.layer4
        c = body.channels
        self.ppm = nn.Module()
        self.ppm.features = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(b), *conv_bn_relu(c, c // 4, 1)) for b in BINS
        )
        self.cls = nn.Sequential(*conv_bn_relu(2 * c, c // 4), nn.Dropout2d(0.1), nn.Conv2d(c // 4, classes, 1))
        self.aux = nn.Sequential(*conv_bn_relu(c // 2, c // 8), nn.Dropout2d(0.1), nn.Conv2d(c // 8, classes, 1))

    def maps(self, x):
        third = self.layer3(self.layer2(self.layer1(self.layer0(x))))
        return third, self.layer4(third)

    def head_of(self, x):
        return self.cls(self.concatenated(x, [level[1:] for level in self.ppm.features]))


class ConvModule(nn.Module):
    def __init__(self, inputs, outputs, kernel):
        super().__init__()
        self.conv, self.bn = conv_bn(inputs, outputs, kernel)

    def forward(self, x):
        return F.relu(self.bn(self.conv(x)))


class Mmseg(Net):
    def __init__(self, layers, width, stem="v1c", classes=5, align_corners=False):
        super().__init__()
        self.align_corners = align_corners
        if stem == "plain":
            self.backbone = Numbered(layers, width, stem, HALVED, second=False)
        else:
            self.backbone = Stages(layers, width, stem_channels(stem, width)[-1], HALVED, second=False)
            self.backbone.stem = deep_stem(stem, width)
        c = self.backbone.channels
        self.decode_head, self.auxiliary_head = nn.Module(), nn.Module()
        self.decode_head.conv_seg = nn.Conv2d(c // 4, classes, 1)
        self.decode_head.psp_modules = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(b), ConvModule(c, c // 4, 1)) for b in BINS
        )
        self.decode_head.bottleneck = ConvModule(2 * c, c // 4, 3)
        self.auxiliary_head.conv_seg = nn.Conv2d(c // 8, classes, 1)
        self.auxiliary_head.convs = nn.Sequential(ConvModule(c // 2, c // 8, 3))

    def maps(self, x):
        if hasattr(self.backbone, "stem"):
            return self.backbone.stages(F.max_pool2d(self.backbone.stem(x), 3, 2, 1))[-2:]
        return self.backbone(x)[-2:]

    def head_of(self, x):
        head = self.decode_head
        return head.conv_seg(head.bottleneck(self.concatenated(x, [level[1] for level in head.psp_modules])))

    def aux(self, x):
        return self.auxiliary_head.conv_seg(self.auxiliary_head.convs(x))


class Smp(Net):
    """x last; the second stage's features; a 1x1 and then a 3x3 convolution; a bias at bin 1."""

    def __init__(self, layers, width, classes=5, channels=12):
        super().__init__()
        self.encoder = Numbered(layers, width, "plain", UNDILATED)
        c = self.encoder.channels // 4
        self.decoder = nn.Module()
        self.decoder.psp = nn.Module()
        self.decoder.psp.blocks = nn.ModuleList()
        for b in BINS:
            conv = nn.Conv2d(c, c // 4, 1, bias=b == 1)
            norm = nn.Identity() if b == 1 else nn.BatchNorm2d(c // 4)
            block = nn.Module()
            block.pool = nn.Sequential(nn.AdaptiveAvgPool2d(b), nn.Sequential(conv, norm, nn.ReLU()))
            self.decoder.psp.blocks.append(block)
        self.decoder.conv = nn.Sequential(*conv_bn_relu(2 * c, channels, 1))
        self.segmentation_head = nn.Sequential(nn.Conv2d(channels, classes, 3, padding=1))

    def maps(self, x):
        return self.encoder(x)[:2]

    def head_of(self, x):
        x, *levels = self.concatenated(x, [block.pool[1] for block in self.decoder.psp.blocks]).split(
            (x.shape[1], x.shape[1]), 1
        )
        return self.segmentation_head(self.decoder.conv(torch.cat([*levels, x], 1)))


class Pretrained(Stages):
    """Tramac's and PyTorch-Encoding's backbone: all of the stem but its last norm is conv1."""

    def __init__(self, layers, width):
        super().__init__(layers, width, 2 * width, HALVED)
        *convolutions, self.bn1, _ = deep_stem("deep", width)
        self.conv1 = nn.Sequential(*convolutions)
        self.fc = nn.Linear(self.channels, 10)

    def forward(self, x):
        return self.stages(F.max_pool2d(F.relu(self.bn1(self.conv1(x))), 3, 2, 1))


class Pyramid(nn.Module):
    def __init__(self, channels):
        super().__init__()
        for k in range(4):
            self.add_module(f"conv{k + 1}", nn.Sequential(*conv_bn_relu(channels, channels // 4, 1)))

    def forward(self, x):
        levels = pooled(x, [self.conv1, self.conv2, self.conv3, self.conv4])
        return torch.cat([x, *upsampled(levels, x.shape[2:], True)], 1)


def tail(inputs, inner, classes):
    return (*conv_bn_relu(inputs, inner), nn.Dropout(0.1), nn.Conv2d(inner, classes, 1))


class Tramac(Net):
    def __init__(self, layers, width, classes=5):
        super().__init__()
        self.pretrained = Pretrained(layers, width)
        c = self.pretrained.channels
        self.head, self.auxlayer = nn.Module(), nn.Module()
        self.head.psp = Pyramid(c)
        self.head.block = nn.Sequential(*tail(2 * c, c // 4, classes))
        self.auxlayer.block = nn.Sequential(*tail(c // 2, c // 8, classes))

    def maps(self, x):
        return self.pretrained(x)[-2:]

    def head_of(self, x):
        return self.head.block(self.head.psp(x))

    def aux(self, x):
        return self.auxlayer.block(x)


class Encoding(Net):
    def __init__(self, layers, width, classes=5):
        super().__init__()
        self.pretrained = Pretrained(layers, width)
        del self.pretrained.fc
        c = self.pretrained.channels
        self.head, self.auxlayer = nn.Module(), nn.Module()
        self.head.conv5 = nn.Sequential(Pyramid(c), *tail(2 * c, c // 4, classes))
        self.auxlayer.conv5 = nn.Sequential(*tail(c // 2, c // 8, classes))

    def maps(self, x):
        return self.pretrained(x)[-2:]

    def head_of(self, x):
        return self.head.conv5(x)

    def aux(self, x):
        return self.auxlayer.conv5(x)


class Csail(Net):
    """The levels and the bottleneck have a number of channels of their own (512 there)."""

    align_corners = False

    def __init__(self, layers, width, classes=5, channels=24):
        super().__init__()
        self.encoder = Numbered(layers, width, "deep", HALVED)
        c = self.encoder.channels
        self.decoder = nn.Module()
        self.decoder.ppm = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(b), *conv_bn_relu(c, channels, 1)) for b in BINS
        )
        self.decoder.cbr_deepsup = nn.Sequential(*conv_bn_relu(c // 2, c // 4))
        self.decoder.conv_last = nn.Sequential(*tail(c + 4 * channels, channels, classes))
        self.decoder.conv_last_deepsup = nn.Conv2d(c // 4, classes, 1)

    def maps(self, x):
        return self.encoder(x)[-2:]

    def head_of(self, x):
        return self.decoder.conv_last(self.concatenated(x, [level[1:] for level in self.decoder.ppm]))

    def aux(self, x):
        return self.decoder.conv_last_deepsup(self.decoder.cbr_deepsup(x))


NETWORKS = {
    "semseg-50": lambda: Semseg(50, 4),
    "mmseg-50": lambda: Mmseg(50, 4),
    "mmseg-18": lambda: Mmseg(18, 8),
    "mmseg-50b": lambda: Mmseg(50, 4, "plain"),
    "smp-50": lambda: Smp(50, 4),
    "smp-18": lambda: Smp(18, 8),
    "tramac-50": lambda: Tramac(50, 4),
    "encoding-50": lambda: Encoding(50, 4),
    "csail-50": lambda: Csail(50, 4),
    "csail-18": lambda: Csail(18, 8),
    "torchvision-50": lambda: Numbered(50, 4, "plain", UNDILATED, classes=10),
    "torchvision-18": lambda: Numbered(18, 8, "plain", UNDILATED),
    "imagenet-50": lambda: Numbered(50, 4, "deep", UNDILATED, classes=10),
}
"""The libraries' networks by family and depth."""


def make(name):
    """A network with random weights and running statistics, in evaluation mode."""
    torch.manual_seed(sum(map(ord, name)))
    net = NETWORKS[name]()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.2)
            module.running_var.uniform_(0.5, 1.5)
            module.num_batches_tracked.random_(1, 2**40)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.2)
    return net.eval()


def wrapped(name, state):
    """What the library's file holds, around a state_dict."""
    state = OrderedDict(state)
    return {
        "semseg": lambda: {"epoch": 3, "state_dict": {f"module.{key}": tensor for key, tensor in state.items()}},
        "mmseg": lambda: {"meta": {"mmseg_version": "0.6.0"}, "state_dict": state, "optimizer": {"lr": 0.01}},
        "encoding": lambda: {"epoch": 3, "state_dict": state, "best_pred": 0.5},
    }.get(name.partition("-")[0], lambda: state)()


def write(name, net, folder):
    """The library's file or files."""
    if name.startswith("csail"):
        paths = (folder / f"{name}_encoder_epoch_20.pth", folder / f"{name}_decoder_epoch_20.pth")
        for path, part in zip(paths, (net.encoder, net.decoder), strict=True):
            torch.save(part.state_dict(), path)
        return paths
    path = folder / f"{name}.pth"
    torch.save(wrapped(name, net.state_dict()), path)
    return path
