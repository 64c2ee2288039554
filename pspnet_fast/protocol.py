"""Pictures to labels: sliding windows, multiple scales and flips by named protocols.

The protocol is that of semseg (hszhao/semseg, tool/test.py): the picture is resized so that its long side is
scale * base_size, cut into windows of `crop` that overlap by a third, the softmax of all windows averaged, resized to the
picture's size, and averaged over scales. Caffe's, that of the paper's own code, differs from it in three points (`Protocol`).
Everything runs on the network's device.

Past 300 lines, because what a protocol asks for and how it is computed in bands of rows are read side by side.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Literal, NamedTuple, cast, get_args

import torch
import torch.nn.functional as F
from torch import nn

from .data.normalisation import MEAN, STD
from .functional import upsample_argmax, upsample_softmax_add
from .geometry import accumulation_dtype, bilinear_tap
from .models.pspnet import PSPNet
from .nn.calls import why_call
from .schema import shown

BAND = 2**22  # probabilities at the picture's size that are held at once: 16 MB, which caches and the allocator keep
SCALED_BAND = 4  # times as many may be held of a larger scale: what one of twice the picture's size needs

# A number beyond these is a slip of the hand. It is refused before it asks for memory, which Linux grants and then kills for.
MAX_SIDE = 2**15  # of a picture that is enlarged; three channels of a square one are 13 GB
BOUNDS: Mapping[str, tuple[int, int]] = {
    "crop": (1, 2**13),  # the last features of one such window are 9 GB
    "base_size": (1, MAX_SIDE),
    "batch_size": (1, 2**10),
}
SCALES = (0.01, 100.0)

Kind = Literal["semseg", "caffe"]


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


def check_protocol(protocol: Protocol, named: Callable[[str], str] = "Protocol: {}".format) -> None:
    """See that a protocol can work, before the pictures are there.

    Args:
        protocol: what is checked.
        named: what a message calls a setting.

    Raises:
        ValueError: a setting outside of BOUNDS or SCALES, or a picture that a scale makes longer than MAX_SIDE.
    """
    if protocol.kind not in get_args(Kind):
        raise ValueError(f"{named('kind')} must be one of {', '.join(get_args(Kind))}, got {protocol.kind!r}")
    for name, (least, most) in BOUNDS.items():
        value = getattr(protocol, name)
        if value is not None and not least <= value <= most:
            raise ValueError(f"{named(name)} must be from {least} to {most}, got {shown(value)}")
    smallest, largest = SCALES
    if not protocol.scales or not all(smallest <= scale <= largest for scale in protocol.scales):
        raise ValueError(
            f"{named('scales')} must be from {smallest:g} to {largest:g}, and one at least, got {shown([*protocol.scales])}"
        )
    if protocol.base_size is not None and round(max(protocol.scales) * protocol.base_size) > MAX_SIDE:
        raise ValueError(
            f"{named('scales')} times the base size must be at most {MAX_SIDE} pixels, "
            f"got {max(protocol.scales):g} times {protocol.base_size}"
        )


def scaled_size(height: int, width: int, scale: float, protocol: Protocol) -> tuple[int, int]:
    """Height and width that a picture is resized to at one scale. ValueError where it is enlarged beyond MAX_SIDE."""
    longest = max(height, width)
    long_side = round(scale * (protocol.base_size or longest)) + (protocol.kind == "caffe")
    if long_side > max(MAX_SIDE, longest) + 1:
        raise ValueError(
            f"Protocol: the long side of an enlarged picture must be at most {MAX_SIDE}, got {scale:g} times {longest}"
        )
    rows, columns = (max(1, round(long_side / longest * side)) for side in (height, width))
    return rows, columns


def windows(size: int, crop: int) -> list[int]:
    """First pixels of the windows along an axis of at least `crop` pixels: a stride of 2/3, the last one shifted back."""
    stride = math.ceil(crop * 2 / 3)
    count = math.ceil((size - crop) / stride) + 1
    return [min(i * stride, size - crop) for i in range(count)]


def network_input(pixels: torch.Tensor) -> torch.Tensor:
    """RGB from 0 to 255 (3, H, W), normalised by ImageNet's mean and standard deviation, in float32."""
    mean, std = (
        torch.tensor(numbers, dtype=torch.float32, device=pixels.device)[:, None, None] for numbers in (MEAN, STD)
    )
    return pixels.to(torch.float32, copy=True).sub_(mean).div_(std)


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
    shown: tuple[list[int], list[int]]  # how often a row and a column are shown; a pixel is, their product


def _coarse_logits(net: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """Logits of any size: a PSPNet's are the coarse ones, unless calling it would do anything else than its forward."""
    if isinstance(net, PSPNet) and type(net).forward is PSPNet.forward and why_call(net) is None:
        return net.coarse_logits(images)
    return cast(torch.Tensor, net(images))


def _by_scale(net: nn.Module, pixels: torch.Tensor, protocol: Protocol) -> list[_Scale]:
    """Show the picture to the network at every scale."""
    if pixels.dim() != 3 or pixels.shape[0] != 3 or 0 in pixels.shape:
        raise ValueError(f"predict: pixels must be (3, H, W), got {tuple(pixels.shape)}")
    check_protocol(protocol)
    image = network_input(pixels)
    caffe = protocol.kind == "caffe"
    found = []
    for scale in protocol.scales:
        height, width = scaled_size(image.shape[1], image.shape[2], scale, protocol)
        resized = image
        if (height, width) != image.shape[1:]:
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
        times = 2 if protocol.flip and not caffe else 1
        shown = (
            [times * n for n in _overlaps(rows, window[0], top, height)],
            _overlaps(columns, window[1], left, width),
        )
        align_corners = net.align_corners if isinstance(net, PSPNet) else False
        found.append(_Scale((height, width), window, align_corners, batches, shown))
    return found


def _overlaps(starts: Sequence[int], length: int, border: int, size: int) -> list[int]:
    """How many windows hold each of the `size` pixels that follow a border."""
    return [sum(start <= border + i < start + length for start in starts) for i in range(size)]


class _RowTaps(NamedTuple):
    """Which rows of a scale each row of the picture lies between, and how far it is from the upper one."""

    above: list[int]
    below: list[int]
    share: torch.Tensor  # (H,)

    def reach(self, rows: range) -> range:
        """The rows of the scale that some rows of the picture need."""
        return range(self.above[rows[0]], self.below[rows[-1]] + 1)


def _row_taps(scale: _Scale, height: int) -> _RowTaps:
    """Half-pixel centres. A row that lies on another needs no second: where sizes are equal, a band needs its own rows."""
    lower, upper, numerator, denominator = zip(
        *(bilinear_tap(i, height, scale.size[0], align_corners=False) for i in range(height)), strict=True
    )
    below = [ends[part > 0] for *ends, part in zip(lower, upper, numerator, strict=True)]
    like = scale.batches[0].logits
    parts, wholes = (torch.tensor(n, dtype=torch.float32, device=like.device) for n in (numerator, denominator))
    return _RowTaps([*lower], below, parts / wholes)


class _Memory:
    """Float32 tensors of any shape up to a number of elements, which are all the same memory."""

    def __init__(self, elements: int, like: torch.Tensor) -> None:
        self.flat = like.new_empty(elements, dtype=torch.float32)

    def shaped(self, *shape: int) -> torch.Tensor:
        return self.flat[: math.prod(shape)].view(shape)


def _fill(total: torch.Tensor, scale: _Scale, rows: range) -> None:
    """Some rows (K, rows, W) of the probabilities at the scale's size: the mean over the windows that hold a pixel."""
    total.zero_()
    for batch in scale.batches:
        corners = [(top - rows.start, left) for top, left in batch.corners]
        upsample_softmax_add(total, batch.logits, corners, scale.window, scale.align_corners, batch.flipped)
    if max(scale.shown[0]) * max(scale.shown[1]) > 1:
        by_row, by_column = (total.new_tensor(n) for n in (scale.shown[0][rows.start : rows.stop], scale.shown[1]))
        total.div_(by_row[:, None] * by_column)


def _bands(scales: Sequence[_Scale], height: int, width: int, band: int) -> Iterator[tuple[range, torch.Tensor]]:
    """Rows of the picture, and the mean over scales there (K, rows, W), each scale resized to (H, W) bilinearly.

    A band's memory is the next one's, too: hundreds of bands in memory of their own leave an allocator gigabytes of holes.
    """
    like = scales[0].batches[0].logits
    classes = like.shape[1]
    taps = [_row_taps(scale, height) for scale in scales]
    step = band // (classes * width)
    for scale in scales:
        if scale.size[0] != height:  # of which a band reaches up to two rows further than its share
            room = SCALED_BAND * band // (classes * scale.size[1]) - 2
            step = min(step, room * height // scale.size[0])
    step = max(1, min(step, height))
    bands = [range(start, min(start + step, height)) for start in range(0, height, step)]

    resized = [scale.size != (height, width) for scale in scales]
    reach = [max(len(tap.reach(rows)) for rows in bands) for tap in taps]
    longest = max(
        (r * scale.size[1] for r, scale, different in zip(reach, scales, resized, strict=True) if different), default=0
    )
    widest = max((scale.size[1] for scale in scales if scale.size[0] != height), default=0)
    mean, other = (_Memory(classes * step * width * needed, like) for needed in (True, len(scales) > 1))
    scaled = _Memory(classes * longest, like)
    above, below = (_Memory(classes * step * widest, like) for _ in range(2))
    for rows in bands:
        total = mean.shaped(classes, len(rows), width)
        for i, (scale, tap) in enumerate(zip(scales, taps, strict=True)):
            one = total if i == 0 else other.shaped(classes, len(rows), width)
            if not resized[i]:
                _fill(one, scale, rows)
            else:
                needed = tap.reach(rows)
                at_scale = scaled.shaped(classes, len(needed), scale.size[1])
                _fill(at_scale, scale, needed)
                if scale.size[0] != height:
                    at_scale = _between(at_scale, tap, rows, above, below)
                _stretch(at_scale, one)
            if i > 0:
                total.add_(one)
        yield rows, total.div_(len(scales)) if len(scales) > 1 else total


def _between(source: torch.Tensor, tap: _RowTaps, rows: range, above: _Memory, below: _Memory) -> torch.Tensor:
    """Rows of the picture (K, rows, w) from those of the scale that they lie between."""
    shape = (source.shape[0], len(rows), source.shape[2])
    first = tap.above[rows.start]
    upper, lower = (memory.shaped(*shape) for memory in (above, below))
    for ends, target in ((tap.above, upper), (tap.below, lower)):
        at = torch.tensor([i - first for i in ends[rows.start : rows.stop]], device=source.device)
        torch.index_select(source, 1, at, out=target)
    return upper.lerp_(lower, tap.share[rows.start : rows.stop, None])


def _stretch(source: torch.Tensor, target: torch.Tensor) -> None:
    """`F.interpolate` of the columns, with half-pixel centres, into memory that is there."""
    size = [*target.shape[1:]]
    torch.ops.aten.upsample_bilinear2d.out(source[None], size, False, None, None, out=target[None])


@torch.inference_mode()
def predict_probabilities(
    net: nn.Module, pixels: torch.Tensor, protocol: Protocol, *, band: int = BAND
) -> torch.Tensor:
    """Class probabilities of one picture.

    Args:
        net: in evaluation mode, a PSPNet, or any module from (N, 3, h, w) to logits (N, K, h', w'), which are upsampled to
            (h, w) with half-pixel centres where they are coarser.
        pixels: RGB from 0 to 255, (3, H, W), uint8 or floating point, on the network's device.
        protocol: windows, scales and flips.
        band: about how many probabilities are worked on at once. It decides about memory and time, not about the result.

    Returns:
        (K, H, W), float32, summing to 1 over K.

    Raises:
        ValueError: pixels of another shape, or a protocol that cannot work.
    """
    scales = _by_scale(net, pixels, protocol)
    height, width = pixels.shape[1:]
    logits = scales[0].batches[0].logits
    result = logits.new_empty((logits.shape[1], height, width), dtype=torch.float32)
    for rows, some in _bands(scales, height, width, band):
        result[:, rows.start : rows.stop] = some
    return result


@torch.inference_mode()
def predict_labels(net: nn.Module, pixels: torch.Tensor, protocol: Protocol, *, band: int = BAND) -> torch.Tensor:
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
    found = torch.empty((height, width), dtype=torch.int64, device=pixels.device)
    for rows, some in _bands(scales, height, width, band):
        torch.argmax(some, 0, out=found[rows.start : rows.stop])
    return found
