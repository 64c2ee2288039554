"""`pytest benchmarks`: what runs by default, that a row is seen at once, that no gate fails by chance or passes by mistake."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from measuring import parameters_as_tensors
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


@pytest.fixture(autouse=True)
def _by_itself(monkeypatch):
    """pytest-benchmark measures nothing in what it takes for a worker of pytest-xdist."""
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)


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
        (["benchmarks/bench_ppm.py", "--set", "quick"], 4),
        (["benchmarks/bench_ppm.py", "--provider", "compile", "--provider", "cpu"], 8),
        (["benchmarks", "tests/test_files.py", "-k", "bench_pyramid_norm or replacing"], 3),
    ],
    ids=["file", "set", "provider", "beside_tests"],
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
            if line.startswith("[1/3] pyramid_pool forward + backward") and "ms, " in line:
                (small / "seen").touch()
    assert process.returncode == 0, "".join(lines)
    assert sum(line.startswith("[") and "times as fast as eager PyTorch" in line for line in lines) == 3
    table = [line for line in lines if line.startswith("| pyramid")]
    assert [line.split("|")[2].strip() for line in table] == ["nchw", "channels_last", "nchw"]
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


def drawn(seed, channels=64, reduced=64, bins=(1, 2, 3, 6)):
    """Two images and a plain PPM, as a training row's gate has them before they are cleared of kinks.

    Of 12x12 positions, but with means of the size of 60x60's: d of bin 1 is about twice the root of eps there.
    """
    torch.manual_seed(seed)
    return torch.randn(2, channels, 12, 12) / 5, PlainPPM(channels, reduced, bins).train()


def nearest_to_zero(plain, x):
    """Of all that the levels' ReLUs are given, in float64."""
    wide = copy.deepcopy(plain).double()
    with torch.no_grad():
        return min(float(level[:3](x.double()).abs().min()) for level in wide.features)


def test_rounding_decides_no_relu():
    """Over 300 draws: without care the nearest to zero is some rounding steps away, with it a sixtieth at least."""
    careless, careful = [], []
    for seed in range(300):
        x, plain = drawn(seed, channels=8)
        careless.append(nearest_to_zero(plain, x))
        testing.clear_of_kinks(plain, x)
        careful.append(nearest_to_zero(plain, x))
    assert min(careless) < 1e-5
    assert min(careful) > 1 / 64


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("norm", [nn.BatchNorm2d, lambda c: nn.GroupNorm(2, c), None], ids=["batch", "group", "none"])
def test_zero_is_in_a_gap_whatever_the_norm(norm, dtype):
    """Also without one, where it is the convolution's bias that is moved; and with values that are all alike."""
    conv = nn.Conv2d(6, 8, 1, bias=norm is None)
    level = nn.Sequential(nn.AdaptiveAvgPool2d(2), conv, *([] if norm is None else [norm(8)])).to(dtype)
    for x in (torch.randn(3, 6, 9, 7).to(dtype), torch.randn(1, 6, 9, 7).to(dtype).expand(3, -1, -1, -1)):
        testing.clear_of_kinks(level, x)
        y = copy.deepcopy(level).double()(x.double())
        assert y.abs().min() > y.std() / 64
        assert (y > 0).any()


def cut_by_chance(plain, x):
    """Make the first channel of bin 1 alike in both images, to within rounding."""
    first, second = x.mean((2, 3))
    with torch.no_grad():
        weight, difference = plain.features[0][1].weight[0, :, 0, 0], first - second
        weight -= (weight @ difference) / difference.square().sum() * difference


def test_two_images_are_told_apart():
    """In every channel of bin 1, however alike they were."""
    x, plain = drawn(0)
    cut_by_chance(plain, x)

    def half_differences():
        with torch.no_grad():
            y = copy.deepcopy(plain).double().features[0][:2](x.double())
        return ((y[0] - y[1]) / 2).abs()

    before = half_differences()
    testing.clear_of_kinks(plain, x)
    after = half_differences()
    assert before[0] < 1e-5 * before.max()
    assert after.min() > 0.4 * after.square().mean().sqrt()
    assert after.max() == pytest.approx(float(before.max()), rel=1e-5)


def compared(seed, careful):
    """Value and gradients, of the images and of every parameter: ours, plain PyTorch's, and in float64."""
    x, plain = drawn(seed)
    cut_by_chance(plain, x)
    if careful:
        testing.clear_of_kinks(plain, x)
    ours = PPM(64, 64).train()
    ours.load_state_dict(plain.state_dict())
    cotangent, tensors = torch.randn(2, 5 * 64, 12, 12), [x, *plain.parameters()]
    with use_backend("cpu"):
        results = testing.evaluate(parameters_as_tensors(ours), tensors, cotangent)
    function = parameters_as_tensors(plain)
    wide = testing.evaluate(function, [t.double() for t in tensors], cotangent.double())
    return results, testing.evaluate(function, tensors, cotangent), wide


def holds(runs):
    """The accuracy rule over all of some runs, where the largest error of plain PyTorch's is no accident of one of them."""
    try:
        for parts in zip(*(map(torch.stack, zip(*each, strict=True)) for each in zip(*runs, strict=True)), strict=True):
            testing.assert_within(*parts)
    except AssertionError:
        return False
    return True


@needs_kernels
def test_no_gate_fails_by_chance():
    """Where a channel's two values are alike, rounding decides, here so and there so. Not where care is taken."""
    assert not all(holds([compared(seed, careful=False)]) for seed in range(40))
    runs = [compared(seed, careful=True) for seed in range(40)]
    assert holds(runs)
    for (
        _,
        plain,
        exact,
    ) in runs:  # where a ReLU were decided otherwise, plain PyTorch would be off by as much as a value
        assert float((plain[1] - exact[1]).abs().max() / exact[1].abs().max()) < 1e-3
