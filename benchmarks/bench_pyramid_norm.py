"""pyramid_norm: the batch norms of all levels, in training."""

import torch
from selection import quick
from workloads import BINS, WORKLOADS

from pspnet_fast import testing
from pspnet_fast.functional import pyramid_norm


@quick("ops")
def bench_forward_backward(measure, workload, provider, device, dtype):
    shape = WORKLOADS[workload]
    y = torch.randn(shape.batch, sum(b * b for b in BINS), shape.reduced, device=device).to(dtype)
    weight, bias = torch.rand(2, len(BINS), shape.reduced, device=device) + 0.5
    measure(
        f"pyramid_norm forward + backward {workload}",
        provider,
        "nchw",
        lambda y: pyramid_norm(y, BINS, weight=weight, bias=bias, training=True, relu=False),
        lambda y: testing.plain_pyramid_norm(y, weight.to(y.dtype), bias.to(y.dtype), BINS, relu=False),
        [y],
        ["pyramid_norm"],
        5 * y.nbytes,
        True,
    )


bench_forward_backward.standard_workload = "ade20k_473_pair"
