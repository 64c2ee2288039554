"""Whole networks: PSPNet and the dilated ResNets it stands on."""

from __future__ import annotations

from .checkpoint import CheckpointError, read_checkpoint
from .pspnet import PSPNet, TrainingLogits, TrainingOutput
from .resnet import ResNet

__all__ = ["CheckpointError", "PSPNet", "ResNet", "TrainingLogits", "TrainingOutput", "read_checkpoint"]
