"""Whether a change of its forward leaves what a module computes: both are run, in copies, on random features and weights."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.utils._pytree import tree_leaves

from .family import Layout
from .forwards import MARK, falls_back

TOLERANCE = 1e-6  # of the largest value, in float64: another rounding is 1e-15, another function at least 1e-4


class Trial:
    """A module's copy, to compare changed copies with.

    Args:
        module: what is copied, in float64 and without hooks.
        inputs: makes the arguments of its forward from a copy, which is in the mode that is tried.
        random: the parts of a copy that get random parameters and statistics.
    """

    def __init__(
        self,
        module: nn.Module,
        inputs: Callable[[nn.Module], Sequence[Any]],
        random: Callable[[nn.Module], Iterable[nn.Module]] = lambda module: (module,),
    ) -> None:
        self.inputs = inputs
        self.device = next((p.device for p in module.parameters()), torch.device("cpu"))
        self.copy = copy.deepcopy(module).double()
        for each in self.copy.modules():
            for hooks in (each._forward_hooks, each._forward_pre_hooks, each._backward_hooks, each._backward_pre_hooks):
                hooks.clear()
        with self._alone():
            for part in random(self.copy):
                _randomise(part)

    def first_that_agrees(
        self, layouts: Iterable[Layout], change: Callable[[nn.Module, Layout], None]
    ) -> tuple[Layout | None, str]:
        """The first layout whose change leaves outputs and running statistics; else None, and a sentence why not."""
        reason = "it has no layout to try"
        try:
            expected = self._run(self.copy.eval())
        except Exception as error:  # whatever a stranger's forward raises is why it is left alone
            return None, f"its forward could not be tried on random features: {type(error).__name__}: {error}"
        for layout in layouts:
            changed = copy.deepcopy(self.copy)
            change(changed, layout)
            if fallback := falls_back(changed):
                return None, fallback  # by which every layout would agree
            try:
                got = self._run(changed)
            except Exception as error:  # a stranger's forward may check what it is given, in its own words
                reason = f"its layers are known, and its forward is another: {type(error).__name__}: {error}"
                continue
            if not _agree(expected, got):
                reason = "its layers are known, and its forward computes something else"
                continue
            if self._synchronises():
                return layout, ""
            try:
                expected = [*self._run(self.copy.train()), *self.copy.buffers()]
                got = [*self._run(changed.train()), *changed.buffers()]
            except Exception as error:
                return None, f"its training could not be tried: {type(error).__name__}: {error}"
            if _agree(expected, got):
                return layout, ""
            return None, "in training it computes something else than in evaluation"
        return None, reason

    def _run(self, module: nn.Module) -> list[torch.Tensor]:
        with self._alone():
            arguments = [_to(argument, self.device) for argument in self.inputs(module)]
            out = module(*arguments)
        # What a forward leaves in attributes is a result, too.
        kept = [value for each in module.modules() for name, value in each.__dict__.items() if name != MARK]
        return [leaf for leaf in tree_leaves([out, kept]) if type(leaf) is torch.Tensor]

    def passes_on(self, source: nn.Module, target: nn.Module) -> bool:
        """Whether what `target` is given is the very tensor that `source` returned, in the copy that both are parts of."""
        seen: list[Any] = []
        with (
            source.register_forward_hook(lambda module, arguments, out: seen.append(out)),
            target.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0])),
        ):
            self._run(self.copy.eval())
        return len(seen) == 2 and seen[0] is seen[1]

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """The same random numbers every time, nobody's own disturbed; no gradients, no autocast."""
        cuda = self.device.type == "cuda"
        with (
            torch.random.fork_rng(devices=[self.device] if cuda else []),
            torch.no_grad(),
            torch.autocast(self.device.type, enabled=False),
        ):
            torch.manual_seed(0)
            yield

    def _synchronises(self) -> bool:
        """Whether training would call the other processes."""
        together = dist.is_available() and dist.is_initialized()
        return together and any(isinstance(module, nn.SyncBatchNorm) for module in self.copy.modules())


def _randomise(module: nn.Module) -> None:
    for parameter in module.parameters():
        parameter.uniform_(-0.5, 0.5)
    for each in module.modules():
        if isinstance(getattr(each, "running_var", None), torch.Tensor):
            each.running_mean.uniform_(-0.5, 0.5)  # type: ignore[operator]
            each.running_var.uniform_(0.5, 2.0)  # type: ignore[operator]


def _to(argument: Any, device: torch.device) -> Any:
    if isinstance(argument, torch.Tensor):
        return argument.to(device)
    return [_to(each, device) for each in argument] if isinstance(argument, (list, tuple)) else argument


def _agree(expected: Sequence[torch.Tensor], got: Sequence[torch.Tensor]) -> bool:
    if len(expected) != len(got):
        return False
    for a, b in zip(expected, got, strict=True):
        if a.shape != b.shape or a.dtype != b.dtype:
            return False
        if a.is_floating_point():
            if not bool((a - b).abs().max() <= TOLERANCE * a.abs().max()):
                return False
        elif not torch.equal(a, b):
            return False
    return True
