"""Every blocked loop of the kernels: with one block, a full one, a last block of one, and several.

Maps and pyramids are small, but hold enough numbers for plain PyTorch's largest error among them not to be luck.

A row names what a loop walks, the lengths of its blocks (constants of the kernels, by instruction set, dtype or tile), and
a case of the op in which there are so many. Each is run with a length around every block, as accurate as the rule asks.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F

from pspnet_fast import testing
from pspnet_fast.functional import (
    pyramid_conv2d,
    pyramid_norm,
    pyramid_pool,
    pyramid_project,
    upsample_argmax,
    upsample_concat,
    upsample_cross_entropy,
    upsample_softmax_add,
)

FORMATS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}


class Loop(NamedTuple):
    """`lengths` are of one block each; `case` makes the arguments of the op's check from how many there are."""

    backend: str
    walks: str
    lengths: Sequence[int]
    case: Callable[[int], tuple[Any, ...]]
    format: str | None = None


def around(lengths: Sequence[int]) -> list[int]:
    """One short of a block, a full one, one more, and two and one."""
    counts = {count for length in lengths for count in (length - 1, length, length + 1, 2 * length + 1)}
    return sorted(counts - {0})


def cases(op: str, loops: Sequence[Loop], formats: bool = True) -> list[Any]:
    """Parameters for pytest (backend, format, arguments); without formats (backend, arguments)."""
    marks = {parameter.values[0]: parameter.marks for parameter in testing.backends(op)}
    parameters = []
    for loop in loops:
        for name in FORMATS if formats and loop.format is None else [loop.format]:
            for count in around(loop.lengths):
                values = (loop.backend, FORMATS[name], loop.case(count)) if name else (loop.backend, loop.case(count))
                label = "-".join(filter(None, (loop.backend, loop.walks, name, str(count))))
                parameters.append(pytest.param(*values, marks=marks[loop.backend], id=label))
    return parameters


# Of the CPU: vectors of 4, 8 and 16 (2, 4, 8 of float64), kChannelBlock 16. Of CUDA: vectors of 4, warps of 32.
POOL = [  # size, bins
    Loop("cpu", "channels", (4, 8, 16), lambda c: ((2, c, 3, 5), (1, 2))),
    Loop("cpu", "chunks of channels", (1024,), lambda c: ((1, c, 2, 3), (1, 2)), "channels_last"),
    Loop("cpu", "columns", (4, 8, 16), lambda w: ((1, 2, 3, w), (1, 2))),
    Loop("cpu", "rows", (2,), lambda h: ((1, 17, h, 4), (1, 2, 3))),
    Loop("cuda", "channels", (64,), lambda c: ((1, c, 2, 3), (1, 2)), "channels_last"),
    Loop("cuda", "planes of a group", (32,), lambda c: ((2, c, 3, 2), (1, 2)), "nchw"),
    Loop("cuda", "pixels of a row's segment", (16,), lambda w: ((2, 20, 1, w), (1,))),
    Loop("cuda", "rows of a segment", (16,), lambda h: ((3, 40, h, 3), (1,))),
    Loop("cuda", "rows of a band", (64,), lambda h: ((1, 2, h, 64), (1, 3)), "nchw"),  # 16 KiB
    Loop("cuda", "bands of a ring", (192,), lambda h: ((1, 1, h, 64), (1, 2)), "nchw"),  # of three
    Loop(
        "cuda",
        "levels of a launch",
        (16, 64),
        lambda levels: ((1, 2, 4, 3), (1, 2) * (levels // 2) + (3,) * (levels % 2)),
    ),
    Loop(
        "cuda",
        "windows of an axis",
        (128,),
        lambda windows: ((1, 8, 3, 5), (*(16,) * (windows // 16), windows % 16 or 16)),
    ),
    Loop("cuda", "segments of an axis", (64,), lambda b: ((1, 1, b, 3), (b,))),
    Loop("triton", "channels", (64,), lambda c: ((1, c, 2, 3), (1, 2))),
    Loop("triton", "pixels of a segment", (16,), lambda w: ((1, 3, 1, w), (1,))),
    Loop("triton", "rows", (4, 16), lambda h: ((1, 3, h, 3), (1,))),
    Loop("triton", "columns", (256,), lambda w: ((1, 2, 1, w), (1, 2)), "nchw"),
    Loop("triton", "segments of a cell", (8, 32), lambda s: ((1, 2, 1, 16 * s), (1,)), "channels_last"),
]


@pytest.mark.parametrize(("backend", "memory_format", "case"), cases("pyramid_pool", POOL))
def test_pyramid_pool(backend, memory_format, case):
    size, bins = case
    x = torch.randn(size).contiguous(memory_format=memory_format)
    testing.assert_as_accurate(
        lambda x: pyramid_pool(x, bins),
        lambda x: testing.plain_pyramid_pool(x, bins),
        [x],
        backend,
        torch.randn(size[0], sum(b * b for b in bins), size[1]),
    )
    there = x.to(testing.device(backend))
    with testing.use_backend(backend), testing.poisoned_memory(), torch.no_grad():
        pyramid, copy = pyramid_pool(there, bins, reserve=(3, 2))
        assert torch.equal(pyramid, pyramid_pool(there, bins))
    assert torch.equal(copy[:, 3:-2].cpu(), x)


PROJECT = [  # N, C, R, bins
    Loop("cpu", "rows of a product", (3, 6), lambda r: (3, 5, r, (2,))),
    Loop("cpu", "rows of few cells", (3, 6), lambda r: (1, 5, r, (2,))),
    Loop("cpu", "few cells", (4, 8), lambda n: (n, 7, 5, (1,))),
    Loop("cpu", "cells of a panel", (8, 16, 64), lambda n: (n, 3, 7, (1,))),
    Loop("cpu", "products of a sum", (256,), lambda c: (3, c, 2, (2,))),
    Loop("cpu", "channels packed", (32,), lambda c: (3, c, 3, (2,))),
    Loop("cpu", "channels of a strip", (64,), lambda c: (2, c, 3, (1, 2))),
    Loop("cpu", "reduced channels packed", (32,), lambda r: (2, 3, r, (1, 2))),
    Loop("cpu", "cells of a short sum", (32,), lambda n: (n, 3, 2, (1,))),
    Loop("cpu", "strips whose sums stay", (4,), lambda s: (128, 64 * s, 2, (1,))),  # 128 cells of 256 bytes, four times
    Loop("cuda", "rows of a tile", (64,), lambda n: (n, 3, 2, (1,))),
    Loop("cuda", "reduced channels of a tile", (64,), lambda r: (1, 3, r, (1,))),
    Loop("cuda", "channels of a tile", (64,), lambda c: (1, c, 3, (1,))),
    Loop("cuda", "channels of a stage, and of the ring", (32, 128), lambda c: (2, c, 2, (1,))),
    Loop("cuda", "stages of a split", (16 * 32,), lambda c: (2, c, 2, (1,))),
    Loop("cuda", "levels of a launch", (16,), lambda levels: (1, 3, 2, (1,) * levels)),
    Loop("triton", "rows", (16,), lambda n: (n, 3, 2, (1,))),
    Loop("triton", "rows of a split's sum", (4,), lambda n: (n, 65, 2, (1,))),
    Loop("triton", "reduced channels", (16, 64), lambda r: (2, 3, r, (1,))),
    Loop("triton", "channels", (32, 64), lambda c: (2, c, 3, (1,))),
]


@pytest.mark.parametrize(("backend", "case"), cases("pyramid_project", PROJECT, formats=False))
def test_pyramid_project(backend, case):
    n, channels, reduced, bins = case
    pyramid = torch.randn(n, sum(b * b for b in bins), channels)
    testing.assert_as_accurate(
        lambda pyramid, *weights: pyramid_project(pyramid, weights, bins, relu=False),
        lambda pyramid, *weights: testing.plain_pyramid_project(pyramid, *weights, bins=bins, relu=False),
        [pyramid, *(torch.randn(reduced, channels) for _ in bins)],
        backend,
        torch.randn(*pyramid.shape[:2], reduced),
    )


NORM = [  # N, R, bins
    Loop("cpu", "channels", (4, 8, 16, 32), lambda r: (3, r, (1, 2))),
    Loop("cuda", "channels", (4, 16), lambda r: (3, r, (1, 2))),
    Loop("cuda", "rows of a part, and those kept", (16, 128), lambda n: (n + 1, 3, (1,))),
    Loop("cuda", "rows of vectors, and those kept", (64, 512), lambda n: (n + 1, 16, (1,))),
    Loop("cuda", "levels of a launch", (16,), lambda levels: (3, 2, (1,) * levels)),
    Loop("triton", "rows", (4, 128), lambda n: (n + 1, 2, (1,))),
    Loop("triton", "channels", (16, 128), lambda r: (3, r, (1,))),
]


@pytest.mark.parametrize(("backend", "case"), cases("pyramid_norm", NORM, formats=False))
def test_pyramid_norm(backend, case):
    n, reduced, bins = case
    y = 3 * torch.randn(n, sum(b * b for b in bins), reduced) + 1
    weight, bias = torch.rand(len(bins), reduced) + 0.5, torch.randn(len(bins), reduced)
    testing.assert_as_accurate(
        lambda y: pyramid_norm(y, bins, weight=weight.to(y.device), bias=bias.to(y.device), training=True, relu=False),
        lambda y: testing.plain_pyramid_norm(y, weight.to(y.dtype), bias.to(y.dtype), bins, False),
        [y],
        backend,
        torch.randn(y.shape),
    )


CONCAT = [  # size of x, R, bins
    Loop("cpu", "channels", (4, 8, 16), lambda r: ((2, 3, 4, 5), r, (1, 2))),
    Loop("cpu", "columns, and four vectors of them", (4, 8, 16, 64), lambda w: ((1, 1, 3, w), 2, (1, 2))),
    Loop("cpu", "pixels of a run", (4,), lambda w: ((1, 2, 3, w), 17, (1,)), "channels_last"),
    Loop("cuda", "channels", (4, 32, 128), lambda r: ((1, 4, 2, 3), r, (1, 2))),
    Loop("cuda", "elements of a copy", (4096,), lambda c: ((1, c, 1, 1), 4, (1,))),
    Loop("cuda", "pixels of a copy", (4096,), lambda w: ((1, 1, 1, w), 1, (2,)), "nchw"),
    Loop("cuda", "columns of a warp, of a run, of a split", (8, 16, 32), lambda w: ((1, 4, 2, w), 4, (1, 2))),
    Loop("cuda", "rows of a split of cells", (4, 128), lambda h: ((1, 4, h, 2), 4, (1,)), "channels_last"),
    Loop("cuda", "rows of a tile", (1024,), lambda h: ((1, 1, h, 2), 1, (2,)), "nchw"),
    Loop("cuda", "elements of a tile, and of a band", (128,), lambda h: ((1, 1, h, 128), 1, (2,)), "nchw"),
    Loop("cuda", "planes of a tile", (8, 32), lambda r: ((1, 1, 4, 4), r, (1, 2)), "nchw"),
    Loop(
        "cuda",
        "levels of a launch",
        (8,),
        lambda levels: ((1, 2, 3, 4), 2, (1, 2) * (levels // 2) + (3,) * (levels % 2)),
    ),
    Loop("triton", "channels", (16, 64), lambda r: ((1, 2, 2, 3), r, (1,))),
    Loop("triton", "columns", (8, 16), lambda w: ((1, 2, 2, w), 20, (1,))),
    Loop("triton", "wide columns", (256,), lambda w: ((1, 1, 1, w), 1, (2,)), "nchw"),
    Loop("triton", "rows", (4, 16), lambda h: ((1, 2, h, 2), 20, (1,))),
]


@pytest.mark.parametrize(("backend", "memory_format", "case"), cases("upsample_concat", CONCAT))
def test_upsample_concat(backend, memory_format, case):
    size, reduced, bins = case
    pyramid = torch.randn(size[0], sum(b * b for b in bins), reduced)
    x = torch.randn(size).contiguous(memory_format=memory_format)
    testing.assert_as_accurate(
        lambda x, p: upsample_concat(x, p, bins),
        lambda x, p: testing.plain_upsample_concat(x, p, bins, True),
        [x, pyramid],
        backend,
        torch.randn(size[0], size[1] + len(bins) * reduced, *size[2:]).contiguous(memory_format=memory_format),
    )


CONV2D = [  # R, O, size, bins, k
    Loop("reference", "output channels of a product", (8, 32), lambda o: (16, o, (2, 3), (1, 2, 3), 3)),
    Loop("cpu", "output channels", (4, 8, 16, 32), lambda o: (16, o, (3, 4), (1, 2, 3), 3)),
    Loop("cpu", "columns, and four vectors of them", (4, 8, 16, 64), lambda w: (8, 5, (2, w), (1, 2, 3), 3)),
    Loop("cpu", "rows", (2,), lambda h: (8, 17, (h, 5), (1, 2, 3), 3)),
    Loop("cuda", "output channels", (4, 8, 32), lambda o: (8, o, (2, 3), (1, 2, 3), 3)),
    Loop("cuda", "columns", (4, 8, 16, 32), lambda w: (8, 5, (2, w), (1, 2, 3), 3)),
    Loop("cuda", "rows of a group, of a tile, of a chunk", (4, 16, 64), lambda h: (8, 2, (h, 2), (1, 2, 3), 3)),
    Loop("cuda", "pairs of a level and dy that warps take", (12,), lambda k: (8, 2, (2, 3), (1,) * k, 1)),
    Loop("triton", "output channels", (16,), lambda o: (8, o, (2, 3), (1,), 3), "nchw"),
    Loop("triton", "output channels", (128,), lambda o: (8, o, (1, 2), (1,), 1), "channels_last"),
    Loop("triton", "columns", (64,), lambda w: (8, 2, (1, w), (1,), 1), "nchw"),
    Loop("triton", "columns", (8,), lambda w: (8, 2, (1, w), (1,), 1), "channels_last"),
]


@pytest.mark.parametrize(("backend", "memory_format", "case"), cases("pyramid_conv2d", CONV2D))
def test_pyramid_conv2d(backend, memory_format, case):
    reduced, channels, size, bins, k = case
    padding = k // 2
    pyramid, weight = (
        torch.randn(1, sum(b * b for b in bins), reduced),
        torch.randn(channels, len(bins) * reduced, k, k),
    )
    testing.assert_as_accurate(
        lambda p, w: pyramid_conv2d(p, w, size, bins, padding, memory_format=memory_format),
        lambda p, w: testing.plain_pyramid_conv2d(p, w, size, bins, padding),
        [pyramid, weight],
        backend,
        torch.randn(1, channels, *size).contiguous(memory_format=memory_format),
    )


ARGMAX = [  # size of the logits, size of the labels
    Loop("cpu", "classes", (4, 8, 16), lambda k: ((2, k, 2, 3), (9, 10))),
    Loop("cpu", "columns of a run", (4, 8, 16), lambda w: ((1, 5, 2, 1), (9, w))),
    Loop("cpu", "rows of a run", (4,), lambda h: ((1, 5, 1, 2), (h, 20))),
    Loop("cpu", "pixels of a cell", (9,), lambda w: ((1, 5, 1, 1), (1, w))),
    Loop("cuda", "classes", (32, 64), lambda k: ((1, k, 1, 2), (8, 9))),
    Loop("cuda", "rows of a part", (32,), lambda h: ((1, 5, 1, 1), (h, 2))),
    Loop("cuda", "pixels of a cell", (64,), lambda w: ((1, 3, 1, 1), (1, w))),
    Loop("cuda", "pixels of a block", (128,), lambda w: ((1, 3, 2, w), (1, w))),
    Loop("triton", "classes", (16,), lambda k: ((1, k, 1, 2), (2, 3))),
    Loop("triton", "rows and columns", (8,), lambda w: ((1, 3, 2, 2), (w, w))),
]


@pytest.mark.parametrize(("backend", "memory_format", "case"), cases("upsample_argmax", ARGMAX))
def test_upsample_argmax(backend, memory_format, case):
    shape, size = case
    logits = (3 * torch.randn(shape)).contiguous(memory_format=memory_format)
    with testing.use_backend(backend), testing.poisoned_memory():
        labels, confidence = upsample_argmax(logits.to(testing.device(backend)), size, confidence=True)
    expected, exact = testing.plain_upsample_argmax(logits.double(), size)
    best = F.interpolate(logits.double(), size, mode="bilinear", align_corners=True).topk(min(2, shape[1]), 1).values
    clear = (best[:, 0] - best[:, -1] > 1e-5) | torch.tensor(shape[1] == 1)
    assert clear.float().mean() > 0.9
    assert torch.equal(labels.cpu()[clear].long(), expected[clear])
    testing.assert_within(confidence, testing.plain_upsample_argmax(logits, size)[1], exact)


CROSS_ENTROPY = [  # size of the logits, size of the target
    Loop("cpu", "classes, and four vectors of them", (4, 8, 16, 64), lambda k: ((2, k, 2, 2), (5, 6))),
    Loop("cpu", "rows of a unit", (16,), lambda h: ((1, 5, 1, 2), (h, 3))),
    Loop("cpu", "columns of a run", (16,), lambda w: ((1, 5, 2, 1), (3, w))),
    Loop("cpu", "columns of cells", (4, 8, 16), lambda w: ((1, 5, 2, w), (3, w))),
    Loop("cuda", "pixels of a row", (128,), lambda w: ((1, 3, 2, 2), (2, w))),
    Loop("cuda", "classes", (64,), lambda k: ((1, k, 2, 2), (3, 3))),
    Loop("cuda", "pixels that share a class", (2,), lambda w: ((2, 9, 1, 2), (2, w))),
    Loop("triton", "pixels of a row", (4, 32), lambda w: ((1, 3, 1, 1), (2, w))),
    Loop("triton", "classes", (16,), lambda k: ((1, k, 1, 2), (2, 3))),
]


@pytest.mark.parametrize(("backend", "memory_format", "case"), cases("upsample_cross_entropy", CROSS_ENTROPY))
def test_upsample_cross_entropy(backend, memory_format, case):
    shape, at = case
    logits = torch.randn(shape).contiguous(memory_format=memory_format)
    target = torch.randint(0, shape[1], (shape[0], *at))
    target[torch.rand(target.shape) < 0.2] = -1
    target[0, 0, 0] = 0
    for reduction, cotangent in (("none", torch.randn(target.shape)), ("sum", torch.tensor(0.7))):
        testing.assert_as_accurate(
            lambda x, how=reduction: upsample_cross_entropy(x, target.to(x.device), None, -1, how, 0.1),
            lambda x, how=reduction: testing.plain_upsample_cross_entropy(x, target, None, -1, how, 0.1, True),
            [logits],
            backend,
            cotangent,
        )


SOFTMAX_ADD = [  # size of the logits, size of the window
    Loop("cpu", "classes", (4, 8, 16), lambda k: ((2, k, 2, 3), (4, 5))),
    Loop("cpu", "pixels of a tile, and vectors of them", (4, 8, 16, 64), lambda w: ((1, 3, 2, 2), (2, w))),
    Loop("cpu", "columns of nodes", (4, 8, 16), lambda w: ((1, 3, 2, w), (3, 7))),
    Loop("cuda", "pixels of a row", (128,), lambda w: ((1, 3, 2, 2), (2, w))),
    Loop("cuda", "classes of a batch", (8,), lambda k: ((1, k, 2, 2), (3, 3))),
    Loop("triton", "classes", (16,), lambda k: ((1, k, 1, 2), (2, 3))),
    Loop("triton", "rows and columns", (8,), lambda w: ((1, 3, 2, 2), (w, w))),
]


@pytest.mark.parametrize(("backend", "memory_format", "case"), cases("upsample_softmax_add", SOFTMAX_ADD))
def test_upsample_softmax_add(backend, memory_format, case):
    shape, size = case
    logits = (3 * torch.randn(shape)).contiguous(memory_format=memory_format)
    total, corners = torch.rand(shape[1], size[0] + 1, size[1] + 2), ((1, 0), (0, 2))[: shape[0]]
    ours, plain, exact = total.clone().to(testing.device(backend)), total.clone(), total.double()
    with testing.use_backend(backend), testing.poisoned_memory():
        upsample_softmax_add(ours, logits.to(ours.device), corners, size, flip=True)
    testing.plain_upsample_softmax_add(plain, logits, corners, size, flip=True)
    testing.plain_upsample_softmax_add(exact, logits.double(), corners, size, flip=True)
    testing.assert_within(ours, plain, exact)


def shared_work(op: str, memory_format: torch.memory_format) -> tuple[Callable[..., torch.Tensor], list[torch.Tensor]]:
    """An op and tensors of enough work for three threads, in units that three do not divide."""
    bins = (1, 2, 3)
    x = torch.randn(2, 83, 31, 29).contiguous(memory_format=memory_format)
    pyramid = torch.randn(2, 14, 83)
    logits = torch.randn(2, 37, 13, 11).contiguous(memory_format=memory_format)
    target = torch.randint(0, 37, (2, 101, 87))
    weights = [torch.randn(530, 530) for _ in bins]
    return {
        "pyramid_pool": (lambda x: pyramid_pool(x, bins), [x]),
        "pyramid_project": (lambda p, *w: pyramid_project(p, w, bins), [torch.randn(5, 14, 530), *weights]),
        "pyramid_norm": (lambda y: pyramid_norm(y, bins, training=True), [torch.randn(70, 14, 83)]),
        "upsample_concat": (lambda x, p: upsample_concat(x, p, bins), [x, pyramid]),
        "pyramid_conv2d": (
            lambda p, w: pyramid_conv2d(p, w, (31, 29), bins, memory_format=memory_format),
            # Integers: the library's own product is exact, whatever its threads do.
            [t.mul(2).round() for t in (pyramid, torch.randn(83, 3 * 83, 3, 3))],
        ),
        "upsample_argmax": (lambda x: upsample_argmax(x, (101, 87), confidence=True)[1], [logits]),
        "upsample_cross_entropy": (lambda x: upsample_cross_entropy(x, target), [logits]),
        "upsample_softmax_add": (
            lambda x: upsample_softmax_add(torch.zeros(37, 110, 90), x, ((0, 0), (5, -3)), (101, 87)),
            [logits],
        ),
    }[op]


@pytest.mark.parametrize("memory_format", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize(
    "op",
    [
        "pyramid_pool",
        "pyramid_project",
        "pyramid_norm",
        "upsample_concat",
        "pyramid_conv2d",
        "upsample_argmax",
        "upsample_cross_entropy",
        "upsample_softmax_add",
    ],
)
def test_any_number_of_threads_gives_the_same_bits(op, memory_format):
    if reason := testing.unavailable(op, "cpu"):
        pytest.skip(reason)
    function, tensors = shared_work(op, memory_format)
    before, runs = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            with testing.use_backend("cpu"), testing.poisoned_memory():
                leaves = [tensor.detach().requires_grad_() for tensor in tensors]
                out = function(*leaves)
                gradients = torch.autograd.grad(out.square().sum(), leaves) if out.requires_grad else ()
            runs.append([out.detach(), *gradients])
    finally:
        torch.set_num_threads(before)
    for run in runs[1:]:
        for once, again in zip(runs[0], run, strict=True):
            assert torch.equal(once, again)
