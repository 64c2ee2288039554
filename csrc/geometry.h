// All index arithmetic of the pyramid, in integers: the names of pspnet_fast/geometry.py, for host and device.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define PSPNET_FAST_HOST_DEVICE __host__ __device__
#else
#define PSPNET_FAST_HOST_DEVICE
#endif

namespace pspnet_fast {

// First row (or column) of window i when an axis of `size` is pooled to `bins` cells.
PSPNET_FAST_HOST_DEVICE constexpr int64_t bin_start(int64_t i, int64_t size, int64_t bins) {
  return i * size / bins;
}

// One past the last row (or column) of window i. Windows may overlap by one.
PSPNET_FAST_HOST_DEVICE constexpr int64_t bin_end(int64_t i, int64_t size, int64_t bins) {
  return ((i + 1) * size + bins - 1) / bins;
}

// The packed pyramid's first row of level k; with k the number of levels, S: all cells together.
PSPNET_FAST_HOST_DEVICE constexpr int64_t level_start(const int64_t* bins, int64_t k) {
  int64_t start = 0;
  for (int64_t level = 0; level < k; ++level) {
    start += bins[level] * bins[level];
  }
  return start;
}

// value = (1 - f) * cell[lower] + f * cell[upper], f = numerator / denominator.
template <class Integer>
struct BilinearTap {
  Integer lower, upper, numerator, denominator;
};

// The upper cell of the pixels whose lower one is `lower`: the next; itself at the end, and on an axis that keeps its size.
// The latter has one cell a pixel, as in torch: a neighbour's NaN or Inf, times a weight of 0, would be NaN.
template <class Integer>
PSPNET_FAST_HOST_DEVICE constexpr Integer next_cell(Integer lower, Integer size, Integer cells) {
  return size == cells || lower + 1 == cells ? lower : lower + 1;
}

// Of taps, kernels on a GPU may use int where (2 * size + 1) * (cells + 1) is below 2^31: there divisions of 64 bits are slow.
template <class Integer>
PSPNET_FAST_HOST_DEVICE constexpr BilinearTap<Integer> bilinear_tap(Integer i, Integer size, Integer cells,
                                                                    bool align_corners) {
  const Integer shifted = (2 * i + 1) * cells - size;
  const Integer position = align_corners ? i * (cells - 1) : (shifted > 0 ? shifted : 0);
  const Integer denominator = align_corners ? (size > 1 ? size - 1 : 1) : 2 * size;
  const Integer floor = position / denominator;
  const Integer lower = floor < cells - 1 ? floor : cells - 1;
  return {lower, next_cell(lower, size, cells), position - lower * denominator, denominator};
}

// First pixel whose lower tap is `cell` or a later one; `size` from `cell` = `cells` on. The taps' inverse.
template <class Integer>
PSPNET_FAST_HOST_DEVICE constexpr Integer tap_start(Integer cell, Integer size, Integer cells, bool align_corners) {
  if (cell <= 0 || cell >= cells) {
    return cell <= 0 ? 0 : size;
  }
  const Integer steps = cells - 1, length = size > 1 ? size - 1 : 1;
  const Integer first = align_corners ? (cell * length + steps - 1) / steps
                                      : (2 * size * cell + size + cells - 1) / (2 * cells);
  return first < size ? first : size;
}

}  // namespace pspnet_fast
