import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

import pspnet_fast
from pspnet_fast import backends
from pspnet_fast.functional import pyramid_pool
from pspnet_fast.preference import PREFERENCE, Preference, preferred


def run_python(code, **environment):
    """Run code in a fresh interpreter; what it printed, or its exit status and what it said."""
    done = subprocess.run(
        [sys.executable, "-P", "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout if done.returncode == 0 else (done.returncode, done.stderr)


def test_use_backend_as_context_and_as_call():
    x = torch.randn(1, 2, 6, 6)
    automatic, _ = backends.choose("pyramid_pool", "forward", x, (1,))
    with pspnet_fast.use_backend("reference"):
        assert backends.choose("pyramid_pool", "forward", x, (1,))[0] == "reference"
    assert backends.choose("pyramid_pool", "forward", x, (1,))[0] == automatic
    pspnet_fast.use_backend("reference")
    assert backends.choose("pyramid_pool", "forward", x, (1,))[0] == "reference"
    pspnet_fast.use_backend(None)
    assert backends.choose("pyramid_pool", "forward", x, (1,))[0] == automatic


def test_use_backend_reaches_the_threads_of_autograd():
    x = torch.randn(1, 2, 6, 6, requires_grad=True)
    seen = []
    with pspnet_fast.use_backend("reference"):
        y = pyramid_pool(x)
        y.register_hook(lambda grad: seen.append(backends.choose("pyramid_pool", "backward", grad)[0]))
        y.sum().backward()
    assert seen == ["reference"]


def test_unknown_names():
    with pytest.raises(ValueError, match="use_backend: backend must be one of .* got 'gpu'"):
        pspnet_fast.use_backend("gpu")
    with pytest.raises(ValueError, match="op must be one of .* got 'pool'"):
        pspnet_fast.explain("pool", torch.zeros(1, 1, 1, 1))


def test_a_named_backend_that_cannot_run_raises_its_sentence():
    with pspnet_fast.use_backend("cuda"), pytest.raises((ImportError, NotImplementedError), match="^pyramid_pool: "):
        pyramid_pool(torch.zeros(1, 1, 4, 4, dtype=torch.float64))


def test_the_first_row_of_the_table_that_fits_is_taken():
    """Read by what the rows say, not by what happens to stand in them today."""
    rows = [
        Preference("cpu", ("reference",), "here", ops=("pyramid_pool",), channels_last=True, elements=100),
        Preference("cpu", ("triton",), "here", dtypes=(torch.bfloat16,)),
        Preference("cpu", ("cpu",), "here"),
    ]

    def first(op, size, dtype=torch.float32, memory_format=torch.contiguous_format):
        x = torch.empty(size, dtype=dtype).contiguous(memory_format=memory_format)
        return next(row.order[0] for row in rows if row.fits(op, x))

    assert first("pyramid_pool", (1, 4, 5, 5), memory_format=torch.channels_last) == "reference"
    assert first("pyramid_pool", (1, 4, 5, 4), memory_format=torch.channels_last) == "cpu"  # too small
    assert first("pyramid_pool", (1, 4, 5, 5)) == "cpu"  # another memory format
    assert first("upsample_concat", (1, 4, 5, 5), torch.bfloat16, torch.channels_last) == "triton"
    assert not rows[0].fits("pyramid_pool", torch.empty(1, 4, 5, 5, device="meta"))


def test_the_table_names_what_exists():
    for row in PREFERENCE:
        assert set(row.order) <= set(backends.BACKENDS)
        assert set(row.ops) <= set(backends.ops())
        assert row.order[-1] == "reference"
        assert row.evidence
    assert preferred("pyramid_pool", torch.empty(1, 1, 1, 1, device="meta")) == ("reference",)


@pytest.mark.parametrize(
    ("architectures", "capability", "runs"),
    [
        ("8.0;9.0", (8, 0), True),
        ("8.0 9.0", (8, 6), True),  # a later minor one
        ("8.6", (8, 0), False),
        ("8.0", (9, 0), False),  # a later major one needs PTX
        ("8.0+PTX", (9, 0), True),
        ("9.0a", (9, 0), True),
        ("9.0a", (9, 1), False),
        ("8.0;12.0+PTX", (10, 0), False),
        ("", (9, 0), False),
    ],
)
def test_which_gpus_a_build_runs_on(architectures, capability, runs):
    assert backends.runs_on(architectures, capability) == runs


@pytest.mark.skipif(backends.load_extension() is not None, reason="the compiled extension is not built")
def test_a_gpu_that_the_build_has_no_code_for(monkeypatch):
    for capability, words in (((7, 5), "need compute capability 8.0"), ((99, 0), 'TORCH_CUDA_ARCH_LIST="99.0"')):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, c=capability: c)
        sentence = backends._without_code_for.__wrapped__(torch.device("cuda:0"))
        assert words in sentence
        assert f"cuda:0 has {capability[0]}.{capability[1]}" in sentence


@pytest.mark.skipif(not backends.interpreted(), reason="Triton runs on the GPU here")
def test_triton_refuses_float64_by_name_only():
    x = torch.zeros(1, 1, 4, 4, dtype=torch.float64)
    with pspnet_fast.use_backend("triton"), pytest.raises(NotImplementedError, match="pyramid_pool: .*float64"):
        pyramid_pool(x)
    assert pyramid_pool(x).dtype == torch.float64


def test_explain_says_what_runs_and_why_not(capsys):
    x = torch.zeros(1, 3, 4, 4, dtype=torch.float64)
    pspnet_fast.explain("pyramid_pool", x)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "pyramid_pool_forward"
    chosen = backends.choose("pyramid_pool", "forward", x, (1,))[0]
    assert [line.split()[0] for line in lines[1:5]] == list(backends.BACKENDS)
    assert [line.split()[0] for line in lines[1:5] if line.split()[1] == "runs"] == [chosen]
    assert any("no: " in line for line in lines[1:5] if line.split()[0] == "cuda")
    assert lines[5] == "pyramid_pool_concat"


def test_backend_from_the_environment():
    code = (
        "import torch; from pspnet_fast.backends import choose;"
        "print(choose('pyramid_pool', 'forward', torch.zeros(1, 1, 1, 1))[0])"
    )
    assert run_python(code, PSPNET_FAST_BACKEND="reference").strip() == "reference"
    status, said = run_python(code, PSPNET_FAST_BACKEND="gpu")
    assert status
    assert "backend must be one of" in said


WITHOUT = """
import sys, warnings
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name in ABSENT:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Absent())
import torch, pspnet_fast
x = torch.randn(2, 4, 7, 5, requires_grad=True)
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    for _ in range(2):
        pspnet_fast.PPM(4, 3)(x).sum().backward()
print(len(said), said[0].message)
pspnet_fast.explain("pyramid_pool", x)
"""


def test_runs_with_neither_extension_nor_triton():
    """Slower, and it says once how to build."""
    out = run_python("ABSENT = {'pspnet_fast._C', 'triton'}\n" + WITHOUT)
    assert isinstance(out, str), out
    first, *lines = out.splitlines()
    assert first.startswith(
        "1 pspnet_fast runs slower than it could: the compiled extension pspnet_fast._C is not built"
    )
    assert "pip install" in first
    assert any(line.split()[:2] == ["reference", "runs"] for line in lines)
    assert any(line.startswith("  triton") and "not installed" in line for line in lines)


def test_a_broken_extension_is_not_hidden():
    code = """
import sys, types
class Broken:
    def find_spec(self, name, path=None, target=None):
        if name == "pspnet_fast._C":
            raise ImportError("undefined symbol: something")
sys.meta_path.insert(0, Broken())
import torch
from pspnet_fast.functional import pyramid_pool
pyramid_pool(torch.zeros(1, 1, 1, 1))
"""
    status, said = run_python(code)
    assert status
    assert "undefined symbol" in said


def test_importing_needs_neither_triton_nor_the_extension():
    code = "import sys, pspnet_fast; print('triton' in sys.modules, 'pspnet_fast._C' in sys.modules)"
    assert run_python(code).split() == ["False", "False"]


def test_cpu_capability_is_checked():
    if missing := backends.load_extension():
        pytest.skip(missing)
    code = "import torch, pspnet_fast; print(pspnet_fast.functional.pyramid_pool(torch.ones(1, 1, 6, 6)).sum())"
    assert "50" in run_python(code, PSPNET_FAST_CPU_CAPABILITY="scalar")
    status, said = run_python(code, PSPNET_FAST_CPU_CAPABILITY="mmx")
    assert status
    assert "PSPNET_FAST_CPU_CAPABILITY" in said
    assert "mmx" in said


@pytest.mark.skipif(backends.load_extension() is not None, reason="the compiled extension is not built")
@pytest.mark.parametrize("capability", ["scalar", "avx2", "avx512"])
def test_every_cpu_capability_passes_the_tests_of_the_ops(capability):
    flags = {"scalar": [], "avx2": ["avx2", "fma"], "avx512": ["avx512f"]}[capability]
    if not all(flag in Path("/proc/cpuinfo").read_text() for flag in flags):
        pytest.skip(f"this processor has no {capability}")
    if capability == torch.ops.pspnet_fast_native.cpu_capability():
        pytest.skip(f"{capability} is what all other tests run on")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-k", "cpu", "tests/ops", "-p", "no:cacheprovider"]
    done = subprocess.run(
        command,
        env={**os.environ, "PSPNET_FAST_CPU_CAPABILITY": capability},
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert " passed" in done.stdout


def test_no_warnings_on_import():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        __import__("pspnet_fast")
