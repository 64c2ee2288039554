"""Confusion matrix, and the scores of semantic segmentation that follow from it: mIoU, mAcc, aAcc.

With n[t, p] the pixels of class t that were labelled p, and every sum over all pictures of a dataset:

    inter_k = n[k, k]    target_k = sum over p of n[k, p]    predicted_k = sum over t of n[t, k]
    union_k = target_k + predicted_k - inter_k
    IoU_k = inter_k / union_k    accuracy_k = inter_k / target_k    aAcc = sum of inter / sum of target

mIoU and mAcc are the means of IoU and accuracy over classes (Long et al., CVPR 2015, section 5; PSPNet, section 5.1). What a
class scores that does not occur, 0/0, is a convention, and moves the mean: `ABSENT` names three.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import torch

from .checks import check_same_device, equals

Absent = Literal["zero", "nan", "one"]
ABSENT: tuple[Absent, ...] = get_args(Absent)
EPSILON = 1e-10  # semseg's, of convention "zero"


class Scores(NamedTuple):
    """Scores of a confusion matrix, as fractions of 1.

    Attributes:
        miou: mean of `iou`; NaN where no class has one.
        macc: mean of `acc`; NaN where no class has one.
        aacc: share of all pixels that is labelled right.
        iou: of each of the K classes; NaN by convention "nan" where it is undefined.
        acc: of each of the K classes; NaN by convention "nan" where it is undefined.
    """

    miou: float
    macc: float
    aacc: float
    iou: tuple[float, ...]
    acc: tuple[float, ...]


def confusion_matrix(labels: torch.Tensor, targets: torch.Tensor, classes: int, ignore: int = 255) -> torch.Tensor:
    """Count pixels by what they are and what they were labelled.

    Args:
        labels: predicted classes, integers of any shape, on any device.
        targets: true classes, of the same shape and on the same device; uint8 and int64 as they are.
        classes: K.
        ignore: the target of pixels that are not counted, whatever their label.

    Returns:
        (K, K), int64, on the same device: rows are targets, columns labels.

    Raises:
        ValueError: shapes or devices that differ, or a counted pixel whose target or label is not below K.
        TypeError: tensors that are not integers.
    """
    for name, tensor in (("labels", labels), ("targets", targets)):
        if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
            raise TypeError(f"confusion_matrix: {name} must be integers, got {tensor.dtype}")
    if labels.shape != targets.shape:
        raise ValueError(
            "confusion_matrix: labels and targets must be of one shape, "
            f"got {tuple(labels.shape)} and {tuple(targets.shape)}"
        )
    check_same_device("confusion_matrix", "labels", labels, "targets", targets)
    counted = ~equals(targets, ignore)
    truth, predicted = targets[counted].long(), labels[counted].long()
    for name, values in (("targets", truth), ("labels", predicted)):
        wrong = values[(values < 0) | (values >= classes)]
        if wrong.numel() > 0:
            but = f" or {ignore} for ignored" if name == "targets" else ""
            shown = ", ".join(str(int(value)) for value in wrong.unique()[:5])
            raise ValueError(
                f"confusion_matrix: {name} must be from 0 to {classes - 1}{but}, got {shown} ({wrong.numel()} pixels)"
            )
    return torch.bincount(truth * classes + predicted, minlength=classes**2).view(classes, classes)


def scores(matrix: torch.Tensor, absent: Absent = "zero") -> Scores:
    """mIoU, mAcc, aAcc and the scores of each class.

    Args:
        matrix: (K, K) from `confusion_matrix`, or the sum of several.
        absent: what a class scores that does not occur, whose IoU (no pixel of it, and none labelled so) or accuracy (no pixel
            of it) is 0/0.
            "zero": 0, and it counts in the mean: inter / (union + 1e-10), inter / (target + 1e-10), as hszhao/semseg
            (tool/test.py) and the Caffe code.
            "nan": NaN, and the mean skips it, as mmsegmentation (IoUMetric, `nanmean`).
            "one": 1, and it counts in the mean, as PaddleSeg (utils/metrics.py, `mean_iou`) and segmentation_models.pytorch
            (metrics, `zero_division=1.0`).

    Raises:
        ValueError: an unknown convention, or a matrix that is not square.
    """
    if absent not in ABSENT:
        raise ValueError(f"scores: absent must be one of {', '.join(ABSENT)}, got {absent!r}")
    if matrix.dim() != 2 or matrix.shape[0] != matrix.shape[1] or matrix.shape[0] == 0:
        raise ValueError(f"scores: matrix must be (K, K), got {tuple(matrix.shape)}")
    exact = matrix.detach().cpu().double()
    inter, target, predicted = exact.diagonal(), exact.sum(1), exact.sum(0)

    def ratio(part: torch.Tensor, whole: torch.Tensor) -> torch.Tensor:
        if absent == "zero":
            return part / (whole + EPSILON)
        found = part / whole
        return found.masked_fill(whole == 0, 1.0) if absent == "one" else found

    iou, acc = ratio(inter, target + predicted - inter), ratio(inter, target)
    return Scores(
        miou=iou.nanmean().item(),
        macc=acc.nanmean().item(),
        aacc=ratio(inter.sum(), target.sum()).item(),
        iou=tuple(iou.tolist()),
        acc=tuple(acc.tolist()),
    )
