"""Which implementation of an op runs: the only module that knows there are several.

`run` is called from inside every op, below autograd and `torch.compile`, once per direction. A backend is found or
refuses with a sentence: chosen automatically, the next one is taken and the sentence logged at debug level; asked for by
name (`use_backend`, or the environment variable PSPNET_FAST_BACKEND), the sentence is raised.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import logging
import os
import pkgutil
import warnings
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any

import torch

from . import reference
from .extras import install
from .preference import preferred

BACKENDS = ("cuda", "triton", "cpu", "reference")

_PACKAGE = __name__.rpartition(".")[0]
_LOG = logging.getLogger(__name__)


class Refusal(str):
    """Why a backend does not run an op. `error` is the exception it becomes when the backend was asked for by name."""

    error: type[Exception] = NotImplementedError


class NotBuilt(Refusal):
    """The backend is not installed, or was not compiled in."""

    error = ImportError


@functools.cache
def load_extension() -> NotBuilt | None:
    """Load the compiled extension, once. Returns None, or the sentence that says how to build it."""
    try:
        importlib.import_module(f"{_PACKAGE}._C")
    except ModuleNotFoundError as error:
        if error.name != f"{_PACKAGE}._C":
            raise
        return NotBuilt(
            "the compiled extension pspnet_fast._C is not built: run `pip install --no-build-isolation .` "
            "in the repository, beside the torch it shall run with"
        )
    return None


def interpreted() -> bool:
    """Whether Triton kernels run in Triton's interpreter, on the CPU: TRITON_INTERPRET=1 before triton is imported."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def emulated() -> str | None:
    """The library that runs the CUDA kernels on the CPU, thread by thread, for tests (tests/emulation), or None.

    PSPNET_FAST_CUDA_EMULATION names it, before the first op is called.
    """
    return os.environ.get("PSPNET_FAST_CUDA_EMULATION") or None


@functools.cache
def _load_emulation(library: str) -> None:
    torch.ops.load_library(library)


def _native(name: str, backend: str) -> Callable[..., Any] | Refusal:
    namespace, key = "pspnet_fast_native", backend.upper()
    if backend == "cuda" and (library := emulated()):
        _load_emulation(library)
        namespace, key = "pspnet_fast_emulated", "CPU"
    elif missing := load_extension():
        return missing
    full = f"{namespace}::{name}"
    if not (torch._C._dispatch_has_kernel(full) and torch._C._dispatch_has_kernel_for_dispatch_key(full, key)):
        if backend == "cuda":
            return NotBuilt(f"pspnet_fast._C was built without CUDA code for {name}")
        return NotBuilt(f"pspnet_fast._C holds no code for {name}: rebuild it from these sources")
    function: Callable[..., Any] = getattr(getattr(torch.ops, namespace), name).default
    return function


def _module(op: str, backend: str) -> Any:
    return importlib.import_module(f"{_PACKAGE}.{'kernels' if backend == 'triton' else 'reference'}.{op}")


@functools.cache
def find(op: str, direction: str, backend: str) -> Callable[..., Any] | Refusal:
    """The function `<op>_<direction>` of a backend, or the sentence why there is none on this machine."""
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    name = f"{op}_{direction}"
    if backend in ("cpu", "cuda"):
        return _native(name, backend)
    try:
        function: Callable[..., Any] = getattr(_module(op, backend), name)
    except ModuleNotFoundError as error:
        if error.name == "triton":
            return NotBuilt(f"triton is not installed: {install('triton')}")
        if error.name == f"{_PACKAGE}.kernels.{op}":
            return Refusal(f"{op} has no Triton kernel")
        raise
    return function


def runs_on(architectures: str, capability: tuple[int, int]) -> bool:
    """Whether code for these architectures, such as "8.0;9.0+PTX", runs on a GPU of this compute capability.

    Machine code runs on its own capability and on later minor ones (with an "a", on its own alone), PTX on all later.
    """
    for name in architectures.replace(";", " ").split():
        number, _, ptx = name.partition("+")
        major, minor = map(int, number.removesuffix("a").split("."))
        if (major, minor) == capability:
            return True
        if (major, minor) < capability and (ptx or (major == capability[0] and not number.endswith("a"))):
            return True
    return False


@functools.cache
def _without_code_for(device: torch.device) -> str | None:
    """Why the extension's CUDA kernels cannot run on this GPU, or None."""
    capability = torch.cuda.get_device_capability(device)
    built = torch.ops.pspnet_fast_native.cuda_architectures()
    if capability >= (8, 0) and runs_on(built, capability):
        return None
    here = "{}.{}".format(*capability)
    if capability < (8, 0):
        return f"the cuda kernels need compute capability 8.0 or later, and {device} has {here}"
    return (
        f"pspnet_fast._C was built for compute capability {built}, and {device} has {here}: "
        f'build it again, with TORCH_CUDA_ARCH_LIST="{here}" in the environment'
    )


def refusal(op: str, backend: str, *args: Any) -> Refusal | None:
    """Why a backend that is installed does not take these arguments, or None. The first argument is a tensor."""
    device, dtype = args[0].device, args[0].dtype
    if backend == "cpu" and device.type != "cpu":
        return Refusal(f"backend cpu runs on cpu tensors, got one on {device}")
    if backend == "cuda":
        if device.type != ("cpu" if emulated() else "cuda"):
            return Refusal(f"backend cuda runs on cuda tensors, got one on {device}")
        if dtype == torch.float64:
            return Refusal(f"backend cuda takes float32, bfloat16 and float16, got {dtype}")
        if device.type == "cuda" and (missing := _without_code_for(device)):
            return NotBuilt(missing)
    if backend == "triton":
        if device.type != "cuda" and not (interpreted() and device.type == "cpu"):
            return Refusal(
                f"backend triton runs on cuda tensors, got one on {device} "
                "(TRITON_INTERPRET=1 in the environment runs it on the CPU, slowly, for tests)"
            )
        if refuses := getattr(_module(op, backend), f"{op}_refuses", None):
            sentence = refuses(*args)
            return None if sentence is None else Refusal(sentence)
    return None


def _consider(op: str, direction: str, backend: str, args: tuple[Any, ...]) -> Callable[..., Any] | Refusal:
    found = find(op, direction, backend)
    if isinstance(found, Refusal):
        return found
    return refusal(op, backend, *args) or found


@functools.cache
def _say_once(sentence: str) -> None:
    warnings.warn(f"pspnet_fast runs slower than it could: {sentence}", RuntimeWarning, stacklevel=2)


_selected: str | None = None


def _candidates(op: str, tensor: torch.Tensor) -> tuple[str, ...]:
    return (_selected,) if _selected else preferred(op, tensor)


def choose(op: str, direction: str, *args: Any) -> tuple[str, Callable[..., Any]]:
    """The backend that runs `op` in this direction for these arguments, and its function."""
    for backend in _candidates(op, args[0]):
        found = _consider(op, direction, backend, args)
        if not isinstance(found, Refusal):
            return backend, found
        if _selected:
            raise found.error(f"{op}: {found}")
        _LOG.debug("%s_%s: not %s: %s", op, direction, backend, found)
        if found is load_extension():
            _say_once(found)
    raise AssertionError("the reference takes every tensor")


def run(op: str, direction: str, *args: Any) -> Any:
    """Call the first implementation of `<op>_<direction>` that takes these arguments."""
    return choose(op, direction, *args)[1](*args)


class _Selection(contextlib.AbstractContextManager[None]):
    """Ends where its `with` block ends; used as a call, it holds."""

    def __init__(self, previous: str | None) -> None:
        self._previous = previous

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        global _selected
        _selected = self._previous


def use_backend(backend: str | None) -> contextlib.AbstractContextManager[None]:
    """Choose the backend of every op: as a call from here on, in a `with` statement up to its end.

    The setting belongs to the process, not to a thread: autograd runs CUDA backward passes on threads of its own.
    `None` goes back to the automatic choice. A backend that cannot run an op raises where the op is called, with the
    reason.

    Raises:
        ValueError: no backend of this name.
    """
    global _selected
    if backend is not None and backend not in BACKENDS:
        raise ValueError(f"use_backend: backend must be one of {', '.join(BACKENDS)} or None, got {backend!r}")
    selection = _Selection(_selected)
    _selected = backend
    return selection


use_backend(os.environ.get("PSPNET_FAST_BACKEND") or None)


def ops() -> list[str]:
    """The names of all ops."""
    return sorted(module.name for module in pkgutil.iter_modules(reference.__path__))


def directions(op: str) -> list[str]:
    """The functions an op is made of: forward, backward and whatever else its reference has."""
    if op not in ops():
        raise ValueError(f"op must be one of {', '.join(ops())}, got {op!r}")
    names = vars(_module(op, "reference"))
    return [name.removeprefix(f"{op}_") for name in names if name.startswith(f"{op}_")]


def _lines(op: str, args: tuple[Any, ...]) -> Iterator[str]:
    for direction in directions(op):
        yield f"{op}_{direction}"
        taken = False
        for backend in BACKENDS:
            answer = _consider(op, direction, backend, args)
            candidate = backend in _candidates(op, args[0])
            if isinstance(answer, Refusal):
                verdict = f"no: {answer}"
            elif candidate and not taken:
                verdict, taken = "runs", True
            else:
                verdict = "could run" if candidate else f"could run, with use_backend({backend!r})"
            yield f"  {backend:<10} {verdict}"


def describe(op: str, *args: Any) -> str:
    """What each backend would do with these arguments, and why not: one block of lines per direction."""
    return "\n".join(_lines(op, args))


def explain(op: str, *args: Any) -> None:
    """Print `describe(op, *args)`: `explain("pyramid_pool", x)`. The first argument is the op's first tensor."""
    print(describe(op, *args))
