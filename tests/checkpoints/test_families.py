"""Checkpoints of other libraries: what they mean, against those libraries' networks in plain PyTorch (networks.py)."""

from functools import cache

import networks
import pytest
import torch

from pspnet_fast import PSPNet
from pspnet_fast.checkpoints import detect, load_checkpoint, to_family
from pspnet_fast.checkpoints.detect import recognise
from pspnet_fast.checkpoints.load import built, read
from pspnet_fast.models import CheckpointError

BACKBONES = [name for name in networks.NETWORKS if name.startswith(("torchvision", "imagenet"))]
WHOLE = [name for name in networks.NETWORKS if name not in BACKBONES]
# Maps of 8x9 cells: every bin's windows differ, and the largest dilation reaches across.
IMAGES = torch.randn(1, 3, 64, 72, generator=torch.Generator().manual_seed(0))

peer = cache(networks.make)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("peers")


@pytest.fixture(scope="module")
def file(folder):
    return cache(lambda name: networks.write(name, peer(name), folder))


def logits(net):
    with torch.inference_mode():
        return net(IMAGES)


def distance(one, other):
    return ((one - other).abs().max() / other.abs().max()).item()


def same(state, other):
    assert list(state) == list(other)
    return all(torch.equal(state[name], other[name]) and state[name].dtype == other[name].dtype for name in state)


@pytest.mark.parametrize("name", WHOLE)
def test_logits_are_the_librarys(name, file):
    net = load_checkpoint(file(name))
    assert not net.training
    assert distance(logits(net), logits(peer(name))) < 1e-5
    if net.aux is not None:
        third = torch.randn(1, net.channels[0], 5, 4)
        with torch.inference_mode():
            assert distance(net.aux(third), peer(name).aux(third)) < 1e-6


@pytest.mark.parametrize(
    ("name", "family", "expected"),
    [
        ("semseg-50", "semseg", {"stem": "deep", "dilation": "full", "align_corners": True}),
        ("mmseg-50", "mmseg", {"stem": "v1c", "dilation": "halved", "align_corners": False, "dilate_second": True}),
        ("mmseg-18", "mmseg", {"layers": 18, "width": 8, "stem": "v1c", "dilation": "halved", "dilate_second": False}),
        ("mmseg-50b", "mmseg", {"stem": "plain", "dilation": "halved"}),
        (
            "smp-50",
            "smp",
            {"stem": "plain", "stages": 2, "output_stride": 8, "kernel_sizes": (1, 3), "bin1_norm": False, "aux": False}
            | {"bottleneck_channels": 12, "align_corners": True, "x_last": True, "assumed": ("align_corners", "bins")},
        ),
        ("tramac-50", "tramac", {"stem": "deep", "dilation": "halved", "align_corners": True}),
        ("encoding-50", "encoding", {"stem": "deep", "dilation": "halved", "align_corners": True}),
        (
            "csail-50",
            "csail",
            {"stem": "deep", "dilation": "halved", "align_corners": False, "dilate_second": True}
            | {"reduction_channels": 24, "bottleneck_channels": 24, "aux_channels": 32},
        ),
        (
            "csail-18",
            "csail",
            {"layers": 18, "width": 8, "dilation": "halved", "dilate_second": True, "aux_channels": 16},
        ),
        ("torchvision-50", "torchvision", {"stem": "plain", "classes": None, "assumed": ()}),
        ("torchvision-18", "torchvision", {"layers": 18, "width": 8, "stem": "plain", "classes": None}),
        ("imagenet-50", "semseg", {"stem": "deep", "classes": None, "aux": False}),
    ],
)
def test_layouts(name, family, expected, file):
    layout = detect(read(file(name)))
    whole = {"classes": 5, "bins": (1, 2, 3, 6), "aux": True} if name in WHOLE else {}
    expected = {"family": family, "layers": 50, "width": 4, "x_last": False, **whole, **expected}
    assert {key: getattr(layout, key) for key in expected} == expected
    if name in WHOLE and family != "smp":
        assert {"align_corners", "dilation", "bins"} <= {*layout.assumed}


def test_a_trap_set_otherwise_is_another_function(file):
    """What the weights do not say decides the logits, so that the test of the logits sees each of them."""
    for name, other in (("semseg-50", {"dilation": "halved"}), ("tramac-50", {"dilation": "full"})):
        net = load_checkpoint(file(name), **other)
        assert distance(logits(net), logits(peer(name))) > 1e-3
    for name in ("mmseg-50", "csail-50"):
        net = load_checkpoint(file(name), align_corners=True)
        assert distance(logits(net), logits(peer(name))) > 1e-3
    net = load_checkpoint(file("encoding-50"), bins=(1, 2, 3, 4))
    assert distance(logits(net), logits(peer("encoding-50"))) > 1e-4


def test_what_is_dropped_is_said(file):
    dropped = detect(read(file("smp-50"))).dropped
    assert dropped
    assert all(name.startswith(("encoder.layer3.", "encoder.layer4.")) for name in dropped)
    assert detect(read(file("tramac-50"))).dropped == ("pretrained.fc.weight", "pretrained.fc.bias")
    state = dict(peer("csail-18").state_dict())
    for name in [name for name in state if name.endswith("running_mean")]:
        prefix = name.removesuffix("running_mean")
        state |= {f"{prefix}_tmp_running_mean": state[name], f"{prefix}_tmp_running_var": state[name]}
        state |= {f"{prefix}_running_iter": torch.ones(1)}
    assert len(detect(state).dropped) == len(state) - len(peer("csail-18").state_dict())


@pytest.mark.parametrize("prefix", ["", "backbone."])
def test_imagenet_weights_of_mmseg(prefix):
    """As open-mmlab's resnet50_v1c has them, and as mmpretrain saves them."""
    stages = peer("mmseg-18").backbone.state_dict(prefix=prefix)
    stages["head.fc.weight" if prefix else "fc.weight"] = torch.zeros(10, 64)
    layout = detect(stages)
    assert (layout.family, layout.layers, layout.width, layout.stem, layout.classes) == ("mmseg", 18, 8, "v1c", None)
    assert layout.dropped == (("head.fc.weight",) if prefix else ())
    net = PSPNet(18, width=8, stem="v1c", pretrained=to_family(stages, "pspnet_fast"))
    assert torch.equal(net.layer0[6].weight, peer("mmseg-18").backbone.stem[6].weight)
    assert torch.equal(net.layer4[1].conv2.weight, peer("mmseg-18").backbone.layer4[1].conv2.weight)


# Configuration beside the weights


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("head=dict(align_corners=True)\naux=dict(align_corners = True)", {"align_corners": True}),
        ("a=dict(align_corners=True)\nb=dict(align_corners=False)", {"align_corners": False}),  # undecided: the default
        ("backbone=dict(contract_dilation=False)", {"dilation": "full"}),
        ("head=dict(pool_scales=(1, 2, 4, 8))", {"bins": (1, 2, 4, 8)}),
    ],
)
def test_an_mmseg_configuration_is_read(text, expected):
    layout = detect({"meta": {"config": text}, "state_dict": peer("mmseg-50").state_dict()})
    assert layout == detect({"meta": {"cfg": text}, "state_dict": peer("mmseg-50").state_dict()})  # of its version 1
    assert {key: getattr(layout, key) for key in expected} == expected
    assert ("align_corners" in layout.assumed) == ("align_corners" not in expected or "False)" in text)


def test_a_769_checkpoint_of_mmseg_aligns_corners():
    plain = networks.Mmseg(50, 4, align_corners=True).eval()
    net = built(recognise({"meta": {"config": "align_corners=True,"}, "state_dict": plain.state_dict()}))
    assert distance(logits(net), logits(plain)) < 1e-5


# A folder of the Hugging Face hub


def test_a_folder_of_smp(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    (tmp_path / "config.json").write_text('{"encoder_name": "resnet50", "encoder_depth": 3}')
    with pytest.raises(CheckpointError, match="a folder must hold model.safetensors or pytorch_model.bin"):
        load_checkpoint(tmp_path)
    safetensors.save_file(peer("smp-50").state_dict(), tmp_path / "model.safetensors")
    assert distance(logits(load_checkpoint(tmp_path)), logits(peer("smp-50"))) < 1e-5
    (tmp_path / "config.json").write_text('{"encoder_name": "resnet50", "upsampling": 4}')
    with pytest.raises(CheckpointError, match=r"upsampling must be 8 in config\.json, .* got 4"):
        load_checkpoint(tmp_path)


# What is no network


def test_an_unknown_layout_names_the_nearest():
    state = peer("mmseg-50").state_dict()
    renamed = {name.replace("bottleneck", "fpn_bottleneck"): tensor for name, tensor in state.items()}
    with pytest.raises(
        CheckpointError,
        match=r"nearest is that of mmseg, which has \d+ of \d+ names, but not 6: decode_head\.fpn_bottleneck\.conv\.weight, "
        r".* and 2 more; it lacks decode_head\.bottleneck\.conv\.weight$",
    ):
        detect(renamed)
    with pytest.raises(CheckpointError, match=r"no known layout \(semseg, .*CSAIL\)\): the names begin with weight$"):
        detect({"weight": torch.zeros(1)})
    with pytest.raises(CheckpointError, match=r"CSAIL's decoder is loaded together with its encoder"):
        detect(peer("csail-18").decoder.state_dict())


def test_names_without_their_tensors():
    def changed(name, **changes):
        state = dict(peer(name).state_dict())
        for key, tensor in changes.items():
            if tensor is None:
                del state[key]
            else:
                state[key] = tensor
        return state

    for state, words in (
        (
            changed("mmseg-18", **{"backbone.layer4.1.bn2.weight": None}),
            r"1 missing: backbone\.layer4\.1\.bn2\.weight$",
        ),
        (changed("mmseg-18", **{"decode_head.conv_seg.weight": None}), r"'decode_head\.conv_seg\.weight' is missing"),
        (changed("semseg-50", **{"cls.9.weight": torch.zeros(1)}), r"1 unexpected: cls\.9\.weight"),
        (changed("semseg-50", **{"cls.1.weight": torch.zeros(3)}), r"1 mismatched: cls\.1\.weight \(3,\) instead of"),
        (
            changed("semseg-50", **{"cls.4.weight": torch.zeros(3)}),
            r"'cls\.4\.weight' must be a convolution's, got \(3,\)",
        ),
        (
            changed("smp-18", **{"encoder.conv1.weight": torch.zeros(8, 3, 3, 3)}),
            "the stem must be plain for stages of 8",
        ),
        (
            changed("mmseg-18", **{"backbone.layer2.2.bn2.weight": torch.zeros(16)}),
            "stages of 2, 3, 2, 2 basic blocks are",
        ),
    ):
        with pytest.raises(CheckpointError, match=words):
            detect(state)


def test_old_files_lack_batch_counters(tmp_path):
    state = {name: t for name, t in peer("mmseg-18").state_dict().items() if not name.endswith("num_batches_tracked")}
    torch.save(state, tmp_path / "old.pth")
    assert distance(logits(load_checkpoint(tmp_path / "old.pth")), logits(peer("mmseg-18"))) < 1e-5
    assert same(to_family(state, "mmseg"), state)


def test_levels_whose_bins_nobody_says():
    net = PSPNet(18, bins=(1, 4), width=4)
    with pytest.raises(CheckpointError, match="there are 2 levels, of bins that must be given: --bins"):
        detect(net.state_dict())
    assert detect(net.state_dict(), bins=[1, 4]).bins == (1, 4)
    with pytest.raises(ValueError, match=r"bins must be 2, as there are levels, got \(1, 2, 3\)"):
        detect(net.state_dict(), bins=(1, 2, 3))


def test_what_is_known_is_not_overridden():
    content = {"meta": {"config": "align_corners=True"}, "state_dict": peer("mmseg-18").state_dict()}
    assert detect(content, align_corners=True).align_corners
    with pytest.raises(ValueError, match="mmseg: align_corners is known to be True, got False"):
        detect(content, align_corners=False)
    with pytest.raises(ValueError, match="dilation is known to be 'full', got 'halved'"):
        detect(peer("smp-18").state_dict(), dilation="halved")
    with pytest.raises(ValueError, match="align_corners is no matter of a backbone alone, got False"):
        detect(peer("torchvision-18").state_dict(), align_corners=False)
