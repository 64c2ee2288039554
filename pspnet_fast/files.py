"""Files that appear whole or not at all."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path


@contextlib.contextmanager
def replacing(path: Path, error: Callable[[str], Exception] = OSError) -> Iterator[Path]:
    """Another name to write a file under, of the same ending, which is then renamed: no half of a file is ever seen.

    Raises:
        error: it cannot be written; the message names `path`, and what was there is untouched.
    """
    temporary = path.with_name(f".part.{path.name}")
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as reason:
        raise error(f"{path}: cannot be written: {reason.strerror or reason}") from reason
    finally:
        temporary.unlink(missing_ok=True)
