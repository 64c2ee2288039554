"""Files of a training that survive a kill: written under another name, flushed, renamed; the one before is kept."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .models.checkpoint import CheckpointError, read_checkpoint, write_checkpoint

LAST, PREVIOUS, BEST = "last.pth", "previous.pth", "best.pth"


class SnapshotError(OSError):
    """A snapshot that cannot be written; the message names it and says what is still there."""


def save(content: Mapping[str, Any], path: Path, keep: Path | None = None) -> None:
    """Write a checkpoint of tensors and plain values.

    At no moment is there less than one whole file: the new one gets its name when it is on the disk, and what had the name
    until then gets the name `keep`.

    Raises:
        SnapshotError: the disk is full, the folder cannot be written: what was there is untouched.
    """
    write_checkpoint(content, path, SnapshotError, keep)


def read(path: Path) -> Mapping[str, Any]:
    """A snapshot, on the CPU, with every checksum in it verified.

    Raises:
        OSError: no such file.
        CheckpointError: truncated, damaged, or no snapshot of a training.
    """
    content = read_checkpoint(path)
    missing = [key for key in ("model", "optimizer", "scaler", "iteration", "recipe") if key not in content]
    if missing:
        raise CheckpointError(f"{path}: is not a snapshot of a training, it lacks {', '.join(missing)}")
    return content


def latest(folder: Path) -> tuple[Path, Mapping[str, Any], list[str]] | None:
    """The newest whole snapshot of a folder, and a sentence for each that was skipped; None where there is none at all.

    Raises:
        CheckpointError: there are snapshots, and all are damaged.
    """
    skipped: list[str] = []
    for name in (LAST, PREVIOUS):
        path = folder / name
        if not path.exists():
            continue
        try:
            return path, read(path), skipped
        except CheckpointError as error:
            skipped.append(str(error))
    if skipped:
        raise CheckpointError(f"{folder}: no whole snapshot: {'; '.join(skipped)}")
    return None
