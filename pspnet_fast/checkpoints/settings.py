"""What a file may say of a network, before one is made: its settings and their bounds."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, get_args

from ..models.checkpoint import CheckpointError
from ..models.resnet import LAYERS, STEMS, Dilation
from ..nn.plain_ppm import Pooling

_MOST_CHANNELS = 1 << 16
MOST_CLASSES = 1 << 16
"""As many as labels of 16 bits tell apart."""
MOST_BINS = 1024
"""Cells along an axis of a level, far past any feature map's."""


def _is_count(value: object) -> bool:
    return type(value) is int and 1 <= value <= _MOST_CHANNELS


def _is_truth(value: object) -> bool:
    return isinstance(value, bool)


def _is_count_or_none(value: object) -> bool:
    return value is None or _is_count(value)


def are_bins(value: object) -> bool:
    """Whether these can be a pyramid's bins."""
    return isinstance(value, tuple) and 0 < len(value) <= 64 and all(_is_count(b) and b <= MOST_BINS for b in value)


_POSSIBLE: dict[str, Callable[[Any], bool]] = {
    "layers": lambda value: type(value) is int and value in LAYERS,
    "width": _is_count,
    "stem": lambda value: isinstance(value, str) and value in STEMS,
    "in_channels": _is_count,
    "stages": lambda value: type(value) is int and value in (2, 3, 4),
    "output_stride": lambda value: type(value) is int and value in (8, 16, 32),
    "dilation": lambda value: isinstance(value, str) and value in get_args(Dilation),
    "dilate_second": _is_truth,
    "bins": are_bins,
    "align_corners": _is_truth,
    "kernel_sizes": lambda value: isinstance(value, tuple) and len(value) == 2 and all(k in (1, 3) for k in value),
    "bin1_norm": _is_truth,
    "pooling": lambda value: isinstance(value, str) and value in get_args(Pooling),
    "reduction": _is_truth,
    "reduction_channels": _is_count_or_none,
    "bottleneck_channels": _is_count_or_none,
    "aux_channels": _is_count_or_none,
}
"""What a file may say of each setting. Whether these are the weights' is seen by the shapes."""


def check_settings(where: str, values: Mapping[str, Any]) -> None:
    """See that what a file says of a network can be.

    Raises:
        CheckpointError: it cannot.
    """
    for name, value in values.items():
        if not _POSSIBLE[name](value):
            raise CheckpointError(f"{where}: {name} cannot be {_short(value)}")


def _short(value: object) -> str:
    shown = repr(value)
    return shown if len(shown) < 80 else f"{shown[:80]}..."
