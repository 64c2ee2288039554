"""What is printed: text that a terminal shows and does not obey, in any encoding."""

from __future__ import annotations

import logging
import sys
import unicodedata
from typing import TextIO


def printable(text: str, encoding: str | None = None) -> str:
    r"""`text`, in which nothing moves a cursor, hides a word or ends a program that prints it.

    File names hold any character. Control and format characters (escape sequences, changes of the direction of writing),
    halves of characters, and what `encoding` lacks become escapes, such as `\x1b`. Line ends and tabs stay.
    """
    shown = "".join(
        character
        if character in "\n\t" or character.isprintable() or unicodedata.category(character) == "Zs"
        else character.encode("unicode_escape", "backslashreplace").decode("ascii")
        for character in text
    )
    encoding = encoding or "utf-8"
    return shown.encode(encoding, "backslashreplace").decode(encoding)


def say(text: object, file: TextIO | None = None) -> None:
    """`print`, on standard output where no file is given, of `printable` text."""
    file = sys.stdout if file is None else file
    print(printable(str(text), getattr(file, "encoding", None)), file=file)


class Formatter(logging.Formatter):
    """Lines of a log as `printable` text: they hold names of files, too."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))
