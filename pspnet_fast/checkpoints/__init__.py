"""Checkpoints of other libraries: which network the weights mean, read into PSPNet, and written with other libraries' names.

A file for each family says what its names are and what its code does that weights do not show. `pspnet-fast convert` is the
command line (`pspnet_fast/convert.py`).
"""

from __future__ import annotations

from .detect import detect
from .layout import Layout
from .load import load_checkpoint
from .write import to_family

__all__ = ["Layout", "detect", "load_checkpoint", "to_family"]
