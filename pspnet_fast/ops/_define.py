"""How an op enters torch: one schema, one implementation for all devices (it asks `backends` which), one fake."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

LIBRARY = torch.library.Library("pspnet_fast", "DEF")


def define(schema: str, implementation: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """Register `torch.ops.pspnet_fast.<name>` and return it.

    Args:
        schema: the op's signature, such as "pyramid_pool(Tensor x, int[] bins) -> Tensor".
        implementation: computes it, on any device.
        fake: returns empty tensors of the same shapes, dtypes and strides.
    """
    name = schema.partition("(")[0]
    # Output strides follow input strides, so a compiler may not change the latter.
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides))
    LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"pspnet_fast::{name}", fake, lib=LIBRARY)
    return getattr(torch.ops.pspnet_fast, name).default


def autocast_dtype(tensor: torch.Tensor) -> torch.dtype | None:
    """What autocast computes in on the tensor's device, or None where it is off or the device knows none."""
    device = tensor.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return None
