"""Whether calling a module would do anything else than its class's forward: asked wherever a module is read, not called."""

from __future__ import annotations

import logging
from typing import cast

import torch
from torch import nn
from torch.nn.modules import module as _of_all

_CALL = nn.Module.__call__
_FORWARDS: dict[type, object] = {
    kind: kind.forward
    for kind in (nn.AdaptiveAvgPool2d, nn.Conv2d, nn.BatchNorm2d, nn.SyncBatchNorm, nn.ReLU, nn.Identity, nn.Sequential)
}
_CONV_FORWARD = nn.Conv2d._conv_forward  # all that a convolution's forward calls
# Filled and emptied in place, and never another dictionary.
_FORWARD_HOOKS, _FORWARD_PRE_HOOKS = _of_all._global_forward_hooks, _of_all._global_forward_pre_hooks
_BACKWARD_HOOKS, _BACKWARD_PRE_HOOKS = _of_all._global_backward_hooks, _of_all._global_backward_pre_hooks


def remember(kind: type[nn.Module]) -> None:
    """The forward of a class of ours that is read: another in its place is seen then."""
    _FORWARDS[kind] = kind.forward


def why_call(module: nn.Module) -> str | None:
    """Why a module must be called, not computed from what it holds: a phrase that ends "the module ...", or None.

    Its class is for the caller to look at. This is what may have been done to one instance (hooks, a forward of its own,
    as those who offload weights put there, `compile()`) or to all modules (hooks for all, methods replaced in a class). It
    may be done at any time, so nothing of the answer is kept.
    """
    own = module.__dict__
    if own["_forward_hooks"] or own["_forward_pre_hooks"] or own["_backward_hooks"] or own["_backward_pre_hooks"]:
        return "has hooks"
    # A convolution's forward is one line that calls `_conv_forward`, which is what people replace.
    if "forward" in own or "_conv_forward" in own:
        return "has a forward of its own"
    if own.get("_compiled_call_impl") is not None:
        return "is compiled by itself"
    if _FORWARD_HOOKS or _FORWARD_PRE_HOOKS or _BACKWARD_HOOKS or _BACKWARD_PRE_HOOKS:
        return "would call the hooks that are registered for all modules"
    kind = type(module)
    if kind.__call__ is not _CALL or _FORWARDS.get(kind) not in (None, kind.forward):
        return "is of a class whose methods were replaced"
    if kind is nn.Conv2d and nn.Conv2d._conv_forward is not _CONV_FORWARD:
        return "is of a class whose methods were replaced"
    return None


def held(module: nn.Module, name: str) -> torch.Tensor | None:
    """A parameter or buffer; `getattr` finds it by `nn.Module.__getattr__`, in five times as long."""
    if name in module._parameters:
        return module._parameters[name]
    return module._buffers[name] if name in module._buffers else cast("torch.Tensor | None", getattr(module, name))


def weight_of(convolution: nn.Module) -> torch.Tensor:
    return cast(torch.Tensor, held(convolution, "weight"))


def tell(log: logging.Logger, message: str, *arguments: object) -> None:
    """A line of debugging; none while torch.compile traces, which takes no logging into a graph."""
    if not torch.compiler.is_compiling():
        log.debug(message, *arguments)
