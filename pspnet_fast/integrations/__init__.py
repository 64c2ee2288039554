"""`accelerate(model)`: other people's pyramid pooling modules and their heads, on the kernels; `restore(model)` undoes it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, cast

from torch import nn

from ..nn.plain_ppm import PlainPPM
from ..nn.ppm import PPM
from . import csail, lists, mmseg, semseg, smp, tramac, transformers
from .family import Family, FamilyError, Head, Layout, ListedLevels, Pyramid, features, leaves, pyramid_of
from .forwards import (
    AcceleratedHead,
    AcceleratedLayers,
    AcceleratedList,
    AcceleratedPPM,
    Plan,
    own_forward,
    plan_of,
    rebind,
    unbind,
)
from .losses import accelerate_losses
from .report import Part, Refusal, Report
from .trial import Trial

__all__ = [
    "FAMILIES",
    "HEADS",
    "Family",
    "FamilyError",
    "Head",
    "Layout",
    "ListedLevels",
    "Part",
    "Pyramid",
    "Refusal",
    "Report",
    "accelerate",
    "accelerate_losses",
    "features",
    "leaves",
    "pyramid_of",
    "restore",
]

FAMILIES: tuple[Family, ...] = (
    *(semseg.PPM(), smp.PSPModule(), smp.UPerNetPSPModule(), mmseg.PPM(), transformers.PyramidPoolingModule()),
    *(csail.UPerNet(), tramac.Tramac(), tramac.Encoding(), lists.TorchSeg(), lists.Yassouali(), lists.Speedinghzl()),
    *(lists.Lextal(), lists.Kazuto1011(), lists.Tutorial()),
)
HEADS: tuple[Head, ...] = (
    *(semseg.PSPNet(), smp.PSPDecoder(), mmseg.DecodeHead(), transformers.UperNetHead(), csail.Decoder()),
)


_OF_HEAD = "its head: "


def accelerate(model: nn.Module, head: bool = True, families: Sequence[Family | Head] = ()) -> Report:
    """Let the pyramid pooling modules of a model run on the kernels of this library, with the same results to rounding.

    Modules are recognised by structure (`FAMILIES`): semseg, segmentation_models_pytorch (PSPNet, UPerNet),
    mmsegmentation (PSPHead, UPerHead), transformers (UperNet), CSAIL, Tramac, PyTorch-Encoding, TorchSeg, and those of the
    common small repositories and tutorials. A copy of each is run by its own forward and by the new one, with random weights,
    in evaluation and in training; only where outputs and running statistics agree is the module changed. That also finds
    align_corners and x's place in the concatenation, which stand in nothing but code.

    The model is changed in place, and nothing else of it: its modules, parameters, names, hooks and state_dict stay, and it
    may be trained, converted, wrapped, copied and saved as before. (`torch.load` of a whole pickled model then needs this
    library; `restore` it first where that is not wanted.)

    Args:
        model: any module.
        head: also compute the convolution after the concatenation without it, where the head is known (`HEADS`) or that
            convolution is inside the pyramid's module.
        families: families and heads of your own, tried first.

    Returns:
        What was accelerated, what was already, and what was refused and why; print it.

    Raises:
        TypeError: a model that is no module, a family that is no instance of `Family` or `Head`.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"accelerate: model must be a torch.nn.Module, got {type(model).__name__}")
    for each in families:
        if not isinstance(each, (Family, Head)):
            raise TypeError(f"accelerate: families must be instances of Family or Head, got {each!r}")
    report = Report()
    known = [each for each in families if isinstance(each, Family)] + [*FAMILIES]
    heads = [each for each in families if isinstance(each, Head)] + [*HEADS]
    ours = (PPM, PlainPPM)
    for name, module in model.named_modules():
        plan = plan_of(module)
        if plan is not None:
            _count_present(report.already, name, plan, module)
        elif not isinstance(module, ours):
            _accelerate_pyramid(report, name, module, known, head)
    for name, module in model.named_modules():
        if plan_of(module) is None:
            _accelerate_head(report, name, module, heads, head)
    done = {part.name for part in report.accelerated}
    report.refused = [each for each in report.refused if each.name not in done or each.reason.startswith(_OF_HEAD)]
    if not report.accelerated and not report.already:
        told = {each.name for each in report.refused}
        told |= {name for name, module in model.named_modules() if isinstance(module, ours)}
        near = [name for name, module in model.named_modules() if name not in told and _is_near(module)]
        report.near = [name or "the model" for name in near if not _inside(name, told)]
    return report


def restore(model: nn.Module) -> list[str]:
    """Undo `accelerate`: every module has its own class and forward again, and gives its old outputs to the bit.

    Returns:
        The names of the modules that were accelerated.
    """
    names = []
    for name, module in model.named_modules():
        if plan_of(module) is not None:
            unbind(module)
            names.append(name)
    return names


def _count_present(parts: list[Part], name: str, plan: Plan, module: nn.Module) -> None:
    if isinstance(module, AcceleratedPPM):
        parts.append(Part(name, cast(Family, plan.family).name, "PPM"))
    elif isinstance(module, AcceleratedHead):
        parts.append(Part(name, cast(Head, plan.head).name, "head"))


def _accelerate_pyramid(
    report: Report, name: str, module: nn.Module, known: Sequence[Family], factorised: bool
) -> None:
    """Try a module as every family that its structure fits; the first reason against it is told."""
    refusals = []
    for family in known:
        try:
            pyramid = family.pyramid(module)
        except FamilyError as error:
            refusals.append(Refusal(name, family.name, str(error)))
            continue
        if pyramid is None:
            continue
        change = partial(_rebind_pyramid, family, factorised)
        inputs = partial(_features_of, pyramid)
        layout, reason = _tried([module], module, inputs, family.layouts, change)
        if layout is not None:
            change(module, layout)
            report.accelerated.append(Part(name, family.name, "PPM"))
            return
        refusals.append(Refusal(name, family.name, reason))
    report.refused += refusals[:1]


def _rebind_pyramid(family: Family, factorised: bool, module: nn.Module, layout: Layout) -> None:
    rebind(module, AcceleratedPPM, Plan(family, layout, factorised=factorised))


def _features_of(pyramid: Pyramid, module: nn.Module) -> Sequence[Any]:
    return (features(pyramid.channels, _size(pyramid), 2),)


def _accelerate_head(report: Report, name: str, module: nn.Module, heads: Sequence[Head], factorised: bool) -> None:
    for head in heads:
        ppm, layers = (module._modules.get(each) for each in (head.ppm, head.layers))
        if ppm is None or layers is None:
            continue
        plan = plan_of(ppm)
        family = None if plan is None else plan.family
        try:
            pyramid = head.pyramid(module, ppm, family)
        except FamilyError as error:
            report.refused.append(Refusal(name, head.name, str(error)))
            continue
        if pyramid is None or (plan is not None and not factorised):
            continue
        change = partial(_rebind_head, head, family, factorised)
        inputs = partial(_inputs_of_head, head, pyramid)
        direct = (head.ppm, head.layers) if plan is not None and plan.layout.x != "none" else None
        layouts = _layouts_of_head(plan)
        layout, reason = _tried([module, layers], module, inputs, layouts, change, head.random, direct)
        if layout is not None:
            change(module, layout)
            report.accelerated.append(Part(name, head.name, "head"))
            return
        report.refused.append(Refusal(name, head.name, _OF_HEAD + reason))


def _inputs_of_head(head: Head, pyramid: Pyramid, module: nn.Module) -> Sequence[Any]:
    return head.inputs(module, pyramid.channels, _size(pyramid), 2)


def _layouts_of_head(plan: Plan | None) -> Sequence[Layout]:
    """A list of levels stands after x in the concatenation that its head makes of both."""
    if plan is None:
        return Family.layouts
    return [Layout("first", plan.layout.align_corners)] if plan.layout.x == "none" else [plan.layout]


def _rebind_head(head: Head, family: Family | None, factorised: bool, module: nn.Module, layout: Layout) -> None:
    plan = Plan(family, layout, head, factorised)
    ppm, layers = (cast(nn.Module, getattr(module, name)) for name in (head.ppm, head.layers))
    if plan_of(ppm) is None:
        rebind(ppm, AcceleratedList, plan)
    rebind(layers, AcceleratedLayers, plan)
    rebind(module, AcceleratedHead, plan)


def _tried(
    called: Sequence[nn.Module],
    module: nn.Module,
    inputs: Callable[[nn.Module], Sequence[Any]],
    layouts: Sequence[Layout],
    change: Callable[[nn.Module, Layout], None],
    random: Callable[[nn.Module], Iterable[nn.Module]] = lambda module: (module,),
    between: tuple[str, str] | None = None,
) -> tuple[Layout | None, str]:
    """The layout with which the changed module agrees with the module; or None, and why there is none.

    `between` names two children: the first one's result must reach the second as it is.
    """
    for each in called:
        if not own_forward(each):
            return None, f"{type(each).__name__} is not called by its class's forward"
    if any(parameter.is_meta for parameter in module.parameters()):
        return None, "its weights are not here (device meta): accelerate it before they are taken elsewhere"
    try:
        trial = Trial(module, inputs, random)
    except Exception as error:  # whatever a stranger's module raises is why it is left alone
        return None, f"it could not be copied: {type(error).__name__}: {error}"
    layout, reason = trial.first_that_agrees(layouts, change)
    if layout is not None and between is not None and layout.x != "none":
        source, target = (cast(nn.Module, getattr(trial.copy, name)) for name in between)
        if not trial.passes_on(source, target):
            return None, "something happens to the concatenation on its way, which the trial cannot judge"
    return layout, reason


def _size(pyramid: Pyramid) -> tuple[int, int]:
    """A small map with more rows and columns than cells, which the levels do not divide."""
    least = max(6, *pyramid.bins) + 1
    return least, least + 2


def _inside(name: str, others: Iterable[str]) -> bool:
    return any(other == "" or name.startswith(f"{other}.") for other in others)


def _is_near(module: nn.Module) -> bool:
    called = re.search(r"psp|ppm|pyramid_?pool", type(module).__name__, re.IGNORECASE)
    pools = sum(type(child) is nn.AdaptiveAvgPool2d for child in module.children())
    return called is not None or pools > 0
