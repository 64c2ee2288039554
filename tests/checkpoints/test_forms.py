"""Checkpoints in the shapes people have: wrapped, averaged, of other images and backbones, with settings that cannot be."""

import logging
from functools import cache

import networks
import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from pspnet_fast import PSPNet, config
from pspnet_fast.checkpoints import detect, load_checkpoint, to_family
from pspnet_fast.checkpoints.detect import recognise
from pspnet_fast.models import CheckpointError

peer = cache(networks.make)
WHOLE = ["semseg-50", "mmseg-18", "smp-18", "tramac-50", "csail-18"]


def prefixed(state, prefix):
    return {f"{prefix}{name}": tensor for name, tensor in state.items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def ours(content, **options):
    return recognise(content, **options).state


# Wrappers


@pytest.mark.parametrize("name", [*WHOLE, "torchvision-18", "imagenet-50"])
def test_lightning(name):
    """Its prefix is whatever the attribute is called; losses and metrics of the module lie beside the network."""
    state = peer(name).state_dict()
    wanted = ours(state)
    for prefix in ("model.", "net.", "model.module.", "segmentor."):
        content = {"state_dict": prefixed(state, prefix), "pytorch-lightning_version": "2.4", "callbacks": {}}
        assert same(ours(content), wanted)
        said = f"  names without {prefix.partition('.')[0] + '.'!r}"
        assert said in detect(content).report()
    if name in WHOLE:
        content["state_dict"] |= {"loss.weight": torch.ones(5), "val_iou.confmat": torch.zeros(5, 5)}
        assert same(ours(content), wanted)
        assert {"loss.weight", "val_iou.confmat"} <= {*detect(content).dropped}


def test_a_backbone_is_not_taken_out_of_a_network():
    """One name that is strange, and the encoder alone would be torchvision's ResNet: that is refused."""
    state = {**peer("smp-18").state_dict(), "decoder.strange.weight": torch.zeros(1)}
    with pytest.raises(
        CheckpointError, match=r"nearest is that of segmentation_models_pytorch.* decoder\.strange\.weight"
    ):
        detect(state)


@pytest.mark.parametrize("name", ["semseg-50", "mmseg-18"])
def test_averaged_model(name):
    averaged = AveragedModel(peer(name)).state_dict()
    assert "n_averaged" in averaged
    assert same(ours(averaged), ours(peer(name).state_dict()))
    assert same(ours(averaged, ema=True), ours(peer(name).state_dict()))
    assert any("n_averaged" in sentence for sentence in detect(averaged).unwrapped)


def test_a_teacher_beside_the_weights(tmp_path, caplog):
    """Two networks in one state_dict, as Lightning modules with an average have them."""
    weights = peer("mmseg-18").state_dict()
    averages = {name: tensor + 1 for name, tensor in weights.items()}
    path = tmp_path / "last.ckpt"
    torch.save({"state_dict": {**prefixed(weights, "model."), **prefixed(averages, "ema_model.")}}, path)
    with caplog.at_level(logging.WARNING):
        assert same(load_checkpoint(path).state_dict(), ours(weights))
        assert "there are averages, too, under 'ema_model.'" in caplog.text
        assert same(load_checkpoint(path, ema=True).state_dict(), ours(averages))
    counted = {"ema_model.n_averaged": torch.tensor(3), **prefixed(averages, "ema_model.module.")}
    torch.save({"state_dict": {**prefixed(weights, "model."), **counted}}, path)  # an AveragedModel's
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        assert same(load_checkpoint(path).state_dict(), ours(weights))
        assert "there are averages, too, under 'ema_model.'" in caplog.text
    assert same(load_checkpoint(path, ema=True).state_dict(), ours(averages))
    with pytest.raises(CheckpointError, match=r"there are 2 networks, under 'a\.', 'b\.'"):
        detect({**prefixed(weights, "a."), **prefixed(averages, "b.")})


def test_averages_that_are_not_there(tmp_path):
    torch.save({"state_dict": peer("mmseg-18").state_dict()}, tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match="there are no averages beside the weights"):
        load_checkpoint(tmp_path / "w.pth", ema=True)


# Images of other channels


@pytest.mark.parametrize("channels", [1, 4, 13])
@pytest.mark.parametrize("stem", ["deep", "v1c", "plain"])
def test_channels_of_images(channels, stem, tmp_path):
    net = PSPNet(18, width=4, stem=stem, in_channels=channels, classes=3).eval()
    assert net.in_channels == net.settings["in_channels"] == channels
    torch.save(net.state_dict(), tmp_path / "w.pth")
    again = load_checkpoint(tmp_path / "w.pth")
    images = torch.randn(1, channels, 40, 48)
    with torch.inference_mode():
        assert torch.equal(again(images), net(images))
    with pytest.raises(ValueError, match=rf"x must have {channels} channels"):
        net(torch.randn(1, channels + 1, 40, 48))
    assert f"in_channels         {channels}" in "\n".join(detect(net.state_dict()).report())


def changed_first(name, channels):
    """The library's network for images of other channels."""
    net = networks.make(name)
    for parent in net.modules():
        for key, child in parent.named_children():
            if isinstance(child, nn.Conv2d) and child.in_channels == 3:
                conv = nn.Conv2d(
                    channels, child.out_channels, child.kernel_size, child.stride, child.padding, bias=False
                )
                setattr(parent, key, conv)
                return net.eval()
    raise AssertionError(name)


@pytest.mark.parametrize("name", WHOLE)
def test_the_librarys_networks_of_other_images(name):
    net, images = changed_first(name, 4), torch.randn(1, 4, 64, 72)
    found = recognise(net.state_dict())
    with torch.inference_mode():
        theirs = net(images)
        built = found.layout.build()
        built.load_state_dict(found.state)
        assert (built.eval()(images) - theirs).abs().max() < 1e-5 * theirs.abs().max()


def test_other_images_in_other_libraries(tmp_path):
    """Mmseg is told by its configuration; semseg and torchvision have no such setting."""
    net = PSPNet(18, width=4, stem="v1c", dilation="halved", dilate_second=False, in_channels=4, align_corners=False)
    theirs = to_family(net, "mmseg")
    assert theirs["backbone.stem.0.weight"].shape[1] == 4
    assert same(ours(theirs), net.state_dict())
    semseg = PSPNet(18, width=4, in_channels=4)
    with pytest.raises(CheckpointError, match="semseg: the network must have in_channels 3, got 4"):
        to_family(semseg, "semseg")
    plain = PSPNet(50, width=4, stem="plain", dilation="halved", in_channels=1)
    with pytest.raises(CheckpointError, match="torchvision: the network must have in_channels 3, got 1"):
        to_family(plain, "torchvision")


def test_convert_of_other_images(tmp_path, capsys):
    pytest.importorskip("safetensors")
    from safetensors import safe_open

    from pspnet_fast.convert import convert

    net = PSPNet(18, width=4, stem="v1c", dilation="halved", dilate_second=False, in_channels=4).eval()
    torch.save({"model": net.state_dict()}, tmp_path / "w.pth")
    convert([tmp_path / "w.pth"], tmp_path / "ours", dilation="halved")
    with safe_open(tmp_path / "ours.safetensors", "pt") as file:
        assert "normalisation" not in file.metadata()
    convert([tmp_path / "ours.safetensors"], tmp_path / "back.pth")
    assert same(load_checkpoint(tmp_path / "back.pth").state_dict(), load_checkpoint(tmp_path / "w.pth").state_dict())
    with pytest.raises(CheckpointError, match=r"images of 4 channels and the network for 3: .*Recipes, `predict`"):
        config.trained_network(tmp_path / "ours.safetensors", config.Recipe(dataset="list", classes=2))


def test_pretrained_weights_of_other_images(tmp_path):
    weights = peer("torchvision-18").state_dict()
    with pytest.raises(CheckpointError, match=r"is for images of 3 channels and the network for 4"):
        PSPNet(18, width=8, stem="plain", in_channels=4, pretrained=weights)
    with pytest.raises(ValueError, match="pretrained='torchvision' is for images of 3 channels, got in_channels=4"):
        PSPNet(18, stem="plain", in_channels=4, pretrained="torchvision")
    with pytest.raises(ValueError, match="in_channels must be at least 1, got 0"):
        PSPNet(18, width=4, in_channels=0)
    torch.save(weights, tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match="in_channels is 3, the model's 1"):
        load_checkpoint(tmp_path / "w.pth", PSPNet(18, width=8, stem="plain", in_channels=1))


# Other backbones


def widened(groups):
    """The names and shapes of torchvision's ResNeXt and wide ResNets, narrow: blocks of twice the width, or grouped."""
    state = dict(peer("torchvision-50").state_dict())
    for name, tensor in state.items():
        if "layer" in name and name.endswith("conv1.weight"):
            state[name] = torch.zeros(2 * tensor.shape[0], *tensor.shape[1:])
        if "layer" in name and name.endswith("conv2.weight"):
            state[name] = torch.zeros(2 * tensor.shape[0], 2 * tensor.shape[1] // groups, 3, 3)
        if "layer" in name and name.endswith("conv3.weight"):
            state[name] = torch.zeros(tensor.shape[0], 2 * tensor.shape[1], 1, 1)
    return state


@pytest.mark.parametrize("prefix", ["", "model."])
def test_resnext_and_wide_resnets_are_named(prefix):
    with pytest.raises(
        CheckpointError, match=r"the backbone is a ResNeXt, of 4 groups of 2 channels \('layer1\.0\.conv2"
    ):
        detect(prefixed(widened(4), prefix))
    with pytest.raises(CheckpointError, match="the backbone is a wide ResNet, whose blocks are 8 channels wide for 16"):
        detect(prefixed(widened(1), prefix))


# Settings in a file


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("layers", "fifty"),
        ("layers", [50]),
        ("width", 2**40),
        ("width", "64"),
        ("width", True),
        ("stem", {"a": 1}),
        ("stages", 0),
        ("output_stride", 0),
        ("dilation", None),
        ("bins", []),
        ("bins", [0, 1, 2, 3]),
        ("bins", [10**9] * 4),
        ("bins", "1236"),
        ("align_corners", "no"),
        ("kernel_sizes", [3]),
        ("pooling", "median"),
        ("reduction_channels", -1),
        ("bottleneck_channels", 1.5),
        ("aux_channels", 10**12),
    ],
)
def test_settings_that_cannot_be(name, value):
    content = {"model": peer("semseg-50").state_dict(), "recipe": {"layers": 50, "width": 4, name: value}}
    with pytest.raises(CheckpointError, match=f"the recipe in the file: {name} cannot be "):
        detect(content)


def test_settings_of_another_network():
    """They can be, and are not those of the weights: no network is made to find out."""
    content = {"model": peer("semseg-50").state_dict(), "recipe": {"layers": 269, "width": 2000}}
    with pytest.raises(CheckpointError, match=r"not the tensors those of its PSPNet of 269 layers"):
        detect(content)
    with pytest.raises(CheckpointError, match="what its file says of the network is none: ResNet: width must be even"):
        detect({"model": peer("semseg-50").state_dict(), "recipe": {"width": 5}})
    huge = {"dataset": "list", "classes": 5, "layers": 18, "width": 512}
    with pytest.raises(CheckpointError, match=r"layer0\.0\.weight \(4, 3, 3, 3\) instead of \(512, 3, 3, 3\)"):
        config.snapshot_network({"model": peer("semseg-50").state_dict(), "recipe": huge})


@pytest.mark.parametrize("text", ["[1]", "{", '{"encoder_depth": 1000000000}', '{"encoder_depth": "3"}', '"' + "\xff"])
def test_configurations_that_cannot_be(text, tmp_path):
    torch.save(peer("smp-18").state_dict(), tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text(text, "latin-1")
    with pytest.raises(CheckpointError, match=r"config\.json"):
        load_checkpoint(tmp_path)
    content = {"meta": {"config": f"pool_scales=({'9' * 5000},)"}, "state_dict": peer("mmseg-18").state_dict()}
    with pytest.raises(CheckpointError, match="mmseg's configuration: bins cannot be"):
        detect(content)
