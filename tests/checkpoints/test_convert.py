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
    for argv, words in (
        ([given], "FILE must be one or two checkpoints and then the file to write, got 1"),
        ([given, given, given, tmp_path / "o.pth"], "got 4"),
        ([tmp_path / "none.pth", tmp_path / "o.pth"], "no checkpoint at"),
        ([tmp_path / "text.pth", tmp_path / "o.pth"], "cannot be read as a checkpoint"),
        ([given, tmp_path / "o.onnx"], "o.onnx: the file to write must end in .safetensors, .pth, .pt"),
        ([given, tmp_path / "o.pth", "--to", "semseg"], "semseg: the network must have stem 'deep', got 'v1c'"),
        ([given, tmp_path / "o.pth", "--bins", "1"], "bins must be 4, as there are levels, got (1,)"),
        ([given, tmp_path / "o.pth", "--reset-classifier", "0"], "--reset-classifier must be from 1 to 65536, got 0"),
        ([given, tmp_path / "o.pth", "--reset-classifier", "1000000000"], "must be from 1 to 65536, got 1000000000"),
        ([given, tmp_path / "o.pth", "--bins", "1", "2", "3", "0"], "--bins must be from 1 to 1024 each, got 1 2 3 0"),
        ([given, tmp_path / "o.pth", "--bins", "1", "2", "3", "9999"], "--bins must be from 1 to 1024 each, got"),
        ([given, tmp_path / "no" / "o.pth"], "o.pth: cannot be written: there is no folder"),
        ([given, f"{tmp_path}/no/"], "no/: there is no such folder"),
        ([given, tmp_path / "no" / "o.safetensors"], "o.safetensors: cannot be written"),
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
    assert command(given, tmp_path / "out.safetensors", "--force") == 2
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


# What is there already


def test_no_file_is_overwritten_unless_asked(tmp_path, capsys):
    """The third word forgotten: the decoder is not the file to write. And a source is never."""
    encoder, decoder = networks.write("csail-18", peer("csail-18"), tmp_path)
    kept = {path: path.read_bytes() for path in (encoder, decoder)}
    for argv in ([encoder, decoder], [encoder, encoder], [encoder, decoder, decoder], [encoder, decoder, encoder]):
        for force in ([], ["--force"]):
            if force and argv == [encoder, decoder]:
                continue  # this is then what was asked for
            assert command(*argv, *force) == 2
            assert capsys.readouterr().err.count("\n") == 1
    assert command(encoder, decoder) == 2
    assert "is there already: give the result another name, or --force to replace it" in capsys.readouterr().err
    assert command(decoder, encoder, encoder, "--force") == 2
    assert "would overwrite a file that is read" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in kept} == kept
    out = tmp_path / "out.pth"
    assert command(encoder, decoder, out) == 0
    first = out.read_bytes()
    assert command(encoder, decoder, out) == 2
    assert out.read_bytes() == first
    assert command(encoder, decoder, out, "--reset-classifier", "3", "--force") == 0
    assert load_checkpoint(out).cls[4].out_channels == 3


@NEEDS_SAFETENSORS
def test_the_file_in_a_folder_that_is_read(tmp_path, capsys):
    torch.save(peer("smp-18").state_dict(), tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").symlink_to(tmp_path / "pytorch_model.bin")
    assert command(tmp_path, tmp_path / "model.safetensors", "--force") == 2
    assert "would overwrite a file that is read" in capsys.readouterr().err


@NEEDS_SAFETENSORS
def test_into_a_folder(tmp_path, capsys):
    given = networks.write("mmseg-18", peer("mmseg-18"), tmp_path)
    (tmp_path / "ex").mkdir()
    for folder in (f"{tmp_path}/ex/", tmp_path / "ex"):
        assert command(given, folder) == (0 if folder != tmp_path / "ex" else 2)
    assert "ex/mmseg-18.safetensors: is there already" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ex", "mmseg-18.pth"]
    assert [path.name for path in (tmp_path / "ex").iterdir()] == ["mmseg-18.safetensors"]


def test_what_cannot_be_written_is_said_before_anything_is_read(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(convert, "read", lambda sources: pytest.fail("the file was read"))
    for target in (tmp_path / "no" / "o.pth", tmp_path / "o.onnx"):
        assert command(tmp_path / "w.pth", target) == 2
        assert capsys.readouterr().err.count("\n") == 1


def test_what_was_read_is_said_before_it_is_written(tmp_path, capsys, monkeypatch):
    """A disk that is full then: the report is there, one sentence, and nothing is left."""
    given = networks.write("mmseg-18", peer("mmseg-18"), tmp_path)

    def full(file):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert command(given, tmp_path / "out.pth") == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    assert "No space left on device" in captured.err
    assert captured.out.startswith("mmseg: a PSPNet of 5 classes")
    assert "out.pth" not in captured.out
    assert [path.name for path in tmp_path.iterdir()] == ["mmseg-18.pth"]


# Weights and averages


def test_averages_are_asked_for(tmp_path, capsys):
    weights, averages = peer("semseg-50").state_dict(), networks.make("semseg-50").state_dict()
    averages["cls.4.bias"] = averages["cls.4.bias"] + 1
    torch.save({"model": weights, "model_ema": averages, "epoch": 3, "optimizer": {"state": {}}}, tmp_path / "in.pth")
    assert command(tmp_path / "in.pth", tmp_path / "plain.pth") == 0
    assert "  the weights under 'model'; there are averages, too: --ema" in capsys.readouterr().out
    assert command(tmp_path / "in.pth", tmp_path / "ema.pth", "--ema") == 0
    assert "  the averages, under 'model_ema'" in capsys.readouterr().out
    assert same(read_checkpoint(tmp_path / "plain.pth")["model"], weights)
    assert same(read_checkpoint(tmp_path / "ema.pth")["model"], averages)
    torch.save(weights, tmp_path / "alone.pth")
    assert command(tmp_path / "alone.pth", tmp_path / "no.pth", "--ema") == 2
    assert "there are no averages beside the weights" in capsys.readouterr().err
