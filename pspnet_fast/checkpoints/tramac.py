"""Tramac/awesome-semantic-segmentation-pytorch: core/models/pspnet.py, base_models/resnetv1b.py, fcn.py.

The backbone's classifier is saved and never runs.
"""

from __future__ import annotations

from .family import Family, Rules

PRETRAINED: Rules = (
    *((f"pretrained.conv1.{i}", f"layer0.{i}") for i in (0, 1, 3, 4, 6)),
    *(("pretrained.bn1", "layer0.7"), ("pretrained.layer{i}", "layer{i}")),
)
"""The deep stem is one `conv1`, but for its last norm; PyTorch-Encoding's, too."""


def levels(psp: str) -> Rules:
    """The levels are attributes, counted from 1."""
    return tuple((f"{psp}.conv{k + 1}.{i}", f"ppm.features.{k}.{i + 1}") for k in range(4) for i in (0, 1))


TRAMAC = Family(
    name="tramac",
    library="awesome-semantic-segmentation-pytorch (Tramac)",
    rules=(
        *PRETRAINED,
        *levels("head.psp"),
        *((f"head.block.{i}", f"cls.{i}") for i in (0, 1, 4)),
        *((f"auxlayer.block.{i}", f"aux.{i}") for i in (0, 1, 4)),
    ),
    dropped=(r"^pretrained\.fc\.",),
)
