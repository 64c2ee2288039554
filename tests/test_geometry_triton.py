"""Triton's index arithmetic against Python's. What a kernel calls must be global in its file: hence this file."""

import pytest
import torch

from pspnet_fast import geometry

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")
kernel = pytest.importorskip("pspnet_fast.kernels.geometry")
bin_start, bin_end, bilinear_tap = kernel.bin_start, kernel.bin_end, kernel.bilinear_tap

SIZES = 130


@triton.jit
def table_kernel(out_ptr, cells, BLOCK: tl.constexpr):
    """Ten tables; in each, row r holds the numbers of an axis of r + 1 pixels."""
    r = tl.arange(0, BLOCK)[:, None]
    i = tl.arange(0, BLOCK)[None, :]
    element = out_ptr + r * BLOCK + i
    tl.store(element, bin_start(i, r + 1, cells))
    tl.store(element + BLOCK * BLOCK, bin_end(i, r + 1, cells))
    lower, upper, numerator, denominator = bilinear_tap(i, r + 1, cells, True)
    tl.store(element + 2 * BLOCK * BLOCK, lower)
    tl.store(element + 3 * BLOCK * BLOCK, upper)
    tl.store(element + 4 * BLOCK * BLOCK, numerator)
    tl.store(element + 5 * BLOCK * BLOCK, denominator + 0 * i)
    lower, upper, numerator, denominator = bilinear_tap(i, r + 1, cells, False)
    tl.store(element + 6 * BLOCK * BLOCK, lower)
    tl.store(element + 7 * BLOCK * BLOCK, upper)
    tl.store(element + 8 * BLOCK * BLOCK, numerator)
    tl.store(element + 9 * BLOCK * BLOCK, denominator + 0 * i)


@pytest.mark.parametrize("cells", [*range(1, 9), 12, 16])
def test_triton_agrees(cells):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    out = torch.empty(10, 256, 256, dtype=torch.int32, device=device)
    table_kernel[(1,)](out, cells, BLOCK=256)
    tables = out.cpu()
    for size in range(1, SIZES + 1):
        windows = [(geometry.bin_start(i, size, cells), geometry.bin_end(i, size, cells)) for i in range(cells)]
        assert tables[:2, size - 1, :cells].T.tolist() == [list(window) for window in windows]
        for corners, first in ((True, 2), (False, 6)):
            taps = [geometry.bilinear_tap(i, size, cells, corners) for i in range(size)]
            assert tables[first : first + 4, size - 1, :size].T.tolist() == [list(tap) for tap in taps]
