"""How the benchmarks measure: a correctness gate, then rounds in which plain PyTorch and the provider take turns.

    pytest benchmarks --benchmark-only                  the standard workload on this machine's default device
    pytest benchmarks --benchmark-only --workload all

Every round runs eager PyTorch in the same memory format once, then the provider once: the ratio of the two medians is what
the machine's other load disturbs least. The summary is a Markdown table, with the machine in its heading.
"""

from __future__ import annotations

import copy
import os

os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # workers of a cold compilation would share our cores

import platform
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from workloads import WORKLOADS

import pspnet_fast
from pspnet_fast import testing, use_backend

FORMATS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}
ROWS: list[dict[str, Any]] = []


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("pspnet_fast")
    names = ", ".join(WORKLOADS)
    group.addoption("--workload", action="append", default=[], help=f"one of {names}, or all (default ade20k_473)")
    group.addoption("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    group.addoption("--dtype", default=None, help="default bfloat16 on cuda, float32 on cpu")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    config = metafunc.config
    device = config.getoption("--device")
    if "workload" in metafunc.fixturenames:
        standard = getattr(metafunc.function, "standard_workload", "ade20k_473")
        chosen = config.getoption("--workload") or [standard]
        metafunc.parametrize("workload", list(WORKLOADS) if "all" in chosen else chosen)
    if "memory_format" in metafunc.fixturenames:
        metafunc.parametrize("memory_format", list(FORMATS))
    if "provider" in metafunc.fixturenames:
        ours = ["cpu"] if device == "cpu" else ["triton", "cuda"]
        metafunc.parametrize("provider", ["eager", "compile", *ours])


@pytest.fixture
def device(request: pytest.FixtureRequest) -> str:
    return request.config.getoption("--device")


@pytest.fixture
def dtype(request: pytest.FixtureRequest, device: str) -> torch.dtype:
    name = request.config.getoption("--dtype") or ("bfloat16" if device == "cuda" else "float32")
    return getattr(torch, name)


def synchronise(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _rounds(seconds: float) -> int:
    """How often to measure what takes so long: 60 times at most, 5 at least, and 15 where that does not take minutes."""
    return max(5, min(60, int(3 / seconds)), min(15, int(30 / seconds)))


def parameters_as_tensors(module: torch.nn.Module) -> Callable[..., Any]:
    """The module as a function of its argument (or tuple of them) and its parameters, in their dtype: in float64, too."""
    names = [name for name, _ in module.named_parameters()]
    modules = {torch.float64: copy.deepcopy(module).double()}

    def call(x: torch.Tensor | tuple[torch.Tensor, ...], *parameters: torch.Tensor) -> Any:
        chosen = modules.get(parameters[0].dtype, module)
        return torch.func.functional_call(chosen, dict(zip(names, parameters, strict=True)), x)

    return call


class Measure:
    """Gate, then time, one provider at one workload."""

    def __init__(self, benchmark: Any, device: str) -> None:
        self.benchmark, self.device = benchmark, device

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
                self.gate(*(gated or (function, plain)), tensors, cotangent)
            for _ in range(3):
                call(function)
            memory = testing.peak_memory(lambda: call(function), self.device)
            baseline: list[float] = []

            def before_each_round() -> None:
                with use_backend(None):
                    start = time.perf_counter()
                    call(plain)
                    baseline.append(time.perf_counter() - start)

            start = time.perf_counter()
            call(plain)
            rounds = _rounds(time.perf_counter() - start)
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

    def gate(
        self,
        function: Callable[..., torch.Tensor],
        plain: Callable[..., torch.Tensor],
        tensors: Sequence[torch.Tensor],
        cotangent: torch.Tensor | None,
    ) -> None:
        """No time of ours without the accuracy rule being met in the same run."""
        results = testing.evaluate(function, tensors, cotangent)
        same_dtype = testing.evaluate(plain, tensors, cotangent)
        exact = testing.evaluate(
            plain, [t.double() for t in tensors], None if cotangent is None else cotangent.double()
        )
        for i, parts in enumerate(zip(results, same_dtype, exact, strict=True)):
            testing.assert_within(*parts, "value" if i == 0 else f"gradient {i - 1}")


@pytest.fixture
def measure(benchmark: Any, device: str) -> Measure:
    return Measure(benchmark, device)


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


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    if not ROWS:
        return
    write = terminalreporter.write_line
    terminalreporter.section("medians, and ratios to eager PyTorch in the same memory format")
    write(machine(config.getoption("--device")))
    write("")
    write("| work | format | provider | ms | times eager's speed | GB/s | peak extra MB |")
    write("|---|---|---|---|---|---|---|")
    for row in ROWS:
        write(
            f"| {row['work']} | {row['format']} | {row['provider']} | {row['ms']:.2f} | {row['ratio']:.2f} "
            f"| {row['GB/s']:.1f} | {row['MB']:.1f} |"
        )
