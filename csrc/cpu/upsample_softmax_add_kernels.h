// The kernels of upsample_softmax_add, compiled once for each instruction set (vec.h).
#pragma once

#include "cpu/exp.h"
#include "cpu/upsample_softmax_add.h"

namespace pspnet_fast {
namespace {

constexpr int64_t kLineFloats = 16;  // of a cache line

// Each product by itself, so that Inf and NaN go where torch's go.
template <class V>
inline V between(V lower, V upper, V fraction) {
  return fma(fraction, upper, (1 - fraction) * lower);
}

// One row of nodes of a window, blended from two, as [class][column].
template <class T>
void blend_nodes(const UpsampleSoftmaxAdd& a, int64_t m, const TapRun& run, Accumulator<T> fraction,
                 Accumulator<T>* nodes) {
  using A = Accumulator<T>;
  const Vec<A> down = splat(fraction);
  const int64_t window = m * a.classes * a.rows * a.columns;
  if (a.channels_last) {
    const T* const lower = static_cast<const T*>(a.logits) + window + run.lower * a.columns * a.classes;
    const T* const upper = static_cast<const T*>(a.logits) + window + run.upper * a.columns * a.classes;
    for (int64_t column = 0; column < a.columns; ++column) {
      for_each_vector<T>(a.classes, [&](int64_t k, auto part) {
        const int64_t at = column * a.classes + k;
        const Vec<A> blended = between(load(lower + at, part), load(upper + at, part), down);
        for (int64_t lane = 0; lane < kLanes<A> && k + lane < a.classes; ++lane) {
          nodes[(k + lane) * a.column_pitch + column] = blended[lane];
        }
      });
    }
    return;
  }
  for (int64_t k = 0; k < a.classes; ++k) {
    const T* const plane = static_cast<const T*>(a.logits) + window + k * a.rows * a.columns;
    for_each_vector<T>(a.columns, [&](int64_t column, auto part) {
      store(nodes + k * a.column_pitch + column, between(load(plane + run.lower * a.columns + column, part),
                                                         load(plane + run.upper * a.columns + column, part), down),
            part);
    });
  }
}

// Exponentials of the pixels [begin, end), relative to the largest value, as [class][pixel - begin], and what makes
// probabilities of them. `run` is the first that has pixels here. `to`, where they will be added, is called into the cache.
template <class A>
void exponentials(const UpsampleSoftmaxAdd& a, const A* nodes, const A* fraction, const TapRun* run, int64_t begin,
                  int64_t end, const float* to, A* pixels, A* scale) {
  const int64_t count = end - begin;
  for (int64_t k = 0; k < a.classes; ++k) {
    const A* const node = nodes + k * a.column_pitch;
    A* const row = pixels + k * kSoftmaxPitch - begin;
    // Runs are written in order: what spills over a run's end is overwritten by the next.
    for (const TapRun* r = run; r < a.column_taps.runs + a.column_taps.run_count && r->begin < end; ++r) {
      const Vec<A> lower = splat(node[r->lower]), upper = splat(node[r->upper]);
      const int64_t last = r->end < end ? r->end : end;
      for (int64_t w = r->begin > begin ? r->begin : begin; w < last; w += kLanes<A>) {
        store(row + w, between(lower, upper, load(fraction + w)));
      }
    }
    for (int64_t w = 0; w < count + kLineFloats; w += kLineFloats) {
      __builtin_prefetch(to + k * a.total_height * a.total_width + (w < count ? w : count - 1), 1);
    }
  }
  for (int64_t w = 0; w < count; w += kLanes<A>) {
    Vec<A> largest = load(pixels + w);
    for (int64_t k = 1; k < a.classes; ++k) {
      const Vec<A> value = load(pixels + k * kSoftmaxPitch + w);
      largest = value > largest ? value : largest;
    }
    Vec<A> sum{};
    for (int64_t k = 0; k < a.classes; ++k) {
      A* const value = pixels + k * kSoftmaxPitch + w;
      const Vec<A> power = exp<A>(load(value) - largest);
      store(value, power);
      sum += power;
    }
    store(scale + w, splat(static_cast<A>(a.weight)) / sum);
  }
}

template <class A>
void add_products(const A* from, const A* scale, int64_t count, float* to) {
  if constexpr (sizeof(A) == sizeof(float)) {
    for_each_vector<A>(count, [&](int64_t w, auto part) {
      store(to + w, fma(load(from + w), load(scale + w), load(to + w, part)), part);
    });
  } else {
    for (int64_t w = 0; w < count; ++w) {
      to[w] += static_cast<float>(from[w] * scale[w]);
    }
  }
}

}  // namespace

namespace PSPNET_FAST_CAPABILITY {

// Grid     rows of the total
// Tile     window after window that has this row: its nodes blended along H, then kSoftmaxTile pixels at a time all classes
//          blended along W, exponentials with pixels as lanes, and the products added to the total
// Traffic  the logits read once for each of their rows of pixels (cached), the total read and written
void upsample_softmax_add_forward(const UpsampleSoftmaxAdd& a, int64_t begin, int64_t end, void* scratch) {
  with_dtype(a.dtype, [&](auto zero) {
    using T = decltype(zero);
    using A = Accumulator<T>;
    A* const nodes = static_cast<A*>(scratch);
    A* const pixels = nodes + a.classes * a.column_pitch;
    A* const scale = pixels + a.classes * kSoftmaxPitch;
    A* const fraction = scale + kSoftmaxPitch;
    for (int64_t w = 0; w < a.pitch; ++w) {
      fraction[w] = w < a.width ? static_cast<A>(a.column_taps.fraction[w]) : A{};
    }
    for (int64_t y = begin; y < end; ++y) {
      for (int64_t m = 0; m < a.windows; ++m) {
        const int64_t h = y - a.corners[2 * m], left = a.corners[2 * m + 1];
        const int64_t first = left < 0 ? -left : 0;
        const int64_t last = a.total_width - left < a.width ? a.total_width - left : a.width;
        if (h < 0 || h >= a.height || first >= last) {
          continue;
        }
        blend_nodes<T>(a, m, *find_run(a.row_taps, h), static_cast<A>(a.row_taps.fraction[h]), nodes);
        const TapRun* run = find_run(a.column_taps, first);
        for (int64_t w = first; w < last; w += kSoftmaxTile) {
          const int64_t tile_end = w + kSoftmaxTile < last ? w + kSoftmaxTile : last;
          float* const to = a.total + y * a.total_width + left + w;
          while (run->end <= w) {
            ++run;
          }
          exponentials(a, nodes, fraction, run, w, tile_end, to, pixels, scale);
          for (int64_t k = 0; k < a.classes; ++k) {
            add_products(pixels + k * kSoftmaxPitch, scale, tile_end - w, to + k * a.total_height * a.total_width);
          }
        }
      }
    }
  });
}

}  // namespace PSPNET_FAST_CAPABILITY
}  // namespace pspnet_fast
