"""A network on a labelled dataset: mIoU, mAcc, aAcc, the scores of every class, and what to look at where they are low.

Pictures are predicted by a named protocol (`predict.Protocol`), counted into one confusion matrix on the network's device, and
scored by a named convention for absent classes (`metrics.scores`). Over several processes every one takes its share of the
pictures, and one collective adds their matrices: the result does not depend on how many they are.
"""

from __future__ import annotations

import csv
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn

from .data.datasets import IGNORED, Dataset, DatasetError, Sample, read_sample
from .distributed import together
from .extras import install
from .files import check_target, replacing
from .metrics import ABSENT, Absent, Scores, confusion_matrix, scores
from .predict import PictureError, colour, make_folder, one_line, save, save_labels
from .protocol import BAND, Protocol, check_protocol, predict_labels
from .terminal import printable

try:
    from PIL import Image
    from tqdm import tqdm
except ImportError as error:
    raise ImportError(f"evaluate needs Pillow and tqdm ({error}): {install('train')}") from error

WORST = 8  # pictures that are shown
EARLIER = "[0-9][0-9]_[01].[0-9][0-9][0-9]_*.png"  # what they are called
FILES = ("results.json", "per_class.csv", "confusion.png")
LONG = 40  # rows of a table, above which it is set in three columns


class ImageScore(NamedTuple):
    """A picture, and the mIoU of its own pixels, over the classes that are in its labels or were predicted ("nan")."""

    image: Path
    miou: float


class Evaluation(NamedTuple):
    """What an evaluation found; in every process the same, but for the time.

    Attributes:
        dataset: its name.
        split: its part.
        names: of the K classes.
        protocol: how the pictures were shown.
        absent: the convention for absent classes.
        scores: of all pixels.
        matrix: (K, K), int64, on the CPU; rows are targets, columns labels.
        images: those that were evaluated, in the dataset's order; mIoU is NaN where all pixels are ignored.
        skipped: what was wrong with those that were not, each naming its file.
        seconds: from the first picture to the last, reading included.
    """

    dataset: str
    split: str
    names: tuple[str, ...]
    protocol: Protocol
    absent: Absent
    scores: Scores
    matrix: torch.Tensor
    images: tuple[ImageScore, ...]
    skipped: tuple[str, ...]
    seconds: float

    @property
    def images_per_second(self) -> float:
        return len(self.images) / self.seconds

    @property
    def pixels(self) -> tuple[int, ...]:
        """Pixels of every class in the labels."""
        return tuple(self.matrix.sum(1).tolist())


class _Predicted(NamedTuple):
    """A picture that one process predicted."""

    number: int  # in the dataset
    miou: float
    labels: torch.Tensor  # (H, W), uint8, on the CPU


def evaluate(
    net: nn.Module,
    dataset: Dataset,
    protocol: Protocol,
    *,
    device: torch.device | str,
    absent: Absent = "zero",
    output: Path | None = None,
    predictions: bool = False,
    skip_corrupt: bool = False,
    progress: bool = False,
    rank: int = 0,
    world_size: int = 1,
    report: Callable[[Evaluation], None] | None = None,
    band: int = BAND,
) -> Evaluation:
    """Predict every picture of a dataset and score the labels.

    Args:
        net: on `device` and in evaluation mode, as for `predict_labels`.
        dataset: of the network's classes, with labels.
        protocol: windows, scales and flips.
        device: where the network is, and where pixels are counted.
        absent: what a class scores that does not occur: "zero", "nan" or "one".
        output: a folder for `results.json`, `per_class.csv`, `confusion.png`, and `worst/`: the 8 pictures of the lowest mIoU,
            each beside its prediction and its labels, named by place, mIoU and picture. Those of an earlier evaluation in
            the same folder are removed once the new ones are there.
        predictions: whether `output` gets `predictions/`, too: for every picture its labels (PNG, from 0 to K - 1), and the
            same in the dataset's colours.
        skip_corrupt: go on where a file cannot be read, and name it in the result.
        progress: show a bar.
        rank: this process's place among `world_size`, which are in one torch.distributed group (gloo or NCCL).
        world_size: processes that share the pictures: each takes every world_size-th.
        report: called in the first process with what was found, before it is written: a disk that is full by then costs no
            result.
        band: see `predict_labels`.

    Raises:
        DatasetError: a picture or labels that cannot be read or do not fit, naming the file.
        RuntimeError: a picture that the network cannot be shown, as for want of memory, naming it; a ValueError where it is
            the protocol that makes it too large, or a label of the network that is no class.
        ValueError: an unknown convention, a protocol that cannot work, an empty dataset or one of more than 255 classes, a
            network in training mode or of more classes, processes without a group; `PictureError` where `output` cannot be
            written, or would overwrite the dataset. What cannot be written any more after
            hours is raised at the end, of several processes by the first.
        ImportError: matplotlib is not installed, and `output` given.
    """
    if absent not in ABSENT:
        raise ValueError(f"evaluate: absent must be one of {', '.join(ABSENT)}, got {absent!r}")
    if net.training:
        raise ValueError("evaluate: net must be in evaluation mode, got one in training mode: call eval() first")
    if not dataset.samples:
        raise ValueError(f"evaluate: {dataset.name} must have at least one picture in split {dataset.split}, got none")
    if predictions and output is None:
        raise ValueError("evaluate: predictions need an output folder, got none")
    if not 0 <= rank < world_size or (world_size > 1 and not dist.is_initialized()):
        raise ValueError(
            "evaluate: rank must be from 0 to world_size - 1, with torch.distributed initialised for more than one process, "
            f"got rank {rank} of {world_size}"
        )
    count = len(dataset.classes.names)
    if count > IGNORED:
        raise ValueError(
            f"evaluate: there must be at most {IGNORED} classes, as label {IGNORED} is ignored, got {count}"
        )
    check_protocol(protocol)
    if output is not None:
        from . import charts  # noqa: F401  matplotlib is missed now, not after hours

        _prepare(output, predictions, dataset)

    names = _file_names(dataset.samples)
    matrix = torch.zeros((count, count), dtype=torch.int64, device=device)
    mious: dict[int, float] = {}
    skipped: dict[int, str] = {}
    worst: list[_Predicted] = []
    unwritten: list[str] = []
    start = time.perf_counter()
    with together(world_size):  # a picture that fails in one process would leave the others waiting
        for i in tqdm(range(rank, len(dataset.samples), world_size), unit="picture", disable=not progress or rank > 0):
            try:
                image, truth = read_sample(dataset.samples[i], dataset)
            except DatasetError as error:
                if not skip_corrupt:
                    raise
                skipped[i] = str(error)
                continue
            try:
                labels = predict_labels(net, torch.from_numpy(image).permute(2, 0, 1).to(device), protocol, band=band)
                found = confusion_matrix(labels, torch.from_numpy(truth).to(device), count)
            except (RuntimeError, MemoryError, ValueError) as error:
                kind = ValueError if isinstance(error, ValueError) else RuntimeError
                raise kind(f"{dataset.samples[i].image}: cannot be evaluated: {one_line(error)}") from error
            matrix += found
            mious[i] = scores(found, "nan").miou
            if output is not None:
                predicted = _Predicted(i, mious[i], labels.to(torch.uint8).cpu())
                if predictions and not unwritten:
                    try:
                        _save_prediction(predicted.labels, dataset, output / "predictions" / names[i])
                    except PictureError as error:
                        unwritten.append(f"{error}; no predictions were written after it")
                if not math.isnan(predicted.miou):
                    worst = sorted([*worst, predicted], key=lambda one: (one.miou, one.number))[:WORST]
    parts: list[Any] = [None] * world_size
    if world_size > 1:
        matrix = matrix.cpu() if dist.get_backend() == dist.Backend.GLOO else matrix
        dist.all_reduce(matrix)
        dist.all_gather_object(parts, (mious, skipped))
        for others, unread in parts:
            mious.update(others)
            skipped.update(unread)
    result = Evaluation(
        dataset.name,
        dataset.split,
        dataset.classes.names,
        protocol,
        absent,
        scores(matrix, absent),
        matrix.cpu(),
        tuple(ImageScore(dataset.samples[i].image, mious[i]) for i in sorted(mious)),
        tuple(skipped[i] for i in sorted(skipped)),
        time.perf_counter() - start,
    )
    try:
        if report is not None and rank == 0:
            report(result)
    finally:
        if output is not None:
            try:
                _write(result, output, rank, dataset, worst, mious, names)
            except PictureError as error:
                unwritten.append(str(error))
    if world_size > 1:  # torchrun stops all processes when one fails: the first has reported and written before
        dist.all_gather_object(parts, unwritten)
        unwritten = [sentence for part in parts for sentence in part] if rank == 0 else []
    if unwritten:
        raise PictureError(unwritten[0])
    return result


def _prepare(output: Path, predictions: bool, dataset: Dataset) -> None:
    """Make the folders, and see that what will be written can be, and is nothing that the dataset holds."""
    folders = [output / name for name in ("worst", "predictions")[: 1 + predictions]]
    ours = {(output / name).resolve() for name in FILES} | {folder.resolve() for folder in folders}
    if dataset.name != "list":  # whose files are found by what their folder holds: a confusion.png would be one of them
        ours.add(output.resolve())
    for path in (path.resolve() for sample in dataset.samples for path in sample if path is not None):
        if path in ours or path.parent in ours:
            raise PictureError(
                f"{output}: its results would overwrite {path}, or lie beside it, which is read: give another folder"
            )
    for folder in (output, *folders):
        make_folder(folder)
    for name in FILES:
        check_target(output / name, PictureError)


def _file_names(samples: Sequence[Sample]) -> list[str]:
    """What the files of every picture are called: its own name, numbered where two would have the same."""
    stems = [sample.image.stem for sample in samples]
    return stems if len(set(stems)) == len(stems) else [f"{i:06d}_{stem}" for i, stem in enumerate(stems)]


def _save_prediction(labels: torch.Tensor, dataset: Dataset, path: Path) -> None:
    save_labels(labels, len(dataset.classes.names), path.with_name(f"{path.name}_labels.png"))
    save(colour(labels, dataset.classes), path.with_name(f"{path.name}_colour.png"))


def _save_comparison(one: _Predicted, dataset: Dataset, path: Path) -> None:
    """Picture, prediction and labels. The picture is read once more: eight large ones need not stay in memory."""
    from .charts import side_by_side

    image, truth = read_sample(dataset.samples[one.number], dataset)
    maps = (one.labels, torch.from_numpy(truth))
    save(side_by_side([Image.fromarray(image), *(colour(labels, dataset.classes) for labels in maps)]), path)


def _write(
    result: Evaluation,
    output: Path,
    rank: int,
    dataset: Dataset,
    worst: Sequence[_Predicted],
    mious: Mapping[int, float],
    names: Sequence[str],
) -> None:
    """The scores first, by the first process; then of the worst pictures those that this process has."""
    lowest = sorted((i for i in mious if not math.isnan(mious[i])), key=lambda i: (mious[i], i))[:WORST]
    shown = {i: f"{place:02d}_{mious[i]:.3f}_{names[i]}.png" for place, i in enumerate(lowest, 1)}
    if rank == 0:
        _write_scores(result, output)
        for path in (output / "worst").glob(EARLIER):
            if path.name not in shown.values():
                path.unlink()
    for one in worst:
        if one.number in shown:
            _save_comparison(one, dataset, output / "worst" / shown[one.number])


def _write_scores(result: Evaluation, output: Path) -> None:
    from .charts import confusion_picture

    write_json(result, output / "results.json")
    with (
        replacing(output / "per_class.csv", PictureError) as temporary,
        temporary.open("w", newline="", encoding="utf-8") as file,
    ):
        rows = csv.writer(file)
        rows.writerow(["class", "IoU", "accuracy", "pixels"])
        columns = zip(result.names, result.scores.iou, result.scores.acc, result.pixels, strict=True)
        rows.writerows([name, *(_or_none(share) for share in shares), n] for name, *shares, n in columns)
    save(confusion_picture(result.matrix, result.names), output / "confusion.png")


def _or_none(number: float) -> float | None:
    """None for NaN, which strict JSON does not know; an empty cell in CSV."""
    return None if math.isnan(number) else number


def to_json(result: Evaluation) -> dict[str, Any]:
    """An evaluation as JSON has it: numbers, strings, lists; None where a score is undefined.

    Scores are fractions of 1; `classes`, `IoU`, `accuracy` and `pixels` (of the labels) go by class.
    """
    return {
        "dataset": result.dataset,
        "split": result.split,
        "mIoU": _or_none(result.scores.miou),
        "mAcc": _or_none(result.scores.macc),
        "aAcc": _or_none(result.scores.aacc),
        "absent": result.absent,
        "protocol": result.protocol._asdict(),
        "classes": list(result.names),
        "IoU": [_or_none(share) for share in result.scores.iou],
        "accuracy": [_or_none(share) for share in result.scores.acc],
        "pixels": list(result.pixels),
        "images": len(result.images),
        "skipped": list(result.skipped),
        "seconds": result.seconds,
        "images_per_second": result.images_per_second,
    }


def write_json(result: Evaluation, path: Path) -> None:
    """`to_json` as a file. PictureError where it cannot be written."""
    with replacing(path, PictureError) as temporary:
        temporary.write_text(json.dumps(to_json(result), indent=1, allow_nan=False) + "\n", encoding="utf-8")


def table(result: Evaluation) -> str:
    """The scores for people, in per cent: a row for every class, and the three means, with the conventions they depend on."""
    names = [" ".join(printable(name).split()) for name in result.names]
    width = max(len(name) for name in names)

    def cell(share: float) -> str:
        return "     -" if math.isnan(share) else f"{100 * share:6.2f}"

    rows = [f"{'class':{width}}    IoU    acc"]
    rows += [
        f"{name:{width}} {cell(iou)} {cell(acc)}"
        for name, iou, acc in zip(names, result.scores.iou, result.scores.acc, strict=True)
    ]
    if len(result.names) > LONG:
        head, body = rows[0], rows[1:]
        length = math.ceil(len(body) / 3)
        columns = [[head, *body[i : i + length]] for i in range(0, len(body), length)]
        rows = ["   ".join(column[i] for column in columns if i < len(column)) for i in range(length + 1)]
    counts = f"{len(result.images)} pictures in {result.seconds:.1f} s, {result.images_per_second:.2f} a second"
    skipped = f", {len(result.skipped)} skipped" if result.skipped else ""
    means = (("mIoU", result.scores.miou), ("mAcc", result.scores.macc), ("aAcc", result.scores.aacc))
    rows.append("\n" + "   ".join(f"{name} {cell(mean)}" for name, mean in means))
    rows[-1] += f"   (per cent; absent classes: {result.absent})"
    return "\n".join([*rows, f"{result.dataset} {result.split}: {counts}{skipped}"])
