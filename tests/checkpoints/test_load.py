"""`load_checkpoint` into a network that there is, and the settings of PSPNet that other libraries' networks need."""

import pathlib
from functools import cache

import networks
import pytest
import torch

from pspnet_fast import PSPNet
from pspnet_fast.checkpoints import load_checkpoint, to_family
from pspnet_fast.models import CheckpointError

IMAGES = torch.randn(1, 3, 64, 72, generator=torch.Generator().manual_seed(0))

peer = cache(networks.make)


def logits(net):
    with torch.inference_mode():
        return net(IMAGES)


def copied(net):
    return {name: tensor.clone() for name, tensor in net.state_dict().items()}


def same(state, other):
    return state.keys() == other.keys() and all(torch.equal(state[name], other[name]) for name in state)


def mmseg_18(**changes):
    """The network that "mmseg-18" is."""
    settings = {"stem": "v1c", "dilation": "halved", "align_corners": False, "dilate_second": False, "classes": 5}
    return PSPNet(**{"layers": 18, "width": 8, **settings, **changes})


# Into a network


def test_the_same_network_is_loaded(tmp_path):
    path = networks.write("mmseg-18", peer("mmseg-18"), tmp_path)
    net = mmseg_18()
    assert load_checkpoint(path, net) is net
    assert net.training
    assert torch.equal(logits(net.eval()), logits(load_checkpoint(path)))
    assert net.layer3[0].bn1.num_batches_tracked == peer("mmseg-18").backbone.layer3[0].bn1.num_batches_tracked > 2**20


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"dilation": "full"}, r"dilation is 'halved' \(assumed\), the model's 'full'"),
        ({"align_corners": True}, r"align_corners is False \(assumed\), the model's True"),
        ({"dilate_second": True}, r"dilate_second is False \(assumed\), the model's True"),
        ({"bins": (1, 2, 4, 8)}, r"bins is \(1, 2, 3, 6\) \(assumed\), the model's \(1, 2, 4, 8\)"),
        ({"output_stride": 16}, r"output_stride is 8 \(assumed\), the model's 16"),
        ({"stem": "deep"}, "stem is 'v1c', the model's 'deep'"),
        ({"layers": 34}, "layers is 18, the model's 34"),
        ({"kernel_sizes": (1, 1), "pooling": "max"}, "kernel_sizes is .*; pooling is 'average', the model's 'max'"),
    ],
)
def test_another_network_is_not(changes, words, tmp_path):
    """Shapes equal or not: both values are named, and nothing is loaded."""
    path = networks.write("mmseg-18", peer("mmseg-18"), tmp_path)
    net = mmseg_18(**changes)
    before = copied(net)
    with pytest.raises(CheckpointError, match=rf"mmseg-18\.pth: the weights \(mmseg\) are another network .*{words}"):
        load_checkpoint(path, net)
    assert same(net.state_dict(), before)


def test_other_classes(tmp_path):
    path = networks.write("mmseg-18", peer("mmseg-18"), tmp_path)
    net = mmseg_18(classes=7)
    before = copied(net)
    with pytest.raises(
        CheckpointError,
        match=r"decode_head\.conv_seg\.weight and auxiliary_head\.conv_seg\.weight are for 5 classes, the model for 7: "
        r"reset_classifier=True \(--reset-classifier\)",
    ):
        load_checkpoint(path, net)
    assert same(net.state_dict(), before)
    load_checkpoint(path, net, reset_classifier=True)
    ours = to_family(peer("mmseg-18").state_dict(), "pspnet_fast")
    for name, tensor in net.state_dict().items():
        assert torch.equal(tensor, (before if name.startswith(("cls.4", "aux.4")) else ours)[name])
    fresh = load_checkpoint(path, reset_classifier=True, classes=9)
    assert fresh.cls[4].out_channels == fresh.aux[4].out_channels == 9
    assert torch.equal(fresh.cls[0].weight, ours["cls.0.weight"])
    for wrong in ({"reset_classifier": True}, {"classes": 9}):
        with pytest.raises(ValueError, match="without a model, reset_classifier and classes go together"):
            load_checkpoint(path, **wrong)
    with pytest.raises(ValueError, match="classes are the model's, got 9 and a model"):
        load_checkpoint(path, net, classes=9)


def test_the_auxiliary_head_may_be_absent(tmp_path):
    path = networks.write("mmseg-18", peer("mmseg-18"), tmp_path)
    net = load_checkpoint(path, mmseg_18(aux=False).eval())
    assert torch.equal(logits(net), logits(load_checkpoint(path)))


@pytest.mark.parametrize("name", ["torchvision-50", "imagenet-50"])
def test_a_backbone_goes_into_the_backbone(name, tmp_path):
    path = networks.write(name, peer(name), tmp_path)
    stem = "plain" if name.startswith("torchvision") else "deep"
    net = PSPNet(50, stem=stem, width=4)
    before = copied(net)
    load_checkpoint(path, net)
    wanted = PSPNet(50, stem=stem, width=4, pretrained=path).state_dict()
    for key, tensor in net.state_dict().items():
        assert torch.equal(tensor, (wanted if key.startswith("layer") else before)[key])
    with pytest.raises(CheckpointError, match="a backbone alone has no classes: give the PSPNet"):
        load_checkpoint(path)
    with pytest.raises(CheckpointError, match=f"stem is '{stem}', the model's 'v1c'"):
        load_checkpoint(path, PSPNet(50, stem="v1c", width=4))


def test_csails_files_are_two(tmp_path):
    encoder, decoder = networks.write("csail-18", peer("csail-18"), tmp_path)
    assert torch.equal(logits(load_checkpoint([decoder, encoder])), logits(load_checkpoint([encoder, decoder])))
    for wrong in ([encoder, encoder], [decoder, decoder]):
        with pytest.raises(
            CheckpointError, match="two files must be CSAIL's encoder .* and decoder .*, got files with"
        ):
            load_checkpoint(wrong)


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return pathlib.Path.touch, (self.path,)


def test_code_is_refused_with_the_way_to_convert(tmp_path):
    content = networks.wrapped("mmseg-18", peer("mmseg-18").state_dict())
    torch.save({**content, "hooks": Payload(tmp_path / "mark")}, tmp_path / "mmseg1.pth")
    with pytest.raises(
        CheckpointError, match=r"mmseg1\.pth' cannot be read.*\(\S+\), and code .* is never run.*torch\.save"
    ):
        load_checkpoint(tmp_path / "mmseg1.pth")
    assert not (tmp_path / "mark").exists()


# Settings of PSPNet that other libraries' networks need


def test_the_settings_change_nothing_unless_given():
    plain = PSPNet(18, width=4)
    given = PSPNet(18, width=4, stages=4, dilate_second=True, kernel_sizes=(3, 1), bin1_norm=True)
    shapes = {name: tensor.shape for name, tensor in plain.state_dict().items()}
    assert {name: tensor.shape for name, tensor in given.state_dict().items()} == shapes
    assert shapes == {name: tensor.shape for name, tensor in networks.Semseg(18, 4, classes=2).state_dict().items()}
    widths = PSPNet(18, width=4, reduction_channels=8, bottleneck_channels=8, aux_channels=4)
    assert {name: tensor.shape for name, tensor in widths.state_dict().items()} == shapes


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"stages": 1}, "stages must be 2, 3 or 4, got 1"),
        ({"kernel_sizes": (3, 5)}, r"kernel_sizes must be two of 1 and 3, got \(3, 5\)"),
        ({"kernel_sizes": (3,)}, r"kernel_sizes must be two of 1 and 3, got \(3,\)"),
        ({"bottleneck_channels": 0}, "bottleneck_channels must be at least 1, got 0"),
        ({"bin1_norm": False, "pooling": "max"}, "bin1_norm=False needs pooling='average'"),
    ],
)
def test_bad_settings_are_named(settings, words):
    with torch.device("meta"), pytest.raises(ValueError, match=f"PSPNet: {words}"):
        PSPNet(18, width=4, **settings)


@pytest.mark.parametrize(("stages", "stride"), [(2, 8), (3, 8), (3, 16)])
def test_fewer_stages(stages, stride):
    net = PSPNet(50, width=4, stages=stages, output_stride=stride)
    assert net.channels == (16 << (stages - 2), 16 << (stages - 1))
    third, fourth = net.features(IMAGES)
    assert (third.shape[1], fourth.shape[1]) == net.channels
    assert fourth.shape[2:] == (64 // stride, -(-72 // stride))
    assert not any(name.startswith(f"layer{stages + 1}") for name in net.state_dict())
    assert [tuple(each.shape) for each in net(IMAGES.repeat(2, 1, 1, 1))] == [(2, 2, 64, 72)] * 2
