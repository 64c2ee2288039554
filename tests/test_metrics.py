import math

import numpy as np
import pytest
import torch

from pspnet_fast.metrics import ABSENT, confusion_matrix, scores


def plain_matrix(labels, targets, classes, ignore):
    """Pixel after pixel."""
    matrix = np.zeros((classes, classes), np.int64)
    for label, target in zip(labels.ravel().tolist(), targets.ravel().tolist(), strict=True):
        if target != ignore:
            matrix[target, label] += 1
    return matrix


def plain_scores(labels, targets, classes, ignore, absent):
    """From sets of pixels, without a confusion matrix."""
    counted = targets != ignore
    iou, acc = [], []
    for k in range(classes):
        true, said = counted & (targets == k), counted & (labels == k)
        inter, union, target = (true & said).sum(), (true | said).sum(), true.sum()
        if absent == "zero":
            iou.append(inter / (union + 1e-10))
            acc.append(inter / (target + 1e-10))
        else:
            undefined = {"nan": math.nan, "one": 1.0}[absent]
            iou.append(inter / union if union else undefined)
            acc.append(inter / target if target else undefined)
    right = (counted & (labels == targets)).sum() / counted.sum()
    return np.nanmean(iou), np.nanmean(acc), right, iou, acc


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64], ids=str)
@pytest.mark.parametrize("ignore", [255, 3])
def test_confusion_matrix(dtype, ignore):
    labels, targets = torch.randint(7, (3, 11, 13)), torch.randint(7, (3, 11, 13))
    targets[torch.rand(targets.shape) < 0.2] = 255 if ignore == 255 else 3
    labels[targets == ignore] = 99  # what an ignored pixel is labelled does not matter
    found = confusion_matrix(labels.to(torch.uint8), targets.to(dtype), 7, ignore)
    assert found.dtype == torch.int64
    np.testing.assert_array_equal(found.numpy(), plain_matrix(labels.numpy(), targets.numpy(), 7, ignore))


def test_rows_are_targets():
    assert confusion_matrix(torch.tensor([2, 2, 0]), torch.tensor([1, 1, 0]), 3).tolist() == [
        [1, 0, 0],
        [0, 0, 2],
        [0] * 3,
    ]
    assert (
        confusion_matrix(torch.zeros(0, dtype=torch.uint8), torch.zeros(0, dtype=torch.uint8), 2).tolist()
        == [[0, 0]] * 2
    )


@pytest.mark.parametrize("absent", ABSENT)
def test_scores_are_those_of_the_pixels(absent):
    """Nine classes: one is never true, one never predicted, one neither."""
    labels, targets = torch.randint(9, (40, 50)), torch.randint(9, (40, 50))
    targets[targets == 2] = 255
    labels[labels == 3] = 0
    for tensor in (labels, targets):
        tensor[tensor == 5] = 1
    found = scores(confusion_matrix(labels, targets, 9), absent)
    expected = plain_scores(labels.numpy(), targets.numpy(), 9, 255, absent)
    for ours, plain in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, plain, rtol=1e-12)


# Class 0: 6 of 8 right, 2 labelled as class 1. Class 1: does not occur, but is predicted. Class 2: neither.
HAND_MADE = torch.tensor([[6, 2, 0], [0, 0, 0], [0, 0, 0]])


@pytest.mark.parametrize(
    ("absent", "iou", "acc"),
    [
        ("zero", (0.75, 0, 0), (0.75, 0, 0)),
        ("nan", (0.75, 0, math.nan), (0.75, math.nan, math.nan)),
        ("one", (0.75, 0, 1), (0.75, 1, 1)),
    ],
)
def test_conventions_by_hand(absent, iou, acc):
    found = scores(HAND_MADE, absent)
    np.testing.assert_allclose(found.iou, iou)
    np.testing.assert_allclose(found.acc, acc)
    means = {"zero": (0.25, 0.25), "nan": (0.375, 0.75), "one": (1.75 / 3, 2.75 / 3)}[absent]
    np.testing.assert_allclose(found[:3], (*means, 0.75))
    assert scores(HAND_MADE) == scores(HAND_MADE, "zero")


@pytest.mark.parametrize(("absent", "value"), [("zero", 0), ("nan", math.nan), ("one", 1)])
def test_no_pixel_at_all(absent, value):
    found = scores(torch.zeros(2, 2, dtype=torch.int64), absent)
    np.testing.assert_equal([*found[:3], *found.iou, *found.acc], [value] * 7)


def test_counts_of_a_large_dataset_are_exact():
    """Above 2^31, and where float32 would round."""
    matrix = torch.tensor([[2**40 + 1, 1], [0, 2**40]])
    assert scores(matrix).acc[0] == (2**40 + 1) / (2**40 + 2)


@pytest.mark.parametrize(
    ("labels", "targets", "words"),
    [
        ([0, 1], [0, 4], "targets must be from 0 to 3 or 255 for ignored, got 4 \\(1 pixels"),
        ([0, 1], [-1, -1], "targets must be from 0 to 3 or 255 for ignored, got -1 \\(2 pixels"),
        ([7, 9], [0, 3], "labels must be from 0 to 3, got 7, 9 \\(2 pixels"),
        ([255, 0], [0, 0], "labels must be from 0 to 3, got 255"),
        ([0], [0, 0], r"of one shape, got \(1,\) and \(2,\)"),
    ],
)
def test_labels_that_do_not_fit(labels, targets, words):
    with pytest.raises(ValueError, match=f"^confusion_matrix: .*{words}"):
        confusion_matrix(torch.tensor(labels), torch.tensor(targets), 4)


def test_labels_must_be_integers():
    with pytest.raises(TypeError, match=r"confusion_matrix: labels must be integers, got torch\.float32"):
        confusion_matrix(torch.zeros(3), torch.zeros(3, dtype=torch.uint8), 4)
    with pytest.raises(TypeError, match=r"confusion_matrix: targets must be integers, got torch\.bool"):
        confusion_matrix(torch.zeros(3, dtype=torch.uint8), torch.zeros(3, dtype=torch.bool), 4)


def test_bad_conventions_and_matrices():
    with pytest.raises(ValueError, match="scores: absent must be one of zero, nan, one, got 'skip'"):
        scores(HAND_MADE, "skip")
    for shape in ((2, 3), (4,), (0, 0)):
        with pytest.raises(ValueError, match=r"scores: matrix must be \(K, K\), got"):
            scores(torch.zeros(shape, dtype=torch.int64))
