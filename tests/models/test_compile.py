"""PSPNet under torch.compile: one graph, training and inference, any size, and the modes that a user asks for by name."""

import copy

import pytest
import torch
from torch import nn

from pspnet_fast import PSPNet

# PyTorch, of itself, when Dynamo looks at a tensor that is not a leaf.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")

SIZES = [(33, 41), (49, 33), (65, 65)]


@pytest.fixture(autouse=True)
def _fresh():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def network(**choices):
    net = PSPNet(layers=18, classes=5, width=8, bins=(1, 2, 3), dropout=0.0, **choices)
    for parameter in net.parameters():
        parameter.data.add_(0.01 * torch.randn_like(parameter))
    return net


class Backbone(nn.Module):
    """Two layers in the ResNet's place: Inductor needs minutes for a ResNet, and nothing of that is ours."""

    def __init__(self):
        super().__init__()
        self.third, self.fourth = nn.Conv2d(3, 8, 3, 8, 1), nn.Conv2d(8, 12, 3, 1, 1)

    def forward(self, x):
        third = self.third(x).relu()
        return third, self.fourth(third).relu()


def small():
    return PSPNet(classes=5, bins=(1, 2, 3), dropout=0.0, backbone=Backbone(), channels=(8, 12))


def batch(size=(33, 41), count=2):
    labels = torch.randint(5, (count, *size))
    labels[:, :3] = 255
    return torch.randn(count, 3, *size), labels


def step(net, function, x, labels):
    """The outputs of a training step, its gradients, and the statistics it leaves in the norms."""
    net.zero_grad()
    prediction, main_loss, aux_loss = function(x, labels)
    (main_loss + 0.4 * aux_loss).backward()
    return {
        "prediction": prediction,
        "main": main_loss.detach(),
        "aux": aux_loss.detach(),
        **{name: parameter.grad for name, parameter in net.named_parameters()},
        **dict(net.named_buffers()),
    }


def assert_same(actual, expected):
    assert actual.keys() == expected.keys()
    for name, theirs in expected.items():
        mine = actual[name]
        if name == "prediction":
            assert mine.dtype == theirs.dtype
            assert (mine != theirs).float().mean() < 0.002
        else:
            scale = theirs.abs().max().item() if theirs.is_floating_point() else 0
            torch.testing.assert_close(
                mine, theirs, rtol=1e-3, atol=1e-3 * scale + 1e-6, msg=lambda m, n=name: f"{n}: {m}"
            )


def compiled_step(net, x, labels, **options):
    return step(net, torch.compile(net, fullgraph=True, **options), x, labels)


def dynamic(tensor):
    for axis in (2, 3):
        torch._dynamo.mark_dynamic(tensor, axis)
    return tensor


@pytest.mark.parametrize(
    ("head", "memory_format"), [("factorised", torch.contiguous_format), ("concat", torch.channels_last)], ids=str
)
def test_training_is_one_graph(head, memory_format):
    """Targets in; losses, labels, gradients and running statistics out."""
    net = network(head=head).to(memory_format=memory_format)
    twin = copy.deepcopy(net)
    x, labels = batch()
    x = x.contiguous(memory_format=memory_format)
    assert_same(compiled_step(net, x, labels, backend="aot_eager"), step(twin, twin, x, labels))


def test_inference_is_one_graph():
    net, (x, _) = small().eval(), batch()
    with torch.no_grad():
        logits = torch.compile(net, backend="aot_eager", fullgraph=True)(x)
        torch.testing.assert_close(logits, net(x))
        for confidence in (False, True):
            predict = torch.compile(net.predict, backend="aot_eager", fullgraph=True)
            torch.testing.assert_close(predict(x, confidence), net.predict(x, confidence))


@pytest.mark.parametrize("how", ["dynamic=True", "mark_dynamic"])
def test_inference_of_any_size_compiles_once(how):
    net = (small() if how == "dynamic=True" else network()).eval()
    mark = dynamic if how == "mark_dynamic" else lambda x: x
    functions = [
        torch.compile(function, backend="aot_eager", fullgraph=True, dynamic=True if how == "dynamic=True" else None)
        for function in (net.forward, net.predict)
    ]
    with torch.no_grad():
        for i, size in enumerate(SIZES):
            x = batch(size)[0]
            with torch.compiler.set_stance("fail_on_recompile" if i else "default"):
                results = [function(mark(x.clone())) for function in functions]
            torch.testing.assert_close(results, [net(x), net.predict(x)])


def test_training_of_any_size_compiles_once():
    net = small()
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True, dynamic=True)
    for i, size in enumerate(SIZES):
        twin, (x, labels) = copy.deepcopy(net), batch(size)
        with torch.compiler.set_stance("fail_on_recompile" if i else "default"):
            actual = step(net, compiled, x, labels)
        assert_same(actual, step(twin, twin, x, labels))


def test_reduce_overhead():
    """With Inductor; on a processor the mode is accepted and means no more than that."""
    net, (x, labels) = small(), batch()
    twin = copy.deepcopy(net)
    with torch._inductor.config.patch(compile_threads=1):  # processes to compile in cost more than they save here
        assert_same(compiled_step(net, x, labels, mode="reduce-overhead"), step(twin, twin, x, labels))
        net.eval()
        with torch.no_grad():
            predicted = torch.compile(net.predict, fullgraph=True, mode="reduce-overhead")(x)
            assert torch.equal(predicted, net.predict(x))


def test_wrong_targets_are_still_an_error():
    net, (x, labels) = small(), batch()
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    compiled(x, labels)
    labels[0, 5, 5] = 7
    with pytest.raises(ValueError, match="target must be a class in .* got 7; 1 such pixels"):
        compiled(x, labels)
