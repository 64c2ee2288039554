"""Augmentation of a picture and its labels together: scale, rotation, blur, mirror, colours, crop, normalisation.

Parameters and order are those of semseg (hszhao/semseg, util/transform.py and tool/train.py); photometric distortion and
`cat_max_ratio`, both off, are those of mmsegmentation. Labels are always taken from the nearest pixel, never blended.

`augment` draws first and computes then, from the crop backwards: of every picture in the chain it computes the window that
ends up in the crop. The values are those of the whole chain, to the rounding of float32 coordinates: 0.01 of 255 levels.
Pictures are float32 from the first step on, as semseg's. In uint8 every step would round, by up to 1.2 levels together
as measured, and save 7 % of the time.

Past 300 lines, because draws, windows and steps are one derivation.
"""

from __future__ import annotations

import math
from typing import NamedTuple, cast

import numpy as np
import torch

from ..extras import install
from .augmentation import Augmentation
from .normalisation import MEAN, STD

try:
    import cv2
except ImportError as error:
    raise ImportError(f"the transforms need OpenCV ({error}): {install('train')}") from error

IGNORED = 255
CROP_RETRIES = 10  # of `cat_max_ratio`
BRIGHTNESS, CONTRAST, SATURATION, HUE = 32.0, (0.5, 1.5), (0.5, 1.5), 18  # hue in OpenCV's steps of two degrees
BLUR = 5  # side of the Gaussian, whose weights OpenCV takes as 1, 4, 6, 4, 1 sixteenths


class Colours(NamedTuple):
    """A photometric distortion: what is added to or multiplied with what."""

    brightness: float
    contrast: float
    contrast_first: bool
    saturation: float
    hue: int


class Chance(NamedTuple):
    """What was drawn for a picture, but for the place of its crop.

    Attributes:
        factors: of height and width.
        angle: in degrees, or None.
        blur: whether the picture is blurred.
        mirror: whether it is mirrored.
        colours: its photometric distortion, or None.
    """

    factors: tuple[float, float]
    angle: float | None
    blur: bool
    mirror: bool
    colours: Colours | None


class Window(NamedTuple):
    """Rows [top, bottom) and columns [left, right) of a picture."""

    top: int
    bottom: int
    left: int
    right: int

    def within(self, size: tuple[int, int]) -> Window:
        """The part that a picture (H, W) has; where it has none, its nearest row or column."""
        top, left = min(max(self.top, 0), size[0] - 1), min(max(self.left, 0), size[1] - 1)
        return Window(top, max(min(self.bottom, size[0]), top + 1), left, max(min(self.right, size[1]), left + 1))

    def seen_from(self, top: int, left: int) -> Window:
        """The same pixels, counted from another corner."""
        return Window(self.top - top, self.bottom - top, self.left - left, self.right - left)

    def grown(self, border: int) -> Window:
        return Window(self.top - border, self.bottom + border, self.left - border, self.right + border)

    def of(self, pixels: np.ndarray) -> np.ndarray:
        return pixels[self.top : self.bottom, self.left : self.right]


def draw(settings: Augmentation, random: np.random.Generator) -> Chance:
    """Draw in the chain's order: scale, aspect, rotation, blur, mirror, colours."""
    scale = random.uniform(*settings.scale)
    aspect = 1.0 if settings.aspect is None else math.sqrt(random.uniform(*settings.aspect))
    angle = random.uniform(*settings.rotate) if random.random() < settings.rotate_probability else None
    blur = random.random() < settings.blur_probability
    mirror = random.random() < settings.mirror
    colours = draw_colours(random) if settings.photometric else None
    return Chance((scale / aspect, scale * aspect), angle, blur, mirror, colours)


def draw_colours(random: np.random.Generator) -> Colours:
    """Brightness, contrast, saturation and hue each vary with probability 0.5; contrast comes first as often as last."""
    change, first = random.random(4) < 0.5, random.random() < 0.5
    return Colours(
        random.uniform(-BRIGHTNESS, BRIGHTNESS) if change[0] else 0.0,
        random.uniform(*CONTRAST) if change[1] else 1.0,
        bool(first),
        random.uniform(*SATURATION) if change[2] else 1.0,
        int(random.integers(-HUE, HUE)) if change[3] else 0,
    )


def scaled_size(size: tuple[int, int], factors: tuple[float, float]) -> tuple[int, int]:
    """(H, W) of a picture after `scale`."""
    height, width = (max(1, round(n * factor)) for n, factor in zip(size, factors, strict=True))
    return height, width


def scale(pixels: np.ndarray, factors: tuple[float, float], window: Window) -> np.ndarray:
    """A window of the picture, resized as cv2.resize does.

    Args:
        pixels: an image (H, W, 3), interpolated linearly with half-pixel centres, or labels (H, W): the nearest by
            OpenCV's rule, which is at floor(i / factor).
        factors: of height and width.
        window: of the resized picture.

    Returns:
        float32 for an image, the labels' dtype for labels.
    """
    height, width = pixels.shape[:2]
    if scaled_size((height, width), factors) == (height, width):  # OpenCV takes no samples then, whatever the factor
        return window.of(pixels).astype(np.float32 if pixels.ndim == 3 else pixels.dtype)
    down, right = (1 / factor for factor in factors)
    if pixels.ndim == 2:
        rows = np.minimum((np.arange(window.top, window.bottom) * down).astype(np.intp), height - 1)
        columns = np.minimum((np.arange(window.left, window.right) * right).astype(np.intp), width - 1)
        nearest: np.ndarray = pixels[rows].take(columns, 1)
        return nearest
    matrix = np.array([[right, 0, 0.5 * right - 0.5], [0, down, 0.5 * down - 0.5]])
    return _warp(pixels, Window(0, height, 0, width), (height, width), matrix, window, cv2.BORDER_REPLICATE)


def rotation(size: tuple[int, int], angle: float) -> np.ndarray:
    """The matrix (2, 3) from points (x, y) of the rotated picture (H, W) to the same points before."""
    matrix = cv2.getRotationMatrix2D((size[1] / 2, size[0] / 2), angle, 1)
    return cv2.invertAffineTransform(matrix)


def view(pixels: np.ndarray, chance: Chance, window: Window) -> np.ndarray:
    """A window of the picture, or of its labels, scaled and rotated; around it are the mean and 255.

    A rotated picture is as large as before and turns about its middle.
    """
    if chance.angle is None:
        return scale(pixels, chance.factors, window)
    height, width = pixels.shape[:2]
    size = scaled_size((height, width), chance.factors)
    matrix = rotation(size, chance.angle)
    source = _source(matrix, window).within(size)
    return _warp(scale(pixels, chance.factors, source), source, size, matrix, window, cv2.BORDER_CONSTANT)


def _source(matrix: np.ndarray, window: Window) -> Window:
    """What an affine matrix from a window's points reads, and a pixel around it that rounding might reach."""
    corners = [(x, y, 1) for x in (window.left, window.right - 1) for y in (window.top, window.bottom - 1)]
    points = np.array(corners) @ matrix.T
    left, top = np.floor(points.min(0)).astype(int).tolist()
    right, bottom = np.floor(points.max(0)).astype(int).tolist()
    return Window(top, bottom + 2, left, right + 2).grown(1)


def _warp(
    pixels: np.ndarray, held: Window, size: tuple[int, int], matrix: np.ndarray, window: Window, border: int
) -> np.ndarray:
    """A window of what cv2.warpAffine makes of a picture (H, W) = size, of which `pixels` hold the window `held`."""
    source = _source(matrix, window).within(size)
    pixels = source.seen_from(held.top, held.left).of(pixels)
    shifted = matrix.copy()
    shifted[:, 2] += matrix[:, :2] @ (window.left, window.top) - np.array((source.left, source.top))
    image = pixels.ndim == 3
    return cv2.warpAffine(
        pixels.astype(np.float32, copy=False) if image else pixels,
        shifted,
        (window.right - window.left, window.bottom - window.top),
        flags=cv2.WARP_INVERSE_MAP | (cv2.INTER_LINEAR if image else cv2.INTER_NEAREST),
        borderMode=border,
        borderValue=MEAN if image else IGNORED,
    )


def blur(image: np.ndarray) -> np.ndarray:
    """Gaussian, 5x5, with the weights that OpenCV has for that size where sigma is 0; the edges are reflected."""
    return cv2.GaussianBlur(image, (BLUR, BLUR), 0)


def mirror(pixels: np.ndarray) -> np.ndarray:
    return cv2.flip(pixels, 1)


def distort(image: np.ndarray, colours: Colours) -> np.ndarray:
    """Brightness, contrast, saturation and hue of an image (H, W, 3), float32 from 0 to 255, which it stays within.

    As mmsegmentation's PhotoMetricDistortion, but without its rounding to uint8 at every step.
    """

    def contrast(image: np.ndarray) -> np.ndarray:
        return image if colours.contrast == 1 else (image * np.float32(colours.contrast)).clip(0, 255)

    if colours.brightness:
        image = (image + np.float32(colours.brightness)).clip(0, 255)
    if colours.contrast_first:
        image = contrast(image)
    if colours.saturation != 1 or colours.hue:
        hsv = cv2.cvtColor(image / np.float32(255), cv2.COLOR_RGB2HSV)  # degrees, and two from 0 to 1
        hsv[..., 0] = (hsv[..., 0] + 2 * colours.hue) % 360
        hsv[..., 1] = (hsv[..., 1] * np.float32(colours.saturation)).clip(0, 1)
        image = (cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB) * np.float32(255)).clip(0, 255)
    return image if colours.contrast_first else contrast(image)


def normalise(image: np.ndarray) -> torch.Tensor:
    """RGB from 0 to 255 (H, W, 3), uint8 or float32, as the network takes it: float32 (3, H, W), (x - MEAN) / STD."""
    mean, std = (np.array(numbers, np.float32)[:, None, None] for numbers in (MEAN, STD))
    planes = np.empty((3, *image.shape[:2]), np.float32)  # subtract would keep the image's order in memory
    np.subtract(image.transpose(2, 0, 1), mean, out=planes)
    planes /= std
    return torch.from_numpy(planes)


class _Place(NamedTuple):
    """A crop of a picture: what it shows of it, and the border (top, bottom, left, right) around that."""

    window: Window
    border: tuple[int, int, int, int]


def _draw_place(size: tuple[int, int], crop: tuple[int, int], random: np.random.Generator) -> _Place:
    """Every place is equally likely; a picture (H, W) smaller than the crop is padded on both sides, the odd one last."""
    firsts = []
    for n, side in zip(size, crop, strict=True):
        padding = max(side - n, 0)
        firsts.append(int(random.integers(n + padding - side + 1)) - padding // 2)
    wanted = Window(firsts[0], firsts[0] + crop[0], firsts[1], firsts[1] + crop[1])
    shown = wanted.within(size)
    return _Place(
        shown,
        (shown.top - wanted.top, wanted.bottom - shown.bottom, shown.left - wanted.left, wanted.right - shown.right),
    )


def _pad(pixels: np.ndarray, border: tuple[int, int, int, int]) -> np.ndarray:
    """With the mean around an image and 255 around labels."""
    value = MEAN if pixels.ndim == 3 else IGNORED
    return cv2.copyMakeBorder(pixels, *border, cv2.BORDER_CONSTANT, value=value) if any(border) else pixels


def _varied(labels: np.ndarray, cat_max_ratio: float) -> bool:
    """Whether no class has that share of the labelled pixels."""
    counts = np.bincount(labels.ravel(), minlength=256)[:IGNORED]
    return bool(counts.max() < cat_max_ratio * counts.sum())


def augment(
    image: np.ndarray, labels: np.ndarray, crop: tuple[int, int], settings: Augmentation, random: np.random.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """A random crop of the varied picture, normalised, and its labels.

    Args:
        image: RGB from 0 to 255 (H, W, 3), uint8 or float32.
        labels: (H, W), uint8; 255 is ignored.
        crop: height and width of the result.
        settings: what varies, and how far.
        random: what all chance comes from: equal generators give equal results.

    Returns:
        The image, float32 (3, *crop), and labels, uint8 (*crop): an eighth of int64 on the way from a worker to the device,
        where they are widened. Both contiguous.

    Raises:
        ValueError: other shapes or dtypes, or a crop without pixels.
    """
    if image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape or image.dtype not in (np.uint8, np.float32):
        raise ValueError(f"augment: image must be (H, W, 3), uint8 or float32, got {image.shape}, {image.dtype}")
    if labels.shape != image.shape[:2] or labels.dtype != np.uint8:
        raise ValueError(
            f"augment: labels must be uint8 and as large as the image, {image.shape[:2]}, got {labels.shape}, {labels.dtype}"
        )
    if min(crop) < 1:
        raise ValueError(f"augment: crop must be at least one pixel in height and width, got {crop}")
    chance = draw(settings, random)
    size = scaled_size(cast(tuple[int, int], labels.shape), chance.factors)
    for _ in range(1 + CROP_RETRIES):
        window, border = _draw_place(size, crop, random)
        if chance.mirror:
            window = window._replace(left=size[1] - window.right, right=size[1] - window.left)
        cropped = view(labels, chance, window)
        cropped = _pad(mirror(cropped) if chance.mirror else cropped, border)
        if settings.cat_max_ratio == 1 or _varied(cropped, settings.cat_max_ratio):
            break
    return normalise(_pad(_image(image, chance, window, size), border)), torch.from_numpy(cropped)


def _image(image: np.ndarray, chance: Chance, window: Window, size: tuple[int, int]) -> np.ndarray:
    """A window of the varied image, whose size at its scale is `size`."""
    if chance.blur:
        wider = window.grown(BLUR // 2).within(size)
        image = window.seen_from(wider.top, wider.left).of(blur(view(image, chance, wider)))
    else:
        image = view(image, chance, window)
    image = mirror(image) if chance.mirror else image
    return image if chance.colours is None else distort(image, chance.colours)


def init_worker(worker_id: int) -> None:
    """For `DataLoader(worker_init_fn=...)`: OpenCV computes in the worker's own thread.

    One worker is one core's work; with OpenCV's default every worker would start a thread for every core of the machine,
    and they would only wait for each other.
    """
    cv2.setNumThreads(0)
