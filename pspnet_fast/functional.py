"""The ops: everything that is computed by kernels, on one screen. Each op's file holds its maths and its contract."""

from __future__ import annotations

from .ops.pyramid_conv2d import pyramid_conv2d
from .ops.pyramid_norm import pyramid_norm
from .ops.pyramid_pool import pyramid_pool
from .ops.pyramid_project import pyramid_project
from .ops.upsample_argmax import upsample_argmax
from .ops.upsample_concat import upsample_concat
from .ops.upsample_cross_entropy import upsample_cross_entropy
from .ops.upsample_softmax_add import upsample_softmax_add

__all__ = [
    "pyramid_conv2d",
    "pyramid_norm",
    "pyramid_pool",
    "pyramid_project",
    "upsample_argmax",
    "upsample_concat",
    "upsample_cross_entropy",
    "upsample_softmax_add",
]
