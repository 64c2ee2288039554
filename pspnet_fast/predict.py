"""Pictures to labels: semseg's sliding windows, multiple scales and flips, and the files that are written.

The protocol is that of semseg (hszhao/semseg, tool/test.py): the picture is resized so that its long side is
scale * base_size, cut into windows of `crop` that overlap by a third, the softmax of all windows averaged, resized to the
picture's size, and averaged over scales. Everything runs on the network's device. `pspnet-fast predict` is its command line.

Past 300 lines, because reading, legend and writing serve the protocol only and are read beside it.
"""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from .data.classes import Classes
from .geometry import bilinear_tap
from .models.checkpoint import bare_state_dict, read_checkpoint
from .models.pspnet import PSPNet

try:
    from PIL import Image, ImageDraw, ImageFont, ImageOps
    from tqdm import tqdm
except ImportError as error:
    raise ImportError(f"predict needs Pillow and tqdm ({error}): pip install 'pspnet_fast[predict]'") from error

MEAN = (123.675, 116.28, 103.53)  # ImageNet's, of RGB from 0 to 255
STD = (58.395, 57.12, 57.375)
PICTURES = (".jpg", ".jpeg", ".png")
BAND = 2**24  # probabilities at the picture's size that are held at once: 64 MB


class PictureError(ValueError):
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


def _by_scale(net: nn.Module, pixels: torch.Tensor, protocol: Protocol) -> list[torch.Tensor]:
    """Class probabilities (K, h, w) at every scale, at the size the network saw."""
    if pixels.dim() != 3 or pixels.shape[0] != 3 or 0 in pixels.shape:
        raise ValueError(f"predict: pixels must be (3, H, W), got {tuple(pixels.shape)}")
    image = network_input(pixels.float())
    size = image.shape[1], image.shape[2]
    maps = []
    for scale in protocol.scales:
        long_side = round(scale * (protocol.base_size or max(size)))
        scaled = [max(1, round(long_side / max(size) * side)) for side in size]
        resized = F.interpolate(image[None], scaled, mode="bilinear", align_corners=False)
        if protocol.crop is None:
            maps.append(_softmax(net, resized, protocol)[0])
        else:
            maps.append(_sliding(net, resized[0], protocol, protocol.crop))
    return maps


def _rows(maps: Sequence[torch.Tensor], rows: range, height: int, width: int) -> torch.Tensor:
    """Some rows (K, rows, W) of the mean of `maps`, each resized to (H, W) bilinearly with half-pixel centres."""
    total = None
    for one in maps:
        lower, upper, numerator, denominator = zip(
            *(bilinear_tap(i, height, one.shape[1], align_corners=False) for i in rows), strict=True
        )
        share = one.new_tensor(numerator) / one.new_tensor(denominator)
        blended = torch.lerp(one[:, list(lower)], one[:, list(upper)], share[:, None])
        resized = F.interpolate(blended[None], (len(rows), width), mode="bilinear", align_corners=False)[0]
        total = resized if total is None else total.add_(resized)
    assert total is not None
    return total / len(maps)


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
    maps = _by_scale(net, pixels, protocol)
    height, width = pixels.shape[1:]
    return _rows(maps, range(height), height, width)


@torch.inference_mode()
def predict_labels(net: nn.Module, pixels: torch.Tensor, protocol: Protocol) -> torch.Tensor:
    """`predict_probabilities(...).argmax(0)`, (H, W), in bands of rows: all of a photograph's probabilities are gigabytes."""
    maps = _by_scale(net, pixels, protocol)
    height, width = pixels.shape[1:]
    step = max(1, BAND // (maps[0].shape[0] * width))
    bands = (range(start, min(start + step, height)) for start in range(0, height, step))
    return torch.cat([_rows(maps, rows, height, width).argmax(0) for rows in bands])


def read_picture(path: Path) -> Image.Image:
    """A picture in RGB, turned as its EXIF orientation says. PictureError names a file that is none, or is cut short."""
    if path.is_dir():
        raise PictureError(f"{path}: is a directory, not a picture")
    try:
        with Image.open(path) as file:
            picture = ImageOps.exif_transpose(file)
            if picture.mode.startswith("I"):  # 16 bits a pixel, which convert() would clip at 255
                picture = Image.fromarray((np.asarray(picture).clip(0, 65535) // 256).astype(np.uint8))
            if picture.mode == "F":
                raise ValueError("floating-point pixels, of no known range")
            return picture.convert("RGB")
    except FileNotFoundError:
        raise PictureError(f"{path}: no such file") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise PictureError(f"{path}: cannot be read as a picture: {error}") from error


def to_pixels(picture: Image.Image, device: torch.device) -> torch.Tensor:
    """(3, H, W), uint8."""
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).to(device)


def colour(labels: torch.Tensor, classes: Classes) -> Image.Image:
    """Labels (H, W) as a picture in the dataset's colours."""
    palette = torch.tensor(classes.colours, dtype=torch.uint8)
    return Image.fromarray(palette[labels.cpu().long()].numpy())


def overlay(picture: Image.Image, labels: torch.Tensor, classes: Classes) -> Image.Image:
    """The picture under its colours, and beside it a legend: swatch, name and share of the classes, largest first."""
    size = max(12, min(22, picture.height // 24))
    font, row, margin = ImageFont.load_default(size), round(1.6 * size), size
    counts = torch.bincount(labels.cpu().flatten().long(), minlength=len(classes.names))
    present = [int(k) for k in counts.argsort(descending=True, stable=True) if counts[k] > 0]
    height = max(picture.height, 2 * margin + 5 * row)
    room = (height - 2 * margin) // row
    shown = present if len(present) <= room else present[: room - 1]
    entries = [f"{classes.names[k]}  {_per_cent(int(counts[k]), labels.numel())}" for k in shown]
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


def _per_cent(part: int, whole: int) -> str:
    share = 100 * part / whole
    return f"{share:.1f} %" if share >= 0.05 else "< 0.1 %"


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
    picture = read_picture(path)
    device = next(net.parameters()).device
    labels = predict_labels(net, to_pixels(picture, device), protocol).to(torch.uint8).cpu()
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


def pictures_of(arguments: Sequence[Path], folder: Path) -> list[Path]:
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


def make_folder(folder: Path) -> None:
    """Make a folder, and see that files can be written into it before hours are spent on them. PictureError where not."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise PictureError(f"{folder}: cannot be written into: {error.strerror or error}") from error


def predict_files(
    net: nn.Module, paths: Sequence[Path], folder: Path, classes: Classes, protocol: Protocol
) -> list[PictureError]:
    """`predict_file` for each, with a progress bar where there are several. Returns what failed; the rest is done."""
    failed = []
    for path in tqdm(paths, unit="picture", disable=len(paths) < 2):
        try:
            predict_file(net, path, folder, classes, protocol)
        except PictureError as error:
            failed.append(error)
    return failed
