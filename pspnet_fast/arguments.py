"""Command lines of recipes: YAML files found by name, `--option value` over them.

`pspnet-fast train NAME --layers 101 --augmentation.scale 0.75 1.5`: NAME is a file of `pspnet_fast/configs` without its
ending, or the path of a YAML file. jsonargparse parses, checks types and prints (`--print_config`). What its command line
lacks is added here: dashes in names, flags without a value (`--flip`, `--no-flip`), lists without brackets
(`--scales 0.5 1 1.5`), and the nearest name where one is unknown.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Literal, TypeVar, cast, get_args, get_origin, get_type_hints

from .config import MANY, ConfigError, Recipe, check_between
from .extras import install
from .placement import Precision
from .protocol import BOUNDS
from .schema import from_plain, nearest, shown

Settings = TypeVar("Settings")

LARGEST_FILE = 2**16  # bytes; recipes have less than two thousand
DEEPEST = 4  # lists and groups inside each other; recipes have three
LONGEST = 400  # characters of a message of jsonargparse, which repeats values


@dataclass(frozen=True)
class Evaluating:
    """How a network is evaluated.

    Args:
        weights: a snapshot of a training (best.pth), or a checkpoint of PSPNet, ours or semseg's.
        output: folder for results.json, per_class.csv, confusion.png and the worst images; null writes none.
        json: a file for mIoU, mAcc, aAcc and the lists of the classes.
        predictions: whether `output` gets the labels of every image, too, plain and coloured.
        split: "val", or "train".
        images: how many images are evaluated; null takes all.
        windows: windows in one call of the network.
        precision: "fp32", or autocast to "bf16" or "fp16".
        channels_last: memory format of images and weights.
        device: "cpu", "cuda" or "cuda:1"; null takes CUDA where it is.
        check_data: read every file of the data before.
        skip_corrupt: where an image cannot be read, name it and go on.
    """

    weights: Path
    output: Path | None = None
    json: Path | None = None
    predictions: bool = False
    split: Literal["val", "train"] = "val"
    images: int | None = None
    windows: int = 4
    precision: Precision = "fp32"
    channels_last: bool = True
    device: str | None = None
    check_data: bool = False
    skip_corrupt: bool = False

    def __post_init__(self) -> None:
        check_between(self, 1, MANY, "images")
        check_between(self, *BOUNDS["batch_size"], "windows")


def recipes() -> list[str]:
    """The names of the recipes that are installed."""
    return sorted(file.name[:-5] for file in _folder().iterdir() if file.name.endswith(".yaml"))


def _folder() -> Any:
    return resources.files("pspnet_fast").joinpath("configs")


def find_recipe(name: str) -> Path:
    """The file of a recipe: a name of `recipes()`, or a path.

    Raises:
        ConfigError: there is none; it lists the names.
    """
    if name in recipes():
        return Path(str(_folder().joinpath(f"{name}.yaml")))
    if Path(name).is_file():
        return Path(name)
    raise ConfigError(
        f"no recipe {name!r}{nearest(name, recipes())}: give the path of a YAML file, or one of {', '.join(recipes())}"
    )


def parse(prog: str, argv: Sequence[str], kind: type[Settings], description: str) -> tuple[Recipe, Settings]:
    """`CONFIG [--option value ...]` to the recipe and the command's own settings, a dataclass.

    Raises:
        ConfigError: an unknown recipe, option or key (with the nearest name), a value of another type, settings that cannot
            work. SystemExit 0 after `--help` and `--print_config`.
        ImportError: jsonargparse is not installed; nothing else here needs it.
    """
    try:
        from jsonargparse import ArgumentError, ArgumentParser
    except ImportError as error:
        raise ImportError(f"recipes need jsonargparse ({error}): {install('train')}") from error
    parser = ArgumentParser(prog=prog, description=description, exit_on_error=False, allow_abbrev=False)
    parser.usage = f"{prog} CONFIG [--option VALUE ...]"
    parser.add_argument("--config", action="config", help="a YAML file of settings, in place of CONFIG or over it")
    parser.add_class_arguments(kind, fail_untyped=True)
    parser.add_class_arguments(Recipe, fail_untyped=True)
    known = _names(kind) | _names(Recipe)
    given = [*argv]
    if given and not given[0].startswith("-"):
        given[:1] = ["--config", str(find_recipe(given[0]))]
    elif not {"-h", "--help"} & {*given} and not any(each.startswith("--config") for each in given):
        raise ConfigError(f"CONFIG is missing: one of {', '.join(recipes())}, or the path of a YAML file")
    given = [_checked(word, known) for word in _arguments(given, known)]
    for one, other in (("epochs", "iterations"), ("iterations", "epochs")):
        # Either says how long to train: one on the command line replaces the recipe's other.
        if any(word.startswith(f"--{one}=") for word in given) and not any(
            word.startswith(f"--{other}=") for word in given
        ):
            given.append(f"--{other}=null")
    try:
        values = parser.parse_args(given).as_dict()
    except (ArgumentError, TypeError, ValueError, ArithmeticError, LookupError, RecursionError) as error:
        raise ConfigError(_explained(str(error), known)) from error
    # Not by jsonargparse, which takes null for everything.
    parts = (
        from_plain(each, {part.name: values[part.name] for part in dataclasses.fields(cast(Any, each))}, ConfigError)
        for each in (Recipe, kind)
    )
    return cast("tuple[Recipe, Settings]", tuple(parts))


def _names(kind: type) -> dict[str, Any]:
    """Every option and its type, those of nested dataclasses with a dot."""
    found: dict[str, Any] = {}
    for name, hint in get_type_hints(kind).items():
        found[name] = hint
        if dataclasses.is_dataclass(hint):
            found |= {f"{name}.{inner}": of for inner, of in _names(cast(type, hint)).items()}
    return found


def _arguments(argv: Sequence[str], known: Mapping[str, Any]) -> list[str]:
    """The command line as jsonargparse reads it."""
    made: list[str] = []
    rest = [*argv]
    while rest:
        word = rest.pop(0)
        if not word.startswith("--"):
            made.append(word)
            continue
        name, equals, value = word[2:].partition("=")
        name = name.replace("-", "_")
        negated = name.startswith("no_") and known.get(name[3:]) is bool
        name = name[3:] if negated else name
        values = [value] if equals else []
        while not equals and rest and not rest[0].startswith("--"):
            values.append(rest.pop(0))
        hint = known.get(name)
        if negated and values:
            raise ConfigError(f"--no-{name} takes no value, got {shown(values[0])}")
        if hint is bool and not values:
            made.append(f"--{name}={'false' if negated else 'true'}")
        elif _is_tuple(hint) and values and not values[0].startswith("["):
            made.append(f"--{name}=[{','.join(values)}]")
        elif len(values) == 1:
            made.append(f"--{name}={values[0]}")
        else:
            made += [f"--{name}", *values]
    return made


def _checked(word: str, known: Mapping[str, Any]) -> str:
    """A word for jsonargparse, which reads files wherever a value is the path of one, and repeats in messages what is in them.

    So settings come from files that `_check_file` has seen, and from nowhere else.
    """
    name, _, value = word.removeprefix("--").partition("=")
    if name == "config" and value:
        path = find_recipe(value)
        _check_file(path, known)
        return f"--config={path}"
    if dataclasses.is_dataclass(known.get(name)) and value and not value.startswith("{"):
        raise ConfigError(
            f"{name} is given by its parts, such as --{next(n for n in known if n.startswith(name + '.'))}"
        )
    return word


def _check_file(path: Path, known: Mapping[str, Any]) -> None:
    """See that a YAML file holds names of settings, each once, and values written out: no anchors, aliases or tags.

    Raises:
        ConfigError: it does not, with the line, and with nothing of what else is in the file.
    """
    import yaml  # type: ignore[import-untyped]

    with path.open("rb") as file:
        raw = file.read(LARGEST_FILE + 1)
    if len(raw) > LARGEST_FILE:
        raise ConfigError(f"{path}: a file of settings must have at most {LARGEST_FILE} bytes")
    try:
        text = raw.decode()
        depth = 0
        for event in yaml.parse(text, yaml.BaseLoader):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > DEEPEST:  # the parser takes minutes for thousands
                raise ConfigError(f"{path}: line {event.start_mark.line + 1}: settings are not lists in lists")
            if getattr(event, "anchor", None) or getattr(event, "tag", None):
                line = event.start_mark.line + 1
                raise ConfigError(f"{path}: line {line}: settings are written out, without anchors, aliases and tags")
        node = yaml.compose(text, yaml.BaseLoader)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise ConfigError(f"{path}: line {line}: is not YAML: {error.problem}") from None
    except (UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        raise ConfigError(f"{path}: is not YAML text ({type(error).__name__})") from None
    _check_names(node, path, known, "")


def _check_names(node: Any, path: Path, known: Mapping[str, Any], inside: str) -> None:
    if getattr(node, "id", None) != "mapping":
        raise ConfigError(f"{path}: {inside.rstrip('.') or 'the file'} must hold names and values, such as 'crop: 473'")
    seen = set()
    for key, value in node.value:
        name = f"{inside}{key.value}" if key.id == "scalar" else ""
        where = f"{path}: line {key.start_mark.line + 1}"
        if name not in known:
            raise ConfigError(f"{where}: there is no option {shown(name)}{nearest(name, list(known))}")
        if name in seen:
            raise ConfigError(f"{where}: {name} is there twice")
        seen.add(name)
        if dataclasses.is_dataclass(known[name]):
            _check_names(value, path, known, f"{name}.")


def _is_tuple(hint: Any) -> bool:
    return get_origin(hint) is tuple or any(get_origin(each) is tuple for each in get_args(hint))


def _explained(message: str, known: Mapping[str, Any]) -> str:
    """The message of jsonargparse, with the nearest name where one is unknown."""
    message = " ".join(message.split())
    message = message if len(message) <= LONGEST else f"{message[:LONGEST]} ..."
    unknown = re.search(r"unrecognized arguments: --(\S+?)(?:=.*)?$|(?:Option|Key|key) '([^']+)' is not", message)
    if unknown is None:
        return message
    name = unknown.group(1) or unknown.group(2)
    return f"there is no option {name!r}{nearest(name, list(known))}"
