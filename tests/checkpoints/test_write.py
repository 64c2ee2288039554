"""`to_family`: there and back to the bit, and what a library cannot express."""

from functools import cache

import networks
import pytest
import torch

from pspnet_fast import PSPNet
from pspnet_fast.checkpoints import detect, to_family
from pspnet_fast.checkpoints.detect import recognise
from pspnet_fast.checkpoints.load import built
from pspnet_fast.models import CheckpointError

# Maps of 8x9 cells: every bin's windows differ, and the largest dilation reaches across.
IMAGES = torch.randn(1, 3, 64, 72, generator=torch.Generator().manual_seed(0))

peer = cache(networks.make)


def logits(net):
    with torch.inference_mode():
        return net(IMAGES)


def same(state, other):
    assert list(state) == list(other)
    return all(torch.equal(state[name], other[name]) and state[name].dtype == other[name].dtype for name in state)


@pytest.mark.parametrize(
    "name", ["semseg-50", "mmseg-50", "mmseg-18", "mmseg-50b", "torchvision-50", "torchvision-18", "imagenet-50"]
)
def test_round_trips_are_bitwise(name):
    """Through our names: the same names, in the same order, the same tensors."""
    state = peer(name).state_dict()
    ours = to_family(state, "pspnet_fast")
    family = {"imagenet": "semseg"}.get(name.partition("-")[0], name.partition("-")[0])
    assert same(to_family(carried(name, ours), family), state)


def carried(name, ours):
    """Our names say less than mmseg's do: which dilation and align_corners are the weights', a recipe says."""
    if not name.startswith("mmseg"):
        return ours
    return {"model": ours, "recipe": detect(peer(name).state_dict()).recipe()}


def test_semseg_to_mmseg_and_back():
    state = peer("semseg-50").state_dict()
    theirs = to_family(state, "mmseg")
    assert theirs.keys() == networks.Mmseg(50, 4, "deep").state_dict().keys()
    assert same(to_family(theirs, "pspnet_fast"), state)


@pytest.mark.parametrize("name", ["semseg-50", "mmseg-18"])
def test_a_network_is_written_as_the_library_would(name):
    """From the module: a state_dict that the library's own network loads."""
    net = built(recognise(networks.wrapped(name, peer(name).state_dict())))
    family = name.partition("-")[0]
    copy = networks.NETWORKS[name]()
    copy.load_state_dict(to_family(net, family))
    assert torch.equal(logits(copy.eval()), logits(peer(name)))


def test_a_backbone_is_taken_out():
    """Of mmseg's `b` variant, which has torchvision's stem."""
    state = peer("mmseg-50b").state_dict()
    taken = to_family(state, "torchvision")
    plain = networks.Numbered(50, 4, "plain", networks.HALVED)
    plain.load_state_dict(taken)
    maps = plain.eval()(IMAGES)
    assert torch.equal(maps[-1], peer("mmseg-50b").maps(IMAGES)[-1])


@pytest.mark.parametrize(
    ("name", "family", "words"),
    [
        ("mmseg-50", "semseg", r"semseg: .* stem 'deep', got 'v1c'; dilation 'full', got 'halved'; align_corners True"),
        ("tramac-50", "semseg", "dilation 'full', got 'halved': nothing there says otherwise"),
        ("smp-50", "mmseg", "mmseg: the network must have stages 4, got 2"),
        ("csail-18", "mmseg", "mmseg's basic blocks: the network must have dilate_second False, got True"),
        ("semseg-50", "torchvision", "torchvision: the network must have stem 'plain', got 'deep'"),
        ("imagenet-50", "torchvision", "stem 'plain', got 'deep'"),
        ("mmseg-18", "torchvision", "stem 'plain', got 'v1c'"),
        ("torchvision-50", "semseg", "semseg: the network must have stem 'deep', got 'plain'"),
    ],
)
def test_what_a_library_cannot_express_is_refused(name, family, words):
    with pytest.raises(CheckpointError, match=words):
        to_family(peer(name).state_dict(), family)


def test_other_refusals():
    wide = PSPNet(18, width=4, bottleneck_channels=6, dilate_second=False, dilation="halved")
    with pytest.raises(CheckpointError, match="mmseg: levels and bottleneck must have as many channels.* got 8 and 6"):
        to_family(wide, "mmseg")
    dilated = PSPNet(18, width=4, stem="plain", dilation="halved")
    with pytest.raises(CheckpointError, match="torchvision's basic blocks: .* output_stride 32, got 8"):
        to_family(dilated, "torchvision")
    with pytest.raises(CheckpointError, match="torchvision: .* dilation 'halved', got 'full'"):
        to_family(PSPNet(50, width=4, stem="plain"), "torchvision")
    with pytest.raises(ValueError, match="family must be one of semseg, torchvision, mmseg, pspnet_fast, got 'smp'"):
        to_family(dilated, "smp")
    with pytest.raises(CheckpointError, match="conv_bias must be False for checkpoints, got True"):
        to_family(PSPNet(18, width=4, conv_bias=True), "semseg")
    with torch.device("meta"):
        other = PSPNet(backbone=torch.nn.Identity(), channels=(8, 8))
    with pytest.raises(CheckpointError, match="a backbone of its own has no layout"):
        to_family(other, "semseg")
