"""`accelerate_losses()`: other people's training loops, which interpolate logits and take their loss, on the kernels.

Inside the block a bilinear `interpolate` returns a deferred tensor: it has the shape, dtype, device and place in the graph of
the upsampled logits, and holds a copy of the small ones. The loss and the labels are computed from these; whatever else reads
it computes the upsampled logits first, by PyTorch's own `interpolate`, and goes on with them.

The copy costs what one pixel in 64 costs, and is what makes deferring safe: the loop may change its logits in place.

One file of more than 300 lines: what defers a tensor, the tensor, and what takes it are of no use without each other.
"""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch._C._dynamo.eval_frame import _FrameAction, _FrameExecStrategy, set_code_exec_strategy
from torch.autograd.grad_mode import _unsafe_preserve_version_counter
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from ..checks import DTYPES
from ..functional import upsample_argmax, upsample_cross_entropy
from ..geometry import accumulation_dtype
from ..tracing import is_transformed

Compute = Callable[[torch.Tensor], torch.Tensor]


@dataclass
class Used:
    """What a block of `accelerate_losses` did.

    Attributes:
        losses: how many losses came from the small logits.
        labels: how many maps of labels did.
        materialised: what needed the upsampled logits after all: a function's name, and how many it computed.
    """

    losses: int = 0
    labels: int = 0
    materialised: Counter[str] = field(default_factory=Counter)

    def __str__(self) -> str:
        names = ", ".join(f"{name} {count}" for name, count in self.materialised.most_common())
        return f"losses {self.losses}, labels {self.labels}, materialised {self.materialised.total()}" + (
            f" ({names})" if names else ""
        )


@contextlib.contextmanager
def accelerate_losses() -> Iterator[Used]:
    """A block, or as a decorator a function, in which loss and labels of upsampled logits come without these logits.

    Two lines are all that a training loop changes:

        from pspnet_fast import accelerate_losses

        with accelerate_losses() as used:                                      # around forward and loss
            logits = F.interpolate(net(images), labels.shape[1:], mode="bilinear", align_corners=True)
            loss = F.cross_entropy(logits, labels, ignore_index=255)           # never builds (N, K, H, W)
            prediction = logits.max(1)[1]                                      # nor does this
        loss.backward()

    Deferred is `F.interpolate` (and `nn.Upsample`) with mode="bilinear" of a 4-D floating-point tensor, by size, or by a
    scale factor that means the same as the size; with antialias it is PyTorch's. From the small logits come

        `F.cross_entropy` (`nn.CrossEntropyLoss`) with class indices, and all of its options     `upsample_cross_entropy`
        `argmax(1)`, `max(1)`, `topk(1, 1)`; the values, too, are deferred                       `upsample_argmax`

    `contiguous()` and `float()` stay deferred, and shape and dtype are known. Anything else (printing, indexing, arithmetic,
    softmax, other losses, `torch.cat`, ...) computes the upsampled logits once, with PyTorch, differentiable as ever, and
    goes on with an ordinary tensor, in the block or after it. Wherever the loop gets an exception from PyTorch it still does,
    but for targets that are no class: there the words are those of `upsample_cross_entropy`, which on a GPU ignores them.

    The block counts for its own thread (not for `nn.DataParallel`'s), nests (an inner block counts for itself), and
    leaves nothing behind. In what torch.compile, torch.export, torch.jit.trace and `torch.func` trace it does nothing, nor in
    forward mode. The second derivative of a loss is PyTorch's, of the upsampled logits. `checkpoint` may not hold both
    interpolation and loss, which it would compute again outside the block. Of 16-bit logits, labels within rounding of each
    other may change places.

    Yields:
        `Used`: how many losses and labels came from the small logits, and what did not.
    """
    used = Used()
    with _Deferring(used):
        yield used


class _Deferring(TorchFunctionMode):
    """Sees every function of torch, and changes `interpolate`."""

    def __init__(self, used: Used) -> None:
        super().__init__()
        self._used = used

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is F.interpolate and not torch.compiler.is_compiling():
            return _interpolate(self._used, *args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _interpolate(used: Used, x: torch.Tensor, **call: Any) -> Any:
    size = _deferred_size(x, **call)
    if size is None:
        return F.interpolate(x, **call)
    source = x.clone()
    if _autocasts(x):
        source = source.to(F.interpolate(x.new_zeros(1, 1, 1, 1), size=1, mode="bilinear").dtype)
    compute, shape = partial(F.interpolate, **call), (*x.shape[:2], *size)
    return _defer(_Logits, source, compute, shape, source.dtype, used, bool(call["align_corners"]))


def _deferred_size(
    x: object,
    size: Any = None,
    scale_factor: Any = None,
    mode: str = "nearest",
    align_corners: bool | None = None,
    recompute_scale_factor: bool | None = None,
    antialias: bool = False,
) -> tuple[int, int] | None:
    """(H, W) of the result, where deferring is right; None where the call is PyTorch's, as are its complaints.

    Subclasses are PyTorch's, and what a transform, forward mode or a tracer looks into. So is a scale factor without
    align_corners that is not the ratio of the sizes: PyTorch then samples by the factor.
    """
    if type(x) not in (torch.Tensor, torch.nn.Parameter):
        return None
    if is_transformed():
        return None
    assert isinstance(x, torch.Tensor)
    if x.dim() != 4 or x.dtype not in DTYPES or x.numel() == 0 or mode != "bilinear" or antialias:
        return None
    if (size is None) == (scale_factor is None) or (size is not None and recompute_scale_factor):
        return None
    given = scale_factor if size is None else size
    pair = tuple(given) if isinstance(given, (tuple, list)) else (given, given)
    if len(pair) != 2 or not all(type(number) in (int, float) and 0 < number < math.inf for number in pair):
        return None
    if size is not None:
        return None if float in map(type, pair) else pair
    exact = [Fraction(scale) * length for scale, length in zip(pair, x.shape[2:], strict=True)]
    height, width = (math.floor(scale * length) for scale, length in zip(pair, x.shape[2:], strict=True))
    by_size = align_corners or recompute_scale_factor or exact == [height, width]
    return (height, width) if by_size and min(height, width) > 0 else None


def _autocasts(x: torch.Tensor) -> bool:
    return torch.amp.is_autocast_available(x.device.type) and torch.is_autocast_enabled(x.device.type)


class _Deferred(torch.Tensor):
    """`compute(source)`, not yet computed. Once it is, `value` is the tensor, and this one stands for it.

    Its place in the graph is then behind `value`, for what takes it as a tensor and not through `__torch_function__`, as an
    autograd.Function does: `place` is the version and the node of the value when this was last seen to, `node` its own.
    """

    source: torch.Tensor
    compute: Compute
    used: Used
    value: torch.Tensor | None
    place: tuple[int, Any] | None
    node: Any
    align_corners: bool

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if torch.compiler.is_compiling():  # a compiled function was given a deferred tensor
            torch._dynamo.graph_break(msg="accelerate_losses: deferred logits are for functions that are not compiled")
        options = dict(kwargs or {})
        first, *rest = args or (options.pop("input", None),)
        if isinstance(first, _Deferred) and first.value is None:
            if func in _KNOWN:
                with torch._C.DisableTorchFunctionSubclass():
                    return func(*args, **(kwargs or {}))
            if isinstance(first, _Logits) and func in _FROM_LOGITS and _node(first) is first.node:
                result = _FROM_LOGITS[func](first, *rest, **options)
                if result is not NotImplemented:
                    return result
        given = args, kwargs or {}
        args, kwargs = pytree.tree_map_only(_Deferred, partial(_materialise, _name(func)), given)
        result = func(*args, **kwargs)
        for leaf in pytree.tree_leaves(given):
            if isinstance(leaf, _Deferred):
                _follow(leaf)
        return result

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch's stub leaves out the class method's first argument
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """For what reaches it below `__torch_function__`, as inputs of an autograd.Function do: values without a graph."""
        if func._schema.is_mutable:
            raise RuntimeError(f"accelerate_losses: {func} must not write where deferred logits are: clone them before")
        name = func.overloadpacket.__name__
        args, kwargs = pytree.tree_map_only(
            _Deferred, lambda deferred: _materialise(name, deferred).detach(), (args, kwargs or {})
        )
        return func(*args, **kwargs)


class _Logits(_Deferred):
    """Upsampled logits, of which `source` are the small ones."""


class _Defer(torch.autograd.Function):
    """The deferred tensor's place in the graph before there is a value."""

    @staticmethod
    def forward(
        ctx: Any,
        source: torch.Tensor,
        kind: type[_Deferred],
        compute: Compute,
        shape: tuple[int, ...],
        dtype: torch.dtype,
    ) -> torch.Tensor:
        ctx.save_for_backward(source)
        ctx.compute = compute
        tensor: torch.Tensor = torch.Tensor._make_wrapper_subclass(kind, shape, dtype=dtype, device=source.device)
        return tensor

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        """Whatever is deferred is linear, or piecewise so: of second derivatives only the one by `grad` is not zero."""
        (source,) = ctx.saved_tensors
        leaf, twice = source.detach().requires_grad_(), torch.is_grad_enabled()
        return (
            *torch.autograd.grad(_computed(ctx.compute, leaf), leaf, grad, create_graph=twice),
            None,
            None,
            None,
            None,
        )


class _Follow(torch.autograd.Function):
    """Puts the deferred tensor behind its value in the graph, by writing the one over the other."""

    @staticmethod
    def forward(ctx: Any, deferred: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        ctx.mark_dirty(deferred)
        return deferred

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        return None, grad


class _Behind(torch.autograd.Function):
    """The value, behind the deferred tensor in the graph: the other way round."""

    @staticmethod
    def forward(ctx: Any, deferred: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        return grad, None


def _defer(
    kind: type[_Deferred],
    source: torch.Tensor,
    compute: Compute,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    used: Used,
    align_corners: bool,
) -> Any:
    deferred: Any = _Defer.apply(source, kind, compute, shape, dtype)  # type: ignore[no-untyped-call]
    deferred.source, deferred.compute, deferred.value, deferred.place = source, compute, None, None
    deferred.used, deferred.align_corners, deferred.node = used, align_corners, _node(deferred)
    return deferred


def _computed(compute: Compute, source: torch.Tensor) -> torch.Tensor:
    """As it would have been where it was deferred: whatever modes, autocast and no_grad there are now."""
    device = source.device.type
    plain = torch.autocast(device, enabled=False) if _autocasts(source) else contextlib.nullcontext()
    with torch.inference_mode(False), torch.enable_grad(), torch._C.DisableTorchFunction(), plain:
        return compute(source)


def _materialise(name: str, deferred: _Deferred) -> torch.Tensor:
    value = deferred.value
    if value is None:
        value = _computed(deferred.compute, deferred.source)
        deferred.used.materialised[name] += 1
        del deferred.source
    if _node(deferred) is not deferred.node:  # it was made in an autograd.Function, which has put it behind itself
        with torch.inference_mode(False), torch.enable_grad(), torch._C.DisableTorchFunction():
            value = _Behind.apply(deferred, value)  # type: ignore[no-untyped-call]
    deferred.value = value
    _follow(deferred)
    return value


def _node(deferred: _Deferred) -> Any:
    with torch._C.DisableTorchFunctionSubclass():
        return deferred.grad_fn


def _follow(deferred: _Deferred) -> None:
    """After whatever may have moved the value in the graph."""
    value, before = deferred.value, deferred.place
    assert value is not None
    node = torch.autograd.graph.get_gradient_edge(value).node if value.requires_grad else None
    deferred.place = value._version, node
    if deferred.place == before:
        return
    with torch.inference_mode(False), torch.enable_grad(), torch._C.DisableTorchFunction():
        if deferred.is_inference():  # such a tensor is in no graph
            return
        written = before is not None and before[0] != value._version
        # Who has saved the deferred tensor for backward finds the same numbers there, unless they were written over.
        with contextlib.nullcontext() if written else _unsafe_preserve_version_counter(deferred):
            _Follow.apply(deferred, value)  # type: ignore[no-untyped-call]
        deferred.node = deferred.grad_fn


def _name(func: Callable[..., Any]) -> str:
    name = func.__name__
    return func.__self__.__name__ if name == "__get__" else name  # type: ignore[attr-defined]  # an attribute's


def _loss(
    logits: _Logits,
    target: Any,
    weight: torch.Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Any:
    shape, device, dtype = logits.shape, logits.device, logits.dtype
    autocasts = _autocasts(logits.source)
    indices = type(target) is torch.Tensor and target.dtype == torch.int64 and target.device == device
    if not indices or target.shape != (shape[0], *shape[2:]) or size_average is not None or reduce is not None:
        return NotImplemented
    if reduction not in _REDUCTIONS or not 0 <= label_smoothing <= 1:
        return NotImplemented
    if weight is not None and (
        weight.shape != shape[1:2]
        or weight.device != device
        or weight.requires_grad
        or not (weight.dtype == dtype or (autocasts and {weight.dtype, dtype} <= _CAST_DOWN))
    ):
        return NotImplemented
    loss = upsample_cross_entropy(
        logits.source, target, weight, ignore_index, reduction, label_smoothing, logits.align_corners
    )
    logits.used.losses += 1
    return loss.to(accumulation_dtype(dtype) if autocasts else dtype)


def _argmax(logits: _Logits, dim: int | None = None, keepdim: bool = False, **other: Any) -> Any:
    if dim not in _CLASS_AXIS or other:
        return NotImplemented
    labels = upsample_argmax(logits.source, logits.shape[2:], logits.align_corners, dtype=torch.int64)
    logits.used.labels += 1
    assert isinstance(labels, torch.Tensor)
    return labels.unsqueeze(1) if keepdim else labels


def _max(logits: _Logits, dim: Any = None, keepdim: bool = False, **other: Any) -> Any:
    labels = _argmax(logits, dim, keepdim, **other) if type(dim) is int else NotImplemented
    if labels is NotImplemented:
        return NotImplemented
    compute = logits.compute

    def values(source: torch.Tensor) -> torch.Tensor:
        return compute(source).max(1, keepdim).values

    return torch.return_types.max((_defer_like(_Deferred, logits, values, labels.shape, logits.dtype), labels))


def _topk(logits: _Logits, k: int, dim: int = -1, largest: bool = True, sorted: bool = True, **other: Any) -> Any:  # noqa: A002
    """Of one: the maximum, as mmsegmentation's accuracy asks for it."""
    pair = _max(logits, dim, keepdim=True, **other) if k == 1 and largest else NotImplemented
    return pair if pair is NotImplemented else torch.return_types.topk(tuple(pair))


def _contiguous(logits: _Logits, memory_format: torch.memory_format = torch.contiguous_format) -> Any:
    """Itself where it would be in NCHW order already, as PyTorch's; where memory does not tell, PyTorch's."""
    source, compute = logits.source, logits.compute
    if memory_format != torch.contiguous_format:
        return NotImplemented
    if not source.is_contiguous(memory_format=torch.channels_last):
        return logits
    if source.is_contiguous():
        return NotImplemented
    return _defer_like(_Logits, logits, lambda small: compute(small).contiguous(), logits.shape, logits.dtype)


def _float(logits: _Logits, **other: Any) -> Any:
    """Of 16 bits, too: the loss is computed in float32."""
    compute = logits.compute
    if other or logits.dtype == torch.float64:
        return NotImplemented
    if logits.dtype == torch.float32:
        return logits
    return _defer_like(_Logits, logits, lambda small: compute(small).float(), logits.shape, torch.float32)


def _defer_like(
    kind: type[_Deferred], logits: _Logits, compute: Compute, shape: tuple[int, ...], dtype: torch.dtype
) -> Any:
    return _defer(kind, logits.source, compute, shape, dtype, logits.used, logits.align_corners)


_REDUCTIONS = ("mean", "sum", "none")
_CLASS_AXIS = (1, -3)
_CAST_DOWN = {torch.float32, torch.bfloat16, torch.float16}  # what autocast brings to one dtype

_T = torch.Tensor
_KNOWN = {
    *(_T.size, _T.dim, _T.ndimension, _T.numel, _T.nelement, _T.is_floating_point, _T.__len__),
    *(torch.numel, torch.is_floating_point),
    *(getattr(_T, name).__get__ for name in ("shape", "ndim", "dtype", "device", "layout", "requires_grad", "is_cuda")),
}
_FROM_LOGITS: dict[Callable[..., Any], Callable[..., Any]] = {
    F.cross_entropy: _loss,
    **dict.fromkeys((_T.argmax, torch.argmax), _argmax),
    **dict.fromkeys((_T.max, torch.max), _max),
    **dict.fromkeys((_T.topk, torch.topk), _topk),
    _T.contiguous: _contiguous,
    _T.float: _float,
}

# Dynamo (torch 2.13), where a compiled function breaks its graph in the block, compiles these two as functions of their own,
# and then takes one `func` for another: it does not guard it. They may be traced, but never compiled by themselves.
for _handler in (_Deferring.__torch_function__, _Deferred.__torch_function__.__func__):  # type: ignore[attr-defined]
    set_code_exec_strategy(_handler.__code__, _FrameExecStrategy(_FrameAction.SKIP, _FrameAction.SKIP))
