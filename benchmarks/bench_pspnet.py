"""PSPNet-50 with 150 classes: an image to labels, and a training step with both losses."""

import copy

import torch
import torch.nn.functional as F
from measuring import parameters_as_tensors
from selection import whole_network
from torch import nn
from workloads import BINS, FORMATS, WORKLOADS

from pspnet_fast import PSPNet, testing
from pspnet_fast.backends import ops
from pspnet_fast.nn.plain_ppm import PlainPPM

CLASSES = 150


class _Plain(nn.Module):
    """The same network as it is usually written: concatenation, logits upsampled to the image, then argmax or losses."""

    def __init__(self, net):
        super().__init__()
        copied, channels = copy.deepcopy(net), net.channels[1]
        copied.ppm = PlainPPM(channels, channels // len(BINS), BINS)
        copied.ppm.load_state_dict(net.ppm.state_dict())
        for name in ("layer0", "layer1", "layer2", "layer3", "layer4", "ppm", "cls", "aux"):
            setattr(self, name, getattr(copied, name))

    def forward(self, x, y=None):
        third = self.layer3(self.layer2(self.layer1(self.layer0(x))))
        logits = self._upsample(self.cls(self.ppm(self.layer4(third))), x)
        if y is None:
            return logits
        main, aux = (
            F.cross_entropy(maps, y, ignore_index=255) for maps in (logits, self._upsample(self.aux(third), x))
        )
        return logits.argmax(1), main, aux

    def _upsample(self, logits, x):
        return F.interpolate(logits, x.shape[2:], mode="bilinear", align_corners=True)


def _networks(workload, memory_format, device, dtype, training):
    shape, layout = WORKLOADS[workload], FORMATS[memory_format]
    ours = PSPNet(50, classes=CLASSES, dropout=0.0)
    plain = _Plain(ours)
    x = torch.randn(shape.batch, 3, 8 * shape.height - 7, 8 * shape.width - 7, device=device)
    x = x.to(dtype).contiguous(memory_format=layout)
    ours, plain = (net.to(device, dtype, memory_format=layout).train(training) for net in (ours, plain))
    if training:
        testing.clear_of_kinks(plain, x)
        ours.load_state_dict(plain.state_dict())
    return x, ours, plain


@whole_network
def bench_evaluation(measure, workload, memory_format, provider, device, dtype):
    """To labels. What is gated are their probabilities."""
    x, ours, plain = _networks(workload, memory_format, device, dtype, training=False)
    wide = copy.deepcopy(plain).double()
    measure(
        f"PSPNet-50 to labels {workload}",
        provider,
        memory_format,
        ours.predict,
        lambda x: plain(x).argmax(1),
        [x],
        ops(),
        x.nbytes + sum(p.nbytes for p in ours.parameters()),
        gated=(
            lambda x: ours.predict(x, confidence=True)[1],
            lambda x: (wide if x.dtype == torch.float64 else plain)(x).softmax(1).amax(1),
        ),
    )


@whole_network
def bench_training(measure, workload, memory_format, provider, device, dtype):
    """Forward with both losses and the labels, and backward to every parameter."""
    x, ours, plain = _networks(workload, memory_format, device, dtype, training=True)
    y = torch.randint(CLASSES, (x.shape[0], *x.shape[2:]), device=device)

    def loss(net):
        step = parameters_as_tensors(net)

        def call(x, *parameters):
            _, main, aux = step((x, y), *parameters)
            return main + 0.4 * aux

        return call

    measure(
        f"PSPNet-50 training step {workload}",
        provider,
        memory_format,
        loss(ours),
        loss(plain),
        [x, *plain.parameters()],
        ops(),
        3 * (x.nbytes + sum(p.nbytes for p in ours.parameters())),
        True,
    )


bench_training.standard_workload = "ade20k_473_pair"
