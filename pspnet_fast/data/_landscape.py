"""The country a scene stands in: an hour of the day, a camera, sky, hills, water, a road and houses."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from ..extras import install
from ._draw import Camera, Canvas, Colour, Point, pick, shade, smooth_noise, vary
from ._figures import Label, building

try:
    from PIL import Image
except ImportError as error:
    raise ImportError(f"the scenes need Pillow ({error}): {install('predict')}") from error

FINER = 3  # the canvas's pixels in a pixel of the picture, along an axis

_GRASS = ((96, 138, 62), (124, 150, 74), (78, 116, 60), (160, 158, 92), (186, 170, 112))
_EARTH = ((140, 112, 84), (206, 190, 150), (166, 140, 108), (112, 98, 84))
_PAVING = ((172, 168, 160), (146, 144, 142), (184, 170, 152))
_ROADS = ((84, 86, 90), (108, 108, 110), (132, 130, 128), (70, 72, 80), (142, 122, 100), (120, 104, 98))
_PAINT = ((226, 224, 216), (214, 190, 110))
_WATERS = ((66, 108, 138), (88, 124, 126), (96, 110, 96), (52, 84, 118), (110, 126, 140))
_HILLS = ((96, 118, 132), (84, 112, 92), (126, 112, 100), (112, 112, 126), (136, 140, 112))
_WALLS = (
    (172, 98, 78),
    (206, 188, 156),
    (148, 148, 152),
    (226, 222, 212),
    (118, 126, 138),
    (150, 162, 138),
    (132, 104, 84),
)


class Light(NamedTuple):
    """Of an hour of the day."""

    zenith: Colour
    horizon: Colour
    tint: tuple[float, float, float]
    contrast: float  # of shadows
    windows: float  # the share of them with a light on


_HOURS = (
    Light((84, 140, 214), (200, 222, 238), (1.04, 1.02, 0.98), 0.45, 0.04),  # noon
    Light((120, 168, 222), (222, 230, 232), (1.08, 1.03, 0.94), 0.55, 0.04),
    Light((146, 154, 164), (198, 202, 206), (0.88, 0.91, 0.95), 0.12, 0.15),  # overcast
    Light((190, 200, 206), (222, 224, 222), (0.98, 0.98, 0.96), 0.08, 0.1),  # mist
    Light((116, 142, 186), (248, 208, 146), (1.14, 0.98, 0.78), 0.55, 0.12),  # a low sun
    Light((72, 72, 124), (234, 146, 112), (0.82, 0.68, 0.76), 0.3, 0.4),  # dusk
    Light((20, 28, 58), (64, 76, 112), (0.44, 0.5, 0.68), 0.1, 0.55),  # night
)


class Plan(NamedTuple):
    """Where the road runs: along the depth around `middle`, or across at this depth; nowhere for a width of 0."""

    along: bool
    middle: float
    width: float
    bend: float  # to the right, in metres per metre squared of depth
    pavement: float  # its width, on both sides

    def x(self, depth: float) -> float:
        return self.middle + self.bend * depth * depth


def _sky(random: np.random.Generator, light: Light, width: int, height: int, horizon: float) -> Image.Image:
    """From the zenith's colour to the horizon's, under clouds, with a sun or a moon on some days."""
    depth = np.linspace(0, height / horizon, height, dtype=np.float32).clip(0, 1)[:, None, None] ** 0.8
    sky = (1 - depth) * np.array(light.zenith, np.float32) + depth * np.array(light.horizon, np.float32)
    if random.random() < 0.3:
        x, y, radius = random.uniform(0, width), random.uniform(0.2, 0.9) * horizon, random.uniform(0.03, 0.06) * height
        rows, columns = np.ogrid[:height, :width]
        distance = np.hypot(rows - y, columns - x).astype(np.float32)[..., None]
        disc = 1 / (1 + np.exp(2 * (distance - radius).clip(-9, 9)))
        glow = 0.5 * np.exp(-((distance / (4 * radius)) ** 2)) + 0.5 * disc
        sky = sky + glow * (np.array((255, 246, 214), np.float32) - sky)
    clouds = sum(smooth_noise(random, height, width, cells) / (i + 1) for i, cells in enumerate((5, 12, 30))) / 1.83
    cover = np.clip((clouds - random.uniform(0.4, 0.66)) * random.uniform(3, 7), 0, 1)[..., None] * (0.35 + 0.6 * depth)
    bright = (np.array(light.horizon, np.float32) * random.uniform(0.85, 1.15)).clip(0, 250)
    return Image.fromarray((sky + cover * (bright - sky)).clip(0, 255).astype(np.uint8))


class Landscape:
    """A scene before anybody is in it, drawn on a canvas larger and finer than the picture.

    Args:
        random: what every choice is drawn from.
        width: of the picture, in pixels.
        height: of the picture.

    Attributes:
        margin: pixels of the picture around it, which turning the camera brings into view.
        unit: pixels of the picture in one of a picture 144 high.
        near: depth of the ground at the canvas's lower edge, in metres.
        things: what stands in the scene, yet to be painted: depth, and the painter.
    """

    def __init__(self, random: np.random.Generator, width: int, height: int) -> None:
        self.random, self.width, self.height = random, width, height
        self.margin, self.unit = -(-7 * max(width, height) // 100), height / 144
        self.size = (FINER * (width + 2 * self.margin), FINER * (height + 2 * self.margin))
        self.light, gain = pick(random, _HOURS), random.uniform(0.85, 1.12)
        red, green, blue = (gain * t * random.uniform(0.96, 1.04) for t in self.light.tint)
        horizon = FINER * (self.margin + random.uniform(0.3, 0.52) * height)
        centre = FINER * (self.margin + random.uniform(0.25, 0.75) * width)
        self.camera = Camera(FINER * random.uniform(1.0, 1.5) * height, random.uniform(1.7, 4.0), centre, horizon)
        self.canvas = Canvas(self.size, self.camera, (red, green, blue), pick(random, (-1, 1)))
        self.near = self.camera.depth_of(self.size[1] + 1)
        self.things: list[tuple[float, Callable[[], None]]] = []

        self.kind = pick(random, ("street",) * 8 + ("village",) * 7 + ("shore",) * 5)
        if self.kind == "street":
            middle, width_of_road = random.uniform(-3, 3), random.uniform(5.5, 9)
            self.plan = Plan(True, middle, width_of_road, 0.0, random.uniform(1.8, 4))
        else:
            along, road = random.random() < 0.6, random.uniform(4, 6) if random.random() < 0.7 else 0.0
            middle = random.uniform(-3, 3) if along else random.uniform(1.4, 2.6) * self.near + 2
            self.plan = Plan(along, middle, road, random.normal(0, 0.012), 0.0)
        self._backdrop()
        self._water()
        if self.plan.width:
            self._road()
        self.look()
        self._houses()
        self.look()

    def look(self) -> None:
        """Keep what is drawn by now as `floor`, the labels at the picture's resolution."""
        self.floor = np.asarray(self.canvas.image)[FINER // 2 :: FINER, FINER // 2 :: FINER, 3].copy()

    def label_at(self, x: float, depth: float) -> int | None:
        """What is seen at a place on the ground, of what the last `look` saw; None out of view."""
        column, row = (int(at) // FINER for at in self.camera.project(x, 0, depth))
        if 0 <= column < self.floor.shape[1] and 0 <= row < self.floor.shape[0]:
            return int(self.floor[row, column])
        return None

    def place(self, labels: tuple[Label, ...], least: float, most: float) -> Point | None:
        """A random (x, depth) in view, on one of the labels, where a metre is between `least` and `most` units long."""
        horizon, eye = self.camera.horizon / FINER, self.camera.eye
        least, most = least * self.unit, min(most * self.unit, 1.04 * (self.margin + self.height - horizon) / eye)
        for _ in range(8 if least < most else 0):
            scale = self.random.uniform(least, most)
            row = self.floor[int(horizon + scale * eye), self.margin : self.margin + self.width]
            columns = np.flatnonzero(np.isin(row, labels))
            if len(columns):
                column = FINER * (self.margin + int(self.random.choice(columns)))
                return (column - self.camera.centre) / FINER / scale, self.camera.focal / FINER / scale
        return None

    def _backdrop(self) -> None:
        random, canvas, (width, height), horizon = self.random, self.canvas, self.size, self.camera.horizon
        sky = _sky(random, self.light, width // FINER, height // FINER, horizon / FINER)
        sky = sky.resize(self.size, Image.Resampling.BILINEAR)
        sky.putalpha(Label.SKY)
        canvas.image.paste(sky)
        if random.random() < {"street": 0.45, "village": 0.8, "shore": 0.7}[self.kind]:
            rock = vary(random, _HILLS)
            for haze, size in ((0.36, 1.3), (0.12, 0.7))[random.integers(2) :]:
                waves = [smooth_noise(random, 2, 128, cells)[0] / cells**0.8 for cells in (4, 9, 25, 60)]
                relief = np.sum(waves, axis=0)
                relief = 0.12 + (relief - relief.min()) / np.ptp(relief)
                tops = horizon - random.uniform(0.1, 0.24) * size * self.height * FINER * relief
                ridge = [*zip(np.linspace(0, width, 128).tolist(), tops.tolist(), strict=True)]
                near = canvas.ink(rock, Label.MOUNTAIN)
                red, green, blue = (
                    round(c + haze * (far - c)) for c, far in zip(near, self.light.horizon, strict=False)
                )
                base = horizon + FINER
                canvas.draw.polygon([(0, base), *ridge, (width, base)], fill=(red, green, blue, Label.MOUNTAIN))
        town = _PAVING if self.kind == "street" else _GRASS
        ground = canvas.ink(vary(random, pick(random, (_GRASS, _GRASS, _EARTH, town))), Label.GROUND)
        canvas.draw.rectangle((0, horizon, *self.size), fill=ground)

    def _rim(self, row: float) -> list[Point]:
        """An uneven edge across the canvas around a row."""
        uneven = row + 0.35 * (row - self.camera.horizon) * (smooth_noise(self.random, 2, 64, 9)[0] - 0.5)
        return [*zip(np.linspace(0, self.size[0], 64).tolist(), uneven.tolist(), strict=True)]

    def _water(self) -> None:
        random, canvas, horizon, (width, height) = self.random, self.canvas, self.camera.horizon, self.size
        tone, sand = canvas.ink(vary(random, _WATERS), Label.WATER), canvas.ink(vary(random, _EARTH[1:3]), Label.GROUND)
        room = height - FINER * self.margin - horizon
        if self.kind == "shore":
            form = pick(random, ("sea", "river", "lake"))
            low, high = {"sea": (0.16, 0.4), "river": (0.3, 0.45), "lake": (0.5, 0.75)}[form]
            rim = self._rim(horizon + random.uniform(low, high) * room)
            if form == "sea":
                area = [(0, horizon + 1), *rim, (width, horizon + 1)]
            elif form == "river":
                area = [*self._rim(horizon + random.uniform(0.08, 0.2) * room), *reversed(rim)]
            else:  # we stand on the other side
                area = [(0, height), *rim, (width, height)]
            canvas.draw.line(area, fill=sand, width=round(5 * FINER * self.unit))
            canvas.draw.polygon(area, fill=tone)
        elif random.random() < {"street": 0.12, "village": 0.45}[self.kind]:  # a pond
            x, row = random.uniform(0, width), horizon + random.uniform(0.15, 0.7) * room
            turns = np.linspace(0, 2 * np.pi, 40, endpoint=False)
            uneven = (
                1 + 0.12 * np.sin(2 * turns + random.uniform(0, 6)) + 0.07 * np.sin(3 * turns + random.uniform(0, 6))
            )
            radius = random.uniform(0.15, 0.35) * width * uneven
            flat = min(0.32, 0.8 * (row - horizon) / radius.max())
            for wider, ink in ((1.1, sand), (1.0, tone)):
                rim_x, rim_y = x + wider * radius * np.cos(turns), row + wider * flat * radius * np.sin(turns)
                canvas.draw.polygon([*zip(rim_x.tolist(), rim_y.tolist(), strict=True)], fill=ink)

    def _strip(self, left: float, right: float, colour: Colour, label: int, part: Point | None = None) -> None:
        """Along the road, between two distances from its middle; a part of it between two depths, or two x of one across."""
        plan = self.plan
        if plan.along:
            near, far = part or (self.near, 30 * self.near + 150)
            steps = np.geomspace(near, far, 16 if plan.bend and not part else 2).tolist()
            points = [(plan.x(d) + left, 0.0, d) for d in steps] + [(plan.x(d) + right, 0.0, d) for d in steps[::-1]]
        else:
            (start, end), near = part or (-99.0, 99.0), max(plan.middle + left, self.near / 2)
            far = plan.middle + right
            points = [(start, 0, near), (end, 0, near), (end, 0, far), (start, 0, far)]
        self.canvas.polygon(points, colour, label)

    def _road(self) -> None:
        random, plan, half = self.random, self.plan, self.plan.width / 2
        if plan.pavement:
            paving = vary(random, _PAVING)
            self._strip(-half - plan.pavement, half + plan.pavement, paving, Label.GROUND)
            self._strip(-half - 0.25, half + 0.25, shade(paving, 1.2), Label.GROUND)
        self._strip(-half, half, vary(random, _ROADS), Label.ROAD)
        white = vary(random, _PAINT)
        if random.random() < 0.4:
            for edge in (-half + 0.15, half - 0.35):
                self._strip(edge, edge + 0.2, white, Label.ROAD)
        if random.random() < 0.75:
            dash = random.uniform(2, 4)
            for i in range(12):
                start = (self.near if plan.along else -20) + 2 * dash * i
                self._strip(-0.11, 0.11, white, Label.ROAD, (start, start + dash))
        if self.kind == "street" and random.random() < 0.3:  # a zebra crossing
            depth = random.uniform(1.3, 2.5) * self.near
            for x in np.arange(-half + 0.3, half - 0.6, 0.9).tolist():
                self._strip(x, x + 0.5, white, Label.ROAD, (depth, depth + 2.5))

    def _houses(self) -> None:
        random, plan, camera = self.random, self.plan, self.camera
        blocks: list[tuple[Point, Point, float]] = []
        if self.kind == "street":  # a row on either side
            for side in (-1, 1):
                edge = plan.middle + side * (plan.width / 2 + plan.pavement)
                depth, tall = random.uniform(0.6, 1.6) * self.near, random.uniform(5, 15)
                while depth < 110 and random.random() < 0.985:
                    long, back, deep = random.uniform(7, 15), random.uniform(0, 2.5), random.uniform(9, 14)
                    near, far = edge + side * back, edge + side * (back + deep)
                    x, high = (min(near, far), max(near, far)), tall * random.uniform(0.7, 1.3)
                    blocks.append((x, (depth, depth + long), high))
                    depth += long + (random.uniform(2, 9) if random.random() < 0.3 else 0.2)
        else:
            for _ in range(int(random.integers(0, 5))):
                row = camera.horizon + random.uniform(0.05, 0.4) * (self.size[1] - camera.horizon)
                depth = camera.depth_of(row)
                left = (random.uniform(0, self.size[0]) - camera.centre) * depth / camera.focal
                right, far = left + random.uniform(6, 13), depth + random.uniform(6, 10)
                corners = [(x, d) for x in np.linspace(left, right, 5) for d in np.linspace(depth, far, 3)]
                if all(self.label_at(*corner) in (Label.GROUND, None) for corner in corners):
                    blocks.append(((left, right), (depth, far), random.uniform(3.5, 8)))
        for x, depths, high in sorted(blocks, key=lambda block: -block[1][0]):
            building(self.canvas, random, x, depths, high, vary(random, _WALLS), self.light.windows)
