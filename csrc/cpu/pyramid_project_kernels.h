// The kernels of pyramid_project, compiled once for each instruction set (vec.h).
//
// Three products, one inner kernel: a tile of kProjectRows rows times a few vectors is held in registers and summed over
// `depth`, rows of the left operand read element by element, the right operand packed so that a step of depth is one
// run of vectors.
//   forward    y^T   = weight (R, C)   * cells^T (C, cells)     right: the cells, transposed
//   d_pyramid  dp    = grad (cells, R) * weight (R, C)          right: strips of the weight
//   d_weight   dw    = grad^T (R, cells) * cells (cells, C)     right: strips of the cells
// 16-bit operands are widened where they are packed. The order of every sum depends on the shapes alone.
#pragma once

#include "cpu/pyramid_project.h"
#include "cpu/vec.h"

namespace pspnet_fast {
namespace {

constexpr int kTileVectors = kVectorBytes == 64 ? 4 : 2;  // with kProjectRows: 24 sums of 32 registers, or 12 of 16
constexpr int64_t kDepth = 256;       // products summed from zero, before they join the rest: bounds the rounding error

template <class A>
constexpr int64_t kStrip = kProjectStripBytes / static_cast<int64_t>(sizeof(A));

constexpr int64_t least(int64_t a, int64_t b) {
  return a < b ? a : b;
}

// All cells of one level, image after image.
struct Level {
  int64_t index, start, area, images, all;  // `all`: cells of all levels in one image

  int64_t cells() const { return images * area; }
  // The row of a packed pyramid that holds the level's cell q.
  int64_t row(int64_t q) const { return q / area * all + start + q % area; }
};

template <class Body>
void for_each_level(const PyramidProject& a, Body body) {
  int64_t start = 0;
  for (int64_t k = 0; k < a.level_count; ++k) {
    const int64_t area = a.bins[k] * a.bins[k];
    body(Level{k, start, area, a.images, a.cells});
    start += area;
  }
}

// Memory to ask for while computing: at each step of depth the cache line at `next`, `step` bytes on each time.
struct Ahead {
  const void* next;
  int64_t step;
};

// out (rows x vectors, ldo apart) = sum over depth of left (lda apart) * right (ldr apart); `add`: to what out holds.
template <class A, int rows, int vectors>
void multiply(const A* left, int64_t lda, const A* right, int64_t ldr, int64_t depth, bool add, A* out, int64_t ldo,
              Ahead ahead) {
  constexpr int64_t lanes = kLanes<A>;
  Vec<A> sums[rows][vectors] = {};
  const char* next = static_cast<const char*>(ahead.next);
  for (int64_t k = 0; k < depth; ++k) {
    __builtin_prefetch(next, 0, 2);
    next += ahead.step;
    Vec<A> r[vectors];
    for (int v = 0; v < vectors; ++v) {
      r[v] = load(right + k * ldr + v * lanes);
    }
#pragma GCC unroll 8
    for (int i = 0; i < rows; ++i) {
      const Vec<A> l = splat(left[i * lda + k]);
#pragma GCC unroll 8
      for (int v = 0; v < vectors; ++v) {
        sums[i][v] = fma(l, r[v], sums[i][v]);
      }
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < rows; ++i) {
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) {
      A* const p = out + i * ldo + v * lanes;
      store(p, add ? load(p) + sums[i][v] : sums[i][v]);
    }
  }
}

template <class A, int vectors>
void multiply(int64_t rows, const A* left, int64_t lda, const A* right, int64_t ldr, int64_t depth, bool add, A* out,
              int64_t ldo, Ahead ahead) {
  static_assert(kProjectRows == 6);
  switch (rows) {
    case 1:
      return multiply<A, 1, vectors>(left, lda, right, ldr, depth, add, out, ldo, ahead);
    case 2:
      return multiply<A, 2, vectors>(left, lda, right, ldr, depth, add, out, ldo, ahead);
    case 3:
      return multiply<A, 3, vectors>(left, lda, right, ldr, depth, add, out, ldo, ahead);
    case 4:
      return multiply<A, 4, vectors>(left, lda, right, ldr, depth, add, out, ldo, ahead);
    case 5:
      return multiply<A, 5, vectors>(left, lda, right, ldr, depth, add, out, ldo, ahead);
    default:
      return multiply<A, 6, vectors>(left, lda, right, ldr, depth, add, out, ldo, ahead);
  }
}

// ---- forward --------------------------------------------------------------------------------------------------------

// Neighbouring cells of a level that one pass over the weight serves. Packed: channel after channel, `width` elements
// each, zero where there is no cell.
struct Panel {
  int64_t first, count, vectors, width, offset;
};

template <class A, class Body>
void for_each_panel(const PyramidProject& a, Body body) {
  int64_t offset = 0;
  for_each_level(a, [&](const Level& level) {
    constexpr int64_t lanes = kLanes<A>;
    const int64_t vectors = (level.cells() + lanes - 1) / lanes, panels = (vectors + kTileVectors - 1) / kTileVectors;
    for (int64_t p = 0; p < panels; ++p) {
      const int64_t begin = vectors * p / panels, end = vectors * (p + 1) / panels, first = begin * lanes;
      const Panel panel{first, least(end * lanes, level.cells()) - first, end - begin, (end - begin) * lanes, offset};
      body(level, panel);
      offset += panel.width * a.channels;
    }
  });
}

// Grid     blocks of channels [begin, end)
// Tile     a vector's lanes of cells by as many channels, transposed
// Traffic  the pyramid read once, packed written once
template <class T>
void pack(const PyramidProjectForward& a, int64_t begin, int64_t end) {
  using A = Accumulator<T>;
  constexpr int64_t lanes = kLanes<T>;
  const int64_t first = begin * kProjectBlock, last = least(end * kProjectBlock, a.channels);
  for_each_panel<A>(a, [&](const Level& level, const Panel& panel) {
    A* const packed = static_cast<A*>(a.packed) + panel.offset;
    for (int64_t j = 0; j < panel.width; j += lanes) {
      const T* cells[lanes];
      for (int64_t i = 0; i < lanes; ++i) {
        cells[i] = j + i < panel.count
                       ? static_cast<const T*>(a.pyramid) + level.row(panel.first + j + i) * a.channels
                       : nullptr;
      }
      for_each_vector<T>(last - first, [&](int64_t c, auto part) {
        Vec<A> tile[lanes];
        for (int64_t i = 0; i < lanes; ++i) {
          tile[i] = cells[i] ? load(cells[i] + first + c, part) : Vec<A>{};
        }
        transpose<A>(tile);
        for (int64_t i = 0; i < least(lanes, last - first - c); ++i) {
          store(packed + (first + c + i) * panel.width + j, tile[i]);
        }
      });
    }
  });
}

// Sums of `rows` reduced channels from `row` on for a panel's cells, to out.
template <class T>
void finish(const PyramidProjectForward& a, const Level& level, const Panel& panel, int64_t row, int64_t rows,
            const Accumulator<T>* sums) {
  using A = Accumulator<T>;
  constexpr int64_t lanes = kLanes<T>;
  const A* const scale = a.scale ? static_cast<const A*>(a.scale) + level.index * a.reduced : nullptr;
  const A* const shift = a.shift ? static_cast<const A*>(a.shift) + level.index * a.reduced : nullptr;
  for (int64_t j = 0; j < panel.count; j += lanes) {
    for (int64_t first = 0; first < rows; first += lanes) {
      const int64_t count = least(lanes, rows - first);
      Vec<A> tile[lanes] = {};
      for (int64_t i = 0; i < count; ++i) {
        const int64_t r = row + first + i;
        Vec<A> y = load(sums + (first + i) * panel.width + j);
        y = scale ? y * splat(scale[r]) : y;
        y = shift ? y + splat(shift[r]) : y;
        tile[i] = a.relu ? relu(y) : y;
      }
      transpose<A>(tile);
      for (int64_t i = 0; i < least(lanes, panel.count - j); ++i) {
        T* const out = static_cast<T*>(a.out) + level.row(panel.first + j + i) * a.reduced + row + first;
        store(out, tile[i], count);
      }
    }
  }
}

// Grid     tiles of kProjectRows rows of every level's weight [begin, end)
// Tile     those rows times a panel of cells, over all channels; meanwhile the next rows are fetched
// Traffic  every weight read once a panel (once where a level has at most a panel of cells), packed read once a tile
template <class T, int vectors>
void forward_panel(const PyramidProjectForward& a, const Level& level, const Panel& panel, int64_t begin, int64_t end) {
  using A = Accumulator<T>;
  constexpr bool wide = sizeof(T) == sizeof(A);
  const T* const weight = static_cast<const T*>(a.weight[level.index]);
  const T* const after = static_cast<const T*>(a.weight[least(level.index + 1, a.level_count - 1)]);
  const A* const packed = static_cast<const A*>(a.packed) + panel.offset;
  alignas(64) A sums[kProjectRows * vectors * kLanes<A>];
  alignas(64) A widened[wide ? 1 : kProjectRows * kDepth];
  for (int64_t tile = begin; tile < end; ++tile) {
    const int64_t row = tile * kProjectRows, rows = least(kProjectRows, a.reduced - row);
    const T* const left = weight + row * a.channels;
    const T* const next = tile + 1 < end ? left + rows * a.channels : after + begin * kProjectRows * a.channels;
    for (int64_t c = 0; c < a.channels; c += kDepth) {
      const int64_t depth = least(kDepth, a.channels - c);
      const Ahead ahead{next + c * rows, rows * static_cast<int64_t>(sizeof(T))};
      if constexpr (wide) {
        multiply<A, vectors>(rows, left + c, a.channels, packed + c * panel.width, panel.width, depth, c > 0, sums,
                             panel.width, ahead);
      } else {
        for (int64_t i = 0; i < rows; ++i) {
          for_each_vector<T>(depth, [&](int64_t k, auto part) {
            store(widened + i * kDepth + k, load(left + i * a.channels + c + k, part));
          });
        }
        multiply<A, vectors>(rows, widened, kDepth, packed + c * panel.width, panel.width, depth, c > 0, sums,
                             panel.width, ahead);
      }
    }
    finish<T>(a, level, panel, row, rows, sums);
  }
}

template <class T>
void forward(const PyramidProjectForward& a, int64_t begin, int64_t end) {
  for_each_panel<Accumulator<T>>(a, [&](const Level& level, const Panel& panel) {
    switch (panel.vectors) {
      case 1:
        return forward_panel<T, 1>(a, level, panel, begin, end);
      case 2:
        return forward_panel<T, 2>(a, level, panel, begin, end);
      case 3:
        return forward_panel<T, least(3, kTileVectors)>(a, level, panel, begin, end);
      default:
        return forward_panel<T, kTileVectors>(a, level, panel, begin, end);
    }
  });
}

// ---- backward -------------------------------------------------------------------------------------------------------

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
    A* const rows = static_cast<A*>(a.grad_rows) + before * a.padded_reduced();
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
// Tile     kProjectBlock rows of a strip of the weight, packed, times kProjectRows cells at a time; strip after strip of
//          as many as have their sums in L2, then on to the next rows. Meanwhile the next strip is fetched
// Traffic  the weights read once, d_pyramid written once
template <class T>
void d_pyramid(const PyramidProjectBackward& a, int64_t begin, int64_t end, Accumulator<T>* sums) {
  using A = Accumulator<T>;
  constexpr int64_t strip = kStrip<A>, panel = kTileVectors * kLanes<A>, line = 64 / sizeof(T);
  alignas(64) A packed[kProjectBlock * strip];
  for_each_level(a, [&](const Level& level) {
    const int64_t cells = level.cells(), group = kProjectSumsBytes / (cells * kProjectStripBytes);
    const T* const weight = static_cast<const T*>(a.weight[level.index]);
    const A* const grad = static_cast<const A*>(a.grad_rows) + a.images * level.start * a.padded_reduced();
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
              const Ahead ahead = next < stop ? Ahead{next, a.channels * static_cast<int64_t>(sizeof(T))} : Ahead{packed, 0};
              next += line;
              multiply<A, kTileVectors>(least(kProjectRows, cells - q), grad + row * cells + q * kProjectBlock, kProjectBlock,
                                        packed + c, strip, depth, row > 0, sums + q * pitch + channel - first + c, pitch,
                                        ahead);
            }
          }
        }
      }
      for (int64_t q = 0; q < cells; ++q) {
        T* const out = static_cast<T*>(a.d_pyramid) + level.row(q) * a.channels + first;
        for_each_vector<T>(last - first, [&](int64_t c, auto part) { store(out + c, load(sums + q * pitch + c), part); });
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
        for (int64_t q = 0; q < cells; q += kDepth) {
          for (int64_t c = 0; c < kStrip<A>; c += panel) {
            multiply<A, kTileVectors>(rows, grad + row * cells + q, cells, packed + q * kStrip<A> + c, kStrip<A>,
                                      least(kDepth, cells - q), q > 0, sums + c, kStrip<A>, Ahead{packed, 0});
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

namespace PSPNET_FAST_CAPABILITY {

void pyramid_project_pack(const PyramidProjectForward& a, int64_t begin, int64_t end) {
  with_dtype(a.dtype, [&](auto zero) { pack<decltype(zero)>(a, begin, end); });
}

void pyramid_project_forward(const PyramidProjectForward& a, int64_t begin, int64_t end) {
  with_dtype(a.dtype, [&](auto zero) { forward<decltype(zero)>(a, begin, end); });
}

void pyramid_project_pack_grad(const PyramidProjectBackward& a, int64_t begin, int64_t end) {
  with_dtype(a.dtype, [&](auto zero) { pack_grad<decltype(zero)>(a, begin, end); });
}

void pyramid_project_d_pyramid(const PyramidProjectBackward& a, int64_t begin, int64_t end, void* scratch) {
  with_dtype(a.dtype, [&](auto zero) {
    using T = decltype(zero);
    d_pyramid<T>(a, begin, end, static_cast<Accumulator<T>*>(scratch));
  });
}

void pyramid_project_d_weight(const PyramidProjectBackward& a, int64_t begin, int64_t end, void* scratch) {
  with_dtype(a.dtype, [&](auto zero) {
    using T = decltype(zero);
    d_weight<T>(a, begin, end, static_cast<Accumulator<T>*>(scratch));
  });
}

}  // namespace PSPNET_FAST_CAPABILITY
}  // namespace pspnet_fast
