// The backward kernels of pyramid_project.
#pragma once

#include "cpu/pyramid_project_product.h"

namespace pspnet_fast {
namespace {

template <class A>
constexpr int64_t kStrip = kProjectStripBytes / static_cast<int64_t>(sizeof(A));

// Grid     blocks of reduced channels [begin, end)
// Tile     a vector's lanes of cells by as many channels: widened, kProjectBlock channels of all cells together; and
//          transposed
// Traffic  grad read once, grad_rows and grad_columns written once
template <class T>
void pack_grad(const PyramidProjectBackward& a, int64_t begin, int64_t end) {
  using A = Accumulator<T>;
  constexpr int64_t lanes = kLanes<T>;
  const int64_t first = begin * kProjectBlock, last = least(end * kProjectBlock, a.reduced);
  for_each_level(a, [&](const Level& level) {
    const int64_t cells = level.cells(), before = a.images * level.start;
    A* const rows = static_cast<A*>(a.grad_rows) + before * a.padded_reduced;
    A* const columns = static_cast<A*>(a.grad_columns) + before * a.reduced;
    for (int64_t q = 0; q < cells; q += lanes) {
      const int64_t count = least(lanes, cells - q);
      for (int64_t r = first; r < last; r += lanes) {
        const int64_t part = least(lanes, last - r);
        Vec<A> tile[lanes] = {};
        for (int64_t i = 0; i < count; ++i) {
          tile[i] = load(static_cast<const T*>(a.grad) + level.row(q + i) * a.reduced + r, part);
          store(rows + (r / kProjectBlock * cells + q + i) * kProjectBlock + r % kProjectBlock, tile[i], part);
        }
        transpose<A>(tile);
        for (int64_t i = 0; i < part; ++i) {
          store(columns + (r + i) * cells + q, tile[i], count);
        }
      }
    }
  });
}

// `width` elements from source, at most a strip, widened; zeros up to a strip.
template <class T>
void pack_strip(const T* source, int64_t width, Accumulator<T>* packed) {
  using A = Accumulator<T>;
  constexpr int64_t lanes = kLanes<T>;
  for (int64_t c = 0; c < kStrip<A>; c += lanes) {
    const int64_t left = width - c;
    store(packed + c, left >= lanes ? load(source + c) : load(source + c, left < 0 ? 0 : left));
  }
}

// Grid     strips of channels [begin, end)
// Tile     kProjectBlock rows of a strip of the weight, packed, times kProjectRows cells at a time; so strip after
//          strip while their sums fit L2, then the next rows. Meanwhile the next strip is fetched
// Traffic  the weights read once, d_pyramid written once
template <class T>
void d_pyramid(const PyramidProjectBackward& a, int64_t begin, int64_t end, Accumulator<T>* sums) {
  using A = Accumulator<T>;
  constexpr int64_t strip = kStrip<A>, panel = kTileVectors * kLanes<A>, line = 64 / sizeof(T);
  const int64_t row_bytes = a.channels * static_cast<int64_t>(sizeof(T));
  alignas(64) A packed[kProjectBlock * strip];
  for_each_level(a, [&](const Level& level) {
    const int64_t cells = level.cells(), group = kProjectSumsBytes / (cells * kProjectStripBytes);
    const T* const weight = static_cast<const T*>(a.weight[level.index]);
    const A* const grad = static_cast<const A*>(a.grad_rows) + a.images * level.start * a.padded_reduced;
    for (int64_t from = begin, to; from < end; from = to) {
      to = least(end, from + (group > 1 ? group : 1));
      const int64_t pitch = (to - from) * strip, first = from * strip, last = least(to * strip, a.channels);
      for (int64_t row = 0; row < a.reduced; row += kProjectBlock) {
        const int64_t depth = least(kProjectBlock, a.reduced - row);
        for (int64_t channel = first; channel < last; channel += strip) {
          const T* const rows = weight + row * a.channels;
          const T* next = rows + (channel + strip < last ? channel + strip : depth * a.channels + first);
          const T* const stop = next + strip;
          for (int64_t k = 0; k < depth; ++k) {
            pack_strip(rows + k * a.channels + channel, last - channel, packed + k * strip);
          }
          for (int64_t q = 0; q < cells; q += kProjectRows) {
            for (int64_t c = 0; c < strip; c += panel) {
              const Ahead ahead = next < stop ? Ahead{next, row_bytes} : Ahead{packed, 0};
              next += line;
              multiply<A, kTileVectors>(least(kProjectRows, cells - q), grad + row * cells + q * kProjectBlock,
                                        kProjectBlock, packed + c, strip, depth, row > 0,
                                        sums + q * pitch + channel - first + c, pitch, ahead);
            }
          }
        }
      }
      for (int64_t q = 0; q < cells; ++q) {
        T* const out = static_cast<T*>(a.d_pyramid) + level.row(q) * a.channels + first;
        const A* const result = sums + q * pitch;
        for_each_vector<T>(last - first, [&](int64_t c, auto part) { store(out + c, load(result + c), part); });
      }
    }
  });
}

// An aligned vector, written past the caches where the instruction set and the type have a way.
inline void stream(float* p, Vec<float> v) {
#if defined(PSPNET_FAST_AVX512)
  _mm512_stream_ps(p, (__m512)v);
#elif defined(PSPNET_FAST_AVX2)
  _mm256_stream_ps(p, (__m256)v);
#else
  store(p, v);
#endif
}

template <class T>
inline void stream(T* p, Vec<Accumulator<T>> v) {
  store(p, v);
}

// Streamed vectors are seen by other threads only after a fence.
inline void end_stream() {
#if defined(PSPNET_FAST_AVX512) || defined(PSPNET_FAST_AVX2)
  _mm_sfence();
#endif
}

// Grid     strips of channels [begin, end)
// Tile     a strip of a level's cells, packed, times kProjectRows reduced channels at a time
// Traffic  the pyramid read once, d_weight written once
template <class T>
void d_weight(const PyramidProjectBackward& a, int64_t begin, int64_t end, Accumulator<T>* packed) {
  using A = Accumulator<T>;
  constexpr int64_t lanes = kLanes<A>, panel = kTileVectors * lanes;
  alignas(64) A sums[kProjectRows * kStrip<A>];
  for_each_level(a, [&](const Level& level) {
    const int64_t cells = level.cells();
    const A* const grad = static_cast<const A*>(a.grad_columns) + a.images * level.start * a.reduced;
    T* const out = static_cast<T*>(a.d_weight) + level.index * a.reduced * a.channels;
    for (int64_t strip = begin; strip < end; ++strip) {
      const int64_t first = strip * kStrip<A>, width = least(kStrip<A>, a.channels - first);
      for (int64_t q = 0; q < cells; ++q) {
        pack_strip(static_cast<const T*>(a.pyramid) + level.row(q) * a.channels + first, width, packed + q * kStrip<A>);
      }
      for (int64_t row = 0; row < a.reduced; row += kProjectRows) {
        const int64_t rows = least(kProjectRows, a.reduced - row);
        for (int64_t q = 0; q < cells; q += kProjectBlock) {  // short sums, for they round less
          for (int64_t c = 0; c < kStrip<A>; c += panel) {
            multiply<A, kTileVectors>(rows, grad + row * cells + q, cells, packed + q * kStrip<A> + c, kStrip<A>,
                                      least(kProjectBlock, cells - q), q > 0, sums + c, kStrip<A>, Ahead{packed, 0});
          }
        }
        for (int64_t i = 0; i < rows; ++i) {
          T* const to = out + (row + i) * a.channels + first;
          const A* const from = sums + i * kStrip<A>;
          if (a.stream && width % lanes == 0) {
            for (int64_t c = 0; c < width; c += lanes) {
              stream(to + c, load(from + c));
            }
          } else {
            for_each_vector<T>(width, [&](int64_t c, auto part) { store(to + c, load(from + c), part); });
          }
        }
      }
    }
  });
  end_stream();
}

}  // namespace
}  // namespace pspnet_fast
