"""upsample_softmax_add: the probabilities of two overlapping windows of 150 classes, added up."""

import torch
import torch.nn.functional as F
from selection import quick
from workloads import FORMATS, WORKLOADS

from pspnet_fast.functional import upsample_softmax_add

CLASSES, WINDOWS = 150, 2


@quick("ops")
def bench_forward(measure, workload, memory_format, provider, device, dtype):
    shape = WORKLOADS[workload]
    logits = torch.randn(WINDOWS, CLASSES, shape.height, shape.width, device=device).to(dtype)
    logits = logits.contiguous(memory_format=FORMATS[memory_format])
    height, width = 8 * (shape.height - 1) + 1, 8 * (shape.width - 1) + 1
    step = height // 3
    corners = [(0, 0), (0, step)]
    extent = CLASSES, height, width + step

    # One total of each, cleared in the round: fresh memory of this size costs either side as much as the work.
    sums, plain_sums = (torch.zeros(extent, device=device) for _ in range(2))

    def ours(x):
        return upsample_softmax_add(sums.zero_(), x, corners, (height, width))

    def plain(x):
        total = plain_sums.to(torch.promote_types(x.dtype, torch.float32)).zero_()
        for window, (top, left) in zip(x.split(1), corners, strict=True):
            wide = F.interpolate(window, (height, width), mode="bilinear", align_corners=True)
            total[:, top : top + height, left : left + width] += wide.softmax(1)[0]
        return total

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
