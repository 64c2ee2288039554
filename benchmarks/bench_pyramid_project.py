"""pyramid_project: the 1x1 convolutions of all levels, with the batch norm of evaluation and the ReLU."""

import pytest
import torch
from selection import quick
from workloads import BINS, WORKLOADS

from pspnet_fast import testing
from pspnet_fast.functional import pyramid_project

CELLS = sum(b * b for b in BINS)


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward_backward"])
@quick("ops", backward=True)
def bench_projection(measure, workload, provider, device, dtype, backward):
    shape = WORKLOADS[workload]
    pyramid = torch.randn(shape.batch, CELLS, shape.channels, device=device).to(dtype)
    weights = [(torch.randn(shape.reduced, shape.channels, device=device) / 50).to(dtype) for _ in BINS]
    scale, shift = torch.rand(2, len(BINS), shape.reduced, device=device)
    epilogue = {"relu": False} if backward else {"scale": scale, "shift": shift}
    read = sum(w.nbytes for w in weights) + pyramid.nbytes
    measure(
        f"pyramid_project {'forward + backward' if backward else 'forward'} {workload}",
        provider,
        "nchw",
        lambda p, *w: pyramid_project(p, w, BINS, **epilogue),
        lambda p, *w: testing.plain_pyramid_project(p, *w, bins=BINS, **epilogue),
        [pyramid, *weights],
        ["pyramid_project"],
        3 * read if backward else read,
        backward,
    )
