"""open-mmlab/mmsegmentation: configs/_base_/models/pspnet_r50-d8.py and r18; the `b` variants have a 7x7 stem.

decode_heads/psp_head.py, decode_head.py and backbones/resnet.py. contract_dilation and align_corners are configuration, which
files of its version 0 keep as text under "meta": where it is there, it is read. Basic blocks never dilate their second
convolution. align_corners is False but in the configurations of 769x769 crops.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

from ..models.checkpoint import CheckpointError
from ..models.resnet import STEMS
from .family import Family
from .layout import Layout


def _read_config(text: str) -> dict[str, Any]:
    """What the plain text of a configuration says, where it says one thing.

    Raises:
        CheckpointError: it says what no layout does.
    """
    if re.search(r"\bstyle\s*=\s*['\"]caffe", text):
        raise CheckpointError(
            "mmseg: style='caffe' in the configuration puts strides elsewhere, and no layout says that"
        )
    found: dict[str, Any] = {}
    corners = set(re.findall(r"\balign_corners\s*=\s*(True|False)", text))
    if len(corners) == 1:
        found["align_corners"] = corners == {"True"}
    contracted = set(re.findall(r"\bcontract_dilation\s*=\s*(True|False)", text))
    if len(contracted) == 1:
        found["dilation"] = "halved" if contracted == {"True"} else "full"
    elif not contracted and re.search(r"\bdilations\s*=", text):
        found["dilation"] = "full"  # the default of its ResNet, which its PSPNets' configurations replace
    scales = set(re.findall(r"\bpool_scales\s*=\s*[(\[]([\d\s,]+)[)\]]", text))
    if len(scales) == 1:
        found["bins"] = tuple(int(scale) for scale in re.findall(r"\d{1,9}", scales.pop()))
    return found


def _needs(layout: Layout) -> str:
    """The part of its configuration that says which network it is."""
    layout.refuse_others("mmseg", stages=4, output_stride=8)
    if layout.layers not in (18, 34, 50, 101, 152):
        raise CheckpointError(f"mmseg: layers must be 18, 34, 50, 101 or 152, got {layout.layers}")
    if layout.basic_blocks:
        layout.refuse_others("mmseg's basic blocks", dilate_second=False)
    if layout.network:
        layout.refuse_others("mmseg", kernel_sizes=(3, 1), bin1_norm=True)
        if layout.reduced != layout.inner:
            raise CheckpointError(
                "mmseg: levels and bottleneck must have as many channels, the decode head's, "
                f"got {layout.reduced} and {layout.inner}"
            )
    stem = STEMS[layout.stem][-1] * layout.width // 64
    images = "" if layout.in_channels == 3 else f"in_channels={layout.in_channels}, "
    lines = [
        "model = dict(",
        "    type='EncoderDecoder',",
        f"    backbone=dict(type='{'ResNet' if layout.stem == 'plain' else 'ResNetV1c'}', depth={layout.layers}, {images}"
        f"stem_channels={stem}, base_channels={layout.width}, dilations=(1, 1, 2, 4), strides=(1, 2, 1, 1), "
        f"contract_dilation={layout.dilation == 'halved'}),",
    ]
    if layout.network:
        third, fourth = layout.channels
        lines.append(
            f"    decode_head=dict(type='PSPHead', in_channels={fourth}, in_index=3, channels={layout.inner}, "
            f"pool_scales={layout.bins}, num_classes={layout.classes}, align_corners={layout.align_corners}),"
        )
    if layout.aux:
        lines.append(
            f"    auxiliary_head=dict(type='FCNHead', in_channels={third}, in_index=2, "
            f"channels={layout.aux_channels or third // 4}, num_convs=1, concat_input=False, "
            f"num_classes={layout.classes}, align_corners={layout.align_corners}),"
        )
    return "\n".join([*lines, ")"])


MMSEG = Family(
    name="mmseg",
    library="mmseg",
    rules=(
        *(("backbone.stem", "layer0"), ("backbone.layer{i}", "layer{i}")),
        *(("decode_head.psp_modules.{i}.1.conv", "ppm.features.{i}.1"),),
        *(("decode_head.psp_modules.{i}.1.bn", "ppm.features.{i}.2"),),
        *(("decode_head.bottleneck.conv", "cls.0"), ("decode_head.bottleneck.bn", "cls.1")),
        *(("decode_head.conv_seg", "cls.4"), ("auxiliary_head.conv_seg", "aux.4")),
        *(("auxiliary_head.convs.0.conv", "aux.0"), ("auxiliary_head.convs.0.bn", "aux.1")),
    ),
    stems=("deep", "v1c"),
    dropped=(r"^head\.fc\.",),
    align_corners=False,
    dilate_second=False,
    read_config=_read_config,
    needs=_needs,
)
MMSEG_B = replace(
    MMSEG,
    rules=(("backbone.conv1", "layer0.0"), ("backbone.bn1", "layer0.1"), *MMSEG.rules[1:]),
    stems=("plain",),
)
MMSEG_BACKBONE = replace(
    MMSEG,
    library="mmseg's ImageNet weights",
    rules=(("stem", "layer0"), ("layer{i}", "layer{i}"), ("fc", "fc")),
    needs=None,
)
"""open-mmlab://resnet50_v1c and the like. mmpretrain saves "backbone." before the names, and a classifier `head.fc`."""
