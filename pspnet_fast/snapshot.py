"""Snapshots of a training that survive a kill: written under another name, flushed, renamed; the one before is kept."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from .config import ConfigError, Recipe, differing_settings, plain, recipe_of
from .models.checkpoint import CheckpointError, read_checkpoint, write_checkpoint
from .schema import shown, typed

LAST, PREVIOUS, BEST = "last.pth", "previous.pth", "best.pth"
SKIPPED = "skipped.pth"
"""What a `LAST` that could not be read is called, once a training has gone on without it."""

VERSION = 1
"""Of what is in a snapshot: a greater one is of a newer pspnet_fast, and not read; 0 has no number in it."""

_NEEDED = ("model", "optimizer", "scaler", "iteration", "recipe")
_HINTS: dict[str, Any] = {
    "version": int,
    "model": Mapping,
    "optimizer": Mapping,
    "scaler": Mapping,
    "iteration": int,
    "best": float,
    "losses": tuple[tuple[int, float], ...],
    "scores": tuple[tuple[int, float], ...],
    "validation_due": bool,
    "recipe": Mapping,
    "run": Mapping,
    "images": int,
    "processes": int,
    "threads": int,
    "machine": str,
    "torch": str,
}


class SnapshotError(OSError):
    """A snapshot that cannot be written; the message names it and says what is still there."""


def save(content: Mapping[str, Any], path: Path, keep: Path | None = None) -> None:
    """Write a checkpoint of tensors and plain values.

    At no moment is there less than one whole file: the new one gets its name when it is on the disk, and what had the name
    until then gets the name `keep`.

    Raises:
        SnapshotError: the disk is full, the folder cannot be written: what was there is untouched.
    """
    write_checkpoint({"version": VERSION, **content}, path, SnapshotError, keep)


def read(path: Path) -> Mapping[str, Any]:
    """A snapshot, on the CPU, with every checksum in it verified, every key of a known type, and a recipe that can be.

    Raises:
        OSError: no such file.
        CheckpointError: truncated, damaged, of a newer version, or no snapshot of a training.
    """
    content = read_checkpoint(path)
    _check(content, path)
    return content


def _check(content: Mapping[str, Any], path: Path) -> None:
    def error(words: str) -> CheckpointError:
        return CheckpointError(f"{path}: is not a snapshot of a training: {words}")

    missing = [key for key in _NEEDED if key not in content]
    if missing:
        raise CheckpointError(f"{path}: is not a snapshot of a training, it lacks {', '.join(missing)}")
    version = typed(int, content.get("version", 0), "version", error)
    if version > VERSION:
        raise CheckpointError(
            f"{path}: is a snapshot of version {version}, this pspnet_fast reads those up to {VERSION}: a newer one wrote it"
        )
    for key, hint in _HINTS.items():
        if key in content:
            typed(hint, content[key], key, error)
    for name, tensor in content["model"].items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            raise error(f"model must be names and tensors, got {shown(name)} and a {type(tensor).__name__}")
    for key in ("version", "iteration", "images", "processes", "threads"):
        if content.get(key, 0) < 0:
            raise error(f"{key} must be at least 0, got {content[key]}")
    if math.isnan(content.get("best", 0)):
        raise error("best must be a number, got nan")
    try:
        recipe_of(content["recipe"])
    except ConfigError as reason:
        raise CheckpointError(f"{path}: its recipe cannot be: {reason}") from reason


def latest(folder: Path) -> tuple[Path, Mapping[str, Any], list[str]] | None:
    """The newest whole snapshot of a folder, and a sentence for each that was skipped; None where there is none at all.

    Raises:
        CheckpointError: there are snapshots, and none can be read.
    """
    skipped: list[str] = []
    for name in (LAST, PREVIOUS):
        path = folder / name
        if not path.exists():
            continue
        try:
            return path, read(path), skipped
        except Exception as error:  # whatever a reader stumbles over: this one is skipped, and said to be
            skipped.append(str(error) if str(path) in str(error) else f"{path}: {type(error).__name__}: {error}")
    if skipped:
        best = folder / BEST
        other = f"; --resume {best} goes on from the best validation" if best.exists() else ""
        raise CheckpointError(f"{folder}: no whole snapshot: {'; '.join(skipped)}{other}")
    return None


def check_same_training(content: Mapping[str, Any], recipe: Recipe, path: Path) -> None:
    """See that a training by `recipe` can go on from a snapshot.

    Raises:
        CheckpointError: it is of another network, or its parameters are optimised in another way.
    """
    saved = recipe_of(content["recipe"])
    differing = differing_settings(recipe, saved)
    if saved.optimizer != recipe.optimizer:
        differing.append(f"optimizer {saved.optimizer} instead of {recipe.optimizer}")
    if (saved.aux_weight > 0) != (recipe.aux_weight > 0):
        differing.append(f"aux_weight {saved.aux_weight} instead of {recipe.aux_weight}")
    if differing:
        raise CheckpointError(f"{path}: is a snapshot of another training: {', '.join(differing)}")


def changes(content: Mapping[str, Any], recipe: Recipe, now: Mapping[str, Any]) -> list[str]:
    """What is not as it was when a snapshot was written, and has weights differ, such as "threads 2 -> 1".

    Args:
        content: the snapshot; what an older one does not hold is not compared.
        recipe: of the training now.
        now: the circumstances that a snapshot written now would hold.
    """
    before = {**content, **content.get("run", {}), **plain(recipe_of(content["recipe"]))}
    after = {**now, **now["run"], **plain(recipe)}
    del after["run"], after["data"]
    names = {"images": "training images"}
    return [
        f"{names.get(name, name)} {_bare(before[name])} -> {_bare(value)}"
        for name, value in after.items()
        if name in before and before[name] != value
    ]


def _bare(value: object) -> str:
    return shown(value).strip("'")


_STATES = {torch.optim.SGD: {"momentum_buffer"}, torch.optim.AdamW: {"step", "exp_avg", "exp_avg_sq"}}


def load_optimizer(saved: Mapping[str, Any], optimizer: torch.optim.Optimizer, path: Path) -> None:
    """Momenta and the like of a snapshot; rates, decay and such are the optimiser's own, which the recipe made.

    Raises:
        CheckpointError: they are of other parameters, or of another optimiser.
    """

    def error(words: str) -> CheckpointError:
        return CheckpointError(f"{path}: its optimizer does not fit: {words}")

    own = optimizer.state_dict()["param_groups"]
    groups = typed(tuple[Mapping[Any, Any], ...], saved.get("param_groups"), "param_groups", error)
    if [group.get("params") for group in groups] != [group["params"] for group in own]:
        raise error("it has other parameters")
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    states = typed(Mapping, saved.get("state"), "state", error)
    names = _STATES[type(optimizer)]
    for number, state in states.items():
        if typed(int, number, "the number of a parameter", error) not in range(len(parameters)):
            raise error(f"there is no parameter {number}")
        if {*typed(Mapping, state, "the state of a parameter", error)} not in (set(), names):
            raise error(f"a parameter's state must be {', '.join(sorted(names))}, got {shown([*state])}")
        shapes = ((), parameters[number].shape)
        for name, value in state.items():
            if value is not None and not (isinstance(value, torch.Tensor) and value.shape in shapes):
                raise error(f"{name} must be a tensor of shape {tuple(shapes[1])}, got {shown(value)}")
    optimizer.load_state_dict({"state": states, "param_groups": own})


def load_scaler(saved: Mapping[str, Any], scaler: torch.amp.GradScaler, path: Path) -> None:
    """The scale of the loss of a snapshot; nothing where the loss is not scaled now.

    Raises:
        CheckpointError: it is no scale.
    """
    own = scaler.state_dict()
    for name in own:
        value = saved.get(name)
        if not isinstance(value, (int, float)) or not 0 <= value < math.inf:
            raise CheckpointError(
                f"{path}: its scaler does not fit: {name} must be a positive number, got {shown(value)}"
            )
    if own:
        scaler.load_state_dict({name: saved[name] for name in own})
