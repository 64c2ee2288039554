"""Pictures to labels: sliding windows, multiple scales and flips by named protocols, and the files that are written.

The protocol is that of semseg (hszhao/semseg, tool/test.py): the picture is resized so that its long side is
scale * base_size, cut into windows of `crop` that overlap by a third, the softmax of all windows averaged, resized to the
picture's size, and averaged over scales. Caffe's, that of the paper's own code, differs from it in three points (`Protocol`).
Everything runs on the network's device. `pspnet-fast predict` is its command line.

Past 300 lines, because reading, legend and writing serve the protocol only and are read beside it.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast, get_args

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from .data.classes import Classes
from .data.normalisation import MEAN, STD
from .files import replacing
from .functional import upsample_argmax, upsample_softmax_add
from .geometry import accumulation_dtype, bilinear_tap
from .models.checkpoint import bare_state_dict, read_checkpoint
from .models.pspnet import PSPNet
from .nn.calls import why_call

try:
    from PIL import Image, ImageDraw, ImageFont, ImageOps
    from tqdm import tqdm
except ImportError as error:
    raise ImportError(f"predict needs Pillow and tqdm ({error}): pip install 'pspnet_fast[predict]'") from error

PICTURES = (".jpg", ".jpeg", ".png")
BAND = 2**22  # probabilities at the picture's size that are held at once: 16 MB, which caches and the allocator keep

Kind = Literal["semseg", "caffe"]


class PictureError(ValueError):
    """A file that is no picture, or one that cannot be written; the message names it."""


class Protocol(NamedTuple):
    """How a picture is shown to the network.

    Attributes:
        crop: side of the square windows, in pixels; None shows whole pictures.
        base_size: length that the long side is resized to at scale 1; None keeps the picture's own.
        scales: factors of base_size; the probabilities are averaged over them.
        flip: whether the mirrored picture is shown, too.
        batch_size: windows in one call of the network.
        kind: "semseg" (hszhao/semseg, tool/test.py): long side round(scale * base_size), the mean on all sides of a picture
            smaller than the window, the softmax of both directions averaged. "caffe" (hszhao/PSPNet, evaluation/eval_sub.m,
            scale_process.m, caffe_process.m): a long side longer by 1, the mean at the bottom and on the right, the logits
            of both directions summed (not averaged) before the softmax. Matlab's imresize, which smooths what it shrinks
            and rounds pixels to whole numbers, is not restated: both kinds resize alike.
    """

    crop: int | None = 473
    base_size: int | None = 512
    scales: tuple[float, ...] = (1.0,)
    flip: bool = False
    batch_size: int = 4
    kind: Kind = "semseg"


# By name, as published for crops of 473; for another dataset: PROTOCOLS["caffe"]._replace(crop=713, base_size=2048).
PROTOCOLS: Mapping[str, Protocol] = {
    "semseg": Protocol(),
    "caffe": Protocol(flip=True, kind="caffe"),
    "whole": Protocol(crop=None, base_size=None, batch_size=1),
}
MULTIPLE_SCALES = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)  # of section 5 of the paper, with flips


def _check_protocol(protocol: Protocol) -> None:
    if protocol.kind not in get_args(Kind):
        raise ValueError(f"Protocol: kind must be one of {', '.join(get_args(Kind))}, got {protocol.kind!r}")
    for name in ("crop", "base_size", "batch_size"):
        value = getattr(protocol, name)
        if value is not None and value < 1:
            raise ValueError(f"Protocol: {name} must be at least 1, got {value}")
    if not protocol.scales or min(protocol.scales) <= 0:
        raise ValueError(f"Protocol: scales must be positive, and one at least, got {protocol.scales}")


def scaled_size(height: int, width: int, scale: float, protocol: Protocol) -> tuple[int, int]:
    """Height and width that a picture is resized to at one scale."""
    longest = max(height, width)
    long_side = round(scale * (protocol.base_size or longest)) + (protocol.kind == "caffe")
    rows, columns = (max(1, round(long_side / longest * side)) for side in (height, width))
    return rows, columns


def windows(size: int, crop: int) -> list[int]:
    """First pixels of the windows along an axis of at least `crop` pixels: a stride of 2/3, the last one shifted back."""
    stride = math.ceil(crop * 2 / 3)
    count = math.ceil((size - crop) / stride) + 1
    return [min(i * stride, size - crop) for i in range(count)]


def network_input(pixels: torch.Tensor) -> torch.Tensor:
    """RGB from 0 to 255 (3, H, W), normalised by ImageNet's mean and standard deviation."""
    mean, std = (pixels.new_tensor(numbers)[:, None, None] for numbers in (MEAN, STD))
    return (pixels - mean) / std


class _Batch(NamedTuple):
    """Windows that the network saw at once."""

    logits: torch.Tensor  # (M, K, h', w'), as coarse as they come
    corners: list[tuple[int, int]]  # first row and column of each in the picture at its scale, negative in a border
    flipped: bool


class _Scale(NamedTuple):
    """A picture at one scale, as far as the network is concerned."""

    size: tuple[int, int]
    window: tuple[int, int]
    align_corners: bool
    batches: list[_Batch]


def _coarse_logits(net: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """Logits of any size: a PSPNet's are the coarse ones, unless calling it would do anything else than its forward."""
    if isinstance(net, PSPNet) and type(net).forward is PSPNet.forward and why_call(net) is None:
        return net.coarse_logits(images)
    return cast(torch.Tensor, net(images))


def _by_scale(net: nn.Module, pixels: torch.Tensor, protocol: Protocol) -> list[_Scale]:
    """Show the picture to the network at every scale."""
    if pixels.dim() != 3 or pixels.shape[0] != 3 or 0 in pixels.shape:
        raise ValueError(f"predict: pixels must be (3, H, W), got {tuple(pixels.shape)}")
    _check_protocol(protocol)
    image = network_input(pixels.float())
    caffe = protocol.kind == "caffe"
    found = []
    for scale in protocol.scales:
        height, width = scaled_size(image.shape[1], image.shape[2], scale, protocol)
        resized = F.interpolate(image[None], (height, width), mode="bilinear", align_corners=False)[0]
        window = (height, width) if protocol.crop is None else (protocol.crop, protocol.crop)
        pad_h, pad_w = max(window[0] - height, 0), max(window[1] - width, 0)
        top, left = (0, 0) if caffe else (pad_h // 2, pad_w // 2)
        padded = F.pad(resized, (left, pad_w - left, top, pad_h - top))  # the mean, once normalised, is 0
        rows, columns = (windows(n, crop) for n, crop in zip(padded.shape[1:], window, strict=True))
        corners = [(h, w) for h in rows for w in columns]
        batches = []
        for start in range(0, len(corners), protocol.batch_size):
            some = corners[start : start + protocol.batch_size]
            crops = torch.stack([padded[:, h : h + window[0], w : w + window[1]] for h, w in some])
            places = [(h - top, w - left) for h, w in some]
            logits = _coarse_logits(net, crops)
            mirrored = _coarse_logits(net, crops.flip(3)) if protocol.flip else None
            if mirrored is not None and caffe:
                # Upsampling is linear and its taps are symmetric: the sum may be taken of coarse logits, exact to rounding.
                logits, mirrored = logits.to(accumulation_dtype(logits.dtype)) + mirrored.flip(3), None
            batches.append(_Batch(logits, places, flipped=False))
            if mirrored is not None:
                batches.append(_Batch(mirrored, places, flipped=True))
        align_corners = net.align_corners if isinstance(net, PSPNet) else False
        found.append(_Scale((height, width), window, align_corners, batches))
    return found


def _probabilities(scale: _Scale, first: int, last: int) -> torch.Tensor:
    """Rows [first, last) of (K, H, W) at the scale's size: the mean over the windows that hold a pixel."""
    logits, width = scale.batches[0].logits, scale.size[1]
    total = logits.new_zeros((logits.shape[1], last - first, width), dtype=torch.float32)
    count = total.new_zeros(total.shape[1:])
    for batch in scale.batches:
        corners = [(top - first, left) for top, left in batch.corners]
        upsample_softmax_add(total, batch.logits, corners, scale.window, scale.align_corners, batch.flipped)
        for top, left in corners:
            rows, columns = (slice(max(a, 0), max(a + n, 0)) for a, n in zip((top, left), scale.window, strict=True))
            count[rows, columns] += 1
    return total.div_(count)


def _rows(scales: Sequence[_Scale], rows: range, height: int, width: int) -> torch.Tensor:
    """Some rows (K, rows, W) of the mean over scales, each resized to (H, W) bilinearly with half-pixel centres."""
    total = None
    for scale in scales:
        lower, upper, numerator, denominator = zip(
            *(bilinear_tap(i, height, scale.size[0], align_corners=False) for i in rows), strict=True
        )
        first = lower[0]
        one = _probabilities(scale, first, upper[-1] + 1)
        if scale.size != (height, width):
            share = one.new_tensor(numerator) / one.new_tensor(denominator)
            above, below = ([i - first for i in ends] for ends in (lower, upper))
            one = torch.lerp(one[:, above], one[:, below], share[:, None])
            one = F.interpolate(one[None], (len(rows), width), mode="bilinear", align_corners=False)[0]
        total = one if total is None else total.add_(one)
    assert total is not None
    return total / len(scales) if len(scales) > 1 else total


@torch.inference_mode()
def predict_probabilities(net: nn.Module, pixels: torch.Tensor, protocol: Protocol) -> torch.Tensor:
    """Class probabilities of one picture.

    Args:
        net: in evaluation mode, a PSPNet, or any module from (N, 3, h, w) to logits (N, K, h', w'), which are upsampled to
            (h, w) with half-pixel centres where they are coarser.
        pixels: RGB from 0 to 255, (3, H, W), uint8 or floating point, on the network's device.
        protocol: windows, scales and flips.

    Returns:
        (K, H, W), float32, summing to 1 over K.

    Raises:
        ValueError: pixels of another shape, or a protocol that cannot work.
    """
    scales = _by_scale(net, pixels, protocol)
    height, width = pixels.shape[1:]
    return _rows(scales, range(height), height, width)


@torch.inference_mode()
def predict_labels(net: nn.Module, pixels: torch.Tensor, protocol: Protocol) -> torch.Tensor:
    """`predict_probabilities(...).argmax(0)`, (H, W), int64.

    The windows' logits are kept as coarse as the network gives them. Their probabilities are made and added up in bands of
    rows: a photograph's, whole, would be gigabytes. Where one window is the whole picture, not even these are made.
    """
    scales = _by_scale(net, pixels, protocol)
    height, width = pixels.shape[1:]
    if len(scales) == 1 and scales[0].size == (height, width) and len(scales[0].batches) == 1:
        scale = scales[0]
        (batch,) = scale.batches
        if len(batch.corners) == 1:
            ((top, left),) = batch.corners
            labels = upsample_argmax(batch.logits, scale.window, scale.align_corners, dtype=torch.int64)
            labels = cast(torch.Tensor, labels)[0]
            return labels[-top : height - top, -left : width - left]
    step = max(1, BAND // (scales[0].batches[0].logits.shape[1] * width))
    bands = (range(start, min(start + step, height)) for start in range(0, height, step))
    return torch.cat([_rows(scales, rows, height, width).argmax(0) for rows in bands])


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
    """Labels (H, W) from 0 to 255 as a picture in the dataset's colours; white where a label, such as 255, is no class."""
    palette = torch.full((256, 3), 255, dtype=torch.uint8)
    palette[: len(classes.colours)] = torch.tensor(classes.colours, dtype=torch.uint8)
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
    """As PNG. PictureError where it cannot be written; what was there is then untouched."""
    with replacing(path, PictureError) as temporary:
        picture.save(temporary, format="PNG")


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


def load_network(weights: Path | None, layers: int, classes: int, state: Mapping[str, Any] | None = None) -> PSPNet:
    """PSPNet in evaluation mode, with a checkpoint's weights, or at random for None.

    Args:
        weights: the checkpoint's file.
        layers: depth of the ResNet.
        classes: number of classes.
        state: what `read_checkpoint` found in that file, where it has been read.

    Raises:
        OSError: no such file.
        ValueError: a checkpoint of other classes, or (`CheckpointError`) one that does not fit.
    """
    if weights is None:
        return PSPNet(layers=layers, classes=classes).eval()
    state = read_checkpoint(weights) if state is None else state
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
