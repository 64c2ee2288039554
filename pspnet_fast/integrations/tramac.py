"""Tramac/awesome-semantic-segmentation-pytorch (and gluon-cv) and zhanghang1989/PyTorch-Encoding: numbered children."""

from __future__ import annotations

from typing import ClassVar, cast

from torch import nn

from .family import X_FIRST, Family, Pyramid, leaves, pyramid_of


class _Numbered(Family):
    """Pools and convolutions are children with the numbers 1, 2, ..., and nothing else is."""

    pool: ClassVar[str]
    layouts = X_FIRST

    def pyramid(self, module: nn.Module) -> Pyramid | None:
        children = module._modules
        numbers = range(1, len(children) // 2 + 1)
        names = [(f"{self.pool}{i}", f"conv{i}") for i in numbers]
        if not names or children.keys() != {name for pair in names for name in pair}:
            return None
        pairs = [(cast(nn.Module, children[pool]), cast(nn.Module, children[conv])) for pool, conv in names]
        return pyramid_of([[pool, *leaves(conv)] for pool, conv in pairs])


class Tramac(_Numbered):
    """`avgpool1`, `conv1`, ..."""

    name = "Tramac"
    pool = "avgpool"


class Encoding(_Numbered):
    """`pool1`, `conv1`, ..."""

    name = "PyTorch-Encoding"
    pool = "pool"
