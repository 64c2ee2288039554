"""The index arithmetic exists three times, in Python, C++ and Triton: here the three are held against one another."""

import pytest
import torch
import torch.nn.functional as F

from pspnet_fast import geometry
from pspnet_fast.backends import load_extension

SIZES, CELLS = range(1, 131), (*range(1, 9), 12, 16)


def tables(size, cells):
    """Windows, then taps with and without align_corners, as rows of integers."""
    windows = [(geometry.bin_start(i, size, cells), geometry.bin_end(i, size, cells)) for i in range(cells)]
    taps = [[geometry.bilinear_tap(i, size, cells, corners) for i in range(size)] for corners in (True, False)]
    return windows, *taps


@pytest.mark.parametrize("cells", CELLS)
def test_windows_are_those_of_adaptive_pooling(cells):
    """The indicator of every row, pooled, is 1 / length inside the window and 0 outside."""
    for size in SIZES:
        matrix = F.adaptive_avg_pool1d(torch.eye(size, dtype=torch.float64)[:, None], cells)[:, 0].T
        expected = torch.zeros_like(matrix)
        for i, (start, end) in enumerate(tables(size, cells)[0]):
            expected[i, start:end] = 1 / (end - start)
        torch.testing.assert_close(matrix, expected)


@pytest.mark.parametrize("align_corners", [True, False])
@pytest.mark.parametrize("cells", CELLS)
def test_taps_are_those_of_interpolate(cells, align_corners):
    basis = torch.eye(cells, dtype=torch.float64)[:, None, None]
    for size in SIZES:
        matrix = F.interpolate(basis, (1, size), mode="bilinear", align_corners=align_corners)[:, 0, 0].T
        ours = torch.zeros_like(matrix)
        for i in range(size):
            lower, upper, numerator, denominator = geometry.bilinear_tap(i, size, cells, align_corners)
            assert 0 <= lower <= upper < cells
            assert 0 <= numerator < denominator
            ours[i, lower] += 1 - numerator / denominator
            ours[i, upper] += numerator / denominator
        torch.testing.assert_close(ours, matrix, atol=1e-12, rtol=0)


@pytest.mark.parametrize("align_corners", [True, False])
def test_an_axis_that_keeps_its_size_has_one_cell_a_pixel(align_corners):
    for size in SIZES:
        for i in range(size):
            lower, upper, numerator, _ = geometry.bilinear_tap(i, size, size, align_corners)
            assert (lower, upper, numerator) == (i, i, 0)


def test_packed_levels():
    assert geometry.level_starts((1, 2, 3, 6)) == [0, 1, 5, 14]
    assert geometry.cell_count((1, 2, 3, 6)) == 50
    pyramid = torch.arange(50.0)[None, :, None]
    assert [level[0, 0, 0].item() for level in geometry.levels(pyramid, (1, 2, 3, 6))] == [0, 1, 5, 14]
    assert geometry.channel_blocks((1, -1, 0), 10, 3) == {1: 0, -1: 3, 0: 13}


@pytest.mark.skipif(load_extension() is not None, reason="the compiled extension is not built")
def test_cpp_agrees():
    native = torch.ops.pspnet_fast_native
    for cells in CELLS:
        for size in SIZES:
            windows, *taps = tables(size, cells)
            assert native.bin_windows(size, cells) == [edge for window in windows for edge in window]
            for corners, rows in zip((True, False), taps, strict=True):
                assert native.bilinear_taps(size, cells, corners) == [number for row in rows for number in row]
                lower = [row[0] for row in rows]
                starts = [sum(tap < cell for tap in lower) for cell in range(cells)]
                assert native.tap_starts(size, cells, corners) == [*starts, size]
    assert native.level_starts([1, 2, 3, 6]) == geometry.level_starts((1, 2, 3, 6))
