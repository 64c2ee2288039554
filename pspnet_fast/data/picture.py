"""A street that the project draws itself, so that there is a picture to try things on."""

from __future__ import annotations

import numpy as np

from ..extras import install
from ._draw import Colour, shade, smooth_noise

try:
    from PIL import Image, ImageDraw, ImageFilter
except ImportError as error:
    raise ImportError(f"the drawn picture needs Pillow ({error}): {install('predict')}") from error

HORIZON = 0.56  # of the height


def _sky(random: np.random.Generator, height: int, width: int) -> np.ndarray:
    """A blue gradient with clouds, (height, width, 3)."""
    depth = np.linspace(0, 1, height)[:, None, None]
    sky = (1 - depth) * np.array([88, 142, 206]) + depth * np.array([206, 224, 238])
    clouds = np.zeros((height, width))
    for i, cells in enumerate((6, 14, 34)):
        clouds += smooth_noise(random, height, width, cells) / (i + 1)
    cover = np.clip((clouds / 1.83 - 0.52) * 5, 0, 1)[..., None] * (0.35 + 0.65 * depth)
    mixed: np.ndarray = (1 - cover) * sky + cover * 246
    return mixed


def _building(draw: ImageDraw.ImageDraw, random: np.random.Generator, box: tuple[int, int, int, int]) -> None:
    left, top, right, bottom = box
    wall = shade(((178, 120, 98), (196, 178, 150), (150, 152, 160), (208, 196, 172))[random.integers(4)], 0.9)
    draw.rectangle(box, fill=wall)
    draw.rectangle((left, top, right, top + max(3, (bottom - top) // 40)), fill=shade(wall, 0.7))
    columns, floor = max(2, (right - left) // 26), 27
    step = (right - left) / columns
    for y in range(top + 14, bottom - 34, floor):
        for i in range(columns):
            x = left + i * step + step * 0.22
            pane = (70, 86, 104) if random.random() < 0.75 else (226, 206, 150)
            draw.rectangle((x, y, x + step * 0.56, y + floor * 0.58), fill=pane, outline=shade(wall, 0.75))
    draw.rectangle((left, bottom - 26, right, bottom), fill=shade(wall, 0.6))


def _tree(draw: ImageDraw.ImageDraw, random: np.random.Generator, x: float, ground: float, size: float) -> None:
    draw.rectangle((x - size * 0.05, ground - size * 0.5, x + size * 0.05, ground), fill=(84, 62, 44))
    for _ in range(26):
        angle, radius = random.uniform(0, 2 * np.pi), size * 0.3 * np.sqrt(random.random())
        cx, cy = x + radius * np.cos(angle), ground - size * 0.7 + radius * np.sin(angle)
        leaf = size * random.uniform(0.08, 0.15)
        green = shade((66, 112, 52), random.uniform(0.75, 1.3) * (1.15 - 0.4 * (cy - ground + size) / size))
        draw.ellipse((cx - leaf, cy - leaf, cx + leaf, cy + leaf), fill=green)


def _car(draw: ImageDraw.ImageDraw, x: float, ground: float, size: float, paint: Colour) -> None:
    """Seen from behind."""
    draw.ellipse((x - size * 0.55, ground - size * 0.06, x + size * 0.55, ground + size * 0.06), fill=(52, 52, 54))
    for side in (-1, 1):
        wheel = x + side * size * 0.36
        draw.rectangle((wheel - size * 0.09, ground - size * 0.22, wheel + size * 0.09, ground), fill=(26, 26, 28))
    body, roof = ground - size * 0.46, ground - size * 0.78
    draw.rounded_rectangle((x - size / 2, body, x + size / 2, ground - size * 0.1), size * 0.08, fill=paint)
    corners = [
        (x - size * 0.42, body + 2),
        (x - size * 0.31, roof),
        (x + size * 0.31, roof),
        (x + size * 0.42, body + 2),
    ]
    draw.polygon(corners, fill=shade(paint, 0.85))
    glass = [(x - size * 0.36, body), (x - size * 0.27, roof + size * 0.05)]
    draw.polygon([*glass, (x + size * 0.27, roof + size * 0.05), (x + size * 0.36, body)], fill=(60, 76, 92))
    for side in (-1, 1):
        lamp = x + side * size * 0.4
        draw.rectangle(
            (lamp - size * 0.07, body + size * 0.08, lamp + size * 0.07, body + size * 0.15), fill=(186, 34, 30)
        )
    plate = body + size * 0.2
    draw.rectangle((x - size * 0.1, plate, x + size * 0.1, plate + size * 0.07), fill=(236, 236, 226))


def _person(draw: ImageDraw.ImageDraw, x: float, ground: float, size: float, coat: Colour) -> None:
    draw.ellipse((x - size * 0.2, ground - size * 0.03, x + size * 0.2, ground + size * 0.03), fill=(96, 94, 92))
    for side in (-1, 1):
        foot = x + side * size * 0.07
        draw.rectangle((foot - size * 0.05, ground - size * 0.45, foot + size * 0.05, ground), fill=(46, 50, 66))
    draw.rounded_rectangle(
        (x - size * 0.14, ground - size * 0.83, x + size * 0.14, ground - size * 0.4), size * 0.05, coat
    )
    head = ground - size * 0.91
    draw.ellipse((x - size * 0.085, head - size * 0.1, x + size * 0.085, head + size * 0.09), fill=(214, 172, 142))
    draw.pieslice(
        (x - size * 0.09, head - size * 0.11, x + size * 0.09, head + size * 0.08), 180, 360, fill=(62, 46, 36)
    )


def draw_street(seed: int = 0, width: int = 640, height: int = 480) -> Image.Image:
    """A street with sky, buildings, trees, a road, cars and people; the same for the same seed.

    Args:
        seed: of the buildings, clouds, trees and noise.
        width: in pixels.
        height: in pixels.

    Returns:
        A picture in RGB.
    """
    random = np.random.default_rng(seed)
    horizon = round(HORIZON * height)
    pixels = np.full((height, width, 3), 150.0)
    pixels[:horizon] = _sky(random, horizon, width)
    picture = Image.fromarray(pixels.astype(np.uint8))
    draw = ImageDraw.Draw(picture)

    draw.rectangle((0, horizon, width, height), fill=(168, 164, 156))  # the pavements
    vanishing = (width * 0.5, horizon - 4)
    draw.polygon([vanishing, (width * 1.08, height), (-width * 0.08, height)], fill=(92, 94, 98))
    for side in (-1, 1):
        kerb = [(width * (0.5 + side * 0.58), height), (width * (0.5 + side * 0.62), height)]
        draw.polygon([vanishing, *kerb], fill=(206, 204, 198))
    near = 1.0
    while near > 0.08:  # the dashes of the middle line, shorter and thinner with distance
        y0, y1 = (vanishing[1] + (height - vanishing[1]) * t for t in (near, near * 0.82))
        w0, w1 = width * 0.012 * near, width * 0.012 * near * 0.82
        middle = vanishing[0]
        draw.polygon([(middle - w0, y0), (middle + w0, y0), (middle + w1, y1), (middle - w1, y1)], fill=(232, 230, 222))
        near *= 0.66

    for side in (-1, 1):  # both rows of houses, from the vanishing point outwards
        reach = 0.08
        while reach < 0.5:
            end = reach * 1.62 + 0.02
            edges = sorted(width * (0.5 + side * r) for r in (reach, end))
            top = horizon - height * (0.1 + 0.78 * reach) * random.uniform(0.9, 1.25)
            floor = horizon + height * 0.02 + height * 0.1 * reach
            _building(draw, random, (round(edges[0]), max(6, round(top)), round(edges[1]), round(floor)))
            reach = end
    for side in (-1, 1):
        for reach in (0.17, 0.27, 0.42):
            x = width * (0.5 + side * reach * random.uniform(0.98, 1.06))
            _tree(draw, random, x, horizon + height * 0.33 * reach, height * 0.85 * reach)

    _car(draw, width * 0.535, horizon + height * 0.045, width * 0.05, (190, 190, 196))
    _car(draw, width * 0.43, horizon + height * 0.09, width * 0.085, (52, 88, 142))
    _car(draw, width * 0.66, horizon + height * 0.2, width * 0.17, (164, 44, 40))
    _person(draw, width * 0.2, horizon + height * 0.1, height * 0.2, (196, 148, 52))
    _person(draw, width * 0.1, horizon + height * 0.2, height * 0.32, (92, 60, 116))
    _person(draw, width * 0.885, horizon + height * 0.14, height * 0.24, (48, 110, 96))

    soft = np.asarray(picture.filter(ImageFilter.GaussianBlur(0.7)), dtype=np.float64)
    light = 0.9 + 0.2 * smooth_noise(random, height, width, 8)[..., None]
    texture = random.normal(0, 4, (height, width, 1)) + random.normal(0, 2, (height, width, 3))
    return Image.fromarray((soft * light + texture).clip(0, 255).astype(np.uint8))
