"""What looks into a call from outside, and therefore has to find plain PyTorch there: transforms, forward mode, tracers."""

from __future__ import annotations

import torch
from torch.autograd import forward_ad


def is_traced() -> bool:
    """Whether torch.jit.trace records, or torch.onnx.export exports."""
    if torch._C._get_tracing_state() is not None:
        return True
    # The last question imports an exporter, so it is asked where there may be one.
    return torch.compiler.is_compiling() and torch.onnx.is_in_onnx_export()


def is_transformed() -> bool:
    """Whether a transform of torch.func, a level of forward mode, torch.jit.trace or torch.onnx.export is active.

    None of them can look into a kernel. torch.compile and torch.export can: they take an op as one node.
    """
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0 or is_traced()


def is_batched(tensor: torch.Tensor) -> bool:
    """Whether vmap has one of these for every sample: their values cannot decide what is done."""
    functorch = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(tensor):
        if functorch.is_batchedtensor(tensor):
            return True
        tensor = functorch.get_unwrapped(tensor)
    return False
