"""Exported PSPNet-50 with 150 classes at 473x473, logits: the factorised head and the plain one in other runtimes, 2 threads.

    pytest benchmarks/bench_export.py --benchmark-only

The baseline is the same network's export with the concatenation (`head="concat"`). Both files are compared with the network
when they are written, and once more here, in the runtime that is timed.
"""

import importlib
import statistics
import time

import pytest
import torch
from bench_pspnet import CLASSES
from measuring import ROWS
from selection import whole_network

from pspnet_fast import PSPNet
from pspnet_fast.export import TOLERANCE, export

SIZE, THREADS, ROUNDS, WARM_UP = (473, 473), 2, 9, 2
HEADS = ("concat", "factorised")
RUNTIMES = ("onnxruntime", "openvino")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Both files, an image, and what the network makes of it."""
    for package in ("onnx", "onnxscript"):
        pytest.importorskip(package, reason=f"{package} is not installed: pip install --no-build-isolation '.[onnx]'")
    torch.manual_seed(0)
    # Norms as they are made: with random weights and the batches' own statistics, float32 itself is off by more than the gate.
    net = PSPNet(50, classes=CLASSES).eval()
    image = torch.randn(1, 3, *SIZE)
    with torch.no_grad():
        expected = net(image)
    folder = tmp_path_factory.mktemp("exported")
    for head in HEADS:
        export(net, folder / f"{head}.onnx", "onnx", SIZE, head=head)
    return folder, image, expected


def _onnxruntime(path):
    onnxruntime = importlib.import_module("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = THREADS
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda image: torch.from_numpy(session.run(None, {"image": image.numpy()})[0])


def _openvino(path):
    """In float32: on processors with bfloat16, OpenVINO would else take that."""
    openvino = importlib.import_module("openvino")
    settings = {"INFERENCE_NUM_THREADS": THREADS, "INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}
    compiled = openvino.Core().compile_model(str(path), "CPU", settings)
    return lambda image: torch.from_numpy(compiled(image.numpy())[0])


@whole_network
@pytest.mark.parametrize("runtime", RUNTIMES)
def bench_heads(measure, files, device, runtime):
    if device != "cpu":
        pytest.skip("the exported files are timed on the CPU")
    pytest.importorskip(runtime, reason=f"{runtime} is not installed: pip install {runtime}")
    folder, image, expected = files
    plain, ours = ({"onnxruntime": _onnxruntime, "openvino": _openvino}[runtime](folder / f"{h}.onnx") for h in HEADS)
    assert expected.std() > 1  # a gate of small numbers would tell nothing
    for run in (plain, ours):
        torch.testing.assert_close(run(image), expected, rtol=0, atol=TOLERANCE * float(expected.abs().max()))
        for _ in range(WARM_UP):
            run(image)
    baseline = []

    def before_each_round():
        start = time.perf_counter()
        plain(image)
        baseline.append(time.perf_counter() - start)

    benchmark = measure.benchmark
    benchmark.group = f"exported PSPNet-50, {runtime}"
    benchmark.pedantic(ours, args=(image,), setup=before_each_round, rounds=ROUNDS)
    if benchmark.disabled:
        return
    seconds = benchmark.stats.stats.median
    eager = statistics.median(baseline)
    for head, median in (("concat", eager), ("factorised", seconds)):
        size = (folder / f"{head}.onnx").stat().st_size
        row = {"work": f"PSPNet-50 exported, 473x473, {THREADS} threads", "format": "nchw"}
        row |= {"provider": f"{runtime}, {head}", "ms": 1e3 * median, "ratio": eager / median}
        row["baseline"] = "the concatenating head"
        ROWS.append({**row, "GB/s": (size + image.nbytes + expected.nbytes) / median / 1e9, "MB": size / 1e6})
    benchmark.extra_info.update(ROWS[-1], concat_ms=1e3 * eager)
