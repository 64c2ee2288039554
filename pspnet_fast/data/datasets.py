"""ADE20K, PASCAL VOC 2012, Cityscapes, drawn scenes and semseg's list files: found, checked and read.

Every dataset is found in the layout it is shipped in, and its raw labels become classes on reading, so that nothing has to be
converted first. What is missing is said before training starts; `check_dataset` reads every file.

Labels are drawn on the pixels as they are stored: EXIF orientation is ignored for their pictures. (A picture that a camera
turned would otherwise lie across its labels; `predict`, which has no labels, turns it upright.)

Past 300 lines, because four layouts, each with its own errors, are read side by side.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from .classes import CLASSES, Classes

try:
    import cv2
    from PIL import Image
    from tqdm import tqdm
except ImportError as error:
    raise ImportError(
        f"the datasets need OpenCV, Pillow and tqdm ({error}): pip install 'pspnet_fast[train]'"
    ) from error

IGNORED = 255
NAMES = ("ade20k", "scenes", "voc2012", "cityscapes", "list")
SHOWN = 3  # names in a sentence
LINES = 20  # problems in a report

# Cityscapes' trainIds by labelId, 0 to 33 (cityscapesScripts, helpers/labels.py); void classes are ignored.
TRAIN_IDS = (
    *(255, 255, 255, 255, 255, 255, 255, 0, 1, 255, 255, 2, 3, 4, 255, 255, 255),
    *(5, 255, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 255, 255, 16, 17, 18),
)


class DatasetError(ValueError):
    """A dataset, or a file of it, that is not as it must be; the message names it."""


class Sample(NamedTuple):
    """A picture, and the file of its labels where it has one."""

    image: Path
    labels: Path | None


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
    name: str, root: Path, split: str, *, list_file: Path | None = None, classes: Classes | None = None
) -> Dataset:
    """Find a dataset's files, and check that they belong together; the first, middle and last sample are read.

    Args:
        name: "ade20k" (SceneParse150; `root` is ADEChallengeData2016 or the folder that holds it), "scenes" (the same layout),
            "voc2012" (`root` is VOCdevkit, VOC2012, or the folder that holds either; training takes the augmented list and
            SegmentationClassAug where both are there), "cityscapes" (`root` holds leftImg8bit and gtFine; labelIds where they
            are complete, else labelTrainIds), or "list".
        root: a folder.
        split: "train", "val", or "test", which has pictures only (voc2012, cityscapes and list files).
        list_file: semseg's format instead of a layout: a line has the paths of a picture and of its labels, which are 0 to
            K - 1 and 255 for ignored, both seen from `root`. In split "test" it has the picture alone.
        classes: the class table, where it is not the dataset's own; "list" needs it.

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
        samples, source = _listed(name, root, split, list_file), str(list_file)
    elif name == "voc2012":
        samples, source = _voc2012(root, split)
    elif name == "cityscapes":
        samples, source, ids = _cityscapes(root, split)
        raw = {**dict(enumerate(TRAIN_IDS)), IGNORED: IGNORED} if ids else raw  # 255 is the id -1 in eight bits
    else:
        samples, source = _scene_parsing(name, root, split)
        raw = {0: IGNORED, **{k + 1: k for k in range(count)}}
    table, valid = np.full(256, IGNORED, np.uint8), np.zeros(256, bool)
    table[list(raw)], valid[list(raw)] = list(raw.values()), True
    dataset = Dataset(name, split, classes, tuple(samples), table, valid, f"{len(samples)} pictures of {source}")
    for i in sorted({0, len(samples) // 2, len(samples) - 1}):
        problems = _problems(samples[i], dataset)
        if problems:
            raise DatasetError(f"{name}: {problems[0]}")
    return dataset


def _classes_of(name: str) -> Classes:
    if name == "scenes":
        from .scenes import SCENES  # what draws them is needed for nothing else here

        return SCENES
    return CLASSES[name]


def _folder(name: str, what: str, folder: Path, root: Path) -> Path:
    if folder.is_dir():
        return folder
    there = sorted(path.name for path in root.iterdir() if path.is_dir())
    below = f"there are: {_some(there, 8)}" if there else "there are no folders"
    raise DatasetError(f"{name}: expected {what} in {folder}, there is no such folder; below {root} {below}")


def _some(names: Sequence[str], shown: int = SHOWN) -> str:
    more = len(names) - shown
    return ", ".join(names[:shown]) + (f" and {more} more" if more > 0 else "")


def _with_suffix(name: str, what: str, folder: Path, suffixes: Sequence[str]) -> dict[str, Path]:
    """The files of a folder by what precedes the suffix, sorted; a DatasetError where there is none."""
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        suffix = next((suffix for suffix in suffixes if path.name.endswith(suffix)), None)
        if suffix is None:
            continue
        key = path.name.removesuffix(suffix)
        if key in found:
            raise DatasetError(
                f"{name}: expected one file {key} of {what} in {folder}, got {found[key].name}, {path.name}"
            )
        found[key] = path
    if not found:
        raise DatasetError(f"{name}: expected {what} in {folder}, there is no file *{' or *'.join(suffixes)}")
    return found


def _pairs(name: str, images: dict[str, Path], labels: dict[str, Path], labels_at: Path) -> list[Sample]:
    """Pictures and labels of the same key."""
    alone = [key for key in images if key not in labels]
    unseen = [key for key in labels if key not in images]
    problems = []
    if alone:
        problems.append(f"{len(alone)} of {len(images)} pictures have no labels in {labels_at}: {_some(alone)}")
    if unseen:
        problems.append(f"{len(unseen)} of {len(labels)} label files in {labels_at} have no picture: {_some(unseen)}")
    if problems:
        raise DatasetError(f"{name}: {'; '.join(problems)}")
    return [Sample(image, labels[key]) for key, image in images.items()]


def _scene_parsing(name: str, root: Path, split: str) -> tuple[list[Sample], str]:
    """SceneParse150: images/training/*.jpg and annotations/training/*.png."""
    if split == "test":
        raise DatasetError(f"{name}: has the splits train and val, got test; name its pictures in a list file")
    inner = root / "ADEChallengeData2016"
    root = inner if inner.is_dir() else root
    part = {"train": "training", "val": "validation"}[split]
    at = [
        _folder(name, what, root / kind / part, root)
        for what, kind in (("pictures", "images"), ("labels", "annotations"))
    ]
    images = _with_suffix(name, "pictures", at[0], (".jpg", ".png"))
    return _pairs(name, images, _with_suffix(name, "labels", at[1], (".png",)), at[1]), str(at[0])


def _voc2012(root: Path, split: str) -> tuple[list[Sample], str]:
    """The development kit: JPEGImages, SegmentationClass and the lists in ImageSets/Segmentation."""
    name = "voc2012"
    places = (root / "VOCdevkit" / "VOC2012", root / "VOC2012", root)
    base = next((place for place in places if (place / "JPEGImages").is_dir()), root)
    pictures = _folder(name, "pictures", base / "JPEGImages", base)
    lists = _folder(name, "lists of pictures", base / "ImageSets" / "Segmentation", base)
    labels, names = base / "SegmentationClass", lists / f"{split}.txt"
    augmented = base / "SegmentationClassAug", lists / "trainaug.txt"
    if split == "train" and augmented[0].is_dir() and augmented[1].is_file():
        labels, names = augmented
    if not names.is_file():
        raise DatasetError(f"{name}: expected the list of pictures {names}, there is no such file")
    keys = names.read_text().split()
    if not keys:
        raise DatasetError(f"{name}: expected names of pictures in {names}, it is empty")
    images = _listed_in(name, "pictures", keys, pictures, ".jpg", names)
    if split == "test":
        return [Sample(image, None) for image in images], str(names)
    marked = _listed_in(name, "labels", keys, _folder(name, "labels", labels, base), ".png", names)
    return [Sample(*pair) for pair in zip(images, marked, strict=True)], f"{names}, labels of {labels.name}"


def _listed_in(name: str, what: str, keys: Sequence[str], folder: Path, suffix: str, names: Path) -> list[Path]:
    there = {path.name for path in folder.iterdir()}
    missing = [f"{key}{suffix}" for key in keys if f"{key}{suffix}" not in there]
    if missing:
        raise DatasetError(
            f"{name}: expected the {what} of {names} in {folder}, {len(missing)} of {len(keys)} are missing: {_some(missing)}"
        )
    return [folder / f"{key}{suffix}" for key in keys]


def _cityscapes(root: Path, split: str) -> tuple[list[Sample], str, bool]:
    """leftImg8bit and gtFine, a folder for each city; the third value tells labelIds from labelTrainIds."""
    name = "cityscapes"
    pictures = _folder(name, "pictures", root / "leftImg8bit" / split, root)
    images = _by_city(pictures, "_leftImg8bit.png")
    if not images:
        raise DatasetError(f"{name}: expected pictures in {pictures}, there is no file CITY/*_leftImg8bit.png")
    if split == "test":
        return [Sample(image, None) for image in images.values()], str(pictures), True
    folder = _folder(name, "labels", root / "gtFine" / split, root)
    ids, train_ids = (_by_city(folder, f"_gtFine_{kind}.png") for kind in ("labelIds", "labelTrainIds"))
    if not ids and not train_ids:
        raise DatasetError(f"{name}: expected labels in {folder}, there is no file CITY/*_gtFine_labelIds.png")
    # labelIds are shipped and mean the same everywhere: where they are complete nobody's conversion has to be trusted.
    takes_ids = len(ids.keys() & images.keys()) >= len(train_ids.keys() & images.keys())
    source = f"{pictures}, {'labelIds' if takes_ids else 'labelTrainIds'}"
    return _pairs(name, images, ids if takes_ids else train_ids, folder), source, takes_ids


def _by_city(folder: Path, suffix: str) -> dict[str, Path]:
    found = sorted(folder.glob(f"*/*{suffix}"))
    return {f"{path.parent.name}/{path.name.removesuffix(suffix)}": path for path in found}


def _listed(name: str, root: Path, split: str, list_file: Path) -> list[Sample]:
    """The samples of semseg's list file."""
    try:
        lines = list_file.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DatasetError(f"{name}: expected a list of pictures at {list_file}: {error}") from None
    columns = 1 if split == "test" else 2
    samples = []
    for i, line in enumerate(lines, 1):
        paths = line.split()
        if not paths:
            continue
        if len(paths) != columns:
            expected = "a picture" if columns == 1 else "a picture and its labels"
            raise DatasetError(f"{name}: {list_file}, line {i}: expected {expected}, got {len(paths)} columns")
        samples.append(Sample(root / paths[0], root / paths[1] if columns == 2 else None))
    if not samples:
        raise DatasetError(f"{name}: expected pictures in {list_file}, it is empty")
    missing = [str(path) for sample in samples for path in sample if path is not None and not path.is_file()]
    if missing:
        raise DatasetError(f"{name}: {len(missing)} files of {list_file} are missing: {_some(missing)}")
    return samples


def read_image(path: Path) -> np.ndarray:
    """A picture in RGB, uint8 (H, W, 3), as it is stored: EXIF orientation is not applied.

    OpenCV decodes a JPEG in a third of Pillow's time, but makes a truncated one a picture whose lower part is grey. A whole
    one has an end marker after the marker of its last scan, and neither can occur within the data: that is looked for.
    (Data changed in the middle of a JPEG are seen by no decoder: the format has no checksum.)

    Raises:
        DatasetError: no such file, no picture, or a truncated one.
    """
    try:
        data = path.read_bytes()
        if data.startswith(b"\xff\xd8") and data.rfind(b"\xff\xd9") <= data.rfind(b"\xff\xda"):
            raise ValueError("the JPEG is truncated")
        image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION)
        if image is None:
            raise ValueError("OpenCV finds another format, or one that is damaged")
        return image
    except FileNotFoundError:
        raise DatasetError(f"{path}: no such file") from None
    except cv2.error as error:
        raise DatasetError(f"{path}: cannot be read as a picture: {error.err}") from error
    except (OSError, ValueError) as error:
        raise DatasetError(f"{path}: cannot be read as a picture: {error}") from error


def read_labels(path: Path, dataset: Dataset) -> np.ndarray:
    """Classes of the pixels, uint8 (H, W); 255 is ignored. A palette's colours do not matter, its indices are the labels.

    Raises:
        DatasetError: no such file, not one channel of eight bits, truncated, or labels that the dataset does not have:
            file, values, and how many pixels of each.
    """
    try:
        with Image.open(path) as file:
            raw = np.array(file)
            mode = file.mode
    except FileNotFoundError:
        raise DatasetError(f"{path}: no such file") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DatasetError(f"{path}: cannot be read as labels: {error}") from error
    if mode not in ("L", "P"):
        raise DatasetError(f"{path}: labels must be one channel of eight bits (Pillow's mode L or P), got mode {mode}")
    if cv2.LUT(raw, (~dataset.valid).astype(np.uint8)).any():
        counts = np.bincount(raw.ravel(), minlength=256)
        wrong = [f"{value} ({counts[value]} pixels)" for value in np.flatnonzero((counts > 0) & ~dataset.valid)]
        raise DatasetError(f"{path}: labels must be {_ranges(dataset.valid)}, got {_some(wrong)}")
    return cv2.LUT(raw, dataset.table)


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
    return f"{sample.labels}: labels must be as large as {sample.image}, {width}x{height}, got {columns}x{rows}"


def _problems(sample: Sample, dataset: Dataset) -> list[str]:
    """All that is wrong with a sample: picture and labels are looked at even where the other cannot be read."""
    found: list[str] = []
    read: list[np.ndarray] = []
    for path, reader in ((sample.image, read_image), (sample.labels, partial(read_labels, dataset=dataset))):
        try:
            if path is not None:
                read.append(reader(path))
        except DatasetError as error:
            found.append(str(error))
    if len(read) == 2 and read[0].shape[:2] != read[1].shape:
        found.append(_sizes_differ(sample, *read))
    return found


def check_dataset(dataset: Dataset, workers: int) -> None:
    """Read every file of the dataset, `workers` at a time, with a progress bar.

    Raises:
        DatasetError: one for all problems, a line each, the first 20 of them.
    """
    if workers < 1:
        raise ValueError(f"check_dataset: workers must be at least 1, got {workers}")
    pool = ThreadPoolExecutor(workers)  # threads, because the decoders work without Python's lock
    try:
        found = pool.map(lambda sample: _problems(sample, dataset), dataset.samples)
        bar = tqdm(found, f"{dataset.name} {dataset.split}", total=len(dataset.samples), unit="picture")
        problems = [problem for some in bar for problem in some]
    finally:
        pool.shutdown(cancel_futures=True)  # interrupted, it does not read on
    if problems:
        lines = problems[:LINES] + ([f"and {len(problems) - LINES} more"] if len(problems) > LINES else [])
        raise DatasetError("\n".join([f"{dataset.name}: {len(problems)} problems in split {dataset.split}:", *lines]))
