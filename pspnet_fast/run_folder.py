"""The folder of a training: one training at a time, no other one's snapshots in it, and a log that is never replaced."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

from .files import PART, check_target
from .snapshot import BEST, LAST, PREVIOUS, SnapshotError
from .terminal import Formatter

LOCK, LOG = ".lock", "train.log"
_MADE = (".pth", ".png")  # the endings of what a training writes by another name first
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)

_LOG = logging.getLogger(__name__)
_held: set[int] = set()


def _let_go_in_child() -> None:
    """A lock is its process's alone: workers that outlive it for seconds would keep the folder locked."""
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_let_go_in_child)


@contextlib.contextmanager
def opened(folder: Path, resume: str | None) -> Iterator[logging.Logger]:
    """A folder that a training writes into, made where there is none, for as long as this lasts.

    What a killed training left unfinished in it is removed. What the package logs goes into `train.log`, too.

    Args:
        folder: of the training.
        resume: "auto", or the path of the snapshot that it goes on from, or None.

    Yields:
        A logger for lines of `train.log` alone. What ends the training with an exception is its last line.

    Raises:
        SnapshotError: the folder cannot be written into, holds the snapshots of another training, or has another training
            writing into it now.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SnapshotError(f"{folder}: cannot be made: {error.strerror or error}") from error
    check_target(folder / LAST, SnapshotError)
    with _alone(folder):
        _check_snapshots(folder, resume)
        for left in folder.glob(f"{PART}*"):
            if left.suffix in _MADE:
                left.unlink(missing_ok=True)
        with _log(folder / LOG) as lines:
            try:
                yield lines
            except BaseException as error:
                lines.error("ended by %s: %s", type(error).__name__, error)
                raise


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """The folder's lock. The system lets it go when the process ends, however it does."""
    path = folder / LOCK
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise SnapshotError(f"{path}: cannot be written: {error.strerror or error}") from error
    _held.add(descriptor)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            owner = os.read(descriptor, 200).decode(errors="replace").strip()
            raise SnapshotError(
                f"{folder}: another training writes into it now ({owner}): give this one another folder (--output)"
            ) from error
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise SnapshotError(f"{path}: cannot be locked: {error.strerror or error}") from error
            _LOG.warning("%s: its file system has no locks, so nothing keeps a second training out", folder)
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        yield
    finally:
        _held.discard(descriptor)
        os.close(descriptor)


def _check_snapshots(folder: Path, resume: str | None) -> None:
    """See that no snapshot of another training would be replaced."""
    there = [name for name in (LAST, PREVIOUS, BEST) if os.path.lexists(folder / name)]
    if not there:
        return
    elsewhere = "give this one another folder (--output)"
    if resume is None:
        raise SnapshotError(
            f"{folder}: holds the snapshots of another training ({', '.join(there)}): --resume auto goes on with it, or "
            f"{elsewhere}"
        )
    if resume == "auto":
        if there == [BEST]:
            raise SnapshotError(
                f"{folder}: holds {BEST} and no {LAST} to go on from: --resume {folder / BEST} goes on from that, or "
                f"{elsewhere}"
            )
        return
    source = Path(resume).parent
    if not (source.is_dir() and os.path.samefile(source, folder)):
        raise SnapshotError(
            f"{folder}: holds the snapshots of another training ({', '.join(there)}) than {resume}: --resume auto goes on "
            f"with those, or {elsewhere}"
        )


@contextlib.contextmanager
def _log(path: Path) -> Iterator[logging.Logger]:
    try:
        file = _File(path, encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        raise SnapshotError(f"{path}: cannot be written: {error.strerror or error}") from error
    file.setFormatter(Formatter("%(asctime)s %(message)s"))
    ours, lines = logging.getLogger(__package__), logging.getLogger(f"{__name__}.lines")
    # Where nobody has set up logging, warnings go to the terminal; a handler of ours would end that.
    last = None if ours.hasHandlers() else logging.lastResort
    lines.propagate = False
    lines.setLevel(logging.INFO)
    added = [(ours, file), (lines, file), *([(ours, last)] if last is not None else [])]
    for logger, handler in added:
        logger.addHandler(handler)
    try:
        yield lines
    finally:
        for logger, handler in added:
            logger.removeHandler(handler)
        with contextlib.suppress(OSError):  # every line was flushed: what cannot be written has been said
            file.close()


class _File(logging.FileHandler):
    """A log whose disk may be full: said once, and no reason to end a training."""

    def __init__(self, path: Path, encoding: str, errors: str) -> None:
        super().__init__(path, encoding=encoding, errors=errors)
        self.failed = False

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        if not self.failed:
            self.failed = True
            print(f"{self.baseFilename}: cannot be written: {sys.exc_info()[1]}", file=sys.stderr)
