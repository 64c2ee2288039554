// upsample_concat forward: the kernels, one for each memory format, which makes it as long as it is. No torch.
#pragma once

#include "cuda/upsample_concat.h"

namespace pspnet_fast::cuda {

constexpr int kCopyInFlight = 4;
constexpr int kCopyBytes = 2 * kCopyInFlight * kConcatThreads * kAccessBytes;  // of x, copied by one block

// NCHW. A tile is one run of the flattened planes: some whole planes, or some rows of one, or some columns of one row.
template <class T>
struct ForwardNchw {
  Concat concat;
  const T* x;
  int64_t x_elements, x_offset;  // of one image; where they go in an image of out
  int copy_blocks;               // an image's, for x
  const T* pyramid;
  T* out;
  int planes, rows, columns;  // of a tile
  int plane_tiles, row_tiles, column_tiles;
  Divisor by_columns;
  Divisor by_cell_rows[kConcatLevels];  // the rows of cells that a tile of this level needs at most
};

template <class T, int kGroup>
__device__ __forceinline__ Vector<float, kGroup> blend_rows(const float* table, const Tap& tap, int column) {
  const Vector<float, kGroup> lower = load<kGroup>(table + tap.lower + column);
  const Vector<float, kGroup> upper = load<kGroup>(table + tap.upper + column);
  Vector<float, kGroup> value;
#pragma unroll
  for (int e = 0; e < kGroup; ++e) {
    value.at[e] = tap.rest * lower.at[e] + tap.fraction * upper.at[e];
  }
  return value;
}

// Part `block` of a copy of `count` elements: vectors where both ends are aligned alike, counted from the last boundary
// of 16 bytes before `to`.
template <class T>
__device__ __forceinline__ void copy_part(const T* __restrict__ from, T* __restrict__ to, int64_t count, int block) {
  constexpr int kPart = kCopyBytes / static_cast<int>(sizeof(T));
  const int lead = skew_of(to);
  const int64_t start = static_cast<int64_t>(block) * kPart - lead;
  const int begin = start < 0 ? static_cast<int>(-start) : 0;
  const int end = static_cast<int>(min(static_cast<int64_t>(kPart), count - start));
  from += start;
  to += start;
  const bool alike = skew_of(from) == 0;
  const int first = alike ? (begin + kVector<T> - 1) / kVector<T> : 0, last = alike ? end / kVector<T> : 0;
  const int tid = static_cast<int>(threadIdx.x);
  const uint4* const read = reinterpret_cast<const uint4*>(from);  // indexed as such: else stores come in four parts
  uint4* const write = reinterpret_cast<uint4*>(to);
  int v = first + tid;
#pragma unroll 1
  for (; v + (kCopyInFlight - 1) * kConcatThreads < last; v += kCopyInFlight * kConcatThreads) {
    uint4 values[kCopyInFlight];
#pragma unroll
    for (int u = 0; u < kCopyInFlight; ++u) {
      values[u] = read[v + u * kConcatThreads];
    }
#pragma unroll
    for (int u = 0; u < kCopyInFlight; ++u) {
      write[v + u * kConcatThreads] = values[u];
    }
  }
#pragma unroll 1
  for (; v < last; v += kConcatThreads) {
    write[v] = read[v];
  }
  // What no vector holds: one end or two of a few elements, or everything.
  const int head_end = first < last ? first * kVector<T> : begin, tail = first < last ? last * kVector<T> : begin;
  if (begin + tid < head_end) {
    to[begin + tid] = from[begin + tid];
  }
#pragma unroll 4
  for (int i = tail + tid; i < end; i += kConcatThreads) {
    to[i] = from[i];
  }
}

// Grid       an image's blocks one after another: kCopyBytes of x each, then the tiles of every level
// Tile       the rows of cells it needs, each stretched along W once, in shared memory as float32; then vectors of 16
//            bytes of the flattened planes, wherever rows begin and end: an element is a blend of two of these rows
// Traffic    x read once, the concatenation written once, the cells from L2
// Shared     a tap for every row of the tile (its offsets into the table) and every column, and the table
// kGroup     elements that share a row: a divisor of W, and the width of the table's accesses
// Registers  48 (sm_80), 56 (sm_90), no spills; about 9 instructions an element in bfloat16
template <class T, int kGroup>
__global__ void __launch_bounds__(kConcatThreads, 8)
    upsample_concat_forward_nchw_kernel(const __grid_constant__ ForwardNchw<T> a) {
  const Concat& concat = a.concat;
  const int tid = static_cast<int>(threadIdx.x);
  const int tiles = a.plane_tiles * a.row_tiles * a.column_tiles;
  const int blocks = a.copy_blocks + tiles * concat.level_count;
  const int64_t n = blockIdx.x / static_cast<unsigned>(blocks);
  int tile = static_cast<int>(blockIdx.x % static_cast<unsigned>(blocks));
  const int64_t plane_size = static_cast<int64_t>(concat.height) * concat.width;
  if (tile < a.copy_blocks) {
    T* const to = a.out + n * concat.total_channels * plane_size + a.x_offset;
    copy_part(a.x + n * a.x_elements, to, a.x_elements, tile);
    return;
  }
  tile -= a.copy_blocks;
  const int k = tile / tiles;
  tile -= k * tiles;
  const ConcatLevel& level = concat.levels[k];
  const int column = tile % a.column_tiles * a.columns;
  tile /= a.column_tiles;
  const int row = tile % a.row_tiles * a.rows;
  const int channel = tile / a.row_tiles * a.planes;
  const int planes = min(a.planes, concat.reduced - channel);
  const int rows = min(a.rows, concat.height - row), columns = min(a.columns, concat.width - column);
  const int cell_rows = static_cast<int>(a.by_cell_rows[k].divisor);

  Tap* const row_taps = shared_memory<Tap>();             // [planes][rows]: lower, upper are offsets into the table
  Tap* const column_taps = row_taps + a.planes * a.rows;  // [columns]
  float* const table = reinterpret_cast<float*>(column_taps + a.columns);  // [planes][cell_rows][columns]
  const int first_row = tap_of(row, concat.height, level.bins, concat.align_corners).lower;
#pragma unroll 1
  for (int h = tid; h < rows; h += kConcatThreads) {
    Tap tap = tap_of(row + h, concat.height, level.bins, concat.align_corners);
    tap.lower = (tap.lower - first_row) * a.columns;
    tap.upper = (tap.upper - first_row) * a.columns;
#pragma unroll 1
    for (int plane = 0; plane < planes; ++plane) {
      row_taps[plane * rows + h] = tap;
      tap.lower += cell_rows * a.columns;
      tap.upper += cell_rows * a.columns;
    }
  }
#pragma unroll 1
  for (int w = tid; w < columns; w += kConcatThreads) {
    column_taps[w] = tap_of(column + w, concat.width, level.bins, concat.align_corners);
  }
  __syncthreads();

  const int used_rows =
      tap_of(row + rows - 1, concat.height, level.bins, concat.align_corners).upper - first_row + 1;
  const T* const cells =
      a.pyramid +
      (n * concat.cells + level.first_cell + static_cast<int64_t>(first_row) * level.bins) * concat.reduced + channel;
#pragma unroll 4
  for (int i = tid; i < planes * cell_rows * a.columns; i += kConcatThreads) {
    const int table_row = a.by_columns.quotient(i), w = i - table_row * a.columns;
    const int plane = a.by_cell_rows[k].quotient(table_row), cell_row = table_row - plane * cell_rows;
    if (w < columns && cell_row < used_rows) {
      const Tap tap = column_taps[w];
      const T* const cell = cells + static_cast<int64_t>(cell_row * level.bins) * concat.reduced + plane;
      table[i] = tap.rest * to_float(cell[static_cast<int64_t>(tap.lower) * concat.reduced]) +
                 tap.fraction * to_float(cell[static_cast<int64_t>(tap.upper) * concat.reduced]);
    }
  }
  __syncthreads();

  const int64_t first_plane = n * concat.total_channels + level.first_channel + channel;
  T* const out = a.out + first_plane * plane_size + static_cast<int64_t>(row) * concat.width + column;
  const int length = planes * rows * columns, lead = skew_of(out);
  for (int start = tid * kVector<T> - lead; start < length; start += kConcatThreads * kVector<T>) {
    const int from = max(start, 0);
    int h = a.by_columns.quotient(from), w = from - h * a.columns;
    Tap tap = row_taps[h];
    if (start >= 0 && start + kVector<T> <= length) {
      Vector<T, kVector<T>> values;
#pragma unroll
      for (int e = 0; e < kVector<T>; e += kGroup) {
        if (e > 0 && w == columns) {
          w = 0;
          tap = row_taps[++h];
        }
        const Vector<float, kGroup> value = blend_rows<T, kGroup>(table, tap, w);
#pragma unroll
        for (int g = 0; g < kGroup; ++g) {
          values.at[e + g] = round_to<T>(value.at[g]);
        }
        w += kGroup;
      }
      store(out + start, values);
    } else {
#pragma unroll 1
      for (int e = from; e < min(start + kVector<T>, length); ++e) {
        if (w == columns) {
          w = 0;
          tap = row_taps[++h];
        }
        out[e] = round_to<T>(blend_rows<T, 1>(table, tap, w).at[0]);
        ++w;
      }
    }
  }
}

template <class T>
struct ForwardChannelsLast {
  Concat concat;
  const T* x;
  int x_channels, x_first_channel, x_tiles;
  const T* pyramid;
  T* out;
  int lanes;    // threads side by side along the channels: 32, 64 or 128; the rest of a block takes other rows
  int columns;  // of a tile
  int level_tiles, row_tiles, column_tiles;
};

// Grid       an image's blocks one after another; of these, those for all channels of the same pixels beside each other
// Tile       `lanes` vectors along the channels of x or of a level, some columns of kConcatThreads / lanes rows: it
//            blends the two rows of cells, keeps the two columns of cells that it stands between, and walks the pixels
// Traffic    x read once, the concatenation written once, the cells from L1 and L2
// Shared     the taps of 32 columns for each warp
// Registers  48 (sm_80), 48 (sm_90) for vectors of bfloat16, no spills
template <class T, int kLength>
__global__ void __launch_bounds__(kConcatThreads, 9)
    upsample_concat_forward_channels_last_kernel(const __grid_constant__ ForwardChannelsLast<T> a) {
  const Concat& concat = a.concat;
  const int tid = static_cast<int>(threadIdx.x), lane = tid % kWarp;
  const int channel_tiles = a.x_tiles + a.level_tiles * concat.level_count;
  int tile = static_cast<int>(blockIdx.x % static_cast<unsigned>(channel_tiles));
  const int pixels = static_cast<int>(blockIdx.x / static_cast<unsigned>(channel_tiles));
  const int column = pixels % a.column_tiles * a.columns;
  const int64_t n = pixels / a.column_tiles / a.row_tiles;
  const int h = pixels / a.column_tiles % a.row_tiles * (kConcatThreads / a.lanes) + tid / a.lanes;
  if (h >= concat.height) {
    return;  // a whole warp
  }
  const int end = min(column + a.columns, concat.width);
  const int64_t row = (n * concat.height + h) * concat.width;
  if (tile < a.x_tiles) {
    const int c = (tile * a.lanes + tid % a.lanes) * kLength;
    if (c >= a.x_channels) {
      return;
    }
    const T* from = a.x + (row + column) * a.x_channels + c;
    T* to = a.out + (row + column) * concat.total_channels + a.x_first_channel + c;
    int w = column;
#pragma unroll 1
    for (; w + kCopyInFlight <= end; w += kCopyInFlight) {
      Raw<T, kLength> values[kCopyInFlight];
#pragma unroll
      for (int u = 0; u < kCopyInFlight; ++u) {
        values[u] = load_raw<T, kLength>(from);
        from += a.x_channels;
      }
#pragma unroll
      for (int u = 0; u < kCopyInFlight; ++u) {
        store_raw<T, kLength>(to, values[u]);
        to += concat.total_channels;
      }
    }
#pragma unroll 1
    for (; w < end; ++w) {
      store_raw<T, kLength>(to, load_raw<T, kLength>(from));
      from += a.x_channels;
      to += concat.total_channels;
    }
    return;
  }

  tile -= a.x_tiles;
  const int k = tile / a.level_tiles;
  const ConcatLevel& level = concat.levels[k];
  const int c = ((tile - k * a.level_tiles) * a.lanes + tid % a.lanes) * kLength;
  const bool within = c < concat.reduced;
  Tap* const taps = shared_memory<Tap>() + tid / kWarp * kWarp;
  const Tap vertical = tap_of(h, concat.height, level.bins, concat.align_corners);
  const T* const cells = a.pyramid + (n * concat.cells + level.first_cell) * concat.reduced + (within ? c : 0);
  const T* const lower_row = cells + static_cast<int64_t>(vertical.lower) * level.bins * concat.reduced;
  const T* const upper_row = cells + static_cast<int64_t>(vertical.upper) * level.bins * concat.reduced;
  const auto blended = [&](int j) {
    const Vector<T, kLength> lower = load<kLength>(lower_row + static_cast<int64_t>(j) * concat.reduced);
    const Vector<T, kLength> upper = load<kLength>(upper_row + static_cast<int64_t>(j) * concat.reduced);
    Vector<float, kLength> value;
#pragma unroll
    for (int e = 0; e < kLength; ++e) {
      value.at[e] = vertical.rest * to_float(lower.at[e]) + vertical.fraction * to_float(upper.at[e]);
    }
    return value;
  };

  T* to = a.out + (row + column) * concat.total_channels + level.first_channel + c;
  Vector<float, kLength> left{}, right{};
  const bool apart = concat.width != level.bins;  // `right` is the next cell's, else `left` again
  int cell = -2;  // neither the first cell nor the one before it
  for (int first = column; first < end; first += kWarp) {
    __syncwarp();
    if (first + lane < end) {
      taps[lane] = tap_of(first + lane, concat.width, level.bins, concat.align_corners);
    }
    __syncwarp();
    const int count = min(kWarp, end - first);
    for (int i = 0; i < count; ++i) {
      const Tap tap = taps[i];
      if (tap.lower != cell) {
        left = apart && tap.lower == cell + 1 ? right : blended(tap.lower);
        right = blended(tap.upper);
        cell = tap.lower;
      }
      Vector<T, kLength> value;
#pragma unroll
      for (int e = 0; e < kLength; ++e) {
        value.at[e] = round_to<T>(tap.rest * left.at[e] + tap.fraction * right.at[e]);
      }
      if (within) {
        store(to, value);
      }
      to += concat.total_channels;
    }
  }
}

}  // namespace pspnet_fast::cuda
