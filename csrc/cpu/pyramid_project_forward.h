// The forward kernels of pyramid_project: a level of many cells as a product with the packed cells, a vector along the
// cells; a level of few cells, which would leave most lanes idle, as dot products, a vector along the channels.
#pragma once

#include "cpu/pyramid_project_product.h"

namespace pspnet_fast {
namespace {

constexpr int64_t kFewCells = 8;
constexpr int kDotRows = kVectorBytes == 64 ? 6 : 3, kDotCells = 4;  // sums held in registers

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
    if (level.cells() <= kFewCells) {
      return;
    }
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

// Lane i: the sum of the lanes of rows[i].
template <class A>
Vec<A> sum_each(Vec<A> (&rows)[kLanes<A>]) {
  transpose<A>(rows);
  for (int stage = kLanes<A> / 2; stage > 0; stage /= 2) {
    for (int i = 0; i < stage; ++i) {
      rows[i] += rows[i + stage];
    }
  }
  return rows[0];
}

// Grid     rows [row, row + kDotRows) of a level's weight, `count` of them there, times `cells` cells from `first` on
// Tile     the same, as vectors along the channels; meanwhile the rows after the tile are fetched
// Traffic  the rows read once, the cells once a tile
template <class T, int cells>
void dot(const PyramidProjectForward& a, const Level& level, int64_t first, int64_t row, int64_t count) {
  using A = Accumulator<T>;
  constexpr int64_t lanes = kLanes<T>, products = kDotRows * cells;
  const T* w[kDotRows];
  const T* p[cells];
  for (int i = 0; i < kDotRows; ++i) {
    w[i] = static_cast<const T*>(a.weight[level.index]) + (row + least(i, count - 1)) * a.channels;
  }
  for (int j = 0; j < cells; ++j) {
    p[j] = static_cast<const T*>(a.pyramid) + level.row(first + j) * a.channels;
  }
  Vec<A> sums[products] = {};
  for_each_vector<T>(a.channels, [&](int64_t c, auto part) {
    Vec<A> l[kDotRows];
#pragma GCC unroll 8
    for (int i = 0; i < kDotRows; ++i) {
      __builtin_prefetch(w[i] + kProjectRows * a.channels + c, 0, 2);
      l[i] = load(w[i] + c, part);
    }
#pragma GCC unroll 8
    for (int j = 0; j < cells; ++j) {
      const Vec<A> r = load(p[j] + c, part);
#pragma GCC unroll 8
      for (int i = 0; i < kDotRows; ++i) {
        sums[j * kDotRows + i] = fma(l[i], r, sums[j * kDotRows + i]);
      }
    }
  });
  alignas(64) A dots[products + lanes];
  for (int64_t d = 0; d < products; d += lanes) {
    Vec<A> tile[lanes];
    for (int64_t i = 0; i < lanes; ++i) {
      tile[i] = d + i < products ? sums[d + i] : Vec<A>{};
    }
    store(dots + d, sum_each<A>(tile));
  }
  for (int j = 0; j < cells; ++j) {
    T* const out = static_cast<T*>(a.out) + level.row(first + j) * a.reduced + row;
    for_each_vector<T>(count, [&](int64_t i, auto part) {
      const int64_t at = level.index * a.reduced + row + i;
      Vec<A> y = load(dots + j * kDotRows + i, part);
      y = a.scale ? y * load(static_cast<const A*>(a.scale) + at, part) : y;
      y = a.shift ? y + load(static_cast<const A*>(a.shift) + at, part) : y;
      store(out + i, a.relu ? relu(y) : y, part);
    });
  }
}

template <class T>
void forward_few(const PyramidProjectForward& a, const Level& level, int64_t begin, int64_t end) {
  for (int64_t row = begin * kProjectRows; row < least(end * kProjectRows, a.reduced); row += kDotRows) {
    const int64_t count = least(kDotRows, a.reduced - row);
    for (int64_t q = 0; q < level.cells(); q += kDotCells) {
      switch (level.cells() - q) {
        case 1:
          dot<T, 1>(a, level, q, row, count);
          break;
        case 2:
          dot<T, 2>(a, level, q, row, count);
          break;
        case 3:
          dot<T, 3>(a, level, q, row, count);
          break;
        default:
          dot<T, 4>(a, level, q, row, count);
      }
    }
  }
}

template <class T>
void forward(const PyramidProjectForward& a, int64_t begin, int64_t end) {
  for_each_level(a, [&](const Level& level) {
    if (level.cells() <= kFewCells) {
      forward_few<T>(a, level, begin, end);
    }
  });
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

}  // namespace
}  // namespace pspnet_fast
