"""Whose names a checkpoint's are: a family's, as they stand, or behind a part that a wrapper put before them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch

from ..models.checkpoint import CheckpointError
from ..models.unwrap import Unwrapped, common_part, first_parts, is_average, say, without_prefix, without_wrappers
from .csail import CSAIL
from .encoding import ENCODING
from .family import Family, Names
from .mmseg import MMSEG, MMSEG_B, MMSEG_BACKBONE
from .semseg import SEMSEG, SEMSEG_BACKBONE
from .smp import SMP
from .torchvision import TORCHVISION
from .tramac import TRAMAC

FAMILIES = (SEMSEG, SEMSEG_BACKBONE, TORCHVISION, MMSEG, MMSEG_B, MMSEG_BACKBONE, SMP, TRAMAC, ENCODING, CSAIL)


class Part(NamedTuple):
    """Of a state_dict, what is a family's.

    Attributes:
        family: whose names they are.
        names: its names, sorted out.
        tensors: by these names.
        found: what was left out before the names, and which weights these are, in sentences.
        beside: names of what is no part of the network.
    """

    family: Family
    names: Names
    tensors: Mapping[str, torch.Tensor]
    found: tuple[str, ...] = ()
    beside: tuple[str, ...] = ()


def family_of(inside: Unwrapped, ema: bool) -> Part:
    """The family whose names these are, as they stand, or behind a first part such as Lightning's "model."."""
    state = inside.state
    fitting = _fitting(state)
    if fitting is None:
        parts = {prefix: part for prefix in first_parts(state) if (part := _behind(prefix, state)) is not None}
        averages = {prefix: part for prefix, part in parts.items() if is_average(prefix)}
        plain = {prefix: part for prefix, part in parts.items() if prefix not in averages}
        chosen = averages if averages and (ema or not plain) else plain
        if len(chosen) > 1:
            raise CheckpointError(
                f"there are {len(chosen)} networks, under {', '.join(map(repr, chosen))}: save one alone"
            )
        if chosen:
            ((prefix, fitting),) = chosen.items()
            sentences = [f"names without {prefix!r}"]
            if averages and plain:
                other = "weights" if ema else "averages"
                sentences.append(f"there are {other}, too, under {' and '.join(map(repr, plain if ema else averages))}")
            fitting = fitting._replace(found=(*fitting.found, *sentences))
            say("checkpoint", Unwrapped(state, tuple(sentences), choice=bool(averages and plain)))
            inside = inside._replace(averaged=True) if chosen is averages else inside
    if fitting is None:
        raise _no_family(state)
    if ema and not inside.averaged:
        raise CheckpointError("--ema (ema=True): there are no averages beside the weights in this file")
    return fitting


def _behind(prefix: str, state: OrderedDict[str, torch.Tensor]) -> Part | None:
    """The network behind a part that all names begin with, or some: then a whole one, with head and classifier."""
    behind = OrderedDict((name, tensor) for name, tensor in state.items() if name.startswith(prefix))
    beside = tuple(name for name in state if name not in behind)
    inner, counter = without_wrappers(without_prefix(behind, prefix))
    beside += (f"{prefix}{counter}",) if counter else ()
    fitting = _fitting(inner)
    if fitting is None and (further := common_part(inner)):
        fitting = _behind(further, inner)
    if fitting is None or (beside and not {"cls.0.weight", "cls.4.weight"} <= {*fitting.names.ours.values()}):
        return None
    return fitting._replace(beside=(*fitting.beside, *beside))


def _fitting(tensors: Mapping[str, torch.Tensor]) -> Part | None:
    """The family all names are of, if there is one."""
    found = [(family, family.to_ours(tensors)) for family in FAMILIES]
    fitting = [(family, names) for family, names in found if names.ours and not names.strange]
    if len(fitting) > 1:  # a ResNet's own names are torchvision's and semseg's: the stem tells
        deep = "conv2.weight" in tensors
        fitting = [(family, names) for family, names in fitting if deep == ("deep" in family.stems)] or fitting
    return Part(*fitting[0], tensors) if fitting else None


def _no_family(tensors: Mapping[str, torch.Tensor]) -> CheckpointError:
    """Which family is nearest, and what differs."""
    found = [(family, family.to_ours(tensors)) for family in FAMILIES]
    nearest, names = max(found, key=lambda pair: len(pair[1].ours))
    if not names.ours:
        libraries = ", ".join(dict.fromkeys(family.library for family in FAMILIES))
        hint = ": CSAIL's decoder is loaded together with its encoder" if "conv_last.0.weight" in tensors else ""
        return CheckpointError(f"no known layout ({libraries}): the names begin with {some([*tensors])}{hint}")
    there = {*names.ours.values()}
    absent = [name for name in _ALWAYS if name not in there]
    lacks = f"; it lacks {some(list(nearest.to_theirs(absent).values()))}" if absent else ""
    return CheckpointError(
        f"no known layout: the nearest is that of {nearest.library}, which has {len(names.ours)} of {len(tensors)} names, "
        f"but not {len(names.strange)}: {some(names.strange)}{lacks}"
    )


_ALWAYS = ("layer0.0.weight", "layer1.0.conv1.weight", "ppm.features.0.1.weight", "cls.0.weight", "cls.4.weight")


def some(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
