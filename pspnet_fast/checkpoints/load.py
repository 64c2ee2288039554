"""Load a checkpoint of any family into PSPNet: the network that the weights mean, or an error."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..models.checkpoint import CheckpointError, bare_state_dict, read_checkpoint
from ..models.pspnet import PSPNet
from ..models.resnet import Dilation
from .csail import put_together
from .detect import Recognised, recognise
from .layout import differences, layout_of
from .settings import MOST_CLASSES

CheckpointPath = str | os.PathLike[str]

CLASSIFIERS = ("cls.4.", "aux.4.")
OF_A_FOLDER = ("model.safetensors", "pytorch_model.bin")


def load_checkpoint(
    path: CheckpointPath | Sequence[CheckpointPath],
    model: PSPNet | None = None,
    *,
    reset_classifier: bool = False,
    classes: int | None = None,
    align_corners: bool | None = None,
    bins: Sequence[int] | None = None,
    dilation: Dilation | None = None,
    ema: bool = False,
) -> PSPNet:
    """A PSPNet with the weights of a checkpoint, which may be of semseg, mmseg, segmentation_models_pytorch, Tramac,
    PyTorch-Encoding, CSAIL or this library.

    Nothing in a file is ever executed (`read_checkpoint`), and nothing is loaded unless everything fits.

    Args:
        path: the file; CSAIL's encoder and decoder as two; or a folder that a model was saved into for the Hugging Face hub.
        model: the network to load into, which must compute what the weights mean: the same dilation, align_corners and so on,
            and not only the same shapes. A backbone alone, torchvision's or ImageNet's, is loaded into its backbone. None
            builds the network that the weights mean, in evaluation mode.
        reset_classifier: leave the convolutions to the classes, `cls.4` and `aux.4`, as the model has them, for other classes.
        classes: with `reset_classifier` and without a model, for how many.
        align_corners: where the weights do not say, in place of the family's own (see `detect`).
        bins: the same.
        dilation: the same.
        ema: the exponential averages of the weights, where the file has both ("state_dict_ema", "model_ema" and the like);
            otherwise the weights are taken, and a warning says that there are averages.

    Returns:
        The model.

    Raises:
        OSError: no such file.
        CheckpointError: a file that cannot be read, of no known layout, of another network than the model or of another
            number of classes.
        ValueError: a setting that is known to be another.
    """
    found = recognise(read(path), ema, align_corners=align_corners, bins=bins, dilation=dilation)
    where = _shown(path)
    if model is None:
        return built(found, _classes(reset_classifier, classes))
    if classes is not None:
        raise ValueError(f"load_checkpoint: classes are the model's, got {classes} and a model")
    unlike = differences(found.layout, layout_of(model))
    if unlike:
        raise CheckpointError(
            f"{where}: the weights ({found.layout.library}) are another network than the model: {'; '.join(unlike)}. "
            "Without a model load_checkpoint builds the right one"
        )
    own = model.state_dict()
    if not found.layout.network:
        model.load_state_dict({**own, **{name: tensor for name, tensor in found.state.items() if name in own}})
        return model
    state = dict(found.state)
    if reset_classifier:
        state = _with_own_classifiers(state, own)
    elif found.layout.classes != (count := layout_of(model).classes):
        raise CheckpointError(
            f"{where}: {' and '.join(_classifier_names(found))} are for {found.layout.classes} classes, the model for "
            f"{count}: reset_classifier=True (--reset-classifier) leaves the model's own"
        )
    model.load_state_dict(state)
    return model


def read(path: CheckpointPath | Sequence[CheckpointPath]) -> Mapping[str, Any]:
    """What a file holds, a folder's file, or two files of CSAIL's put together."""
    if isinstance(path, (str, os.PathLike)):
        return _content(Path(path))
    if len(path) not in (1, 2):
        raise ValueError(f"load_checkpoint: path must be one file, or CSAIL's two, got {len(path)}")
    contents = [_content(Path(each)) for each in path]
    return contents[0] if len(contents) == 1 else put_together([bare_state_dict(content) for content in contents])


def built(found: Recognised, classes: int | None = None) -> PSPNet:
    """The network that the weights mean, in evaluation mode; with new classifiers for `classes`, where they are given."""
    net = found.layout.build(classes=classes)
    state = dict(found.state)
    if classes is not None:
        own = net.state_dict()
        state = _with_own_classifiers(state, own)
    net.load_state_dict(state)
    return net.eval()


def _content(path: Path) -> Mapping[str, Any]:
    """Of a folder: its weights, with its configuration where mmseg's files have theirs."""
    if not path.is_dir():
        return read_checkpoint(path)
    for name in OF_A_FOLDER:
        if (path / name).is_file():
            config = path / "config.json"
            beside = {"meta": {"config": config.read_text("utf-8", "replace")}} if config.is_file() else {}
            content = read_checkpoint(path / name)
            flat = all(isinstance(value, torch.Tensor) for value in content.values())
            return {**({"state_dict": content} if flat else content), **beside}
    raise CheckpointError(f"{path}: a folder must hold {' or '.join(OF_A_FOLDER)}")


def _classes(reset_classifier: bool, classes: int | None) -> int | None:
    if reset_classifier != (classes is not None):
        raise ValueError("load_checkpoint: without a model, reset_classifier and classes go together")
    if classes is not None and not 1 <= classes <= MOST_CLASSES:
        raise ValueError(f"load_checkpoint: classes must be from 1 to {MOST_CLASSES}, got {classes}")
    return classes


def _with_own_classifiers(
    state: Mapping[str, torch.Tensor], own: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """The state with a model's own convolutions to the classes; an auxiliary head that one of them lacks stays out."""
    return {name: own.get(name, tensor) if name.startswith(CLASSIFIERS) else tensor for name, tensor in state.items()}


def _classifier_names(found: Recognised) -> list[str]:
    return [name for ours, name in found.theirs.items() if ours.startswith(CLASSIFIERS) and name.endswith("weight")]


def _shown(path: CheckpointPath | Sequence[CheckpointPath]) -> str:
    return os.fspath(path) if isinstance(path, (str, os.PathLike)) else " and ".join(os.fspath(each) for each in path)
