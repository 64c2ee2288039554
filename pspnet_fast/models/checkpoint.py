"""Checkpoints: read a file without running what is in it, and load all of it or none of it."""

from __future__ import annotations

import json
import os
import pickle
import re
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from copy import copy
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn.modules.module import _IncompatibleKeys
from torch.nn.modules.utils import consume_prefix_in_state_dict_if_present

from ..files import replacing

FORMAT = "pspnet_fast"
"""The metadata entry "format" of the safetensors files that `pspnet-fast convert` writes."""
_WRAPPERS = ("state_dict", "model")
_PREFIXES = ("module.", "_orig_mod.")


class CheckpointError(ValueError, RuntimeError):
    """A checkpoint that cannot be read or does not fit. A RuntimeError too, as PyTorch's `load_state_dict` raises."""


def read_checkpoint(path: str | os.PathLike[str]) -> Mapping[str, Any]:
    """What `torch.load` finds in a file, on the CPU and with `weights_only=True`: a pickle in it is never executed.

    A safetensors file is read, too, and known by its content: its tensors are under "model" and its header's metadata under
    "metadata". In one that `pspnet-fast convert` wrote with this library's names, "recipe" says which network they mean, as
    in a snapshot of a training.

    Raises:
        OSError: the file is missing, a directory, or not readable.
        CheckpointError: the file is not a checkpoint, is truncated, or holds more than tensors and plain values.
        ImportError: a safetensors file, and safetensors is not installed.
    """
    if not Path(path).exists():
        raise FileNotFoundError(
            f"no checkpoint at {os.fspath(path)!r}. Nothing is downloaded: give the path of a file that is there"
        )
    if _is_safetensors(path):
        return _read_safetensors(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:
        # A damaged file surfaces as whatever the unpickler trips over: EOFError, RuntimeError, UnicodeDecodeError...
        where, reason = f"{os.fspath(path)!r} cannot be read", str(error)
        if isinstance(error, pickle.UnpicklingError) and (
            found := re.search(r"WeightsUnpickler error:\s*(.+)", reason)
        ):
            reason = found[1].strip()  # without the advice around it, which is to run what is in the file
        if found := re.search(r"GLOBAL (\S+)", reason):
            raise CheckpointError(
                f"{where}: it holds more than tensors and plain values ({found[1]}), and code in a checkpoint is never run. "
                "Where the file is trusted, save its weights alone, once: "
                "content = torch.load(IN, map_location='cpu', weights_only=False); "
                "torch.save({'state_dict': content['state_dict']}, OUT)"
            ) from error
        raise CheckpointError(f"{where} as a checkpoint of tensors: {reason}") from error
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{os.fspath(path)!r} must hold a dictionary, got {type(content).__name__}")
    return content


def _is_safetensors(path: str | os.PathLike[str]) -> bool:
    """Whether a file begins as safetensors do: eight bytes for the length of a JSON object, which follows."""
    with Path(path).open("rb") as file:
        start = file.read(9)
    return start[8:] == b"{" and int.from_bytes(start[:8], "little") <= Path(path).stat().st_size


def _read_safetensors(path: str | os.PathLike[str]) -> Mapping[str, Any]:
    try:
        import safetensors
    except ImportError as error:
        raise ImportError(
            f"{os.fspath(path)!r} needs safetensors ({error}): pip install 'pspnet_fast[convert]'"
        ) from error
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            metadata: dict[str, Any] = dict(file.metadata() or {})
        content = {"model": tensors, "metadata": metadata}
        if metadata.get("format") == FORMAT and "recipe" in metadata:
            metadata["recipe"] = json.loads(metadata["recipe"])
            if metadata.get("family") == FORMAT:
                content["recipe"] = metadata["recipe"]
    except (safetensors.SafetensorError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{os.fspath(path)!r} cannot be read as a checkpoint of tensors: {error}") from error
    return content


def write_checkpoint(
    content: Mapping[str, Any], path: Path, error: Callable[[str], Exception] = OSError, keep: Path | None = None
) -> None:
    """`torch.save` as a file that appears whole or not at all; see `files.replacing` for `error` and `keep`."""
    with replacing(path, error, keep) as temporary, temporary.open("wb") as file:
        try:
            torch.save(dict(content), file)
        except RuntimeError as reason:  # torch's writer, of its own position, after a write that came up short
            if isinstance(reason.__context__, OSError):
                raise OSError(reason.__context__.errno, reason.__context__.strerror) from reason
            raise OSError(" ".join(str(reason).split())) from reason


def bare_state_dict(checkpoint: Mapping[str, Any]) -> Mapping[str, torch.Tensor]:
    """The names and tensors inside a checkpoint: the dictionary under "state_dict" or "model" where there is one,
    without the prefix that `DistributedDataParallel` ("module.") or `torch.compile` ("_orig_mod.") puts before names.
    """
    if not isinstance(checkpoint, Mapping):
        raise TypeError(f"a state_dict must be a mapping, got {type(checkpoint).__name__}")
    for name in _WRAPPERS:
        if isinstance(checkpoint.get(name), Mapping):
            checkpoint = checkpoint[name]
    for name, value in checkpoint.items():
        if not isinstance(value, torch.Tensor):
            raise CheckpointError(f"a state_dict maps names to tensors, got {type(value).__name__} under {name!r}")
    bare: OrderedDict[str, Any] = OrderedDict(checkpoint)
    if hasattr(checkpoint, "_metadata"):
        bare._metadata = copy(checkpoint._metadata)  # type: ignore[attr-defined]
    while prefix := next((p for p in _PREFIXES if bare and all(name.startswith(p) for name in bare)), None):
        consume_prefix_in_state_dict_if_present(bare, prefix)
    return bare


class Loadable(nn.Module):
    """A module whose `load_state_dict` looks at the whole checkpoint first, then copies all of it or nothing."""

    optional_prefixes: ClassVar[tuple[str, ...]] = ()
    """Parts that may be absent, as a whole, from the checkpoint or from the module."""

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> _IncompatibleKeys:
        """Load a checkpoint as `bare_state_dict` understands it.

        As `nn.Module.load_state_dict`, with these differences: nothing is copied unless everything fits; also where
        `strict`, the parts named in `optional_prefixes` may be absent on either side, and `num_batches_tracked` from
        the checkpoint (files older than PyTorch 0.4.1 lack it). Absent names are in the returned `missing_keys`,
        left-over ones in `unexpected_keys`.

        Raises:
            CheckpointError: shapes differ or, where `strict`, keys are missing or unexpected. It lists all of them.
        """
        given = bare_state_dict(state_dict)
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
            )
        super().load_state_dict(given, strict=False, assign=assign)
        return _IncompatibleKeys(missing, unexpected)

    def _not_optional(self, names: Iterable[str], other_side: Iterable[str]) -> list[str]:
        absent = tuple(p for p in self.optional_prefixes if not any(name.startswith(p) for name in other_side))
        return [name for name in names if not name.startswith(absent)]


def _is_counter(name: str) -> bool:
    return name.endswith("num_batches_tracked")
