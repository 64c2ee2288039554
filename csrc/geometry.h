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
struct BilinearTap {
  int64_t lower, upper, numerator, denominator;
};

PSPNET_FAST_HOST_DEVICE constexpr BilinearTap bilinear_tap(int64_t i, int64_t size, int64_t cells, bool align_corners) {
  const int64_t shifted = (2 * i + 1) * cells - size;
  const int64_t position = align_corners ? i * (cells - 1) : (shifted > 0 ? shifted : 0);
  const int64_t denominator = align_corners ? (size > 1 ? size - 1 : 1) : 2 * size;
  const int64_t floor = position / denominator;
  const int64_t lower = floor < cells - 1 ? floor : cells - 1;
  const int64_t upper = lower + 1 < cells - 1 ? lower + 1 : cells - 1;
  return {lower, upper, position - lower * denominator, denominator};
}

// First pixel whose lower tap is `cell` or a later one; `size` from `cell` = `cells` on. The taps' inverse.
PSPNET_FAST_HOST_DEVICE constexpr int64_t tap_start(int64_t cell, int64_t size, int64_t cells, bool align_corners) {
  if (cell <= 0 || cell >= cells) {
    return cell <= 0 ? 0 : size;
  }
  const int64_t steps = cells - 1, length = size > 1 ? size - 1 : 1;
  const int64_t first = align_corners ? (cell * length + steps - 1) / steps
                                      : (2 * size * cell + size + cells - 1) / (2 * cells);
  return first < size ? first : size;
}

}  // namespace pspnet_fast
