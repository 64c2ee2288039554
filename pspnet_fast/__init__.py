"""pspnet_fast: custom kernels for PSPNet and every model with a pyramid pooling module."""

from __future__ import annotations

from . import functional
from .backends import describe, explain, use_backend
from .checkpoints import load_checkpoint
from .integrations import accelerate, accelerate_losses, restore
from .models.pspnet import PSPNet
from .nn.losses import UpsampleCrossEntropyLoss
from .nn.ppm import PPM
from .nn.psp_head import PSPHead

__version__ = "0.1.0"
__all__ = [
    "PPM",
    "PSPHead",
    "PSPNet",
    "UpsampleCrossEntropyLoss",
    "__version__",
    "accelerate",
    "accelerate_losses",
    "describe",
    "explain",
    "functional",
    "load_checkpoint",
    "restore",
    "use_backend",
]
