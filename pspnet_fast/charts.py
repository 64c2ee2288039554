"""Pictures of results: the confusion matrix, the learning curve, and pictures side by side."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
import torch

from .extras import install

try:
    from matplotlib.figure import Figure
    from PIL import Image
except ImportError as error:
    raise ImportError(f"charts need matplotlib and Pillow ({error}): {install('train')}") from error

NAMED = 40  # classes, up to which the confusion matrix names them
GAP = 8  # pixels between pictures


def confusion_picture(matrix: torch.Tensor, names: Sequence[str]) -> Image.Image:
    """A confusion matrix as a picture: every row divided by its sum, grey where a class has no pixel.

    Args:
        matrix: (K, K), rows are targets, columns labels.
        names: of the K classes; written along the axes for K up to 40.

    Returns:
        A picture in RGB.

    Raises:
        ValueError: a matrix that is not (K, K) for K names.
    """
    count = len(names)
    if tuple(matrix.shape) != (count, count):
        raise ValueError(f"confusion_picture: matrix must be ({count}, {count}), got {tuple(matrix.shape)}")
    exact = matrix.cpu().double()
    shares = np.ma.masked_invalid((exact / exact.sum(1, keepdim=True)).numpy())
    side = 3 + (0.26 * count if count <= NAMED else 8)
    figure = Figure(figsize=(side + 1, side), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    axes.set_facecolor("lightgrey")
    image = axes.imshow(shares, cmap="viridis", vmin=0, vmax=1, interpolation="nearest")
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    if count <= NAMED:
        axes.set_xticks(range(count), names, rotation=90)
        axes.set_yticks(range(count), names)
    figure.colorbar(image, label="share of the true class", shrink=0.8)
    return _drawn(figure)


def learning_curve(losses: Sequence[tuple[int, float]], scores: Sequence[tuple[int, float]]) -> Image.Image:
    """Loss and mIoU over iterations, as a picture in RGB.

    Args:
        losses: (iteration, loss), in the order of iterations; a running mean is drawn over them.
        scores: (iteration, mIoU), a fraction of 1.
    """
    figure = Figure(figsize=(8, 4), dpi=120, layout="constrained")
    left, right = figure.subplots(1, 2)
    iterations, values = np.array([i for i, _ in losses]), np.array([value for _, value in losses])
    left.plot(iterations, values, color="lightsteelblue", label="loss")
    window = max(1, len(values) // 20)
    if window > 1:
        means = np.convolve(values, np.ones(window) / window, "valid")
        left.plot(iterations[window - 1 :], means, color="navy", label=f"mean of {window}")
        left.legend()
    left.set_xlabel("iteration")
    left.set_ylabel("training loss")
    right.plot([i for i, _ in scores], [score for _, score in scores], color="seagreen", marker="o")
    right.set_xlabel("iteration")
    right.set_ylabel("mIoU of the validation")
    right.set_ylim(0, 1)
    for axes in (left, right):
        axes.set_xlim(left=0)
        axes.grid(alpha=0.3)
    return _drawn(figure)


def _drawn(figure: Figure) -> Image.Image:
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png")
    return Image.open(drawn, formats=("PNG",)).convert("RGB")


def grid(rows: Sequence[Sequence[Image.Image]]) -> Image.Image:
    """Rows of pictures, one below the other, on white."""
    strips = [side_by_side(row) for row in rows]
    height = sum(strip.height for strip in strips) + GAP * (len(strips) - 1)
    canvas = Image.new("RGB", (max(strip.width for strip in strips), height), "white")
    top = 0
    for strip in strips:
        canvas.paste(strip, (0, top))
        top += strip.height + GAP
    return canvas


def side_by_side(pictures: Sequence[Image.Image]) -> Image.Image:
    """Pictures of one height in a row, from left to right, on white."""
    width = sum(picture.width for picture in pictures) + GAP * (len(pictures) - 1)
    canvas = Image.new("RGB", (width, max(picture.height for picture in pictures)), "white")
    left = 0
    for picture in pictures:
        canvas.paste(picture, (left, 0))
        left += picture.width + GAP
    return canvas
