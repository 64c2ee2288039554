"""huggingface/transformers, models/upernet/modeling_upernet.py: `UperNetPyramidPoolingModule` in `UperNetHead`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from torch import nn

from ..nn.calls import why_call
from . import mmseg
from .family import LIST, Family, FamilyError, Pyramid, leaves, pyramid_of


class PyramidPoolingModule(Family):
    """Its forward reads Python lists, `blocks` and each block's `layers`, beside the children of the same modules.

    What replaces a child (a conversion to SyncBatchNorm) does not reach these lists; they decide here as they do there.
    """

    name = "transformers"
    layouts = LIST

    def pyramid(self, module: nn.Module) -> Pyramid | None:
        blocks = module.__dict__.get("blocks")
        if not isinstance(blocks, list) or not blocks or not hasattr(module, "pool_scales"):
            return None
        return pyramid_of([_layers(block) for block in blocks])


def _layers(block: nn.Module) -> list[nn.Module]:
    if reason := why_call(block):
        raise FamilyError(f"a block {reason}, and only its layers would be called")
    listed = cast("Sequence[nn.Module]", block.layers)
    return [leaf for layer in listed for leaf in leaves(layer)]


class UperNetHead(mmseg.DecodeHead):
    """It takes the backbone's feature maps, and pools the last."""

    name = "transformers"
    families = PyramidPoolingModule
