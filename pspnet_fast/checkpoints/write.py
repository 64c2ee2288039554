"""A network's tensors by another library's names, where that library can be told which network they are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from ..models.checkpoint import FORMAT
from ..models.pspnet import PSPNet
from .detect import recognise
from .family import FLAT, Family
from .layout import Layout, layout_of
from .naming import FAMILIES

_OURS = (
    Family(
        name=FORMAT, library=FORMAT, rules=tuple((part, part) for part in ("layer0", "layer{i}", "ppm", "cls", "aux"))
    ),
    Family(name=FORMAT, library=FORMAT, rules=FLAT),  # a backbone alone: what `pretrained` takes
)

TARGETS = (*dict.fromkeys(family.name for family in FAMILIES if family.needs is not None), FORMAT)
"""The families that can be written."""


class Written(NamedTuple):
    """What a target's file holds.

    Attributes:
        state: tensors by the target's names.
        needs: how the target's code is told which network they are; empty for this library, whose files say it themselves.
        left_out: the names for which there is no place in the target.
    """

    state: dict[str, torch.Tensor]
    needs: str
    left_out: tuple[str, ...]


def to_family(net_or_state_dict: PSPNet | Mapping[str, Any], family: str) -> dict[str, torch.Tensor]:
    """A network's tensors by a family's names, the same tensors.

    Args:
        net_or_state_dict: a PSPNet, or a state_dict of any family that `detect` knows.
        family: "semseg", "mmseg", "torchvision" (the backbone alone, with `fc` where the source has it) or "pspnet_fast".

    Raises:
        CheckpointError: the family cannot express the network; the settings are named.
        ValueError: another family.
    """
    if isinstance(net_or_state_dict, PSPNet):
        return written(layout_of(net_or_state_dict), net_or_state_dict.state_dict(), family).state
    found = recognise(net_or_state_dict)
    return written(found.layout, found.state, family).state


def written(layout: Layout, state: Mapping[str, torch.Tensor], target: str) -> Written:
    """As `to_family`, of a state by our names."""
    if target not in TARGETS:
        raise ValueError(f"family must be one of {', '.join(TARGETS)}, got {target!r}")
    family = _family(layout, target)
    needs = family.needs(layout) if family.needs is not None else ""
    names = family.to_theirs(state)
    left_out = tuple(name for name in state if name not in names)
    return Written({theirs: state[name] for name, theirs in names.items()}, needs, left_out)


def _family(layout: Layout, target: str) -> Family:
    """That of the target's whose names the network can have."""
    if target == FORMAT:
        return _OURS[not layout.network]
    found = [family for family in FAMILIES if family.name == target]
    if target == "semseg":
        return found[not layout.network]
    return next((family for family in found if layout.stem in family.stems), found[0])
