// The kernels of pyramid_norm, compiled once for each instruction set (vec.h).
#pragma once

#include "cpu/pyramid_norm.h"
#include "cpu/vec.h"

namespace pspnet_fast {
namespace {

template <class Body>
void for_each_level(const PyramidNorm& a, Body body) {
  int64_t start = 0;
  for (int64_t k = 0; k < a.level_count; ++k) {
    const int64_t area = a.bins[k] * a.bins[k];
    body(k, start, area);
    start += area;
  }
}

// Adds up term(cell, sums) over the cells of a level, all images: runs of cells in four chains, then run by run. The
// order depends on the shape alone.
template <int count, class V, class Term>
void sum_cells(const PyramidNorm& a, int64_t start, int64_t area, V (&total)[count], Term term) {
  constexpr int64_t kRun = 64;
  constexpr int kChains = 4;
  for (int64_t n = 0; n < a.images; ++n) {
    const int64_t first = n * a.cells + start, last = first + area;
    for (int64_t cell = first; cell < last;) {
      const int64_t stop = cell + kRun < last ? cell + kRun : last;
      V sums[kChains][count] = {};
      for (; cell + kChains <= stop; cell += kChains) {
        for (int chain = 0; chain < kChains; ++chain) {
          term(cell + chain, sums[chain]);
        }
      }
      for (; cell < stop; ++cell) {
        term(cell, sums[0]);
      }
      for (int i = 0; i < count; ++i) {
        total[i] += (sums[0][i] + sums[1][i]) + (sums[2][i] + sums[3][i]);
      }
    }
  }
}

// body(offset of a vector of channels in a row, the same in a (levels, channels) tensor, lanes, start, area of the level).
template <class T, class Body>
void for_each_channel(const PyramidNorm& a, int64_t begin, int64_t end, Body body) {
  const int64_t first = begin * kNormBlock, last = end * kNormBlock < a.channels ? end * kNormBlock : a.channels;
  for_each_level(a, [&](int64_t k, int64_t start, int64_t area) {
    for_each_vector<T>(last - first, [&](int64_t offset, auto lanes) {
      body(first + offset, k * a.channels + first + offset, lanes, start, area);
    });
  });
}

// Grid     blocks of channels [begin, end)
// Tile     a level's vector of channels: the mean, then the squares about it. The sum of the differences, zero but for
//          the mean's rounding, corrects both
// Traffic  y read once from memory, once from cache
template <class T>
void statistics(const PyramidNorm& a, int64_t begin, int64_t end) {
  using A = Accumulator<T>;
  for_each_channel<T>(a, begin, end, [&](int64_t channel, int64_t at, auto lanes, int64_t start, int64_t area) {
    const T* const y = static_cast<const T*>(a.y) + channel;
    const Vec<A> count = splat(static_cast<A>(a.images * area));
    Vec<A> sum[1] = {};
    sum_cells(a, start, area, sum, [&](int64_t cell, Vec<A>* sums) { sums[0] += load(y + cell * a.channels, lanes); });
    const Vec<A> mean = sum[0] / count;
    Vec<A> about[2] = {};
    sum_cells(a, start, area, about, [&](int64_t cell, Vec<A>* sums) {
      const Vec<A> difference = load(y + cell * a.channels, lanes) - mean;
      sums[0] += difference;
      sums[1] = fma(difference, difference, sums[1]);
    });
    const Vec<A> rest = about[0] / count;
    store(static_cast<A*>(a.result) + at, mean + rest, lanes);
    store(static_cast<A*>(a.second_result) + at, about[1] / count - rest * rest, lanes);
  });
}

// The gradient at offset i, where a ReLU let it through.
template <class T, class Lanes>
inline Vec<Accumulator<T>> load_grad(const PyramidNorm& a, int64_t i, Lanes lanes) {
  const Vec<Accumulator<T>> grad = load(static_cast<const T*>(a.grad) + i, lanes), zero{};
  return a.relu ? (load(static_cast<const T*>(a.out) + i, lanes) > zero ? grad : zero) : grad;
}

// Grid     blocks of channels [begin, end)
// Tile     a level's vector of channels
// Traffic  grad, y and, with relu, out read once
template <class T>
void sums(const PyramidNorm& a, int64_t begin, int64_t end) {
  using A = Accumulator<T>;
  for_each_channel<T>(a, begin, end, [&](int64_t channel, int64_t at, auto lanes, int64_t start, int64_t area) {
    const T* const y = static_cast<const T*>(a.y);
    const Vec<A> mean = load(static_cast<const A*>(a.mean) + at, lanes);
    Vec<A> total[2] = {};
    sum_cells(a, start, area, total, [&](int64_t cell, Vec<A>* sums) {
      const int64_t i = cell * a.channels + channel;
      const Vec<A> g = load_grad<T>(a, i, lanes);
      sums[0] += g;
      sums[1] = fma(g, load(y + i, lanes) - mean, sums[1]);
    });
    store(static_cast<A*>(a.result) + at, total[0], lanes);
    store(static_cast<A*>(a.second_result) + at, total[1] * load(static_cast<const A*>(a.invstd) + at, lanes), lanes);
  });
}

// body(offset of a vector in the pyramid, the same in a (levels, channels) tensor, lanes) over cells [begin, end).
template <class T, class Body>
void for_each_cell(const PyramidNorm& a, int64_t begin, int64_t end, Body body) {
  for (int64_t n = begin / a.cells; n * a.cells < end; ++n) {
    for_each_level(a, [&](int64_t k, int64_t start, int64_t area) {
      const int64_t first = n * a.cells + start, last = first + area < end ? first + area : end;
      for (int64_t cell = first < begin ? begin : first; cell < last; ++cell) {
        for_each_vector<T>(a.channels, [&](int64_t offset, auto lanes) {
          body(cell * a.channels + offset, k * a.channels + offset, lanes);
        });
      }
    });
  }
}

// Grid     cells [begin, end), image after image
// Tile     a vector of channels
// Traffic  y read once, out written once
template <class T>
void forward(const PyramidNorm& a, int64_t begin, int64_t end) {
  using A = Accumulator<T>;
  for_each_cell<T>(a, begin, end, [&](int64_t i, int64_t at, auto lanes) {
    const auto per_channel = [&](const void* values) { return load(static_cast<const A*>(values) + at, lanes); };
    const Vec<A> difference = load(static_cast<const T*>(a.y) + i, lanes) - per_channel(a.mean);
    const Vec<A> out = fma(difference, per_channel(a.invstd) * per_channel(a.weight), per_channel(a.bias));
    store(static_cast<T*>(a.result) + i, a.relu ? relu(out) : out, lanes);
  });
}

// Grid     cells [begin, end), image after image
// Tile     a vector of channels
// Traffic  grad and, with relu, out read once; with the means of a level, y too; dy written once
template <class T>
void backward(const PyramidNorm& a, int64_t begin, int64_t end) {
  using A = Accumulator<T>;
  for_each_cell<T>(a, begin, end, [&](int64_t i, int64_t at, auto lanes) {
    const auto per_channel = [&](const void* values) { return load(static_cast<const A*>(values) + at, lanes); };
    Vec<A> g = load_grad<T>(a, i, lanes);
    const Vec<A> invstd = per_channel(a.invstd);
    if (a.mean_grad != nullptr) {
      const Vec<A> difference = load(static_cast<const T*>(a.y) + i, lanes) - per_channel(a.mean);
      g = g - per_channel(a.mean_grad) - difference * (invstd * per_channel(a.mean_grad_normal));
    }
    store(static_cast<T*>(a.result) + i, g * (invstd * per_channel(a.weight)), lanes);
  });
}

}  // namespace

namespace PSPNET_FAST_CAPABILITY {

void pyramid_norm_statistics(const PyramidNorm& a, int64_t begin, int64_t end) {
  with_dtype(a.dtype, [&](auto zero) { statistics<decltype(zero)>(a, begin, end); });
}

void pyramid_norm_forward(const PyramidNorm& a, int64_t begin, int64_t end) {
  with_dtype(a.dtype, [&](auto zero) { forward<decltype(zero)>(a, begin, end); });
}

void pyramid_norm_sums(const PyramidNorm& a, int64_t begin, int64_t end) {
  with_dtype(a.dtype, [&](auto zero) { sums<decltype(zero)>(a, begin, end); });
}

void pyramid_norm_backward(const PyramidNorm& a, int64_t begin, int64_t end) {
  with_dtype(a.dtype, [&](auto zero) { backward<decltype(zero)>(a, begin, end); });
}

}  // namespace PSPNET_FAST_CAPABILITY
}  // namespace pspnet_fast
