"""Files that appear whole or not at all, and what is asked of a target before the work that fills it."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

PART = ".part."
"""What the names of unfinished files begin with."""


@contextlib.contextmanager
def replacing(path: Path, error: Callable[[str], Exception] = OSError, keep: Path | None = None) -> Iterator[Path]:
    """Another name to write a file under, of the same ending, which is then renamed: no half of a file is ever seen.

    The name is new and cannot be guessed, so nothing planted in the folder (a symbolic link, say) is written through.

    Args:
        path: the file.
        error: what to raise where it cannot be written.
        keep: what `path` held until now gets this name.

    Raises:
        error: it cannot be written; the message names `path`, and what was there is untouched.
    """
    temporary = None
    try:
        temporary = _new_file(path)
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        if keep is not None and path.exists():
            _keep(path, keep)
        os.replace(temporary, path)
        _flush_folder(path.parent)
    except OSError as reason:
        still = f"; the {path.name} that was there is untouched" if path.exists() else ""
        raise error(f"{path}: cannot be written: {reason.strerror or reason}{still}") from reason
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def _new_file(path: Path) -> Path:
    """An empty file beside `path`, with the permissions that `open` would give it."""
    descriptor, name = tempfile.mkstemp(prefix=PART, suffix=path.suffix, dir=path.parent)
    umask = os.umask(0)
    os.umask(umask)
    os.fchmod(descriptor, 0o666 & ~umask)
    os.close(descriptor)
    return Path(name)


def _keep(path: Path, keep: Path) -> None:
    """Give `path`'s content the name `keep`, too, so that at no moment there is less than one whole file."""
    link = _new_file(keep)
    try:
        link.unlink()
        try:
            os.link(path, link)
        except OSError:  # a file system without hard links
            shutil.copyfile(path, link)
        os.replace(link, keep)
    finally:
        link.unlink(missing_ok=True)


def _flush_folder(folder: Path) -> None:
    """The renaming, too, is on the disk when this returns."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_target(
    path: Path,
    error: Callable[[str], Exception] = OSError,
    *,
    sources: Iterable[Path] = (),
    overwrite: bool = True,
) -> None:
    """See that a file can be written, before the work whose result it will hold.

    Args:
        path: the file.
        error: what to raise.
        sources: files that the work reads, which `path` must not be.
        overwrite: whether a file that is there may be replaced.

    Raises:
        error: it is a folder, one of the sources or there already, or its folder does not exist or cannot be written into.
    """
    folder = path.parent
    if path.is_dir():
        raise error(f"{path}: is a folder, give the name of a file")
    if not folder.is_dir():
        raise error(f"{path}: cannot be written: there is no folder {folder}")
    if any(path.exists() and source.exists() and os.path.samefile(path, source) for source in sources):
        raise error(f"{path}: would overwrite a file that is read: give the result another name")
    if path.exists() and not overwrite:
        raise error(f"{path}: is there already: give the result another name, or --force to replace it")
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as reason:
        raise error(f"{path}: cannot be written: {reason.strerror or reason}") from reason
