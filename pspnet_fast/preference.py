"""Which backend is tried first: one table by op, dtype, memory format and size, each row with where it was measured."""

from __future__ import annotations

from typing import NamedTuple

import torch

from .geometry import is_channels_last


class Preference(NamedTuple):
    """Backends in the order in which they are tried for what fits: an empty tuple or None fits everything.

    The tensor is an op's first. Its memory format is asked of 4-D ones alone; packed pyramids have but one.
    """

    device: str
    order: tuple[str, ...]
    evidence: str  # where it was measured
    ops: tuple[str, ...] = ()
    dtypes: tuple[torch.dtype, ...] = ()
    channels_last: bool | None = None
    elements: int = 0  # at least so many

    def fits(self, op: str, tensor: torch.Tensor) -> bool:
        return (
            self.device == tensor.device.type
            and (not self.ops or op in self.ops)
            and (not self.dtypes or tensor.dtype in self.dtypes)
            and tensor.numel() >= self.elements
            and (self.channels_last is None or tensor.dim() != 4 or self.channels_last == is_channels_last(tensor))
        )


NOT_MEASURED = "not measured on a card yet: the order is what the kernels were designed for"

# The first row that fits is taken; what it does not name is left to the reference.
PREFERENCE = (
    Preference("cpu", ("cpu", "reference"), "benchmarks/README.md"),
    Preference("cuda", ("reference",), "the only one that takes it", dtypes=(torch.float64,)),
    Preference("cuda", ("cuda", "triton", "reference"), NOT_MEASURED),
)


def preferred(op: str, tensor: torch.Tensor) -> tuple[str, ...]:
    """Backends for an op in the order in which they are tried, by the op's first tensor."""
    return next((row.order for row in PREFERENCE if row.fits(op, tensor)), ("reference",))
