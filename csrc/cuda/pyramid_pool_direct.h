// pyramid_pool by its definition, cell by cell and pixel by pixel, in either memory format: for bins and sizes that the
// tables of pyramid_pool_axes.h do not hold. One thread makes one long sum, and so holds it in double. No torch.
#pragma once

#include "cuda/device.h"

namespace pspnet_fast::cuda {

constexpr int kDirectThreads = 256, kDirectLevels = 64;

struct PoolDirect {
  int levels;
  int64_t bins[kDirectLevels];
  int64_t first_cell, cells;  // of these levels; of the pyramid
  int64_t elements;           // of the result: one thread each
  int64_t channels, height, width;
  bool channels_last;
  int64_t image, channel, row, column;  // strides of x; backward of grad_input
  const void* from;                     // x; backward the pyramid's gradient
  void* to;                             // the pyramid; backward x's gradient
  const void* grad_input;               // backward: or null
  const float* before;                  // backward: what other levels gave, or null
  float* after;                         // backward: where the sum goes if more levels follow, or null
};

// The last coordinate of an index whose last axis has so many elements; the index becomes that of the others.
__device__ __forceinline__ int64_t take(int64_t& index, int64_t size) {
  const int64_t rest = index / size, coordinate = index - rest * size;
  index = rest;
  return coordinate;
}

// Grid     256 cells of the pyramid, neighbouring channels in channels_last, else neighbouring cells
// Tile     a thread sums its window, row by row
// Traffic  x read once a level
//
// Registers: 48, no spills.
template <class T>
__global__ void __launch_bounds__(kDirectThreads, 2) pyramid_pool_direct_kernel(const __grid_constant__ PoolDirect a) {
  int64_t index = static_cast<int64_t>(blockIdx.x) * kDirectThreads + threadIdx.x;
  if (index >= a.elements) {
    return;
  }
  const int64_t levels_cells = level_start(a.bins, a.levels);
  int64_t c = a.channels_last ? take(index, a.channels) : 0;
  const int64_t s = take(index, levels_cells);
  c = a.channels_last ? c : take(index, a.channels);
  int64_t place = s;
  int level = 0;
  for (; place >= a.bins[level] * a.bins[level]; ++level) {
    place -= a.bins[level] * a.bins[level];
  }
  const int64_t bins = a.bins[level], i = place / bins, j = place - i * bins;
  const int64_t top = bin_start(i, a.height, bins), bottom = bin_end(i, a.height, bins);
  const int64_t left = bin_start(j, a.width, bins), right = bin_end(j, a.width, bins);
  const T* const x = static_cast<const T*>(a.from) + index * a.image + c * a.channel;
  double total = 0;
  for (int64_t h = top; h < bottom; ++h) {
#pragma unroll 4
    for (int64_t w = left; w < right; ++w) {
      total += to_float(x[h * a.row + w * a.column]);
    }
  }
  const float area = static_cast<float>((bottom - top) * (right - left)), sum = static_cast<float>(total);
  static_cast<T*>(a.to)[(index * a.cells + a.first_cell + s) * a.channels + c] = round_to<T>(__fdiv_rn(sum, area));
}

// Grid     256 elements of x's gradient, as they stand in memory
// Tile     a thread walks the windows that hold its pixel
// Traffic  grad_input read, x's gradient written; the cells read once a pixel, cached
//
// Registers: 86 in float32, 62 in 16 bits; no spills.
template <class T>
__global__ void __launch_bounds__(kDirectThreads, 2)
    pyramid_pool_direct_backward_kernel(const __grid_constant__ PoolDirect a) {
  const int64_t element = static_cast<int64_t>(blockIdx.x) * kDirectThreads + threadIdx.x;
  if (element >= a.elements) {
    return;
  }
  int64_t index = element;
  int64_t c = a.channels_last ? take(index, a.channels) : 0;
  const int64_t w = take(index, a.width), h = take(index, a.height);
  c = a.channels_last ? c : take(index, a.channels);
  double total = a.before == nullptr ? 0 : a.before[element];
  int64_t cell = index * a.cells + a.first_cell;
  for (int level = 0; level < a.levels; ++level) {
    // The windows that hold a pixel are the pixels that a window holds, with the sizes exchanged.
    const int64_t bins = a.bins[level];
    for (int64_t i = bin_start(h, bins, a.height); i < bin_end(h, bins, a.height); ++i) {
      const int64_t height = bin_end(i, a.height, bins) - bin_start(i, a.height, bins);
      for (int64_t j = bin_start(w, bins, a.width); j < bin_end(w, bins, a.width); ++j) {
        const int64_t width = bin_end(j, a.width, bins) - bin_start(j, a.width, bins);
        const T grad = static_cast<const T*>(a.from)[(cell + i * bins + j) * a.channels + c];
        total += __fdiv_rn(to_float(grad), static_cast<float>(height * width));
      }
    }
    cell += bins * bins;
  }
  if (a.after != nullptr) {
    a.after[element] = static_cast<float>(total);
    return;
  }
  if (a.grad_input != nullptr) {
    const int64_t from = index * a.image + c * a.channel + h * a.row + w * a.column;
    total += to_float(static_cast<const T*>(a.grad_input)[from]);
  }
  static_cast<T*>(a.to)[element] = round_to<T>(static_cast<float>(total));
}

}  // namespace pspnet_fast::cuda
