"""The modules: parameters and state_dict keys of the models people know, computed by `pspnet_fast.functional`."""

from __future__ import annotations

from .losses import UpsampleCrossEntropyLoss
from .ppm import PPM
from .psp_head import PSPHead

__all__ = ["PPM", "PSPHead", "UpsampleCrossEntropyLoss"]
