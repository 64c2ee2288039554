"""pyramid_conv2d: the pyramid's half of the bottleneck, a 3x3 convolution to 512 channels, without the upsampled levels."""

import torch
from selection import quick
from workloads import BINS, FORMATS, WORKLOADS

from pspnet_fast import testing
from pspnet_fast.functional import pyramid_conv2d


def _bench(measure, workload, memory_format, provider, device, dtype, backward):
    shape, layout = WORKLOADS[workload], FORMATS[memory_format]
    size, channels = (shape.height, shape.width), shape.channels // 4
    pyramid = torch.randn(shape.batch, sum(b * b for b in BINS), shape.reduced, device=device).to(dtype)
    weight = torch.randn(channels, len(BINS) * shape.reduced, 3, 3, device=device).to(dtype)
    weight = weight.contiguous(memory_format=layout)
    written = shape.batch * channels * shape.height * shape.width * pyramid.itemsize
    measure(
        f"pyramid_conv2d {'forward + backward' if backward else 'forward'} {workload}",
        provider,
        memory_format,
        lambda p, w: pyramid_conv2d(p, w, size, BINS, memory_format=layout),
        lambda p, w: testing.plain_pyramid_conv2d(p, w, size, BINS),
        [pyramid, weight],
        ["pyramid_conv2d"],
        (weight.nbytes + written) * (3 if backward else 1),
        backward,
    )


@quick("head")
def bench_forward(measure, workload, memory_format, provider, device, dtype):
    _bench(measure, workload, memory_format, provider, device, dtype, backward=False)


def bench_backward(measure, workload, memory_format, provider, device, dtype):
    """The gradients of the pyramid and of the weight."""
    _bench(measure, workload, memory_format, provider, device, dtype, backward=True)
