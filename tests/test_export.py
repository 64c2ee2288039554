"""Exported files against the network, in runtimes that know nothing of this library."""

import copy
import json
import os
import subprocess
import sys

import pytest
import torch
from torch import nn

from pspnet_fast import PSPNet, cli, export, use_backend
from pspnet_fast.export import ExportError, exportable

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),
    # What torch.export and its ONNX exporter say of themselves.
    pytest.mark.filterwarnings("ignore::DeprecationWarning:torch.*"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:onnx.*"),
    pytest.mark.filterwarnings("ignore:No complete tensor found in the group:UserWarning"),
]
TOLERANCE = 1e-4


def network(**options):
    """Small, with norms far from the identity."""
    torch.manual_seed(0)
    net = PSPNet(layers=18, classes=5, width=8, **options)
    for norm in (m for m in net.modules() if isinstance(m, nn.BatchNorm2d)):
        nn.init.uniform_(norm.running_var, 0.5, 2)
        nn.init.uniform_(norm.running_mean, -0.5, 0.5)
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.uniform_(norm.bias, -0.5, 0.5)
    return net.eval()


class Backbone(nn.Module):
    """Two layers in the ResNet's place, whose compilation takes minutes and is not ours."""

    def __init__(self):
        super().__init__()
        self.third, self.fourth = nn.Conv2d(3, 8, 3, 8, 1), nn.Conv2d(8, 16, 3, 1, 1)

    def forward(self, x):
        third = self.third(x).relu()
        return third, self.fourth(third).relu()


def small(**options):
    torch.manual_seed(0)
    return PSPNet(classes=5, backbone=Backbone(), channels=(8, 16), **options).eval()


def plain(net, x):
    """The logits of the head as the paper draws it, in plain PyTorch."""
    head, net.head = net.head, "concat"
    with torch.no_grad(), use_backend("reference"):
        logits = net(x)
    net.head = head
    return logits


def onnx_file(net, path, size, **options):
    export.export(net, path, "onnx", size, **options)
    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])


def run(session, x):
    return torch.from_numpy(session.run(None, {"image": x.numpy()})[0])


def assert_close(got, expected):
    assert (got - expected).abs().max() <= TOLERANCE * max(1, float(expected.abs().max()))


OPTIONS = {
    "as it is": {},
    "align_corners false": {"align_corners": False},
    "zoom 4": {"zoom_factor": 4},
    "bins 1 2 4 8": {"bins": (1, 2, 4, 8)},
    "no pyramid": {"use_ppm": False},
    "smp's": {"stages": 2, "kernel_sizes": (1, 3), "bin1_norm": False, "bottleneck_channels": 16},
    "maximum": {"pooling": "max"},
}


@pytest.mark.parametrize("size", [(89, 97), (64, 80)], ids=["divided by no bin", "by some"])
@pytest.mark.parametrize("head", ["factorised", "concat"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_what_is_exported_equals_the_network(options, head, size):
    net = network(**options)
    module, x = exportable(net, size, head), torch.randn(2, 3, *size)
    with torch.no_grad():
        assert_close(module(x), plain(net, x))


@pytest.mark.parametrize("head", ["factorised", "concat"])
@pytest.mark.parametrize("align_corners", [True, False])
def test_onnx_of_one_size(tmp_path, align_corners, head):
    net, x = network(align_corners=align_corners), torch.randn(1, 3, 89, 97)
    session = onnx_file(net, tmp_path / "net.onnx", (89, 97), head=head)
    assert_close(run(session, x), plain(net, x))
    model = onnx.load(tmp_path / "net.onnx")
    assert {node.domain for node in model.graph.node} <= {"", "ai.onnx"}
    assert [i.name for i in model.graph.input] == ["image"]
    assert [o.name for o in model.graph.output] == ["logits"]
    properties = {p.key: p.value for p in model.metadata_props}
    assert properties["classes"] == "5"
    assert properties["align_corners"] == ("true" if align_corners else "false")


@pytest.mark.parametrize(("head", "align_corners"), [("factorised", False), ("factorised", True), ("concat", False)])
def test_onnx_of_any_size(tmp_path, head, align_corners):
    net = small(align_corners=align_corners)
    session = onnx_file(net, tmp_path / "net.onnx", (89, 97), dynamic=True, head=head)
    for batch, height, width in ((1, 89, 97), (3, 65, 129), (2, 161, 73)):
        x = torch.randn(batch, 3, height, width)
        assert_close(run(session, x), plain(net, x))


def test_labels(tmp_path):
    """A label may be another only where both have the same logit, to the tolerance."""
    net, x = small(), 3 * torch.randn(1, 3, 89, 97)
    net.cls[4].bias.data.sub_(plain(net, x).mean((0, 2, 3)))  # no class everywhere
    labels = run(onnx_file(net, tmp_path / "net.onnx", (89, 97), output="labels"), x)
    logits = plain(net, x)
    assert labels.dtype == torch.uint8
    assert labels.shape == (1, 89, 97)
    assert labels.unique().numel() > 1
    chosen = logits.gather(1, labels.long()[:, None])[:, 0]
    assert (logits.amax(1) - chosen).max() <= 2 * TOLERANCE * max(1, float(logits.abs().max()))


WITHOUT = """
import sys
sys.modules["pspnet_fast"] = None
import torch
x = torch.load("x.pt")
{load}
torch.save(f(x), "y.pt")
"""
LOAD = {
    "pt2": 'f = torch.export.load("net.pt2").module()',
    "aoti": 'from torch._inductor import aoti_load_package; f = aoti_load_package("net.pt2")',
}


@pytest.mark.parametrize("kind", LOAD)
def test_a_process_without_this_library(tmp_path, kind):
    net, x = small(), torch.randn(1, 3, 89, 97)
    export.export(net, tmp_path / "net.pt2", kind, (89, 97))
    torch.save(x, tmp_path / "x.pt")
    line = [sys.executable, "-W", "ignore", "-c", WITHOUT.format(load=LOAD[kind])]
    subprocess.run(line, cwd=tmp_path, check=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert_close(torch.load(tmp_path / "y.pt"), plain(net, x))


def test_a_file_that_differs_is_not_written(tmp_path, monkeypatch):
    monkeypatch.setattr(export, "_onnxruntime", lambda path: lambda image: torch.zeros(1, 5, 89, 97))
    with pytest.raises(ExportError, match="must agree with the network to"):
        export.export(small(), tmp_path / "net.onnx", "onnx", (89, 97))
    assert os.listdir(tmp_path) == []


def test_what_is_as_exact_as_the_network_is_written(tmp_path):
    """A network whose own float32 error is past 1e-4: a norm adds a hundred thousand and takes it away."""
    net = small(head="concat")  # the factorised head folds the norm, as the file does
    net.cls[0].weight.data.mul_(10)
    net.cls[1].running_mean.fill_(-1e5)
    net.cls[1].bias.data.fill_(-1e5)
    x = torch.randn(1, 3, 89, 97)
    own = (plain(net, x) - plain(copy.deepcopy(net).double(), x.double())).abs().max()
    assert own > TOLERANCE * max(1, float(plain(net, x).abs().max()))
    onnx_file(net, tmp_path / "net.onnx", (89, 97))


def test_the_network_is_not_changed(tmp_path):
    net, x = network(), torch.randn(1, 3, 65, 73)
    state = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    expected = plain(net, x)
    exportable(net.train(), (65, 73))(x)
    assert net.training
    assert all(torch.equal(tensor, state[name]) for name, tensor in net.state_dict().items())
    assert torch.equal(plain(net.eval(), x), expected)


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: exportable(nn.Conv2d(3, 3, 1), (65, 65)), "net must be a PSPNet, got Conv2d"),
        (lambda: exportable(network().double(), (65, 65)), "must be in float32, got torch.float64"),
        (lambda: exportable(network(), (65, 0)), "size must be"),
        (lambda: exportable(network(), (65, 65), head="fast"), "head must be 'factorised' or 'concat', got 'fast'"),
        (lambda: exportable(network(), (65, 65), output="masks"), "output must be 'logits' or 'labels', got 'masks'"),
        (lambda: exportable(network(pooling="max"), None), "pooling='max' needs a size"),
    ],
)
def test_bad_input(build, words):
    with pytest.raises((TypeError, ValueError), match=words):
        build()


def test_the_command(tmp_path, capsys):
    net = network()
    torch.save({"state_dict": net.state_dict()}, tmp_path / "net.pth")
    out = tmp_path / "net.onnx"
    assert cli.main(["export", str(tmp_path / "net.pth"), str(out), "--size", "65", "73"]) == 0
    assert f"{out}: onnx, logits, 65x73, factorised head" in capsys.readouterr().out
    x = torch.randn(1, 3, 65, 73)
    session = onnxruntime.InferenceSession(str(out), providers=["CPUExecutionProvider"])
    assert_close(run(session, x), plain(net, x))
    assert cli.main(["export", str(tmp_path / "none.pth"), str(tmp_path / "no.onnx"), "--size", "65", "73"]) == 2
    assert "pspnet-fast export: no checkpoint at" in capsys.readouterr().err


# What is asked before the work


def test_what_the_command_asks_before_it_works(tmp_path, capsys, monkeypatch):
    """Nothing is read for a file that cannot be written, of a size that cannot be, or that is there."""
    monkeypatch.setattr("pspnet_fast.checkpoints.load_checkpoint", lambda *a, **k: pytest.fail("the weights were read"))
    weights, there = tmp_path / "w.onnx", tmp_path / "there.onnx"
    weights.write_bytes(b"weights")
    there.write_bytes(b"kept")
    size = ["--size", "65", "73"]
    for argv, words in (
        ([there, *size], "there.onnx: is there already: give the result another name, or --force"),
        ([weights, *size], "w.onnx: is there already"),
        ([weights, *size, "--force"], "w.onnx: would overwrite a file that is read"),
        ([tmp_path / "no" / "o.onnx", *size], "o.onnx: cannot be written: there is no folder"),
        ([tmp_path / "o.pt2", *size], "a file of format onnx must end in .onnx"),
        ([tmp_path / "o.onnx"], "size must be given, (H, W), unless dynamic"),
        ([tmp_path / "o.onnx", "--size", "0", "-1"], "size must be (H, W), both positive, got (0, -1)"),
        ([tmp_path / "o.onnx", "--size", "65", "9000"], "size must be at most 8192 along each side, got (65, 9000)"),
    ):
        assert cli.main(["export", str(weights), *map(str, argv)]) == 2
        captured = capsys.readouterr()
        assert captured.err.startswith("pspnet-fast export: ")
        assert words in captured.err
        assert captured.err.count("\n") == 1
    assert (weights.read_bytes(), there.read_bytes()) == (b"weights", b"kept")
    assert sorted(os.listdir(tmp_path)) == ["there.onnx", "w.onnx"]


def of_zeros(net):
    net.forward = torch.zeros_like
    return net


class Doubled(PSPNet):
    def forward(self, x, y=None):
        return super().forward(x, y) * 2


@pytest.mark.parametrize(
    "change",
    [
        lambda net: net.register_forward_hook(lambda module, inputs, output: output * 2),
        lambda net: net.register_forward_pre_hook(lambda module, inputs: (inputs[0] * 2,)),
        of_zeros,
        lambda net: setattr(net, "__class__", Doubled),
    ],
)
def test_what_calling_the_network_would_do_besides(change):
    """Its parts alone are read."""
    net = small()
    change(net)
    with pytest.raises(ValueError, match="net has hooks or a forward of its own, and would not be called"):
        exportable(net, (65, 65))


def test_a_module_behind_the_classes(tmp_path):
    net, x = small(), torch.randn(1, 3, 65, 73)
    net.cls.append(nn.Softmax(1))
    export.export(net, tmp_path / "net.pt2", "pt2", (65, 73))
    extra = {"metadata.json": ""}
    assert_close(torch.export.load(tmp_path / "net.pt2", extra_files=extra).module()(x), plain(net, x))
    assert json.loads(extra["metadata.json"])["classes"] == "5"


def test_weights_that_are_not_finite_are_named():
    net = network()
    net.cls[0].weight.data[0, 0, 0, 0] = float("nan")
    net.layer1[0].bn1.running_var[0] = float("inf")
    with pytest.raises(
        ValueError, match=r"must be finite, got NaN or infinity in layer1\.0\.bn1\.running_var, cls\.0\.weight$"
    ):
        exportable(net, (65, 65))


@pytest.mark.parametrize("channels", [1, 4])
def test_images_of_other_channels(tmp_path, channels):
    net, x = network(in_channels=channels), torch.randn(1, channels, 65, 73)
    session = onnx_file(net, tmp_path / "net.onnx", (65, 73))
    assert_close(run(session, x), plain(net, x))
    assert "normalisation" not in {p.key for p in onnx.load(tmp_path / "net.onnx").metadata_props}


FULL_DISK = """
import resource, sys
from pathlib import Path
import torch
from pspnet_fast import PSPNet, export
torch.manual_seed(0)
net = PSPNet(layers=18, classes=5, width=8).eval()
program = export._traced(export.exportable(net, (33, 33)), (33, 33), False)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
from pspnet_fast.files import replacing
try:
    with replacing(Path("net.pt2")) as temporary:
        export._write_pt2(program, temporary, {})
except OSError as error:
    print(error)
"""


def test_a_full_disk_is_one_sentence(tmp_path):
    """Torch's own writer, stopped by a limit on files' sizes."""
    line = [sys.executable, "-W", "ignore", "-c", FULL_DISK]
    done = subprocess.run(line, cwd=tmp_path, check=True, timeout=300, capture_output=True, text=True)
    assert done.stdout.startswith("net.pt2: cannot be written: ")
    assert done.stdout.count("\n") == 1
    assert os.listdir(tmp_path) == []
