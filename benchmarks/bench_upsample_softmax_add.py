"""upsample_softmax_add: the probabilities of four overlapping windows of 150 classes, added up."""

import torch
from workloads import WORKLOADS

from conftest import FORMATS
from pspnet_fast import testing
from pspnet_fast.functional import upsample_softmax_add

CLASSES, WINDOWS = 150, 4


def bench_forward(measure, workload, memory_format, provider, device, dtype):
    shape = WORKLOADS[workload]
    logits = torch.randn(WINDOWS, CLASSES, shape.height, shape.width, device=device).to(dtype)
    logits = logits.contiguous(memory_format=FORMATS[memory_format])
    height, width = 8 * (shape.height - 1) + 1, 8 * (shape.width - 1) + 1
    step = height // 3
    corners = [(0, 0), (0, step), (step, 0), (step, step)]
    extent = CLASSES, height + step, width + step

    def ours(x):
        total = torch.zeros(extent, device=x.device)
        return upsample_softmax_add(total, x, corners, (height, width))

    def plain(x):
        total = torch.zeros(extent, device=x.device, dtype=torch.promote_types(x.dtype, torch.float32))
        return testing.plain_upsample_softmax_add(total, x, corners, (height, width))

    moved = logits.nbytes + 2 * 4 * CLASSES * extent[1] * extent[2]
    measure(
        f"upsample_softmax_add {workload}",
        provider,
        memory_format,
        ours,
        plain,
        [logits],
        ["upsample_softmax_add"],
        moved,
    )
