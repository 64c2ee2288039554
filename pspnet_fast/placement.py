"""Where and how a network computes: device, memory format, precision."""

from __future__ import annotations

from typing import Any, Literal, cast

import torch

from .config import ConfigError
from .models.pspnet import PSPNet
from .nn.ppm import PPM
from .schema import shown

Precision = Literal["fp32", "bf16", "fp16"]


def device_of(name: str | None) -> torch.device:
    """The device of that name; CUDA where it is for None.

    Raises:
        ConfigError: there is no such device.
    """
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise ConfigError(f"device must be cpu, cuda or cuda:1, got {shown(name)}") from error
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"device must be cpu, cuda or cuda:1, got {shown(name)}")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device {name}: torch {torch.__version__} finds no CUDA GPU here")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"device {name}: there are {torch.cuda.device_count()} CUDA GPUs here, counted from 0")
    return device


def placed(net: PSPNet, device: torch.device, channels_last: bool) -> PSPNet:
    """The network on a device, its weights in a memory format."""
    layout = torch.channels_last if channels_last else torch.contiguous_format
    net = cast(PSPNet, cast(Any, net).to(device, memory_format=layout))
    if isinstance(net.ppm, PPM):
        for weight in (p for p in net.ppm.parameters() if p.dim() == 4):
            # 1x1: the same memory in both formats, and the strides that its gradient has, which DDP compares.
            weight.data = weight.data.clone(memory_format=torch.contiguous_format)
    return net


def autocast(device: torch.device, precision: Precision) -> torch.autocast:
    """Autocast to a precision; for "fp32" one that does nothing."""
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    return torch.autocast(device.type, dtype, enabled=precision != "fp32")
