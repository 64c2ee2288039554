// pyramid_pool backward, NCHW: what the windows give each pixel, added to contiguous runs of planes. No torch.
#pragma once

#include "cuda/pyramid_pool_axes.h"

namespace pspnet_fast::cuda {

constexpr int kAddThreads = 256, kAddInFlight = 4;  // 16 KiB under way in a block

struct PoolPlanesBackward {
  PoolAxis rows, columns;
  PoolLevels levels;
  const void* grad;
  const void* grad_input;  // or null
  void* out;
  int64_t grad_input_image;
  int channels, height, width, plane;
  // A unit is `group` planes of an image, or one plane in `bands` bands of `band_rows` rows.
  int group, bands, band_rows;
  int pitch;       // of a row of shares: its elements, with a gap after each access
  int share_rows;  // rows of shares
  Divisor by_units_per_image, by_bands, by_group, by_height, by_width, by_segments_of_rows, by_segments_of_columns;
};

// What every pixel of the block (row segment, column segment) receives, from the plane's cells over their areas.
__device__ __forceinline__ float received(const PoolPlanesBackward& a, const float* cells, int h, int w) {
  float total = 0;
  for (int level = 0; level < a.levels.levels; ++level) {
    // The windows that hold a pixel are the pixels that a window holds, with the sizes exchanged.
    const int bins = a.levels.bins[level];
    const int top = a.by_height.quotient(h * bins), bottom = a.by_height.quotient((h + 1) * bins + a.height - 1);
    const int left = a.by_width.quotient(w * bins), right = a.by_width.quotient((w + 1) * bins + a.width - 1);
    for (int i = top; i < bottom; ++i) {
      for (int j = left; j < right; ++j) {
        total += cells[a.levels.first_cell[level] + i * bins + j];
      }
    }
  }
  return total;
}

// Grid     an item: some planes of an image, or a band of rows of one
// Tile     for each segment of rows one row of shares, in shared memory; then accesses of 16 bytes, whose elements pass
//          from row to row, four under way in each thread from before the shares are made
// Traffic  grad_input read, x's gradient written; the cells read once an item; about 14 instructions an element
//
// Registers: 48 (sm_80), 47 (sm_90) in float32, 64 in 16 bits; no spills. Shared memory: 4 KiB for 60x60, bins 1, 2, 3, 6.
template <class T>
__global__ void __launch_bounds__(kAddThreads)
    pyramid_pool_planes_backward_kernel(const __grid_constant__ PoolPlanesBackward a) {
  constexpr int V = kVector<T>;
  float* const cells = shared_memory<float>();                 // [group][cells]
  float* const shares = cells + a.group * a.levels.cells;      // [share_rows][pitch]
  float* const axes = shares + a.share_rows * a.pitch;
  uint16_t* const share_row = reinterpret_cast<uint16_t*>(axes + 2 * sizeof(PoolAxis) / sizeof(float));  // of each row
  const PoolAxis& rows = *to_shared(axes, a.rows);
  const PoolAxis& columns = *to_shared(axes + sizeof(PoolAxis) / sizeof(float), a.columns);
  const int thread = static_cast<int>(threadIdx.x);

  const int unit = a.by_bands.quotient(static_cast<int>(blockIdx.x));
  const int n = a.by_units_per_image.quotient(unit), c = a.by_units_per_image.remainder(unit) * a.group;
  const int planes = min(a.group, a.channels - c);
  const int top = a.by_bands.remainder(static_cast<int>(blockIdx.x)) * a.band_rows;
  const int bottom = min(a.height, top + a.band_rows), height = bottom - top;
  const int count = planes * height * a.width;
  const int64_t first = static_cast<int64_t>(c) * a.plane + top * a.width;
  T* const out = static_cast<T*>(a.out) + static_cast<int64_t>(n) * a.channels * a.plane + first;
  const T* const input =
      a.grad_input == nullptr ? nullptr : static_cast<const T*>(a.grad_input) + n * a.grad_input_image + first;

  // Accesses are out's; the first and the last may be cut.
  const int skew = skew_of(out), accesses = (skew + count + V - 1) / V;
  const bool alike = skew_of(input) == skew;
  const auto whole = [&](int i) { return i * V >= skew && (i + 1) * V <= skew + count; };
  Vector<T, V> value[kAddInFlight];
  const auto load_accesses = [&](int begin) {
#pragma unroll
    for (int k = 0; k < kAddInFlight; ++k) {
      const int i = begin + k * kAddThreads + thread;
      if (input != nullptr && whole(i)) {
        const T* const from = input + (i * V - skew);
        if (alike) {
          value[k] = load<V>(from);
        } else {
#pragma unroll
          for (int e = 0; e < V; ++e) {
            value[k].at[e] = from[e];
          }
        }
      }
    }
  };
  load_accesses(0);
  __syncthreads();

  const T* const grad = static_cast<const T*>(a.grad) + static_cast<int64_t>(n) * a.levels.cells * a.channels + c;
  for (int i = thread; i < a.group * a.levels.cells; i += kAddThreads) {
    const int s = a.by_group.quotient(i), p = i - s * a.group;
    if (p < planes) {
      const float value_of_cell = to_float(grad[static_cast<int64_t>(s) * a.channels + p]);
      cells[p * a.levels.cells + s] = mean_of(value_of_cell, rows, columns, pool_cell(a.levels, s));
    }
  }
  __syncthreads();
  int first_segment = 0, segments = rows.segments;
  if (a.bands > 1) {
    while (rows.edges[first_segment + 1] <= top) {
      ++first_segment;
    }
    segments = first_segment;
    while (rows.edges[segments] < bottom) {
      ++segments;
    }
    segments -= first_segment;
  }
  for (int i = thread; i < planes * segments * columns.segments; i += kAddThreads) {
    const int row = a.by_segments_of_columns.quotient(i), column = i - row * columns.segments;
    const int p = a.bands > 1 ? 0 : a.by_segments_of_rows.quotient(row);
    const int segment = first_segment + row - p * segments;
    const float share = received(a, cells + p * a.levels.cells, rows.edges[segment], columns.edges[column]);
    for (int w = columns.edges[column]; w < columns.edges[column + 1]; ++w) {
      shares[row * a.pitch + w + w / V] = share;
    }
    if (column == 0) {
      const int begin = max(static_cast<int>(rows.edges[segment]), top);
      const int end = min(static_cast<int>(rows.edges[segment + 1]), bottom);
      for (int h = begin; h < end; ++h) {
        share_row[p * height + h - top] = static_cast<uint16_t>(row);
      }
    }
  }
  __syncthreads();

  for (int begin = 0; begin < accesses; begin += kAddInFlight * kAddThreads) {
    if (begin > 0) {
      load_accesses(begin);
    }
#pragma unroll
    for (int k = 0; k < kAddInFlight; ++k) {
      const int i = begin + k * kAddThreads + thread, element = i * V - skew;
      if (i >= accesses) {
        continue;
      }
      // Neighbouring threads read V elements apart, with the gaps V + 1: from different banks.
      if (whole(i) && a.width >= V) {
        const int row = a.by_width.quotient(element);
        const unsigned start = static_cast<unsigned>(element - row * a.width), width = static_cast<unsigned>(a.width);
        const float* const here = shares + share_row[row] * a.pitch;
        const float* const next = shares + share_row[row + 1] * a.pitch;  // behind the last row: not read from
        Vector<T, V> result;
#pragma unroll
        for (unsigned e = 0; e < V; ++e) {
          const bool wraps = start + e >= width;
          const unsigned w = start + e - (wraps ? width : 0);
          const float share = (wraps ? next : here)[w + w / V];
          result.at[e] = round_to<T>(input == nullptr ? share : to_float(value[k].at[e]) + share);
        }
        store_whole(out + element, result);
      } else {
#pragma unroll 1
        for (int e = max(element, 0); e < min(element + V, count); ++e) {
          const int row = a.by_width.quotient(e), w = e - row * a.width;
          const float share = shares[share_row[row] * a.pitch + w + w / V];
          out[e] = round_to<T>(input == nullptr ? share : to_float(input[e]) + share);
        }
      }
    }
  }
}

}  // namespace pspnet_fast::cuda
