"""How pictures are varied in training: settings alone, which recipes hold. `transforms` applies them."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Augmentation:
    """How pictures are varied in training; the defaults are semseg's.

    Attributes:
        scale: smallest and largest factor of the size, drawn uniformly.
        aspect: smallest and largest ratio of the horizontal to the vertical factor, drawn uniformly; None keeps the picture's.
        mirror: probability of a mirrored picture.
        rotate: smallest and largest angle in degrees, counter-clockwise, drawn uniformly.
        rotate_probability: probability of a rotation.
        blur_probability: probability of a Gaussian blur, 5x5.
        photometric: whether brightness, contrast, saturation and hue vary, as mmsegmentation's do.
        cat_max_ratio: share of the labelled pixels from which on one class fills too much of a crop, which is then drawn
            again, 10 times at most; 1 takes every crop.
    """

    scale: tuple[float, float] = (0.5, 2.0)
    aspect: tuple[float, float] | None = None
    mirror: float = 0.5
    rotate: tuple[float, float] = (-10.0, 10.0)
    rotate_probability: float = 0.5
    blur_probability: float = 0.5
    photometric: bool = False
    cat_max_ratio: float = 1.0

    def __post_init__(self) -> None:
        for name in ("scale", "aspect"):
            pair = getattr(self, name)
            if pair is not None and not 0 < pair[0] <= pair[1] < math.inf:
                raise ValueError(f"augmentation: {name} must be two positive factors, the smaller first, got {pair}")
        if not -180 <= self.rotate[0] <= self.rotate[1] <= 180:
            raise ValueError(
                f"augmentation: rotate must be two angles from -180 to 180, the smaller first, got {self.rotate}"
            )
        for name in ("mirror", "rotate_probability", "blur_probability"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"augmentation: {name} must be a probability, from 0 to 1, got {getattr(self, name)}")
        if not 0 < self.cat_max_ratio <= 1:
            raise ValueError(f"augmentation: cat_max_ratio must be above 0 and at most 1, got {self.cat_max_ratio}")
