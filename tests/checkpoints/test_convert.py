"""`pspnet-fast convert`: files in, files out, which say which network they are."""

import argparse
import importlib.util
import json
import os
from functools import cache

import networks
import pytest
import torch

from pspnet_fast import PSPNet, config, convert
from pspnet_fast.checkpoints import detect, load_checkpoint
from pspnet_fast.models import CheckpointError, read_checkpoint

IMAGES = torch.randn(1, 3, 64, 72, generator=torch.Generator().manual_seed(0))
NEEDS_SAFETENSORS = pytest.mark.skipif(importlib.util.find_spec("safetensors") is None, reason="needs safetensors")

peer = cache(networks.make)


def logits(net):
    with torch.inference_mode():
        return net(IMAGES)


def same(state, other):
    return state.keys() == other.keys() and all(torch.equal(state[name], other[name]) for name in state)


def command(*argv):
    parser = argparse.ArgumentParser()
    convert.add_arguments(parser)
    return convert.run(parser.parse_args([str(each) for each in argv]))


ALL = ["semseg-50", "mmseg-18", "smp-18", "tramac-50", "csail-18"]


@NEEDS_SAFETENSORS
@pytest.mark.parametrize("name", ALL)
def test_our_safetensors_are_the_same_network(name, tmp_path, capsys):
    """Bitwise the same logits, and the header alone says which network it is."""
    from safetensors import safe_open

    given = networks.write(name, peer(name), tmp_path)
    out = tmp_path / "out.safetensors"
    assert command(*(given if isinstance(given, tuple) else [given]), out.with_suffix("")) == 0
    report = capsys.readouterr().out
    assert "align_corners" in report
    assert "assumed: not in the weights" in report
    net, again = load_checkpoint(given), load_checkpoint(out)
    assert torch.equal(logits(net), logits(again))
    assert same(net.state_dict(), again.state_dict())
    with safe_open(out, "pt") as file:
        metadata = file.metadata()
    assert (metadata["format"], metadata["family"], metadata["classes"]) == ("pspnet_fast", "pspnet_fast", "5")
    assert metadata["source"] == name.partition("-")[0]
    assert json.loads(metadata["normalisation"])["mean"] == [123.675, 116.28, 103.53]
    layout = detect(read_checkpoint(out))
    assert (layout.family, layout.assumed) == ("pspnet_fast", ())
    assert json.loads(metadata["recipe"]).items() <= layout.recipe().items()
    assert all(t.dtype == torch.int64 for n, t in again.state_dict().items() if n.endswith("num_batches_tracked"))


@NEEDS_SAFETENSORS
@pytest.mark.parametrize("name", ["smp-18", "csail-18", "mmseg-18"])
@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
def test_predict_and_evaluate_know_the_network(name, suffix, tmp_path):
    given = networks.write(name, peer(name), tmp_path)
    out = tmp_path / f"out.{suffix}"
    assert command(*(given if isinstance(given, tuple) else [given]), out) == 0
    net, recipe = config.snapshot_network(read_checkpoint(out))
    assert torch.equal(logits(net), logits(load_checkpoint(given)))
    assert (recipe.layers, recipe.width, recipe.classes) == (18, 8, 5)
    other, _ = config.trained_network(out, config.Recipe(dataset="list", classes=5))
    assert torch.equal(logits(other), logits(net))


def test_a_trainings_snapshot_keeps_its_recipe(tmp_path):
    recipe = config.Recipe(dataset="scenes", layers=18, width=4, pooling="max", bins=(1, 2), crop=65)
    net = recipe.network().eval()
    content = {"model": net.state_dict(), "optimizer": {}, "recipe": config.plain(recipe), "iteration": 3}
    torch.save(content, tmp_path / "best.pth")
    assert torch.equal(logits(load_checkpoint(tmp_path / "best.pth")), logits(net))
    assert command(tmp_path / "best.pth", tmp_path / "out.pth") == 0
    assert config.recipe_of(read_checkpoint(tmp_path / "out.pth")["recipe"]) == recipe
    with pytest.raises(CheckpointError, match="bins is .*pooling is 'max', the model's 'average'"):
        load_checkpoint(tmp_path / "best.pth", PSPNet(18, width=4, classes=11, bins=(1, 3)))


@pytest.mark.parametrize("name", ["semseg-50", "mmseg-18", "torchvision-50", "torchvision-18", "imagenet-50"])
def test_a_file_of_the_library_comes_back(name, tmp_path):
    """Through our own file, to the library's: the same names, tensors and wrapping."""
    pytest.importorskip("safetensors")
    given = networks.write(name, peer(name), tmp_path)
    assert command(given, tmp_path / "ours.safetensors") == 0
    family = {"imagenet": "semseg"}.get(name.partition("-")[0], name.partition("-")[0])
    assert command(tmp_path / "ours.safetensors", tmp_path / "back.pth", "--to", family) == 0
    before, after = read_checkpoint(given), read_checkpoint(tmp_path / "back.pth")
    assert same(before.get("state_dict", before), after.get("state_dict", after))
    assert ("meta" in after) == (family == "mmseg")


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_semseg_through_mmsegs_names(suffix, tmp_path, capsys):
    """What semseg's code fixes, mmseg's is told by configuration: it stands in the file, and is read again."""
    pytest.importorskip("safetensors")
    given = networks.write("semseg-50", peer("semseg-50"), tmp_path)
    out = tmp_path / f"mmseg.{suffix}"
    assert command(given, out, "--to", "mmseg") == 0
    report = capsys.readouterr().out
    assert "contract_dilation=False" in report
    assert "stem_channels=8" in report
    assert "align_corners=True" in report
    layout = detect(read_checkpoint(out))
    assert (layout.family, layout.dilation, layout.align_corners) == ("mmseg", "full", True)
    assert torch.equal(logits(load_checkpoint(out)), logits(load_checkpoint(given)))
    assert command(out, tmp_path / "semseg.pth", "--to", "semseg") == 0
    back = read_checkpoint(tmp_path / "semseg.pth")["state_dict"]
    assert same(back, read_checkpoint(given)["state_dict"])


def test_options_of_the_command(tmp_path, capsys):
    given = networks.write("mmseg-18", peer("mmseg-18"), tmp_path)
    out = tmp_path / "out.pth"
    options = ["--align-corners", "--dilation", "full", "--bins", "1", "2", "3", "5", "--reset-classifier", "7"]
    assert command(given, out, *options) == 0
    assert "classifiers made anew, for 7 classes" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mmseg-18.pth", "out.pth"]
    layout = detect(read_checkpoint(out))
    assert (layout.align_corners, layout.dilation, layout.bins, layout.classes) == (True, "full", (1, 2, 3, 5), 7)
    assert torch.equal(load_checkpoint(out).cls[0].weight, peer("mmseg-18").decode_head.bottleneck.conv.weight)


@NEEDS_SAFETENSORS
def test_shared_and_strided_tensors(tmp_path):
    state = peer("semseg-50").state_dict()
    state["cls.0.weight"] = state["cls.0.weight"].to(memory_format=torch.channels_last)
    state["cls.1.weight"] = state["cls.1.bias"]
    torch.save(state, tmp_path / "in.pth")
    assert command(tmp_path / "in.pth", tmp_path / "out.safetensors") == 0
    assert same(read_checkpoint(tmp_path / "out.safetensors")["model"], state)


@NEEDS_SAFETENSORS
def test_what_the_command_refuses(tmp_path, capsys):
    given = networks.write("mmseg-18", peer("mmseg-18"), tmp_path)
    (tmp_path / "text.pth").write_text("not a checkpoint")
    (tmp_path / "folder.pth").mkdir()
    for argv, words in (
        ([given], "FILE must be one or two checkpoints and then the file to write, got 1"),
        ([given, given, given, tmp_path / "o.pth"], "got 4"),
        ([tmp_path / "none.pth", tmp_path / "o.pth"], "no checkpoint at"),
        ([tmp_path / "text.pth", tmp_path / "o.pth"], "cannot be read as a checkpoint"),
        ([given, tmp_path / "o.onnx"], "o.onnx: the file to write must end in .safetensors, .pth, .pt"),
        ([given, tmp_path / "o.pth", "--to", "semseg"], "semseg: the network must have stem 'deep', got 'v1c'"),
        ([given, tmp_path / "o.pth", "--bins", "1"], "bins must be 4, as there are levels, got (1,)"),
        ([given, tmp_path / "o.pth", "--reset-classifier", "0"], "--reset-classifier must be at least 1, got 0"),
        ([given, tmp_path / "no" / "o.pth"], "cannot be written: No such file"),
        ([given, tmp_path / "no" / "o.safetensors"], "o.safetensors: cannot be written"),
        ([given, tmp_path / "folder.pth"], "folder.pth: cannot be written: Is a directory"),
    ):
        assert command(*argv) == 2
        captured = capsys.readouterr()
        assert captured.err.startswith("pspnet-fast convert: ")
        assert words in captured.err
        assert captured.err.count("\n") == 1
        assert not captured.out
    assert not [path for path in tmp_path.iterdir() if path.name.startswith((".", "o."))]


@NEEDS_SAFETENSORS
def test_a_failed_write_leaves_what_was_there(tmp_path, monkeypatch, capsys):
    given = networks.write("mmseg-18", peer("mmseg-18"), tmp_path)
    (tmp_path / "out.safetensors").write_bytes(b"before")

    def full(file):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert command(given, tmp_path / "out.safetensors") == 2
    assert "out.safetensors: cannot be written: No space left on device" in capsys.readouterr().err
    assert (tmp_path / "out.safetensors").read_bytes() == b"before"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mmseg-18.pth", "out.safetensors"]


@NEEDS_SAFETENSORS
def test_damaged_safetensors_are_named(tmp_path):
    given = networks.write("mmseg-18", peer("mmseg-18"), tmp_path)
    assert command(given, tmp_path / "whole.safetensors") == 0
    whole = (tmp_path / "whole.safetensors").read_bytes()
    (tmp_path / "half.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match=r"half\.safetensors' cannot be read as a checkpoint of tensors"):
        load_checkpoint(tmp_path / "half.safetensors")
