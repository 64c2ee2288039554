"""hszhao/semseg: model/pspnet.py and model/resnet.py; and its ImageNet weights (initmodel/resnet50_v2.pth).

Its names are ours. All blocks of a dilated stage have the stage's dilation, every upsampling aligns corners, and neither is
an option there. Training saves "module." before every name, under "state_dict".
"""

from __future__ import annotations

from .family import FLAT, Family
from .layout import Layout


def _needs(layout: Layout) -> str:
    layout.refuse_others(
        "semseg",
        stem="deep",
        in_channels=3,
        dilation="full",
        align_corners=True,
        output_stride=8,
        stages=4,
        dilate_second=True,
        kernel_sizes=(3, 1),
        bin1_norm=True,
        reduction_channels=None,
        bottleneck_channels=None,
        aux_channels=None,
    )
    return f"PSPNet(layers={layout.layers}, bins={layout.bins}, classes={layout.classes}, pretrained=False)"


def _needs_of_backbone(layout: Layout) -> str:
    layout.refuse_others("semseg", stem="deep", in_channels=3)
    return f"resnet{layout.layers}(deep_base=True)"


SEMSEG = Family(
    name="semseg",
    library="semseg",
    rules=tuple((part, part) for part in ("layer0", "layer{i}", "ppm.features.{i}", "cls", "aux")),
    stems=("deep", "v1c", "plain"),
    dropped=(r"^criterion\.",),
    dilation="full",
    needs=_needs,
)
SEMSEG_BACKBONE = Family(
    name="semseg",
    library="semseg's ImageNet weights",
    rules=FLAT,
    stems=("deep", "v1c"),
    dilation="full",
    needs=_needs_of_backbone,
)
