// upsample_concat in CUDA: what its kernels share. No torch.
#pragma once

#include "cuda/device.h"

namespace pspnet_fast::cuda {

constexpr int kConcatThreads = 128;
constexpr int kConcatWarps = kConcatThreads / kWarp;
constexpr int kConcatLevels = 8;  // of one launch; more of them take more launches

struct ConcatLevel {
  int bins, first_cell, first_channel;
  int first_column;  // where the columns of all levels' cells stand in one row
};

struct Concat {
  int images, reduced, total_channels, height, width, cells, columns;
  bool align_corners;
  int level_count;
  ConcatLevel levels[kConcatLevels];
};

// What a pixel is made of along one axis: rest * cell[lower] + fraction * cell[upper].
struct alignas(16) Tap {
  int lower, upper;
  float rest, fraction;
};

__device__ __forceinline__ Tap tap_of(int pixel, int size, int cells, bool align_corners) {
  const BilinearTap<int> tap = bilinear_tap(pixel, size, cells, align_corners);
  const float f = fraction(tap.numerator, tap.denominator);
  return {tap.lower, tap.upper, 1 - f, f};
}

// The pixels that a cell is part of along one axis, as the gradient's gather walks them: first those that have it for
// their upper cell, then those that have it for their lower one. Pixels beyond the last cell's centre are in both.
struct alignas(16) Support {
  int upper_begin, upper_end, lower_begin, lower_end;

  __device__ __forceinline__ int count() const { return upper_end - upper_begin + lower_end - lower_begin; }
};

__device__ __forceinline__ Support support_of(int cell, int size, int cells, bool align_corners) {
  const int begin = tap_start(cell, size, cells, align_corners);
  return {tap_start(cell - 1, size, cells, align_corners), cell == cells - 1 ? size : begin, begin,
          tap_start(cell + 1, size, cells, align_corners)};
}

// A vector as it lies in memory, for what waits in registers: of 16-bit elements the compiler would make packing and
// unpacking, and stores of two bytes.
template <class T, int kLength>
using Raw = std::conditional_t<kLength * sizeof(T) == kAccessBytes, uint4, Vector<T, kLength>>;

template <class T, int kLength>
__device__ __forceinline__ Raw<T, kLength> load_raw(const T* from) {
  return *reinterpret_cast<const Raw<T, kLength>*>(from);
}

template <class T, int kLength>
__device__ __forceinline__ void store_raw(T* to, const Raw<T, kLength>& value) {
  *reinterpret_cast<Raw<T, kLength>*>(to) = value;
}

}  // namespace pspnet_fast::cuda
