"""The head up to its classifier, PPM + 3x3 bottleneck + batch norm + ReLU: at evaluation, and a training step of it."""

import copy
import math

import pytest
import torch
from measuring import parameters_as_tensors
from selection import quick
from torch import nn
from workloads import BINS, FORMATS, WORKLOADS

from pspnet_fast import PSPHead, testing
from pspnet_fast.backends import ops
from pspnet_fast.nn.conv2d import weight_gradient
from pspnet_fast.nn.plain_ppm import PlainPPM


class _PlainHead(nn.Module):
    """As it is usually written, with PSPHead's keys."""

    def __init__(self, ppm, cls):
        super().__init__()
        self.ppm, self.cls = ppm, cls

    def forward(self, x):
        return self.cls(self.ppm(x))


def _heads(workload, memory_format, device, dtype, training):
    shape, layout = WORKLOADS[workload], FORMATS[memory_format]
    x = torch.randn(shape.size, device=device).to(dtype).contiguous(memory_format=layout)
    ours = PSPHead(shape.channels, shape.reduced, shape.channels // 4, 150, BINS)
    ours.cls = ours.cls[:3]
    for norm in (m for m in ours.modules() if isinstance(m, nn.BatchNorm2d)):
        nn.init.uniform_(norm.running_var, 0.001, 0.01)
    plain = _PlainHead(PlainPPM(shape.channels, shape.reduced, BINS), copy.deepcopy(ours.cls))
    plain.load_state_dict(ours.state_dict())
    ours, plain = (m.to(device, dtype, memory_format=layout).train(training) for m in (ours, plain))
    if training:
        testing.clear_of_kinks(plain.ppm, x)
        ours.load_state_dict(plain.state_dict())
    return x, ours, plain


def _moved(x, module, written):
    return x.nbytes + sum(p.nbytes for p in module.parameters()) + written


@quick("head")
def bench_evaluation(measure, workload, memory_format, provider, device, dtype):
    x, ours, plain = _heads(workload, memory_format, device, dtype, training=False)
    wide = copy.deepcopy(plain).double()
    measure(
        f"head evaluation {workload}",
        provider,
        memory_format,
        ours,
        lambda x: wide(x) if x.dtype == torch.float64 else plain(x),
        [x],
        ops(),
        _moved(x, ours, x.nbytes // 4),
    )


def bench_training(measure, workload, memory_format, provider, device, dtype):
    """Forward and backward, gradients of the features and of every parameter.

    The gate leaves the last ReLU out: of millions of values a few are 0 to within rounding, and on which side they fall
    decides whether they have a gradient.
    """
    x, ours, plain = _heads(workload, memory_format, device, dtype, training=True)
    linear = [copy.deepcopy(module) for module in (ours, plain)]
    for module in linear:
        module.cls[2] = nn.Identity()
    measure(
        f"head training step {workload}",
        provider,
        memory_format,
        parameters_as_tensors(ours),
        parameters_as_tensors(plain),
        [x, *plain.parameters()],
        ops(),
        3 * _moved(x, ours, x.nbytes // 4),
        True,
        gated=(parameters_as_tensors(linear[0]), parameters_as_tensors(linear[1])),
    )


def bench_weight_gradient(measure, workload, memory_format, provider, device, dtype):
    """Of the bottleneck's half that convolves the features: nine matrix products against the library's own."""
    if device != "cpu":
        pytest.skip("on a GPU it is the library's")
    shape, layout = WORKLOADS[workload], FORMATS[memory_format]
    x = torch.randn(shape.size).to(dtype).contiguous(memory_format=layout)
    grad = torch.randn(shape.batch, shape.channels // 4, *shape.size[2:]).to(dtype).contiguous(memory_format=layout)
    size = shape.channels // 4, shape.channels, 3, 3
    measure(
        f"weight gradient of the features' convolution {workload}",
        provider,
        memory_format,
        weight_gradient,
        lambda x, grad: torch.nn.grad.conv2d_weight(x, size, grad, padding=1),
        [x, grad],
        [],
        x.nbytes + grad.nbytes + 4 * math.prod(size),
    )


bench_training.standard_workload = "ade20k_473_pair"
bench_weight_gradient.standard_workload = "ade20k_473_pair"
