// The kernels of pyramid_pool, compiled once for each instruction set (vec.h).
#pragma once

#include "cpu/pyramid_pool.h"
#include "cpu/vec.h"

namespace pspnet_fast {
namespace {

// Sums of rows [top, bottom), columns [column, column + kVectors vectors); what lies beyond the row's end is noise.
template <int kVectors, class T>
inline void sum_rows(const PyramidPool& a, const T* plane, int64_t top, int64_t bottom, int64_t column,
                     Accumulator<T>* sums) {
  using A = Accumulator<T>;
  constexpr int64_t lanes = kLanes<T>;
  const int64_t room = a.height * a.width - column - kVectors * lanes;  // the last offset of a row read in whole vectors
  Vec<A> total[kVectors] = {};
  int64_t offset = top * a.width;
  const int64_t end = bottom * a.width;
  for (; offset < end && offset <= room; offset += a.width) {
    for (int v = 0; v < kVectors; ++v) {
      total[v] += load(plane + offset + column + v * lanes);
    }
  }
  for (; offset < end; offset += a.width) {
    for (int v = 0; v < kVectors; ++v) {
      const int64_t left = a.width - column - v * lanes;
      total[v] += load(plane + offset + column + v * lanes, left < lanes ? left : lanes);
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

// Grid     one block of channels of one image, `planes` <= a vector's lanes of them
// Tile     a plane's row segments summed row by row into vectors along W; then, for all planes at once, transposed to
//          vectors along C and summed to blocks (row segment x column segment); then blocks to cells
// Traffic  x read once, the cells written once
template <class T>
void forward_nchw(const PyramidPoolForward& a, int64_t n, int64_t channel, int64_t planes, Accumulator<T>* scratch) {
  using A = Accumulator<T>;
  constexpr int64_t lanes = kLanes<T>;
  const int64_t pitch = a.padded_width(), together = a.buffered_rows(), plane_size = a.height * a.width;
  A* const sums = scratch;                                 // [together][lanes][pitch]
  A* const columns = sums + together * lanes * pitch;      // [pitch][lanes]
  A* const blocks = columns + pitch * lanes;               // [row segments][column segments][lanes]
  const T* const x = static_cast<const T*>(a.x) + (n * a.channels + channel) * plane_size;

  for (int64_t first = 0; first < a.rows.segments; first += together) {
    const int64_t last = first + together < a.rows.segments ? first + together : a.rows.segments;
    for (int64_t plane = 0; plane < planes; ++plane) {
      for (int64_t r = first; r < last; ++r) {
        sum_rows(a, x + plane * plane_size, a.rows.edges[r], a.rows.edges[r + 1],
                 sums + ((r - first) * lanes + plane) * pitch);
      }
    }
    for (int64_t r = first; r < last; ++r) {
      const A* const rows = sums + (r - first) * lanes * pitch;
      for (int64_t w = 0; w < a.width; w += lanes) {
        Vec<A> tile[lanes];
        for (int64_t i = 0; i < lanes; ++i) {
          tile[i] = load(rows + (i < planes ? i : 0) * pitch + w);
        }
        transpose<A>(tile);
        for (int64_t i = 0; i < lanes; ++i) {
          store(columns + (w + i) * lanes, tile[i]);
        }
      }
      for (int64_t c = 0; c < a.columns.segments; ++c) {
        Vec<A> total{};
        for (int64_t w = a.columns.edges[c]; w < a.columns.edges[c + 1]; ++w) {
          total += load(columns + w * lanes);
        }
        store(blocks + (r * a.columns.segments + c) * lanes, total);
      }
    }
  }

  T* const out = static_cast<T*>(a.out) + n * a.cell_count * a.channels + channel;
  for (int64_t s = 0; s < a.cell_count; ++s) {
    const PoolCell& cell = a.cells[s];
    Vec<A> total{};
    for (int64_t r = cell.top; r < cell.bottom; ++r) {
      for (int64_t c = cell.left; c < cell.right; ++c) {
        total += load(blocks + (r * a.columns.segments + c) * lanes);
      }
    }
    store(out + s * a.channels, total / splat(static_cast<A>(cell.pixels)), planes);
  }
}

// sums[c] += the `pixels` pixels from x on, for `count` channels; at the first pixels of a block, = instead of +=.
template <int kPixels, class T>
inline void add_pixels(const T* x, int64_t pitch, int64_t count, bool first, Accumulator<T>* sums) {
  using A = Accumulator<T>;
  for_each_vector<T>(count, [&](int64_t c, auto lanes) {
    Vec<A> total = load(x + c, lanes);
    for (int i = 1; i < kPixels; ++i) {
      total += load(x + i * pitch + c, lanes);
    }
    store(sums + c, first ? total : load(sums + c, lanes) + total, lanes);
  });
}

// Grid     `count` channels of one image, at most kPoolChunk
// Tile     pixels in the order they stand in memory, four at a time, added to the sums of their block; then blocks to
//          cells
// Traffic  x read once, the cells written once
template <class T>
void forward_channels_last(const PyramidPoolForward& a, int64_t n, int64_t channel, int64_t count,
                           Accumulator<T>* blocks) {
  using A = Accumulator<T>;
  const T* const x = static_cast<const T*>(a.x) + n * a.height * a.width * a.channels + channel;
  for (int64_t r = 0; r < a.rows.segments; ++r) {
    for (int64_t h = a.rows.edges[r]; h < a.rows.edges[r + 1]; ++h) {
      for (int64_t c = 0; c < a.columns.segments; ++c) {
        A* const sums = blocks + (r * a.columns.segments + c) * count;
        bool first = h == a.rows.edges[r];
        int64_t w = a.columns.edges[c];
        for (; w + 4 <= a.columns.edges[c + 1]; w += 4, first = false) {
          add_pixels<4>(x + (h * a.width + w) * a.channels, a.channels, count, first, sums);
        }
        for (; w < a.columns.edges[c + 1]; ++w, first = false) {
          add_pixels<1>(x + (h * a.width + w) * a.channels, a.channels, count, first, sums);
        }
      }
    }
  }

  T* const out = static_cast<T*>(a.out) + n * a.cell_count * a.channels + channel;
  for (int64_t s = 0; s < a.cell_count; ++s) {
    const PoolCell& cell = a.cells[s];
    for_each_vector<T>(count, [&](int64_t i, auto lanes) {
      Vec<A> total{};
      for (int64_t r = cell.top; r < cell.bottom; ++r) {
        for (int64_t c = cell.left; c < cell.right; ++c) {
          total += load(blocks + (r * a.columns.segments + c) * count + i, lanes);
        }
      }
      store(out + s * a.channels + i, total / splat(static_cast<A>(cell.pixels)), lanes);
    });
  }
}

template <class T>
void forward(const PyramidPoolForward& a, int64_t begin, int64_t end, Accumulator<T>* scratch) {
  const int64_t most = a.channels_last ? kPoolChunk : kLanes<T>;
  while (begin < end) {
    const int64_t n = begin / a.blocks(), stop = (n + 1) * a.blocks() < end ? (n + 1) * a.blocks() : end;
    const int64_t last = (stop - n * a.blocks()) * kPoolBlock < a.channels ? (stop - n * a.blocks()) * kPoolBlock : a.channels;
    for (int64_t channel = (begin - n * a.blocks()) * kPoolBlock; channel < last; channel += most) {
      const int64_t count = channel + most < last ? most : last - channel;
      if (a.channels_last) {
        forward_channels_last<T>(a, n, channel, count, scratch);
      } else {
        forward_nchw<T>(a, n, channel, count, scratch);
      }
    }
    begin = stop;
  }
}

// Grid     one block of channels of one image, `planes` <= a vector's lanes of them
// Tile     every block's gradient as a vector along C, transposed to rows along W, each added to the rows of its segment
// Traffic  grad_input read once, out written once
template <class T>
void backward_nchw(const PyramidPoolBackward& a, int64_t n, int64_t channel, int64_t planes, Accumulator<T>* scratch) {
  using A = Accumulator<T>;
  constexpr int64_t lanes = kLanes<T>;
  const int64_t pitch = a.padded_width(), together = a.buffered_rows(), plane_size = a.height * a.width;
  A* const rows = scratch;                             // [together][lanes][pitch]
  A* const blocks = rows + together * lanes * pitch;   // [row segments][column segments][lanes]
  const T* const grad = static_cast<const T*>(a.grad) + n * a.cell_count * a.channels + channel;

  for (int64_t block = 0; block < a.rows.segments * a.columns.segments; ++block) {
    store(blocks + block * lanes, Vec<A>{});
  }
  for (int64_t s = 0; s < a.cell_count; ++s) {
    const PoolCell& cell = a.cells[s];
    const Vec<A> share = load(grad + s * a.channels, planes) / splat(static_cast<A>(cell.pixels));
    for (int64_t r = cell.top; r < cell.bottom; ++r) {
      for (int64_t c = cell.left; c < cell.right; ++c) {
        A* const block = blocks + (r * a.columns.segments + c) * lanes;
        store(block, load(block) + share);
      }
    }
  }

  const int64_t vectors = (a.width + lanes - 1) / lanes, room = plane_size - vectors * lanes;
  for (int64_t first = 0; first < a.rows.segments; first += together) {
    const int64_t last = first + together < a.rows.segments ? first + together : a.rows.segments;
    for (int64_t r = first; r < last; ++r) {
      int64_t c = 0;
      for (int64_t w = 0; w < a.width; w += lanes) {
        Vec<A> tile[lanes];
        for (int64_t i = 0; i < lanes; ++i) {
          while (c + 1 < a.columns.segments && a.columns.edges[c + 1] <= w + i) {
            ++c;
          }
          tile[i] = load(blocks + (r * a.columns.segments + c) * lanes);
        }
        transpose<A>(tile);
        for (int64_t i = 0; i < lanes; ++i) {
          store(rows + ((r - first) * lanes + i) * pitch + w, tile[i]);
        }
      }
    }
    for (int64_t plane = 0; plane < planes; ++plane) {
      const int64_t offset = (channel + plane) * plane_size;
      T* const out = static_cast<T*>(a.out) + n * a.channels * plane_size + offset;
      const T* const input = a.grad_input ? static_cast<const T*>(a.grad_input) + n * a.grad_input_image + offset : nullptr;
      for (int64_t r = first; r < last; ++r) {
        const A* const row = rows + ((r - first) * lanes + plane) * pitch;
        for (int64_t h = a.rows.edges[r]; h < a.rows.edges[r + 1]; ++h) {
          const auto add = [&](int64_t w, auto part) {
            const Vec<A> share = load(row + w);
            store(out + h * a.width + w, input ? load(input + h * a.width + w, part) + share : share, part);
          };
          // Rows are written in order: what spills over a row's end is overwritten by the next row.
          for_each_vector<T>(h * a.width <= room ? vectors * lanes : a.width, add);
        }
      }
    }
  }
}

// Grid     rows of pixels [begin, end), image after image
// Tile     for every column segment the gradient of its pixels, all channels; renewed where a row segment begins
// Traffic  grad_input read once, out written once
template <class T>
void backward_channels_last(const PyramidPoolBackward& a, int64_t begin, int64_t end, Accumulator<T>* shares) {
  using A = Accumulator<T>;
  int64_t n = begin / a.height, h = begin % a.height, r = 0;
  bool renew = true;
  for (int64_t row = begin; row < end; ++row) {
    while (a.rows.edges[r + 1] <= h) {
      ++r;
      renew = true;
    }
    if (renew) {
      for_each_vector<A>(a.columns.segments * a.channels, [&](int64_t i, auto lanes) { store(shares + i, Vec<A>{}, lanes); });
      for (int64_t s = 0; s < a.cell_count; ++s) {
        const PoolCell& cell = a.cells[s];
        if (r < cell.top || cell.bottom <= r) {
          continue;
        }
        const T* const grad = static_cast<const T*>(a.grad) + (n * a.cell_count + s) * a.channels;
        for_each_vector<T>(a.channels, [&](int64_t i, auto lanes) {
          const Vec<A> share = load(grad + i, lanes) / splat(static_cast<A>(cell.pixels));
          for (int64_t c = cell.left; c < cell.right; ++c) {
            A* const total = shares + c * a.channels + i;
            store(total, load(total, lanes) + share, lanes);
          }
        });
      }
      renew = false;
    }
    T* const out = static_cast<T*>(a.out) + row * a.width * a.channels;
    const T* const input =
        a.grad_input ? static_cast<const T*>(a.grad_input) + n * a.grad_input_image + h * a.width * a.grad_input_pixel : nullptr;
    for (int64_t c = 0; c < a.columns.segments; ++c) {
      const A* const share = shares + c * a.channels;
      for (int64_t w = a.columns.edges[c]; w < a.columns.edges[c + 1]; ++w) {
        for_each_vector<T>(a.channels, [&](int64_t i, auto lanes) {
          const Vec<A> value = load(share + i, lanes);
          store(out + w * a.channels + i, input ? load(input + w * a.grad_input_pixel + i, lanes) + value : value, lanes);
        });
      }
    }
    if (++h == a.height) {
      h = r = 0;
      ++n;
      renew = true;
    }
  }
}

template <class T>
void backward(const PyramidPoolBackward& a, int64_t begin, int64_t end, Accumulator<T>* scratch) {
  if (a.channels_last) {
    return backward_channels_last<T>(a, begin, end, scratch);
  }
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t n = unit / a.blocks(), first = unit % a.blocks() * kPoolBlock;
    const int64_t last = first + kPoolBlock < a.channels ? first + kPoolBlock : a.channels;
    for (int64_t channel = first; channel < last; channel += kLanes<T>) {
      const int64_t planes = channel + kLanes<T> < last ? kLanes<T> : last - channel;
      backward_nchw<T>(a, n, channel, planes, scratch);
    }
  }
}

}  // namespace

namespace PSPNET_FAST_CAPABILITY {

void pyramid_pool_forward(const PyramidPoolForward& a, int64_t begin, int64_t end, void* scratch) {
  with_dtype(a.dtype, [&](auto zero) {
    using T = decltype(zero);
    forward<T>(a, begin, end, static_cast<Accumulator<T>*>(scratch));
  });
}

void pyramid_pool_backward(const PyramidPoolBackward& a, int64_t begin, int64_t end, void* scratch) {
  with_dtype(a.dtype, [&](auto zero) {
    using T = decltype(zero);
    backward<T>(a, begin, end, static_cast<Accumulator<T>*>(scratch));
  });
}

}  // namespace PSPNET_FAST_CAPABILITY
}  // namespace pspnet_fast
