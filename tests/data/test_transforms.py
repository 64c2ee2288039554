import colorsys
import importlib
import sys
from itertools import pairwise

import cv2
import numpy as np
import pytest
import torch

from pspnet_fast.data import transforms
from pspnet_fast.data.normalisation import MEAN, STD
from pspnet_fast.data.transforms import (
    Augmentation,
    Chance,
    Colours,
    Window,
    augment,
    distort,
    draw,
    draw_colours,
    init_worker,
    normalise,
    scale,
    view,
)

LEVEL = 1 / max(STD)  # a grey level, normalised
NOTHING = Augmentation(scale=(1, 1), mirror=0, rotate_probability=0, blur_probability=0)


def street(size, seed=0):
    """An image that varies from pixel to pixel, and labels in patches, with ignored ones."""
    random = np.random.default_rng(seed)
    image = cv2.GaussianBlur(random.integers(0, 256, (*size, 3), dtype=np.uint8), (3, 3), 0)
    patches = random.choice(np.array([0, 3, 4, 7, 149, 255], np.uint8), (9, 9))
    return image, cv2.resize(patches, size[::-1], interpolation=cv2.INTER_NEAREST)


def semseg(image, labels, crop, settings, random):
    """The chain of semseg's util/transform.py, every step on the whole picture, plainly with OpenCV."""
    image = image.astype(np.float32)
    factor = random.uniform(*settings.scale)
    aspect = 1 if settings.aspect is None else np.sqrt(random.uniform(*settings.aspect))
    fx, fy = factor * aspect, factor / aspect
    image = cv2.resize(image, None, fx=fx, fy=fy, interpolation=cv2.INTER_LINEAR)
    labels = cv2.resize(labels, None, fx=fx, fy=fy, interpolation=cv2.INTER_NEAREST)
    height, width = labels.shape
    if random.random() < settings.rotate_probability:
        matrix = cv2.getRotationMatrix2D((width / 2, height / 2), random.uniform(*settings.rotate), 1)
        image = cv2.warpAffine(image, matrix, (width, height), flags=cv2.INTER_LINEAR, borderValue=MEAN)
        labels = cv2.warpAffine(labels, matrix, (width, height), flags=cv2.INTER_NEAREST, borderValue=255)
    if random.random() < settings.blur_probability:
        image = cv2.GaussianBlur(image, (5, 5), 0)
    if random.random() < settings.mirror:
        image, labels = image[:, ::-1], labels[:, ::-1]
    down, right = max(crop[0] - height, 0), max(crop[1] - width, 0)
    around = down // 2, down - down // 2, right // 2, right - right // 2
    image = cv2.copyMakeBorder(image, *around, cv2.BORDER_CONSTANT, value=MEAN)
    labels = cv2.copyMakeBorder(labels, *around, cv2.BORDER_CONSTANT, value=255)
    top = random.integers(0, labels.shape[0] - crop[0], endpoint=True)
    left = random.integers(0, labels.shape[1] - crop[1], endpoint=True)
    part = slice(top, top + crop[0]), slice(left, left + crop[1])
    return ((image[part] - np.float32(MEAN)) / np.float32(STD)).transpose(2, 0, 1), labels[part]


def both(size, crop, settings, seed):
    image, labels = street(size, seed)
    ours = augment(image, labels, crop, settings, np.random.default_rng(seed))
    return [t.numpy() for t in ours], semseg(image, labels, crop, settings, np.random.default_rng(seed))


@pytest.mark.parametrize(
    "settings",
    [
        Augmentation(),
        Augmentation(aspect=(0.6, 1.7)),
        Augmentation(rotate=(-180, 180), rotate_probability=1, blur_probability=1),
        Augmentation(rotate_probability=0, blur_probability=1, mirror=1),
    ],
    ids=["default", "aspect", "any angle", "blur"],
)
@pytest.mark.parametrize(
    ("size", "crop"),
    [((90, 121), (65, 65)), ((60, 200), (72, 57)), ((33, 40), (81, 81)), ((150, 150), (9, 9)), ((97, 64), (97, 64))],
    ids=str,
)
def test_a_crop_is_that_of_semsegs_whole_chain(size, crop, settings):
    wrong = 0
    for seed in range(25):
        (image, labels), (expected, expected_labels) = both(size, crop, settings, seed)
        np.testing.assert_allclose(image, expected, atol=0.02 * LEVEL)
        wrong += (labels != expected_labels).sum()
    assert wrong <= 25 * crop[0] * crop[1] * 1e-4  # a label between two pixels may fall to either


@pytest.mark.parametrize("size", [(90, 121), (50, 50), (64, 66), (65, 30)], ids=str)
@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_exact_where_nothing_is_interpolated(size, dtype):
    settings = Augmentation(scale=(1, 1), rotate_probability=0, blur_probability=0)
    for seed in range(8):
        image, labels = street(size, seed)
        ours = augment(image.astype(dtype), labels, (65, 65), settings, np.random.default_rng(seed))
        expected = semseg(image, labels, (65, 65), settings, np.random.default_rng(seed))
        assert (ours[0].numpy() == expected[0]).all()
        assert (ours[1].numpy() == expected[1]).all()


def test_labels_of_a_scaled_picture_are_opencvs_exactly():
    labels = np.random.default_rng(0).integers(0, 255, (47, 61), dtype=np.uint8)
    for fy, fx in np.random.default_rng(1).uniform(0.4, 2.2, (200, 2)):
        expected = cv2.resize(labels, None, fx=fx, fy=fy, interpolation=cv2.INTER_NEAREST)
        height, width = transforms.scaled_size(labels.shape, (fy, fx))
        assert (scale(labels, (fy, fx), Window(0, height, 0, width)) == expected).all()
        assert (scale(labels, (fy, fx), Window(5, height - 2, 3, width - 1)) == expected[5:-2, 3:-1]).all()


def test_labels_are_never_blended():
    image, labels = street((90, 121))
    labels[labels == 4] = 200  # far from its neighbours: a blend would be another value
    found = set()
    for seed in range(60):
        found |= set(augment(image, labels, (80, 80), Augmentation(), np.random.default_rng(seed))[1].unique().tolist())
    assert found == set(np.unique(labels)) | {255}


def test_result():
    image, labels = augment(*street((40, 50)), (65, 33), Augmentation(), np.random.default_rng(0))
    assert (image.shape, image.dtype, image.is_contiguous()) == ((3, 65, 33), torch.float32, True)
    assert (labels.shape, labels.dtype, labels.is_contiguous()) == ((65, 33), torch.uint8, True)


def test_equal_generators_give_equal_results_and_the_picture_stays():
    settings = Augmentation(photometric=True, cat_max_ratio=0.5)
    image, labels = street((60, 70))
    kept = image.copy(), labels.copy()
    random, again = np.random.default_rng(3), np.random.default_rng(3)
    images = []
    for _ in range(6):
        first = augment(image, labels, (33, 33), settings, random)
        second = augment(image, labels, (33, 33), settings, again)
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
        images.append(first[0])
    assert not any(torch.equal(a, b) for a, b in pairwise(images))
    assert (image == kept[0]).all()
    assert (labels == kept[1]).all()
    augment(image, labels, (60, 70), NOTHING, random)[1].fill_(9)
    assert (labels == kept[1]).all()


def test_a_small_picture_stands_in_the_middle():
    image, labels = np.zeros((4, 5, 3), np.uint8), np.full((4, 5), 7, np.uint8)
    padded, marked = augment(image, labels, (9, 10), NOTHING, np.random.default_rng(0))
    assert (marked.numpy() == np.pad(labels, ((2, 3), (2, 3)), constant_values=255)).all()
    assert torch.equal(padded[:, marked == 255], torch.zeros(3, 70))  # the mean, normalised
    assert torch.equal(padded[:, 2, 2], torch.tensor([-m / s for m, s in zip(MEAN, STD, strict=True)]))


def test_crops_come_from_everywhere_alike():
    labels = np.arange(5 * 7, dtype=np.uint8).reshape(5, 7)
    image, random = np.zeros((5, 7, 3), np.uint8), np.random.default_rng(0)
    firsts = [int(augment(image, labels, (3, 6), NOTHING, random)[1][0, 0]) for _ in range(1200)]
    values, counts = np.unique(firsts, return_counts=True)
    assert values.tolist() == [0, 1, 7, 8, 14, 15]
    assert abs(counts - 200).max() < 50  # four standard deviations


def test_what_is_drawn():
    random, count = np.random.default_rng(0), 4000
    chances = [draw(Augmentation(aspect=(0.5, 2)), random) for _ in range(count)]
    for name in ("blur", "mirror"):
        assert abs(np.mean([getattr(c, name) for c in chances]) - 0.5) < 0.03
    angles = [c.angle for c in chances if c.angle is not None]
    assert abs(len(angles) / count - 0.5) < 0.03
    scales = [np.sqrt(c.factors[0] * c.factors[1]) for c in chances]
    aspects = [c.factors[1] / c.factors[0] for c in chances]
    for values, low, high in ((angles, -10, 10), (scales, 0.5, 2), (aspects, 0.5, 2)):
        assert low <= min(values) < low + 0.01 * (high - low)
        assert high >= max(values) > high - 0.01 * (high - low)
        quarters = np.quantile(values, [0.25, 0.5, 0.75])
        np.testing.assert_allclose((quarters - low) / (high - low), [0.25, 0.5, 0.75], atol=0.03)  # uniform
    together = np.mean([(c.blur, c.mirror, c.angle is not None) == (True, True, True) for c in chances])
    assert abs(together - 1 / 8) < 0.02  # independent
    assert all(c.colours is None for c in chances)
    plain = [draw(Augmentation(), random) for _ in range(20)]
    assert all(c.factors[0] == c.factors[1] for c in plain)


def test_what_is_drawn_of_colours():
    random, count = np.random.default_rng(0), 4000
    colours = [draw_colours(random) for _ in range(count)]
    for values, nothing, low, high in (
        ([c.brightness for c in colours], 0, -32, 32),
        ([c.contrast for c in colours], 1, 0.5, 1.5),
        ([c.saturation for c in colours], 1, 0.5, 1.5),
        ([c.hue for c in colours], 0, -18, 17),
    ):
        changed = np.array([value for value in values if value != nothing])
        assert abs(len(changed) / count - 0.5) < 0.04
        assert low <= changed.min() < low + 0.02 * (high - low)
        assert high >= changed.max() > high - 0.02 * (high - low)
        assert abs((changed.mean() - low) / (high - low) - 0.5) < 0.02
    assert abs(np.mean([c.contrast_first for c in colours]) - 0.5) < 0.03


@pytest.mark.parametrize("contrast_first", [False, True])
@pytest.mark.parametrize("brightness", [0.0, -31.0, 30.0])
@pytest.mark.parametrize(("saturation", "hue"), [(1.0, 0), (1.4, 0), (0.6, -18), (1.0, 17)])
def test_photometric_distortion(contrast_first, brightness, saturation, hue):
    """Pixel by pixel with Python's colorsys."""
    image = np.random.default_rng(0).uniform(0, 255, (6, 7, 3)).astype(np.float32)
    image[0] = image[0, :, :1]  # greys
    ours = distort(image, Colours(brightness, 1.3, contrast_first, saturation, hue))
    for pixel, result in zip(image.reshape(-1, 3).astype(float), ours.reshape(-1, 3), strict=True):
        x = np.clip(pixel + brightness, 0, 255)
        x = np.clip(x * 1.3, 0, 255) if contrast_first else x
        h, s, v = colorsys.rgb_to_hsv(*x / 255)
        x = 255 * np.array(colorsys.hsv_to_rgb((h + hue / 180) % 1, min(s * saturation, 1), v))
        x = x if contrast_first else np.clip(x * 1.3, 0, 255)
        np.testing.assert_allclose(result, x, atol=0.01)


def test_colours_change_the_picture_and_not_its_border():
    image, labels = street((30, 30))
    random = np.random.default_rng(0)
    settings = Augmentation(**{**vars(NOTHING), "photometric": True})
    changed = [augment(image, labels, (40, 40), settings, random)[0] for _ in range(12)]
    plain = augment(image, labels, (40, 40), NOTHING, random)[0]
    assert sum(not torch.equal(x, plain) for x in changed) >= 8
    for x in changed:
        assert torch.equal(x[:, :5], torch.zeros(3, 5, 40))
        assert ((x - normalise(np.zeros((1, 1, 3), np.uint8))).min() >= -1e-5).all()


def test_mirrored_pictures_are_distorted_alike():
    image, labels = street((30, 31))
    colours = Colours(10, 1.2, True, 0.7, 9)
    chance = Chance((1.0, 1.0), None, False, False, colours)
    whole = Window(0, 30, 0, 31)
    one = transforms._image(image, chance, whole, labels.shape)
    other = transforms._image(image, chance._replace(mirror=True), whole, labels.shape)
    np.testing.assert_allclose(one[:, ::-1], other, atol=1e-3)
    assert not (one == image).any(2).all()


def test_crops_of_one_class_are_drawn_again():
    """Only the last of 60 columns is of another class; a crop that shows it has a tenth of that class."""
    image, labels = np.zeros((10, 60, 3), np.uint8), np.zeros((10, 60), np.uint8)
    labels[:, 59] = 1

    def share(cat_max_ratio, count=400):
        settings = Augmentation(**{**vars(NOTHING), "cat_max_ratio": cat_max_ratio})
        random = np.random.default_rng(0)
        return np.mean([(augment(image, labels, (10, 10), settings, random)[1] == 1).any() for _ in range(count)])

    assert abs(share(1.0) - 1 / 51) < 0.02
    assert abs(share(0.91) - (1 - (50 / 51) ** 11)) < 0.06


class Counting:
    """A generator that counts how often a place was drawn: two integers each."""

    def __init__(self):
        self.generator, self.places = np.random.default_rng(0), 0

    def __getattr__(self, name):
        self.places += 0.5 * (name == "integers")
        return getattr(self.generator, name)


@pytest.mark.parametrize(
    ("pixels", "cat_max_ratio", "places"),
    [
        ({3: 20, 4: 80}, 0.81, 1),
        ({3: 20, 4: 80}, 0.8, 11),  # ten times again, and no more
        ({3: 100}, 0.99, 11),
        ({3: 100}, 1.0, 1),
        ({3: 10, 4: 10, 255: 80}, 0.75, 1),  # ignored pixels are no class
        ({3: 16, 4: 4, 255: 80}, 0.75, 11),  # and not counted
        ({255: 100}, 0.75, 11),
    ],
    ids=str,
)
def test_when_a_crop_is_drawn_again(pixels, cat_max_ratio, places):
    labels = np.repeat(np.array([*pixels], np.uint8), [*pixels.values()]).reshape(10, 10)
    random, settings = Counting(), Augmentation(**{**vars(NOTHING), "cat_max_ratio": cat_max_ratio})
    augment(np.zeros((10, 10, 3), np.uint8), labels, (10, 10), settings, random)
    assert random.places == places


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_normalise(dtype):
    image = street((5, 7))[0].astype(dtype)
    x = normalise(image)
    expected = (image.astype(np.float64) - MEAN) / STD
    np.testing.assert_allclose(x.permute(1, 2, 0).numpy(), expected, atol=1e-6)
    assert x.is_contiguous()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"scale": (2.0, 0.5)}, r"scale must be two positive factors, the smaller first, got \(2.0, 0.5\)"),
        ({"scale": (0.0, 1.0)}, "scale must be two positive factors"),
        ({"scale": (float("nan"), 1.0)}, "scale must be two positive factors"),
        ({"aspect": (1.0, float("inf"))}, "aspect must be two positive factors"),
        ({"rotate": (10.0, -10.0)}, "rotate must be two angles from -180 to 180"),
        ({"rotate": (-10.0, 200.0)}, "rotate must be two angles from -180 to 180"),
        ({"mirror": 1.5}, "mirror must be a probability, from 0 to 1, got 1.5"),
        ({"rotate_probability": -0.1}, "rotate_probability must be a probability"),
        ({"blur_probability": float("nan")}, "blur_probability must be a probability"),
        ({"cat_max_ratio": 0.0}, "cat_max_ratio must be above 0 and at most 1, got 0.0"),
    ],
    ids=str,
)
def test_settings_that_cannot_be(wrong, message):
    with pytest.raises(ValueError, match=f"augmentation: {message}"):
        Augmentation(**wrong)


@pytest.mark.parametrize(
    ("image", "labels", "crop", "message"),
    [
        ((4, 5), (4, 5), (3, 3), r"image must be \(H, W, 3\), uint8 or float32, got \(4, 5\)"),
        ((4, 5, 4), (4, 5), (3, 3), "image must be"),
        ((0, 5, 3), (0, 5), (3, 3), "image must be"),
        ((4, 5, 3), (5, 4), (3, 3), r"labels must be uint8 and as large as the image, \(4, 5\), got \(5, 4\)"),
        ((4, 5, 3), (4, 5), (3, 0), r"crop must be at least one pixel in height and width, got \(3, 0\)"),
    ],
    ids=str,
)
def test_arguments_that_do_not_fit(image, labels, crop, message):
    with pytest.raises(ValueError, match=f"augment: {message}"):
        augment(np.zeros(image, np.uint8), np.zeros(labels, np.uint8), crop, Augmentation(), np.random.default_rng(0))


def test_dtypes_that_do_not_fit():
    image, labels, random = np.zeros((4, 5, 3), np.uint8), np.zeros((4, 5), np.uint8), np.random.default_rng(0)
    with pytest.raises(ValueError, match="augment: image must be .* got .* float64"):
        augment(image.astype(np.float64), labels, (3, 3), Augmentation(), random)
    with pytest.raises(ValueError, match="augment: labels must be uint8 .* int64"):
        augment(image, labels.astype(np.int64), (3, 3), Augmentation(), random)


def test_tiny_pictures():
    for size in ((1, 1), (1, 9), (2, 3)):
        for seed in range(20):
            image, labels = augment(*street(size), (5, 5), Augmentation(), np.random.default_rng(seed))
            assert image.isfinite().all()
            assert (labels != 255).sum() <= 4 * size[0] * size[1]


def test_a_worker_has_one_thread():
    threads = cv2.getNumThreads()
    try:
        cv2.setNumThreads(2)
        init_worker(1)
        assert cv2.getNumThreads() == 1
    finally:
        cv2.setNumThreads(threads)


def test_a_view_past_the_picture_is_border():
    """A crop in the corner of a picture turned by 45 degrees shows nothing of it."""
    image, labels = street((60, 60))
    chance = Chance((1.0, 1.0), 45.0, False, False, None)
    corner = Window(0, 6, 0, 6)
    assert (view(labels, chance, corner) == 255).all()
    assert (view(image, chance, corner) == np.float32(MEAN)).all()


def test_a_missing_extra_is_named_with_its_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "cv2", None)
    monkeypatch.delitem(sys.modules, "pspnet_fast.data.transforms")
    with pytest.raises(ImportError, match=r"transforms need OpenCV.*pip install --no-build-isolation '\.\[train\]'"):
        importlib.import_module("pspnet_fast.data.transforms")
