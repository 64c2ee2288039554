import errno
import os
import subprocess
import sys

import pytest
import torch

from pspnet_fast import snapshot
from pspnet_fast.models.checkpoint import CheckpointError
from pspnet_fast.snapshot import BEST, LAST, PREVIOUS, SnapshotError, latest, read, save


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
        patch.setattr(snapshot.torch, "save", full)
        with pytest.raises(
            SnapshotError, match=f"{LAST}: cannot be written: No space left on device, {LAST} is as it was"
        ):
            save_last(tmp_path, 2)
    assert os.listdir(tmp_path) == [LAST]
    assert read(tmp_path / LAST)["iteration"] == 1


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full")
def test_a_disk_that_is_really_full(tmp_path):
    """What torch's own writer does then."""
    (tmp_path / f".{LAST}.part").symlink_to("/dev/full")
    with pytest.raises(SnapshotError, match=f"{LAST}: cannot be written: .*"):
        save_last(tmp_path, 2)
    assert os.listdir(tmp_path) == []


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
