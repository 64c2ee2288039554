"""What a sequence of modules is to the kernels: a level of a pyramid, as its modules are at this moment, or why it is none."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import nn

from .calls import why_call


class Level(NamedTuple):
    """The layers of one level; None where it has no such layer."""

    convolution: nn.Module
    norm: nn.Module | None
    activation: nn.Module | None


def leaves_of(module: nn.Module, through: tuple[type, ...] | None = None) -> list[nn.Module] | str:
    """The modules that calling a container comes down to, in the order they were registered.

    Args:
        module: a container, or a module without children, which is its own leaf, as a convolution is with any.
        through: classes of containers whose forward is to call their children one after another; None for any class.

    Returns:
        The modules; or a phrase that says why calling the container may do something else.
    """
    if not module._modules or isinstance(module, nn.Conv2d):
        return [module]
    name = type(module).__name__
    if through is not None and type(module) not in through:
        return f"holds a {name}, whose forward is its own"
    if reason := why_call(module):
        return f"holds a {name} that {reason}"
    found = []
    for child in module._modules.values():
        if child is None:
            continue
        if not child._modules or isinstance(child, nn.Conv2d):
            found.append(child)
            continue
        below = leaves_of(child, through)
        if isinstance(below, str):
            return below
        found += below
    return found


def read_level(layers: Sequence[nn.Module]) -> tuple[int, Level] | str:
    """Bins and layers of one level: adaptive average pooling, a 1x1 convolution, a norm or none, an activation or none.

    The layers between pooling and upsampling may be other than the kernels compute (`beyond_the_kernels`).

    Returns:
        Both; or a phrase that says why the layers are not such a level.
    """
    if not layers or type(layers[0]) is not nn.AdaptiveAvgPool2d:
        return "does not begin with AdaptiveAvgPool2d"
    size = layers[0].output_size
    height, width = size if isinstance(size, (tuple, list)) else (size, size)
    if height is None or height != width:
        return f"pools to {height}x{width} cells, and not to as many rows as columns"
    if reason := why_call(layers[0]):
        return f"has a pooling that {reason}"
    if len(layers) < 2 or not isinstance(layers[1], nn.Conv2d):
        return "has no 1x1 convolution after its pooling"
    rest = [layer for layer in layers[2:] if type(layer) is not nn.Identity or why_call(layer)]
    if len(rest) > 2:
        names = ", ".join(type(layer).__name__ for layer in layers)
        return f"is {names}: more than pooling, convolution, norm and activation"
    if len(rest) == 1 and type(rest[0]) is nn.ReLU:
        return height, Level(layers[1], None, rest[0])
    norm, activation = [*rest, None, None][:2]
    return height, Level(layers[1], norm, activation)
