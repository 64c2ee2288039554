"""Files that are often taken for a checkpoint of tensors: what they are, and what to do with them, by their first bytes."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .archive import Stub, TensorStub

FIRST = 512
"""How many bytes tell."""

_KINDS = (
    (
        b"version https://git-lfs",
        "a Git LFS pointer in place of the file: `git lfs pull` in its repository fetches the file",
    ),
    (b"\x1f\x8b", "compressed with gzip: unpack it (gunzip, or tar xzf) and give what was in it"),
    (b"BZh", "compressed with bzip2: unpack it (bunzip2, or tar xjf) and give what was in it"),
    (b"\xfd7zXZ\x00", "compressed with xz: unpack it (unxz, or tar xJf) and give what was in it"),
    (b"\x28\xb5\x2f\xfd", "compressed with Zstandard: unpack it (unzstd) and give what was in it"),
    (b"7z\xbc\xaf\x27\x1c", "a 7-Zip archive: unpack it and give what was in it"),
    (b"Rar!", "a RAR archive: unpack it and give what was in it"),
    (b"\x89HDF\r\n\x1a\n", "HDF5, as Keras saves weights: only PyTorch's weights are read"),
    (b"\x93NUMPY", "a NumPy array: put the arrays into a dictionary of tensors, by name, and torch.save it"),
    (b"\x89PNG", "a picture (PNG)"),
    (b"\xff\xd8\xff", "a picture (JPEG)"),
    (b"%PDF", "a PDF document"),
)
_MAGIC = b"\x8a\n\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19"
"""The first pickle of the files that torch.save wrote before its version 1.6."""
_TENSORFLOW = re.compile(r"\.ckpt(-\d+)?\.(index|meta|data-\d+-of-\d+)$|^checkpoint$|^saved_model\.pb$")


def what_it_is(path: Path, first: bytes, length: int) -> str | None:
    """What a file is in place of a checkpoint and what to do, as "it is" goes on; None for one of torch.save's before 1.6.

    Args:
        path: its name tells where its bytes do not.
        first: its first `FIRST` bytes.
        length: bytes in all.
    """
    if not length:
        return "empty: the download or the copy of it did not begin"
    text = first.lstrip().lower()
    if text.startswith((b"<!doctype", b"<html", b"<?xml")):
        return "a web page, of an error or a login: download the file itself"
    for begins, kind in _KINDS:
        if first.startswith(begins):
            return kind
    if first[257:262] == b"ustar":
        return (
            "a tar archive: unpack it and give what was in it; one that torch.save wrote before PyTorch 0.2 is read by "
            "PyTorch alone: torch.save(torch.load(IN), OUT) with an old version of it"
        )
    if _TENSORFLOW.search(path.name):
        return "TensorFlow's: only PyTorch's weights are read"
    if path.suffix == ".caffemodel":
        return "Caffe's: only PyTorch's weights are read, so that it must be converted first"
    if path.suffix == ".onnx" or re.match(rb"\x08[\x01-\x14]\x12.pytorch", first, re.DOTALL):
        return "an ONNX model, which holds a graph: give the checkpoint that it was exported from"
    if first[8:9] == b"{" and int.from_bytes(first[:8], "little") > length - 8:
        return "truncated: the header of a safetensors file is longer than what is there"
    if not first.startswith(b"\x80"):
        return f"no file that torch.save writes, by its first bytes {first[:16]!r}"
    if _MAGIC not in first[:32]:
        return (
            "a pickle that torch.save did not write (detectron2's model zoo, NumPy): where it is trusted, unpickle it "
            "once and torch.save a dictionary of its arrays as tensors, by name"
        )
    return None


def what_the_archive_is(names: Sequence[str]) -> str | None:
    """The same of a zip archive without the tensors of torch.save, or with more, by the names in it; None without any."""
    inside = {name.partition("/")[2] for name in names}
    if "constants.pkl" in inside:
        return (
            "TorchScript, a program: where it is trusted, save its weights alone, once: "
            "torch.save(torch.jit.load(IN, map_location='cpu').state_dict(), OUT)"
        )
    if "data.pkl" in inside or not names:
        return None
    if all(name.endswith(".npy") for name in names):
        return (
            "NumPy's .npz: torch.save({name: torch.from_numpy(array) for name, array in numpy.load(IN).items()}, OUT) "
            "makes a checkpoint of it"
        )
    return f"a zip archive without torch.save's tensors (it begins with {names[0]!r}): unpack it"


def how_to_save(content: Any) -> str:
    """Python that saves the weights alone of a file with more in it, `content` as a dry run found it."""
    weights = "content.state_dict()"
    if isinstance(content, Mapping) and not isinstance(content, Stub):
        states = [key for key, value in content.items() if isinstance(value, Mapping) and _holds_tensors(value)]
        modules = [key for key, value in content.items() if isinstance(value, Stub) and value.module]
        weights = "{name: each for name, each in content.items() if isinstance(each, torch.Tensor)}"
        if not _holds_tensors(content) and (states or modules):
            weights = f"content[{states[0]!r}]" if states else f"content[{modules[0]!r}].state_dict()"
    return (
        "content = torch.load(IN, map_location='cpu', weights_only=False); "
        f"torch.save({{'state_dict': {weights}}}, OUT)"
    )


def _holds_tensors(content: Mapping[Any, Any]) -> bool:
    return any(isinstance(value, TensorStub) for value in content.values())
