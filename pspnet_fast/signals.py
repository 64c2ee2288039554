"""SIGTERM and Ctrl-C while a network trains: the step is finished and saved, then the training ends."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from types import FrameType
from typing import Any


class Left(BaseException):
    """A validation is left, because a signal came."""


class Stop:
    """SIGTERM and SIGINT ask for an end after the step; a second one ends at once."""

    def __init__(self, speaks: bool = True) -> None:
        self.asked, self.number, self.speaks = False, 0, speaks
        self._leaves_at_once = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Stop:
        for number in (signal.SIGTERM, signal.SIGINT):
            with contextlib.suppress(ValueError):  # not in the main thread: then whoever runs that one decides
                self._before[number] = signal.signal(number, self._ask)
        return self

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.asked, self.number = True, number
        signal.signal(number, self._before[number])
        if self.speaks:  # not through the log or the bar, whose locks this may have interrupted
            name = signal.Signals(number).name
            os.write(2, f"\n{name}: ends after this step, once it is saved; a second one ends at once\n".encode())
        if self._leaves_at_once:
            raise Left

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """Work that is left as soon as an end is asked for.

        Raises:
            Left: it is asked for, now or earlier.
        """
        self._leaves_at_once = True
        try:
            if self.asked:
                raise Left
            yield
        finally:
            self._leaves_at_once = False

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
