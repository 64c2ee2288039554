"""Where the layouts of ADE20K, PASCAL VOC 2012, Cityscapes and semseg's list files have their pictures and labels.

Endings are taken in capitals or not. What is missing, or has no partner, is said with the place where it was looked for.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from .images import SUFFIXES

SHOWN = 3  # names in a sentence


class DatasetError(ValueError):
    """A dataset, or a file of it, that is not as it must be; the message names it."""


class Sample(NamedTuple):
    """A picture, and the file of its labels where it has one."""

    image: Path
    labels: Path | None


def _folder(name: str, what: str, folder: Path, root: Path) -> Path:
    if folder.is_dir():
        return folder
    there = sorted(path.name for path in root.iterdir() if path.is_dir())
    below = f"there are: {some(there, 8)}" if there else "there are no folders"
    raise DatasetError(f"{name}: expected {what} in {folder}, there is no such folder; below {root} {below}")


def some(names: Sequence[str], shown: int = SHOWN) -> str:
    """The first names, and how many more there are."""
    more = len(names) - shown
    return ", ".join(names[:shown]) + (f" and {more} more" if more > 0 else "")


def _found(name: str, what: str, folder: Path, suffixes: Sequence[str], pattern: str = "*") -> dict[str, Path]:
    """The files of a folder by what precedes the suffix, in capitals or not, sorted.

    Hidden files are none: macOS leaves `._a.jpg` beside `a.jpg`.
    """
    found: dict[str, Path] = {}
    for path in sorted(folder.glob(pattern)):
        suffix = next((suffix for suffix in suffixes if path.name.lower().endswith(suffix.lower())), None)
        if suffix is None or path.name.startswith("."):
            continue
        key = path.relative_to(folder).as_posix()[: -len(suffix)]
        if key in found:
            raise DatasetError(
                f"{name}: expected one file {key} of {what} in {folder}, got {found[key].name}, {path.name}"
            )
        found[key] = path
    return found


def _with_suffix(name: str, what: str, folder: Path, suffixes: Sequence[str]) -> dict[str, Path]:
    """`_found`, and a DatasetError where there is none."""
    found = _found(name, what, folder, suffixes)
    if not found:
        raise DatasetError(f"{name}: expected {what} in {folder}, there is no file *{' or *'.join(suffixes)}")
    return found


def _pairs(name: str, images: dict[str, Path], labels: dict[str, Path], labels_at: Path) -> list[Sample]:
    """Pictures and labels of the same key."""
    alone = [key for key in images if key not in labels]
    unseen = [key for key in labels if key not in images]
    problems = []
    if alone:
        problems.append(f"{len(alone)} of {len(images)} pictures have no labels in {labels_at}: {some(alone)}")
    if unseen:
        problems.append(f"{len(unseen)} of {len(labels)} label files in {labels_at} have no picture: {some(unseen)}")
    if problems:
        raise DatasetError(f"{name}: {'; '.join(problems)}")
    return [Sample(image, labels[key]) for key, image in images.items()]


def scene_parsing(name: str, root: Path, split: str) -> tuple[list[Sample], str]:
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
    images = _with_suffix(name, "pictures", at[0], SUFFIXES)
    return _pairs(name, images, _with_suffix(name, "labels", at[1], (".png",)), at[1]), str(at[0])


def voc2012(root: Path, split: str) -> tuple[list[Sample], str]:
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
    keys = [line.strip() for line in _lines(name, names) if line.strip()]
    if not keys:
        raise DatasetError(f"{name}: expected names of pictures in {names}, it is empty")
    images = _listed_in(name, "pictures", keys, pictures, SUFFIXES, names)
    if split == "test":
        return [Sample(image, None) for image in images], str(names)
    marked = _listed_in(name, "labels", keys, _folder(name, "labels", labels, base), (".png",), names)
    return [Sample(*pair) for pair in zip(images, marked, strict=True)], f"{names}, labels of {labels.name}"


def _listed_in(
    name: str, what: str, keys: Sequence[str], folder: Path, suffixes: Sequence[str], names: Path
) -> list[Path]:
    """The file of each key: the first suffix that is there, in capitals or not."""
    there = {f"{path.stem}{path.suffix.lower()}": path for path in sorted(folder.iterdir())}
    found = [
        next((there[key + suffix] for suffix in suffixes if key + suffix in there), folder / f"{key}{suffixes[0]}")
        for key in keys
    ]
    ours = set(there.values())
    missing = [path.name for path in found if path not in ours]
    if missing:
        raise DatasetError(
            f"{name}: expected the {what} of {names} in {folder}, {len(missing)} of {len(keys)} are missing: {some(missing)}"
        )
    return found


def cityscapes(root: Path, split: str) -> tuple[list[Sample], str, bool]:
    """leftImg8bit and gtFine, a folder for each city; the third value tells labelIds from labelTrainIds."""
    name = "cityscapes"
    pictures = _folder(name, "pictures", root / "leftImg8bit" / split, root)
    images = _by_city(pictures, "pictures", *(f"_leftImg8bit{suffix}" for suffix in (".png", *SUFFIXES)))
    if not images:
        raise DatasetError(f"{name}: expected pictures in {pictures}, there is no file CITY/*_leftImg8bit.png")
    if split == "test":
        return [Sample(image, None) for image in images.values()], str(pictures), True
    folder = _folder(name, "labels", root / "gtFine" / split, root)
    ids, train_ids = (_by_city(folder, "labels", f"_gtFine_{kind}.png") for kind in ("labelIds", "labelTrainIds"))
    if not ids and not train_ids:
        raise DatasetError(f"{name}: expected labels in {folder}, there is no file CITY/*_gtFine_labelIds.png")
    # labelIds are shipped and mean the same everywhere: where they are complete nobody's conversion has to be trusted.
    takes_ids = len(ids.keys() & images.keys()) >= len(train_ids.keys() & images.keys())
    source = f"{pictures}, {'labelIds' if takes_ids else 'labelTrainIds'}"
    return _pairs(name, images, ids if takes_ids else train_ids, folder), source, takes_ids


def _by_city(folder: Path, what: str, *suffixes: str) -> dict[str, Path]:
    return _found("cityscapes", what, folder, suffixes, "*/*")


def _lines(name: str, path: Path) -> list[str]:
    """The lines of a text file, of Unix or Windows, with a byte-order mark or without."""
    try:
        return path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise DatasetError(
            f"{name}: {path} must be UTF-8, got byte {error.object[error.start]:#x} at {error.start} "
            "(Latin-1 or UTF-16?): save it as UTF-8"
        ) from None
    except OSError as error:
        raise DatasetError(f"{name}: expected a list of pictures at {path}: {error}") from None


_CELL = re.compile(r"""\"([^"]+)\"(?!\S)|'([^']+)'(?!\S)|(\S+)""")  # in quotes, or without spaces


def _cells(line: str) -> list[str]:
    """The paths of a line: between tabs where there are any, else between spaces that are in no quotes."""
    tabbed = [part.strip() for part in line.split("\t") if part.strip()]
    parts = tabbed if len(tabbed) > 1 else [line]
    cells = [[next(filter(None, found)) for found in _CELL.findall(part)] for part in parts]
    if len(tabbed) > 1:
        return [found[0] if len(found) == 1 else part for found, part in zip(cells, parts, strict=True)]
    return cells[0]


def listed(name: str, root: Path, split: str, list_file: Path) -> list[Sample]:
    """The samples of semseg's list file."""
    columns = 1 if split == "test" else 2
    samples = []
    for i, line in enumerate(_lines(name, list_file), 1):
        paths = _cells(line)
        if not paths:
            continue
        if columns == 1 and len(paths) > 1 and (root / line.strip()).is_file():
            paths = [line.strip()]  # a name with spaces, alone on its line
        if len(paths) != columns:
            expected = "a picture" if columns == 1 else "a picture and its labels"
            raise DatasetError(
                f"{name}: {list_file}, line {i}: expected {expected}, got {len(paths)} columns "
                "(names with spaces stand in quotes, or have tabs between them)"
            )
        samples.append(Sample(root / paths[0], root / paths[1] if columns == 2 else None))
    if not samples:
        raise DatasetError(f"{name}: expected pictures in {list_file}, it is empty")
    missing = [str(path) for sample in samples for path in sample if path is not None and not path.is_file()]
    if missing:
        raise DatasetError(f"{name}: {len(missing)} files of {list_file} are missing: {some(missing)}")
    return samples
