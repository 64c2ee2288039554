"""ADE20K, PASCAL VOC 2012, Cityscapes, drawn scenes and semseg's list files: found, checked and read.

Every dataset is found in the layout it is shipped in, and its raw labels become classes on reading, so that nothing has to be
converted first. What is missing is said before training starts; `check_dataset` reads every file.

Labels are drawn on the pixels as they are stored: EXIF orientation is ignored for their pictures, and that is said. (A picture
that a camera turned would otherwise lie across its labels; `predict`, which has no labels, turns it upright.)

Past 300 lines, because what is checked when a dataset is found, read or gone through is one list of sentences.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..extras import install
from .classes import CLASSES, Classes

try:
    from tqdm import tqdm

    from .images import MAX_PIXELS, orientation, read_indices, read_picture
    from .layouts import DatasetError as DatasetError
    from .layouts import Sample as Sample
    from .layouts import cityscapes, listed, scene_parsing, some, voc2012
except ImportError as error:
    raise ImportError(f"the datasets need Pillow and tqdm ({error}): {install('predict')}") from error

_LOG = logging.getLogger(__name__)

IGNORED = 255
NAMES = ("ade20k", "scenes", "voc2012", "cityscapes", "list")
LINES = 20  # problems in a report
LARGEST = 2 * MAX_PIXELS  # pixels: a satellite's scenes are larger than the pictures that strangers send
FEW = 3  # classes, of which each should be seen in
LOOKED = 100  # label files

# Cityscapes' trainIds by labelId, 0 to 33 (cityscapesScripts, helpers/labels.py); void classes are ignored.
TRAIN_IDS = (
    *(255, 255, 255, 255, 255, 255, 255, 0, 1, 255, 255, 2, 3, 4, 255, 255, 255),
    *(5, 255, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 255, 255, 16, 17, 18),
)


class Dataset(NamedTuple):
    """Where the files of a split are, and what their raw labels mean.

    Attributes:
        name: one of NAMES.
        split: "train", "val" or "test".
        classes: names and colours of the K classes.
        samples: pictures and labels; in "test" there are no labels.
        table: the class of every raw label (256,), uint8; 255 is ignored.
        valid: whether a raw label may occur (256,), bool.
        source: where the samples come from, for people.
    """

    name: str
    split: str
    classes: Classes
    samples: tuple[Sample, ...]
    table: np.ndarray
    valid: np.ndarray
    source: str


def find_dataset(
    name: str,
    root: Path,
    split: str,
    *,
    list_file: Path | None = None,
    classes: Classes | None = None,
    skip_corrupt: bool = False,
) -> Dataset:
    """Find a dataset's files, and check that they belong together; the first, middle and last sample are read.

    A picture among these that EXIF turns is named in a warning. Where classes are few, up to 100 label files are
    looked at, and a class that occurs in none is named.

    Args:
        name: "ade20k" (SceneParse150; `root` is ADEChallengeData2016 or the folder that holds it), "scenes" (the same layout),
            "voc2012" (`root` is VOCdevkit, VOC2012, or the folder that holds either; training takes the augmented list and
            SegmentationClassAug where both are there), "cityscapes" (`root` holds leftImg8bit and gtFine; labelIds where they
            are complete, else labelTrainIds), or "list".
        root: a folder.
        split: "train", "val", or "test", which has pictures only (voc2012, cityscapes and list files).
        list_file: semseg's format instead of a layout: a line has the paths of a picture and of its labels, which are 0 to
            K - 1 and 255 for ignored, both seen from `root`. In split "test" it has the picture alone. Paths with spaces
            stand in quotes, or a tab stands between the two. UTF-8, with or without a byte-order mark.
        classes: the class table, where it is not the dataset's own; "list" needs it.
        skip_corrupt: whether whoever reads the samples skips those that cannot be: then only where none of those that are
            looked at can be is it an error.

    Raises:
        DatasetError: what was expected is not there, files have no partner, or a sample that was read does not fit.
        ValueError: an unknown name or split, or "list" without file or classes.
    """
    if name not in NAMES:
        raise ValueError(f"dataset: the name must be one of {', '.join(NAMES)}, got {name}")
    if split not in ("train", "val", "test"):
        raise ValueError(f"{name}: the split must be train, val or test, got {split}")
    if name == "list" and (list_file is None or classes is None):
        raise ValueError("list: needs a list file and a class table (ade20k, voc2012, cityscapes or your own)")
    classes = classes or _classes_of(name)
    count = len(classes.names)
    if not 1 <= count <= IGNORED:
        raise ValueError(f"{name}: the class table must have 1 to {IGNORED} classes, got {count}")
    if not root.is_dir():
        raise DatasetError(f"{name}: expected a folder at {root}, there is none")
    raw = {**{k: k for k in range(count)}, IGNORED: IGNORED}
    if list_file is not None:
        samples, source = listed(name, root, split, list_file), str(list_file)
    elif name == "voc2012":
        samples, source = voc2012(root, split)
    elif name == "cityscapes":
        samples, source, ids = cityscapes(root, split)
        raw = {**dict(enumerate(TRAIN_IDS)), IGNORED: IGNORED} if ids else raw  # 255 is the id -1 in eight bits
    else:
        samples, source = scene_parsing(name, root, split)
        raw = {0: IGNORED, **{k + 1: k for k in range(count)}}
    table, valid = np.full(256, IGNORED, np.uint8), np.zeros(256, bool)
    table[list(raw)], valid[list(raw)] = list(raw.values()), True
    dataset = Dataset(name, split, classes, tuple(samples), table, valid, f"{len(samples)} pictures of {source}")
    looked = [_look(samples[i], dataset) for i in sorted({0, len(samples) // 2, len(samples) - 1})]
    problems = [one.problems[0] for one in looked if one.problems]
    if problems and not (skip_corrupt and len(problems) < len(looked)):
        raise DatasetError(f"{name}: {problems[0]}")
    _say_turned(dataset, [one.sample.image for one in looked if one.turned])
    if split != "test" and count <= FEW:
        _say_unseen_of_few(dataset)
    return dataset


def _classes_of(name: str) -> Classes:
    if name == "scenes":
        from .scenes import SCENES  # what draws them is needed for nothing else here

        return SCENES
    return CLASSES[name]


def read_image(path: Path) -> np.ndarray:
    """A picture in RGB, uint8 (H, W, 3), as it is stored: EXIF orientation is not applied (`images.read_picture`).

    Raises:
        DatasetError: no such file, no picture, a truncated one, or one whose numbers have no known range.
    """
    return read_picture(path, DatasetError, max_pixels=LARGEST)


def read_labels(path: Path, dataset: Dataset) -> np.ndarray:
    """Classes of the pixels, uint8 (H, W); 255 is ignored. A palette's colours do not matter, its indices are the labels.

    Raises:
        DatasetError: no such file, a format that does not keep numbers, several channels, truncated (`images.read_indices`),
            or labels that the dataset does not have: file, values, and how many pixels of each.
    """
    raw = read_indices(path, DatasetError, max_pixels=LARGEST)
    small = raw.astype(np.uint8)
    if (small.dtype != raw.dtype and (small != raw).any()) or not looked_up(small, dataset.valid).all():
        values, counts = np.unique(raw, return_counts=True)
        wrong = [
            f"{value} ({count} pixels)"
            for value, count in zip(values, counts, strict=True)
            if not (0 <= value < 256 and dataset.valid[value])
        ]
        raise DatasetError(f"{path}: labels must be {_ranges(dataset.valid)}, got {some(wrong)}")
    return looked_up(small, dataset.table)


def looked_up(values: np.ndarray, table: np.ndarray) -> np.ndarray:
    """`table[values]` for bytes, in a quarter of its time.

    Args:
        values: any shape, uint8.
        table: (256,), uint8 or bool; the result has its dtype.
    """
    mapped = bytearray(np.ascontiguousarray(values)).translate(table.tobytes())
    return np.frombuffer(mapped, table.dtype).reshape(values.shape)


def _ranges(valid: np.ndarray) -> str:
    """The values that are valid, such as "0 to 20 or 255"."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], valid, [False]]).astype(int))).reshape(-1, 2)
    return " or ".join(f"{a}" if a == b - 1 else f"{a} to {b - 1}" for a, b in edges)


def read_sample(sample: Sample, dataset: Dataset) -> tuple[np.ndarray, np.ndarray]:
    """`read_image` and `read_labels` of a sample that has labels. DatasetError where their sizes differ, too."""
    if sample.labels is None:
        raise DatasetError(f"{sample.image}: has no labels in split {dataset.split}")
    image, labels = read_image(sample.image), read_labels(sample.labels, dataset)
    if image.shape[:2] != labels.shape:
        raise DatasetError(_sizes_differ(sample, image, labels))
    return image, labels


def _sizes_differ(sample: Sample, image: np.ndarray, labels: np.ndarray) -> str:
    (height, width), (rows, columns) = image.shape[:2], labels.shape
    turned = ""
    if (height, width) == (columns, rows) and orientation(sample.image, max_pixels=LARGEST) > 4:
        turned = (
            ": the picture's EXIF orientation turns it by 90 degrees, and its pixels are taken as they are stored. "
            "Turn these (as ImageOps.exif_transpose of Pillow does), or the labels back"
        )
    return f"{sample.labels}: labels must be as large as {sample.image}, {width}x{height}, got {columns}x{rows}{turned}"


class _Looked(NamedTuple):
    """What was found in a sample."""

    sample: Sample
    problems: list[str]
    pixels: np.ndarray  # of each class (256,), 255 ignored
    turned: bool  # by EXIF


def _look(sample: Sample, dataset: Dataset) -> _Looked:
    """All that is wrong with a sample: picture and labels are looked at even where the other cannot be read."""
    found: list[str] = []
    read: list[np.ndarray] = []
    pixels = np.zeros(256, np.int64)
    for path, reader in ((sample.image, read_image), (sample.labels, partial(read_labels, dataset=dataset))):
        try:
            if path is not None:
                read.append(reader(path))
        except DatasetError as error:
            found.append(str(error))
        else:
            if path is not None and path is sample.labels:
                pixels = np.bincount(read[-1].ravel(), minlength=256)
    if len(read) == 2 and read[0].shape[:2] != read[1].shape:
        found.append(_sizes_differ(sample, *read))
    turned = sample.labels is not None and orientation(sample.image, max_pixels=LARGEST) != 1
    return _Looked(sample, found, pixels, turned)


def _say_turned(dataset: Dataset, turned: Sequence[Path]) -> None:
    if turned:
        _LOG.warning(
            "%s %s: EXIF turns %s, whose pixels and labels are taken as they are stored",
            dataset.name,
            dataset.split,
            some([path.name for path in turned]),
        )


def _say_unseen(dataset: Dataset, pixels: np.ndarray, where: str) -> None:
    """Name the classes of which there is no pixel."""
    unseen = [f"{k} ({name})" for k, name in enumerate(dataset.classes.names) if pixels[k] == 0]
    if not unseen:
        return
    hint = ""
    if len(dataset.classes.names) <= FEW and pixels[IGNORED] and dataset.valid[IGNORED]:
        hint = ". Raw labels of 255 are ignored: a mask of 0 and 255 has to be written as 0 and 1"
    _LOG.warning(
        "%s %s: %d of %d classes never occur in %s: %s%s",
        dataset.name,
        dataset.split,
        len(unseen),
        len(dataset.classes.names),
        where,
        some(unseen, 8),
        hint,
    )


def _say_unseen_of_few(dataset: Dataset) -> None:
    """Look at labels, from all over the dataset, until every class was seen; say which was not."""
    count = len(dataset.samples)
    pixels, looked = np.zeros(256, np.int64), 0
    for i in np.unique(np.linspace(0, count - 1, min(count, LOOKED)).round().astype(int)):
        sample = dataset.samples[i]
        try:
            assert sample.labels is not None
            pixels += np.bincount(read_labels(sample.labels, dataset).ravel(), minlength=256)
        except DatasetError:  # whoever trains on it names it, or skips it
            continue
        looked += 1
        if pixels[: len(dataset.classes.names)].all():
            return
    _say_unseen(dataset, pixels, f"{looked} label files of {count}")


def check_dataset(dataset: Dataset, workers: int) -> None:
    """Read every file of the dataset, `workers` at a time, with a progress bar, and log which classes occur.

    Raises:
        DatasetError: one for all problems, a line each, the first 20 of them.
    """
    if workers < 1:
        raise ValueError(f"check_dataset: workers must be at least 1, got {workers}")
    pool = ThreadPoolExecutor(workers)  # threads, because the decoders work without Python's lock
    try:
        found = pool.map(lambda sample: _look(sample, dataset), dataset.samples)
        problems: list[str] = []
        turned: list[Path] = []
        pixels = np.zeros(256, np.int64)
        for one in tqdm(found, f"{dataset.name} {dataset.split}", total=len(dataset.samples), unit="picture"):
            problems += one.problems
            pixels += one.pixels
            if one.turned:
                turned.append(one.sample.image)
    finally:
        pool.shutdown(cancel_futures=True)  # interrupted, it does not read on
    if problems:
        lines = problems[:LINES] + ([f"and {len(problems) - LINES} more"] if len(problems) > LINES else [])
        raise DatasetError("\n".join([f"{dataset.name}: {len(problems)} problems in split {dataset.split}:", *lines]))
    _say_turned(dataset, turned)
    if dataset.split != "test":
        _say_classes(dataset, pixels)


def _say_classes(dataset: Dataset, pixels: np.ndarray) -> None:
    """Which classes occur: each one's share of the pixels where they are few enough for a line, else how many."""
    names = dataset.classes.names
    shares = [*names, "ignored"] if len(names) <= LINES else ["ignored"]
    parts = [
        f"{name} {100 * pixels[IGNORED if name == 'ignored' else k] / pixels.sum():.2f} %"
        for k, name in enumerate(shares)
    ]
    seen = np.count_nonzero(pixels[: len(names)])
    _LOG.info("%s %s: %d of %d classes occur: %s", dataset.name, dataset.split, seen, len(names), ", ".join(parts))
    _say_unseen(dataset, pixels, f"all {len(dataset.samples)} label files")
