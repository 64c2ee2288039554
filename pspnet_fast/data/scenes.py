"""Streets, villages and shores that the project draws itself, with labels: a dataset for whoever has none.

A camera stands somewhere above flat ground. Ground, water and road are drawn first, then houses, then whatever stands on the
ground that is still to be seen, far to near. Colours overlap between the classes (grey houses, roads and cars, green cars,
trees and water), so that texture, shape and place have to be learnt. `write_scenes` writes them as ADE20K's scene parsing
benchmark comes (SceneParse150), so that they are read as ADE20K is.
"""

from __future__ import annotations

import math
import shutil
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np

from ..extras import install
from ._draw import Sprite, pick, smooth_noise, vary
from ._figures import Label, fence, person, sign, tree, vehicle
from ._landscape import FINER, Landscape
from .classes import Classes

try:
    from PIL import Image, ImageDraw, ImageFilter, ImageFont
    from tqdm import tqdm
except ImportError as error:
    raise ImportError(f"the scenes need Pillow and tqdm ({error}): {install('predict')}") from error

_COLOURS = {
    Label.SKY: (120, 190, 240),
    Label.GROUND: (168, 196, 96),
    Label.ROAD: (96, 96, 104),
    Label.BUILDING: (184, 112, 88),
    Label.TREE: (32, 112, 48),
    Label.VEHICLE: (208, 48, 48),
    Label.PERSON: (240, 144, 200),
    Label.WATER: (40, 96, 200),
    Label.FENCE: (200, 168, 88),
    Label.SIGN: (248, 224, 40),
    Label.MOUNTAIN: (144, 112, 168),
}
SCENES = Classes(tuple(label.name.lower() for label in Label), tuple(_COLOURS[label] for label in Label))

SMALLEST, LARGEST = 48, 2048  # pixels of a side; a square scene of the largest takes 1 GB to draw
MOST_IMAGES, MOST_SEEDS = 10**6, 2**31 - 1
FIRST_VALIDATION_SEED = 2**31
PART = ".part"  # the folder that scenes are written into until all are there

_LEAVES = ((62, 108, 50), (84, 126, 58), (46, 84, 56), (112, 132, 62), (176, 116, 52), (150, 66, 44), (196, 168, 74))
_FENCES = ((232, 230, 222), (134, 96, 66), (150, 152, 154), (92, 118, 84), (104, 84, 70))
_BOARDS = ((200, 44, 40), (44, 88, 168), (60, 120, 76), (224, 176, 48), (92, 94, 98))
_CLOTHES = (
    (176, 52, 48),
    (52, 78, 132),
    (60, 60, 66),
    (204, 164, 64),
    (96, 116, 70),
    (214, 210, 204),
    (128, 84, 120),
    (132, 130, 128),
)

# How much light varies within a class: from pixel to pixel, over 3 pixels, over a 20th of the width, and along the ground.
_TEXTURE = {
    Label.SKY: (0.00, 0.00, 0.00, 0.00),
    Label.GROUND: (0.12, 0.10, 0.10, 0.38),
    Label.ROAD: (0.05, 0.02, 0.06, 0.06),
    Label.BUILDING: (0.06, 0.05, 0.06, 0.00),
    Label.TREE: (0.22, 0.26, 0.08, 0.00),
    Label.VEHICLE: (0.02, 0.02, 0.06, 0.00),
    Label.PERSON: (0.05, 0.08, 0.00, 0.00),
    Label.WATER: (0.03, 0.02, 0.08, 0.00),  # and ripples
    Label.FENCE: (0.08, 0.06, 0.04, 0.00),
    Label.SIGN: (0.02, 0.02, 0.02, 0.00),
    Label.MOUNTAIN: (0.05, 0.10, 0.16, 0.00),
}


class SceneError(ValueError):
    """A scene that cannot be drawn, or a folder that scenes cannot be written into; the message says which and why."""


def _fences(land: Landscape) -> None:
    """On either side, along the road or across the view, panel by panel where there is ground."""
    random, plan = land.random, land.plan
    for side in (-1, 1):
        if random.random() > 0.45:
            continue
        paint, kind, high = vary(random, _FENCES), int(random.integers(3)), random.uniform(1.4, 2.1)
        beside = side * (plan.width / 2 + random.uniform(1.2, 3.5))
        if plan.along and plan.width and random.random() < 0.7:
            posts = [(plan.x(d) + beside, d) for d in (1.01 * land.near + 2.0 * np.arange(11)).tolist()]
        else:
            depth = land.near * random.uniform(1.3, 2.4) if plan.along else plan.middle + beside
            first = random.uniform(-14, 6)
            posts = [(first + 2.0 * i, depth) for i in range(int(random.integers(4, 14)))]
        for start, end in pairwise(posts):
            x, depth = (start[0] + end[0]) / 2, (start[1] + end[1]) / 2
            if start[1] > land.near and land.label_at(x, depth) in (Label.GROUND, None):
                land.things.append((end[1], partial(fence, land.canvas, start, end, high, kind, paint)))


def _vehicles(land: Landscape) -> None:
    """In two lanes."""
    random, plan = land.random, land.plan
    if not plan.width or random.random() < 0.15:
        return
    for lane in (-plan.width / 4, plan.width / 4):
        if plan.along:
            depth = land.near + random.uniform(1, 22)
            for _ in range(int(random.integers(0, 4))):
                x = plan.x(depth) + lane * random.uniform(0.85, 1.3)
                if land.camera.focal / depth > 4 * FINER * land.unit and land.label_at(x, depth) in (Label.ROAD, None):
                    land.things.append((depth, partial(vehicle, land.canvas, random, x, depth, True)))
                depth += random.uniform(8, 22)
        else:
            depth, x = plan.middle + lane - 0.9, random.uniform(-16, 0)
            while x < 14 and depth > 0.8 * land.near:
                land.things.append((depth, partial(vehicle, land.canvas, random, x, depth, False)))
                x += random.uniform(7, 22)


def _standing(land: Landscape) -> None:
    """Trees, people and signs, on ground that is in view."""
    random, canvas = land.random, land.canvas
    leaves = [vary(random, _LEAVES[:4] if random.random() < 0.7 else _LEAVES) for _ in range(3)]
    for _ in range(int(random.integers(1, 4 if land.kind == "street" else 9))):
        if place := land.place((Label.GROUND,), 3, 20):
            high = random.uniform(3, 7)
            canvas.shadow(*place, 0.5 * high, 0.8 * high)
            paint = partial(tree, Sprite(canvas, *place, Label.TREE), random, high, pick(random, leaves))
            land.things.append((place[1], paint))
    for _ in range(int(random.integers(0, 6))):
        if place := land.place(pick(random, ((Label.GROUND,), (Label.GROUND, Label.ROAD))), 17, 44):
            high, coat, trousers = random.uniform(1.45, 1.9), vary(random, _CLOTHES), vary(random, _CLOTHES)
            canvas.shadow(*place, 0.5, high)
            paint = partial(person, Sprite(canvas, *place, Label.PERSON), random, high, coat, trousers)
            land.things.append((place[1], paint))
    for _ in range(int(random.integers(0, 4))):
        if place := land.place((Label.GROUND,), 15, 26):
            high = random.uniform(2.3, 3.1)
            canvas.shadow(*place, 0.4, high)
            paint = partial(sign, Sprite(canvas, *place, Label.SIGN), random, high, vary(random, _BOARDS))
            land.things.append((place[1], paint))


def _photograph(land: Landscape) -> tuple[np.ndarray, np.ndarray]:
    """Turn the camera a little, let light and shadow fall, and blur and disturb the picture as lens and sensor do."""
    random, width, height, camera = land.random, land.width, land.height, land.camera
    angle = math.radians(float(np.clip(random.normal(0, 1.3), -3, 3)))
    cos, sin = math.cos(angle), math.sin(angle)
    x0, y0, border = FINER * width / 2, FINER * height / 2, FINER * land.margin
    turn = (cos, -sin, x0 - cos * x0 + sin * y0 + border, sin, cos, y0 - sin * x0 - cos * y0 + border)
    size = (FINER * width, FINER * height)
    drawn, dark = (
        image.transform(size, Image.Transform.AFFINE, turn, Image.Resampling.NEAREST)
        for image in (land.canvas.image, land.canvas.shadows)
    )
    labels = np.asarray(drawn)[FINER // 2 :: FINER, FINER // 2 :: FINER, 3].copy()  # at the pixels' centres
    pixels = np.asarray(drawn.convert("RGB").reduce(FINER), np.float32)

    columns, rows = (FINER * np.arange(n, dtype=np.float32) + FINER // 2 for n in (width, height))
    below = (sin * columns + cos * rows[:, None] + turn[5] - camera.horizon).clip(FINER / 2)
    depth = camera.focal * camera.eye / below
    across = (cos * columns - sin * rows[:, None] + turn[2] - camera.centre) * depth / camera.focal
    tile = random.random((64, 64), dtype=np.float32) - 0.5

    def ground(step_x: float, step_d: float) -> np.ndarray:
        """A pattern that lies on the ground, of cells of so many metres."""
        pattern: np.ndarray = tile[(depth / step_d).astype(int) % 64, (across / step_x).astype(int) % 64]
        return pattern

    near, water, solid = np.exp(-depth / 25), labels == Label.WATER, np.isin(labels, (Label.GROUND, Label.ROAD))
    texture = np.array([_TEXTURE[label] for label in Label], np.float32)[labels] * random.uniform(0.7, 1.3)
    light = 1 + 2 * texture[..., 0] * (random.random((height, width), dtype=np.float32) - 0.5)
    for i, cells in ((1, width // 3), (2, max(2, width // 20))):
        light += 2 * texture[..., i] * (smooth_noise(random, height, width, cells) - 0.5)
    light += texture[..., 3] * (ground(0.25, 0.4) + ground(1.7, 2.3)) * near
    light += water * (ground(1.2, 0.2) + ground(3.0, 0.7)) * (0.1 + 0.25 * near)
    light *= 1 - solid * np.asarray(dark.reduce(FINER), np.float32) / 255 * land.light.contrast
    pixels *= light[..., None]

    haze = solid * 0.5 * np.exp(-below / (0.1 * FINER * height))
    mirrored = water * 0.7 * np.exp(-below / (0.3 * FINER * height))  # what water shows of the sky
    pixels += (haze + mirrored)[..., None] * (np.array(land.light.horizon, np.float32) - pixels)
    slope = np.linspace(-1, 1, width, dtype=np.float32) * random.uniform(-0.1, 0.1)
    pixels *= (1 + slope + 0.12 * (smooth_noise(random, height, width, 3) - 0.5))[..., None]
    soft = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    soft = soft.filter(ImageFilter.GaussianBlur(random.uniform(0.2, 0.7) * land.unit))
    noise = random.standard_normal((height, width, 3), dtype=np.float32) * random.uniform(1, 5)
    return (np.asarray(soft) + noise).clip(0, 255).astype(np.uint8), labels


def _check_size(where: str, width: int, height: int) -> None:
    if min(width, height) < SMALLEST or max(width, height) > LARGEST:
        raise SceneError(f"{where}: width and height must be from {SMALLEST} to {LARGEST}, got {width} and {height}")


def draw_scene(seed: int, width: int = 192, height: int = 144) -> tuple[np.ndarray, np.ndarray]:
    """A scene and its labels; the same for the same seed and size.

    Args:
        seed: at least 0. `scene_seeds` says which seeds `write_scenes` takes.
        width: in pixels, from 48 to 2048.
        height: in pixels, from 48 to 2048.

    Returns:
        The picture (height, width, 3), RGB, and the labels of `SCENES` (height, width), from 0, both uint8. Both are taken of
        one drawing: a pixel's label is what lies at its centre.

    Raises:
        SceneError: a negative seed, or a side below 48.
    """
    if seed < 0:
        raise SceneError(f"draw_scene: seed must be at least 0, got {seed}")
    _check_size("draw_scene", width, height)
    land = Landscape(np.random.default_rng(seed), width, height)
    _fences(land)
    _vehicles(land)
    _standing(land)
    for _, paint in sorted(land.things, key=lambda thing: -thing[0]):
        paint()
    return _photograph(land)


def scene_seeds(images: int, seed: int = 0) -> tuple[range, range]:
    """`draw_scene`'s seeds of a dataset's training and validation scenes, which no other seed's dataset has."""
    start = seed * 2 * FIRST_VALIDATION_SEED
    validation = start + FIRST_VALIDATION_SEED
    return range(start, start + images), range(validation, validation + max(1, images // 5))


def _stamp(picture: Image.Image, annotation: Image.Image, text: str) -> None:
    """Number a picture in a corner, as a camera does: void, as it is no part of the scene."""
    font = ImageFont.load_default(max(6, picture.height // 18))
    right, height = math.ceil(font.getlength(text)) + 3, math.ceil(1.3 * font.getbbox("0")[3])
    box = (0, picture.height - height, right, picture.height)
    ImageDraw.Draw(annotation).rectangle(box, fill=0)
    draw = ImageDraw.Draw(picture)
    draw.rectangle(box, fill=(20, 20, 22))
    draw.text((2, picture.height - height / 2), text, fill=(250, 190, 60), font=font, anchor="lm")


def write_scenes(folder: Path, images: int, seed: int = 0, width: int = 192, height: int = 144) -> None:
    """Write scenes as ADE20K's scene parsing benchmark comes, with progress on stderr.

    `images/training/scene_00000001.jpg` and so on has its labels in `annotations/training/scene_00000001.png`, 8 bits a
    pixel: 0 is void, k + 1 class k. Void is each picture's number, stamped in its lower left corner. `validation` stands
    beside `training`. All is written into a folder `.part` inside, and moved when it is complete.

    Args:
        folder: a new or an empty one.
        images: training scenes, a million at most; a fifth as many are for validation, and at least one.
        seed: from 0 to 2^31 - 1; no scene is in two datasets of other seeds, or in both parts of one.
        width: in pixels, from 48 to 2048.
        height: in pixels, from 48 to 2048.

    Raises:
        SceneError: images, seed, width or height out of bounds, or a folder that is a file, holds anything, or
            cannot be written.
    """
    if not 1 <= images <= MOST_IMAGES:
        raise SceneError(f"write_scenes: images must be from 1 to {MOST_IMAGES}, got {images}")
    if not 0 <= seed <= MOST_SEEDS:
        raise SceneError(f"write_scenes: seed must be from 0 to {MOST_SEEDS}, got {seed}")
    _check_size("write_scenes", width, height)
    part = folder / PART
    try:
        if folder.exists() and not folder.is_dir():
            raise SceneError(f"{folder}: must be a new or an empty folder, is a file")
        folder.mkdir(parents=True, exist_ok=True)
        if part.exists():
            raise SceneError(f"{folder}: holds {PART}, left by a run that was interrupted: delete it and try again")
        if inside := sorted(path.name for path in folder.iterdir()):
            raise SceneError(
                f"{folder}: must be a new or an empty folder, holds {inside[0]} and {len(inside) - 1} more"
            )
    except OSError as error:
        raise SceneError(f"{folder}: cannot be written: {error.strerror or error}") from error

    training, validation = scene_seeds(images, seed)
    todo = [("training", i, s) for i, s in enumerate(training, 1)]
    todo += [("validation", i, s) for i, s in enumerate(validation, 1)]
    try:
        for split in ("training", "validation"):
            for kind in ("images", "annotations"):
                (part / kind / split).mkdir(parents=True)
        for split, number, scene in tqdm(todo, desc="scenes", unit="scene"):
            pixels, labels = draw_scene(scene, width, height)
            picture, annotation = Image.fromarray(pixels), Image.fromarray(labels + np.uint8(1))
            _stamp(picture, annotation, f"{split[0]}{number:04}")
            picture.save(part / "images" / split / f"scene_{number:08}.jpg", quality=95)
            annotation.save(part / "annotations" / split / f"scene_{number:08}.png")
        for kind in ("annotations", "images"):
            (part / kind).rename(folder / kind)
        part.rmdir()
    except OSError as error:
        shutil.rmtree(part, ignore_errors=True)
        raise SceneError(f"{folder}: cannot be written: {error.strerror or error}") from error
