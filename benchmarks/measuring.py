"""How a row is measured: a correctness gate, then rounds in which plain PyTorch and the provider take turns.

Every round runs eager PyTorch in the same memory format once, then the provider once: the ratio of the two medians is what
the machine's other load disturbs least.
"""

from __future__ import annotations

import copy
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from workloads import FORMATS

import pspnet_fast
from pspnet_fast import testing, use_backend

ROWS: list[dict[str, Any]] = []  # what was measured, in this order: conftest.py prints them


def synchronise(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _rounds(plain: float, ours: float, quick: bool) -> int:
    """How often to measure what takes so many seconds.

    60 times at most, 5 at least, and 15 where that does not take minutes. In the quick set as often as goes into two seconds,
    3 times at least. A whole network's training step, of more than ten seconds, 3 times.
    """
    if quick:
        return max(3, min(60, int(2 / (plain + ours))))
    return max(3 if plain > 10 else 5, min(60, int(3 / plain)), min(15, int(30 / plain)))


def _seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def parameters_as_tensors(module: torch.nn.Module) -> Callable[..., Any]:
    """The module as a function of its argument (or tuple of them) and its parameters, in their dtype: in float64, too."""
    names = [name for name, _ in module.named_parameters()]
    modules = {torch.float64: copy.deepcopy(module).double()}

    def call(x: torch.Tensor | tuple[torch.Tensor, ...], *parameters: torch.Tensor) -> Any:
        chosen = modules.get(parameters[0].dtype, module)
        return torch.func.functional_call(chosen, dict(zip(names, parameters, strict=True)), x)

    return call


def gate(
    function: Callable[..., torch.Tensor],
    plain: Callable[..., torch.Tensor],
    tensors: Sequence[torch.Tensor],
    cotangent: torch.Tensor | None,
) -> None:
    """No time of ours without the accuracy rule being met in the same run."""
    results = testing.evaluate(function, tensors, cotangent)
    same_dtype = testing.evaluate(plain, tensors, cotangent)
    exact = testing.evaluate(plain, [t.double() for t in tensors], None if cotangent is None else cotangent.double())
    for i, parts in enumerate(zip(results, same_dtype, exact, strict=True)):
        testing.assert_within(*parts, "value" if i == 0 else f"gradient {i - 1}")


class Measure:
    """Gate, then time, one provider at one workload."""

    def __init__(self, benchmark: Any, device: str, quick: bool) -> None:
        self.benchmark, self.device, self.quick = benchmark, device, quick

    def __call__(
        self,
        work: str,
        provider: str,
        memory_format: str,
        ours: Callable[..., torch.Tensor],
        plain: Callable[..., torch.Tensor],
        tensors: Sequence[torch.Tensor],
        ops: Sequence[str],
        moved: int,
        backward: bool = False,
        compiled: Callable[..., torch.Tensor] | None = None,
        gated: tuple[Callable[..., torch.Tensor], Callable[..., torch.Tensor]] | None = None,
    ) -> None:
        """Measure `provider` against `plain`.

        Args:
            work: what is measured, with its workload: the rows of one kind.
            provider: "eager", "compile" (of `compiled`, or of `plain`) or one of our backends.
            memory_format: a key of FORMATS; `tensors` are in it already.
            ours: our function of the tensors.
            plain: PyTorch's, the baseline.
            tensors: arguments, on the device; with `backward`, what gradients are taken of.
            ops: the ops of ours that run.
            moved: bytes that must move, for GB/s.
            backward: whether a backward pass belongs to the work.
            compiled: what torch.compile gets, where it cannot take `plain`.
            gated: what the gate compares, where it is not `ours` and `plain`: a value that tells more than labels do.
        """
        if provider not in ("eager", "compile"):
            for op in ops:
                if reason := testing.unavailable(op, provider, tensors[0].dtype):
                    pytest.skip(f"{provider}: {reason}")
        function = {"eager": plain, "compile": compiled or plain}.get(provider, ours)
        if provider == "compile":
            torch.compiler.reset()
            function = torch.compile(function, fullgraph=True)
        backend = provider if provider not in ("eager", "compile") else None
        leaves = [t.detach().requires_grad_(backward) for t in tensors]
        cotangent = torch.randn_like(plain(*tensors).detach()) if backward else None
        if cotangent is not None and cotangent.dim() == 4:
            # As the layer that follows gives it: in the features' format, whatever format the output came in.
            cotangent = cotangent.contiguous(memory_format=FORMATS[memory_format])

        def call(function: Callable[..., torch.Tensor]) -> None:
            if backward:
                torch.autograd.grad(function(*leaves), leaves, cotangent)
            else:
                with torch.inference_mode():
                    function(*leaves)
            synchronise(self.device)

        with use_backend(backend):
            if backend:
                gate(*(gated or (function, plain)), tensors, cotangent)
            if self.benchmark.disabled:  # --benchmark-disable: the gates alone
                self.benchmark.pedantic(call, args=(function,))
                return
            for _ in range(3):
                if (warm := _seconds(lambda: call(function))) > 1 and provider != "compile":
                    break  # what takes so long hides what the first call does besides
            memory = testing.peak_memory(lambda: call(function), self.device)
            baseline: list[float] = []

            def before_each_round() -> None:
                with use_backend(None):
                    baseline.append(_seconds(lambda: call(plain)))

            rounds = _rounds(_seconds(lambda: call(plain)), warm, self.quick)
            self.benchmark.group = f"{work}, {memory_format}"
            self.benchmark.pedantic(call, args=(function,), setup=before_each_round, rounds=rounds)
        median = self.benchmark.stats.stats.median
        row = {
            "work": work,
            "format": memory_format,
            "provider": provider,
            "ms": 1e3 * median,
            "ratio": statistics.median(baseline) / median,
            "GB/s": moved / median / 1e9,
            "MB": memory / 1e6,
        }
        self.benchmark.extra_info.update(row)
        ROWS.append(row)


def machine(device: str) -> str:
    if device == "cuda":
        name = torch.cuda.get_device_name()
    else:
        with open("/proc/cpuinfo") as info:
            models = [line.split(":", 1)[1].strip() for line in info if line.startswith("model name")]
        name = f"{models[0] if models else platform.processor()}, {torch.get_num_threads()} threads"
    return (
        f"{name}; torch {torch.__version__}, pspnet_fast {pspnet_fast.__version__}, Python {platform.python_version()}"
    )
