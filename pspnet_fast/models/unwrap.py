"""A state_dict inside of what people save: dictionaries around it, prefixes before its names, averages beside it."""

from __future__ import annotations

import logging
import re
from collections import OrderedDict
from collections.abc import Callable, Mapping
from copy import copy
from typing import Any, NamedTuple, cast

import torch

_LOG = logging.getLogger(__name__)

PLAIN = (
    *("state_dict", "model", "model_state_dict", "model_state", "net", "network"),
    *("net_state_dict", "net_state", "model_dict", "weights", "params", "module", "checkpoint"),
)
"""What the dictionary of the weights is called, in the order in which they are looked for."""
AVERAGED = (
    *("state_dict_ema", "model_ema", "ema", "ema_state_dict", "ema_model", "model_ema_state_dict", "params_ema"),
    *("ema_network", "averaged_model", "swa_model", "swa_state_dict"),
)
"""The same of exponential (or other) averages of them."""
_DEPTH = 4
"""How many dictionaries may lie around a state_dict."""
_COUNTERS = ("n_averaged", "steps")  # PyTorch's AveragedModel and MMEngine's, beside "module."
_WRAPPER = re.compile(r"(?:(?<=\.)|^)(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|_forward_module)\.")
"""What torch.compile, FSDP, activation checkpointing and DeepSpeed put into names, wherever they wrapped a module."""
_AVERAGE_WORD = re.compile(r"(?:^|[._])(?:ema|swa|averaged|teacher)(?:[._]|$)")


class UnwrapError(ValueError):
    """No weights can be told apart in a dictionary."""


class Unwrapped(NamedTuple):
    """The names and tensors inside a checkpoint.

    Attributes:
        state: names without wrappers' prefixes, tensors, and the state_dict's own metadata.
        found: what was chosen and taken away, a sentence each.
        averaged: whether these are averages; None where nothing tells.
        choice: whether there were weights and averages.
    """

    state: OrderedDict[str, torch.Tensor]
    found: tuple[str, ...] = ()
    averaged: bool | None = None
    choice: bool = False


def unwrap(checkpoint: Mapping[str, Any], ema: bool = False) -> Unwrapped:
    """Find the state_dict.

    Args:
        checkpoint: a state_dict, or the dictionary of a file that has one in it, such as {"epoch": 3, "state_dict": ...}.
        ema: take the averages (`AVERAGED`) where there are averages and weights.

    Raises:
        TypeError: it is no mapping.
        UnwrapError: it holds other things than tensors.
    """
    if not isinstance(checkpoint, Mapping):
        raise TypeError(f"a state_dict must be a mapping, got {type(checkpoint).__name__}")
    found: list[str] = []
    averaged, choice = None, False
    for _ in range(_DEPTH):
        if not (inside := _wrappers(checkpoint)):
            break
        average = next((key for key in inside if key in AVERAGED), None)
        plain = next((key for key in inside if key not in AVERAGED), None)
        key = average if average is not None and (ema or plain is None) else plain
        if plain is not None and average is not None:
            choice, averaged = True, key == average
            if _exchanged(checkpoint):
                key, averaged = plain, True
            found.append(
                f"the averages, under {key!r}; there are other weights, too"
                if averaged
                else f"the weights under {key!r}; there are averages, too: --ema (ema=True) takes them"
            )
        elif key == average:
            averaged = True
            found.append(f"the averages, under {key!r}: there are no other weights")
        elif key not in PLAIN[:2]:
            found.append(f"the weights are under {key!r}")
        checkpoint = checkpoint[cast(str, key)]
    for name, value in checkpoint.items():
        if not isinstance(value, torch.Tensor):
            raise UnwrapError(f"a state_dict maps names to tensors, got {type(value).__name__} under {_short(name)}")
        if not isinstance(name, str):
            raise UnwrapError(
                f"a state_dict maps names to tensors, got a tensor under {_short(name)}, which is no name"
            )
    state: OrderedDict[str, torch.Tensor] = OrderedDict(checkpoint)
    if hasattr(checkpoint, "_metadata"):
        state._metadata = copy(checkpoint._metadata)  # type: ignore[attr-defined]
    state, counter = without_wrappers(state)
    if counter:
        averaged = True if averaged is None and counter == "n_averaged" else averaged
        found.append(f"names without {counter!r} and 'module.', as averages are saved")
    return Unwrapped(state, tuple(found), averaged, choice)


def _short(name: object) -> str:
    """A key as a sentence has it: any of a file's, and of any length."""
    return repr(name)[:80] if isinstance(name, (str, int)) else type(name).__name__


def _exchanged(checkpoint: Mapping[str, Any]) -> bool:
    """MMEngine saves averages under "state_dict", for those who know of no other, and weights under "ema_state_dict"."""
    meta = checkpoint.get("meta")
    return "ema_state_dict" in checkpoint and isinstance(meta, Mapping) and "mmengine_version" in meta


def _wrappers(checkpoint: Mapping[str, Any], depth: int = _DEPTH) -> list[str]:
    """The names of the dictionaries in a checkpoint that are, or hold, a state_dict: those above, or a single other."""
    if not depth:
        return []
    names = [name for name in (*PLAIN, *AVERAGED) if isinstance(checkpoint.get(name), Mapping)]
    holding = [name for name in names if _holds_tensors(checkpoint[name]) or _wrappers(checkpoint[name], depth - 1)]
    if names or _holds_tensors(checkpoint):
        return holding or names
    others = [name for name, value in checkpoint.items() if isinstance(value, Mapping) and _holds_tensors(value)]
    return others if len(others) == 1 else []


def _holds_tensors(value: Mapping[str, Any]) -> bool:
    return any(isinstance(each, torch.Tensor) for each in value.values())


def without_wrappers(state: OrderedDict[str, torch.Tensor]) -> tuple[OrderedDict[str, torch.Tensor], str | None]:
    """The same without the names that wrappers add; and the counter of averages that there was."""
    state = renamed(state, lambda name: _WRAPPER.sub("", name))
    counter = next((name for name in _COUNTERS if name in state), None)
    if counter and len(state) > 1 and all(name.startswith("module.") for name in state if name != counter):
        del state[counter]
    else:
        counter = None
    while state and all(name.startswith("module.") for name in state):
        state = without_prefix(state, "module.")
    return state, counter


def renamed(state: OrderedDict[str, torch.Tensor], rename: Callable[[str], str]) -> OrderedDict[str, torch.Tensor]:
    """A state_dict with other names, in its metadata, too.

    Raises:
        UnwrapError: two names become one.
    """
    other: OrderedDict[str, torch.Tensor] = OrderedDict((rename(name), tensor) for name, tensor in state.items())
    if len(other) < len(state):
        raise UnwrapError("two tensors have one name when the wrappers' parts of names are left out")
    if hasattr(state, "_metadata"):
        modules = {rename(f"{module}.") if module else "": value for module, value in state._metadata.items()}
        other._metadata = OrderedDict((name.removesuffix("."), value) for name, value in modules.items())  # type: ignore[attr-defined]
    return other


def without_prefix(state: OrderedDict[str, torch.Tensor], prefix: str) -> OrderedDict[str, torch.Tensor]:
    return renamed(state, lambda name: name.removeprefix(prefix))


def first_parts(state: Mapping[str, torch.Tensor]) -> dict[str, int]:
    """What the names begin with, up to the first dot and with it, and how many do."""
    counts: dict[str, int] = {}
    for name in state:
        first, dot, _ = name.partition(".")
        if dot:
            counts[first + dot] = counts.get(first + dot, 0) + 1
    return counts


def common_part(state: Mapping[str, torch.Tensor]) -> str | None:
    """The first part of the names that all of them have."""
    counts = first_parts(state)
    return next(iter(counts)) if len(counts) == 1 and sum(counts.values()) == len(state) else None


def is_average(prefix: str) -> bool:
    """Whether a part of a name says that averages follow, as "ema_model." does."""
    return _AVERAGE_WORD.search(prefix) is not None


def say(where: str, unwrapped: Unwrapped) -> None:
    """Log what was chosen: as a warning where it could have been other weights."""
    for sentence in unwrapped.found:
        _LOG.log(logging.WARNING if unwrapped.choice else logging.INFO, "%s: %s", where, sentence)
