"""`pspnet-fast convert`: a checkpoint of one library to the names of another, and which network it means."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from .checkpoints.detect import Recognised, recognise
from .checkpoints.layout import Layout, layout_of
from .checkpoints.load import OF_A_FOLDER, built, read
from .checkpoints.settings import MOST_BINS, MOST_CLASSES, are_bins
from .checkpoints.write import TARGETS, Written, written
from .data import normalisation
from .extras import install
from .files import check_target, replacing
from .models.checkpoint import FORMAT, write_checkpoint
from .terminal import say

SUFFIXES = (".safetensors", ".pth", ".pt")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "files",
        nargs="+",
        metavar="FILE",
        help="the checkpoint, or CSAIL's two, or a folder of the Hugging Face hub; then the file to write, safetensors "
        "unless it ends in .pth or .pt, or a folder to write it into",
    )
    parser.add_argument("--to", choices=TARGETS, default=FORMAT, help=f"whose names to write (default {FORMAT})")
    parser.add_argument(
        "--align-corners",
        action=argparse.BooleanOptionalAction,
        help="how the network upsamples, where the file does not say (default the family's own)",
    )
    parser.add_argument(
        "--dilation",
        choices=["full", "halved"],
        help="of the first block of a dilated stage, where the file does not say (default the family's own)",
    )
    parser.add_argument(
        "--bins",
        type=int,
        nargs="+",
        metavar="BIN",
        help=f"of the levels, from 1 to {MOST_BINS} each (default 1 2 3 6)",
    )
    parser.add_argument(
        "--reset-classifier",
        type=int,
        metavar="CLASSES",
        help=f"new, random convolutions to so many classes, from 1 to {MOST_CLASSES}",
    )
    parser.add_argument(
        "--ema", action="store_true", help="the averages of the weights, where the file has both (default the weights)"
    )
    parser.add_argument("--force", action="store_true", help="replace the file to write where it is there")


def run(args: argparse.Namespace) -> int:
    """Exit status 0; 2 where nothing could be written."""
    try:
        *sources, target = args.files
        convert(
            [Path(source) for source in sources],
            target,
            args.to,
            reset_classifier=args.reset_classifier,
            ema=args.ema,
            overwrite=args.force,
            align_corners=args.align_corners,
            bins=args.bins,
            dilation=args.dilation,
        )
    except (ImportError, OSError, ValueError, RuntimeError) as error:
        say(f"pspnet-fast convert: {error}", sys.stderr)
        return 2
    return 0


def convert(
    sources: Sequence[Path],
    target: str | Path,
    to: str = FORMAT,
    *,
    reset_classifier: int | None = None,
    ema: bool = False,
    overwrite: bool = False,
    say: Callable[[str], object] = say,
    **overrides: Any,
) -> None:
    """Read a checkpoint, write it by another family's names, and report.

    What was read is said before anything is written, and whether it can be written is seen before anything is read.

    Args:
        sources: a file or a folder, or CSAIL's two files.
        target: safetensors unless it ends in .pth or .pt; without an ending it gets .safetensors. In a folder that there is,
            the file has the first source's name.
        to: the family (`TARGETS`).
        reset_classifier: for how many classes the convolutions to the classes are made anew, at random.
        ema: the averages of the weights, as for `load_checkpoint`.
        overwrite: whether a file that is there may be replaced. A source never is.
        say: takes the lines of the report, as they are known.
        overrides: align_corners, bins and dilation, as for `load_checkpoint`.

    Raises:
        CheckpointError: a file of no known layout, or a network that the family cannot express.
        ValueError: no source or more than two, another ending, a setting that is known to be another.
        OSError: what cannot be read or written, a target that is there.
    """
    if len(sources) not in (1, 2):
        raise ValueError(f"FILE must be one or two checkpoints and then the file to write, got {len(sources) + 1}")
    if reset_classifier is not None and not 1 <= reset_classifier <= MOST_CLASSES:
        raise ValueError(f"--reset-classifier must be from 1 to {MOST_CLASSES}, got {reset_classifier}")
    bins = overrides.get("bins")
    if bins is not None and not are_bins(tuple(bins)):
        raise ValueError(f"--bins must be from 1 to {MOST_BINS} each, got {' '.join(map(str, bins))}")
    target = _target(target, sources[0])
    check_target(target, sources=_all_files(sources), overwrite=overwrite)
    content = read(sources)
    found = recognise(content, ema, **overrides)
    lines = found.layout.report()
    if reset_classifier is not None:
        net = built(found, reset_classifier)
        found = Recognised(layout_of(net), dict(net.state_dict()), {})
        lines.append(f"  classifiers made anew, for {reset_classifier} classes")
    made = written(found.layout, found.state, to)
    for line in lines:
        say(line)
    recipe = None if to == "torchvision" else _recipe(content, found.layout, reset_classifier)
    if target.suffix == ".safetensors":
        _save_safetensors(made, target, _metadata(found.layout, to, made.needs, recipe))
    else:
        write_checkpoint(_wrapped(made, to, recipe), target)
    if made.left_out:
        parts = ", ".join(dict.fromkeys(name.split(".")[0] for name in made.left_out))
        say(f"  not written, as {to} has no place for it: {parts}")
    say(f"{target}: {len(made.state)} tensors by {to}'s names")
    if made.needs:
        say(f"to be loaded into\n{made.needs}")


def _target(given: str | Path, source: Path) -> Path:
    """The file to write."""
    target = Path(given)
    if target.is_dir():
        return target / f"{source.resolve().with_suffix('').name}.safetensors"
    if str(given).endswith(os.sep):
        raise FileNotFoundError(f"{given}: there is no such folder")
    target = target if target.suffix else target.with_name(f"{target.name}.safetensors")
    if target.suffix not in SUFFIXES:
        raise ValueError(f"{target}: the file to write must end in {', '.join(SUFFIXES)}")
    return target


def _all_files(sources: Iterable[Path]) -> Iterator[Path]:
    """What is read: the sources, and of folders the files in them."""
    for source in sources:
        yield source
        if source.is_dir():
            yield from (source / name for name in (*OF_A_FOLDER, "config.json"))


def _recipe(content: Mapping[str, Any], layout: Layout, reset: int | None) -> dict[str, Any] | None:
    """What says which network a file means: a training's recipe, where there is one, else the network's part of it."""
    if not layout.network:
        return None
    recipe = content.get("recipe")
    return {**recipe} if isinstance(recipe, Mapping) and reset is None else layout.recipe()


def _metadata(layout: Layout, to: str, needs: str, recipe: Mapping[str, Any] | None) -> dict[str, str]:
    """The header's metadata, strings all."""
    values = {
        "format": FORMAT,
        "version": metadata.version("pspnet_fast"),
        "family": to,
        "source": layout.family,
    }
    if layout.in_channels == 3:  # of other images nothing is known
        values["normalisation"] = normalisation.JSON
    if recipe is not None:
        values |= {"recipe": json.dumps(recipe), "classes": str(layout.classes)}
    return values | ({"needs": needs} if needs else {})


def _wrapped(made: Written, to: str, recipe: Mapping[str, Any] | None) -> dict[str, Any]:
    """A .pth file as the family writes it."""
    state = {name: tensor.detach().clone() for name, tensor in made.state.items()}
    if recipe is None and to != "mmseg":
        return state  # a backbone alone is flat everywhere else
    if to == "semseg":
        return {"state_dict": {f"module.{name}": tensor for name, tensor in state.items()}}
    if to == "mmseg":
        return {"meta": {"config": made.needs}, "state_dict": state}
    return {"model": state, "recipe": recipe}


def _save_safetensors(made: Written, path: Path, values: dict[str, str]) -> None:
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError(f"{path}: needs safetensors ({error}): {install('convert')}") from error
    # Each tensor its own, in order: safetensors refuses shared and strided memory.
    state = {name: tensor.detach().clone(memory_format=torch.contiguous_format) for name, tensor in made.state.items()}
    with replacing(path) as temporary:
        temporary.write_bytes(safetensors.torch.save(state, values))
