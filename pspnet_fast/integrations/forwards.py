"""The forwards that accelerated modules get, by a change of their class: parameters, names, hooks and keys stay.

A module's class becomes a subclass of it with another `forward`, so `isinstance` holds, copies and pickles are of it, and
replicas of DataParallel, too. Every forward looks at the module's layers as they are then: what somebody replaced, converted
or hooked is seen, and where it is no longer what the kernels compute, the module's own forward runs. So it does where a
module is of another class than any that were tried: what that one's forward does with its children, nobody has looked at.
"""

from __future__ import annotations

import copyreg
import logging
import threading
from collections.abc import Iterator
from typing import Any, NamedTuple, cast

import torch
from torch import nn

from ..functional import pyramid_pool, upsample_concat
from ..nn.calls import tell, why_call
from ..nn.levels import reduce_levels
from ..nn.plain_ppm import upsampled
from ..nn.ppm import ppm
from ..nn.psp_head import beyond_the_factorised_form, bottleneck
from .family import Family, FamilyError, Head, Layout, Pyramid, containers, leaves, stranger

_LOG = logging.getLogger(__name__)

MARK = "_pspnet_fast"


class Plan(NamedTuple):
    """What an accelerated module computes, kept beside its parameters.

    Attributes:
        family: that recognised the pyramid, if it is a module by itself.
        layout: of the concatenation.
        head: of a head, what it is; else None.
        factorised: whether the layers after the concatenation are computed without it.
        through: the classes of the modules that hold layers, as they were tried; None in files of before there were any.
    """

    family: Family | None
    layout: Layout
    head: Head | None = None
    factorised: bool = True
    through: tuple[type, ...] | None = None


def plan_of(module: nn.Module) -> Plan | None:
    """The plan of an accelerated module."""
    return cast("Plan | None", module.__dict__.get(MARK))


def own_forward(module: nn.Module) -> bool:
    """Whether a module is called by its class's forward."""
    unimplemented = type(module).forward is nn.Module.forward
    return not unimplemented and "forward" not in module.__dict__ and not isinstance(module, torch.jit.ScriptModule)


def falls_back(module: nn.Module) -> str | None:
    """Why an accelerated module runs the forward that it had before, or None."""
    now = _passing_of(module) if isinstance(module, AcceleratedHead) else _pyramid_now(module)
    return now if isinstance(now, str) else None


class _Passing(NamedTuple):
    """A head's forward under way: its pyramid gives x on, and its layers compute both."""

    ppm: nn.Module
    layers: nn.Module
    pyramid: Pyramid
    layout: Layout
    factorised: bool


class _Local(threading.local):
    passing: tuple[_Passing, ...] = ()


_UNDER_WAY = _Local()


def _passed(module: nn.Module) -> bool:
    """Whether the module is the pyramid of a head whose forward is under way."""
    return any(each.ppm is module for each in _UNDER_WAY.passing)


def levels_after(x: torch.Tensor, pyramid: Pyramid, layout: Layout) -> torch.Tensor | list[torch.Tensor]:
    """What a pyramid's forward returns before the modules that follow inside: the concatenation, or a list without x."""
    if layout.x != "none":
        return ppm(x, pyramid.bins, pyramid.levels, layout.align_corners, layout.x == "last")
    cells, x = pyramid_pool(x, pyramid.bins, return_input=True)
    reduced = reduce_levels(cells, pyramid.bins, pyramid.levels)
    if not isinstance(reduced, torch.Tensor):
        return upsampled(x, reduced, layout.align_corners)
    order = range(len(pyramid.bins))
    maps = upsample_concat(x, reduced, pyramid.bins, layout.align_corners, order)
    return [*maps.split(reduced.shape[2], 1)]


def with_layers(
    x: torch.Tensor, pyramid: Pyramid, layout: Layout, modules: tuple[nn.Module, ...], factorised: bool
) -> torch.Tensor | None:
    """`modules` over the concatenation without it; None where they are not what can be computed so."""
    if not factorised:
        return None
    try:
        layers = [leaf for module in modules for leaf in leaves(module)]
    except FamilyError as error:
        tell(_LOG, "accelerate: the concatenation is built: %s", error)
        return None
    if reason := beyond_the_factorised_form(layers[0]):
        tell(_LOG, "accelerate: the concatenation is built, for the convolution after it: %s", reason)
        return None
    return bottleneck(x, pyramid.bins, pyramid.levels, layout.align_corners, layers, layout.x == "last")


class _Accelerated:
    """What the subclasses share: how they are pickled."""

    original: type[nn.Module]

    def __reduce_ex__(self, protocol: Any) -> Any:
        function, arguments, *state = cast("tuple[Any, ...]", super().__reduce_ex__(protocol))
        if function is not copyreg.__newobj__:  # type: ignore[attr-defined]
            raise TypeError(
                f"{type(self).__name__} has a pickling of its own: restore(model) before it is saved or copied"
            )
        return _new, (_KINDS.index(type(self).__mro__[1]), self.original, *arguments[1:]), *state


def _new(kind: int, original: type[nn.Module], *arguments: Any) -> nn.Module:
    made = subclass(_KINDS[kind], original)
    return cast(nn.Module, cast(Any, made).__new__(made, *arguments))


class AcceleratedPPM(_Accelerated):
    """A pyramid pooling module."""

    def forward(self, x: torch.Tensor, *more: Any, **named: Any) -> Any:
        module = cast(nn.Module, self)
        plan = plan_of(module)
        if plan is None:
            return _restored(module, x, *more, **named)
        if _passed(module):
            return [] if plan.layout.x == "none" else x
        pyramid = _pyramid_now(module)
        if isinstance(pyramid, str):
            tell(_LOG, "accelerate: %s runs its own forward: %s", type(module).__name__, pyramid)
            return cast(Any, super()).forward(x, *more, **named)
        if pyramid.after:
            y = with_layers(x, pyramid, plan.layout, pyramid.after, plan.factorised)
            if y is not None:
                return y
        out: Any = levels_after(x, pyramid, plan.layout)
        for after in pyramid.after:
            out = after(out)
        return out


class AcceleratedList(_Accelerated):
    """A list of levels, read by the forward of the head that it belongs to."""

    def __iter__(self) -> Iterator[nn.Module]:
        if _passed(cast(nn.Module, self)):
            return iter(())
        return cast("Iterator[nn.Module]", cast(Any, super()).__iter__())


class AcceleratedHead(_Accelerated):
    """What concatenates x and the levels."""

    def forward(self, *arguments: Any, **named: Any) -> Any:
        module = cast(nn.Module, self)
        if plan_of(module) is None:
            return _restored(module, *arguments, **named)
        passing = _passing_of(module)
        if isinstance(passing, str):
            tell(_LOG, "accelerate: %s runs its own forward: %s", type(module).__name__, passing)
            return cast(Any, super()).forward(*arguments, **named)
        before = _UNDER_WAY.passing
        _UNDER_WAY.passing = (*before, passing)
        try:
            return cast(Any, super()).forward(*arguments, **named)
        finally:
            _UNDER_WAY.passing = before


class AcceleratedLayers(_Accelerated):
    """What takes the concatenation."""

    def forward(self, x: torch.Tensor, *more: Any, **named: Any) -> Any:
        module = cast(nn.Module, self)
        if plan_of(module) is None:
            return _restored(module, x, *more, **named)
        for each in _UNDER_WAY.passing:
            if each.layers is module:
                y = with_layers(x, each.pyramid, each.layout, (each.layers,), each.factorised)
                if y is not None:
                    return y
                x = cast(torch.Tensor, levels_after(x, each.pyramid, each.layout))
        return cast(Any, super()).forward(x, *more, **named)


_KINDS: list[type] = [AcceleratedPPM, AcceleratedList, AcceleratedHead, AcceleratedLayers]
_SUBCLASSES: dict[tuple[type, type], type[nn.Module]] = {}


def subclass(kind: type, original: type[nn.Module]) -> type[nn.Module]:
    """The subclass of a module's class with the forward of a kind."""
    found = _SUBCLASSES.get((kind, original))
    if found is None:
        body = {name: getattr(original, name) for name in ("__module__", "__qualname__", "__doc__")}
        metaclass = cast(Any, type(original))
        found = cast("type[nn.Module]", metaclass(original.__name__, (kind, original), {**body, "original": original}))
        _SUBCLASSES[kind, original] = found
    return found


def rebind(module: nn.Module, kind: type, plan: Plan) -> None:
    """Give a module the forward of a kind."""
    module.__class__ = subclass(kind, type(module))
    module.__dict__[MARK] = plan._replace(through=tuple(dict.fromkeys(containers(module))))


def unbind(module: nn.Module) -> None:
    """Give an accelerated module its own class back."""
    del module.__dict__[MARK]
    module.__class__ = cast(Any, module).original


def _restored(module: nn.Module, *arguments: Any, **named: Any) -> Any:
    """The forward of a module that was accelerated, for who took hold of its method then and calls it now."""
    return type(module).forward(module, *arguments, **named)


def _pyramid_now(module: nn.Module) -> Pyramid | str:
    """An accelerated module's pyramid as it is; or why its own forward must run."""
    plan = cast(Plan, plan_of(module))
    if reason := _strange(module, plan):
        return reason
    try:
        pyramid = cast(Family, plan.family).pyramid(module)
    except FamilyError as reason:
        return str(reason)
    return "it has another structure" if pyramid is None else pyramid


def _passing_of(head: nn.Module) -> _Passing | str:
    """How a head's forward goes; or why its own must run, with a pyramid and layers that compute what they are."""
    plan = cast(Plan, plan_of(head))
    of_head = cast(Head, plan.head)
    ppm, layers = (cast(nn.Module, getattr(head, name)) for name in (of_head.ppm, of_head.layers))
    for name, module in ((of_head.ppm, ppm), (of_head.layers, layers)):
        of_module = plan_of(module)
        if of_module is None or "original" not in type(module).__dict__:
            return f"{name} was replaced, or is of another class"
        if reason := why_call(module) or _strange(module, of_module):
            return f"{name}: it {reason}"
    try:
        pyramid = of_head.pyramid(head, ppm, plan.family)
    except FamilyError as reason:
        return str(reason)
    return (
        "it has another structure" if pyramid is None else _Passing(ppm, layers, pyramid, plan.layout, plan.factorised)
    )


def _strange(module: nn.Module, plan: Plan) -> str | None:
    """What an accelerated module holds that its forward was not tried with."""
    kind = None if plan.through is None else stranger(module, plan.through)
    return None if kind is None else f"holds a {kind.__name__}, which it did not when it was tried"
