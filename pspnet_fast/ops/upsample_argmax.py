"""upsample_argmax: the class of every pixel of bilinearly upsampled logits, without the upsampled logits.

    v[n, k, h, w]      = sum over i, j of  U_h[h, i] U_w[w, j] logits[n, k, i, j]
    labels[n, h, w]    = the first k with the largest v; NaN is larger than everything
    confidence[n, h, w] = exp(v[label]) / sum over k of exp(v[k])

U are the interpolation matrices (`geometry.bilinear_tap`). Pixels with the same four nodes, a cell, need few classes: a
value lies between the smallest and the largest of its nodes, so a class whose largest node is below the smallest node of
another is the label nowhere in the cell. Of K = 150 classes, smooth maps leave 5 to 9, white noise 100.

Nothing here has a gradient.    Must move: |logits| read, N*H*W labels (and confidences) written.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..backends import run
from ..checks import check_logits, check_map_size
from ..geometry import dense
from ..tracing import is_traced, is_transformed
from ._define import define, plain

BYTE_CLASSES = 256
LABEL_DTYPES = (torch.uint8, torch.int32, torch.int64)
_plain_confidence = plain("upsample_argmax", "confidence")
_plain_forward = plain("upsample_argmax", "forward")


def upsample_argmax(
    logits: torch.Tensor,
    size: Sequence[int],
    align_corners: bool = True,
    confidence: bool = False,
    dtype: torch.dtype | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """The label of every pixel of the upsampled logits, and how sure it is.

    Equals `interpolate(logits, size, mode="bilinear", align_corners).argmax(1)`: of equal values the first class, of NaN
    the first. Values are compared in float32 (float64 for float64) and not rounded to 16 bits before, so two classes
    within rounding of each other may change places. Not differentiable: neither result has a gradient.

    Args:
        logits: (N, K, h, w); NCHW and channels_last are read as they are.
        size: (H, W) of the result, smaller, equal or larger.
        align_corners: as in `torch.nn.functional.interpolate`.
        confidence: whether the softmax probability of the label is wanted, too.
        dtype: of the labels: uint8, int32 or int64. None is uint8 for up to 256 classes, else int64.

    Returns:
        Labels (N, H, W), or (labels, confidence) with confidence (N, H, W) in float32.

    Raises:
        ValueError: a rank or a size that does not fit, or uint8 for more than 256 classes.
        TypeError: not floating point, a size that is not integers, or another dtype.
    """
    op = "upsample_argmax"
    check_logits(op, logits)
    height, width = size if is_traced() else check_map_size(op, size)  # a tracer's numbers are no integers
    classes = logits.shape[1]
    if dtype is None:
        dtype = torch.uint8 if classes <= BYTE_CLASSES else torch.int64
    if dtype not in LABEL_DTYPES:
        raise TypeError(f"{op}: dtype must be uint8, int32 or int64, got {dtype}")
    if dtype == torch.uint8 and classes > BYTE_CLASSES:
        raise ValueError(f"{op}: uint8 must hold every class, at most {BYTE_CLASSES}, got {classes}")
    logits = logits.detach()
    if confidence:
        with_confidence = _plain_confidence if is_transformed() else _confidence_op
        pair: tuple[torch.Tensor, torch.Tensor] = with_confidence(logits, [height, width], align_corners, dtype)
        return pair
    compute = _plain_forward if is_transformed() else _op
    labels: torch.Tensor = compute(logits, [height, width], align_corners, dtype)
    return labels


def _forward(logits: torch.Tensor, size: Sequence[int], align_corners: bool, dtype: torch.dtype) -> torch.Tensor:
    labels: torch.Tensor = run("upsample_argmax", "forward", dense(logits), size, align_corners, dtype)
    return labels


def _forward_fake(logits: torch.Tensor, size: Sequence[int], align_corners: bool, dtype: torch.dtype) -> torch.Tensor:
    return logits.new_empty((logits.shape[0], *size), dtype=dtype)


def _confidence(
    logits: torch.Tensor, size: Sequence[int], align_corners: bool, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    labels, confidence = run("upsample_argmax", "confidence", dense(logits), size, align_corners, dtype)
    return labels, confidence


def _confidence_fake(
    logits: torch.Tensor, size: Sequence[int], align_corners: bool, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    shape = (logits.shape[0], *size)
    return logits.new_empty(shape, dtype=dtype), logits.new_empty(shape, dtype=torch.float32)


_op = define(
    "upsample_argmax(Tensor logits, SymInt[] size, bool align_corners, ScalarType dtype) -> Tensor",
    _forward,
    _forward_fake,
)
_confidence_op = define(
    "upsample_argmax_confidence(Tensor logits, SymInt[] size, bool align_corners, ScalarType dtype) -> (Tensor, Tensor)",
    _confidence,
    _confidence_fake,
)
