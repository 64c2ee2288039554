"""segmentation_models_pytorch: decoders/pspnet/, with torchvision's ResNets as encoders.

The encoder stops where the features of `encoder_depth` are (3 unless said: the second stage) and is not dilated; the stages
that never run are in the file all the same. The bottleneck reads the levels, then x; it is a 1x1 convolution, and that to the
classes a 3x3. The level of bin 1 has a bias in place of a norm.
"""

from __future__ import annotations

import json
from typing import Any

from ..models.checkpoint import CheckpointError
from .family import Family


def _read_config(text: str) -> dict[str, Any]:
    """Nothing of a hub folder's config.json is needed, but some of it would make another network.

    Raises:
        CheckpointError: it does.
    """
    try:
        config = json.loads(text)
        depth, factor = config.get("encoder_depth", 3), config.get("upsampling", 8)
    except (ValueError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"smp: config.json must hold a JSON object: {error}") from error
    if depth not in (3, 4, 5):
        raise CheckpointError(f"smp: encoder_depth must be 3, 4 or 5 in config.json, got {depth!r}")
    if factor != 2**depth:
        raise CheckpointError(
            f"smp: upsampling must be {2**depth} in config.json, for logits of the image's size, got {factor!r}"
        )
    return {}


SMP = Family(
    name="smp",
    library="segmentation_models_pytorch",
    rules=(
        *(("encoder.conv1", "layer0.0"), ("encoder.bn1", "layer0.1"), ("encoder.layer{i}", "layer{i}")),
        *(("decoder.psp.blocks.{i}.pool.1.0", "ppm.features.{i}.1"),),
        *(("decoder.psp.blocks.{i}.pool.1.1", "ppm.features.{i}.2"),),
        *(("decoder.conv.0", "cls.0"), ("decoder.conv.1", "cls.1"), ("segmentation_head.0", "cls.4")),
    ),
    stems=("plain",),
    dilates=False,
    x_last=True,
    dropped=(r"^classification_head\.",),
    read_config=_read_config,
)
