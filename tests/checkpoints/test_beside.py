"""What lies beside weights: configurations, classifiers of other tasks, folders; and parts of networks."""

import importlib.util
import json
import sys
from pathlib import Path

import networks
import pytest
import torch

from pspnet_fast import PSPNet
from pspnet_fast.checkpoints import detect, load_checkpoint
from pspnet_fast.models import CheckpointError


def state_of(name):
    return dict(networks.make(name).state_dict())


def test_a_classifier_of_images_in_smps_file_is_dropped():
    """Its aux_params."""
    state = state_of("smp-50") | {"classification_head.3.weight": torch.rand(2, 256)}
    assert "classification_head.3.weight" in detect(state).dropped


def test_a_folder_of_the_hub(tmp_path):
    save_file = pytest.importorskip("safetensors.torch").save_file
    save_file(state_of("smp-50"), tmp_path / "model.safetensors", {"format": "pt"})
    config = {"encoder_name": "resnet50", "encoder_depth": 3, "upsampling": 8, "activation": None}
    (tmp_path / "config.json").write_text(json.dumps(config))
    net = load_checkpoint(tmp_path)
    images = torch.randn(1, 3, 64, 72)
    with torch.inference_mode():
        theirs = networks.make("smp-50")(images)
        assert (net(images) - theirs).abs().max() < 1e-5 * theirs.abs().max()
    (tmp_path / "config.json").write_text(json.dumps({**config, "upsampling": 4}))
    with pytest.raises(CheckpointError, match=r"smp: upsampling must be 8 in config\.json, .* got 4"):
        load_checkpoint(tmp_path)


def test_a_folder_of_older_files(tmp_path):
    torch.save(state_of("smp-50"), tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text("{}")
    assert load_checkpoint(tmp_path).settings["stages"] == 2
    with pytest.raises(CheckpointError, match=r"a folder must hold model\.safetensors or pytorch_model\.bin"):
        load_checkpoint(tmp_path.parent)


@pytest.mark.parametrize("key", ["config", "cfg"])
def test_both_versions_of_mmseg_keep_the_configuration(key):
    text = "decode_head=dict(align_corners=True, pool_scales=[1, 2, 4, 8])"
    layout = detect({"meta": {key: text}, "state_dict": state_of("mmseg-50")})
    assert layout.align_corners is True
    assert layout.bins == (1, 2, 4, 8)


def test_the_default_of_mmsegs_backbone_is_full():
    """Where a configuration has dilations, but not contract_dilation, which its PSPNets' have."""
    state = state_of("mmseg-50")
    assert detect({"meta": {"config": "dilations=(1, 1, 2, 4)"}, "state_dict": state}).dilation == "full"
    assert (
        detect({"meta": {"config": "dilations=(1, 1, 2, 4), contract_dilation=True"}, "state_dict": state}).dilation
        == "halved"
    )
    assert detect({"meta": {"config": ""}, "state_dict": state}).dilation == "halved"


def test_strides_elsewhere_are_refused():
    with pytest.raises(CheckpointError, match="style='caffe'"):
        detect({"meta": {"config": "backbone=dict(style='caffe')"}, "state_dict": state_of("mmseg-50")})


@pytest.mark.parametrize("form", ["stem.0.weight", "backbone.stem.0.weight"])
def test_mmsegs_backbones(form, tmp_path):
    """Its ImageNet weights, and what mmpretrain saves."""
    backbone = networks.make("mmseg-50").backbone.state_dict()
    prefix, classifier = form.removesuffix("stem.0.weight"), "head.fc.weight" if form[0] == "b" else "fc.weight"
    path = tmp_path / "backbone.pth"
    state = {f"{prefix}{name}": tensor for name, tensor in backbone.items()} | {classifier: torch.rand(10, 128)}
    assert form in state
    torch.save({"meta": {}, "state_dict": state}, path)
    net = load_checkpoint(path, PSPNet(50, width=4, stem="v1c", dilation="halved", aux=False))
    assert torch.equal(net.layer0[0].weight, backbone["stem.0.weight"])
    assert torch.equal(net.layer4[2].bn3.running_var, backbone["layer4.2.bn3.running_var"])
    with pytest.raises(CheckpointError, match="stem is 'v1c', the model's 'deep'"):
        load_checkpoint(path, PSPNet(50, width=4, aux=False))


def test_new_classes_without_an_auxiliary_head_in_the_file(tmp_path):
    path = tmp_path / "no_aux.pth"
    torch.save({name: tensor for name, tensor in state_of("semseg-50").items() if not name.startswith("aux.")}, path)
    net = PSPNet(50, width=4, classes=7)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    load_checkpoint(path, net, reset_classifier=True)
    for name, tensor in net.state_dict().items():
        assert torch.equal(tensor, before[name]) == name.startswith(("aux.", "cls.4.")), name


def test_how_many_files():
    for paths in ((), ("a", "b", "c")):
        with pytest.raises(ValueError, match=f"path must be one file, or CSAIL's two, got {len(paths)}"):
            load_checkpoint(paths)


def test_the_live_library(tmp_path):
    """segmentation_models_pytorch itself, where it is installed (requirements/compare.txt)."""
    if importlib.util.find_spec("segmentation_models_pytorch") is None:
        pytest.skip("segmentation_models_pytorch is not installed (requirements/compare.txt)")
    folder = str(Path(__file__).parents[1] / "integrations")
    sys.path.insert(0, folder)
    try:
        import peers
    finally:
        sys.path.remove(folder)
    with peers.libraries():
        import segmentation_models_pytorch as smp
    model = peers.randomise(smp.PSPNet("resnet18", encoder_weights=None, classes=5)).eval()
    images = torch.randn(1, 3, 64, 96)
    torch.save(model.state_dict(), tmp_path / "smp.pth")
    with torch.inference_mode():
        theirs, ours = model(images), load_checkpoint(tmp_path / "smp.pth")(images)
    assert (ours - theirs).abs().max() < 1e-5 * theirs.abs().max()
