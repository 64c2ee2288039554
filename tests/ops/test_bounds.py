"""Integers whose squares, sums or products would leave 64 bits: what the public functions refuse, the kernels refuse, too.

Called as the public functions call them, past their checks: a wrong size there would be read as memory, or walked for ever.
"""

import pytest
import torch

from pspnet_fast import backends, testing

MOST = 2**63 - 1
CELLS, SIZE = "bins must come to at most 2\\^24 cells", "size must be .* at most 2\\^30"


def ones(*size):
    return torch.ones(size)


CASES = [  # op, direction, arguments, words
    ("pyramid_pool", "forward", (ones(1, 1, 2, 2), [4097]), CELLS),
    ("pyramid_pool", "forward", (ones(1, 1, 2, 2), [2**32]), CELLS),  # whose square is 0
    ("pyramid_pool", "forward", (ones(1, 1, 2, 2), [1, 2**32]), CELLS),
    ("pyramid_pool", "forward", (ones(1, 1, 2, 2), [MOST, MOST]), CELLS),
    ("pyramid_pool", "concat", (ones(1, 1, 2, 2), [1], 4, MOST), "channels from .* must lie within"),
    ("pyramid_pool", "concat", (ones(1, 1, 2, 2), [1], 2**31, 0), "channels from .* must lie within"),
    ("pyramid_pool", "backward", (ones(1, 1, 1), None, [MOST, 1], [1], False), SIZE),
    ("pyramid_pool", "backward", (ones(1, 1, 1), None, [2, 2], [2**32 + 1], False), CELLS),
    ("pyramid_project", "forward", (ones(1, 1, 1), [ones(1, 1)], [2**32 + 1], None, None, False), CELLS),
    ("pyramid_norm", "statistics", (ones(2, 1, 1), [2**32 + 1]), CELLS),
    (
        "pyramid_norm",
        "training",
        (ones(2, 1, 1), [1], [], [], [], [], [0.1], 0.0, False),
        "eps must be positive, got 0",
    ),
    ("upsample_concat", "forward", (ones(1, 1, 2, 2), ones(1, 1, 1), [2**32 + 1], [-1, 0], True), CELLS),
    ("upsample_concat", "backward", (ones(1, 2, 2, 2), -MOST - 1, [1], [-1, 0], True), "C \\+ B \\* R channels"),
    ("pyramid_conv2d", "backward", (ones(1, 1, 2, 2), [2, 2], [1], 1, MOST, True), "both at most 2\\^30"),
    ("pyramid_conv2d", "backward", (ones(1, 1, 2, 2), [2, 2], [1], MOST, 0, True), "both at most 2\\^30"),
    ("pyramid_conv2d", "backward", (ones(1, 1, 2, 2), [2, MOST], [1], 1, 0, True), SIZE),
    ("upsample_argmax", "forward", (ones(1, 1, 2, 2), [1, 2**40], True, torch.int64), SIZE),
    ("upsample_argmax", "confidence", (ones(1, 1, 2, 2), [MOST, 1], True, torch.int64), SIZE),
    ("upsample_softmax_add", "forward", (ones(1, 1, 2, 2), ones(1, 3, 3), [0, 0], [1, 2**40], True, False, 1.0), SIZE),
    (
        "upsample_softmax_add",
        "forward",
        (ones(1, 1, 2, 2), ones(1, 3, 3), [MOST, 0], [2, 2], True, False, 1.0),
        "corners",
    ),
    (
        "upsample_softmax_add",
        "forward",
        (ones(1, 1, 2, 2), ones(1, 3, 3), [0, -MOST], [2, 2], True, False, 1.0),
        "corners",
    ),
]


@pytest.mark.parametrize("backend", ["cpu", "cuda"])
@pytest.mark.parametrize(("op", "direction", "arguments", "words"), CASES)
def test_kernels_refuse_what_would_overflow(backend, op, direction, arguments, words):
    if reason := testing.unavailable(op, backend):
        pytest.skip(reason)
    there = testing.device(backend)
    moved = [
        value.to(there)
        if isinstance(value, torch.Tensor)
        else [v.to(there) if isinstance(v, torch.Tensor) else v for v in value]
        if isinstance(value, list)
        else value
        for value in arguments
    ]
    with testing.use_backend(backend), pytest.raises(RuntimeError, match=f"^{op}_{direction}: .*{words}"):
        backends.run(op, direction, *moved)
