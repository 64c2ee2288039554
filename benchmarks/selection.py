"""Which benchmarks run, and in which order: the cheapest and most telling ones first, whole networks last.

A benchmark says where it belongs: `@quick(group)` puts its rows of our own providers into the quick set, `@whole_network` puts
it behind everything else. `pytest benchmarks` runs the quick set; whoever names a file or gives -k gets all that he named.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import pytest

Benchmark = TypeVar("Benchmark", bound=Callable[..., Any])

GROUPS = ("ppm", "ops", "head", "loss", "labels")  # of the quick set, in the order in which they run
SETS = ("quick", "all")
HERE = Path(__file__).resolve().parent


def quick(group: str, **parameters: object) -> Callable[[Benchmark], Benchmark]:
    """A benchmark of the quick set, or only its cases with these parameters."""
    rank = GROUPS.index(group)

    def mark(function: Benchmark) -> Benchmark:
        function.quick = rank, parameters  # type: ignore[attr-defined]
        return function

    return mark


def whole_network(function: Benchmark) -> Benchmark:
    """A benchmark that takes minutes."""
    function.whole_network = True  # type: ignore[attr-defined]
    return function


def providers(device: str, chosen: list[str]) -> list[str]:
    """Who is measured: the chosen ones, or plain PyTorch, eager and compiled, and our backends."""
    return chosen or ["eager", "compile", *ours(device)]


def ours(device: str) -> list[str]:
    return ["cpu"] if device == "cpu" else ["triton", "cuda"]


def order(item: pytest.Item) -> tuple[bool, bool, int]:
    """A sorting key. torch.compile takes its time before the first round, so its rows come after everybody else's."""
    rank = _rank(item, ours(item.config.getoption("--device")))
    return _says(item, "whole_network", False), _parameter(item, "provider") == "compile", rank


def chosen(item: pytest.Item, config: pytest.Config) -> bool:
    """Whether an item runs."""
    who = config.getoption("--provider") or ours(config.getoption("--device"))
    return _asked(config, [item.path]) == "all" or _rank(item, who) < len(GROUPS)


def quick_alone(config: pytest.Config) -> bool:
    """Whether nothing but the quick set is asked for."""
    return _asked(config, list(HERE.glob("bench_*.py"))) == "quick"


def _asked(config: pytest.Config, files: list[Path]) -> str:
    """The set that is asked for: all, if one of these files stands on the command line (not only a folder), or -k or -m."""
    paths = (Path(config.invocation_params.dir, argument.split("::")[0]) for argument in config.args)
    named = any(path.is_file() and path.resolve() in files for path in paths)
    narrowed = named or config.getoption("-k") or config.getoption("-m")
    return config.getoption("--set") or ("all" if narrowed else "quick")


def _rank(item: pytest.Item, who: list[str]) -> int:
    """The group's place in the quick set; behind them all for what is not in it."""
    rank, parameters = _says(item, "quick", (len(GROUPS), {}))
    ran = _parameter(item, "provider") in (None, *who)
    return rank if ran and all(_parameter(item, name) == value for name, value in parameters.items()) else len(GROUPS)


def _says(item: pytest.Item, name: str, default: Any) -> Any:
    return getattr(getattr(item, "function", None), name, default)


def _parameter(item: pytest.Item, name: str) -> Any:
    return getattr(getattr(item, "callspec", None), "params", {}).get(name)
