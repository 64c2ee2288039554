// How the windows of pyramid_pool cut a map, as a kernel's parameter: of a fixed size, so that no table has to be copied
// to the device; and what the kernels of planes need for planes that start anywhere. No torch.
#pragma once

#include "cuda/device.h"

namespace pspnet_fast::cuda {

constexpr int kPoolLevels = 16, kPoolWindows = 128, kPoolSegments = 64;

// The starts and ends of all windows of all levels cut an axis into segments; every window is a run of whole segments.
struct PoolAxis {
  int segments;
  uint16_t edges[kPoolSegments + 1];                // segment s is [edges[s], edges[s + 1])
  uint8_t first[kPoolWindows], end[kPoolWindows];   // segments of a window, counted through all levels
};

struct PoolLevels {
  int levels, cells, windows;  // cells of the packed pyramid; windows along an axis
  int bins[kPoolLevels], first_cell[kPoolLevels], first_window[kPoolLevels];
  Divisor by_bins[kPoolLevels];
};

// A cell's windows: counted through all levels as in PoolAxis.
struct PoolCell {
  int row, column;
};

__device__ __forceinline__ PoolCell pool_cell(const PoolLevels& levels, int cell) {
  int level = 0;
  while (level + 1 < levels.levels && levels.first_cell[level + 1] <= cell) {
    ++level;
  }
  const int place = cell - levels.first_cell[level];
  const int row = levels.by_bins[level].quotient(place);
  return {levels.first_window[level] + row, levels.first_window[level] + place - row * levels.bins[level]};
}

__device__ __forceinline__ int window_length(const PoolAxis& axis, int window) {
  return axis.edges[axis.end[window]] - axis.edges[axis.first[window]];
}

__device__ __forceinline__ float mean_of(float sum, const PoolAxis& rows, const PoolAxis& columns, PoolCell cell) {
  return __fdiv_rn(sum, static_cast<float>(window_length(rows, cell.row) * window_length(columns, cell.column)));
}

// A table, read with a different index by every thread, is faster in shared memory than among the parameters.
template <class Table>
__device__ __forceinline__ const Table* to_shared(void* memory, const Table& table) {
  static_assert(sizeof(Table) % sizeof(uint32_t) == 0);
  uint32_t* const words = static_cast<uint32_t*>(memory);
  for (int i = static_cast<int>(threadIdx.x); i < static_cast<int>(sizeof(Table) / sizeof(uint32_t));
       i += static_cast<int>(blockDim.x)) {
    words[i] = reinterpret_cast<const uint32_t*>(&table)[i];
  }
  return static_cast<const Table*>(memory);
}

}  // namespace pspnet_fast::cuda
