// upsample_concat backward: the kernels, for NCHW one that stages planes and one for maps too wide for it, for
// channels_last a pass along W and one along H. All are gathers, and sum in an order that only the sizes and the dtype
// decide. No torch.
// Past 300 lines: four kernels that walk one sum in four ways, read beside each other.
#pragma once

#include "cuda/upsample_concat.h"

namespace pspnet_fast::cuda {

struct alignas(8) TapWeights {
  float rest, fraction;
};

template <class T>
struct BackwardNchw {
  Concat concat;
  const T* grad;
  T* out;
  int planes, plane_tiles;  // of a block; rows are staged `band` at a time
  int band, stage_bytes;
  bool bulk;          // the planes come in one bulk copy: compute capability 9.0 and later, one band
  Divisor by_groups;  // W / kGroup
  Divisor by_bins[kConcatLevels], by_cells[kConcatLevels];
  int log_strips[kConcatLevels];  // a cell row's rows of pixels are shared out among 2^this threads
};

// Brings `count` elements to shared memory, as far past 16 bytes as they stand in global memory: where that is.
// It waits for nothing: what is bulk completes on the barrier, the rest with copy_async_wait.
template <class T>
__device__ __forceinline__ T* stage(const T* __restrict__ from, int count, T* memory, bool bulk, Barrier* barrier) {
  const int tid = static_cast<int>(threadIdx.x), lead = skew_of(from);
  T* const to = memory + lead;
  const int head = min(lead == 0 ? 0 : kVector<T> - lead, count);
  const int vectors = (count - head) / kVector<T>, tail = head + vectors * kVector<T>;
  if (bulk) {
    if (tid == 0) {
      barrier_expect(barrier, static_cast<uint32_t>(vectors) * kAccessBytes);
      if (vectors > 0) {
        bulk_load(to + head, from + head, static_cast<uint32_t>(vectors) * kAccessBytes, barrier);
      }
    }
  } else {
    for (int v = tid; v < vectors; v += kConcatThreads) {
      copy_async(to + head + v * kVector<T>, from + head + v * kVector<T>);
    }
    copy_async_commit();
  }
  if (tid < head) {
    to[tid] = from[tid];
  }
  if (tail + tid < count) {
    to[tail + tid] = from[tail + tid];
  }
  return to;
}

// sum += weight * row over rows begin, begin + step, ... of the staged band.
template <bool kUpper, int kGroup, class T>
__device__ __forceinline__ void add_rows(float (&sum)[kGroup], const T* column, int width, const TapWeights* weights,
                                         int begin, int end, int step) {
#pragma unroll 4
  for (int h = begin; h < end; h += step) {
    const Vector<T, kGroup> values = load<kGroup>(column + h * width);
    const float weight = kUpper ? weights[h].fraction : weights[h].rest;
#pragma unroll
    for (int e = 0; e < kGroup; ++e) {
      sum[e] += weight * to_float(values.at[e]);
    }
  }
}

// Grid     `planes` planes of one level of one image, level after level, image after image
// Tile     the planes, or where there is one its bands of rows, staged in shared memory as they are; a thread sums
//          kGroup columns over every 2^log_strips-th row of a cell row's; then eight lanes sum a cell along W
// Traffic  the levels' planes read once, N * S * R written
// Shared   the barrier, the supports of rows and columns of cells, the band, the weights of its rows and of the
//          columns, the sums [planes][bins][strips][W]
// Registers 31 (sm_80), 54 (sm_90) for bfloat16 and W % 4 == 0; float32 55 and 64; no spills
template <class T, int kGroup>
__global__ void __launch_bounds__(kConcatThreads, 8)
    upsample_concat_backward_nchw_kernel(const __grid_constant__ BackwardNchw<T> a) {
  constexpr int kLanes = 8;  // of a cell
  const Concat& concat = a.concat;
  const int tid = static_cast<int>(threadIdx.x);
  const int64_t n = blockIdx.x / static_cast<unsigned>(a.plane_tiles * concat.level_count);
  const int tile = static_cast<int>(blockIdx.x % static_cast<unsigned>(a.plane_tiles * concat.level_count));
  const int k = tile / a.plane_tiles, channel = (tile - k * a.plane_tiles) * a.planes;
  const ConcatLevel& level = concat.levels[k];
  const int planes = min(a.planes, concat.reduced - channel);
  const int height = concat.height, width = concat.width, bins = level.bins, strips = 1 << a.log_strips[k];

  Barrier* const barrier = shared_memory<Barrier>();
  Support* const row_supports = reinterpret_cast<Support*>(shared_memory<unsigned char>() + kAccessBytes);  // [bins]
  Support* const column_supports = row_supports + bins;                                                     // [bins]
  T* const memory = reinterpret_cast<T*>(column_supports + bins);  // 16 bytes more than the band
  TapWeights* const row_weights =
      reinterpret_cast<TapWeights*>(reinterpret_cast<unsigned char*>(memory) + a.stage_bytes);  // [band]
  TapWeights* const column_weights = row_weights + (a.band + 1) / 2 * 2;                        // [W]
  float* const sums = reinterpret_cast<float*>(column_weights + (width + 1) / 2 * 2);

  const int64_t first_plane = n * concat.total_channels + level.first_channel + channel;
  const T* const grad = a.grad + first_plane * height * width;
  if (a.bulk) {
    if (tid == 0) {
      barrier_init(barrier);
      fence_barrier_init();
    }
    __syncthreads();
  }
#pragma unroll 1
  for (int i = tid; i < 2 * bins; i += kConcatThreads) {
    row_supports[i] = i < bins ? support_of(i, height, bins, concat.align_corners)
                               : support_of(i - bins, width, bins, concat.align_corners);
  }
#pragma unroll 1
  for (int w = tid; w < width; w += kConcatThreads) {
    const Tap tap = tap_of(w, width, bins, concat.align_corners);
    column_weights[w] = {tap.rest, tap.fraction};
  }

  const int groups = width / kGroup, items = (planes * bins << a.log_strips[k]) * groups;
  for (int row = 0; row < height; row += a.band) {
    const int rows = min(a.band, height - row), plane_size = height * width;
    const T* const staged = stage(grad + static_cast<int64_t>(row) * width,
                                  planes > 1 ? planes * plane_size : rows * width, memory, a.bulk, barrier);
#pragma unroll 1
    for (int h = tid; h < rows; h += kConcatThreads) {
      const Tap tap = tap_of(row + h, height, bins, concat.align_corners);
      row_weights[h] = {tap.rest, tap.fraction};
    }
    if (a.bulk) {
      barrier_wait(barrier, 0);
    } else {
      copy_async_wait<0>();
    }
    __syncthreads();
    for (int i = tid; i < items; i += kConcatThreads) {
      const int strip_row = a.by_groups.quotient(i), w = (i - strip_row * groups) * kGroup;
      const int strip = strip_row & (strips - 1), cell_row = strip_row >> a.log_strips[k];
      const int plane = a.by_bins[k].quotient(cell_row);
      const Support support = row_supports[cell_row - plane * bins];
      const T* const column = staged + plane * plane_size + w;
      float sum[kGroup];
      float* const kept = sums + strip_row * width + w;
#pragma unroll
      for (int e = 0; e < kGroup; ++e) {
        sum[e] = row == 0 ? 0 : kept[e];
      }
      add_rows<true>(sum, column, width, row_weights, max(support.upper_begin - row, 0) + strip,
                     min(support.upper_end - row, rows), strips);
      add_rows<false>(sum, column, width, row_weights, max(support.lower_begin - row, 0) + strip,
                      min(support.lower_end - row, rows), strips);
#pragma unroll
      for (int e = 0; e < kGroup; ++e) {
        kept[e] = sum[e];
      }
    }
    __syncthreads();  // before the next band takes this one's place
  }

  const int cells = planes * bins * bins, lane = tid % kLanes;
  T* const out = a.out + (n * concat.cells + level.first_cell) * concat.reduced + channel;
  for (int first = 0; first < cells; first += kConcatThreads / kLanes) {
    const int i = min(first + tid / kLanes, cells - 1);
    const int plane = a.by_cells[k].quotient(i), cell = i - plane * bins * bins;
    const int cell_row = a.by_bins[k].quotient(cell);
    const Support support = column_supports[cell - cell_row * bins];
    const float* const strip_rows = sums + ((plane * bins + cell_row) << a.log_strips[k]) * width;
    float sum = 0;
    const int uppers = support.upper_end - support.upper_begin;
    for (int e = lane; e < support.count(); e += kLanes) {
      const bool upper = e < uppers;
      const int w = upper ? support.upper_begin + e : support.lower_begin + e - uppers;
      float value = 0;
#pragma unroll 1
      for (int strip = 0; strip < strips; ++strip) {
        value += strip_rows[strip * width + w];
      }
      sum += (upper ? column_weights[w].fraction : column_weights[w].rest) * value;
    }
#pragma unroll
    for (int distance = kLanes / 2; distance > 0; distance /= 2) {
      sum += __shfl_xor_sync(0xffffffffu, sum, distance);
    }
    if (lane == 0 && first + tid / kLanes < cells) {
      out[static_cast<int64_t>(cell) * concat.reduced + plane] = round_to<T>(sum);
    }
  }
}

// Grid     one cell of one plane of one level for each warp
// Tile     the pixels that the cell is part of, row after row, lanes along W
// Traffic  the planes read up to four times, from L2 where planes fit; N * S * R written
// For maps of which not even one row of sums for each cell row fits into shared memory.
// Registers 46 (sm_80), 46 (sm_90) for bfloat16, no spills
template <class T>
__global__ void __launch_bounds__(kConcatThreads, 8)
    upsample_concat_backward_nchw_cells_kernel(const __grid_constant__ BackwardNchw<T> a) {
  const Concat& concat = a.concat;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  int64_t i = static_cast<int64_t>(blockIdx.x) * kConcatWarps + threadIdx.x / kWarp;
  const int channel = static_cast<int>(i % concat.reduced);
  i /= concat.reduced;
  const int cells = concat.levels[concat.level_count - 1].first_cell - concat.levels[0].first_cell +
                    concat.levels[concat.level_count - 1].bins * concat.levels[concat.level_count - 1].bins;
  const int64_t n = i / cells;
  if (n >= concat.images) {
    return;  // a whole warp
  }
  const int cell = concat.levels[0].first_cell + static_cast<int>(i - n * cells);
  int k = 0;
  while (k + 1 < concat.level_count && cell >= concat.levels[k + 1].first_cell) {
    ++k;
  }
  const ConcatLevel& level = concat.levels[k];
  const int cell_row = (cell - level.first_cell) / level.bins, cell_column = (cell - level.first_cell) % level.bins;
  const Support rows = support_of(cell_row, concat.height, level.bins, concat.align_corners);
  const Support columns = support_of(cell_column, concat.width, level.bins, concat.align_corners);
  const int64_t plane_number = n * concat.total_channels + level.first_channel + channel;
  const T* const plane = a.grad + plane_number * concat.height * concat.width;
  const auto weight = [&](const Support& support, int e, int size, int& pixel) {
    const int uppers = support.upper_end - support.upper_begin;
    pixel = e < uppers ? support.upper_begin + e : support.lower_begin + e - uppers;
    const Tap tap = tap_of(pixel, size, level.bins, concat.align_corners);
    return e < uppers ? tap.fraction : tap.rest;
  };
  float sum = 0;
#pragma unroll 1
  for (int column = lane; column < columns.count(); column += kWarp) {
    int w, h;
    const float horizontal = weight(columns, column, concat.width, w);
    float column_sum = 0;
#pragma unroll 1
    for (int row = 0; row < rows.count(); ++row) {
      const float vertical = weight(rows, row, concat.height, h);
      column_sum += vertical * to_float(plane[static_cast<int64_t>(h) * concat.width + w]);
    }
    sum += horizontal * column_sum;
  }
  sum = warp_sum(sum);
  if (lane == 0) {
    a.out[(n * concat.cells + cell) * concat.reduced + channel] = round_to<T>(sum);
  }
}

template <class T>
struct BackwardChannelsLast {
  Concat concat;
  const T* grad;
  float* rows;  // (N, H, columns of all levels' cells, R)
  T* out;
  int tiles;   // of kWarp vectors along a level's channels
  int splits;  // warps that share a row: kConcatWarps or 1
  int split_columns;  // columns of cells that a split touches at most
};

constexpr int kRowsInFlight = 8;

template <int kLength>
__device__ __forceinline__ void store_floats(float* to, const float (&values)[kLength]) {
  constexpr int kPart = kLength < kVector<float> ? kLength : kVector<float>;
#pragma unroll
  for (int i = 0; i < kLength; i += kPart) {
    Vector<float, kPart> part;
#pragma unroll
    for (int e = 0; e < kPart; ++e) {
      part.at[e] = values[i + e];
    }
    store(to + i, part);
  }
}

// Grid     kWarp vectors of a level's channels in kConcatWarps / splits rows
// Tile     a warp walks a row, or its part of it, run by run of pixels between the same two columns of cells, whose
//          sums it keeps, kRowsInFlight pixels in flight; parts are added in shared memory, in their order
// Traffic  the levels' channels read once; N * H * columns * R float32 written (12 columns for bins 1, 2, 3, 6)
// Shared   the taps of 32 columns for each warp, the columns of cells of each part and their sums
// Registers 81 (sm_80), 84 (sm_90) for vectors of bfloat16, no spills
template <class T, int kLength>
__global__ void __launch_bounds__(kConcatThreads, 4)
    upsample_concat_backward_rows_kernel(const __grid_constant__ BackwardChannelsLast<T> a) {
  const Concat& concat = a.concat;
  const int tid = static_cast<int>(threadIdx.x), lane = tid % kWarp, warp = tid / kWarp;
  const int tiles = a.tiles * concat.level_count;
  const int tile = static_cast<int>(blockIdx.x % static_cast<unsigned>(tiles));
  const int k = tile / a.tiles, c = ((tile - k * a.tiles) * kWarp + lane) * kLength;
  const bool within = c < concat.reduced;
  const ConcatLevel& level = concat.levels[k];
  const int split = warp % a.splits;
  const int64_t row = static_cast<int64_t>(blockIdx.x / static_cast<unsigned>(tiles)) * (kConcatWarps / a.splits) +
                      warp / a.splits;  // of all images
  const int width = concat.width, bins = level.bins;
  if (row >= static_cast<int64_t>(concat.images) * concat.height) {
    return;  // a whole warp, and only where splits are 1: nobody waits for it
  }
  Tap* const taps = shared_memory<Tap>() + warp * kWarp;
  int* const bounds = reinterpret_cast<int*>(shared_memory<Tap>() + kConcatThreads);  // first, last column of each part
  float* const parts = reinterpret_cast<float*>(bounds + 2 * kConcatWarps);  // [splits][split_columns][kLength][kWarp]
  float* const out = a.rows + (row * concat.columns + level.first_column) * concat.reduced + c;
  const bool whole = a.splits == 1;
  const bool apart = width != bins;  // `high` is the next cell's, else this one's: 0, or NaN like `low`

  const int begin = whole ? 0 : static_cast<int>(static_cast<int64_t>(width) * split / kConcatWarps);
  const int end = whole ? width : static_cast<int>(static_cast<int64_t>(width) * (split + 1) / kConcatWarps);
  const int first_cell = whole ? 0 : tap_of(begin, width, bins, concat.align_corners).lower;
  const int last_cell = whole ? bins - 1 : tap_of(end - 1, width, bins, concat.align_corners).upper;
  float low[kLength] = {}, high[kLength] = {};
  int cell = first_cell;
  const auto emit = [&](const float (&sum)[kLength]) {
    if (!whole) {
      float* const to = parts + (split * a.split_columns + cell - first_cell) * kLength * kWarp + lane;
#pragma unroll
      for (int e = 0; e < kLength; ++e) {
        to[e * kWarp] = sum[e];
      }
    } else if (within) {
      store_floats(out + static_cast<int64_t>(cell) * concat.reduced, sum);
    }
  };
  const auto move_to = [&](int next) {
#pragma unroll 1
    for (; cell < next; ++cell) {
      emit(low);
#pragma unroll
      for (int e = 0; e < kLength; ++e) {
        low[e] = apart ? high[e] : 0;
        high[e] = 0;
      }
    }
  };

  const int64_t pitch = concat.total_channels;
  const T* from = a.grad + (row * width + begin) * pitch + level.first_channel + (within ? c : 0);
  for (int first = begin; first < end; first += kWarp) {
    __syncwarp();
    if (first + lane < end) {
      taps[lane] = tap_of(first + lane, width, bins, concat.align_corners);
    }
    __syncwarp();
    const int count = min(kWarp, end - first);
#pragma unroll 1
    for (int i = 0; i < count;) {
      move_to(taps[i].lower);
      const int run = min(count, tap_start(cell + 1, width, bins, concat.align_corners) - first);
#pragma unroll 1
      for (; i < run; i += kRowsInFlight) {
        Raw<T, kLength> values[kRowsInFlight];
#pragma unroll
        for (int u = 0; u < kRowsInFlight; ++u) {
          if (i + u < run) {
            values[u] = load_raw<T, kLength>(from);
            from += pitch;
          }
        }
#pragma unroll
        for (int u = 0; u < kRowsInFlight; ++u) {
          if (i + u < run) {
            const Tap tap = taps[i + u];
            const Vector<T, kLength> pixel = *reinterpret_cast<const Vector<T, kLength>*>(&values[u]);
#pragma unroll
            for (int e = 0; e < kLength; ++e) {
              const float value = to_float(pixel.at[e]);
              low[e] += tap.rest * value;
              high[e] += tap.fraction * value;
            }
          }
        }
      }
      i = run;
    }
  }
  // The last cell is its own upper one.
  if (cell == bins - 1) {
#pragma unroll
    for (int e = 0; e < kLength; ++e) {
      low[e] += high[e];
      high[e] = 0;
    }
  }
  move_to(last_cell);
  emit(low);
  if (whole) {
    return;
  }

  if (lane == 0) {
    bounds[2 * split] = first_cell;
    bounds[2 * split + 1] = last_cell;
  }
  __syncthreads();
#pragma unroll 1
  for (int j = warp; j < bins; j += kConcatWarps) {
    float sum[kLength] = {};
#pragma unroll 1
    for (int part = 0; part < kConcatWarps; ++part) {
      if (j >= bounds[2 * part] && j <= bounds[2 * part + 1]) {
        const float* const from_part = parts + (part * a.split_columns + j - bounds[2 * part]) * kLength * kWarp + lane;
#pragma unroll
        for (int e = 0; e < kLength; ++e) {
          sum[e] += from_part[e * kWarp];
        }
      }
    }
    if (within) {
      store_floats(out + static_cast<int64_t>(j) * concat.reduced, sum);
    }
  }
}

// Grid     one cell of one image, kWarp vectors of its channels
// Tile     each warp sums every fourth row that the cell is part of; the four sums are added in shared memory
// Traffic  the rows' float32 sums read twice (L2), N * S * R written
// Shared   the weights of 32 rows for each warp, the four sums
// Registers 56 (sm_80), 58 (sm_90) for vectors, no spills
template <class T, int kLength>
__global__ void __launch_bounds__(kConcatThreads, 8)
    upsample_concat_backward_cells_kernel(const __grid_constant__ BackwardChannelsLast<T> a) {
  struct alignas(8) Entry {
    int row;
    float weight;
  };
  const Concat& concat = a.concat;
  const int tid = static_cast<int>(threadIdx.x), lane = tid % kWarp, warp = tid / kWarp;
  const int first_cell = concat.levels[0].first_cell;
  const ConcatLevel& last = concat.levels[concat.level_count - 1];
  const int cells = last.first_cell + last.bins * last.bins - first_cell;
  const int tile = static_cast<int>(blockIdx.x % static_cast<unsigned>(a.tiles));
  const int image_cell = static_cast<int>(blockIdx.x / static_cast<unsigned>(a.tiles));
  const int64_t n = image_cell / cells;
  const int cell = first_cell + image_cell % cells;
  int k = 0;
  while (k + 1 < concat.level_count && cell >= concat.levels[k + 1].first_cell) {
    ++k;
  }
  const ConcatLevel& level = concat.levels[k];
  const int cell_row = (cell - level.first_cell) / level.bins;
  const int column = level.first_column + cell - level.first_cell - cell_row * level.bins;
  const int c = (tile * kWarp + lane) * kLength;
  const bool within = c < concat.reduced;

  Entry* const entries = shared_memory<Entry>() + warp * kWarp;
  float* const parts = reinterpret_cast<float*>(shared_memory<Entry>() + kConcatThreads);  // [warps][kLength][kWarp]
  const Support support = support_of(cell_row, concat.height, level.bins, concat.align_corners);
  const int uppers = support.upper_end - support.upper_begin, count = support.count();
  const float* const from =
      a.rows + (n * concat.height * concat.columns + column) * concat.reduced + (within ? c : 0);
  const int64_t pitch = static_cast<int64_t>(concat.columns) * concat.reduced;
  float sum[kLength] = {};
  for (int first = warp; first < count; first += kConcatThreads) {
    const int e = first + lane * kConcatWarps;
    __syncwarp();
    if (e < count) {
      const int h = e < uppers ? support.upper_begin + e : support.lower_begin + e - uppers;
      const Tap tap = tap_of(h, concat.height, level.bins, concat.align_corners);
      entries[lane] = {h, e < uppers ? tap.fraction : tap.rest};
    }
    __syncwarp();
    const int mine = min(kWarp, (count - first + kConcatWarps - 1) / kConcatWarps);
#pragma unroll 4
    for (int i = 0; i < mine; ++i) {
      const Entry entry = entries[i];
      const Vector<float, kLength> values = load<kLength>(from + entry.row * pitch);
#pragma unroll
      for (int e = 0; e < kLength; ++e) {
        sum[e] += entry.weight * values.at[e];
      }
    }
  }
#pragma unroll
  for (int e = 0; e < kLength; ++e) {
    parts[(warp * kLength + e) * kWarp + lane] = sum[e];
  }
  __syncthreads();
  if (warp == 0 && within) {
    Vector<T, kLength> value;
#pragma unroll
    for (int e = 0; e < kLength; ++e) {
      float total = sum[e];
      for (int part = 1; part < kConcatWarps; ++part) {
        total += parts[(part * kLength + e) * kWarp + lane];
      }
      value.at[e] = round_to<T>(total);
    }
    store(a.out + (n * concat.cells + cell) * concat.reduced + c, value);
  }
}

}  // namespace pspnet_fast::cuda
