"""A convolution whose weight's gradient is nine matrix products, where the library's own takes longer."""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F

from ..geometry import dense, is_channels_last
from ..tracing import is_transformed


def conv2d(x: torch.Tensor, weight: torch.Tensor, padding: int) -> torch.Tensor:
    """`torch.nn.functional.conv2d` of stride 1 and without a bias.

    Its value and x's gradient are the library's. So is the weight's gradient, but in float32 on a CPU with AVX2: oneDNN's
    takes 1.2 to 1.5 times as long there as matrix products in NCHW, and 3 times in channels_last (`benchmarks/README.md`).
    """
    if _products_pay(x, weight, padding):
        return cast(torch.Tensor, cast(Any, _Conv2d).apply(x, weight))
    return F.conv2d(x, weight, padding=padding)


def _products_pay(x: torch.Tensor, weight: torch.Tensor, padding: int) -> bool:
    if torch.compiler.is_compiling() or is_transformed() or x.device.type != "cpu" or torch.is_autocast_enabled("cpu"):
        return False
    measured = torch.backends.cpu.get_cpu_capability() == "AVX2"
    return measured and x.dtype == weight.dtype == torch.float32 and weight.shape[2:] == (3, 3) and padding == 1


class _Conv2d(torch.autograd.Function):
    """3x3, padding 1."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        return F.conv2d(x, weight, padding=1)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        x, weight = ctx.saved_tensors
        grad, (for_x, for_weight) = grads[0], ctx.needs_input_grad
        by_products = for_weight and not torch.is_grad_enabled()  # where it will be differentiated, by the library
        asked = [for_x, for_weight and not by_products, False]
        dx = d_weight = None
        if any(asked):
            dx, d_weight, _ = torch.ops.aten.convolution_backward(
                grad, x, weight, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1, asked
            )
        return dx, weight_gradient(x, grad) if by_products else d_weight


def weight_gradient(x: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
    """Of a 3x3 convolution with padding 1, the gradient (O, C, 3, 3).

    Tap (dy, dx) pairs pixel p of the gradient with pixel p + dy W + dx of x, in the order of memory, which is a matrix
    product of two stretches of it. Rows outside x fall outside the stretch; a dx that leaves a row arrives in its neighbour,
    and meets a gradient that was set to zero there. (So an Inf or NaN in the first or last column of x reaches taps that
    do not see it, beside those that do.)

    Args:
        x: (N, C, H, W), float32.
        grad: of the convolution's result, (N, O, H, W).
    """
    x, grad = dense(x), dense(grad)
    width, pixels = x.shape[3], x.shape[2] * x.shape[3]
    by_input = not is_channels_last(x)  # which of the two products has its operands in a better order
    shape = (x.shape[1], grad.shape[1]) if by_input else (grad.shape[1], x.shape[1])
    taps = x.new_zeros(3, 3, *shape)
    for dx in (-1, 0, 1):
        inside = grad
        if dx != 0:
            inside = grad.clone()
            inside[..., 0 if dx < 0 else width - 1] = 0
        for dy in (-1, 0, 1):
            shift = dy * width + dx
            first, last = max(0, -shift), pixels - max(0, shift)
            if first >= last:
                continue
            for image, its_grad in zip(x.flatten(2), inside.flatten(2), strict=True):
                a, b = image[:, first + shift : last + shift], its_grad[:, first:last]
                tap = taps[dy + 1, dx + 1]
                tap.addmm_(a, b.t()) if by_input else tap.addmm_(b, a.t())
    return taps.permute(3, 2, 0, 1) if by_input else taps.permute(2, 3, 0, 1)
