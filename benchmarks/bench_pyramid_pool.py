"""pyramid_pool: every level in one read of x."""

import torch
from selection import quick
from workloads import BINS, FORMATS, WORKLOADS

from pspnet_fast import testing
from pspnet_fast.functional import pyramid_pool


def _run(measure, work, provider, memory_format, workload, x, moved, backward):
    measure(
        f"{work} {workload}",
        provider,
        memory_format,
        lambda x: pyramid_pool(x, BINS),
        lambda x: testing.plain_pyramid_pool(x, BINS),
        [x],
        ["pyramid_pool"],
        moved,
        backward,
    )


def _features(workload, memory_format, device, dtype):
    x = torch.randn(WORKLOADS[workload].size, device=device).to(dtype)
    return x.contiguous(memory_format=FORMATS[memory_format])


def bench_forward(measure, workload, memory_format, provider, device, dtype):
    x = _features(workload, memory_format, device, dtype)
    _run(measure, "pyramid_pool forward", provider, memory_format, workload, x, x.nbytes, False)


@quick("ops")
def bench_forward_backward(measure, workload, memory_format, provider, device, dtype):
    x = _features(workload, memory_format, device, dtype)
    _run(measure, "pyramid_pool forward + backward", provider, memory_format, workload, x, 2 * x.nbytes, True)
