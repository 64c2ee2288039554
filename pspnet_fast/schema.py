"""Plain values, as YAML, JSON and checkpoints hold them, to typed settings: what has another type is named, with its key.

Nothing here knows which settings there are: types come from annotations, bounds from the dataclasses themselves.
"""

from __future__ import annotations

import dataclasses
import difflib
import reprlib
import types
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

Made = TypeVar("Made")
Raised = Callable[[str], Exception]

_LARGEST = 2**63  # whole numbers beyond 64 bits mean nothing here, and may be too long to print
_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = 60


def shown(value: object) -> str:
    """A value for a message: short, in one line, whatever it is."""
    if isinstance(value, int) and not -_LARGEST < value < _LARGEST:
        return f"a number of {value.bit_length()} bits"
    try:
        return " ".join(_REPR.repr(value).split())
    except ValueError:  # numbers inside that are too long to print
        return f"a {type(value).__name__}"


def nearest(name: str, names: Sequence[str]) -> str:
    """Words that name the nearest of some names, or none."""
    close = difflib.get_close_matches(name, names, 1, 0.5)
    return f", did you mean {close[0]!r}?" if close else ""


def from_plain(kind: type[Made], values: object, error: Raised = ValueError, inside: str = "") -> Made:
    """A dataclass from names and values. What is left out has its default.

    Args:
        kind: the dataclass. Its hints may be bool, int, float, str, Path, Literal, tuples, unions with None, mappings and
            dataclasses.
        values: lists for tuples, strings for paths.
        error: what to raise.
        inside: what comes before names in messages, such as "augmentation.".

    Raises:
        error: `values` are no names and values, one is unknown, of another type, or not among those that `kind` takes.
    """
    if not isinstance(values, Mapping):
        raise error(f"{inside.rstrip('.') or 'settings'} must be names and values, got {shown(values)}")
    hints = get_type_hints(kind)
    made = {}
    for name, value in values.items():
        if not isinstance(name, str) or name not in hints:
            near = nearest(name, list(hints)) if isinstance(name, str) else ""
            full = f"{inside}{name}" if isinstance(name, str) else name
            raise error(f"there is no setting {shown(full)}{near}")
        made[name] = typed(hints[name], value, f"{inside}{name}", error)
    try:
        return kind(**made)
    except ValueError as reason:
        raise error(str(reason)) from reason


def typed(hint: Any, value: object, name: str, error: Raised = ValueError) -> Any:
    """A plain value as its hint says: `from_plain` of one value."""
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        (of,) = (each for each in args if each is not type(None))
        return None if value is None and type(None) in args else typed(of, value, name, error)
    if origin is Literal:
        if not any(type(value) is type(each) and value == each for each in args):
            raise error(f"{name} must be one of {', '.join(map(str, args))}, got {shown(value)}")
        return value
    if origin is tuple:
        many = len(args) == 2 and args[1] is ...
        if not isinstance(value, (list, tuple)) or not (many or len(value) == len(args)):
            count = "a list" if many else f"a list of {len(args)}"
            raise error(f"{name} must be {count}, got {shown(value)}")
        inner = [args[0]] * len(value) if many else args
        return tuple(typed(of, each, name, error) for of, each in zip(inner, value, strict=True))
    if dataclasses.is_dataclass(hint):
        return from_plain(cast("type[Any]", hint), value, error, f"{name}.")
    return _simple(hint, value, name, error)


def _simple(hint: Any, value: object, name: str, error: Raised) -> Any:
    words, fits = {
        bool: ("true or false", isinstance(value, bool)),
        int: ("a whole number", isinstance(value, int) and not isinstance(value, bool)),
        float: ("a number", isinstance(value, (int, float)) and not isinstance(value, bool)),
        str: ("text", isinstance(value, str)),
        Path: ("a path", isinstance(value, (str, Path)) and str(value) != "" and "\0" not in str(value)),
        Mapping: ("names and values", isinstance(value, Mapping)),
    }[get_origin(hint) or hint]
    if fits and isinstance(value, int) and not -_LARGEST < value < _LARGEST:
        fits, words = False, f"{words} of at most 64 bits"
    if not fits:
        raise error(f"{name} must be {words}, got {shown(value)}")
    return hint(value) if hint in (float, Path) else value
