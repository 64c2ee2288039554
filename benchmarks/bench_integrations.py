"""Other people's modules before and after `accelerate`: the libraries' own where they are installed, else their structure.

    pytest benchmarks/bench_integrations.py --benchmark-only [-k "semseg_head and training"]
    pip install --no-deps --target build/compare -r requirements/compare.txt; PYTHONPATH=build/compare pytest ...

One provider, the accelerated module; the baseline is the module itself. Maps are 60x60 (a 473 crop at output stride 8) or
16x16 (a 512 crop at 32, where the UPerNets pool), of 2048 channels and levels of 512, unless the name says otherwise.
"""

import copy
import importlib.util
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from measuring import parameters_as_tensors
from torch import nn
from workloads import FORMATS

from pspnet_fast import testing
from pspnet_fast.backends import ops
from pspnet_fast.integrations import Head, accelerate, features

if "peers" not in sys.modules:
    _path = Path(__file__).parents[1] / "tests" / "integrations" / "peers.py"
    _spec = importlib.util.spec_from_file_location("peers", _path)
    sys.modules["peers"] = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(sys.modules["peers"])
import peers


class SemsegHead(nn.Module):
    """PPM, bottleneck, norm and ReLU of semseg's network, on features."""

    def __init__(self, channels, reduced):
        super().__init__()
        self.ppm = peers.SemsegPPM(channels, reduced)
        self.cls = peers.classifier(channels + 4 * reduced, reduced)[:3]

    def forward(self, x):
        return self.cls(self.ppm(x))


class OnFeatures(Head):
    """Semseg's head is known as a network of images; this one takes features."""

    name, ppm, layers = "semseg", "ppm", "cls"

    def inputs(self, head, channels, size, batch):
        return (features(channels, size, batch),)


def smp_decoder(channels, _):
    if find_spec("segmentation_models_pytorch") is None:
        return peers.SmpPSPDecoder(channels, 512)
    with peers.libraries():
        from segmentation_models_pytorch.decoders.pspnet.decoder import PSPDecoder
    return PSPDecoder([channels], out_channels=512, dropout=0.0)


def smp_upernet(channels, reduced):
    if find_spec("segmentation_models_pytorch") is None:
        return peers.SmpUPerNetPSPModule(channels, reduced)
    with peers.libraries():
        from segmentation_models_pytorch.decoders.upernet.decoder import PSPModule
    return PSPModule(channels, reduced)


def transformers_pyramid(channels, reduced):
    if find_spec("transformers") is None:
        return peers.UperNetPyramidPoolingModule((1, 2, 3, 6), channels, reduced, align_corners=False)
    with peers.libraries():
        from transformers.models.upernet.modeling_upernet import UperNetPyramidPoolingModule
    return UperNetPyramidPoolingModule((1, 2, 3, 6), channels, reduced, align_corners=False)


def listed(channels, size):
    """Only the map that is pooled, in a list."""
    return []


def below(channels, size):
    """The maps under it, which the feature pyramid takes."""
    return [torch.randn(1, channels // 4, 2 * size, 2 * size), torch.randn(1, channels // 2, size, size)]


def before(channels, size):
    """The map before it, for deep supervision."""
    return [torch.randn(1, channels // 2, size, size)]


# Name: how it is built, rows of the map, channels, and what stands before the map in a list of arguments (None: no list).
CASES = {
    "semseg_head": (SemsegHead, 60, 2048, None),
    "smp_pspnet_resnet50_decoder": (smp_decoder, 60, 512, listed),
    "transformers_pyramid_2048": (transformers_pyramid, 16, 2048, None),
    "transformers_pyramid_768": (transformers_pyramid, 16, 768, None),
    "semseg_ppm": (peers.SemsegPPM, 60, 2048, None),
    "zijundeng": (peers.ZijundengPyramidPoolingModule, 60, 2048, None),
    "smp_pspnet": (smp_decoder, 60, 2048, listed),
    "smp_upernet": (smp_upernet, 16, 2048, None),
    "mmseg_psphead": (peers.MmsegPSPHead, 60, 2048, listed),
    "mmseg_uperhead": (peers.MmsegUPerHead, 16, 2048, below),
    "transformers_head": (peers.UperNetHead, 16, 2048, below),
    "csail_ppm": (peers.CsailPPM, 60, 2048, listed),
    "csail_deepsup": (peers.CsailPPMDeepsup, 60, 2048, before),
    "tramac": (peers.TramacPSPHead, 60, 2048, None),
    "encoding": (peers.EncodingPSPHead, 60, 2048, None),
    "torchseg": (peers.TorchSegPyramidPooling, 60, 2048, None),
    "yassouali": (peers.StagesPSPModule, 60, 2048, None),
    "speedinghzl": (peers.SpeedinghzlPSPModule, 60, 2048, None),
    "kazuto1011": (peers.KazutoPyramidPoolModule, 60, 2048, None),
    "lextal": (peers.LextalPSPModule, 60, 2048, None),
    "tutorial": (peers.TutorialPyramid, 60, 2048, None),
}


class OfTheMap(nn.Module):
    """A module as a function of the map that it pools; the maps before it stay as they are."""

    def __init__(self, module, maps):
        super().__init__()
        self.module, self.count = module, None if maps is None else len(maps)
        for i, each in enumerate(maps or ()):
            self.register_buffer(f"map{i}", each)

    def forward(self, x):
        if self.count is None:
            out = self.module(x)
        else:
            maps = [getattr(self, f"map{i}").expand(len(x), -1, -1, -1) for i in range(self.count)]
            out = self.module([*maps, x])
        out = peers.tensors(out)
        return out[0] if len(out) == 1 else torch.cat(out, 1)


@pytest.fixture
def ours(device):
    return "cpu" if device == "cpu" else "cuda"


def _modules(case, batch, memory_format, device, dtype, training):
    """The map, the module as it is, and accelerated."""
    build, size, channels, maps = CASES[case]
    layout = FORMATS[memory_format]
    module = OfTheMap(build(channels, 512), None if maps is None else maps(channels, size))
    plain = peers.randomise(module).to(device, dtype, memory_format=layout).train(training)
    x = torch.randn(batch, channels, size, size, device=device).to(dtype).contiguous(memory_format=layout)
    if training:
        testing.clear_of_kinks(plain, x)
    accelerated = copy.deepcopy(plain)
    assert accelerate(accelerated, families=[OnFeatures()] if case == "semseg_head" else []).accelerated
    return x, plain, accelerated


def _moved(x, module):
    return x.nbytes + sum(p.nbytes for p in module.parameters())


@pytest.mark.parametrize("case", CASES)
def bench_evaluation(measure, case, memory_format, ours, device, dtype):
    x, plain, accelerated = _modules(case, 1, memory_format, device, dtype, training=False)
    wide = copy.deepcopy(plain).double()
    measure(
        f"{case} evaluation",
        ours,
        memory_format,
        accelerated,
        lambda x: wide(x) if x.dtype == torch.float64 else plain(x),
        [x],
        ops(),
        _moved(x, plain),
    )


def _without_last_activations(module):
    """A copy without the ReLUs after the concatenation; those beside a pooling, or below, are of the levels."""
    module = copy.deepcopy(module)
    pools = [m for m in module.modules() if any(type(c) is nn.AdaptiveAvgPool2d for c in m.children())]
    in_levels = {activation for level in pools for activation in level.modules()}
    for parent in module.modules():
        for name, child in parent._modules.items():
            if type(child) is nn.ReLU and child not in in_levels:
                setattr(parent, name, nn.Identity())
    return module


@pytest.mark.parametrize("case", CASES)
def bench_training(measure, case, memory_format, ours, device, dtype):
    """Forward and backward of two maps, gradients of the map and of every parameter.

    The gate leaves the ReLUs after the concatenation out: of millions of values a few are 0 to within rounding, and on which
    side they fall decides whether they have a gradient.
    """
    x, plain, accelerated = _modules(case, 2, memory_format, device, dtype, training=True)
    measure(
        f"{case} training step",
        ours,
        memory_format,
        parameters_as_tensors(accelerated),
        parameters_as_tensors(plain),
        [x, *plain.parameters()],
        ops(),
        3 * _moved(x, plain),
        True,
        gated=tuple(parameters_as_tensors(_without_last_activations(each)) for each in (accelerated, plain)),
    )
