"""upsample_concat: every level upsampled beside x, each output written once."""

import torch
from selection import quick
from workloads import BINS, FORMATS, WORKLOADS

from pspnet_fast import testing
from pspnet_fast.functional import upsample_concat


def _inputs(workload, memory_format, device, dtype):
    shape = WORKLOADS[workload]
    x = torch.randn(shape.size, device=device).to(dtype).contiguous(memory_format=FORMATS[memory_format])
    return x, torch.randn(shape.batch, sum(b * b for b in BINS), shape.reduced, device=device).to(dtype)


@quick("ops")
def bench_forward(measure, workload, memory_format, provider, device, dtype):
    x, pyramid = _inputs(workload, memory_format, device, dtype)
    written = x.nbytes + len(BINS) * pyramid.shape[2] * x.nbytes // x.shape[1]
    measure(
        f"upsample_concat forward {workload}",
        provider,
        memory_format,
        lambda x, p: upsample_concat(x, p, BINS),
        lambda x, p: testing.plain_upsample_concat(x, p, BINS),
        [x, pyramid],
        ["upsample_concat"],
        x.nbytes + written,
    )


def bench_backward(measure, workload, memory_format, provider, device, dtype):
    """The levels alone, so that x's part of the concatenation is nobody's work: the gradient of the pyramid."""
    x, pyramid = _inputs(workload, memory_format, device, dtype)
    order = tuple(range(len(BINS)))
    written = len(BINS) * pyramid.shape[2] * x.nbytes // x.shape[1]
    measure(
        f"upsample_concat forward + backward, levels alone, {workload}",
        provider,
        memory_format,
        lambda p: upsample_concat(x, p, BINS, order=order),
        lambda p: testing.plain_upsample_concat(x.to(p.dtype), p, BINS, order=order),
        [pyramid],
        ["upsample_concat"],
        2 * written,
        True,
    )
