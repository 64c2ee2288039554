// The kernels of upsample_concat, compiled once for each instruction set (vec.h).
#pragma once

#include "cpu/planes.h"
#include "cpu/upsample_concat.h"

namespace pspnet_fast {
namespace {

template <class V, class A>
inline V blend(V lower, V upper, A fraction) {
  return fma(splat(fraction), upper, splat(1 - fraction) * lower);
}

// Calls body(n, level, first channel, count) for stretches of at most `most` channels of a level.
template <class Body>
inline void for_each_level_stretch(const UpsampleConcat& a, int64_t begin, int64_t end, int64_t most, Body body) {
  for_each_stretch(begin, end, a.reduced, most, [&](int64_t group, int64_t r, int64_t count) {
    body(group / a.level_count, a.levels[group % a.level_count], r, count);
  });
}

// Grid     one block of a level's channels of one image, `planes` <= a vector's lanes of them
// Tile     each row of cells blended along W, as vectors along C, transposed to rows along W; then, plane by plane,
//          each row of pixels blended from two of these rows
// Traffic  the planes written once
template <class T>
void forward_nchw(const UpsampleConcatForward& a, int64_t n, const UpsampleLevel& level, int64_t r, int64_t planes,
                  Accumulator<T>* scratch) {
  using A = Accumulator<T>;
  constexpr int64_t lanes = kLanes<T>;
  const int64_t b = level.bins, plane_size = a.height * a.width;
  A* const rows = scratch;                       // [b][lanes][pitch]
  A* const cells = rows + b * lanes * a.pitch;   // [b * b][lanes]
  const T* const pyramid = static_cast<const T*>(a.pyramid) + (n * a.cell_count + level.first_cell) * a.reduced + r;
  for (int64_t cell = 0; cell < b * b; ++cell) {
    store(cells + cell * lanes, load(pyramid + cell * a.reduced, planes));
  }
  for (int64_t i = 0; i < b; ++i) {
    const TapRun* run = level.columns.runs;
    const auto column = [&](int64_t w) {
      run += w == run->end;
      return blend(load(cells + (i * b + run->lower) * lanes), load(cells + (i * b + run->upper) * lanes),
                   static_cast<A>(level.columns.fraction[w]));
    };
    columns_to_rows(column, a.width, rows + i * lanes * a.pitch, a.pitch);
  }

  const int64_t whole = (a.width + lanes - 1) / lanes * lanes;
  for (int64_t plane = 0; plane < planes; ++plane) {
    T* const out = static_cast<T*>(a.out) + (n * a.total_channels + level.first_channel + r + plane) * plane_size;
    for (int64_t i = 0; i < level.rows.run_count; ++i) {
      const TapRun& run = level.rows.runs[i];
      const A* const lower = rows + (run.lower * lanes + plane) * a.pitch;
      const A* const upper = rows + (run.upper * lanes + plane) * a.pitch;
      for (int64_t h = run.begin; h < run.end; ++h) {
        const A fraction = static_cast<A>(level.rows.fraction[h]);
        // Rows are written in order: what spills over a row's end is overwritten by the next row.
        for_each_vector<T>(h * a.width + whole <= plane_size ? whole : a.width, [&](int64_t w, auto part) {
          store(out + h * a.width + w, blend(load(lower + w), load(upper + w), fraction), part);
        });
      }
    }
  }
}

// Grid     pixels [begin, end), image after image
// Tile     at the start of each row of pixels, every level's two rows of cells blended to one; then, pixel by pixel,
//          x's channels copied and every level's blended from two columns of that row
// Traffic  x read once, the concatenation written once; without x, the levels' channels alone
template <class T>
void forward_channels_last(const UpsampleConcatForward& a, int64_t begin, int64_t end, Accumulator<T>* columns) {
  using A = Accumulator<T>;
  for (int64_t row = begin / a.width; row * a.width < end; ++row) {
    const int64_t n = row / a.height, h = row % a.height;
    A* blended = columns;  // level by level [b][reduced]
    for (int64_t k = 0; k < a.level_count; ++k) {
      const UpsampleLevel& level = a.levels[k];
      const TapRun& run = *find_run(level.rows, h);
      const T* const pyramid = static_cast<const T*>(a.pyramid) + (n * a.cell_count + level.first_cell) * a.reduced;
      const T* const lower = pyramid + run.lower * level.bins * a.reduced;
      const T* const upper = pyramid + run.upper * level.bins * a.reduced;
      const A fraction = static_cast<A>(level.rows.fraction[h]);
      for_each_vector<T>(level.bins * a.reduced, [&](int64_t i, auto part) {
        store(blended + i, blend(load(lower + i, part), load(upper + i, part), fraction), part);
      });
      blended += level.bins * a.reduced;
    }
    const int64_t first = begin > row * a.width ? begin - row * a.width : 0;
    const int64_t last = end < (row + 1) * a.width ? end - row * a.width : a.width;
    for (int64_t w = first; w < last; ++w) {
      const int64_t pixel = row * a.width + w;
      T* const out = static_cast<T*>(a.out) + pixel * a.total_channels;
      if (a.x_channels > 0) {
        std::memcpy(out + a.x_first_channel, static_cast<const T*>(a.x) + pixel * a.x_channels,
                    static_cast<size_t>(a.x_channels) * sizeof(T));
      }
      const A* level_columns = columns;
      for (int64_t k = 0; k < a.level_count; ++k) {
        const UpsampleLevel& level = a.levels[k];
        const TapRun& run = *find_run(level.columns, w);
        const A* const lower = level_columns + run.lower * a.reduced;
        const A* const upper = level_columns + run.upper * a.reduced;
        const A fraction = static_cast<A>(level.columns.fraction[w]);
        for_each_vector<T>(a.reduced, [&](int64_t i, auto part) {
          store(out + level.first_channel + i, blend(load(lower + i, part), load(upper + i, part), fraction), part);
        });
        level_columns += level.bins * a.reduced;
      }
    }
  }
}

// Sums of the rows of a run, weighted for its lower and for its upper cell, added to these cells' rows.
template <int kVectors, class T>
inline void add_run(const UpsampleConcat& a, const T* plane, const TapRun& run, const double* fraction, int64_t column,
                    Accumulator<T>* lower, Accumulator<T>* upper) {
  using A = Accumulator<T>;
  constexpr int64_t lanes = kLanes<T>;
  Vec<A> low[kVectors] = {}, high[kVectors] = {};
  for (int64_t h = run.begin; h < run.end; ++h) {
    const Vec<A> f = splat(static_cast<A>(fraction[h])), rest = splat(1 - static_cast<A>(fraction[h]));
    const T* const row = plane + h * a.width + column;
    const bool within = h * a.width + column + kVectors * lanes <= a.height * a.width;
    for (int v = 0; v < kVectors; ++v) {
      const int64_t left = a.width - column - v * lanes;
      const Vec<A> g = within ? load(row + v * lanes) : load(row + v * lanes, left < lanes ? left : lanes);
      low[v] = fma(rest, g, low[v]);
      high[v] = fma(f, g, high[v]);
    }
  }
  for (int v = 0; v < kVectors; ++v) {
    store(lower + column + v * lanes, load(lower + column + v * lanes) + low[v]);
    store(upper + column + v * lanes, load(upper + column + v * lanes) + high[v]);
  }
}

// Grid     one block of a level's channels of one image, `planes` <= a vector's lanes of them
// Tile     a plane's rows summed into one row for each row of cells, along W; then, for all planes at once, transposed
//          to vectors along C and summed into cells
// Traffic  the planes read once
template <class T>
void backward_nchw(const UpsampleConcatBackward& a, int64_t n, const UpsampleLevel& level, int64_t r, int64_t planes,
                   Accumulator<T>* scratch) {
  using A = Accumulator<T>;
  constexpr int64_t lanes = kLanes<T>;
  const int64_t b = level.bins, plane_size = a.height * a.width;
  A* const rows = scratch;                       // [b][lanes][pitch]
  A* const cells = rows + b * lanes * a.pitch;   // [b * b][lanes]
  A* const columns = cells + b * b * lanes;      // [pitch][lanes]
  clear(rows, (b * a.pitch + b * b) * lanes);

  const T* const grad = static_cast<const T*>(a.grad) + (n * a.total_channels + level.first_channel + r) * plane_size;
  for (int64_t plane = 0; plane < planes; ++plane) {
    for (int64_t i = 0; i < level.rows.run_count; ++i) {
      const TapRun& run = level.rows.runs[i];
      A* const lower = rows + (run.lower * lanes + plane) * a.pitch;
      A* const upper = rows + (run.upper * lanes + plane) * a.pitch;
      int64_t column = 0;
      for (; column + 3 * lanes < a.width; column += 4 * lanes) {
        add_run<4>(a, grad + plane * plane_size, run, level.rows.fraction, column, lower, upper);
      }
      for (; column < a.width; column += lanes) {
        add_run<1>(a, grad + plane * plane_size, run, level.rows.fraction, column, lower, upper);
      }
    }
  }

  for (int64_t i = 0; i < b; ++i) {
    rows_to_columns(rows + i * lanes * a.pitch, a.pitch, planes, a.width, columns);
    for (int64_t j = 0; j < level.columns.run_count; ++j) {
      const TapRun& run = level.columns.runs[j];
      Vec<A> low{}, high{};
      for (int64_t w = run.begin; w < run.end; ++w) {
        const A fraction = static_cast<A>(level.columns.fraction[w]);
        const Vec<A> g = load(columns + w * lanes);
        low = fma(splat(1 - fraction), g, low);
        high = fma(splat(fraction), g, high);
      }
      A* const lower = cells + (i * b + run.lower) * lanes;
      A* const upper = cells + (i * b + run.upper) * lanes;
      store(lower, load(lower) + low);
      store(upper, load(upper) + high);
    }
  }
  T* const out = static_cast<T*>(a.out) + (n * a.cell_count + level.first_cell) * a.reduced + r;
  for (int64_t cell = 0; cell < b * b; ++cell) {
    store(out + cell * a.reduced, load(cells + cell * lanes), planes);
  }
}

// lower += (1 - f) g and upper += f g over kPixels pixels, for `count` channels.
template <int kPixels, class T>
inline void add_pixels(const T* grad, int64_t pitch, int64_t count, const double* fraction, Accumulator<T>* lower,
                       Accumulator<T>* upper) {
  using A = Accumulator<T>;
  for_each_vector<T>(count, [&](int64_t c, auto part) {
    Vec<A> low{}, high{};
    for (int i = 0; i < kPixels; ++i) {
      const Vec<A> g = load(grad + i * pitch + c, part);
      low = fma(splat(1 - static_cast<A>(fraction[i])), g, low);
      high = fma(splat(static_cast<A>(fraction[i])), g, high);
    }
    store(lower + c, load(lower + c, part) + low, part);
    store(upper + c, load(upper + c, part) + high, part);
  });
}

// Grid     `count` channels of a level of one image
// Tile     each row of pixels summed into one vector of channels for each column of cells, four pixels at a time; these
//          added to the two rows of cells that the row of pixels samples
// Traffic  the level's channels read once
template <class T>
void backward_channels_last(const UpsampleConcatBackward& a, int64_t n, const UpsampleLevel& level, int64_t r,
                            int64_t count, Accumulator<T>* scratch) {
  using A = Accumulator<T>;
  const int64_t b = level.bins;
  A* const cells = scratch;                   // [b * b][count]
  A* const columns = cells + b * b * count;   // [b][count]
  clear(cells, b * b * count);

  const T* const grad =
      static_cast<const T*>(a.grad) + n * a.height * a.width * a.total_channels + level.first_channel + r;
  for (int64_t i = 0; i < level.rows.run_count; ++i) {
    const TapRun& rows = level.rows.runs[i];
    for (int64_t h = rows.begin; h < rows.end; ++h) {
      clear(columns, b * count);
      for (int64_t j = 0; j < level.columns.run_count; ++j) {
        const TapRun& run = level.columns.runs[j];
        A* const lower = columns + run.lower * count;
        A* const upper = columns + run.upper * count;
        int64_t w = run.begin;
        for (; w + 4 <= run.end; w += 4) {
          add_pixels<4>(grad + (h * a.width + w) * a.total_channels, a.total_channels, count,
                        level.columns.fraction + w, lower, upper);
        }
        for (; w < run.end; ++w) {
          add_pixels<1>(grad + (h * a.width + w) * a.total_channels, a.total_channels, count,
                        level.columns.fraction + w, lower, upper);
        }
      }
      const A fraction = static_cast<A>(level.rows.fraction[h]);
      A* const lower = cells + rows.lower * b * count;
      A* const upper = cells + rows.upper * b * count;
      for_each_vector<A>(b * count, [&](int64_t c, auto part) {
        const Vec<A> g = load(columns + c, part);
        store(lower + c, fma(splat(1 - fraction), g, load(lower + c, part)), part);
        store(upper + c, fma(splat(fraction), g, load(upper + c, part)), part);
      });
    }
  }
  T* const out = static_cast<T*>(a.out) + (n * a.cell_count + level.first_cell) * a.reduced + r;
  for (int64_t cell = 0; cell < b * b; ++cell) {
    for_each_vector<T>(count, [&](int64_t c, auto part) {
      store(out + cell * a.reduced + c, load(cells + cell * count + c, part), part);
    });
  }
}

}  // namespace

namespace PSPNET_FAST_CAPABILITY {

void upsample_concat_forward(const UpsampleConcatForward& a, int64_t begin, int64_t end, void* scratch) {
  with_dtype(a.dtype, [&](auto zero) {
    using T = decltype(zero);
    const auto memory = static_cast<Accumulator<T>*>(scratch);
    if (a.channels_last) {
      forward_channels_last<T>(a, begin, end, memory);
    } else {
      for_each_level_stretch(a, begin, end, kLanes<T>, [&](int64_t n, const auto& level, int64_t r, int64_t planes) {
        forward_nchw<T>(a, n, level, r, planes, memory);
      });
    }
  });
}

void upsample_concat_backward(const UpsampleConcatBackward& a, int64_t begin, int64_t end, void* scratch) {
  with_dtype(a.dtype, [&](auto zero) {
    using T = decltype(zero);
    const auto memory = static_cast<Accumulator<T>*>(scratch);
    for_each_level_stretch(a, begin, end, a.channels_last ? a.reduced : kLanes<T>,
                           [&](int64_t n, const auto& level, int64_t r, int64_t count) {
                             a.channels_last ? backward_channels_last<T>(a, n, level, r, count, memory)
                                             : backward_nchw<T>(a, n, level, r, count, memory);
                           });
  });
}

}  // namespace PSPNET_FAST_CAPABILITY
}  // namespace pspnet_fast
