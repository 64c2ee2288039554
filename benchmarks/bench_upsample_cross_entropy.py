"""upsample_cross_entropy: the loss at the crop's size, without the upsampled logits."""

import pytest
import torch
from selection import quick
from workloads import FORMATS, WORKLOADS

from pspnet_fast import testing
from pspnet_fast.functional import upsample_cross_entropy

CLASSES = [150, 21, 19]  # ADE20K, PASCAL VOC, Cityscapes


def _measure(measure, workload, memory_format, provider, device, dtype, classes, backward):
    shape = WORKLOADS[workload]
    logits = torch.randn(shape.batch, classes, shape.height, shape.width, device=device).to(dtype)
    size = shape.batch, 8 * (shape.height - 1) + 1, 8 * (shape.width - 1) + 1
    target = torch.randint(classes, size, device=device)
    target[torch.rand(size, device=device) < 0.05] = 255
    measure(
        f"upsample_cross_entropy forward{' + backward' if backward else ''} {workload}, {classes} classes",
        provider,
        memory_format,
        lambda x: upsample_cross_entropy(x, target),
        lambda x: testing.plain_upsample_cross_entropy(x, target),
        [logits.contiguous(memory_format=FORMATS[memory_format])],
        ["upsample_cross_entropy"],
        target.nbytes + logits.nbytes * (2 if backward else 1),
        backward,
    )


@pytest.mark.parametrize("classes", CLASSES)
def bench_forward(measure, workload, memory_format, provider, device, dtype, classes):
    _measure(measure, workload, memory_format, provider, device, dtype, classes, False)


@quick("loss", classes=150)
@pytest.mark.parametrize("classes", CLASSES)
def bench_backward(measure, workload, memory_format, provider, device, dtype, classes):
    _measure(measure, workload, memory_format, provider, device, dtype, classes, True)
