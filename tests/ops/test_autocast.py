"""Autocast casts what it casts for PyTorch's own convolutions, and leaves float64 as it is."""

import pytest
import torch
import torch.nn.functional as F

from pspnet_fast import PPM, PSPHead, testing
from pspnet_fast.functional import (
    pyramid_conv2d,
    pyramid_norm,
    pyramid_pool,
    pyramid_project,
    upsample_concat,
    upsample_cross_entropy,
)

BINS = (1, 2)
SIZE = (4, 5)


def matrices(weight):
    return weight.unbind(0)


CASES = {  # each with its shapes
    "pyramid_pool": (lambda x: pyramid_pool(x, BINS), [(2, 3, *SIZE)]),
    "pyramid_project": (lambda p, w: pyramid_project(p, matrices(w), BINS), [(2, 5, 3), (2, 4, 3)]),
    "pyramid_project stacked": (lambda p, w, s: pyramid_project(p, w, BINS, s, s), [(2, 5, 3), (2, 4, 3), (2, 4)]),
    "pyramid_norm": (lambda y, w: pyramid_norm(y, BINS, weight=matrices(w), training=True), [(2, 5, 3), (2, 3)]),
    "upsample_concat": (lambda x, p: upsample_concat(x, p, BINS), [(2, 3, *SIZE), (2, 5, 2)]),
    "upsample_concat in place": (
        lambda x, p: upsample_concat(x.clone(), p, BINS, in_place=True),
        [(2, 3 + 4, *SIZE), (2, 5, 2)],
    ),
    "pyramid_conv2d": (lambda p, w: pyramid_conv2d(p, w, SIZE, BINS), [(2, 5, 3), (4, 6, 3, 3)]),
    "pyramid_conv2d onto": (
        lambda p, w, y: pyramid_conv2d(p, w, SIZE, BINS, out=y.clone()),
        [(2, 5, 3), (4, 6, 3, 3), (2, 4, *SIZE)],
    ),
    "upsample_cross_entropy": (
        lambda x: upsample_cross_entropy(x, torch.zeros(2, *SIZE, dtype=torch.int64)),
        [(2, 3, 2, 2)],
    ),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_float64_is_left_alone(backend, name):
    """As by `F.linear` and `F.conv2d`."""
    function, shapes = CASES[name]
    tensors = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    with testing.use_backend(backend):
        expected = function(*tensors)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            actual = function(*tensors)
    assert actual.dtype == torch.float64
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("make", [lambda: PPM(3, 2, BINS), lambda: PSPHead(3, 2, 4, 5, BINS)], ids=["PPM", "PSPHead"])
def test_float64_modules_are_left_alone(make):
    module, x = make().double().eval(), torch.randn(2, 3, *SIZE, dtype=torch.float64)
    expected = module(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(module(x), expected)


def test_float64_beside_float32_is_an_error_as_of_a_convolution():
    wide, narrow = torch.randn(2, 5, 3, dtype=torch.float64), torch.randn(2, 4, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with pytest.raises(RuntimeError, match="dtype"):
            F.linear(wide, narrow[0])
        with pytest.raises(TypeError, match="pyramid and weight.0. must have one dtype"):
            pyramid_project(wide, matrices(narrow), BINS)
        with pytest.raises(TypeError, match="pyramid and weight must have one dtype"):
            pyramid_conv2d(wide, torch.randn(4, 6, 3, 3), SIZE, BINS)
        with pytest.raises(TypeError, match="pyramid and out must have one dtype"):
            pyramid_conv2d(
                torch.randn(2, 5, 3), torch.randn(4, 6, 3, 3), SIZE, BINS, out=torch.zeros(2, 4, *SIZE).double()
            )


def test_float32_is_cast():
    p, w = torch.randn(2, 5, 3), torch.randn(2, 4, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert pyramid_project(p, matrices(w), BINS).dtype == torch.bfloat16
        assert pyramid_conv2d(p, torch.randn(4, 6, 3, 3), SIZE, BINS).dtype == torch.bfloat16
