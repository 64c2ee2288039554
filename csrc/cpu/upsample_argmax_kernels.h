// The kernels of upsample_argmax, compiled once for each instruction set (vec.h).
// Past 300 lines: a cell has a pruned walk, a plain one and a careful one for what is not finite, which share its state.
#pragma once

#include "cpu/exp.h"
#include "cpu/upsample_argmax.h"

namespace pspnet_fast {
namespace {

// Between numbers of at most this size there is no overflow.
template <class A>
constexpr A kLargest = sizeof(A) == 8 ? static_cast<A>(4e307) : static_cast<A>(8e37);

// A class whose largest node is so far below another's smallest adds less than 1e-13 to the sum of exponentials.
constexpr int kNegligible = 30;

// Fewer pixels than this are not worth finding a cell's candidates.
constexpr int64_t kFewPixels = 9;

template <class A>
class Argmax {
 public:
  using I = IntegersOf<A>;
  using Id = std::conditional_t<sizeof(A) == 8, int64_t, int32_t>;
  static constexpr int64_t lanes = kLanes<A>;

  Argmax(const UpsampleArgmax& a, A* scratch) : a_(a) {
    const auto take = [&](int64_t elements) {
      A* const taken = scratch;
      scratch += elements;
      return taken;
    };
    largest_ = take(a.pitch);
    ids_ = reinterpret_cast<Id*>(take(a.pitch));
    nodes_ = take(4 * a.pitch);
    start_ = take(kArgmaxRows * a.pitch);
    step_ = take(kArgmaxRows * a.pitch);
    top_ = take(a.columns * a.pitch);
    bottom_ = take(a.columns * a.pitch);
    top_flags_ = take(a.columns);
    bottom_flags_ = take(a.columns);
    fraction_ = take(a.width + kChannelBlock);
    for (int64_t w = 0; w < a.width + lanes; ++w) {
      fraction_[w] = w < a.width ? static_cast<A>(a.column_taps.fraction[w]) : A{};
    }
  }

  // Rows [begin, end) of labels, image after image.
  template <class T>
  void rows(int64_t begin, int64_t end) {
    while (begin < end) {
      const int64_t n = begin / a_.height, first = begin - n * a_.height;
      const int64_t last = first + end - begin < a_.height ? first + end - begin : a_.height;
      int64_t in_bottom = -1;
      for (const TapRun* run = find_run(a_.row_taps, first);; ++run) {
        if (in_bottom == run->lower) {
          exchange(top_, bottom_);
          exchange(top_flags_, bottom_flags_);
        } else {
          load_nodes<T>(n, run->lower, top_, top_flags_);
        }
        const bool one_row = run->upper == run->lower;
        if (!one_row) {
          load_nodes<T>(n, run->upper, bottom_, bottom_flags_);
        }
        in_bottom = one_row ? -1 : run->upper;
        const int64_t h = run->begin > first ? run->begin : first, h_end = run->end < last ? run->end : last;
        for (int64_t i = 0; i < a_.column_taps.run_count; ++i) {
          cell(n, *run, h, h_end, a_.column_taps.runs[i]);
        }
        if (run->end >= last) {
          break;
        }
      }
      begin += last - first;
    }
  }

 private:
  template <class P>
  static void exchange(P*& a, P*& b) {
    P* const before = a;
    a = b;
    b = before;
  }

  static Vec<A> smaller(Vec<A> a, Vec<A> b) { return a < b ? a : b; }
  static Vec<A> larger(Vec<A> a, Vec<A> b) { return a > b ? a : b; }
  static I splat_id(Id id) { return id - I{}; }
  static I count_up(Id from) {
    I ids{};
    for (int64_t lane = 0; lane < lanes; ++lane) {
      ids[lane] = from + static_cast<Id>(lane);
    }
    return ids;
  }

  // A row of logits as [column][class], classes past the last as low as can be; flags tell nodes that may overflow.
  template <class T>
  void load_nodes(int64_t n, int64_t row, A* nodes, A* flags) {
    if (a_.channels_last) {
      const T* const from = static_cast<const T*>(a_.logits) + (n * a_.rows + row) * a_.columns * a_.classes;
      for (int64_t w = 0; w < a_.columns; ++w) {
        A* const node = nodes + w * a_.pitch;
        for_each_vector<T>(a_.classes, [&](int64_t k, auto part) {
          store(node + k, load(from + w * a_.classes + k, part), part);
        });
        for (int64_t k = a_.classes; k < a_.pitch; ++k) {
          node[k] = -kLargest<A>;
        }
      }
    } else {
      const T* const from = static_cast<const T*>(a_.logits) + (n * a_.classes * a_.rows + row) * a_.columns;
      const int64_t plane = a_.rows * a_.columns;
      for (int64_t k = 0; k < a_.pitch; k += lanes) {
        for_each_vector<T>(a_.columns, [&](int64_t w, auto part) {
          Vec<A> tile[lanes];
          for (int64_t i = 0; i < lanes; ++i) {
            tile[i] = k + i < a_.classes ? load(from + (k + i) * plane + w, part) : splat(-kLargest<A>);
          }
          transpose<A>(tile);
          for (int64_t i = 0; i < lanes && w + i < a_.columns; ++i) {
            store(nodes + (w + i) * a_.pitch + k, tile[i]);
          }
        });
      }
    }
    for (int64_t w = 0; w < a_.columns; ++w) {
      I small = ~I{};
      for (int64_t k = 0; k < a_.pitch; k += lanes) {
        const Vec<A> value = load(nodes + w * a_.pitch + k);
        small &= (value <= kLargest<A>) & (value >= -kLargest<A>);
      }
      bool all = true;
      for (int64_t lane = 0; lane < lanes; ++lane) {
        all = all && small[lane] != 0;
      }
      flags[w] = all ? A{0} : A{1};
    }
  }

  // Rows [h, h_end) of the pixels between four nodes.
  void cell(int64_t n, const TapRun& rows, int64_t h, int64_t h_end, const TapRun& columns) {
    const bool one_row = rows.upper == rows.lower;
    const A* const bottom = one_row ? top_ : bottom_;
    const A* const bottom_flags = one_row ? top_flags_ : bottom_flags_;
    const A* const corners[4] = {top_ + columns.lower * a_.pitch, top_ + columns.upper * a_.pitch,
                                 bottom + columns.lower * a_.pitch, bottom + columns.upper * a_.pitch};
    const A flags = top_flags_[columns.lower] + top_flags_[columns.upper] + bottom_flags[columns.lower] +
                    bottom_flags[columns.upper];
    // Rows are parted between threads: what is decided here must not depend on how.
    if (flags != 0 || (rows.end - rows.begin) * (columns.end - columns.begin) < kFewPixels) {
      for (; h < h_end; ++h) {
        for (int64_t w = columns.begin; w < columns.end; ++w) {
          pixel(n, h, w, corners);
        }
      }
      return;
    }
    const int64_t count = find_candidates(corners);
    while (h < h_end) {
      if (h_end - h == 1) {
        pixels<1>(n, h, h_end, columns, count);
        h += 1;
      } else {
        pixels<kArgmaxRows>(n, h, h_end, columns, count);
        h += kArgmaxRows;
      }
    }
  }

  // One pixel, whatever its nodes: classes as lanes, each product by itself, so that Inf and NaN go where torch's go.
  void pixel(int64_t n, int64_t h, int64_t w, const A* const (&corners)[4]) {
    const Vec<A> down = splat(static_cast<A>(a_.row_taps.fraction[h])), right = splat(fraction_[w]);
    const Vec<A> up = 1 - down, left = 1 - right, infinity = splat(static_cast<A>(__builtin_inf()));
    Vec<A> best = -infinity;
    I label = count_up(0), id = label;
    for (int64_t k = 0; k < a_.pitch; k += lanes, id += static_cast<Id>(lanes)) {
      const Vec<A> above = fma(right, load(corners[1] + k), left * load(corners[0] + k));
      const Vec<A> below = fma(right, load(corners[3] + k), left * load(corners[2] + k));
      const Vec<A> value = id < static_cast<Id>(a_.classes) ? fma(down, below, up * above) : -infinity;
      const I taken = (value > best) | ((value != value) & (best == best));
      best = taken ? value : best;
      label = taken ? id : label;
      store(largest_ + k, value);
    }
    A winner = best[0];
    Id winner_id = label[0];
    for (int64_t lane = 1; lane < lanes; ++lane) {
      const A value = best[lane];
      const bool is_nan = value != value, winner_is_nan = winner != winner;
      const bool equal = value == winner || (is_nan && winner_is_nan);
      if (equal ? label[lane] < winner_id : (value > winner || (is_nan && !winner_is_nan))) {
        winner = value;
        winner_id = label[lane];
      }
    }
    const int64_t at = (n * a_.height + h) * a_.width + w;
    store_label(at, winner_id);
    if (a_.confidence != nullptr) {
      Vec<A> sums{};
      for (int64_t k = 0; k < a_.pitch; k += lanes) {
        sums += exp<A>(load(largest_ + k) - winner);
      }
      A sum = sums[0];
      for (int64_t lane = 1; lane < lanes; ++lane) {
        sum += sums[lane];
      }
      a_.confidence[at] = static_cast<float>(1 / sum);
    }
  }

  // The classes that may be the label somewhere in a cell, or whose exponential counts: numbers and nodes, packed.
  int64_t find_candidates(const A* const (&corners)[4]) {
    Vec<A> best_smallest = splat(-kLargest<A>);
    for (int64_t k = 0; k < a_.pitch; k += lanes) {
      const Vec<A> p = load(corners[0] + k), q = load(corners[1] + k), r = load(corners[2] + k), s = load(corners[3] + k);
      best_smallest = larger(best_smallest, smaller(smaller(p, q), smaller(r, s)));
      store(largest_ + k, larger(larger(p, q), larger(r, s)));
    }
    A threshold = best_smallest[0];
    for (int64_t lane = 1; lane < lanes; ++lane) {
      threshold = best_smallest[lane] > threshold ? best_smallest[lane] : threshold;
    }
    threshold -= a_.confidence != nullptr ? kNegligible : 0;
    int64_t count = 0;
    for (int64_t k = 0; k < a_.classes; ++k) {
      ids_[count] = static_cast<Id>(k);
      count += largest_[k] >= threshold;
    }
    for (int64_t corner = 0; corner < 4; ++corner) {
      for (int64_t c = 0; c < count; ++c) {
        nodes_[corner * a_.pitch + c] = corners[corner][ids_[c]];
      }
      for (int64_t c = count; c % lanes != 0; ++c) {
        nodes_[corner * a_.pitch + c] = 0;
      }
    }
    return count;
  }

  // Up to R rows from h on: pixels as lanes, candidate after candidate; along a row, values are a start and a step.
  template <int64_t R>
  void pixels(int64_t n, int64_t h, int64_t h_end, const TapRun& columns, int64_t count) {
    const int64_t pitch = a_.pitch, rows = h_end - h < R ? h_end - h : R;
    Vec<A> down[R];
    for (int64_t r = 0; r < R; ++r) {
      down[r] = splat(static_cast<A>(a_.row_taps.fraction[h + (r < rows ? r : 0)]));
    }
    for (int64_t c = 0; c < count; c += lanes) {
      const A* const node = nodes_ + c;
      const Vec<A> left = load(node), right = load(node + pitch);
      const Vec<A> left_step = load(node + 2 * pitch) - left, right_step = load(node + 3 * pitch) - right;
      for (int64_t r = 0; r < R; ++r) {
        const Vec<A> start = fma(down[r], left_step, left);
        store(start_ + r * pitch + c, start);
        store(step_ + r * pitch + c, fma(down[r], right_step, right) - start);
      }
    }
    for (int64_t w = columns.begin; w < columns.end; w += lanes) {
      const int64_t width = columns.end - w < lanes ? columns.end - w : lanes;
      const Vec<A> right = load(fraction_ + w);
      const A *const start = start_, *const step = step_;
      const Id* const ids = ids_;
      Vec<A> best[R];
      I label[R];
      for (int64_t r = 0; r < R; ++r) {
        best[r] = fma(right, splat(step[r * pitch]), splat(start[r * pitch]));
        label[r] = splat_id(ids[0]);
      }
      for (int64_t c = 1; c < count; ++c) {
        const I id = splat_id(ids[c]);
        for (int64_t r = 0; r < R; ++r) {
          const Vec<A> value = fma(right, splat(step[r * pitch + c]), splat(start[r * pitch + c]));
          const I taken = value > best[r];
          best[r] = taken ? value : best[r];
          label[r] = taken ? id : label[r];
        }
      }
      const int64_t at = (n * a_.height + h) * a_.width + w;
      for (int64_t r = 0; r < rows; ++r) {
        for (int64_t lane = 0; lane < width; ++lane) {
          store_label(at + r * a_.width + lane, label[r][lane]);
        }
      }
      if (a_.confidence == nullptr) {
        continue;
      }
      Vec<A> sum[R] = {};
      for (int64_t c = 0; c < count; ++c) {
        for (int64_t r = 0; r < R; ++r) {
          sum[r] += exp<A>(fma(right, splat(step[r * pitch + c]), splat(start[r * pitch + c])) - best[r]);
        }
      }
      for (int64_t r = 0; r < rows; ++r) {
        for (int64_t lane = 0; lane < width; ++lane) {
          a_.confidence[at + r * a_.width + lane] = static_cast<float>(1 / sum[r][lane]);
        }
      }
    }
  }

  void store_label(int64_t at, Id label) {
    switch (a_.label_bytes) {
      case 1:
        static_cast<uint8_t*>(a_.labels)[at] = static_cast<uint8_t>(label);
        break;
      case 4:
        static_cast<int32_t*>(a_.labels)[at] = static_cast<int32_t>(label);
        break;
      default:
        static_cast<int64_t*>(a_.labels)[at] = label;
    }
  }

  const UpsampleArgmax& a_;
  A *largest_, *nodes_, *start_, *step_;
  Id* ids_;
  A *top_, *bottom_;              // two rows of nodes, [column][class]
  A *top_flags_, *bottom_flags_;  // not 0 where a node holds NaN, Inf, or what is near to overflow
  A* fraction_;                   // of every column
};

}  // namespace

namespace PSPNET_FAST_CAPABILITY {

// Grid     rows of labels, in runs between two rows of nodes
// Tile     the two rows of nodes with classes side by side; then, cell by cell, the classes that may win are packed, and
//          evaluated with pixels as lanes. Cells of few pixels, or with NaN or Inf: pixel by pixel, all classes, as lanes
// Traffic  the logits read once (twice where threads meet), labels and confidences written once
void upsample_argmax_forward(const UpsampleArgmax& a, int64_t begin, int64_t end, void* scratch) {
  with_dtype(a.dtype, [&](auto zero) {
    using T = decltype(zero);
    Argmax<Accumulator<T>>(a, static_cast<Accumulator<T>*>(scratch)).template rows<T>(begin, end);
  });
}

}  // namespace PSPNET_FAST_CAPABILITY
}  // namespace pspnet_fast
