"""Checkpoints: read a file without running what is in it, and load all of it or none of it."""

from __future__ import annotations

import io
import json
import os
import pickle
import re
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import IO, Any, BinaryIO, ClassVar, TypeVar, cast

import torch
from torch import nn
from torch.nn.modules.module import _IncompatibleKeys
from torch.overrides import TorchFunctionMode

from ..extras import install
from ..files import replacing
from .archive import OTHER_PROTOCOL, ZIP, RefusedError, dry_run, dry_run_legacy, names_in, verified
from .formats import FIRST, how_to_save, what_it_is, what_the_archive_is
from .unwrap import UnwrapError, Unwrapped, common_part, say, unwrap, without_prefix

_Module = TypeVar("_Module", bound="Loadable")

FORMAT = "pspnet_fast"
"""The metadata entry "format" of the safetensors files that `pspnet-fast convert` writes."""


class CheckpointError(ValueError, RuntimeError):
    """A checkpoint that cannot be read or does not fit. A RuntimeError too, as PyTorch's `load_state_dict` raises."""


def read_checkpoint(path: str | os.PathLike[str]) -> Mapping[str, Any]:
    """What `torch.load` finds in a file, on the CPU and with `weights_only=True`: a pickle in it is never executed.

    Every checksum in a file of `torch.save` is verified first, and that its tensors are no larger than it is; see
    `archive.py`. Files of before PyTorch 1.6 and safetensors have no checksums: of those, the sizes alone are.

    A safetensors file is read, too, and known by its content: its tensors are under "model" and its header's metadata under
    "metadata". In one that `pspnet-fast convert` wrote with this library's names, "recipe" says which network they mean, as
    in a snapshot of a training.

    Raises:
        OSError: the file is missing, a directory, no regular file or not readable.
        CheckpointError: the file is not a checkpoint, is truncated or damaged, or holds more than tensors and plain values.
        ImportError: a safetensors file, and safetensors is not installed.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(
            f"no checkpoint at {str(path)!r}. Nothing is downloaded: give the path of a file that is there"
        )
    if path.is_dir():
        raise IsADirectoryError(f"{str(path)!r} is a folder: give the checkpoint's file in it")
    if not path.is_file():
        raise OSError(f"{str(path)!r} is no regular file: give one that can be read twice")
    with path.open("rb") as file:
        try:
            content = _read(file, path)
        except (CheckpointError, ImportError):
            raise
        except Exception as error:
            # A damaged file surfaces as whatever its reader trips over: EOFError, UnicodeDecodeError, a bare OSError...
            reason = " ".join(str(error).split()) or type(error).__name__
            raise CheckpointError(f"{str(path)!r} cannot be read as a checkpoint of tensors: {reason}") from error
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{str(path)!r} must hold a dictionary, got {type(content).__name__}")
    return content


def _read(file: BinaryIO, path: Path) -> Any:
    length = file.seek(0, os.SEEK_END)
    file.seek(0)
    first = file.read(FIRST)
    if first[8:9] == b"{" and int.from_bytes(first[:8], "little") <= length - 8:
        return _read_safetensors(path)
    if first.startswith(ZIP):
        if reason := what_the_archive_is(names_in(file)):
            raise RefusedError(f"it is {reason}")
        archive = verified(file)
        sketch = dry_run(io.BytesIO(archive.data_pkl or b""), length, archive.sizes)
    else:
        if reason := what_it_is(path, first, length):
            raise RefusedError(f"it is {reason}")
        file.seek(0)
        sketch = dry_run_legacy(file, length)
    file.seek(0)
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = str(error)
        if found := re.search(r"WeightsUnpickler error:\s*(.+)", reason):
            reason = found[1].strip()  # without the advice around it, which is to run what is in the file
        if found := re.search(r"GLOBAL (\S+)", reason):
            raise CheckpointError(
                f"{str(path)!r} cannot be read: it holds more than tensors and plain values ({found[1]}), and code in a "
                f"checkpoint is never run. Where the file is trusted, save its weights alone, once: {how_to_save(sketch)}"
            ) from error
        raise RefusedError(OTHER_PROTOCOL if reason.startswith("Unsupported operand") else reason) from error


def _read_safetensors(path: Path) -> Mapping[str, Any]:
    """Safetensors' own reader compares the header with the file's length, and the tensors with one another."""
    try:
        import safetensors
    except ImportError as error:
        raise ImportError(f"{str(path)!r} needs safetensors ({error}): {install('convert')}") from error
    with safetensors.safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        metadata: dict[str, Any] = dict(file.metadata() or {})
    content = {"model": tensors, "metadata": metadata}
    if metadata.get("format") == FORMAT and "recipe" in metadata:
        metadata["recipe"] = json.loads(metadata["recipe"])
        if metadata.get("family") == FORMAT:
            content["recipe"] = metadata["recipe"]
    return content


def write_checkpoint(
    content: Mapping[str, Any], path: Path, error: Callable[[str], Exception] = OSError, keep: Path | None = None
) -> None:
    """`torch.save` as a file that appears whole or not at all; see `files.replacing` for `error` and `keep`."""
    with replacing(path, error, keep) as temporary, temporary.open("wb") as file:
        recorder = _Recorder(file)
        try:
            torch.save(dict(content), cast("IO[bytes]", recorder))
        except RuntimeError as reason:  # how torch's writer says that a write came up short, and not why
            raise recorder.failed or OSError(" ".join(str(reason).split())) from reason


class _Recorder:
    """A file to write to, which remembers why it could not be."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.failed: OSError | None = None

    def write(self, data: bytes) -> int:
        try:
            return self.file.write(data)
        except OSError as error:
            self.failed = error
            raise

    def flush(self) -> None:
        self.file.flush()


def bare_state_dict(checkpoint: Mapping[str, Any], ema: bool = False) -> Mapping[str, torch.Tensor]:
    """The names and tensors inside a checkpoint: the dictionary under "state_dict", "model" and the like where there is one,
    without what `DistributedDataParallel` ("module."), `torch.compile` ("_orig_mod."), FSDP and `AveragedModel` add to names.

    Args:
        checkpoint: a state_dict, or the dictionary of a file that has one in it.
        ema: the averages, where there are weights and averages of them ("ema", "state_dict_ema" and the like).
    """
    return unwrapped(checkpoint, ema).state


def unwrapped(checkpoint: Mapping[str, Any], ema: bool = False) -> Unwrapped:
    """As `bare_state_dict`, with what was chosen, which is logged.

    Raises:
        CheckpointError: it holds other things than tensors.
    """
    try:
        inside = unwrap(checkpoint, ema)
    except UnwrapError as error:
        raise CheckpointError(str(error)) from error
    say("checkpoint", inside)
    return inside


class Loadable(nn.Module):
    """A module whose `load_state_dict` looks at the whole checkpoint first, then copies all of it or nothing."""

    optional_prefixes: ClassVar[tuple[str, ...]] = ()
    """Parts that may be absent, as a whole, from the checkpoint or from the module."""
    first_convolution: ClassVar[str | None] = None
    """The name of the weight that reads the images."""

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> _IncompatibleKeys:
        """Load a checkpoint as `bare_state_dict` understands it.

        As `nn.Module.load_state_dict`, with these differences: a part that all names begin with is left out, where no name is
        the module's with it (Lightning's "model."); nothing is copied unless everything fits; also where
        `strict`, the parts named in `optional_prefixes` may be absent on either side, and `num_batches_tracked` from
        the checkpoint (files older than PyTorch 0.4.1 lack it). Absent names are in the returned `missing_keys`,
        left-over ones in `unexpected_keys`.

        Raises:
            CheckpointError: shapes differ or, where `strict`, keys are missing or unexpected. It lists all of them.
        """
        given = _without_common_part(bare_state_dict(state_dict), self.state_dict())
        keys = self.check_fit(given, strict)
        super().load_state_dict(given, strict=False, assign=assign)
        return keys

    def check_fit(self, given: Mapping[str, torch.Tensor], strict: bool = True) -> _IncompatibleKeys:
        """What `load_state_dict` asks of bare names and tensors before it copies any. Returns what it does."""
        own = self.state_dict()
        missing = [name for name in own if name not in given]
        unexpected = [name for name in given if name not in own]
        lists = {
            "mismatched": [
                f"{name} {tuple(given[name].shape)} instead of {tuple(own[name].shape)}"
                for name in own
                if name in given and own[name].shape != given[name].shape
            ]
        }
        if strict:
            lists["missing"] = [name for name in self._not_optional(missing, given) if not _is_counter(name)]
            lists["unexpected"] = self._not_optional(unexpected, own)
        if any(lists.values()):
            raise CheckpointError(
                f"{type(self).__name__}: the checkpoint does not fit, nothing was loaded"
                + "".join(f"\n  {len(names)} {kind}: {', '.join(names)}" for kind, names in lists.items() if names)
                + self._of_other_images(given)
            )
        return _IncompatibleKeys(missing, unexpected)

    def _of_other_images(self, given: Mapping[str, torch.Tensor]) -> str:
        """A sentence where the checkpoint is for images of another number of channels."""
        name = self.first_convolution
        weights = [state[name] for state in (given, self.state_dict()) if name is not None and name in state]
        if [each.dim() for each in weights] != [4, 4] or weights[0].shape[1] == weights[1].shape[1]:
            return ""
        theirs, ours = (each.shape[1] for each in weights)
        return (
            f"\n  the checkpoint is for images of {theirs} channels and the network for {ours}: PSPNet(in_channels={theirs}) "
            "is its network. Recipes, `predict`, `evaluate` and `train` know images of 3 channels alone"
        )

    def _not_optional(self, names: Iterable[str], other_side: Iterable[str]) -> list[str]:
        absent = tuple(p for p in self.optional_prefixes if not any(name.startswith(p) for name in other_side))
        return [name for name in names if not name.startswith(absent)]


def _is_counter(name: str) -> bool:
    return name.endswith("num_batches_tracked")


class _Unfilled(TorchFunctionMode):
    """Tensors are made and not filled: on "meta" there is nothing to fill, and the first attempt imports for seconds."""

    _FILLS = (torch.Tensor.normal_, torch.Tensor.uniform_, torch.Tensor.fill_, torch.Tensor.zero_)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return args[0] if func in self._FILLS else func(*args, **(kwargs or {}))


def fitted(build: Callable[[], _Module], checkpoint: Mapping[str, Any]) -> _Module:
    """A module with a checkpoint's weights, which is made when they are known to fit, and not before.

    Settings in a small file may be those of a network that takes minutes and all memory to make.

    Args:
        build: makes the module, with random weights.
        checkpoint: as for `Loadable.load_state_dict`.

    Raises:
        CheckpointError: the checkpoint does not fit.
    """
    state = bare_state_dict(checkpoint)
    with torch.device("meta"), _Unfilled():
        try:
            sketch = build()
        except RuntimeError as error:
            raise CheckpointError(f"there is no network of the settings in the checkpoint: {error}") from error
    sketch.check_fit(_without_common_part(state, sketch.state_dict()))
    module = build()
    module.load_state_dict(state)
    return module


def _without_common_part(given: Mapping[str, Any], own: Mapping[str, Any]) -> Mapping[str, Any]:
    state = cast("OrderedDict[str, torch.Tensor]", given)
    while (part := common_part(state)) and not any(name in own for name in state):
        state = without_prefix(state, part)
    return state if any(name in own for name in state) else given
