"""Files of pictures to files of labels: what `pspnet-fast predict` reads and writes.

How a picture becomes labels stands in `protocol.py`, whose names are here, too.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from .data import images
from .data.classes import Classes
from .data.images import MAX_PIXELS
from .extras import install
from .files import replacing
from .models.checkpoint import bare_state_dict, read_checkpoint
from .models.pspnet import PSPNet
from .protocol import BAND as BAND
from .protocol import MULTIPLE_SCALES as MULTIPLE_SCALES
from .protocol import PROTOCOLS as PROTOCOLS
from .protocol import Protocol as Protocol
from .protocol import network_input as network_input
from .protocol import predict_labels as predict_labels
from .protocol import predict_probabilities as predict_probabilities
from .protocol import scaled_size as scaled_size
from .protocol import windows as windows

try:
    from PIL import Image, ImageDraw, ImageFont
    from tqdm import tqdm
except ImportError as error:
    raise ImportError(f"predict needs Pillow and tqdm ({error}): {install('predict')}") from error

PICTURES = images.SUFFIXES
BYTE_CLASSES, DEEP_CLASSES = 2**8, 2**16  # whose labels fit into 8 and 16 bits


class PictureError(ValueError):
    """A file that is no picture, or one that cannot be written; the message names it."""


def read_picture(path: Path, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """A picture in RGB, turned as its EXIF orientation says. PictureError names a file that is none, or is cut short."""
    return Image.fromarray(images.read_picture(path, PictureError, upright=True, max_pixels=max_pixels))


def to_pixels(picture: Image.Image, device: torch.device) -> torch.Tensor:
    """(3, H, W), uint8."""
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).to(device)


def colour(labels: torch.Tensor, classes: Classes) -> Image.Image:
    """Labels (H, W) as a picture in the dataset's colours; white where a label, such as 255 of fewer classes, is none."""
    found = labels.cpu().numpy()
    palette = np.full((max(256, len(classes.colours), int(found.max(initial=0)) + 1), 3), 255, np.uint8)
    palette[: len(classes.colours)] = classes.colours
    return Image.fromarray(palette[found])


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


def save_labels(labels: torch.Tensor, classes: int, path: Path) -> None:
    """Labels (H, W) on the CPU as a grey PNG whose values they are: of 8 bits for up to 256 classes, else of 16.

    ValueError where 16 bits do not hold them. PictureError where it cannot be written.
    """
    if classes > DEEP_CLASSES:
        raise ValueError(f"labels: there must be at most {DEEP_CLASSES} classes in a PNG, got {classes}")
    save(Image.fromarray(labels.numpy().astype(np.uint8 if classes <= BYTE_CLASSES else np.uint16)), path)


def outputs(path: Path, folder: Path) -> dict[str, Path]:
    """Where the three pictures of an input go."""
    return {kind: folder / f"{path.stem}_{kind}.png" for kind in ("labels", "colour", "overlay")}


def predict_file(
    net: nn.Module, path: Path, folder: Path, classes: Classes, protocol: Protocol, max_pixels: int = MAX_PIXELS
) -> None:
    """Read a picture, predict it, and write labels, colours and overlay into `folder`."""
    picture = read_picture(path, max_pixels)
    device = next(net.parameters()).device
    labels = predict_labels(net, to_pixels(picture, device), protocol).to(torch.int32).cpu()
    to = outputs(path, folder)
    save_labels(labels, len(classes.names), to["labels"])
    save(colour(labels, classes), to["colour"])
    save(overlay(picture, labels, classes), to["overlay"])


def load_network(weights: Path | None, layers: int, classes: int, state: Mapping[str, Any] | None = None) -> PSPNet:
    """PSPNet in evaluation mode, with a checkpoint's weights, or at random for None.

    Args:
        weights: the checkpoint's file.
        layers: depth of the ResNet.
        classes: number of classes.
        state: what `read_checkpoint` found in that file, where it has been read.

    Raises:
        OSError: no such file.
        ValueError: a checkpoint of other classes or channels, or (`CheckpointError`) one that does not fit.
    """
    if weights is None:
        return PSPNet(layers=layers, classes=classes).eval()
    state = read_checkpoint(weights) if state is None else state
    net = PSPNet(layers=layers, classes=classes, aux=False)
    bare = bare_state_dict(state)
    if "layer0.0.weight" in bare:
        check_channels(bare["layer0.0.weight"].shape[1], str(weights))
    head = bare.get("cls.4.weight")
    if head is not None and head.shape[0] != classes:
        raise ValueError(f"{weights}: has {head.shape[0]} classes, and the dataset {classes}: choose its --dataset")
    net.load_state_dict(state)
    return net.eval()


def check_channels(channels: int, source: str) -> None:
    """ValueError where a network takes something else than pictures in red, green and blue."""
    if channels != 3:
        raise ValueError(f"{source}: the network must take 3 channels, pictures are read in RGB, got one of {channels}")


def pictures_of(arguments: Sequence[Path], folder: Path) -> list[Path]:
    """The files to predict: a directory stands for its pictures, sorted, but for hidden ones.

    (macOS leaves `._a.jpg` beside `a.jpg`, which is no picture.)

    Raises:
        PictureError: a directory without pictures, two pictures whose results would have one name, or a result that would
            overwrite a picture. OSError: a directory that cannot be read.
    """
    found: list[Path] = []
    for argument in arguments:
        if not argument.is_dir():
            found.append(argument)
            continue
        inside = sorted(
            path for path in argument.iterdir() if path.suffix.lower() in PICTURES and not path.name.startswith(".")
        )
        if not inside:
            raise PictureError(f"{argument}: holds no picture ({', '.join(PICTURES)})")
        found += inside
    # Every path is resolved once: ten thousand pictures must not wait for a hundred million look-ups.
    target_folder = folder.resolve()
    read = {path.resolve() for path in found}
    read |= {path.parent.resolve() / path.name for path in found if path.is_symlink()}
    written: dict[Path, Path] = {}
    for path in found:
        for target in outputs(path, target_folder).values():
            if target in written:
                raise PictureError(f"{path} and {written[target]}: both would be written to {target}")
            if target in read:
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


def one_line(error: BaseException) -> str:
    """What an exception says, in a line: its kind where it says nothing, and that memory is what was missing."""
    words = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in words:
        return f"out of memory: {words}"
    return words


def predict_files(
    net: nn.Module,
    paths: Sequence[Path],
    folder: Path,
    classes: Classes,
    protocol: Protocol,
    max_pixels: int = MAX_PIXELS,
    *,
    rank: int = 0,
    world_size: int = 1,
) -> list[PictureError]:
    """`predict_file` for each, with a progress bar where there are several. Whatever fails with one, the rest is done.

    Args:
        net: as for `predict_labels`.
        paths: the pictures; the same in every process.
        folder: for the results.
        classes: names and colours.
        protocol: windows, scales and flips.
        max_pixels: height times width of a picture at most; larger ones fail.
        rank: this process's place among `world_size`, which are in one torch.distributed group (gloo or NCCL).
        world_size: processes that share the pictures: each takes every world_size-th.

    Returns:
        What failed in any process, in the order of the pictures, each naming its own.

    Raises:
        ValueError: processes of other pictures.
    """
    if world_size > 1:  # and nobody writes into a folder that another still lists
        counts: list[Any] = [None] * world_size
        dist.all_gather_object(counts, len(paths))
        if len({*counts}) > 1:
            raise ValueError(f"predict: all processes must have the same pictures, got {counts} of them")
    failed: dict[int, str] = {}
    for i in tqdm(range(rank, len(paths), world_size), unit="picture", disable=len(paths) < 2 or rank > 0):
        try:
            predict_file(net, paths[i], folder, classes, protocol, max_pixels)
        except PictureError as error:
            failed[i] = one_line(error)
        except Exception as error:  # out of memory, a decoder's own: words are kept, the frames with their tensors go
            failed[i] = f"{paths[i]}: cannot be predicted: {one_line(error)}"
    if world_size > 1:
        parts: list[Any] = [None] * world_size
        dist.all_gather_object(parts, failed)
        failed = {i: words for part in parts for i, words in part.items()}
    return [PictureError(failed[i]) for i in sorted(failed)]
