"""`pytest benchmarks`: what runs by default, that a row is seen when it is there, and that no gate fails by chance or passes by mistake."""

import copy
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from pspnet_fast import PPM, backends, testing, use_backend
from pspnet_fast.nn.plain_ppm import PlainPPM

ROOT = Path(__file__).parents[1]

# Small features in place of the real ones; on request, a norm that is off by 0.1 %, and a second benchmark that waits.
PLUGIN = """
import os, pathlib, time
import workloads
from pspnet_fast import functional

for name in ("ade20k_473", "ade20k_473_pair"):
    workloads.WORKLOADS[name] = workloads.Workload(2, 64, 13, 10, 32, "small")
if os.environ.get("BREAK"):
    right = functional.pyramid_norm
    functional.pyramid_norm = lambda *a, **k: right(*a, **k) * 1.001

def pytest_runtest_setup(item, seen=[]):
    seen.append(item)
    give_up = time.monotonic() + 60
    while len(seen) == 2 and "WAIT" in os.environ and not pathlib.Path(os.environ["WAIT"]).exists():
        assert time.monotonic() < give_up
        time.sleep(0.05)
"""


def command(*arguments):
    return [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--device", "cpu", *map(str, arguments)]


def collected(*arguments):
    """(file, function, parameters) of what would run, and the other lines."""
    run = subprocess.run(command("--collect-only", "-q", *arguments), cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    lines = run.stdout.splitlines()
    rows = [line.removeprefix("benchmarks/") for line in lines if "::" in line]
    return [tuple(row.rstrip("]").replace(".py::", "[").split("[")) for row in rows], lines


@pytest.fixture
def small(tmp_path, monkeypatch):
    """Where a plugin `small` makes the benchmarks' features small."""
    (tmp_path / "small.py").write_text(PLUGIN)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), str(ROOT / "benchmarks")]))
    return tmp_path


needs_kernels = pytest.mark.skipif(
    testing.unavailable("pyramid_norm", "cpu") is not None, reason="the compiled extension is not built"
)


def test_the_quick_set():
    """The PPM first, then the ops, head, loss and labels; a row for every op; no torch.compile, no whole network."""
    rows, lines = collected("benchmarks")
    names = [(file, function) for file, function, *_ in rows]
    assert len(rows) <= 24
    assert names[:4] == [("bench_ppm", "bench_evaluation")] * 2 + [("bench_ppm", "bench_training")] * 2
    assert names[-2:] == [("bench_upsample_argmax", "bench_labels")] * 2
    groups = ["pyramid_norm", "upsample_concat", "psp_head", "upsample_cross_entropy", "upsample_argmax"]
    places = [[file for file, _ in names].index(f"bench_{name}") for name in groups]
    assert places == sorted(places)
    assert {f"bench_{op}" for op in backends.ops()} <= {file for file, _ in names}
    assert all("cpu" in parameters.split("-") for *_, parameters in rows)
    assert not {"bench_pspnet", "bench_train", "bench_evaluate", "bench_export", "bench_integrations"} & {
        file for file, _ in names
    }
    assert any(line.startswith(f"the quick set: {len(rows)} of ") and "--set all" in line for line in lines)


def test_everything():
    """Whole networks last, torch.compile after everybody else; what is quick stays first."""
    rows, lines = collected("benchmarks", "--set", "all")
    assert len(rows) > 200
    assert not any(line.startswith("the quick set") for line in lines)
    assert rows[0][:2] == ("bench_ppm", "bench_evaluation")
    networks = [file in ("bench_pspnet", "bench_train", "bench_evaluate", "bench_export") for file, *_ in rows]
    assert networks == sorted(networks)
    assert any(networks)
    compiled = [
        "compile" in parameters
        for row, network in zip(rows, networks, strict=True)
        if not network
        for parameters in row[2:]
    ]
    assert compiled == sorted(compiled)
    assert any(compiled)


@pytest.mark.parametrize(
    ("arguments", "count"),
    [
        (["benchmarks/bench_ppm.py"], 12),
        (["benchmarks/bench_ppm.py::bench_training"], 6),
        (["benchmarks/bench_ppm.py", "--set", "quick"], 4),
        (["benchmarks/bench_ppm.py", "--provider", "compile", "--provider", "cpu"], 8),
        (["benchmarks", "-k", "bench_ppm and compile"], 4),
        (["benchmarks", "tests/test_files.py", "-k", "bench_pyramid_norm or symlink"], 3),
    ],
    ids=["file", "function", "set", "provider", "expression", "beside_tests"],
)
def test_what_is_named_runs(arguments, count):
    """All of a named file, as ever; tests that are collected in the same run keep out of it."""
    rows, _ = collected(*arguments)
    assert sum(row[0].startswith("bench_") for row in rows) == count


@needs_kernels
def test_a_row_is_seen_when_it_is_there(small, monkeypatch):
    """The second benchmark begins when somebody has read the first one's row; with pytest's capture on and -q."""
    monkeypatch.setenv("WAIT", str(small / "seen"))
    report = small / "report.json"
    arguments = ["-q", "-p", "small", "--set", "quick", "--benchmark-only", "--benchmark-json", report]
    files = ["benchmarks/bench_pyramid_pool.py", "benchmarks/bench_pyramid_norm.py"]
    with subprocess.Popen(command(*arguments, *files), cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        lines = []
        for line in process.stdout:
            lines.append(line)
            if line.startswith("[1/3] pyramid_norm forward + backward") and "ms, " in line:
                (small / "seen").touch()
    assert process.returncode == 0, "".join(lines)
    assert sum(line.startswith("[") and "times as fast as eager PyTorch" in line for line in lines) == 3
    table = [line for line in lines if line.startswith("| pyramid")]
    assert [line.split("|")[2].strip() for line in table] == ["nchw", "nchw", "channels_last"]
    saved = json.loads(report.read_text())["benchmarks"]
    assert {key for each in saved for key in each["extra_info"]} == {
        "work",
        "format",
        "provider",
        "ms",
        "ratio",
        "GB/s",
        "MB",
    }


@needs_kernels
@pytest.mark.parametrize("mode", ["--benchmark-only", "--benchmark-disable"])
def test_a_wrong_result_has_no_row(small, monkeypatch, mode):
    arguments = ["-p", "small", mode, "--provider", "cpu", "benchmarks/bench_pyramid_norm.py"]
    right = subprocess.run(command(*arguments), cwd=ROOT, capture_output=True, text=True)
    assert right.returncode == 0, right.stdout
    assert ("the gate holds" in right.stdout) == (mode == "--benchmark-disable")
    monkeypatch.setenv("BREAK", "1")
    wrong = subprocess.run(command(*arguments), cwd=ROOT, capture_output=True, text=True)
    assert wrong.returncode == 1, wrong.stdout
    assert "[1/1] failed in its call: AssertionError: value: " in wrong.stdout
    assert "ms, " not in wrong.stdout
    assert "| work |" not in wrong.stdout


def drawn(seed, channels, bins=(1, 2, 3, 6), size=(12, 12), batch=2):
    """Features and a plain PPM as a training row's gate gets them, before they are cleared of kinks."""
    torch.manual_seed(seed)
    return torch.randn(batch, channels, *size), PlainPPM(channels, 64, bins).train()


def before_relu(plain, x):
    """Of each level, its values in float64 (N, R, b, b)."""
    wide = copy.deepcopy(plain).double()
    return [level[:3](x.double()) for level in wide.features]


def test_rounding_decides_no_relu():
    """Over 300 draws: without care the nearest to zero is a few rounding steps away, with it a sixtieth at least."""
    careless, careful = [], []
    for seed in range(300):
        x, plain = drawn(seed, 8)
        with torch.no_grad():
            careless.append(min(float(y.abs().min()) for y in before_relu(plain, x)))
            testing.clear_of_kinks(plain, x)
            careful.append(min(float(y.abs().min()) for y in before_relu(plain, x)))
    assert min(careless) < 1e-6
    assert min(careful) > 1 / 64
