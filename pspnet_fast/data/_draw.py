"""What the drawn pictures share: shades, smooth noise, and a canvas seen by a camera that holds colours and labels at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, TypeVar

import numpy as np

from ..extras import install

try:
    from PIL import Image, ImageDraw
except ImportError as error:
    raise ImportError(f"the drawn picture needs Pillow ({error}): {install('predict')}") from error

Colour = tuple[int, int, int]
Point = tuple[float, float]
T = TypeVar("T")


def shade(colour: Colour, factor: float) -> Colour:
    red, green, blue = (min(255, round(factor * channel)) for channel in colour)
    return red, green, blue


def smooth_noise(random: np.random.Generator, height: int, width: int, cells: int) -> np.ndarray:
    """Noise between 0 and 1 (height, width) that varies over about 1 / cells of the width."""
    coarse = random.random((max(2, cells * height // width), cells)).astype(np.float32)
    fine = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(fine).clip(0, 1)


def pick(random: np.random.Generator, choices: Sequence[T]) -> T:
    return choices[int(random.integers(len(choices)))]


def vary(random: np.random.Generator, colours: Sequence[Colour]) -> Colour:
    """One of the colours, a little lighter or darker, a little warmer or colder."""
    red, green, blue = pick(random, colours)
    gain, warm = random.uniform(0.85, 1.15), round(random.uniform(-8, 8))
    return shade((max(0, red + warm), green, max(0, blue - warm)), gain)


class Camera(NamedTuple):
    """Looks along the ground, whose points are (x to the right, y upwards, depth), in metres; the eye is above (0, 0, 0).

    Attributes:
        focal: in pixels: a metre at depth d is focal / d pixels long.
        eye: its height above the ground.
        centre: the column that everything straight ahead vanishes at.
        horizon: the row of it.
    """

    focal: float
    eye: float
    centre: float
    horizon: float

    def project(self, x: float, y: float, depth: float) -> Point:
        return self.centre + self.focal * x / depth, self.horizon + self.focal * (self.eye - y) / depth

    def depth_of(self, row: float) -> float:
        """Of the ground at a row below the horizon."""
        return self.focal * self.eye / (row - self.horizon)


class Face(NamedTuple):
    """An upright rectangle over the ground from `start` to `end`, both (x, depth); `light` falls on it."""

    start: Point
    end: Point
    bottom: float
    top: float
    light: float

    def corners(self, left: float, bottom: float, right: float, top: float) -> list[tuple[float, float, float]]:
        """Of a part of it, in (x, y, depth); the part's sides are shares of the face's."""
        (x0, d0), (x1, d1) = self.start, self.end
        rise = self.top - self.bottom
        return [
            (x0 + u * (x1 - x0), self.bottom + v * rise, d0 + u * (d1 - d0))
            for u, v in ((left, bottom), (right, bottom), (right, top), (left, top))
        ]


class Canvas:
    """Colours and labels, drawn together: the label is the image's fourth channel, so they have the same edges.

    Args:
        size: width and height.
        camera: in pixels of this canvas.
        tint: the light, by channel; what shines itself (`lit`) does not take it.
        sun: -1 where it comes from the left, 1 from the right.
    """

    def __init__(self, size: tuple[int, int], camera: Camera, tint: tuple[float, float, float], sun: int) -> None:
        self.image = Image.new("RGBA", size)
        self.shadows = Image.new("L", size)  # how much of the ground's light is taken
        self.camera, self.tint, self.sun = camera, tint, sun
        self.draw, self.dark = ImageDraw.Draw(self.image), ImageDraw.Draw(self.shadows)

    def ink(self, colour: Colour, label: int, lit: bool = False) -> tuple[int, int, int, int]:
        red, green, blue = colour if lit else (min(255, int(c * t)) for c, t in zip(colour, self.tint, strict=True))
        return red, green, blue, label

    def polygon(
        self, points: Sequence[tuple[float, float, float]], colour: Colour, label: int, lit: bool = False
    ) -> None:
        """Of corners (x, y, depth)."""
        self.draw.polygon([self.camera.project(*point) for point in points], fill=self.ink(colour, label, lit))

    def box(
        self, x: Point, y: Point, depth: Point, colour: Colour, label: int, top: Colour | None = None
    ) -> tuple[Face, Face | None]:
        """A box between two x, two y and two depths; gives its front, and the side that is seen, if one is."""
        (left, right), (low, high), (near, far) = x, y, depth
        front, side = Face((left, near), (right, near), low, high, 0.94), None
        if left > 0:
            side = Face((left, near), (left, far), low, high, 1.12 if self.sun < 0 else 0.68)
        elif right < 0:
            side = Face((right, near), (right, far), low, high, 1.12 if self.sun > 0 else 0.68)
        if high < self.camera.eye:
            corners = [(left, high, near), (right, high, near), (right, high, far), (left, high, far)]
            self.polygon(corners, top or shade(colour, 1.15), label)
        if side:
            self.patch(side, (0, 0, 1, 1), colour, label)
        self.patch(front, (0, 0, 1, 1), colour, label)
        return front, side

    def patch(
        self, face: Face, part: tuple[float, float, float, float], colour: Colour, label: int, lit: bool = False
    ) -> None:
        """A part of a face: left, bottom, right and top as shares of it."""
        self.polygon(face.corners(*part), colour if lit else shade(colour, face.light), label, lit)

    def wheel(self, face: Face, middle: float, radius: float, label: int) -> None:
        """On the ground in the plane of a face, `middle` of the way along it."""
        (x, _, d), (dx, dd) = face.corners(middle, 0, middle, 0)[0], np.subtract(face.end, face.start)
        step = radius / float(np.hypot(dx, dd))
        for size, colour in ((1.0, (24, 24, 26)), (0.5, (150, 152, 156))):
            circle = [(size * np.cos(t), radius + size * radius * np.sin(t)) for t in np.linspace(0, 2 * np.pi, 12)]
            self.polygon([(x + step * u * dx, y, d + step * u * dd) for u, y in circle], colour, label)

    def shadow(self, x: float, depth: float, width: float, height: float) -> None:
        """Of something that stands there: a spot below it, and its length away from the sun."""
        (column, row), scale = self.camera.project(x, 0, depth), self.camera.focal / depth
        half, flat = width / 2 * scale, max(0.12 * width * scale, 1)
        away = -self.sun * 0.8 * height * scale
        self.dark.ellipse((column - half * 1.15, row - flat, column + half * 1.15, row + flat), fill=200)
        end = row + 0.12 * height * scale
        points = [(column - half, row), (column + half, row), (column + away + half, end), (column + away - half, end)]
        self.dark.polygon(points, fill=150)


class Sprite(NamedTuple):
    """A flat figure of one label that stands on the ground: shapes in metres, to the right and upwards of its foot."""

    canvas: Canvas
    x: float
    depth: float
    label: int

    def _at(self, x: float, y: float) -> Point:
        return self.canvas.camera.project(self.x + x, y, self.depth)

    def rectangle(self, left: float, bottom: float, right: float, top: float, colour: Colour) -> None:
        box = (*self._at(left, top), *self._at(right, bottom))
        self.canvas.draw.rectangle(box, fill=self.canvas.ink(colour, self.label))

    def ellipse(self, x: float, y: float, radii: Point, colour: Colour, lit: bool = False) -> None:
        box = (*self._at(x - radii[0], y + radii[1]), *self._at(x + radii[0], y - radii[1]))
        self.canvas.draw.ellipse(box, fill=self.canvas.ink(colour, self.label, lit))

    def polygon(self, points: Sequence[Point], colour: Colour) -> None:
        self.canvas.draw.polygon([self._at(*point) for point in points], fill=self.canvas.ink(colour, self.label))
