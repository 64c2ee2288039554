"""Second derivatives, torch.func, torch.jit.trace and torch.onnx.export of modules and networks, against plain PyTorch's."""

import copy
import io
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pspnet_fast import PPM, PSPHead, PSPNet
from pspnet_fast.nn.conv2d import conv2d
from pspnet_fast.nn.plain_ppm import PlainPPM

FORMATS = [torch.contiguous_format, torch.channels_last]
BINS = (1, 2, 3)

# PyTorch, of itself, where it loads forward-mode rules and where it traces; and of sizes, which are checked once.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.(trace|trace_method|save|load).* is:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
]


class PlainHead(nn.Module):
    """PSPHead's parameters, computed by their modules."""

    def __init__(self, head):
        super().__init__()
        self.ppm, self.cls = plain_ppm(head.ppm), copy.deepcopy(head.cls)

    def forward(self, x):
        return self.cls(self.ppm(x))


def plain_ppm(ppm):
    plain = PlainPPM(ppm.in_dim, ppm.features[0][1].out_channels, ppm.bins, align_corners=ppm.align_corners)
    plain.load_state_dict(ppm.state_dict())
    return plain.train(ppm.training)


def filled(module):
    """With running statistics and norms of a network that was trained."""
    for name, tensor in module.state_dict().items():
        if tensor.is_floating_point():
            tensor.copy_(torch.rand_like(tensor) + 0.5 if "var" in name or tensor.dim() == 1 else tensor + 0.05)
    return module


def pair(kind):
    """A module in float64 and the same in plain PyTorch."""
    if kind == "PPM":
        ours = filled(PPM(6, 3, BINS))
        return ours.double(), plain_ppm(ours).double()
    ours = filled(PSPHead(6, 3, 5, 4, BINS, dropout=0.0, head=kind))
    return ours.double(), PlainHead(ours).double()


KINDS = ["PPM", "factorised", "concat"]


def hessian_times_vectors(loss, leaves):
    """For the same vectors at every call."""
    noise = torch.Generator().manual_seed(1)
    gradients = torch.autograd.grad(loss, leaves, create_graph=True)
    vectors = [torch.randn(leaf.shape, generator=noise, dtype=torch.float64).to(leaf) for leaf in leaves]
    return torch.autograd.grad(gradients, leaves, vectors, allow_unused=True)


def assert_as_plain(actual, expected, rtol=1e-7):
    """Everything as exact as the largest of its kind."""
    for mine, theirs in zip(actual, expected, strict=True):
        assert theirs is not None
        largest = theirs.abs().max().item()
        torch.testing.assert_close(mine, theirs, rtol=rtol, atol=rtol * largest + 1e-12)


@pytest.mark.parametrize("memory_format", FORMATS, ids=["nchw", "channels_last"])
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("kind", KINDS)
def test_second_derivatives_of_modules(kind, training, memory_format):
    x = torch.randn(3, 6, 7, 5, dtype=torch.float64).contiguous(memory_format=memory_format)
    results = []
    for module in pair(kind):
        module.train(training)
        leaf = x.clone().requires_grad_()
        loss = (module(leaf) + 0.3).pow(3).sum()
        results.append(hessian_times_vectors(loss, [leaf, *module.parameters()]))
    assert_as_plain(*results)


@pytest.mark.parametrize("head", ["factorised", "concat"])
def test_a_training_loss_has_hessian_vector_products(head):
    """As conjugate gradients and sharpness take them: of the whole network, loss included."""
    net = filled(PSPNet(layers=18, width=4, classes=5, bins=BINS, dropout=0.0, head=head)).double()
    plain = copy.deepcopy(net)
    plain.ppm, plain.criterion = plain_ppm(net.ppm).double(), nn.CrossEntropyLoss(ignore_index=255)
    x, labels = torch.randn(2, 3, 33, 41, dtype=torch.float64), torch.randint(5, (2, 33, 41))
    labels[:, :3] = 255
    results = []
    for each in (net, plain):
        out = each(x, labels)
        results.append(hessian_times_vectors(out.main_loss + 0.4 * out.aux_loss, [*each.parameters()]))
    assert_as_plain(*results, rtol=1e-5)


@pytest.mark.parametrize("frozen", ["nothing", "x", "weight"])
def test_second_derivatives_of_a_convolution_by_products(frozen, monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    tensors = {"x": torch.randn(2, 3, 5, 4), "weight": torch.randn(6, 3, 3, 3)}
    results = []
    for function in (lambda x, w: conv2d(x, w, 1), lambda x, w: F.conv2d(x, w, padding=1)):
        leaves = {name: tensor.clone().requires_grad_(name != frozen) for name, tensor in tensors.items()}
        loss = function(*leaves.values()).pow(3).sum()
        results.append(hessian_times_vectors(loss, [leaf for leaf in leaves.values() if leaf.requires_grad]))
    assert_as_plain(*results, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_transforms_of_modules(kind):
    """Per-sample gradients, tangents, and derivatives by parameters."""
    ours, plain = (module.eval() for module in pair(kind))
    x, tangent = torch.randn(2, 2, 1, 6, 7, 5, dtype=torch.float64)
    results = []
    for module in (ours, plain):
        state = dict(module.named_parameters())

        def loss(x, module=module, state=None):
            return torch.func.functional_call(module, state or {}, (x,)).pow(3).mean()

        results.append(
            [
                torch.vmap(torch.func.grad(loss))(x),
                torch.func.jvp(module, (x[0],), (tangent[0],))[1],
                torch.func.jvp(torch.func.grad(loss), (x[0],), (tangent[0],))[1],
                *torch.func.grad(lambda state, loss=loss: loss(x[0], state=state))(state).values(),
            ]
        )
    assert_as_plain(*results)


@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
@pytest.mark.parametrize("kind", KINDS)
def test_vmap_over_parameters(kind, grad):
    """One of them, with the rest shared, and all: an ensemble."""
    x, results = torch.randn(2, 6, 7, 5, dtype=torch.float64), []
    ours, plain = (module.eval() for module in pair(kind))
    for module in (ours, plain):
        shared = {name: tensor.detach() for name, tensor in module.named_parameters()}
        models = {name: torch.stack([tensor, 1.5 * tensor]) for name, tensor in shared.items()}

        def outputs(state, module=module, shared=shared):
            return torch.vmap(lambda own: torch.func.functional_call(module, {**shared, **own}, (x,)))(state)

        with torch.set_grad_enabled(grad):
            results.append([outputs({name: tensor}) for name, tensor in models.items()] + [outputs(models)])
    assert_as_plain(*results)


def test_running_statistics_under_a_transform_are_refused_as_by_torch():
    x = torch.randn(2, 6, 7, 5)
    for module in (PPM(6, 3), PlainPPM(6, 3)):
        with pytest.raises(RuntimeError, match="in-place operation .* that would mutate a captured Tensor"):
            torch.func.grad(lambda x, module=module: module(x).sum())(x)


def network(head="factorised"):
    net = filled(PSPNet(layers=18, width=4, classes=5, bins=BINS, head=head)).eval()
    for parameter in net.parameters():
        parameter.data.mul_(0.5)
    return net


@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
@pytest.mark.parametrize("head", ["factorised", "concat"])
def test_trace(head, grad):
    """The traced network computes the same, at other sizes and without this library's ops."""
    net = network(head)
    with torch.set_grad_enabled(grad):
        traced = torch.jit.trace(net, torch.randn(1, 3, 33, 41))
    assert "pspnet_fast::" not in str(traced.inlined_graph)
    file = io.BytesIO()
    torch.jit.save(traced, file)
    file.seek(0)
    loaded = torch.jit.load(file)
    for size in ((1, 3, 33, 41), (2, 3, 49, 33)):
        x = torch.randn(size)
        with torch.no_grad():
            torch.testing.assert_close(loaded(x), net(x), rtol=1e-4, atol=1e-4)


def test_trace_of_labels_and_modules():
    net, x = network(), torch.randn(1, 3, 33, 41)
    traced = torch.jit.trace_module(net, {"predict": x})
    for images in (x, torch.randn(2, 3, 49, 33)):
        labels = net.predict(images)
        assert traced.predict(images).shape == labels.shape
        assert (traced.predict(images) != labels).float().mean() < 0.002
    for kind in KINDS:
        ours, plain = (module.eval() for module in pair(kind))
        features = torch.randn(1, 6, 7, 5, dtype=torch.float64)
        traced = torch.jit.trace(ours, features)
        assert "pspnet_fast::" not in str(traced.inlined_graph)
        torch.testing.assert_close(traced(features), plain(features))


@pytest.mark.parametrize("dynamo", [False, True])
def test_onnx_export(tmp_path, dynamo):
    """By PyTorch's own exporters, at a size that no bin divides."""
    runtime = pytest.importorskip("onnxruntime")
    if dynamo:
        pytest.importorskip("onnxscript")
    net, x, path = network(), torch.randn(1, 3, 33, 41), tmp_path / "net.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # exporters' own, of their versions
        torch.onnx.export(net, (x,), path, dynamo=dynamo, verbose=False)
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (out,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(out), net(x), rtol=1e-3, atol=1e-4)


def test_symbolic_tracing_says_what_it_got():
    """torch.fx has no values, and what is checked needs them: one sentence."""
    with pytest.raises(TypeError, match="^PPM: x must be a tensor, got Proxy"):
        torch.fx.symbolic_trace(PPM(6, 3))
