import pytest
import torch
import torch.nn.functional as F

from pspnet_fast import testing
from pspnet_fast.nn import conv2d as module

FORMATS = [torch.contiguous_format, torch.channels_last]


@pytest.fixture
def avx2(monkeypatch):
    """On any machine, what one with AVX2 does."""
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")


@pytest.mark.parametrize("memory_format", FORMATS, ids=["nchw", "channels_last"])
@pytest.mark.parametrize("size", [(7, 10), (1, 6), (6, 1), (1, 1), (2, 2)])
def test_gradients(avx2, size, memory_format):
    x = torch.randn(3, 24, *size).contiguous(memory_format=memory_format)
    weight = torch.randn(40, 30, 3, 3).contiguous(memory_format=memory_format)
    testing.assert_as_accurate(
        lambda x, w: module.conv2d(x, w[:, :24], 1),
        lambda x, w: F.conv2d(x, w[:, :24], padding=1),
        [x, weight],
        "cpu",
        torch.randn(3, 40, *size),
    )


@pytest.mark.parametrize("memory_format", FORMATS, ids=["nchw", "channels_last"])
def test_weight_gradient_is_by_products(avx2, memory_format, monkeypatch):
    """In training on such a machine; a frozen weight, float64, bfloat16 and other paddings are the library's."""
    calls, weight_gradient = [], module.weight_gradient
    monkeypatch.setattr(module, "weight_gradient", lambda *tensors: calls.append(1) or weight_gradient(*tensors))
    x = torch.randn(1, 4, 5, 6).contiguous(memory_format=memory_format).requires_grad_()
    weight = torch.randn(3, 4, 3, 3)
    module.conv2d(x, weight, 1).sum().backward()
    for dtype, padding in ((torch.float64, 1), (torch.bfloat16, 1), (torch.float32, 0)):
        module.conv2d(x.to(dtype), weight.to(dtype).requires_grad_(), padding).sum().backward()
    assert not calls
    module.conv2d(x, weight.requires_grad_(), 1).sum().backward()
    assert len(calls) == 1


def test_elsewhere_it_is_the_library_s(monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.setattr(module, "weight_gradient", None)
    weight = torch.randn(3, 4, 3, 3, requires_grad=True)
    module.conv2d(torch.randn(1, 4, 5, 6), weight, 1).sum().backward()
    assert weight.grad is not None
