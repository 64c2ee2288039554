"""What stands in a scene: trees, people, signs, fences, vehicles and houses, in their labels' colours and sizes of life."""

from __future__ import annotations

from enum import IntEnum
from typing import NamedTuple

import numpy as np

from ._draw import Canvas, Colour, Face, Point, Sprite, pick, shade, vary


class Label(IntEnum):
    """The classes of `scenes`, in their order."""

    SKY = 0
    GROUND = 1
    ROAD = 2
    BUILDING = 3
    TREE = 4
    VEHICLE = 5
    PERSON = 6
    WATER = 7
    FENCE = 8
    SIGN = 9
    MOUNTAIN = 10


def tree(sprite: Sprite, random: np.random.Generator, height: float, leaves: Colour) -> None:
    """A crown of leaves on a trunk, a fir, a poplar, or a bush without a trunk."""
    kind = random.choice(4, p=(0.45, 0.25, 0.12, 0.18))
    sun, bark = sprite.canvas.sun, pick(random, ((84, 62, 44), (104, 92, 80), (60, 48, 40)))
    if kind != 3:
        sprite.rectangle(-0.05 * height, -0.01 * height, 0.05 * height, 0.4 * height, bark)
        sprite.rectangle(-0.05 * height * (sun > 0), 0, 0.05 * height * (sun < 0), 0.4 * height, shade(bark, 0.7))
    if kind == 1:
        for i in range(4):
            low, half = (0.14 + 0.19 * i) * height, (0.26 - 0.045 * i) * height
            top = low + 0.36 * height if i < 3 else height
            sprite.polygon([(-half, low), (half, low), (0, top)], shade(leaves, 0.82 + 0.06 * i))
            sprite.polygon([(-half * sun, low), (0, low), (0, top)], shade(leaves, 0.62 + 0.06 * i))
        return
    spread, rise, middle = {0: (0.3, 0.27, 0.68), 2: (0.13, 0.36, 0.58), 3: (0.55, 0.2, 0.22)}[int(kind)]
    for _ in range(34):
        angle, radius = random.uniform(0, 2 * np.pi), np.sqrt(random.random())
        x, y = radius * np.cos(angle) * spread, max(radius * np.sin(angle) * rise, 0.09 - middle)
        leaf = random.uniform(0.07, 0.13) * height
        light = 1 + 0.3 * y / rise + 0.22 * sun * x / spread + random.uniform(-0.16, 0.16)
        sprite.ellipse(x * height, (middle + y) * height, (leaf, leaf * 0.9), shade(leaves, light))


def person(sprite: Sprite, random: np.random.Generator, height: float, coat: Colour, trousers: Colour) -> None:
    """In trousers or a dress, walking or standing, some with a hat or a bag."""
    skin = pick(random, ((224, 184, 156), (198, 150, 118), (140, 98, 72), (96, 66, 50)))
    hair, h = pick(random, ((52, 38, 30), (24, 22, 22), (150, 110, 60), (170, 170, 170))), height
    stride = random.uniform(0, 0.09) * h
    if random.random() < 0.3:
        sprite.rectangle(-0.1 * h, 0, 0.1 * h, 0.3 * h, shade(skin, 0.9))
        sprite.polygon([(-0.21 * h, 0.2 * h), (0.21 * h, 0.2 * h), (0.11 * h, 0.62 * h), (-0.11 * h, 0.62 * h)], coat)
    else:
        for side in (-1, 1):
            foot, shadow = side * (0.05 * h + stride), 1 if side == sprite.canvas.sun else 0.72
            hip = 0.06 * side * h
            leg = [(foot - 0.06 * h, 0), (foot + 0.06 * h, 0), (hip + 0.07 * h, 0.5 * h), (hip - 0.07 * h, 0.5 * h)]
            sprite.polygon(leg, shade(trousers, shadow))
    sprite.rectangle(-0.14 * h, 0.45 * h, 0.14 * h, 0.83 * h, coat)
    for side in (-1, 1):
        arm = [(0.12, 0.82), (0.18, 0.8), (0.22, 0.45), (0.16, 0.44)]
        tone = 1.06 if side == sprite.canvas.sun else 0.7
        sprite.polygon([(side * x * h, y * h) for x, y in arm], shade(coat, tone))
        sprite.ellipse(side * 0.19 * h, 0.43 * h, (0.03 * h, 0.03 * h), skin)
    if random.random() < 0.3:
        bag = pick(random, ((120, 60, 40), (40, 70, 120), (60, 60, 60), (190, 60, 60)))
        sprite.rectangle(0.13 * h, 0.28 * h, 0.29 * h, 0.46 * h, bag)
    sprite.ellipse(0, 0.91 * h, (0.095 * h, 0.1 * h), skin)
    sprite.ellipse(0, 0.95 * h, (0.1 * h, 0.06 * h), hair)
    if random.random() < 0.25:
        sprite.rectangle(-0.15 * h, 0.94 * h, 0.15 * h, 0.97 * h, shade(coat, 0.8))
        sprite.rectangle(-0.09 * h, 0.96 * h, 0.09 * h, 1.04 * h, shade(coat, 0.8))


def sign(sprite: Sprite, random: np.random.Generator, height: float, board: Colour) -> None:
    """A board or a traffic light on a post, which is thicker than life."""
    post, half, kind = pick(random, ((150, 152, 154), (96, 98, 100), (120, 90, 62))), 0.3 * height, random.integers(4)
    white, middle = (236, 236, 230), height - half
    sprite.rectangle(-0.075 * height, 0, 0.075 * height, middle, post)
    sprite.rectangle(0.03 * height, 0, 0.075 * height, middle, shade(post, 0.7))
    if kind == 0:
        sprite.ellipse(0, middle, (half, half), board)
        sprite.ellipse(0, middle, (0.68 * half, 0.68 * half), white)
        sprite.rectangle(-0.45 * half, middle - 0.14 * half, 0.45 * half, middle + 0.14 * half, shade(board, 0.8))
    elif kind == 1:
        for factor, colour in ((1.1, board), (0.62, white)):
            base = middle - 0.62 * half * factor
            corners = [(-half * factor, base), (half * factor, base), (0, middle + half * factor)]
            sprite.polygon(corners, colour)
    elif kind == 2:
        wide = half * random.uniform(1.0, 1.6)
        sprite.rectangle(-wide, middle - 0.7 * half, wide, middle + 0.7 * half, white)
        sprite.rectangle(-0.9 * wide, middle - 0.6 * half, 0.9 * wide, middle + 0.6 * half, board)
        for line in (-0.25, 0.25):
            y = middle + line * half
            sprite.rectangle(-0.65 * wide, y - 0.1 * half, random.uniform(0, 0.7) * wide, y + 0.1 * half, white)
    else:
        sprite.rectangle(-0.5 * half, middle - 1.1 * half, 0.5 * half, middle + half, (44, 46, 48))
        on = random.integers(3)
        for i, lamp in enumerate(((232, 60, 48), (240, 190, 60), (70, 210, 110))):
            colour = lamp if i == on else shade(lamp, 0.3)
            sprite.ellipse(0, middle + (0.6 - 0.65 * i) * half, (0.27 * half, 0.27 * half), colour, lit=i == on)


def fence(canvas: Canvas, start: Point, end: Point, height: float, kind: int, paint: Colour) -> None:
    """One panel of a fence between two (x, depth): boards, pointed pickets or sheets of metal, without gaps."""
    face = Face(start, end, 0, height, 1.05 if kind == 1 else 0.95)
    boards = 6
    for i in range(boards):
        part, tone = (i / boards, 0, (i + 1) / boards, 0.86), 1.0 if i % 2 else (0.68, 0.78, 0.86)[kind]
        canvas.patch(face, part, shade(paint, tone), Label.FENCE)
        if kind == 1:
            left, _, right, top = part
            corners = [*face.corners(left, 0, right, top)[2:], face.corners((left + right) / 2, 0, right, 1)[3]]
            canvas.polygon(corners, shade(paint, tone * face.light), Label.FENCE)
    if kind != 1:
        canvas.patch(face, (0, 0.82, 1, 1), shade(paint, 1.12), Label.FENCE)
    canvas.patch(face, (0, 0.25, 1, 0.36), shade(paint, 0.6), Label.FENCE)


class _Part(NamedTuple):
    """A box of a vehicle: from `start` to `end` as shares of its length, `inset` from its sides, with windows or without."""

    start: float
    end: float
    inset: float
    bottom: float
    top: float
    windows: int = 0


_PAINTS = (
    (168, 40, 36),
    (44, 80, 140),
    (186, 188, 192),
    (232, 232, 230),
    (44, 46, 50),
    (74, 112, 62),
    (120, 122, 126),
    (206, 168, 52),
    (112, 84, 62),
    (96, 128, 150),
)
# Width, length, and one or two stacks of boxes: a car, a van, a bus, a lorry.
_VEHICLES = (
    (1.8, 4.1, ((_Part(0, 1, 0, 0.3, 0.88), _Part(0.22, 0.84, 0.12, 0.88, 1.45, 2)),)),
    (2.0, 4.8, ((_Part(0, 1, 0, 0.3, 1.15), _Part(0, 0.86, 0.1, 1.15, 2.1, 3)),)),
    (2.5, 8.0, ((_Part(0, 1, 0, 0.3, 1.3), _Part(0, 1, 0, 1.3, 2.9, 6)),)),
    (2.4, 6.5, ((_Part(0, 0.74, 0, 0.4, 2.9),), (_Part(0.76, 1, 0.05, 0.3, 1.2), _Part(0.76, 1, 0.05, 1.2, 2.2, 1)))),
)


def vehicle(canvas: Canvas, random: np.random.Generator, x: float, depth: float, along: bool) -> None:
    """A car, van, bus or lorry with its middle at x and its near end at `depth`, pointing along the depth or across."""
    wide, long, stacks = _VEHICLES[int(random.choice(4, p=(0.62, 0.18, 0.1, 0.1)))]
    paint, load = vary(random, _PAINTS), vary(random, _PAINTS)
    turned = bool(random.integers(2))  # the driver looks at us, or to the left
    canvas.shadow(x, depth + 0.1, wide if along else long, 0.7)

    def span(part: _Part) -> tuple[float, float]:
        start, end = (1 - part.end, 1 - part.start) if turned else (part.start, part.end)
        first = depth if along else x - long / 2
        return first + start * long, first + end * long

    for stack in sorted(stacks, key=lambda stack: -abs(sum(span(stack[0])))):  # far ones first
        for part in stack:
            across = x - wide / 2 + part.inset, x + wide / 2 - part.inset
            into = depth + part.inset, depth + wide - part.inset
            colour = paint if len(stack) > 1 else load
            height = part.bottom, part.top
            sides = (across, height, span(part)) if along else (span(part), height, into)
            front, side = canvas.box(*sides, colour, Label.VEHICLE)
            length, end = (side, front) if along else (front, side)
            for face, panes in ((length, part.windows), (end, min(part.windows, 1))):
                for i in range(panes):
                    if face is None:
                        break
                    canvas.patch(face, ((i + 0.1) / panes, 0.12, (i + 0.9) / panes, 0.86), (52, 68, 84), Label.VEHICLE)
            if part is stack[0]:
                canvas.patch(front, (0.04, 0, 0.96, 0.12), (30, 30, 32), Label.VEHICLE)
            if part is stack[0] and end:
                lamp, low = ((240, 236, 206), 0.45) if turned else ((196, 36, 30), 0.5)
                for left in (0.05, 0.77):
                    canvas.patch(end, (left, low, left + 0.18, low + 0.25), lamp, Label.VEHICLE, lit=True)
            if part is stack[0] and length:
                for middle in (0.2, 0.8) if part.end - part.start > 0.5 else (0.5,):
                    canvas.wheel(length, middle, 0.36, Label.VEHICLE)


def building(
    canvas: Canvas, random: np.random.Generator, x: Point, depth: Point, height: float, wall: Colour, lit: float
) -> None:
    """A house or a block between two x and two depths; `lit` is the share of windows with a light on."""
    roof = pick(random, ((150, 74, 56), (96, 74, 62), (84, 88, 96), (122, 118, 112)))
    front, side = canvas.box(x, (0, height), depth, wall, Label.BUILDING, top=roof)
    storey, step = random.uniform(2.8, 3.6), random.uniform(2.0, 3.4)
    wide, tall = random.uniform(0.4, 0.72), random.uniform(0.42, 0.66)
    pane, frame = pick(random, ((70, 86, 104), (52, 58, 66), (104, 124, 138))), shade(wall, pick(random, (0.72, 1.25)))
    floors = max(1, round(height / storey))
    for face in (front, side) if side else (front,):
        ends = [canvas.camera.project(px, 0, d)[0] for px, d in (face.start, face.end)]
        columns = max(1, round(float(np.hypot(*np.subtract(face.end, face.start))) / step))
        if max(ends) < 0 or min(ends) > canvas.image.width or abs(ends[1] - ends[0]) < 4 * columns:
            continue
        for floor in range(floors):
            bottom = (floor + (1 - tall) / 2 + 0.08) / floors
            for i in range(columns):
                left, right = (i + (1 - wide) / 2) / columns, (i + (1 + wide) / 2) / columns
                if floor == 0 and i == columns // 2:
                    canvas.patch(face, (left, 0, right, 0.75 / floors), (74, 54, 42), Label.BUILDING)
                    continue
                on = random.random() < lit
                window = (left, bottom, right, bottom + tall / floors)
                canvas.patch(face, window, (250, 214, 140) if on else pane, Label.BUILDING, on)
                canvas.patch(face, (left, bottom - 0.06 / floors, right, bottom), frame, Label.BUILDING)
        canvas.patch(face, (0, 0.975, 1, 1), frame, Label.BUILDING)
    if height < 10 and random.random() < 0.75:
        rise, eaves = random.uniform(0.25, 0.45) * (depth[1] - depth[0]), 0.3
        middle, (left, right) = (depth[0] + depth[1]) / 2, (x[0] - eaves, x[1] + eaves)
        if side:
            (px, near), (_, far) = side.start, side.end
            corners = [(px, height, near), (px, height, far), (px, height + rise, middle)]
            canvas.polygon(corners, shade(wall, side.light), Label.BUILDING)
        low = [(left, height - 0.2, depth[0] - eaves), (right, height - 0.2, depth[0] - eaves)]
        canvas.polygon([*low, (right, height + rise, middle), (left, height + rise, middle)], roof, Label.BUILDING)
