"""Pictures to labels: semseg's sliding windows, multiple scales and flips, and the files that are written.

The protocol is that of semseg (hszhao/semseg, tool/test.py): the picture is resized so that its long side is
scale * base_size, cut into windows of `crop` that overlap by a third, the softmax of all windows averaged, resized to the
picture's size, and averaged over scales. Everything runs on the network's device.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from .data.classes import CLASSES, Classes
from .models.checkpoint import bare_state_dict, read_checkpoint
from .models.pspnet import PSPNet

if TYPE_CHECKING:
    from PIL import Image

MEAN = (123.675, 116.28, 103.53)  # ImageNet's, of RGB from 0 to 255
STD = (58.395, 57.12, 57.375)
PICTURES = (".jpg", ".jpeg", ".png")

CROPS = {"ade20k": 473, "voc2012": 473, "cityscapes": 713}
BASE_SIZES = {"ade20k": 512, "voc2012": 512, "cityscapes": 2048}


class PictureError(Exception):
    """A file that is no picture, or a picture that cannot be written; the message names it."""


class Protocol(NamedTuple):
    """How a picture is shown to the network.

    Attributes:
        crop: side of the square windows, in pixels; None shows whole pictures.
        base_size: length that the long side is resized to at scale 1; None keeps the picture's own.
        scales: factors of base_size; the probabilities are averaged over them.
        flip: whether the mirrored picture is averaged in.
        batch_size: windows in one call of the network.
    """

    crop: int | None = 473
    base_size: int | None = 512
    scales: tuple[float, ...] = (1.0,)
    flip: bool = False
    batch_size: int = 4


def windows(size: int, crop: int) -> list[int]:
    """First pixels of the windows along an axis of at least `crop` pixels: a stride of 2/3, the last one shifted back."""
    stride = math.ceil(crop * 2 / 3)
    count = math.ceil((size - crop) / stride) + 1
    return [min(i * stride, size - crop) for i in range(count)]


def network_input(pixels: torch.Tensor) -> torch.Tensor:
    """RGB from 0 to 255 (3, H, W), normalised by ImageNet's mean and standard deviation."""
    mean, std = (pixels.new_tensor(numbers)[:, None, None] for numbers in (MEAN, STD))
    return (pixels - mean) / std


def _softmax(net: nn.Module, crops: torch.Tensor, protocol: Protocol) -> torch.Tensor:
    """Crops (M, 3, h, w), normalised, to class probabilities (M, K, h, w)."""
    parts = []
    for batch in crops.split(protocol.batch_size):
        probabilities = net(batch).float().softmax(1)
        if protocol.flip:
            probabilities = (probabilities + net(batch.flip(3)).float().softmax(1).flip(3)) / 2
        parts.append(probabilities)
    return torch.cat(parts)


def _sliding(net: nn.Module, image: torch.Tensor, protocol: Protocol, crop: int) -> torch.Tensor:
    """A normalised picture (3, h, w) to probabilities (K, h, w): the mean over the windows that hold a pixel."""
    _, height, width = image.shape
    pad_h, pad_w = max(crop - height, 0), max(crop - width, 0)
    top, left = pad_h // 2, pad_w // 2
    padded = F.pad(image, (left, pad_w - left, top, pad_h - top))  # the mean, once normalised, is 0
    corners = [(h, w) for h in windows(padded.shape[1], crop) for w in windows(padded.shape[2], crop)]
    total, count = None, padded.new_zeros(padded.shape[1:])
    for start in range(0, len(corners), protocol.batch_size):
        some = corners[start : start + protocol.batch_size]
        crops = torch.stack([padded[:, h : h + crop, w : w + crop] for h, w in some])
        probabilities = _softmax(net, crops, protocol)
        if total is None:
            total = probabilities.new_zeros(probabilities.shape[1], *padded.shape[1:])
        for (h, w), one in zip(some, probabilities, strict=True):
            total[:, h : h + crop, w : w + crop] += one
            count[h : h + crop, w : w + crop] += 1
    assert total is not None
    return (total / count)[:, top : top + height, left : left + width]


@torch.inference_mode()
def predict_probabilities(net: nn.Module, pixels: torch.Tensor, protocol: Protocol) -> torch.Tensor:
    """Class probabilities of one picture.

    Args:
        net: from (N, 3, h, w) to logits (N, K, h, w), in evaluation mode.
        pixels: RGB from 0 to 255, (3, H, W), uint8 or floating point, on the network's device.
        protocol: windows, scales and flips.

    Returns:
        (K, H, W), float32, summing to 1 over K.

    Raises:
        ValueError: pixels of another shape.
    """
    if pixels.dim() != 3 or pixels.shape[0] != 3 or 0 in pixels.shape:
        raise ValueError(f"predict: pixels must be (3, H, W), got {tuple(pixels.shape)}")
    image = network_input(pixels.float())
    size = height, width = image.shape[1], image.shape[2]
    total = None
    for scale in protocol.scales:
        long_side = round(scale * (protocol.base_size or max(size)))
        scaled = [max(1, round(long_side / max(size) * side)) for side in size]
        resized = F.interpolate(image[None], scaled, mode="bilinear", align_corners=False)
        if protocol.crop is None:
            probabilities = _softmax(net, resized, protocol)
        else:
            probabilities = _sliding(net, resized[0], protocol, protocol.crop)[None]
        probabilities = F.interpolate(probabilities, (height, width), mode="bilinear", align_corners=False)[0]
        total = probabilities if total is None else total + probabilities
    assert total is not None
    return total / len(protocol.scales)


def read_picture(path: Path) -> Image.Image:
    """A picture in RGB, turned as its EXIF orientation says. PictureError names a file that is none, or is cut short."""
    from PIL import Image, ImageOps

    if path.is_dir():
        raise PictureError(f"{path}: is a directory, not a picture")
    try:
        with Image.open(path) as file:
            return ImageOps.exif_transpose(file).convert("RGB")
    except FileNotFoundError:
        raise PictureError(f"{path}: no such file") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise PictureError(f"{path}: cannot be read as a picture: {error}") from error


def to_pixels(picture: Image.Image, device: torch.device) -> torch.Tensor:
    """(3, H, W), uint8."""
    import numpy as np

    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).to(device)


def colour(labels: torch.Tensor, classes: Classes) -> Image.Image:
    """Labels (H, W) as a picture in the dataset's colours."""
    from PIL import Image

    palette = torch.tensor(classes.colours, dtype=torch.uint8)
    return Image.fromarray(palette[labels.cpu().long()].numpy())


def overlay(picture: Image.Image, labels: torch.Tensor, classes: Classes) -> Image.Image:
    """The picture under its colours, and beside it a legend: swatch, name and share of the classes, largest first."""
    from PIL import Image, ImageDraw, ImageFont

    size = max(12, min(22, picture.height // 24))
    font, row, margin = ImageFont.load_default(size), round(1.6 * size), size
    counts = torch.bincount(labels.cpu().flatten().long(), minlength=len(classes.names))
    present = [int(k) for k in counts.argsort(descending=True, stable=True) if counts[k] > 0]
    height = max(picture.height, 2 * margin + 5 * row)
    room = (height - 2 * margin) // row
    shown = present if len(present) <= room else present[: room - 1]
    entries = [f"{classes.names[k]}  {100 * int(counts[k]) / labels.numel():.1f} %" for k in shown]
    if len(shown) < len(present):
        entries.append(f"and {len(present) - len(shown)} more")
    panel = 3 * margin + round(max(font.getlength(entry) for entry in entries)) + size

    canvas = Image.new("RGB", (picture.width + panel, height), "white")
    canvas.paste(Image.blend(picture, colour(labels, classes), 0.55), (0, 0))
    draw = ImageDraw.Draw(canvas)
    for i, entry in enumerate(entries):
        x, y = picture.width + margin, margin + i * row
        if i < len(shown):
            draw.rectangle((x, y, x + size, y + size), fill=classes.colours[shown[i]], outline="black")
        draw.text((x + size + margin, y + size / 2), entry, fill="black", font=font, anchor="lm")
    return canvas


def save(picture: Image.Image, path: Path) -> None:
    """Written under another name and then renamed, so that no half of a file is ever seen."""
    temporary = path.with_name(f".{path.name}.part")
    try:
        picture.save(temporary, format="PNG")
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise PictureError(f"{path}: cannot be written: {error.strerror or error}") from error


def outputs(path: Path, folder: Path) -> dict[str, Path]:
    """Where the three pictures of an input go."""
    return {kind: folder / f"{path.stem}_{kind}.png" for kind in ("labels", "colour", "overlay")}


def predict_file(net: nn.Module, path: Path, folder: Path, classes: Classes, protocol: Protocol) -> None:
    """Read a picture, predict it, and write labels, colours and overlay into `folder`."""
    from PIL import Image

    picture = read_picture(path)
    device = next(net.parameters()).device
    labels = predict_probabilities(net, to_pixels(picture, device), protocol).argmax(0).to(torch.uint8).cpu()
    made = {
        "labels": Image.fromarray(labels.numpy()),
        "colour": colour(labels, classes),
        "overlay": overlay(picture, labels, classes),
    }
    for kind, target in outputs(path, folder).items():
        save(made[kind], target)


def load_network(weights: Path | None, layers: int, classes: int) -> PSPNet:
    """PSPNet in evaluation mode, with a checkpoint's weights, or at random for None.

    Raises:
        OSError: no such file.
        ValueError: a checkpoint of other classes, or (`CheckpointError`) one that does not fit.
    """
    if weights is None:
        return PSPNet(layers=layers, classes=classes).eval()
    state = read_checkpoint(weights)
    net = PSPNet(layers=layers, classes=classes, aux=False)
    head = bare_state_dict(state).get("cls.4.weight")
    if head is not None and head.shape[0] != classes:
        raise ValueError(f"{weights}: has {head.shape[0]} classes, and the dataset {classes}: choose its --dataset")
    net.load_state_dict(state)
    return net.eval()


def _pictures(arguments: Sequence[Path], folder: Path) -> list[Path]:
    """The files to predict: a directory stands for its pictures, sorted."""
    found: list[Path] = []
    for argument in arguments:
        if not argument.is_dir():
            found.append(argument)
            continue
        inside = sorted(path for path in argument.iterdir() if path.suffix.lower() in PICTURES)
        if not inside:
            raise PictureError(f"{argument}: holds no picture ({', '.join(PICTURES)})")
        found += inside
    written: dict[Path, Path] = {}
    for path in found:
        for target in outputs(path.resolve(), folder.resolve()).values():
            if target in written:
                raise PictureError(f"{path} and {written[target]}: both would be written to {target}")
            if any(target == other.resolve() for other in found):
                raise PictureError(f"{path}: its result {target} would overwrite a picture to predict")
            written[target] = path
    return found


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line of `pspnet-fast predict`."""
    parser.add_argument("pictures", nargs="+", type=Path, metavar="IMAGE", help="JPEG or PNG files, or folders of them")
    parser.add_argument("--output", type=Path, default=Path("predictions"), metavar="DIR", help="default: predictions")
    weights = parser.add_mutually_exclusive_group(required=True)
    weights.add_argument("--weights", type=Path, metavar="FILE", help="a checkpoint of PSPNet, ours or semseg's")
    weights.add_argument("--random-weights", action="store_true", help="an untrained network, to try the command")
    parser.add_argument("--dataset", choices=sorted(CLASSES), default="ade20k", help="names and colours of the classes")
    parser.add_argument("--layers", type=int, default=50, help="depth of the ResNet (default 50)")
    parser.add_argument("--crop", type=int, help="side of the sliding windows (default 473, cityscapes 713)")
    parser.add_argument("--whole", action="store_true", help="show whole pictures, at their own size, without windows")
    parser.add_argument("--base-size", type=int, help="long side at scale 1 (default 512, cityscapes 2048)")
    parser.add_argument("--scales", type=float, nargs="+", default=[1.0], help="averaged over, such as 0.5 1 1.5")
    parser.add_argument("--flip", action="store_true", help="average with the mirrored picture")
    parser.add_argument("--batch-size", type=int, default=4, help="windows at a time (default 4)")
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda, cuda:1 ..."
    )


def _protocol(args: argparse.Namespace) -> Protocol:
    for name, value in (("crop", args.crop), ("base-size", args.base_size), ("batch-size", args.batch_size)):
        if value is not None and value < 1:
            raise ValueError(f"--{name} must be at least 1, got {value}")
    if min(args.scales) <= 0:
        raise ValueError(f"--scales must be positive, got {args.scales}")
    return Protocol(
        crop=None if args.whole else args.crop or CROPS[args.dataset],
        base_size=args.base_size or (None if args.whole else BASE_SIZES[args.dataset]),
        scales=tuple(args.scales),
        flip=args.flip,
        batch_size=args.batch_size,
    )


def _progress(paths: Sequence[Path]) -> Iterator[Path]:
    from tqdm import tqdm

    yield from tqdm(paths, unit="picture", disable=len(paths) < 2)


def run(args: argparse.Namespace) -> int:
    """`pspnet-fast predict`. Exit status 0; 1 where pictures failed (named, the rest is done); 2 where nothing could start."""
    try:
        classes, protocol = CLASSES[args.dataset], _protocol(args)
        net = load_network(args.weights, args.layers, len(classes.names)).to(args.device)
        paths = _pictures(args.pictures, args.output)
        args.output.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError, RuntimeError, PictureError) as error:
        print(f"pspnet-fast predict: {error}", file=sys.stderr)
        return 2
    if args.random_weights:
        print("pspnet-fast predict: the network is untrained, its labels mean nothing", file=sys.stderr)
    failed: list[str] = []
    for path in _progress(paths):
        try:
            predict_file(net, path, args.output, classes, protocol)
        except PictureError as error:
            failed.append(str(error))
    for sentence in failed:
        print(f"pspnet-fast predict: {sentence}", file=sys.stderr)
    print(f"{len(paths) - len(failed)} of {len(paths)} pictures predicted, in {args.output}")
    return 1 if failed else 0
