// The kernels of pyramid_pool, compiled once for each instruction set (vec.h).
#pragma once

#include "cpu/planes.h"
#include "cpu/pyramid_pool.h"

namespace pspnet_fast {
namespace {

// Sums of rows [top, bottom), columns [column, column + kVectors vectors); what lies beyond the row's end is noise.
template <int kVectors, class T>
inline void sum_rows(const PyramidPool& a, const T* plane, int64_t top, int64_t bottom, int64_t column,
                     Accumulator<T>* sums) {
  constexpr int64_t lanes = kLanes<T>;
  const int64_t end = bottom * a.width, room = a.height * a.width - column - kVectors * lanes;
  Vec<Accumulator<T>> total[kVectors] = {};
  int64_t row = top * a.width;
  for (; row < end && row <= room; row += a.width) {
    for (int v = 0; v < kVectors; ++v) {
      total[v] += load(plane + row + column + v * lanes);
    }
  }
  for (; row < end; row += a.width) {  // whole vectors would leave the plane
    for (int v = 0; v < kVectors; ++v) {
      const int64_t left = a.width - column - v * lanes;
      total[v] += load(plane + row + column + v * lanes, left < lanes ? left : lanes);
    }
  }
  for (int v = 0; v < kVectors; ++v) {
    store(sums + column + v * lanes, total[v]);
  }
}

template <class T>
inline void sum_rows(const PyramidPool& a, const T* plane, int64_t top, int64_t bottom, Accumulator<T>* sums) {
  constexpr int64_t lanes = kLanes<T>;
  int64_t column = 0;
  for (; column + 3 * lanes < a.width; column += 4 * lanes) {
    sum_rows<4>(a, plane, top, bottom, column, sums);
  }
  for (; column < a.width; column += lanes) {
    sum_rows<1>(a, plane, top, bottom, column, sums);
  }
}

// Cells from blocks (row segment x column segment), which hold `pitch` channels each.
template <class T>
inline void blocks_to_cells(const PyramidPoolForward& a, const Accumulator<T>* blocks, int64_t pitch, int64_t n,
                            int64_t channel, int64_t count) {
  using A = Accumulator<T>;
  T* const out = static_cast<T*>(a.out) + n * a.cell_count * a.channels + channel;
  for (int64_t s = 0; s < a.cell_count; ++s) {
    const PoolCell& cell = a.cells[s];
    for_each_vector<T>(count, [&](int64_t i, auto lanes) {
      Vec<A> total{};
      for (int64_t r = cell.top; r < cell.bottom; ++r) {
        Vec<A> row{};  // a sum of sums rounds less than one long sum
        for (int64_t c = cell.left; c < cell.right; ++c) {
          row += load(blocks + (r * a.columns.segments + c) * pitch + i, lanes);
        }
        total += row;
      }
      store(out + s * a.channels + i, total / splat(static_cast<A>(cell.pixels)), lanes);
    });
  }
}

// Grid     one block of channels of one image, `planes` <= a vector's lanes of them
// Tile     plane by plane, each row segment summed to one row and the plane copied while it is in the cache; then, for
//          all planes at once, the rows transposed to vectors along C and these summed to blocks; then blocks to cells
// Traffic  x read once, the cells written once, and the copy where one is asked for
template <class T>
void forward_nchw(const PyramidPoolForward& a, int64_t n, int64_t channel, int64_t planes, Accumulator<T>* scratch) {
  using A = Accumulator<T>;
  constexpr int64_t lanes = kLanes<T>;
  A* const sums = scratch;                                       // [row segments][lanes][pitch]
  A* const columns = sums + a.rows.segments * lanes * a.pitch;   // [pitch][lanes]
  A* const blocks = columns + a.pitch * lanes;                   // [row segments][column segments][lanes]
  const T* const x = static_cast<const T*>(a.x) + (n * a.channels + channel) * a.height * a.width;
  for (int64_t plane = 0; plane < planes; ++plane) {
    for (int64_t r = 0; r < a.rows.segments; ++r) {
      sum_rows(a, x + plane * a.height * a.width, a.rows.edges[r], a.rows.edges[r + 1],
               sums + (r * lanes + plane) * a.pitch);
    }
    if (a.copy != nullptr) {
      const int64_t size = a.height * a.width;
      __builtin_memcpy(static_cast<T*>(a.copy) + (n * a.copy_channels + channel + plane) * size, x + plane * size,
                       static_cast<size_t>(size) * sizeof(T));
    }
  }
  for (int64_t r = 0; r < a.rows.segments; ++r) {
    rows_to_columns(sums + r * lanes * a.pitch, a.pitch, planes, a.width, columns);
    for (int64_t c = 0; c < a.columns.segments; ++c) {
      Vec<A> total{};
      for (int64_t w = a.columns.edges[c]; w < a.columns.edges[c + 1]; ++w) {
        total += load(columns + w * lanes);
      }
      store(blocks + (r * a.columns.segments + c) * lanes, total);
    }
  }
  blocks_to_cells<T>(a, blocks, lanes, n, channel, planes);
}

// sums[c] += kPixels pixels from x on, for `count` channels.
template <int kPixels, class T>
inline void add_pixels(const T* x, int64_t pixel, int64_t count, Accumulator<T>* sums) {
  for_each_vector<T>(count, [&](int64_t c, auto lanes) {
    auto total = load(x + c, lanes);
    for (int i = 1; i < kPixels; ++i) {
      total += load(x + i * pixel + c, lanes);
    }
    store(sums + c, load(sums + c, lanes) + total, lanes);
  });
}

// Grid     `count` <= kPoolChunk channels of one image
// Tile     pixels in the order they stand in memory, four at a time, added to their block, and copied row by row; then
//          blocks to cells
// Traffic  x read once, the cells written once, and the copy where one is asked for
template <class T>
void forward_channels_last(const PyramidPoolForward& a, int64_t n, int64_t channel, int64_t count,
                           Accumulator<T>* blocks) {
  using A = Accumulator<T>;
  const T* const x = static_cast<const T*>(a.x) + n * a.height * a.width * a.channels + channel;
  for (int64_t r = 0; r < a.rows.segments; ++r) {
    A* const row_blocks = blocks + r * a.columns.segments * count;
    clear(row_blocks, a.columns.segments * count);
    for (int64_t h = a.rows.edges[r]; h < a.rows.edges[r + 1]; ++h) {
      const T* const row = x + h * a.width * a.channels;
      for (int64_t c = 0; c < a.columns.segments; ++c) {
        int64_t w = a.columns.edges[c];
        for (; w + 4 <= a.columns.edges[c + 1]; w += 4) {
          add_pixels<4>(row + w * a.channels, a.channels, count, row_blocks + c * count);
        }
        for (; w < a.columns.edges[c + 1]; ++w) {
          add_pixels<1>(row + w * a.channels, a.channels, count, row_blocks + c * count);
        }
      }
      if (a.copy != nullptr) {
        T* const copy = static_cast<T*>(a.copy) + (n * a.height + h) * a.width * a.copy_channels + channel;
        for (int64_t w = 0; w < a.width; ++w) {
          __builtin_memcpy(copy + w * a.copy_channels, row + w * a.channels, static_cast<size_t>(count) * sizeof(T));
        }
      }
    }
  }
  blocks_to_cells<T>(a, blocks, count, n, channel, count);
}

// shares[c] = what the cells give each pixel of column segment c in row segment r, for `count` channels; `pitch` apart.
template <class T>
inline void row_shares(const PyramidPoolBackward& a, int64_t n, int64_t r, int64_t channel, int64_t count,
                       Accumulator<T>* shares, int64_t pitch) {
  using A = Accumulator<T>;
  for (int64_t c = 0; c < a.columns.segments; ++c) {
    clear(shares + c * pitch, count);
  }
  for (int64_t s = 0; s < a.cell_count; ++s) {
    const PoolCell& cell = a.cells[s];
    if (r < cell.top || cell.bottom <= r) {
      continue;
    }
    const T* const grad = static_cast<const T*>(a.grad) + (n * a.cell_count + s) * a.channels + channel;
    for_each_vector<T>(count, [&](int64_t i, auto lanes) {
      const Vec<A> share = load(grad + i, lanes) / splat(static_cast<A>(cell.pixels));
      for (int64_t c = cell.left; c < cell.right; ++c) {
        A* const total = shares + c * pitch + i;
        store(total, load(total, lanes) + share, lanes);
      }
    });
  }
}

// Grid     one block of channels of one image, `planes` <= a vector's lanes of them
// Tile     for every row segment the shares as vectors along C, transposed to rows along W; then, plane by plane, added
//          to the rows of the segment
// Traffic  grad_input read once, out written once
template <class T>
void backward_nchw(const PyramidPoolBackward& a, int64_t n, int64_t channel, int64_t planes, Accumulator<T>* scratch) {
  using A = Accumulator<T>;
  constexpr int64_t lanes = kLanes<T>;
  A* const rows = scratch;                                      // [row segments][lanes][pitch]
  A* const shares = rows + a.rows.segments * lanes * a.pitch;   // [column segments][lanes]
  for (int64_t r = 0; r < a.rows.segments; ++r) {
    row_shares<T>(a, n, r, channel, planes, shares, lanes);
    int64_t c = 0;
    const auto share = [&](int64_t w) {
      c += w == a.columns.edges[c + 1];
      return load(shares + c * lanes);
    };
    columns_to_rows(share, a.width, rows + r * lanes * a.pitch, a.pitch);
  }

  const int64_t plane_size = a.height * a.width, whole = (a.width + lanes - 1) / lanes * lanes;
  for (int64_t plane = 0; plane < planes; ++plane) {
    const int64_t offset = (channel + plane) * plane_size;
    T* const out = static_cast<T*>(a.out) + n * a.channels * plane_size + offset;
    const T* input = static_cast<const T*>(a.grad_input);
    input = input ? input + n * a.grad_input_image + offset : nullptr;
    for (int64_t r = 0; r < a.rows.segments; ++r) {
      const A* const row = rows + (r * lanes + plane) * a.pitch;
      for (int64_t p = a.rows.edges[r] * a.width; p < a.rows.edges[r + 1] * a.width; p += a.width) {
        // Rows are written in order: what spills over a row's end is overwritten by the next row.
        for_each_vector<T>(p + whole <= plane_size ? whole : a.width, [&](int64_t w, auto part) {
          const Vec<A> value = load(row + w);
          store(out + p + w, input ? load(input + p + w, part) + value : value, part);
        });
      }
    }
  }
}

// Grid     rows of pixels [begin, end), image after image
// Tile     the shares of a row segment, all channels; added pixel by pixel to the rows of the segment
// Traffic  grad_input read once, out written once
template <class T>
void backward_channels_last(const PyramidPoolBackward& a, int64_t begin, int64_t end, Accumulator<T>* shares) {
  while (begin < end) {
    const int64_t n = begin / a.height, top = begin % a.height;
    int64_t r = 0;
    while (a.rows.edges[r + 1] <= top) {
      ++r;
    }
    row_shares<T>(a, n, r, 0, a.channels, shares, a.channels);
    const int64_t bottom = top + end - begin < a.rows.edges[r + 1] ? top + end - begin : a.rows.edges[r + 1];
    for (int64_t h = top; h < bottom; ++h) {
      T* const out = static_cast<T*>(a.out) + (n * a.height + h) * a.width * a.channels;
      const T* input = static_cast<const T*>(a.grad_input);
      input = input ? input + n * a.grad_input_image + h * a.width * a.grad_input_pixel : nullptr;
      for (int64_t c = 0; c < a.columns.segments; ++c) {
        for (int64_t w = a.columns.edges[c]; w < a.columns.edges[c + 1]; ++w) {
          const T* const pixel = input ? input + w * a.grad_input_pixel : nullptr;
          for_each_vector<T>(a.channels, [&](int64_t i, auto lanes) {
            const auto value = load(shares + c * a.channels + i, lanes);
            store(out + w * a.channels + i, pixel ? load(pixel + i, lanes) + value : value, lanes);
          });
        }
      }
    }
    begin += bottom - top;
  }
}

}  // namespace

namespace PSPNET_FAST_CAPABILITY {

void pyramid_pool_forward(const PyramidPoolForward& a, int64_t begin, int64_t end, void* scratch) {
  with_dtype(a.dtype, [&](auto zero) {
    using T = decltype(zero);
    const auto memory = static_cast<Accumulator<T>*>(scratch);
    for_each_stretch(begin, end, a.channels, a.channels_last ? kPoolChunk : kLanes<T>,
                     [&](int64_t n, int64_t channel, int64_t count) {
                       a.channels_last ? forward_channels_last<T>(a, n, channel, count, memory)
                                       : forward_nchw<T>(a, n, channel, count, memory);
                     });
  });
}

void pyramid_pool_backward(const PyramidPoolBackward& a, int64_t begin, int64_t end, void* scratch) {
  with_dtype(a.dtype, [&](auto zero) {
    using T = decltype(zero);
    const auto memory = static_cast<Accumulator<T>*>(scratch);
    if (a.channels_last) {
      backward_channels_last<T>(a, begin, end, memory);
    } else {
      for_each_stretch(begin, end, a.channels, kLanes<T>, [&](int64_t n, int64_t channel, int64_t planes) {
        backward_nchw<T>(a, n, channel, planes, memory);
      });
    }
  });
}

}  // namespace PSPNET_FAST_CAPABILITY
}  // namespace pspnet_fast
