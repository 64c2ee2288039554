"""The command line of the benchmarks, and what they print: each row as soon as it is measured, and a table at the end.

    pytest benchmarks --benchmark-only                          the quick set: under five minutes on two cores
    pytest benchmarks --benchmark-only --set all                everything: torch.compile, other people's modules, networks
    pytest benchmarks/bench_ppm.py --benchmark-only             all of a file
    pytest benchmarks --benchmark-only --workload resnet18_473  another shape of workloads.py

The summary is a Markdown table, with the machine in its heading. With --benchmark-disable the gates run alone, without times.
"""

from __future__ import annotations

import os

os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # workers of a cold compilation would share our cores

from pathlib import Path
from typing import Any

import pytest
import selection
import torch
from measuring import ROWS, Measure, machine
from workloads import FORMATS, WORKLOADS, seed_of

HERE = Path(__file__).parent
LEGEND = (
    "provider: who computed; cpu, cuda and triton are ours. ms: the median time. times eager's speed: plain PyTorch's median",
    "time, taken in turns with it, over that. GB/s: the bytes that must move, over that. peak extra MB: what tensors take at",
    "most beyond the inputs, the result included. Wrong results have no row: an accuracy gate comes before each time.",
)


class Printed:
    """How much of this session has been printed."""

    reporter: Any = None
    benchmarks: tuple[str, ...] = ()  # node ids, in the order in which they run
    left_out = 0
    rows = 0


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("pspnet_fast")
    names = ", ".join(WORKLOADS)
    group.addoption(
        "--set",
        choices=selection.SETS,
        default=None,
        help="which benchmarks run (default: quick; all of those in a file that is named, or chosen by -k or -m)",
    )
    group.addoption("--workload", action="append", default=[], help=f"one of {names}, or all (default ade20k_473)")
    group.addoption(
        "--provider",
        action="append",
        default=[],
        choices=("eager", "compile", "cpu", "cuda", "triton"),
        help="who is measured, several times for several (default: our backends in the quick set, else all)",
    )
    group.addoption("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    group.addoption("--dtype", default=None, help="default bfloat16 on cuda, float32 on cpu")


def pytest_configure(config: pytest.Config) -> None:
    """The quick set has rows and a table of its own: --benchmark-verbose prints pytest-benchmark's, too, one for each row."""
    if selection.quick_alone(config):
        config.option.benchmark_quiet = True


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    config = metafunc.config
    if "workload" in metafunc.fixturenames:
        standard = getattr(metafunc.function, "standard_workload", "ade20k_473")
        chosen = config.getoption("--workload") or [standard]
        metafunc.parametrize("workload", list(WORKLOADS) if "all" in chosen else chosen)
    if "memory_format" in metafunc.fixturenames:
        metafunc.parametrize("memory_format", list(FORMATS))
    if "provider" in metafunc.fixturenames:
        chosen = selection.providers(config.getoption("--device"), config.getoption("--provider"))
        metafunc.parametrize("provider", chosen)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests that run beside the benchmarks keep their places."""
    places = [i for i, item in enumerate(items) if item.path.is_relative_to(HERE)]
    benchmarks = [items[i] for i in places]
    kept = sorted((item for item in benchmarks if selection.chosen(item, config)), key=selection.order)
    left_out = [item for item in benchmarks if item not in kept]
    for i, item in zip(places, kept, strict=False):
        items[i] = item
    for i in reversed(places[len(kept) :]):
        del items[i]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
    Printed.reporter = config.pluginmanager.get_plugin("terminalreporter")
    Printed.benchmarks, Printed.left_out = tuple(item.nodeid for item in kept), len(left_out)


def pytest_report_collectionfinish() -> list[str]:
    if not Printed.left_out:
        return []
    count, every = len(Printed.benchmarks), len(Printed.benchmarks) + Printed.left_out
    return [f"the quick set: {count} of {every} benchmarks; --set all, a file's name, or -k runs the others"]


@pytest.fixture
def device(request: pytest.FixtureRequest) -> str:
    return request.config.getoption("--device")


@pytest.fixture
def dtype(request: pytest.FixtureRequest, device: str) -> torch.dtype:
    name = request.config.getoption("--dtype") or ("bfloat16" if device == "cuda" else "float32")
    return getattr(torch, name)


@pytest.fixture(autouse=True)
def _seed(request: pytest.FixtureRequest) -> None:
    """Of the work alone: every provider, in either memory format, gets the same numbers, in whatever order they run."""
    parameters = getattr(request.node, "callspec", None)
    given = {} if parameters is None else parameters.params
    work = [f"{name}={given[name]}" for name in sorted(given) if name not in ("provider", "memory_format")]
    torch.manual_seed(seed_of(request.node.path.stem, request.node.originalname, *work))


@pytest.fixture
def measure(request: pytest.FixtureRequest, benchmark: Any, device: str) -> Measure:
    return Measure(benchmark, device, quick=Printed.left_out > 0)


def pytest_report_teststatus(report: pytest.TestReport) -> tuple[str, str, str] | None:
    """Rows stand for the dots; -v prints pytest's words as ever."""
    if report.nodeid not in Printed.benchmarks or (report.when != "call" and report.passed):
        return None
    return report.outcome, "", report.outcome.upper()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_logstart(nodeid: str, location: tuple[str, int | None, str]) -> None:
    """A number before the benchmark begins, so that a slow one is seen to run, where pytest would write the file's name."""
    if nodeid in Printed.benchmarks and Printed.reporter.verbosity <= 0:
        place, count = Printed.benchmarks.index(nodeid) + 1, len(Printed.benchmarks)
        Printed.reporter.ensure_newline()
        Printed.reporter.write(f"[{place:>{len(str(count))}}/{count}] ", flush=True)
        Printed.reporter.currentfspath = Printed.reporter.config.rootpath / location[0]  # as if it were written


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Between the phases of a test nothing is captured: what is written here is seen at once."""
    if report.nodeid not in Printed.benchmarks:
        return
    if report.failed:
        reason = getattr(getattr(report.longrepr, "reprcrash", None), "message", "no reason")
        _line(f"failed in its {report.when}: {reason.splitlines()[0]}")
    elif report.skipped:
        _line(f"skipped: {report.longrepr[2].removeprefix('Skipped: ')}")
    elif report.when == "call":
        for row in ROWS[Printed.rows :]:
            _line(
                f"{row['work']}, {row['format']}, {row['provider']}: {row['ms']:.2f} ms, "
                f"{row['ratio']:.2f} times as fast as {row.get('baseline', 'eager PyTorch')}"
            )
        if len(ROWS) == Printed.rows:
            _line("the gate holds")
        Printed.rows = len(ROWS)


def _line(text: str) -> None:
    """A line of its own with -v, else the rest of the one with the number."""
    if Printed.reporter.verbosity <= 0:
        Printed.reporter.currentfspath = None
    Printed.reporter.write_line(text)
    Printed.reporter.flush()


@pytest.hookimpl(trylast=True)
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
        rest = " | ".join(f"{row[key]:.1f}" if key in row else "" for key in ("GB/s", "MB"))
        write(
            f"| {row['work']} | {row['format']} | {row['provider']} | {row['ms']:.2f} | {row['ratio']:.2f} | {rest} |"
        )
    write("")
    for line in LEGEND:
        write(line)
    for name, shape in WORKLOADS.items():
        if any(name in row["work"].replace(",", "").split() for row in ROWS):
            write(f"{name}: features {'x'.join(map(str, shape.size))}, {shape.reason}")
