"""CSAILVision/semantic-segmentation-pytorch: mit_semseg/models/models.py, ResnetDilated with PPM or PPMDeepsup.

It saves two files, here put together under "encoder." and "decoder.". Levels and bottleneck have 512 channels whatever the
backbone, the auxiliary head a quarter of the features'. Its synchronised batch norm saved counters of its own.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ..models.checkpoint import CheckpointError
from .family import FLAT, Family

CSAIL = Family(
    name="csail",
    library="semantic-segmentation-pytorch (CSAIL)",
    rules=(
        *((f"encoder.{theirs}", ours) for theirs, ours in FLAT if ours != "fc"),
        *(("decoder.ppm.{i}", "ppm.features.{i}"),),
        *((f"decoder.conv_last.{i}", f"cls.{i}") for i in (0, 1, 4)),
        *((f"decoder.cbr_deepsup.{i}", f"aux.{i}") for i in (0, 1)),
        *(("decoder.conv_last_deepsup", "aux.4"),),
    ),
    dropped=(r"\._tmp_running_(mean|var)$", r"\._running_iter$"),
    align_corners=False,
)


def put_together(parts: list[Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Encoder and decoder, in either order, as one.

    Raises:
        CheckpointError: they are not one of each.
    """
    found = {}
    for part in parts:
        kind = next((kind for kind, key in _MARKS.items() if key in part), None)
        if kind is not None:
            found[kind] = part
    if len(found) != len(parts):
        raise CheckpointError(
            "two files must be CSAIL's encoder (with 'conv1.weight') and decoder (with 'conv_last.0.weight'), got files with "
            + " and ".join(repr(next(iter(part), "nothing")) for part in parts)
        )
    return {f"{kind}.{name}": tensor for kind in _MARKS for name, tensor in found[kind].items()}


_MARKS = {"encoder": "conv1.weight", "decoder": "conv_last.0.weight"}
