"""accelerate_losses: a training loop's last lines, as they stand, and in the block: upsampling, loss, its gradient, labels."""

from functools import partial

import torch
import torch.nn.functional as F
from selection import quick
from workloads import FORMATS, WORKLOADS

from pspnet_fast.integrations.losses import accelerate_losses

CLASSES = 150


def _loss(x, target):
    """The lines of semseg's PSPNet; its labels are made and let go."""
    logits = F.interpolate(x, target.shape[1:], mode="bilinear", align_corners=True)
    logits.max(1)[1]
    return F.cross_entropy(logits, target, ignore_index=255)


def _loss_and_accuracy(x, target):
    """One number in which the labels are, too: for the gate, and for a compiler, which leaves out what nobody reads."""
    logits = F.interpolate(x, target.shape[1:], mode="bilinear", align_corners=True)
    right = (logits.max(1)[1] == target).to(x.dtype).mean()
    return F.cross_entropy(logits, target, ignore_index=255) + right


def _accelerated(function, x):
    with accelerate_losses() as used:
        result = function(x)
    assert (used.losses, used.labels, used.materialised.total()) == (1, 1, 0)
    return result


@quick("loss")
def bench_loop(measure, workload, memory_format, provider, device, dtype):
    shape = WORKLOADS[workload]
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(shape.batch, CLASSES, shape.height, shape.width, generator=generator).to(device, dtype)
    size = shape.batch, 8 * (shape.height - 1) + 1, 8 * (shape.width - 1) + 1
    target = torch.randint(CLASSES, size, generator=generator).to(device)
    target[:, ::20] = 255
    plain, checked = partial(_loss, target=target), partial(_loss_and_accuracy, target=target)
    measure(
        f"accelerate_losses, loss + backward + labels, {workload}, {CLASSES} classes",
        provider,
        memory_format,
        partial(_accelerated, plain),
        plain,
        [logits.contiguous(memory_format=FORMATS[memory_format])],
        ["upsample_cross_entropy", "upsample_argmax"],
        2 * target.nbytes + 3 * logits.nbytes,
        backward=True,
        compiled=checked,
        gated=(partial(_accelerated, checked), checked),
    )


bench_loop.standard_workload = "ade20k_473_pair"
