"""upsample_argmax: labels of 150 classes, from white noise and from smooth maps, which real predictions are."""

import pytest
import torch
import torch.nn.functional as F
from selection import quick
from workloads import FORMATS, WORKLOADS

from pspnet_fast import testing
from pspnet_fast.functional import upsample_argmax

CLASSES = 150


def _logits(workload, kind, memory_format, device, dtype):
    shape, generator = WORKLOADS[workload], torch.Generator().manual_seed(0)
    logits = torch.randn(shape.batch, CLASSES, shape.height, shape.width, generator=generator)
    if kind == "smooth":
        few = logits[:, :, ::8, ::8]
        logits = 3 * F.interpolate(few, (shape.height, shape.width), mode="bicubic", align_corners=True)
    return logits.to(device, dtype).contiguous(memory_format=FORMATS[memory_format])


def _size(workload):
    """The crop of a network of output stride 8."""
    return 8 * (WORKLOADS[workload].height - 1) + 1, 8 * (WORKLOADS[workload].width - 1) + 1


@quick("labels", kind="smooth")
@pytest.mark.parametrize("kind", ["noise", "smooth"])
def bench_labels(measure, workload, memory_format, provider, device, dtype, kind):
    """The gate compares float tensors: labels of 32 bits are shown as such, bit by bit."""
    logits, size = _logits(workload, kind, memory_format, device, dtype), _size(workload)
    measure(
        f"upsample_argmax labels, {kind}, {workload}",
        provider,
        memory_format,
        lambda x: upsample_argmax(x, size, dtype=torch.int32).view(torch.float32),
        lambda x: (
            F.interpolate(x, size, mode="bilinear", align_corners=True).argmax(1).to(torch.int32).view(torch.float32)
        ),
        [logits],
        ["upsample_argmax"],
        logits.nbytes + 4 * logits.shape[0] * size[0] * size[1],
    )


@pytest.mark.parametrize("kind", ["noise", "smooth"])
def bench_confidence(measure, workload, memory_format, provider, device, dtype, kind):
    """Labels and their probabilities; the gate compares the latter."""
    logits, size = _logits(workload, kind, memory_format, device, dtype), _size(workload)
    measure(
        f"upsample_argmax labels and confidence, {kind}, {workload}",
        provider,
        memory_format,
        lambda x: upsample_argmax(x, size, confidence=True)[1],
        lambda x: testing.plain_upsample_argmax(x, size)[1],
        [logits],
        ["upsample_argmax"],
        logits.nbytes + 5 * logits.shape[0] * size[0] * size[1],
    )
