// One block's tile of a matrix product, for the kernels of pyramid_project. No torch.
//
//     out[n][m] = sum over k of  b[n][k] a[m][k]          m, n: kSide of each; k: the depth, kDepth at a time
//
// a and b may each lie in memory along the depth ([m][k]: rows are the product's, columns its depth) or across it
// ([k][m]). They come into shared memory as they lie, a ring of kStages tiles of both, and are read there as they are
// needed: 16 bits by ldmatrix, transposed where they lie across, float32 by vectors of 4 in either direction. Every row
// of a tile ends in 16 bytes of padding, so that 8 rows, read 16 bytes each, are in 32 different banks.
//
// What lies outside of a or b is zero in shared memory, so that a tail of the depth adds nothing; sums of rows that lie
// outside are not written.
//
// Past 300 lines: the two ways to sum a tile, on tensor cores and on the vector units, read the same tiles.
#pragma once

#include "cuda/device.h"

namespace pspnet_fast::cuda::project {

constexpr int kThreads = 128;
constexpr int kSide = 64;
constexpr int kStages = 4;
template <class T>
constexpr int kDepth = 128 / static_cast<int>(sizeof(T));

// A tile in shared memory.
template <class T, bool kAlong>
struct Shape {
  static constexpr int kRows = kAlong ? kSide : kDepth<T>;
  static constexpr int kColumns = kAlong ? kDepth<T> : kSide;
  static constexpr int kStride = kColumns + kVector<T>;
};

constexpr int kTileBytes = kSide * (128 + kAccessBytes);  // the largest shape's
constexpr int kSumsStride = kSide + 4;                    // of the finished sums, as float32 in the ring's place
constexpr int kSharedBytes = kStages * 2 * kTileBytes;
static_assert(kSide * kSumsStride * sizeof(float) <= kSharedBytes);
constexpr int kResident = 3;  // blocks in the shared memory of a multiprocessor of compute capability 9.0

// The rows of a dense matrix, and of one level of a packed pyramid (N, S, ...), where they lie apart in the batch: by
// their number, null outside.
template <class Pointer>
struct MatrixRows {
  Pointer first;
  int count;
  int64_t stride;

  __device__ __forceinline__ Pointer operator()(int row) const {
    return row < count ? first + row * stride : nullptr;
  }
};

template <class Pointer>
struct LevelRows {
  Pointer first;
  int count;
  Divisor cells;  // of the level, in one image
  int64_t image, stride;

  __device__ __forceinline__ Pointer operator()(int row) const {
    if (row >= count) {
      return nullptr;
    }
    const int n = cells.quotient(row);
    return first + n * image + (row - n * static_cast<int>(cells.divisor)) * stride;
  }
};

// a or b of a product: this thread's vectors of a tile, which are kThreads apart.
template <class T, bool kAlong, class Rows>
class Operand {
 public:
  using Tile = Shape<T, kAlong>;

  // The block's rows of the product begin at `first`; the matrix has so many columns, and aligned rows or not.
  __device__ __forceinline__ Operand(const Rows& rows, int first, int columns, bool aligned)
      : rows_(rows), first_(first), columns_(columns), aligned_(aligned) {
    if constexpr (kAlong) {
#pragma unroll
      for (int i = 0; i < kPerThread; ++i) {
        row_[i] = rows(first + row_of(i));
      }
    }
  }

  __device__ __forceinline__ void fill(T* tile, int depth) const {
    const int in_row = static_cast<int>(threadIdx.x) % kInRow * kVector<T>;
    const int first_row = kAlong ? first_ : depth, column = (kAlong ? depth : first_) + in_row;
    T* const to = tile + row_of(0) * Tile::kStride + in_row;
    if (aligned_) {
#pragma unroll
      for (int i = 0; i < kPerThread; ++i) {
        const T* const row = kAlong ? row_[i] : rows_(first_row + row_of(i));
        const bool inside = row != nullptr && column < columns_;
        copy_async_or_zero(to + i * kRowsApart * Tile::kStride, inside ? row + column : nullptr, inside);
      }
    } else {
#pragma unroll 1
      for (int i = 0; i < kPerThread; ++i) {
        const T* const row = rows_(first_row + row_of(i));
        Vector<T, kVector<T>> value;
#pragma unroll
        for (int e = 0; e < kVector<T>; ++e) {
          value.at[e] = row != nullptr && column + e < columns_ ? row[column + e] : round_to<T>(0);
        }
        store(to + i * kRowsApart * Tile::kStride, value);
      }
    }
  }

 private:
  static constexpr int kInRow = Tile::kColumns / kVector<T>;
  static constexpr int kRowsApart = kThreads / kInRow;
  static constexpr int kPerThread = Tile::kRows / kRowsApart;
  static_assert(kThreads % kInRow == 0 && Tile::kRows % kRowsApart == 0);

  static __device__ __forceinline__ int row_of(int i) {
    return static_cast<int>(threadIdx.x) / kInRow + i * kRowsApart;
  }

  Rows rows_;
  int first_, columns_;
  bool aligned_;
  const T* row_[kPerThread];  // along the depth a thread's rows stay the same
};

template <class T, bool kAlong, class Rows>
__device__ __forceinline__ Operand<T, kAlong, Rows> operand(const Rows& rows, int first, int columns, bool aligned) {
  return {rows, first, columns, aligned};
}

// Sums of 16-bit elements on tensor cores: four warps as 2 x 2, each 32 x 32 sums as 2 x 4 products of 16 x 8. A tile's
// fragments are loaded one step of 16 ahead of their use.
template <class T, bool kAlongA, bool kAlongB>
class TensorSums {
 public:
  __device__ __forceinline__ TensorSums() {
#pragma unroll
    for (int i = 0; i < 2 * 4 * 4; ++i) {
      d_[i / 16][i / 4 % 4][i % 4] = 0;
    }
  }

  // Columns from `columns` on are not needed; they are left out by 16.
  __device__ __forceinline__ void add(const T* a, const T* b, int columns) {
    if (first_n() + 16 < columns) {
      add<2>(a, b);
    } else if (first_n() < columns) {
      add<1>(a, b);
    }
  }

  // body(m, n, sum) for this thread's sums.
  template <class Body>
  __device__ __forceinline__ void each(Body body) const {
    const int group = lane() / 4, pair = lane() % 4;
#pragma unroll
    for (int i = 0; i < 2 * 4 * 4; ++i) {
      const int part = i / 16, j = i / 4 % 4, e = i % 4;
      body(first_m() + 16 * part + 8 * (e / 2) + group, first_n() + 8 * j + 2 * pair + e % 2, d_[part][j][e]);
    }
  }

 private:
  struct Fragments {
    uint32_t a[2][4], b[2][4];  // b: of 8 columns in two registers, of 16 in four
  };

  // The first kPairs times 16 of the warp's columns.
  template <int kPairs>
  __device__ __forceinline__ void add(const T* a, const T* b) {
    Fragments step[2];
    read<kPairs>(step[0], a, b, 0);
#pragma unroll
    for (int k = 0; k < kDepth<T>; k += 16) {
      if (k + 16 < kDepth<T>) {
        read<kPairs>(step[(k / 16 + 1) % 2], a, b, k + 16);
      }
      const Fragments& now = step[k / 16 % 2];
#pragma unroll
      for (int j = 0; j < 2 * kPairs; ++j) {
        const uint32_t b_fragment[2] = {now.b[j / 2][j % 2 * 2], now.b[j / 2][j % 2 * 2 + 1]};
        multiply_add<T>(d_[0][j], now.a[0], b_fragment);
        multiply_add<T>(d_[1][j], now.a[1], b_fragment);
      }
    }
  }

  static __device__ __forceinline__ int lane() { return static_cast<int>(threadIdx.x) % kWarp; }
  static __device__ __forceinline__ int first_m() { return static_cast<int>(threadIdx.x) / kWarp % 2 * 32; }
  static __device__ __forceinline__ int first_n() { return static_cast<int>(threadIdx.x) / kWarp / 2 * 32; }

  // Four 8 x 8 matrices, 2 along the side and 2 along the depth; `side` and `depth` choose this lane's of them.
  template <bool kAlong>
  static __device__ __forceinline__ void read_four(uint32_t (&to)[4], const T* tile, int first, int k, int side,
                                                   int depth) {
    const int row = lane() % 8, s = first + 8 * side, d = k + 8 * depth;
    constexpr int kStride = Shape<T, kAlong>::kStride;
    load_matrices<!kAlong>(to, tile + (kAlong ? (s + row) * kStride + d : (d + row) * kStride + s));
  }

  template <int kPairs>
  static __device__ __forceinline__ void read(Fragments& to, const T* a, const T* b, int k) {
    const int low = lane() / 8 % 2, high = lane() / 16;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      read_four<kAlongA>(to.a[i], a, first_m() + 16 * i, k, low, high);
    }
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      read_four<kAlongB>(to.b[i], b, first_n() + 16 * i, k, high, low);
    }
  }

  float d_[2][4][4];
};

// Sums of float32 on the vector units, in full precision: 8 x 16 threads with 8 x 4 sums each, kDepth at a time in a
// run of its own, for short sums round less. Of 4 steps of the depth a thread reads 12 vectors and makes 128
// multiplications. A thread's 8 (4) are 8 (16) apart where the operand lies along the depth, so that 8 lanes read 8
// rows in a row; across it they are vectors.
template <bool kAlongA, bool kAlongB>
class VectorSums {
 public:
  __device__ __forceinline__ VectorSums() {
#pragma unroll
    for (int i = 0; i < 8 * 4; ++i) {
      sum_[i / 4][i % 4] = 0;
    }
  }

  // Columns from `columns` on are not needed; they are left out by 16, where b lies along the depth.
  __device__ __forceinline__ void add(const float* a, const float* b, int columns) {
    float run[8][4] = {};
#pragma unroll 2
    for (int k = 0; k < kDepth<float>; k += 4) {
      float x[8][4], y[4][4];
      read<kAlongA, 8, 8>(x, a, thread_m(), k);
      read<kAlongB, 4, 16>(y, b, thread_n(), k);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        if (!kAlongB || 16 * j < columns) {
#pragma unroll
          for (int i = 0; i < 8 * 4; ++i) {
            run[i % 8][j] = fmaf(x[i % 8][i / 8], y[j][i / 8], run[i % 8][j]);
          }
        }
      }
    }
#pragma unroll
    for (int i = 0; i < 8 * 4; ++i) {
      sum_[i / 4][i % 4] += run[i / 4][i % 4];
    }
  }

  // body(m, n, sum) for this thread's sums.
  template <class Body>
  __device__ __forceinline__ void each(Body body) const {
#pragma unroll
    for (int i = 0; i < 8 * 4; ++i) {
      body(place<kAlongA, 8>(thread_m(), i / 4), place<kAlongB, 16>(thread_n(), i % 4), sum_[i / 4][i % 4]);
    }
  }

 private:
  static __device__ __forceinline__ int thread_m() { return static_cast<int>(threadIdx.x) % 8; }
  static __device__ __forceinline__ int thread_n() { return static_cast<int>(threadIdx.x) / 8; }

  // Which of the side's kSide a thread's i-th is, of so many threads.
  template <bool kAlong, int kCount>
  static __device__ __forceinline__ int place(int thread, int i) {
    return kAlong ? thread + kCount * i : 4 * (thread + kCount * (i / 4)) + i % 4;
  }

  template <bool kAlong, int kOwn, int kCount>
  static __device__ __forceinline__ void read(float (&to)[kOwn][4], const float* tile, int thread, int k) {
    constexpr int kStride = Shape<float, kAlong>::kStride;
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      const int step = i % 4, vector = i / 4 * 4;
      const auto four = load<4>(tile + (kAlong ? place<true, kCount>(thread, i) * kStride + k
                                               : (k + step) * kStride + place<false, kCount>(thread, vector)));
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        (kAlong ? to[i][e] : to[vector + e][step]) = four.at[e];
      }
    }
  }

  float sum_[8][4];
};

template <class T, bool kAlongA, bool kAlongB>
using Sums =
    std::conditional_t<std::is_same_v<T, float>, VectorSums<kAlongA, kAlongB>, TensorSums<T, kAlongA, kAlongB>>;

// The block's sums over `tiles` tiles of the depth from `first_tile` on, in `memory` as [n][m], kSumsStride apart. The
// whole ring is requested before the first tile is used; a stage is filled again once everyone has left it, at the next
// barrier.
template <class T, bool kAlongA, bool kAlongB, class RowsA, class RowsB>
__device__ __forceinline__ const float* multiply(const Operand<T, kAlongA, RowsA>& a,
                                                 const Operand<T, kAlongB, RowsB>& b, int first_tile, int tiles,
                                                 int columns, unsigned char* memory) {
  const auto stage = [memory](int tile) { return reinterpret_cast<T*>(memory + tile % kStages * 2 * kTileBytes); };
  constexpr int kSecond = kTileBytes / static_cast<int>(sizeof(T));
  const auto fill = [&](int tile) {
    if (tile < tiles) {
      a.fill(stage(tile), (first_tile + tile) * kDepth<T>);
      b.fill(stage(tile) + kSecond, (first_tile + tile) * kDepth<T>);
    }
    copy_async_commit();
  };
  for (int tile = 0; tile < kStages; ++tile) {
    fill(tile);
  }
  Sums<T, kAlongA, kAlongB> sums;
  for (int tile = 0; tile < tiles; ++tile) {
    copy_async_wait<kStages - 2>();
    __syncthreads();
    if (tile > 0) {
      fill(tile - 1 + kStages);
    }
    sums.add(stage(tile), stage(tile) + kSecond, columns);
  }
  copy_async_wait<0>();
  __syncthreads();
  float* const finished = reinterpret_cast<float*>(memory);
  sums.each([finished](int m, int n, float sum) { finished[n * kSumsStride + m] = sum; });
  __syncthreads();
  return finished;
}

// Writes finish(sum, m) of the block's sums, 16 bytes at a time where rows are aligned.
template <class Out, class Rows, class Finish>
__device__ __forceinline__ void write(const float* sums, const Rows& rows, int first_row, int first_column, int columns,
                                      bool aligned, Finish finish) {
  constexpr int kInRow = kSide / kVector<Out>;
  for (int i = static_cast<int>(threadIdx.x); i < kSide * kInRow; i += kThreads) {
    Out* const row = rows(first_row + i / kInRow);
    const int column = first_column + i % kInRow * kVector<Out>;
    if (row == nullptr) {
      return;  // and so is all that follows
    }
    const float* const sum = sums + i / kInRow * kSumsStride + i % kInRow * kVector<Out>;
    if (aligned && column < columns) {
      Vector<Out, kVector<Out>> value;
#pragma unroll
      for (int e = 0; e < kVector<Out>; ++e) {
        value.at[e] = round_to<Out>(finish(sum[e], column + e));
      }
      store(row + column, value);
    } else {
#pragma unroll
      for (int e = 0; e < kVector<Out>; ++e) {
        if (column + e < columns) {
          row[column + e] = round_to<Out>(finish(sum[e], column + e));
        }
      }
    }
  }
}

}  // namespace pspnet_fast::cuda::project
