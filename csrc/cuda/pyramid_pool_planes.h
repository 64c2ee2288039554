// pyramid_pool forward, NCHW: planes stream through a ring of stages in shared memory, and from there also into the
// copy of x that upsample_concat will fill up. No torch.
#pragma once

#include "cuda/pyramid_pool_axes.h"

namespace pspnet_fast::cuda {

constexpr int kPlanesThreads = 192;
constexpr int kPlanesStages = 3;
constexpr int kItemBytes = 16 * 1024;  // the most of x in a stage: the whole of 60x60 in float32, of 90x90 in 16 bits
// An item starts and ends within an access of 16 bytes; stages stay aligned to 128.
constexpr int kStageBytes = kItemBytes + 128;

struct PoolPlanes {
  PoolAxis rows, columns;
  PoolLevels levels;
  const void* x;
  void* y;
  void* copy;           // where x's first plane goes, or null
  int64_t elements;     // of x
  int64_t copy_image;   // elements from image to image of the copy
  int channels, height, width, plane;
  bool bulk;            // bulk copies, compute capability 9.0; else 16 bytes by each thread
  // A unit of work is `group` planes of an image, or one plane in `bands` bands of `band_rows` rows. A block has
  // units_each, the first units_more blocks one more.
  int group, bands, band_rows, units_each, units_more;
  int batch;            // planes whose blocks are kept until cells are made of them
  int sum_rows, pitch;  // the column sums: rows at once, elements from row to row
  Divisor by_units_per_image, by_width, by_segments_of_rows, by_segments_of_columns, by_windows, by_batch;
};

// What is in a stage: `planes` planes of image n from channel c on, or rows [top, bottom) of one. `count` elements from
// `first` on, without gaps.
struct PoolItem {
  int64_t first;
  int count, n, c, planes, top, bottom;
};

// An item by its unit and band.
__device__ __forceinline__ PoolItem pool_item(const PoolPlanes& a, int unit, int band) {
  const int n = a.by_units_per_image.quotient(unit);
  const int c = a.by_units_per_image.remainder(unit) * a.group;
  const int planes = min(a.group, a.channels - c);
  const int top = band * a.band_rows, bottom = min(a.height, top + a.band_rows);
  return {(static_cast<int64_t>(n) * a.channels + c) * a.plane + top * a.width,
          (planes - 1) * a.plane + (bottom - top) * a.width,
          n,
          c,
          planes,
          top,
          bottom};
}

// Item to stage. The stage has the item's own alignment, so that whole accesses of 16 bytes move, neighbours' elements at
// the ends included; only where such an access would leave x are its elements loaded one by one.
template <class T>
__device__ __forceinline__ void load_item(const PoolPlanes& a, const PoolItem& item, T* stage, Barrier* full) {
  constexpr int V = kVector<T>;
  const T* const source = static_cast<const T*>(a.x) + item.first;
  const int skew = skew_of(source), accesses = (skew + item.count + V - 1) / V;
  const bool cut_head = item.first < skew, cut_tail = item.first - skew + accesses * V > a.elements;
  const int begin = cut_head, end = accesses - cut_tail, thread = static_cast<int>(threadIdx.x);
  if (!a.bulk) {
    for (int i = begin + thread; i < end; i += kPlanesThreads) {
      copy_async(stage + i * V, source - skew + i * V);
    }
  } else if (thread == 0) {
    const uint32_t bytes = begin < end ? (end - begin) * kAccessBytes : 0;
    barrier_expect(full, bytes);
    if (bytes > 0) {
      bulk_load(stage + begin * V, source - skew + begin * V, bytes, full);
    }
  }
  if (thread < V) {
    const int head = thread - skew, tail = head + (accesses - 1) * V;
    if (cut_head && head >= 0 && head < item.count) {
      stage[thread] = source[head];
    }
    if (cut_tail && tail >= 0 && tail < item.count) {
      stage[(accesses - 1) * V + thread] = source[tail];
    }
  }
}

// Stage to copy, in accesses of 16 bytes of the copy. Where x and copy have the same alignment these are accesses of the
// stage as well, and one bulk store moves all of them.
template <class T>
__device__ __forceinline__ void store_item(const PoolPlanes& a, const PoolItem& item, const T* stage) {
  constexpr int V = kVector<T>;
  const int64_t first = item.n * a.copy_image + static_cast<int64_t>(item.c) * a.plane + item.top * a.width;
  T* const to = static_cast<T*>(a.copy) + first;
  const T* const from = stage + skew_of(static_cast<const T*>(a.x) + item.first);
  const int skew = skew_of(to), accesses = (skew + item.count + V - 1) / V;
  const bool alike = skew_of(from) == skew;
  const int begin = skew > 0, end = (skew + item.count) / V;  // the whole accesses
  const bool by_bulk = a.bulk && alike && begin < end;
  if (by_bulk && threadIdx.x == 0) {
    bulk_store(to - skew + begin * V, from - skew + begin * V, (end - begin) * kAccessBytes);
    bulk_store_commit();
  }
  for (int i = static_cast<int>(threadIdx.x); i < accesses; i += kPlanesThreads) {
    const int element = i * V - skew;
    if (i < begin || i >= end) {
#pragma unroll
      for (int k = 0; k < V; ++k) {
        if (element + k >= 0 && element + k < item.count) {
          to[element + k] = from[element + k];
        }
      }
    } else if (!by_bulk) {
      Vector<T, V> value;
      if (alike) {
        value = load<V>(from + element);
      } else {
#pragma unroll
        for (int k = 0; k < V; ++k) {
          value.at[k] = from[element + k];
        }
      }
      store_whole(to + element, value);
    }
  }
}

// The block sums of an item's planes, `planes_before` planes of the batch before them. First the rows of each segment are
// summed to one row, with neighbouring columns in neighbouring threads: no bank conflicts whatever the width, and all
// threads of a warp mostly in segments of one length. Then each row is summed over the segments of columns.
template <class T>
__device__ __forceinline__ void sum_item(const PoolPlanes& a, const PoolItem& item, const T* tile, const PoolAxis& rows,
                                         const PoolAxis& columns, float* sums, float* blocks) {
  int first = 0, segments = rows.segments;  // of rows, in this item
  if (a.bands > 1) {
    while (rows.edges[first + 1] <= item.top) {
      ++first;
    }
    segments = first;
    while (rows.edges[segments] < item.bottom) {
      ++segments;
    }
    segments -= first;
  }
  for (int begin = 0; begin < item.planes * segments; begin += a.sum_rows) {
    const int count = min(a.sum_rows, item.planes * segments - begin);
    for (int i = static_cast<int>(threadIdx.x); i < count * a.width; i += kPlanesThreads) {
      const int row = a.by_width.quotient(i), w = i - row * a.width;
      const int p = a.bands > 1 ? 0 : a.by_segments_of_rows.quotient(begin + row);
      const int segment = first + begin + row - p * segments;
      const int top = max(static_cast<int>(rows.edges[segment]), item.top);
      const int bottom = min(static_cast<int>(rows.edges[segment + 1]), item.bottom);
      const T* from = tile + p * a.plane + (top - item.top) * a.width + w;
      float sum = 0;
#pragma unroll 4
      for (int h = top; h < bottom; ++h, from += a.width) {
        sum += to_float(*from);
      }
      sums[row * a.pitch + w] = sum;
    }
    __syncthreads();
    for (int i = static_cast<int>(threadIdx.x); i < count * columns.segments; i += kPlanesThreads) {
      const int row = a.by_segments_of_columns.quotient(i), column = i - row * columns.segments;
      const int p = a.bands > 1 ? 0 : a.by_segments_of_rows.quotient(begin + row);
      const int segment = first + begin + row - p * segments;
      float sum = 0;
#pragma unroll 4
      for (int w = columns.edges[column]; w < columns.edges[column + 1]; ++w) {
        sum += sums[row * a.pitch + w];
      }
      float* const block = blocks + (p * rows.segments + segment) * columns.segments + column;
      *block = rows.edges[segment] < item.top ? *block + sum : sum;  // a segment that began in the band before
    }
    __syncthreads();
  }
}

// The cells of `planes` planes of image n from channel c on: blocks summed along each row to the windows' columns, these
// down to the cells. Neighbouring threads write neighbouring channels.
template <class T>
__device__ __forceinline__ void make_cells(const PoolPlanes& a, int n, int c, int planes, const PoolAxis& rows,
                                           const PoolAxis& columns, const float* blocks, float* windows) {
  for (int i = static_cast<int>(threadIdx.x); i < planes * rows.segments * a.levels.windows; i += kPlanesThreads) {
    const int row = a.by_windows.quotient(i), window = i - row * a.levels.windows;
    float sum = 0;
#pragma unroll 4
    for (int s = columns.first[window]; s < columns.end[window]; ++s) {
      sum += blocks[row * columns.segments + s];
    }
    windows[i] = sum;
  }
  __syncthreads();
  T* const y = static_cast<T*>(a.y) + static_cast<int64_t>(n) * a.levels.cells * a.channels + c;
  for (int i = static_cast<int>(threadIdx.x); i < a.batch * a.levels.cells; i += kPlanesThreads) {
    const int s = a.by_batch.quotient(i), p = i - s * a.batch;
    if (p >= planes) {
      continue;
    }
    const PoolCell cell = pool_cell(a.levels, s);
    float sum = 0;
#pragma unroll 4
    for (int r = rows.first[cell.row]; r < rows.end[cell.row]; ++r) {
      sum += windows[(p * rows.segments + r) * a.levels.windows + cell.column];
    }
    y[static_cast<int64_t>(s) * a.channels + p] = round_to<T>(mean_of(sum, rows, columns, cell));
  }
}

// Grid     persistent: a block owns a run of units, neighbouring planes, so that it writes a cell's neighbouring channels
// Tile     an item, a few whole planes or a band of one, in each of three stages: two under way while the third is summed
//          and stored
// Traffic  x read once, the cells written once, and the copy where one is asked for; about 10 instructions an element,
//          half of them to find what a thread sums
//
// Registers: 51 (sm_80), 59 in float32 and 61 in 16 bits (sm_90), no spills. Shared memory: 54 KiB for 60x60 and bins 1, 2,
// 3, 6: four blocks to a multiprocessor of compute capability 9.0, 112 KiB under way.
template <class T>
__global__ void __launch_bounds__(kPlanesThreads, 4)
    pyramid_pool_planes_kernel(const __grid_constant__ PoolPlanes a) {
  unsigned char* memory = shared_memory<unsigned char>();
  const auto stage = [&](int k) { return reinterpret_cast<T*>(memory + k % kPlanesStages * kStageBytes); };
  unsigned char* const tables = memory + kPlanesStages * kStageBytes;
  Barrier* const full = reinterpret_cast<Barrier*>(tables);
  float* const sums = reinterpret_cast<float*>(full + kPlanesStages + 1);
  float* const blocks = sums + a.sum_rows * a.pitch;
  float* const windows = blocks + a.batch * a.rows.segments * a.columns.segments;
  float* const axes = windows + a.batch * a.rows.segments * a.levels.windows;

  const int block = static_cast<int>(blockIdx.x);
  const int first_unit = block * a.units_each + min(block, a.units_more);
  const int units = a.units_each + (block < a.units_more);
  if (a.bulk) {
    if (threadIdx.x == 0) {
      for (int k = 0; k < kPlanesStages; ++k) {
        barrier_init(full + k);
      }
      fence_barrier_init();
    }
    __syncthreads();
  }

  // Loads run ahead of sums by all stages but one.
  int next = 0, next_unit = 0, next_band = 0;
  const auto load_next = [&] {
    if (next_unit < units) {
      load_item<T>(a, pool_item(a, first_unit + next_unit, next_band), stage(next), full + next % kPlanesStages);
      ++next;
      if (++next_band == a.bands) {
        next_band = 0;
        ++next_unit;
      }
    }
    copy_async_commit();  // a group each time, empty ones at the end
  };
  for (int k = 0; k < kPlanesStages - 1; ++k) {
    load_next();
  }
  const PoolAxis& rows = *to_shared(axes, a.rows);
  const PoolAxis& columns = *to_shared(axes + sizeof(PoolAxis) / sizeof(float), a.columns);

  int item_number = 0, planes = 0;  // planes of the batch
  for (int unit = 0; unit < units; ++unit) {
    for (int band = 0; band < a.bands; ++band, ++item_number) {
      const PoolItem item = pool_item(a, first_unit + unit, band);
      if (a.bulk) {
        if (threadIdx.x == 0) {
          bulk_store_wait_read<0>();  // of the item before, whose stage is loaded next
        }
        barrier_wait(full + item_number % kPlanesStages, item_number / kPlanesStages % 2);
      } else {
        copy_async_wait<kPlanesStages - 2>();
      }
      __syncthreads();  // the stage is there, and nobody reads the one before any more
      load_next();
      if (a.copy != nullptr) {
        store_item<T>(a, item, stage(item_number));
      }
      const T* const tile = stage(item_number) + skew_of(static_cast<const T*>(a.x) + item.first);
      sum_item<T>(a, item, tile, rows, columns, sums, blocks + planes * a.rows.segments * a.columns.segments);
      if (band + 1 == a.bands) {
        planes += item.planes;
        const bool last = unit + 1 == units || item.c + item.planes == a.channels;
        if (last || planes + a.group > a.batch) {
          make_cells<T>(a, item.n, item.c + item.planes - planes, planes, rows, columns, blocks, windows);
          planes = 0;
        }
      }
    }
  }
  copy_async_wait<0>();
  if (a.bulk && threadIdx.x == 0) {
    bulk_store_wait<0>();
  }
}

}  // namespace pspnet_fast::cuda
