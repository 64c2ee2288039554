"""What is said of a family of checkpoints, and its names to ours and back."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from ..models.resnet import Dilation, Stem
from .layout import Layout

Rules = tuple[tuple[str, str], ...]

FLAT: Rules = (
    *(("conv1", "layer0.0"), ("bn1", "layer0.1")),
    *(("conv2", "layer0.3"), ("bn2", "layer0.4"), ("conv3", "layer0.6"), ("bn3", "layer0.7")),
    *(("layer{i}", "layer{i}"), ("fc", "fc")),
)
"""A ResNet's own names, torchvision's and those of ImageNet weights with three convolutions in the stem."""


class Names(NamedTuple):
    """A checkpoint's names, sorted out."""

    ours: dict[str, str]
    dropped: tuple[str, ...]
    strange: tuple[str, ...]


@dataclass(frozen=True)
class Family:
    """How one library names PSPNet's tensors, and what its code does that the weights do not show.

    Names are those of our PSPNet on one side (`layer0` to `layer4`, `ppm`, `cls`, `aux`), and `fc` of a ResNet alone.

    Attributes:
        name: as the command line has it.
        library: as sentences have it.
        rules: their name or beginning of a name to ours, {i} a number; the first that fits counts, in both directions.
        stems: the kinds of stem that these names are for.
        dropped: patterns of names that never run in its PSPNet, or mean nothing here.
        dilation: of the first block of a dilated stage, by its code.
        align_corners: by its code or default.
        dilate_second: whether it dilates the second convolution of a basic block.
        dilates: whether its last stages are dilated at all; without, every stage there is halves the map.
        x_last: whether the bottleneck's input is the levels and then x, not x and then the levels.
        read_config: settings that a configuration kept beside the weights names.
        needs: for writing: how the family's code is told which network it is. Raises where it cannot be; None: never written.
    """

    name: str
    library: str
    rules: Rules
    stems: tuple[Stem, ...] = ("deep",)
    dropped: tuple[str, ...] = ()
    dilation: Dilation = "halved"
    align_corners: bool = True
    dilate_second: bool = True
    dilates: bool = True
    x_last: bool = False
    read_config: Callable[[str], dict[str, Any]] | None = None
    needs: Callable[[Layout], str] | None = field(default=None)

    def to_ours(self, names: Iterable[str]) -> Names:
        """Their names to ours; which are not needed, and which are not this family's."""
        rules = [(_pattern(theirs), ours) for theirs, ours in self.rules]
        found: dict[str, str] = {}
        dropped, strange = [], []
        for name in names:
            if any(re.search(pattern, name) for pattern in self.dropped):
                dropped.append(name)
            elif (ours := _renamed(name, rules)) is not None:
                found[name] = ours
            else:
                strange.append(name)
        return Names(found, tuple(dropped), tuple(strange))

    def to_theirs(self, names: Iterable[str]) -> dict[str, str]:
        """Our names to theirs; names for which there is no place are left out."""
        rules = [(_pattern(ours), theirs) for theirs, ours in self.rules]
        renamed = {name: _renamed(name, rules) for name in names}
        return {name: theirs for name, theirs in renamed.items() if theirs is not None}


def _pattern(beginning: str) -> re.Pattern[str]:
    """Matches a name or the beginning of one, up to a dot."""
    return re.compile(re.escape(beginning).replace(r"\{i\}", r"(\d+)") + r"(?=\.|$)")


def _renamed(name: str, rules: Iterable[tuple[re.Pattern[str], str]]) -> str | None:
    for pattern, other in rules:
        if match := pattern.match(name):
            return (other.replace("{i}", match[1]) if match.groups() else other) + name[match.end() :]
    return None
