"""PSPNet from a picture to labels, once in plain PyTorch and once on the kernels, compared and timed.

The network is untrained: what is shown is that both compute the same, and what each stage costs.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import cast

import torch
import torch.nn.functional as F
from torch import nn

from ..backends import choose
from ..functional import upsample_argmax
from ..models.pspnet import PSPNet
from ..nn.plain_ppm import PlainPPM
from ..nn.psp_head import psp_head
from ..predict import network_input, read_picture, to_pixels

Stage = Callable[[torch.Tensor], torch.Tensor]


def calibrate(net: PSPNet, images: torch.Tensor) -> None:
    """Set every batch norm's running statistics to those of `images`, so that an untrained network's activations are sane."""
    norms = [module for module in net.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
    net.train()
    with torch.no_grad():
        net(images)
    net.eval()


HEAD, LABELS = "head (pyramid, bottleneck, classifier)", "labels (upsampling, argmax)"


def plain_stages(net: PSPNet, ppm: nn.Module, crop: int) -> dict[str, Stage]:
    """The network in evaluation, cut into pieces that are timed, with another PPM of the same parameters."""
    return {
        "backbone (ResNet, output stride 8)": lambda x: net.features(x)[1],
        HEAD: lambda x: net.cls(ppm(x)),
        LABELS: lambda x: F.interpolate(x, (crop, crop), mode="bilinear", align_corners=True).argmax(1),
    }


def our_stages(net: PSPNet, crop: int) -> dict[str, Stage]:
    """The same pieces of `net.predict`."""
    return {
        "backbone (ResNet, output stride 8)": lambda x: net.features(x)[1],
        HEAD: lambda x: psp_head(net.ppm, net.cls, x),
        LABELS: lambda x: cast(torch.Tensor, upsample_argmax(x, (crop, crop))),
    }


def compare(
    plain: dict[str, Stage], ours: dict[str, Stage], x: torch.Tensor, repeats: int
) -> tuple[dict[str, tuple[float, float]], dict[str, tuple[torch.Tensor, torch.Tensor]]]:
    """Median seconds of every stage, plain and ours, taking turns; and what both give out."""
    sides = (plain, ours)
    seconds: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in plain}
    results = {}
    with torch.inference_mode():
        for turn in range(repeats + 1):  # the first one warms up
            values = [x, x]
            for name in plain:
                for i in (0, 1) if turn % 2 else (1, 0):  # neither side always runs in the caches the other has left
                    start = time.perf_counter()
                    values[i] = sides[i][name](values[i])
                    if turn:
                        seconds[name][i].append(time.perf_counter() - start)
                results[name] = (values[0], values[1])
    return {name: (statistics.median(a), statistics.median(b)) for name, (a, b) in seconds.items()}, results


def show(path: Path, layers: int, crop: int, repeats: int) -> None:
    """Compare on one picture, and print a table.

    Raises:
        PictureError: no picture at `path`. ValueError: no such ResNet.
    """
    torch.manual_seed(0)
    x = _input(path, crop)
    net = PSPNet(layers=layers, classes=150)
    calibrate(net, torch.cat([x, x.flip(3)]))
    plain_ppm = PlainPPM(net.channels[1], net.channels[1] // 4).eval()
    plain_ppm.load_state_dict(net.ppm.state_dict())
    medians, results = compare(plain_stages(net, plain_ppm, crop), our_stages(net, crop), x, repeats)
    _print(medians, results, layers, choose("pyramid_pool", "forward", x)[0])


def _input(path: Path, crop: int) -> torch.Tensor:
    """The picture, squeezed to a square and normalised: (1, 3, crop, crop)."""
    pixels = to_pixels(read_picture(path).resize((crop, crop)), torch.device("cpu"))
    return network_input(pixels.float())[None]


def _print(
    medians: dict[str, tuple[float, float]],
    results: dict[str, tuple[torch.Tensor, torch.Tensor]],
    layers: int,
    backend: str,
) -> None:
    (plain, ours), (plain_labels, labels) = results[HEAD], results[LABELS]
    size = "x".join(map(str, labels.shape[1:]))
    print(f"PSPNet-{layers}, 150 classes, 1x3x{size}, float32, CPU, {torch.get_num_threads()} threads")
    print("plain: adaptive_avg_pool2d, conv2d, batch_norm, relu, interpolate, cat, argmax, in eager PyTorch")
    print(f"ours:  pspnet_fast on its {backend!r} backend\n")
    print(f"{'stage':40}{'plain':>10}{'ours':>10}{'ratio':>8}")
    total = tuple(sum(column) for column in zip(*medians.values(), strict=True))
    for name, (theirs, mine) in [*medians.items(), ("all", (total[0], total[1]))]:
        print(f"{name:40}{1e3 * theirs:7.1f} ms{1e3 * mine:7.1f} ms{theirs / mine:7.2f}x")
    largest = (plain - ours).abs().max().item()
    same = (plain_labels == labels).float().mean().item()
    print(f"\nlargest difference of the logits  {largest:.1e}, of values up to {plain.abs().max().item():.1f}")
    print(f"pixels with the same label        {100 * same:.3f} %")
