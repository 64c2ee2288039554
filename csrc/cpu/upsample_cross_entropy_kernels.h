// The kernels of upsample_cross_entropy, compiled once for each instruction set (vec.h). Lanes are classes.
//
// A pixel needs one exponential a class: instead of a first pass for the largest class, the interpolation of the cells' own
// largest classes is subtracted, which none exceeds. Where it is so far above that the sum loses digits, the largest class
// is looked for after all; where a cell is not finite, or there is one class and all must be exactly 0, the pixel is computed
// class by class, as written.
//
// Past 300 lines: losses, sums and the gradient are one walk over the pixels with three ends, and the careful walk beside it.
#pragma once

#include "cpu/upsample_cross_entropy.h"
#include "cpu/vec.h"

namespace pspnet_fast {
namespace {

constexpr double kFinite = 1e30;  // logits beyond are treated like infinite ones: class by class

template <class A>
struct ExpConstants;

// Polynomials on [-ln 2 / 2, ln 2 / 2]: a minimax one (Cephes, expf), and the Taylor series up to x^13.
template <>
struct ExpConstants<float> {
  using Integer = int32_t;
  static constexpr float least = -87.0f, shift = 0x1.8p23f, ln2_high = 0.693359375f, ln2_low = -2.12194440e-4f;
  static constexpr float log2_e = 1.44269504088896341f, lost = 1e-25f;
  static constexpr int mantissa = 23;
  static constexpr float terms[] = {1.9875691500e-4f, 1.3981999507e-3f, 8.3334519073e-3f,
                                    4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f};
};
template <>
struct ExpConstants<double> {
  using Integer = int64_t;
  static constexpr double least = -708.0, shift = 0x1.8p52, ln2_high = 6.93145751953125e-1,
                          ln2_low = 1.42860682030941723212e-6, log2_e = 1.44269504088896340736, lost = 1e-250;
  static constexpr int mantissa = 52;
  static constexpr double terms[] = {1 / 6227020800.0, 1 / 479001600.0, 1 / 39916800.0, 1 / 3628800.0, 1 / 362880.0,
                                     1 / 40320.0,      1 / 5040.0,      1 / 720.0,      1 / 120.0,     1 / 24.0,
                                     1 / 6.0,          1 / 2.0};
};

// exp(v) for finite v that is not far above 0, to a few units in the last place; below `least` it is exp(least).
template <class A>
inline Vec<A> exponential(Vec<A> v) {
  using C = ExpConstants<A>;
  using Integers = Vec<typename C::Integer>;
  v = v > C::least ? v : splat(C::least);
  const Vec<A> shifted = fma(v, splat(C::log2_e), splat(C::shift));
  const Vec<A> whole = shifted - C::shift;
  const Vec<A> rest = fma(whole, splat(-C::ln2_low), fma(whole, splat(-C::ln2_high), v));
  Vec<A> sum = splat(C::terms[0]);
  for (size_t i = 1; i < sizeof(C::terms) / sizeof(A); ++i) {
    sum = fma(sum, rest, splat(C::terms[i]));
  }
  sum = fma(sum, rest * rest, rest + 1);
  return (Vec<A>)((Integers)sum + ((Integers)shifted << C::mantissa));
}

inline float exponential(float v) {
  return __builtin_expf(v);
}
inline double exponential(double v) {
  return __builtin_exp(v);
}
inline float logarithm(float v) {
  return __builtin_logf(v);
}
inline double logarithm(double v) {
  return __builtin_log(v);
}

template <class A>
inline A sum_of(Vec<A> v) {
  A sum = 0;
  for (int lane = 0; lane < kLanes<A>; ++lane) {
    sum += v[lane];
  }
  return sum;
}

template <class A>
inline A mix(A lower, A upper, A fraction) {
  return (1 - fraction) * lower + fraction * upper;
}

// Grid     one row of cells
// Tile     a vector of cells x a vector of classes, transposed (NCHW)
// Traffic  reads the logits, writes as many accumulators, classes last and padded with values that vanish
template <class T>
void gather_cells(const UpsampleCrossEntropy& a, int64_t y) {
  using A = Accumulator<T>;
  constexpr int64_t lanes = kLanes<A>;
  const int64_t w = a.cell_columns, plane = a.cell_rows * w;
  const auto logits = static_cast<const T*>(a.logits);
  const auto weight = static_cast<const A*>(a.weight);
  A* const cells = static_cast<A*>(a.cells) + y * w * a.pitch;
  A* const bounds = static_cast<A*>(a.bounds) + y * w;
  A* const weighted_sums = static_cast<A*>(a.weighted_sums) + y * w;
  if (a.channels_last) {
    for (int64_t x = 0; x < w; ++x) {
      for_each_vector<T>(a.classes, [&](int64_t k, auto count) {
        store(cells + x * a.pitch + k, load(logits + (y * w + x) * a.classes + k, count));
      });
    }
  } else {
    for (int64_t k = 0; k < a.classes; k += lanes) {
      for (int64_t x = 0; x < w; x += lanes) {
        const int64_t columns = w - x < lanes ? w - x : lanes;
        Vec<A> tile[lanes];
        for (int64_t i = 0; i < lanes; ++i) {
          const T* const from = logits + (k + i) * plane + y * w + x;
          tile[i] = k + i >= a.classes ? Vec<A>{} : columns == lanes ? load(from) : load(from, columns);
        }
        transpose<A>(tile);
        for (int64_t i = 0; i < columns; ++i) {
          store(cells + (x + i) * a.pitch + k, tile[i]);
        }
      }
    }
  }
  for (int64_t x = 0; x < w; ++x) {
    A* const cell = cells + x * a.pitch;
    for (int64_t k = a.classes; k < a.pitch; ++k) {
      cell[k] = static_cast<A>(-kFinite);
    }
    Vec<A> largest = load(cell);
    bool finite = true;
    for (int64_t k = 0; k < a.pitch; k += lanes) {
      const Vec<A> v = load(cell + k);
      largest = v > largest ? v : largest;
      const auto inside = (v >= static_cast<A>(-kFinite)) & (v <= static_cast<A>(kFinite));
      for (int lane = 0; lane < lanes; ++lane) {
        finite &= inside[lane] != 0;
      }
    }
    bounds[x] = largest[0];
    for (int lane = 1; lane < lanes; ++lane) {
      bounds[x] = largest[lane] > bounds[x] ? largest[lane] : bounds[x];
    }
    bounds[x] = finite && a.classes > 1 ? bounds[x] : static_cast<A>(__builtin_nan(""));
    if (a.label_smoothing != 0) {
      A sum = 0;
      for (int64_t k = 0; k < a.classes; ++k) {
        sum += (weight == nullptr ? A{1} : weight[k]) * cell[k];
      }
      weighted_sums[x] = sum;
    }
  }
}

// One output row: its cells, blended from two rows of cells.
template <class A>
struct BlendedRow {
  A* cells;            // (w, pitch)
  A* bounds;           // (w)
  A* weighted_sums;    // (w)
  A* gradient;         // (w, pitch)
  A* smoothing;        // (w): of the smoothed target, what each cell's gradient lacks, times w[c]
  A* exponentials;     // (kMostColumns, pitch)
};

template <class A>
void blend_row(const UpsampleCrossEntropy& a, const RowRun& run, A f, const BlendedRow<A>& row) {
  const int64_t w = a.cell_columns, length = w * a.pitch;
  const auto blend = [&](const void* from, int64_t count, A* to) {
    const A* const lower = static_cast<const A*>(from) + run.lower * count;
    const A* const upper = static_cast<const A*>(from) + run.upper * count;
    for_each_vector<A>(count, [&](int64_t i, auto lanes) {
      store(to + i, fma(splat(f), load(upper + i, lanes), splat(1 - f) * load(lower + i, lanes)), lanes);
    });
  };
  blend(a.cells, length, row.cells);
  blend(a.bounds, w, row.bounds);
  if (a.label_smoothing != 0) {
    blend(a.weighted_sums, w, row.weighted_sums);
  }
}

// The exponentials of left + f (right - left) - bound, and their sum.
template <class A>
inline A exponentials(const A* left, const A* right, A f, A bound, int64_t pitch, A* to) {
  Vec<A> sum{};
  for (int64_t k = 0; k < pitch; k += kLanes<A>) {
    const Vec<A> l = load(left + k), e = exponential<A>(fma(splat(f), load(right + k) - l, l) - bound);
    store(to + k, e);
    sum += e;
  }
  return sum_of<A>(sum);
}

template <class A>
inline A largest(const A* left, const A* right, A f, int64_t classes) {
  A most = left[0] + f * (right[0] - left[0]);
  for (int64_t k = 1; k < classes; ++k) {
    const A v = left[k] + f * (right[k] - left[k]);
    most = v > most ? v : most;
  }
  return most;
}

// As torch does it: the largest class, NaN if there is one, then the exponentials. With them how far the classes stand below
// the largest: the target, and all of them together, weighted.
template <class A>
struct Below {
  A target, all;
};

template <class A>
inline A exponentials_as_written(const UpsampleCrossEntropy& a, const A* left, const A* right, A f, int64_t target,
                                 A* to, Below<A>& below) {
  const auto weight = static_cast<const A*>(a.weight);
  A most = mix(left[0], right[0], f);
  for (int64_t k = 0; k < a.pitch; ++k) {
    to[k] = k < a.classes ? mix(left[k], right[k], f) : 0;
    most = k < a.classes && !(to[k] <= most) ? to[k] : most;
  }
  A sum = 0;
  below.all = 0;
  for (int64_t k = 0; k < a.classes; ++k) {
    const A distance = most - to[k];
    below.target = k == target ? distance : below.target;
    below.all += weight == nullptr ? distance : weight[k] * distance;
    to[k] = exponential(-distance);
    sum += to[k];
  }
  return sum;
}

// A pixel that counts, once its exponentials are known.
template <class A>
struct Pixel {
  A fraction, factor;  // factor: of the exponentials, in the gradient
};

// gradient of both cells += factor (1 - f, f) exponentials, over a run's pixels: sums stay in registers, a few vectors of
// classes at a time.
template <class A, int kVectors>
inline void add_gradient(const Pixel<A>* pixels, int64_t count, const A* exponentials, int64_t pitch, A* left, A* right) {
  constexpr int64_t lanes = kLanes<A>;
  Vec<A> to_left[kVectors] = {}, to_right[kVectors] = {};
  for (int64_t p = 0; p < count; ++p) {
    const Vec<A> upper = splat(pixels[p].factor * pixels[p].fraction);
    const Vec<A> lower = splat(pixels[p].factor * (1 - pixels[p].fraction));
    for (int i = 0; i < kVectors; ++i) {
      const Vec<A> e = load(exponentials + p * pitch + i * lanes);
      to_left[i] = fma(lower, e, to_left[i]);
      to_right[i] = fma(upper, e, to_right[i]);
    }
  }
  for (int i = 0; i < kVectors; ++i) {
    store(left + i * lanes, load(left + i * lanes) + to_left[i]);
    store(right + i * lanes, load(right + i * lanes) + to_right[i]);
  }
}

template <class A>
void walk_row(const UpsampleCrossEntropy& a, int64_t h, const BlendedRow<A>& row, UnitSums& sums) {
  constexpr int64_t lanes = kLanes<A>;
  const auto weight = static_cast<const A*>(a.weight);
  const A smoothing = static_cast<A>(a.label_smoothing), each = smoothing / static_cast<A>(a.classes);
  const A weight_sum = static_cast<A>(a.weight_sum);
  for (int64_t r = 0; r < a.column_run_count; ++r) {
    const ColumnRun& run = a.columns[r];
    const A *const left = row.cells + run.lower * a.pitch, *const right = row.cells + run.upper * a.pitch;
    Pixel<A> pixels[kMostColumns];
    int64_t counted = 0;
    for (int64_t x = run.begin; x < run.end; ++x) {
      const int64_t at = h * a.width + x;
      const int64_t target = a.target_is_bytes ? static_cast<const uint8_t*>(a.target)[at]
                                               : static_cast<const int64_t*>(a.target)[at];
      const A g = a.pixel_weight == nullptr ? A{1} : static_cast<const A*>(a.pixel_weight)[at];
      if (target == a.ignore_index || target < 0 || target >= a.classes || g == 0) {
        if (a.losses != nullptr) {
          static_cast<A*>(a.losses)[at] = 0;
        }
        continue;
      }
      const A f = static_cast<A>(a.column_fraction[x]);
      A* const e = row.exponentials + counted * a.pitch;
      A bound = mix(row.bounds[run.lower], row.bounds[run.upper], f), sum;
      Below<A> below{};
      if (bound == bound) {
        sum = exponentials(left, right, f, bound, a.pitch, e);
        if (!(sum > ExpConstants<A>::lost)) {
          bound = largest(left, right, f, a.classes);
          sum = exponentials(left, right, f, bound, a.pitch, e);
        }
        below.target = bound - (left[target] + f * (right[target] - left[target]));
        if (smoothing != 0) {
          below.all = weight_sum * bound - mix(row.weighted_sums[run.lower], row.weighted_sums[run.upper], f);
        }
      } else {
        sum = exponentials_as_written(a, left, right, f, target, e, below);
      }
      const A target_weight = weight == nullptr ? A{1} : weight[target];
      const A of_target = (1 - smoothing) * target_weight, all = of_target + each * weight_sum;
      A loss = all * logarithm(sum) + of_target * below.target;
      if (smoothing != 0) {
        loss += each * below.all;
      }
      if (a.losses != nullptr) {
        static_cast<A*>(a.losses)[at] = loss;
      }
      sums.loss += static_cast<double>(g * loss);
      sums.weight += static_cast<double>(g * target_weight);
      sums.count += 1;
      if (a.partials != nullptr) {
        e[target] -= all == 0 ? 0 : of_target / all * sum;
        row.smoothing[run.lower] += (1 - f) * g * each;
        row.smoothing[run.upper] += f * g * each;
        pixels[counted++] = {f, g * all / sum};
      }
    }
    if (counted > 0) {
      A *const to_left = row.gradient + run.lower * a.pitch, *const to_right = row.gradient + run.upper * a.pitch;
      int64_t k = 0;
      for (; k + 4 * lanes <= a.pitch; k += 4 * lanes) {
        add_gradient<A, 4>(pixels, counted, row.exponentials + k, a.pitch, to_left + k, to_right + k);
      }
      for (; k < a.pitch; k += lanes) {
        add_gradient<A, 1>(pixels, counted, row.exponentials + k, a.pitch, to_left + k, to_right + k);
      }
    }
  }
}

// Grid     a run of output rows between the same two rows of cells
// Tile     an output row: its cells blended once, then runs of pixels between the same two of them
// Traffic  reads the target and two rows of cells a run (cached); writes two rows of the gradient, or the losses
template <class T>
void walk_rows(const UpsampleCrossEntropy& a, int64_t unit, Accumulator<T>* memory) {
  using A = Accumulator<T>;
  const int64_t w = a.cell_columns, length = w * a.pitch;
  const auto weight = static_cast<const A*>(a.weight);
  const BlendedRow<A> row{memory,
                          memory + 2 * length + kMostColumns * a.pitch,
                          memory + 2 * length + kMostColumns * a.pitch + w,
                          memory + length,
                          memory + 2 * length + kMostColumns * a.pitch + 2 * w,
                          memory + 2 * length};
  const RowRun& run = a.rows[unit];
  A* const lower = a.partials == nullptr ? nullptr : static_cast<A*>(a.partials) + 2 * unit * length;
  if (lower != nullptr) {
    clear(lower, 2 * length);
  }
  UnitSums sums{};
  for (int64_t h = run.begin; h < run.end; ++h) {
    const A f = static_cast<A>(a.row_fraction[h]);
    blend_row(a, run, f, row);
    if (lower == nullptr) {
      walk_row(a, h, row, sums);
      continue;
    }
    clear(row.gradient, length);
    clear(row.smoothing, w);
    walk_row(a, h, row, sums);
    for (int64_t x = 0; x < w; ++x) {
      A* const gradient = row.gradient + x * a.pitch;
      if (row.smoothing[x] != 0) {
        for (int64_t k = 0; k < a.classes; ++k) {
          gradient[k] -= row.smoothing[x] * (weight == nullptr ? A{1} : weight[k]);
        }
      }
      for (int64_t k = 0; k < a.pitch; k += kLanes<A>) {
        A *const to_lower = lower + x * a.pitch + k, *const to_upper = to_lower + length;
        store(to_lower, fma(splat(1 - f), load(gradient + k), load(to_lower)));
        store(to_upper, fma(splat(f), load(gradient + k), load(to_upper)));
      }
    }
  }
  a.sums[unit] = sums;
}

// Grid     one row of cells
// Tile     a vector of cells x a vector of classes, transposed (NCHW)
// Traffic  reads the partial rows of the runs on both sides, always in the same order; writes the gradient
template <class T>
void combine_partials(const UpsampleCrossEntropy& a, int64_t y) {
  using A = Accumulator<T>;
  constexpr int64_t lanes = kLanes<A>;
  const int64_t w = a.cell_columns, plane = a.cell_rows * w, length = w * a.pitch;
  // The logits are not needed any more: the row of cells takes the sum.
  A* const sum = static_cast<A*>(a.cells) + y * length;
  clear(sum, length);
  for (int64_t unit = 0; unit < a.row_run_count; ++unit) {
    for (int64_t side = 0; side < 2; ++side) {
      if (y == (side == 0 ? a.rows[unit].lower : a.rows[unit].upper)) {
        const A* const partial = static_cast<const A*>(a.partials) + (2 * unit + side) * length;
        for (int64_t i = 0; i < length; i += lanes) {
          store(sum + i, load(sum + i) + load(partial + i));
        }
      }
    }
  }
  const auto gradient = static_cast<A*>(a.gradient);
  if (a.channels_last) {
    for (int64_t x = 0; x < w; ++x) {
      for_each_vector<A>(a.classes, [&](int64_t k, auto count) {
        store(gradient + (y * w + x) * a.classes + k, load(sum + x * a.pitch + k, count), count);
      });
    }
    return;
  }
  for (int64_t k = 0; k < a.classes; k += lanes) {
    for (int64_t x = 0; x < w; x += lanes) {
      const int64_t columns = w - x < lanes ? w - x : lanes;
      Vec<A> tile[lanes];
      for (int64_t i = 0; i < lanes; ++i) {
        tile[i] = load(sum + (i < columns ? x + i : x) * a.pitch + k);
      }
      transpose<A>(tile);
      for (int64_t i = 0; i < lanes && k + i < a.classes; ++i) {
        store(gradient + (k + i) * plane + y * w + x, tile[i], columns);
      }
    }
  }
}

}  // namespace

namespace PSPNET_FAST_CAPABILITY {

void upsample_cross_entropy_cells(const UpsampleCrossEntropy& a, int64_t begin, int64_t end, void*) {
  with_dtype(a.dtype, [&](auto zero) {
    for (int64_t y = begin; y < end; ++y) {
      gather_cells<decltype(zero)>(a, y);
    }
  });
}

void upsample_cross_entropy_pixels(const UpsampleCrossEntropy& a, int64_t begin, int64_t end, void* scratch) {
  with_dtype(a.dtype, [&](auto zero) {
    using T = decltype(zero);
    for (int64_t unit = begin; unit < end; ++unit) {
      walk_rows<T>(a, unit, static_cast<Accumulator<T>*>(scratch));
    }
  });
}

void upsample_cross_entropy_gradient(const UpsampleCrossEntropy& a, int64_t begin, int64_t end, void*) {
  with_dtype(a.dtype, [&](auto zero) {
    for (int64_t y = begin; y < end; ++y) {
      combine_partials<decltype(zero)>(a, y);
    }
  });
}

}  // namespace PSPNET_FAST_CAPABILITY
}  // namespace pspnet_fast
