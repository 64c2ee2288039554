// What a pixel takes from the two cells that it stands between, and a cell from its pixels, along one axis. No torch.
#pragma once

#include "cuda/device.h"

namespace pspnet_fast::cuda {

// What a pixel is made of: rest * cell[lower] + fraction * cell[upper].
struct alignas(16) Tap {
  int lower, upper;
  float rest, fraction;
};

// `Integer` must hold (2 * size + 1) * (cells + 1).
template <class Integer = int>
__device__ __forceinline__ Tap tap_of(int pixel, int size, int cells, bool align_corners) {
  const BilinearTap<Integer> tap = bilinear_tap<Integer>(pixel, size, cells, align_corners);
  const float f = fraction(static_cast<int>(tap.numerator), static_cast<int>(tap.denominator));
  return {static_cast<int>(tap.lower), static_cast<int>(tap.upper), 1 - f, f};
}

// Each product by itself, so that Inf and NaN go where torch's go.
__device__ __forceinline__ float mix(float lower, float upper, float fraction) {
  return (1 - fraction) * lower + fraction * upper;
}

// A tap's fraction where its lower cell is known: without the division that finds it.
__device__ __forceinline__ float upper_weight(int pixel, int lower, int size, int cells, bool align_corners) {
  const int shifted = (2 * pixel + 1) * cells - size, length = size > 1 ? size - 1 : 1;
  const int position = align_corners ? pixel * (cells - 1) : shifted > 0 ? shifted : 0;
  const int denominator = align_corners ? length : 2 * size;
  return fraction(position - lower * denominator, denominator);
}

// The pixels that a cell is part of, as a gradient's gather walks them: first those that have it for their upper cell,
// then those that have it for their lower one. Pixels beyond the last cell's centre are in both. On an axis that keeps its
// size a cell is its own pixel's alone.
struct alignas(16) Support {
  int upper_begin, upper_end, lower_begin, lower_end;

  __device__ __forceinline__ int count() const { return upper_end - upper_begin + lower_end - lower_begin; }
};

__device__ __forceinline__ Support support_of(int cell, int size, int cells, bool align_corners) {
  const int begin = tap_start(cell, size, cells, align_corners);
  if (size == cells) {
    return {begin, begin, begin, begin + 1};
  }
  return {tap_start(cell - 1, size, cells, align_corners), cell == cells - 1 ? size : begin, begin,
          tap_start(cell + 1, size, cells, align_corners)};
}

}  // namespace pspnet_fast::cuda
