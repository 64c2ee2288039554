"""Which network a checkpoint's weights mean: by the names the family, by the shapes the rest."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from ..models.checkpoint import FORMAT, CheckpointError, unwrapped
from ..models.resnet import LAYERS, BasicBlock, Dilation, Stem
from .family import Family
from .layout import Layout, known_settings
from .naming import family_of, some
from .settings import MOST_BINS, are_bins, check_settings


class Recognised(NamedTuple):
    """A checkpoint as our network.

    Attributes:
        layout: the network.
        state: its tensors by PSPNet's names; of a backbone alone, also `fc`.
        theirs: the checkpoint's names of them.
    """

    layout: Layout
    state: dict[str, torch.Tensor]
    theirs: dict[str, str]


def detect(
    state_dict: Mapping[str, Any],
    *,
    ema: bool = False,
    align_corners: bool | None = None,
    bins: Sequence[int] | None = None,
    dilation: Dilation | None = None,
) -> Layout:
    """Which network the weights mean, from their names and shapes.

    Args:
        state_dict: a state_dict of any family, or the dictionary that its file holds, with whatever is around it. CSAIL's two
            files are one here, "encoder." and "decoder." before their names.
        ema: the averages of the weights, where a file has both.
        align_corners: in place of the family's own, where nothing in the file says (`Layout.assumed`).
        bins: the same; needed where there are not four levels.
        dilation: the same.

    Raises:
        CheckpointError: no known layout (the nearest is named, and what differs), or names or shapes that are no network.
        ValueError: a setting that is known to be another.
    """
    return recognise(state_dict, ema, align_corners=align_corners, bins=bins, dilation=dilation).layout


def recognise(checkpoint: Mapping[str, Any], ema: bool = False, **overrides: object) -> Recognised:
    """As `detect`, with the tensors by our names."""
    inside = unwrapped(checkpoint, ema)
    part = family_of(inside, ema)
    family, names, tensors = part.family, part.names, part.tensors
    recipe = _recipe(checkpoint)
    state = {ours: tensors[name] for name, ours in names.ours.items()}
    theirs = {ours: name for name, ours in names.ours.items()}
    layout = _layout(family, state, theirs, _config(checkpoint, family) if recipe is None else known_settings(recipe))
    if recipe is not None:
        ours = isinstance(checkpoint.get("recipe"), Mapping)
        layout = replace(layout, assumed=())
        layout = replace(layout, family=FORMAT, library=FORMAT) if ours else layout
    idle = [name for name in state if (k := _stage(name)) and k > layout.stages] if not family.dilates else []
    for name in idle:
        del state[name]
    dropped = (*names.dropped, *(theirs.pop(name) for name in idle), *part.beside)
    layout = replace(layout, dropped=dropped, unwrapped=(*inside.found, *part.found))
    given = {name: value for name, value in overrides.items() if value is not None}
    layout = _overridden(layout.normal(), given).normal()
    _check_shapes(family, layout, state, theirs)
    if layout.x_last and layout.network:
        state["cls.0.weight"] = state["cls.0.weight"].roll(layout.channels[1], 1)
    return Recognised(layout, state, theirs)


def _recipe(checkpoint: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """A recipe of ours beside the weights: of a training, or in the header of a file that `convert` wrote."""
    for holder in (checkpoint, checkpoint.get("metadata")):
        if isinstance(holder, Mapping) and isinstance(recipe := holder.get("recipe"), Mapping):
            return recipe
    return None


def _config(checkpoint: Mapping[str, Any], family: Family) -> dict[str, Any]:
    """What the family's own configuration says beside the weights."""
    meta = checkpoint.get("meta")
    if (
        family.read_config
        and isinstance(meta, Mapping)
        and isinstance(text := meta.get("config", meta.get("cfg")), str)
    ):
        said = family.read_config(text)
        check_settings(f"{family.library}'s configuration", said)
        return said
    return {}


def _layout(
    family: Family, state: Mapping[str, torch.Tensor], theirs: Mapping[str, str], said: Mapping[str, Any]
) -> Layout:
    """What the shapes say; where they do not, what is said beside them; else the family's own."""

    def shape(name: str) -> torch.Size:
        if name not in state:
            missing = next(iter(family.to_theirs([name]).values()), name)
            raise CheckpointError(f"{family.library}: {missing!r} is missing, among the names of that family")
        if state[name].dim() != 4:
            raise CheckpointError(
                f"{family.library}: {theirs[name]!r} must be a convolution's, got {tuple(state[name].shape)}"
            )
        return state[name].shape

    width = shape("layer1.0.conv1.weight")[0]
    _check_blocks(family, state, theirs)
    first = shape("layer0.0.weight")
    read: dict[str, Any] = {
        "layers": said.get("layers") or _layers(family, state),
        "width": width,
        "stem": _stem(family, first, width),
        "in_channels": first[1],
        "x_last": family.x_last,
    }
    aux = "aux.4.weight" in state
    if not any(name.startswith(("ppm.", "cls.")) for name in state):
        return Layout(family.name, family.library, **read)
    levels = len({name.split(".")[2] for name in state if name.startswith("ppm.features.")})
    settings = {
        "align_corners": family.align_corners,
        "dilation": family.dilation,
        "dilate_second": family.dilate_second,
        "bins": (1, 2, 3, 6) if levels == 4 else (0,) * levels,  # 0: to be given
        "output_stride": 8,
    }
    assumed = [name for name in settings if name not in said and (family.dilates or name != "output_stride")]
    if said.get("reduction", True):
        reduced, channels = shape("ppm.features.0.1.weight")[:2]
        expansion = LAYERS[read["layers"]][0].expansion
        read["stages"] = (channels // (width * expansion)).bit_length()
        read["reduction_channels"] = reduced
        if not family.dilates:
            settings["output_stride"] = 2 ** (read["stages"] + 1)
    return Layout(
        family.name,
        family.library,
        **{
            **settings,
            "kernel_sizes": (shape("cls.0.weight")[2], shape("cls.4.weight")[2]),
            "bin1_norm": not any(re.match(r"ppm\.features\.\d+\.1\.bias$", name) for name in state),
            "bottleneck_channels": shape("cls.0.weight")[0],
            "aux_channels": shape("aux.0.weight")[0] if aux else None,
            **read,
            **said,
        },
        classes=shape("cls.4.weight")[0],
        aux=aux,
        assumed=tuple(assumed),
    )


def _layers(family: Family, state: Iterable[str]) -> int:
    blocks: dict[int, set[str]] = {}
    for name in state:
        if stage := _stage(name):
            blocks.setdefault(stage, set()).add(name.split(".")[1])
    depths = tuple(len(blocks.get(k, ())) for k in range(1, max(blocks, default=0) + 1))
    basic = "layer1.0.conv3.weight" not in state
    for layers, (block, wanted) in LAYERS.items():
        if (block is BasicBlock) == basic and wanted[: len(depths)] == depths:
            return layers
    raise CheckpointError(
        f"{family.library}: stages of {', '.join(map(str, depths)) or 'no'} {'basic ' if basic else ''}blocks are none of "
        f"ResNet {', '.join(map(str, LAYERS))}"
    )


def _stage(name: str) -> int | None:
    match = re.match(r"layer([1-9])\.", name)
    return int(match[1]) if match else None


def _check_blocks(family: Family, state: Mapping[str, torch.Tensor], theirs: Mapping[str, str]) -> None:
    """The first block is a ResNet's: its 3x3 convolution reads all channels, and the last makes four times as many."""
    names = [f"layer1.0.conv{i}.weight" for i in (1, 2, 3)]
    if any(name not in state or state[name].dim() != 4 for name in names):
        return  # basic blocks, or what `_check_shapes` names
    inner, grouped, outer = (tuple(state[name].shape) for name in names)
    if grouped[1] != inner[0] and grouped[1] and grouped[0] % grouped[1] == 0:
        kind = (
            f"a ResNeXt, of {grouped[0] // grouped[1]} groups of {grouped[1]} channels ({theirs[names[1]]!r} {grouped})"
        )
    elif outer[0] != 4 * inner[0]:
        kind = f"a wide ResNet, whose blocks are {inner[0]} channels wide for {outer[0]} ({theirs[names[2]]!r} {outer})"
    else:
        return
    raise CheckpointError(f"{family.library}: the backbone is {kind}: only ResNets as in their paper are read")


def _stem(family: Family, first: torch.Size, width: int) -> Stem:
    channels, _, kernel = first[:3]
    stems: dict[tuple[int, int], Stem] = {(7, width): "plain", (3, width): "deep", (3, width // 2): "v1c"}
    stem = stems.get((kernel, channels))
    if stem is None or stem not in family.stems:
        raise CheckpointError(
            f"{family.library}: the stem must be {' or '.join(family.stems)} for stages of {width} channels, got a first "
            f"convolution {tuple(first)}"
        )
    return stem


def _overridden(layout: Layout, given: Mapping[str, Any]) -> Layout:
    for name, value in given.items():
        if name == "bins":
            value = tuple(value)
        if name == "bins" and not are_bins(value):
            raise ValueError(f"{layout.library}: bins must be from 1 to {MOST_BINS} each, got {value}")
        if name == "bins" and len(value) != len(layout.bins):
            raise ValueError(f"{layout.library}: bins must be {len(layout.bins)}, as there are levels, got {value}")
        if name not in layout.assumed and getattr(layout, name) != value:
            known = f"known to be {getattr(layout, name)!r}" if layout.network else "no matter of a backbone alone"
            raise ValueError(f"{layout.library}: {name} is {known}, got {value!r}")
        changes: dict[str, Any] = {name: value, "assumed": tuple(other for other in layout.assumed if other != name)}
        layout = replace(layout, **changes)
    if 0 in layout.bins:
        raise CheckpointError(
            f"{layout.library}: there are {len(layout.bins)} levels, of bins that must be given: --bins"
        )
    return layout


def _check_shapes(family: Family, layout: Layout, state: Mapping[str, torch.Tensor], theirs: Mapping[str, str]) -> None:
    """The network that was read has these tensors and no others; batch counters may be absent, as in old files."""
    try:
        wanted = layout.shapes()
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise CheckpointError(f"{layout.library}: what its file says of the network is none: {error}") from error
    missing = [name for name in wanted if name not in state and not name.endswith("num_batches_tracked")]
    extra = [theirs[name] for name in state if name not in wanted and not name.startswith("fc.")]
    unlike = [
        f"{theirs[name]} {tuple(state[name].shape)} instead of {tuple(size)}"
        for name, size in wanted.items()
        if name in state and state[name].shape != size
    ]
    if missing or extra or unlike:
        lists = {"missing": [family.to_theirs([name]).get(name, name) for name in missing], "unexpected": extra}
        raise CheckpointError(
            f"{layout.library}: the names are this family's, but not the tensors those of "
            f"{'its PSPNet' if layout.network else 'a ResNet'} of {layout.layers} layers"
            + "".join(
                f"; {len(names)} {kind}: {some(names)}"
                for kind, names in {**lists, "mismatched": unlike}.items()
                if names
            )
        )
