"""Files that are something else, or more, than tensors: what is said of them, and that the advice works."""

import os
import struct
import tarfile
import warnings
import zipfile

import pytest
import torch
from torch import nn

from pspnet_fast.models import CheckpointError, read_checkpoint


class Made:
    """A pickle that calls something."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def html(path):
    path.write_text("\n<!DOCTYPE html><html>Sign in</html>")


def torchscript(path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.save(torch.jit.script(nn.Linear(2, 2)), path)


def npz(path):
    import numpy as np

    np.savez(path, weight=np.zeros(3))
    os.rename(f"{path}.npz", path)


def tar(path):
    with tarfile.open(path, "w") as file:
        file.add(__file__, "storages")


def zipped(path):
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("weights/net.pth", b"1")


def pickled(path):
    import pickle

    path.write_bytes(pickle.dumps({"model": {"w": [1.0]}, "__author__": "somebody"}, protocol=4))


OTHERS = {
    "empty.pth": (b"", "empty: the download"),
    "lfs.pth": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
        "a Git LFS pointer.*git lfs pull",
    ),
    "gzip.pth.gz": (b"\x1f\x8b\x08\x00" + bytes(20), "compressed with gzip: unpack it"),
    "keras.h5": (b"\x89HDF\r\n\x1a\n" + bytes(20), "HDF5, as Keras saves"),
    "psp.caffemodel": (b"\n\x06PSPNet\xa2\x06\x01", "Caffe's: only PyTorch's"),
    "net.onnx": (b"\x08\x08\x12\x07pytorch\x1a\x00", "an ONNX model"),
    "net.bin": (b"\x08\x08\x12\x07pytorch\x1a\x00", "an ONNX model"),
    "model.ckpt-100.data-00000-of-00001": (bytes(99), "TensorFlow's"),
    "login.pth": (html, "a web page, of an error or a login"),
    "script.pt": (torchscript, r"TorchScript, a program.*torch\.jit\.load.*state_dict\(\)"),
    "arrays.pth": (npz, r"NumPy's \.npz"),
    "array.pth": (b"\x93NUMPY\x01\x00" + bytes(80), "a NumPy array"),
    "old.tar": (tar, "a tar archive"),
    "zipped.pth": (zipped, r"a zip archive without torch\.save's tensors \(it begins with 'weights/net\.pth'\)"),
    "detectron.pkl": (pickled, r"a pickle that torch\.save did not write"),
    "photo.pth": (b"\xff\xd8\xff\xe0" + bytes(20), r"a picture \(JPEG\)"),
    "short.safetensors": (struct.pack("<Q", 5000) + b'{"weight"', "truncated: the header of a safetensors file"),
    "text.pth": (b"layers: 50", "no file that torch.save writes, by its first bytes b'layers: 50'"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_files_are_named(tmp_path, name):
    given, words = OTHERS[name]
    path = tmp_path / name
    if callable(given):
        given(path)
    else:
        path.write_bytes(given)
    with pytest.raises(CheckpointError, match=f"cannot be read as a checkpoint of tensors: it is {words}") as caught:
        read_checkpoint(path)
    assert repr(str(path)) in str(caught.value)
    assert "\n" not in str(caught.value)


class Net(nn.Linear):
    """A network whose code is not run."""


@pytest.mark.parametrize(
    ("save", "advice"),
    [
        (lambda net: net, "content.state_dict()"),
        (lambda net: {"model": net, "epoch": 3}, "content['model'].state_dict()"),
        (lambda net: {"net": net.state_dict(), "args": Made(os.getcwd)}, "content['net']"),
        (lambda net: {"state_dict": net.state_dict(), "hook": net}, "content['state_dict']"),
        (
            lambda net: {**net.state_dict(), "args": Made(os.getcwd)},
            "{name: each for name, each in content.items() if isinstance(each, torch.Tensor)}",
        ),
    ],
)
@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.filterwarnings("ignore:Couldn't retrieve source code:UserWarning")
def test_the_advice_works(tmp_path, save, advice, legacy, monkeypatch):
    """What is said about files with more in them is run, and its result is read."""
    monkeypatch.chdir(tmp_path)
    net = Net(2, 3)
    torch.save(save(net), "in.pth", _use_new_zipfile_serialization=not legacy)
    with pytest.raises(CheckpointError, match="holds more than tensors and plain values") as caught:
        read_checkpoint("in.pth")
    code = str(caught.value).partition("once: ")[2]
    assert f"{{'state_dict': {advice}}}" in code
    exec(code, {"torch": torch, "IN": "in.pth", "OUT": "out.pth"})
    read = read_checkpoint("out.pth")["state_dict"]
    assert read.keys() == net.state_dict().keys()
    assert all(torch.equal(read[name], tensor) for name, tensor in net.state_dict().items())
