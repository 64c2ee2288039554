import errno
import math
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pspnet_fast import files, snapshot
from pspnet_fast.files import PART
from pspnet_fast.models.checkpoint import CheckpointError
from pspnet_fast.snapshot import BEST, LAST, PREVIOUS, SnapshotError, latest, load_optimizer, load_scaler, read, save


def content(iteration):
    model = {"weight": torch.full((1000,), float(iteration))}
    return {"model": model, "optimizer": {}, "scaler": {}, "iteration": iteration, "recipe": {"layers": 18}}


def save_last(folder, iteration):
    save(content(iteration), folder / LAST, folder / PREVIOUS)


def test_the_one_before_is_kept(tmp_path):
    for iteration in range(3):
        save_last(tmp_path, iteration)
    assert [read(tmp_path / name)["iteration"] for name in (LAST, PREVIOUS)] == [2, 1]
    assert sorted(os.listdir(tmp_path)) == [LAST, PREVIOUS]
    path, found, skipped = latest(tmp_path)
    assert (path.name, found["iteration"], skipped) == (LAST, 2, [])
    assert torch.equal(found["model"]["weight"], torch.full((1000,), 2.0))


@pytest.mark.parametrize("damage", ["truncated", "empty", "flipped", "no_archive"])
def test_a_damaged_one_is_skipped(tmp_path, damage):
    save_last(tmp_path, 1)
    save_last(tmp_path, 2)
    path = tmp_path / LAST
    data = bytearray(path.read_bytes())
    at = data.find(torch.full((4,), 2.0).numpy().tobytes())
    assert at > 0
    data[at] ^= 1
    path.write_bytes({"truncated": data[:-300], "empty": b"", "flipped": data, "no_archive": b"weights" * 99}[damage])
    with pytest.raises(CheckpointError, match=f"{LAST}' cannot be read as a checkpoint of tensors: "):
        read(path)
    found, content, skipped = latest(tmp_path)
    assert (found.name, content["iteration"]) == (PREVIOUS, 1)
    assert len(skipped) == 1
    assert LAST in skipped[0]
    (tmp_path / PREVIOUS).write_bytes(b"")
    with pytest.raises(CheckpointError, match=f"no whole snapshot: .*{LAST}.*{PREVIOUS}"):
        latest(tmp_path)


def test_nothing_there(tmp_path):
    assert latest(tmp_path) is None
    with pytest.raises(FileNotFoundError, match=f"no checkpoint at .*{LAST}"):
        read(tmp_path / LAST)


def test_weights_alone_are_no_snapshot(tmp_path):
    torch.save(content(1)["model"], tmp_path / BEST)
    with pytest.raises(CheckpointError, match="is not a snapshot of a training, it lacks model, optimizer"):
        read(tmp_path / BEST)


def test_a_full_disk_leaves_what_was_there(tmp_path, monkeypatch):
    save_last(tmp_path, 1)

    def full(content, file):
        file.write(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        with pytest.raises(
            SnapshotError,
            match=f"{LAST}: cannot be written: No space left on device; the {LAST} that was there is untouched$",
        ):
            save_last(tmp_path, 2)
    assert os.listdir(tmp_path) == [LAST]
    assert read(tmp_path / LAST)["iteration"] == 1


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full")
@pytest.mark.parametrize("size", [1, 1000, 3_000_000])
def test_a_disk_that_is_really_full(tmp_path, monkeypatch, size):
    """What torch's own writer does then: it may fail at a write, when the file is closed, or by its own count of bytes."""

    def on_a_full_disk(path):
        temporary = path.with_name(f"{PART}a.pth")
        temporary.symlink_to("/dev/full")
        return temporary

    monkeypatch.setattr(files, "_new_file", on_a_full_disk)
    made = content(2)
    made["model"]["weight"] = torch.zeros(size)
    with pytest.raises(SnapshotError, match=f"{LAST}: cannot be written: No space left on device$"):
        save(made, tmp_path / LAST, tmp_path / PREVIOUS)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("limit", [0, 100, 5_000, 100_000])
def test_a_file_that_may_not_grow(tmp_path, limit):
    """Half of it is written before the system says so."""
    save_last(tmp_path, 1)
    made = content(2)
    made["model"]["weight"] = torch.zeros(100_000)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        with pytest.raises(
            SnapshotError, match=f"{LAST}: cannot be written: File too large; the {LAST} that was there"
        ):
            save(made, tmp_path / LAST, tmp_path / PREVIOUS)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert os.listdir(tmp_path) == [LAST]
    assert read(tmp_path / LAST)["iteration"] == 1


def test_no_hard_links(tmp_path, monkeypatch):
    """A file system that has none gets a copy."""

    def none(*_):
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "link", none)
    for iteration in range(3):
        save_last(tmp_path, iteration)
    assert [read(tmp_path / name)["iteration"] for name in (LAST, PREVIOUS)] == [2, 1]
    assert sorted(os.listdir(tmp_path)) == [LAST, PREVIOUS]


def same(a, b):
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and (a.dtype, a.shape) == (b.dtype, b.shape) and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_any_bit_that_flips(tmp_path):
    """In the directory of the archive each, in the rest of it some: the one before is read, or exactly what was written."""
    for iteration in (1, 2):
        made = content(iteration)
        made["model"] = {"weight": torch.full((10,), float(iteration)), "count": torch.arange(3)}
        save(made, tmp_path / LAST, tmp_path / PREVIOUS)
    path = tmp_path / LAST
    data, whole = path.read_bytes(), read(path)
    directory = data.find(b"PK\x01\x02")
    assert 0 < directory < len(data)
    places = [(at, at // 19 % 8) for at in range(0, directory, 19)]
    places += [(at, bit) for at in range(directory, len(data)) for bit in {4, at % 8}]
    found = {LAST: 0, PREVIOUS: 0}
    for at, bit in places:
        flipped = bytearray(data)
        flipped[at] ^= 1 << bit
        path.write_bytes(flipped)
        taken, got, skipped = latest(tmp_path)
        found[taken.name] += 1
        if taken.name == LAST:
            assert same(got, whole), (at, bit)
        else:
            assert (got["iteration"], len(skipped)) == (1, 1)
            with pytest.raises(CheckpointError):
                read(path)
            assert skipped[0].startswith(f"{path}: ") or repr(str(path)) in skipped[0]
    assert min(found.values()) > 50


@pytest.mark.parametrize("error", [MemoryError, UnicodeDecodeError, OSError(22, "Invalid argument"), RecursionError])
def test_whatever_the_reader_raises(tmp_path, monkeypatch, error):
    """The snapshot is skipped, by its name."""
    save_last(tmp_path, 1)
    save_last(tmp_path, 2)
    real = snapshot.read_checkpoint

    def fails(path):
        if path.name == LAST:
            raise UnicodeDecodeError("ascii", b"\xff", 0, 1, "not in range") if error is UnicodeDecodeError else error
        return real(path)

    monkeypatch.setattr(snapshot, "read_checkpoint", fails)
    path, found, skipped = latest(tmp_path)
    assert (path.name, found["iteration"]) == (PREVIOUS, 1)
    assert skipped[0].startswith(str(tmp_path / LAST))


def test_a_snapshot_that_is_no_file(tmp_path):
    """A folder, or a pipe that nobody writes into."""
    for iteration in (1, 2):
        save_last(tmp_path, iteration)
    (tmp_path / LAST).unlink()
    os.mkfifo(tmp_path / LAST)
    assert latest(tmp_path)[2] == [f"'{tmp_path / LAST}' is no regular file: give one that can be read twice"]
    (tmp_path / LAST).unlink()
    (tmp_path / LAST).mkdir()
    assert latest(tmp_path)[2] == [f"'{tmp_path / LAST}' is a folder: give the checkpoint's file in it"]


def test_the_best_validation_is_named_where_nothing_else_is_whole(tmp_path):
    (tmp_path / LAST).write_bytes(b"")
    save(content(1), tmp_path / BEST)
    with pytest.raises(
        CheckpointError, match="no whole snapshot: .*; --resume .*best.pth goes on from the best validation$"
    ):
        latest(tmp_path)


HOSTILE = [
    ({"version": 2}, "is a snapshot of version 2, this pspnet_fast reads those up to 1: a newer one wrote it"),
    ({"version": "1"}, "version must be a whole number, got '1'"),
    ({"version": -1}, "version must be at least 0, got -1"),
    ({"model": [1]}, r"model must be names and values, got \[1\]"),
    ({"model": {"a": 1}}, "model must be names and tensors, got 'a' and a int"),
    ({"model": {1: torch.zeros(1)}}, "model must be names and tensors, got 1 and a Tensor"),
    ({"optimizer": None}, "optimizer must be names and values, got None"),
    ({"scaler": 3}, "scaler must be names and values, got 3"),
    ({"iteration": "7"}, "iteration must be a whole number, got '7'"),
    ({"iteration": True}, "iteration must be a whole number, got True"),
    ({"iteration": -1}, "iteration must be at least 0, got -1"),
    ({"iteration": 2**64}, "iteration must be a whole number of at most 64 bits, got a number of 65 bits"),
    ({"best": float("nan")}, "best must be a number, got nan"),
    ({"best": "high"}, "best must be a number, got 'high'"),
    ({"losses": 5}, "losses must be a list, got 5"),
    ({"losses": [5]}, "losses must be a list of 2, got 5"),
    ({"losses": [(1, "2")]}, "losses must be a number, got '2'"),
    ({"scores": [(0.5, 0.5)]}, "scores must be a whole number, got 0.5"),
    ({"validation_due": 1}, "validation_due must be true or false, got 1"),
    ({"run": []}, r"run must be names and values, got \[\]"),
    ({"threads": 1.5}, "threads must be a whole number, got 1.5"),
    ({"torch": b"2"}, "torch must be text, got b'2'"),
    ({"recipe": {"widht": 64}}, "its recipe cannot be: there is no setting 'widht', did you mean 'width'"),
    ({"recipe": {"width": "64"}}, "its recipe cannot be: width must be a whole number, got '64'"),
    ({"recipe": {"output_stride": 0}}, "its recipe cannot be: output_stride must be one of 8, 16, 32, got 0"),
    ({"recipe": [1]}, r"recipe must be names and values, got \[1\]"),
]


@pytest.mark.parametrize(("changes", "words"), HOSTILE)
def test_a_whole_file_of_another_schema(tmp_path, changes, words):
    """It is named with its key and value, and skipped as a damaged one is."""
    save_last(tmp_path, 1)
    save_last(tmp_path, 2)
    torch.save({"version": 1, **content(2), **changes}, tmp_path / LAST)
    with pytest.raises(CheckpointError, match=f"{LAST}: .*{words}"):
        read(tmp_path / LAST)
    path, found, skipped = latest(tmp_path)
    assert (path.name, found["iteration"], len(skipped)) == (PREVIOUS, 1, 1)


def test_a_snapshot_of_before_versions_had_numbers(tmp_path):
    torch.save(content(3), tmp_path / LAST)
    assert latest(tmp_path)[1]["iteration"] == 3
    save_last(tmp_path, 4)
    assert read(tmp_path / LAST)["version"] == snapshot.VERSION


def trained(kind=torch.optim.SGD):
    parameters = [torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(2, 2))]
    options = {"momentum": 0.9} if kind is torch.optim.SGD else {}
    optimizer = kind([{"params": parameters[:1]}, {"params": parameters[1:]}], lr=0.1, **options)
    sum(p.square().sum() for p in parameters).backward()
    optimizer.step()
    return optimizer


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_an_optimizer_goes_on_with_its_own_settings(kind):
    """States are the snapshot's, decay and the like the recipe's."""
    saved = trained(kind).state_dict()
    optimizer = trained(kind)
    for group in optimizer.param_groups:
        group["weight_decay"] = 0.5
    load_optimizer(saved, optimizer, Path("a.pth"))
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.5, 0.5]
    assert same(optimizer.state_dict()["state"], saved["state"])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: s.pop("state"), "state must be names and values, got None"),
        (lambda s: s.update(param_groups=3), "param_groups must be a list, got 3"),
        (lambda s: s.update(param_groups=[3]), "param_groups must be names and values, got 3"),
        (lambda s: s["param_groups"].pop(), "it has other parameters"),
        (lambda s: s["param_groups"][0].pop("params"), "it has other parameters"),
        (lambda s: s["state"].update({9: {}}), "there is no parameter 9"),
        (lambda s: s["state"].update(a={}), "the number of a parameter must be a whole number, got 'a'"),
        (lambda s: s["state"].update({0: 3}), "the state of a parameter must be names and values, got 3"),
        (
            lambda s: s["state"][0].update(more=1),
            "a parameter's state must be momentum_buffer, got .'momentum_buffer'",
        ),
        (
            lambda s: s["state"][0].update(momentum_buffer=torch.ones(4)),
            r"momentum_buffer must be a tensor of shape \(3,\)",
        ),
        (lambda s: s["state"][0].update(momentum_buffer=4), r"momentum_buffer must be a tensor of shape \(3,\), got 4"),
    ],
)
def test_the_state_of_another_optimizer(change, words):
    saved = trained().state_dict()
    change(saved)
    with pytest.raises(CheckpointError, match=f"a.pth: its optimizer does not fit: {words}"):
        load_optimizer(saved, trained(), Path("a.pth"))


def test_the_scale_of_a_loss():
    scaler, off = (torch.amp.GradScaler("cpu", enabled=enabled) for enabled in (True, False))
    saved = {**scaler.state_dict(), "scale": 8.0}
    load_scaler(saved, scaler, Path("a.pth"))
    assert scaler.state_dict() == saved
    load_scaler(saved, off, Path("a.pth"))
    for wrong in ({**saved, "scale": math.inf}, {**saved, "scale": "8"}, {"scale": 8.0}):
        with pytest.raises(CheckpointError, match="a.pth: its scaler does not fit: .* must be a positive number, got"):
            load_scaler(wrong, scaler, Path("a.pth"))


SAVES_FOR_EVER = """
import sys
from pathlib import Path
import torch
from pspnet_fast.snapshot import LAST, PREVIOUS, save
folder, i = Path(sys.argv[1]), 0
while True:
    i += 1
    model = {"weight": torch.full((300_000,), float(i))}
    content = {"model": model, "optimizer": {}, "scaler": {}, "iteration": i, "recipe": {}}
    save(content, folder / LAST, folder / PREVIOUS)
    print(i, flush=True)
"""


def test_killed_while_it_saves(tmp_path):
    """At any of several moments, a whole snapshot is there, and it is the last or the last but one that was begun."""
    for _ in range(3):
        process = subprocess.Popen([sys.executable, "-c", SAVES_FOR_EVER, tmp_path], stdout=subprocess.PIPE, text=True)
        saved = [int(process.stdout.readline()) for _ in range(10)][-1]
        process.kill()
        saved += len(process.stdout.read().split())
        process.stdout.close()
        process.wait()
        path, found, _ = latest(tmp_path)
        assert path.name == LAST
        assert found["iteration"] >= saved
        assert torch.equal(found["model"]["weight"], torch.full((300_000,), float(found["iteration"])))
