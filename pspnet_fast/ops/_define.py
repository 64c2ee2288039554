"""How an op enters torch, and how it is differentiated.

An op has one schema, one implementation for all devices (it asks `backends` which) and one fake; what it writes in place has
its version counted, as of PyTorch's own ops, so that autograd sees who saved a tensor that was changed since.

First derivatives are kernels. A second one is asked for by `create_graph=True`, which runs a backward in grad mode:

- A linear or bilinear op's backward is an op with a formula of its own, made of the same ops: the backward of a gather is the
  forward. So derivatives of any order run on the same kernels.
- What is not linear (norms, losses) computes its gradient in plain PyTorch then (`plain_gradient`), which torch
  differentiates on. In an ordinary backward it is the kernel's.
- What has neither says so when it is differentiated twice (`once`).

Forward mode, `torch.func`, `torch.jit.trace` and `torch.onnx.export` look into a call, and cannot look into a kernel. While
one is active (`tracing.is_transformed`) the public functions compute in plain PyTorch, by the reference (`plain`). An op
itself, as in an exported program, refuses forward mode, which would take its derivative for zero.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

import torch
from torch.autograd import forward_ad
from torch.autograd.graph import increment_version

from ..backends import Refusal, find

LIBRARY = torch.library.Library("pspnet_fast", "DEF")


def define(schema: str, implementation: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """Register `torch.ops.pspnet_fast.<name>` and return it.

    Args:
        schema: the op's signature, such as "pyramid_pool(Tensor x, int[] bins) -> Tensor".
        implementation: computes it, on any device.
        fake: returns empty tensors of the same shapes, dtypes and strides.
    """
    name = schema.partition("(")[0]
    # Output strides follow input strides, so a compiler may not change the latter.
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides))
    LIBRARY.impl(name, _without_forward_mode(name, implementation), "CompositeExplicitAutograd")
    torch.library.register_fake(f"pspnet_fast::{name}", fake, lib=LIBRARY)
    op = getattr(torch.ops.pspnet_fast, name).default
    if op._schema.is_mutable:
        LIBRARY.impl(name, _counting_versions(op), "ADInplaceOrView", with_keyset=True)
    else:
        torch.library.register_vmap(op, functools.partial(_one_by_one, op), lib=LIBRARY)
    return op


def _one_by_one(op: Any, info: Any, in_dims: Sequence[Any], *args: Any) -> tuple[Any, Any]:
    """A batch of backwards of one forward, as `is_grads_batched` asks for: a call for each."""
    results = [op(*(_of_sample(i, *pair) for pair in zip(args, in_dims, strict=True))) for i in range(info.batch_size)]
    if isinstance(results[0], torch.Tensor):
        return torch.stack(results), 0
    return tuple(torch.stack(each) for each in zip(*results, strict=True)), (0,) * len(results[0])


def _of_sample(i: int, argument: Any, dim: Any) -> Any:
    if isinstance(dim, (list, tuple)):
        return [_of_sample(i, *pair) for pair in zip(argument, dim, strict=True)]
    return argument if dim is None else argument.select(dim, i)


def _without_forward_mode(name: str, implementation: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(implementation)
    def compute(*args: Any) -> Any:
        if forward_ad._current_level >= 0:
            raise NotImplementedError(
                f"{name}: forward-mode derivatives must be taken of pspnet_fast.functional and its modules, "
                "got the op itself"
            )
        return implementation(*args)

    return compute


def _counting_versions(op: Any) -> Callable[..., Any]:
    """What torch's own in-place ops do below autograd. Inference tensors have no version."""
    written = [i for i, argument in enumerate(op._schema.arguments) if argument.is_write]

    def count(keyset: Any, *args: Any) -> Any:
        for i in written:
            tensors = args[i] if isinstance(args[i], (list, tuple)) else [args[i]]
            increment_version([tensor for tensor in tensors if not tensor.is_inference()])
        with torch._C._AutoDispatchBelowADInplaceOrView():
            return op.redispatch(keyset & torch._C._after_ADInplaceOrView_keyset, *args)

    return count


def plain(op: str, direction: str) -> Callable[..., Any]:
    """The reference's `<op>_<direction>`: plain PyTorch, which transforms and tracers can look into. For module level."""
    found = find(op, direction, "reference")
    assert not isinstance(found, Refusal)
    return found


def plain_gradient(
    function: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, grad: torch.Tensor
) -> torch.Tensor:
    """The gradient of `function(x)` by x for a backward in grad mode: itself differentiable, by x and by `grad`."""
    with torch.autocast(grad.device.type, enabled=False):
        return torch.autograd.grad(function(x), x, grad, create_graph=True)[0]


class _Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, sentence: str, count: int, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.sentence = sentence
        return tuple(gradient.view_as(gradient) for gradient in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        raise NotImplementedError(ctx.sentence)


def once(sentence: str, gradients: Sequence[torch.Tensor], inputs: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """Gradients, computed without a graph, for a backward in grad mode: whoever differentiates them gets the sentence.

    Args:
        sentence: of the error.
        gradients: what the backward returns.
        inputs: what they were computed from, and depend on.
    """
    result: tuple[torch.Tensor, ...] = cast(Any, _Once).apply(sentence, len(gradients), *gradients, *inputs)
    return result


def check_writable(op: str, name: str, tensor: torch.Tensor, read: Iterable[tuple[str, torch.Tensor]] = ()) -> None:
    """Raise where PyTorch's own ops would not write in place: see `pyramid_conv2d`'s `out`.

    Args:
        op: whom the sentence is about.
        name: the argument that will be written.
        tensor: what will be written.
        read: other arguments with their names, which must not lie in the same memory.

    Raises:
        RuntimeError: a leaf that requires grad, in grad mode; an inference tensor outside inference mode.
        ValueError: memory shared with what is read.
    """
    if torch.is_grad_enabled() and tensor.requires_grad and tensor.is_leaf:
        raise RuntimeError(f"{op}: {name} is written in place and must not be a leaf that requires grad")
    if torch.compiler.is_compiling():
        return
    if tensor.is_inference() and not torch.is_inference_mode_enabled():
        raise RuntimeError(
            f"{op}: {name} is written in place and must not be an inference tensor outside inference mode"
        )
    for other_name, other in read:
        if _overlap(tensor, other):
            raise ValueError(f"{op}: {name} is written in place and must not share memory with {other_name}")


def _overlap(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether the stretches of memory that two tensors lie in overlap."""
    if torch._C._are_functorch_transforms_active():
        return False  # wrappers have no memory
    if a.numel() == 0 or b.numel() == 0 or a.untyped_storage()._cdata != b.untyped_storage()._cdata:
        return False
    if not (_is_dense(a) and _is_dense(b)):
        return False  # nor does torch look further
    (a_start, a_end), (b_start, b_end) = (_stretch(tensor) for tensor in (a, b))
    return a_start < b_end and b_start < a_end


def _is_dense(tensor: torch.Tensor) -> bool:
    return bool(torch.ops.aten.is_non_overlapping_and_dense(tensor))


def _stretch(tensor: torch.Tensor) -> tuple[int, int]:
    """First byte of a dense tensor and one past the last, in its storage."""
    start, size = int(tensor.storage_offset()), tensor.element_size()
    return start * size, (start + tensor.numel()) * size


def autocast_dtype(tensor: torch.Tensor) -> torch.dtype | None:
    """What autocast computes in on the tensor's device, or None where it is off or the device knows none."""
    device = tensor.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return None


def autocast(tensor: torch.Tensor) -> torch.Tensor:
    """A convolution's operand, in what autocast computes in: never of float64, which autocast leaves as it is."""
    dtype = autocast_dtype(tensor)
    return tensor if dtype is None or tensor.dtype == torch.float64 else tensor.to(dtype)
