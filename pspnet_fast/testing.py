"""What tests and benchmarks share: the ops in plain PyTorch, which backends can run here, and the accuracy rule.

The rule: error against float64 at most twice the error that plain PyTorch makes in the same dtype, plus one rounding step.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .backends import BACKENDS, Refusal, directions, emulated, find, interpreted, refusal, use_backend
from .geometry import levels


def plain_pyramid_pool(x: torch.Tensor, bins: Sequence[int]) -> torch.Tensor:
    return torch.cat([F.adaptive_avg_pool2d(x, b).flatten(2) for b in bins], 2).transpose(1, 2)


def plain_pyramid_project(
    pyramid: torch.Tensor,
    *weight: torch.Tensor,
    bins: Sequence[int],
    scale: torch.Tensor | None = None,
    shift: torch.Tensor | None = None,
    relu: bool = True,
) -> torch.Tensor:
    """Scale and shift (B, R) stand where a batch norm at evaluation would."""
    projected = []
    for k, level in enumerate(levels(pyramid, bins)):
        y = F.conv2d(level.transpose(1, 2)[..., None], weight[k][:, :, None, None])[..., 0].transpose(1, 2)
        y = y if scale is None else y * scale[k].to(y.dtype)
        y = y if shift is None else y + shift[k].to(y.dtype)
        projected.append(F.relu(y) if relu else y)
    return torch.cat(projected, 1)


def plain_pyramid_norm(
    y: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, bins: Sequence[int], relu: bool = True
) -> torch.Tensor:
    """In training; weight and bias (B, R)."""
    normalised = []
    for k, level in enumerate(levels(y, bins)):
        out = F.batch_norm(level.transpose(1, 2), None, None, weight[k], bias[k], training=True).transpose(1, 2)
        normalised.append(F.relu(out) if relu else out)
    return torch.cat(normalised, 1)


def plain_upsample_concat(
    x: torch.Tensor,
    pyramid: torch.Tensor,
    bins: Sequence[int],
    align_corners: bool = True,
    order: Sequence[int] | None = None,
) -> torch.Tensor:
    maps = {-1: x}
    for k, (b, level) in enumerate(zip(bins, levels(pyramid, bins), strict=True)):
        grid = level.transpose(1, 2).unflatten(2, (b, b))
        maps[k] = F.interpolate(grid, x.shape[2:], mode="bilinear", align_corners=align_corners)
    return torch.cat([maps[block] for block in order or range(-1, len(bins))], 1)


def plain_upsample_argmax(
    logits: torch.Tensor, size: Sequence[int], align_corners: bool = True
) -> tuple[torch.Tensor, torch.Tensor]:
    """Labels and their probabilities."""
    maps = F.interpolate(logits, tuple(size), mode="bilinear", align_corners=align_corners)
    labels = maps.argmax(1)
    return labels, maps.softmax(1).gather(1, labels[:, None])[:, 0]


def plain_upsample_cross_entropy(
    logits: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor | None = None,
    ignore_index: int = 255,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    align_corners: bool = True,
) -> torch.Tensor:
    """In float32 for 16-bit logits, but upsampled in their own dtype, as a network would."""
    upsampled = F.interpolate(logits, target.shape[-2:], mode="bilinear", align_corners=align_corners)
    upsampled = upsampled.to(torch.promote_types(logits.dtype, torch.float32))
    weight = None if weight is None else weight.to(upsampled.dtype)
    return F.cross_entropy(
        upsampled,
        target.long(),
        weight,
        ignore_index=ignore_index,
        reduction=reduction,
        label_smoothing=label_smoothing,
    )


def plain_pyramid_conv2d(
    pyramid: torch.Tensor,
    weight: torch.Tensor,
    size: Sequence[int],
    bins: Sequence[int],
    padding: int = 1,
    align_corners: bool = True,
) -> torch.Tensor:
    maps = []
    for b, level in zip(bins, levels(pyramid, bins), strict=True):
        grid = level.transpose(1, 2).unflatten(2, (b, b))
        maps.append(F.interpolate(grid, tuple(size), mode="bilinear", align_corners=align_corners))
    return F.conv2d(torch.cat(maps, 1), weight, padding=padding)


def plain_upsample_softmax_add(
    total: torch.Tensor,
    logits: torch.Tensor,
    corners: Sequence[Sequence[int]],
    size: Sequence[int],
    align_corners: bool = True,
    flip: bool = False,
    weight: float = 1.0,
) -> torch.Tensor:
    """In place, window after window; on a total with room around it where a window reaches outside."""
    height, width = size
    reach = [(-top, top + height - total.shape[1], -left, left + width - total.shape[2]) for top, left in corners]
    room = max(0, *(distance for distances in reach for distance in distances))
    wide = F.pad(total, (room, room, room, room)) if room > 0 else total
    for window, (top, left) in zip(logits.split(1), corners, strict=True):
        part = F.interpolate(window, tuple(size), mode="bilinear", align_corners=align_corners).softmax(1)[0]
        part = part.flip(2) if flip else part
        wide[:, room + top : room + top + height, room + left : room + left + width] += weight * part
    return total if room == 0 else total.copy_(wide[:, room:-room, room:-room])


def device(backend: str) -> str:
    """The device a backend is tested on: cuda for cuda and triton, unless the one is emulated, the other interpreted."""
    on_cpu = {"cuda": emulated(), "triton": interpreted(), "cpu": True, "reference": True}
    return "cpu" if on_cpu[backend] else "cuda"


def unavailable(op: str, backend: str, dtype: torch.dtype = torch.float32) -> str | None:
    """Why a backend cannot run an op on this machine, for tensors of a dtype; None if it can."""
    for direction in directions(op):
        found = find(op, direction, backend)
        if isinstance(found, Refusal):
            return found
    if device(backend) == "cuda" and not torch.cuda.is_available():
        return "there is no CUDA device"
    return refusal(op, backend, torch.empty(0, dtype=dtype, device=device(backend)))


def backends(*ops: str) -> list[Any]:
    """All backends as pytest parameters; one that cannot run all these ops here is skipped with its sentence."""
    import pytest

    parameters = []
    for backend in BACKENDS:
        reason = next(filter(None, (unavailable(op, backend) for op in ops)), None)
        marks = [] if reason is None else [pytest.mark.skip(reason=reason)]
        parameters.append(pytest.param(backend, marks=marks))
    return parameters


def backends_and(cases: Sequence[Any], op: str, interpret: int) -> list[Any]:
    """Every backend with every case, as pytest parameters; interpreted Triton, a thousand times slower, with the first few.

    Args:
        cases: whatever the test takes as its second argument.
        op: the op under test.
        interpret: how many of the cases Triton's interpreter runs; on a GPU, Triton runs all of them.
    """
    import pytest

    return [
        pytest.param(*backend.values, case, marks=backend.marks, id=f"{backend.values[0]}-{case}")
        for backend in backends(op)
        for case in cases[: interpret if backend.values[0] == "triton" and interpreted() else None]
    ]


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fresh memory holds NaN, so that an element nobody writes is found."""
    memory: Any = torch.utils.deterministic
    before = torch.are_deterministic_algorithms_enabled(), memory.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    memory.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        memory.fill_uninitialized_memory = before[1]


def assert_same_in_any_order(op: str, function: Callable[[], Sequence[torch.Tensor]]) -> None:
    """Emulated CUDA kernels give the same bits whichever block and thread comes first, with bulk copies or without."""
    import pytest

    if not emulated():
        pytest.skip("the CUDA kernels are not emulated: only there can their order be chosen")
    if reason := unavailable(op, "cuda"):
        pytest.skip(reason)
    emulation, runs = torch.ops.pspnet_fast_emulated, []
    try:
        for capability, order in ((90, 0), (90, 1), (80, 2), (80, 0)):
            emulation.set_capability(capability)
            emulation.set_order(order)
            with use_backend("cuda"), poisoned_memory():
                runs.append(function())
    finally:
        emulation.set_capability(90)
        emulation.set_order(0)
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], run, strict=True))


def evaluate(
    function: Callable[..., torch.Tensor], tensors: Sequence[torch.Tensor], cotangent: torch.Tensor | None = None
) -> list[torch.Tensor]:
    """The function's value and, given a cotangent, its gradient with respect to every tensor."""
    if cotangent is None:
        with torch.no_grad():
            return [function(*tensors)]
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, cotangent.to(out))]


def assert_within(ours: torch.Tensor, plain: torch.Tensor, exact: torch.Tensor, name: str = "result") -> None:
    """The accuracy rule, element by element.

    In float64, where plain PyTorch is the exact value itself, its error is taken to be 32 steps of the largest element.
    """
    assert ours.shape == exact.shape, f"{name}: shape {tuple(ours.shape)}, expected {tuple(exact.shape)}"
    if exact.numel() == 0:
        return
    eps = torch.finfo(ours.dtype).eps
    exact = exact.detach().cpu().double()
    plain_error = (plain.detach().cpu().double() - exact).abs().max()
    if ours.dtype == torch.float64:
        plain_error = 32 * eps * exact.abs().max()
    error = (ours.detach().cpu().double() - exact).abs()
    allowed = 2 * plain_error + eps * exact.abs()
    wrong = ~(error <= allowed)  # NaN is wrong
    if wrong.any():
        worst = (error - allowed).nan_to_num(nan=torch.inf).argmax()
        raise AssertionError(
            f"{name}: {int(wrong.sum())} of {wrong.numel()} elements are off; the worst, at flat index {int(worst)}, "
            f"by {error.flatten()[worst]:.3g} where {allowed.flatten()[worst]:.3g} is allowed "
            f"(plain PyTorch is off by at most {plain_error:.3g})"
        )


def assert_as_accurate(
    ours: Callable[..., torch.Tensor],
    plain: Callable[..., torch.Tensor],
    tensors: Sequence[torch.Tensor],
    backend: str,
    cotangent: torch.Tensor | None = None,
) -> list[torch.Tensor]:
    """Hold a backend's value and gradients against plain PyTorch's, both against float64. Returns ours.

    `ours` and `plain` take the tensors; the cotangent is a tensor like their result, None for no gradients.
    """
    exact = evaluate(plain, [t.double() for t in tensors], None if cotangent is None else cotangent.double())
    same_dtype = evaluate(plain, tensors, cotangent)
    there = [t.to(device(backend)) for t in tensors]
    with use_backend(backend), poisoned_memory():
        results = evaluate(ours, there, None if cotangent is None else cotangent.to(device(backend)))
    names = ["value", *(f"gradient {i}" for i in range(len(tensors)))]
    for name, mine, theirs, truth in zip(names, results, same_dtype, exact, strict=False):
        assert_within(mine, theirs, truth, name)
    return results


FEW = 1024  # values of a channel; between the middle ones of so many there is still a gap of many rounding steps
NARROW = 1 / 32  # half a gap that is too narrow, in standard deviations of the values


@torch.no_grad()
def clear_of_kinks(module: nn.Module, x: torch.Tensor) -> None:
    """Change a module a little, so that on `x`, in training, rounding decides nothing: what gradients can be compared on.

    Where a ReLU's argument is zero to within rounding, its gradient is there in one computation and not in the other, both as
    exact as they can be. So every bias of a channel of few values (a level's: N times b squared) is moved to where zero falls
    into the widest gap between the middle ones, or below them all where they are all alike.

    The two values of bin 1 in a batch of two, y + d and y - d, become d / sqrt(d^2 + eps) and the opposite. Near d = 0 that
    takes the sign, and the size of its derivative (up to 1 / sqrt(eps), 316), from the rounding of y: one such channel decides
    the largest error, of plain PyTorch's as of anybody's. As d is the weight's product with half the difference of the two
    pooled images, the weight gets as much of that difference as |d| needs to be half of what it is in other channels.

    Args:
        module: a plain module, in training, which calls its children; convolutions and norms, of any dtype, are changed in
            place. Take its state_dict afterwards.
        x: what it will be called with.
    """
    wide = copy.deepcopy(module).double()
    for original, copied in zip(module.modules(), wide.modules(), strict=True):
        if type(copied) is nn.Conv2d:
            copied.register_forward_hook(functools.partial(_tell_two_apart, original))
        if isinstance(copied, nn.Conv2d | nn.modules.batchnorm._BatchNorm | nn.GroupNorm) and copied.bias is not None:
            copied.register_forward_hook(functools.partial(_put_zero_into_a_gap, original))
    wide(x.double())


def _tell_two_apart(original: Any, copied: nn.Module, inputs: tuple[torch.Tensor], out: torch.Tensor) -> Any:
    """Of bin 1 in a batch of two: no channel in which both are alike, unless the images are."""
    if out.shape[0] * out.shape[2:].numel() != 2 or original.kernel_size != (1, 1) or original.groups != 1:
        return None
    first, second = inputs[0].transpose(0, 1).flatten(1).unbind(1)
    this, other = out.transpose(0, 1).flatten(1).unbind(1)
    difference, d = (first - second) / 2, (this - other) / 2
    if difference.norm() < 1e-3 * first.norm():
        return None
    wanted = d.abs().clamp(min=0.5 * d.square().mean().sqrt()).copysign(d)
    more = ((wanted - d)[:, None] * difference / difference.square().sum())[:, :, None, None]
    return _change(original, copied, "weight", original.weight.double() + more, inputs)


def _put_zero_into_a_gap(original: nn.Module, copied: Any, inputs: tuple[torch.Tensor], out: torch.Tensor) -> Any:
    count = out.numel() // out.shape[1]
    if not 2 <= count <= FEW:
        return None
    if isinstance(copied, nn.modules.batchnorm._BatchNorm):
        out = nn.modules.batchnorm._BatchNorm.forward(copied, *inputs)  # without the activation of a class of its own
    values = out.transpose(0, 1).flatten(1).sort(1).values
    outside = (count - 1) // 4
    width, place = values.diff(dim=1)[:, outside : count - 1 - outside].max(1)
    below = (place + outside)[:, None]
    zero = (values.gather(1, below) + values.gather(1, below + 1))[:, 0] / 2
    scale = out.std()
    zero = torch.where(width / 2 < NARROW * scale, values[:, 0] - scale, zero)
    return _change(original, copied, "bias", copied.bias - zero, inputs)


def _change(original: Any, copied: Any, name: str, value: torch.Tensor, inputs: tuple[torch.Tensor]) -> torch.Tensor:
    """Set a parameter in both, rounded as the original is; what the module makes of its inputs then."""
    getattr(original, name).copy_(value)
    getattr(copied, name).copy_(getattr(original, name))
    result: torch.Tensor = copied.forward(*inputs)
    return result


def peak_memory(function: Callable[[], object], device: str) -> int:
    """Bytes that tensors take at most while `function` runs, beyond what they took before."""
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        function()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        function()
    results = profile.profiler.kineto_results
    events = [e for e in results.events() if e.name() == "[memory]"]
    taken = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        taken += event.nbytes()
        peak = max(peak, taken)
    return peak
