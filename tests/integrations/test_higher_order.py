"""Second derivatives and PyTorch's tracers on accelerated models: as before they were accelerated."""

import copy
import warnings

import peers
import pytest
import torch

from pspnet_fast import accelerate

# PyTorch, of itself and of sizes, which are checked once.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.jit.trace.* is:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
]


def pair(name):
    plain = peers.make(name).double()
    ours = copy.deepcopy(plain)
    assert accelerate(ours).accelerated
    return ours, plain


def hessian_times_vectors(model, arguments):
    """Of the results' squares, by features and parameters."""
    model = copy.deepcopy(model)
    arguments = peers.to(arguments, dtype=torch.float64)
    leaves = [t.requires_grad_() for t in peers.tensors(arguments) if t.is_floating_point()] + [*model.parameters()]
    torch.manual_seed(0)
    results = [t for t in peers.tensors(model(*arguments)) if t.is_floating_point() and t.requires_grad]
    loss = sum(result.square().sum() for result in results)
    gradients = torch.autograd.grad(loss, leaves, create_graph=True, allow_unused=True)
    used = [(leaf, gradient) for leaf, gradient in zip(leaves, gradients, strict=True) if gradient is not None]
    leaves, gradients = zip(*used, strict=True)
    vectors = [torch.randn_like(leaf) for leaf in leaves]
    product = sum((g * v).sum() for g, v in zip(gradients, vectors, strict=True) if g.requires_grad)
    return torch.autograd.grad(product, leaves, allow_unused=True)


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("name", peers.ACCELERATED)
def test_second_derivatives(name, training):
    ours, plain = pair(name)
    arguments = peers.inputs(name, batch=3)
    results = []
    for model in (ours, plain):
        torch.manual_seed(1)
        results.append(hessian_times_vectors(model.train(training), arguments))
    assert any(each is not None and each.abs().max() > 0 for each in results[1])
    for mine, theirs in zip(*results, strict=True):
        assert (mine is None) == (theirs is None)
        if theirs is not None:
            torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-8 * theirs.abs().max().item() + 1e-9)


@pytest.mark.parametrize("name", ["semseg", "semseg_ppm", "smp", "tramac", "tutorial"])
def test_trace(name):
    ours, plain = (model.eval() for model in pair(name))
    arguments = peers.to(peers.inputs(name), dtype=torch.float64)
    traced = torch.jit.trace(ours, arguments)
    assert "pspnet_fast::" not in str(traced.inlined_graph)
    with torch.no_grad():
        for mine, theirs in zip(peers.tensors(traced(*arguments)), peers.tensors(plain(*arguments)), strict=True):
            torch.testing.assert_close(mine, theirs)


def test_onnx_export(tmp_path):
    """By the exporter that traces, at a size that no bin divides; it cannot export the model as it was."""
    runtime = pytest.importorskip("onnxruntime")
    model = peers.make("semseg_ppm").eval()
    arguments, path = peers.inputs("semseg_ppm"), tmp_path / "net.onnx"
    expected = model(*arguments)
    assert accelerate(model).accelerated
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's own, of its version
        torch.onnx.export(model, arguments, path, dynamo=False)
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (out,) = session.run(None, {session.get_inputs()[0].name: arguments[0].numpy()})
    torch.testing.assert_close(torch.from_numpy(out), expected, rtol=1e-3, atol=1e-4)
