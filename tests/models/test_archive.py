"""What the reader promises: a checkpoint is the one that was written, no larger than its file, or it is refused by name."""

import io
import json
import os
import pickle
import random
import struct
import threading
import zipfile
from collections import Counter

import pytest
import torch
from torch import nn

from pspnet_fast.models import CheckpointError, read_checkpoint
from pspnet_fast.models.archive import RefusedError, dry_run


def content():
    generator = torch.Generator().manual_seed(0)
    model = {f"l{i}.weight": torch.randn(4, 3, generator=generator) for i in range(4)}
    return {
        "model": model,
        "optimizer": {"state": {0: {"m": torch.arange(5)}}},
        "iteration": 3,
        "recipe": {"layers": 18},
    }


def same(one, other):
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    return one == other


def bytes_of(value, **options):
    file = io.BytesIO()
    torch.save(value, file, **options)
    return file.getvalue()


def refused(path, data, words):
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=words) as caught:
        read_checkpoint(path)
    assert repr(str(path)) in str(caught.value)
    assert "\n" not in str(caught.value)


def outcome(path, data):
    """What is read of a file, or None where it is refused, by name."""
    path.write_bytes(data)
    try:
        return read_checkpoint(path)
    except CheckpointError as error:
        return None if repr(str(path)) in str(error) else error


def flipped(data, bit):
    other = bytearray(data)
    other[bit // 8] ^= 1 << bit % 8
    return bytes(other)


def directory_of(data):
    return data.index(b"PK\x01\x02")


# Damage


def test_a_flipped_bit_is_refused_or_without_effect(tmp_path):
    """Anywhere, and every bit of what stands in the directory of one tensor's bytes."""
    data, wanted = bytes_of(content()), content()
    entry = data.index(b"data/0", directory_of(data)) - data[directory_of(data) :].index(b"archive") - 60
    bits = {*random.Random(0).sample(range(8 * len(data)), 400), *range(8 * entry, 8 * (entry + 80))}
    read = [outcome(tmp_path / "w.pth", flipped(data, bit)) for bit in sorted(bits)]
    whole = [each for each in read if each is not None]
    assert 0 < len(whole) < len(read) / 2
    assert all(same(wanted, each) for each in whole)


@pytest.mark.parametrize("legacy", [False, True])
def test_a_truncated_file_is_refused_by_name(tmp_path, legacy):
    data = bytes_of(content(), _use_new_zipfile_serialization=not legacy)
    for length in range(0, len(data), 41):
        refused(tmp_path / "w.pth", data[:length], r"w\.pth' cannot be read as a checkpoint of tensors")


def test_damage_to_files_without_checksums_is_never_another_exception(tmp_path):
    """What torch.save wrote before 1.6: tensors may be others, which nothing tells; anything else is refused."""
    data, path = bytes_of(content(), _use_new_zipfile_serialization=False), tmp_path / "w.pth"
    path.write_bytes(data)
    assert same(read_checkpoint(path), content())
    read = [outcome(path, flipped(data, bit)) for bit in random.Random(1).sample(range(8 * len(data)), 400)]
    assert all(each is None or isinstance(each, dict) for each in read)


def patched(data, name, offset, value, local=False):
    """The directory's header of an entry with another value at an offset of its; or the one before its bytes."""
    header = data.index(name) - (30 if local else 46) if local else data.index(name, directory_of(data)) - 46
    return data[: header + offset] + value + data[header + offset + len(value) :]


@pytest.mark.parametrize(
    ("offset", "value", "local", "words"),
    [
        (8, b"\x09\x08", False, "do not agree"),  # encrypted: torch returns memory as it found it
        (6, b"\x09\x08", True, "do not agree"),
        (8, b"\x08\x00", True, "do not agree"),
        (38, b"\x10", False, "do not agree"),  # a directory: the same
        (10, b"\x08", False, "is compressed"),
        (24, b"\x10\x00", False, "is compressed"),  # its size, and stored in as many bytes as before
        (26, b"\x02\x00", True, "truncated or damaged|do not agree"),  # the length of its name
    ],
)
def test_headers_that_disagree(tmp_path, offset, value, local, words):
    data = bytes_of(content())
    refused(tmp_path / "w.pth", patched(data, b"archive/data/0", offset, value, local), words)


def test_both_headers_of_an_encrypted_entry(tmp_path):
    data = patched(bytes_of(content()), b"archive/data/0", 8, b"\x09\x08")
    refused(tmp_path / "w.pth", patched(data, b"archive/data/0", 6, b"\x09\x08", local=True), "do not agree")


def test_an_entry_inside_of_another(tmp_path):
    """With a header and a checksum of its own, in another's bytes: sizes would add up to more than the file."""

    def packed(entries):
        file = io.BytesIO()
        with zipfile.ZipFile(file, "w") as archive:
            for name, value in entries:
                archive.writestr(zipfile.ZipInfo(name), value)
        return file.getvalue()

    inner = packed([("archive/b", b"12345678")])
    inner = inner[: directory_of(inner)]
    data = packed([("archive/data.pkl", b"N."), ("archive/a", inner), ("archive/b", b"12345678")])
    at = data.index(b"archive/b", directory_of(data)) - 46 + 42
    refused(
        tmp_path / "w.pth",
        data[:at] + struct.pack("<L", data.index(inner)) + data[at + 4 :],
        "b lies over another entry",
    )


def rewritten(data, change, **options):
    """The same archive, packed anew."""
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(file, "w", **options) as new:
        for entry in old.infolist():
            for name, value in change(entry.filename, old.read(entry)):
                new.writestr(name, value)
    return file.getvalue()


def test_an_archive_packed_anew_is_read(tmp_path):
    """Without compression it is what torch.save writes, without its padding."""
    (tmp_path / "w.pth").write_bytes(rewritten(bytes_of(content()), lambda name, value: [(name, value)]))
    assert same(read_checkpoint(tmp_path / "w.pth"), content())


@pytest.mark.filterwarnings("ignore:Duplicate name:UserWarning")
def test_other_ways_to_hold_other_bytes(tmp_path):
    data, path = bytes_of(content()), tmp_path / "w.pth"
    keep = lambda name, value: [(name, value)]  # noqa: E731
    refused(path, rewritten(data, keep, compression=zipfile.ZIP_DEFLATED), "is compressed, which torch.save never does")
    twice = lambda name, value: [(name, value)] * (1 + name.endswith("data/0"))  # noqa: E731
    refused(path, rewritten(data, twice), "two entries of one name")
    cased = lambda name, value: [(name, value), (name.upper(), value)] if name[-1] == "0" else [(name, value)]  # noqa: E731
    refused(path, rewritten(data, cased), "two entries of one name")
    refused(path, data + b"more", "bytes behind its end")
    at = data.index(b"archive/data/1", directory_of(data)) - 46
    first = data.index(b"archive/data/0", directory_of(data)) - 46
    shared = data[: at + 42] + data[first + 42 : first + 46] + data[at + 46 :]
    refused(path, shared, "damaged")


def test_what_is_no_regular_file(tmp_path):
    with pytest.raises(IsADirectoryError, match="is a folder: give the checkpoint's file in it"):
        read_checkpoint(tmp_path)
    os.mkfifo(tmp_path / "fifo")
    failed = []

    def read():
        try:
            read_checkpoint(tmp_path / "fifo")
        except OSError as error:
            failed.append(str(error))

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    thread.join(10)
    assert "is no regular file" in failed[0]


# Sizes


def expanded():
    return {"weight": torch.zeros(1).expand(1 << 20)}


class Made:
    """A pickle that calls something."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


WHOLE = torch.zeros(1 << 16)


def resized(data, numel):
    """The archive with a storage of so many elements, of 12 before."""

    def change(name, value):
        return [
            (name, value.replace(b"K\x0ct", b"J" + struct.pack("<i", numel) + b"t") if name.endswith(".pkl") else value)
        ]

    return rewritten(data, change)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (lambda: bytes_of(expanded()), r"a tensor of size \(1048576,\) and strides \(0,\) in a storage of 1 elements"),
        (lambda: bytes_of(expanded(), _use_new_zipfile_serialization=False), "in a storage of 1 elements"),
        (lambda: bytes_of({"w": Made(torch.Tensor, 3_000_000_000)}), r"it calls torch\.Tensor"),
        (lambda: bytes_of({"w": Made(torch.FloatTensor, 3_000_000_000)}), r"it calls torch\.FloatTensor"),
        (
            lambda: bytes_of({"w": Made(torch.UntypedStorage, 3_000_000_000)}),
            r"it calls torch\.storage\.UntypedStorage",
        ),
        (lambda: bytes_of({"w": Made(bytearray, 3_000_000_000)}), r"it calls builtins\.bytearray"),
        (
            lambda: bytes_of(
                {"w": Made(torch._tensor._rebuild_from_type_v2, torch.Tensor, torch.Tensor, (3_000_000_000,), {})}
            ),
            r"it calls torch\.Tensor",
        ),
        (lambda: resized(bytes_of({"w": torch.zeros(12)}), 1 << 30), "storage '0' of 4294967296 bytes, for which"),
        (lambda: bytes_of({str(i): WHOLE[:] for i in range(99)}), "its tensors are 25952256 bytes"),
        (lambda: bytes_of({"w": torch.zeros(3).to_sparse()}), "not plain .* are not read"),
    ],
)
def test_no_more_memory_than_the_file_has_bytes(tmp_path, data, words):
    refused(tmp_path / "w.pth", data(), words)


def test_the_legacy_format_too(tmp_path):
    """There PyTorch makes a storage as large as the tensor says, of memory as it found it."""
    data = bytes_of({"w": torch.zeros(12)}, _use_new_zipfile_serialization=False)
    path = tmp_path / "w.pth"
    refused(
        path,
        data.replace(b"K\x0c\x85", b"J\x00\x00\x00\x40\x85"),
        r"a tensor of size \(1073741824,\) .* of 12 elements",
    )
    wide = data.replace(b"K\x01\x85", b"J\x00\x00\x10\x00\x85")
    refused(path, wide, r"strides \(1048576,\) in a storage of 12 elements")
    huge = data.replace(b"K\x0c", b"J\x00\x00\x00\x40")
    refused(path, huge, "storage '[0-9]+' of 4294967296 bytes, for which the file has")


@pytest.mark.parametrize(
    "tensor",
    [
        torch.arange(24.0).reshape(4, 6).t(),
        torch.zeros(2, 3, 4, 5).to(memory_format=torch.channels_last),
        torch.arange(24.0)[3:20:2],
        torch.zeros(0, 3),
        torch.tensor(7),
        torch.zeros(3, dtype=torch.bfloat16),
        torch.zeros(3, dtype=torch.bool),
        nn.Parameter(torch.ones(2)),
    ],
)
@pytest.mark.parametrize("legacy", [False, True])
def test_ordinary_views_are_read(tmp_path, tensor, legacy):
    value = {"a": tensor, "b": tensor, "c": b"bytes", "size": tensor.shape, "dtype": tensor.dtype, "set": {1, 2}}
    torch.save(value, tmp_path / "w.pth", _use_new_zipfile_serialization=not legacy)
    read = read_checkpoint(tmp_path / "w.pth")
    assert same(value, read)
    assert read["a"].stride() == tensor.stride()


def test_a_dry_run_makes_nothing():
    """Calls are stubs, whatever they would do."""
    sketch = dry_run(io.BytesIO(b"cos\nsystem\n(S'touch mark'\ntR."), 100)
    assert not sketch
    assert not os.path.exists("mark")
    with pytest.raises(RefusedError, match="calls _codecs.encode"):
        dry_run(io.BytesIO(b"c_codecs\nencode\n(S'aa'\nS'hex'\ntR."), 100)


ITEM = b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\n%s\x8c\x03cpu%stQ"
VIEW = b"ctorch._utils\n_rebuild_tensor_v2\n(" + ITEM % (b"\x8c\x010", b"K\x0c") + b"K\x00%s%s\x89}tR"
DOUBLED = b")q\x00" + b"".join(b"h%c\x86q%c" % (i, i + 1) for i in range(60))
"""A tuple twice in a tuple twice in a tuple: 60 levels, whose hash and whose words take as many steps as 2 to the 60."""
MANY = b"]q\x01(" + b"K\x01" * 20_000 + b"e"
ATTRIBUTES = b"}q\x01(" + b"".join(b"\x8c\x04%04dK\x01" % i for i in range(2000)) + b"u"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"}" + DOUBLED + b"K\x01s.", "as a key"),
        (b"}(" + DOUBLED + b"K\x01u.", "as a key"),
        (b"c__builtin__\nset\n]" + DOUBLED + b"a\x85R.", "as a key"),
        (b"ccollections\nOrderedDict\n]]" + DOUBLED + b"aK\x01aa\x85R.", "as a key"),
        (b"(" + DOUBLED + b"K\x01d.", "weights_only=False"),
        (b"(" + DOUBLED + b"\x91.", "weights_only=False"),
        (b"\x8f(" + DOUBLED + b"\x90.", "weights_only=False"),
        (b"\x96\x00\x00\x00\x00\x01\x00\x00\x00a.", "weights_only=False"),  # room for 4 GB, set aside at once
        (b"c_codecs\nencode\n(\x8c\x01a" + DOUBLED + b"tR.", "another encoding"),
        (ITEM % (DOUBLED, b"K\x0c") + b".", "without a key or a number"),
        (ITEM % (b"\x8c\x010", DOUBLED) + b".", "without a key or a number"),
        (VIEW % (DOUBLED, b"K\x01\x85") + b".", "none"),
        (VIEW % (b"(\x8a\x0a" + b"\x7f" * 10 + b"t", b"K\x01\x85") + b".", "none"),  # numbers of any length
        (VIEW % (b"(" + b"K\x01" * 99 + b"t", b"(" + b"K\x01" * 99 + b"t") + b".", "none"),
        (VIEW % (b"K\x0c\x85", b"K\x01\x85") + b"(K\x01tb.", "made another afterwards"),
        (b"ctorch\nSize\n" + MANY + b"\x85R.", "a size that is none"),
        (b"](c__builtin__\nset\nq\x02" + MANY + b"\x85R" + b"h\x02h\x01\x85R" * 9 + b"e.", "again and again"),
        (b"](c__builtin__\nset\nq\x02" + MANY + b"\x85\x81" + b"h\x02h\x01\x85\x81" * 9 + b"e.", "again and again"),
        (b"](ccollections\nOrderedDict\n)R" + ATTRIBUTES + b"b" + b"h\x01b" * 20 + b"e.", "again and again"),
        (b"](" + b"".join(b"cm\n%d\n" % i for i in range(5000)) + b"e.", "more than 4096 classes"),
    ],
)
def test_what_a_pickle_makes_of_little(content, words):
    """Steps and memory are a file's length, too, and not what its pickle says."""
    with pytest.raises(RefusedError, match=words):
        dry_run(io.BytesIO(b"\x80\x02" + content), len(content))


def test_keys_and_calls_as_people_have_them(tmp_path):
    generation = {"a": torch.ones(2), ("lr", (1, 2)): 3, "milestones": Counter([30, 30, 60]), "set": {1, (2, 3)}}
    torch.save(generation, tmp_path / "w.pth")
    assert same(generation, read_checkpoint(tmp_path / "w.pth"))


def test_legacy_storages_are_all_in_the_list_of_those_that_follow(tmp_path):
    """PyTorch leaves the others' memory as it found it."""
    data = bytes_of({"w": torch.ones(12)}, _use_new_zipfile_serialization=False)
    file = io.BytesIO(data)
    for _ in range(3):
        pickle.load(file)
    dry_run(file, len(data))
    keys = pickle.load(file_of_keys := io.BytesIO(data[file.tell() :]))
    assert len(keys) == 1
    rest = data[file.tell() + file_of_keys.tell() :]
    for other in ([], keys * 2, [*keys, "1"]):
        refused(tmp_path / "w.pth", data[: file.tell()] + pickle.dumps(other, 2) + rest, "not those that follow")


@pytest.mark.filterwarnings("ignore:Detected pickle protocol:UserWarning")
@pytest.mark.parametrize("protocol", [4, 5])
def test_other_protocols_of_pickles(tmp_path, protocol):
    words = "pickle_protocol=4 do: where the file is trusted, save it anew"
    refused(tmp_path / "w.pth", bytes_of(content(), pickle_protocol=protocol), words)
    refused(tmp_path / "w.pth", bytes_of({"set": {1, 2}}, pickle_protocol=protocol), words)
    torch.save(content(), tmp_path / "w.pth", pickle_protocol=3)
    assert same(content(), read_checkpoint(tmp_path / "w.pth"))


# safetensors


def test_safetensors_are_compared_with_their_header(tmp_path):
    """They have no checksums: every exception is one of ours, and sizes are compared with the file's."""
    save = pytest.importorskip("safetensors.torch").save
    recipe = {"format": "pspnet_fast", "family": "pspnet_fast", "recipe": json.dumps({"layers": 18})}
    data, path = save({"a": torch.ones(4), "b": torch.zeros(2, dtype=torch.int64)}, recipe), tmp_path / "w.safetensors"
    path.write_bytes(data)
    assert read_checkpoint(path)["recipe"] == {"layers": 18}
    for length in range(1, len(data), 7):
        refused(path, data[:length], r"w\.safetensors' cannot be read")
    refused(path, data + b"more", "cannot be read")
    header = 8 + int.from_bytes(data[:8], "little")
    read = [outcome(path, flipped(data, bit)) for bit in range(0, 8 * header, 3)]
    whole = [each["model"].values() for each in read if each is not None]
    assert whole
    assert all(sum(t.numel() * t.itemsize for t in each) <= len(data) for each in whole)
    bomb = {**recipe, "recipe": "[" * 100_000}
    refused(path, save({"a": torch.ones(4)}, bomb), "cannot be read")
