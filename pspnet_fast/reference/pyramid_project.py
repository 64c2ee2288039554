"""pyramid_project in plain PyTorch. The maths stands in `pspnet_fast/ops/pyramid_project.py`."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..geometry import accumulation_dtype, levels


def pyramid_project_forward(
    pyramid: torch.Tensor,
    weight: Sequence[torch.Tensor],
    bins: Sequence[int],
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
    relu: bool,
) -> torch.Tensor:
    wide = pyramid.to(accumulation_dtype(pyramid.dtype))
    projected = []
    for k, level in enumerate(levels(wide, bins)):
        y = level @ weight[k].to(wide.dtype).T
        if scale is not None:
            y = y * scale[k]
        if shift is not None:
            y = y + shift[k]
        projected.append(torch.relu(y) if relu else y)
    return torch.cat(projected, 1).to(pyramid.dtype)


def pyramid_project_backward(
    grad: torch.Tensor, pyramid: torch.Tensor, weight: Sequence[torch.Tensor], bins: Sequence[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    dtype = accumulation_dtype(pyramid.dtype)
    grads, inputs = levels(grad.to(dtype), bins), levels(pyramid.to(dtype), bins)
    d_pyramid = torch.cat([g @ w.to(dtype) for g, w in zip(grads, weight, strict=True)], 1)
    d_weight = torch.stack([g.flatten(0, 1).T @ p.flatten(0, 1) for g, p in zip(grads, inputs, strict=True)])
    return d_pyramid.to(pyramid.dtype), d_weight.to(weight[0].dtype)
