"""Checks of what callers pass, in one wording: `op: what must hold, got this`.

ValueError for a shape or a value, TypeError for a type or a dtype. Every helper names the op it speaks for.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

# Up to here integers are exact in float32, and the kernels' tables of cells and of an axis' pixels stay within a gigabyte. Far
# beyond, squares of bins and products of sizes would leave 64 bits.
MAX_CELLS = MAX_LENGTH = 2**24
# Of what is added to a pixel's index or to a channel's, which kernels count in 32 bits.
MAX_OFFSET = 2**30


def check_tensor(op: str, name: str, tensor: object, dims: str) -> None:
    """A floating-point tensor whose rank is the number of letters of `dims`, such as "NCHW"."""
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, got {type(tensor).__name__}")
    if tensor.dim() != len(dims):
        raise ValueError(f"{op}: {name} must be {len(dims)}-D ({', '.join(dims)}), got {tuple(tensor.shape)}")
    if tensor.dtype not in DTYPES:
        kinds = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        raise TypeError(f"{op}: {name} must be one of {kinds}, got {str(tensor.dtype).removeprefix('torch.')}")


def check_features(op: str, x: torch.Tensor) -> None:
    """Features (N, C, H, W): N may be 0, the rest may not."""
    check_tensor(op, "x", x, "NCHW")
    if 0 in x.shape[1:]:
        raise ValueError(f"{op}: x must have at least one channel, row and column, got {tuple(x.shape)}")


def check_logits(op: str, logits: torch.Tensor) -> None:
    """Logits (N, K, h, w): N may be 0, the rest may not."""
    check_tensor(op, "logits", logits, "NKHW")
    if 0 in logits.shape[1:]:
        raise ValueError(f"{op}: logits must have at least one class, row and column, got {tuple(logits.shape)}")


def check_map_size(op: str, size: Sequence[int]) -> tuple[int, int]:
    """(H, W) of a map with pixels."""
    if isinstance(size, (int, str)) or not isinstance(size, Sequence):
        raise TypeError(f"{op}: size must be two integers (H, W), got {size!r}")
    for length in size:
        if isinstance(length, bool) or not isinstance(length, (int, torch.SymInt)):
            raise TypeError(f"{op}: size must be integers, got {size!r}")
    if len(size) != 2 or min(size) < 1:
        raise ValueError(f"{op}: size must be (H, W), both positive, got {size!r}")
    if max(size) > MAX_LENGTH:
        raise ValueError(f"{op}: size must be at most {MAX_LENGTH} x {MAX_LENGTH}, got {size!r}")
    return size[0], size[1]


def check_bins(op: str, bins: Sequence[int]) -> tuple[int, ...]:
    """Bins as a tuple: at least one, all of them positive integers, of at most MAX_CELLS cells together."""
    if isinstance(bins, (int, str)) or not isinstance(bins, Sequence):
        raise TypeError(f"{op}: bins must be a sequence of integers such as (1, 2, 3, 6), got {bins!r}")
    if not bins:
        raise ValueError(f"{op}: bins must not be empty")
    for b in bins:
        if isinstance(b, bool) or not isinstance(b, int):
            raise TypeError(f"{op}: bins must be integers, got {bins!r}")
        if b < 1:
            raise ValueError(f"{op}: bins must be positive, got {bins!r}")
    if sum(b * b for b in bins) > MAX_CELLS:
        raise ValueError(f"{op}: bins must come to at most {MAX_CELLS} cells, got {bins!r}")
    return tuple(bins)


def equals(target: torch.Tensor, value: int) -> torch.Tensor:
    """`target == value` of integers. A value that target's dtype cannot hold is none of them: torch would wrap it."""
    info = torch.iinfo(target.dtype)
    return target == value if info.min <= value <= info.max else torch.zeros_like(target, dtype=torch.bool)


def is_class(target: torch.Tensor, classes: int) -> torch.Tensor:
    """Where an integer target is in [0, classes), in its own dtype: torch would wrap a number that it cannot hold."""
    return (target >= 0) & (target <= min(classes - 1, torch.iinfo(target.dtype).max))


def check_pyramid(op: str, name: str, pyramid: torch.Tensor, bins: Sequence[int]) -> None:
    """A packed pyramid (N, S, C) of exactly these bins."""
    check_tensor(op, name, pyramid, "NSC")
    cells = sum(b * b for b in bins)
    if pyramid.shape[1] != cells:
        raise ValueError(
            f"{op}: {name} must have {cells} cells for bins {tuple(bins)}, got {pyramid.shape[1]} in {tuple(pyramid.shape)}"
        )
    if pyramid.shape[2] == 0:
        raise ValueError(f"{op}: {name} must have at least one channel, got {tuple(pyramid.shape)}")


def check_shape(op: str, name: str, tensor: torch.Tensor, shape: tuple[int, ...], meaning: str) -> None:
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{op}: {name} must be {meaning} = {shape}, got {tuple(tensor.shape)}")


def check_same_device(op: str, first: str, a: torch.Tensor, second: str, b: torch.Tensor) -> None:
    if a.device != b.device:
        raise ValueError(f"{op}: {first} and {second} must be on one device, got {a.device} and {b.device}")


def check_same_dtype(op: str, first: str, a: torch.Tensor, second: str, b: torch.Tensor) -> None:
    if a.dtype != b.dtype:
        raise TypeError(f"{op}: {first} and {second} must have one dtype, got {a.dtype} and {b.dtype}")


def check_order(op: str, order: Sequence[int] | None, level_count: int) -> tuple[int, ...]:
    """The concatenation's blocks: -1 is x (at most once), k is level k (each once). None is x, then the levels."""
    if order is None:
        return tuple(range(-1, level_count))
    if sorted(set(order) - {-1}) != list(range(level_count)) or len(set(order)) != len(order):
        raise ValueError(
            f"{op}: order must name each level 0..{level_count - 1} once, and x as -1 at most once, got {tuple(order)}"
        )
    return tuple(order)
