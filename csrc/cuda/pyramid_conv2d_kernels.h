// pyramid_conv2d on the GPU: the kernels. The maths stands in pspnet_fast/ops/pyramid_conv2d.py. No torch.
//
// A band (level, row of cells i, dy) is what one row of cells and one dy contribute along W. Forward, a block makes its
// part of the bands in shared memory: they never leave it. Backward, the sums along H are bands in global memory,
// float32, and a second kernel sums them along W. Past 300 lines: both directions walk the same bands.
#pragma once

#include "cuda/taps.h"

namespace pspnet_fast::cuda::conv2d {

constexpr int kMostLevels = 64;

// Bands stand level after level, row of cells after row, dy after dy.
struct Level {
  int bins, first_cell, first_band;
  int kept_rows, first_slot;  // rows of cells that a forward block keeps, and where their bands stand
};

struct Conv2d {
  int images, channels, rows, columns;  // of the convolution
  int height, width;                    // of the upsampled levels
  int cells, bands, kernel_size, padding;
  bool align_corners;
  int level_count;
  Level levels[kMostLevels];
};

// Where the taps of one cell, dy and dx stand: channels, contiguous.
__device__ __forceinline__ int64_t taps_row(const Conv2d& a, int64_t n, int cell, int dy, int dx) {
  return ((n * a.cells + cell) * a.kernel_size * a.kernel_size + dy * a.kernel_size + dx) * a.channels;
}

// Of an output pixel and a d, the tap along an axis; lower is -1 outside the map, which is the padding.
__device__ __forceinline__ Tap tap_at(const Conv2d& a, int pixel, int d, int size, int cells) {
  const int source = pixel + d - a.padding;
  return source < 0 || source >= size ? Tap{-1, -1, 0, 0} : tap_of(source, size, cells, a.align_corners);
}

constexpr int kForwardThreads = 256;
constexpr int kForwardWarps = kForwardThreads / kWarp;
// A tile: what is contiguous in the output, channels of channels_last or pixels of NCHW, by the other of the two.
constexpr int kInner = 32;
constexpr int kOuter = 8;
constexpr int kTile = kInner * kOuter;
constexpr int kEach = kTile / kWarp;  // elements of a thread
constexpr int kGroupRows = 4;         // rows that share what is read of the bands
constexpr int kQuad = 4;              // channels that are read at once: float32, 16 bytes

template <bool kChannelsLast>
constexpr int kTilePixels = kChannelsLast ? kOuter : kInner;

// What the rows of a group take of the bands of one level and dy: where these stand in shared memory, or -1.
struct alignas(16) RowTaps {
  int lower[kGroupRows], upper[kGroupRows];
  float fraction[kGroupRows];
};

template <class T>
struct Forward {
  Conv2d conv;
  const float *taps, *scale, *shift;  // scale and shift may be null
  T* out;
  bool add, relu;
  bool quads;  // channels of the taps can be read four at once
  int tile_rows, groups;
  int inner_tiles, outer_tiles, row_tiles;
};

// Where element e of a tile stands in shared memory. Of eight in one access the halves stand apart, so that threads
// beside each other read 16 bytes beside each other.
template <int kAccess>
__device__ __forceinline__ int place(int e) {
  return kAccess <= kQuad ? e : e / kQuad % 2 * (kTile / 2) + e / (2 * kQuad) * kQuad + e % kQuad;
}

// Element i of a thread's: kAccess together, those of the lanes beside each other.
template <int kAccess>
__device__ __forceinline__ int element(int lane, int i) {
  return (i / kAccess * kWarp + lane) * kAccess + i % kAccess;
}

template <int kAccess>
__device__ __forceinline__ void load_tile(const float* tile, int lane, float (&to)[kEach]) {
  constexpr int kPart = kAccess < kQuad ? kAccess : kQuad;
#pragma unroll
  for (int i = 0; i < kEach; i += kPart) {
    const Vector<float, kPart> part = load<kPart>(tile + place<kAccess>(element<kAccess>(lane, i)));
#pragma unroll
    for (int e = 0; e < kPart; ++e) {
      to[i + e] = part.at[e];
    }
  }
}

// Four channels from `o` on, or as many as there are.
__device__ __forceinline__ Vector<float, kQuad> load_quad(const float* from, int o, int channels, bool quads) {
  if (quads) {
    return load<kQuad>(from + o);
  }
  Vector<float, kQuad> values;
#pragma unroll
  for (int e = 0; e < kQuad; ++e) {
    values.at[e] = from[min(o + e, channels - 1)];
  }
  return values;
}

// Grid       tiles of channels and pixels of tile_rows rows; tiles of what is contiguous beside each other
// Tile       the bands of its rows are summed from the taps along W, into shared memory; then each warp takes four rows
//            at a time, which mostly read the same two bands of a level and dy, and sums them in registers
// Traffic    the output written once, read once where it is added to; the taps from L2, for tiles of 32 channels and 8
//            pixels (channels_last) by 64 rows about as many bytes as the output
// Shared     the taps of the tile's columns for each level and dx, of its rows for each level and dy; scale and shift;
//            the bands
// Registers  94 to 104 (sm_80, sm_90) for vectors of four and eight, 128 for two, up to 216 for one; no spills
template <class T, int kAccess, bool kChannelsLast>
__global__ void __launch_bounds__(kForwardThreads, kAccess == 1 ? 1 : 2)
    pyramid_conv2d_forward_kernel(const __grid_constant__ Forward<T> a) {
  constexpr int kPixels = kTilePixels<kChannelsLast>, kChannels = kTile / kPixels, kQuads = kTile / kQuad;
  const Conv2d& conv = a.conv;
  const int tid = static_cast<int>(threadIdx.x), lane = tid % kWarp, k = conv.kernel_size, pairs = conv.level_count * k;
  int block = static_cast<int>(blockIdx.x);
  const int inner = block % a.inner_tiles * kInner;
  block /= a.inner_tiles;
  const int outer = block % a.outer_tiles * kOuter;
  block /= a.outer_tiles;
  const int row = block % a.row_tiles * a.tile_rows, rows = min(a.tile_rows, conv.rows - row);
  const int64_t n = block / a.row_tiles;
  const int channel = kChannelsLast ? inner : outer, pixel = kChannelsLast ? outer : inner;

  RowTaps* const row_taps = shared_memory<RowTaps>();                              // [pairs][groups]
  Tap* const column_taps = reinterpret_cast<Tap*>(row_taps + pairs * a.groups);    // [pairs][kPixels]
  float* const scale = reinterpret_cast<float*>(column_taps + pairs * kPixels);    // [kTile]
  float* const shift = scale + kTile;                                              // [kTile]
  float* const bands = shift + kTile;                                              // [slots][kTile]

  const int first_source = max(row - conv.padding, 0);
  const int last_source = min(row + rows - 1 + k - 1 - conv.padding, conv.height - 1);
  const auto first_cell_row = [&](const Level& level) {  // of those kept; no source is inside where all rows are padding
    return first_source > last_source
               ? 0
               : bilinear_tap(first_source, conv.height, level.bins, conv.align_corners).lower;
  };
#pragma unroll 1
  for (int i = tid; i < pairs * a.groups; i += kForwardThreads) {
    const int pair = i / a.groups, h = row + (i - pair * a.groups) * kGroupRows;
    const Level& level = conv.levels[pair / k];
    const int dy = pair % k, first = first_cell_row(level);
#pragma unroll
    for (int r = 0; r < kGroupRows; ++r) {
      const Tap tap = h + r < row + rows ? tap_at(conv, h + r, dy, conv.height, level.bins) : Tap{-1, -1, 0, 0};
      const auto slot = [&](int i) { return i < 0 ? -1 : (level.first_slot + (i - first) * k + dy) * kTile; };
      row_taps[i].lower[r] = slot(tap.lower);
      row_taps[i].upper[r] = slot(tap.upper);
      row_taps[i].fraction[r] = tap.fraction;
    }
  }
#pragma unroll 1
  for (int i = tid; i < pairs * kPixels; i += kForwardThreads) {
    const int pair = i / kPixels;
    column_taps[i] = tap_at(conv, pixel + i % kPixels, pair % k, conv.width, conv.levels[pair / k].bins);
  }
  {
    const int o = min(channel + (kChannelsLast ? tid % kInner : tid / kInner), conv.channels - 1);
    scale[place<kAccess>(tid)] = a.scale == nullptr ? 1.0f : a.scale[o];
    shift[place<kAccess>(tid)] = a.shift == nullptr ? 0.0f : a.shift[o];
  }
  __syncthreads();

#pragma unroll 1
  for (int l = 0; l < conv.level_count; ++l) {
    const Level& level = conv.levels[l];
    const int first = first_cell_row(level);
#pragma unroll 1
    for (int i = tid; i < level.kept_rows * k * kQuads; i += kForwardThreads) {
      const int slot = i / kQuads, item = i % kQuads, kept = slot / k, dy = slot - kept * k;
      const int quad = kChannelsLast ? item % (kChannels / kQuad) : item / kPixels;
      const int w = kChannelsLast ? item / (kChannels / kQuad) : item % kPixels;
      const int o = channel + quad * kQuad;
      if (first + kept >= level.bins || o >= conv.channels || pixel + w >= conv.columns) {
        continue;
      }
      const int cell = level.first_cell + (first + kept) * level.bins;
      Vector<float, kQuad> sum{};
#pragma unroll 3
      for (int dx = 0; dx < k; ++dx) {
        const Tap tap = column_taps[(l * k + dx) * kPixels + w];
        const float* const from = a.taps + taps_row(conv, n, cell, dy, dx);
        const int64_t step = static_cast<int64_t>(k) * k * conv.channels;
        const Vector<float, kQuad> left = load_quad(from + max(tap.lower, 0) * step, o, conv.channels, a.quads);
        const Vector<float, kQuad> right = load_quad(from + max(tap.upper, 0) * step, o, conv.channels, a.quads);
        if (tap.lower >= 0) {
#pragma unroll
          for (int e = 0; e < kQuad; ++e) {
            sum.at[e] += tap.rest * left.at[e];
            sum.at[e] += tap.fraction * right.at[e];
          }
        }
      }
      float* const to = bands + (level.first_slot + slot) * kTile;
      if constexpr (kChannelsLast) {
        store(to + place<kAccess>(w * kInner + quad * kQuad), sum);
      } else {
#pragma unroll
        for (int e = 0; e < kQuad; ++e) {
          to[place<kAccess>((quad * kQuad + e) * kInner + w)] = sum.at[e];
        }
      }
    }
  }
  __syncthreads();

  const int inner_count = kChannelsLast ? conv.channels : conv.columns;
  const int outer_count = kChannelsLast ? conv.columns : conv.channels;
  const int64_t plane = static_cast<int64_t>(conv.rows) * conv.columns;
  const int64_t outer_step = kChannelsLast ? conv.channels : plane;
  const int64_t row_step = kChannelsLast ? static_cast<int64_t>(conv.columns) * conv.channels : conv.columns;
  T* const out = a.out + n * conv.channels * plane + row * row_step + outer * outer_step + inner;
#pragma unroll 1
  for (int group = tid / kWarp; group * kGroupRows < rows; group += kForwardWarps) {
    const auto within = [&](int r, int e) {
      return group * kGroupRows + r < rows && inner + e % kInner < inner_count && outer + e / kInner < outer_count;
    };
    const auto at = [&](int r, int e) {
      return out + (group * kGroupRows + r) * row_step + e / kInner * outer_step + e % kInner;
    };
    float sum[kGroupRows][kEach];
#pragma unroll
    for (int r = 0; r < kGroupRows; ++r) {
#pragma unroll
      for (int i = 0; i < kEach; i += kAccess) {
        const int e = element<kAccess>(lane, i);
        Vector<T, kAccess> there{};
        if (a.add && within(r, e)) {
          there = load<kAccess>(at(r, e));
        }
#pragma unroll
        for (int j = 0; j < kAccess; ++j) {
          sum[r][i + j] = to_float(there.at[j]);
        }
      }
    }
#pragma unroll 1
    for (int pair = 0; pair < pairs; ++pair) {
      const RowTaps& taps = row_taps[pair * a.groups + group];
      float top[kEach], bottom[kEach];
      if (taps.lower[0] >= 0 && taps.lower[0] == taps.lower[kGroupRows - 1]) {
        load_tile<kAccess>(bands + taps.lower[0], lane, top);
        load_tile<kAccess>(bands + taps.upper[0], lane, bottom);
        const Vector<float, kGroupRows> fractions = load<kGroupRows>(taps.fraction);
#pragma unroll
        for (int r = 0; r < kGroupRows; ++r) {
          const float fraction = fractions.at[r];
#pragma unroll
          for (int e = 0; e < kEach; ++e) {
            sum[r][e] += (1 - fraction) * top[e];
            sum[r][e] += fraction * bottom[e];
          }
        }
        continue;
      }
#pragma unroll
      for (int r = 0; r < kGroupRows; ++r) {
        if (taps.lower[r] >= 0) {
          const float fraction = taps.fraction[r];
          load_tile<kAccess>(bands + taps.lower[r], lane, top);
          load_tile<kAccess>(bands + taps.upper[r], lane, bottom);
#pragma unroll
          for (int e = 0; e < kEach; ++e) {
            sum[r][e] += (1 - fraction) * top[e];
            sum[r][e] += fraction * bottom[e];
          }
        }
      }
    }
    if (a.scale != nullptr || a.shift != nullptr) {
      float factor[kEach], offset[kEach];
      load_tile<kAccess>(scale, lane, factor);
      load_tile<kAccess>(shift, lane, offset);
#pragma unroll
      for (int r = 0; r < kGroupRows; ++r) {
#pragma unroll
        for (int e = 0; e < kEach; ++e) {
          sum[r][e] = sum[r][e] * factor[e] + offset[e];
        }
      }
    }
#pragma unroll
    for (int r = 0; r < kGroupRows; ++r) {
#pragma unroll
      for (int i = 0; i < kEach; i += kAccess) {
        const int e = element<kAccess>(lane, i);
        if (!within(r, e)) {
          continue;
        }
        Vector<T, kAccess> value;
#pragma unroll
        for (int j = 0; j < kAccess; ++j) {
          const float y = sum[r][i + j];
          value.at[j] = round_to<T>(a.relu && y < 0 ? 0 : y);
        }
        if constexpr (kAccess == kVector<T>) {
          store_whole(at(r, e), value);
        } else {
          store(at(r, e), value);
        }
      }
    }
  }
}

// Grid       kForwardThreads elements of the output
// Tile       an element a thread, summed from the taps
// Traffic    the output written once, read once where it is added to; up to four taps for each level, dy and dx, cached
// For levels of so many bins that not even four rows' bands fit into shared memory.
// Registers  40 (sm_80), 34 (sm_90), no spills
template <class T, bool kChannelsLast>
__global__ void __launch_bounds__(kForwardThreads)
    pyramid_conv2d_forward_elements_kernel(const __grid_constant__ Forward<T> a) {
  const Conv2d& conv = a.conv;
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kForwardThreads + threadIdx.x;
  const int64_t plane = static_cast<int64_t>(conv.rows) * conv.columns, image = plane * conv.channels;
  if (index >= conv.images * image) {
    return;
  }
  const int64_t n = index / image, in_image = index - n * image;
  const int o = static_cast<int>(kChannelsLast ? in_image % conv.channels : in_image / plane);
  const int64_t pixel = kChannelsLast ? in_image / conv.channels : in_image % plane;
  const int h = static_cast<int>(pixel / conv.columns), w = static_cast<int>(pixel % conv.columns);
  float y = a.add ? to_float(a.out[index]) : 0;
#pragma unroll 1
  for (int l = 0; l < conv.level_count; ++l) {
    const Level& level = conv.levels[l];
#pragma unroll 1
    for (int d = 0; d < conv.kernel_size * conv.kernel_size; ++d) {
      const int dy = d / conv.kernel_size, dx = d % conv.kernel_size;
      const Tap down = tap_at(conv, h, dy, conv.height, level.bins), right = tap_at(conv, w, dx, conv.width, level.bins);
      if (down.lower < 0 || right.lower < 0) {
        continue;
      }
      const auto along_w = [&](int i) {
        const int cell = level.first_cell + i * level.bins;
        return right.rest * a.taps[taps_row(conv, n, cell + right.lower, dy, dx) + o] +
               right.fraction * a.taps[taps_row(conv, n, cell + right.upper, dy, dx) + o];
      };
      y += down.rest * along_w(down.lower);
      y += down.fraction * along_w(down.upper);
    }
  }
  if (a.scale != nullptr) {
    y *= a.scale[o];
  }
  if (a.shift != nullptr) {
    y += a.shift[o];
  }
  a.out[index] = round_to<T>(a.relu && y < 0 ? 0 : y);
}

constexpr int kBandWarps = 12;  // of a block at most: as many as the usual levels have pairs of level and dy
constexpr int kBandTile = kWarp * kQuad;
constexpr int kTapsThreads = 256;

template <bool kChannelsLast>
constexpr int kBandChannels = kChannelsLast ? 32 : 8;  // of a tile; 16 pixels of NCHW are at least 32 bytes

template <class T>
struct Backward {
  Conv2d conv;
  const T* grad;
  float *bands, *taps;  // (N, bands, W', O), (N, S, k*k, O)
  bool quads;           // the channels are a multiple of four
  int chunk;            // rows that are staged at once
  int channel_tiles, pixel_tiles;
};

// Grid       a tile of channels and pixels of all rows of one image; tiles of channels beside each other
// Tile       a chunk of rows is staged in shared memory, as pixels of channels; then each warp takes a level and a dy and
//            walks the rows: two of its bands at a time are summed in registers. Between chunks these wait in their places
// Traffic    the gradient read once; N * bands * W' * O float32 written
// Shared     the fractions of the rows' taps for each level, the rows
// Registers  64 (sm_80), 69 (sm_90) for vectors of bfloat16, elsewhere up to 80; no spills
template <class T, int kAccess, bool kChannelsLast>
__global__ void __launch_bounds__(kBandWarps* kWarp, 2)
    pyramid_conv2d_backward_bands_kernel(const __grid_constant__ Backward<T> a) {
  constexpr int kChannels = kBandChannels<kChannelsLast>, kPixels = kBandTile / kChannels;
  constexpr int kContiguous = kChannelsLast ? kChannels : kPixels;
  const Conv2d& conv = a.conv;
  const int tid = static_cast<int>(threadIdx.x), lane = tid % kWarp, threads = static_cast<int>(blockDim.x);
  const int k = conv.kernel_size, height = conv.height;
  int block = static_cast<int>(blockIdx.x);
  const int channel = block % a.channel_tiles * kChannels;
  block /= a.channel_tiles;
  const int pixel = block % a.pixel_tiles * kPixels;
  const int64_t n = block / a.pixel_tiles;

  const int sources = (a.chunk + k - 1 + 3) / 4 * 4;
  float* const fractions = shared_memory<float>();                                         // [levels][sources]
  T* const tile = reinterpret_cast<T*>(fractions + conv.level_count * sources);            // [chunk][kBandTile]
  const int64_t plane = static_cast<int64_t>(conv.rows) * conv.columns;
  const T* const grad = a.grad + n * conv.channels * plane;
  const int o = channel + lane * kQuad % kChannels, w = pixel + lane * kQuad / kChannels;
  const auto band_at = [&](int band) {
    return a.bands + ((n * conv.bands + band) * conv.columns + w) * conv.channels + o;
  };
  const int valid = w < conv.columns ? min(conv.channels - o, kQuad) : 0;  // of this thread's channels
  const auto keep = [&](int band, const float (&sum)[kQuad]) {
    float* const to = band_at(band);
    if (a.quads && valid > 0) {
      store(to, Vector<float, kQuad>{{sum[0], sum[1], sum[2], sum[3]}});
    } else {
#pragma unroll
      for (int e = 0; e < kQuad; ++e) {
        if (e < valid) {
          to[e] = sum[e];
        }
      }
    }
  };

#pragma unroll 1
  for (int first = 0; first < conv.rows; first += a.chunk) {
    const int rows = min(a.chunk, conv.rows - first);
    __syncthreads();  // before these rows take the last ones' place
#pragma unroll 4
    for (int i = tid; i < rows * (kBandTile / kAccess); i += threads) {
      const int r = i / (kBandTile / kAccess), e = i % (kBandTile / kAccess) * kAccess;
      const int c = kChannelsLast ? e % kContiguous : e / kContiguous, x = kChannelsLast ? e / kContiguous : e % kContiguous;
      if (channel + c >= conv.channels || pixel + x >= conv.columns) {
        continue;
      }
      const int64_t in_plane = static_cast<int64_t>(first + r) * conv.columns + pixel + x;
      const T* const from = grad + (kChannelsLast ? in_plane * conv.channels + channel + c : (channel + c) * plane + in_plane);
      if constexpr (kChannelsLast && kAccess == kVector<T>) {
        copy_async(tile + r * kBandTile + e, from);
      } else {
        const Vector<T, kAccess> values = load<kAccess>(from);
#pragma unroll
        for (int j = 0; j < kAccess; ++j) {
          tile[r * kBandTile + (kChannelsLast ? e + j : (x + j) * kChannels + c)] = values.at[j];
        }
      }
    }
    copy_async_commit();
#pragma unroll 1
    for (int i = tid; i < conv.level_count * sources; i += threads) {
      const int l = i / sources, source = first - conv.padding + i - l * sources;
      if (source >= 0 && source < height) {
        const Tap tap = tap_of(source, height, conv.levels[l].bins, conv.align_corners);
        fractions[i] = tap.lower == tap.upper ? 0.0f : tap.fraction;
      }
    }
    copy_async_wait<0>();
    __syncthreads();

#pragma unroll 1
    for (int pair = tid / kWarp; pair < conv.level_count * k; pair += threads / kWarp) {
      const int l = pair / k, dy = pair - l * k, shift = dy - conv.padding, bins = conv.levels[l].bins;
      const int first_band = conv.levels[l].first_band + dy;
      const float* const weights = fractions + l * sources + conv.padding - first;
      const T* const column = tile + lane * kQuad;
      float top[kQuad] = {}, bottom[kQuad] = {};
      int cell = 0;  // `top` is its band, `bottom` the next one's
      const int before = min(first + shift, height) - 1;  // the last source of the chunks before
      if (first > 0 && before >= 0) {
        cell = bilinear_tap(before, height, bins, conv.align_corners).lower;
        const float* const of_cell = band_at(first_band + cell * k);
        const float* const of_next = band_at(first_band + (cell + 1) * k);
#pragma unroll
        for (int e = 0; e < kQuad; ++e) {
          if (e < valid) {
            top[e] = of_cell[e];
            bottom[e] = cell + 1 < bins ? of_next[e] : 0;
          }
        }
      }
      const int end = min(first + rows + shift, height);
#pragma unroll 1
      for (int source = max(first + shift, 0); source < end;) {
        const int lower = bilinear_tap(source, height, bins, conv.align_corners).lower;
#pragma unroll 1
        for (; cell < lower; ++cell) {
          keep(first_band + cell * k, top);
#pragma unroll
          for (int e = 0; e < kQuad; ++e) {
            top[e] = bottom[e];
            bottom[e] = 0;
          }
        }
        const int stop = min(end, tap_start(cell + 1, height, bins, conv.align_corners));
#pragma unroll 4
        for (; source < stop; ++source) {
          const float fraction = weights[source];
          const Vector<T, kQuad> values = load<kQuad>(column + (source - shift - first) * kBandTile);
#pragma unroll
          for (int e = 0; e < kQuad; ++e) {
            const float value = to_float(values.at[e]);
            top[e] += (1 - fraction) * value;
            bottom[e] += fraction * value;
          }
        }
        if (height == bins) {  // no pixel has two cells: `bottom` is 0, or NaN like `top`
#pragma unroll
          for (int e = 0; e < kQuad; ++e) {
            bottom[e] = 0;
          }
        }
      }
      keep(first_band + cell * k, top);
      if (++cell < bins) {
        keep(first_band + cell * k, bottom);
      }
      if (first + rows == conv.rows) {
        constexpr float kNothing[kQuad] = {};
#pragma unroll 1
        for (++cell; cell < bins; ++cell) {  // no row samples these
          keep(first_band + cell * k, kNothing);
        }
      }
    }
  }
}

// Grid       a tile of kWarp vectors of channels of one band of one image; tiles beside each other
// Tile       each warp takes a cell and a dx and walks the pixels that sample it
// Traffic    the bands read once, and from L1 again for each dx and both of a pixel's cells; N * S * k*k * O written
// Registers  66 (sm_80), 72 (sm_90) for vectors, no spills
template <int kLength>
__global__ void __launch_bounds__(kTapsThreads, 3)
    pyramid_conv2d_backward_taps_kernel(const __grid_constant__ Conv2d conv, const float* bands, float* taps, int tiles) {
  const int tid = static_cast<int>(threadIdx.x), k = conv.kernel_size;
  const int o = (static_cast<int>(blockIdx.x % static_cast<unsigned>(tiles)) * kWarp + tid % kWarp) * kLength;
  if (o >= conv.channels) {
    return;
  }
  const int64_t image_band = blockIdx.x / static_cast<unsigned>(tiles), n = image_band / conv.bands;
  const int band = static_cast<int>(image_band - n * conv.bands);
  int l = 0;
  while (l + 1 < conv.level_count && band >= conv.levels[l + 1].first_band) {
    ++l;
  }
  const Level& level = conv.levels[l];
  const int i = (band - level.first_band) / k, dy = (band - level.first_band) % k;
  const float* const from = bands + image_band * conv.columns * conv.channels + o;
#pragma unroll 1
  for (int item = tid / kWarp; item < level.bins * k; item += kTapsThreads / kWarp) {
    const int j = item / k, dx = item - j * k, shift = dx - conv.padding;
    const Support support = support_of(j, conv.width, level.bins, conv.align_corners);
    float sum[kLength] = {};
    const auto add = [&](int begin, int end, auto weight_of) {
#pragma unroll 4
      for (int source = max(begin, shift); source < min(end, conv.columns + shift); ++source) {
        const Vector<float, kLength> values = load<kLength>(from + static_cast<int64_t>(source - shift) * conv.channels);
        const float weight = weight_of(source);
#pragma unroll
        for (int e = 0; e < kLength; ++e) {
          sum[e] += weight * values.at[e];
        }
      }
    };
    // The last cell is its own upper one: there a pixel has it whole.
    add(support.upper_begin, support.lower_begin, [&](int source) {
      return upper_weight(source, j - 1, conv.width, level.bins, conv.align_corners);
    });
    add(support.lower_begin, support.lower_end, [&](int source) {
      return j + 1 == level.bins ? 1.0f : 1 - upper_weight(source, j, conv.width, level.bins, conv.align_corners);
    });
    Vector<float, kLength> value;
#pragma unroll
    for (int e = 0; e < kLength; ++e) {
      value.at[e] = sum[e];
    }
    store(taps + taps_row(conv, n, level.first_cell + i * level.bins + j, dy, dx) + o, value);
  }
}

}  // namespace pspnet_fast::cuda::conv2d
