"""The ops in Triton: `<op>_forward` and `<op>_backward`, each in the file of its op, and `<op>_refuses`, which says why not.

Here stands only what their launchers share. Index arithmetic inside kernels: `kernels/geometry.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any, NamedTuple

import torch

if __name__ != "pspnet_fast.kernels":
    raise ImportError(f"the kernels are installed as pspnet_fast.kernels, not {__name__}: import them by that name")

TRITON_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


class CompileCase(NamedTuple):
    """One compilation of one kernel, as its launcher would ask for it; `.ci/triton_check.py` compiles every one.

    `signature` gives each run-time argument's type ("*bf16", "i32"); pointers and the names in `divisible` are multiples
    of 16, as the launcher finds them on the shapes that matter. `spills` is the reason for spilled registers, if any.
    """

    kernel: Any
    variant: str
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any]
    num_warps: int = 4
    divisible: tuple[str, ...] = ()
    num_stages: int = 3
    spills: str = ""


def compile_case(
    kernel: Any,
    dtype: torch.dtype,
    constexprs: Mapping[str, Any],
    num_warps: int,
    divisible: tuple[str, ...] = ("C",),
    **types: str,
) -> CompileCase:
    """The case that its arguments' names and values tell: `..._ptr` points to `dtype` unless `types` says else."""
    values = " ".join(f"{name}={value}".replace(" ", "") for name, value in constexprs.items())
    signature = {
        name: types.get(name, f"*{TRITON_NAMES[dtype]}" if name.endswith("_ptr") else "i32")
        for name in kernel.arg_names
        if name not in constexprs
    }
    return CompileCase(kernel, f"{TRITON_NAMES[dtype]} {values}", signature, constexprs, num_warps, divisible)


@cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def refuses(tensor: torch.Tensor) -> str | None:
    """Why no kernel here takes this tensor, or None."""
    if tensor.dtype not in TRITON_NAMES:
        return f"the triton kernels take float32, bfloat16 and float16, got {tensor.dtype}"
    if tensor.is_cuda and torch.version.hip is None and _capability(tensor.device) < (8, 0):
        return f"the triton kernels need compute capability 8.0 or later, got {_capability(tensor.device)}"
    return None


def on_device(tensor: torch.Tensor) -> AbstractContextManager[Any]:
    """Triton launches on the current device: make it the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()
