// pyramid_pool in channels_last, both ways: a block of threads owns a block of pixels. No torch.
#pragma once

#include "cuda/pyramid_pool_axes.h"

namespace pspnet_fast::cuda {

// A tile of channels, an access wide for each of 16 threads, by 16 groups of threads that share the pixels: 256 bytes of
// a pixel stand together, and each thread has four accesses under way.
constexpr int kPixelLanes = 16, kPixelGroups = 16, kPixelThreads = kPixelLanes * kPixelGroups, kInFlight = 4;
constexpr int kCellGroups = 8, kCellThreads = kWarp * kCellGroups;

struct PoolPixels {
  PoolAxis rows, columns;
  PoolLevels levels;
  const void* from;  // x; backward grad_input, or null
  void* to;          // the copy of x, or null; backward x's gradient
  float* blocks;     // forward: (N, segments of rows, segments of columns, C)
  void* y;           // forward: the pyramid
  const void* grad;  // backward: the pyramid's gradient
  int64_t from_image, to_image;
  int from_pixel, to_pixel;  // elements from pixel to pixel
  int channels, height, width;
  Divisor by_tiles, by_columns, by_rows, by_cells, by_height, by_width;
};

// The block that a block of threads owns, and this thread's first channel in it.
struct PixelBlock {
  int n, row, column, channel;
};

template <int V>
__device__ __forceinline__ PixelBlock pixel_block(const PoolPixels& a) {
  int rest = a.by_tiles.quotient(static_cast<int>(blockIdx.x));
  const int tile = a.by_tiles.remainder(static_cast<int>(blockIdx.x));
  const int column = a.by_columns.remainder(rest);
  rest = a.by_columns.quotient(rest);
  const int lane = static_cast<int>(threadIdx.x) % kPixelLanes;
  return {a.by_rows.quotient(rest), a.by_rows.remainder(rest), column, (tile * kPixelLanes + lane) * V};
}

// A thread's pixels: every 16th of the block, in the order of the rows. No division from one to the next.
struct PixelWalk {
  int left;    // to the end of the block, from this one on
  int pixel;   // in the image
  int column;  // in the block
  int width, step, step_column, to_next_row;

  __device__ __forceinline__ PixelWalk(const PoolPixels& a, const PixelBlock& block) {
    const int top = a.rows.edges[block.row], start = a.columns.edges[block.column];
    const int first = static_cast<int>(threadIdx.x) / kPixelLanes;
    width = a.columns.edges[block.column + 1] - start;
    left = block.channel < a.channels ? (a.rows.edges[block.row + 1] - top) * width - first : 0;
    column = first % width;
    pixel = (top + first / width) * a.width + start + column;
    step_column = kPixelGroups % width;
    step = kPixelGroups / width * a.width + step_column;
    to_next_row = a.width - width;
  }
  __device__ __forceinline__ void advance() {
    left -= kPixelGroups;
    pixel += step;
    column += step_column;
    if (column >= width) {
      column -= width;
      pixel += to_next_row;
    }
  }
};

// The sum over the groups of threads: in `sums`, V * kPixelLanes floats for each group, to the first V * kPixelLanes
// threads, a channel each.
template <int V>
__device__ __forceinline__ float sum_of_groups(float* sums, const float (&mine)[V]) {
  constexpr int kChannels = V * kPixelLanes;
  const int thread = static_cast<int>(threadIdx.x);
  constexpr int kPart = V % 4 == 0 ? 4 : V;
#pragma unroll
  for (int i = 0; i < V; i += kPart) {
    Vector<float, kPart> part;
#pragma unroll
    for (int k = 0; k < kPart; ++k) {
      part.at[k] = mine[i + k];
    }
    store(sums + thread * V + i, part);
  }
  __syncthreads();
  float total = 0;
  if (thread < kChannels) {
#pragma unroll
    for (int group = 0; group < kPixelGroups; ++group) {
      total += sums[group * kChannels + thread];
    }
  }
  return total;
}

// Sums of blocks. V is an access of 16 bytes, or 1 where channels or alignment allow no more.
//
// Grid     a block of pixels, at most 16 x 16 unless there are too many, of a tile of channels
// Tile     16 pixels at a time, each group of threads four of its own under way; then summed over the groups
// Traffic  x read, its copy written where one is asked for, N * blocks * C float32 written; about 3 instructions an
//          element
//
// Registers: 40 (sm_80), 46 (sm_90) in float32, 48 and up to 64 in 16 bits, 32 for V = 1; no spills.
template <class T, int V>
__global__ void __launch_bounds__(kPixelThreads)
    pyramid_pool_pixels_kernel(const __grid_constant__ PoolPixels a) {
  const PixelBlock block = pixel_block<V>(a);
  PixelWalk walk(a, block);
  const T* const from = static_cast<const T*>(a.from) + block.n * a.from_image + block.channel;
  T* const to = a.to == nullptr ? nullptr : static_cast<T*>(a.to) + block.n * a.to_image + block.channel;
  float total[V] = {};
  while (walk.left > 0) {
    Vector<T, V> value[kInFlight];
    int pixel[kInFlight];
#pragma unroll
    for (int k = 0; k < kInFlight; ++k, walk.advance()) {
      pixel[k] = walk.left > 0 ? walk.pixel : -1;
      if (pixel[k] >= 0) {
        value[k] = load<V>(from + static_cast<int64_t>(pixel[k]) * a.from_pixel);
      }
    }
#pragma unroll
    for (int k = 0; k < kInFlight; ++k) {
      if (pixel[k] >= 0) {
        if (to != nullptr) {
          store(to + static_cast<int64_t>(pixel[k]) * a.to_pixel, value[k]);
        }
#pragma unroll
        for (int i = 0; i < V; ++i) {
          total[i] += to_float(value[k].at[i]);
        }
      }
    }
  }
  const float sum = sum_of_groups<V>(shared_memory<float>(), total);
  const int lane = static_cast<int>(threadIdx.x) % kPixelLanes, channel = block.channel - lane * V + threadIdx.x;
  if (threadIdx.x < V * kPixelLanes && channel < a.channels) {
    const int64_t row = static_cast<int64_t>(block.n) * a.rows.segments + block.row;
    a.blocks[(row * a.columns.segments + block.column) * a.channels + channel] = sum;
  }
}

// Cells from sums of blocks.
//
// Grid     a cell of an image, 32 channels
// Tile     each of eight warps every eighth of the cell's blocks; then summed over the warps
// Traffic  the sums read once a level, from L2; the cells written once
//
// Registers: 40 (sm_80), 32 (sm_90), no spills.
template <class T>
__global__ void __launch_bounds__(kCellThreads)
    pyramid_pool_cells_kernel(const __grid_constant__ PoolPixels a) {
  const int rest = a.by_tiles.quotient(static_cast<int>(blockIdx.x)), lane = static_cast<int>(threadIdx.x) % kWarp;
  const int channel = a.by_tiles.remainder(static_cast<int>(blockIdx.x)) * kWarp + lane;
  const int n = a.by_cells.quotient(rest), s = a.by_cells.remainder(rest);
  const int group = static_cast<int>(threadIdx.x) / kWarp;
  const PoolCell cell = pool_cell(a.levels, s);
  const int left = a.columns.first[cell.column], width = a.columns.end[cell.column] - left;
  const int top = a.rows.first[cell.row], count = (a.rows.end[cell.row] - top) * width;
  float total = 0;
  if (channel < a.channels) {
    const float* const from = a.blocks + static_cast<int64_t>(n) * a.rows.segments * a.columns.segments * a.channels;
#pragma unroll 4
    for (int i = group; i < count; i += kCellGroups) {
      const int row = i / width;
      const int64_t block = (top + row) * a.columns.segments + left + i - row * width;
      total += from[block * a.channels + channel];
    }
  }
  float* const sums = shared_memory<float>();
  sums[threadIdx.x] = total;
  __syncthreads();
  if (group == 0 && channel < a.channels) {
#pragma unroll
    for (int g = 1; g < kCellGroups; ++g) {
      total += sums[g * kWarp + lane];
    }
    static_cast<T*>(a.y)[(static_cast<int64_t>(n) * a.levels.cells + s) * a.channels + channel] =
        round_to<T>(mean_of(total, a.rows, a.columns, cell));
  }
}

// x's gradient: to every pixel what its block receives, the gradient over the area of every window that holds it, and
// grad_input.
//
// Grid     a block of pixels, at most 16 x 16 unless there are too many, of a tile of channels
// Tile     the windows shared out to the groups of threads, while the first pixels are under way; then 16 pixels at a
//          time, each group four of its own under way
// Traffic  grad_input read, x's gradient written; the cells read once a block, from L2; about 4 instructions an element
//
// Registers: 62 (sm_80), 61 (sm_90) in float32, 78 and 80 in 16 bits, 45 for V = 1; no spills.
template <class T, int V>
__global__ void __launch_bounds__(kPixelThreads)
    pyramid_pool_pixels_backward_kernel(const __grid_constant__ PoolPixels a) {
  const PixelBlock block = pixel_block<V>(a);
  PixelWalk walk(a, block);
  const T* const from =
      a.from == nullptr ? nullptr : static_cast<const T*>(a.from) + block.n * a.from_image + block.channel;
  T* const to = static_cast<T*>(a.to) + block.n * a.to_image + block.channel;
  Vector<T, V> value[kInFlight];
  int pixel[kInFlight];
  const auto load_pixels = [&] {
#pragma unroll
    for (int k = 0; k < kInFlight; ++k, walk.advance()) {
      pixel[k] = walk.left > 0 ? walk.pixel : -1;
      if (pixel[k] >= 0 && from != nullptr) {
        value[k] = load<V>(from + static_cast<int64_t>(pixel[k]) * a.from_pixel);
      }
    }
  };
  load_pixels();

  float share[V] = {};
  if (block.channel < a.channels) {
    const T* const grad = static_cast<const T*>(a.grad) + static_cast<int64_t>(block.n) * a.levels.cells * a.channels;
    const int h = a.rows.edges[block.row], w = a.columns.edges[block.column];
    int turn = static_cast<int>(threadIdx.x) / kPixelLanes;
    for (int level = 0; level < a.levels.levels; ++level) {
      // The windows that hold a pixel are the pixels that a window holds, with the sizes exchanged.
      const int bins = a.levels.bins[level];
      const int top = a.by_height.quotient(h * bins), bottom = a.by_height.quotient((h + 1) * bins + a.height - 1);
      const int left = a.by_width.quotient(w * bins), right = a.by_width.quotient((w + 1) * bins + a.width - 1);
      for (; turn < (bottom - top) * (right - left); turn += kPixelGroups) {
        const int i = top + turn / (right - left), j = left + turn % (right - left);
        const PoolCell cell{a.levels.first_window[level] + i, a.levels.first_window[level] + j};
        const int64_t s = a.levels.first_cell[level] + i * bins + j;
        const Vector<T, V> received = load<V>(grad + s * a.channels + block.channel);
#pragma unroll
        for (int k = 0; k < V; ++k) {
          share[k] += mean_of(to_float(received.at[k]), a.rows, a.columns, cell);
        }
      }
      turn -= (bottom - top) * (right - left);
    }
  }
  float* const sums = shared_memory<float>();
  const float sum = sum_of_groups<V>(sums, share);
  if (threadIdx.x < V * kPixelLanes) {
    sums[threadIdx.x] = sum;  // the first group's, which this thread alone has read
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < V; ++i) {
    share[i] = sums[static_cast<int>(threadIdx.x) % kPixelLanes * V + i];
  }

  while (pixel[0] >= 0) {
#pragma unroll
    for (int k = 0; k < kInFlight; ++k) {
      if (pixel[k] >= 0) {
#pragma unroll
        for (int i = 0; i < V; ++i) {
          value[k].at[i] = round_to<T>(from == nullptr ? share[i] : to_float(value[k].at[i]) + share[i]);
        }
        store(to + static_cast<int64_t>(pixel[k]) * a.to_pixel, value[k]);
      }
    }
    load_pixels();
  }
}

}  // namespace pspnet_fast::cuda
