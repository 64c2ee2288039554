"""torchvision: models/resnet.py, the classification networks.

A PSPNet's backbone is written without the rest of it. The dilation of `replace_stride_with_dilation` is halved in the first
block of a stage, and there is none for basic blocks.
"""

from __future__ import annotations

from .family import FLAT, Family
from .layout import Layout


def _needs(layout: Layout) -> str:
    layout.refuse_others("torchvision", stem="plain", in_channels=3, stages=4)
    name = f"resnet{layout.layers}"
    if not layout.network or layout.output_stride == 32:
        return f"{name}()"
    layout.refuse_others("torchvision", dilation="halved")
    if layout.basic_blocks:
        layout.refuse_others("torchvision's basic blocks", output_stride=32)
    return f"{name}(replace_stride_with_dilation={[False, layout.output_stride == 8, True]})"


TORCHVISION = Family(name="torchvision", library="torchvision", rules=FLAT, stems=("plain",), needs=_needs)
