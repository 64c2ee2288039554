"""What a family of pyramid pooling modules is: how its levels are found in a module, and where its output may differ.

Peers' PPMs differ in bins, their order, x's place in the concatenation, what they return, align_corners, biases, norms,
activations, and a bottleneck inside. Structure tells all but x's place and align_corners, which stand in the code of a
forward: a family names the layouts that its forward may have, and `accelerate` runs the module to find which it is.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, ClassVar, Literal, NamedTuple, cast

import torch
from torch import nn

from ..nn.reading import Level, leaves_of, read_level


class FamilyError(ValueError):
    """A module that is nearly what a family knows; the message is a sentence that says what differs."""


class Layout(NamedTuple):
    """Where x stands in the concatenation, "none" where a list of the upsampled levels is returned, and align_corners."""

    x: Literal["first", "last", "none"]
    align_corners: bool


X_FIRST = (Layout("first", True), Layout("first", False))
X_LAST = (Layout("last", True), Layout("last", False))
LIST = (Layout("none", True), Layout("none", False))


class Pyramid(NamedTuple):
    """The layers of a PPM, as they are at this moment.

    Attributes:
        bins: cells per axis of each level, in the order of the concatenation.
        levels: their layers.
        after: modules applied to the concatenation, one after another, inside the PPM's own forward.
    """

    bins: tuple[int, ...]
    levels: tuple[Level, ...]
    after: tuple[nn.Module, ...] = ()

    @property
    def channels(self) -> int:
        """C, the channels of the features."""
        return cast(nn.Conv2d, self.levels[0].convolution).in_channels


class Family:
    """One kind of pyramid pooling module. Subclass it, and give an instance to `accelerate(model, families=[...])`.

    Attributes:
        name: for the report.
        layouts: what its forward may do with x and align_corners; the one that the module really has is found by running it.
    """

    name: ClassVar[str]
    layouts: ClassVar[tuple[Layout, ...]] = (*X_FIRST, *X_LAST)

    def pyramid(self, module: nn.Module) -> Pyramid | None:
        """The module's pyramid, or None where the module is something else. Called at every forward, so it must be cheap.

        Raises:
            FamilyError: it is one, but not of a form that can be computed.
        """
        raise NotImplementedError


class Head:
    """A module whose forward concatenates x with a pyramid's levels and gives the result to layers of its own.

    With it, the concatenation is never built: inside the head's forward the pyramid gives way, and its layers compute what
    they and the pyramid compute together.

    Attributes:
        name: for the report.
        ppm: the name of the child that is the pyramid.
        layers: the name of the child that takes the concatenation, a convolution and what follows it.
    """

    name: ClassVar[str]
    ppm: ClassVar[str]
    layers: ClassVar[str]

    def pyramid(self, head: nn.Module, ppm: nn.Module, of_ppm: Family | None) -> Pyramid | None:
        """The pyramid of child `ppm`, which `of_ppm` has recognised; None where this is not such a head."""
        return None if of_ppm is None else of_ppm.pyramid(ppm)

    def inputs(self, head: nn.Module, channels: int, size: tuple[int, int], batch: int) -> Sequence[Any]:
        """Arguments of the head's forward, random, such that its pyramid sees (batch, channels, *size) or some other size."""
        raise NotImplementedError

    def random(self, head: nn.Module) -> Iterable[nn.Module]:
        """The parts whose parameters are made random in the copy that is run."""
        return (head,)


def leaves(module: nn.Module) -> list[nn.Module]:
    """The modules without children below, and convolutions, in the order they were registered.

    Raises:
        FamilyError: calling a module between would do something else than its forward, as with hooks.
    """
    found = leaves_of(module)
    if isinstance(found, str):
        raise FamilyError(f"it {found}, and only its layers would be called")
    return found


def containers(module: nn.Module) -> Iterator[type]:
    """The classes of the modules with children below a module: what `leaves` reads through, and more."""
    for child in module._modules.values():
        if child is not None and child._modules and not isinstance(child, nn.Conv2d):
            yield getattr(type(child), "original", type(child))
            yield from containers(child)


def stranger(module: nn.Module, known: tuple[type, ...]) -> type | None:
    """The first of `containers` that is none of the known ones. Asked at every forward, so it must be cheap."""
    for child in module._modules.values():
        if child is not None and child._modules and not isinstance(child, nn.Conv2d):
            kind = type(child)
            if kind not in known and getattr(kind, "original", kind) not in known:
                return kind
            if found := stranger(child, known):
                return found
    return None


def pyramid_of(levels: Iterable[Sequence[nn.Module]], after: Iterable[nn.Module] = ()) -> Pyramid:
    """The pyramid of the layers of its levels.

    Raises:
        FamilyError: a level is of another form, or the levels do not fit each other.
    """
    pairs = []
    for k, layers in enumerate(levels):
        level = read_level(layers)
        if isinstance(level, str):
            raise FamilyError(f"level {k} {level}")
        pairs.append(level)
    for what in ("in_channels", "out_channels"):
        counts = [getattr(level.convolution, what) for _, level in pairs]
        if len(set(counts)) > 1:
            raise FamilyError(f"its levels' convolutions differ in {what}: {', '.join(map(str, counts))}")
    return Pyramid(tuple(bins for bins, _ in pairs), tuple(level for _, level in pairs), tuple(after))


class ListedLevels(Family):
    """A family whose levels are the elements of one list of modules.

    Attributes:
        levels: name of the `ModuleList`.
        after: names of the children that take the concatenation, one after another; there are no other children.
    """

    levels: ClassVar[str]
    after: ClassVar[tuple[str, ...]] = ()

    def pyramid(self, module: nn.Module) -> Pyramid | None:
        children = module._modules
        if children.keys() != {self.levels, *self.after} or not isinstance(children[self.levels], nn.ModuleList):
            return None
        if not holds_levels(listed := children[self.levels]):
            return None
        after = [cast(nn.Module, children[name]) for name in self.after]
        return pyramid_of([leaves(level) for level in cast(nn.ModuleList, listed)], after)


def holds_levels(listed: nn.Module | None) -> bool:
    """Whether the first element of a list pools: what asks for a family's word."""
    first = next(iter(cast(nn.ModuleList, listed)), None)
    return first is not None and any(type(module) is nn.AdaptiveAvgPool2d for module in first.modules())


def features(channels: int, size: tuple[int, int], batch: int) -> torch.Tensor:
    """Random (batch, channels, *size) in float64, as every input that a module is tried with."""
    return torch.randn(batch, channels, *size, dtype=torch.float64)
