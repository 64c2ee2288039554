"""What a loader's worker does for a picture of ADE20K's usual size, 512x683, to a crop of 473: images/s, on one thread.

"plain" is semseg's chain of util/transform.py, every step on the whole picture in float32, with OpenCV; "ours" is
`augment`, on the same draws. In "read and augment" the picture (a JPEG) and its labels (a PNG) are read, too, the plain way
by OpenCV. A round is the same 24 pictures for both, which take turns; a row has a round's time.
"""

import statistics
import time

import cv2
import numpy as np
import pytest
import torch
from measuring import ROWS

from pspnet_fast.data.augmentation import Augmentation
from pspnet_fast.data.classes import CLASSES
from pspnet_fast.data.datasets import find_dataset, read_sample
from pspnet_fast.data.normalisation import MEAN, STD
from pspnet_fast.data.picture import draw_street
from pspnet_fast.data.transforms import augment, init_worker

HEIGHT, WIDTH, CROP = 512, 683, 473
PICTURES = 24
SETTINGS = Augmentation()


def semseg(image, labels, seed):
    """The chain with the draws of `augment`, in plain OpenCV and PyTorch."""
    random = np.random.default_rng(seed)
    image, factor = np.float32(image), random.uniform(*SETTINGS.scale)
    image = cv2.resize(image, None, fx=factor, fy=factor, interpolation=cv2.INTER_LINEAR)
    labels = cv2.resize(labels, None, fx=factor, fy=factor, interpolation=cv2.INTER_NEAREST)
    height, width = labels.shape
    if random.random() < SETTINGS.rotate_probability:
        matrix = cv2.getRotationMatrix2D((width / 2, height / 2), random.uniform(*SETTINGS.rotate), 1)
        image = cv2.warpAffine(image, matrix, (width, height), flags=cv2.INTER_LINEAR, borderValue=MEAN)
        labels = cv2.warpAffine(labels, matrix, (width, height), flags=cv2.INTER_NEAREST, borderValue=255)
    if random.random() < SETTINGS.blur_probability:
        image = cv2.GaussianBlur(image, (5, 5), 0)
    if random.random() < SETTINGS.mirror:
        image, labels = cv2.flip(image, 1), cv2.flip(labels, 1)
    down, right = max(CROP - height, 0), max(CROP - width, 0)
    if down or right:
        around = down // 2, down - down // 2, right // 2, right - right // 2
        image = cv2.copyMakeBorder(image, *around, cv2.BORDER_CONSTANT, value=MEAN)
        labels = cv2.copyMakeBorder(labels, *around, cv2.BORDER_CONSTANT, value=255)
    top, left = (int(random.integers(n - CROP + 1)) for n in labels.shape)
    image, labels = image[top : top + CROP, left : left + CROP], labels[top : top + CROP, left : left + CROP]
    planes = torch.from_numpy(image.transpose(2, 0, 1))
    for plane, mean, std in zip(planes, MEAN, STD, strict=True):
        plane.sub_(mean).div_(std)
    return planes, torch.from_numpy(labels).long()


def ours(image, labels, seed):
    return augment(image, labels, (CROP, CROP), SETTINGS, np.random.default_rng(seed))


@pytest.fixture
def dataset(tmp_path):
    """A drawn picture in ADE20K's layout, with labels in patches."""
    patches = np.random.default_rng(0).integers(0, 151, (16, 22), dtype=np.uint8)
    for folder in ("images", "annotations"):
        (tmp_path / folder / "training").mkdir(parents=True)
    draw_street(0, WIDTH, HEIGHT).save(tmp_path / "images" / "training" / "a.jpg", quality=90)
    labels = cv2.resize(patches, (WIDTH, HEIGHT), interpolation=cv2.INTER_NEAREST)
    cv2.imwrite(str(tmp_path / "annotations" / "training" / "a.png"), labels)
    return find_dataset("ade20k", tmp_path, "train", classes=CLASSES["ade20k"])


@pytest.fixture(autouse=True)
def _one_thread():
    threads = cv2.getNumThreads(), torch.get_num_threads()
    init_worker(0)
    torch.set_num_threads(1)
    yield
    cv2.setNumThreads(threads[0])
    torch.set_num_threads(threads[1])


@pytest.mark.parametrize("transforms", ["plain", "ours"])
@pytest.mark.parametrize("work", ["augment", "read and augment"])
def bench_transforms(benchmark, dataset, work, transforms):
    """The gate: the same images to 0.02 of 255 levels, and labels but for one in 10000 at most."""
    sample = dataset.samples[0]
    pixels = read_sample(sample, dataset)

    def plain_pixels():
        image = cv2.cvtColor(cv2.imread(str(sample.image), cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB)
        labels = cv2.imread(str(sample.labels), cv2.IMREAD_GRAYSCALE)
        return image, labels - np.uint8(1)  # as if the files held classes: 0 becomes 255

    for seed in range(PICTURES):
        (image, labels), (expected, expected_labels) = ours(*pixels, seed), semseg(*plain_pixels(), seed)
        torch.testing.assert_close(image, expected, rtol=0, atol=0.02 / min(STD))
        assert (labels != expected_labels).float().mean() < 1e-4

    reading = work == "read and augment"

    def plain():
        for seed in range(PICTURES):
            semseg(*(plain_pixels() if reading else pixels), seed)

    def fast():
        for seed in range(PICTURES):
            ours(*(read_sample(sample, dataset) if reading else pixels), seed)

    baseline = []

    def before_each_round():
        start = time.perf_counter()
        plain()
        baseline.append(time.perf_counter() - start)

    benchmark.group = f"{work}, {PICTURES} pictures {HEIGHT}x{WIDTH} to a crop of {CROP}"
    benchmark.pedantic(plain if transforms == "plain" else fast, setup=before_each_round, rounds=15, warmup_rounds=1)
    if benchmark.disabled:
        return
    seconds = benchmark.stats.stats.median
    row = {"work": f"{work}, {PICTURES} pictures {HEIGHT}x{WIDTH} to a crop of {CROP}, one thread", "format": "HWC"}
    row |= {"provider": transforms, "ms": 1e3 * seconds, "ratio": statistics.median(baseline) / seconds}
    ROWS.append({**row, "baseline": "semseg's chain"})
    benchmark.extra_info["images/s"] = round(PICTURES / seconds, 1)
    benchmark.extra_info["times plain's speed"] = round(statistics.median(baseline) / seconds, 2)
