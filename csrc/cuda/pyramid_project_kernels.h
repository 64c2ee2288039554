// The kernels of pyramid_project: its three products over the tiles of pyramid_project_product.h. No torch.
//
//     product             m   n     depth   a               b               result
//     forward             r   row   c       W_k    along    p      along    out[row][r], or its parts over splits of c
//     pyramid gradient    c   row   r       W_k    across   g      along    dp[row][c]
//     weight gradient     c   r     row     p      across   g      across   dW_k[r][c]
//
// Rows are those of one level k, N * b_k^2 of them; m is the side of tensor cores that is 16 wide, and rows, which may
// be as few as one, are counted by 16 on the other. Weights are read once for every kSide rows of their level: at N = 1
// once.
#pragma once

#include "cuda/pyramid_project_product.h"

namespace pspnet_fast::cuda::project {

constexpr int kLevels = 16;  // of one launch; more levels are several launches
constexpr int kSumThreads = 128;

template <class T>
struct Level {
  const T* weight;
  Divisor cells;
  int start;   // its first cell in an image
  int rows;
  int number;  // among all levels, those of other launches too
};

template <class T>
struct Levels {
  Level<T> at[kLevels];
  int64_t channels, reduced, cells;  // cells: of all levels, in one image

  template <class Pointer>
  __device__ __forceinline__ LevelRows<Pointer> rows(const Level<T>& level, Pointer pyramid, int64_t columns) const {
    return {pyramid + level.start * columns, level.rows, level.cells, cells * columns, columns};
  }
  __device__ __forceinline__ MatrixRows<const T*> weight(const Level<T>& level) const {
    return {level.weight, static_cast<int>(reduced), channels};
  }
};

// The level of a block, when levels one after the other have a block for every kRows of their rows; `block` is then the
// block's number within its level.
template <int kRows, class T>
__device__ __forceinline__ const Level<T>& level_of(const Levels<T>& levels, int& block) {
  const Level<T>* level = levels.at;
  for (int blocks; block >= (blocks = (level->rows + kRows - 1) / kRows); ++level) {
    block -= blocks;
  }
  return *level;
}

struct Epilogue {
  const float* scale;  // or null
  const float* shift;  // or null
  bool relu;

  __device__ __forceinline__ float operator()(float y, int64_t channel) const {
    y = scale != nullptr ? y * scale[channel] : y;
    y = shift != nullptr ? y + shift[channel] : y;
    return relu && y < 0 ? 0 : y;  // NaN stays
  }
};

template <class T>
struct Forward {
  Levels<T> levels;
  const T* pyramid;
  T* out;
  float* parts;  // null: one split, and out is written
  int64_t part;  // elements of one of them
  Epilogue epilogue;
  int tiles_per_split;
  bool aligned_pyramid, aligned_weight, aligned_out, aligned_parts;
};

template <class T>
struct Backward {
  Levels<T> levels;
  const T *grad, *pyramid;
  T *d_pyramid, *d_weight;
  int row_tiles, c_blocks, r_blocks;
  bool aligned_grad, aligned_pyramid, aligned_weight, aligned_d_pyramid, aligned_d_weight;
};

// Grid: (tiles of kSide rows over all levels, blocks of R, splits of C).
// Tile: kSide r x kSide rows of sums; the split's channels walked by kDepth.
// Traffic: the weights once for every kSide rows of their level (through L2 after the first), N*S*C for every block of
// R; N*S*R written, or with splits as many in float32.
// Registers: 16 bits 114 (sm_80), 110 (sm_90); float32 162, 167; no spills.
template <class T>
__global__ void __launch_bounds__(kThreads, kResident)
    pyramid_project_forward_kernel(const __grid_constant__ Forward<T> a) {
  int tile = static_cast<int>(blockIdx.x);
  const Level<T>& level = level_of<kSide>(a.levels, tile);
  const int channels = static_cast<int>(a.levels.channels), reduced = static_cast<int>(a.levels.reduced);
  const int row = tile * kSide, r = static_cast<int>(blockIdx.y) * kSide, split = static_cast<int>(blockIdx.z);
  const int first = split * a.tiles_per_split, tiles = (channels + kDepth<T> - 1) / kDepth<T>;
  const auto weight = operand<T, true>(a.levels.weight(level), r, channels, a.aligned_weight);
  const auto cells = operand<T, true>(a.levels.rows(level, a.pyramid, channels), row, channels, a.aligned_pyramid);
  const float* const sums = multiply(weight, cells, first, min(a.tiles_per_split, tiles - first), level.rows - row,
                                     shared_memory<unsigned char>());
  if (a.parts != nullptr) {
    write<float>(sums, a.levels.rows(level, a.parts + split * a.part, reduced), row, r, reduced, a.aligned_parts,
                 [](float y, int) { return y; });
  } else {
    const int64_t channel = level.number * a.levels.reduced;
    write<T>(sums, a.levels.rows(level, a.out, reduced), row, r, reduced, a.aligned_out,
             [&](float y, int m) { return a.epilogue(y, channel + m); });
  }
}

// Grid: (rows of all levels, blocks of R).
// Tile: N reduced channels a thread; their parts are added first to last.
// Traffic: splits*N*S*R read in float32, N*S*R written.
// Registers: 32 (sm_80), 38 (sm_90), no spills.
template <class T, int N>
__global__ void __launch_bounds__(kSumThreads)
    pyramid_project_sum_kernel(const __grid_constant__ Forward<T> a, int splits) {
  int row = static_cast<int>(blockIdx.x);
  const Level<T>& level = level_of<1>(a.levels, row);
  const int reduced = static_cast<int>(a.levels.reduced);
  const int r = (static_cast<int>(blockIdx.y) * kSumThreads + static_cast<int>(threadIdx.x)) * N;
  if (r >= reduced) {
    return;
  }
  const float* from = a.levels.rows(level, static_cast<const float*>(a.parts), reduced)(row) + r;
  Vector<float, N> y = load<N>(from);
#pragma unroll 4
  for (int split = 1; split < splits; ++split) {
    const auto part = load<N>(from + split * a.part);
#pragma unroll
    for (int e = 0; e < N; ++e) {
      y.at[e] += part.at[e];
    }
  }
  const int64_t channel = level.number * a.levels.reduced + r;
  Vector<T, N> rounded;
#pragma unroll
  for (int e = 0; e < N; ++e) {
    rounded.at[e] = round_to<T>(a.epilogue(y.at[e], channel + e));
  }
  store(a.levels.rows(level, a.out, reduced)(row) + r, rounded);
}

// Both gradients in one launch, for the weight's writes what the pyramid's reads.
// Grid: row tiles x blocks of C of the pyramid's gradient, then blocks of C x blocks of R x levels of the weight's.
// Tile: kSide c x kSide rows of sums, R walked by kDepth; kSide c x kSide r, the level's rows walked by kDepth.
// Traffic: the weights as in the forward, N*S*R for every block of C, N*S*C written; N*S*C for every block of R, N*S*R
// for every block of C (through L2, both), levels*R*C written.
// Registers: 16 bits 112 (sm_80), 110 (sm_90); float32 166, 148; no spills.
template <class T>
__global__ void __launch_bounds__(kThreads, kResident)
    pyramid_project_backward_kernel(const __grid_constant__ Backward<T> a) {
  const int channels = static_cast<int>(a.levels.channels), reduced = static_cast<int>(a.levels.reduced);
  const int pyramid_blocks = a.row_tiles * a.c_blocks;
  int block = static_cast<int>(blockIdx.x);
  const auto as_it_is = [](float sum, int) { return sum; };
  if (block < pyramid_blocks) {
    int tile = block % a.row_tiles;
    const Level<T>& level = level_of<kSide>(a.levels, tile);
    const int row = tile * kSide, c = block / a.row_tiles * kSide;
    const auto weight = operand<T, false>(a.levels.weight(level), c, channels, a.aligned_weight);
    const auto grad = operand<T, true>(a.levels.rows(level, a.grad, reduced), row, reduced, a.aligned_grad);
    const float* const sums = multiply(weight, grad, 0, (reduced + kDepth<T> - 1) / kDepth<T>, level.rows - row,
                                       shared_memory<unsigned char>());
    write<T>(sums, a.levels.rows(level, a.d_pyramid, channels), row, c, channels, a.aligned_d_pyramid, as_it_is);
  } else {
    block -= pyramid_blocks;
    const int c = block % a.c_blocks * kSide, r = block / a.c_blocks % a.r_blocks * kSide;
    const Level<T>& level = a.levels.at[block / a.c_blocks / a.r_blocks];
    const auto cells = operand<T, false>(a.levels.rows(level, a.pyramid, channels), c, channels, a.aligned_pyramid);
    const auto grad = operand<T, false>(a.levels.rows(level, a.grad, reduced), r, reduced, a.aligned_grad);
    const float* const sums = multiply(cells, grad, 0, (level.rows + kDepth<T> - 1) / kDepth<T>, reduced - r,
                                       shared_memory<unsigned char>());
    const MatrixRows<T*> out{a.d_weight + level.number * a.levels.reduced * a.levels.channels, reduced, channels};
    write<T>(sums, out, r, c, channels, a.aligned_d_weight, as_it_is);
  }
}

}  // namespace pspnet_fast::cuda::project
