"""PPM, the whole module: at evaluation, and a training step of it."""

import copy

import torch
import torch.nn.functional as F
from measuring import parameters_as_tensors
from selection import quick
from workloads import BINS, FORMATS, WORKLOADS

from pspnet_fast import PPM, testing
from pspnet_fast.backends import ops
from pspnet_fast.nn.plain_ppm import PlainPPM


class _PlainForCompile(PlainPPM):
    """torch.compile's training graph of bin 1 does not build on the CPU in torch 2.13: bin 1 is expanded, not interpolated."""

    def forward(self, x):
        maps = [x]
        for level in self.features:
            y = level(x)
            size = x.shape[2:]
            one = y.shape[2:] == (1, 1)
            maps.append(y.expand(-1, -1, *size) if one else F.interpolate(y, size, mode="bilinear", align_corners=True))
        return torch.cat(maps, 1)


def _modules(workload, memory_format, device, dtype, training):
    shape = WORKLOADS[workload]
    x = torch.randn(shape.size, device=device).to(dtype).contiguous(memory_format=FORMATS[memory_format])
    plain = PlainPPM(shape.channels, shape.reduced, BINS).to(device, dtype).train(training)
    for level in plain.features:
        torch.nn.init.uniform_(level[2].running_var, 0.001, 0.01)
    if training:
        testing.clear_of_kinks(plain, x)
    ours = PPM(shape.channels, shape.reduced, BINS).to(device, dtype).train(training)
    for_compile = _PlainForCompile(shape.channels, shape.reduced, BINS).to(device, dtype).train(training)
    ours.load_state_dict(plain.state_dict())
    for_compile.load_state_dict(plain.state_dict())
    return x, plain, ours, for_compile


def _plain(module):
    """In x's dtype, so that the gate can ask it for float64."""
    wide = copy.deepcopy(module).double()
    return lambda x: wide(x) if x.dtype == torch.float64 else module(x)


@quick("ppm")
def bench_evaluation(measure, workload, memory_format, provider, device, dtype):
    x, plain, ours, _ = _modules(workload, memory_format, device, dtype, training=False)
    shape = WORKLOADS[workload]
    written = x.nbytes * (shape.channels + len(BINS) * shape.reduced) // shape.channels
    measure(
        f"PPM evaluation {workload}",
        provider,
        memory_format,
        ours,
        _plain(plain),
        [x],
        ops(),
        x.nbytes + written,
    )


@quick("ppm")
def bench_training(measure, workload, memory_format, provider, device, dtype):
    """Forward and backward, gradients of the features and of every parameter."""
    x, plain, ours, for_compile = _modules(workload, memory_format, device, dtype, training=True)

    measure(
        f"PPM training step {workload}",
        provider,
        memory_format,
        parameters_as_tensors(ours),
        parameters_as_tensors(plain),
        [x, *plain.parameters()],
        ops(),
        5 * x.nbytes,
        True,
        compiled=parameters_as_tensors(for_compile),
    )


bench_training.standard_workload = "ade20k_473_pair"
