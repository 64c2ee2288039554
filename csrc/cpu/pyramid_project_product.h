// The inner kernel of pyramid_project's three products: a tile of kProjectRows rows times a few vectors is held in
// registers and summed over `depth`, the left operand read element by element along its rows, the right operand packed
// so that a step of depth is one run of vectors.
//   forward    y^T = weight (R, C)   * cells^T (C, cells)     right: the cells, transposed
//   d_pyramid  dp  = grad (cells, R) * weight (R, C)          right: strips of the weight
//   d_weight   dw  = grad^T (R, cells) * cells (cells, C)     right: strips of the cells
// 16-bit operands are widened where they are packed. The order of every sum depends on the shapes alone.
#pragma once

#include "cpu/pyramid_project.h"
#include "cpu/vec.h"

namespace pspnet_fast {
namespace {

constexpr int kTileVectors = kVectorBytes == 64 ? 4 : 2;  // with kProjectRows: 24 sums of 32 registers, or 12 of 16
constexpr int64_t kDepth = 256;  // products summed from zero, before they join the rest: bounds the rounding error

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

}  // namespace
}  // namespace pspnet_fast
