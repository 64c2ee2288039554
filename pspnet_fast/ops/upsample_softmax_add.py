"""upsample_softmax_add: the class probabilities of upsampled windows, added up where the windows lie in an image.

    v[m, k, h, w]             = sum over i, j of  U_h[h, i] U_w[w, j] logits[m, k, i, j]
    p[m, k, h, w]             = exp(v[m, k, h, w]) / sum over k of exp(v[m, k, h, w])
    total[k, top_m + h, left_m + w] += weight p[m, k, h, w]          with flip  p[m, k, h, W - 1 - w]

U are the interpolation matrices (`geometry.bilinear_tap`). Windows are added in the order of m, whatever overlaps; what lies
outside of the total is left out. Not differentiable.    Must move: |logits| read, |total| read and written once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from ..backends import run
from ..checks import MAX_OFFSET, check_logits, check_map_size, check_same_device
from ..geometry import dense
from ..tracing import is_transformed
from ._define import check_writable, define, plain

_plain_forward = plain("upsample_softmax_add", "forward")


def upsample_softmax_add(
    total: torch.Tensor,
    logits: torch.Tensor,
    corners: Sequence[Sequence[int]] | torch.Tensor,
    size: Sequence[int],
    align_corners: bool = True,
    flip: bool = False,
    weight: float = 1.0,
) -> torch.Tensor:
    """Add the probabilities of M windows of an image to its total, in place: sliding windows, flips, several scales.

    Equals `total[:, top : top + H, left : left + W] += weight * interpolate(logits[m], size).softmax(0)` for every m, but the
    upsampled logits never exist. Not differentiable.

    Args:
        total: (K, height, width) in float32, contiguous.
        logits: (M, K, h, w); NCHW and channels_last are read as they are.
        corners: (top, left) of every window, M pairs of integers or an integer tensor (M, 2) on the CPU. Windows may
            overlap and may reach outside of the total: the part inside is added.
        size: (H, W) of a window in the total.
        align_corners: as in `torch.nn.functional.interpolate`.
        flip: whether the windows' columns are mirrored, after the softmax.
        weight: what every probability is multiplied by, a finite number of either sign.

    Returns:
        total.

    Raises:
        ValueError: a rank, a size or a number of corners or classes that does not fit, a total that is not contiguous or
            shares memory with the logits, tensors on two devices, a corner more than 2^30 away, a weight that is not finite.
        RuntimeError: a total that PyTorch would not write to: a leaf that requires grad.
        TypeError: a total that is not float32, logits that are not floating point, corners or a size that are not integers.
    """
    op = "upsample_softmax_add"
    check_logits(op, logits)
    height, width = check_map_size(op, size)
    if not isinstance(total, torch.Tensor) or total.dtype != torch.float32:
        raise TypeError(f"{op}: total must be a float32 tensor, got {getattr(total, 'dtype', type(total).__name__)}")
    if total.dim() != 3 or total.shape[0] != logits.shape[1]:
        raise ValueError(f"{op}: total must be (K, H, W) with K = {logits.shape[1]}, got {tuple(total.shape)}")
    if not total.is_contiguous():
        raise ValueError(f"{op}: total must be contiguous, got strides {total.stride()}")
    check_same_device(op, "total", total, "logits", logits)
    check_writable(op, "total", total, read=[("logits", logits)])
    pairs = _pairs(op, corners, logits.shape[0])
    if not math.isfinite(weight):
        raise ValueError(f"{op}: weight must be finite, got {weight}")
    options = pairs, [height, width], align_corners, flip, weight
    if is_transformed():
        with torch.no_grad():
            _plain_forward(logits.detach(), total, *options)
    else:
        _op(total.detach(), logits.detach(), *options)
    return total


def _pairs(op: str, corners: Sequence[Sequence[int]] | torch.Tensor, windows: int) -> list[int]:
    if isinstance(corners, torch.Tensor):
        if corners.is_floating_point() or corners.device.type != "cpu":
            raise TypeError(f"{op}: corners must be integers on the CPU, got {corners.dtype} on {corners.device}")
        corners = corners.tolist()
    if len(corners) != windows or any(isinstance(pair, int) or len(pair) != 2 for pair in corners):
        raise ValueError(f"{op}: corners must be {windows} pairs (top, left), got {corners!r}")
    flat = [value for pair in corners for value in pair]
    if any(isinstance(value, bool) or not isinstance(value, int) for value in flat):
        raise TypeError(f"{op}: corners must be integers, got {corners!r}")
    if any(abs(value) > MAX_OFFSET for value in flat):
        raise ValueError(f"{op}: corners must lie within {MAX_OFFSET} of the total's, got {corners!r}")
    return flat


def _forward(
    total: torch.Tensor,
    logits: torch.Tensor,
    corners: Sequence[int],
    size: Sequence[int],
    align_corners: bool,
    flip: bool,
    weight: float,
) -> None:
    run("upsample_softmax_add", "forward", dense(logits), total, corners, size, align_corners, flip, weight)


def _forward_fake(
    total: torch.Tensor,
    logits: torch.Tensor,
    corners: Sequence[int],
    size: Sequence[int],
    align_corners: bool,
    flip: bool,
    weight: float,
) -> None:
    return None


_op = define(
    "upsample_softmax_add(Tensor(a!) total, Tensor logits, int[] corners, SymInt[] size, bool align_corners, bool flip, "
    "float weight) -> ()",
    _forward,
    _forward_fake,
)
