"""Loading: all of a checkpoint or nothing, from every form in which PSPNets are published."""

import pathlib
import subprocess
import sys
import types

import pytest
import torch
from torch import nn

from pspnet_fast.models import CheckpointError, PSPNet, ResNet, read_checkpoint


class Backbone(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, stride=4, padding=1)
        self.second = nn.Conv2d(8, 12, 3, stride=2, padding=1)

    def forward(self, x):
        first = self.first(x)
        return first, self.second(first)


def tiny(**choices):
    settings = {"bins": (1, 2), "classes": 5, "backbone": Backbone(), "channels": (8, 12)}
    return PSPNet(**{**settings, **choices})


def snapshot(module):
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def same(module, state, without=()):
    ours = module.state_dict()
    return all(torch.equal(ours[name], tensor) for name, tensor in state.items() if not name.startswith(without))


def without(state, prefix):
    return {name: tensor for name, tensor in state.items() if not name.startswith(prefix)}


@pytest.mark.parametrize(
    "form",
    [
        lambda state: state,
        lambda state: {f"module.{name}": tensor for name, tensor in state.items()},
        lambda state: {f"_orig_mod.module.{name}": tensor for name, tensor in state.items()},
        lambda state: {
            "epoch": 3,
            "state_dict": {f"module.{n}": t for n, t in state.items()},
            "optimizer": {"lr": 0.1},
        },
        lambda state: {"model": state, "args": None},
    ],
    ids=["plain", "module.", "compiled", "semseg", "torchvision"],
)
def test_every_form_of_a_checkpoint_loads(form):
    source, target = tiny(), tiny()
    kept = snapshot(source)
    given = form(source.state_dict())
    names = list(given)
    target.load_state_dict(given, strict=True)
    assert same(target, kept)
    assert list(given) == names


def test_checkpoint_of_distributed_data_parallel_keeps_its_metadata():
    class Wrapped(nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

    source = tiny()
    wrapped = Wrapped(source).state_dict()
    target = tiny()
    target.load_state_dict(wrapped)
    assert same(target, source.state_dict())
    assert "module.backbone" in wrapped._metadata


def test_auxiliary_head_may_be_absent_from_the_checkpoint():
    source, target = tiny(), tiny()
    before = snapshot(target)
    keys = target.load_state_dict(without(source.state_dict(), "aux."), strict=True)
    assert keys.missing_keys == [name for name in before if name.startswith("aux.")]
    assert same(target, without(source.state_dict(), "aux."))
    assert same(target.aux, {name[4:]: tensor for name, tensor in before.items() if name.startswith("aux.")})


def test_auxiliary_head_may_be_absent_from_the_network():
    source, target = tiny(), tiny(aux=False)
    target.load_state_dict(source.state_dict(), strict=True)
    assert same(target, without(source.state_dict(), "aux."))


def test_half_an_auxiliary_head_does_not_fit():
    state = without(tiny().state_dict(), "aux.4.")
    with pytest.raises(CheckpointError, match=r"2 missing: aux\.4\.weight, aux\.4\.bias"):
        tiny().load_state_dict(state)


def test_class_weights_of_the_criterion_may_be_absent_on_either_side():
    weighted, ordinary = tiny(criterion=nn.CrossEntropyLoss(torch.rand(5))), tiny()
    kept = weighted.criterion.weight.clone()
    ordinary.load_state_dict(weighted.state_dict())
    weighted.load_state_dict(tiny().state_dict())
    assert torch.equal(weighted.criterion.weight, kept)


def test_batch_counters_may_be_absent():
    source, target = tiny(), tiny()
    state = {n: t for n, t in source.state_dict().items() if not n.endswith("num_batches_tracked")}
    assert len(state) < len(source.state_dict())
    target.load_state_dict(state, strict=True)
    assert same(target, state)


def test_what_does_not_fit_is_listed_and_nothing_is_loaded():
    net = tiny()
    before = snapshot(net)
    state = {name: torch.zeros_like(tensor) for name, tensor in tiny(classes=7).state_dict().items()}
    del state["backbone.first.bias"]
    state["head.weight"] = torch.zeros(1)
    with pytest.raises(CheckpointError, match="PSPNet: the checkpoint does not fit, nothing was loaded") as caught:
        net.load_state_dict(state)
    lines = str(caught.value).splitlines()[1:]
    assert lines == [
        "  4 mismatched: cls.4.weight (7, 3, 1, 1) instead of (5, 3, 1, 1), cls.4.bias (7,) instead of (5,), "
        "aux.4.weight (7, 2, 1, 1) instead of (5, 2, 1, 1), aux.4.bias (7,) instead of (5,)",
        "  1 missing: backbone.first.bias",
        "  1 unexpected: head.weight",
    ]
    assert same(net, before)


def test_misfit_is_the_error_that_pytorch_raises_and_a_value_error():
    for error in (RuntimeError, ValueError):
        with pytest.raises(error, match="nothing was loaded"):
            tiny().load_state_dict({})


def test_not_strict_takes_what_is_there_but_no_other_shape():
    net = tiny()
    weight = torch.zeros(8, 3, 3, 3)
    keys = net.load_state_dict({"backbone.first.weight": weight, "head.weight": weight}, strict=False)
    assert torch.equal(net.backbone.first.weight, weight)
    assert keys.unexpected_keys == ["head.weight"]
    assert "backbone.first.bias" in keys.missing_keys
    with pytest.raises(CheckpointError, match="1 mismatched"):
        net.load_state_dict({"backbone.first.weight": torch.zeros(1)}, strict=False)


def test_values_that_are_not_tensors_are_named():
    with pytest.raises(CheckpointError, match="maps names to tensors, got int under 'epoch'"):
        tiny().load_state_dict({"epoch": 3})


def test_a_state_dict_that_is_no_mapping_is_named():
    with pytest.raises(TypeError, match="must be a mapping, got list"):
        tiny().load_state_dict([1])


# Files


def test_file_of_a_whole_network(tmp_path):
    source = tiny()
    path = tmp_path / "train_epoch_100.pth"
    torch.save({"epoch": 100, "state_dict": {f"module.{n}": t for n, t in source.state_dict().items()}}, path)
    for pretrained in (path, str(path)):
        assert same(tiny(pretrained=pretrained), source.state_dict())


def test_missing_file_says_that_nothing_is_downloaded():
    with pytest.raises(FileNotFoundError, match=r"no checkpoint at 'resnet50'\. Nothing is downloaded: give the path"):
        tiny(pretrained="resnet50")


def test_directory_is_no_checkpoint(tmp_path):
    with pytest.raises(IsADirectoryError):
        read_checkpoint(tmp_path)


def test_damaged_file_is_named(tmp_path):
    whole = tmp_path / "whole.pth"
    torch.save({"weight": torch.zeros(100)}, whole)
    for name, content in (("half", whole.read_bytes()[:300]), ("text", b"not a checkpoint"), ("empty", b"")):
        path = tmp_path / f"{name}.pth"
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=rf"{name}\.pth' cannot be read as a checkpoint"):
            read_checkpoint(path)


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return pathlib.Path.touch, (self.path,)


def test_code_in_a_file_is_not_run(tmp_path):
    mark, path = tmp_path / "mark", tmp_path / "payload.pth"
    torch.save({"weight": Payload(mark)}, path)
    with pytest.raises(CheckpointError, match=r"payload\.pth' cannot be read"):
        read_checkpoint(path)
    assert not mark.exists()


def test_file_without_a_dictionary_is_named(tmp_path):
    path = tmp_path / "list.pth"
    torch.save([torch.zeros(1)], path)
    with pytest.raises(CheckpointError, match=r"list\.pth' must hold a dictionary, got list"):
        read_checkpoint(path)


# pretrained


@pytest.mark.parametrize("stem", ["deep", "plain"])
def test_imagenet_weights_start_the_backbone(stem):
    weights = {f"module.{n}": t for n, t in ResNet(18, stem=stem, classes=1000).state_dict().items()}
    net = PSPNet(18, stem=stem, pretrained=weights)
    layer0 = {"0": "conv1", "1": "bn1", "3": "conv2", "4": "bn2", "6": "conv3", "7": "bn3"}
    for name, tensor in net.state_dict().items():
        part, index, rest = name.split(".", 2)
        if part == "layer0":
            assert torch.equal(tensor, weights[f"module.{layer0[index]}.{rest}"])
        elif part.startswith("layer"):
            assert torch.equal(tensor, weights[f"module.{name}"])


def test_imagenet_weights_that_lack_a_tensor_do_not_fit():
    weights = ResNet(18).state_dict()
    del weights["layer2.0.conv1.weight"]
    with (
        torch.device("meta"),
        pytest.raises(CheckpointError, match=r"ResNet: .*\n  1 missing: layer2\.0\.conv1\.weight"),
    ):
        PSPNet(18, pretrained=weights)


def test_imagenet_weights_of_another_stem_do_not_fit():
    with torch.device("meta"), pytest.raises(CheckpointError, match=r"conv1\.weight \(64, 3, 7, 7\) instead of"):
        PSPNet(18, stem="deep", pretrained=ResNet(18, stem="plain").state_dict())


def fake_torchvision(monkeypatch, asked):
    def get_model(name, weights):
        asked.append((name, weights))
        return ResNet(int(name.removeprefix("resnet")), stem="plain", classes=1000)

    models = types.ModuleType("torchvision.models")
    models.get_model = get_model
    monkeypatch.setitem(sys.modules, "torchvision", types.ModuleType("torchvision"))
    monkeypatch.setitem(sys.modules, "torchvision.models", models)


def test_torchvision_gives_its_own_weights(monkeypatch):
    asked = []
    fake_torchvision(monkeypatch, asked)
    with torch.device("meta"):
        PSPNet(18, stem="plain", pretrained="torchvision")
    assert asked == [("resnet18", "DEFAULT")]


@pytest.mark.parametrize("choices", [{}, {"stem": "plain", "stride_in": "conv1"}, {"stem": "plain", "layers": 269}])
def test_torchvision_has_no_weights_for_other_networks(monkeypatch, choices):
    fake_torchvision(monkeypatch, [])
    with torch.device("meta"), pytest.raises(ValueError, match="pretrained='torchvision' needs stem='plain'"):
        PSPNet(pretrained="torchvision", **choices)


def test_torchvision_is_asked_for_when_absent(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    monkeypatch.setitem(sys.modules, "torchvision.models", None)
    with torch.device("meta"), pytest.raises(ImportError, match="needs torchvision: pip install torchvision"):
        PSPNet(18, stem="plain", pretrained="torchvision")


def test_pretrained_true_says_what_to_give():
    with (
        torch.device("meta"),
        pytest.raises(TypeError, match=r"must be the path .*, which alone may download, got True"),
    ):
        PSPNet(18, pretrained=True)


def test_pretrained_false_is_none():
    with torch.device("meta"):
        PSPNet(18, pretrained=False)


FULL_DISK = """
import os, resource, sys
from pathlib import Path
import torch
from pspnet_fast.models.checkpoint import write_checkpoint
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
for numel in (25_000, 100_000, 1_000_000):
    try:
        write_checkpoint({"w": torch.zeros(numel), "v": torch.zeros(numel)}, Path("w.pth"))
    except OSError as error:
        print(error)
"""


def test_a_full_disk_is_said_as_what_it_is(tmp_path):
    """PyTorch's own writer says "unexpected pos" instead."""
    line = [sys.executable, "-c", FULL_DISK]
    done = subprocess.run(line, cwd=tmp_path, check=True, timeout=120, capture_output=True, text=True)
    assert done.stdout == "w.pth: cannot be written: File too large\n" * 3
    assert not [*tmp_path.iterdir()]
