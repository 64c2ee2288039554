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

// A vector of accumulators in double: in sums over a level's cells float would lose digits that plain PyTorch keeps.
template <class A>
struct Doubles {
  static constexpr int parts = sizeof(double) / sizeof(A);
  typedef A Part __attribute__((vector_size(kVectorBytes / parts)));
  Vec<double> part[parts];
};

template <class A>
inline Doubles<A> widened(Vec<A> v) {
  typename Doubles<A>::Part part[Doubles<A>::parts];
  std::memcpy(part, &v, sizeof(v));
  Doubles<A> wide;
  for (int i = 0; i < Doubles<A>::parts; ++i) {
    wide.part[i] = __builtin_convertvector(part[i], Vec<double>);
  }
  return wide;
}

template <class A>
inline Vec<A> rounded(const Doubles<A>& wide) {
  typename Doubles<A>::Part part[Doubles<A>::parts];
  for (int i = 0; i < Doubles<A>::parts; ++i) {
    part[i] = __builtin_convertvector(wide.part[i], typename Doubles<A>::Part);
  }
  Vec<A> v;
  std::memcpy(&v, part, sizeof(v));
  return v;
}

template <class A>
inline Doubles<A> operator-(Doubles<A> a, const Doubles<A>& b) {
  for (int i = 0; i < Doubles<A>::parts; ++i) {
    a.part[i] -= b.part[i];
  }
  return a;
}

template <class A>
inline Doubles<A> operator*(Doubles<A> a, const Doubles<A>& b) {
  for (int i = 0; i < Doubles<A>::parts; ++i) {
    a.part[i] *= b.part[i];
  }
  return a;
}

template <class A>
inline Doubles<A> operator/(Doubles<A> a, double b) {
  for (int i = 0; i < Doubles<A>::parts; ++i) {
    a.part[i] /= splat(b);
  }
  return a;
}

template <class A>
inline void add_product(Doubles<A>& sum, const Doubles<A>& a, const Doubles<A>& b) {
  for (int i = 0; i < Doubles<A>::parts; ++i) {
    sum.part[i] = fma(a.part[i], b.part[i], sum.part[i]);
  }
}

template <class A>
inline void add(Doubles<A>& sum, const Doubles<A>& a) {
  for (int i = 0; i < Doubles<A>::parts; ++i) {
    sum.part[i] += a.part[i];
  }
}

// body(cell) for the cells of a level, image after image: the order of every sum.
template <class Body>
void for_each_cell_of(const PyramidNorm& a, int64_t start, int64_t area, Body body) {
  for (int64_t n = 0; n < a.images; ++n) {
    for (int64_t cell = n * a.cells + start; cell < n * a.cells + start + area; ++cell) {
      body(cell);
    }
  }
}

// body(offset of a vector of channels in a cell, the same in a (levels, channels) tensor, lanes, the level's start, its
// area) over blocks of channels [begin, end).
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
// Tile     a level's vector of channels: the mean, then the squares about it
// Traffic  y read once from memory, once from cache
template <class T>
void statistics(const PyramidNorm& a, int64_t begin, int64_t end) {
  using A = Accumulator<T>;
  for_each_channel<T>(a, begin, end, [&](int64_t channel, int64_t at, auto lanes, int64_t start, int64_t area) {
    const T* const y = static_cast<const T*>(a.y) + channel;
    const auto count = static_cast<double>(a.images * area);
    Doubles<A> sum{}, squares{};
    for_each_cell_of(a, start, area, [&](int64_t cell) { add(sum, widened<A>(load(y + cell * a.channels, lanes))); });
    const Doubles<A> mean = sum / count;
    for_each_cell_of(a, start, area, [&](int64_t cell) {
      const Doubles<A> difference = widened<A>(load(y + cell * a.channels, lanes)) - mean;
      add_product(squares, difference, difference);
    });
    store(static_cast<A*>(a.result) + at, rounded(mean), lanes);
    store(static_cast<A*>(a.second_result) + at, rounded(squares / count), lanes);
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
    const T* const y = static_cast<const T*>(a.y) + channel;
    const Doubles<A> mean = widened<A>(load(static_cast<const A*>(a.mean) + at, lanes));
    const Doubles<A> invstd = widened<A>(load(static_cast<const A*>(a.invstd) + at, lanes));
    Doubles<A> sum{}, products{};
    for_each_cell_of(a, start, area, [&](int64_t cell) {
      const Doubles<A> g = widened<A>(load_grad<T>(a, cell * a.channels + channel, lanes));
      add(sum, g);
      add_product(products, g, widened<A>(load(y + cell * a.channels, lanes)) - mean);
    });
    store(static_cast<A*>(a.result) + at, rounded(sum), lanes);
    store(static_cast<A*>(a.second_result) + at, rounded(products * invstd), lanes);
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
