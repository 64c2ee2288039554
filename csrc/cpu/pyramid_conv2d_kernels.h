// The kernels of pyramid_conv2d, compiled once for each instruction set (vec.h).
#pragma once

#include "cpu/planes.h"
#include "cpu/pyramid_conv2d.h"

namespace pspnet_fast {
namespace {

// result[v] = the weighted sum i of vectors at from + source * step, all of them whole.
template <int kVectors, class T>
inline void sum_terms(const Sums& sums, int64_t i, const T* from, int64_t step, Vec<Accumulator<T>> (&result)[kVectors]) {
  using A = Accumulator<T>;
  for (int v = 0; v < kVectors; ++v) {
    result[v] = Vec<A>{};
  }
  for (const Term *term = sums.terms + sums.start[i], *end = sums.terms + sums.start[i + 1]; term < end; ++term) {
    const Vec<A> weight = splat(static_cast<A>(term->weight));
    const T* const at = from + term->source * step;
    for (int v = 0; v < kVectors; ++v) {
      result[v] = fma(weight, load(at + v * kLanes<T>), result[v]);
    }
  }
}

// The same of one vector, or of its first lanes.
template <class T, class Part>
inline Vec<Accumulator<T>> sum_terms(const Sums& sums, int64_t i, const T* from, int64_t step, Part part) {
  using A = Accumulator<T>;
  Vec<A> result{};
  for (const Term *term = sums.terms + sums.start[i], *end = sums.terms + sums.start[i + 1]; term < end; ++term) {
    result = fma(splat(static_cast<A>(term->weight)), load(from + term->source * step, part), result);
  }
  return result;
}

// Adds onto what is there, then the folded norm.
template <class T, class Part>
inline void finish(const PyramidConv2dForward& a, T* out, Vec<Accumulator<T>> y, Vec<Accumulator<T>> scale,
                   Vec<Accumulator<T>> shift, Part part) {
  if (a.add) {
    y = y + load(out, part);
  }
  if (a.scale != nullptr) {
    y = y * scale;
  }
  if (a.shift != nullptr) {
    y = y + shift;
  }
  store(out, a.relu ? relu(y) : y, part);
}

// Grid     one block of output channels of one image, `planes` <= a vector's lanes of them
// Tile     each band summed from the taps along W, as vectors along O, transposed to rows along W; then, plane by plane,
//          each row summed from the bands that it meets (21 for bins 1, 2, 3, 6 and k = 3), four vectors at a time
// Traffic  the planes written once, and read once where they are added to
template <class T>
void forward_nchw(const PyramidConv2dForward& a, int64_t n, int64_t o, int64_t planes, Accumulator<T>* bands) {
  using A = Accumulator<T>;
  constexpr int64_t lanes = kLanes<T>;
  const A* const taps = static_cast<const A*>(a.taps) + n * a.cell_taps * a.channels + o;
  for (int64_t band = 0; band < a.band_count; ++band) {  // [band][lanes][pitch]
    const Sums& sums = a.along_w[a.bands[band].level];
    const A* const from = taps + a.bands[band].first * a.channels;
    const auto column = [&](int64_t w) { return sum_terms(sums, w, from, a.channels, planes); };
    const auto whole = [&](int64_t w) { return sum_terms(sums, w, from, a.channels, Full{}); };
    A* const rows = bands + band * lanes * a.pitch;
    planes == lanes ? columns_to_rows(whole, a.columns, rows, a.pitch)
                    : columns_to_rows(column, a.columns, rows, a.pitch);
  }
  for (int64_t plane = 0; plane < planes; ++plane) {
    const A* const rows = bands + plane * a.pitch;
    const Vec<A> scale = splat(a.scale == nullptr ? A{1} : static_cast<const A*>(a.scale)[o + plane]);
    const Vec<A> shift = splat(a.shift == nullptr ? A{0} : static_cast<const A*>(a.shift)[o + plane]);
    T* out = static_cast<T*>(a.out) + (n * a.channels + o + plane) * a.rows * a.columns;
    for (int64_t h = 0; h < a.rows; ++h, out += a.columns) {
      int64_t w = 0;
      for (; w + 3 * lanes < a.columns; w += 4 * lanes) {
        Vec<A> y[4];
        sum_terms(a.along_h, h, rows + w, lanes * a.pitch, y);
        for (int64_t v = 0; v < 3; ++v) {
          finish(a, out + w + v * lanes, y[v], scale, shift, Full{});
        }
        const int64_t left = a.columns - w - 3 * lanes;
        left >= lanes ? finish(a, out + w + 3 * lanes, y[3], scale, shift, Full{})
                      : finish(a, out + w + 3 * lanes, y[3], scale, shift, left);
      }
      for (; w < a.columns; w += lanes) {
        const Vec<A> y = sum_terms(a.along_h, h, rows + w, lanes * a.pitch, Full{});
        const int64_t left = a.columns - w;
        finish(a, out + w, y, scale, shift, left < lanes ? left : lanes);
      }
    }
  }
}

// Grid     `count` output channels of one image
// Tile     each band summed from the taps along W; then, pixel by pixel, the sum of the bands that its row meets
// Traffic  the channels written once, and read once where they are added to
template <class T>
void forward_channels_last(const PyramidConv2dForward& a, int64_t n, int64_t o, int64_t count, Accumulator<T>* bands) {
  using A = Accumulator<T>;
  const A* const taps = static_cast<const A*>(a.taps) + n * a.cell_taps * a.channels + o;
  for (int64_t band = 0; band < a.band_count; ++band) {  // [band][columns][count]
    const Sums& sums = a.along_w[a.bands[band].level];
    for (int64_t w = 0; w < a.columns; ++w) {
      for_each_vector<A>(count, [&](int64_t c, auto part) {
        const A* const from = taps + a.bands[band].first * a.channels + c;
        store(bands + (band * a.columns + w) * count + c, sum_terms(sums, w, from, a.channels, part), part);
      });
    }
  }
  T* out = static_cast<T*>(a.out) + n * a.rows * a.columns * a.channels + o;
  for (int64_t h = 0; h < a.rows; ++h) {
    for (int64_t w = 0; w < a.columns; ++w, out += a.channels) {
      for_each_vector<T>(count, [&](int64_t c, auto part) {
        const Vec<A> y = sum_terms(a.along_h, h, bands + w * count + c, a.columns * count, part);
        const Vec<A> scale = a.scale == nullptr ? Vec<A>{} : load(static_cast<const A*>(a.scale) + o + c, part);
        const Vec<A> shift = a.shift == nullptr ? Vec<A>{} : load(static_cast<const A*>(a.shift) + o + c, part);
        finish(a, out + c, y, scale, shift, part);
      });
    }
  }
}

// The taps' gradient of one band, from its sums along H as `columns` of vectors along O, `step` apart.
template <class T>
inline void collect_band(const PyramidConv2dBackward& a, int64_t n, int64_t o, int64_t count, const Band& band,
                         const Accumulator<T>* columns, int64_t step) {
  using A = Accumulator<T>;
  A* const taps = static_cast<A*>(a.taps) + (n * a.cell_taps + band.first) * a.channels + o;
  for (int64_t j = 0; j < band.bins; ++j) {
    for (int64_t dx = 0; dx < a.kernel_size; ++dx) {
      A* const to = taps + (j * a.kernel_size * a.kernel_size + dx) * a.channels;
      for_each_vector<A>(count, [&](int64_t c, auto part) {
        store(to + c, sum_terms(a.along_w[band.level], j * a.kernel_size + dx, columns + c, step, part), part);
      });
    }
  }
}

// Grid     one block of output channels of one image, `planes` <= a vector's lanes of them
// Tile     each plane's rows summed into bands, along W; then, for all planes at once, each band transposed to vectors
//          along O and summed into its taps
// Traffic  the planes read once
template <class T>
void backward_nchw(const PyramidConv2dBackward& a, int64_t n, int64_t o, int64_t planes, Accumulator<T>* bands) {
  using A = Accumulator<T>;
  constexpr int64_t lanes = kLanes<T>;
  A* const columns = bands + a.band_count * lanes * a.pitch;  // [pitch][lanes]
  for (int64_t plane = 0; plane < planes; ++plane) {
    const T* const grad = static_cast<const T*>(a.grad) + (n * a.channels + o + plane) * a.rows * a.columns;
    for (int64_t band = 0; band < a.band_count; ++band) {
      A* const row = bands + (band * lanes + plane) * a.pitch;
      int64_t w = 0;
      for (; w + 4 * lanes <= a.columns; w += 4 * lanes) {
        Vec<A> sums[4];
        sum_terms(a.along_h, band, grad + w, a.columns, sums);
        for (int64_t v = 0; v < 4; ++v) {
          store(row + w + v * lanes, sums[v]);
        }
      }
      for (; w + lanes <= a.columns; w += lanes) {
        store(row + w, sum_terms(a.along_h, band, grad + w, a.columns, Full{}));
      }
      if (w < a.columns) {
        store(row + w, sum_terms(a.along_h, band, grad + w, a.columns, a.columns - w));
      }
    }
  }
  for (int64_t band = 0; band < a.band_count; ++band) {
    rows_to_columns(bands + band * lanes * a.pitch, a.pitch, planes, a.columns, columns);
    collect_band<T>(a, n, o, planes, a.bands[band], columns, lanes);
  }
}

// Grid     `count` output channels of one image
// Tile     column by column of pixels, the sum of every band; then each band summed into its taps
// Traffic  the channels read once
template <class T>
void backward_channels_last(const PyramidConv2dBackward& a, int64_t n, int64_t o, int64_t count, Accumulator<T>* bands) {
  using A = Accumulator<T>;
  const T* grad = static_cast<const T*>(a.grad) + n * a.rows * a.columns * a.channels + o;
  for (int64_t w = 0; w < a.columns; ++w, grad += a.channels) {
    for (int64_t band = 0; band < a.band_count; ++band) {  // [band][columns][count]
      for_each_vector<T>(count, [&](int64_t c, auto part) {
        const Vec<A> sum = sum_terms(a.along_h, band, grad + c, a.columns * a.channels, part);
        store(bands + (band * a.columns + w) * count + c, sum, part);
      });
    }
  }
  for (int64_t band = 0; band < a.band_count; ++band) {
    collect_band<T>(a, n, o, count, a.bands[band], bands + band * a.columns * count, count);
  }
}

}  // namespace

namespace PSPNET_FAST_CAPABILITY {

void pyramid_conv2d_forward(const PyramidConv2dForward& a, int64_t begin, int64_t end, void* scratch) {
  with_dtype(a.dtype, [&](auto zero) {
    using T = decltype(zero);
    const auto memory = static_cast<Accumulator<T>*>(scratch);
    for_each_stretch(begin, end, a.channels, a.channels_last ? kConv2dChannels : kLanes<T>,
                     [&](int64_t n, int64_t o, int64_t count) {
                       a.channels_last ? forward_channels_last<T>(a, n, o, count, memory)
                                       : forward_nchw<T>(a, n, o, count, memory);
                     });
  });
}

void pyramid_conv2d_backward(const PyramidConv2dBackward& a, int64_t begin, int64_t end, void* scratch) {
  with_dtype(a.dtype, [&](auto zero) {
    using T = decltype(zero);
    const auto memory = static_cast<Accumulator<T>*>(scratch);
    for_each_stretch(begin, end, a.channels, a.channels_last ? kConv2dChannels : kLanes<T>,
                     [&](int64_t n, int64_t o, int64_t count) {
                       a.channels_last ? backward_channels_last<T>(a, n, o, count, memory)
                                       : backward_nchw<T>(a, n, o, count, memory);
                     });
  });
}

}  // namespace PSPNET_FAST_CAPABILITY
}  // namespace pspnet_fast
